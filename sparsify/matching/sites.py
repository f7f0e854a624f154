"""The records that the matcher makes: what is at a place in the graph, never what to do about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx

from sparsify.masks.predicate import Leaf, MaskPredicate, QueryStart

Size = int | sympy.Expr
Phase = Literal["prefill", "chunk", "decode"]


@dataclass(frozen=True)
class KeyBias:
    """scale · node is added to the scores. node: float, broadcastable to [batch, query_heads, 1, key_len]; flat: [batch · query_heads, 1,
    key_len]. reader: the node that adds it, while the site is described. on_hidden: scores that the mask hides get it, too."""

    node: fx.Node
    scale: float = 1.0
    flat: bool = False
    reader: fx.Node | None = None
    on_hidden: bool = True


@dataclass(frozen=True)
class AttentionSite:
    """One attention in a Dynamo graph.

    name: layer path from `nn_module_stack`, such as `model.layers.3.self_attn`: for reports and rules, never as proof.
    layer: the last integer in that path.
    output: the node whose value is the attention's output, [batch, query_heads, query_len, v_head_dim]: the node a pass replaces.
    query: [batch, query_heads, query_len, qk_head_dim]; key, value: [batch, kv_heads, key_len, head_dim], *before* any repeat
        over the GQA group. Query head h reads KV head h // (query_heads // kv_heads).
    mask_node: the graph's own mask, None without one and where there are several. mask: what it was proved to say.
    dtype: what attention computes in; under autocast query, key and value may be float32 still, and are converted first.
    scale: float, or the node that holds it. softcap: c of c·tanh(s/c), 0 without. dropout: probability.
    empty_rows: what a row that sees no key holds, as `sparsify.ops.attention` says; "impossible" where every row was proved to see one.
        lowest: the finite number that hides, where it is "mean".
    output_stride_order: "bhqd" when the replaced value is contiguous as [batch, heads, query, dim], "bqhd" when it is the
        transpose of a contiguous [batch, query, heads, dim], else "other".
    near_miss: why a site that looks like attention cannot be described further; every pass refuses with it.
    """

    name: str
    layer: int | None
    index: int
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask_node: fx.Node | None
    mask: MaskPredicate
    batch: Size
    query_heads: Size
    kv_heads: Size
    query_len: Size
    key_len: Size
    qk_head_dim: Size
    v_head_dim: Size
    scale: float | fx.Node
    softcap: float
    dropout: float
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    output_stride_order: Literal["bhqd", "bqhd", "other"]
    source: Literal["sdpa", "eager"] = "sdpa"
    sink_logits: fx.Node | None = None  # [query_heads], one extra logit per head in the softmax's denominator
    alibi_slopes: fx.Node | None = None  # [query_heads] or [batch, query_heads], float: adds slope · key position
    key_bias: tuple[KeyBias, ...] = ()  # what else is added to the scores, the same for every query row
    empty_rows: Literal["impossible", "zero", "mean", "nan"] = "zero"
    lowest: float = 0.0
    near_miss: str = ""
    covered: tuple[fx.Node, ...] = field(default=(), repr=False)  # nodes that only compute this attention, output included

    def mapped(self, mapping: dict[fx.Node, fx.Node]) -> AttentionSite:
        """The same site in a copy of its graph; `mapping` sends each node to its copy."""
        moved = {f.name: _mapped(getattr(self, f.name), mapping) for f in dataclasses.fields(self)}
        return AttentionSite(**moved)

    @property
    def phase(self) -> Phase:
        """decode: one query row; prefill: as many rows as keys, starting at key 0; chunk: anything between."""
        if self.query_len == 1:
            return "decode"
        if self.query_len == self.key_len and self.mask.query_start.bottom_right:
            return "prefill"
        return "chunk"


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension, computed in float32 whatever the input's dtype.

    kind: "none"; "layer" (F.layer_norm); "rms": weight · cast(x̂); "rms_fp32": cast(weight · x̂); "rms_offset": cast((1 + weight) · x̂),
        where x̂ = x · rsqrt(mean(x²) + eps) and cast rounds to the input's dtype.
    """

    kind: Literal["none", "layer", "rms", "rms_fp32", "rms_offset"] = "none"
    weight: fx.Node | None = None  # [hidden]
    bias: fx.Node | None = None  # [hidden], "layer" only
    eps: float = 0.0


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward block of a Dynamo graph with its norm and its residual sum: output = sum(residuals) + scale · ffn(input).

    name: module path of the block, such as `model.layers.3.mlp`: for reports and rules, never as proof. layer: the last integer in it.
    index, count: this block's place among the `count` feed-forward blocks of the graph, near misses included.
    output: the residual sum, the node a pass replaces. residuals: its other terms, in order; all of output's shape and dtype.
    input: what `norm` reads, or the block's input without a norm of its own.
    layout: "split" (gate and up apart), "gate_up" or "up_gate" (both in `up`, in that order), "plain" (no gate).
    up, gate: [intermediate, hidden] weights ([2 · intermediate, hidden] when fused); down: [hidden, intermediate]; all transposed
        when `transposed`. activation: applied to the gate, or to up without one.
    positions: int64 node, [1 or batch, query_len] or [query_len]; cached: a node whose dimension 2 is the number of keys; None where
        the graph shows neither.
    near_miss: why a block that looks like this cannot be described further; every pass refuses with it.
    """

    name: str
    layer: int | None
    index: int
    count: int
    output: fx.Node
    residuals: tuple[fx.Node, ...] = ()
    input: fx.Node | None = None
    up: fx.Node | None = None
    gate: fx.Node | None = None
    down: fx.Node | None = None
    up_bias: fx.Node | None = None
    gate_bias: fx.Node | None = None
    down_bias: fx.Node | None = None
    layout: Literal["split", "gate_up", "up_gate", "plain"] = "plain"
    transposed: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    norm: Norm = Norm()
    post_norm: Norm = Norm()
    scale: float = 1.0
    rows: Size = 0
    query_len: Size = 0
    hidden: Size = 0
    intermediate: Size = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    needs_grad: bool = False
    positions: fx.Node | None = None
    cached: fx.Node | None = None
    output_stride_order: Literal["bhqd"] = "bhqd"
    near_miss: str = ""
    covered: tuple[fx.Node, ...] = field(default=(), repr=False)

    def mapped(self, mapping: dict[fx.Node, fx.Node]) -> FeedForwardSite:
        """The same site in a copy of its graph; `mapping` sends each node to its copy."""
        moved = {f.name: _mapped(getattr(self, f.name), mapping) for f in dataclasses.fields(self)}
        return FeedForwardSite(**moved)

    @property
    def phase(self) -> Phase:
        """decode: one query row per sequence; else prefill."""
        return "decode" if self.query_len == 1 else "prefill"

    @property
    def weight_bytes(self) -> Size:
        """Bytes of the block's weights, what a decode step streams from memory."""
        matrices = 2 if self.layout == "plain" else 3
        return matrices * self.hidden * self.intermediate * self.dtype.itemsize


def _mapped(value: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return mapping[value]
    if isinstance(value, tuple):
        return tuple(_mapped(v, mapping) for v in value)
    if isinstance(value, Leaf | QueryStart | MaskPredicate | Norm | KeyBias):
        return dataclasses.replace(value, **{f.name: _mapped(getattr(value, f.name), mapping) for f in dataclasses.fields(value)})
    return value

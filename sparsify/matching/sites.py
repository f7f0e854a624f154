"""The records that the matcher makes: what is at a place in the graph, never what to do about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import sympy
import torch
from torch import fx

from sparsify.costs import seconds
from sparsify.costs.device import Device
from sparsify.costs.sizes import FeedForwardSizes, Size
from sparsify.masks.predicate import MaskKind, MaskPredicate
from sparsify.matching.base import Phase, Site, SiteKind, SiteOverKeys, StrideOrder, stand_in
from sparsify.matching.layouts import IN_ORDER, Layouts, length_dim
from sparsify.ops.pages import Pages

Source = Literal["sdpa", "eager"]
EmptyRowsKind = Literal["impossible", "zero", "nan", "mean", "fused"]
NormKind = Literal["none", "layer", "rms", "rms_fp32", "rms_offset"]
Layout = Literal["split", "gate_up", "up_gate", "plain"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class ScoreBias:
    """scale · node is added to the scores. node: float, broadcastable to [batch, query_heads, query_len, key_len]; flat: [batch ·
    query_heads, 1 or query_len, key_len]. reader: the node that adds it, while the site is described. on_hidden: scores that the mask
    hides get it, too."""

    node: fx.Node
    scale: float = 1.0
    flat: bool = False
    reader: fx.Node | None = None
    on_hidden: bool = True


@dataclass(frozen=True)
class AttentionSite(SiteOverKeys):
    """One attention in a Dynamo graph.

    name: layer path from `nn_module_stack`, such as `model.layers.3.self_attn`: for reports and rules, never as proof.
    layer: the last integer in that path.
    output: the node whose value is the attention's output, [batch, query_heads, query_len, v_head_dim]: the node a pass replaces.
    query: [batch, query_heads, query_len, qk_head_dim]; key, value: [batch, kv_heads, key_len, head_dim], *before* any repeat
        over the GQA group. Query head h reads KV head h // (query_heads // kv_heads).
    layouts: in which order these four hold their dimensions; the editor arranges them as above for methods.
    mask_node: the graph's own mask, None without one and where there are several. mask: what it was proved to say.
    dtype: what attention computes in; under autocast query, key and value may be float32 still, and are converted first.
    scale: float, or the node that holds it. softcap: c of c·tanh(s/c), 0 without. dropout: probability.
    empty_rows: what a row that sees no key holds, as `sparsify.ops.attention` says; "impossible" where every row was proved to see one.
        lowest: the finite number that hides, where it is "mean" or "fused".
    output_stride_order: "bhqd" when the replaced value is contiguous as [batch, heads, query, dim], "bqhd" when it is the
        transpose of a contiguous [batch, query, heads, dim], else "other".
    near_miss: why a site that looks like attention cannot be described further; every pass refuses with it.
    """

    kind: ClassVar[SiteKind] = "attention"
    converted_operands: ClassVar[tuple[str, ...]] = ("query", "key", "value")

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
    output_stride_order: StrideOrder
    source: Source = "sdpa"
    sink_logits: fx.Node | None = None  # one more logit in the softmax's denominator: [query_heads], or a column of the scores
    alibi_slopes: fx.Node | None = None  # [query_heads] or [batch, query_heads], float: adds slope · key position
    bias: tuple[ScoreBias, ...] = ()  # what else is added to the scores
    empty_rows: EmptyRowsKind = "zero"
    lowest: float = 0.0
    near_miss: str = ""
    layouts: Layouts = IN_ORDER
    covered: tuple[fx.Node, ...] = field(default=(), repr=False)  # nodes that only compute this attention, output included

    @property
    def phase(self) -> Phase:
        if self.query_len == 1:
            return "decode"
        if self.query_len == self.key_len and self.mask.query_start.bottom_right:
            return "prefill"
        return "chunk"

    @property
    def batch_and_heads(self) -> tuple[sympy.Expr, ...]:
        return sympy.sympify(self.batch), sympy.sympify(self.query_heads)

    @property
    def mask_bytes(self) -> int:
        example = self.mask_node.meta.get("example_value") if self.mask_node is not None else None
        return example.numel() * example.element_size() if example is not None else 0

    def resized(self, old: int, new: int) -> Self:
        site = super().resized(old, new)
        query_len, key_len = site.query_len, site.key_len
        if (query_len, key_len) == (self.query_len, self.key_len):
            return self
        nodes = {"query": query_len, "key": key_len, "value": key_len}
        mask = None if self.mask_node is None else stand_in(self.mask_node, {-2: int(query_len), -1: int(key_len)})
        places = {name: length_dim(getattr(self.layouts, name)) for name in nodes}
        operands = {name: stand_in(getattr(self, name), {places[name]: int(length)}) for name, length in nodes.items()}
        return dataclasses.replace(site, mask_node=mask, **operands)


@dataclass(frozen=True)
class CacheSite(SiteOverKeys):
    """One layer of a SparseCache in a graph.

    name: the attention's layer path with `.cache` appended.
    output: the attention node that reads the cache; for a prompt, whose attention is a site of its own, the store itself.
    store: the `cache_store` node.
    query, key, value: the call's tokens, [batch, heads, query_len, head_dim]; query is key where the store observes none.
    state: keys, values, positions, counts, seen, length.
    key_len: slots per KV head.
    empty: whether no token was stored before.
    near_miss: why the two ops cannot be described as one; kv_evict refuses with it.
    pages: which slots one token reads; None: all.
    codes: as which keys and values are stored; "": as they come.
    """

    kind: ClassVar[SiteKind] = "cache"
    proved: ClassVar[bool] = False  # a cache's own ops: nothing about them has to be

    name: str
    layer: int | None
    index: int
    output: fx.Node
    store: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    state: tuple[fx.Node, ...]
    batch: Size
    query_heads: Size
    kv_heads: Size
    query_len: Size
    key_len: Size
    qk_head_dim: Size
    v_head_dim: Size
    dtype: torch.dtype
    device: torch.device
    empty: bool
    mask: MaskPredicate = field(default_factory=lambda: MaskPredicate(MaskKind.NONE, condition="kept slots"))
    output_stride_order: StrideOrder = "bqhd"
    near_miss: str = ""
    pages: Pages | None = None
    codes: str = ""
    covered: tuple[fx.Node, ...] = field(default=(), repr=False)

    @property
    def phase(self) -> Phase:
        return "decode" if self.query_len == 1 else "prefill" if self.empty else "chunk"

    @property
    def offers_choice(self) -> bool:
        return self.phase == "decode"  # a prompt's attention is a site of its own, or the policy's


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension, computed in float32 whatever the input's dtype.

    kind: "none"; "layer" (F.layer_norm); "rms": weight · cast(x̂); "rms_fp32": cast(weight · x̂); "rms_offset": cast((1 + weight) · x̂),
        where x̂ = x · rsqrt(mean(x²) + eps) and cast rounds to the input's dtype.
    """

    kind: NormKind = "none"
    weight: fx.Node | None = None  # [hidden]
    bias: fx.Node | None = None  # [hidden], "layer" only
    eps: float = 0.0


@dataclass(frozen=True)
class FeedForwardSite(Site):
    """One feed-forward block of a Dynamo graph with its norm and its residual sum: output = sum(residuals) + scale · ffn(input).

    name: module path of the block, such as `model.layers.3.mlp`: for reports and rules, never as proof. layer: the last integer in it.
    index, count: this block's place among the `count` feed-forward blocks of the graph, near misses included.
    output: the residual sum, the node a pass replaces. residuals: its other terms, in order; all of output's shape and dtype.
    input: what `norm` reads, or the block's input without a norm of its own. source: what gate and up multiply: `norm`'s result or `input`.
    product: the down projection's result, with its bias, before scale, norm and sum.
    layout: "split" (gate and up apart), "gate_up" or "up_gate" (both in `up`, in that order), "plain" (no gate).
    up, gate: [intermediate, hidden] weights ([2 · intermediate, hidden] when fused); down: [hidden, intermediate]; all transposed
        when `transposed`. activation: applied to the gate, or to up without one.
    positions: int64 node, [1 or batch, query_len] or [query_len]; cached: a node whose dimension 2 is the number of keys; None where
        the graph shows neither.
    near_miss: why a block that looks like this cannot be described further; every pass refuses with it.
    """

    kind: ClassVar[SiteKind] = "ffn"

    name: str
    layer: int | None
    index: int
    count: int
    output: fx.Node
    residuals: tuple[fx.Node, ...] = ()
    input: fx.Node | None = None
    source: fx.Node | None = None
    product: fx.Node | None = None
    up: fx.Node | None = None
    gate: fx.Node | None = None
    down: fx.Node | None = None
    up_bias: fx.Node | None = None
    gate_bias: fx.Node | None = None
    down_bias: fx.Node | None = None
    layout: Layout = "plain"
    transposed: bool = False
    activation: Activation = "silu"
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
    output_stride_order: StrideOrder = "bhqd"
    near_miss: str = ""
    covered: tuple[fx.Node, ...] = field(default=(), repr=False)

    @property
    def phase(self) -> Phase:
        return "decode" if self.query_len == 1 else "prefill"

    @property
    def sizes(self) -> FeedForwardSizes:
        return FeedForwardSizes(self.rows, self.hidden, self.intermediate, 2 if self.layout == "plain" else 3, self.dtype)

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the block's products, as the model stores their weights."""
        hidden, wide = int(self.hidden), int(self.intermediate)
        first = {"plain": ((hidden, wide),), "split": ((hidden, wide),) * 2}.get(self.layout, ((hidden, 2 * wide),))
        return (*first, (wide, hidden))

    def dense_seconds(self, device: Device) -> sympy.Expr:
        return seconds.feed_forward_seconds(self.sizes, device)

    @property
    def hint_nodes(self) -> tuple[fx.Node, ...]:
        return (self.output,)

    @property
    def position(self) -> tuple[int, int]:
        return self.index, self.count

    def renumbered(self, name: str, layer: int, index: int, count: int) -> Self:
        return dataclasses.replace(self, name=name, layer=layer, index=index, count=count)

    def resized(self, old: int, new: int) -> Self:
        if self.query_len != old or old == new:
            return self
        rows = int(self.rows // self.query_len * new)
        shape = self.output.meta["example_value"].shape
        changed: dict[Any, Any] = {old: new, self.rows: rows}
        output = stand_in(self.output, {dim: changed.get(size, size) for dim, size in enumerate(shape[:-1])})
        return dataclasses.replace(self, query_len=new, rows=rows, output=output)

"""The records that the matcher makes: what is at a place in the graph, never what to do about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx

from sparsify.masks import Leaf, MaskPredicate, QueryStart

Size = int | sympy.Expr
Phase = Literal["prefill", "chunk", "decode"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention in a Dynamo graph.

    name: layer path from `nn_module_stack`, such as `model.layers.3.self_attn`: for reports and rules, never as proof.
    layer: the last integer in that path.
    output: the node whose value is the attention's output, [batch, query_heads, query_len, v_head_dim]: the node a pass replaces.
    query: [batch, query_heads, query_len, qk_head_dim]; key, value: [batch, kv_heads, key_len, head_dim], *before* any repeat
        over the GQA group. Query head h reads KV head h // (query_heads // kv_heads).
    mask_node: the graph's own mask, None without one. mask: what it was proved to say.
    scale: float, or the node that holds it. softcap: c of c·tanh(s/c), 0 without. dropout: probability.
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


def _mapped(value: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return mapping[value]
    if isinstance(value, tuple):
        return tuple(_mapped(v, mapping) for v in value)
    if isinstance(value, Leaf | QueryStart | MaskPredicate):
        return dataclasses.replace(value, **{f.name: _mapped(getattr(value, f.name), mapping) for f in dataclasses.fields(value)})
    return value

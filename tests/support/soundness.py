"""Runs captured graphs on real inputs and recomputes every described attention from its record alone.

What the matcher says of a site (operands before the repeat, mask as proved, scale, softcap, sinks, slopes) must reproduce what the
graph itself computes. A record that is wrong in any field fails here.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.masks.predicate import MaskPredicate
from sparsify.matching.attention import find_attention
from sparsify.matching.layouts import order
from sparsify.matching.sites import AttentionSite


def evaluate(mask: MaskPredicate, values: dict[fx.Node, torch.Tensor], symbols: dict, shape: tuple[int, int, int]) -> torch.Tensor:
    """The boolean mask [batch, query_len, key_len] that a predicate stands for, clause by clause as `masks` defines them."""
    batch, query_len, key_len = shape
    number = lambda e: int(sympy.sympify(e).xreplace(symbols))
    start = key_len - query_len
    if not mask.query_start.bottom_right:
        start = 0 if mask.query_start.constant is None else number(mask.query_start.constant)
        if mask.query_start.leaf is not None:
            start += int(values[mask.query_start.leaf].reshape(()))
    row = torch.arange(query_len)[:, None] + start
    key = torch.arange(key_len)[None]
    visible = torch.ones(batch, query_len, key_len, dtype=torch.bool)
    if mask.causal:
        visible &= key <= row
    if mask.window is not None:
        visible &= key > row - mask.window
    if mask.padding is not None:
        shift = number(mask.padding.shift)
        assert shift >= 0
        rows = _rows(values[mask.padding.node])[:, shift : shift + key_len].expand(batch, key_len)
        visible &= getattr(operator, mask.padding.relation)(rows, mask.padding.number)[:, None]
    if mask.documents is not None:
        shift = number(mask.documents.shift)
        of_key = _rows(values[mask.documents.node])[:, shift : shift + key_len].expand(batch, key_len)
        of_query = _rows(values[mask.documents.node])[:, shift + start : shift + start + query_len].expand(batch, query_len)
        visible &= of_key[:, None] == of_query[:, :, None]
    return visible


def _rows(leaf: torch.Tensor) -> torch.Tensor:
    """[batch or 1, keys]."""
    return leaf[None] if leaf.dim() == 1 else leaf.reshape(leaf.shape[0], -1)


def attention(site: AttentionSite, operands: dict[str, Any], visible: torch.Tensor) -> torch.Tensor:
    """[batch, query_heads, query_len, v_head_dim] in float64."""
    query, key, value = (operands[n].double() for n in ("query", "key", "value"))
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    logits = query @ key.transpose(-1, -2) * operands["scale"]
    if site.softcap:
        logits = torch.tanh(logits / site.softcap) * site.softcap
    if operands["alibi_slopes"] is not None:
        slopes = operands["alibi_slopes"].double().reshape(-1, query.shape[1], 1, 1)
        logits = logits + slopes * torch.arange(key.shape[2])
    for one, bias in zip(site.bias, operands["bias"], strict=True):
        apart = bias.double().reshape(*query.shape[:2], -1, key.shape[2]) if one.flat else bias.double()
        logits = logits + apart.expand_as(logits) * one.scale
    logits = logits.masked_fill(~visible[:, None], -torch.inf)
    if operands["sink_logits"] is not None:
        sinks = operands["sink_logits"].double().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1] @ value
    return torch.softmax(logits, -1).nan_to_num(0.0) @ value


@dataclass
class Capture:
    """A torch.compile backend that records each graph's sites and, while the graph runs eagerly, checks them.

    checked: sites whose output was reproduced. sites: all, per graph.
    """

    tolerance: float = 2e-5
    sites: list[list[AttentionSite]] = field(default_factory=list)
    checked: list[AttentionSite] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Any:
        found = find_attention(gm)
        self.sites.append(found)
        return lambda *args: _Checker(gm, found, self).run(*args)

    @property
    def flat(self) -> list[AttentionSite]:
        return [s for sites in self.sites for s in sites]

    @property
    def masks(self) -> list[str]:
        return [s.near_miss or s.mask.describe() for s in self.flat]


class _Checker(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, sites: list[AttentionSite], capture: Capture):
        super().__init__(gm, garbage_collect_values=False)
        self.capture = capture
        self.by_output = {s.output: s for s in sites}
        self.leaves = {
            leaf.node if hasattr(leaf, "node") else leaf: None
            for s in sites
            for leaf in (s.mask.padding, s.mask.documents, s.mask.query_start.leaf)
            if leaf is not None
        }
        self.symbols: dict[sympy.Expr, sympy.Integer] = {}

    def run_node(self, node: fx.Node) -> Any:
        site = self.by_output.get(node)
        operands = self.operands(site) if site is not None and not site.near_miss and not site.mask.opaque else None
        result = super().run_node(node)
        self.learn(node, result)
        if node in self.leaves:
            self.leaves[node] = result.clone()
        if operands is not None:
            self.check(site, operands, result)
        return result

    def learn(self, node: fx.Node, result: Any) -> None:
        example = node.meta.get("example_value")
        pairs = [(example, result)]
        if isinstance(example, torch.Tensor) and isinstance(result, torch.Tensor):
            pairs = list(zip(example.shape, result.shape, strict=True))
        for symbolic, real in pairs:
            if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
                self.symbols.setdefault(symbolic.node.expr, sympy.Integer(int(real)))

    def operands(self, site: AttentionSite) -> dict[str, Any]:
        at = lambda n: self.env[n] if isinstance(n, fx.Node) else n
        names = ("query", "key", "value", "scale", "sink_logits", "alibi_slopes")
        found = {n: v.clone() if isinstance(v := at(getattr(site, n)), torch.Tensor) else v for n in names}
        return found | {"bias": [self.env[one.node].clone() for one in site.bias]}

    def check(self, site: AttentionSite, operands: dict[str, Any], result: torch.Tensor) -> None:
        for name in ("query", "key", "value"):
            layout = getattr(site.layouts, name)
            apart = operands[name].unflatten(layout.index("n"), (-1, int(site.query_heads))) if "n" in layout else operands[name]
            operands[name] = apart.permute(order(layout))
        query, key = operands["query"], operands["key"]
        sizes = (query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2], query.shape[3], operands["value"].shape[3])
        said = (site.batch, site.query_heads, site.kv_heads, site.query_len, site.key_len, site.qk_head_dim, site.v_head_dim)
        assert tuple(int(sympy.sympify(s).xreplace(self.symbols)) for s in said) == sizes
        visible = evaluate(site.mask, self.leaves, self.symbols, (query.shape[0], query.shape[2], key.shape[2]))
        self.check_mask(site, visible)
        layout = site.layouts.output
        result = (result.unflatten(layout.index("n"), (-1, int(site.query_heads))) if "n" in layout else result).permute(order(layout))
        expected = attention(site, operands, visible).reshape(result.shape)
        rows = visible.any(-1)[:, None, :, None].expand(*query.shape[:3], result.shape[-1]).reshape(result.shape)
        error = (result.double() - expected).abs()[rows].nan_to_num(torch.inf).max().item() if rows.any() else 0.0
        assert error < self.capture.tolerance, (site.name, site.mask.describe(), error)
        strides = {"bhqd": result.is_contiguous(), "other": True}
        assert strides.get(site.output_stride_order, result.dim() == 4 and result.transpose(1, 2).is_contiguous())
        self.capture.checked.append(site)

    def check_mask(self, site: AttentionSite, visible: torch.Tensor) -> None:
        if site.mask_node is None or site.alibi_slopes is not None or site.bias:
            return
        mask = self.env[site.mask_node]
        if site.source == "eager" and mask.dtype is torch.bool:
            return  # its True may hide; the output tells
        if mask.dtype is not torch.bool:
            mask = mask == 0
        assert torch.equal(
            mask.expand(visible.shape[0], mask.shape[1], *visible.shape[1:]), visible[:, None].expand(-1, mask.shape[1], -1, -1)
        )

"""What planning asks of a site of any kind: sizes and cost, what of it is symbolic, how a plan records it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import sympy
import torch
from torch import fx

from sparsify.costs import seconds, work
from sparsify.costs.device import Device
from sparsify.costs.sizes import AttentionSizes, FeedForwardSizes, Size
from sparsify.masks.predicate import MaskPredicate
from sparsify.matching.layouts import IN_ORDER, Layouts, length_dim

Phase = Literal["prefill", "chunk", "decode"]
SiteKind = Literal["attention", "cache", "ffn", "stream", "batch", "token"]
PlanKind = Literal["attention", "ffn", "stream", "batch", "token"]
StrideOrder = Literal["bhqd", "bqhd", "other"]

CACHE_SUFFIX = ".cache"  # of the names of a SparseCache's sites, behind their attention's path


def plan_kind(kind: SiteKind) -> PlanKind:
    """The kind under which plan files know a site: a SparseCache's layer counts as attention."""
    return "attention" if kind == "cache" else kind


class Site:
    """What every kind of site can be asked.

    kind: what a method's `kinds` names.
    name: layer path from `nn_module_stack`, such as `model.layers.3.self_attn`: for reports and rules, never as proof.
    layer: the last integer in that path.
    index: place among the graph's sites of this kind, from 0.
    output: the node whose value a pass replaces.
    dtype, device: of the computation.
    near_miss: why a site that looks like its kind cannot be described further; every pass refuses with it.
    covered: nodes that only compute this site, output included.
    proved: whether something was proved about the site, which can be run.
    layouts: in which order query, key, value and output hold their dimensions, where the site has these.
    converted_operands: fields that hold operands of another dtype than the site's under autocast.
    """

    kind: ClassVar[SiteKind]
    proved: ClassVar[bool] = True
    converted_operands: ClassVar[tuple[str, ...]] = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # every kind is a dataclass

    name: str
    layer: int | None
    index: int
    output: fx.Node
    dtype: torch.dtype
    device: torch.device
    output_stride_order: StrideOrder
    near_miss: str
    covered: tuple[fx.Node, ...]
    layouts: Layouts = IN_ORDER

    @property
    def batch_and_heads(self) -> tuple[sympy.Expr, ...]:
        """Numbers of batch rows and heads, where the site has heads."""
        return ()

    def mapped(self, mapping: dict[fx.Node, fx.Node]) -> Self:
        """The same site in a copy of its graph; `mapping` sends each node to its copy."""
        fields = dataclasses.fields(self)
        return dataclasses.replace(self, **{f.name: _mapped(getattr(self, f.name), mapping) for f in fields})

    @property
    def phase(self) -> Phase:
        """decode: one query row of each sequence; prefill: as many rows as keys, starting at key 0; chunk: anything between."""
        raise NotImplementedError

    # -- what a plan records -----------------------------------------------------------------------------------------------------------

    @property
    def mask_text(self) -> str:
        """What was proved about the mask, in words; empty without one."""
        return ""

    @property
    def offers_choice(self) -> bool:
        """Whether methods can be chosen for it; else it runs as it stands."""
        return True

    def sees(self, keys: int) -> str:
        """What tells the site from full causal attention over `keys` keys, in words; empty where nothing does."""
        return ""

    # -- what it costs -----------------------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> AttentionSizes | FeedForwardSizes:
        """The numbers that its cost depends on, symbolic ones as sympy expressions."""
        raise NotImplementedError

    def dense_seconds(self, device: Device) -> sympy.Expr:
        """Expected seconds of the site as it stands."""
        raise NotImplementedError

    def dense_formula(self, device: Device) -> str:
        """The same in letters, at the example's sizes; empty where there is none."""
        return ""

    @property
    def mask_bytes(self) -> int:
        """Bytes of the mask tensor that the site reads where it stays as it is."""
        return 0

    # -- what of it is symbolic --------------------------------------------------------------------------------------------------------

    @property
    def hint_nodes(self) -> tuple[fx.Node, ...]:
        """Nodes whose example values tell the hints of the site's symbols."""
        raise NotImplementedError

    @property
    def planned_length(self) -> Size:
        """The key length that a choice may depend on; 0 where it depends on none."""
        return 0

    @property
    def example_length(self) -> int | torch.SymInt:
        """The same as the graph's example holds it."""
        return 0

    def reaches(self, bound: int) -> bool:
        """Whether the key length reaches a bound; on a symbolic length the answer becomes a guard of the compiled graph."""
        return bound <= 0 or bool(self.example_length >= bound)

    # -- the same site elsewhere -------------------------------------------------------------------------------------------------------

    @property
    def position(self) -> tuple[int, int] | None:
        """(index, number of such sites), where a method's answer depends on them."""
        return None

    def renumbered(self, name: str, layer: int, index: int, count: int) -> Self:
        """The same site in another layer, the `index`-th of `count`."""
        return dataclasses.replace(self, name=name, layer=layer, index=index)

    def resized(self, old: int, new: int) -> Self:
        """The site of a prompt of `old` tokens as that of one of `new` tokens, over nodes outside of any graph of the model."""
        raise NotImplementedError


class SiteOverKeys(Site):
    """What attention and a cache's layer have in common: queries that read keys.

    query: [batch, query_heads, query_len, qk_head_dim]; key, value: [batch, kv_heads, key_len, head_dim], in the order of `layouts`.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: MaskPredicate
    batch: Size
    query_heads: Size
    kv_heads: Size
    query_len: Size
    key_len: Size
    qk_head_dim: Size
    v_head_dim: Size

    @property
    def mask_text(self) -> str:
        return self.mask.describe()

    def sees(self, keys: int) -> str:
        if self.phase == "decode":
            return "" if self.key_len == keys else f"{self.key_len} keys"
        return self.mask.describe().removeprefix("causal").removeprefix(", ")

    @property
    def sizes(self) -> AttentionSizes:
        numbers = {name: getattr(self, name) for name in AttentionSizes.NAMES}
        return AttentionSizes(**numbers, dtype=self.dtype, causal=self.mask.causal, window=self.mask.window)

    @property
    def example(self) -> AttentionSizes:
        """The sizes with the example's numbers for those that are symbolic, as far as it has any.

        Reading them installs no guard, so that what follows from them must not change a result.
        """
        found: dict[str, int] = {}
        dimensions = (
            (self.query, self.layouts.query, {"b": "batch", "h": "query_heads", "l": "query_len", "d": "qk_head_dim"}),
            (self.key, self.layouts.key, {"b": "batch", "h": "kv_heads", "l": "key_len"}),
            (self.value, self.layouts.value, {"b": "batch", "h": "kv_heads", "d": "v_head_dim"}),
        )
        for operand, layout, names in dimensions:
            value = operand.meta.get("example_value")
            shape: Sequence[Any] = () if value is None else value.shape
            for letter, size in zip(layout, shape, strict=False):
                name = names.get(letter)
                hint = size.node.hint if isinstance(size, torch.SymInt) else size
                if name and name not in found and hint is not None and not isinstance(getattr(self, name), int):
                    found[name] = int(hint)
        return dataclasses.replace(self.sizes, **found)

    @staticmethod
    def _dense_work(sizes: AttentionSizes) -> tuple[work.Work, ...]:
        return (work.attention(sizes, "sdpa"),)

    def dense_seconds(self, device: Device) -> sympy.Expr:
        return seconds.seconds(self._dense_work(self.sizes), device)

    def dense_formula(self, device: Device) -> str:
        return "" if self.near_miss else seconds.formula(self._dense_work, self.example, device)

    @property
    def hint_nodes(self) -> tuple[fx.Node, ...]:
        return self.query, self.key, self.value

    @property
    def planned_length(self) -> Size:
        return self.key_len

    @property
    def example_length(self) -> int | torch.SymInt:
        return self.key.meta["example_value"].shape[length_dim(self.layouts.key)]

    def resized(self, old: int, new: int) -> Self:
        query_len, key_len = (new if length == old else length for length in (self.query_len, self.key_len))
        return dataclasses.replace(self, query_len=query_len, key_len=key_len)


def _mapped(value: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return mapping[value]
    if isinstance(value, tuple):
        return tuple(_mapped(v, mapping) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _mapped(getattr(value, f.name), mapping) for f in dataclasses.fields(value)})
    return value


def stand_in(node: fx.Node, sizes: dict[int, int]) -> fx.Node:
    """A node outside any graph of the model whose example has other sizes, by dimension; methods read lengths off it."""
    example = node.meta["example_value"]
    shape = list(example.shape)
    for dimension, size in sizes.items():
        shape[dimension] = size if shape[dimension] != 1 else 1
    made = fx.Graph().placeholder(node.name)
    made.meta = {**node.meta, "example_value": torch.empty(shape, dtype=example.dtype, device="meta")}
    return made

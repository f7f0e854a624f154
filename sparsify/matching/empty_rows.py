"""What rows that see no key hold, read from the form of the mask and from the arithmetic between the mask and the softmax.

Where every row sees a key, nothing is asked of the form. Elsewhere hidden scores must end at one number: -inf makes a row of them NaN, and
a finite one that is so low that scores are lost beside it makes it an average over all keys. scaled_dot_product_attention, which never
gives NaN, leaves such a row 0 under -inf.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.calls import as_node
from sparsify.masks.predicate import MaskKind, MaskPredicate
from sparsify.masks.prove import Extents
from sparsify.masks.reader import Reader
from sparsify.masks.symbolic import BATCH, HEAD, KEY, QUERY, Element, Facts, Unreadable, cases
from sparsify.matching import biases
from sparsify.matching.context import Bias, MaskReading, MatchContext
from sparsify.matching.eager_ops import FILLS, NoMatch
from sparsify.matching.scores import AddedTerms, Chain
from sparsify.matching.sites import EmptyRowsKind, ScoreBias


@dataclass(frozen=True)
class EmptyRows:
    """The fields of `sites.AttentionSite` that say it."""

    empty_rows: EmptyRowsKind
    lowest: float = 0.0


IMPOSSIBLE, ZERO, NAN = EmptyRows("impossible"), EmptyRows("zero"), EmptyRows("nan")


def impossible(mask: MaskPredicate, extents: Extents, facts: Facts) -> bool:
    """Whether the clauses leave every row a key: itself, or with a window alone the last one."""
    if mask.kind is MaskKind.NONE:
        return True
    start, query_len, key_len = mask.query_start, extents.query_len, extents.key_len
    if mask.padding is not None or start.leaf is not None:
        return False
    if start.bottom_right and query_len == 1:
        return True
    first = sympy.expand(key_len - query_len) if start.constant is None else start.constant
    behind = sympy.expand(first + query_len - key_len)  # the last row's position, counted from the last key
    if (mask.causal or mask.documents is not None) and not facts.holds(sympy.Ge(first, 0)):
        return False
    reach = 0 if mask.documents is not None else math.inf if mask.window is None else mask.window - 1
    return reach == math.inf or facts.holds(sympy.Le(behind, reach))


def rows_of_sdpa(
    context: MatchContext, node: fx.Node, mask: fx.Node | None, proof: MaskPredicate, parts: Bias, extents: Extents
) -> EmptyRows:
    """For a call of scaled_dot_product_attention under a proved mask. parts: what the mask was taken apart into.

    Raises:
        NoMatch: rows may see no key, and what they hold cannot be said.
    """
    if proof.opaque or (impossible(proof, extents, context.facts) and not parts.biases):
        return IMPOSSIBLE
    if mask is None or not example_tensor(mask).dtype.is_floating_point:
        return ZERO
    masks = parts.masks or (() if parts.biases else ((mask, "mask", node),))
    numbers = {number for one in masks for number in _hidden(context, *one, extents)}
    if numbers <= {-math.inf}:
        return ZERO
    if example_tensor(mask).dtype is not example_tensor(node).dtype:
        raise NoMatch("rows may see no key, under a mask of another dtype")
    # half types are computed in float32
    math_dtype = torch.promote_types(example_tensor(node).dtype, torch.float32)
    found = _decided({number: _swallows(number, math_dtype) for number in numbers})
    # fused kernels of GPUs multiply the mask by log2(e), beyond the range of float32: -inf to them
    if example_tensor(node).device.type == "cuda":
        return ZERO
    return replace(found, empty_rows="fused") if parts.biases and found.empty_rows == "mean" else found


def rows_of_written_out(
    context: MatchContext,
    chain: Chain,
    softmax: fx.Node,
    masks: Sequence[MaskReading],
    added: AddedTerms,
    proof: MaskPredicate,
    extents: Extents,
) -> tuple[EmptyRows, tuple[ScoreBias, ...]]:
    """For written-out attention under a proved mask, and its biases with `on_hidden` set. masks: all of them; added: what
    the added terms are.

    Raises:
        NoMatch: rows may see no key, and what they hold cannot be said.
    """
    places = added.biases
    added_biases = tuple(replace(one, reader=None) for one in places)  # no operand of the site
    # one more logit in the denominator outweighs everything hidden
    if proof.opaque or (chain.sinks is not None and not chain.scaled) or (impossible(proof, extents, context.facts) and not added_biases):
        return IMPOSSIBLE if chain.sinks is None else ZERO, added_biases
    adders = {term.node: term.reader for term in chain.terms}
    fills = {reader: {_filled(context, reader)} for _, _, reader in chain.masks}
    sums: dict[fx.Node, set[float]] = {}
    for mask, form, reader in added.masks:
        sums.setdefault(adders.get(reader, reader), set()).update(_hidden(context, mask, form, reader, extents))
    levels = _levels(context, chain, softmax, fills, sums, {*adders.values()})
    if chain.scaled:
        if places:
            raise NoMatch("a bias may hide every key of a row that a sink scales")
        if -math.inf in levels:
            raise NoMatch("rows may see no key, and what a sink scales is NaN there")
        return ZERO, added_biases  # whatever they average, it is scaled by sigmoid of about the number that hides
    dtypes = {example_tensor(one.reader).dtype for one in places}
    if added_biases and chain.bounds:
        raise NoMatch("a bias may hide every key of a row, and scores are bounded from below")
    if any(not _swallows(torch.finfo(dtype).min, dtype) for dtype in dtypes):
        raise NoMatch("a bias may hide every key of a row, and float16 keeps scores beside it")
    if not levels:  # masks that hide nothing, or none
        return NAN, added_biases
    return _decided(levels), tuple(replace(one, reader=None, on_hidden=_reaches(context, one, [*fills])) for one in places)


def _levels(
    context: MatchContext,
    chain: Chain,
    softmax: fx.Node,
    fills: dict[fx.Node, set[float]],
    sums: dict[fx.Node, set[float]],
    adders: set[fx.Node],
) -> dict[float, bool]:
    """Where hidden scores stand before the softmax, and whether they are all equal there: filled, or swallowed by the number."""
    position = context.memory.position
    levels: dict[float, bool] = {}
    for node in sorted({n for n in chain.nodes if position[n] <= position[softmax]}, key=position.__getitem__):
        tensor = tensor_of(node)
        if tensor is None or not tensor.dtype.is_floating_point:
            continue
        numbers = sums.get(node, set())
        levels = levels | {a + b: False for a in (0.0, *levels) for b in numbers}
        if node in adders:
            levels = {number: _swallows(number, tensor.dtype) for number in levels}
        levels |= dict.fromkeys(fills.get(node, ()), True)
        if node in chain.bounds:
            low, raised = _number_of(context, node), {}
            for number, equal in levels.items():
                held = max(number, low)
                raised[held] = raised.get(held, True) and (equal or number < low)
            levels = raised
        rounded: dict[float, bool] = {}
        for number, equal in levels.items():
            held = _rounded(number, tensor.dtype)
            rounded[held] = rounded.get(held, True) and equal
        levels = rounded
    return levels


def _decided(levels: dict[float, bool]) -> EmptyRows:
    if set(levels) == {-math.inf}:
        return NAN
    if len(levels) != 1:
        raise NoMatch("rows may see no key, and hidden scores stand at different numbers")
    ((number, equal),) = levels.items()
    if not equal:
        raise NoMatch(f"rows may see no key, and scores are not lost beside {number:g}")
    return EmptyRows("mean", number)


def _reaches(context: MatchContext, bias: ScoreBias, fills: list[fx.Node]) -> bool:
    """Whether scores that the mask hides get the bias too: not where a fill replaces their sum."""
    position = context.memory.position
    added = position[as_node(bias.reader)]
    after = {added > position[fill] for fill in fills} or {True}
    if len(after) > 1:
        raise NoMatch("rows may see no key, and a bias is added between two masks")
    return bias.on_hidden and after == {True}


def _hidden(context: MatchContext, mask: fx.Node, form: str, reader: fx.Node, extents: Extents) -> set[float]:
    """The numbers that a mask adds to hidden scores, or puts in their place. reader: as `masks.prove` takes it."""
    if not example_tensor(mask).dtype.is_floating_point:
        return {_filled(context, reader)}
    if (mask, extents) not in context.hiding_numbers:
        at = {BATCH: extents.batch, HEAD: extents.heads, QUERY: extents.query_len, KEY: extents.key_len}
        indices = [sympy.Integer(0) if size == 1 else symbol for symbol, size in at.items()]
        element = Reader(Facts(context.shape_env, at)).read(mask).broadcast(4)(*indices)
        context.hiding_numbers[mask, extents] = {_float(value) for _, value in cases(element)} - {0.0}
    return context.hiding_numbers[mask, extents]


def _filled(context: MatchContext, node: fx.Node) -> float:
    """The number that a fill, or a mask that is a broadcast of one, puts at hidden places."""
    while node.target not in FILLS:
        node = as_node(node.args[0])
    return _number_of(context, node)


def _number_of(context: MatchContext, node: fx.Node) -> float:
    """The number among the operands of a fill or of a bound."""
    dtype = example_tensor(node).dtype
    for operand in (*node.args, *node.kwargs.values()):
        single = (tensor := tensor_of(operand)) is None or tensor.dim() == 0
        if single and biases.hides(operand, dtype, context.shape_env):
            return _rounded(_float(Reader(Facts(context.shape_env)).read(operand).at()), dtype)
    raise Unreadable("a mask fills with no number")


def _float(element: Element) -> float:
    """An element that is known to be a number."""
    return float(typing.cast(sympy.Expr, element))


def _rounded(number: float, dtype: torch.dtype) -> float:
    return torch.tensor(number, dtype=torch.float64).to(dtype).item()


def _swallows(number: float, dtype: torch.dtype) -> bool:
    """Whether a score added to the number in this dtype leaves it as it is."""
    return number == -math.inf or -number * torch.finfo(dtype).eps > 2.0**40

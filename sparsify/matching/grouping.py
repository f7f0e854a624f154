"""Keys and values before they are repeated over the query heads of a group (grouped-query attention)."""

from __future__ import annotations

import operator
import typing
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from sparsify.graph.aliasing import Memory, example_tensor
from sparsify.graph.calls import Unbound, as_node, bind
from sparsify.masks.symbolic import scalar, sizes

_COPIES = {"contiguous", "clone"}


@dataclass(frozen=True)
class Grouped:
    """Keys or values before their repeat over the query heads of a group: the node, the repeat, and the nodes in between."""

    node: fx.Node
    repeat: sympy.Expr
    between: tuple[fx.Node, ...]


def whole(node: fx.Node) -> Grouped:
    """Keys or values that were not repeated."""
    return Grouped(node, sympy.Integer(1), ())


def ungroup(memory: Memory, node: fx.Node, reader: fx.Node) -> Grouped:
    """Looks through a repeat over the heads of each group; without one, the node itself.

    Keys are then read by `reader` instead of by the copy, so nothing may write to them in between.
    """
    chain: list[fx.Node] = []
    here = node
    while here.op == "call_method" and here.target in _COPIES:
        chain.append(here)
        here = as_node(here.args[0])
    found = _repeat_interleave(here) or _expanded(here)
    if found is None or any(memory.written_between(found.node, n, reader) for n in found.between):
        return whole(node)
    if any(memory.written_between(n, None, reader) for n in (*chain, *found.between) if _fresh(n, found.node)):
        return whole(node)
    return Grouped(found.node, found.repeat, (*chain, *found.between))


def _repeat_interleave(node: fx.Node) -> Grouped | None:
    if node.target not in (torch.repeat_interleave, "repeat_interleave"):
        return None
    try:
        call = bind(node, "input: tensor, repeats: int, dim: int")
    except Unbound:
        return None
    return Grouped(call.input, typing.cast(sympy.Expr, scalar(call.repeats)), (node,)) if call.dim in (1, -3) else None


def _expanded(node: fx.Node) -> Grouped | None:
    """`x[:, :, None].expand(batch, heads, repeat, length, dim).reshape(batch, heads * repeat, length, dim)`."""
    if node.op == "call_method" and node.target == "expand" and example_tensor(node).dim() == 4:
        return _single_head(node)
    if node.target not in ("reshape", "view", "flatten", torch.reshape, torch.flatten):
        return None
    chain, here = [node], node.all_input_nodes[0]
    while here.op == "call_method" and here.target in _COPIES:
        chain.append(here)
        here = as_node(here.args[0])
    if here.target not in ("expand", "broadcast_to", torch.broadcast_to):
        return None
    chain.append(here)
    lifted = here.all_input_nodes[0]
    if not _inserts_third_dimension(lifted):
        return None
    chain.append(lifted)
    source = as_node(lifted.args[0])
    before, wide, after = sizes(example_tensor(source)), sizes(example_tensor(here)), sizes(example_tensor(node))
    if len(before) != 4 or len(wide) != 5 or len(after) != 4:
        return None
    fits = wide[:2] == before[:2] and wide[3:] == before[2:] and example_tensor(source).dtype is example_tensor(node).dtype
    fits = fits and after == (wide[0], sympy.expand(wide[1] * wide[2]), *wide[3:])
    return Grouped(source, wide[2], tuple(chain)) if fits else None


def _single_head(node: fx.Node) -> Grouped | None:
    """One key head for all query heads: `x.expand(batch, heads, length, dim)` of [batch, 1, length, dim]."""
    source = as_node(node.args[0])
    before, after = sizes(example_tensor(source)), sizes(example_tensor(node))
    if len(before) != 4 or before[1] != 1 or (before[0], *before[2:]) != (after[0], *after[2:]):
        return None
    return Grouped(source, after[1], (node,))


def _inserts_third_dimension(node: fx.Node) -> bool:
    if node.target in ("unsqueeze", torch.unsqueeze):
        return bind(node, "input, dim").dim in (2, -3)
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    index = node.args[1]
    everything = slice(None, None, None)
    return len(index) >= 3 and index[2] is None and all(j == everything for n, j in enumerate(index) if n != 2) and len(index) <= 5


def _fresh(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node has memory of its own."""
    one, other = example_tensor(node), example_tensor(source)
    return one.untyped_storage()._cdata != other.untyped_storage()._cdata

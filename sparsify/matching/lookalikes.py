"""Finds what looks like attention, however it is written: a softmax between two products, with anything in between. What the matchers
cannot read of it becomes a near miss, so that no attention is passed over in silence.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from sparsify.graph.aliasing import tensor_of
from sparsify.masks.symbolic import sizes
from sparsify.matching.eager_ops import BADDBMM, CAST, DROPOUT, EINSUM, MATMUL, SAME, VIEW

# attention that reaches the compiler as one call
WHOLE = {F.multi_head_attention_forward, torch._native_multi_head_attention}  # pyright: ignore[reportPrivateImportUsage]
_PRODUCTS = MATMUL | BADDBMM | EINSUM | {torch.tensordot, torch.inner, "inner", "tensordot"}
# what takes a part of its input, or puts inputs side by side
_PARTS = {
    *(operator.getitem, torch.narrow, torch.select, torch.index_select, torch.split, torch.chunk, torch.unbind),
    *("narrow", "select", "index_select", "split", "chunk", "unbind"),
    *(torch.cat, torch.concat, torch.concatenate, torch.stack, F.pad),
}
_STEPS = 32


def origin(scores: fx.Node) -> fx.Node | None:
    """The product of two tensors of activations that a value comes from, element by element or in parts; None without one."""
    return next((node for node in _search(scores, _sources) if _multiplies(node)), None)


def reached(weights: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(product, what it multiplies) of the first product that a value goes into, element by element or in parts; None without one."""
    for node in _search(weights, _readers):
        for user in node.users:
            if user.target in _PRODUCTS and tensor_of(user) is not None:
                return user, node
    return None


def way(weights: fx.Node, factor: fx.Node) -> str:
    """The first call between a softmax and what the product multiplies that is none of the ways of attention; empty without one."""
    known = CAST | SAME | VIEW | DROPOUT | {operator.getitem}
    between = {*_search(factor, _sources)} & {*_search(weights, _readers)}
    ordered = (node for node in weights.graph.nodes if node in between and node is not weights)
    return next((_word(node) for node in ordered if node.target not in known), "")


def _word(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _search(start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """The nodes that are reached, nearest first."""
    seen, pending = {start}, deque([start])
    while pending and len(seen) < _STEPS:
        node = pending.popleft()
        yield node
        for other in neighbours(node):
            if other not in seen:
                seen.add(other)
                pending.append(other)


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    return () if _multiplies(node) else [source for source in node.all_input_nodes if _follows(source, node)]


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    return [user for user in node.users if _follows(node, user)]


def _follows(source: fx.Node, user: fx.Node) -> bool:
    """Whether a call holds the same elements as what it reads, or takes a part of them."""
    if user.op not in ("call_function", "call_method"):
        return False
    counts = _count(source), _count(user)
    return user.target in _PARTS or (counts[0] is not None and counts[0] == counts[1])


def _count(node: fx.Node) -> sympy.Expr | None:
    tensor = tensor_of(node)
    return None if tensor is None or tensor.dim() < 2 else sympy.expand(sympy.Mul(*sizes(tensor)))


def _multiplies(node: fx.Node) -> bool:
    """Whether a node multiplies two tensors, neither of them a matrix of weights."""
    if node.target not in _PRODUCTS or (result := tensor_of(node)) is None:
        return False
    ranks = [tensor.dim() for source in node.all_input_nodes if (tensor := tensor_of(source)) is not None]
    return sum(rank >= min(3, result.dim()) for rank in ranks) >= 2

"""Recognises views that reorder a tensor's dimensions, in every form in which torch lets them be written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify.graph.aliasing import tensor_of
from sparsify.graph.calls import Unbound, bind
from sparsify.graph.compat import attribute

_SIGNATURES = {
    **dict.fromkeys(("transpose", "swapdims", "swapaxes"), ("input: tensor, dim0, dim1", "input: tensor, axis0, axis1")),
    "permute": ("input: tensor, *dims",),
    **dict.fromkeys(("movedim", "moveaxis"), ("input: tensor, source, destination",)),
    **dict.fromkeys(("t", "adjoint"), ("input: tensor",)),
}
_FUNCTIONS: dict[Any, str] = {getattr(torch, name): name for name in _SIGNATURES}
# names of all methods, functions and attributes that are such a view
PERMUTATIONS = (*_SIGNATURES, "T", "mT", "H", "mH")


def permutation(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The tensor that a node is a reordering view of, and the order: the node's dimension d is the tensor's dimension order[d].

    None for any other node, and where the dimensions are not constants.
    """
    word = attribute(node) or (str(node.target) if node.op == "call_method" else _FUNCTIONS.get(node.target, ""))
    if word not in PERMUTATIONS or tensor_of(node) is None:
        return None
    try:
        source, dims = (node.args[0], ()) if attribute(node) else _bind_dims(node, word)
    except Unbound:
        return None
    if not isinstance(source, fx.Node) or (tensor := tensor_of(source)) is None:
        return None
    order = _dimension_order(word, dims, tensor)
    return (source, order) if order is not None else None


def transposed(node: fx.Node) -> fx.Node | None:
    """The tensor of which a node is the view with the last two dimensions swapped; None for any other node."""
    found = permutation(node)
    if found is None or len(found[1]) < 2:
        return None
    source, order = found
    rank = len(order)
    return source if order == (*range(rank - 2), rank - 1, rank - 2) else None


def _bind_dims(node: fx.Node, word: str) -> tuple[fx.Node, tuple[Any, ...]]:
    """The tensor, and the dimensions in the order of the signature."""
    arguments = vars(bind(node, *_SIGNATURES[word]))
    names = ("source", "destination", "dim0", "dim1", "axis0", "axis1")
    return arguments["input"], arguments.get("dims", tuple(arguments[name] for name in names if name in arguments))


def _dimension_order(word: str, dims: tuple[Any, ...], tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Source dimension of each dimension; without `dims` the last two are swapped. None where `dims` are not constants."""
    rank, order = tensor.dim(), list(range(tensor.dim()))
    if word in ("movedim", "moveaxis"):
        sources, destinations = (tuple(d) if isinstance(d, (tuple, list)) else (d,) for d in dims)
        return _movedim_order(sources, destinations, rank)
    if not _are_dimensions(dims, rank) or (word in ("H", "mH", "adjoint") and tensor.is_complex()):
        return None
    if word == "permute":
        return tuple(d % rank for d in dims)
    if word in ("T", "t"):
        return tuple(reversed(order))
    first, second = (d % rank for d in dims or (-2, -1)) if rank else (0, 0)
    if rank:
        order[first], order[second] = order[second], order[first]
    return tuple(order)


def _movedim_order(sources: tuple[Any, ...], destinations: tuple[Any, ...], rank: int) -> tuple[int, ...] | None:
    if not _are_dimensions((*sources, *destinations), rank):
        return None
    places = {d % rank: s % rank for s, d in zip(sources, destinations, strict=True)}
    rest = iter([d for d in range(rank) if d not in places.values()])
    return tuple(places[d] if d in places else next(rest) for d in range(rank))


def _are_dimensions(dims: tuple[Any, ...], rank: int) -> bool:
    return all(isinstance(d, int) and -rank <= d < rank for d in dims)

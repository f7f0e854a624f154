"""Views that reorder a tensor's dimensions, whichever way they are written."""

from __future__ import annotations

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
_FUNCTIONS = {getattr(torch, name): name for name in _SIGNATURES}
# every method, function and attribute that is such a view
PERMUTATIONS = (*_SIGNATURES, "T", "mT", "H", "mH")


def permutation(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """(tensor, order): the node is a view of that tensor, and the node's dimension d is the tensor's dimension order[d].

    None for anything else, and for calls whose dimensions are not known now.
    """
    word = attribute(node) or (node.target if node.op == "call_method" else _FUNCTIONS.get(node.target))
    if word not in PERMUTATIONS or tensor_of(node) is None:
        return None
    try:
        source, dims = (node.args[0], ()) if attribute(node) else _bound(node, word)
    except Unbound:
        return None
    order = _order(word, dims, tensor_of(source)) if tensor_of(source) is not None else None
    return (source, order) if order is not None else None


def transposed(node: fx.Node) -> fx.Node | None:
    """The tensor that a node holds with its last two dimensions swapped."""
    found = permutation(node)
    if found is None or len(found[1]) < 2:
        return None
    source, order = found
    rank = len(order)
    return source if order == (*range(rank - 2), rank - 1, rank - 2) else None


def _bound(node: fx.Node, word: str) -> tuple[fx.Node, tuple]:
    arguments = vars(bind(node, *_SIGNATURES[word]))
    names = ("source", "destination", "dim0", "dim1", "axis0", "axis1")
    return arguments["input"], arguments.get("dims", tuple(arguments[name] for name in names if name in arguments))


def _order(word: str, dims: tuple, tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions' order; a call without any swaps the last two."""
    rank, order = tensor.dim(), list(range(tensor.dim()))
    if word in ("movedim", "moveaxis"):
        return _moved(*(tuple(d) if isinstance(d, (tuple, list)) else (d,) for d in dims), rank)
    if not _known(dims, rank) or (word in ("H", "mH", "adjoint") and tensor.is_complex()):
        return None
    if word == "permute":
        return tuple(d % rank for d in dims)
    if word in ("T", "t"):
        return tuple(reversed(order))
    first, second = (d % rank for d in dims or (-2, -1)) if rank else (0, 0)
    if rank:
        order[first], order[second] = order[second], order[first]
    return tuple(order)


def _moved(sources: tuple, destinations: tuple, rank: int) -> tuple[int, ...] | None:
    if not _known((*sources, *destinations), rank):
        return None
    places = {d % rank: s % rank for s, d in zip(sources, destinations, strict=True)}
    rest = iter([d for d in range(rank) if d not in places.values()])
    return tuple(places[d] if d in places else next(rest) for d in range(rank))


def _known(dims: tuple, rank: int) -> bool:
    return all(isinstance(d, int) and -rank <= d < rank for d in dims)

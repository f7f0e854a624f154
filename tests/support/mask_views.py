"""The operators of `mask_evaluator` that move, pick or join elements."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tests.support.mask_evaluator import (
    INTEGERS,
    WHOLE,
    Array,
    Scalar,
    Unevaluable,
    bind,
    broadcast,
    convert,
    make,
    operates,
    promote,
    spread,
    word,
)


@operates("expand", "expand_as", "broadcast_to")
def _expand(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source, size = _shaped(node, args, kwargs)
    skip = len(size) - len(source.shape)
    size = [source.shape[d - skip] if n == -1 else n for d, n in enumerate(size)]
    if broadcast(source.shape, size) != tuple(size):
        raise Unevaluable("sizes do not expand")
    return make(size, source.dtype, spread(source, size))


def _shaped(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> tuple[Array, list[int]]:
    """The tensor and the sizes: one by one, as one argument, by name, or those of another tensor."""
    args = list(args)
    source = args.pop(0) if args else kwargs["input"]
    named = [v for k, v in kwargs.items() if k not in ("input", "implicit")]
    if named:
        args = named
    if any(isinstance(a, torch.dtype) for a in args):
        raise Unevaluable("bits as another dtype")
    if len(args) == 1 and isinstance(args[0], Array):
        return source, list(args[0].shape)
    return source, list(args[0]) if len(args) == 1 and isinstance(args[0], (list, tuple)) else list(args)


@operates("repeat", "tile")
def _repeat(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source, times = _shaped(node, args, kwargs)
    rank = max(len(times), len(source.shape))
    shape, times = [1] * (rank - len(source.shape)) + list(source.shape), [1] * (rank - len(times)) + list(times)
    skip = rank - len(source.shape)
    at = lambda *i: source[[i[skip + d] % size for d, size in enumerate(source.shape)]]
    return make([size * count for size, count in zip(shape, times, strict=True)], source.dtype, at)


@operates("repeat_interleave")
def _repeat_interleave(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "repeats", "dim", "output_size")
    source, times, dim = given["input"], given["repeats"], given.get("dim")
    if not isinstance(times, int):
        raise Unevaluable("a count for each element")
    if dim is None:
        if len(source.shape) != 1:
            raise Unevaluable("repeats of what is made flat first")
        dim = 0
    dim %= len(source.shape)
    shape = [size * times if d == dim else size for d, size in enumerate(source.shape)]
    return make(shape, source.dtype, lambda *i: source[[index // times if d == dim else index for d, index in enumerate(i)]])


@operates("pad")
def _pad(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "pad", "mode", "value")
    source, borders = given["input"], list(given["pad"])
    if given.get("mode", "constant") != "constant" or min(borders) < 0:
        raise Unevaluable("padded otherwise")
    rest = len(source.shape) - len(borders) // 2
    sides = [(0, 0)] * rest + [(borders[n], borders[n + 1]) for n in range(len(borders) - 2, -1, -2)]
    value = given.get("value") or 0

    def at(*i: int) -> Scalar:
        place = [index - before for index, (before, _) in zip(i, sides, strict=True)]
        return source[place] if all(0 <= n < size for n, size in zip(place, source.shape, strict=True)) else value

    return make([size + sum(side) for size, side in zip(source.shape, sides, strict=True)], source.dtype, at)


@operates("view", "reshape", "view_as", "reshape_as")
def _reshape(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source, size = _shaped(node, args, kwargs)
    if -1 in size:
        known = math.prod(n for n in size if n != -1)
        size[size.index(-1)] = len(source.data) // known
    if math.prod(size) != len(source.data):
        raise Unevaluable("another number of elements")
    return Array(tuple(size), source.dtype, source.data)


@operates("flatten")
def _flatten(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "start_dim", "end_dim")
    source, rank = given["input"], len(given["input"].shape)
    if rank == 0:
        return Array((1,), source.dtype, source.data)
    first, last = (given.get(name, default) % rank for name, default in (("start_dim", 0), ("end_dim", -1)))
    middle = math.prod(source.shape[first : last + 1])
    return Array((*source.shape[:first], middle, *source.shape[last + 1 :]), source.dtype, source.data)


@operates("unflatten")
def _unflatten(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "dim", "sizes")
    source = given["input"]
    dim, sizes = given["dim"] % len(source.shape), list(given["sizes"])
    if -1 in sizes:
        sizes[sizes.index(-1)] = source.shape[dim] // math.prod(n for n in sizes if n != -1)
    return Array((*source.shape[:dim], *sizes, *source.shape[dim + 1 :]), source.dtype, source.data)


@operates("unsqueeze")
def _unsqueeze(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "dim")
    source = given["input"]
    place = given["dim"] % (len(source.shape) + 1)
    return Array((*source.shape[:place], 1, *source.shape[place:]), source.dtype, source.data)


@operates("squeeze")
def _squeeze(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "dim")
    source, rank = given["input"], len(given["input"].shape)
    dims = given.get("dim", tuple(range(rank)))
    dims = {d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return Array(tuple(n for d, n in enumerate(source.shape) if d not in dims or n != 1), source.dtype, source.data)


def _permuted(source: Array, order: Sequence[int]) -> Array:
    """Dimension d of the result is dimension order[d] of the source."""
    back = [list(order).index(d) for d in range(len(order))]
    return make([source.shape[d] for d in order], source.dtype, lambda *i: source[[i[back[d]] for d in range(len(order))]])


@operates("transpose", "swapaxes", "swapdims")
def _transpose(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "dim0", "dim1")
    source = given["input"]
    order = list(range(len(source.shape)))
    a, b = given["dim0"] % len(order), given["dim1"] % len(order)
    order[a], order[b] = order[b], order[a]
    return _permuted(source, order)


@operates("adjoint")
def _adjoint(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source = bind(node, args, kwargs, "input")["input"]
    rank = len(source.shape)
    return _permuted(source, [*range(rank - 2), rank - 1, rank - 2])


@operates("movedim", "moveaxis")
def _movedim(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "source", "destination")
    rank = len(given["input"].shape)
    source, target = ([d % rank for d in (x if isinstance(x, (list, tuple)) else [x])] for x in (given["source"], given["destination"]))
    rest = iter([d for d in range(rank) if d not in source])
    return _permuted(given["input"], [source[target.index(d)] if d in target else next(rest) for d in range(rank)])


@operates("t")
def _t(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source = bind(node, args, kwargs, "input")["input"]
    return _permuted(source, list(range(len(source.shape)))[::-1])


@operates("getattr")
def _attribute(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    source, name = args
    rank = len(source.shape)
    if name == "shape":
        return source.shape
    if name in ("mT", "mH") or (name in ("T", "H") and rank == 2):
        return _permuted(source, [*range(rank - 2), rank - 1, rank - 2])
    if name == "dtype":
        return source.dtype
    raise Unevaluable(f"the attribute {name}")


@operates("permute")
def _permute(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source, order = _shaped(node, args, kwargs)
    return _permuted(source, [d % len(source.shape) for d in order])


@operates("size")
def _size(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    given = bind(node, args, kwargs, "input", "dim")
    return given["input"].shape if given.get("dim") is None else given["input"].shape[given["dim"]]


@operates("getitem")
def _getitem(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    source, index = args
    if not isinstance(source, Array):
        return source[index]
    index = list(index) if isinstance(index, tuple) else [index]
    used = sum(j is not None and j is not Ellipsis for j in index)
    if Ellipsis in [j for j in index if j is Ellipsis]:
        place = next(n for n, j in enumerate(index) if j is Ellipsis)
        index[place : place + 1] = [slice(None)] * (len(source.shape) - used)
    else:
        index += [slice(None)] * (len(source.shape) - used)
    if any(isinstance(j, Array) for j in index):
        return _gather(source, index)
    shape: list[int] = []
    picks: list[Any] = []  # per source dimension: a position, or (place in the result's index, first, step)
    for j in index:
        if j is None:
            shape.append(1)
            continue
        size = source.shape[len(picks)]
        if isinstance(j, slice):
            first, last, step = j.indices(size)
            picks.append((len(shape), first, step))
            shape.append(max(0, -(-(last - first) // step)))
        else:
            if isinstance(j, bool) or not -size <= j < size:
                raise Unevaluable(f"index {j} of {size}")
            picks.append(j % size)
    return make(shape, source.dtype, lambda *i: source[[p if isinstance(p, int) else p[1] + p[2] * i[p[0]] for p in picks]])


def _gather(source: Array, index: list[Any]) -> Array:
    if len(index) != len(source.shape) or any(not isinstance(j, (Array, int)) or isinstance(j, bool) for j in index):
        raise Unevaluable("a partial advanced index")
    if any(isinstance(j, Array) and j.dtype not in (torch.int32, torch.int64) for j in index):
        raise Unevaluable("an index that is a mask")
    shape = broadcast(*(j.shape for j in index if isinstance(j, Array)))
    places = [spread(j, shape) for j in index]

    def at(*i: int) -> Scalar:
        found = [int(place(*i)) for place in places]
        if any(not -size <= n < size for n, size in zip(found, source.shape, strict=True)):
            raise Unevaluable("an index out of range")
        return source[[n % size for n, size in zip(found, source.shape, strict=True)]]

    return make(shape, source.dtype, at)


@operates("select")
def _select(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "dim", "index")
    source = given["input"]
    dim = given["dim"] % len(source.shape)
    place = given["index"] % source.shape[dim]
    return make((*source.shape[:dim], *source.shape[dim + 1 :]), source.dtype, lambda *i: source[[*i[:dim], place, *i[dim:]]])


@operates("narrow")
def _narrow(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "dim", "start", "length")
    source, start, length = given["input"], given["start"], given["length"]
    dim = given["dim"] % len(source.shape)
    if isinstance(start, Array):
        start = start.data[0]
    start = start + source.shape[dim] if start < 0 else start
    shape = (*source.shape[:dim], length, *source.shape[dim + 1 :])
    return make(shape, source.dtype, lambda *i: source[[*i[:dim], i[dim] + start, *i[dim + 1 :]]])


@operates("triu", "tril")
def _triangle(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "diagonal")
    source, diagonal = given["input"], given.get("diagonal", 0)
    kept = operator.ge if word(node) == "triu" else operator.le
    return make(source.shape, source.dtype, lambda *i: source[i] if kept(i[-1] - i[-2], diagonal) else 0)


@operates("diff")
def _diff(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "n", "dim", "prepend", "append")
    source, dim = given["input"], given.get("dim", -1) % len(given["input"].shape)
    if given.get("n", 1) != 1 or given.get("append") is not None:
        raise Unevaluable("another difference")
    parts = [p for p in (given.get("prepend"), source) if p is not None]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = promote(dtype, part.dtype)
    length = sum(p.shape[dim] for p in parts)

    def at(*i: int) -> Scalar:
        place = i[dim]
        for part in parts:
            if place < part.shape[dim]:
                return convert(part[[*i[:dim], place, *i[dim + 1 :]]], dtype)
            place -= part.shape[dim]
        raise AssertionError

    def difference(*i: int) -> Scalar:
        here, there = at(*i), at(*i[:dim], i[dim] + 1, *i[dim + 1 :])
        return here != there if dtype is torch.bool else there - here

    return make((*source.shape[:dim], length - 1, *source.shape[dim + 1 :]), dtype, difference)


@operates("cumsum")
def _cumsum(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "dim", "dtype")
    source = given["input"]
    dtype = given.get("dtype") or (torch.int64 if source.dtype in WHOLE else source.dtype)
    if dtype not in INTEGERS:
        raise Unevaluable("sums of floats, whose order is not documented")
    dim = given["dim"] % len(source.shape)
    return make(source.shape, dtype, lambda *i: sum(convert(source[[*i[:dim], n, *i[dim + 1 :]]], dtype) for n in range(i[dim] + 1)))

"""How each tensor operator of a mask is read. One function per group of operators; `reader` finds them by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.aliasing import tensor_of
from sparsify.compat import operator_word
from sparsify.reader import Reader, argument, arithmetic, cast, checked_index, handles, no_more, relation, rounded
from sparsify.symbolic import CONDITION, Cases, Element, Unreadable, as_condition, as_number, choose, lift, number, scalar, sizes

At = Callable[..., Element]
_DEVICE = ("device", "dtype", "layout", "requires_grad", "pin_memory", "names", "memory_format", "non_blocking", "copy")


def _pair(reader: Reader, node: fx.Node, rank: int) -> tuple[At, At]:
    other = argument(node, 1, "other")
    return reader.read(node.args[0]).broadcast(rank), reader.read(other).broadcast(rank)


@handles("add", "sub", "mul")
def _arithmetic(reader: Reader, node: fx.Node) -> At:
    no_more(node, "other")
    tensor = tensor_of(node)
    name = operator_word(node)
    left, right = _pair(reader, node, tensor.dim())
    if tensor.dtype is torch.bool:
        if name != "mul":
            raise Unreadable(f"{name} of booleans")
        return lambda *i: sympy.And(as_condition(left(*i)), as_condition(right(*i)))
    return lambda *i: arithmetic(name, left(*i), right(*i), tensor.dtype)


@handles("rsub")
def _rsub(reader: Reader, node: fx.Node) -> At:
    no_more(node, "other")
    tensor = tensor_of(node)
    left, right = _pair(reader, node, tensor.dim())
    return lambda *i: arithmetic("sub", right(*i), left(*i), tensor.dtype)


@handles("neg")
def _neg(reader: Reader, node: fx.Node) -> At:
    dtype, source = tensor_of(node).dtype, reader.read(node.args[0])
    return lambda *i: arithmetic("mul", source.at(*i), sympy.Integer(-1), dtype)


@handles("abs", "absolute")
def _abs(reader: Reader, node: fx.Node) -> At:
    source = reader.read(node.args[0])
    if tensor_of(node).dtype not in (torch.int32, torch.int64):
        raise Unreadable("the absolute value of floats")
    return lambda *i: lift(sympy.Abs, as_number(source.at(*i)))


@handles("le", "lt", "ge", "gt", "eq", "ne")
def _compare(reader: Reader, node: fx.Node) -> At:
    no_more(node, "other")
    name = operator_word(node)
    rank, other = tensor_of(node).dim(), argument(node, 1, "other")
    left, right = _pair(reader, node, rank)
    dtypes = (reader.read(node.args[0]).dtype, reader.read(other).dtype)
    if dtypes == (torch.bool, torch.bool) and name in ("eq", "ne"):
        agree = sympy.Equivalent if name == "eq" else sympy.Xor
        return lambda *i: agree(as_condition(left(*i)), as_condition(right(*i)))
    return lambda *i: relation(name, left(*i), right(*i), dtypes)


@handles("and_", "or_", "__and__", "__or__", "xor", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor")
def _connect(reader: Reader, node: fx.Node) -> At:
    no_more(node, "other")
    name = operator_word(node)
    if tensor_of(node).dtype is not torch.bool:
        raise Unreadable(f"{name} of integers")
    left, right = _pair(reader, node, tensor_of(node).dim())
    join = sympy.And if "and" in name else sympy.Xor if "xor" in name else sympy.Or
    return lambda *i: join(as_condition(left(*i)), as_condition(right(*i)))


@handles("invert", "__invert__", "logical_not", "bitwise_not")
def _not(reader: Reader, node: fx.Node) -> At:
    if tensor_of(node).dtype is not torch.bool:
        raise Unreadable("the bitwise complement of integers")
    source = reader.read(node.args[0])
    return lambda *i: sympy.Not(as_condition(source.at(*i)))


@handles("where")
def _where(reader: Reader, node: fx.Node) -> At:
    tensor = tensor_of(node)
    first, second, third = (argument(node, n, name) for n, name in enumerate(("condition", "input", "other")))
    # the method's receiver is the value, the function's first argument the condition
    condition, then, otherwise = (second, first, third) if node.op == "call_method" else (first, second, third)
    chosen = [reader.read(x) for x in (condition, then, otherwise)]
    c, x, y = (f.broadcast(tensor.dim()) for f in chosen)
    kinds = [f.dtype for f in chosen]
    return lambda *i: choose(as_condition(c(*i)), cast(x(*i), kinds[1], tensor.dtype), cast(y(*i), kinds[2], tensor.dtype))


@handles("masked_fill")
def _masked_fill(reader: Reader, node: fx.Node) -> At:
    tensor = tensor_of(node)
    source, condition, value = (reader.read(argument(node, n, name)) for n, name in enumerate(("input", "mask", "value")))
    s, c, v = (f.broadcast(tensor.dim()) for f in (source, condition, value))
    return lambda *i: choose(as_condition(c(*i)), cast(v(*i), value.dtype, tensor.dtype), s(*i))


@handles("arange")
def _arange(reader: Reader, node: fx.Node) -> At:
    no_more(node, *_DEVICE, "start", "end", "step")
    if tensor_of(node).dtype.is_floating_point:
        raise Unreadable("a float range")
    bounds = [scalar(a) for a in node.args]
    start = bounds[0] if len(bounds) > 1 else scalar(node.kwargs.get("start", 0))
    step = bounds[2] if len(bounds) > 2 else scalar(node.kwargs.get("step", 1))
    return lambda i: sympy.expand(start + i * step)


@handles("ones", "zeros", "new_ones", "new_zeros", "ones_like", "zeros_like")
def _constant(reader: Reader, node: fx.Node) -> At:
    name = operator_word(node)
    dtype = tensor_of(node).dtype
    value = number(bool("ones" in name)) if dtype is torch.bool else sympy.Integer(int("ones" in name))
    return lambda *i: value


@handles("full", "new_full", "full_like")
def _full(reader: Reader, node: fx.Node) -> At:
    dtype = tensor_of(node).dtype
    value = scalar(argument(node, 1, "fill_value") if node.target is torch.full or len(node.args) < 3 else node.args[2])
    if not (dtype.is_floating_point or isinstance(value, CONDITION) or value.is_integer):
        raise Unreadable("a fraction becomes an integer")
    return lambda *i: cast(value, torch.float64, dtype) if dtype.is_floating_point else cast(value, torch.int64, dtype)


@handles("tensor", "scalar_tensor")
def _literal(reader: Reader, node: fx.Node) -> At:
    if tensor_of(node).dim() != 0 or not isinstance(node.args[0], (bool, int, float)):
        raise Unreadable("a literal tensor")
    dtype = tensor_of(node).dtype
    value = rounded(float(node.args[0]), dtype) if dtype.is_floating_point else cast(number(node.args[0]), torch.int64, dtype)
    return lambda: value


@handles("to", "type", "float", "double", "half", "bfloat16", "bool", "int", "long", "type_as", "contiguous", "clone", "detach", "_to_copy")
def _convert(reader: Reader, node: fx.Node) -> At:
    source, target = reader.read(node.args[0]), tensor_of(node).dtype
    if source.dtype is target:
        return source.at
    return lambda *i: cast(source.at(*i), source.dtype, target)


@handles("expand", "expand_as", "broadcast_to")
def _expand(reader: Reader, node: fx.Node) -> At:
    return reader.read(node.args[0]).broadcast(tensor_of(node).dim())


@handles("unsqueeze")
def _unsqueeze(reader: Reader, node: fx.Node) -> At:
    source = reader.read(node.args[0])
    place = argument(node, 1, "dim") % tensor_of(node).dim()
    return lambda *i: source.at(*i[:place], *i[place + 1 :])


@handles("squeeze", "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(reader: Reader, node: fx.Node) -> At:
    """Only where the shapes differ in dimensions of size 1: then no element moves."""
    source, target = reader.read(node.args[0]), sizes(tensor_of(node))
    old = [d for d, size in enumerate(source.shape) if size != 1]
    new = [d for d, size in enumerate(target) if size != 1]
    if [source.shape[d] for d in old] != [target[d] for d in new]:
        raise Unreadable("a reshape that merges or splits dimensions")

    def at(*i: sympy.Expr) -> Element:
        indices = [sympy.Integer(0)] * len(source.shape)
        for here, there in zip(old, new, strict=True):
            indices[here] = i[there]
        return source.at(*indices)

    return at


@handles("transpose", "swapaxes")
def _transpose(reader: Reader, node: fx.Node) -> At:
    source, rank = reader.read(node.args[0]), tensor_of(node).dim()
    order = list(range(rank))
    a, b = argument(node, 1, "dim0") % rank, argument(node, 2, "dim1") % rank
    order[a], order[b] = order[b], order[a]
    return lambda *i: source.at(*(i[d] for d in order))


@handles("getattr")
def _attribute(reader: Reader, node: fx.Node) -> At:
    """A view that is written as an attribute."""
    rank, name = tensor_of(node).dim(), node.args[1]
    if name != "mT" and (name != "T" or rank != 2):
        raise Unreadable(f"the attribute {name}")
    source = reader.read(node.args[0])
    return lambda *i: source.at(*i[:-2], i[-1], i[-2])


@handles("permute")
def _permute(reader: Reader, node: fx.Node) -> At:
    source, rank = reader.read(node.args[0]), tensor_of(node).dim()
    order = argument(node, 1, "dims")
    order = [d % rank for d in (order if isinstance(order, (tuple, list)) else node.args[1:])]
    return lambda *i: source.at(*(i[order.index(d)] for d in range(rank)))


@handles("getitem")
def _getitem(reader: Reader, node: fx.Node) -> At:
    if tensor_of(node.args[0]) is None:
        raise Unreadable("an item of a tuple")
    source, index = reader.read(node.args[0]), node.args[1]
    index = list(index) if isinstance(index, tuple) else [index]
    if any(tensor_of(j) is not None for j in index):
        return _gather(reader, node, index)
    if any(j is Ellipsis for j in index):
        place = next(n for n, j in enumerate(index) if j is Ellipsis)
        used = sum(j is not None for j in index) - 1
        index[place : place + 1] = [slice(None)] * (len(source.shape) - used)
    index += [slice(None)] * (len(source.shape) - sum(j is not None for j in index))
    steps: list[tuple[str, Any]] = []
    dimension = 0
    for j in index:
        if j is None:
            steps.append(("new", None))
            continue
        steps.append(_step(reader, j, source.shape[dimension]))
        dimension += 1

    def at(*i: sympy.Expr) -> Element:
        rest, indices = list(i), []
        for kind, value in steps:
            if kind == "new":
                rest.pop(0)
            else:
                indices.append(value if kind == "at" else sympy.expand(rest.pop(0) + value))
        return source.at(*indices)

    return at


def _step(reader: Reader, index: Any, size: sympy.Expr) -> tuple[str, sympy.Expr]:
    """How one dimension is indexed: ("at", position) or ("from", first position)."""
    if isinstance(index, slice):
        if index.step not in (None, 1):
            raise Unreadable("a slice with a step")
        return "from", _place(reader, 0 if index.start is None else index.start, size, clamps=True)
    return "at", _place(reader, index, size, clamps=False)


def _place(reader: Reader, index: Any, size: sympy.Expr, clamps: bool) -> sympy.Expr:
    place, holds = scalar(index), reader.facts.holds
    if isinstance(place, CONDITION):
        raise Unreadable("a boolean index")
    if holds(sympy.Lt(place, 0)):
        place = sympy.expand(place + size)
    if not holds(sympy.Ge(place, 0)) or (clamps and not holds(sympy.Le(place, size))):
        raise Unreadable(f"the index {place} may be out of range")
    return place


def _gather(reader: Reader, node: fx.Node, index: list[Any]) -> At:
    source, rank = reader.read(node.args[0]), tensor_of(node).dim()
    if len(index) != len(source.shape) or any(tensor_of(j) is None and not isinstance(j, (int, fx.Node)) for j in index):
        raise Unreadable("a partial advanced index")
    parts = [reader.read(j) for j in index]
    if any(p.dtype not in (torch.int32, torch.int64) for p in parts):
        raise Unreadable("a boolean index")
    places = [p.broadcast(rank) for p in parts]
    return lambda *i: source.at(*(checked_index(reader, place(*i)) for place in places))


@handles("select", "narrow")
def _select(reader: Reader, node: fx.Node) -> At:
    source = reader.read(node.args[0])
    dimension = argument(node, 1, "dim") % len(source.shape)
    keep = (node.target if isinstance(node.target, str) else node.target.__name__) == "narrow"
    place = _place(reader, argument(node, 2, "start" if keep else "index"), source.shape[dimension], clamps=False)

    def at(*i: sympy.Expr) -> Element:
        if keep:
            return source.at(*i[:dimension], sympy.expand(i[dimension] + place), *i[dimension + 1 :])
        return source.at(*i[:dimension], place, *i[dimension:])

    return at


@handles("triu", "tril")
def _triangle(reader: Reader, node: fx.Node) -> At:
    source, dtype = reader.read(node.args[0]), tensor_of(node).dtype
    diagonal = scalar(argument(node, 1, "diagonal", 0))
    upper = (node.target if isinstance(node.target, str) else node.target.__name__) == "triu"

    def at(*i: sympy.Expr) -> Element:
        distance = sympy.expand(i[-1] - i[-2] - diagonal)
        kept = sympy.Ge(distance, 0) if upper else sympy.Le(distance, 0)
        return choose(kept, source.at(*i), sympy.false if dtype is torch.bool else sympy.Integer(0))

    return at


@handles("diff")
def _diff(reader: Reader, node: fx.Node) -> At:
    """Along the last dimension; the first difference is taken with `prepend`, of length 1."""
    no_more(node, "prepend", "dim", "n")
    tensor = tensor_of(node)
    prepend = argument(node, 3, "prepend")
    if argument(node, 1, "n", 1) != 1 or argument(node, 2, "dim", -1) not in (-1, tensor.dim() - 1) or tensor_of(prepend) is None:
        raise Unreadable("a difference of another form")
    source, before = reader.read(node.args[0]), reader.read(prepend)
    if before.shape[-1] != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise Unreadable("a difference of another form")

    def at(*i: sympy.Expr) -> Element:
        *row, last = i
        first = arithmetic("sub", source.at(*row, sympy.Integer(0)), before.at(*row, sympy.Integer(0)), tensor.dtype)
        other = arithmetic("sub", source.at(*row, last), source.at(*row, last - 1), tensor.dtype)
        return first if first == other else choose(sympy.Eq(last, 0), first, other)

    return at


@handles("cumsum")
def _cumsum(reader: Reader, node: fx.Node) -> At:
    """Sums of a constant along the last dimension; sums of `diff(p) != 1` are kept as the run numbers of p."""
    no_more(node, "dim", "dtype")
    tensor = tensor_of(node)
    if argument(node, 1, "dim") not in (-1, tensor.dim() - 1):
        raise Unreadable("a cumulative sum over another dimension")
    source = reader.read(node.args[0])
    probe = sympy.symbols(f"i:{tensor.dim()}", integer=True, nonnegative=True)
    term = as_number(source.at(*probe))
    if not isinstance(term, Cases) and term.is_Integer:
        return lambda *i: sympy.expand(term * (i[-1] + 1))
    if _counts_breaks(node.args[0]):
        reader.runs[node.name] = reader.read(node.args[0].args[0].args[0]).at
    raise Unreadable("a cumulative sum of data")


def _counts_breaks(node: Any) -> bool:
    """Whether the node is `diff(p, prepend=one value per row) != 1` along the last dimension: its sums number the runs of p."""
    if not isinstance(node, fx.Node) or node.target not in (operator.ne, torch.ne, "ne") or node.args[1:] != (1,):
        return False
    difference = node.args[0]
    if not isinstance(difference, fx.Node) or difference.target not in (torch.diff, "diff"):
        return False
    tensor, prepend = tensor_of(difference), tensor_of(argument(difference, 3, "prepend"))
    return (
        not set(difference.kwargs) - {"prepend", "dim", "n"}
        and prepend is not None
        and prepend.shape[-1] == 1
        and argument(difference, 1, "n", 1) == 1
        and argument(difference, 2, "dim", -1) in (-1, tensor.dim() - 1)
    )

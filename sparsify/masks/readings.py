"""How each tensor operator of a mask is read: one handler per group of operators, registered by name.

Handlers get arguments by torch's names. Arguments with an underscore in the signature are not passed on: their effect shows in the example
value's shape and dtype.
"""

from __future__ import annotations

import types
import typing
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.compat import operator_word
from sparsify.graph.views import PERMUTATIONS, permutation
from sparsify.masks.numerics import INTEGERS, Typed, arithmetic, cast, relation, truth
from sparsify.masks.reader import At, Reader, TensorFunction, bind_named_call, checked_index, example_value, handles
from sparsify.masks.symbolic import (
    Cases,
    Element,
    Unreadable,
    as_condition,
    as_number,
    cases,
    choose,
    compare,
    lift,
    loads,
    number,
    scalar,
    sizes,
)

# what stands between the brackets for one dimension
_Index: TypeAlias = "int | slice[Any, Any, Any] | fx.Node | torch.SymInt | types.EllipsisType | None"
_OPTIONS = "_dtype=None, _device=None, _layout=None, _pin_memory=False, _requires_grad=False"
_FACTORY = f"*, {_OPTIONS}"
_LIKE = f"{_FACTORY}, _memory_format=None"
_TO = "_dtype=None, _device=None, _other=None, _non_blocking=False, _copy=False, _memory_format=None"
_BINARY = "input, other"


def _pair(reader: Reader, node: fx.Node, left: Any, right: Any) -> tuple[At, At]:
    shape = sizes(example_tensor(node))
    return reader.spread(left, shape), reader.spread(right, shape)


def _dtypes(reader: Reader, *operands: Any) -> list[torch.dtype]:
    return [reader.read(operand).dtype for operand in operands]


@handles("add", "sub", signature="input, other, *, alpha=1 | input, alpha: number, other: tensor")
def _sum(reader: Reader, node: fx.Node, input: Any, other: Any, alpha: Any) -> At:
    name = operator_word(node)
    if example_tensor(node).dtype is torch.bool:
        raise Unreadable(f"{name} of booleans")
    return _scaled_sum(reader, node, name, input, other, alpha)


@handles("rsub", signature="input, other, *, alpha=1")
def _rsub(reader: Reader, node: fx.Node, input: Any, other: Any, alpha: Any) -> At:
    return _scaled_sum(reader, node, "sub", other, input, alpha)


def _scaled_sum(reader: Reader, node: fx.Node, name: str, first: Any, second: Any, alpha: Any) -> At:
    """first ± alpha · second"""
    dtype, (left, right) = example_tensor(node).dtype, _pair(reader, node, first, second)
    kinds, factor = _dtypes(reader, first, second), reader.read(alpha)
    if factor.shape or (dtype.is_floating_point and factor.at() != 1):
        raise Unreadable("a scaled sum")

    def at(*i: sympy.Expr) -> Element:
        term = (right(*i), kinds[1])
        if factor.at() != 1:
            term = arithmetic(reader.facts, "mul", term, (factor.at(), factor.dtype), dtype), dtype
        return arithmetic(reader.facts, name, (left(*i), kinds[0]), term, dtype)

    return at


@handles("mul", signature=_BINARY)
def _product(reader: Reader, node: fx.Node, input: Any, other: Any) -> At:
    dtype, (left, right) = example_tensor(node).dtype, _pair(reader, node, input, other)
    if dtype is torch.bool:
        return lambda *i: sympy.And(as_condition(left(*i)), as_condition(right(*i)))
    kinds = _dtypes(reader, input, other)
    return lambda *i: arithmetic(reader.facts, "mul", (left(*i), kinds[0]), (right(*i), kinds[1]), dtype)


@handles("floordiv", "floor_divide", signature=_BINARY)
def _floor_quotient(reader: Reader, node: fx.Node, input: Any, other: Any) -> At:
    """Of integers by a constant, rounded towards minus infinity."""
    dtype, source, divisor = example_tensor(node).dtype, reader.read(input), reader.read(other)
    by = None if divisor.shape or divisor.dtype not in INTEGERS else divisor.at()
    if dtype not in INTEGERS or not isinstance(by, sympy.Integer) or by < 1:
        raise Unreadable("a quotient by another number than a positive constant")

    def quotient(value: sympy.Expr) -> sympy.Basic:
        return FloorDiv(value, by)

    return lambda *i: lift(quotient, as_number(cast(reader.facts, source.at(*i), source.dtype, dtype)))


@handles("neg", "negative", signature="input")
def _neg(reader: Reader, node: fx.Node, input: Any) -> At:
    dtype, source = example_tensor(node).dtype, reader.read(input)
    return lambda *i: arithmetic(reader.facts, "mul", (source.at(*i), source.dtype), (sympy.Integer(-1), torch.int64), dtype)


@handles("abs", "absolute", signature="input")
def _abs(reader: Reader, node: fx.Node, input: Any) -> At:
    source, dtype = reader.read(input), example_tensor(node).dtype
    if dtype not in INTEGERS:
        raise Unreadable("the absolute value of floats")

    def distance(value: sympy.Expr) -> sympy.Expr:
        if not reader.facts.fits(value, dtype):
            raise Unreadable(f"the absolute value of {value} may overflow {dtype}")
        return sympy.Abs(value)

    return lambda *i: lift(distance, as_number(source.at(*i)))


@handles("le", "lt", "ge", "gt", "eq", "ne", signature=_BINARY)
def _compare(reader: Reader, node: fx.Node, input: Any, other: Any) -> At:
    name, kinds = operator_word(node), _dtypes(reader, input, other)
    left, right = _pair(reader, node, input, other)
    if kinds == [torch.bool, torch.bool] and name in ("eq", "ne"):
        agree = sympy.Equivalent if name == "eq" else sympy.Xor
        return lambda *i: agree(as_condition(left(*i)), as_condition(right(*i)))
    common = torch.result_type(*(_plain_example(operand) for operand in (input, other)))
    return lambda *i: relation(reader.facts, name, (left(*i), kinds[0]), (right(*i), kinds[1]), common)


def _plain_example(operand: Any) -> Any:
    """An operand for torch.result_type: its example tensor, or a Python number of the same type."""
    example = example_value(operand)
    if isinstance(example, torch.SymBool):
        return True
    return 1 if isinstance(example, torch.SymInt) else 1.0 if isinstance(example, torch.SymFloat) else example


@handles(
    *("and_", "or_", "xor", "__and__", "__or__", "__xor__"),
    *("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"),
    signature=_BINARY,
)
def _connect(reader: Reader, node: fx.Node, input: Any, other: Any) -> At:
    name = operator_word(node)
    if example_tensor(node).dtype is not torch.bool:
        raise Unreadable(f"{name} of integers")
    (left, right), kinds = _pair(reader, node, input, other), _dtypes(reader, input, other)
    join = sympy.And if "and" in name else sympy.Xor if "xor" in name else sympy.Or
    return lambda *i: join(truth(left(*i), kinds[0]), truth(right(*i), kinds[1]))


@handles("invert", "__invert__", "logical_not", "bitwise_not", signature="input")
def _not(reader: Reader, node: fx.Node, input: Any) -> At:
    if example_tensor(node).dtype is not torch.bool:
        raise Unreadable("the bitwise complement of integers")
    source = reader.read(input)
    return lambda *i: sympy.Not(truth(source.at(*i), source.dtype))


# the method's receiver is the value, the function's first argument the condition
@handles("where", signature="condition, input, other", method="input, condition, other")
def _where(reader: Reader, node: fx.Node, condition: Any, input: Any, other: Any) -> At:
    shape, dtype = sizes(example_tensor(node)), example_tensor(node).dtype
    c, x, y = (reader.spread(operand, shape) for operand in (condition, input, other))
    kinds = _dtypes(reader, condition, input, other)
    if kinds[0] is not torch.bool:
        raise Unreadable("a condition that is not boolean")

    def convert(element: Element, kind: torch.dtype) -> Element:
        return cast(reader.facts, element, kind, dtype)

    return lambda *i: choose(as_condition(c(*i)), convert(x(*i), kinds[1]), convert(y(*i), kinds[2]))


@handles("masked_fill", signature="input, mask, value")
def _masked_fill(reader: Reader, node: fx.Node, input: Any, mask: Any, value: Any) -> At:
    shape, dtype = sizes(example_tensor(node)), example_tensor(node).dtype
    s, c, v = (reader.spread(operand, shape) for operand in (input, mask, value))
    kinds = _dtypes(reader, input, mask, value)
    if kinds[:2] != [dtype, torch.bool]:
        raise Unreadable("a mask that is not boolean")
    return lambda *i: choose(as_condition(c(*i)), cast(reader.facts, v(*i), kinds[2], dtype), s(*i))


@handles("arange", signature=f"_end, {_FACTORY} | start, _end, step=1, {_FACTORY}")
def _arange(reader: Reader, node: fx.Node, start: Any = 0, step: Any = 1) -> At:
    dtype = example_tensor(node).dtype
    first, by = reader.read(start), reader.read(step)
    if {dtype, first.dtype, by.dtype} - set(INTEGERS) or first.shape or by.shape:
        raise Unreadable("a range that is not of integers")

    def at(i: sympy.Expr) -> Element:
        begin, by_one = (typing.cast(sympy.Expr, number.at()) for number in (first, by))
        value = sympy.expand(begin + i * by_one)
        return cast(reader.facts, value, torch.int64, dtype)

    return at


@handles("ones", "zeros", signature=f"*_size, {_OPTIONS}")
@handles("new_ones", "new_zeros", signature=f"_input, *_size, {_OPTIONS}")
@handles("ones_like", "zeros_like", signature=f"_input, {_LIKE}")
def _constant(reader: Reader, node: fx.Node) -> At:
    one = "ones" in operator_word(node)
    value = number(one) if example_tensor(node).dtype is torch.bool else sympy.Integer(int(one))
    return lambda *i: value


@handles("full", signature=f"_size, fill_value, {_FACTORY}")
@handles("new_full", signature=f"_input, _size, fill_value, {_FACTORY}")
@handles("full_like", signature=f"_input, fill_value, {_LIKE}")
@handles("tensor", signature=f"fill_value, {_FACTORY} | data, {_FACTORY}")
@handles("scalar_tensor", signature=f"fill_value, {_FACTORY} | s, {_FACTORY}")
def _full(reader: Reader, node: fx.Node, fill_value: Any = None, data: Any = None, s: Any = None) -> At:
    source = reader.read(next(value for value in (fill_value, data, s) if value is not None))
    if source.shape:
        raise Unreadable("a literal tensor")
    value = cast(reader.facts, source.at(), source.dtype, example_tensor(node).dtype)
    return lambda *i: value


@handles("to", signature=f"input, *, {_TO} | input, *_target, {_TO}")
@handles("type", signature="input, _dtype=None, _non_blocking=False")
@handles("type_as", signature="input, _other")
@handles("float", "double", "half", "bfloat16", "bool", "int", "long", "contiguous", "clone", signature="input, _memory_format=None")
@handles("detach", signature="input")
def _convert(reader: Reader, node: fx.Node, input: Any) -> At:
    source, target = reader.read(input), example_tensor(node).dtype
    return lambda *i: cast(reader.facts, source.at(*i), source.dtype, target)


@handles("expand", "broadcast_to", signature="input, *_size")
@handles("expand_as", signature="input, _other")
def _expand(reader: Reader, node: fx.Node, input: Any) -> At:
    return reader.spread(input, sizes(example_tensor(node)))


@handles("repeat", signature="input, *_repeats")
@handles("tile", signature="input, *_dims")
def _repeat(reader: Reader, node: fx.Node, input: Any) -> At:
    """Read where each dimension stays or is one element many times."""
    source, target = reader.read(input), sizes(example_tensor(node))
    rank = len(target) - len(source.shape)
    if any(old not in (1, new) for old, new in zip(source.shape, target[rank:], strict=True)):
        raise Unreadable("a repeat of more than one element")
    return source.broadcast(len(target))


@handles("repeat_interleave", signature="input, repeats, dim=None, *, _output_size=None")
def _repeat_interleave(reader: Reader, node: fx.Node, input: Any, repeats: Any, dim: Any = None) -> At:
    """By one constant count: element i of the dimension is element i // count of the input's."""
    source = reader.read(input)
    if type(repeats) is not int or repeats < 1:
        raise Unreadable("a repeat by another count than a positive constant")
    if dim is None and len(source.shape) != 1:
        raise Unreadable("a repeat that merges dimensions")
    place = 0 if dim is None else dim % len(source.shape)
    return lambda *i: source.at(*i[:place], sympy.expand(FloorDiv(i[place], sympy.Integer(repeats))), *i[place + 1 :])


@handles("pad", signature="input, pad, mode='constant', value=None", method="input")
def _pad(
    reader: Reader, node: fx.Node, input: Any, pad: tuple[Any, ...] | list[Any] | fx.Node = (), mode: str = "", value: Any = None
) -> At:
    """Of a constant, put before and behind."""
    source, dtype = reader.read(input), example_tensor(node).dtype
    filled = reader.read(0 if value is None else value)
    if mode != "constant" or filled.shape or not isinstance(pad, (tuple, list)):
        raise Unreadable("padded by other than a constant")
    fill = cast(reader.facts, filled.at(), filled.dtype, dtype)
    borders = [size for size in map(scalar, pad) if isinstance(size, sympy.Expr) and reader.facts.holds(sympy.Ge(size, 0))]
    if len(borders) < len(pad):
        raise Unreadable("a pad that may cut off")
    anywhere = source.at(*(sympy.Symbol(f"place{n}", integer=True, nonnegative=True) for n in range(len(source.shape))))
    if any(loads(part) for pair in cases(anywhere) for part in pair):
        # a clause on the padded tensor is as wide as the keys, one on what it is made of is not
        raise Unreadable("a pad of values that the graph is given")
    before = [*([sympy.Integer(0)] * (len(source.shape) - len(borders) // 2)), *borders[-2::-2]]

    def at(*i: sympy.Expr) -> Element:
        places = [sympy.expand(index - skipped) for index, skipped in zip(i, before, strict=True)]
        inside = [
            condition
            for place, size in zip(places, source.shape, strict=True)
            for condition in (compare(sympy.Ge, place, sympy.Integer(0)), compare(sympy.Lt, place, size))
        ]
        return choose(reader.facts.reduce(sympy.And(*inside)), source.at(*places), fill)

    return at


@handles("unsqueeze", signature="input, dim")
def _unsqueeze(reader: Reader, node: fx.Node, input: Any, dim: int) -> At:
    source, place = reader.read(input), dim % example_tensor(node).dim()
    return lambda *i: source.at(*i[:place], *i[place + 1 :])


@handles("squeeze", signature="input, _dim=None")
@handles("view", signature="input, *_size | input, _dtype: dtype")
@handles("reshape", signature="input, *_shape")
@handles("flatten", signature="input, _start_dim=0, _end_dim=-1")
@handles("unflatten", signature="input, _dim, _sizes")
@handles("view_as", "reshape_as", signature="input, _other")
def _reshape(reader: Reader, node: fx.Node, input: Any) -> At:
    """Read only where the shapes differ in dimensions of size 1: then no element moves."""
    source, target = reader.read(input), sizes(example_tensor(node))
    if source.dtype is not example_tensor(node).dtype:
        raise Unreadable("a view as another dtype")
    old = [d for d, size in enumerate(source.shape) if size != 1]
    new = [d for d, size in enumerate(target) if size != 1]
    if [source.shape[d] for d in old] != [target[d] for d in new]:
        raise Unreadable("a reshape that merges or splits dimensions")

    def at(*i: sympy.Expr) -> Element:
        indices: list[sympy.Expr] = [sympy.Integer(0)] * len(source.shape)
        for here, there in zip(old, new, strict=True):
            indices[here] = i[there]
        return source.at(*indices)

    return at


@handles(*PERMUTATIONS, signature="")
def _permute(reader: Reader, node: fx.Node) -> At:
    found = permutation(node)
    if found is None:
        raise Unreadable("dimensions reordered in a form that is not read")
    source, order = reader.read(found[0]), found[1]
    return lambda *i: source.at(*(i[order.index(d)] for d in range(len(order))))


@handles("getitem", signature="input, index")
def _getitem(reader: Reader, node: fx.Node, input: Any, index: tuple[_Index, ...] | _Index) -> At:
    if tensor_of(input) is None:
        raise Unreadable("an item of a tuple")
    source = reader.read(input)
    items: list[_Index] = list(index) if isinstance(index, tuple) else [index]
    if any(tensor_of(j) is not None for j in items):
        return _gather(reader, node, source, items)
    if any(j is Ellipsis for j in items):
        place = next(n for n, j in enumerate(items) if j is Ellipsis)
        used = sum(j is not None for j in items) - 1
        items[place : place + 1] = [slice(None)] * (len(source.shape) - used)
    items += [slice(None)] * (len(source.shape) - sum(j is not None for j in items))
    steps: list[tuple[str, Any]] = []
    dimension = 0
    for j in items:
        if j is None:
            steps.append(("new", None))
            continue
        steps.append(_step(reader, j, source.shape[dimension]))
        dimension += 1

    def at(*i: sympy.Expr) -> Element:
        rest = list(i)
        indices: list[sympy.Expr] = []
        for kind, value in steps:
            if kind == "new":
                rest.pop(0)
            else:
                indices.append(value if kind == "at" else sympy.expand(rest.pop(0) + value))
        return source.at(*indices)

    return at


def _step(reader: Reader, index: _Index, size: sympy.Expr) -> tuple[str, sympy.Expr]:
    """How one dimension is indexed: ("at", position) or ("from", first position)."""
    if isinstance(index, slice):
        if index.step not in (None, 1):
            raise Unreadable("a slice with a step")
        return "from", _place(reader, 0 if index.start is None else index.start, size, clamps=True)
    return "at", _place(reader, index, size, clamps=False)


def _place(reader: Reader, index: Any, size: sympy.Expr, clamps: bool) -> sympy.Expr:
    place, holds = scalar(index), reader.facts.holds
    if not isinstance(place, sympy.Expr) or not place.is_integer:
        raise Unreadable("an index that is no integer")
    if holds(sympy.Lt(place, 0)):
        place = sympy.expand(place + size)
    if not holds(sympy.Ge(place, 0)) or (clamps and not holds(sympy.Le(place, size))):
        raise Unreadable(f"the index {place} may be out of range")
    return place


def _gather(reader: Reader, node: fx.Node, source: TensorFunction, index: list[Any]) -> At:
    if len(index) != len(source.shape) or any(tensor_of(j) is None and not isinstance(j, (int, fx.Node)) for j in index):
        raise Unreadable("a partial advanced index")
    if set(_dtypes(reader, *index)) - set(INTEGERS):
        raise Unreadable("a boolean index")
    places = [reader.spread(j, sizes(example_tensor(node))) for j in index]
    return lambda *i: source.at(*(checked_index(reader, place(*i)) for place in places))


@handles("select", signature="input, dim, index")
def _select(reader: Reader, node: fx.Node, input: Any, dim: int, index: Any) -> At:
    source = reader.read(input)
    dimension = dim % len(source.shape)
    place = _place(reader, index, source.shape[dimension], clamps=False)
    return lambda *i: source.at(*i[:dimension], place, *i[dimension:])


@handles("narrow", signature="input, dim, start, _length")
def _narrow(reader: Reader, node: fx.Node, input: Any, dim: int, start: Any) -> At:
    source = reader.read(input)
    dimension = dim % len(source.shape)
    place = _place(reader, start, source.shape[dimension], clamps=False)
    return lambda *i: source.at(*i[:dimension], sympy.expand(i[dimension] + place), *i[dimension + 1 :])


@handles("triu", "tril", signature="input, diagonal=0")
def _triangle(reader: Reader, node: fx.Node, input: Any, diagonal: Any) -> At:
    source, dtype, border = reader.read(input), example_tensor(node).dtype, reader.read(diagonal)
    if border.shape or border.dtype is not torch.int64:
        raise Unreadable("a diagonal that is no integer")
    upper = operator_word(node) == "triu"

    def at(*i: sympy.Expr) -> Element:
        element = arithmetic(reader.facts, "sub", (i[-1] - i[-2], torch.int64), (border.at(), torch.int64), torch.int64)
        distance = typing.cast(sympy.Expr, element)
        kept = sympy.Ge(distance, 0) if upper else sympy.Le(distance, 0)
        return choose(kept, source.at(*i), sympy.false if dtype is torch.bool else sympy.Integer(0))

    return at


@handles("diff", signature="input, n=1, dim=-1, prepend=None, append=None")
def _diff(reader: Reader, node: fx.Node, input: Any, n: int, dim: int, prepend: Any, append: Any) -> At:
    """Along the last dimension; the first difference is taken with `prepend`, of length 1."""
    source, dtype = reader.read(input), example_tensor(node).dtype
    if not _first_differences(example_tensor(node), n, dim, prepend, append):
        raise Unreadable("a difference of another form")
    before = reader.read(prepend)

    def at(*i: sympy.Expr) -> Element:
        *row, last = i

        def subtract(x: Element, y: Typed) -> Element:
            return arithmetic(reader.facts, "sub", (x, source.dtype), y, dtype)

        first = subtract(source.at(*row, sympy.Integer(0)), (before.at(*row, sympy.Integer(0)), before.dtype))
        other = subtract(source.at(*row, last), (source.at(*row, last - 1), source.dtype))
        return first if first == other else choose(compare(sympy.Eq, last, sympy.Integer(0)), first, other)

    return at


def _first_differences(tensor: torch.Tensor, n: Any, dim: Any, prepend: Any, append: Any) -> bool:
    """Whether `diff` subtracts from every integer the one before it in its row, with one value put in front of the row."""
    before = tensor_of(prepend)
    return (
        (n, append) == (1, None)
        and dim in (-1, tensor.dim() - 1)
        and tensor.dtype in INTEGERS
        and before is not None
        and before.dim() == tensor.dim()
        and before.shape[-1] == 1
    )


@handles("cumsum", signature="input, dim, *, _dtype=None")
def _cumsum(reader: Reader, node: fx.Node, input: Any, dim: int) -> At:
    """Sums of an integer along the last dimension; sums of `diff(p) != 1` are kept as the run numbers of p."""
    tensor, source = example_tensor(node), reader.read(input)
    if dim not in (-1, tensor.dim() - 1):
        raise Unreadable("a cumulative sum over another dimension")
    probe = sympy.symbols(f"i:{tensor.dim()}", integer=True, nonnegative=True)
    term = cast(reader.facts, as_number(source.at(*probe)), source.dtype, tensor.dtype)
    if not isinstance(term, Cases) and term.is_Integer:

        def places(i: sympy.Expr) -> Typed:
            return sympy.expand(i + 1), torch.int64

        return lambda *i: arithmetic(reader.facts, "mul", (term, tensor.dtype), places(i[-1]), tensor.dtype)
    positions = _positions_of_breaks(input)
    if positions is not None:
        reader.runs[node.name] = reader.read(positions).at
    raise Unreadable("a cumulative sum of data")


def _positions_of_breaks(node: Any) -> fx.Node | None:
    """p where the node is `diff(p, prepend=one value per row) != 1` along the last dimension: its sums number the runs of p."""
    unequal = bind_named_call(node, "ne")
    if unequal is None or type(unequal["other"]) is not int or unequal["other"] != 1:
        return None
    difference = bind_named_call(unequal["input"], "diff")
    if difference is None:
        return None
    positions = difference.pop("input")
    whole = example_tensor(unequal["input"]), example_tensor(positions)
    return positions if whole[1].dtype is torch.int64 and _first_differences(whole[0], **difference) else None

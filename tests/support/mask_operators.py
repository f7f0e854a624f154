"""The operators of `mask_evaluator`, each from its entry in torch's documentation."""

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
    elementwise,
    make,
    operates,
    result_type,
    spread,
    word,
)


def _opmath(dtype: torch.dtype) -> torch.dtype:
    """What a half precision is computed in before the result is rounded."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


# -- arithmetic ----------------------------------------------------------------------------------------------------------------------------


@operates("add", "sub", "rsub")
def _sum(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    """input ± alpha * other; deprecated: (input, alpha, other)."""
    if len(args) == 3:
        given = bind(node, args, kwargs, "input", "alpha", "other")
        if not isinstance(given["other"], Array):
            raise Unevaluable("three numbers")
    else:
        given = bind(node, args, kwargs, "input", "other", "alpha")
    left, right, alpha = given["input"], given["other"], given.get("alpha", 1)
    dtype = result_type(left, right)
    name = word(node)
    if name == "rsub":
        left, right = right, left
    if name != "add" and torch.bool in [v.dtype if isinstance(v, Array) else type(v) for v in (left, right)]:
        raise Unevaluable("a difference of booleans")
    if dtype is torch.bool and isinstance(alpha, bool):
        return elementwise(lambda x, y: x or (y and alpha), dtype, (left, right), dtype)
    if isinstance(alpha, float) and dtype in WHOLE:
        raise Unevaluable("a fraction of integers")
    compute = _opmath(dtype)
    sign = 1 if name == "add" else -1

    def at(x: Scalar, y: Scalar) -> Scalar:
        scaled = convert(convert(alpha, compute) * y, compute) if dtype is not torch.bool else bool(alpha) and y
        return convert(x + sign * scaled, compute)

    return elementwise(at, dtype, (left, right), dtype)


@operates("mul")
def _product(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "other")
    dtype = result_type(given["input"], given["other"])
    compute = _opmath(dtype)
    return elementwise(lambda x, y: convert(_times(x, y), compute), dtype, (given["input"], given["other"]), dtype)


def _times(x: Scalar, y: Scalar) -> Scalar:
    return x * y if isinstance(x, (bool, int)) or isinstance(y, (bool, int)) or (x == x and y == y) else math.nan


@operates("floordiv", "floor_divide")
def _floor_quotient(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "other")
    dtype = result_type(given["input"], given["other"])
    if dtype not in WHOLE:
        raise Unevaluable("a quotient of fractions")

    def at(x: Scalar, y: Scalar) -> Scalar:
        if y == 0:
            raise Unevaluable("a quotient by zero")
        return x // y

    return elementwise(at, dtype, (given["input"], given["other"]), dtype)


@operates("neg", "negative", "abs", "absolute")
def _sign(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source = bind(node, args, kwargs, "input")["input"]
    if source.dtype is torch.bool:
        raise Unevaluable("the sign of booleans")
    return elementwise(operator.neg if word(node).startswith("neg") else abs, source.dtype, [source], source.dtype)


@operates("le", "lt", "ge", "gt", "eq", "ne")
def _compare(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "other")
    common = result_type(given["input"], given["other"])
    return elementwise(getattr(operator, word(node)), torch.bool, (given["input"], given["other"]), common)


@operates("and_", "or_", "xor", "bitwise_and", "bitwise_or", "bitwise_xor")
def _bitwise(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "other")
    dtype = result_type(given["input"], given["other"])
    if dtype not in WHOLE:
        raise Unevaluable("bits of floats")
    name = word(node)
    compute = operator.and_ if "and" in name else operator.xor if "xor" in name else operator.or_
    return elementwise(compute, dtype, (given["input"], given["other"]), dtype)


@operates("logical_and", "logical_or", "logical_xor")
def _logical(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "other")
    compute = {"logical_and": operator.and_, "logical_or": operator.or_, "logical_xor": operator.xor}[word(node)]
    values = (given["input"], given["other"])
    return elementwise(lambda x, y: compute(x != 0, y != 0), torch.bool, values, result_type(*values))


@operates("invert", "bitwise_not", "logical_not")
def _not(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source = bind(node, args, kwargs, "input")["input"]
    if word(node) == "logical_not":
        return elementwise(lambda x: x == 0, torch.bool, [source], source.dtype)
    if source.dtype not in WHOLE:
        raise Unevaluable("bits of floats")
    return elementwise((lambda x: not x) if source.dtype is torch.bool else operator.invert, source.dtype, [source], source.dtype)


@operates("where")
def _where(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    names = ("input", "condition", "other") if node.op == "call_method" else ("condition", "input", "other")
    given = bind(node, args, kwargs, *names)
    condition, then, otherwise = given["condition"], given["input"], given["other"]
    if condition.dtype not in (torch.bool, torch.uint8):
        raise Unevaluable("a condition of numbers")
    dtype = result_type(then, otherwise)
    shape = broadcast(*(v.shape for v in (condition, then, otherwise) if isinstance(v, Array)))
    c, x, y = (spread(v, shape) for v in (condition, then, otherwise))
    return make(shape, dtype, lambda *i: convert(x(*i) if c(*i) else y(*i), dtype))


@operates("masked_fill")
def _masked_fill(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "input", "mask", "value")
    source, mask, value = given["input"], given["mask"], given["value"]
    if mask.dtype is not torch.bool:
        raise Unevaluable("a mask of numbers")
    if isinstance(value, Array):
        if value.shape:
            raise Unevaluable("many values")
        value = value.data[0]
    shape = broadcast(source.shape, mask.shape)
    s, m = spread(source, shape), spread(mask, shape)
    return make(shape, source.dtype, lambda *i: convert(value, source.dtype) if m(*i) else s(*i))


# -- made from nothing ---------------------------------------------------------------------------------------------------------------------


@operates("arange")
def _arange(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    """(end) or (start, end, step=1): ceil((end - start) / step) elements."""
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", None)
    only_end = len(args) == 1 and "end" not in kwargs
    given = bind(node, args, kwargs, *(("end", "start", "step") if only_end else ("start", "end", "step")))
    start, end, step = given.get("start", 0), given["end"], given.get("step", 1)
    if dtype is None:
        dtype = torch.float32 if any(isinstance(x, float) for x in (start, end, step)) else torch.int64
    fractions = any(isinstance(x, float) and not x.is_integer() for x in (start, step))
    if (dtype not in INTEGERS or isinstance(step, float)) and (dtype in (torch.float16, torch.bfloat16) or fractions):
        raise Unevaluable("a range whose rounding is not documented")
    count = math.ceil((end - start) / step)
    first = convert(start, dtype) if dtype in INTEGERS else start
    return make((count,), dtype, lambda i: first + i * (convert(step, dtype) if dtype in INTEGERS else step))


def _dtype_for(value: Scalar) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32


@operates("ones", "zeros")
def _ones(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    size, dtype = _sizes(node, args, kwargs)
    return make(size, dtype or torch.float32, lambda *i: word(node) == "ones")


@operates("new_ones", "new_zeros", "new_full")
def _new(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source, *rest = args
    name, value = word(node), None
    kwargs = dict(kwargs)
    if name == "new_full":
        given = bind(node, rest, {k: v for k, v in kwargs.items() if k != "dtype"}, "size", "fill_value")
        size, dtype, value = given["size"], kwargs.get("dtype"), given["fill_value"]
    else:
        size, dtype = _sizes(node, rest, kwargs)
        value = name == "new_ones"
    return make(size, dtype or source.dtype, lambda *i: _filled(value))


def _sizes(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> tuple[Sequence[int], torch.dtype | None]:
    """Sizes one by one or as one argument, and a dtype."""
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", None)
    if args and not isinstance(args[0], (list, tuple)):
        args = [tuple(args)]
    return bind(node, args, kwargs, "size").get("size", ()), dtype


def _filled(value: Array | Scalar) -> Scalar:
    return value.data[0] if isinstance(value, Array) else value


@operates("full")
def _full(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "size", "fill_value", "dtype")
    value = _filled(given["fill_value"])
    return make(given["size"], given.get("dtype") or _dtype_for(value), lambda *i: value)


@operates("ones_like", "zeros_like", "full_like")
def _like(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", None)
    given = bind(node, args, kwargs, "input", "fill_value")
    value = _filled(given["fill_value"]) if word(node) == "full_like" else word(node) == "ones_like"
    return make(given["input"].shape, dtype or given["input"].dtype, lambda *i: value)


@operates("tensor", "scalar_tensor")
def _literal(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    given = bind(node, args, kwargs, "data", "dtype") if word(node) == "tensor" else bind(node, args, kwargs, "s", "dtype")
    value = given["data"] if "data" in given else given["s"]
    if isinstance(value, (list, tuple)):
        raise Unevaluable("a list")
    default = _dtype_for(value) if word(node) == "tensor" else torch.float32
    return make((), given.get("dtype") or default, lambda: value)


# -- conversions ---------------------------------------------------------------------------------------------------------------------------

_NAMED = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_NAMED |= {"bool": torch.bool, "int": torch.int32, "long": torch.int64}


@operates("to", "type", "type_as", "_to_copy", *_NAMED, "contiguous", "clone", "detach")
def _convert(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Array:
    source, name = args[0] if args else kwargs["input"], word(node)
    dtype = _NAMED.get(name, source.dtype)
    if name in ("to", "type", "type_as", "_to_copy"):
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Array):
                dtype = value.dtype
            elif not isinstance(value, (str, torch.device, bool, torch.memory_format)):
                raise Unevaluable(f"{name} with {value}")
    return make(source.shape, dtype, lambda *i: source[i])

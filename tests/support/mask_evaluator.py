"""A second interpreter of mask graphs: element by element in plain Python, written from torch's documentation.

It shares no code with `sparsify.masks.reader`, and asks torch for nothing but the elements of the graph's inputs: dtypes are promoted,
integers wrap around and floats are rounded here. Slow, small, and only for tests.
"""

from __future__ import annotations

import itertools
import math
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Scalar = bool | int | float
_BITS = {torch.uint8: 8, torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}
INTEGERS = tuple(_BITS)
WHOLE = (torch.bool, *INTEGERS)
_FLOAT_RANK = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class Unevaluable(Exception):
    """An operator, signature or dtype that is not interpreted."""


@dataclass(frozen=True)
class Array:
    """shape: sizes. dtype: torch's. data: elements in row-major order, as bool, int or (rounded) float."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    data: tuple[Scalar, ...]

    def __getitem__(self, index: Sequence[int]) -> Scalar:
        place = 0
        for size, i in zip(self.shape, index, strict=True):
            assert 0 <= i < size
            place = place * size + i
        return self.data[place]


def indices(shape: Sequence[int]) -> itertools.product:
    return itertools.product(*(range(size) for size in shape))


def make(shape: Sequence[int], dtype: torch.dtype, at: Callable[..., Scalar]) -> Array:
    """The array of these elements, each converted to the dtype."""
    return Array(tuple(shape), dtype, tuple(convert(at(*i), dtype) for i in indices(shape)))


def from_tensor(tensor: torch.Tensor) -> Array:
    return Array(tuple(tensor.shape), tensor.dtype, tuple(tensor.reshape(-1).tolist()))


# -- numbers -------------------------------------------------------------------------------------------------------------------------------


def convert(value: Scalar, dtype: torch.dtype) -> Scalar:
    """The number that a dtype holds: integers wrap around, fractions are cut off, floats are rounded to the nearest, ties to even."""
    if dtype is torch.bool:
        return value != 0
    if dtype in _BITS:
        if isinstance(value, float):
            high = 2 ** (_BITS[dtype] if dtype is torch.uint8 else _BITS[dtype] - 1)
            low = 0 if dtype is torch.uint8 else -high
            if not math.isfinite(value) or not low <= math.trunc(value) < high:
                raise Unevaluable("a float out of an integer's range is undefined")
            value = math.trunc(value)
        bits = _BITS[dtype]
        value = int(value) & ((1 << bits) - 1)
        return value if dtype is torch.uint8 or value < 1 << (bits - 1) else value - (1 << bits)
    if dtype is torch.float64:
        return float(value)
    single = _single(value)
    if dtype is torch.float32 or not math.isfinite(single):
        return single
    if dtype is torch.float16:
        try:
            return struct.unpack("<e", struct.pack("<e", single))[0]
        except OverflowError:
            return math.copysign(math.inf, single)
    if dtype is torch.bfloat16:
        bits = struct.unpack("<I", struct.pack("<f", single))[0]
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return struct.unpack("<f", struct.pack("<I", bits))[0]
    raise Unevaluable(f"{dtype}")


def _single(value: Scalar) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def promote(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The smallest dtype that both fit in, by torch's table."""
    if one is other or other is torch.bool:
        return one
    if one is torch.bool:
        return other
    if one in _FLOAT_RANK and other in _FLOAT_RANK:
        if _FLOAT_RANK[one] == _FLOAT_RANK[other]:
            return torch.float32
        return max(one, other, key=_FLOAT_RANK.__getitem__)
    if one in _FLOAT_RANK or other in _FLOAT_RANK:
        return one if one in _FLOAT_RANK else other
    wider, narrower = (one, other) if _BITS[one] >= _BITS[other] else (other, one)
    if torch.uint8 in (one, other):
        return torch.int16 if _BITS[wider] == 8 else wider
    return wider if _BITS[wider] >= _BITS[narrower] else narrower


def _category(dtype: torch.dtype) -> int:
    return 0 if dtype is torch.bool else 2 if dtype in _FLOAT_RANK else 1


def _of_number(value: Scalar) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32


def result_type(*values: Array | Scalar) -> torch.dtype:
    """Tensors with dimensions decide, unless a tensor without, or a number, is of a higher kind (bool, integer, float)."""
    groups: list[list[torch.dtype]] = [[], [], []]
    for value in values:
        if isinstance(value, Array):
            groups[0 if value.shape else 1].append(value.dtype)
        else:
            groups[2].append(_of_number(value))
    found: torch.dtype | None = None
    for group in groups:
        if not group:
            continue
        here = group[0]
        for dtype in group[1:]:
            here = promote(here, dtype)
        if found is None or _category(here) > _category(found):
            found = promote(found, here) if found is not None and group is groups[1] else here
    assert found is not None
    return found


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    found = tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))
    if any(n not in (1, size) for sizes, size in zip(zip(*padded, strict=True), found, strict=True) for n in sizes):
        raise Unevaluable("shapes do not broadcast")
    return found


def spread(value: Array | Scalar, shape: Sequence[int]) -> Callable[..., Scalar]:
    """The elements of a value that is broadcast to a shape."""
    if not isinstance(value, Array):
        return lambda *i: value
    skip = len(shape) - len(value.shape)
    return lambda *i: value[[0 if size == 1 else i[skip + d] for d, size in enumerate(value.shape)]]


def elementwise(compute: Callable[..., Scalar], dtype: torch.dtype, values: Sequence[Array | Scalar], common: torch.dtype) -> Array:
    """Each value is broadcast and converted to `common`; what is computed becomes `dtype`."""
    shape = broadcast(*(v.shape for v in values if isinstance(v, Array)))
    parts = [spread(v, shape) for v in values]
    return make(shape, dtype, lambda *i: compute(*(convert(part(*i), common) for part in parts)))


# -- signatures ----------------------------------------------------------------------------------------------------------------------------

_ALIASES = {"axis": "dim", "self": "input", "axis0": "dim0", "axis1": "dim1", "x": "input"}
_IGNORED = {"device", "layout", "requires_grad", "pin_memory", "memory_format", "non_blocking", "copy", "names"}
_MISSING = object()


def bind(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Arguments by name. Raises Unevaluable for what the signature does not have."""
    if len(args) > len(names):
        raise Unevaluable(f"{node.target} with {len(args)} arguments")
    found = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        name = name if name in names else _ALIASES.get(name, name)
        if name in _IGNORED:
            continue
        if name not in names or name in found:
            raise Unevaluable(f"{node.target} with an argument {name}")
        found[name] = value
    return found


class Evaluator:
    """Values of the nodes of one graph, for the given values of its inputs (tensors, or numbers for sizes)."""

    def __init__(self, inputs: Mapping[fx.Node, Any]):
        self._found: dict[fx.Node, Any] = {n: from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}

    def value(self, node: Any) -> Any:
        """The value of a node; anything else is its own."""
        if isinstance(node, (list, tuple)):
            return type(node)(map(self.value, node))
        if isinstance(node, slice):
            return slice(self.value(node.start), self.value(node.stop), self.value(node.step))
        if not isinstance(node, fx.Node):
            return node
        if node not in self._found:
            self._found[node] = self._evaluate(node)
        return self._found[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op not in ("call_function", "call_method"):
            raise Unevaluable(f"{node.op} {node.target}")
        args, kwargs = [self.value(a) for a in node.args], {k: self.value(v) for k, v in node.kwargs.items()}
        flat = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, (list, tuple)) else [a])]
        if not any(isinstance(a, Array) for a in flat) and node.op == "call_function" and node.target in vars(operator).values():
            return node.target(*args, **kwargs)  # arithmetic of sizes
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        name = _WORDS.get(name, name)
        if name not in OPERATORS:
            raise Unevaluable(f"{name} is not interpreted")
        return OPERATORS[name](node, args, kwargs)


Operator = Callable[[fx.Node, list[Any], dict[str, Any]], Any]
OPERATORS: dict[str, Operator] = {}
_WORDS = {f"__{name}__": name for name in ["add", "sub", "mul", "le", "lt", "ge", "gt", "eq", "ne", "invert", "neg", "getitem"]}
_WORDS |= {"__and__": "and_", "__or__": "or_", "__xor__": "xor", "__rsub__": "rsub", "__radd__": "add", "__rmul__": "mul"}


def operates(*names: str) -> Callable[[Operator], Operator]:
    def register(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


def word(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return _WORDS.get(name, name)


import tests.support.mask_operators  # noqa: E402  (registers operators)
import tests.support.mask_views  # noqa: E402, F401

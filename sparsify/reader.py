"""Reads a mask's FX subgraph: every tensor becomes a function from indices to a symbolic element.

What has no reading (graph inputs, unknown operators) becomes an uninterpreted function of its indices, so that a statement proved
about the result holds whatever the tensor contains. Integers are taken as unbounded; narrow integer types are left unread.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.aliasing import tensor_of
from sparsify.compat import operator_word
from sparsify.symbolic import (
    CONDITION,
    Cases,
    Element,
    Facts,
    Unreadable,
    as_condition,
    as_number,
    cases,
    compare,
    lift,
    loads,
    number,
    scalar,
    sizes,
)

_WIDE = (torch.bool, torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorFunction:
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    at: Callable[..., Element]

    def broadcast(self, rank: int) -> Callable[..., Element]:
        """`at` for the indices of a tensor of higher rank, by the broadcasting rules."""
        skip = rank - len(self.shape)
        return lambda *i: self.at(*(sympy.Integer(0) if size == 1 else i[skip + d] for d, size in enumerate(self.shape)))


class Reader:
    """Reads tensors of one graph under the given facts.

    leaves: node of every uninterpreted function by the function's name. reasons: why a node was left uninterpreted.
    runs: for a leaf that numbers the runs of consecutive numbers in a tensor (packed position ids): that tensor's reading.
    """

    def __init__(self, facts: Facts):
        self.facts = facts
        self.leaves: dict[str, fx.Node] = {}
        self.reasons: dict[str, str] = {}
        self.runs: dict[str, Callable[..., Element]] = {}
        self._read: dict[fx.Node, TensorFunction] = {}

    @property
    def nodes(self) -> list[fx.Node]:
        """Every tensor node read so far."""
        return list(self._read)

    def read(self, value: Any) -> TensorFunction:
        """A tensor node, or a Python number as a tensor of rank 0."""
        tensor = tensor_of(value)
        if tensor is None:
            constant = scalar(value)
            example = value.meta.get("example_value") if isinstance(value, fx.Node) else value
            whole = isinstance(example, (int, torch.SymInt)) or constant.is_Integer
            kind = torch.bool if isinstance(constant, CONDITION) else torch.int64 if whole else torch.float64
            return TensorFunction((), kind, lambda: constant)
        if value not in self._read:
            self._read[value] = self._interpret(value)
        return self._read[value]

    def leaf(self, node: fx.Node, reason: str = "") -> TensorFunction:
        """The node as an uninterpreted function of its indices."""
        tensor = tensor_of(node)
        if reason:
            self.reasons.setdefault(node.name, reason)
        whole = not tensor.dtype.is_floating_point
        function = sympy.Function(node.name, integer=True) if whole else sympy.Function(node.name, real=True)

        def at(*indices: sympy.Expr) -> Element:
            self.leaves[node.name] = node
            if any(isinstance(i, Cases) for i in indices):
                raise Unreadable(f"{node.name} is read at a conditional index")
            element = function(*(sympy.expand(i) for i in indices)) if indices else function(sympy.Integer(0))
            return sympy.Ne(element, 0) if tensor.dtype is torch.bool else element

        return TensorFunction(sizes(tensor), tensor.dtype, at)

    def _interpret(self, node: fx.Node) -> TensorFunction:
        tensor = tensor_of(node)
        if node.op == "placeholder":
            return self.leaf(node, "it is an input of the graph")
        if node.op not in ("call_function", "call_method"):
            return self.leaf(node, f"{node.op} is not read")
        name = node.target if node.op == "call_method" else _NAMES.get(node.target)
        handler = HANDLERS.get(name) or (HANDLERS.get(operator_word(node)) if node.op == "call_method" else None)
        if handler is None:
            return self.leaf(node, f"{name or getattr(node.target, '__name__', node.target)} is not read")
        if tensor.dtype not in _WIDE + _FLOATS:
            return self.leaf(node, f"{tensor.dtype} is not read")
        try:
            at = handler(self, node)
        except Unreadable as why:
            return self.leaf(node, str(why))
        fallback = self.leaf(node)

        def safely(*indices: sympy.Expr) -> Element:
            try:
                return at(*indices)
            except Unreadable as why:
                self.reasons.setdefault(node.name, str(why))
                return fallback.at(*indices)

        return TensorFunction(fallback.shape, tensor.dtype, safely)


Handler = Callable[[Reader, fx.Node], Callable[..., Element]]
HANDLERS: dict[str, Handler] = {}
_NAMES: dict[Any, str] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers a reading for methods, torch functions and operators of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
            for space in (operator, torch, torch.nn.functional, builtins):
                if hasattr(space, name):
                    _NAMES[getattr(space, name)] = name
        return handler

    return register


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def no_more(node: fx.Node, *names: str) -> None:
    """Refuses keyword arguments that the reading does not know."""
    unknown = set(node.kwargs) - set(names)
    if unknown:
        raise Unreadable(f"{node.name} has arguments {sorted(unknown)}")


def rounded(value: float, dtype: torch.dtype) -> sympy.Basic:
    """The number that a dtype holds."""
    return number(torch.tensor(value, dtype=dtype).item())


def cast(element: Element, source: torch.dtype, target: torch.dtype) -> Element:
    """An element after conversion; refuses conversions that could change the value unnoticed."""
    if target is torch.bool:
        return as_condition(element)
    element = as_number(element)
    if target in (torch.int32, torch.int64):
        if source.is_floating_point:
            raise Unreadable("a float becomes an integer")
        if source is torch.int64 and target is torch.int32 and any(loads(value) for _, value in cases(element)):
            raise Unreadable("data loses its upper bits")
        return element
    if not target.is_floating_point:
        raise Unreadable(f"a conversion to {target}")

    def convert(value: sympy.Expr) -> sympy.Basic:
        if value.is_number:
            return rounded(float(value), target)
        if source.is_floating_point and torch.promote_types(source, target) is target:
            return value
        if target in (torch.float32, torch.float64):
            return value
        raise Unreadable(f"a value rounded to {target}")

    return lift(convert, element)


_ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def arithmetic(name: str, left: Element, right: Element, dtype: torch.dtype) -> Element:
    """add, sub or mul of two elements in the result's dtype."""
    compute = _ARITHMETIC[name]

    def apply(x: sympy.Expr, y: sympy.Expr) -> sympy.Basic:
        if dtype.is_floating_point:
            if x.is_number and y.is_number:
                return number(compute(torch.tensor(float(x), dtype=dtype), torch.tensor(float(y), dtype=dtype)).item())
            if dtype not in (torch.float32, torch.float64) or x.is_infinite or y.is_infinite:
                raise Unreadable(f"{dtype} arithmetic on positions")
        return sympy.expand(compute(x, y))

    return lift(apply, as_number(left), as_number(right))


def relation(name: str, left: Element, right: Element, dtypes: tuple[torch.dtype, ...]) -> Element:
    """A comparison. Floats are compared only where both are constants: positions may have been rounded."""
    kind = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}[name]
    floats = any(d.is_floating_point for d in dtypes)
    if not floats and not set(dtypes) <= set(_WIDE):
        raise Unreadable("a comparison of narrow integers")

    def apply(x: sympy.Expr, y: sympy.Expr) -> sympy.Basic:
        if floats and not (x.is_number and y.is_number):
            raise Unreadable("a comparison of floats")
        return compare(kind, x, y)

    return lift(apply, as_number(left), as_number(right))


def checked_index(reader: Reader, index: Element) -> sympy.Expr:
    """An index that cannot be negative, so that it does not wrap around."""
    if isinstance(index, Cases) or loads(index):
        raise Unreadable("an index that depends on data")
    lowest = reader.facts.extreme(index, highest=False)
    if lowest is None or not reader.facts.holds(sympy.Ge(lowest, 0)):
        raise Unreadable(f"the index {index} may be negative")
    return index

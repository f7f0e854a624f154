"""Reads a mask's FX subgraph: every tensor becomes a function from indices to a symbolic element.

A tensor without a known reading (graph input, unknown operator, call of another form) becomes an uninterpreted function of its indices: a
statement proved about the result then holds whatever that tensor contains.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparsify.graph import calls
from sparsify.graph.aliasing import example_tensor, tensor_of
from sparsify.graph.compat import attribute, operator_word
from sparsify.graph.typed_torch import TRACED_FUNCTIONAL
from sparsify.masks.numerics import FLOATS, WIDE
from sparsify.masks.symbolic import CONDITION, Cases, Element, Facts, Unreadable, loads, scalar, sizes

At = Callable[..., Element]
Handler = Callable[..., At]


@dataclass(frozen=True)
class TensorFunction:
    """A tensor as a function.

    shape: its sizes.
    dtype: its dtype.
    at: maps one index per dimension to the element.
    """

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    at: At

    def broadcast(self, rank: int) -> At:
        """`at` for the indices of a tensor of higher rank, by the broadcasting rules."""
        skip = rank - len(self.shape)
        return lambda *i: self.at(*(sympy.Integer(0) if size == 1 else i[skip + d] for d, size in enumerate(self.shape)))


class Reader:
    """Reads tensors of one graph under the given facts.

    leaves: node of every uninterpreted function, by the function's name.
    reasons: why a node was left uninterpreted, by its name.
    runs: for a node that numbers the runs of consecutive values in a tensor (packed position ids), by name: that tensor's reading.
    """

    def __init__(self, facts: Facts):
        self.facts = facts
        self.leaves: dict[str, fx.Node] = {}
        self.reasons: dict[str, str] = {}
        self.runs: dict[str, At] = {}
        self._read: dict[fx.Node, TensorFunction] = {}

    @property
    def nodes(self) -> list[fx.Node]:
        """Every tensor node read so far."""
        return list(self._read)

    def read(self, value: Any) -> TensorFunction:
        """Reads a tensor node, or a Python number as a tensor of rank 0 and dtype int64, float64 or bool."""
        if tensor_of(value) is None:
            constant, whole = scalar(value), isinstance(example_value(value), (int, torch.SymInt))
            dtype = torch.bool if isinstance(constant, CONDITION) else torch.int64 if whole else torch.float64
            if dtype is torch.int64 and not self.facts.fits(typing.cast(sympy.Expr, constant), dtype):
                raise Unreadable(f"{constant} may not fit into {dtype}")
            return TensorFunction((), dtype, lambda: constant)
        if value not in self._read:
            self._read[value] = self._interpret(value)
        return self._read[value]

    def spread(self, value: Any, shape: tuple[sympy.Expr, ...]) -> At:
        """Reads an operand that torch broadcasts to `shape`: a function of that shape's indices."""
        source = self.read(value)
        for size, wide in zip(reversed(source.shape), reversed(shape), strict=False):
            if size not in (1, wide) and not self.facts.holds(sympy.Ne(size, 1)) and not self.facts.holds(sympy.Eq(size, wide)):
                raise Unreadable(f"a dimension of size {size}, which may be 1 and broadcast")
        return source.broadcast(len(shape))

    def leaf(self, node: fx.Node, reason: str = "") -> TensorFunction:
        """Reads a node as an uninterpreted function of its indices.

        Args:
            reason: why it is not interpreted, for the report.
        """
        tensor = example_tensor(node)
        if reason:
            self.reasons.setdefault(node.name, reason)
        whole = not tensor.dtype.is_floating_point
        function = sympy.Function(node.name, integer=True) if whole else sympy.Function(node.name, real=True)

        def at(*indices: sympy.Expr) -> Element:
            self.leaves[node.name] = node
            self.facts.data[node.name] = tensor.dtype
            if any(isinstance(i, Cases) for i in indices):
                raise Unreadable(f"{node.name} is read at a conditional index")
            element = function(*(sympy.expand(i) for i in indices)) if indices else function(sympy.Integer(0))
            return sympy.Ne(element, 0) if tensor.dtype is torch.bool else element

        return TensorFunction(sizes(tensor), tensor.dtype, at)

    def _interpret(self, node: fx.Node) -> TensorFunction:
        tensor = example_tensor(node)
        if node.op == "placeholder":
            return self.leaf(node, "it is an input of the graph")
        if node.op not in ("call_function", "call_method"):
            return self.leaf(node, f"{node.op} is not read")
        reading = find_reading(node)
        if reading is None:
            return self.leaf(node, f"{getattr(node.target, '__name__', node.target)} is not read")
        if tensor.dtype not in WIDE + FLOATS:
            return self.leaf(node, f"{tensor.dtype} is not read")
        try:
            at = reading.handler(self, node, **reading.bind(node))
        except Exception as why:
            return self.leaf(node, describe_failure(why))
        fallback = self.leaf(node)

        def safely(*indices: sympy.Expr) -> Element:
            try:
                return at(*indices)
            except Exception as why:
                self.reasons.setdefault(node.name, describe_failure(why))
                return fallback.at(*indices)

        return TensorFunction(fallback.shape, tensor.dtype, safely)


def describe_failure(why: Exception) -> str:
    """Text for the report: why a node has no reading. Exceptions other than refusals mean a form that the reading does not cover."""
    return (
        str(why) if isinstance(why, (Unreadable, calls.Unbound)) else f"a form that is not foreseen ({type(why).__name__}: {str(why)[:80]})"
    )


def example_value(value: Any) -> Any:
    """The example value of a node; any other value unchanged."""
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


# -- how calls are bound -------------------------------------------------------------------------------------------------------------------

_NAMES: dict[Any, str] = {}
_READINGS: dict[str, Reading] = {}


@dataclass(frozen=True)
class Reading:
    """How calls of some name are read.

    handler: makes the tensor function from the bound arguments.
    function, method: signatures of both forms.
    settled: arguments whose effect is known from the example value; the handler does not get them.
    """

    handler: Handler
    function: tuple[str, ...]
    method: tuple[str, ...]
    settled: frozenset[str]

    def bind(self, node: fx.Node) -> dict[str, Any]:
        """The call's arguments by name, without the settled ones.

        Raises:
            calls.Unbound: an argument is left over or missing in all signatures.
        """
        signatures = self.method if node.op == "call_method" else self.function
        arguments = vars(calls.bind(node, *signatures)) if signatures else {}
        return {name: value for name, value in arguments.items() if name not in self.settled}


def handles(*names: str, signature: str, method: str = "") -> Callable[[Handler], Handler]:
    """Registers a reading for methods, torch functions and operators of these names.

    signature: the parameters of torch as `calls.bind` takes them, overloads apart by "|". The handler gets them by name, except those
        written with an underscore in front: what they do is known from the example value (its shape, its dtype), or they do nothing.
        A call that has others is unreadable. Empty: the handler binds the call itself.
    method: likewise where the method takes others than the function; its receiver comes first.
    """
    forms = tuple(tuple(part.strip() for part in text.split("|") if part.strip()) for text in (signature, method or signature))
    written = {name for form in forms for part in form for name in calls.names(part)}
    settled = frozenset(name[1:] for name in written if name.startswith("_"))
    function, of_method = (tuple(re.sub(r"\b_(?=\w)", "", part) for part in form) for form in forms)

    def register(handler: Handler) -> Handler:
        missing = {name for name in written if not name.startswith("_")} - set(inspect.signature(handler).parameters)
        if missing:
            raise TypeError(f"the reading of {names[0]} ignores {sorted(missing)}")
        for name in names:
            _READINGS[name] = Reading(handler, function, of_method, settled)
            for space in (operator, torch, torch.nn.functional, TRACED_FUNCTIONAL, builtins):
                if callable(getattr(space, name, None)):
                    _NAMES[getattr(space, name)] = name
        return handler

    return register


def find_reading(node: fx.Node) -> Reading | None:
    """The registered reading of a call, by its name; None without one."""
    if node.op != "call_method":
        return _READINGS.get(attribute(node) or _NAMES.get(node.target, ""))
    return _READINGS.get(str(node.target)) or _READINGS.get(operator_word(node))


def bind_named_call(node: Any, *names: str) -> dict[str, Any] | None:
    """The bound arguments when the node is a call of one of these names; None otherwise."""
    if not isinstance(node, fx.Node) or operator_word(node) not in names or (reading := find_reading(node)) is None:
        return None
    return reading.bind(node)


def checked_index(reader: Reader, index: Element) -> sympy.Expr:
    """The index, proved not to be negative: negative ones wrap around.

    Raises:
        Unreadable: it may be negative, or depends on data.
    """
    if not isinstance(index, sympy.Expr) or loads(index):
        raise Unreadable("an index that depends on data")
    lowest = reader.facts.extreme(index, highest=False)
    if lowest is None or not reader.facts.holds(sympy.Ge(lowest, 0)):
        raise Unreadable(f"the index {index} may be negative")
    return index

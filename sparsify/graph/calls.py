"""Binds the arguments of a graph's call to a known signature, so that each has a name, however it was passed. A call with an argument that
the signature lacks is refused: dropping it would change the meaning.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

# NumPy's names of arguments, which torch accepts too
_OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "self": "input", "x2": "other"}
_MISSING = object()


class Unbound(Exception):
    """A call that fits none of the signatures; the message names the argument."""


@dataclass(frozen=True)
class _Parameter:
    name: str
    kind: str = ""
    default: Any = _MISSING
    keyword_only: bool = False
    many: bool = False


def as_node(argument: Any) -> fx.Node:
    """An argument of a call that is known to be a node.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(argument, fx.Node):
        raise TypeError(f"{argument} is no node")
    return argument


def bind(node: fx.Node, *signatures: str) -> SimpleNamespace:
    """The arguments of a call by name, with defaults filled in, under the first signature that they fit.

    Args:
        node: a call_function or call_method; a method's receiver is its first argument.
        signatures: parameter lists as in Python, `"input, dim: int, keepdim=False, *, dtype=None"`. An annotation is one of tensor,
            number, int, bool (a constant), dtype, str; None fits where it is the default. `*shape` takes numbers one by one or as
            one sequence, by position or by keyword, and becomes a tuple.

    Raises:
        Unbound: no signature fits: an argument is missing, unknown, given twice or of another kind.
    """
    why: Unbound | None = None
    for signature in signatures:
        try:
            return _bound(node, _parameters(signature))
        except Unbound as error:
            why = why or error
    raise why or Unbound(f"no signature is given for {_call_name(node)}")


def names(signature: str) -> tuple[str, ...]:
    """The names of a signature's parameters."""
    return tuple(p.name for p in _parameters(signature))


def _bound(node: fx.Node, parameters: tuple[_Parameter, ...]) -> SimpleNamespace:
    known = {p.name: p for p in parameters}
    given: dict[str, Any] = {}
    rest = list(node.args)
    for parameter in parameters:
        if rest and parameter.many:
            given[parameter.name], rest = _spread(node, rest), []
        elif rest and not parameter.keyword_only:
            given[parameter.name] = rest.pop(0)
    if rest:
        raise Unbound(f"{_call_name(node)} has {len(node.args)} arguments by position")
    for keyword, value in node.kwargs.items():
        name = keyword if keyword in known else _OTHER_NAMES.get(keyword, keyword)
        if name not in known or name in given:
            raise Unbound(f"{_call_name(node)} has the argument {keyword}" + (" twice" if name in given else ""))
        given[name] = _spread(node, [value]) if known[name].many else value
    for name, parameter in known.items():
        if given.setdefault(name, parameter.default) is _MISSING:
            raise Unbound(f"{_call_name(node)} has no argument {name}")
        if not _fits(given[name], parameter):
            raise Unbound(f"{_call_name(node)} has an argument {name} that is no {parameter.kind}")
    return SimpleNamespace(**given)


def _spread(node: fx.Node, values: list[Any]) -> tuple[Any, ...]:
    """The values of a `*` parameter, given one by one or as one sequence, as a tuple."""
    if len(values) != 1:
        return tuple(values)
    if isinstance(_example(values[0]), (tuple, list)) and isinstance(values[0], fx.Node):
        raise Unbound(f"{_call_name(node)} takes sizes that another node computes")
    return tuple(values[0]) if isinstance(values[0], (tuple, list)) else (values[0],)


def _fits(value: Any, parameter: _Parameter) -> bool:
    if not parameter.kind or (value is None and parameter.default is None):
        return True
    example = _example(value)
    if parameter.kind in ("int", "number") and isinstance(example, (bool, torch.SymBool)):
        return False
    return isinstance(example, _KINDS[parameter.kind])


_KINDS: dict[str, Any] = {
    "tensor": torch.Tensor,
    "number": (int, float, torch.SymInt, torch.SymFloat),
    "int": (int, torch.SymInt),
    "bool": bool,
    "dtype": torch.dtype,
    "str": str,
}


def _example(value: Any) -> Any:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def _call_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


@functools.cache
def _parameters(signature: str) -> tuple[_Parameter, ...]:
    function = ast.parse(f"def _({signature}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args

    def kind(argument: ast.arg) -> str:
        return ast.unparse(argument.annotation) if argument.annotation else ""

    def literal(default: ast.expr | None) -> Any:
        return _MISSING if default is None else ast.literal_eval(default)

    defaults: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    found = [_Parameter(a.arg, kind(a), literal(d)) for a, d in zip(arguments.args, defaults, strict=True)]
    if arguments.vararg is not None:
        found.append(_Parameter(arguments.vararg.arg, many=True))
    found += [_Parameter(a.arg, kind(a), literal(d), keyword_only=True) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return tuple(found)

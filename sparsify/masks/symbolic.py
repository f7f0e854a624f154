"""Symbolic values of mask tensors: an element is a sympy expression, a sympy condition, or a choice between such (`Cases`).

`Facts` decides statements about sizes from what Dynamo already knows, and never installs a guard.
"""

from __future__ import annotations

import itertools
import math
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanAtom, BooleanFunction
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from sparsify.graph.compat import symbol_values
from sparsify.graph.typed_torch import FLOOR_DIV, SYMBOLIC_MAX, SYMBOLIC_MIN, expression, symbolic_node

BATCH, HEAD, QUERY, KEY = sympy.symbols("b h q k", integer=True, nonnegative=True)
MAX_CASES = 32
# Assumptions by which overflow is excluded where no narrower bound is known: a symbolic size stays below LONGEST, any other symbolic
# integer and 64-bit integers read from tensors below MOST, those that are multiplied with each other below ROOT.
LONGEST, MOST, ROOT = 2**28, 2**61, 2**30
# Largest window: positions, windows and their sums fit into 32 bits.
FURTHEST = 2**30
# sympy's symbols are Booleans too, so `Boolean` itself does not tell conditions from numbers
CONDITION = (BooleanAtom, BooleanFunction, Relational)


class Unreadable(Exception):
    """A value has no symbolic reading; the message says why."""


@dataclass(frozen=True)
class Cases:
    """A number that depends on conditions: (condition, value) pairs, disjoint and exhaustive."""

    items: tuple[tuple[Boolean, sympy.Basic], ...]


Element = sympy.Basic | Cases
# functions of integers whose value is no larger than the largest of their arguments
_NO_LARGER = (sympy.Abs, sympy.Max, sympy.Min, Max, Min, FloorDiv, Mod, PythonMod)
# how sizes are computed at run time, by the functions of their expressions; a power is a product
COMPUTED: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.mul,
    sympy.Max: SYMBOLIC_MAX,
    sympy.Min: SYMBOLIC_MIN,
    Max: SYMBOLIC_MAX,
    Min: SYMBOLIC_MIN,
    FloorDiv: FLOOR_DIV,
    Mod: operator.mod,
    PythonMod: operator.mod,
}


def cases(element: Element) -> tuple[tuple[Boolean, sympy.Basic], ...]:
    """(condition, value) pairs of an element, disjoint and exhaustive."""
    return element.items if isinstance(element, Cases) else ((sympy.true, element),)


def as_number(element: Element) -> Element:
    """The element as a number: a condition becomes 0 or 1."""
    if isinstance(element, CONDITION):
        return choose(element, sympy.Integer(1), sympy.Integer(0))
    return element


def as_condition(element: Element) -> Boolean:
    if isinstance(element, CONDITION):
        return element
    return typing.cast(Boolean, lift(_nonzero, element))


def _nonzero(value: sympy.Expr) -> Boolean:
    return compare(sympy.Ne, value, sympy.Integer(0))


def lift(function: Callable[..., sympy.Basic], *elements: Element) -> Element:
    """Applies a function of plain expressions to every combination of the elements' cases.

    Raises:
        Unreadable: more than MAX_CASES combinations.
    """
    found: dict[sympy.Basic, Boolean] = {}
    combinations = math.prod(len(cases(e)) for e in elements)
    if combinations > MAX_CASES:
        raise Unreadable("too many alternatives")
    for combination in itertools.product(*map(cases, elements)):
        condition = sympy.And(*(c for c, _ in combination))
        if condition is not sympy.false:
            value = function(*(v for _, v in combination))
            found[value] = sympy.Or(found.get(value, sympy.false), condition)
    return _join(found)


def _join(found: dict[sympy.Basic, Boolean]) -> Element:
    if all(isinstance(value, CONDITION) for value in found):
        return sympy.Or(*(sympy.And(condition, typing.cast(Boolean, value)) for value, condition in found.items()))
    if len(found) == 1:
        return next(iter(found))
    return Cases(tuple((condition, value) for value, condition in found.items()))


def choose(condition: Boolean, then: Element, otherwise: Element) -> Element:
    """`then` where the condition holds, else `otherwise`."""
    if condition is sympy.true:
        return then
    if condition is sympy.false:
        return otherwise
    if isinstance(then, CONDITION) and isinstance(otherwise, CONDITION):
        if then in (sympy.true, sympy.false):
            return sympy.Or(condition, otherwise) if then is sympy.true else sympy.And(sympy.Not(condition), otherwise)
        if otherwise in (sympy.true, sympy.false):
            return sympy.Or(sympy.Not(condition), then) if otherwise is sympy.true else sympy.And(condition, then)
        return sympy.Or(sympy.And(condition, then), sympy.And(sympy.Not(condition), otherwise))
    found: dict[sympy.Basic, Boolean] = {}
    for outer, element in ((condition, as_number(then)), (sympy.Not(condition), as_number(otherwise))):
        for inner, value in cases(element):
            found[value] = sympy.Or(found.get(value, sympy.false), sympy.And(outer, inner))
    return _join({value: c for value, c in found.items() if c is not sympy.false})


def compare(relation: type[Relational], left: sympy.Expr, right: sympy.Expr) -> Boolean:
    """A relation between plain expressions. It is decided where their difference is a number; |x| < c becomes x < c and -x < c."""
    if left.is_infinite or right.is_infinite:
        return relation(left, right)
    difference = sympy.expand(left - right)
    if difference.is_number:
        return relation(difference, sympy.Integer(0))
    whole = [f for f in difference.args if f.is_number or (isinstance(f, AppliedUndef) and f.is_integer)]
    if difference.is_Mul and relation in (sympy.Ne, sympy.Eq) and len(whole) == len(difference.args):
        factors = [relation(f, sympy.Integer(0)) for f in difference.args if not f.is_number]
        return sympy.And(*factors) if relation is sympy.Ne else sympy.Or(*factors)
    distances = difference.atoms(sympy.Abs)
    if len(distances) == 1 and relation in (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge):
        (distance,) = distances
        factor, inner = difference.coeff(distance, 1), distance.args[0]
        rest = sympy.expand(difference - factor * distance)
        if factor.is_Integer and not rest.has(sympy.Abs):
            sides = [compare(relation, rest + sign * factor * inner, sympy.Integer(0)) for sign in (1, -1)]
            return sympy.And(*sides) if (factor > 0) == (relation in (sympy.Lt, sympy.Le)) else sympy.Or(*sides)
    return relation(left, right)


def sides(relation: Relational) -> tuple[sympy.Expr, sympy.Expr]:
    """Both sides of a relation between numbers; sympy types them as any `Basic`."""
    left, right = relation.args
    return typing.cast(sympy.Expr, left), typing.cast(sympy.Expr, right)


def replaced(condition: Boolean, swaps: Mapping[Any, Any]) -> Boolean:
    """The condition with subexpressions exchanged; sympy types the result as any `Basic`."""
    return typing.cast(Boolean, condition.xreplace(swaps))


def number(value: float | int | bool) -> sympy.Basic:
    """A Python scalar exactly; floats become binary rationals."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if math.isnan(value):
        raise Unreadable("NaN")
    if math.isinf(value):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.Rational(value)


def scalar(value: Any) -> sympy.Basic:
    """A size, a Python number, or the graph node of one, as an expression.

    Raises:
        Unreadable: anything else, or a float that depends on sizes.
    """
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value")
    if isinstance(value, torch.SymFloat):
        found = expression(value)
        if not found.is_number:
            raise Unreadable("a float that depends on sizes")
        return number(float(found))
    if isinstance(value, (torch.SymInt, torch.SymBool)):
        return expression(value)
    if isinstance(value, (bool, int, float)):
        return number(value)
    raise Unreadable(f"a {type(value).__name__} where a number was expected")


def limits(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest value of an integer dtype."""
    if dtype is torch.bool:
        return 0, 1
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def sizes(tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
    return tuple(typing.cast(sympy.Expr, scalar(size)) for size in tensor.shape)


def plain(size: sympy.Expr) -> int | sympy.Expr:
    """An int where the size is one."""
    return int(size) if size.is_Integer else size


def loads(expr: sympy.Basic) -> set[AppliedUndef]:
    """All reads of graph tensors in an expression."""
    return expr.atoms(AppliedUndef)


def find_shape_env(graph: fx.Graph) -> Any | None:
    """The ShapeEnv of the first symbolic size in the graph's inputs; None when all sizes are numbers."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return symbolic_node(value).shape_env
        if isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    return symbolic_node(size).shape_env
    return None


@dataclass(frozen=True)
class Facts:
    """What is known about sizes: Dynamo's ranges and guards, and the extents of the index symbols b, h, q, k.

    shape_env: Dynamo's ShapeEnv; None when all sizes are numbers.
    extents: size of each index symbol's dimension.
    data: dtypes of the graph tensors that expressions read, by the name of the function that stands for them.
    """

    shape_env: Any | None
    extents: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    data: dict[str, torch.dtype] = field(default_factory=dict)

    def holds(self, statement: sympy.Basic | bool) -> bool:
        """True only where the statement about sizes is proved. Installs no guard."""
        if statement in (True, sympy.true):
            return True
        if statement in (False, sympy.false) or loads(statement) or statement.free_symbols & set(self.extents):
            return False
        if isinstance(statement, Relational):
            statement = type(statement)(sympy.expand(operator.sub(*sides(statement))), 0)
            if statement in (sympy.true, sympy.false):
                return statement is sympy.true
        if self.shape_env is None:
            return False
        return self.shape_env._maybe_evaluate_static(statement) in (True, sympy.true)

    def equal_so_far(self, one: sympy.Expr, other: sympy.Expr) -> bool:
        """Whether two symbols, which nothing relates, have one value in the example. Automatic dynamic shapes give each input's sizes
        symbols of their own."""
        if self.shape_env is None or not (one.is_Symbol and other.is_Symbol) or self.holds(sympy.Ne(one, other)):
            return False
        known = symbol_values(self.shape_env)
        return one in known and known[one] == known.get(other)

    def settled(self, expr: sympy.Expr) -> sympy.Expr:
        """The expression with every maximum and minimum that the sizes decide replaced by the argument that it is."""
        found: dict[sympy.Basic, sympy.Basic] = {}
        for choice in expr.atoms(sympy.Max, sympy.Min, Max, Min):
            relation = sympy.Ge if isinstance(choice, (sympy.Max, Max)) else sympy.Le
            for one in choice.args:
                if all(one is other or self.holds(relation(one, other)) for other in choice.args):
                    found[choice] = one
                    break
        return expr.xreplace(found)

    def extreme(self, expr: sympy.Expr, highest: bool) -> sympy.Expr | None:
        """The largest (or smallest) value over all indices; None where the expression is not linear in them."""
        expr = sympy.expand(expr)
        for symbol, extent in self.extents.items():
            coefficient = expr.coeff(symbol, 1)
            rest = sympy.expand(expr - coefficient * symbol)
            if rest.has(symbol) or not coefficient.is_Integer:
                return None
            expr = rest + coefficient * (extent - 1 if (coefficient > 0) == highest else 0)
        return expr

    def fits(self, expr: sympy.Expr, dtype: torch.dtype) -> bool:
        """Whether an integer dtype can hold the expression's value at every index."""
        return self.magnitude(expr) <= torch.iinfo(dtype).max

    def magnitude(self, expr: sympy.Expr) -> int:
        """An upper bound of the absolute value of an integer expression."""
        if expr.is_number:
            return abs(math.ceil(abs(expr)))
        if isinstance(expr, sympy.Symbol) and expr in self.extents:
            return self.magnitude(self.extents[expr])
        if isinstance(expr, sympy.Symbol):
            return self._largest(expr)
        if isinstance(expr, AppliedUndef):
            return min(MOST, max(map(abs, limits(self.data[expr.func.__name__]))))
        parts = [self.magnitude(typing.cast(sympy.Expr, part)) for part in expr.args]
        if expr.is_Add:
            return sum(parts)
        if expr.is_Mul:
            several = sum(isinstance(part, AppliedUndef) for part in expr.args) > 1
            return math.prod(min(n, ROOT) if several and isinstance(part, AppliedUndef) else n for n, part in zip(parts, expr.args))
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
            return parts[0] ** int(expr.exp)
        if expr.func in _NO_LARGER:
            return max(parts)
        raise Unreadable(f"how large {expr} is cannot be said")

    def _largest(self, symbol: sympy.Symbol) -> int:
        known = self.shape_env.bound_sympy(symbol) if self.shape_env is not None else None
        if known is None:
            return LONGEST
        most = LONGEST if known.lower >= 0 else MOST
        return int(max(abs(max(known.lower, -most)), abs(min(known.upper, most))))

    def always(self, statement: Relational) -> bool:
        """Whether an inequality holds at every index."""
        if not isinstance(statement, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
            return False
        difference = operator.sub(*sides(statement))
        below = isinstance(statement, (sympy.Le, sympy.Lt))
        worst = self.extreme(difference, highest=below)
        return worst is not None and self.holds(type(statement)(worst, 0))

    def never(self, statement: Relational) -> bool:
        """Whether an inequality holds at no index."""
        return self.always(statement.negated)

    def reduce(self, condition: Boolean) -> Boolean:
        """The condition, with every inequality replaced by true or false where it always or never holds."""
        decided: dict[Relational, Boolean] = {}
        for atom in condition.atoms(Relational):
            if self.always(atom):
                decided[atom] = sympy.true
            elif self.never(atom):
                decided[atom] = sympy.false
        return replaced(condition, decided) if decided else condition

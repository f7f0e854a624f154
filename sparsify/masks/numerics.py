"""Conversion, arithmetic and comparison of symbolic elements as torch computes them in its dtypes.

Elements of integer dtypes equal the tensor's values exactly: overflow is excluded by `Facts.fits`, or the reading is refused. Constant
floats are exact. Computed floats may be rounded, and comparisons with them are refused unless rounding cannot change the outcome.
"""

from __future__ import annotations

import functools
import operator
import typing
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from sparsify.masks.symbolic import Element, Facts, Unreadable, as_condition, as_number, cases, compare, lift, loads, number

INTEGERS = (torch.int32, torch.int64)
WIDE = (torch.bool, *INTEGERS)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
Typed = tuple[Element, torch.dtype]  # an element and the dtype of its tensor; of a Python number: bool, int64 or float64

_ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_RELATIONS = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}


def rounded(value: float, dtype: torch.dtype) -> sympy.Basic:
    """The value after rounding to a float dtype."""
    return number(torch.tensor(value, dtype=dtype, device="cpu").item())


def truth(element: Element, dtype: torch.dtype) -> Boolean:
    """The element as a condition.

    Raises:
        Unreadable: a computed float, which may have been rounded to 0.
    """
    if dtype.is_floating_point and not all(v.is_number or isinstance(v, AppliedUndef) for _, v in cases(as_number(element))):
        raise Unreadable("a computed float as a condition")
    return as_condition(element)


def cast(facts: Facts, element: Element, source: torch.dtype, target: torch.dtype) -> Element:
    """The element after conversion to another dtype.

    Raises:
        Unreadable: the conversion might change the value.
    """
    if source is target:
        return element
    if target is torch.bool:
        return truth(element, source)
    if target in INTEGERS:
        return lift(functools.partial(_whole, facts, source=source, target=target), as_number(element))
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

    return lift(convert, as_number(element))


def _cast_value(facts: Facts, value: sympy.Expr, source: torch.dtype, target: torch.dtype) -> sympy.Expr:
    """`cast` of a plain number to a dtype other than bool, which is a plain number again."""
    return typing.cast(sympy.Expr, cast(facts, value, source, target))


def _whole(facts: Facts, value: sympy.Expr, source: torch.dtype, target: torch.dtype) -> sympy.Expr:
    if source.is_floating_point:
        if not value.is_number or value.is_infinite:
            raise Unreadable("a float becomes an integer")
        value = sympy.Integer(int(value))  # towards zero, as torch does
    if torch.promote_types(source, target) is not target and not facts.fits(value, target):
        raise Unreadable(f"{value} may not fit into {target}")
    return value


def arithmetic(facts: Facts, name: str, left: Typed, right: Typed, dtype: torch.dtype) -> Element:
    """The result of add, sub or mul of two elements, in the result's dtype."""
    compute = _ARITHMETIC[name]

    def apply(x: sympy.Expr, y: sympy.Expr) -> sympy.Basic:
        if dtype.is_floating_point and x.is_number and y.is_number:
            return _compute_constants(compute, float(x), float(y), dtype)
        x, y = _cast_value(facts, x, left[1], dtype), _cast_value(facts, y, right[1], dtype)
        value = sympy.expand(compute(x, y))
        if dtype.is_floating_point:
            _check_floats(name, x, y, value, dtype)
        elif not facts.fits(value, dtype):
            raise Unreadable(f"{value} may overflow {dtype}")
        return value

    return lift(apply, as_number(left[0]), as_number(right[0]))


def _compute_constants(compute: Callable[[Any, Any], torch.Tensor], x: float, y: float, dtype: torch.dtype) -> sympy.Basic:
    """The result for two constants.

    Raises:
        Unreadable: kernels may differ, since some round a Python number to the tensor's dtype first.
    """
    a, b = (torch.tensor(value, dtype=dtype, device="cpu") for value in (x, y))
    found = {number(result.item()) for result in (compute(a, b), compute(a, y), compute(x, b))}
    if len(found) > 1:
        raise Unreadable(f"a number that {dtype} does not hold")
    return found.pop()


def _check_floats(name: str, x: sympy.Expr, y: sympy.Expr, value: sympy.Expr, dtype: torch.dtype) -> None:
    """Checks that rounding, infinities or NaN in data cannot change a float result altogether.

    Raises:
        Unreadable: they can.
    """
    if dtype not in (torch.float32, torch.float64) or x.is_infinite or y.is_infinite:
        raise Unreadable(f"{dtype} arithmetic on positions")
    if name == "mul" and 0 in (x, y) and not loads(x) | loads(y):
        return
    if value.is_number or loads(value) != loads(x) | loads(y):
        raise Unreadable("floats that cancel")
    if not all(2**-60 <= abs(factor) <= 2**24 for factor in (sympy.Rational(c) for c in value.as_coefficients_dict().values())):
        raise Unreadable("floats of very different size")


def relation(facts: Facts, name: str, left: Typed, right: Typed, common: torch.dtype) -> Element:
    """The result of a comparison, which torch makes in the common dtype of both sides."""
    kind = _RELATIONS[name]
    if not common.is_floating_point and not {common, left[1], right[1]} <= set(WIDE):
        raise Unreadable("a comparison of narrow integers")

    def apply(x: sympy.Expr, y: sympy.Expr) -> sympy.Basic:
        if common.is_floating_point:
            return compare(kind, *_comparable(x, y, (left[1], right[1]), common))
        return compare(kind, _to(x, left[1]), _to(y, right[1]))

    def _to(value: sympy.Expr, source: torch.dtype) -> sympy.Expr:
        return value if common is torch.bool else _cast_value(facts, value, source, common)

    return lift(apply, as_number(left[0]), as_number(right[0]))


def _comparable(
    x: sympy.Expr, y: sympy.Expr, dtypes: tuple[torch.dtype, torch.dtype], common: torch.dtype
) -> tuple[sympy.Expr, sympy.Expr]:
    """Two sides of a comparison of floats, where rounding cannot change its outcome: both are constants, or one is an integer (rounding
    is monotonous) and the other a whole constant below which every integer is exact."""
    exact = [typing.cast(sympy.Expr, rounded(float(value), common)) if value.is_number else value for value in (x, y)]
    if common in (torch.float16, torch.bfloat16) and exact != [x, y]:
        raise Unreadable(f"a number that {common} does not hold")
    for value, dtype, other in ((x, dtypes[0], exact[1]), (y, dtypes[1], exact[0])):
        if value.is_number:
            continue
        if dtype.is_floating_point or not other.is_Integer or abs(other) >= 2 / torch.finfo(common).eps:
            raise Unreadable("a comparison of floats")
    return exact[0], exact[1]

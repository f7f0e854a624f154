"""Which of many like cases the quick suite runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: the first of every `step` is quick, the others are `slow`. A tuple has a value a name."""
    values = [case if type(case) is tuple else (case,) for case in cases]
    return [pytest.param(*one, marks=[pytest.mark.slow] if place % step else []) for place, one in enumerate(values)]


def examples(quick: int, slow: int) -> pytest.MarkDecorator:
    """Parametrizes `examples`, how many are drawn: few in the quick suite, many more in the slow one."""
    return pytest.mark.parametrize("examples", [quick, pytest.param(slow, marks=pytest.mark.slow)])

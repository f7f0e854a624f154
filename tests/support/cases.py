"""Which of many like cases the quick suite runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: the first of every `step` is quick, the others are marked `slow`."""
    return [case if place % step == 0 else pytest.param(case, marks=pytest.mark.slow) for place, case in enumerate(cases)]

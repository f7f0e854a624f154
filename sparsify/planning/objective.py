"""What a choice minimises, under which error: scores of proposals, the lengths at which another one wins, and what calibration allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import sympy

from sparsify.planning.method import Pass, Proposal, Refusal

Objective = Literal["time", "memory", "balanced"]
Score = tuple[float, float]

# Graphs per site: more would cost more in compiling than their lengths are worth.
MOST_REGIMES = 3
_STEP, _LONGEST = 64, 4 << 20  # tokens between which winners are looked up
_NEVER: Score = (math.inf, math.inf)


def refuse_error(method: Pass, measured: Sequence[dict[str, Any]], max_error: float | None) -> Refusal | None:
    """Why a method may not act where its error is bounded.

    measured: what calibration recorded for the site, see `Decision.measured`; it holds for exactly the options that it was made with.
    """
    if max_error is None or not method.lossy:
        return None
    error = measured_error(method, measured)
    if error is None:
        return method.refuse(f"the plan has no measured error for it here{_changed_options(method)}", "sparsify calibrate errors")
    if not error <= max_error:
        return method.refuse(f"measured error {error:.3g} exceeds max_error {max_error:g}{_changed_options(method)}")
    return None


def _changed_options(method: Pass) -> str:
    """The options that are not the defaults, since one method may be tried with several."""
    own = method.model_dump(mode="json", exclude_defaults=True)
    return f" with {', '.join(f'{name} = {value}' for name, value in own.items())}" if own else ""


def measured_error(method: Pass, measured: Sequence[dict[str, Any]]) -> float | None:
    """Error that calibration found for a method with these very options; 0 for exact ones, None where nobody measured it."""
    if not method.lossy:
        return 0.0
    found = [one["error"] for one in measured if one["method"] == method.name and type(method)(**one["options"]) == method]
    return found[-1] if found else None


def select(
    proposals: Sequence[Proposal],
    objective: Objective,
    *,
    key_len: Any,
    hints: dict[sympy.Symbol, int],
    operands: Any,
    dense: Any,
    reaches: Callable[[int], bool],
) -> int:
    """Index of the proposal that costs least, ties to the first.

    time: seconds. memory: bytes of scratch, then seconds. balanced: seconds over dense attention's plus bytes over its operands'.

    Where the key length is symbolic, the lengths at which another proposal wins become guards, two at most; other symbols keep the
    example's value and guard nothing.

    Args:
        operands: bytes that attention reads and writes without any method. dense: seconds of dense attention.
        reaches: whether the key length reaches a bound; its answer becomes a guard.
    """
    length = sympy.sympify(key_len)
    symbols = sorted(length.free_symbols, key=str)
    costs = [(p.seconds, p.scratch, operands, dense) for p in proposals]
    if len(symbols) != 1:  # a number, or a sum that no single guard could bound
        at = int(length.subs(hints)) if length.subs(hints).is_number else 0
        return _least([_score([_number(c, hints) for c in cost], objective, p, at) for cost, p in zip(costs, proposals, strict=True)])
    symbol = symbols[0]
    others = {s: value for s, value in hints.items() if s != symbol}
    offset = length - symbol
    if not offset.is_number:
        offset = sympy.Integer(0)
    compiled = [[_function(c, symbol, others) for c in cost] for cost in costs]

    def winner(keys: int) -> int:
        value = keys - int(offset)
        return _least([_score([f(value) for f in fs], objective, p, keys) for fs, p in zip(compiled, proposals, strict=True)])

    regimes = merged(switches(winner))
    chosen = regimes[0][1]
    for bound, index in regimes[1:]:
        if not reaches(bound):
            break
        chosen = index
    return chosen


def cost_text(seconds: float | None, scratch: float | None) -> str:
    """A cost as people read it."""
    time = "unknown time" if seconds is None else f"{seconds * 1e3:.3g} ms"
    return time + (f" and {scratch / 2**20:.3g} MiB of scratch" if scratch else "")


def switches(winner: Callable[[int], int]) -> list[tuple[int, int]]:
    """(key length, winner from there on), beginning at 0: looked up at powers of two and bisected to `_STEP` in between."""
    found = [(0, winner(_STEP))]
    low = _STEP
    while low < _LONGEST:
        high = low * 2
        if winner(high) != found[-1][1]:
            found.append(_first(winner, found[-1][1], low, high))
        low = high
    return found


def _first(winner: Callable[[int], int], before: int, low: int, high: int) -> tuple[int, int]:
    while high - low > _STEP:
        middle = (low + high) // 2 // _STEP * _STEP
        low, high = (low, middle) if winner(middle) != before else (middle, high)
    return high, winner(high)


def merged(regimes: list[tuple[int, int]], most: int = MOST_REGIMES) -> list[tuple[int, int]]:
    """At most `most` regimes: the one that spans the least lengths, on a logarithmic scale, falls to the one before it."""
    regimes = list(regimes)
    while len(regimes) > most:
        spans = [math.log((after[0] if after else 2 * _LONGEST) / start) for (start, _), after in zip(regimes[1:], [*regimes[2:], None])]
        del regimes[1 + spans.index(min(spans))]
        regimes = [one for i, one in enumerate(regimes) if i == 0 or one[1] != regimes[i - 1][1]]
    return regimes


def _score(numbers: Sequence[float | None], objective: Objective, proposal: Proposal, key_len: int) -> Score:
    if key_len < proposal.min_key_len:
        return _NEVER
    seconds, scratch, operands, dense = (math.inf if n is None else float(n) for n in numbers)
    if objective == "time":
        return seconds, scratch
    if objective == "memory":
        return scratch, seconds
    return seconds / dense + (operands + scratch) / operands, seconds


def _least(scores: Sequence[Score]) -> int:
    return min(range(len(scores)), key=scores.__getitem__)


def _number(expr: Any, hints: dict[sympy.Symbol, int]) -> float | None:
    value = sympy.sympify(expr).subs(hints)
    return float(value) if value.is_number else None


def _function(expr: Any, symbol: sympy.Symbol, others: dict[sympy.Symbol, int]) -> Callable[[int], float]:
    value = sympy.sympify(expr).subs(others)
    if value.free_symbols - {symbol}:
        return lambda n: math.inf
    return sympy.lambdify(symbol, value, "math")

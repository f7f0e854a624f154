"""The threshold that gives a density on some queries and keys."""

from __future__ import annotations

from collections.abc import Callable


def find_threshold(density_of: Callable[[float], float], target: float, steps: int = 14, close: float = 0.005) -> tuple[float, float]:
    """The threshold in [0, 1) whose density is nearest to `target`, by bisection, and that density. `density_of` does not fall."""
    low, high = 0.0, 1.0
    best = (low, density_of(low))
    for _ in range(steps):
        middle = (low + high) / 2
        density = density_of(middle)
        if abs(density - target) < abs(best[1] - target):
            best = (middle, density)
        if abs(density / target - 1) < close:
            break
        low, high = (middle, high) if density < target else (low, middle)
    return best

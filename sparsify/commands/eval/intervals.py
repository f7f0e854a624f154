"""95 % intervals of shares, of differences of paired shares, and of means of anything.

Scores between 0 and 1 that are no plain right or wrong, as a share of the words that were found, take the first two as well: no such score
varies more than right and wrong of the same mean, so that the intervals are at least as wide as they have to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959964  # normal quantile of a 95 % interval
_DRAWS, _SEED = 4000, 0


def wilson(right: float, asked: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927; z = 1.96 gives 95 %). Raises ValueError when nothing was asked."""
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"{right} right answers of {asked} asked is no share")
    share, spread = right / asked, z * z / asked
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked))
    # at 0 and 1 the bounds are exact; rounding would leave 1e-17 outside [0, 1]
    low = 0.0 if right == 0 else (centre - half) / (1 + spread)
    high = 1.0 if right == asked else (centre + half) / (1 + spread)
    return low, high


def paired(gained: float, lost: float, asked: int, z: float = Z) -> tuple[float, float]:
    """Score interval of (gained - lost) / asked, the difference of two shares of the same questions (T. Tango, Stat. in Medicine, 1998).

    Unlike a bootstrap it has a width where no answer changed: z² / (asked + z²) on both sides.

    Args:
        gained, lost: what the second of the two scores more than the first, and less, each summed over the questions where it does.

    Raises:
        ValueError: nothing was asked, or more changed than was asked.
    """
    if asked == 0 or min(gained, lost) < 0 or gained + lost > asked + 1e-9:
        raise ValueError(f"{gained} gained and {lost} lost of {asked} asked are no paired shares")

    def score(difference: float) -> float:
        """How many standard errors what was seen lies above a true difference; falls as that grows."""
        a = 2 * asked
        b = -gained - lost + (2 * asked - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # share lost, at its most likely under that difference
        variance = asked * (2 * q + difference * (1 - difference))
        distance = gained - lost - asked * difference
        return distance / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, distance)

    seen = (gained - lost) / asked
    return _root(lambda d: score(d) - z, -1.0, seen), _root(lambda d: score(d) + z, seen, 1.0)


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of a mean, by resampling with a fixed seed. Raises ValueError without values."""
    if not len(values):
        raise ValueError("no values, no mean")
    drawn = np.random.default_rng(_SEED).integers(0, len(values), (_DRAWS, len(values)))
    low, high = np.quantile(np.asarray(values, np.float64)[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)

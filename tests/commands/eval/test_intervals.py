import math

import numpy as np
import pytest

from sparsify.commands.eval import intervals

Z2 = intervals.Z**2


def test_nothing_changed_is_not_certainty():
    """Closed form where neither is better anywhere: z² / (n + z²) on both sides."""
    low, high = intervals.paired(0, 0, 50)
    assert (low, high) == (pytest.approx(-Z2 / (50 + Z2), abs=1e-6), pytest.approx(Z2 / (50 + Z2), abs=1e-6))


@pytest.mark.parametrize(("gained", "lost", "asked"), [(12, 2, 54), (0, 3, 40), (1, 1, 20)])
def test_at_the_bounds_the_score_is_the_normal_quantile(gained, lost, asked):
    """The score statistic written down again, with the share lost found by searching for the largest likelihood."""
    for difference, sign in zip(intervals.paired(gained, lost, asked), (1, -1), strict=True):
        lowest = max(0, -difference)
        shares = np.linspace(lowest, (1 - difference) / 2, 1_000_001)[1:-1]
        likelihood = (
            gained * np.log(shares + difference) + lost * np.log(shares) + (asked - gained - lost) * np.log1p(-2 * shares - difference)
        )
        share = shares[likelihood.argmax()]
        score = (gained - lost - asked * difference) / math.sqrt(asked * (2 * share + difference * (1 - difference)))
        assert score == pytest.approx(sign * intervals.Z, abs=1e-3)
    low, high = intervals.paired(gained, lost, asked)
    assert intervals.paired(lost, gained, asked) == (pytest.approx(-high, abs=1e-9), pytest.approx(-low, abs=1e-9))


def test_many_questions_give_the_normal_interval():
    gained, lost, asked = 4000, 6000, 100000
    half = intervals.Z * math.sqrt(gained + lost - (gained - lost) ** 2 / asked) / asked
    low, high = intervals.paired(gained, lost, asked)
    assert (low, high) == (pytest.approx(-0.02 - half, abs=1e-5), pytest.approx(-0.02 + half, abs=1e-5))


@pytest.mark.parametrize(("gained", "lost", "asked"), [(10, 0, 10), (0, 10, 10), (1, 0, 1), (0.5, 0.25, 3)])
def test_bounds_lie_around_what_was_seen_and_within_one(gained, lost, asked):
    low, high = intervals.paired(gained, lost, asked)
    assert -1 <= low <= (gained - lost) / asked <= high <= 1 and low < high


@pytest.mark.parametrize(("gained", "lost", "asked"), [(0, 0, 0), (3, 3, 5), (-1, 0, 5)])
def test_what_is_no_pair_of_shares_is_refused(gained, lost, asked):
    with pytest.raises(ValueError, match="no paired shares"):
        intervals.paired(gained, lost, asked)


def test_a_bootstrap_covers_the_mean_and_is_the_same_each_time():
    values = [0.1 * i for i in range(40)]
    low, high = intervals.bootstrap(values)
    assert low < 1.95 < high and high - low < 1 and intervals.bootstrap(values) == (low, high)
    with pytest.raises(ValueError, match="no mean"):
        intervals.bootstrap([])

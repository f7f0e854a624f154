"""From measured calls to a profile's coefficients: least squares on the relative error, nothing below zero, outliers damped."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparsify.costs.device import Device
from sparsify.costs.profile import Profile
from sparsify.costs.samples import Sample
from sparsify.errors import ProfileError

# What a family's time may depend on; features that its calls do not have drop out by themselves.
FEATURES = {
    "causal": ("call", "work", "scores", "rows", "tail", "spill"),
    "lists": ("call", "work", "scores", "rows", "tail", "spill"),
    "window": ("call", "work", "rows", "tail"),
    "decode": ("call", "bytes", "rows", "tail"),
    "select": ("call", "work", "work8", "scores", "masses", "scratch", "prepare", "passes", "steps", "rows"),
    "streamed": ("call", "work", "work8", "scores", "masses", "scratch", "prepare", "passes", "rows"),
    "skip": ("call", "bytes", "rows"),
    "linear": ("call", "work", "bytes"),
    "stream": ("call", "bytes"),
    "elementwise": ("call", "bytes"),
}
# Not fitted: scratch grows with the estimate's work, so that times cannot tell them apart, and moves at the speed of a copy.
_FIXED = {"scratch": 1.0}
# How large a coefficient may easily be that an earlier profile of the family does without: seconds, and shares.
_SCALE = {"call": 1e-5, "passes": 1e-6, "steps": 1e-6, "rows": 1e-6, "scores": 30.0, "masses": 300.0}
_SCALE_OF_SHARES = 0.1
_ROUNDS = 6
_HUBER = 0.05  # relative errors beyond this count linearly
_PRIOR = 0.02  # how much an earlier profile's coefficients weigh: a term that the calls do not tell apart stays where it was


def fit(samples: Sequence[Sample], device: Device, prior: Profile) -> Profile:
    """`prior` with the coefficients of every family that the samples speak of fitted to them.

    Args:
        samples: of one device; calls of several families are left out.
        device: its ceilings, in whose terms coefficients are expressed.

    Raises:
        ProfileError: a sample is not a positive, finite time.
    """
    by_family: dict[str, list[Sample]] = {}
    for sample in samples:
        if not 0 < sample.seconds < float("inf"):
            raise ProfileError(f"a call took {sample.seconds} s", where=str(sample.workload.as_record()), hint="measure again")
        family, *others = {one.family for one in sample.workload.works()}
        if not others:
            by_family.setdefault(family, []).append(sample)
    families = dict(prior.families)
    for family, found in by_family.items():
        # of one that nobody measured, what stands in for it
        known = prior.families.get(family) or prior.families.get(family.partition("/")[0], {})
        families[family] = fit_family(family, found, device, known)
    return prior.model_copy(update={"families": families})


def fit_family(family: str, samples: Sequence[Sample], device: Device, prior: dict[str, float]) -> dict[str, float]:
    """Coefficients of one family by feature, those that are not zero; `prior`'s for features that no sample has."""
    rows = [_features(sample, device) for sample in samples]
    allowed = FEATURES[family.rpartition("/")[2]]
    fixed = {name: value for name, value in _FIXED.items() if name in allowed}
    names = [name for name in allowed if name not in fixed and any(name in row for row in rows)]
    table = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows], dtype=torch.float64)
    seconds = torch.tensor([sample.seconds for sample in samples], dtype=torch.float64)
    left = seconds - torch.tensor([sum(value * row.get(name, 0.0) for name, value in fixed.items()) for row in rows])
    known = torch.tensor([prior.get(name, 0.0) for name in names], dtype=torch.float64)
    scale = torch.tensor([_SCALE.get(name, _SCALE_OF_SHARES) for name in names], dtype=torch.float64)
    found = relative_least_squares(table, seconds, known, torch.where(known > 0, known, scale) if prior else None, left)
    kept = {name: value for name, value in prior.items() if name in allowed and name not in names}
    return kept | fixed | {name: float(f"{value:.6g}") for name, value in zip(names, found.tolist(), strict=True) if value > 0}


def _features(sample: Sample, device: Device) -> dict[str, float]:
    """Of all kernels of a call together."""
    total: Counter[str] = Counter()
    for one in sample.workload.works():
        total.update({name: float(term) for name, term in one.features(device).items()})
    return dict(total)


def relative_least_squares(
    table: Tensor, seconds: Tensor, prior: Tensor, scale: Tensor | None = None, left: Tensor | None = None
) -> Tensor:
    """Coefficients x ≥ 0 with table · x near `left` (default: `seconds`), errors relative to `seconds`.

    Args:
        table: fp64 [samples, features]. seconds: fp64 [samples], positive. prior: fp64 [features], 0 where nothing is known.
        scale: fp64 [features], how far from its prior a coefficient may easily be; None: nothing is known of any.
    """
    scaled = table / seconds[:, None]
    size = scaled.norm(dim=0).clamp(min=1e-30)
    # in units of each feature's own size; a coefficient that is `scale` away from its prior costs as much as an error of _PRIOR
    pull = torch.ones_like(size) if scale is None else 1 / (scale * size).clamp(min=1e-30)
    matrix = torch.cat([scaled / size, torch.diag(_PRIOR * pull)])
    wanted = torch.cat([(seconds if left is None else left) / seconds, _PRIOR * pull * prior * size])
    weights = torch.ones(len(wanted), dtype=torch.float64)
    best = torch.zeros(len(size), dtype=torch.float64)
    for _ in range(_ROUNDS):
        best = _nonnegative(matrix * weights[:, None], wanted * weights)
        error = (matrix @ best - wanted).abs()
        weights = (_HUBER / error.clamp(min=_HUBER)).sqrt()
        weights[len(seconds) :] = 1
    return best / size


def _nonnegative(matrix: Tensor, wanted: Tensor) -> Tensor:
    """Least squares with x ≥ 0, exactly: every set of features that may be positive is tried, and there are few."""
    features = matrix.shape[1]
    best, least = torch.zeros(features, dtype=matrix.dtype), float(wanted.square().sum())
    for chosen in _subsets(features):
        columns = matrix[:, chosen]
        found = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
        if not bool((found >= 0).all()):
            continue
        error = float((columns @ found - wanted).square().sum())
        if error < least * (1 - 1e-9):
            best = torch.zeros(features, dtype=matrix.dtype)
            best[chosen], least = found, error
    return best


def _subsets(count: int) -> Iterable[list[int]]:
    for size in range(1, count + 1):
        yield from map(list, itertools.combinations(range(count), size))

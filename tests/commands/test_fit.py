"""The fit: coefficients come back from times that were made with them, noise and outliers or not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.commands.calibrate import fit
from sparsify.costs import profile
from sparsify.costs.device import Device
from sparsify.costs.samples import Sample, Workload, predict
from sparsify.errors import ProfileError

PRIOR = profile.shipped("sm_90")
QUICK = settings(max_examples=25, deadline=None)
NOTHING_KNOWN = PRIOR.model_copy(update={"families": {}})
PROMPTS = [
    Workload("attention", "hopper", query_len=n, key_len=n, batch=batch, head_dim=dim)
    for n in (1024, 4096, 16384, 65536, 131072)
    for batch, dim in ((1, 128), (4, 128), (1, 64))
]


def device_with(**families: dict[str, float]) -> Device:
    made = PRIOR.model_copy(update={"families": {**PRIOR.families, **{name.replace("_", "/"): terms for name, terms in families.items()}}})
    return Device.from_profile("cuda", made)


def timed(cells, device: Device, noise: float = 0.0) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    factors = torch.exp(noise * torch.randn(len(cells), generator=generator)).tolist()
    return [Sample(cell, predict(cell, device) * factor) for cell, factor in zip(cells, factors, strict=True)]


@pytest.mark.slow
@QUICK
@given(st.floats(1.0, 3.0), st.floats(1e-6, 1e-4), st.floats(0, 1e-5), st.floats(0, 1.0), st.floats(0, 0.5))
def test_synthetic_coefficients_come_back_as_times(work, call, rows, tail, spill):
    truth = device_with(hopper_causal={"work": work, "call": call, "rows": rows, "tail": tail, "spill": spill})
    found = fit.fit(timed(PROMPTS, truth), truth, NOTHING_KNOWN)
    fitted = Device.from_profile("cuda", found)
    for length in (2048, 8192, 32768, 262144):
        cell = Workload("attention", "hopper", query_len=length, key_len=length)
        assert predict(cell, fitted) == pytest.approx(predict(cell, truth), rel=0.05)


@pytest.mark.parametrize("seed_noise", [0.0, 0.03])
def test_efficiency_survives_noise(seed_noise):
    truth = device_with(linear={"work": 1.25, "call": 4e-6})
    cells = [Workload("linear", rows=rows, inputs=4096, outputs=outputs) for rows in (512, 1024, 4096, 16384) for outputs in (4096, 14336)]
    found = fit.fit(timed(cells, truth, seed_noise), truth, PRIOR).families["linear"]
    assert found["work"] == pytest.approx(1.25, rel=0.05)


def test_one_wild_time_moves_little():
    truth = device_with(hopper_causal={"work": 1.1, "call": 1e-5})
    samples = timed(PROMPTS, truth)
    samples[7] = Sample(samples[7].workload, 3 * samples[7].seconds)
    fitted = Device.from_profile("cuda", fit.fit(samples, truth, PRIOR))
    others = [s for i, s in enumerate(samples) if i != 7]
    assert sorted(abs(predict(s.workload, fitted) / s.seconds - 1) for s in others)[len(others) // 2] < 0.03


def test_other_families_stay_as_they_were():
    truth = device_with(hopper_causal={"work": 2.0})
    found = fit.fit(timed(PROMPTS, truth), truth, PRIOR)
    assert {name: terms for name, terms in found.families.items() if name != "hopper/causal"} == {
        name: terms for name, terms in PRIOR.families.items() if name != "hopper/causal"
    }


def test_calls_of_two_kernels_fit_no_family():
    whole = Workload("whole", "hopper", query_len=8192, key_len=8192, stride=8, density=0.1)
    assert fit.fit([Sample(whole, 1.0)], device_with(), PRIOR).families == PRIOR.families


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_impossible_times_are_refused(seconds):
    with pytest.raises(ProfileError, match="measure again"):
        fit.fit([Sample(PROMPTS[0], seconds)], device_with(), PRIOR)


@QUICK
@given(st.lists(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), min_size=4, max_size=12), st.data())
def test_nothing_falls_below_zero_and_no_neighbour_is_better(rows, data):
    table = torch.tensor(rows, dtype=torch.float64)
    seconds = torch.tensor([data.draw(st.floats(0.1, 10)) for _ in rows], dtype=torch.float64)
    found = fit._nonnegative(table / seconds[:, None], torch.ones(len(rows), dtype=torch.float64))
    error = lambda x: float((table @ x / seconds - 1).square().sum())
    assert bool((found >= 0).all())
    for index in range(3):
        for step in (1e-3, -1e-3):
            moved = found.clone()
            moved[index] = max(0.0, float(moved[index]) + step)
            assert error(moved) >= error(found) - 1e-9


def test_terms_that_calls_do_not_tell_apart_stay_near_the_prior():
    """At one head dim alone, entries of the softmax and FLOPs are the same column."""
    truth = device_with(hopper_causal={"work": 1.1, "scores": 10.0, "call": 1e-6})
    cells = [cell for cell in PROMPTS if cell.head_dim == 128]
    prior = truth.profile
    found = fit.fit(timed(cells, truth), truth, prior).families["hopper/causal"]
    assert found["work"] == pytest.approx(1.1, rel=0.1)
    assert found["scores"] == pytest.approx(10.0, rel=0.6)


def test_features_that_no_call_has_keep_their_coefficients():
    truth = device_with(select={"work": 1.3, "steps": 1e-6, "rows": 1e-7, "scratch": 1.0, "work8": 1.7, "prepare": 1.5, "passes": 4e-6})
    cells = [Workload("select", query_len=n, key_len=n, stride=stride) for n in (2048, 8192, 65536) for stride in (8, 16)]
    found = fit.fit(timed(cells, truth), truth, truth.profile).families["select"]
    assert {name: found[name] for name in ("work8", "prepare", "passes", "scratch")} == {
        "work8": 1.7, "prepare": 1.5, "passes": 4e-6, "scratch": 1.0,
    }  # fmt: skip
    assert found["work"] == pytest.approx(1.3, rel=0.05)

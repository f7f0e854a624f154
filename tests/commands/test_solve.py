"""The choice of settings under a budget against every choice that there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.commands.calibrate.attention import solve
from sparsify.commands.calibrate.attention.solve import Config

NUMBER = st.integers(0, 20).map(lambda n: n / 4)
EXTRA = st.one_of(NUMBER, st.just(float("inf")))


@st.composite
def configs(draw, heads: int) -> Config:
    count = draw(st.integers(1, 3))
    table = lambda: torch.tensor([[draw(NUMBER) for _ in range(count)] for _ in range(heads)], dtype=torch.float64)
    cost, use = table(), table()
    if count > 1 and draw(st.booleans()):
        cost[0, 0] = torch.inf  # a setting that a head may not take
    return Config(cost, use, draw(NUMBER), draw(NUMBER))


@st.composite
def problems(draw):
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        heads = draw(st.integers(1, 2))
        layers.append([draw(configs(heads)) for _ in range(draw(st.integers(1, 2)))])
    return layers, draw(st.integers(0, 60)) / 4


def best(layers, limit) -> float | None:
    """By trying everything."""
    found = None
    every = []
    for layer in layers:
        ways = []
        for index, config in enumerate(layer):
            ways += [(index, s) for s in itertools.product(range(config.cost.shape[1]), repeat=config.cost.shape[0])]
        every.append(ways)
    for chosen in itertools.product(*every):
        cost, use = solve.total(layers, chosen)
        if use <= limit and cost != float("inf"):
            found = cost if found is None else min(found, cost)
    return found


@settings(max_examples=40, deadline=None)
@given(problems())
def test_the_relaxation_keeps_the_budget_and_its_bound_holds(problem):
    layers, limit = problem
    want, got = best(layers, limit), solve.relaxed([[solve._allowed(c, limit) for c in layer] for layer in layers], limit)
    if want is None:
        assert got is None
        return
    if got is None:  # the sparest choice by the relaxation's own measure is the sparest there is
        pytest.fail("a choice exists")
    assert got.use <= limit
    assert got.bound <= want + 1e-9 <= got.cost + 2e-9
    assert (got.cost, got.use) == pytest.approx(solve.total(layers, got.chosen))


@settings(max_examples=20, deadline=None)
@given(problems())
def test_the_integer_program_finds_the_best_choice(problem):
    pytest.importorskip("scipy")
    layers, limit = problem
    want, got = best(layers, limit), solve.solve(layers, limit)
    if want is None:
        assert got is None
        return
    assert got is not None
    assert got.use <= limit
    assert got.bound - 1e-9 <= want
    assert want - 1e-9 <= got.cost <= (1 + 2 * solve.GAP) * want + 1e-9

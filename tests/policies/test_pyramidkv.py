"""pyramidkv: the budget of every layer by the paper's formula, and the inner policy's choice within it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import SparseCache, policies
from sparsify.errors import ConfigError
from sparsify.generation.regions.caches import trouble
from sparsify.policies import LayerFacts
from tests.support.cache_reference import text
from tests.support.harness import holding
from tests.support.tiny_models import build


def budgets(layers, budget, **options):
    facts = [LayerFacts(i, layers, lambda: torch.ones(1)) for i in range(layers)]
    return [policies.make("pyramidkv", **options).bind(one).layout(budget) for one in facts]


@settings(max_examples=50, deadline=None)
@given(layers=st.integers(1, 80), budget=st.integers(100, 5000), beta=st.sampled_from([1, 5, 14, 20]))
def test_budgets_lie_on_the_papers_line_and_no_token_is_lost(layers, budget, beta):
    found = budgets(layers, budget, beta=beta, options={"window": 8})
    assert sum(layout.capacity for layout in found) == layers * budget
    assert all(layout.recent == 8 and layout.pinned < layout.capacity for layout in found)
    mean = Fraction(budget - 8)
    last, first = mean / beta, 2 * mean - mean / beta
    for i, layout in enumerate(found):
        line = mean if layers == 1 else first - (first - last) * Fraction(i, layers - 1)
        assert abs(layout.capacity - 8 - line) <= 1


@torch.no_grad()
def test_each_layer_keeps_what_the_inner_policy_would_under_that_budget():
    model = build("llama", layers=4)
    inner, ids = {"window": 4}, text(1, 60)
    pyramid = SparseCache(model.config, "pyramidkv", 20, options=inner, beta=4)
    model(ids, **holding(pyramid))
    capacities = [layer.layout.capacity for layer in pyramid.layers]
    assert capacities == [32, 24, 16, 8] and pyramid.layers[0].keys.shape[2] == 32
    for layer, capacity in zip(pyramid.layers, capacities, strict=True):
        alone = SparseCache(model.config, "snapkv", capacity, **inner)
        model(ids, **holding(alone))  # a prompt is attended to in full, so that every layer sees the same
        assert torch.equal(layer.positions, alone.layers[layer.index].positions)


def test_layers_of_different_budgets_are_compiled_as_one_graph():
    config = build("llama", layers=3).config
    assert "budgets of their own" in trouble(SparseCache(config, "pyramidkv", 16, options={"window": 4}, beta=4), 3)
    assert not trouble(SparseCache(config, "pyramidkv", 16, options={"window": 4}, beta=1), 3)


def test_what_it_cannot_wrap_is_refused():
    for of in ("full", "streaming_llm", "pyramidkv"):
        with pytest.raises(ConfigError, match="scores no tokens"):
            policies.make("pyramidkv", of=of)
    with pytest.raises(ConfigError, match="leaves none"):
        budgets(2, 10, options={"window": 8})[1]

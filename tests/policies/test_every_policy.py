"""What docs/cache.md promises of every policy, over a small model."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import sparsify
from sparsify import SparseCache, policies
from tests.support import cache_reference as reference
from tests.support.cache_reference import left_padded, text
from tests.support.cases import every
from tests.support.harness import holding
from tests.support.tiny_models import build

# options with which a budget of 16 evicts and keeps something of everything
OPTIONS = {
    "streaming_llm": {},
    "snapkv": {"window": 4},
    "knorm": {"recent": 4},
    "keydiff": {"recent": 4},
    "tova": {},
    "h2o": {},
    "expected_attention": {"future": 32},
    "pyramidkv": {"of": "snapkv", "options": {"window": 4}, "beta": 2},
    "chunkkv": {"of": "snapkv", "options": {"window": 4}, "chunk": 3},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=2)


def make(model, policy, budget=16, **more):
    return SparseCache(model.config, policy, budget, **OPTIONS[policy], **more)


def test_every_policy_that_evicts_is_here():
    assert set(OPTIONS) | {"full", "sirllm", "adakv", "duo"} == set(policies.discover()), "the last three need room: test_promises.py"


@pytest.mark.parametrize("policy", OPTIONS)
@torch.no_grad()
def test_a_budget_that_holds_the_text_changes_nothing_and_a_smaller_one_does(llama, policy):
    """A padded batch with a second turn."""
    ids, mask, cuts = text(2, 34), left_padded([34, 25]), [12, 1, 1, 9, 1, 10]
    want = reference.through(llama, DynamicCache(config=llama.config), ids, cuts, mask)[mask.bool()]
    torch.testing.assert_close(reference.through(llama, make(llama, policy, 80), ids, cuts, mask)[mask.bool()], want, **CLOSE)
    assert (reference.through(llama, make(llama, policy), ids, cuts, mask)[mask.bool()] - want).abs().max() > 1e-3


@pytest.mark.parametrize("policy", OPTIONS)
@torch.no_grad()
def test_padding_and_other_rows_do_not_matter(llama, policy):
    """A padded row beside a longer one keeps what it keeps alone."""
    ids, mask, cuts = text(2, 34), left_padded([34, 25]), [30, 1, 1, 2]
    both, alone = make(llama, policy), make(llama, policy)
    at = mask.cumsum(-1).sub(1).clamp(min=0)
    got = reference.through(llama, both, ids, cuts, mask, at)[1, 9:]
    torch.testing.assert_close(got, reference.through(llama, alone, ids[1:, 9:], [21, 1, 1, 2])[0], **CLOSE)
    for one, other in zip(both.layers, alone.layers, strict=True):
        assert torch.equal(one.positions[1], other.positions[0])


@pytest.mark.parametrize("policy", OPTIONS)
@torch.no_grad()
def test_no_more_than_the_budget_is_stored(llama, policy):
    cache = make(llama, policy)
    reference.through(llama, cache, text(1, 60), [50] + [1] * 6 + [4])
    for layer in cache.layers:
        slots = layer.layout.capacity
        assert layer.keys.shape[2] == layer.values.shape[2] == slots
        assert (layer.positions >= 0).all() and (layer.seen == 60).all()
        assert all(len(set(head)) == slots and 59 in head for head in layer.positions[0].tolist())
    assert sum(layer.layout.capacity for layer in cache.layers) == 16 * len(cache.layers)


@pytest.mark.parametrize("policy", every(3, [name for name in OPTIONS if name not in ("streaming_llm", "snapkv")]))
@torch.no_grad()
def test_compiled_calls_give_the_same(policy):
    """Those two policies are compiled in tests/generation/caches."""
    model = build("llama", layers=2)
    ids = text(1, 40)
    want = model.generate(ids, max_new_tokens=8, do_sample=False, **holding(make(model, policy)))
    sparsify.compile(model, strict=True, inductor={"freezing": False}, lower="eager")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **holding(make(model, policy))), want)

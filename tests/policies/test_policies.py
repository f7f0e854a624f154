"""Policies alone, and how the store op carries out what they say: against row-by-row Python."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsify.backends  # noqa: F401  (registers kernels)
from sparsify import policies
from sparsify.errors import ConfigError
from sparsify.ops import cache as cache_ops
from sparsify.policies import Candidates, Policy
from sparsify.policies.snapkv import SnapKV


def new_state(batch, kv_heads, capacity, dim):
    keys = torch.zeros(batch, kv_heads, capacity, dim)
    ints = {"dtype": torch.int32}
    return (
        keys,
        keys.clone(),
        torch.full((batch, kv_heads, capacity), -1, **ints),
        torch.zeros(batch, kv_heads, **ints),
        torch.zeros(batch, **ints),
        torch.zeros((), dtype=torch.int64),
    )


def store(state, policy, layout, key, query=None, is_token=None, empty=False):
    cache_ops.store(
        query,
        key,
        key + 100,
        *state,
        is_token=is_token,
        pinned=layout.pinned,
        recent=layout.recent,
        empty=empty,
        policy=policy.describe(),
        scale=0.3,
        softcap=0.0,
        version=cache_ops.VERSION,
    )


def marked(first, count, batch=1, heads=1):
    """Keys whose value is their token's number."""
    return torch.arange(first, first + count).float().view(1, 1, -1, 1).expand(batch, heads, -1, 2).contiguous()


# --- layout ---


@settings(max_examples=60, deadline=None)
@given(
    sinks=st.integers(0, 4),
    window=st.integers(1, 6),
    calls=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    pads=st.lists(st.booleans(), min_size=72, max_size=72),
)
def test_streaming_keeps_first_and_last_wherever_padding_stands(sinks, window, calls, pads):
    policy = policies.make("streaming_llm", sinks=sinks, window=window)
    layout = policy.layout(None)
    state, at, tokens = new_state(1, 1, layout.capacity, 2), 0, []
    for i, count in enumerate(calls):
        is_token = ~torch.tensor([pads[at : at + count]])
        key = marked(at, count)
        key[0, 0, ~is_token[0]] = torch.nan  # whatever a model computes for padding must never come back
        store(state, policy, layout, key, is_token=is_token, empty=i == 0)
        tokens += [at + j for j in range(count) if is_token[0, j]]
        at += count
    keys, values, positions, counts, seen, length = state
    expected = sorted(set(range(min(sinks, len(tokens)))) | set(range(max(0, len(tokens) - window), len(tokens))))
    held = {int(p): (keys[0, 0, s], values[0, 0, s]) for s, p in enumerate(positions[0, 0]) if p >= 0}
    if len(tokens) <= layout.capacity:
        expected = list(range(len(tokens)))
    assert sorted(held) == expected
    assert all((k == tokens[p]).all() and (v == tokens[p] + 100).all() for p, (k, v) in held.items())
    assert positions[0, 0, : min(sinks, len(tokens))].tolist() == list(range(min(sinks, len(tokens))))
    assert keys.isfinite().all() and values.isfinite().all()
    assert (int(seen), int(length)) == (len(tokens), at)
    assert (positions[0, 0] >= 0).tolist() == [s < min(int(counts[0, 0]), layout.capacity) for s in range(layout.capacity)]


@pytest.mark.parametrize("budget, share", [(12, 0.25), (12, 1.0), (20, 0.0)])
def test_later_tokens_replace_the_worst_first(budget, share):
    """Slots that a selection filled go in the order of their scores, then the oldest recent tokens."""
    policy = SnapKV(window=3, kernel=1, recent_share=share)
    layout = policy.layout(budget)
    torch.manual_seed(0)
    key, query = torch.randn(1, 1, 30, 2), torch.randn(1, 2, 30, 2)
    state = new_state(1, 1, budget, 2)
    store(state, policy, layout, key, query, empty=True)
    positions = torch.arange(30, dtype=torch.int32)
    score = policy.score(Candidates(key, key, positions[None, None], query[:, :, -3:], positions[None, -3:], torch.tensor([29]), 0.3, 0.0))[
        0, 0
    ]
    chosen = score[:27].argsort(descending=True)[: budget - 3].tolist()
    assert sorted(state[2][0, 0].tolist()) == sorted([*chosen, 27, 28, 29])
    assert state[2][0, 0, : layout.pinned].tolist() == chosen[: layout.pinned]
    leaving = [*chosen[layout.pinned :][::-1], 27, 28, 29, *range(30, 60)]
    held = set(state[2][0, 0].tolist())
    for step in range(30, 50):
        store(state, policy, layout, marked(step, 1))
        now = set(state[2][0, 0].tolist())
        assert (held - now, now - held) == ({leaving[step - 30]}, {step})
        held = now


# --- queries that a policy observes ---


def test_padding_does_not_change_snapkv():
    torch.manual_seed(2)
    policy = SnapKV(window=4)
    layout = policy.layout(10)
    key, query = torch.randn(1, 2, 20, 8), torch.randn(1, 4, 20, 8)
    plain = new_state(1, 2, 10, 8)
    store(plain, policy, layout, key, query, empty=True)
    for is_token in ([0] * 7 + [1] * 20, [1] * 20 + [0] * 7, [1] * 18 + [0] * 5 + [1] * 2 + [0] * 2):
        is_token = torch.tensor([is_token], dtype=torch.bool)
        wide_key, wide_query = torch.full((1, 2, 27, 8), torch.nan), torch.full((1, 4, 27, 8), 50.0)
        wide_key[:, :, is_token[0]], wide_query[:, :, is_token[0]] = key, query
        wide_key[:, :, ~is_token[0]] = 50.0
        padded = new_state(1, 2, 10, 8)
        store(padded, policy, layout, wide_key, wide_query, is_token=is_token, empty=True)
        if is_token[0, -1] or is_token[0, :20].all():  # inner padding separates neighbours, which smoothing feels
            assert torch.equal(padded[2], plain[2])
            torch.testing.assert_close(padded[0], plain[0])
        assert padded[4].tolist() == [20]


def test_fewer_real_queries_than_the_window():
    policy = SnapKV(window=6)
    layout = policy.layout(8)
    torch.manual_seed(3)
    state = new_state(2, 1, 8, 4)
    is_token = torch.ones(2, 20, dtype=torch.bool)
    is_token[1, :17] = False
    store(state, policy, layout, torch.randn(2, 1, 20, 4), torch.randn(2, 2, 20, 4), is_token=is_token, empty=True)
    assert state[2][1, 0].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert state[2][0, 0].min() >= 0 and set(range(14, 20)) <= set(state[2][0, 0].tolist())


def test_a_policy_that_says_nan_loses_no_recent_token():
    class Broken(Policy):
        name = "broken"

        def score(self, candidates):
            return torch.full(candidates.positions.shape, torch.nan)

    policies.parse.cache_clear()
    policies.discover()["broken"] = Broken
    try:
        policy, state = Broken(), new_state(1, 1, 6, 2)
        layout = policies.Layout(6, pinned=2, recent=3)
        store(state, policy, layout, marked(0, 15), empty=True)
        assert {12, 13, 14} <= set(state[2][0, 0].tolist()) and len(set(state[2][0, 0].tolist())) == 6
    finally:
        del policies.discover()["broken"]


# --- the registry ---


def test_policies_are_found_and_travel_as_text():
    assert {"streaming_llm", "snapkv"} <= set(policies.discover())
    policy = policies.make("snapkv", window=7, pool="max")
    assert policies.parse(policy.describe()) == policy
    assert policies.make(policy) is policy


def test_wrong_options():
    with pytest.raises(ConfigError, match=r"no policy 'snap'.*snapkv"):
        policies.make("snap")
    with pytest.raises(ConfigError, match="odd"):
        policies.make("snapkv", kernel=4)
    with pytest.raises(ConfigError, match="beside a finished policy"):
        policies.make(SnapKV(), window=3)
    with pytest.raises(ConfigError, match="neither a budget nor a window"):
        policies.make("streaming_llm").layout(None)


def test_a_foreign_policy_must_be_one(monkeypatch):
    class Entry:
        name, value = "x", "pkg:X"

        def load(self):
            return int

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry()])
    policies.discover.cache_clear()
    try:
        with pytest.raises(ConfigError, match="not a sparsify Policy"):
            policies.discover()
    finally:
        monkeypatch.undo()
        policies.discover.cache_clear()

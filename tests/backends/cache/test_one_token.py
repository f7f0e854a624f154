"""A token over a cache on a CPU: where every stored token is seen the short way serves it, with the reference's output and state."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify.backends.cache import one_token, reference
from sparsify.ops import cache
from sparsify.ops.cache import CacheDecodeCall
from tests.policies.test_policies import new_state

BATCH, KV_HEADS, CAPACITY, DIM = 2, 2, 9, 8
PLAIN = {"scale": 0.3, "softcap": 0.0, "window": 0, "sinks": 0}


def make(stored=4, pinned=cache.NEVER_OVERWRITTEN, heads=4, dtype=torch.float32, **changes):
    """A call over slots of which some hold tokens, and rubbish the others."""
    torch.manual_seed(0)
    keys, values, positions, counts, seen, length = new_state(BATCH, KV_HEADS, CAPACITY, DIM)
    keys, values = torch.randn_like(keys).to(dtype), torch.randn_like(values).to(dtype)
    keys[:, :, stored:], values[:, :, stored:] = torch.nan, torch.nan
    positions[:, :, :stored] = torch.arange(stored, dtype=positions.dtype)
    positions[:, :, stored:] = -1
    for count in (counts, seen, length):
        count.fill_(stored)
    draw = lambda heads: torch.randn(BATCH, heads, 1, DIM).to(dtype)
    state = {"keys": keys, "values": values, "positions": positions, "counts": counts, "seen": seen, "length": length}
    return CacheDecodeCall(query=draw(heads), key=draw(KV_HEADS), value=draw(KV_HEADS), pinned=pinned, **state, **{**PLAIN, **changes})


def both(call, steps=3):
    """Whether the short way served each step; outputs and states of both ways are the same."""
    states = ("keys", "values", "positions", "counts", "seen", "length")
    other = dataclasses.replace(call, **{name: getattr(call, name).clone() for name in states})
    served = []
    for _ in range(steps):
        served.append(one_token._filled(call) is not None)
        got, wanted = one_token.cache_decode(call), reference.cache_decode(other)
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-6)
        assert got.stride() == wanted.stride() and got.dtype == wanted.dtype
        for name in states:
            assert torch.equal(getattr(call, name).nan_to_num(), getattr(other, name).nan_to_num()), name
    return served


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("pinned", [cache.NEVER_OVERWRITTEN, 0, 2])
def test_plain_steps(pinned, heads):
    assert both(make(pinned=pinned, heads=heads)) == [True] * 3


def test_a_full_ring_is_the_references():
    assert both(make(CAPACITY - 2, pinned=2), steps=4) == [True, True, False, False]


@pytest.mark.parametrize(
    "changes",
    [{"window": 2}, {"softcap": 5.0}, {"sink_logits": torch.zeros(4)}, {"is_token": torch.tensor([[True], [False]])}, {"stored": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_hides_or_weighs_is_the_references(changes):
    assert not any(both(make(**changes), steps=1))


def test_rows_of_different_lengths_and_holes_are_the_references():
    uneven, hole = make(), make()
    uneven.counts[0], uneven.positions[0, :, 3], uneven.seen[0] = 3, -1, 3
    hole.positions[:, :, 1] = -1
    assert both(uneven) == [False] * 3 and both(hole) == [False] * 3


def test_other_dtypes_are_the_references():
    assert one_token._filled(make(dtype=torch.float64)) is None and one_token._filled(make(dtype=torch.bfloat16)) is None

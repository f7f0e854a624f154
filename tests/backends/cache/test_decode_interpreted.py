"""Generated decode kernels in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify import policies
from sparsify.backends.cache import decode as triton_decode
from sparsify.backends.cache import reference
from sparsify.backends.cache.decode import DecodeTiling, cache_decode
from sparsify.backends.codegen.launch import choose_splits
from sparsify.errors import KernelError
from sparsify.ops.cache import CacheDecodeCall, CacheStoreCall

pytestmark = pytest.mark.interpreter

SMALL = DecodeTiling(16, 4, 2)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def filled_state(batch, kv_heads, capacity, dims, tokens, layout, dtype, seed=0):
    """A cache in which row b holds tokens[b] tokens."""
    generator = torch.Generator().manual_seed(seed)
    ints = {"dtype": torch.int32}
    state = (
        torch.zeros(batch, kv_heads, capacity, dims[0], dtype=dtype),
        torch.zeros(batch, kv_heads, capacity, dims[1], dtype=dtype),
        torch.full((batch, kv_heads, capacity), -1, **ints),
        torch.zeros(batch, kv_heads, **ints),
        torch.zeros(batch, **ints),
        torch.zeros((), dtype=torch.int64),
    )
    width = max(tokens)
    is_token = torch.tensor([[0] * (width - n) + [1] * n for n in tokens], dtype=torch.bool)
    key = torch.randn(batch, kv_heads, width, dims[0], generator=generator).to(dtype)
    value = torch.randn(batch, kv_heads, width, dims[1], generator=generator).to(dtype)
    policy = policies.make("streaming_llm", sinks=layout.pinned, window=capacity - layout.pinned)
    if width:
        stored = {
            "pinned": layout.pinned,
            "recent": layout.recent,
            "empty": True,
            "policy": policy.describe(),
            "scale": 1.0,
            "softcap": 0.0,
        }
        reference.cache_store(CacheStoreCall(None, key, value, *state, is_token=is_token, **stored))
    return state


def check(
    batch=2, kv_heads=2, group=2, capacity=40, dims=(16, 16), tokens=(70, 23), pinned=4, dtype=torch.float32, steps=3, seed=0, **clauses
):
    layout = policies.Layout(capacity, pinned=pinned, recent=capacity - pinned)
    ours = filled_state(batch, kv_heads, capacity, dims, tokens, layout, dtype, seed)
    theirs = tuple(t.clone() for t in ours)
    generator = torch.Generator().manual_seed(seed + 1)
    options = {"pinned": pinned, "scale": 0.3, "softcap": clauses.pop("softcap", 0.0)}
    options |= {"window": capacity - pinned, "sinks": pinned}
    if clauses.pop("sink_logits", False):
        options["sink_logits"] = torch.randn(kv_heads * group, generator=generator)
    if clauses.pop("rotate_sinks", False):
        options["inverse_frequencies"] = 1.0 / 10.0 ** torch.linspace(0, 2, dims[0] // 4)
    padding = clauses.pop("padding", False)
    limit = triton_decode._WHOLE_SLOTS
    triton_decode._WHOLE_SLOTS = limit if clauses.pop("whole", True) else 0
    tickets = torch.zeros(batch * kv_heads + 1, dtype=torch.int32) if clauses.pop("fused", True) else None
    assert not clauses
    for step in range(steps):
        # as a model hands them over: the transpose of [batch, 1, heads, dim]
        make = lambda heads, dim: torch.randn(batch, 1, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        query, key, value = make(kv_heads * group, dims[0]), make(kv_heads, dims[0]), make(kv_heads, dims[1])
        if padding:
            mask = torch.randint(0, 2, (batch, 5), generator=generator).bool()
            options["is_token"] = mask[:, -1:]
            value[~mask[:, -1]] = torch.nan
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, **options))
        got = cache_decode(CacheDecodeCall(query, key, value, *ours, tickets=tickets, **options), tiling=SMALL)
        assert tickets is None or not tickets.any(), "the next token needs zeros"
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(got.float(), want.float(), atol=bound, rtol=bound)
        assert got.stride() == want.stride()
        for name, a, b in zip(("keys", "values", "positions", "counts", "seen", "length"), ours, theirs):
            assert torch.equal(a, b), f"{name} after step {step}"
    triton_decode._WHOLE_SLOTS = limit
    return got


@pytest.mark.parametrize(
    "clauses",
    [
        {},
        {"fused": False},
        {"whole": False},
        {"whole": False, "fused": False, "padding": True, "rotate_sinks": True, "sink_logits": True, "softcap": 3.0},
        {"softcap": 5.0},
        {"sink_logits": True},
        {"rotate_sinks": True},
        {"padding": True},
        {"padding": True, "rotate_sinks": True, "sink_logits": True, "softcap": 3.0},
        {"dims": (24, 40)},
        {"group": 1},
        {"group": 20},
        {"pinned": 0},
        {"tokens": (0, 0)},
        {"tokens": (1, 39)},
        {"capacity": 1, "pinned": 0, "tokens": (5, 0)},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.samples(5)
def test_against_the_reference(clauses):
    check(**clauses)


def test_clauses_change_the_result():
    plain = check()
    for clause in ({"softcap": 0.5}, {"sink_logits": True}, {"rotate_sinks": True}):
        assert not torch.allclose(check(**clause), plain, atol=1e-3), clause


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    capacity=st.integers(2, 70),
    pinned=st.integers(0, 10),
    tokens=st.lists(st.integers(0, 90), min_size=3, max_size=3),
    padding=st.booleans(),
    rotate_sinks=st.booleans(),
    fused=st.booleans(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_sizes_together(batch, kv_heads, group, capacity, pinned, tokens, padding, rotate_sinks, fused):
    pinned = min(pinned, capacity - 1)
    more = {"padding": padding, "rotate_sinks": rotate_sinks and pinned > 0, "fused": fused}
    check(batch, kv_heads, group, capacity, (16, 16), tuple(tokens[:batch]), pinned, steps=2, **more)


def test_the_reference_can_repeat_a_step_whose_second_kernel_fails(monkeypatch):
    """The first kernel has written the new token's position by then, and nothing else."""
    layout = policies.Layout(20, pinned=4, recent=16)
    ours = filled_state(2, 1, 20, (16, 16), (30, 9), layout, torch.float32)
    theirs = tuple(t.clone() for t in ours)
    whole = triton_decode._module

    def fail(*_, **__):
        raise RuntimeError("ptxas exploded")

    monkeypatch.setattr(triton_decode, "_module", lambda spec: SimpleNamespace(split=whole(spec).split, combine=defaultdict(lambda: fail)))
    query, key, value = (torch.randn(2, heads, 1, 16) for heads in (2, 1, 1))
    options = {"pinned": 4, "scale": 0.3, "softcap": 0.0, "window": 16, "sinks": 4}
    with pytest.raises(KernelError, match="ptxas exploded"):
        cache_decode(CacheDecodeCall(query, key, value, *ours, **options), tiling=SMALL)
    assert not torch.equal(ours[2], theirs[2]), "the first kernel ran"
    got, want = (reference.cache_decode(CacheDecodeCall(query, key, value, *state, **options)) for state in (ours, theirs))
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_splits_cover_what_is_filled_and_share_it():
    """The kernel cuts the filled slots, not the capacity: a cache that is a twentieth full costs a twentieth."""
    for capacity in (1, 63, 64, 65, 4096, 131072, 524288):
        for rows in (1, 8, 64, 1000):
            count = choose_splits(-(-capacity // 64), rows, 2 * 132)
            for filled in {0, 1, capacity // 20, capacity}:
                tiles = -(-filled // 64)
                length = -(-tiles // count) * 64  # as in the kernel's text
                assert count * length >= filled
                assert length <= max(64, -(-filled // count) + 64)

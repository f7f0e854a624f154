"""Generated kernels for calls of several tokens in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify import policies
from sparsify.backends.cache import reference
from sparsify.backends.cache.append import AppendTiling, cache_attention
from sparsify.ops.cache import CacheAttentionCall
from tests.backends.cache.test_decode_interpreted import TOLERANCE, filled_state
from tests.support.cases import examples as drawn

pytestmark = pytest.mark.interpreter

SMALL = AppendTiling(16, 16, 4, 2)


def check(
    batch=2, kv_heads=1, group=2, capacity=24, dims=(16, 16), tokens=(40, 9), sinks=4, count=11, window=None, dtype=torch.float32,
    splits=1, seed=0, new=True, **clauses,
):  # fmt: skip
    """Both implementations on the same call; returns the kernel's output."""
    layout = policies.Layout(capacity, pinned=sinks, recent=capacity - sinks)
    keys, values, positions, _, seen, _ = filled_state(batch, kv_heads, capacity, dims, tokens, layout, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    options = {"scale": 0.3, "softcap": clauses.pop("softcap", 0.0), "sinks": sinks}
    options["window"] = capacity - sinks if window is None else window
    make = lambda heads, dim: torch.randn(batch, count, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    query, key, value = make(kv_heads * group, dims[0]), make(kv_heads, dims[0]), make(kv_heads, dims[1])
    if clauses.pop("sink_logits", False):
        options["sink_logits"] = torch.randn(kv_heads * group, generator=generator)
    if clauses.pop("rotate_sinks", False):
        options["inverse_frequencies"] = 1.0 / 10.0 ** torch.linspace(0, 2, dims[0] // 4)
    if clauses.pop("padding", False):
        options["is_token"] = torch.randint(0, 3, (batch, count), generator=generator) > 0
        value.transpose(1, 2)[~options["is_token"]] = torch.nan
    if new:
        options |= {"new_key": key, "new_value": value}
    assert not clauses
    call = CacheAttentionCall(query, keys, values, positions, seen, **options)
    want = reference.cache_attention(call)
    got = cache_attention(call, tiling=SMALL, splits=splits)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    return got


@pytest.mark.parametrize(
    "clauses",
    [
        {"window": 0},
        {"splits": 2},
        {"padding": True, "kv_heads": 2},
        {"window": 0, "padding": True, "softcap": 3.0, "sink_logits": True},
        {"window": 0, "softcap": 3.0, "sink_logits": True, "splits": 2},
        {"rotate_sinks": True, "splits": 2},
        {"rotate_sinks": True, "padding": True, "tokens": (0, 2), "count": 40, "capacity": 9},
        {"tokens": (0, 0), "count": 50, "capacity": 12, "sinks": 3},
        {"new": False, "count": 1, "window": 0},
        {"new": False, "count": 1, "splits": 3},
        {"group": 3, "dims": (24, 40), "dtype": torch.bfloat16},
        {"group": 20, "count": 5, "dtype": torch.float16, "sink_logits": True},
    ],
    ids=str,
)
@pytest.mark.samples(4)
def test_against_the_reference(clauses):
    check(**clauses)


def test_clauses_change_the_result():
    plain = check()
    for clause in ({"softcap": 0.5}, {"sink_logits": True}, {"rotate_sinks": True}, {"window": 0}, {"window": 9}, {"padding": True}):
        assert not torch.allclose(check(**clause).nan_to_num(), plain, atol=1e-3), clause


@drawn(quick=5, slow=60)
def test_sizes_together(examples):
    @given(
        kv_heads=st.integers(1, 2),
        group=st.integers(1, 3),
        capacity=st.integers(2, 36),
        sinks=st.integers(0, 6),
        window=st.sampled_from([None, 0, 1, 5, 30]),
        tokens=st.lists(st.integers(0, 40), min_size=2, max_size=2),
        count=st.integers(2, 36),
        padding=st.booleans(),
        rotate_sinks=st.booleans(),
        splits=st.integers(1, 3),
    )
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def one(kv_heads, group, capacity, sinks, window, tokens, count, padding, rotate_sinks, splits):
        sinks = min(sinks, capacity - 1)
        rotate_sinks = rotate_sinks and window != 0
        check(
            2,
            kv_heads,
            group,
            capacity,
            (16, 16),
            tuple(tokens),
            sinks,
            count,
            window,
            splits=splits,
            padding=padding,
            rotate_sinks=rotate_sinks,
        )

    one()

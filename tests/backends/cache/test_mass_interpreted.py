"""Kernels that sum the attention that keys get, in Triton's interpreter against the reference. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.backends.cache import reference
from sparsify.backends.cache.mass import MassTiling, cache_mass
from sparsify.ops.cache import CacheMassCall

pytestmark = pytest.mark.interpreter


def operands(batch, kv_heads, group, queries, count, dim, dtype=torch.float32, missing=0, seed=0):
    """Queries that stand on the last keys, of which some are padding; the first `missing` queries of row 0 do not exist."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(batch, 1, count, generator=generator) < 0.2
    positions = torch.where(hidden, -1, (~hidden).cumsum(-1) - 1).to(torch.int32).expand(-1, kv_heads, -1)
    newest = positions[:, 0].amax(-1, keepdim=True)
    asked = (newest - queries + 1 + torch.arange(queries)).to(torch.int32)
    asked[0, :missing] = -1
    make = lambda heads, size: torch.randn(batch, size, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    keys = make(kv_heads, count)
    keys.transpose(1, 2)[hidden[:, 0]] = torch.nan
    return make(kv_heads * group, queries), keys, positions, asked


def check(*sizes, softcap=0.0, splits=2, **more):
    call = CacheMassCall(*operands(*sizes, **more), scale=0.4, softcap=softcap)
    got, want = cache_mass(call, tiling=MassTiling(16, 16, 16), splits=splits), reference.cache_mass(call)
    bound = 1e-5 if call.query.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=bound, rtol=bound)
    # the weights of a query that sees anything sum to 1
    seeing = (call.query_positions >= 0).sum(-1)[:, None].expand(want.shape[:2])
    torch.testing.assert_close(got.sum(-1), seeing.to(got.dtype), atol=0.05, rtol=0.02)
    return got


@pytest.mark.parametrize(
    "sizes, more",
    [
        ((2, 2, 2, 5, 40, 16), {}),
        ((1, 1, 3, 20, 40, 24), {"softcap": 2.0, "splits": 1}),
        ((2, 1, 4, 8, 50, 16), {"missing": 3}),
        ((1, 1, 2, 4, 30, 16), {"missing": 4, "splits": 4}),
        ((1, 2, 1, 6, 50, 16), {"dtype": torch.bfloat16}),
        ((1, 1, 2, 70, 75, 16), {}),  # more queries than a tile has
    ],
    ids=str,
)
def test_against_the_reference(sizes, more):
    check(*sizes, **more)


def test_softcap_changes_the_result():
    assert (check(1, 1, 2, 4, 40, 16) - check(1, 1, 2, 4, 40, 16, softcap=0.5)).abs().max() > 1e-3


@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 20), st.integers(21, 40), st.integers(1, 4))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_sizes_together(batch, kv_heads, group, queries, count, splits):
    check(batch, kv_heads, group, queries, count, 16, splits=splits)

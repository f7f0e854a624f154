"""Kernels over codes on a GPU against the reference, which needs tensor cores that know fp16's smallest numbers."""

from __future__ import annotations

import pytest
import torch

from sparsify import policies
from sparsify.backends.cache import append, quantised, reference
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheDecodeCall, CacheStoreCall
from tests.backends.cache.test_quantised import buffers, counters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def stored(codes, dtype, tokens, capacity, dim):
    """A layer on the GPU, and what ops are told of its codes."""
    keys, values, more = buffers(2, 2, capacity, codes, dtype, dims=(dim, dim))
    state = [t.cuda() for t in (keys, values, *counters(2, 2, capacity))]
    more = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in more.items()}
    key, value = torch.randn(2, 2, 2, tokens, dim, device="cuda").to(dtype)
    common = {
        "pinned": NEVER_OVERWRITTEN,
        "recent": 0,
        "empty": True,
        "policy": policies.make("full").describe(),
        "scale": 1.0,
        "softcap": 0.0,
    }
    reference.cache_store(CacheStoreCall(None, key, value, *state, **common, **more))
    return state, more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("tokens", [70, 5000])
def test_against_the_reference(tokens, codes, dtype):
    torch.manual_seed(0)
    ours, more = stored(codes, dtype, tokens, 5120, 128)
    torch.manual_seed(0)
    theirs, twin = stored(codes, dtype, tokens, 5120, 128)
    how = {"scale": 128**-0.5, "softcap": 0.0, "window": 0, "sinks": 0}
    for _ in range(70):  # a group is filled and becomes codes
        query, key, value = (torch.randn(2, 1, heads, 128, device="cuda").to(dtype).transpose(1, 2) for heads in (8, 2, 2))
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, pinned=NEVER_OVERWRITTEN, **how, **twin))
        got = quantised.cache_decode(CacheDecodeCall(query, key, value, *ours, pinned=NEVER_OVERWRITTEN, **how, **more))
        torch.testing.assert_close(got, want, atol=5e-3, rtol=2e-2)
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        assert torch.equal(a, b)
    query, key, value = (torch.randn(2, 40, heads, 128, device="cuda").to(dtype).transpose(1, 2) for heads in (8, 2, 2))
    call = CacheAttentionCall(query, *ours[:3], ours[4], new_key=key, new_value=value, **how, **more)
    torch.testing.assert_close(append.cache_attention(call), reference.cache_attention(call), atol=1e-2, rtol=2e-2)

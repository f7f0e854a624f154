"""Kernels over codes on a GPU against the reference, which needs tensor cores that know fp16's smallest numbers."""

from __future__ import annotations

import pytest
import torch

from sparsify import policies
from sparsify.backends.cache import append, pages_reference, quantised, reference
from sparsify.backends.cache.pages import cache_bounds
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.pages import Pages
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


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("read", [Pages(share=1.0), Pages(size=8, count=500, recent=200), Pages(size=64, share=1.0)], ids=str)
def test_pages_against_the_reference(codes, read):
    """All of them, since of pages whose bounds are equal up to rounding either may be read."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        state, more = stored(codes, torch.bfloat16, 3000, 3072, 128)
        bounds = torch.zeros(2, 2, read.of(3072), 2, 128, dtype=torch.bfloat16, device="cuda")
        pages_reference.cache_bounds(CacheBoundsCall(state[0], state[2], bounds, values=state[1], size=read.size, **more))
        found.append((state, more, bounds))
    (ours, more, bounds), (theirs, twin, want_bounds) = found
    bounds.fill_(torch.nan)
    cache_bounds(CacheBoundsCall(ours[0], ours[2], bounds, values=ours[1], size=read.size, **more))
    torch.testing.assert_close(bounds, want_bounds, atol=1e-2, rtol=1e-2)
    how = {"pinned": NEVER_OVERWRITTEN, "scale": 128**-0.5, "softcap": 0.0, "window": 0, "sinks": 0, "pages": read}
    for _ in range(70):  # a group is filled and becomes codes
        query, key, value = (torch.randn(2, 1, heads, 128, device="cuda").to(torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2))
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *theirs, bounds=want_bounds, **how, **twin))
        got = quantised.cache_decode(CacheDecodeCall(query, key, value, *ours, bounds=bounds, **how, **more))
        torch.testing.assert_close(got, want, atol=5e-3, rtol=2e-2)
        torch.testing.assert_close(bounds, want_bounds, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("codes", ["fp8", "int4"])
def test_a_graph_reads_other_pages_of_codes_at_every_token(codes):
    torch.manual_seed(0)
    state, more = stored(codes, torch.bfloat16, 3000, 3072, 128)
    read = Pages(share=0.1)
    bounds = torch.zeros(2, 2, read.of(3072), 2, 128, dtype=torch.bfloat16, device="cuda")
    cache_bounds(CacheBoundsCall(state[0], state[2], bounds, values=state[1], size=read.size, **more))
    how = {"pinned": NEVER_OVERWRITTEN, "scale": 128**-0.5, "softcap": 0.0, "window": 0, "sinks": 0, "pages": read}
    query, key, value = (torch.randn(2, 1, heads, 128, device="cuda").to(torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2))
    copies = lambda: (
        [t.clone() for t in state],
        bounds.clone(),
        {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in more.items()},
    )
    warm, warm_bounds, warm_more = copies()
    quantised.cache_decode(CacheDecodeCall(query, key, value, *warm, bounds=warm_bounds, **how, **warm_more))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantised.cache_decode(CacheDecodeCall(query, key, value, *state, bounds=bounds, **how, **more))
    found = []
    for _ in range(70):
        query.normal_(), key.normal_(), value.normal_()
        twin, twin_bounds, twin_more = copies()
        graph.replay()
        want = quantised.cache_decode(CacheDecodeCall(query, key, value, *twin, bounds=twin_bounds, **how, **twin_more))
        assert torch.equal(out, want)
        found.append(out.clone())
    assert not torch.allclose(found[0], found[1])

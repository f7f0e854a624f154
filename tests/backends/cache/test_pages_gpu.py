"""Pages of keys on a real GPU: kernels against the reference, and CUDA graphs that read other pages at every replay."""

from __future__ import annotations

import pytest
import torch

import sparsify.backends.registration  # noqa: F401  registers the ops
from sparsify import Pages, SparseCache
from sparsify.backends.cache import pages_reference, reference
from sparsify.backends.cache.decode import cache_decode
from sparsify.backends.cache.pages import cache_bounds
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheBoundsCall, CacheDecodeCall
from tests.backends.cache.test_decode_gpu import layer
from tests.backends.cache.test_full_gpu import token
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def whole_numbers(tensor):
    """Small ones, whose products are exact, so that bounds are equal where the reference's are."""
    return tensor.mul_(2).round_().clamp_(-4, 4)


@pytest.mark.parametrize("capacity", [1024, 33024, 270016])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pages", [Pages(), Pages(size=64, share=0.2), Pages(size=8, count=40, recent=200)], ids=str)
def test_a_graph_reads_other_pages_at_every_token(capacity, fused, pages):
    torch.manual_seed(0)
    state = layer(2, 8, capacity, 128, torch.bfloat16, (capacity - 30, capacity // 2), 0)
    whole_numbers(state[0])
    bounds = state[0].new_zeros(2, 8, pages.of(capacity), 2, 128)
    cache_bounds(CacheBoundsCall(state[0], state[2], bounds, size=pages.size))
    want_bounds = torch.zeros_like(bounds)
    pages_reference.cache_bounds(CacheBoundsCall(state[0], state[2], want_bounds, size=pages.size))
    assert torch.equal(bounds, want_bounds)
    query, key, value = token(2, 32, 8)
    options = {"pinned": NEVER_OVERWRITTEN, "scale": 0.1, "softcap": 0.0, "window": 0, "sinks": 0, "pages": pages}
    options["tickets"] = torch.zeros(17, dtype=torch.int32, device="cuda") if fused else None
    warm, warm_bounds = tuple(t.clone() for t in state), bounds.clone()
    cache_decode(CacheDecodeCall(query, key, value, *warm, bounds=warm_bounds, **options))  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache_decode(CacheDecodeCall(query, key, value, *state, bounds=bounds, **options))
    found = []
    for _ in range(4):
        whole_numbers(query.normal_()), whole_numbers(key.normal_()), value.normal_()
        twin, twin_bounds = tuple(t.clone() for t in state), bounds.clone()
        graph.replay()
        want = reference.cache_decode(CacheDecodeCall(query, key, value, *twin, bounds=twin_bounds, **options))
        torch.testing.assert_close(out.float(), want.float(), atol=3e-2, rtol=3e-2)
        for a, b in zip((*state, bounds), (*twin, twin_bounds), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
        found.append(out.clone())
    assert not torch.allclose(found[0], found[1])


@torch.no_grad()
def test_a_compiled_model_reads_the_pages_that_the_reference_reads():
    model, ids = build("llama").cuda(), torch.randint(3, VOCAB, (2, 300), device="cuda")
    make = lambda: SparseCache(model.config, "full", 400, batch_size=2, device="cuda", read=Pages(size=8, share=0.1, recent=16))
    want = model.generate(ids, **holding(make()), max_new_tokens=40, do_sample=False)
    model.compile(backend="sparsify", fullgraph=True, options={"strict": True, "mode": "reduce-overhead"})
    assert torch.equal(model.generate(ids, **holding(make()), max_new_tokens=40, do_sample=False), want)

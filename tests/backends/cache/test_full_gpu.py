"""Caches that keep everything, on a real GPU: a full cache and a static one, whose lengths CUDA graphs read on the device."""

from __future__ import annotations

import pytest
import torch

import sparsify.backends.registration  # noqa: F401  registers the ops
from sparsify.backends import dispatch
from sparsify.backends.attention import reference as attention_reference
from sparsify.backends.cache import reference
from sparsify.backends.cache.decode import cache_decode
from sparsify.generation.caches.full import full_cache
from sparsify.ops.attention import AttentionCall
from sparsify.ops.cache import NEVER_OVERWRITTEN, CacheDecodeCall
from tests.backends.cache.test_decode_gpu import layer
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CALL = {"pinned": NEVER_OVERWRITTEN, "scale": 0.1, "softcap": 0.0, "window": 0, "sinks": 0}


def token(batch, heads, kv_heads, dim=128):
    make = lambda count: torch.randn(batch, 1, count, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    return make(heads), make(kv_heads), make(kv_heads)


@pytest.mark.parametrize("capacity", [1024, 33024, 70016])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_graph_over_a_full_cache_is_replayed_until_there_is_no_room(capacity, padded, fused):
    torch.manual_seed(0)
    state = layer(2, 8, capacity, 128, torch.bfloat16, (capacity - 3, capacity // 2), 0)
    call = token(2, 32, 8)
    options = CALL | {"tickets": torch.zeros(17, dtype=torch.int32, device="cuda") if fused else None}
    if padded:
        options["is_token"] = torch.tensor([[True], [False]], device="cuda")
    warm = tuple(t.clone() for t in state)
    cache_decode(CacheDecodeCall(*call, *warm, **options))  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache_decode(CacheDecodeCall(*call, *state, **options))
    for step in range(5):
        twin = tuple(t.clone() for t in state)
        graph.replay()
        want = reference.cache_decode(CacheDecodeCall(*call, *twin, **options))
        torch.testing.assert_close(out.float(), want.float(), atol=3e-2, rtol=3e-2, equal_nan=True)
        assert out.isnan().any((1, 2, 3)).tolist() == [step >= 3, False]
        for a, b in zip(state, twin):
            torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("query_len", [1, 5])
def test_a_graph_over_a_static_cache_reads_its_length(padded, query_len):
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 8, 20000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(2, query_len, 32, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    start, flags = torch.tensor([100], device="cuda"), torch.ones(2, 20000, dtype=torch.uint8, device="cuda")
    flags[1, :5000] = 0
    clauses = {"query_start": start, "scale": 0.1, "causal": True, "seq_major": True} | ({"key_flags": flags} if padded else {})
    call = AttentionCall(query, keys, values, **clauses)
    with dispatch.strict():
        call.run()  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call.run()
    for length in (19990, 7000, 64, 0):
        start.fill_(length)
        graph.replay()
        want, _ = attention_reference.attention(call.in_dtype(torch.float64))
        torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


@torch.no_grad()
@torch._inductor.config.patch("triton.cudagraph_or_error", True)  # says why, where CUDA graphs are skipped
def test_one_compiled_step_serves_caches_of_all_sizes():
    model = build("llama").to("cuda")
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0)).to("cuda")
    want = model(ids).logits[:, 60:]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = torch.compile(model, backend="sparsify", fullgraph=True, options={"mode": "reduce-overhead", "strict": True})
    for capacity in (128, 1024, 5000):
        cache, out = full_cache(model.config, 2, capacity, "cuda", torch.float32), []
        model(ids[:, :60], **holding(cache))
        for i in range(60, 90):
            torch.compiler.cudagraph_mark_step_begin()
            out.append(forward(ids[:, i : i + 1], **holding(cache)).logits.clone())
        torch.testing.assert_close(torch.cat(out, 1), want, atol=2e-3, rtol=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()

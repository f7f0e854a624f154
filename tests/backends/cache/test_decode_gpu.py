"""Decode kernels and a compiled model over a SparseCache on a real GPU."""

from __future__ import annotations

import pytest
import torch

from sparsify import SparseCache
from sparsify.backends.cache import reference
from sparsify.backends.cache.decode import cache_decode
from sparsify.ops.cache import CacheDecodeCall
from tests.backends.cache.test_decode_interpreted import TOLERANCE
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def layer(batch, kv_heads, capacity, dim, dtype, tokens, pinned):
    """A layer in which row b holds tokens[b] tokens; reference stores on the device."""
    ints = {"dtype": torch.int32, "device": "cuda"}
    filled = torch.tensor(tokens, **ints).clamp(max=capacity)
    slots = torch.arange(capacity, **ints)
    keys, values = (torch.randn(batch, kv_heads, capacity, dim, device="cuda").to(dtype) for _ in range(2))
    positions = torch.where(slots < filled[:, None], slots, -1)[:, None].expand(-1, kv_heads, -1).contiguous()
    counts = torch.tensor(tokens, **ints)[:, None].expand(-1, kv_heads).contiguous()
    return keys, values, positions, counts, torch.tensor(tokens, **ints), torch.tensor(max(tokens), device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim, group", [(128, 4), (64, 1), (80, 7), (256, 2)])
@pytest.mark.parametrize("capacity, tokens", [(1024, (9000, 1023)), (300, (0, 299)), (20000, (12345, 20000))])
def test_against_the_reference(capacity, tokens, dim, group, dtype):
    torch.manual_seed(0)
    ours = layer(2, 2, capacity, dim, dtype, tokens, 4)
    theirs = tuple(t.clone() for t in ours)
    options = {"pinned": 4, "scale": dim**-0.5, "softcap": 0.0, "window": 0, "sinks": 0}
    options["tickets"] = torch.zeros(2 * 2 + 1, dtype=torch.int32, device="cuda")
    for _ in range(3):
        make = lambda heads: torch.randn(2, 1, heads, dim, device="cuda").to(dtype).transpose(1, 2)
        call = make(2 * group), make(2), make(2)
        got = cache_decode(CacheDecodeCall(*call, *ours, **options))
        want = reference.cache_decode(CacheDecodeCall(*call, *theirs, **options))
        torch.testing.assert_close(got.float(), want.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_joining_in_the_last_program_loses_nothing():
    """One kernel against two, over many tokens: a program that joins before the others have written would show sooner or later."""
    torch.manual_seed(0)
    ours = layer(2, 8, 1024, 128, torch.bfloat16, (5000, 700), 4)
    theirs = tuple(t.clone() for t in ours)
    options = {"pinned": 4, "scale": 0.2, "softcap": 0.0, "window": 0, "sinks": 0}
    tickets = torch.zeros(17, dtype=torch.int32, device="cuda")
    pairs = []
    for i in range(400):
        call = tuple(torch.randn(2, 1, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (32, 8, 8))
        options["is_token"] = torch.tensor([[True], [i % 3 > 0]], device="cuda") if i >= 200 else None
        joined = CacheDecodeCall(*call, *ours, tickets=tickets, **options)
        pairs.append((cache_decode(joined), cache_decode(CacheDecodeCall(*call, *theirs, **options))))
    got, want = (torch.stack(outputs) for outputs in zip(*pairs))
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and not tickets.any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_cuda_graph_replays_step_by_step(fused):
    state = layer(1, 2, 512, 128, torch.bfloat16, (100,), 4)
    call = tuple(torch.randn(1, 1, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2))
    options = {"pinned": 4, "scale": 0.1, "softcap": 0.0, "window": 0, "sinks": 0}
    options["tickets"] = torch.zeros(3, dtype=torch.int32, device="cuda") if fused else None
    cache_decode(CacheDecodeCall(*call, *state, **options))  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache_decode(CacheDecodeCall(*call, *state, **options))
    for _ in range(5):
        twin = tuple(t.clone() for t in state)
        graph.replay()
        want = reference.cache_decode(CacheDecodeCall(*call, *twin, **options))
        torch.testing.assert_close(out.float(), want.float(), atol=3e-2, rtol=3e-2)
        assert all(torch.equal(a, b) for a, b in zip(state, twin))


@pytest.mark.parametrize("policy, budget", [("streaming_llm", 40), ("snapkv", 48), ("snapkv", 512)])
@torch.no_grad()
@torch._inductor.config.patch("triton.cudagraph_or_error", True)  # says why, where CUDA graphs are skipped
def test_reduce_overhead_gives_the_same_logits(policy, budget):
    model = build("llama").to("cuda")
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0)).to("cuda")

    def run(forward):
        cache = SparseCache(model.config, policy, budget, batch_size=2, device="cuda", dtype=torch.float32)
        out = [model(ids[:, :60], **holding(cache)).logits]
        for i in range(60, 90):
            torch.compiler.cudagraph_mark_step_begin()
            out.append(forward(ids[:, i : i + 1], **holding(cache)).logits.clone())
        return torch.cat(out, 1)

    want = run(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = torch.compile(model, backend="sparsify", fullgraph=True, options={"mode": "reduce-overhead", "strict": True})
    torch.testing.assert_close(run(forward), want, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(run(forward), want, atol=2e-3, rtol=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()


@pytest.mark.parametrize("policy, budget", [("streaming_llm", 40), ("snapkv", 48)])
@torch.no_grad()
@torch._inductor.config.patch("triton.cudagraph_or_error", True)
def test_prompts_and_later_turns_in_cuda_graphs(policy, budget):
    model = build("llama").to("cuda")
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0)).to("cuda")

    def run(forward):
        cache, out, first = SparseCache(model.config, policy, budget, batch_size=2, device="cuda", dtype=torch.float32), [], 0
        for size in [60] + [1] * 6 + [7] + [1] * 6:
            torch.compiler.cudagraph_mark_step_begin()
            out.append(forward(ids[:, first : first + size], **holding(cache)).logits.clone())
            first += size
        return torch.cat(out, 1)

    want = run(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = torch.compile(model, backend="sparsify", fullgraph=True, options={"mode": "reduce-overhead", "strict": True})
    for _ in range(4):  # warmed up, recorded, replayed
        torch.testing.assert_close(run(forward), want, atol=2e-3, rtol=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    torch._dynamo.reset()


@torch.no_grad()
def test_offloaded_and_fetched_back():
    model = build("llama").to("cuda")
    ids = torch.randint(3, VOCAB, (2, 70), generator=torch.Generator().manual_seed(0)).to("cuda")
    caches = [SparseCache(model.config, "snapkv", 48) for _ in range(2)]
    for cache in caches:
        model(ids[:, :60], **holding(cache))
    for layer in caches[0].layers:
        layer.offload()
        assert all(t.device.type == "cpu" for t in (*layer.state, layer.tickets))
    caches[0].reorder_cache(torch.tensor([1, 0], device="cuda"))
    for layer in caches[0].layers:
        layer.prefetch()
    caches[1].reorder_cache(torch.tensor([1, 0], device="cuda"))
    got, want = (model(ids[:, 60:], **holding(cache)).logits for cache in caches)
    torch.testing.assert_close(got, want)

"""Clusters of a prefix on a real GPU: kernels against the reference, graphs that read other clusters at every replay, and a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparsify.backends.registration  # noqa: F401  registers the ops
from sparsify import Clusters, SparseCache
from sparsify.backends.cache import append, reference
from sparsify.backends.cache.decode import cache_decode
from sparsify.generation.caches.clusters import arranged
from sparsify.ops.cache import CacheAttentionCall
from tests.backends.cache.test_clusters_interpreted import STATE, call_of, prepared, whole_numbers
from tests.support.harness import holding
from tests.support.tiny_models import VOCAB, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

READ = [Clusters(), Clusters(size=64, share=0.2), Clusters(size=8, count=40, sinks=20, reach=2), Clusters(size=32, share=0.1, reach=0)]


def on_gpu(call, dtype=torch.bfloat16):
    """The call with its tensors there, floats in another dtype."""
    moved = {}
    for field in dataclasses.fields(call):
        value = getattr(call, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to("cuda", dtype if value.is_floating_point() else value.dtype)
    return dataclasses.replace(call, **moved)


def calls(read, tokens, group=4, dtype=torch.bfloat16, padding=False):
    """A call of one token over rows of which all but the last 100 tokens lie in clusters."""
    clusters = [max(0, n - 100) // read.size for n in tokens]
    state, bounds, held = prepared(read, tokens, clusters, max(tokens) + 300, 128)
    return on_gpu(call_of(state, bounds, held, read, group, padding), dtype)


def twin(call):
    return dataclasses.replace(call, **{name: getattr(call, name).clone() for name in (*STATE, "bounds")})


@pytest.mark.parametrize("tokens", [(900, 640), (33000, 20000), (140000, 9)])
@pytest.mark.parametrize("read", READ, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_the_reference(tokens, read, dtype):
    call = calls(read, tokens, dtype=dtype, padding=tokens[1] == 640)
    other, dense, before = twin(call), twin(call), call.bounds.clone()
    got, want = cache_decode(call), reference.cache_decode(other)
    torch.testing.assert_close(got.float(), want.float(), atol=3e-2, rtol=3e-2)
    for name in STATE:
        torch.testing.assert_close(getattr(call, name), getattr(other, name), atol=0, rtol=0, equal_nan=True)
    stays = torch.arange(before.shape[2], device="cuda") * read.size < call.prepared[..., None]
    assert torch.equal(call.bounds[stays], before[stays])
    everything = reference.cache_decode(dataclasses.replace(dense, bounds=None, pages=None, prepared=None))
    assert not torch.allclose(everything.float(), want.float(), atol=3e-2)


@pytest.mark.parametrize("read", READ[:2], ids=str)
def test_a_graph_reads_other_clusters_at_every_token(read):
    call = calls(read, (33000, 20000))
    cache_decode(twin(call))  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache_decode(call)
    found = []
    for _ in range(4):
        for tensor in (call.query, call.key):
            tensor.copy_(whole_numbers(*tensor.shape))
        call.value.normal_()
        other = twin(call)
        graph.replay()
        torch.testing.assert_close(out.float(), reference.cache_decode(other).float(), atol=3e-2, rtol=3e-2)
        found.append(out.clone())
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("queries", [5, 200])
@pytest.mark.parametrize("read", READ, ids=str)
def test_several_tokens(read, queries):
    one = calls(read, (3000, 2000))
    make = lambda heads: whole_numbers(2, heads, queries, 128).to("cuda", torch.bfloat16)
    call = CacheAttentionCall(
        make(8), one.keys, one.values, one.positions, one.seen, new_key=make(2), new_value=make(2), bounds=one.bounds,
        prepared=one.prepared, pages=read, scale=0.05, softcap=0.0, window=0, sinks=0,
    )  # fmt: skip
    want = reference.cache_attention(call)
    torch.testing.assert_close(append.cache_attention(call).float(), want.float(), atol=3e-2, rtol=3e-2)
    dense = reference.cache_attention(dataclasses.replace(call, bounds=None, prepared=None, pages=None))
    assert not torch.allclose(dense.float(), want.float(), atol=3e-2)


def test_clusters_are_those_that_a_cpu_finds():
    keys = torch.randn(16 * 75, 64)
    assert torch.equal(arranged(keys.cuda(), 16, 1).cpu(), arranged(keys, 16, 1))


@torch.no_grad()
def test_a_prefix_that_a_cpu_prepared_is_read_on_the_gpu(tmp_path):
    model, ids = build("llama"), torch.randint(3, VOCAB, (2, 340))
    how = Clusters(size=8, count=4, sinks=2, recent=10)
    cache = SparseCache(model.config, "full", 400, read=how)
    model(ids[:, :300], **holding(cache))
    cache.prepare()
    cache.save(tmp_path / "prefix", model)
    dense = model(ids, use_cache=False).logits[:, 300:]
    forced = lambda cache, ids: torch.cat([model(part, **holding(cache)).logits for part in ids[:, 300:].split([20, *[1] * 20], 1)], 1)
    want = forced(cache, ids)
    model.cuda()
    got = forced(SparseCache.load(tmp_path / "prefix", model), ids.cuda()).cpu()
    assert (got - want).abs().max() < 0.1 * (dense - want).abs().max()


@torch.no_grad()
def test_a_compiled_model_reads_the_clusters_that_an_uncompiled_one_reads():
    model, ids = build("llama").cuda(), torch.randint(3, VOCAB, (2, 300), device="cuda")

    def generated():
        cache = SparseCache(model.config, "full", 400, batch_size=2, device="cuda", read=Clusters(size=8, share=0.1, recent=16))
        model(ids[:, :-1], **holding(cache))
        cache.prepare()
        return model.generate(ids, **holding(cache), max_new_tokens=40, do_sample=False)

    want = generated()
    model.compile(backend="sparsify", fullgraph=True, options={"strict": True, "mode": "reduce-overhead"})
    assert torch.equal(generated(), want)


@pytest.mark.parametrize("dtype", [None, "fp8"])
@torch.no_grad()
def test_a_file_on_a_gpu_makes_no_second_copy(tmp_path, dtype):
    model, ids = build("llama").cuda(), torch.randint(3, VOCAB, (1, 6000), device="cuda")
    cache = SparseCache(model.config, "full", 1 << 16, dtype=dtype)
    model(ids, **holding(cache))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache.save(tmp_path / "cache", model)
    size = (tmp_path / "cache").stat().st_size
    assert torch.cuda.max_memory_allocated() - before < size // 4
    loaded = SparseCache.load(tmp_path / "cache", model)
    assert torch.cuda.max_memory_allocated() - before < loaded.kept_bytes() + size // 4
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        for name in ("keys", "values", "positions"):
            assert torch.equal(getattr(one, name)[:, :, :6000], getattr(other, name)[:, :, :6000])
    assert torch.equal(model(ids[:, :7], **holding(loaded)).logits, model(ids[:, :7], **holding(cache)).logits)

"""SparseCache(policy="full"): nothing is evicted, buffers grow, and every way of calling gives what an ordinary cache gives."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import sparsify
import tests.support.cache_reference as reference
from sparsify import SparseCache
from sparsify.errors import CacheError
from sparsify.generation.caches.full import full_cache
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
@pytest.mark.parametrize("budget", [None, 20, 64])
@torch.no_grad()
@pytest.mark.samples(3)
def test_tokens_are_those_of_an_ordinary_cache(family, budget):
    model, ids, mask = build(family), text(2, 40), left_padded([40, 33])
    for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 16}):
        options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False} | options
        torch.manual_seed(0)
        want = model.generate(ids, **options)
        torch.manual_seed(0)
        cache = SparseCache(model.config, "full", budget)
        assert torch.equal(model.generate(ids, **holding(cache), **options), want)
        assert cache.get_seq_length() == 69


@pytest.mark.parametrize("padding", ["none", "left", "anywhere"])
@pytest.mark.parametrize("cuts", [[34], [12, 1, 1, 9, 1, 10], [1] * 34])
@torch.no_grad()
def test_any_calls_give_what_an_ordinary_cache_gives(llama, padding, cuts):
    ids, mask = text(3, 34), torch.ones(3, 34, dtype=torch.long)
    if padding == "left":
        mask = left_padded([34, 9, 25])
    if padding == "anywhere":
        mask[0, 5:7], mask[1, 20:] = 0, 0
        mask[2, :30] = 0
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    for room in (None, 10):
        cache = SparseCache(llama.config, "full", room)
        got = reference.through(llama, cache, ids, cuts, mask, at)
        want = reference.through(llama, DynamicCache(config=llama.config), ids, cuts, mask, at)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)
        layer = cache.layers[1]
        assert layer.counts.tolist() == mask.sum(-1, keepdim=True).expand(3, 2).tolist()
        assert [row[row >= 0].tolist() for row in layer.positions[:, 0]] == [list(range(n)) for n in mask.sum(-1)]


@torch.no_grad()
def test_growing_keeps_what_is_stored(llama):
    cache = SparseCache(llama.config, "full", 64, batch_size=1, device="cpu")
    ids = text(1, 90)
    got = reference.through(llama, cache, ids, [60] + [1] * 30)
    torch.testing.assert_close(got, llama(ids).logits, **CLOSE)
    assert [layer.keys.shape[2] for layer in cache.layers] == [1024] * 2
    cache.reserve(2000)
    assert [layer.keys.shape[2] for layer in cache.layers] == [2048] * 2
    more = text(1, 5, seed=1)
    got = reference.through(llama, cache, more, [5])
    torch.testing.assert_close(got, llama(torch.cat((ids, more), 1)).logits[:, 90:], **CLOSE)


@torch.no_grad()
def test_a_crop_and_a_second_turn(llama):
    cache, ids = SparseCache(llama.config, "full", 16), text(1, 40)
    reference.through(llama, cache, ids, [40])
    assert cache.is_croppable
    cache.crop(-10)
    more = text(1, 70, seed=1)
    got = reference.through(llama, cache, more, [50] + [1] * 20)
    torch.testing.assert_close(got, llama(torch.cat((ids[:, :30], more), 1)).logits[:, 30:], **CLOSE)


@torch.no_grad()
def test_assisted_decoding(llama):
    """Drafts that are taken back need a crop, which only a cache that holds everything has."""
    ids = text(1, 20).repeat(1, 3)
    options = {"max_new_tokens": 40, "do_sample": False}
    want = llama.generate(ids, **options)
    cache = SparseCache(llama.config, "full")
    assert torch.equal(llama.generate(ids, **holding(cache), prompt_lookup_num_tokens=4, **options), want)


@torch.no_grad()
def test_rows_move_and_a_copy_goes_its_own_way(llama):
    ids, mask = text(3, 20), left_padded([20, 13, 17])
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = SparseCache(llama.config, "full")
    reference.through(llama, cache, ids, [20], mask, at)
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    twin.batch_select_indices(torch.tensor([2, 0, 0]))
    for layer in twin.layers:
        layer.offload()
        layer.prefetch()
    more, after = text(3, 1, seed=2), torch.cat((mask[[2, 0, 0]], torch.ones(3, 1, dtype=torch.long)), 1)
    step = {"attention_mask": after, "position_ids": after.sum(-1, keepdim=True) - 1}
    got = [llama(more, **holding(held), **step).logits for held in (cache, twin)]
    rows = torch.cat((ids[[2, 0, 0]], more), 1)
    want = llama(rows, attention_mask=after, position_ids=(after.cumsum(-1) - 1).clamp(min=0)).logits[:, -1:]
    for logits in got:
        torch.testing.assert_close(logits, want, **CLOSE)


@torch.no_grad()
def test_a_reset_forgets(llama):
    cache, ids = SparseCache(llama.config, "full", 24), text(2, 30)
    reference.through(llama, cache, text(2, 30, seed=7), [30])
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(reference.through(llama, cache, ids, [20] + [1] * 10), llama(ids).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.slow
def test_compiled_code_serves_all_capacities(llama):
    from torch._dynamo.testing import CompileCounterWithBackend

    ids = text(2, 40)
    want = llama.generate(ids, max_new_tokens=24, do_sample=False)
    make = lambda capacity: full_cache(llama.config, 2, capacity, "cpu")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    llama.compile(backend=counter, fullgraph=True)
    try:
        for capacity in (64, 300, 2000):
            cache = make(capacity)
            assert torch.equal(llama.generate(ids, **holding(cache), max_new_tokens=24, do_sample=False), want)
            assert counter.frame_count == 2  # one graph for the prompt, one for all later tokens
            assert cache.layers[0].keys.shape[2] == -(-capacity // 64) * 64
    finally:
        llama._compiled_call_impl = None
        torch._dynamo.reset()


@torch.no_grad()
def test_too_many_tokens_in_compiled_code_are_told(llama):
    """Compiled code makes no room: NaN at once, and an error as soon as somebody asks."""
    torch._dynamo.reset()
    cache, ids = full_cache(llama.config, 1, 64, "cpu"), text(1, 70)
    reference.through(llama, cache, ids[:, :60], [60])
    forward = torch.compile(llama, backend="aot_eager", fullgraph=True)
    finite = [bool(forward(ids[:, i : i + 1], **holding(cache)).logits.isfinite().all()) for i in range(60, 67)]
    assert finite == [True] * 4 + [False] * 3
    with pytest.raises(CacheError, match="more tokens than the 64 that there is room for"):
        cache.get_seq_length()
    with pytest.raises(CacheError, match="room for"):
        llama(ids[:, 67:69], **holding(cache))
    cache.reset()
    cache.reserve(70)
    reference.through(llama, cache, ids[:, :60], [60])
    got = torch.cat([forward(ids[:, i : i + 1], **holding(cache)).logits for i in range(60, 70)], 1)
    torch.testing.assert_close(got, llama(ids).logits[:, 60:], **CLOSE)
    got = reference.through(llama, cache, ids, [70])  # uncompiled calls after compiled ones read how much is stored
    torch.testing.assert_close(got, llama(torch.cat((ids, ids), 1)).logits[:, 70:], **CLOSE)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regions", "whole"])
@torch.no_grad()
def test_a_later_turn_copies_no_keys(how):
    """Inductor writes into the very buffers, as long as nothing reads what they held once the store has run."""
    from torch._dynamo.utils import ReinplaceCounters

    model, ids = build("llama"), text(1, 69)
    want = model(ids).logits[:, 60:]
    cache = full_cache(model.config, 1, 128, "cpu")
    model(ids[:, :60], **holding(cache))
    torch._dynamo.reset()
    if how == "regions":
        sparsify.compile(model, progress=False)
    else:
        model.compile(backend="sparsify", options={"passes": ["kv_evict", "dense"], "min_length": 0})
    # no cached graph, which would count nothing; compiled C++ may serve again
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        ReinplaceCounters.clear()
        got = model(ids[:, 60:], **holding(cache)).logits
    torch.testing.assert_close(got, want, **CLOSE)
    assert ReinplaceCounters.get_total_missed() == 0
    torch._dynamo.reset()

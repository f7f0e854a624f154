"""SparseCache(dtype="fp8") and "int4": close to the 16-bit cache, in fewer bytes, however it is called, moved and saved."""

from __future__ import annotations

import pytest
import torch

import tests.support.cache_reference as reference
from sparsify import Pages, SparseCache
from sparsify.errors import ConfigError, UnsupportedError
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build

# largest difference of a tiny model's logits, which are some 0.3 large, and the least: codes are no numbers
NEAR = {"fp8": 0.05, "int4": 0.15}
CODES = sorted(NEAR)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("policy, options", [("full", {}), ("streaming_llm", {"sinks": 3, "window": 70})])
@torch.no_grad()
def test_logits_are_near_those_of_16_bits_with_padding(llama, codes, policy, options):
    ids, mask = text(2, 100), left_padded([100, 71])
    at, cuts = (mask.cumsum(-1) - 1).clamp(min=0), [80, 1, 1, 10, 1, 1, 6]
    found = []
    for dtype in (None, codes):
        cache = SparseCache(llama.config, policy, 128 if policy == "full" else None, dtype=dtype, **options)
        found.append(reference.through(llama, cache, ids, cuts, mask, at)[mask.bool()])
    assert 1e-4 < (found[0] - found[1]).abs().max() < NEAR[codes]
    assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)


@torch.no_grad()
def test_fewer_bits_are_fewer_bytes(llama):
    sizes = {}
    for dtype in (None, *CODES):
        cache = SparseCache(llama.config, "full", 4096, batch_size=1, device="cpu", dtype=dtype)
        sizes[dtype] = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert sizes["fp8"] * 4 == sizes[None] and sizes["int4"] * 8 == sizes[None]


@pytest.mark.parametrize("codes", CODES)
@torch.no_grad()
def test_everything_that_moves_a_cache_moves_its_codes(llama, codes, tmp_path):
    ids = text(3, 100)
    cache = SparseCache(llama.config, "full", 128, dtype=codes)
    reference.through(llama, cache, ids, [90, 1, 1, 1])
    cache.save(tmp_path / "cache", llama)
    loaded = SparseCache.load(tmp_path / "cache", llama)
    assert loaded.codes == codes
    twin, grown = cache.fork(), cache.fork()
    grown.reserve(500)
    step = lambda held, tokens: llama(tokens, **holding(held)).logits
    want = step(cache, text(3, 1, seed=3))
    for other in (loaded, twin, grown):
        assert torch.equal(step(other, text(3, 1, seed=3)), want)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    twin.batch_select_indices(torch.tensor([2, 0, 1]))
    again = text(3, 1, seed=4)
    want = step(loaded, again[[1, 2, 0]])[[2, 0, 1]]
    for held in (cache, twin):
        torch.testing.assert_close(step(held, again), want, rtol=1e-4, atol=2e-5)
    # back into the open group, and behind its beginning
    for tokens in (3, 40):
        for held in (cache, grown):
            held.crop(-tokens)
        longer = reference.through(llama, grown, ids[:, :5], [3, 1, 1])
        assert longer.isfinite().all()
        grown.crop(-5)
    shorter = SparseCache(llama.config, "full", 128, dtype=codes)
    reference.through(llama, shorter, ids, [int(grown.get_seq_length())])
    assert (step(grown, again) - step(shorter, again)).abs().max() < NEAR[codes]
    cache.reset()
    fresh = reference.through(llama, SparseCache(llama.config, "full", 128, dtype=codes), ids, [70, 1, 1])
    torch.testing.assert_close(reference.through(llama, cache, ids, [70, 1, 1]), fresh, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("codes", ["fp8", pytest.param("int4", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_code_gives_the_same_tokens(codes):
    ids, model = text(2, 70), build("llama")
    make = lambda: SparseCache(model.config, "full", 128, batch_size=2, device="cpu", dtype=codes)
    want = model.generate(ids, **holding(make()), max_new_tokens=5, do_sample=False)
    torch._dynamo.reset()
    try:
        model.compile(backend="sparsify", fullgraph=True, options={"lower": "eager", "strict": True})
        assert torch.equal(model.generate(ids, **holding(make()), max_new_tokens=5, do_sample=False), want)
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()


def test_what_is_not_served_is_told(llama):
    with pytest.raises(ConfigError, match="int4"):
        SparseCache(llama.config, "full", dtype="int3")
    for more in ({"read": Pages()}, {"read": "pages"}):
        with pytest.raises(UnsupportedError, match="few bits"):
            SparseCache(llama.config, "full", dtype="fp8", **more)

"""What transformers asks of a cache: the keyword it comes by, whether it can be cropped, and cropping in assisted decoding."""

from __future__ import annotations

import contextlib

import pytest
import torch

import tests.support.cache_reference as reference
from sparsify import SparseCache
from sparsify.errors import CacheError
from tests.support.cache_reference import left_padded, text
from tests.support.harness import compiled, holding, strict
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


KEYWORDS = ["past_key_values", "cache"] if "cache" in holding(None) else ["past_key_values"]


def in_two_calls(llama, keyword):
    cache, ids = SparseCache(llama.config, "snapkv", 12, window=4), text(1, 29)
    return torch.cat([llama(ids[:, :28], **{keyword: cache}).logits, llama(ids[:, 28:], **{keyword: cache}).logits], 1)


@pytest.mark.parametrize("keyword", KEYWORDS)
@torch.no_grad()
def test_every_keyword_of_the_release(llama, keyword):
    """transformers renamed `past_key_values`; the old name works as long as transformers takes it."""
    current = keyword in holding(None)
    make = lambda: SparseCache(llama.config, "snapkv", 12, window=4)
    want = reference.through(llama, make(), text(1, 29), [28, 1])
    with contextlib.nullcontext() if current else pytest.warns(FutureWarning, match="past_key_values"):
        torch.testing.assert_close(in_two_calls(llama, keyword), want)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = llama.generate(text(1, 28), **holding(make()), **options)
    with contextlib.nullcontext() if current else pytest.warns(FutureWarning, match="past_key_values"):
        got = llama.generate(text(1, 28), **{keyword: make()}, **options)
    assert torch.equal(got, tokens)
    with compiled(llama, strict()) as plans:
        torch.testing.assert_close(in_two_calls(llama, keyword), want)
    assert sum(d.method == "kv_evict" for plan in plans for d in plan.decisions) == 2


@torch.no_grad()
def test_crop_takes_back_exactly(llama):
    ids = text(1, 30)
    cache = SparseCache(llama.config, policy="snapkv", budget=40)
    reference.through(llama, cache, ids, [20, 5])
    cache.crop(-7)
    assert cache.get_seq_length() == 18
    torch.testing.assert_close(reference.through(llama, cache, ids[:, 18:], [4, 1, 7]), llama(ids).logits[:, 18:], **CLOSE)
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(reference.through(llama, cache, ids, [30]), llama(ids).logits, **CLOSE)


@pytest.mark.parametrize("how", ["assistant", "lookup"])
@torch.no_grad()
def test_assisted_decoding_takes_drafts_back(llama, how):
    """While all is kept tokens are cropped; where a cache evicts they are kept apart (test_drafts_evicted)."""
    ids = text(1, 20).repeat(1, 2)
    drafts = {"assistant_model": build("llama", layers=1, seed=3)} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    options = {"max_new_tokens": 8, "do_sample": False}
    want = llama.generate(ids, **options)
    for policy, budget in (("streaming_llm", 64), ("snapkv", 4096)):
        cache = SparseCache(llama.config, policy, budget)
        assert cache.is_croppable
        assert torch.equal(llama.generate(ids, **holding(cache), **drafts, **options), want)
        assert cache.is_croppable
    # transformers looks after the prompt; what is evicted later is noticed by the cache
    selecting = {"policy": "snapkv", "window": 4, "every": 4}
    with pytest.raises((CacheError, ValueError), match=r"evicted|cropped"):
        llama.generate(ids, **holding(SparseCache(llama.config, budget=12, **selecting)), **drafts, **options)
    with pytest.raises(CacheError, match="evicted"):
        llama.generate(ids, **holding(SparseCache(llama.config, budget=41, **selecting)), **drafts, **options)


@torch.no_grad()
def test_what_can_be_cropped(llama):
    cache = SparseCache(llama.config, budget=12)
    assert cache.is_croppable
    for tokens, croppable in ((8, True), (4, True), (1, False)):
        reference.through(llama, cache, text(1, tokens), [tokens])
        assert cache.is_croppable is croppable
    cache.reset()
    assert cache.is_croppable
    padded = SparseCache(llama.config, budget=12)
    reference.through(llama, padded, text(2, 6), [6], left_padded([6, 4]))
    assert not padded.is_croppable
    window = SparseCache((model := build("gemma3")).config, budget=64)  # with layers that keep 8 tokens
    reference.through(model, window, text(1, 8), [8])
    assert window.is_croppable
    reference.through(model, window, text(1, 1), [1])
    assert not window.is_croppable

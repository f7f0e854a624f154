"""What a SparseCache refuses, and what it does after a call that failed: a clear error, and nothing corrupted."""

from __future__ import annotations

import pytest
import torch

import tests.support.cache_reference as reference
from sparsify import SparseCache
from sparsify.errors import CacheError, ConfigError, UnsupportedError
from tests.support.cache_reference import left_padded, text
from tests.support.harness import holding
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def test_a_budget_below_sinks_and_window(llama):
    with pytest.raises(ConfigError, match=r"smaller than 4 sinks \+ window 10.*at least 14"):
        SparseCache(llama.config, budget=12, window=10)
    with pytest.raises(ConfigError, match="at least 33"):
        SparseCache(llama.config, policy="snapkv", budget=32)
    with pytest.raises(ConfigError, match="share"):
        SparseCache(llama.config, policy="snapkv", budget=1.5)
    with pytest.raises(ConfigError, match="did you mean 'snapkv'"):
        SparseCache(llama.config, policy="snapvk", budget=64)
    with pytest.raises(ConfigError, match=r"windw: no such option .did you mean 'window'"):
        SparseCache(llama.config, policy="snapkv", budget=64, windw=3)


def test_a_model_is_no_configuration(llama):
    with pytest.raises(ConfigError, match=r"not a LlamaForCausalLM.*SparseCache\(model.config, ...\)"):
        SparseCache(llama, "full")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 0}, "at least 1 token, not 0"),
        ({"budget": True}, "tokens or a share, not True"),
        ({"budget": "4k"}, "tokens or a share, not '4k'"),
        ({"budget": 64, "batch_size": 2}, "both or neither"),
        ({"budget": 64, "device": "cpu"}, "both or neither"),
        ({}, "neither a budget nor a window"),
        ({"policy": "snapkv"}, "no budget is given"),
        ({"policy": "snapkv", "budget": 64, "recent_share": 2}, r"recent_share.*less than or equal to 1"),
        ({"policy": "snapkv", "budget": 64, "window": "8"}, "window: Input should be a valid integer, not '8'"),
        ({"policy": "snapkv", "budget": 64, "window": 8.0}, "window: Input should be a valid integer, not 8.0"),
        ({"policy": "snapkv", "budget": 64, "kernel": True}, "kernel: Input should be a valid integer, not True"),
        ({"policy": "snapkv", "budget": 64, "recent_share": "0.5"}, "recent_share: Input should be a valid number"),
        ({"policy": "duo", "budget": 64, "streaming": [["0"], []]}, r"streaming.0.0: Input should be a valid integer"),
        ({"budget": 64, "positions": "relative"}, r"positions.*'absolute' or 'in_cache'"),
    ],
    ids=str,
)
def test_impossible_options(llama, options, words):
    with pytest.raises(ConfigError, match=words):
        SparseCache(llama.config, **options)


@torch.no_grad()
def test_another_dtype(llama):
    cache = SparseCache(llama.config, budget=16, batch_size=1, device="cpu", dtype=torch.float16)
    with pytest.raises(CacheError, match=r"float32 on cpu, the cache holds torch.float16"):
        llama(text(1, 4), **holding(cache))
    assert not cache.layers[0].keys.any() and cache.get_seq_length() == 0


def test_a_cache_from_inference_mode(llama):
    cache = SparseCache(llama.config, budget=16)
    with torch.inference_mode():
        llama(text(1, 10), **holding(cache))
    with torch.no_grad(), pytest.raises(CacheError, match="under inference_mode, or none"):
        llama(text(1, 1), **holding(cache))
    with torch.inference_mode():
        llama(text(1, 1), **holding(cache))
        assert cache.get_seq_length() == 11


@torch.no_grad()
def test_another_batch_size_or_model(llama):
    cache = SparseCache(llama.config, budget=16)
    reference.through(llama, cache, text(2, 10), [10])
    before = [t.clone() for t in cache.layers[0].state]
    with pytest.raises(CacheError, match="batch of 2"):
        llama(text(1, 1), **holding(cache))
    other = build("llama", max_position_embeddings=256)
    with pytest.raises(CacheError, match=r"SparseCache\(model.config"):
        other(text(2, 3), **holding(cache))
    SparseCache(other.config, budget=16)
    with pytest.raises(CacheError, match="another model"):
        other(text(2, 3), **holding(cache))
    assert all(torch.equal(a, b) for a, b in zip(before, cache.layers[0].state))
    reference.through(llama, cache, text(2, 3), [3])  # the cache still works


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_a_model_that_does_not_use_the_caches_attention_fails(llama, tokens):
    cache, other = SparseCache(llama.config, budget=16), build("llama")
    for mask in (None, torch.ones(2, tokens, dtype=torch.long)):
        with pytest.raises(CacheError, match=r"SparseCache\(model.config"):
            other(text(2, tokens), **holding(cache), attention_mask=mask)
        cache.reset()


@torch.no_grad()
def test_a_call_that_fails_halfway_is_noticed(llama, monkeypatch):
    ids = text(1, 24)
    want = reference.through(llama, SparseCache(llama.config, budget=16), ids, [20, 4])
    for cuts in ([], [10]):  # in the prompt, and in a later turn
        cache = SparseCache(llama.config, budget=16)
        if cuts:
            reference.through(llama, cache, ids, cuts)
        with monkeypatch.context() as patched:
            patched.setattr(cache.layers[1], "update", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llama(ids[:, sum(cuts) :][:, :6], **holding(cache))
        with pytest.raises(CacheError, match=r"failed halfway.*reset"):
            llama(ids[:, 16:20], **holding(cache))
        cache.reset()
        torch.testing.assert_close(reference.through(llama, cache, ids, [20, 4]), want)


@torch.no_grad()
def test_a_compiled_prompt_that_fails_leaves_nothing_behind(llama):
    """Compiled code changes buffers before it says that it has: a second try starts from nothing."""
    ids = text(1, 24)
    want = reference.through(llama, SparseCache(llama.config, budget=40), ids, [20, 4])
    cache = SparseCache(llama.config, budget=40)
    reference.through(llama, cache, text(1, 30, seed=1), [30])
    for layer in cache.layers:
        layer.started = False
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(reference.through(llama, cache, ids, [20, 4]), want)


@torch.no_grad()
def test_crop_past_what_is_kept(llama):
    cache = SparseCache(llama.config, budget=16)
    reference.through(llama, cache, text(1, 20), [20])
    before = [t.clone() for t in cache.layers[1].state]
    with pytest.raises(CacheError, match="evicted"):
        cache.crop(-1)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.layers[1].state))
    padded = SparseCache(llama.config, budget=32)
    reference.through(llama, padded, text(2, 20), [20], left_padded([20, 11]))
    with pytest.raises(CacheError, match="padded"):
        padded.crop(-1)
    with pytest.raises(CacheError, match="negative"):
        padded.crop(4)


@torch.no_grad()
def test_masks_that_do_not_fit(llama):
    cache = SparseCache(llama.config, budget=32)
    mask = left_padded([10, 6])
    with pytest.raises(CacheError, match="columns"):
        llama(text(2, 8), **holding(cache), attention_mask=mask)
    cache.reset()
    reference.through(llama, cache, text(2, 10), [10], mask)
    with pytest.raises(CacheError, match="columns"):
        llama(text(2, 1), **holding(cache), attention_mask=torch.ones(2, 1, dtype=torch.long))
    cache = SparseCache(llama.config, budget=32)
    reference.through(llama, cache, text(2, 10), [10])
    with pytest.raises(CacheError, match="hides"):
        llama(text(2, 3), **holding(cache), attention_mask=torch.cat((mask, torch.ones(2, 3, dtype=torch.long)), 1))
    cache = SparseCache(llama.config, budget=32)
    with pytest.raises(UnsupportedError, match="four dimensions"):
        llama(text(1, 4), **holding(cache), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_gradients_are_refused(llama):
    with pytest.raises(UnsupportedError, match="no_grad"):
        llama(text(1, 4), **holding(SparseCache(llama.config, budget=32)))


@pytest.mark.parametrize("family, reason", [("bloom", "AttentionInterface"), ("falcon_alibi", "."), ("deepseek_v3", "MLA")])
def test_models_that_cannot_be_served(family, reason):
    model = build(family, "eager" if family == "bloom" else "sdpa")
    with pytest.raises(UnsupportedError, match=reason):
        SparseCache(model.config, budget=32)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_length_dependent_rope_is_absolute_or_refused(kind):
    factors = (
        {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
        if kind == "longrope"
        else {"factor": 2.0}
    )
    rope = {"rope_type": kind, "rope_theta": 10000.0, **factors}
    model = build("llama", rope_parameters=rope, max_position_embeddings=24)
    with pytest.raises(UnsupportedError, match=kind):
        SparseCache(model.config, budget=16, positions="in_cache")
    ids = text(1, 20)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    cache = SparseCache(model.config, budget=40)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **holding(cache)), want)

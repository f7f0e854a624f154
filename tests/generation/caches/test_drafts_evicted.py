"""Assisted and prompt-lookup decoding over caches that evict: drafts are kept apart until they are verified."""

from __future__ import annotations

import pytest
import torch

import sparsify
import tests.support.cache_reference as reference
from sparsify import Pages, SparseCache
from sparsify.errors import CacheError
from sparsify.generation.caches import provisional
from tests.support.assisted import refused
from tests.support.cache_reference import text
from tests.support.harness import holding
from tests.support.tiny_models import build

NEW = 16
# policy, budget and options: budgets that a prompt of 40 tokens exceeds
CACHES = {
    "streaming_llm": (20, {"sinks": 3}),
    "streaming_llm in_cache": (20, {"sinks": 3, "positions": "in_cache"}),
    "snapkv": (20, {"window": 6, "recent_share": 0.3}),
    "h2o": (20, {}),
    "tova": (20, {}),
    "knorm": (20, {"recent": 5}),
    "keydiff": (20, {"recent": 5}),
    "expected_attention": (20, {"future": 16}),
    "pyramidkv": (20, {"beta": 2, "options": {"window": 6}}),
    "chunkkv": (20, {"chunk": 3, "options": {"window": 6}}),
    "snapkv by pages": (20, {"window": 6, "read": Pages(size=8, count=1, sinks=1, recent=2)}),
    "full by pages": (96, {"read": Pages(size=8, count=1, sinks=1, recent=2)}),
    "full": (96, {}),
}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def make(model, name):
    budget, options = CACHES[name]
    return SparseCache(model.config, name.split()[0], budget, **options)


def run(model, cache, ids, **drafts):
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **drafts}
    return model.generate(ids, **given, **holding(cache))


def lookup():
    return {"prompt_lookup_num_tokens": 5}


def assistant():
    """Another model, most of whose drafts are wrong."""
    return {"assistant_model": build("llama", layers=1, seed=3), "num_assistant_tokens": 4}


class Crops:
    """How many tokens each crop took back, of how many that the cache had been given."""

    def __init__(self, monkeypatch):
        self.found, crop = [], SparseCache.crop

        def spy(cache, tokens):
            self.found.append((-tokens, cache.get_seq_length()))
            return crop(cache, tokens)

        monkeypatch.setattr(SparseCache, "crop", spy)


@pytest.fixture
def crops(monkeypatch):
    return Crops(monkeypatch).found


def state(cache):
    """What a cache holds by layer: tokens with their keys and values, in order of position."""
    found = []
    for layer in cache.layers:
        order = layer.positions.argsort(-1)
        nothing = layer.positions < 0
        clean = lambda t, nothing=nothing: t.masked_fill(nothing[..., None], 0)
        held = lambda t, order=order, clean=clean: clean(t).gather(2, order[..., None].expand(-1, -1, -1, t.shape[-1]))
        found.append((layer.positions.gather(2, order), held(layer.keys), held(layer.values), layer.counts, layer.seen, layer.length))
    return found


def same_state(got, want, slots=True):
    for one, other in zip(state(got), state(want), strict=True):
        for have, need in zip(one, other, strict=True):
            torch.testing.assert_close(have, need, rtol=1e-4, atol=2e-5)
    if slots:  # what is overwritten next
        for one, other in zip(got.layers, want.layers, strict=True):
            assert torch.equal(one.positions, other.positions)


@pytest.mark.samples(8)
@pytest.mark.parametrize("drafts", [lookup, assistant], ids=["lookup", "assistant"])
@pytest.mark.parametrize("name", CACHES)
def test_tokens_and_caches_are_those_without_drafts(llama, crops, name, drafts):
    """For every policy that claims it: what the first call keeps of its drafts is part of the prompt, and all else is as without drafts."""
    ids = text(1, 10).repeat(1, 4)
    cache = make(llama, name)
    got = run(llama, cache, ids, **drafts())
    assert len(crops) > 1 and sum(removed for removed, _ in crops) > 0, "something was drafted, and some of it was wrong"
    removed, stored = crops[0]
    read = stored - removed
    assert 40 <= read < 46 and cache.get_seq_length() == 40 + NEW - 1
    plain = make(llama, name)
    with torch.no_grad():
        reference.through(llama, plain, got[:, :read], [read])
    want = run(llama, plain, got[:, : read + 1], max_new_tokens=40 + NEW - read - 1)
    assert torch.equal(got, want)
    same_state(cache, plain)


@pytest.mark.samples(1)
@pytest.mark.parametrize("family", ["gemma3", "mistral_window"])
def test_windows_of_the_model(family, crops):
    model = build(family)
    ids = text(1, 6).repeat(1, 5)
    make = lambda: SparseCache(model.config, "full", 64)
    assert torch.equal(run(model, make(), ids, **lookup()), run(model, make(), ids))
    assert sum(removed for removed, _ in crops) > 0


@pytest.mark.samples(4)
@pytest.mark.parametrize("drafts", [lookup, assistant], ids=["lookup", "assistant"])
@pytest.mark.parametrize("name", CACHES)
def test_a_prompt_whose_length_was_said_is_what_it_is_without_drafts(llama, crops, name, drafts):
    ids = text(1, 10).repeat(1, 4)
    cache, plain = make(llama, name), make(llama, name)
    cache.activate_past_recording(prompt_len=40)
    got = run(llama, cache, ids, **drafts())
    assert crops[0][1] > 40 and sum(removed for removed, _ in crops) > 0, "the first call had drafts, and some were wrong"
    assert torch.equal(got, run(llama, plain, ids))
    same_state(cache, plain)


@torch.no_grad()
def test_a_turn_whose_length_was_said(llama):
    """Behind what the cache holds, with padding: the turn is stored at once as without drafts, and drafts token after token."""
    ids, mask = text(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    mask[1, 35] = 0
    for turn in (1, 20):
        caches = [SparseCache(llama.config, "snapkv", 12, window=4, recent_share=0.5) for _ in range(2)]
        for cache in caches:
            reference.through(llama, cache, ids[:, :30], [30], mask[:, :30])
        caches[0].activate_past_recording(prompt_len=30 + turn)
        got = go_on(llama, caches[0], ids, [turn + 5], mask)
        caches[0].crop(-2)
        want = go_on(llama, caches[1], ids, [turn, 1, 1, 1], mask)
        real = mask[:, 30 : 33 + turn].bool()
        torch.testing.assert_close(got[:, :-2][real], want[real], rtol=1e-4, atol=2e-5)
        same_state(*caches)


@torch.no_grad()
def test_a_share_is_one_of_the_prompt(llama, crops):
    ids = text(1, 10).repeat(1, 4)
    cache, plain = (SparseCache(llama.config, "knorm", 0.25, recent=3) for _ in range(2))
    cache.activate_past_recording(prompt_len=40)
    assert torch.equal(run(llama, cache, ids, **lookup()), run(llama, plain, ids))
    assert crops[0][1] > 40 and cache.layers[0].layout.capacity == plain.layers[0].layout.capacity == 10
    same_state(cache, plain)


@torch.no_grad()
def test_lengths_that_cannot_be_are_no_lengths(llama):
    """Of another text, or of more drafts than are kept apart."""
    ids = text(1, 40 + provisional.MOST)
    for said in (0, 500, 30):
        cache, plain = (SparseCache(llama.config, "knorm", 12, recent=4) for _ in range(2))
        cache.activate_past_recording(prompt_len=said)
        reference.through(llama, cache, ids, [ids.shape[1]])
        assert all(layer.held is not None and layer.before_drafts is None for layer in cache.layers), "stored when it was cropped"
        cache.crop(-70)
        reference.through(llama, plain, ids, [ids.shape[1] - 70])
        same_state(cache, plain)
    cache.reset()
    cache.activate_past_recording(prompt_len=20)
    cache.reset()
    assert all(layer.before_drafts is None for layer in cache.layers)


def go_on(model, cache, ids, cuts, mask=None):
    """Logits of what follows the tokens that the cache holds."""
    found, at = [], cache.get_seq_length()
    for cut in cuts:
        seen = None if mask is None else mask[:, : at + cut]
        found.append(model(ids[:, at : at + cut], **holding(cache), attention_mask=seen).logits)
        at += cut
    return torch.cat(found, 1)


@torch.no_grad()
def test_what_a_call_replaced_comes_back(llama):
    """By hand: one to all tokens of a call taken back, of rows with padding too, also where a ring goes round within the call."""
    ids, mask = text(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    mask[1, 45] = 0
    for count in (1, 4, 24):
        for gone in (0, 1, count):
            caches = [SparseCache(llama.config, "snapkv", 12, window=4, recent_share=0.5) for _ in range(2)]
            for cache in caches:
                reference.through(llama, cache, ids[:, :30], [30], mask[:, :30])
            for layer in caches[0].layers:
                layer.activate_past_recording()
            got = go_on(llama, caches[0], ids, [count], mask)
            caches[0].crop(-gone)
            rest = count - gone
            if rest:
                want = go_on(llama, caches[1], ids, [1] * rest, mask)
                real = mask[:, 30 : 30 + rest].bool()
                torch.testing.assert_close(got[:, :rest][real], want[real], rtol=1e-4, atol=2e-5)
            same_state(*caches)
            with pytest.raises(CacheError, match=r"evicted|padded"):
                caches[0].crop(-1)


@torch.no_grad()
def test_recording_ends(llama):
    """With a call of many tokens, and with what is asked of the cache meanwhile."""
    ids = text(1, 200)
    cache, plain = (SparseCache(llama.config, "snapkv", 12, window=4) for _ in range(2))
    reference.through(llama, plain, ids[:, :30], [30])
    cache.activate_past_recording()
    reference.through(llama, cache, ids[:, :30], [30])
    assert all(layer.held is not None for layer in cache.layers) and cache.get_seq_length() == 30
    twin = cache.fork()
    twin.reorder_cache(torch.tensor([0]))
    same_state(twin, plain)
    cache.crop(0)
    same_state(cache, plain)
    count = provisional.MOST + 1
    for one in (cache, plain):
        go_on(llama, one, ids, [count])
    assert not any(layer.record_past for layer in cache.layers)
    same_state(cache, plain)


@torch.no_grad()
def test_a_prompt_that_was_not_cropped_stays(llama):
    ids = text(1, 40)
    cache, plain = (SparseCache(llama.config, "knorm", 12, recent=4) for _ in range(2))
    cache.activate_past_recording()
    for one in (cache, plain):
        got = reference.through(llama, one, ids, [30, 1, 1])
    torch.testing.assert_close(got, reference.through(llama, SparseCache(llama.config, "knorm", 12, recent=4), ids, [30, 1, 1]))
    cache.crop(0)
    same_state(cache, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "snapkv", "every": 4, "window": 4},
        {"policy": "adakv", "every": 4, "options": {"window": 4}},
        {"policy": "duo", "every": 4, "streaming": [[0], [1]], "sinks": 1, "window": 4, "options": {"window": 4}},
        {"policy": "snapkv", "dtype": "fp8", "window": 4},
    ],
    ids=str,
)
def test_what_cannot_be_taken_back_is_refused(llama, options, caplog):
    ids = text(1, 10).repeat(1, 4)
    with refused(caplog, "codes, in groups" if "dtype" in options else "selects anew"):
        run(llama, SparseCache(llama.config, budget=16, **options), ids, **lookup())


@pytest.mark.slow
def test_a_compiled_model(llama):
    model = build("llama")
    torch._dynamo.reset()
    sparsify.compile(model, strict=True, lower="eager", min_length=0, progress=False, compile_ahead=False)
    ids = text(1, 10).repeat(1, 4)
    cache, plain = make(model, "snapkv"), make(llama, "snapkv")
    got = run(model, cache, ids, **lookup())
    assert torch.equal(got, run(llama, plain, ids)), "generate() says how long the prompt is"
    same_state(cache, plain)
    assert not any(layer.record_past for layer in cache.layers), "later calls are compiled again"

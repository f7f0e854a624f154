"""Keys and values in the host's memory: the same numbers as on the device, of which two places are enough for all layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import sparsify
import tests.support.cache_reference as reference
from sparsify import Pages, SparseCache
from sparsify.backends.cache import quantised_reference
from sparsify.errors import UnsupportedError
from sparsify.generation import generate
from sparsify.generation.caches import offloading
from sparsify.generation.decoding.runner import Recorded
from tests.support.cache_reference import left_padded, text
from tests.support.harness import compiled, holding, strict
from tests.support.op_recorder import OpRecorder
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
CUTS = [30, 1, 1, 7, 1, 1, 1, 12, 1]
CACHES = {
    "full": ("full", 128, {}),
    "full that grows": ("full", None, {}),
    "full by pages": ("full", 128, {"read": Pages(size=8, count=1, sinks=1, recent=2)}),
    "snapkv": ("snapkv", 14, {"window": 6}),
    "streaming_llm": ("streaming_llm", 14, {"sinks": 3}),
    "a share": ("knorm", 0.4, {"recent": 3}),
    "h2o, selecting": ("h2o", 14, {"every": 4}),
    "pyramidkv": ("pyramidkv", 16, {"beta": 2, "options": {"window": 6}}),
}


@pytest.fixture(scope="module")
def llama():
    return build("llama", layers=3)


def make(model, name, **more):
    policy, budget, options = CACHES[name]
    return SparseCache(model.config, policy, budget, **options, **more)


def spoil(cache):
    """What lies in the two places between calls counts for nothing."""
    for place in cache.offloader.places:
        for tensor in place.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0x7F)
    cache.offloader.resident = [None, None]


@torch.no_grad()
def go_on(model, cache, ids, mask=None, cuts=CUTS, between=lambda cache: None):
    """Logits of texts that go on behind what the cache holds."""
    found, at = [], cache.get_seq_length()
    for cut in cuts:
        seen = None if mask is None else mask[:, : at + cut]
        more = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, at : at + cut]}
        found.append(model(ids[:, at : at + cut], **holding(cache), attention_mask=seen, **more).logits)
        at += cut
        between(cache)
    return torch.cat(found, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_logits_are_those_of_a_cache_on_the_device(llama, name, padded):
    ids, mask = text(2, 60), None
    if padded:
        mask = left_padded([60, 41])
        mask[0, 38] = 0
    want = go_on(llama, make(llama, name), ids, mask)
    cache = make(llama, name, offloading=True)
    for _ in range(2):
        cache.reset()
        got = go_on(llama, cache, ids, mask, between=spoil)
        real = slice(None) if mask is None else mask[:, : got.shape[1]].bool()
        torch.testing.assert_close(got[real], want[real], **CLOSE)


# groups of 64 slots become codes one token after the other, within several at once, behind a selection, and in a ring that goes round
LONG = [58, *[1] * 8, 40, *[1] * 4, 3, *[1] * 70]
IN_CODES = {
    "full": ("full", 256, {}),
    "full that grows": ("full", 70, {}),
    "full by pages": ("full", 256, {"read": Pages(size=8, count=1, sinks=1, recent=2)}),
    "a ring": ("streaming_llm", None, {"sinks": 3, "window": 67}),
    "a ring by pages": ("streaming_llm", None, {"sinks": 3, "window": 67, "read": Pages(size=16, count=1, sinks=1, recent=2)}),
    "snapkv": ("snapkv", 100, {"window": 6}),
    "a share": ("knorm", 0.9, {"recent": 3}),
    "h2o, selecting": ("h2o", 70, {"every": 50}),
    "pyramidkv": ("pyramidkv", 90, {"beta": 2, "options": {"window": 6}}),
}


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", IN_CODES)
@pytest.mark.samples(3)
def test_codes_are_those_of_a_cache_on_the_device(name, padded, codes):
    model, ids, mask = build("llama", layers=3), text(2, sum(LONG)), None
    if padded:
        mask = left_padded([sum(LONG), sum(LONG) - 19])
        mask[0, [38, 60, 64, 125]] = 0
    policy, budget, options = IN_CODES[name]
    plain, cache = (SparseCache(model.config, policy, budget, dtype=codes, **options, offloading=kept) for kept in (False, True))
    want = go_on(model, plain, ids, mask, LONG)
    for _ in range(2):
        cache.reset()
        got = go_on(model, cache, ids, mask, LONG, between=spoil)
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(got[real], want[real], **CLOSE)
    for one, other in zip(cache.layers, plain.layers, strict=True):
        held = other.positions >= 0
        assert (one.counts > 64).all() and torch.equal(one.positions, other.positions) and torch.equal(one.staged, other.staged)
        for name in ("keys", "values"):
            assert one.at_rest(name).dtype == torch.uint8
            lies = quantised_reference.lies_as_it_came(other, torch.arange(held.shape[2]).expand_as(held))
            assert torch.equal(one.at_rest(name)[held & ~lies], getattr(other, name)[held & ~lies])


def test_layers_with_windows_of_the_model_stay(llama):
    model, ids = build("gemma3", layers=4), text(1, 60)
    cache = SparseCache(model.config, "full", 128, offloading=True)
    got = go_on(model, cache, ids, between=spoil)
    torch.testing.assert_close(got, go_on(model, SparseCache(model.config, "full", 128), ids), **CLOSE)
    assert [layer.offloader is None for layer in cache.layers] == [layer.is_sliding for layer in cache.layers]
    assert {layer.is_sliding for layer in cache.layers} == {True, False}


def test_two_layers_of_memory(llama):
    model = build("llama", layers=8)
    cache, plain = (SparseCache(model.config, "full", 512, offloading=kept) for kept in (True, False))
    for one in (cache, plain):
        go_on(model, one, text(1, 300), cuts=[280, 1, 1])
    layer = plain.layers[0]
    keys = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    small = plain.kept_bytes() - 8 * keys
    assert small < keys, "what stays on the device is little"
    assert cache.kept_bytes() == 2 * keys + small and cache.host_bytes() == 8 * keys
    assert len({layer.keys.data_ptr() for layer in cache.layers}) == 2


def copies(cache, monkeypatch):
    """Where what is copied goes to, and how many slots."""
    order, original, places = [], offloading._copy, {}
    for place in cache.offloader.places:
        places |= {tensor.data_ptr(): "device" for tensor in place.values()}

    def spy(to, source, first, end):
        order.append((places.get(to.data_ptr(), "host"), end - first))
        original(to, source, first, end)

    monkeypatch.setattr(offloading, "_copy", spy)
    return order


@pytest.mark.parametrize("codes", ["fp8", "int4"])
def test_a_token_moves_codes_back_when_its_group_is_full(codes, monkeypatch):
    model = build("llama", layers=2)
    cache = SparseCache(model.config, "full", 128, dtype=codes, offloading=True)
    go_on(model, cache, text(1, 60), cuts=[60])
    order = copies(cache, monkeypatch)
    back = []
    for _ in range(8):
        order.clear()
        go_on(model, cache, text(1, 80), cuts=[1])
        back.append([count for to, count in order if to == "host"])
    # of two layers keys and values; the group is closed by the token behind it
    assert back == [[], [], [], [], [64] * 4, [], [], []]


def test_a_token_moves_what_is_filled_there_and_one_slot_back(monkeypatch):
    """Each layer's filled slots come once, while the layer before computes, and no more than new tokens go back."""
    model = build("llama", layers=4)
    cache = SparseCache(model.config, "full", 128, offloading=True)
    go_on(model, cache, text(1, 60), cuts=[30])
    order = copies(cache, monkeypatch)
    for _ in range(2):
        order.clear()
        filled = cache.get_seq_length()
        go_on(model, cache, text(1, 60), cuts=[1])
    # keys and values of the layers after this one, the first one again after the last, each before what this one has written
    assert order[:4] == [("device", filled)] * 2 + [("host", 1)] * 2
    assert order == (order[:4] * 3) + [("device", filled + 1)] * 2 + [("host", 1)] * 2


@torch.no_grad()
@pytest.mark.parametrize("codes", [None, "fp8", "int4"])
@pytest.mark.parametrize("name", ["full", "snapkv"])
@pytest.mark.samples(3)
def test_what_moves_between_calls(llama, name, codes, tmp_path):
    longer = 40 if codes else 0
    ids, more = text(3, 60 + longer), text(3, 80 + longer, seed=1)

    def filled(**how):
        cache = make(llama, name, dtype=codes, **how)
        go_on(llama, cache, ids, cuts=[30 + longer, 1, 1])
        if how:
            spoil(cache)
        return cache

    def both(change, rows=(0, 1, 2)):
        found = []
        for how in ({}, {"offloading": True}):
            cache = filled(**how)
            cache = change(cache) or cache
            assert (cache.offloader is not None) == bool(how)
            found.append(go_on(llama, cache, more[list(rows)], cuts=[1, 5, 1]))
        torch.testing.assert_close(found[1], found[0], **CLOSE)

    both(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))
    both(lambda cache: cache.batch_select_indices(torch.tensor([1])), rows=(1,))
    both(lambda cache: cache.batch_repeat_interleave(2), rows=(0, 0, 1, 1, 2, 2))
    both(lambda cache: cache.reset())
    both(lambda cache: cache.fork())
    both(lambda cache: pickle.loads(pickle.dumps(cache)).attach(llama.config))
    both(lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers] and None)
    if name == "full":
        both(lambda cache: cache.crop(-5))

    def through_a_file(cache):
        cache.save(tmp_path / "prompt.safetensors", llama)
        return SparseCache.load(tmp_path / "prompt.safetensors", llama)

    both(through_a_file)
    cache = filled(offloading=True)
    twin = copy.deepcopy(cache)
    went = go_on(llama, cache, more, cuts=[1, 5])
    spoil(cache)
    torch.testing.assert_close(go_on(llama, twin, more, cuts=[1, 5]), went, **CLOSE)


def test_turns_that_select(llama):
    found = []
    for how in ({}, {"offloading": True}):
        cache = SparseCache(llama.config, "snapkv", 14, window=6, every=40, **how)
        logits = [go_on(llama, cache, text(1, 90), cuts=[30, 1, 1])]
        cache.end_turn()
        found.append(torch.cat([*logits, go_on(llama, cache, text(1, 90), cuts=[20, 1, 1, 1])], 1))
    torch.testing.assert_close(*found, **CLOSE)


def test_drafts_of_assisted_decoding(llama):
    ids = text(1, 10).repeat(1, 4)
    options = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    found = [llama.generate(ids, **options, **holding(make(llama, "snapkv", offloading=kept))) for kept in (False, True)]
    assert torch.equal(*found)


def test_generate_decodes_without_a_graph(monkeypatch, caplog):
    model = build("llama", layers=3)
    assert generate.install(model, shown=False) == ""
    recorder = OpRecorder()
    monkeypatch.setattr(generate._decoders[model], "runner", lambda function, failed: Recorded(function, recorder, failed))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with caplog.at_level("INFO"):
        got = model.generate(text(1, 30), **options, **holding(make(model, "full", offloading=True)))
    assert recorder.warmed == 0 and "host's memory" in caplog.text
    assert torch.equal(got, model.generate(text(1, 30), **options, **holding(make(model, "full"))))
    assert recorder.warmed >= 1, "as another cache does"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full that grows", "snapkv", "h2o, selecting"])
def test_regions(llama, name):
    """Layer by layer compiled code leaves the moving to Python between the layers."""
    model = build("llama", layers=3)
    torch._dynamo.reset()
    sparsify.compile(model, **strict(), progress=False, compile_ahead=False)
    cache = make(model, name, offloading=True)
    with sparsify.api.collect_plans() as plans:
        got = go_on(model, cache, text(2, 60), between=spoil)
    assert sum(decision.method == "kv_evict" for plan in plans for decision in plan.decisions) > 0
    want = go_on(llama, make(llama, name), text(2, 60))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    cache.reset()
    torch.testing.assert_close(go_on(model, cache, text(2, 60), between=spoil), want, rtol=1e-4, atol=2e-5)


def test_what_is_refused(llama):
    refused = {
        "packs slots": {"policy": "adakv", "budget": 16, "every": 4, "options": {"window": 4}},
        "drafted token": {"policy": "full", "draft": "pages"},
    }
    for match, how in refused.items():
        with pytest.raises(UnsupportedError, match=match):
            SparseCache(llama.config, **how, offloading=True)
    model = build("llama", layers=3)
    cache = SparseCache(model.config, "full", 64, batch_size=1, device="cpu", offloading=True)
    with compiled(model, strict()), torch.no_grad(), pytest.raises(Exception, match=r"offloading|graph break|Graph break|disable"):
        model(text(1, 30), **holding(cache))
    with torch.no_grad():
        cache.reset()
        torch.testing.assert_close(reference.through(model, cache, text(1, 30), [30]), model(text(1, 30)).logits, rtol=1e-4, atol=2e-5)

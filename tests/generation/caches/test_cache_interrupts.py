"""Whatever stops halfway, in a call or between calls: the cache is as before, or as afterwards, or says so at its next use."""

from __future__ import annotations

import pytest
import torch

import sparsify
from sparsify import Clusters, Pages, SparseCache
from sparsify.errors import CacheError
from sparsify.generation import generate
from sparsify.generation.caches import layer as cache_layer
from sparsify.generation.caches.offloading import Offloader
from sparsify.generation.decoding.drafts import Drafts
from tests.support.cache_reference import text, through
from tests.support.cases import every
from tests.support.harness import holding
from tests.support.stopping import Cancels, Stopped, Stopping
from tests.support.tiny_models import build

IDS = text(2, 120)
MORE = [1, 3, 1, 6]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
WAYS = {
    "full": {"policy": "full"},
    "selects": {"policy": "snapkv", "budget": 16, "window": 4, "every": 5, "read": Clusters(size=8, share=1.0, sinks=0, recent=1)},
    "offloaded": {"policy": "full", "dtype": "int4", "offloading": True},
    "ring": {"policy": "h2o", "budget": 16, "dtype": "fp8"},
    "packed": {"policy": "adakv", "budget": 16, "every": 6, "options": {"window": 4}},
    "pages": {"policy": "streaming_llm", "budget": 16, "read": Pages(size=8, share=1.0)},
}
DONE = {
    "one token": lambda model, cache: through(model, cache, IDS[:, 21:], [1]),
    "several": lambda model, cache: through(model, cache, IDS[:, 21:], [12]),
    "crop": lambda model, cache: cache.crop(-2),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "end_turn": lambda model, cache: cache.end_turn(),
    "prepare": lambda model, cache: cache.prepare(),
    "reserve": lambda model, cache: cache.reserve(3000),
    "reset": lambda model, cache: cache.reset(),
}


def cases():
    for way, options in WAYS.items():
        for done in DONE:
            serves = {"crop": options["policy"] == "full", "reserve": options["policy"] == "full", "end_turn": "every" in options}
            if serves.get(done, done != "prepare" or way == "selects"):
                yield way, done


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("way, done", every(7, cases()))
@torch.no_grad()
def test_what_stops_anywhere_leaves_no_half(llama, way, done):
    options, change = WAYS[way], DONE[done]
    make = lambda: SparseCache(llama.config, **{"budget": None, **options})
    first = make()
    through(llama, first, IDS, [12, 7, 1, 1])
    after, counted = first.fork(), first.fork()
    change(llama, after)
    with Stopping() as calls:
        change(llama, counted)
    goes_on = lambda cache: through(llama, cache, IDS[:, int(cache.get_seq_length()) :], MORE)
    wanted = [goes_on(cache) for cache in (first.fork(), after)]
    noticed: list[SparseCache] = []
    for place in (1 + calls.calls * part // 5 for part in range(5)):
        cache = first.fork()
        with pytest.raises(Stopped), Stopping(place):
            change(llama, cache)
        try:
            got = goes_on(cache)
        except CacheError as error:
            assert "failed halfway" in str(error)
            noticed.append(cache)
        else:
            assert any(torch.allclose(got, want, **CLOSE) for want in wanted), f"place {place} of {calls.calls}"
    assert noticed, "the test stops nothing"
    noticed[0].reset()
    torch.testing.assert_close(through(llama, noticed[0], IDS, [12, 7]), through(llama, make(), IDS, [12, 7]), **CLOSE)


@torch.no_grad()
def test_memory_that_runs_out_while_buffers_grow(llama, monkeypatch):
    cache, longer, made = SparseCache(llama.config, "full", 64), cache_layer._longer, []

    def fails(*arguments):
        made.append(arguments)
        if len(made) == 2:  # keys have grown, values have not
            raise torch.OutOfMemoryError("none is left")
        return longer(*arguments)

    through(llama, cache, IDS[:1], [60])
    monkeypatch.setattr(cache_layer, "_longer", fails)
    with pytest.raises(torch.OutOfMemoryError):
        through(llama, cache, IDS[:1, 60:], [10])
    with pytest.raises(CacheError, match="failed halfway"):
        through(llama, cache, IDS[:1, 60:], [10])
    with pytest.raises(CacheError, match="failed halfway"):
        cache.get_seq_length()
    cache.reset()
    got = through(llama, cache, IDS[:1], [60, 10])
    torch.testing.assert_close(got, through(llama, SparseCache(llama.config, "full", 80), IDS[:1], [60, 10]), **CLOSE)


@torch.no_grad()
def test_memory_that_runs_out_before_a_cache_is_there(llama, monkeypatch):
    """A share is one of the call that is stored, and what the host's memory had no room for goes there later."""
    cache, zeros = SparseCache(llama.config, "knorm", 0.5, recent=2), torch.Tensor.new_full
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_full", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            through(llama, cache, IDS, [80])
    assert torch.Tensor.new_full is zeros
    through(llama, cache, IDS, [20])
    assert cache.layers[0].keys.shape[2] == 10
    cache = SparseCache(llama.config, "full", 64, offloading=True)
    with monkeypatch.context() as patched:
        patched.setattr(Offloader, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            through(llama, cache, IDS, [20])
    got = through(llama, cache, IDS, [20, 1])
    torch.testing.assert_close(got, through(llama, SparseCache(llama.config, "full", 64), IDS, [20, 1]), **CLOSE)
    assert cache.host_bytes() > 0


def test_a_change_that_is_refused_leaves_the_cache_as_it_was(llama):
    cache = SparseCache(llama.config, "full", 64)
    with torch.no_grad():
        through(llama, cache, IDS, [20])
        with pytest.raises(CacheError, match="negative number"):
            cache.crop(3)
        with pytest.raises(CacheError, match="21 tokens are to be removed"):
            cache.crop(-21)
        cache.crop(-2)
        assert cache.get_seq_length() == 18


def test_tokens_kept_apart_stay_where_nobody_asks_for_them_any_more():
    """Compiled layers know nothing of a prompt that waits to be stored."""
    runs = []
    for compiled in (False, True):
        model = build("llama")
        if compiled:
            sparsify.compile(model, strict=True, lower="eager")
        cache = SparseCache(model.config, "snapkv", 16, window=4)
        with torch.no_grad():
            cache.activate_past_recording()
            through(model, cache, IDS, [40])
            assert cache.layers[0].held is not None
            for layer in cache.layers:
                layer.record_past = False
            assert cache.layers[0].held is None and int(cache.layers[0].counts.max()) == 16
            runs.append(through(model, cache, IDS[:, 40:], [1, 3]))
    torch.testing.assert_close(*runs, **CLOSE)


@pytest.mark.parametrize("drafts", [False, True])
@torch.no_grad()
def test_a_cancelled_generation_leaves_what_it_has_told(drafts):
    """With graphs that run no Python, and of drafts those that a streamer was not given."""
    model = build("llama")
    assert generate.install(model, shown=False) == ""
    more = {"draft": Pages(size=8, share=1.0), "draft_tokens": 5} if drafts else {}
    whole = SparseCache(model.config, "full", 128, **more)
    want = model.generate(IDS[:1, :40], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0, **holding(whole))
    for tokens in (3, 8):
        cache = SparseCache(model.config, "full", 128, **more)
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                IDS[:1, :40],
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=Cancels(tokens),
                **holding(cache),
            )
        stored = cache.get_seq_length()
        assert stored <= 40 + tokens and cache.layers[0].used in (None, stored)
        assert torch.equal(model(want[:, stored : stored + 1], **holding(cache)).logits.argmax(-1), want[:, stored + 1 : stored + 2])


@torch.no_grad()
def test_a_draft_that_stops_is_noticed(monkeypatch):
    model = build("llama")
    assert generate.install(model, shown=False) == ""
    cache = SparseCache(model.config, "full", 128, draft=Pages(size=8, count=1, sinks=1, recent=4), draft_tokens=4)
    monkeypatch.setattr(Drafts, "_verify", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(IDS[:1, :40], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0, **holding(cache))
    with pytest.raises(CacheError, match="failed halfway"):
        model(IDS[:1, 40:41], **holding(cache))

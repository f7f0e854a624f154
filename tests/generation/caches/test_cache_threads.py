"""Requests that share a model and a process: each with a SparseCache of its own, or none; and calls that stop in the middle."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest
import torch

import tests.support.cache_reference as reference
from sparsify import SparseCache
from sparsify.errors import CacheError
from sparsify.generation.caches.layer import SparseLayer
from tests.support.cache_reference import text
from tests.support.tiny_models import build

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def sparse(model, ids, cuts, policy="snapkv"):
    return reference.through(model, SparseCache(model.config, policy, 64), ids, cuts)


def in_threads(*works):
    """Results of functions that run at the same time; what one raises is raised."""
    results, errors = [None] * len(works), []

    def run(i):
        try:
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results


# --- other calls between a layer's update and its attention ---


def between(monkeypatch, act, layer=1, tokens=1):
    """Calls `act` once, after some layer's update for a call of so many tokens and before the attention that follows."""
    update, pending = SparseLayer.update, [act]

    def updated(self, keys, *args, **kwargs):
        result = update(self, keys, *args, **kwargs)
        if pending and self.index == layer and keys.shape[2] == tokens:
            pending.pop()()
        return result

    monkeypatch.setattr(SparseLayer, "update", updated)
    return pending


@pytest.mark.parametrize("where", ["another thread", "a hook"])
@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_other_requests_between_update_and_attention(llama, monkeypatch, where, tokens):
    ids, other = text(1, 42), text(1, 42, seed=1)
    cuts = [40, 1, 1]
    SparseCache(llama.config, budget=8)  # the model's attention is sparsify's from here on
    want, beside = sparse(llama, ids, cuts), (sparse(llama, other, [41, 1]), llama(other).logits)
    got = []

    def others():
        work = (lambda: got.append(sparse(llama, other, [41, 1])), lambda: got.append(llama(other).logits))
        for act in work:
            with torch.no_grad():
                in_threads(torch.no_grad()(act)) if where == "another thread" else act()

    pending = between(monkeypatch, others, tokens=tokens)
    torch.testing.assert_close(sparse(llama, ids, cuts), want, rtol=0, atol=0)
    assert not pending
    for a, b in zip(got, beside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@torch.no_grad()
def test_layers_that_run_in_threads_of_their_own(llama, monkeypatch):
    ids = text(1, 30)
    want = sparse(llama, ids, [20, 1, 9])
    ran = []
    for layer in llama.model.layers:
        forward = layer.forward

        def elsewhere(*args, forward=forward, **kwargs):
            ran.append(1)
            return in_threads(torch.no_grad()(lambda: forward(*args, **kwargs)))[0]

        monkeypatch.setattr(layer, "forward", elsewhere)
    torch.testing.assert_close(sparse(llama, ids, [20, 1, 9]), want, rtol=0, atol=0)
    assert len(ran) == 6


@pytest.mark.torch_in_threads
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_requests_in_threads_give_what_they_give_alone(compiled):
    """Requests over one model at once, a plain one among them, while threads switch as often as they can."""
    ids, cuts = [text(1, 12, seed=i) for i in range(3)], [9, 1, 1, 1]
    model = build("llama", layers=1 if compiled else 2)
    SparseCache(model.config, budget=8)
    kinds = [lambda row: sparse(model, row, cuts), lambda row: model(row).logits, lambda row: sparse(model, row, cuts, "streaming_llm")]
    works = [lambda kind=kind, row=row: [kind(row) for _ in range(2)] for kind, row in zip(kinds, ids, strict=True)]
    want = [work() for work in works]
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="eager", dynamic=False)
        for kind, row in zip(kinds, ids, strict=True):
            kind(row)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        found = in_threads(*map(torch.no_grad(), works))
    finally:
        sys.setswitchinterval(before)
        if compiled:
            torch._dynamo.reset()
    for a, b in zip(found, want, strict=True):
        for one, alone in zip(a, b, strict=True):
            torch.testing.assert_close(one, alone, **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_that_breaks_between_update_and_attention(llama, monkeypatch):
    ids, model = text(1, 12), build("llama", layers=1)
    want = sparse(model, ids, [9, 1, 1, 1])
    update, broken = SparseLayer.update, []

    def updated(self, *args, **kwargs):
        result = update(self, *args, **kwargs)
        torch._dynamo.graph_break()
        broken.append(torch.compiler.is_dynamo_compiling())
        return result

    monkeypatch.setattr(SparseLayer, "update", updated)
    torch._dynamo.reset()
    model.compile(backend="eager")
    torch.testing.assert_close(sparse(model, ids, [9, 1, 1, 1]), want, **CLOSE)
    assert len(broken) == 4
    torch._dynamo.reset()


@torch.no_grad()
def test_another_thread_that_compiles_changes_nothing(llama, monkeypatch):
    """torch 2.14 tells the whole process that it is compiling."""
    cache, ids = SparseCache(llama.config, budget=32), text(1, 9)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    reference.through(llama, cache, ids, [8])
    assert type(cache.get_seq_length()) is int
    cache.layers[1].length += 1
    with pytest.raises(CacheError, match="failed halfway"):
        reference.through(llama, cache, ids[:, 8:], [1], None, torch.tensor([[8]]))


# --- what belongs to no call any more ---


@torch.no_grad()
def test_nothing_is_left_of_a_call_that_stopped_between_update_and_attention(llama, monkeypatch):
    ids = text(1, 24)
    plain, want = llama(ids).logits, sparse(llama, ids, [20, 4])
    cache = SparseCache(llama.config, "snapkv", 64)

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        between(patched, stop, tokens=20)
        with pytest.raises(KeyboardInterrupt):
            reference.through(llama, cache, ids, [20])
    assert torch.equal(llama(ids).logits, plain)
    assert torch.equal(sparse(llama, ids, [20, 4]), want)
    with pytest.raises(CacheError, match=r"failed halfway.*reset"):
        reference.through(llama, cache, ids, [20])
    cache.reset()
    assert torch.equal(reference.through(llama, cache, ids, [20, 4]), want)
    held = weakref.ref(cache)
    del cache
    gc.collect()
    assert held() is None


@torch.no_grad()
def test_attention_that_comes_twice_or_never(llama, monkeypatch):
    from sparsify.generation.caches import attention as cache_attention

    ids, call = text(1, 12), cache_attention.attention_forward
    cache = SparseCache(llama.config, budget=32)

    def twice(base, *args, **kwargs):
        call(base, *args, **kwargs)
        return call(base, *args, **kwargs)

    attention = llama.model.layers[0].self_attn
    interface = sys.modules[type(attention).__module__].ALL_ATTENTION_FUNCTIONS
    name = llama.config._attn_implementation
    with monkeypatch.context() as patched:
        patched.setitem(interface, name, lambda *args, **kwargs: twice("sdpa", *args, **kwargs))
        with pytest.raises(CacheError, match="attended to twice"):
            reference.through(llama, cache, ids, [12])
    cache.reset()
    with monkeypatch.context() as patched:  # attention over a copy of the keys is attention without the cache
        other = lambda module, query, key, *args, **kwargs: call("sdpa", module, query, key.clone(), *args, **kwargs)
        patched.setitem(interface, name, other)
        with pytest.raises(CacheError, match=r"layer 0: the model's attention did not take the keys.*AttentionInterface"):
            reference.through(llama, cache, ids, [12])
    cache.reset()
    torch.testing.assert_close(reference.through(llama, cache, ids, [8, 4]), llama(ids).logits, **CLOSE)


# --- calls that stop between two layers ---


@pytest.mark.parametrize(
    "how, stopped, after",
    [("module", 1, 1), ("module", 1, 3), ("module", 3, 1), ("inside attention", 1, 1), ("inside attention", 3, 1), ("regions", 1, 1)],
)
@torch.no_grad()
@pytest.mark.samples(2)
def test_a_call_that_stops_between_layers_is_noticed_at_the_next(how, stopped, after, monkeypatch):
    """Of one token as of several. regions: every layer is compiled by itself."""
    model, ids = build("llama"), text(1, 20)
    if how == "regions":
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend="eager")
    cache = SparseCache(model.config, sinks=2, window=40)
    reference.through(model, cache, ids, [10, 1, 1])

    def stop(*unused, **options):
        raise MemoryError

    if how == "inside attention":
        from sparsify.ops import cache as cache_ops

        op, last = "decode" if stopped == 1 else "attention", cache.layers[1].keys
        run = getattr(cache_ops, op)
        with monkeypatch.context() as patched:
            patched.setattr(cache_ops, op, lambda *a, **k: stop() if any(tensor is last for tensor in a) else run(*a, **k))
            with pytest.raises(MemoryError):
                reference.through(model, cache, ids[:, 12:], [stopped])
    else:
        hook = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(MemoryError):
            reference.through(model, cache, ids[:, 12:], [stopped])
        hook.remove()
    with pytest.raises(CacheError, match="failed halfway"):
        reference.through(model, cache, ids[:, 12:], [after])
    with pytest.raises(CacheError, match="failed halfway"):
        cache.crop(-1)
    cache.reset()
    want = reference.run(model, ids, reference.streaming(torch.ones_like(ids), 2, 40))
    torch.testing.assert_close(reference.through(model, cache, ids, [10, 1, 9]), want, **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("ask", ["length", "one token", "crop"])
@torch.no_grad()
def test_a_compiled_call_that_stops_halfway_is_noticed_outside_of_compiled_code(llama, ask):
    """A graph that fails changes no Python state: the layers' lengths tell."""
    ids, cache = text(1, 20), SparseCache(llama.config, budget=32)
    reference.through(llama, cache, ids, [10])
    layer = cache.layers[0]  # what a graph does that stops after its first layer
    layer.length += 1
    layer.seen += 1
    acts = {
        "length": cache.get_seq_length,
        "one token": lambda: reference.through(llama, cache, ids[:, 10:], [1], None, torch.tensor([[10]])),
        "crop": lambda: cache.crop(-1),
    }
    with pytest.raises(CacheError, match="failed halfway"):
        acts[ask]()


@torch.no_grad()
def test_a_call_that_is_refused_before_anything_is_stored_leaves_the_cache_as_it_was(llama):
    ids, cache = text(1, 20), SparseCache(llama.config, budget=32)
    reference.through(llama, cache, ids, [10])
    with torch.enable_grad(), pytest.raises(Exception, match="no_grad"):
        reference.through.__wrapped__(llama, cache, ids[:, 10:], [1])
    torch.testing.assert_close(reference.through(llama, cache, ids[:, 10:], [1, 9]), llama(ids).logits[:, 10:], **CLOSE)

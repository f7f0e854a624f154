"""Tokens of small models on a CPU, as one graph for all layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparsify
from sparsify import SparseCache, api
from sparsify.costs import device as hardware
from sparsify.generation.caches.filled import filled
from sparsify.generation.regions import layers, tokens
from sparsify.planning import registry
from sparsify.planning.config import config
from sparsify.rewriting import one_token
from tests.generation.regions.test_regions import CLOSE, GREEDY, cuts, prompt
from tests.support.harness import holding, strict
from tests.support.tiny_models import build

DENSE = strict(passes=["dense", "kv_evict"])
INDUCTOR = config.load({}, method_models=registry.discover())


@pytest.fixture(autouse=True)
def fresh(monkeypatch, fresh_dynamo):
    """Tests leave Inductor out, for which alone such graphs are made."""
    monkeypatch.setattr(tokens, "pays", lambda found, settings: True)


def captures(plans) -> list[tuple[str, int]]:
    return [(plan.capture, len(plan.rewritten)) for plan in plans]


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "sparse": lambda config: SparseCache(config, sinks=2, window=30),
    "full": lambda config: SparseCache(config, "full", 32),
}


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
@pytest.mark.samples(2)
def test_tokens_between_turns(kind):
    """A prompt, tokens, a second turn and tokens again; other lengths over another cache compile nothing."""
    model, make = build("llama", layers=3), CACHES[kind]
    ids = prompt(1, 60)["input_ids"]
    one, two = (30, 1, 1, 20, 1, 1, 6), (23, *[1] * 12, 24, 1)
    want = [cuts(model, make(model.config), ids, *lengths) for lengths in (one, two)]
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(cuts(model, make(model.config), ids, *one), want[0], **CLOSE)
        made = captures(plans)
        torch.testing.assert_close(cuts(model, make(model.config), ids, *two), want[1], **CLOSE)
    assert captures(plans) == made
    assert [found for found in made if found[0] == tokens.CAPTURE] == [(tokens.CAPTURE, 3)]
    assert len(made) == 3


@pytest.mark.parametrize("padding", [5, 0])
@torch.no_grad()
@pytest.mark.samples(1)
def test_generate_gives_the_tokens_that_it_gives_uncompiled(padding):
    model = build("llama", layers=3)
    inputs = prompt(2, 25, padding=padding)
    want = model.generate(**inputs, **GREEDY)
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **GREEDY), want)
    assert [found for found in captures(plans) if found[0] == tokens.CAPTURE] == [(tokens.CAPTURE, 3)]


@pytest.fixture
def written(monkeypatch):
    """How many steps each graph has as torch's own operations."""
    counts, write_out = [], one_token.write_out
    monkeypatch.setattr(one_token, "write_out", lambda *args: counts.append(write_out(*args)))
    return counts


COUNTS = ("counts", "seen", "length")


@torch.no_grad()
def test_a_full_cache_on_a_cpu_needs_no_op(written):
    """Its tokens are torch's own operations in one graph, through growing, cropping and a new text, with the state of uncompiled calls."""
    model = build("llama", layers=3)
    ids = prompt(1, 90)["input_ids"]
    caches = [SparseCache(model.config, "full", 32) for _ in range(2)]
    want, got = [], []

    def text(found, cache):
        found.append(cuts(model, cache, ids, 60, *[1] * 7, 20, 1, 1, 1))  # larger than it was made
        cache.crop(-9)
        found.append(cuts(model, cache, ids[:, :3], 1, 1, 1))
        cache.reset()
        found.append(cuts(model, cache, ids[:, :25], 20, 1, 1, 1, 1, 1))

    text(want, caches[0])
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        text(got, caches[1])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert [found for found in captures(plans) if found[0] == tokens.CAPTURE] == [(tokens.CAPTURE, 3)] and written == [3]
    for one, other in zip(caches[1].layers, caches[0].layers, strict=True):
        assert torch.equal(one.positions[..., :25], other.positions[..., :25])
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in COUNTS)
    assert filled(caches[1]) == filled(caches[0]) == 25


@torch.no_grad()
def test_a_second_generate_of_another_length_compiles_nothing(written):
    model = build("llama", layers=3)
    texts = [prompt(1, length) for length in (25, 31, 40)]
    want = [model.generate(**one, **GREEDY) for one in texts]
    sparsify.compile(model, **DENSE)
    for one, tokens_ in zip(texts, want, strict=True):
        assert torch.equal(model.generate(**one, **GREEDY), tokens_)
    assert written == [3]


@torch.no_grad()
def test_rows_that_hold_different_numbers_of_tokens_keep_the_op(written):
    model = build("llama", layers=3)
    inputs = prompt(2, 25, padding=5)
    want = model.generate(**inputs, **GREEDY)
    sparsify.compile(model, **DENSE)
    assert torch.equal(model.generate(**inputs, **GREEDY), want) and written == []


@torch.no_grad()
def test_when_a_cache_is_filled_to_one_number():
    model = build("llama", layers=2)
    ids = prompt(1, 30)["input_ids"]
    full, hole, one, ring = (SparseCache(model.config, *how) for how in (("full", 64), ("full", 64), ("full", 64), ("snapkv", 64)))
    for cache in (full, hole, ring):
        assert filled(cache) is None  # nothing in it
        cuts(model, cache, ids, 30)
    cuts(model, one, ids[:, :1], 1)
    hole.layers[1].positions[0, 1, 7] = -1
    assert [filled(cache) for cache in (full, hole, one, ring)] == [30, None, None, None]
    assert full.call.looked == 30 and hole.call.looked == 0
    brim = SparseCache(model.config, "full", 64, batch_size=1, device="cpu", dtype=torch.float32)
    cuts(model, brim, prompt(1, brim.layers[0].keys.shape[2])["input_ids"], brim.layers[0].keys.shape[2])
    assert filled(brim) is None  # no room


@pytest.mark.slow
@torch.no_grad()
def test_windows_that_fill_up():
    """Sliding layers count their tokens in Python, and hold as many keys as before from some token on."""
    model = build("gemma3", layers=4)
    ids = prompt(1, 30)["input_ids"]
    lengths = (5, *[1] * 25)
    want = cuts(model, DynamicCache(config=model.config), ids, *lengths)
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        got = cuts(model, DynamicCache(config=model.config), ids, *lengths)
    torch.testing.assert_close(got, want, **CLOSE)
    assert 1 <= sum(plan.capture == tokens.CAPTURE for plan in plans) <= 4


def hooked(model, seen):
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(1))


def shown(model, seen):
    model.config.output_hidden_states = True
    seen.append(1)


def static(model, seen):
    seen.append(1)


@pytest.mark.parametrize("change", [hooked, shown, static])
@torch.no_grad()
def test_calls_that_layers_serve_one_by_one(change):
    model, seen = build("llama", layers=3), []
    ids = prompt(1, 22)["input_ids"]
    make = (lambda: StaticCache(config=model.config, max_cache_len=40)) if change is static else (lambda: DynamicCache(config=model.config))
    want = cuts(model, make(), ids, 20, 1, 1)
    sparsify.compile(model, **DENSE)
    change(model, seen)
    with api.collect_plans() as plans:
        torch.testing.assert_close(cuts(model, make(), ids, 20, 1, 1), want, **CLOSE)
    assert seen and plans and not any(plan.capture == tokens.CAPTURE for plan in plans)


def steps(model, ids):
    return cuts(model, DynamicCache(config=model.config), ids, 20, 1, 1)


def scaled(module, args, result):
    held = result if isinstance(result, torch.Tensor) else result["logits" if "logits" in result else "last_hidden_state"]
    held *= torch.linspace(0.5, 2, held.shape[-1])


@torch.no_grad()
def test_hooks_beside_the_layers_are_called_whenever_they_came():
    """And not any more when they are gone, though torch's guards ask for none that is registered later; a new module's, too."""
    model = build("llama", layers=3)
    ids = prompt(1, 22)["input_ids"]
    plain = steps(model, ids)

    def results():
        for name in ("model.embed_tokens", "model.norm", "lm_head", "model", ""):
            handle = model.get_submodule(name).register_forward_hook(scaled)
            yield steps(model, ids)
            handle.remove()
            yield steps(model, ids)
        kept, model.lm_head = model.lm_head, torch.nn.Linear(64, 128, bias=False)
        model.lm_head.weight = kept.weight
        handle = model.lm_head.register_forward_hook(scaled)
        yield steps(model, ids)
        handle.remove()
        model.lm_head = kept

    want = [*results()]
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(steps(model, ids), plain, **CLOSE)
        for one, other in zip(results(), want, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    assert not any(torch.allclose(one, plain, **CLOSE) for one in want[::2]) and all(torch.equal(one, plain) for one in want[1::2])
    assert [plan.capture for plan in plans].count(tokens.CAPTURE) == 1 and model._compiled_call_impl.reason == ""


@pytest.mark.slow
@torch.no_grad()
def test_more_forms_of_a_token_than_torch_keeps(caplog):
    model = build("llama", layers=2)
    ids = prompt(1, 22)["input_ids"]
    sparsify.compile(model, **DENSE)
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level("INFO", logger="sparsify"):
        for scaling in (1.0, 2.0, 3.0, 4.0):
            model.model.rotary_emb.attention_scaling = scaling
            found = steps(model, ids)
            torch.testing.assert_close(found, cuts_eager(model, ids), **CLOSE)
    assert [one.message for one in caplog.records].count("tokens are not one graph") == 1


def cuts_eager(model, ids):
    other = build("llama", layers=2)
    other.model.rotary_emb.attention_scaling = model.model.rotary_emb.attention_scaling
    return steps(other, ids)


def test_gradients_and_prompts_are_not_tokens():
    model = build("llama", layers=2)
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        with torch.no_grad():
            model(**prompt(1, 1))  # no cache
            cache = DynamicCache(config=model.config)
            model(**prompt(1, 1), **holding(cache))  # nothing in it
            cuts(model, cache, prompt(1, 3)["input_ids"], 3)
        model(**prompt(1, 1), **holding(cache))
    assert {plan.capture for plan in plans} == {"one region for 2 layers"}


def _broken(*args):
    torch._dynamo.graph_break()
    return tokens_run(*args)


tokens_run = tokens._run


@torch.no_grad()
def test_a_token_that_is_no_graph_goes_through_regions(monkeypatch):
    monkeypatch.setattr(tokens, "_run", _broken)
    model = build("llama", layers=3)
    ids = prompt(1, 24)["input_ids"]
    want = cuts(model, DynamicCache(config=model.config), ids, 20, 1, 1, 1, 1)
    sparsify.compile(model, **DENSE)
    with api.collect_plans() as plans:
        torch.testing.assert_close(cuts(model, DynamicCache(config=model.config), ids, 20, 1, 1, 1, 1), want, **CLOSE)
    assert {plan.capture for plan in plans} == {"one region for 3 layers"}


def test_where_it_pays(monkeypatch):
    monkeypatch.undo()
    found = layers.find_layers(build("llama", layers=3))
    assert tokens.pays(found, INDUCTOR)
    assert not tokens.pays(
        found, INDUCTOR.model_copy(update={"lower": "eager"})
    )  # nothing is gained where each operation is called by itself
    assert not tokens.pays(found * tokens.MOST_LAYERS, INDUCTOR)
    slow = dataclasses.replace(hardware.describe(torch.device("cpu")), bandwidth=1e6)
    monkeypatch.setattr(hardware, "describe", lambda device: slow)
    assert not tokens.pays(found, INDUCTOR)  # reading the weights takes longer than calling the layers


@pytest.mark.slow
@torch.no_grad()
def test_by_inductor(monkeypatch):
    monkeypatch.undo()
    model = build("llama", layers=4)
    inputs = prompt(1, 40)
    how = GREEDY | {"max_new_tokens": 20}
    want = model.generate(**inputs, **how)
    sparsify.compile(model, strict=True)
    with api.collect_plans() as plans:
        assert torch.equal(model.generate(**inputs, **how), want)
    assert [found for found in captures(plans) if found[0] == tokens.CAPTURE] == [(tokens.CAPTURE, 4)]

"""skip_layers: generated tokens leave out whole layers, which equals a model whose layers hide those tokens and hand them on."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparsify
from sparsify import SparseCache, api
from sparsify.errors import CacheError, UnsupportedError
from sparsify.generation.generate import Decoder
from sparsify.generation.regions import bypass, layers, regional
from sparsify.generation.regions.bypass import bypassed
from sparsify.passes.skip_layers import SkipLayers
from sparsify.planning.config.config import load
from sparsify.planning.plan import Plan
from sparsify.planning.registry import discover
from tests.support import bypassing
from tests.support.harness import holding, strict
from tests.support.op_recorder import NoReads
from tests.support.stopping import Cancels
from tests.support.tiny_models import VOCAB, build, spread_weights

LAYERS, PROMPT, NEW = 5, 20, 7
SKIP = {"first": 1, "last": 2, "most": 1.0, "warmup": 1, "length": 4}
HOW = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def plain():
    model = build("llama", layers=LAYERS)
    spread_weights(model)
    return model


def skipping(plain, options=SKIP, passes=("dense",), **more):
    model = copy.deepcopy(plain)
    sparsify.compile(model, **strict(passes=["skip_layers", *passes], skip_layers=options, **more))
    return model


def text(batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}


def schedule(start: int, count: int, options=SKIP) -> dict[int, range]:
    """By column, for tokens generated from column `start` on."""
    method = SkipLayers(**options)
    return {start + age: method.bypassed(age, LAYERS) for age in range(count)}


def longer(whole, ids):
    ones = torch.ones_like(ids[:, : ids.shape[1] - whole["input_ids"].shape[1]])
    mask = {"attention_mask": torch.cat((whole["attention_mask"], ones), 1)} if "attention_mask" in whole else {}
    return {"input_ids": ids, **mask}


def expected(plain, prompt, count=NEW, gone=None):
    """The tokens that greedy decoding gives, one pass of the whole text for each."""
    start, ids = prompt["input_ids"].shape[1], prompt["input_ids"]
    gone = {**(gone or {}), **schedule(start, count)}
    for _ in range(count):
        whole = longer(prompt, ids)
        found = bypassing.logits(plain, whole, {c: layers for c, layers in gone.items() if c < ids.shape[1]})
        ids = torch.cat((ids, found[:, -1:].argmax(-1)), 1)
    return ids, gone


@pytest.mark.parametrize(
    "age, most, layers", [(0, 1.0, []), (1, 1.0, []), (2, 1.0, [1]), (3, 1.0, [1]), (4, 1.0, [1, 2]), (99, 1.0, [1, 2]), (99, 0.3, [1])]
)
def test_the_schedule(age, most, layers):
    assert [*SkipLayers(**{**SKIP, "most": most}).bypassed(age, LAYERS)] == layers


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, pytest.param(7, marks=pytest.mark.slow)])
def test_generate_equals_a_model_whose_tokens_bypass_the_layers(plain, padding):
    prompt = text(2, PROMPT, padding)
    want, gone = expected(plain, prompt)
    assert not torch.equal(plain.generate(**prompt, **HOW), want)
    model = skipping(plain)
    cache = SparseCache(model.config, "full")
    with api.collect_plans() as plans:
        found = model.generate(**prompt, **HOW, **holding(cache), return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.sequences, want)
    whole = bypassing.logits(plain, longer(prompt, want), gone)
    torch.testing.assert_close(torch.stack(found.logits, 1), whole[:, PROMPT - 1 : -1], rtol=1e-4, atol=5e-5)
    (decision,) = [d for plan in plans for d in plan.decisions if d.kind == "token"]
    assert (decision.method, decision.sizes["bypassed"], decision.sizes["layers"]) == ("skip_layers", "2", "5")
    assert decision.seconds is not None and 0 < decision.seconds < decision.dense_seconds
    by_layer = [sum(layer in gone[c] for c in range(PROMPT, PROMPT + NEW - 1)) for layer in range(LAYERS)]
    assert [layer.left_out for layer in cache.layers] == by_layer and by_layer[1] > by_layer[2] > 0 == by_layer[3]
    assert [int(layer.length) for layer in cache.layers] == [PROMPT + NEW - 1 - one for one in by_layer]


@torch.no_grad()
@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_a_second_turn_sees_what_each_layer_holds(plain, padding):
    prompt = text(2, PROMPT, padding)
    first, gone = expected(plain, prompt)
    del gone[PROMPT + NEW - 1]  # the last token is read with the second prompt, by every layer
    turn = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(5))
    second = longer(prompt, torch.cat((first, turn), 1))
    want, _ = expected(plain, second, gone=gone)
    model = skipping(plain)
    cache = SparseCache(model.config, "full")
    assert torch.equal(model.generate(**prompt, **HOW, **holding(cache)), first)
    with pytest.raises(CacheError, match="was not given" if not padding else "padded"):
        cache.crop(-1)
    assert torch.equal(model.generate(**second, **HOW, **holding(cache)), want)


@torch.no_grad()
def test_tokens_of_a_cancelled_generation_cannot_be_cropped(plain):
    """Which layers hold the last ones is known of none, as after a generation that ended by itself."""
    model = skipping(plain)
    cache = SparseCache(model.config, "full")
    with pytest.raises(KeyboardInterrupt):
        model.generate(**text(1, PROMPT), **HOW, **holding(cache), streamer=Cancels(NEW))
    assert cache.layers[1].left_out > 0
    with pytest.raises(CacheError, match="was not given"):
        cache.crop(-1)


class Fixed(NoReads):
    """As a CUDA graph: it holds the layers that ran when it was recorded, and reads nothing."""

    keeps = True

    def __call__(self) -> None:
        self.layers = getattr(self, "layers", bypassed())
        assert bypassed() == self.layers
        super().__call__()


@pytest.mark.slow
@torch.no_grad()
def test_each_set_of_layers_has_a_graph_of_its_own(plain, monkeypatch):
    """They are kept for the next call."""
    runners, check = [], SparseCache.check_consistent
    monkeypatch.setattr(SparseCache, "check_consistent", lambda cache, read: check(cache, False))  # as on a GPU

    def runner(self, function, failed):
        runners.append(Fixed(function))
        return runners[-1]

    monkeypatch.setattr(Decoder, "runner", runner)
    prompt = text(1, PROMPT)
    how = {**HOW, "max_new_tokens": 12}
    want = expected(plain, prompt, 12)[0]
    model = skipping(plain, kernels="reference")  # what a CPU may be asked a device may not
    for _ in range(2):
        assert torch.equal(model.generate(**prompt, **how), want)
    assert [[*one.layers] for one in runners] == [[], [1], [1, 2]]
    assert [one.calls for one in runners] == [4, 4, 14]


@pytest.mark.slow
@torch.no_grad()
def test_keeping_all_is_dense_bit_by_bit(plain):
    prompt = text(2, PROMPT)
    model = copy.deepcopy(plain)
    sparsify.compile(model, **strict(passes=["dense"]))
    how, cache = {**HOW, "return_dict_in_generate": True, "output_logits": True}, SparseCache(model.config, "full")
    want = model.generate(**prompt, **how)
    found = skipping(plain, SkipLayers(**SKIP).keep_all().options()).generate(**prompt, **how, **holding(cache))
    assert torch.equal(torch.stack(found.logits), torch.stack(want.logits))
    assert not any(layer.left_out for layer in cache.layers)


@pytest.mark.slow
@torch.no_grad()
def test_calls_outside_of_generate_run_every_layer(plain):
    prompt = text(1, PROMPT)["input_ids"]
    model = skipping(plain)
    cache = SparseCache(model.config, "full")
    found = [model(prompt[:, at], **holding(cache)).logits for at in (slice(0, 14), slice(14, 15), slice(15, 20))]
    torch.testing.assert_close(torch.cat(found, 1), plain(prompt).logits, rtol=1e-4, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("read", [1, pytest.param(PROMPT - 1, marks=pytest.mark.slow)])
def test_a_prompt_whose_last_token_is_a_step_runs_every_layer(plain, read):
    """A prompt of one token, and one that the cache holds but for its last token: nothing of it was generated, even without warm-up."""
    options = {**SKIP, "warmup": 0, "length": 0}
    prompt = text(2, PROMPT if read > 1 else 1)
    start = prompt["input_ids"].shape[1]
    gone, ids = schedule(start, 4, options), prompt["input_ids"]
    for _ in range(4):
        found = bypassing.logits(plain, {"input_ids": ids}, {c: layers for c, layers in gone.items() if c < ids.shape[1]})
        ids = torch.cat((ids, found[:, -1:].argmax(-1)), 1)
    model = skipping(plain, options)
    cache = SparseCache(model.config, "full")
    if read > 1:
        reader = copy.deepcopy(plain)
        sparsify.compile(reader, **strict(passes=["dense"]))
        reader(prompt["input_ids"][:, :read], **holding(cache))
    assert torch.equal(model.generate(**prompt, **{**HOW, "max_new_tokens": 4}, **holding(cache)), ids)
    assert [layer.left_out for layer in cache.layers] == [0, 3, 3, 0, 0]


@torch.no_grad()
def test_room_counts_what_layers_were_not_given(plain):
    """A CUDA graph asks the policy when so many tokens came: never, where that lies behind."""
    model = skipping(plain, passes=("dense", "kv_evict"))
    cache = SparseCache(plain.config, "h2o", budget=16, every=8)
    prompt = text(1, PROMPT)
    ids = model.generate(**prompt, **{**HOW, "max_new_tokens": 14}, **holding(cache))
    assert max(layer.left_out for layer in cache.layers) > 8
    assert cache.get_seq_length() == ids.shape[1] - 1
    free = min(layer.keys.shape[2] - layer.fullest() for layer in cache.layers)
    assert cache.room() == cache.get_seq_length() + free


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_whose_layers_have_budgets_of_their_own(plain):
    """The model is captured whole over it: no layer is bypassed, and none counts as such."""
    prompt, make = text(1, 120), lambda: SparseCache(plain.config, "pyramidkv", budget=80)
    with pytest.raises(UnsupportedError, match="budgets of their own"):
        skipping(plain, passes=("dense", "kv_evict")).generate(**prompt, **HOW, **holding(make()))
    model, cache = copy.deepcopy(plain), make()
    sparsify.compile(model, passes=["skip_layers", "dense", "kv_evict"], skip_layers=SKIP, lower="eager")
    model.generate(**text(1, PROMPT), **HOW)
    model.generate(**prompt, **HOW, **holding(cache))
    assert not any(layer.left_out for layer in cache.layers)


@pytest.mark.slow
@torch.no_grad()
def test_layers_that_are_not_called_one_by_one(plain):
    """Hooks on all modules come after the model was compiled."""
    model, cache = copy.deepcopy(plain), SparseCache(plain.config, "full")
    sparsify.compile(model, passes=["skip_layers", "dense"], skip_layers=SKIP, lower="eager")
    model.generate(**text(1, PROMPT), **HOW)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        found = model.generate(**text(1, PROMPT), **HOW, **holding(cache))
    finally:
        handle.remove()
    assert torch.equal(found, plain.generate(**text(1, PROMPT), **HOW))
    assert not any(layer.left_out for layer in cache.layers)


def test_what_one_call_shows_says_nothing_of_another_threads(plain):
    """What speaks against bypassing layers is of the very prompt, whatever runs in the same model meanwhile."""
    skips = bypass.Bypass(plain, layers.find_layers(plain), load({}, method_models=discover()), SkipLayers(**SKIP))
    hidden, known = torch.zeros(1, PROMPT, plain.config.hidden_size), {"position_ids": torch.zeros(1, PROMPT)}
    strange = {**known, "distances": torch.zeros(1, PROMPT)}
    cache = SparseCache(plain.config, "full")

    def elsewhere(given, result):
        def run():
            skips.look(hidden, given)
            skips.look_at_result(hidden, result)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    for given, result, serves in ((known, hidden, True), (strange, hidden, False), (known, (hidden, hidden), False)):
        with bypass.watching() as seen:
            skips.look(hidden, given)
            skips.look_at_result(hidden, result)
        elsewhere(strange if serves else known, (hidden, hidden) if serves else hidden)
        assert (skips.schedule(cache, seen) is not None) == serves
    # a recorded step shows nothing: tokens are given the same every time
    skips.look(hidden[:, :1], known)
    with bypass.watching() as seen:
        pass
    elsewhere(strange, (hidden, hidden))
    assert skips.schedule(cache, seen) is not None


def test_a_prompt_that_is_divided_is_refused(plain):
    found = layers.find_layers(plain)
    skips = bypass.Bypass(plain, found, load({"strict": True}, method_models=discover()), SkipLayers(**SKIP), divided=True)
    with pytest.raises(UnsupportedError, match="divided among processes"):
        skips.look(torch.zeros(1, PROMPT, plain.config.hidden_size), {})


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) for kind in ("static", "prompt lookup", "window", "own loop", "policy")]
    + ["beams", "dynamic", "few layers", "whole"],
)
def test_what_is_refused(plain, kind):
    options, given = dict(SKIP), dict(HOW)
    model = plain
    if kind == "window":
        model = build("mistral", layers=LAYERS, sliding_window=8)
    if kind == "few layers":
        options |= {"first": 4}
    reason = {
        "dynamic": "a DynamicCache",
        "policy": "turns queries back",
        "static": "a StaticCache",
        "prompt lookup": "assisted generation",
        "beams": "beam search",
        "own loop": "custom_generate is given",
        "window": "sliding",
        "few layers": "none of 5 layers lies between",
        "whole": "one graph, which runs all of them",
    }[kind]
    compiled = copy.deepcopy(model)
    if kind == "whole":
        compiled.compile(backend="sparsify", options=strict(passes=["skip_layers", "dense"], skip_layers=options))
        with pytest.raises(Exception, match=reason):
            compiled(**text(1, PROMPT))
        return
    if kind == "dynamic":
        given |= holding(DynamicCache(config=compiled.config))
    if kind == "static":
        given |= holding(StaticCache(config=compiled.config, max_cache_len=64))
    if kind == "policy":
        given |= holding(SparseCache(compiled.config, "expected_attention", 64))
    if kind == "prompt lookup":
        given |= {"prompt_lookup_num_tokens": 2}
    if kind == "beams":
        given |= {"num_beams": 2}
    if kind == "own loop":
        given |= {"custom_generate": lambda model, input_ids, **rest: input_ids}
    prompt = text(1, PROMPT)
    sparsify.compile(compiled, **strict(passes=["skip_layers", "dense"], skip_layers=options))
    with pytest.raises(UnsupportedError, match=reason):
        compiled.generate(**prompt, **given)
    sparsify.compile(compiled, **{**strict(passes=["skip_layers", "dense"], skip_layers=options), "strict": False})
    alone = {name: given[name] for name in ("num_beams", "custom_generate") if name in given}
    with api.collect_plans() as plans:
        assert torch.equal(compiled.generate(**prompt, **given), model.generate(**prompt, **HOW, **alone))
    refusals = [refusal for plan in plans for d in plan.decisions if d.kind == "token" for refusal in d.refusals]
    assert any(reason in refusal for refusal in refusals)


@torch.no_grad()
def test_a_plan_file_says_it_too(plain, tmp_path):
    prompt = text(1, PROMPT)
    with api.collect_plans() as plans:
        skipping(plain)(**prompt, use_cache=False)
    (said,) = [plan for plan in plans if plan.decisions[0].kind == "token"]
    assert "layers 1 to 2 bypassed" in str(said) and "2 bypassed" in str(said)
    plan = dataclasses.replace(plans[0], decisions=[d for plan in plans for d in plan.decisions])
    plan.save(tmp_path / "plan.json")
    assert [d.options for d in Plan.load(tmp_path / "plan.json").decisions if d.kind == "token"] == [SkipLayers(**SKIP).options()]
    model = copy.deepcopy(plain)
    sparsify.compile(model, plan=str(tmp_path / "plan.json"), lower="eager", strict=True)
    assert regional.bypass_of(model) is not None
    assert torch.equal(model.generate(**prompt, **HOW), expected(plain, prompt)[0])

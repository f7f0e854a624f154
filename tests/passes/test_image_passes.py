"""fastv and divprune: image tokens that are left out equal a mask that hides them in the layers behind, in models with vision towers."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen3VLForConditionalGeneration

import sparsify
from sparsify import SparseCache, api
from sparsify.errors import CacheError, UnsupportedError
from sparsify.planning.registry import discover
from tests.support import image_selection, token_selection
from tests.support.cases import every
from tests.support.harness import holding, strict
from tests.support.image_selection import build, prompt
from tests.support.tiny_models import build_class, spread_weights

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
OPTIONS = {"fastv": {"layer": 1, "queries": 3, "keep": 0.25}, "divprune": {"keep": 0.25}}
PROMPT = 60

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model, name, options=None, **more):
    return sparsify.compile(model, **strict(passes=[name, "dense"], **{name: OPTIONS[name] if options is None else options}, **more))


def reference(model, name, given):
    """(columns that go on, the layer that nothing is left out of any more)."""
    if name == "fastv":
        order, layer = image_selection.looked_at(model, given, 1, 3), 1
    else:
        order, layer = image_selection.far_apart(model, given), -1
    return image_selection.kept(model, given, order, OPTIONS[name]["keep"]), layer


def streams(plans):
    return [d for plan in plans for d in plan.decisions if d.kind == "stream"]


def dense_sites(plans, decoder: bool):
    """Sites of attention that `dense` serves: the decoder's prompts, or all of the vision tower's."""
    sites = [d for plan in plans for d in plan.decisions if d.kind == "attention" and ("language_model" in d.site) is decoder]
    return [d for d in sites if d.method == "dense" and (d.phase == "prefill" or not decoder)]


CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "full": lambda config: SparseCache(config, "full", 64),
    "snapkv": lambda config: SparseCache(config, "snapkv", 200, window=8),
}
CASES = [("llava", "fastv", "dynamic"), *((f, n, c) for f in ("llava", "qwen2_5_vl") for n in OPTIONS for c in CACHES)][:-1]


@pytest.mark.parametrize("family, name, kind", [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[2:])])
@torch.no_grad()
def test_a_prompt_tokens_and_a_second_turn(family, name, kind):
    model = build(family)
    given = prompt(model, PROMPT)
    ids = torch.cat((given["input_ids"], torch.randint(3, 100, (1, 22), generator=torch.Generator().manual_seed(1))), 1)
    whole = image_selection.with_tokens(model, given, ids)
    (columns,), layer = reference(model, name, given)
    want = token_selection.hidden_later(model, whole, [columns], PROMPT, layer)[0]
    dense = model(**whole, use_cache=False).logits[0]
    compiled(model, name)
    cache = CACHES[kind](model.config)
    with api.collect_plans() as plans:
        found = [model(**given, **(holding(cache) if cache is not None else {"use_cache": False})).logits[0]]
        for part in ids[:, PROMPT:].split((1, 1, 20), 1) if cache is not None else ():
            found.append(model(input_ids=part, **holding(cache)).logits[0])
    found = torch.cat(found)
    rows = [*columns, *range(PROMPT, len(found))]
    torch.testing.assert_close(found[rows], want[rows], **CLOSE)
    assert not torch.allclose(found[rows], dense[rows], atol=1e-2)
    assert found[[c for c in range(PROMPT) if c not in columns]].isnan().all()
    (decision,) = streams(plans)
    assert (decision.method, decision.sizes["kept"], decision.sizes["layers"]) == (name, str(PROMPT - 12), str(3 - layer))
    assert "4 of 16 image tokens go on" in decision.reason
    assert len({d.site for d in dense_sites(plans, True)}) == 4 and len(dense_sites(plans, False)) == 4
    if cache is not None:
        held = [layer.keys.shape[2] if kind == "dynamic" else layer.get_seq_length() for layer in cache.layers]
        assert held == [82 if number <= layer else 70 for number in range(4)] and cache.get_seq_length() == 82


@pytest.mark.parametrize("name, kind", every(2, [(name, kind) for name in OPTIONS for kind in ("dynamic", "full")]))
@pytest.mark.slow
@torch.no_grad()
def test_padded_rows_go_on_with_as_many_tokens(name, kind):
    """The row with less text keeps more of its image."""
    model = build("llava")
    given = prompt(model, PROMPT, padding=(7, 0))
    ids = torch.cat((given["input_ids"], torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))), 1)
    mask = torch.cat((given["attention_mask"], torch.ones(2, 9, dtype=torch.long)), 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = {**given, "input_ids": ids, "attention_mask": mask, "position_ids": positions}
    kept, layer = reference(model, name, given)
    assert [len(columns) for columns in kept] == [48, 48]
    want, dense = token_selection.hidden_later(model, whole, kept, PROMPT, layer), model(**whole, use_cache=False).logits
    compiled(model, name)
    cache = CACHES[kind](model.config)
    found = [model(**given, **holding(cache)).logits]
    for at, to in ((60, 61), (61, 69)):
        later = {"input_ids": ids[:, at:to], "attention_mask": mask[:, :to], "position_ids": positions[:, at:to]}
        found.append(model(**later, **holding(cache)).logits)
    found = torch.cat(found, 1)
    for row, columns in enumerate(kept):
        rows = [*columns, *range(PROMPT, 69)]
        torch.testing.assert_close(found[row, rows], want[row, rows], **CLOSE)
        assert not torch.allclose(found[row, rows], dense[row, rows], atol=1e-2)


@pytest.mark.parametrize("family, name", every(2, [(f, n) for f in ("llava", "qwen2_5_vl") for n in OPTIONS]))
@pytest.mark.slow
@torch.no_grad()
def test_generate(family, name):
    model = build(family)
    given = prompt(model, PROMPT)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    kept, layer = reference(model, name, given)
    tokens = given["input_ids"]
    for _ in range(5):
        logits = token_selection.hidden_later(model, image_selection.with_tokens(model, given, tokens), kept, PROMPT, layer)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    compiled(model, name)
    with api.collect_plans() as plans:
        for _ in range(2):
            assert torch.equal(model.generate(**given, **how), tokens)
        assert torch.equal(model.generate(**given, **how, **holding(SparseCache(model.config, "full"))), tokens)
    assert [(d.method, d.sizes["kept"]) for d in streams(plans)] == [(name, "48")]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow
@torch.no_grad()
def test_keeping_all_and_text_alone_are_dense_bit_by_bit(name):
    model = build("llava", layers=2)
    given = prompt(model, PROMPT)
    text = {"input_ids": given["input_ids"].clamp(max=90)}
    sparsify.compile(model, **strict(passes=["dense"]))
    want = [model(**one, use_cache=False).logits for one in (given, text)]
    keep_all = discover()[name](**{**OPTIONS[name], **({"layer": 0} if name == "fastv" else {})}).keep_all().options()
    compiled(model, name, keep_all)
    with api.collect_plans() as plans:
        found = [model(**one, use_cache=False).logits for one in (given, text)]
    assert all(map(torch.equal, found, want))
    assert [(d.method, d.reason) for d in streams(plans)] == [(None, "all 16 image tokens go on")]


# --- refusals ---


def refused(model, given, name="fastv", options=None, **more) -> str:
    """Compiled twice: strict raises, otherwise the call is what it was, and the plan says why."""
    with torch.no_grad():
        dense = model(**given, use_cache=False).logits
    asked = {"passes": [name, *more.get("passes", ()), "dense"], name: OPTIONS[name] if options is None else options}
    sparsify.compile(model, **strict(**asked))
    with pytest.raises(UnsupportedError) as error, torch.no_grad():
        model(**given, use_cache=False)
    sparsify.compile(model, lower="eager", **asked)
    with api.collect_plans() as plans, torch.no_grad():
        found = model(**given, use_cache=False).logits
    if not more.get("acts"):
        torch.testing.assert_close(found, dense, **CLOSE)
    refusals = [r for d in streams(plans) if d.method is None for r in d.refusals]
    assert len(refusals) == 1 and error.value.what in refusals[0]
    return refusals[0]


@pytest.mark.slow
def test_a_window_that_would_choose():
    model = build("gemma3")
    assert "layer 2 is one of sliding attention, which counts places" in refused(
        model, prompt(model, PROMPT), options={"layer": 2, "keep": 2}
    )


@pytest.mark.slow
def test_groups_that_lie_apart():
    model = build("paligemma")
    given = prompt(model, PROMPT)
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    given["token_type_ids"][:, 10:30] = 1
    sparsify.compile(model, passes=["fastv", "dense"], fastv=OPTIONS["fastv"], lower="eager", min_length=0, strict=True)
    with pytest.raises(UnsupportedError, match="do not stand side by side"), torch.no_grad():
        model(**given, use_cache=False)


WINDOW_CACHES = {"windows": lambda config: DynamicCache(config=config), "everything": lambda config: DynamicCache()}


@pytest.mark.slow
@pytest.mark.parametrize("cache", WINDOW_CACHES)
@torch.no_grad()
def test_windows_slide_past_what_was_left_out(cache):
    """Over layers that keep a window, and over such that keep everything; token by token, and in a turn of several."""
    model, lengths = build("gemma3"), (1, 1, 7, 1, 30)
    given = prompt(model, PROMPT)
    ids = torch.cat((given["input_ids"], torch.randint(3, 100, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))), 1)
    whole = image_selection.with_tokens(model, given, ids)
    (columns,) = image_selection.kept(model, given, image_selection.looked_at(model, given, 1, 3), 1)
    want = token_selection.hidden_later(model, whole, [columns], PROMPT, 1)[0]
    sparsify.compile(model, **strict(passes=["fastv", "dense"], fastv={"layer": 1, "queries": 3, "keep": 1}))
    held = WINDOW_CACHES[cache](model.config)
    with api.collect_plans() as plans:
        parts = [model(**given, **holding(held)).logits[0]]
        parts += [model(input_ids=part, **holding(held)).logits[0] for part in ids[:, PROMPT:].split(lengths, 1)]
    found, rows = torch.cat(parts), [*columns, *range(PROMPT, len(want))]
    torch.testing.assert_close(found[rows], want[rows], **CLOSE)
    assert len(streams(plans)) == 1 and streams(plans)[0].method == "fastv"
    if cache == "windows":  # gaps are padding, which is proved
        later = [d for plan in plans for d in plan.decisions if d.kind == "attention" and d.phase == "decode"]
        assert later and all(d.method == "dense" for d in later)
    else:
        with pytest.raises(CacheError, match="cannot be taken back"):
            held.crop(-(sum(lengths) + PROMPT - 6))


@pytest.mark.slow
def test_features_that_are_added_again():
    model = build_class(Qwen3VLForConditionalGeneration, "sdpa", layers=4, by_layer=False)
    spread_weights(model)
    assert "added again behind later layers" in refused(model, prompt(model, PROMPT))


@pytest.mark.slow
def test_what_says_too_little():
    model = build("llava")
    given = prompt(model, PROMPT)
    assert "no keep given" in refused(model, given, options={})
    assert "no layer follows" in refused(model, given, options={"layer": 3, "keep": 2})
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(given["input_ids"])
    assert "embeddings are given" in refused(model, {"inputs_embeds": embeddings})


@pytest.mark.slow
def test_a_second_method_does_not_act():
    model = build("llava")
    assert "divprune chooses already" in refused(model, prompt(model, PROMPT), "divprune", passes=("fastv",), acts=True)


@pytest.mark.slow
@torch.no_grad()
def test_what_came_after_the_image_can_be_cropped():
    model = build("llava")
    given = prompt(model, PROMPT)
    whole = torch.cat((given["input_ids"], torch.randint(3, 100, (1, 6))), 1)
    kept, _ = reference(model, "divprune", given)
    want = token_selection.hidden_later(model, image_selection.with_tokens(model, given, whole), kept, PROMPT, -1)[0, -6:]
    compiled(model, "divprune")
    for cache in (DynamicCache(config=model.config), SparseCache(model.config, "full")):
        model(**given, **holding(cache))
        model(input_ids=torch.randint(3, 100, (1, 4)), **holding(cache))
        cache.crop(-4)
        torch.testing.assert_close(model(input_ids=whole[:, -6:], **holding(cache)).logits[0], want, **CLOSE)
        with pytest.raises(CacheError, match="cannot be taken back"):
            cache.crop(-60)
        assert cache.get_seq_length() == PROMPT + 6


@torch.no_grad()
def test_without_padding_the_host_does_not_wait_for_the_choice(monkeypatch):
    """What cannot be cropped afterwards is known from the images: the tokens behind the last of them all go on."""
    model = build("llava")
    given = prompt(model, PROMPT)
    images = (given["input_ids"] == model.config.image_token_id)[0].nonzero()
    behind = PROMPT - 1 - int(images.max())
    compiled(model, "divprune")
    monkeypatch.setattr("sparsify.generation.regions.narrowed._last_run", lambda *given: pytest.fail("waits"))
    cache = DynamicCache(config=model.config)
    model(**given, **holding(cache))
    assert behind > 0
    assert [(layer.keys.shape[2] - layer.fixed, layer.left_out) for layer in cache.layers] == [
        (behind, PROMPT - layer.keys.shape[2]) for layer in cache.layers
    ]

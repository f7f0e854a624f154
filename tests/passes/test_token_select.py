"""token_select: later layers compute the tokens that one layer's attention chooses, which equals a mask that hides the others there."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparsify
from sparsify import Pages, SparseCache, api, pipeline
from sparsify.costs import seconds
from sparsify.costs.sizes import AttentionSizes
from sparsify.errors import CacheError, UnsupportedError
from sparsify.matching.stream import StreamSite
from sparsify.planning.config.config import Config
from sparsify.planning.method import Refusal
from sparsify.planning.plan import Plan
from sparsify.planning.registry import discover
from tests.support import token_selection
from tests.support.cases import every
from tests.support.harness import holding, strict
from tests.support.padding import Calls, calls
from tests.support.tiny_models import VOCAB, build, spread_weights

LAYERS, LAYER, HEADS = 4, 1, (0, 3)
SELECT = {"layer": LAYER, "heads": list(HEADS), "keep": 40, "window": 12, "sinks": 2, "queries": 6, "kernel": 3}
CLOSE = {"rtol": 1e-4, "atol": 5e-5}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def made(family: str = "llama", **more) -> torch.nn.Module:
    model = build(family, layers=LAYERS, **more)
    spread_weights(model)
    return model


def chosen(model, prompt):
    return token_selection.chosen(model, prompt, SELECT)


def hidden_later(model, whole, kept, prompt_len):
    return token_selection.hidden_later(model, whole, kept, prompt_len, LAYER)


def narrowed(model, passes=("dense",), select=SELECT, **options):
    return sparsify.compile(model, **strict(passes=["token_select", *passes], token_select=select, **options))


def text(batch: int, length: int, padding: int = 0, side: str = "left") -> dict[str, torch.Tensor]:
    """Row 0 has `padding` columns without a token."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
    if not padding:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, slice(padding) if side == "left" else slice(length - padding, length)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def check(found: Calls, want: torch.Tensor, dense: torch.Tensor, kept: list[list[int]], prompt_len: int) -> None:
    """Rows that go on equal the reference and differ from dense; the others are NaN."""
    for row, columns in enumerate(kept):
        rows = [*columns, *range(prompt_len, want.shape[1])]
        torch.testing.assert_close(found.logits[row, rows], want[row, rows], **CLOSE)
        assert not torch.allclose(found.logits[row, rows], dense[row, rows], atol=1e-2)
        gone = sorted({*range(prompt_len)} - {*columns})
        if len(columns) < prompt_len:
            assert found.logits[row, gone].isnan().all(-1).sum() >= prompt_len - max(map(len, kept))


def selections(plans: list[Plan]) -> list[tuple[str, str | None, str]]:
    return [(d.site, d.method, d.sizes["kept"]) for plan in plans for d in plan.decisions if d.kind == "stream"]


CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "lazy": lambda config: DynamicCache(),
    "full": lambda config: SparseCache(config, "full", 64),
    "snapkv": lambda config: SparseCache(config, "snapkv", 200, window=8),
}


@pytest.mark.parametrize("kind", every(3, CACHES))
@pytest.mark.samples(1)
def test_a_prompt_tokens_and_a_second_turn(kind):
    model, whole = made(), text(1, 110)
    prompt = {"input_ids": whole["input_ids"][:, :80]}
    kept, dense = chosen(model, prompt), model(**whole).logits
    want = hidden_later(model, whole, kept, 80)
    narrowed(model)
    cache = CACHES[kind](model.config)
    lengths = (80,) if cache is None else (80, 1, 1, 20, 1, 7)
    found = calls(model, whole, cache, *lengths)
    check(found, want[:, : sum(lengths)], dense[:, : sum(lengths)], kept, 80)
    assert found.lengths == ([] if cache is None else [110, 110, 70, 70])
    assert selections(found.plans) == [("model.layers.1", "token_select", "40")]
    sites = [d for plan in found.plans for d in plan.decisions if d.kind == "attention" and not d.site.endswith(".cache")]
    # every prompt site; SparseCache's later calls are no sites of attention that `dense` serves
    assert all(d.method == "dense" for d in sites if d.phase == "prefill") and len(sites) >= LAYERS


@pytest.mark.parametrize("how", [pytest.param("compiled", marks=pytest.mark.slow), "uncompiled"])
@torch.no_grad()
def test_a_call_with_one_mask_for_all_layers_is_refused(how):
    """Layers of an ordinary cache hold different numbers of keys; a single token needs no mask."""
    plain, ids = made(), text(1, 80)["input_ids"]
    model, whole = narrowed(copy.deepcopy(plain)), {"compiled": {"output_attentions": True}}.get(how, {})
    cache = DynamicCache(config=model.config)
    model(ids, **holding(cache))
    asked = model if how == "compiled" else plain
    with pytest.raises(CacheError, match="one mask for all of them"):
        asked(ids[:, :5], **holding(cache), **whole)
    assert [layer.keys.shape[2] for layer in cache.layers] == [80, 80, 40, 40]
    if how != "compiled":
        want = model(ids[:, :1], **holding(copy.deepcopy(cache))).logits
        torch.testing.assert_close(asked(ids[:, :1], **holding(cache)).logits, want, **CLOSE)
    else:  # of the whole graph's mask for one token, too
        masked = {"attention_mask": torch.ones(1, 81, dtype=torch.int64), "input_ids": ids[:, :1]}
        with pytest.raises(CacheError, match="a call of 1 with a mask makes one mask for all of them"):
            asked(**masked, **holding(cache), **whole)
    cache = DynamicCache(config=model.config)
    asked(ids[:, :20], **holding(cache))
    asked(ids[:, :5], **holding(cache), **whole)


@pytest.mark.slow
@torch.no_grad()
def test_drafts_are_taken_back_from_layers_that_hold_less():
    model, ids = made(), text(2, 90)["input_ids"]
    narrowed(model)
    how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    want = model.generate(ids, **how, **holding(SparseCache(model.config, "full")))
    cache = SparseCache(model.config, "full", draft=Pages(size=8, count=1), draft_tokens=3)
    assert torch.equal(model.generate(ids, **how, **holding(cache)), want)
    assert 0 < cache.drafts_kept < cache.drafted, "some of them were rejected"
    assert [layer.left_out for layer in cache.layers] == [0, 0, 50, 50]


@pytest.mark.parametrize("kind, side", every(4, [(kind, side) for kind in CACHES for side in ("left", "right")]))
@pytest.mark.samples(1)
def test_padded_batches(kind, side):
    """The padded row has more tokens than are kept: its padding is gone behind the layer."""
    model, whole = made(), text(2, 100, padding=17, side="left")
    if side == "right":  # of the prompt: what follows stands behind the padding
        mask = torch.ones_like(whole["input_ids"])
        mask[0, 63:80] = 0
        whole = {"input_ids": whole["input_ids"].clamp(min=3), "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    prompt = {name: value[:, :80] for name, value in whole.items()}
    kept, dense = chosen(model, prompt), model(**whole).logits
    want = hidden_later(model, whole, kept, 80)
    narrowed(model)
    cache = CACHES[kind](model.config)
    lengths = (80,) if cache is None else (80, 1, 18, 1)
    found = calls(model, whole, cache, *lengths)
    check(found, want[:, : sum(lengths)], dense[:, : sum(lengths)], kept, 80)
    assert found.lengths[2:] == ([] if cache is None else [60, 60])
    assert selections(found.plans) == [("model.layers.1", "token_select", "40")]


@torch.no_grad()
def test_no_token_is_taken_back_where_only_padding_would_be():
    """A row whose prompt ends in padding: its last tokens in later layers stand before the columns that others lose."""
    model, ids = narrowed(made()), text(2, 80)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 63:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    cache = DynamicCache(config=model.config)
    model(**given, **holding(cache))
    with pytest.raises(CacheError, match="cannot be taken back"):
        cache.layers[-1].crop(-5)
    cache = DynamicCache(config=model.config)
    model(ids, **holding(cache))
    cache.layers[-1].crop(-5)
    assert cache.layers[-1].keys.shape[2] == 35


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("full", marks=pytest.mark.slow)])
def test_padding_of_a_later_turn_stays_hidden(kind):
    """Columns of a second turn without a token are seen by none of the tokens behind them."""
    model, whole = made(), text(2, 100)
    mask = torch.ones_like(whole["input_ids"])
    mask[0, 80:87] = 0
    whole |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    prompt = {name: value[:, :80] for name, value in whole.items()}
    kept, dense = chosen(model, prompt), model(**whole).logits
    want = hidden_later(model, whole, kept, 80)
    narrowed(model)
    found = calls(model, whole, CACHES[kind](model.config), 80, 12, 1, 7)
    given = [*range(87, 100)]
    torch.testing.assert_close(found.logits[0, given], want[0, given], **CLOSE)
    assert not torch.allclose(found.logits[0, given], dense[0, given], atol=1e-2)
    check(Calls(found.logits[1:], found.lengths, found.plans), want[1:], dense[1:], kept[1:], 80)


@pytest.mark.parametrize("kind", every(3, ["none", "full", "snapkv"]))
@pytest.mark.slow
def test_a_row_with_fewer_tokens_than_are_kept(kind):
    model, whole = made(), text(2, 100, padding=55)
    prompt = {name: value[:, :80] for name, value in whole.items()}
    kept, dense = chosen(model, prompt), model(**whole).logits
    assert [len(columns) for columns in kept] == [25, 40]
    want = hidden_later(model, whole, kept, 80)
    narrowed(model)
    cache = CACHES[kind](model.config)
    lengths = (80,) if cache is None else (80, 1, 19)
    found = calls(model, whole, cache, *lengths)
    whole_row = [*kept[0], *range(80, sum(lengths))]  # nothing of it was left out
    torch.testing.assert_close(found.logits[0, whole_row], dense[0, whole_row], **CLOSE)
    check(Calls(found.logits[1:], found.lengths, found.plans), want[1:, : sum(lengths)], dense[1:], kept[1:], 80)


@pytest.mark.slow
def test_eager_attention():
    model, whole = made(attn_implementation="eager"), text(1, 100)
    kept, dense = chosen(model, {"input_ids": whole["input_ids"][:, :80]}), model(**whole).logits
    want = hidden_later(model, whole, kept, 80)
    narrowed(model)
    check(calls(model, whole, DynamicCache(config=model.config), 80, 1, 19), want, dense, kept, 80)


@pytest.mark.slow
@torch.no_grad()
def test_generate_reads_its_own_cache():
    model, prompt = made(), text(1, 80)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    plain = model.generate(**prompt, **how)
    kept = chosen(model, prompt)
    tokens = prompt["input_ids"]
    for _ in range(6):
        logits = hidden_later(model, {"input_ids": tokens}, kept, 80)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    narrowed(model)
    for _ in range(2):  # the second time over the cache that the first one left
        assert torch.equal(model.generate(**prompt, **how), tokens)
    assert torch.equal(model.generate(**prompt, **how, **holding(DynamicCache(config=model.config))), tokens)
    assert not torch.equal(plain, tokens)


@torch.no_grad()
def test_keeping_all_is_dense_bit_by_bit():
    model, whole = made(), text(2, 90, padding=9)
    sparsify.compile(model, **strict(passes=["dense"]))
    want = calls(model, whole, SparseCache(model.config, "full", 90), 80, 1, 9).logits
    keep_all = discover()["token_select"](**SELECT).keep_all().options()
    narrowed(model, select=keep_all)
    found = calls(model, whole, SparseCache(model.config, "full", 90), 80, 1, 9)
    assert torch.equal(found.logits, want)
    assert selections(found.plans) == [("model.layers.1", None, "80")]


@pytest.mark.slow
@torch.no_grad()
def test_keeping_almost_all_equals_dense_on_what_does_not_see_the_rest():
    """One token is left out: tokens before it are what they were."""
    model, whole = made(), text(1, 80)
    dense = model(**whole).logits
    narrowed(model, select={**SELECT, "keep": 79})
    found = calls(model, whole, None, 80).logits[0]
    (gone,) = found.isnan().any(-1).nonzero()[:, 0].tolist()
    torch.testing.assert_close(found[:gone], dense[0, :gone], **CLOSE)
    assert not torch.allclose(found[gone + 1 :], dense[0, gone + 1 :], atol=1e-3)


# --- which tokens ---


METHOD = discover()["token_select"]


def choose(given, is_token=None, **options):
    mass = torch.tensor(given)
    method = METHOD(**{"layer": 0, "heads": "all", "window": 2, "sinks": 1, "kernel": 1, **options})
    longest = mass.shape[-1] if is_token is None else int(torch.tensor(is_token).sum(-1).max())
    return method.choose(mass, None if is_token is None else torch.tensor(is_token), longest).tolist()


def test_heads_and_how_they_agree():
    mass = [[[0.0, 4, 1, 3, 0, 0, 0], [0, 0, 1.5, 3, 0, 0, 0.0]]]
    assert choose(mass, keep=4, heads=(0,)) == [[0, 1, 5, 6]]
    assert choose(mass, keep=4, heads=(1,)) == choose(mass, keep=4) == [[0, 3, 5, 6]]
    assert choose(mass, keep=5, heads=(1,)) == [[0, 2, 3, 5, 6]]
    assert choose(mass, keep=4, group="max") == [[0, 1, 5, 6]]


def test_what_stays_anyway_does_not_smear():
    """Sinks and window hold nearly everything; their neighbours hold nothing."""
    mass = [[[90.0, 0, 0, 0.5, 0, 0, 0, 0, 0, 50, 60]]]
    assert choose(mass, keep=6, kernel=3) == [[0, 2, 3, 4, 9, 10]]
    assert choose(mass, keep=4, kernel=3, pool="max")[0][1] in (2, 3, 4)


def test_a_share_and_a_mass():
    mass = [[[9.0, 6, 0, 3, 1, 0, 0, 0, 0, 9, 9]]]
    assert choose(mass, keep=0.4) == [[0, 1, 3, 9, 10]]
    assert choose(mass, mass=0.55) == [[0, 1, 9, 10]]
    assert choose(mass, mass=0.85) == [[0, 1, 3, 9, 10]]
    assert choose(mass, mass=0.95) == [[0, 1, 3, 4, 9, 10]]
    assert choose(mass, mass=0.95, keep=4) == [[0, 1, 9, 10]]


def test_padding_between_tokens_is_skipped():
    holes = [[False, True, True, False, True, False, True, True, True, False]]
    mass = [[[0.0, 9, 1, 0, 8, 0, 2, 9, 9, 0]]]
    assert choose(mass, holes, keep=4) == [[1, 4, 7, 8]]
    assert choose([[[0.0, 9, 3, 0, 0, 0, 2, 9, 9, 0]]], holes, keep=4, kernel=3) == [[1, 4, 7, 8]]  # 4 has both others beside it


# --- refusals, each before a layer has run: the call is dense ---


def refused(model, whole, cache=None, select=SELECT, **more) -> str:
    """Compiled twice: strict raises, otherwise the call is what it was, and the plan says why."""
    with torch.no_grad():
        dense = model(**whole, **(holding(cache()) if cache else {"use_cache": False}), **more)
        dense = dense.logits
    narrowed(model, select=select)
    with pytest.raises(UnsupportedError) as error, torch.no_grad():
        model(**whole, **(holding(cache()) if cache else {"use_cache": False}), **more)
    sparsify.compile(model, passes=["token_select", "dense"], token_select=select, lower="eager")
    with api.collect_plans() as plans, torch.no_grad():
        found = model(**whole, **(holding(cache()) if cache else {"use_cache": False}), **more).logits
    torch.testing.assert_close(found, dense, **CLOSE)
    refusals = [r for plan in plans for d in plan.decisions if d.kind == "stream" and d.method is None for r in d.refusals]
    assert len(refusals) == 1 and error.value.what in refusals[0]
    return refusals[0]


@pytest.mark.parametrize(
    "select, reason",
    [
        ({}, "no layer, heads, keep given"),
        ({"layer": 1, "keep": 40}, "no heads given"),
        ({"layer": 1, "heads": "all"}, "no keep given"),
        ({**SELECT, "heads": [9]}, "head 9 does not exist"),
        ({**SELECT, "layer": LAYERS - 1}, "no layer follows"),
        ({**SELECT, "keep": 10}, "leave none beside"),
    ],
)
def test_options_that_say_too_little(select, reason):
    sizes = AttentionSizes(1, 4, 2, 80, 80, 16, 16, torch.float32)
    site = StreamSite("model.layers.1", select.get("layer", 0), LAYERS, 1, 80, 80, sizes, 64, ())
    answer = METHOD(**select).propose(site, pipeline.make_context(torch.device("cpu"), Config()))
    assert isinstance(answer, Refusal) and reason in answer.reason


def test_prompts_after_the_first_predict_nothing_anew(monkeypatch):
    predicted = []
    linear_seconds = seconds.linear_seconds
    monkeypatch.setattr(seconds, "linear_seconds", lambda *given: predicted.append(given) or linear_seconds(*given))
    compiled, prompt = narrowed(made()), text(1, 80)
    with torch.no_grad(), api.collect_plans():
        compiled(**prompt)
        first, shapes = len(predicted), len(set(predicted))
        compiled(**prompt)
    assert 0 < first == shapes  # layers are alike: none is predicted twice
    assert len(predicted) == first
    with torch.no_grad():
        compiled(**text(1, 90))
    assert len(predicted) == first, "where no plan asks, nothing is predicted"


def test_without_options_a_model_stays():
    assert "no layer, heads, keep given" in refused(made(), text(1, 80), select={})


REFUSED = {
    "windows": ("mistral_window", lambda config: DynamicCache(config=config), "window"),
    "alternating": ("gemma3", lambda config: SparseCache(config, "full", 128), "has a sliding window"),
    "no tables": ("gpt2", lambda config: DynamicCache(config=config), "rotary tables"),
    "static": ("llama", lambda config: StaticCache(config=config, max_cache_len=128), "StaticLayer makes its masks from columns"),
    "places": ("llama", lambda config: SparseCache(config, sinks=2, window=30, positions="in_cache"), "turns sinks"),
    "a policy": ("llama", lambda config: SparseCache(config, "expected_attention", 40), "turns queries back"),
}


@pytest.mark.parametrize("name", every(5, REFUSED))
def test_what_cannot_follow(name):
    family, cache, reason = REFUSED[name]
    model = made(family)
    assert reason in refused(model, text(1, 80), lambda: cache(model.config))


def test_a_padded_row_that_is_too_short_for_an_ordinary_cache():
    model = made()
    whole = text(2, 80, padding=55)
    sparsify.compile(model, passes=["token_select", "dense"], token_select=SELECT, lower="eager")
    with api.collect_plans() as plans, torch.no_grad():
        model(**whole, **holding(DynamicCache(config=model.config)))
    assert ["fewer tokens than are kept" in r for plan in plans for d in plan.decisions if d.kind == "stream" for r in d.refusals] == [True]


@pytest.mark.slow
def test_hidden_states_of_all_rows():
    assert "hidden states of all rows" in refused(made(), text(1, 80), output_hidden_states=True)


@pytest.mark.slow
def test_packed_documents():
    model = made()
    positions = torch.cat((torch.arange(50), torch.arange(30)))[None]
    assert "more than causality" in refused(model, {**text(1, 80), "position_ids": positions})


@torch.no_grad()
def test_a_model_that_is_captured_whole():
    model, prompt = made(), text(1, 80)
    model.compile(backend="sparsify", options=strict(passes=["token_select", "dense"], token_select=SELECT))
    with pytest.raises(Exception, match="layers are captured in one graph"):
        model(**prompt, use_cache=False)
    torch._dynamo.reset()
    plan = sparsify.explain(
        model, **prompt, use_cache=False, options={"passes": ["token_select", "dense"], "token_select": SELECT, "min_length": 0}
    )
    assert [d.refusals for d in plan.decisions if d.kind == "stream"] == [
        ["token_select: layers are captured in one graph, within which the number of rows does not change (use sparsify.compile(model))"]
    ]


@pytest.mark.slow
@torch.no_grad()
def test_a_prompt_in_parts_is_not_narrowed():
    model, prompt = made(), text(1, 80)
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": 30}
    want = model.generate(**prompt, **how)
    sparsify.compile(model, passes=["token_select", "dense"], token_select={**SELECT, "keep": 20, "window": 8}, lower="eager")
    with api.collect_plans() as plans:
        assert torch.equal(model.generate(**prompt, **how), want)
    assert ["read in parts" in r for plan in plans for d in plan.decisions for r in d.refusals if d.kind == "stream"] == [True]


def test_exact_leaves_it_out():
    model, whole = made(), text(1, 80)
    with torch.no_grad():
        dense = model(**whole).logits
    narrowed(model, exact=True)
    found = calls(model, whole, None, 80)
    torch.testing.assert_close(found.logits, dense, **CLOSE)
    assert selections(found.plans) == []


@pytest.mark.parametrize(
    "options", [{"kernel": 4}, {"heads": []}, {"heads": [-1]}, {"keep": 1.5}, {"keep": 0}, {"layer": -1}, {"mass": 1.2}]
)
def test_options_are_checked(options):
    with pytest.raises(sparsify.errors.ConfigError):
        sparsify.compile(made(), token_select=options)


# --- caches whose layers hold different numbers of tokens ---


@torch.no_grad()
@pytest.mark.slow
def test_a_cache_is_saved_forked_cropped_and_reset(tmp_path):
    model, whole = made(), text(1, 100)
    prompt = {"input_ids": whole["input_ids"][:, :80]}
    kept = chosen(model, prompt)
    want, dense = hidden_later(model, whole, kept, 80), model(**whole).logits
    narrowed(model)
    cache = SparseCache(model.config, "full", 128)
    calls(model, prompt, cache, 80)
    cache.save(tmp_path / "prompt.safetensors", model)
    follow = {"input_ids": whole["input_ids"][:, 80:]}
    for other in (SparseCache.load(tmp_path / "prompt.safetensors", model), cache.fork()):
        torch.testing.assert_close(calls(model, follow, other, 20).logits, want[:, 80:], **CLOSE)
        assert [layer.get_seq_length() for layer in other.layers] == [100, 100, 60, 60]
        other.crop(-15)
        torch.testing.assert_close(calls(model, {"input_ids": whole["input_ids"][:, 85:]}, other, 15).logits, want[:, 85:], **CLOSE)
        with pytest.raises(CacheError, match="cannot be taken back"):
            other.crop(-33)
        other.crop(-32)  # the window of 12 has no gaps
    cache.reset()
    short = {"input_ids": whole["input_ids"][:, :30]}
    torch.testing.assert_close(calls(model, short, cache, 30).logits, dense[:, :30], **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_a_policy_evicts_from_what_a_layer_was_given():
    """Later layers hold fewer tokens than the budget, earlier ones evict."""
    model, whole = made(), text(1, 90)
    narrowed(model)
    cache = SparseCache(model.config, "snapkv", 50, window=8)
    found = calls(model, whole, cache, 80, 1, 9)
    assert not found.logits[:, 80:].isnan().any()
    assert [int((layer.positions >= 0).sum(-1).max()) for layer in cache.layers] == [50, 50, 50, 50]
    assert found.lengths == [90, 90, 50, 50]


@torch.no_grad()
@pytest.mark.slow
def test_an_ordinary_cache_is_cropped_or_says_why_not():
    model, whole = made(), text(1, 100)
    kept = chosen(model, {"input_ids": whole["input_ids"][:, :80]})
    want = hidden_later(model, whole, kept, 80)
    narrowed(model)
    cache = DynamicCache(config=model.config)
    calls(model, whole, cache, 80, 20)
    cache.crop(-15)
    torch.testing.assert_close(calls(model, {"input_ids": whole["input_ids"][:, 85:]}, cache, 15).logits, want[:, 85:], **CLOSE)
    with pytest.raises(CacheError, match="cannot be taken back"):
        cache.crop(-33)
    assert [layer.keys.shape[2] for layer in cache.layers] == [100, 100, 60, 60]
    cache.crop(-32)  # the window of 12 has no gaps
    assert [layer.keys.shape[2] for layer in cache.layers] == [68, 68, 28, 28]

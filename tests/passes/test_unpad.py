"""unpad: the layers compute the tokens of a padded batch alone, and every token is what eager execution makes of it."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, StaticCache

import sparsify
from sparsify import SparseCache, api
from sparsify.costs.device import describe
from sparsify.costs.sizes import AttentionSizes
from sparsify.errors import UnsupportedError
from sparsify.generation.regions import bins
from sparsify.generation.regions.packed import Layout
from sparsify.matching.base import CACHE_SUFFIX
from sparsify.matching.padded import PaddedSite
from sparsify.planning.method import Context, Refusal
from sparsify.planning.registry import discover
from tests.support import padding
from tests.support.cases import every
from tests.support.harness import strict
from tests.support.padding import Calls, calls, tokens_of
from tests.support.tiny_models import build, build_class, spread_weights

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LENGTHS = (20, 1, 33, 9)
ALWAYS = {"when": "always"}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def made(family: str = "llama", **more) -> nn.Module:
    model = build(family, **more)
    spread_weights(model)
    return model


def packing(model: nn.Module, passes=("dense",), **options) -> nn.Module:
    return sparsify.compile(model, **strict(passes=["unpad", *passes], **{"unpad": ALWAYS, **options}))


def text(lengths=LENGTHS, side: str = "left", later: int = 0) -> dict[str, torch.Tensor]:
    return padding.text(lengths, side, later)


CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "lazy": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
    "full": lambda config: SparseCache(config, "full", 64),
    "snapkv": lambda config: SparseCache(config, "snapkv", 30, window=8),
    "streaming": lambda config: SparseCache(config, "streaming_llm", 16, sinks=2),
    "every": lambda config: SparseCache(config, "h2o", 24, every=8),
}
SIDES = ("left", "right")


@pytest.mark.parametrize(
    ("kind", "side"), every(100, [(kind, side) for kind in ("dynamic", *(kind for kind in CACHES if kind != "dynamic")) for side in SIDES])
)
def test_a_prompt_tokens_and_a_second_turn(kind, side):
    """Over every cache: what was stored serves later calls, which go on unchanged."""
    model, whole = made(), text(side=side, later=12)
    lengths = (33,) if kind == "none" else (33, 1, 1, 9, 1)
    want = calls(model, whole, CACHES[kind](model.config), *lengths)
    packing(model)
    found = calls(model, whole, CACHES[kind](model.config), *lengths)
    torch.testing.assert_close(tokens_of(found.logits, whole), tokens_of(want.logits, whole), **CLOSE)
    assert found.lengths == want.lengths
    (batch,) = found.batches
    assert (batch.method, batch.sizes) == (
        "unpad",
        {"batch": "4", "columns": "33", "tokens": "63", "rows": "2", "length": "33", "layers": "2"},
    )
    prompts = [d for plan in found.plans for d in plan.decisions if d.kind == "attention" and d.phase == "prefill"]
    prompts = [d for d in prompts if not d.site.endswith(CACHE_SUFFIX)]  # that is where keys are stored
    if kind != "streaming":  # whose prompt is the op's own call
        assert len(prompts) == 2 and all((d.mask, d.method) == ("causal, documents", "dense") for d in prompts)
    hidden = ~whole["attention_mask"][:, :33].bool()
    assert (found.logits[:, :33][hidden] - want.logits[:, :33][hidden]).abs().max() > 1e-2, "padding was computed"


def test_what_is_stored_equals_what_a_padded_batch_stores():
    model, whole = made(), text()
    caches = {}
    for compiled in (False, True):
        if compiled:
            packing(model)
        cache = caches[compiled] = DynamicCache(config=model.config)
        calls(model, whole, cache, 33)
    shown = whole["attention_mask"].bool()
    for mine, eager in zip(caches[True].layers, caches[False].layers, strict=True):
        for one, other in ((mine.keys, eager.keys), (mine.values, eager.values)):
            torch.testing.assert_close(one.transpose(1, 2)[shown], other.transpose(1, 2)[shown], **CLOSE)
            assert not one.transpose(1, 2)[~shown].any(), "padding holds zeros"


ENCODERS = {
    "BertModel": {},
    "RobertaModel": {"pad_token_id": 0},
    "ElectraModel": {},
    "ModernBertModel": {"local_attention": 8, "pad_token_id": 0},
    "EuroBertModel": {},
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "side", "lengths"), every(100, [(n, s, x) for n in ENCODERS for s in SIDES for x in (LENGTHS, (7, 30))]))
def test_encoders(name, side, lengths):
    model, whole = build_class(getattr(transformers, name), "sdpa", overrides=ENCODERS[name]), text(lengths, side)
    spread_weights(model)
    inputs = {name: whole[name] for name in ("input_ids", "attention_mask")}
    want = model(**inputs).last_hidden_state
    packing(model)
    with api.collect_plans() as plans:
        found = model(**inputs).last_hidden_state
    torch.testing.assert_close(tokens_of(found, whole), tokens_of(want, whole), **CLOSE)
    assert not found[~whole["attention_mask"].bool()].isnan().any()
    decisions = [d for plan in plans for d in plan.decisions]
    assert [d.method for d in decisions if d.kind == "batch"] == ["unpad"]
    attended = [d for d in decisions if d.kind == "attention"]
    # a window to both sides beside documents is no clause of the op: such a layer keeps its mask
    assert [d.method for d in attended] == ["dense", None if name == "ModernBertModel" else "dense"]
    assert "documents" in attended[0].mask


_SHARED: list[nn.Module] = []


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6), side=st.sampled_from(SIDES))
def test_any_lengths(lengths, side):
    if not _SHARED:
        _SHARED.append(made())
    model, whole = _SHARED[0], text((*lengths, 24), side)
    model._compiled_call_impl = None
    want = calls(model, whole, None, 24)
    packing(model)
    found = calls(model, whole, None, 24)
    torch.testing.assert_close(tokens_of(found.logits, whole), tokens_of(want.logits, whole), **CLOSE)


# -- which rows ------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 200), max_size=24))
def test_every_prompt_lies_in_one_row(lengths):
    rows = bins.pack(tuple(lengths), 1000.0)
    assert sorted(one for row in rows for one in row) == [one for one, length in enumerate(lengths) if length]
    if rows:
        assert max(sum(lengths[one] for one in row) for row in rows) <= 2 * max(lengths)


def test_rows_are_full():
    """1K to 16K: eight rows of 17K, no place empty."""
    rows = bins.pack(tuple(1024 * (1 + one) for one in range(16)), 53_000.0)
    assert sorted(sum(1 + one for one in row) for row in rows) == [17] * 8


def test_layout_there_and_back():
    is_token = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()
    layout = Layout.of(is_token, (1, 0, 2), (2, 3, 1), ((1,), (0, 2)))
    padded = torch.arange(9.0).view(3, 3, 1)
    assert layout.pack(padded).squeeze(-1).tolist() == [[3, 4, 5], [1, 2, 8]]
    assert layout.documents.tolist() == [[1, 1, 1], [0, 0, 2]] and layout.places.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert torch.equal(layout.unpack(layout.pack(padded)), padded * is_token[..., None])
    assert layout.pack(padded[:1]).squeeze(-1).tolist() == [[0, 1, 2], [1, 2, 2]], "one row of the batch stands for all"


# -- what the caller sees --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_hidden_states_come_back_padded():
    model, whole = made(layers=3), text()
    want = model(**whole, output_hidden_states=True, use_cache=False).hidden_states
    packing(model)
    found = model(**whole, output_hidden_states=True, use_cache=False).hidden_states
    assert all(type(one) is torch.Tensor for one in found)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(tokens_of(one, whole), tokens_of(other, whole), **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_hooks_see_and_change_the_padded_stream():
    model, whole = made(layers=3), text()
    seen = []

    def look(module, args, result):
        seen.append(result if isinstance(result, torch.Tensor) else result[0])

    def change(module, args):
        return (args[0] * 0.5, *args[1:])

    model.model.layers[0].register_forward_hook(look)
    model.model.layers[2].register_forward_pre_hook(change)
    want = model(**whole, use_cache=False).logits
    packing(model)
    found = calls(model, whole, None, 33)
    torch.testing.assert_close(tokens_of(found.logits, whole), tokens_of(want, whole), **CLOSE)
    torch.testing.assert_close(tokens_of(seen[1], whole), tokens_of(seen[0], whole), **CLOSE)
    assert [d.method for d in found.batches] == ["unpad"]


def _refused(found: Calls, words: str) -> None:
    assert found.batches and all(d.method is None for d in found.batches)
    assert any(words in refusal for d in found.batches for refusal in d.refusals), [d.refusals for d in found.batches]


class Mixing(nn.Module):
    """Beside a layer's own feed-forward block: rows that take part of their neighbour."""

    def __init__(self, inner: nn.Module, how: str):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.how == "shift":
            rows = rows + torch.nn.functional.pad(rows, (0, 0, 1, 0))[:, :-1]
        elif self.how == "mean":
            rows = rows + rows.mean(1, keepdim=True)
        elif self.how == "batch":
            rows = rows + rows.mean(0, keepdim=True)
        else:  # an expert of a bounded capacity: the last rows of all find no room
            kept = torch.arange(rows.shape[0] * rows.shape[1]) < 15
            rows = rows * kept.view(*rows.shape[:2], 1)
        return self.inner(rows)


@pytest.mark.parametrize("how", every(4, ["shift", "mean", "batch", "capacity"]))
def test_layers_that_mix_rows_keep_the_batch_padded(how):
    """They would look at padding, which no layer computes any more: nothing is packed, and the result is eager's."""
    model, whole = made(layers=3), text(LENGTHS if how != "capacity" else (4, 3))
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, how)
    columns = whole["input_ids"].shape[1]
    want = calls(model, whole, DynamicCache(config=model.config), columns)
    packing(model, strict=False)
    found = calls(model, whole, DynamicCache(config=model.config), columns)
    torch.testing.assert_close(tokens_of(found.logits, whole), tokens_of(want.logits, whole), **CLOSE)
    _refused(found, "model.layers.1: what it computes for a token depends on more")
    with pytest.raises(UnsupportedError, match="depends on more"):
        calls(packing(model), whole, None, columns)


@pytest.mark.slow
def test_refusals():
    model, whole = made(), text()
    packing(model, strict=False)
    holes = {**whole, "attention_mask": whole["attention_mask"].clone()}
    holes["attention_mask"][2, 5] = 0
    _refused(calls(model, holes, None, 33), "do not stand side by side")
    with pytest.raises(UnsupportedError, match="side by side"):
        calls(packing(model), holes, None, 33)
    four = torch.ones(4, 1, 33, 33, dtype=torch.bool).tril() & whole["attention_mask"][:, None, None].bool()
    packing(model, strict=False)
    with torch.no_grad(), api.collect_plans() as plans:
        model(**{**whole, "attention_mask": four}, use_cache=False)
    _refused(Calls(whole["input_ids"], [], plans), "tensor of its own")
    with api.collect_plans() as plans:
        model(**whole, use_cache=False)
    _refused(Calls(whole["input_ids"], [], plans), "gradients")


@pytest.mark.slow
@torch.no_grad()
def test_an_earlier_layers_tokens_go_on_alone():
    model, whole = made(layers=3), text()
    select = {"layer": 0, "heads": "all", "keep": 20, "window": 4, "sinks": 1, "queries": 4, "kernel": 3}
    packing(model, passes=["token_select", "dense"], strict=False, token_select=select)
    _refused(calls(model, whole, None, 33), "go on alone")


@pytest.mark.slow
def test_a_cache_that_turns_sinks_stays_padded():
    model, whole = made(), text(later=2)
    cache = lambda: SparseCache(model.config, "streaming_llm", 16, sinks=2, positions="in_cache")
    want = calls(model, whole, cache(), 33, 1)
    packing(model, strict=False)
    found = calls(model, whole, cache(), 33, 1)
    torch.testing.assert_close(tokens_of(found.logits, whole), tokens_of(want.logits, whole), **CLOSE)
    assert any("turns sinks" in refusal for d in found.batches for refusal in d.refusals)


@pytest.mark.slow
@torch.no_grad()
def test_batches_without_padding_and_single_tokens_are_left_alone():
    model, whole = made(), text((20, 20), later=1)
    want = model(**whole, use_cache=False).logits
    packing(model)
    found = calls(model, whole, DynamicCache(config=model.config), 20, 1)
    torch.testing.assert_close(found.logits, want, **CLOSE)
    assert found.batches == []


# -- what is chosen --------------------------------------------------------------------------------------------------------------------


def site(**more) -> PaddedSite:
    attention = AttentionSizes(16, 32, 8, 16384, 16384, 128, 128, torch.bfloat16)
    given = {"batch": 16, "columns": 16384, "tokens": 139264, "rows": 8, "length": 17408, **more}
    matrices = (((4096, 4096), 64), ((4096, 1024), 64), ((4096, 14336), 64), ((14336, 4096), 32))
    return PaddedSite("model.layers", 32, **given, attention=attention, hidden=4096, matrices=matrices, cached=True)


def test_it_acts_where_that_is_expected_to_pay():
    method, context = discover()["unpad"](), Context(describe(torch.device("cpu")), "reference", formulas=False)
    assert float(method.propose(site(), context).seconds) < 0.7 * site().layer_seconds(context.device, 16, 16384)
    little = site(rows=16, length=16384)
    answer = method.propose(little, context)
    assert isinstance(answer, Refusal) and "expected to save" in answer.reason
    assert not isinstance(discover()["unpad"](when="always").propose(little, context), Refusal)
    assert isinstance(discover()["unpad"](when="never").propose(site(), context), Refusal)


def test_tiny_batches_do_not_pay_and_never_is_never():
    model, whole = made(), text()
    for options, words in (({}, "expected to save"), ({"when": "never"}, 'when = "never"')):
        packing(model, unpad=options)
        found = calls(model, whole, None, 33)
        _refused(found, words)
        assert found.masks == {"causal, padding"}


@pytest.mark.slow
def test_explain_shows_it():
    model, whole = made(), text()
    packing(model)
    plan = sparsify.explain(model, **whole, options=strict(passes=["unpad", "dense"], unpad=ALWAYS))
    assert "4·33→2·33 tokens, 2 layers" in str(plan) and "63 tokens of 4 × 33 in 2 × 33" in str(plan)
    assert {d.mask for d in plan.decisions if d.kind == "attention"} == {"causal, documents"}


# -- with other methods ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_blocks_are_chosen_within_texts():
    """Everything kept equals dense; sparse differs."""
    lengths = (150, 70, 260, 33)
    model, whole = made(), text(lengths)
    want = calls(model, whole, None, 260)
    options = {"stride": 8, "block": 64, "threshold": 1.0, "estimate": []}
    found = calls(packing(model, passes=["xattention"], xattention=options), whole, None, 260)
    torch.testing.assert_close(tokens_of(found.logits, whole), tokens_of(want.logits, whole), **CLOSE)
    assert [d.method for plan in found.plans for d in plan.decisions if d.kind == "attention"] == ["xattention"] * 2
    packing(model, passes=["xattention"], xattention={**options, "threshold": 0.3})
    sparse = calls(model, whole, None, 260)
    assert (tokens_of(sparse.logits, whole) - tokens_of(want.logits, whole)).abs().max() > 1e-2

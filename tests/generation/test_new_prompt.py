"""token_select with mode = "prompt": generate() gives what it gives over the chosen tokens alone, behind the caller's prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import sparsify
from sparsify import api
from sparsify.errors import UnsupportedError
from sparsify.generation.compat import CACHE_NAME
from tests.support import token_selection
from tests.support.harness import strict
from tests.support.tiny_models import VOCAB, build, spread_weights

LENGTH = 80
SELECT = {"layer": 1, "heads": [0, 3], "keep": 40, "window": 12, "sinks": 2, "queries": 6, "kernel": 3}
GREEDY = {"do_sample": False, "pad_token_id": 0}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def model():
    made = build("llama", layers=4)
    spread_weights(made)
    return made


def prompts(batch: int = 1, padding: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def chosen(model, prompt, select=SELECT) -> dict[str, torch.Tensor]:
    """The prompt that is read anew, by attention that eager layers write out. Rows with fewer tokens have padding in front."""
    positions = (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kept = token_selection.chosen(model, {**prompt, "position_ids": positions}, select)
    ids = torch.zeros(len(kept), max(map(len, kept)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, columns in enumerate(kept):
        ids[row, ids.shape[1] - len(columns) :] = prompt["input_ids"][row, columns]
        mask[row, ids.shape[1] - len(columns) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def compiled(model, select=SELECT, **options):
    return sparsify.compile(model, **strict(passes=["token_select", "dense"], token_select={**select, "mode": "prompt"}, **options))


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[0, -1:], -torch.inf)


HOW = {
    "greedy": {**GREEDY, "max_new_tokens": 6},
    "length": {**GREEDY, "max_length": LENGTH + 5},
    "sampled": {"do_sample": True, "pad_token_id": 0, "max_new_tokens": 6, "num_return_sequences": 2},
    "beams": {**GREEDY, "max_new_tokens": 4, "num_beams": 2},
    "processor": {**GREEDY, "max_new_tokens": 5, "logits_processor": LogitsProcessorList([Ban()])},
}


@pytest.mark.parametrize("how", [name if name == "greedy" else pytest.param(name, marks=pytest.mark.slow) for name in HOW])
@pytest.mark.parametrize("batch, padding", [(2, 15), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(1, 0), (2, 50)])])
def test_new_tokens_are_those_of_the_chosen_prompt(model, how, batch, padding):
    """In the last case a row has fewer tokens than are kept."""
    prompt, given = prompts(batch, padding), HOW[how]
    short = chosen(model, prompt)
    assert short["input_ids"].shape == (batch, 40)
    torch.manual_seed(0)
    length = {"max_length": short["input_ids"].shape[1] + 5} if how == "length" else {}
    want = model.generate(**short, **{**given, **length})[:, 40:]
    torch.manual_seed(0)
    dense = model.generate(**prompt, **given)[:, LENGTH:]
    compiled(model)
    torch.manual_seed(0)
    with api.collect_plans() as plans:
        found = model.generate(**prompt, **given)
    rows = found.shape[0] // batch
    assert torch.equal(found[:, :LENGTH], prompt["input_ids"].repeat_interleave(rows, 0))
    assert torch.equal(found[:, LENGTH:], want)
    assert not torch.equal(want, dense[:, : want.shape[1]])
    streams = [d for plan in plans for d in plan.decisions if d.kind == "stream"]
    assert [(d.method, d.sizes["kept"]) for d in streams] == [("token_select", "40")] and "are the prompt" in streams[0].reason
    assert sum(d.method == "dense" for plan in plans for d in plan.decisions if d.kind == "attention" and d.phase == "prefill") >= 4


OTHERS = [("gpt2", 1), ("llama", 3), ("gemma3", 1)]


@pytest.mark.parametrize("family, layer", [("opt", 2), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)])
def test_layers_that_could_not_be_narrowed_read_a_prompt(family, layer):
    """Learned positions, the last layer, sliding windows before and behind."""
    model, prompt, select = build(family, layers=4), prompts(2, 15), {**SELECT, "layer": layer}
    spread_weights(model)
    want = model.generate(**chosen(model, prompt, select), **HOW["greedy"])[:, 40:]
    dense = model.generate(**prompt, **HOW["greedy"])[:, LENGTH:]
    compiled(model, select)
    found = model.generate(**prompt, **HOW["greedy"])[:, LENGTH:]
    assert torch.equal(found, want) and not torch.equal(found, dense)


def test_a_layer_with_a_window_does_not_choose():
    model = compiled(build("gemma3", layers=4), {**SELECT, "layer": 2})
    with pytest.raises(UnsupportedError, match="layer 2 is one of sliding attention"):
        model.generate(**prompts(), **HOW["greedy"])


def test_by_position_and_without_a_mask(model):
    prompt = prompts()
    want = model.generate(**chosen(model, prompt), **HOW["greedy"])[:, 40:]
    compiled(model)
    assert torch.equal(model.generate(prompt["input_ids"], **HOW["greedy"])[:, LENGTH:], want)


def test_nothing_is_left_out_where_all_fit(model):
    prompt = prompts()
    want = model.generate(**prompt, **HOW["greedy"])
    compiled(model, {**SELECT, "keep": LENGTH})
    with api.collect_plans() as plans:
        assert torch.equal(model.generate(**prompt, **HOW["greedy"]), want)
    assert sum(d.method == "dense" for plan in plans for d in plan.decisions if d.phase == "prefill") == 4


REFUSED = {
    "a cache is given": lambda model: {CACHE_NAME: DynamicCache(config=model.config)},
    "a cache is asked for": lambda model: {"return_dict_in_generate": True},
    "min_length counts the prompt": lambda model: {"min_length": 90},
    "read in parts": lambda model: {"prefill_chunk_size": 30},
    "it is given position_ids": lambda model: {"position_ids": torch.arange(LENGTH)[None]},
}


@pytest.mark.parametrize("reason", [next(iter(REFUSED)), *(pytest.param(name, marks=pytest.mark.slow) for name in list(REFUSED)[1:])])
def test_what_cannot_follow_is_refused_and_whole(model, reason):
    prompt, more = prompts(), REFUSED[reason]
    want = model.generate(**prompt, **HOW["greedy"], **more(model))
    compiled(model)
    with pytest.raises(UnsupportedError, match=reason):
        model.generate(**prompt, **HOW["greedy"], **more(model))
    compiled(model, strict=False)
    found = model.generate(**prompt, **HOW["greedy"], **more(model))
    assert torch.equal(getattr(found, "sequences", found), getattr(want, "sequences", want))


def test_calls_of_the_model_alone_are_refused(model):
    prompt = prompts()
    with torch.no_grad():
        want = model(**prompt, use_cache=False).logits
        compiled(model)
        with pytest.raises(UnsupportedError, match="so by generate"):
            model(**prompt, use_cache=False)
        compiled(model, strict=False)
        torch.testing.assert_close(model(**prompt, use_cache=False).logits, want, rtol=1e-4, atol=5e-5)


def test_a_length_that_the_prompt_fills_is_an_error_as_without(model):
    prompt = prompts()
    with pytest.raises(ValueError, match="max_"):
        model.generate(**prompt, **GREEDY, max_length=LENGTH - 10)
    compiled(model)
    with pytest.raises(ValueError, match="max_"):
        model.generate(**prompt, **GREEDY, max_length=LENGTH - 10)

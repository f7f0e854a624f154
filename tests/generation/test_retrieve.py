"""sparsify.retrieve: piece after piece, what the question looks at is carried on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import sparsify
from benchmarks.lib.needles import stdlib_text
from sparsify.commands.eval import needles
from sparsify.errors import UnsupportedError
from tests.support import token_selection
from tests.support.harness import strict
from tests.support.tiny_models import VOCAB, build, spread_weights

SELECT = {"layer": 1, "heads": [0, 3], "keep": 40, "queries": 6, "sinks": 2, "kernel": 3}
DEMO = Path(__file__).parents[2] / "benchmarks" / "models" / "demo"

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model, select=SELECT, **options):
    return sparsify.compile(model, **strict(passes=["token_select", "dense"], token_select={**select, "mode": "prompt"}, **options))


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def by_hand(model, prompt, question, chunk, overlap):
    """The same by eager attention that is written out, from the definition."""
    asking = question.shape[1]
    select = {**SELECT, "window": asking, "queries": min(SELECT["queries"], asking)}
    carried: list[int] = []
    begin, total = 0, prompt.shape[1]
    while begin < total:
        end = min(total, begin + chunk - asking - len(carried))
        columns = [*carried, *range(begin, end)]
        if len(columns) > SELECT["keep"] - asking:
            (kept,) = token_selection.chosen(model, {"input_ids": torch.cat((prompt[:, columns], question), 1)}, select)
            columns = [columns[i] for i in kept if i < len(columns)]
        begin = end if end == total else end - overlap
        carried = columns if end == total else [column for column in columns if column < begin]
    return carried


@pytest.mark.parametrize("tokens, chunk, overlap, asking", [(300, 96, 8, 10), (300, 96, 0, 4), (97, 96, 8, 10), (20, 96, 8, 10)])
def test_equals_the_definition(tokens, chunk, overlap, asking):
    model, prompt, question = build("llama", layers=3), ids(tokens), ids(asking, seed=1)
    spread_weights(model)
    want = by_hand(model, prompt, question, chunk, overlap)
    compiled(model)
    lengths = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    last = []
    model.model.layers[2].register_forward_pre_hook(lambda module, args: last.append(args))
    found = sparsify.retrieve(model, prompt, question, chunk=chunk, overlap=overlap)
    handle.remove()
    assert found.columns.tolist() == want
    assert torch.equal(found.ids, torch.cat((prompt[:, want], question), 1))
    assert len(want) == min(tokens, 40 - asking) and max([0, *lengths]) <= chunk
    assert not last  # nothing runs behind the layer that chooses
    assert found.chunks == max(1, len(lengths)) and (found.chunks > 3) == (tokens == 300)


def test_what_cannot_be_served():
    model, prompt, question = build("llama", layers=3), ids(300), ids(10)
    with pytest.raises(UnsupportedError, match="not compiled to choose"):
        sparsify.retrieve(model, prompt, question)
    sparsify.compile(model, **strict(passes=["token_select", "dense"], token_select=SELECT))
    with pytest.raises(UnsupportedError, match="not compiled to choose"):
        sparsify.retrieve(model, prompt, question)
    compiled(model)
    with pytest.raises(UnsupportedError, match="30 that are carried, 10 of the question and 8 new ones, 64 of them again"):
        sparsify.retrieve(model, prompt, question, chunk=48)
    with pytest.raises(ValueError, match="question: expected tokens of one row"):
        sparsify.retrieve(model, prompt, question.float())
    with pytest.raises(ValueError, match=r"prompt: expected tokens of one row, .* not torch.int64 \[2, 300\]"):
        sparsify.retrieve(model, prompt.repeat(2, 1), question)


@pytest.mark.slow
@torch.no_grad()
def test_facts_in_a_text_that_is_longer_than_the_model():
    """A trained model with 16 384 positions, asked for facts anywhere in 40 000 bytes."""
    model = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    text = stdlib_text(1 << 17)
    sparsify.compile(
        model,
        passes=["token_select", "dense"],
        token_select={"mode": "prompt", "layer": 3, "heads": "all", "keep": 1024, "kernel": 31},
        lower="eager",
        strict=True,
    )
    right = []
    for seed in range(6):
        item = needles.prompt(40000, text, needles.FIRST_SEED + seed, needles=8, asks=1)
        (answer, size), start = item.answers[0], item.questions[0]
        found = sparsify.retrieve(model, item.ids[:, :start], item.ids[:, start:answer], chunk=8192)
        assert found.ids.shape[1] == 1024 and found.chunks == 6
        made = model.generate(found.ids, max_new_tokens=size, do_sample=False, pad_token_id=0)[0, found.ids.shape[1] :]
        right.append(torch.equal(made, item.ids[0, answer : answer + size]))
    assert sum(right) >= 5

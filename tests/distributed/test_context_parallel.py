"""Models whose prompts are divided: each process returns what one process returns, and keeps its part of the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sparsify.distributed import agreement
from sparsify.distributed.shards import Shard
from sparsify.errors import UnsupportedError
from sparsify.generation.regions.context_parallel import DividedCalls
from tests.support import context_parallel, processes
from tests.support.cache_reference import left_padded, text
from tests.support.tiny_models import build

METHODS = {
    "dense": {"passes": ["dense"]},
    "xattention": {"passes": ["xattention", "dense"], "xattention": {"threshold": 0.1}},
    "density": {"passes": ["xattention", "dense"], "xattention": {"density": 0.2}},
    "sink_window": {"passes": ["sink_window", "dense"], "sink_window": {"sinks": 2, "window": 40}},
    "minference": {"passes": ["minference", "dense"], "minference": {"columns": 128, "diagonals": 0, "queries": 16}},
}


def cases(length: int, names: list[str], *more: dict) -> dict:
    masks = (None, left_padded([length, length - 61]))
    return {
        f"{name} {mask is not None} {options}": (text(2, length), mask, METHODS[name], options)
        for name in names
        for mask in masks
        for options in more
    }


def compare_prompts(count: int, family: str, given: dict, **overrides) -> dict:
    want = context_parallel.prompts(family, given, False, overrides)
    for name, case in given.items():  # each within the processes' patience
        for found in processes.run(count, context_parallel.prompts, family, {name: case}, True, overrides):
            logits, methods = found[name]
            mask = case[1]
            real = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask.bool()[:, -logits.shape[1] :]
            torch.testing.assert_close(logits[real], want[name][0][real], atol=3e-5, rtol=1e-4, msg=lambda t, name=name: f"{name}: {t}")
            assert methods == want[name][1]
    return want


@pytest.mark.slow
@pytest.mark.parametrize("count, length", [(2, 700), (4, 1100)])
def test_a_prompt_gives_what_one_process_gives(count, length):
    last = {"logits_to_keep": 3}  # which rows' logits are wanted is no matter of the method
    want = compare_prompts(count, "llama", cases(length, list(METHODS), {}) | cases(length, ["xattention"], last))
    dense, others = want["dense False {}"][0], [want[f"{name} False {{}}"][0] for name in METHODS if name != "dense"]
    assert all((one - dense).abs().max() > 1e-2 for one in others)


@pytest.mark.slow
@pytest.mark.parametrize("family, overrides", [("qwen3", {}), ("llama", {"num_key_value_heads": 4}), ("mistral_window", {})])
def test_families(family, overrides):
    compare_prompts(2, family, cases(601, ["dense"] if overrides == {} else ["xattention"], {}), **overrides)


@pytest.mark.slow
@pytest.mark.parametrize("length", [16, 129, 260])
def test_short_and_uneven_prompts(length):
    compare_prompts(4, "llama", {"dense": (text(1, length), None, METHODS["dense"], {})})


@pytest.mark.slow
@pytest.mark.parametrize("count, length", [(2, 700), (4, 1100)])
def test_generated_tokens_are_those_of_one_process(count, length):
    given = cases(length, ["dense", "xattention"], {}, {"do_sample": True})
    want = context_parallel.tokens("llama", given, False, {})
    for name, case in given.items():
        found = processes.run(count, context_parallel.tokens, "llama", {name: case}, True, {})
        assert all(torch.equal(one[name][0], want[name][0]) for one in found), name
        kept = torch.tensor([one[name][1] for one in found])
        assert kept.sum(0).tolist() == want[name][1]  # every token is kept by one process
        assert (kept < length).all()


REFUSED = {
    "a cache that the model makes": {"use_cache": True},
    "a cache that is no SparseCache": {"past_key_values": DynamicCache()},
    "labels": {"labels": torch.zeros(1, 8, dtype=torch.long)},
    "hidden states": {"output_hidden_states": True},
    "four dimensions": {"attention_mask": torch.ones(1, 1, 8, 8)},
    "return_dict=False": {"return_dict": False},
    "logits_to_keep as a tensor": {"logits_to_keep": torch.tensor([7])},
    "neither input_ids nor": {"input_ids": None},
}


@pytest.mark.parametrize("what", REFUSED)
@torch.no_grad()
def test_what_is_not_served_is_refused_before_anything_runs(what, monkeypatch):
    monkeypatch.setattr(agreement, "agree", lambda *args, **kwargs: None)
    calls = DividedCalls(build("llama", layers=1), Shard(0, 1, "alone"))
    given = {"input_ids": torch.zeros(1, 8, dtype=torch.long), **REFUSED[what]}
    with pytest.raises(UnsupportedError, match=what):
        calls(lambda **kwargs: pytest.fail("ran"), (), given)

"""Models that transformers' tensor parallelism divides: each process gives what one process gives, whatever methods and caches act."""

from __future__ import annotations

import pytest
import torch

from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import provenance_of
from tests.support import processes, tensor_parallel
from tests.support.cache_reference import left_padded, text

LENGTH = 200
THRESHOLDS = ((0.1, 0.3, 0.6, 1.0), (0.9, 0.2, 0.5, 0.5))
XATTENTION = {"block": 64, "stride": 16, "estimate": []}
BY_HEAD = {"passes": ["xattention"], "xattention": {**XATTENTION, "threshold": THRESHOLDS[0]}}
METHODS = {
    "dense": {"passes": ["dense"]},
    "xattention": {"passes": ["xattention"], "xattention": {"block": 64, "threshold": 0.5}},
    "thresholds": BY_HEAD,
    "windows": {"passes": ["xattention"], "xattention": {**XATTENTION, "threshold": 0.5, "windows": (0, 30, 0, 50)}},
    "sink_window": {"passes": ["sink_window"], "sink_window": {"sinks": 2, "window": 40}},
    "window_by_head": {"passes": ["sink_window"], "sink_window": {"sinks": 2, "window": (40, 0, 64, 20)}},
}
MASKS = {"": None, " padded": left_padded([LENGTH, LENGTH - 61])}
CACHES = {
    "own": ({"passes": ["dense"]}, None),
    "sampled": ({"passes": ["dense"]}, None),
    "full": ({"passes": ["dense", "kv_evict"]}, {"policy": "full", "budget": 64}),
    "snapkv": ({"passes": ["dense", "kv_evict"]}, {"policy": "snapkv", "budget": 48, "window": 8}),
    "every": ({"passes": ["dense", "kv_evict"]}, {"policy": "snapkv", "budget": 48, "window": 8, "every": 5}),
    "streaming_llm": ({"passes": ["sink_window", "kv_evict"], "sink_window": {"window": 40}}, {"policy": "streaming_llm", "budget": 48}),
    "pages": ({"passes": ["dense", "kv_evict"]}, {"policy": "full", "budget": 64, "read": "pages"}),
    "int4": ({"passes": ["dense", "kv_evict"]}, {"policy": "full", "budget": 256, "dtype": "int4"}),
}


def _compare(function: str, family: str, cases: dict, count: int = 2, alike: bool = True, **overrides):
    want = tensor_parallel.all_of(function, family, cases, False, overrides)
    for found in processes.run(count, tensor_parallel.all_of, function, family, cases, True, overrides):
        for name, (got, plans) in found.items():
            if alike:
                assert plans == want[name][1], name
            if got.is_floating_point():
                if (mask := cases[name][1]) is not None:  # rows of padding are anybody's
                    got, wanted = got[mask.bool()], want[name][0][mask.bool()]
                else:
                    wanted = want[name][0]
                torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
            else:
                assert torch.equal(got, want[name][0]), name
    return want


def _prompts(names) -> dict:
    return {name + padding: (text(2, LENGTH), mask, METHODS[name]) for name in names for padding, mask in MASKS.items()}


@pytest.mark.slow
def test_a_prompt_gives_what_one_process_gives():
    want = _compare("outcome", "llama", _prompts(METHODS))
    for name, options in METHODS.items():
        assert [methods for _, methods in want[name][1]] == [options["passes"] * 2]
    assert {capture for _, plans in want.values() for capture, _ in plans} == {"one region for 2 layers"}
    logits = {name: found for name, (found, _) in want.items()}
    sparse = [name for name in METHODS if name != "dense"]
    assert all((logits[name] - logits["dense"]).abs().max() > 1e-2 for name in sparse)  # the methods do something


@pytest.mark.slow
@pytest.mark.parametrize("family, overrides", [("qwen3", {}), ("llama", {"num_key_value_heads": 4}), ("mistral_window", {})])
def test_families_and_groups_of_heads(family, overrides):
    _compare("outcome", family, _prompts(["dense"] if family == "mistral_window" else ["thresholds", "window_by_head"]), **overrides)


@pytest.mark.slow
def test_four_processes_with_a_head_each():
    # a process whose head sees all keys has nothing to do for sink_window
    _compare("outcome", "llama", _prompts(["thresholds", "window_by_head"]), 4, False, num_key_value_heads=4)


@pytest.mark.slow
def test_layers_that_are_divided_otherwise_are_captured_whole():
    cases = _prompts(["thresholds"])
    for found in processes.run(2, tensor_parallel.all_of, "outcome", "olmo2", cases, True, {}):
        assert "is divided as" in found["thresholds"][1][0][0]
    _compare("outcome", "olmo2", cases, 2, False)


@pytest.mark.slow
def test_captured_whole():
    cases = {name: (*case, True) for name, case in _prompts(["thresholds"]).items()}
    _compare("outcome", "llama", cases)


@pytest.mark.slow
def test_a_plan_file_holds_all_heads(tmp_path):
    decisions = [
        Decision(f"model.layers.{layer}.self_attn", layer, "", {}, "", "xattention", {**XATTENTION, "threshold": list(THRESHOLDS[layer])})
        for layer in range(2)
    ]
    made_for = provenance_of(tensor_parallel.whole("llama"), measured=True)  # with weights that no process has as a whole
    Plan(decisions, provenance=made_for).save(tmp_path / "plan.json")
    plan = {"plan": str(tmp_path / "plan.json")}
    _compare("outcome", "llama", {"regions": (text(2, LENGTH), None, plan), "whole": (text(2, LENGTH), None, plan, True)})


@pytest.mark.slow
def test_generated_tokens_are_those_of_one_process():
    cases = {
        name + padding: (text(2, LENGTH), mask, options, cache)
        for name, (options, cache) in CACHES.items()
        for padding, mask in MASKS.items()
    }
    want = _compare("tokens", "llama", cases)
    assert all("kv_evict" in methods for name, (_, methods) in want.items() if CACHES[name.split()[0]][1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_token_takes_two_sums_a_layer(family):
    """Beside these the sum of the embedding's parts, and what gathers the logits: both are of transformers' plan."""
    for found in processes.run(2, tensor_parallel.collectives, family, {}):
        taken = {name.removeprefix("_c10d_functional::"): count for name, count in found.items() if name.startswith("_c10d_functional::")}
        taken.pop("_wrap_tensor_autograd", None)
        assert taken == {"all_reduce": 2 * 2 + 1, "all_gather_into_tensor": 1}
        assert found.get("c10d::monitored_barrier_", 0) == 0  # what processes compare, they compare once a prompt

"""Layers that differ in their heads' thresholds, or columns and diagonals, alone share a region, which takes them as operands."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsify
from sparsify import api
from sparsify.ops.patterns import ALWAYS
from sparsify.ops.selection import observing
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from sparsify.planning.saved_plan import SavedPlan
from tests.support.harness import strict
from tests.support.tiny_models import VOCAB, build

THRESHOLDS = ([0.1, 0.3, 0.6, 1.0], [0.9, 0.2, 0.2, 0.5], [0.0, 0.4, 0.8, 0.1])
IDS = torch.randint(3, VOCAB, (1, 400), generator=torch.Generator().manual_seed(0))


PATTERNS = (([0, 64, 400, 0], [64, 0, 0, 128], [0, 0, 0, 64]), ([64, 400, 0, 0], 64, [0, 0, 64, 0]), ([0, 0, 0, 300], [0, 320, 64, 0], 64))
EACH = {"xattention": "threshold", "minference": "columns"}


# of xattention's heads: the layers differ in which of them have one
BY_HEAD = ([[], [64, 0], [], [0, 128]], [[128, 0], [], [0, 64], []], [[], [], [64, 64], []])


def saved(path, method: str = "xattention", beside: str = "") -> str:
    """A plan in which each layer has numbers of its heads, errors and an expected density of its own."""
    decisions = []
    for layer in range(3):
        options = {"block": 64, "stride": 16, "estimate": [], "threshold": THRESHOLDS[layer], "expected": [0.1 * (layer + 1), 0.5]}
        if beside == "windows":
            options["windows"] = [0, 0, 0, 50]
        if beside == "patterns":
            options |= {"patterns": BY_HEAD[layer], "queries": 8}
        if method == "minference":
            options = {"block": 64, "queries": 8, **dict(zip(("columns", "diagonals", "blocks"), PATTERNS[layer], strict=True))}
        measured = [{"method": method, "options": options, "error": 0.01 * layer}]
        decisions.append(Decision(f"model.layers.{layer}.self_attn", layer, "", {}, "", method, options, measured=measured))
    Plan(decisions).save(path)
    return str(path)


@pytest.mark.parametrize("method, beside", [("xattention", "patterns"), ("xattention", ""), ("xattention", "windows"), ("minference", "")])
@torch.no_grad()
@pytest.mark.samples(2)
def test_one_region_serves_layers_with_other_numbers(tmp_path, method, beside):
    model = build("llama", layers=3)
    options = strict(plan=saved(tmp_path / "plan.json", method, beside))
    results, plans = {}, {}
    for whole in (True, False):
        one = copy.deepcopy(model)
        sparsify.compile(one, whole=whole, **options)
        with api.collect_plans() as found:
            results[whole] = one(input_ids=IDS, use_cache=False).logits
        plans[whole] = found
        torch._dynamo.reset()
    (plan,) = plans[False]
    assert plan.capture == "one region for 3 layers"
    wanted = THRESHOLDS if method == "xattention" else [columns for columns, *_ in PATTERNS]
    assert [decision.options[EACH[method]] for decision in plan.decisions] == list(wanted)
    assert [decision.method for decision in plan.decisions] == [method] * 3
    torch.testing.assert_close(results[False], results[True], atol=1e-5, rtol=1e-5)
    dense = model(input_ids=IDS, use_cache=False).logits
    assert (results[False] - dense).abs().max() > 1e-3
    alike = copy.deepcopy(model)  # the same with the first layer's numbers for all: they matter
    sparsify.compile(alike, **strict(passes=[method], **{method: plan.decisions[0].options}))
    assert (alike(input_ids=IDS, use_cache=False).logits - results[False]).abs().max() > 1e-4
    torch._dynamo.reset()


@torch.no_grad()
def test_lists_are_as_large_as_any_layer_of_a_region_may_need(tmp_path, monkeypatch):
    """Whether one op makes and uses them follows from the room that they have in all layers, not from what the first one's heads visit."""
    widths, lists = [], []
    monkeypatch.setattr("sparsify.passes.minference.lists_are_large", lambda site, block, *width: widths.append(width) is not None)
    options = {"columns": [64, 0, 0, 0], "diagonals": [128, 64, 0, 0], "block": 64, "queries": 8}
    decisions = [
        Decision(f"model.layers.{i}.self_attn", i, "", {}, "", "minference", {**options, "columns": [columns, 0, 0, 0]})
        for i, columns in enumerate((64, 128, 64))
    ]
    Plan(decisions).save(tmp_path / "plan.json")
    model = build("llama", layers=3)
    sparsify.compile(model, **strict(plan=str(tmp_path / "plan.json")))
    with observing(lambda call, counts, indices: lists.append(call)):
        model(input_ids=IDS, use_cache=False)
    torch._dynamo.reset()
    assert widths[-1] == (4 + ALWAYS,) and {call.room + ALWAYS for call in lists} == {4 + ALWAYS}


@torch.no_grad()
def test_one_threshold_of_a_plan_is_one_for_all_heads(tmp_path):
    options = {"block": 64, "stride": 16, "estimate": [], "threshold": [0.3]}
    Plan([Decision(f"model.layers.{i}.self_attn", i, "", {}, "", "xattention", options) for i in range(3)]).save(tmp_path / "plan.json")
    model = build("llama", layers=3)
    sparsify.compile(model, **strict(plan=str(tmp_path / "plan.json"), lower="eager"))
    with api.collect_plans() as found:
        model(input_ids=IDS, use_cache=False)
    assert [decision.method for decision in found[0].decisions] == ["xattention"] * 3
    torch._dynamo.reset()


def test_sites_of_one_path_keep_thresholds_apart():
    """Operands are told by the path, so that two sites of one have constants, and layers that differ in them are two kinds."""
    decisions = [
        Decision(f"layers.{i}.mix", i, "", {}, "", "xattention", {"threshold": [0.1 * (i + 1), 0.5]}, ordinal=ordinal)
        for i in range(2)
        for ordinal in range(2)
    ]
    plan = SavedPlan(Plan(decisions), "p")
    assert plan.head_numbers("layers.0") == {}
    assert plan.decisions_in("layers.0") != plan.decisions_in("layers.1")
    alone = SavedPlan(Plan(decisions[::2]), "p")
    assert alone.head_numbers("layers.1") == {(".mix", "threshold"): (0.2, 0.5)}
    assert alone.decisions_in("layers.0") == alone.decisions_in("layers.1")


def test_layers_of_patterns_are_of_one_kind_where_their_lists_need_about_as_much_room():
    decide = lambda i, options: Decision(f"layers.{i}.mix", i, "", {}, "", "minference", options)
    given = ({"columns": [256, 0], "diagonals": [128, 512]}, {"columns": [0, 384], "diagonals": 0}, {"columns": [0, 640], "diagonals": 0})
    plan = SavedPlan(Plan([decide(i, options) for i, options in enumerate(given)]), "p")
    assert plan.head_numbers("layers.0") == {(".mix", "columns"): (2, 0), (".mix", "diagonals"): (1, 4)}
    assert plan.head_numbers("layers.1") == {(".mix", "columns"): (0, 3), (".mix", "diagonals"): (0, 0)}
    assert plan.decisions_in("layers.0") == plan.decisions_in("layers.1") != plan.decisions_in("layers.2")
    by_block = SavedPlan(Plan([decide(0, given[1] | {"blocks": [0, 128]}), decide(1, given[1])]), "p")
    assert by_block.head_numbers("layers.0")[".mix", "blocks"] == (0, 1)
    assert by_block.decisions_in("layers.0") != by_block.decisions_in("layers.1")  # one makes a table of what query blocks choose

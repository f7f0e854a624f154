"""Layers that differ in their heads' thresholds alone share a region, which takes them as operands."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsify
from sparsify import api
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from tests.support.harness import strict
from tests.support.tiny_models import VOCAB, build

THRESHOLDS = ([0.1, 0.3, 0.6, 1.0], [0.9, 0.2, 0.2, 0.5], [0.0, 0.4, 0.8, 0.1])
IDS = torch.randint(3, VOCAB, (1, 400), generator=torch.Generator().manual_seed(0))


def saved(path, windows: bool = False) -> str:
    """A plan in which each layer has thresholds, errors and an expected density of its own."""
    decisions = []
    for layer, thresholds in enumerate(THRESHOLDS):
        options = {"block": 64, "stride": 16, "estimate": [], "threshold": thresholds, "expected": [0.1 * (layer + 1), 0.5]}
        if windows:
            options["windows"] = [0, 0, 0, 50]
        measured = [{"method": "xattention", "options": options, "error": 0.01 * layer}]
        decisions.append(Decision(f"model.layers.{layer}.self_attn", layer, "", {}, "", "xattention", options, measured=measured))
    Plan(decisions).save(path)
    return str(path)


@pytest.mark.parametrize("windows", [False, True])
@torch.no_grad()
def test_one_region_serves_layers_with_other_thresholds(tmp_path, windows):
    model = build("llama", layers=3)
    options = strict(plan=saved(tmp_path / "plan.json", windows))
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
    assert [decision.options["threshold"] for decision in plan.decisions] == list(THRESHOLDS)
    assert [decision.method for decision in plan.decisions] == ["xattention"] * 3
    torch.testing.assert_close(results[False], results[True], atol=1e-5, rtol=1e-5)
    dense = model(input_ids=IDS, use_cache=False).logits
    assert (results[False] - dense).abs().max() > 1e-3
    alike = copy.deepcopy(model)  # the same with the first layer's thresholds for all: they matter
    sparsify.compile(alike, **strict(passes=["xattention"], xattention=plan.decisions[0].options))
    assert (alike(input_ids=IDS, use_cache=False).logits - results[False]).abs().max() > 1e-4
    torch._dynamo.reset()

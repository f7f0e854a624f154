"""Vision towers beside a decoder: their layers are regions, and run as they are where none serves them."""

from __future__ import annotations

import pytest
import torch

import sparsify
from sparsify import api
from tests.support.harness import strict
from tests.support.image_selection import build, prompt

LENGTH = 30


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tower_sites(plans):
    """Sites of attention that is not causal."""
    return [d for plan in plans for d in plan.decisions if d.kind == "attention" and d.mask == "none"]


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
@torch.no_grad()
def test_attention_of_a_tower_is_rewritten(family):
    """CLIP's layers, one region for all; and patches of an image in one row, whose bounds are read while the layer runs."""
    model = build(family, layers=2)
    given = prompt(model, LENGTH)
    want = model(**given, use_cache=False).logits
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        found = [model(**given, use_cache=False).logits for _ in range(2)]
    for logits in found:
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
    assert [d.method for d in tower_sites(plans)] == ["dense"] * 2
    causal = [d for plan in plans for d in plan.decisions if d.kind == "attention" and d.mask == "causal"]
    assert [d.method for d in causal] == ["dense"] * 2
    if family == "llava":
        assert [d.site for d in tower_sites(plans)] == [f"model.vision_tower.encoder.layers.{n}.self_attn" for n in range(2)]


@pytest.mark.slow
@torch.no_grad()
def test_a_tower_beside_a_decoder_whose_masks_cannot_be_read():
    model = build("gemma3", layers=2)
    given = prompt(model, LENGTH)
    want = model(**given, use_cache=False).logits
    sparsify.compile(model, passes=["dense"], lower="eager", min_length=0)
    with api.collect_plans() as plans:
        torch.testing.assert_close(model(**given, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
    assert [d.method for d in tower_sites(plans)] == ["dense"] * 2


@pytest.mark.slow
@torch.no_grad()
def test_many_images_in_one_row_run_as_they_are():
    model = build("qwen2_5_vl", layers=2)
    model.config.vision_config.window_size = model.model.visual.window_size = 16  # of one merged patch: as many texts as image tokens
    model.model.visual.fullatt_block_indexes = []
    given = prompt(model, LENGTH)
    want = model(**given, use_cache=False).logits
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        torch.testing.assert_close(model(**given, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
    assert tower_sites(plans) == []


@pytest.mark.slow
@torch.no_grad()
def test_a_tower_with_hooks_inside_of_its_layers_runs_as_it_is():
    model = build("llava", layers=2)
    given = prompt(model, LENGTH)
    seen = []
    layer = model.model.vision_tower.encoder.layers[0]
    layer.mlp.register_forward_hook(lambda module, args, result: seen.append(result))
    want = model(**given, use_cache=False).logits
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        torch.testing.assert_close(model(**given, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
    assert tower_sites(plans) == [] and len(seen) == 2


@pytest.mark.slow
@torch.no_grad()
def test_hooks_around_a_towers_layer_are_called():
    model = build("llava", layers=3)
    given = prompt(model, LENGTH)
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        before = model(**given, use_cache=False).logits
    assert sum(len(plan.rewritten) for plan in plans) >= 6
    layer = model.model.vision_tower.encoder.layers[0]
    layer.register_forward_hook(lambda module, args, result: result * 2)
    changed = model(**given, use_cache=False).logits
    model._compiled_call_impl = None
    want = model.forward(**given, use_cache=False).logits
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_plan_of_the_decoder_alone_leaves_the_tower_as_it_is(tmp_path):
    """And one that was explained of both is followed in both, what goes on included."""
    model = build("llava", layers=3)
    given = prompt(model, LENGTH)
    options = {"passes": ["divprune", "dense"], "divprune": {"keep": 0.25}}
    sparsify.compile(model, **strict(**options))
    plan = sparsify.explain(model, **given, use_cache=False, options={**options, "min_length": 0})
    assert [d.site for d in plan.decisions if d.kind == "stream" and d.method == "divprune"] == ["model.language_model.layers"]
    want = model(**given, use_cache=False).logits
    for towers in (True, False):
        plan.decisions = [d for d in plan.decisions if towers or "vision" not in d.site]
        plan.save(tmp_path / f"{towers}.json")
        sparsify.compile(model, plan=str(tmp_path / f"{towers}.json"), lower="eager", strict=True)
        with api.collect_plans() as plans:
            found = model(**given, use_cache=False).logits
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert len(tower_sites(plans)) == 3 * towers

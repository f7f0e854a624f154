"""Vision towers beside a decoder: their layers are regions, and run as they are where none serves them."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparsify
from sparsify import api, pipeline
from sparsify.generation.regions import documents, layers
from tests.support.harness import strict
from tests.support.image_selection import build, prompt, with_tokens

LENGTH = 30

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


def pictures(model, *sizes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with images of these widths and heights, in pixels, as the model's own processor cuts them up."""
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    vision, draw = model.config.vision_config, torch.Generator().manual_seed(seed)
    patch, merge = vision.patch_size, vision.spatial_merge_size
    kept = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": vision.temporal_patch_size}
    processor = pil.Qwen2VLImageProcessorPil(**kept, min_pixels=(patch * merge) ** 2, max_pixels=1 << 20)
    images = [torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8).numpy() for width, height in sizes]
    given = dict(processor(images=images, return_tensors="pt"))
    text = lambda count: torch.randint(3, 100, (count,), generator=draw)
    ids = [text(3)]
    for grid in given["image_grid_thw"].tolist():
        ids += [torch.full((math.prod(grid) // merge**2,), model.config.image_token_id), text(2)]
    return with_tokens(model, given, torch.cat(ids)[None])


# one image of few windows, of many, of other shapes; several together, of which one is smaller than a window
SIZES = [[(128, 96)], [(320, 240)], [(240, 320), (16, 48)], [(96, 208), (128, 96), (64, 64)], [(64, 64)], [(32, 32)] * 10]


def looked_at(plans):
    """Sites of towers by path, with mask and method, graph by graph."""
    return [[(d.site, d.mask, d.method) for d in plan.decisions if "visual" in d.site] for plan in plans]


@torch.no_grad()
def test_windows_of_images_are_documents_of_one_attention():
    """However many there are of them: one graph for all shapes of images, beside one for layers that see a single image whole."""
    model = build("qwen2_5_vl", layers=2)
    model.model.visual.window_size, model.model.visual.fullatt_block_indexes = 64, [1]  # 8 x 8 patches, as published
    prompts = [pictures(model, *sizes) for sizes in SIZES]
    want = [model(**given, use_cache=False).logits for given in prompts]
    sparsify.compile(model, **strict(passes=["dense"]))
    with api.collect_plans() as plans:
        found = [model(**given, use_cache=False).logits for given in prompts]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    sites = lambda mask: [(f"model.visual.blocks.{number}.attn", mask, "dense") for number in range(2)]
    assert looked_at(plans) == [sites("documents"), sites("none"), []] and len(plans) == 3
    assert [len({*_windows(given)}) for given in prompts] == [4, 20, 21, 13, 1, 10]


def _windows(given):
    """The image and the window of each patch, of 8 x 8 patches."""
    for image, (_, height, width) in enumerate(given["image_grid_thw"].tolist()):
        for y in range(0, height, 8):
            yield from ((image, y, x) for x in range(0, width, 8))


@pytest.mark.slow
@pytest.mark.parametrize("family, lower", [("qwen2_vl", "eager"), ("qwen3_vl", "eager"), ("qwen2_5_vl", "inductor")])
@torch.no_grad()
def test_several_images_in_one_row(family, lower):
    """And where gradients could be asked for."""
    model = build(family, layers=2)
    prompts = [pictures(model, *sizes) for sizes in ([(96, 64)] * 9, [(64, 128), (96, 96)], [(96, 64)])]
    want = [model(**given, use_cache=False).logits for given in prompts]
    sparsify.compile(model, **strict(passes=["dense"], lower=lower))
    with api.collect_plans() as plans:
        found = [model(**given, use_cache=False).logits for given in prompts]
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    masks = {mask for sites in looked_at(plans) for _, mask, method in sites if method == "dense"}
    assert masks == {"documents", "none"}
    with torch.enable_grad():
        torch.testing.assert_close(model(**prompts[0], use_cache=False).logits, want[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("why", ["it is ruled out", "it failed"])
@torch.no_grad()
def test_documents_that_nothing_rewrites_are_not_attended_by_a_mask(caplog, monkeypatch, why):
    """A mask that is written out takes the square of all patches: such a tower goes on text by text, from the first call on."""
    model = build("qwen2_5_vl", layers=2)
    model.model.visual.window_size, model.model.visual.fullatt_block_indexes = 64, []
    given = pictures(model, (128, 320))
    want = model(**given, use_cache=False).logits
    compile_graph, rewrite_graph, ran = pipeline.compile_graph, pipeline.rewrite_graph, []

    def counting(*args, serves, **how):
        compiled = compile_graph(*args, serves=serves, **how)
        return lambda *inputs: (ran.append(serves[0]), compiled(*inputs))[1]

    def failing(gm, *args, **how):
        plan, *graphs = rewrite_graph(gm, *args, **how)
        if any("visual" in one.site for one in plan.decisions):
            raise RuntimeError("of the tower alone")
        return plan, *graphs

    monkeypatch.setattr(pipeline, "compile_graph", counting)
    rules = [{"layers": "model.visual.*", "method": []}] if why == "it is ruled out" else []
    if not rules:
        monkeypatch.setattr(pipeline, "rewrite_graph", failing)
    sparsify.compile(model, passes=["dense"], rules=rules, lower="eager", min_length=0)
    told = contextlib.nullcontext() if rules else pytest.warns(UserWarning, match="of the tower alone")
    with caplog.at_level("INFO", "sparsify.generation.regions.towers"), api.collect_plans() as plans:
        with told:
            torch.testing.assert_close(model(**given, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
        first = looked_at(plans)
        torch.testing.assert_close(model(**given, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
    sites = [(f"model.visual.blocks.{number}.attn", "documents", None) for number in range(2)] if rules else []
    assert looked_at(plans) == first == [sites, []] and "attend to texts one after the other" in caplog.text
    assert len(ran) == 4 and not any("visual" in path for path in ran)


class _Layer(nn.Module):
    """A layer of a tower that takes bounds for kernels of variable lengths; shift: that it gives these others."""

    def __init__(self, shift: int = 0):
        super().__init__()
        self.is_causal, self.config, self.shift = False, _Config(), shift

    def forward(self, hidden_states, cu_seqlens=None):
        rows = hidden_states.view(1, 1, -1, hidden_states.shape[1])
        if "flash" in self.config._attn_implementation:
            bounds = cu_seqlens + self.shift
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            out = attend(self, rows, rows, rows, None, scaling=1.0, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)[0]
        else:
            parts = rows.split((cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), 2)
            out = torch.cat([F.scaled_dot_product_attention(part, part, part, scale=1.0) for part in parts], 2).transpose(1, 2)
        return hidden_states + out.reshape(hidden_states.shape)


class _Config:
    _attn_implementation_internal = "sdpa"

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal


@pytest.mark.parametrize("rows", [2, 5, 40])
@pytest.mark.parametrize("bounds", [[0, 40], [0, 16, 40]])
def test_a_layer_is_run_over_few_rows_in_both_ways_first(rows, bounds):
    hidden, given = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)), {"cu_seqlens": torch.tensor(bounds)}
    for shift in (0, 1):
        tower = nn.Module()
        tower.layers = nn.ModuleList([_Layer(shift)])
        (layer,) = layers.find_towers(tower, [], documents.told)
        assert documents.serve(layer, hidden, given) == (shift == 0 or len(bounds) == 2)
        assert layer.module.config._attn_implementation == "sdpa"  # it stays the model's own
    assert not documents.serve(layer, hidden, {}) and not documents.serve(layer, hidden[None], given)


def test_what_is_no_attention_of_texts_by_themselves_is_refused():
    rows, bounds = torch.randn(1, 1, 6, 4), torch.tensor([0, 2, 6])
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    assert documents.attend(nn.Module(), rows, rows, rows, None, **given, is_causal=False)[0].shape == (1, 6, 1, 4)
    for wrong in ({}, {**given, "cu_seq_lens_k": bounds + 0}, {**given, "is_causal": True}):
        with pytest.raises(layers.NotShared):
            documents.attend(nn.Module(), rows, rows, rows, None, **wrong)
    with pytest.raises(layers.NotShared):
        documents.attend(nn.Module(), rows, rows, rows, torch.ones(6, 6, dtype=torch.bool), **given)


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

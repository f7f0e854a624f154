"""Patterns by head: what is measured of columns and diagonals, what is chosen for heads that look near or at given tokens, and the plan."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import sparsify
from sparsify import api
from sparsify.commands import main as cli
from sparsify.commands.calibrate.attention import refine
from sparsify.commands.calibrate.attention import run as runs
from sparsify.commands.calibrate.attention import settings as tried
from sparsify.commands.calibrate.attention.capture import Capture, Captured
from sparsify.commands.calibrate.attention.choose import DENSE, Budget, Choice, Chooser
from sparsify.commands.calibrate.attention.make_plan import choose_shared, kinds, make_plan, method_of
from sparsify.commands.calibrate.attention.measure import measure, possible_blocks
from sparsify.commands.cost import device as forecast_device
from sparsify.costs.sizes import AttentionSizes
from sparsify.errors import ConfigError, PlanError, UnsupportedError
from sparsify.ops.selection import SelectCall
from sparsify.passes.minference import MOST
from sparsify.planning.config import config
from sparsify.planning.decision import Place
from sparsify.planning.plan import Plan
from sparsify.planning.registry import discover
from tests.support.harness import strict
from tests.support.patterns import BLOCK, chosen_blocks, masked
from tests.support.tiny_models import VOCAB, build, build_sharp

LENGTHS = (256, 512)
IDS = torch.randint(3, VOCAB, (1, 1400), generator=torch.Generator().manual_seed(0))
OPTIONS = {"minference": {"block": BLOCK, "queries": 16, "columns": [0, 64, 128], "diagonals": [0, 64, 192], "blocks": [64, 128]}}
H200 = forecast_device.named("h200")
GRID = tried.pattern_grid(OPTIONS)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_sharp()


ASKED = runs.Asked(GRID, LENGTHS, 1, 0)


@pytest.fixture(scope="module")
def measured(model) -> runs.Measured:
    return runs.run(model, IDS, ASKED, OPTIONS)


@pytest.fixture(scope="module")
def chooser(measured) -> Chooser:
    return Chooser(GRID, measured, H200, "hopper", at=131072)


def near_and_far(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands of three heads: one looks at the last hundred or so tokens, one at two tokens of all text, one at all keys evenly."""
    draw = torch.Generator().manual_seed(0)
    angles = torch.arange(length)[:, None] * torch.randn(32, generator=draw) / 400
    places = torch.cat((angles.cos(), angles.sin()), -1)
    given = torch.randn(length, 64, generator=draw) * 0.1
    query = torch.zeros(length, 64)
    query[:, 0] = 14.0
    given[:, 0] = 0.0
    given[[200, 700], 0] = 1.0
    even = torch.randn(2, length, 64, generator=draw) * 0.05
    value = torch.randn(1, 3, length, 64, generator=draw)
    return torch.stack((places, query, even[0]))[None], torch.stack((places, given, even[1]))[None], value


def choosing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: tried.Grid) -> Chooser:
    """Over one layer with these operands, whose scores are not scaled."""
    length = query.shape[2]
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    sizes = AttentionSizes(1, heads, kv_heads, length, length, dim, dim, dtype=torch.bfloat16)
    site = Captured(Place("attention", "layer.0"), 0, sizes, 1.0)
    records = {site.place: {length: measure(query, key, value, 1.0, grid)}}
    return Chooser(grid, runs.Measured({}, [[length, 0]], {site.place: site}, records), H200, "hopper", at=131072)


@pytest.mark.parametrize("budget", [Budget("keep_error", 0.02), Budget("speedup", 2.0)])
def test_a_head_that_looks_near_gets_the_a_shape_and_one_that_looks_at_tokens_columns(budget):
    choice = choosing(*near_and_far(1024), GRID).choose(budget)
    near, given, even = choice.layers[0].settings
    assert near.value[0] == 0 < near.value[1] and GRID.families[0].word(near.value) == "A-shape"
    assert given.value[0] == 128 and GRID.families[0].word(given.value) == "vertical-slash"
    assert even == DENSE
    method, options = method_of(choice.layers[0], GRID)
    assert method == "minference" and options["columns"] == [0, 128, MOST] and options["diagonals"] == [near.value[1], given.value[1], 0]
    assert given.value[1] == 0 or budget.kind == "speedup"
    assert choice.error(1024) <= 0.02


def test_what_is_measured_is_what_the_masks_lose():
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 300, 16, generator=draw) * 2 for heads in (4, 2, 2))
    found = measure(query, key, value, 0.25, GRID)
    exact = masked(query, key, value, torch.ones(1, 4, 5, 5, dtype=torch.bool))
    for index, (columns, diagonals, blocks) in enumerate(GRID.families[0].values):
        keep = chosen_blocks(query, key, [columns // BLOCK] * 4, [diagonals // BLOCK] * 4, 16, blocks=[blocks // BLOCK] * 4)
        torch.testing.assert_close(found.density[index], keep[0].sum((1, 2)) / possible_blocks(300, BLOCK), check_dtype=False)
        error = (masked(query, key, value, keep) - exact)[0].norm(dim=(1, 2)) / exact[0].norm(dim=(1, 2))
        torch.testing.assert_close(found.relative_error[index], error.double(), atol=1e-4, rtol=1e-3)
    assert float(found.relative_error.max()) > 0.1


def test_budgets_bind(chooser):
    seconds = []
    for error in (0.0, 0.02, 0.1, 0.3, 10.0):
        choice = chooser.choose(Budget("keep_error", error))
        assert choice.error(512) <= error * (1 + 1e-9)
        seconds.append(choice.seconds)
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 4 * seconds[-1]
    loose, tight = (chooser.choose(Budget("density", density)) for density in (0.6, 0.3))
    assert tight.density <= 0.3 < loose.density <= 0.6 and loose.error(512) < tight.error(512)
    fast = chooser.choose(Budget("speedup", 3))
    assert fast.dense_seconds / fast.seconds >= 3
    with pytest.raises(UnsupportedError, match="visits so few blocks"):
        chooser.choose(Budget("density", 1e-5))


def mixed(chooser: Chooser) -> Choice:
    """In each layer a dense head, an A-shape, and two others; the layers differ."""
    index = lambda *pattern: 1 + GRID.families[0].values.index(pattern)
    picked = [0, index(0, 64, 0), index(128, 0, 0), index(0, 0, 128)], [index(64, 0, 0), 0, index(0, 192, 0), index(0, 0, 64)]
    layers = tuple(chooser.serve(layer, 0, heads) for layer, heads in zip(chooser.layers, picked, strict=True))
    return Choice(layers, Budget("keep_error", 10.0), chooser.at, 0.0)


def test_the_plan_compiled_is_its_mask(model, measured, chooser, tmp_path):
    """Head by head in the first layer, whose operands are the dense model's; and it loses what was predicted."""
    choice = mixed(chooser)
    plan = make_plan(model, IDS, OPTIONS, ASKED, measured, chooser, choice)
    plan.save(tmp_path / "plan.json")
    inputs = IDS[:, measured.done[-1][1] :][:, :512]
    operands = []
    take = lambda site, *those: operands.append((site.scale, *those))
    with (
        Capture(model, config.load({"min_length": 0, "lower": "eager"}, method_models=discover()), take).running() as forward,
        torch.no_grad(),
    ):
        forward(inputs)
    outputs, logits = [], []
    for capture in ("one region for 2 layers", "whole: model.layers.0.self_attn.o_proj has hooks"):
        copied = copy.deepcopy(model)
        if capture.startswith("whole"):
            hooked = copied.model.layers[0].self_attn.o_proj
            hooked.register_forward_pre_hook(lambda _, args: outputs.append(args[0].unflatten(-1, (4, -1))))
        sparsify.compile(copied, **strict(plan=str(tmp_path / "plan.json"), lower="eager"))
        with api.collect_plans() as plans, torch.no_grad():
            logits.append(copied(input_ids=inputs, use_cache=False).logits)
        torch._dynamo.reset()
        assert [[d.method for d in plan.rewritten] for plan in plans] == [["minference"] * 2]
        assert plans[0].capture == capture and plans[0].decisions[1].options["columns"] == [64, MOST, 0, 0]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    scale, query, key, value = operands[0]
    assert scale == pytest.approx(query.shape[-1] ** -0.5)
    keep = chosen_blocks(query, key, [8, 0, 2, 0], [0, 1, 0, 0], 16, blocks=[0, 0, 0, 2])
    (got,) = outputs
    torch.testing.assert_close(got, masked(query, key, value, keep).transpose(1, 2), atol=2e-5, rtol=1e-4)
    exact = masked(query, key, value, torch.ones_like(keep)).transpose(1, 2)
    assert float((got - exact).norm() / exact.norm()) == pytest.approx(choice.layers[0].error[512], rel=1e-3) and choice.error(512) > 0.01
    assert float((got - exact)[:, :, 0].abs().max()) < 1e-5 < float((got - exact)[:, :, 1].abs().max())


@pytest.mark.slow
def test_a_plan_for_another_model_is_refused_and_explain_shows_the_numbers(model, measured, chooser, tmp_path):
    plan = make_plan(model, IDS, OPTIONS, ASKED, measured, chooser, mixed(chooser))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert '    "columns": [4194304, 0, 128, 0],' in plan.to_json().splitlines()
    inputs = {"input_ids": IDS[:, :300], "use_cache": False}
    options = {"plan": str(tmp_path / "plan.json"), "strict": True, "min_length": 0}
    found = api.explain(model, options=options, **inputs)
    assert [d.method for d in found.rewritten] == ["minference"] * 2
    assert [d.options["diagonals"] for d in found.decisions] == [[0, 64, 0, 0], [0, 0, 192, 0]]
    heads = "1 dense, 1 A-shape, 1 block-sparse, 1 vertical-slash"
    assert plan.decisions[0].reason == f"calibrated: heads {heads}, columns and diagonals of the last 16 queries"
    numbers = "every key in a head, 0 + 64 + 0 in a head, 128 + 0 + 0 in a head, 0 + 0 + 128 in a head"
    assert f"columns + diagonals + blocks: {numbers}" in found.decisions[0].reason
    with pytest.raises(PlanError, match="calibrated on another model"):
        api.explain(build("llama", layers=2, max_position_embeddings=1024), options=options, **inputs)


def test_layers_of_other_methods_beside(model):
    """A layer may take blocks by an estimate, or windows, where these serve it better, or heads of both; heads of patterns alone have no
    windows."""
    options = {**OPTIONS, "xattention": {"block": BLOCK, "stride": 16, "estimate": [], "pool": "max"}, "sink_window": {"window": [64]}}
    grid = tried.pattern_grid(options, ("xattention", "sink_window"))
    found = choosing(*near_and_far(1024), grid)
    ways = [(way, seconds) for way, _, seconds in found._options[0]]
    assert [way for way, _ in ways] == [None, None, 0, 1, 2]
    assert bool(ways[2][1][1].isinf().all()) and bool(ways[3][1][1].isfinite().all())  # sinks + window
    served = [
        found.serve(found.layers[0], family, [1 + grid.settings.index(tried.Setting(family, value)), 0, 0])
        for family, value in ((None, 64), (0, (64, 0, 0)), (1, 0.5))
    ]
    assert [method_of(one, grid)[0] for one in served] == ["sink_window", "minference", "xattention"]
    alone = choosing(*near_and_far(1024), GRID)
    for error in (0.02, 0.3, 10.0):
        assert found.choose(Budget("keep_error", error)).seconds <= alone.choose(Budget("keep_error", error)).seconds
    with pytest.raises(ConfigError, match="differ in size"):
        tried.pattern_grid({"minference": {"block": 64}}, ("xattention",))


def near_far_and_apart(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The heads of `near_and_far`, and one that looks, from each eighth of the text, at another eighth."""
    query, key, value = near_and_far(length)
    draw = torch.Generator().manual_seed(1)
    asked, own = torch.tensor([0, 0, 1, 0, 3, 1, 2, 4]), torch.arange(8)
    names = torch.nn.functional.normalize(torch.randn(8, 64, generator=draw), dim=-1)
    apart = [names[which].repeat_interleave(length // 8, 0)[None] for which in (asked, own)]
    query, key = torch.cat((query[0], 12 * apart[0]))[None], torch.cat((key[0], apart[1]))[None]
    value = torch.cat((value[0], torch.randn(1, length, 64, generator=draw)))[None]
    value[:, 2] *= 8  # of whose mean little is left
    return query, key, value


MIXED = {"minference": {**OPTIONS["minference"], "blocks": 0}}  # means would tell these stretches apart, too
MIXED["xattention"] = {"block": BLOCK, "stride": 16, "estimate": [], "pool": "row", "threshold": [0.3, 0.6]}


def test_heads_of_one_layer_differ_in_method():
    """Each gets what serves it: an A-shape, columns, every key, blocks by the estimate; and loses what was predicted."""
    query, key, value = near_far_and_apart(1024)
    grid = tried.pattern_grid(MIXED, ("xattention",))
    found, alone = choosing(query, key, value, grid), choosing(query, key, value, tried.pattern_grid(MIXED))
    choice = found.choose(Budget("keep_error", 0.02))
    (layer,) = choice.layers
    families = [setting.family if setting != DENSE else "dense" for setting in layer.settings]
    assert families == [0, 0, "dense", 1] and layer.way == 2 and grid.ways[2].name.startswith("stride 16 row, columns")
    assert found.grid.families[0].word(layer.settings[0].value) == "A-shape" and layer.settings[1].value[0] == 128
    assert choice.seconds < alone.choose(Budget("keep_error", 0.02)).seconds
    method, options = method_of(layer, grid)
    thresholds = [1.0, 1.0, 1.0, layer.settings[3].value]
    assert method == "xattention" and options["threshold"] == thresholds and options["queries"] == 16
    assert options["patterns"] == [list(layer.settings[0].value[:2]), list(layer.settings[1].value[:2]), [], []]
    exact = masked(query * 8, key, value, torch.ones(1, 4, 16, 16, dtype=torch.bool))  # not scaled
    got = refine.output(layer, grid, query, key, value)
    off = float((got - exact).norm() / exact.norm())
    assert off == pytest.approx(layer.error[1024], rel=1e-3) and 1e-5 < off <= 0.02
    one = config.validate(discover()[method], options, "plan", method)
    lists = SelectCall(query, key, scale=1.0, causal=True, **one.selection()).run()
    assert lists[0].sum((0, 2)).tolist() == [round(float(density) * 136) for density in density_of(layer, 1024)]


def density_of(layer, length):
    """Of each head, as its own setting was measured."""
    every = torch.cat([torch.ones(1, len(layer.settings), dtype=torch.float64), layer.layer.records[length].density])
    return every[list(layer.picked), range(len(layer.settings))]


def test_what_cannot_be_joined():
    ways = lambda **given: len(tried.pattern_grid({name: {**MIXED[name], **given.get(name, {})} for name in MIXED}, ("xattention",)).joined)
    assert ways() == 1 and ways(xattention={"refine_stride": 8}) == ways(minference={"mass": 0.9}) == 0
    rows = {"last_rows": 64}
    assert ways(minference=rows) == ways(xattention=rows) == 0 and ways(minference=rows, xattention=rows) == 1
    grid = tried.pattern_grid(MIXED, ("xattention",))
    takes = [grid.takes(2, tried.Setting(0, value)) for value in ((64, 64, 0), (0, 0, 64))]
    assert takes == [True, False] and grid.takes(2, tried.Setting(1, 0.3)) and not grid.takes(0, tried.Setting(1, 0.3))
    assert grid.digest() == dataclasses.replace(grid, joined=()).digest()  # what is measured stays the same


@pytest.mark.parametrize("more", [{"mass": 0.7}, {"divergence": 0.9}, {"divergence": 0.9, "blocks": [0, 64]}])
def test_heads_that_stay_dense_are_so_when_prompts_decide(more):
    """A share that is enough bounds every head of a layer, so that none beside the others can be dense; a divergence leaves those alone
    that have no blocks."""
    grid = tried.pattern_grid({"minference": {**OPTIONS["minference"], **more}})
    query, key, value = near_and_far(1024)
    found = choosing(query, key, value, grid)
    exact = masked(query * 8, key, value, torch.ones(1, 3, 16, 16, dtype=torch.bool))  # not scaled
    lists = set()
    for error in (0.02, 0.3):
        (layer,) = found.choose(Budget("keep_error", error)).layers
        got = refine.output(layer, grid, query, key, value)
        off = 0.0 if got is None else float((got - exact).norm() / exact.norm())
        assert off == pytest.approx(layer.error[1024], rel=1e-3, abs=1e-5) and off <= error
        lists.add(layer.way)
        assert layer.way is None or "mass" not in more or DENSE not in layer.settings
    assert 0 in lists


def test_a_plan_without_blocks_has_nothing_to_choose_between():
    grid = tried.pattern_grid({"minference": {**OPTIONS["minference"], "divergence": 0.9, "blocks": [0, 64]}})
    for pattern, divergence in (((64, 64, 0), None), ((64, 64, 64), 0.9)):
        options = grid.families[0].options([None, pattern], [0, 0], 4, (0.1, 1.0))
        assert config.validate(discover()["minference"], options, "plan").divergence == divergence


def test_what_needs_the_row_rule_is_tried_with_that_alone():
    """And two stages with first ones that are coarser."""
    names = lambda **given: [family.name for family in tried.grid({"xattention": given}).families]
    assert names(min_share=0.05) == [f"stride {stride} row" for stride in tried.STRIDES]
    assert names(refine_stride=4) == ["stride 8 row, then 4", "stride 16 row, then 4"]
    assert names(refine_stride=8, stride=16) == ["stride 16 row, then 8"]
    windows = lambda **given: {family.takes_windows for family in tried.grid({"xattention": given}).families}
    assert windows() == {True} and windows(refine_stride=4) == {False}, "no kernel makes two stages beside windows"
    with pytest.raises(ConfigError, match="min_share goes with"):
        names(min_share=0.05, pool="max")


def test_kinds_of_layers(chooser, monkeypatch):
    """Layers whose lists need about as much room are of one kind; there are no windows to leave out."""
    choice, note = choose_shared(chooser, Budget("keep_error", 10.0))
    assert kinds(choice, GRID) <= 2 and not note
    monkeypatch.setattr("sparsify.commands.calibrate.attention.make_plan.MOST_KINDS", 0)
    assert "captured whole" in choose_shared(chooser, Budget("keep_error", 10.0))[1]


@pytest.mark.slow
def test_the_command(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(IDS[0].tolist()))
    plan = tmp_path / "plan.json"
    command = ["calibrate", "patterns", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--device", "cpu", "--save", str(plan)]
    command += ["--lengths", "256,512", "--pieces", "1", "--at", "64K", "--target", "h200", "-o", "minference.block=64"]
    command += ["-o", "minference.columns=[0,64]", "-o", "minference.diagonals=[0,128]", "-o", "minference.blocks=0"]
    assert cli.main([*command, "--keep-error", "0.3", "--report", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "A-shape" in said or "vertical-slash" in said
    loaded = Plan.load(plan)
    assert loaded.calibration.at == 65536 and {d.method for d in loaded.decisions} == {"minference"}
    assert loaded.calibration.errors["512"] <= 0.3
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {point["setting"] for point in data["uniform"]} == {"0 tokens in columns", "64 tokens in columns"}
    assert cli.main([*command, "--density", "0.3", "--json"]) == 0  # from the measurements
    assert Plan.load(plan).calibration.density <= 0.3
    assert cli.main([*command, "--density", "0.3", "--beside", "sink_window"]) == 2  # another grid's measurements

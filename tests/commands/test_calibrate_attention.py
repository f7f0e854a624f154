"""Calibrated attention: what is measured, what is chosen under which budget, and the plan that a compiled model loads."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from sparsify import api
from sparsify.backends.select import reference as select_reference
from sparsify.commands import main as cli
from sparsify.commands.calibrate.attention import run as runs
from sparsify.commands.calibrate.attention import settings as tried
from sparsify.commands.calibrate.attention.choose import DENSE, Budget, Chooser
from sparsify.commands.calibrate.attention.densities import Densities
from sparsify.commands.calibrate.attention.make_plan import choose_shared, kinds, make_plan
from sparsify.commands.calibrate.attention.measure import Record, measure, possible_blocks, window_blocks
from sparsify.commands.cost import device as forecast_device
from sparsify.errors import PlanError, UnsupportedError
from sparsify.ops.attention import AttentionCall
from sparsify.ops.selection import SelectCall
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import model_digest
from sparsify.planning.saved_plan import SavedPlan
from tests.support.harness import run, strict
from tests.support.tiny_models import VOCAB, build, build_sharp

LENGTHS = (256, 512)
IDS = torch.randint(3, VOCAB, (1, 1400), generator=torch.Generator().manual_seed(0))
OPTIONS = {"xattention": {"block": 64, "stride": 16, "estimate": [], "threshold": [0.2, 0.6]}, "sink_window": {"window": [64, 200]}}
H200 = forecast_device.named("h200")
GRID = tried.grid(OPTIONS)


def asked(pieces: int = 1, seed: int = 0) -> runs.Asked:
    return runs.Asked(GRID, LENGTHS, pieces, seed)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_sharp()


@pytest.fixture(scope="module")
def measured(model) -> runs.Measured:
    return runs.run(model, IDS, asked(), OPTIONS)


@pytest.fixture(scope="module")
def chooser(measured) -> Chooser:
    return Chooser(GRID, measured, H200, "hopper", at=131072)


def test_mass_and_error_are_those_of_the_definition():
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 300, 16, generator=draw) * 2 for heads in (4, 2, 2))
    found = measure(query, key, value, 0.25, GRID)
    keys, values = (t.repeat_interleave(2, 1).double() for t in (key, value))
    causal = torch.ones(300, 300, dtype=torch.bool).tril()
    weights = (query.double() @ keys.mT * 0.25).masked_fill(~causal, -torch.inf).softmax(-1)
    rows, columns = torch.arange(300)[:, None], torch.arange(300)
    for index, setting in enumerate(GRID.settings):
        if setting.family is None:
            seen = ((columns > rows - setting.value) | (columns < GRID.sinks)).expand(4, -1, -1)
        else:
            call = GRID.families[setting.family].call(query, key, 0.25, setting.value)
            table = select_reference.choose(select_reference.importance(call), *select_reference.candidates(call), call)[0]
            seen = table.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :300, :300]
            torch.testing.assert_close(found.density[index], table.sum((1, 2)) / possible_blocks(300, 64), check_dtype=False)
        kept = weights[0] * seen
        lost = 1 - kept.sum(-1)
        torch.testing.assert_close(found.mean_lost[index], lost.mean(-1), atol=1e-5, rtol=1e-4)
        exact = weights[0] @ values[0]
        error = ((kept / kept.sum(-1, keepdim=True)) @ values[0] - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
        torch.testing.assert_close(found.relative_error[index], error, atol=1e-4, rtol=1e-3)
        worst = found.worst_lost()[index]
        assert bool((lost <= worst[:, None] + 1e-6).double().mean(-1).ge(0.99).all())
        torch.testing.assert_close(found.lost_beyond(0.5)[index], (lost > 0.5).double().mean(-1), atol=0.02, rtol=0)
    assert float(found.relative_error.max()) > 0.1


def test_a_window_that_is_longer_than_the_prompt_visits_all_of_it():
    operands = torch.randn(3, 1, 2, 150, 16, generator=torch.Generator().manual_seed(1))
    found = measure(*operands, 0.25, GRID)
    wide = [index for index, setting in enumerate(GRID.settings) if setting == tried.Setting(None, 200)]
    assert bool(found.error[wide].isnan().all()) and bool((found.density[wide] == 1).all())


def test_last_rows_weigh_as_much_as_all_others():
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 300, 16, generator=draw) * 2 for heads in (4, 2, 2))
    plain, found = (measure(query, key, value, 0.25, GRID, last) for last in (0, 100))
    exact = AttentionCall(query, key, value, scale=0.25, causal=True).run()[0][0].double()
    rows = exact.square().sum(-1)
    torch.testing.assert_close(plain.norm, rows.sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.norm, rows[:, :200].sum(-1) + 2 * rows[:, 200:].sum(-1), rtol=1e-5, atol=0)
    for one in ("lost", "visited", "classes"):
        assert torch.equal(getattr(plain, one), getattr(found, one)), "what is no error counts rows"
    assert not torch.allclose(plain.relative_error, found.relative_error, rtol=1e-3)


def test_pieces_are_ends_of_prompts():
    asked_for = runs.Asked(GRID, (100,), 2, seed=0, ends=(90, 240, 340, 1000), last=10)
    assert set(asked_for.offsets(1000, 100)) < {140, 240, 900} and len(asked_for.offsets(1000, 100)) == 2
    assert runs.Asked(GRID, (100,), 9, seed=0, ends=asked_for.ends).offsets(1000, 100) == [140, 240, 900]
    with pytest.raises(UnsupportedError, match="no prompt has 700 tokens"):
        asked_for.offsets(1000, 700)


@pytest.mark.parametrize("length, window", [(300, 64), (512, 100), (65, 1), (640, 1000)])
def test_blocks_of_a_window_are_those_that_lists_hold(length, window):
    operand = torch.zeros(1, 1, length, 8)
    call = SelectCall(operand, operand, scale=1.0, causal=True, windows=(window,), block_size=64, stride=8, threshold=(1.0,))
    assert window_blocks(length, window, 64) == int(select_reference.candidates(call)[0].sum())


def test_densities_follow_a_power_of_the_length():
    def record(length: int) -> Record:
        found = Record.empty(len(GRID.settings), 2)
        found.possible = possible_blocks(length, 64)
        powers = torch.tensor([0.0, 0.5], dtype=torch.float64)
        found.visited += 0.6 * (1024 / length) ** powers * found.possible
        return found

    fitted = Densities.fit(GRID, {length: record(length) for length in (1024, 2048, 4096)})
    torch.testing.assert_close(fitted.at(65536)[-1], torch.tensor([0.6, 0.6 / 8], dtype=torch.float64))
    assert float(fitted.at(65536)[0, 0]) == window_blocks(65536, 64, 64) / possible_blocks(65536, 64)
    assert bool((Densities.fit(GRID, {1024: record(1024)}).at(1 << 22) > 0).all())


@pytest.mark.slow
def test_without_any_error_all_is_dense(model, measured, chooser):
    choice = chooser.choose(Budget("keep_error", 0.0))
    assert all(one.dense for one in choice.layers)
    assert choice.error(512) == 0 and choice.density == 1
    plan = make_plan(model, IDS, OPTIONS, asked(), measured, chooser, choice)
    assert {decision.method for decision in plan.decisions} == {"dense"}


def test_more_error_never_costs_more_time_and_budgets_are_kept(chooser):
    seconds = []
    for error in (0.0, 0.02, 0.1, 0.2, 0.3, 10.0):
        choice = chooser.choose(Budget("keep_error", error))
        assert choice.error(512) <= error * (1 + 1e-9)
        seconds.append(choice.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 4 * seconds[-1]
    sparse = chooser.choose(Budget("density", 0.2))
    assert sparse.density <= 0.2
    fast = chooser.choose(Budget("speedup", 3))
    assert fast.dense_seconds / fast.seconds >= 3
    assert fast.error(512) <= chooser.choose(Budget("speedup", 6)).error(512) + 1e-9
    with pytest.raises(UnsupportedError, match="times dense attention"):
        chooser.choose(Budget("speedup", 1e4))
    with pytest.raises(UnsupportedError, match="visits so few blocks"):
        chooser.choose(Budget("density", 1e-5))


def test_the_plan_compiled_loses_what_was_predicted(model, measured, chooser, tmp_path):
    """In the first layer, whose operands are the dense model's, exactly; and each head by its own method."""
    choice = mixed(chooser)
    plan = make_plan(model, IDS, OPTIONS, asked(), measured, chooser, choice)
    plan.save(tmp_path / "plan.json")
    at = measured.done[-1][1]
    inputs = IDS[:, at : at + 512]
    outputs = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0].double()))
    try:
        call = lambda m: m(input_ids=inputs, use_cache=False).logits
        got = run(model, call, strict(plan=str(tmp_path / "plan.json")))
        dense = run(model, call, strict(passes=["dense"]))
    finally:
        hook.remove()
    assert got.rewritten("xattention") == 2
    sparse, exact = outputs
    error = float((sparse - exact).norm() / exact.norm())
    assert error == pytest.approx(choice.layers[0].error[512], rel=1e-3)
    assert error > 0.01
    by_head = (sparse - exact).unflatten(-1, (4, -1)).square().sum((0, 1, 3)).sqrt().div(exact.norm()).tolist()
    assert by_head[0] < 1e-5 < min(by_head[1:])  # the first head is dense
    assert (got.value - dense.value).abs().max() > 1e-3


def mixed(chooser: Chooser):
    """A dense head, one with sinks and a window, and two by blocks in each layer."""
    settings = [DENSE, *GRID.settings]
    first = next(i for i, s in enumerate(settings) if s.family is not None)
    picked = [0, 1, first, first + 1]
    layers = tuple(chooser.serve(layer, 0, picked) for layer in chooser.layers)
    choice = chooser.choose(Budget("keep_error", 10.0))
    return type(choice)(layers, choice.budget, choice.at, 0.0)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_interrupted(model, tmp_path):
    file = tmp_path / "measured.pt"
    twice = runs.Asked(GRID, (256,), 2, seed=0)
    whole = runs.run(model, IDS, twice, OPTIONS)
    assert len(whole.done) == 2

    def stop(done: int, all_: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(model, IDS, twice, OPTIONS, file=file, progress=stop)
    assert len(runs.Measured.load(file, runs.identity(model, IDS, twice)).done) == 1
    seen = []
    again = runs.run(model, IDS, twice, OPTIONS, file=file, progress=lambda done, all_, what: seen.append(what))
    assert again.done == whole.done
    assert sum("self_attn" in what for what in seen) == 2  # one piece through two layers
    once_more = runs.run(model, IDS, twice, OPTIONS, file=file, progress=lambda done, all_, what: seen.append(what))
    assert sum("self_attn" in what for what in seen) == 2
    plans = []
    for found in (whole, again, once_more):
        chooser = Chooser(GRID, found, H200, "hopper")
        plans.append(make_plan(model, IDS, OPTIONS, twice, found, chooser, chooser.choose(Budget("keep_error", 0.2))).to_json())
    assert plans[0] == plans[1] == plans[2]
    with pytest.raises(UnsupportedError, match="another seed"):
        runs.run(model, IDS, runs.Asked(GRID, (256,), 2, seed=1), OPTIONS, file=file)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(UnsupportedError, match="holds no measurements"):
        runs.run(model, IDS, asked(), OPTIONS, file=tmp_path / "other")


def test_pieces_are_chosen_by_the_seed_and_do_not_overlap():
    chosen = runs.offsets(10_000, 512, 5, seed=3)
    assert chosen == runs.offsets(10_000, 512, 5, seed=3) != runs.offsets(10_000, 512, 5, seed=4)
    assert len(chosen) == 5 and all(b - a >= 512 for a, b in itertools.pairwise(chosen)) and chosen[-1] + 512 <= 10_000
    assert len(runs.offsets(1100, 512, 5, seed=3)) == 2


def test_a_plan_for_another_model_is_refused(model, measured, chooser, tmp_path):
    plan = make_plan(model, IDS, OPTIONS, asked(), measured, chooser, chooser.choose(Budget("keep_error", 0.2)))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and SavedPlan(loaded, "").plan.calibration.lengths == [256, 512]
    inputs = {"input_ids": IDS[:, :300], "use_cache": False}
    options = {"plan": str(tmp_path / "plan.json"), "strict": True, "min_length": 0}
    assert api.explain(model, options=options, **inputs).rewritten
    for other in (build("llama", layers=2, max_position_embeddings=1024), build("qwen2", layers=2)):
        with pytest.raises(PlanError, match="calibrated on another model"):
            api.explain(other, options=options, **inputs)
    assert model_digest(copy.deepcopy(model).to(torch.bfloat16)) == model_digest(model)


@pytest.mark.slow
def test_below_the_plans_length_attention_is_dense(model, measured, chooser, tmp_path):
    plan = make_plan(model, IDS, OPTIONS, asked(), measured, chooser, mixed(chooser))
    assert plan.min_length >= 256
    plan.min_length = 300
    plan.save(tmp_path / "plan.json")
    for length, method in ((299, "dense"), (300, "xattention")):
        found = api.explain(model, options={"plan": str(tmp_path / "plan.json")}, input_ids=IDS[:, :length], use_cache=False)
        assert {decision.method for decision in found.decisions} == {method}


def test_layers_of_too_many_kinds_are_chosen_without_windows(chooser, monkeypatch):
    budget = Budget("keep_error", 10.0)
    free, note = choose_shared(chooser, budget)
    assert not note and any(s.family is None and s != DENSE for one in free.layers for s in one.settings)
    monkeypatch.setattr("sparsify.commands.calibrate.attention.make_plan.MOST_KINDS", 0)
    shared, note = choose_shared(chooser, budget)
    assert "without windows" in note and shared.seconds > free.seconds
    assert all(s.family is not None or s == DENSE for one in shared.layers for s in one.settings)
    assert kinds(shared, GRID) == 1  # thresholds make no kinds


def test_windows_stay_where_nothing_else_keeps_the_budget(chooser, monkeypatch):
    monkeypatch.setattr("sparsify.commands.calibrate.attention.make_plan.MOST_KINDS", 0)
    windows = slice(1, 1 + len(GRID.windows))
    least = lambda rows: sum(float(layer.density[rows].min(0).values.sum()) for layer in chooser.layers)
    heads = sum(layer.density.shape[1] for layer in chooser.layers)
    by_windows, by_lists = least(windows) / heads, least(slice(1 + len(GRID.windows), None)) / heads
    assert by_windows < by_lists
    choice, note = choose_shared(chooser, Budget("density", (by_windows + by_lists) / 2))
    assert any(s.family is None and s != DENSE for one in choice.layers for s in one.settings)
    assert "captured whole" in note and f"at least {by_lists:.2%} at 131072 tokens" in note and "without windows" in note
    with pytest.raises(UnsupportedError, match=f"at least {by_windows:.2%} at 131072"):
        choose_shared(chooser, Budget("density", by_windows / 2))


def test_plans_differ_in_the_lines_that_differ(model, measured, chooser):
    plan = make_plan(model, IDS, OPTIONS, asked(), measured, chooser, mixed(chooser))
    lines = plan.to_json().splitlines()
    assert '    "threshold": [1.0, 1.0, 0.2, 0.6],' in lines
    assert '    "windows": [0, 64, 0, 0],' in lines
    assert json.loads(plan.to_json())["calibration"]["budget"] == {"keep_error": 10.0}


def test_the_command(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(IDS[0].tolist()))
    plan = tmp_path / "plan.json"
    command = ["calibrate", "attention", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--device", "cpu", "--save", str(plan)]
    command += ["--lengths", "256,512", "--pieces", "1", "--at", "64K", "--target", "h200"]
    command += [
        "-o",
        "xattention.block=64",
        "-o",
        "xattention.stride=16",
        "-o",
        "xattention.pool=max",
        "-o",
        "xattention.threshold=[0.2,0.6]",
    ]
    command += ["-o", "sink_window.window=[64,200]"]
    assert cli.main([*command, "--keep-error", "0.2", "--report", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "extrapolated from 256, 512" in said and "times)" in said
    assert Plan.load(plan).calibration.at == 65536
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img") == 5 and "keep_error" in page
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["layers"] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert data["front"][0]["error"] == 0 and data["front"][-1]["error"] > 0.2
    assert data["looking_back"]["beyond"] == 200
    before = plan.read_text()
    capsys.readouterr()
    assert cli.main([*command, "--keep-error", "0.2", "--json"]) == 0  # from the measurements
    assert plan.read_text() == before == capsys.readouterr().out
    for wrong in (["--keep-error", "-1"], ["--density", "0"], ["--speedup", "0.5"], ["--keep-error", "0.1", "--lengths", "4096"]):
        assert cli.main([*command, *wrong]) == 2
    assert math.isfinite(Plan.load(plan).calibration.seconds)

"""The cost grid: what it measures, what it fits on and what it only predicts, choices, table and plot; once end to end on the CPU."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks.cost_model import CostGrid, report
from benchmarks.cost_model import grid as cost_cells
from benchmarks.cost_model import run as cost_grid
from benchmarks.lib import records
from sparsify.costs import profile
from sparsify.costs.device import Device
from sparsify.costs.profile import Profile
from sparsify.costs.samples import Sample, Workload, predict

K = 1024
GRID = cost_cells.grid("cuda")
H200 = Device.from_profile("cuda", profile.shipped("sm_90"))


def test_the_grid_has_every_length_density_batch_and_method_once():
    assert len(set(GRID)) == len(GRID)
    assert {c.key_len for c in GRID if c.kind == "attention"} >= {K << i for i in range(9)}
    assert {c.kind for c in GRID} == {"attention", "select", "whole", "decode", "ffn", "linear", "elementwise"}
    assert {c.kernel for c in GRID if c.kind == "attention"} == {"sdpa", "hopper", "triton"}
    assert {c.density for c in GRID if c.density} >= {0.03, 0.05, 0.1, 0.2, 0.5}
    assert {c.batch for c in GRID} >= {1, 2, 4, 8}


def test_quick_cells_come_first():
    assert [cost_cells.weight(cell) for cell in GRID] == sorted(cost_cells.weight(cell) for cell in GRID)


def test_what_is_tested_on_has_lengths_and_densities_that_nothing_was_fitted_on():
    parts = {part: [c for c in GRID if cost_cells.fitted(c, c.density) == part] for part in (True, False)}
    prompts = lambda part: [c for c in parts[part] if c.kind == "attention"]
    assert max(c.key_len for c in parts[True]) == 128 * K < 256 * K
    assert {2 * K, 8 * K, 32 * K, 256 * K} <= {c.key_len for c in prompts(False)} - {c.key_len for c in prompts(True)}
    assert {0.03, 0.15, 0.35} <= {c.density for c in prompts(False)} - {c.density for c in prompts(True)}
    assert not any(c.kind == "whole" for c in parts[True])
    families = lambda part: {w.family for c in parts[part] for w in c.works()}
    assert families(False) <= families(True), "nothing is predicted that was never fitted"


def test_the_density_asked_for_decides_and_not_the_one_that_lists_have():
    cell = Workload("attention", "hopper", query_len=4 * K, key_len=4 * K, density=0.1489)
    assert not cost_cells.fitted(cell)
    assert cost_cells.fitted(cell, 0.1)


def test_every_kernel_is_compiled_by_some_job():
    jobs = cost_cells.compile_jobs(GRID)
    cells = [cell for job in jobs for cell in job]
    kinds = lambda some: {(c.kernel, c.density is not None, c.window > 0, c.head_dim) for c in some if c.kind == "attention"}
    assert kinds(cells) == kinds(c for c in GRID if c.kernel != "sdpa")
    estimates = lambda some, kinds: {(c.stride, c.variants, c.key_len) for c in some if c.kind in kinds}
    assert estimates(cells, ("select",)) == estimates(GRID, ("select", "whole"))
    assert all(c.query_heads == 4 for c in cells if c.kind == "select")


def test_two_stages_are_measured_from_short_prompts_to_long_ones_by_thresholds_of_the_first():
    staged = [c for c in GRID if c.refine_stride]
    default = [c for c in staged if c.variants == ("quad", "int8", "peak")]
    assert {(c.key_len, c.coarse_threshold) for c in default} == set(itertools.product([8 * K << i for i in range(6)], (0.8, 0.9, 0.95)))
    assert all(c.pool == "row" and c.min_share == 0.05 and (c.stride, c.refine_stride) == (8, 4) for c in staged)
    assert {c.key_len for c in staged if cost_cells.fitted(c)} == {16 * K, 64 * K, 128 * K}
    assert 0.9 not in {c.coarse_threshold for c in staged if cost_cells.fitted(c)}
    assert set(cost_cells.grid("cuda", only=["selections"])) == set(cost_cells.selections()) < set(GRID)


def test_a_row_rule_is_compiled_apart_from_the_others():
    jobs = [{(c.pool, c.refine_stride, c.stride, c.variants) for c in job if c.kind == "select"} for job in cost_cells.compile_jobs(GRID)]
    assert all(len(job) <= 1 for job in jobs) and len(set().union(*jobs)) == sum(map(len, jobs)) == 14 + 5 + 2


def records_of(device: Device, cells, run: str = "2026-01-01T00:00:00+00:00", factor=lambda cell: 1.0, **began) -> list[dict]:
    machine = {"gpu": device.name, "driver": "1", "torch": "2", "triton": "3", "transformers": "5", "sparsify": "0", "commit": "abc"}
    first = {
        "part": "ceilings", "time": run, "flops": device.flops, "bandwidth": device.bandwidth, "launch": device.launch,
        "device": device.name, "capability": list(device.capability), "processors": device.processors, "l2_bytes": device.l2_bytes, **began,
    }  # fmt: skip
    found = [first]
    for cell in cells:
        values = {"seconds": predict(cell, device) * factor(cell), "asked": cell.density}
        found.append({"part": "cell", "time": run, "run": run, "cell": json.loads(json.dumps(cell.as_record())), **values})
    return [{"benchmark": CostGrid.NAME, "machine": machine, **record} for record in found]


SOME = [c for c in GRID if c.kind in ("attention", "select", "whole", "decode")]


def test_a_device_that_follows_the_formulas_is_predicted():
    ceilings, samples = cost_grid.newest_run(records_of(H200, SOME))
    fitted = cost_grid.profile_of(ceilings, [sample for sample, part in samples if part])
    device = Device.from_profile("cuda", fitted)
    found = cost_grid.summary(cost_grid.errors([sample for sample, part in samples if not part], device))
    assert found["median"] < 0.02
    assert found["p95"] < 0.08
    assert fitted.measured
    assert "cost_model" in fitted.source
    Profile.from_json(fitted.to_json())


def test_the_newest_run_counts():
    old = records_of(H200, SOME[:3], "2026-01-01T00:00:00+00:00")
    new = records_of(H200, SOME[3:5], "2026-01-02T00:00:00+00:00")
    assert len(cost_grid.newest_run([*new, *old])[1]) == 2
    assert cost_grid.newest_run([]) is None


def test_a_part_stands_in_for_what_was_measured_of_it():
    """A cell is recognised by what was asked of it, whatever densities its lists had."""
    whole = records_of(H200, SOME)
    of_part = [c for c in SOME if c.kind == "select"][-3:] + [c for c in SOME if c.kind == "attention" and c.density][-2:]
    part = records_of(H200, of_part, "2026-01-02T00:00:00+00:00", lambda cell: 2.0, only=["selections"])
    for record in part[1:]:
        record["cell"] |= {"density": 0.123, "listed": 0.4} if record["cell"].get("refine_stride") else {}
        record["cell"] |= {"density": 0.1 + record["asked"]} if record["asked"] else {}
    ceilings, samples = cost_grid.newest_run([*part, *whole])
    assert ceilings == whole[0] and len(samples) == len(SOME)
    before = {sample.workload: sample.seconds for sample, _ in cost_grid.newest_run(whole)[1]}
    assert sum(sample.workload not in before or sample.seconds != before[sample.workload] for sample, _ in samples) == len(of_part)
    later = records_of(H200, SOME[:2], "2026-01-03T00:00:00+00:00", only=["dense"])
    for record in (part[0], *later):
        record["device"] = "another"
    assert len(cost_grid.newest_run([*whole, *part, *later])[1]) == len(SOME)
    assert {sample.seconds for sample, _ in cost_grid.newest_run([*whole, *part, *later])[1]} == set(before.values())
    assert len(cost_grid.newest_run(later)[1]) == 2, "a part alone is a run, too"


def test_selections_are_fitted_anew_onto_a_profile(tmp_path, capsys):
    """Kernels of selections that became faster: those families follow, the others and the ceilings stay."""
    shipped = profile.shipped("sm_90")
    one = {name: value / 2 for name, value in shipped.families["select"].items() if name not in ("steps", "scratch", "work")}
    faster = shipped.model_copy(update={"families": shipped.families | {"select/streamed": {**one, "scratch": 1.0, "masses": 500.0}}})
    found = []
    for record in records_of(Device.from_profile("cuda", faster), cost_cells.selections(), flops=7e14, only=["selections"]):
        if record.get("cell", {}).get("refine_stride"):  # what a first stage lists is found when a cell runs
            cell = Workload.from_record(record["cell"] | {"listed": 1 / (1 + record["cell"]["key_len"] / 32768), "density": 0.1})
            seconds = predict(cell, Device.from_profile("cuda", faster))
            record |= {"cell": json.loads(json.dumps(cell.as_record())), "seconds": seconds}
        found.append(record)
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records_of(H200, SOME[::9], "2025-01-01T00:00:00+00:00")))
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    base, saved = tmp_path / "base.json", tmp_path / "profile.json"
    base.write_text(shipped.to_json())
    files = [str(tmp_path / name) for name in ("old.jsonl", "new.jsonl")]
    families = ["select", "select/streamed"]
    assert cost_grid.main(["fit", *files, "--onto", str(base), "--families", *families, "--save", str(saved)]) == 0
    fitted = Profile.load(saved)
    unchanged = lambda one: (one.flops, one.bandwidth, {name: found for name, found in one.families.items() if name not in families})
    assert unchanged(fitted) == unchanged(shipped) and fitted.source.startswith(shipped.source) and "select/streamed" in fitted.source
    device, truth = (Device.from_profile("cuda", one) for one in (fitted, faster))
    for record in found[1::4]:
        cell = Workload.from_record(record["cell"])
        if cell.works()[0].family == "select/streamed":
            assert predict(cell, device) == pytest.approx(predict(cell, truth), rel=0.03)
    assert "a first stage lists" in capsys.readouterr().out


def test_a_wrong_choice_is_seen():
    """A sparse call that takes three times as long as the model says is chosen, and should not be."""
    places = [
        c for c in SOME if c.key_len == 32 * K and c.batch == 1 and c.query_len == 32 * K and c.head_dim == 128 and c.query_heads == 32
    ]
    places = [c for c in places if c.kind == "whole" or (c.density is None and not c.window)]
    right = cost_grid.choices([Sample(c, predict(c, H200)) for c in places], H200)
    assert right
    assert all(one["ratio"] == 1 for one in right)
    wrong = cost_grid.choices([Sample(c, predict(c, H200) * (8 if c.kind == "whole" else 1)) for c in places], H200)
    assert any(one["ratio"] > 1.5 and one["chosen"].startswith("whole") for one in wrong)


def test_small_cells_are_measured_fitted_tabulated_and_drawn(tmp_path, capsys):
    out = tmp_path / "cost_grid.jsonl"
    assert cost_grid.main(["measure", "--device", "cpu", "--out", str(out)]) == 0
    found = list(records.read([out]))
    assert {record["part"] for record in found} == {"ceilings", "cell"}
    assert all("error" not in record for record in found)
    assert cost_grid.main(["fit", str(out), "--save", str(tmp_path / "profile.json")]) == 0
    assert Profile.load(tmp_path / "profile.json").measured
    assert "chosen within 5% of the best" in capsys.readouterr().out
    text = report.table(found)
    assert "| sdpa/causal |" in text
    assert "whole sparse call" in text
    pytest.importorskip("matplotlib")
    assert len(report.plot(found).axes) == 2


def test_a_cell_that_fails_is_recorded(tmp_path, monkeypatch):
    from sparsify.commands.calibrate import timing

    def measure(cell, device, **more):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(timing, "measure", measure)
    out = tmp_path / "cost_grid.jsonl"
    assert cost_grid.main(["measure", "--device", "cpu", "--out", str(out)]) == 0
    failures = [record for record in records.read([out]) if record["part"] == "cell"]
    assert {record["error"] for record in failures} == {"RuntimeError: out of luck"}
    assert cost_grid.newest_run(records.read([out]))[1] == []


def test_whole_models_stand_beside_what_was_measured():
    machine = {"gpu": H200.name}
    measured = [
        {"benchmark": "prefill", "time": "t", "shape": "8b", "layers": 32, "variant": variant, "length": n, "ms": 1.0, "density": density}
        | {"requested_density": density, "machine": machine}
        for variant, density in (("eager", None), ("dense", None), ("xattention", 0.1))
        for n in (4 * K, 128 * K)
    ]
    rows = report.model_rows(measured, H200)
    assert len(rows) == 6
    by_name = {(row[0], row[1]): float(row[3]) for row in rows}
    for length, slow in itertools.product(("4K", "128K"), ("eager",)):
        assert by_name[(f"prefill, {slow}", length)] > by_name[("prefill, sparsify, dense", length)]
    assert by_name[("prefill, sparsify, xattention, density 0.1", "128K")] < by_name[("prefill, sparsify, dense", "128K")] / 2

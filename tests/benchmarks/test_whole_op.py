"""The whole-op benchmark: its data are sparse and repeatable, thresholds are found, records and the table say what was measured."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lib import records
from benchmarks.whole_op import report, run
from benchmarks.whole_op.data import find_threshold
from sparsify.commands.calibrate.structured import SINK_TOKENS, structured


def small(length=2048, **changes):
    return structured(length, **{"heads": 4, "kv_heads": 2, "dtype": torch.float32, "device": "cpu", **changes})


def test_data_are_repeatable_and_their_attention_is_structured():
    query, key, _ = small()
    assert all(torch.equal(one, other) for one, other in zip(small(), small(), strict=True))
    assert not torch.equal(query, small(seed=1)[0])
    rows = torch.arange(1024, 2048, 31)
    logits = (query[0, :, rows] @ key[0].repeat_interleave(2, 0).mT * 128**-0.5).masked_fill(torch.arange(2048) > rows[:, None], -torch.inf)
    mass = logits.softmax(-1)
    sink, local = mass[..., :SINK_TOKENS].sum(-1), mass.where(torch.arange(2048) > rows[:, None] - 64, 0).sum(-1)
    assert 0.05 < sink.mean() < 0.9 and 0.05 < local.mean() < 0.9
    assert mass.sort(descending=True).values[..., :205].sum(-1).mean() > 0.9, "a tenth of the keys holds most of the mass"


@given(st.floats(0.02, 0.95), st.floats(0.3, 4.0))
def test_bisection_finds_the_density(target, power):
    curve = lambda threshold: 0.01 + 0.99 * threshold**power
    threshold, density = find_threshold(curve, target, steps=40)
    assert density == curve(threshold) and abs(density / target - 1) < 0.005


def test_a_density_out_of_reach_is_reported_as_it_is():
    assert find_threshold(lambda threshold: 0.5 + threshold / 2, 0.1) == (0.0, 0.5)


@pytest.mark.parametrize(
    "pool, share",
    [
        ("max", 1 / 32),
        ("max+half", 1 / 64),
        ("sum+group", 1 / 128),
        ("max+half+int8", 1 / 128),
        ("max+pair", 1 / 64),
        ("max+quad", 1 / 128),
    ],
)
def test_estimate_share(pool, share):
    assert run.estimate_share(16, pool, 4) == share


def test_mass_kept():
    dense = torch.tensor([0.0, 1.0])
    assert run.kept_mass(dense - math.log(2), dense) == pytest.approx(0.5)
    assert run.kept_mass(torch.tensor([-torch.inf, 1.0]), dense) == 0.5


def test_cells_compare_estimates_at_one_density_and_densities_at_one_estimate():
    found = run.cells(131072)
    assert len(set(found)) == len(found)
    assert {cell.target for cell in found if (cell.stride, cell.pool) == run.MAIN} >= {0.05, 0.07, 0.1, 0.2}
    assert {cell.target for cell in found if (cell.stride, cell.pool) != run.MAIN} == {0.07}


@pytest.mark.slow
def test_a_run_on_the_cpu_leaves_records_from_which_table_and_plot_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "DENSITIES", (0.3, 0.5))
    monkeypatch.setattr(run, "ESTIMATES", ((16, "max+half+int8"),))
    monkeypatch.setitem(run.TARGET, 2048, 0.5)
    for name, few in (("ROUNDS", 2), ("SAMPLE_MS", 1.0), ("MOST", 2)):
        monkeypatch.setattr(run, name, few)
    out = tmp_path / "whole_op.jsonl"
    command = ["--device", "cpu", "--out", str(out), "--lengths", "2048", "--heads", "2", "--kv-heads", "1"]
    assert run.main(command) == 0
    found = list(records.read([out]))
    sparse = [record for record in found if record["kind"] == "sparse"]
    assert [record["name"] for record in found if record["kind"] == "dense"] == ["sdpa", "ours, dense"]
    assert [(record["pool"], record["target"]) for record in sparse] == [("max", 0.5), ("max+half+int8", 0.5), ("max", 0.3)]
    for record in sparse:
        assert abs(record["density"] - record["target"]) < 0.05
        assert 0.3 < record["kept_mass"] < 1 and record["ms"] > 0
        assert record["speedup"] == pytest.approx(found[0]["ms"] / record["ms"])
        assert record["bound"] == pytest.approx(1 / (record["density"] + record["estimate_share"]))
    table = report.table(found)
    assert table.count("| 2K |") == 5 and "max+half+int8, stride 16" in table
    assert len(report.plot(found).axes) == 2

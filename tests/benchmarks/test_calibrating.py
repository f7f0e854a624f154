"""The benchmark of calibrating, over a tiny model on a CPU."""

import json

import pytest

from benchmarks.model import calibrating, report


@pytest.mark.slow
def test_both_comparisons_give_plans(tmp_path):
    out = tmp_path / "calibrating.jsonl"
    given = ["--shape", "tiny", "--lengths", "512", "1024", "--pieces", "1", "--density", "0.9", "--device", "cpu", "--out", str(out)]
    assert calibrating.main([*given, "--option", "xattention.stride=8", "--option", "xattention.pool=row"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["variant"] for r in found] == ["error", "loss"]
    assert all(r["s"] > 0 and 0 < r["heads"] <= 2 * 4 for r in found)
    text = report.calibrating_table(found)
    assert "1 of each of 512, 1K" in text and "xattention.stride=8" in text

"""Decode over caches that keep everything: the benchmark runs on a CPU, every contestant computes the same, and the table shows it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cache import DecodeFull, full, report
from benchmarks.lib import records


def test_every_contestant_computes_the_same(tmp_path: Path) -> None:
    out = tmp_path / "decode.jsonl"
    full.main(["--device", "cpu", "--shape", "tiny", "--calls", "3x96p", "1x100", "--out", str(out)])
    found = list(records.read([out]))
    assert {r["benchmark"] for r in found} == {DecodeFull.NAME}
    ours = {"full cache", "static cache", "static cache, mask given", "masked"}
    assert {r["variant"] for r in found if r["padded"]} == ours | {"dynamic cache"}
    assert {r["variant"] for r in found if not r["padded"]} == ours | {"sdpa"}
    assert all(r["error"] < 1e-5 and r["ms"] > 0 for r in found)
    text = report.full_table(found)
    assert "| 3 x 96, padded | full cache |" in text and "| 1 x 100 | SDPA |" in text

"""The benchmark of self-speculation runs tiny on a CPU, and its table says what the records say."""

from __future__ import annotations

import json

import pytest

from benchmarks.model import report, speculation


def test_tables_compare_with_no_drafts() -> None:
    machine = {"gpu": "H200", "commit": "a" * 40, "torch": "2.11"}
    facts = {"benchmark": "speculation", "time": "2026-01-01T00:00:00+00:00", "machine": machine, "layers": 32, "tokens": 128}
    facts |= {"length": 131072, "share": 0.05}
    found = [
        facts | {"shape": "8b", "drafts": "0", "ms": 8.0, "trained": False},
        facts | {"shape": "8b", "drafts": "4", "ms": 5.0, "ms_a_round": 20.0, "kept": 0.75, "trained": False},
        facts | {"shape": "code", "drafts": "auto", "ms": 4.0, "ms_a_round": 20.0, "kept": 0.75, "same_tokens": 128, "trained": True},
        facts | {"shape": "code", "drafts": "15", "error": "out of memory", "trained": True},
    ]
    text = report.speculation_table(found)
    assert "| 8b | 128K | none | – | 8.00 | 1.00 | – | – | – |" in text
    assert "| 8b | 128K | 4 | 5% | 5.00 | 1.60 | 20.00 | – | – |" in text, "random weights keep nothing that means something"
    assert "| code | 128K | auto | 5% | 4.00 | – | 20.00 | 75% | 128 of 128 |" in text
    assert "failed: out of memory" in text


@pytest.mark.slow
def test_it_runs_tiny(tmp_path) -> None:
    out = tmp_path / "speculation.jsonl"
    arguments = ["--shape", "tiny", "--lengths", "96", "--tokens", "12", "--drafts", "0", "2", "auto", "--repeats", "1", "--device", "cpu"]
    assert speculation.main([*arguments, "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["drafts"] for record in found] == ["0", "2", "auto"]
    assert all(record["ms"] > 0 for record in found) and 0 <= found[1]["kept"] <= 1 and found[1]["ms_a_round"] > found[1]["ms"]

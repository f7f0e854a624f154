"""Records and the table of what `sparsify eval` finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.answers import tasks, tasks_report
from benchmarks.lib import records
from sparsify.commands.eval import cells, report, settings
from sparsify.commands.exit_codes import FAILED
from sparsify.commands.provenance import machine

QUESTIONS = tuple("abcd")


def cell(setting: str, task: str, *scores: float, **more: object) -> cells.Cell:
    return cells.Cell(setting=setting, task=task, length=8192, scores=scores, questions=QUESTIONS, seconds=1.0, **more)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    chosen = settings.all_of(["default", "tau=0.9"], ["snapkv:512"])
    found = [
        cell("dense", "niah", 1, 1, 1, 0),
        cell("default", "niah", 1, 0, 1, 1, density=0.25),
        cell("τ 0.9", "niah", 0, 0, 1, 0, density=0.1),
        cell("dense", "text", 2.0, 2.1, 2.2, 2.3, metric="nll", higher_is_better=False),
        cell("default", "text", 2.1, 2.1, 2.2, 2.3, metric="nll", higher_is_better=False, density=0.25),
        cells.Cell(setting="snapkv 512, question inside", task="niah", length=8192, error="OutOfMemoryError: x"),
    ]
    facts = {
        "time": "2026-01-02T03:04:05+00:00", "model": "some", "model_digest": "d" * 64, "model_sha256": None, "text_sha256": None,
        "machine": machine(), "settings": [one.data() for one in chosen], "lengths": [8192], "samples": 4, "batch": 1, "dtype": "auto",
        "chat": False,
    }  # fmt: skip
    path = tmp_path / "found.json"
    path.write_text(json.dumps(report.data(found, facts)))
    return path


def test_what_eval_wrote_becomes_records_and_a_table(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "task_answers.jsonl"
    assert tasks.main(["--from", str(file), "--out", str(out)]) == FAILED  # one cell has failed
    found = list(records.read([out]))
    assert len(found) == 6 and {record["time"] for record in found} == {"2026-01-02T03:04:05+00:00"}
    sparse = next(record for record in found if record["setting"] == "τ 0.9")
    assert (sparse["asked"], sparse["mean"], sparse["difference"], sparse["lost"], sparse["gained"]) == (4, 0.25, -0.5, 2, 0)
    assert sparse["options"]["xattention"]["threshold"] == 0.9
    assert next(record for record in found if "error" in record)["cache"]["policy"] == "snapkv"
    table = tasks_report.table(found)
    assert "| `dense` | 0.750 [0.30, 0.95] | 2.1500 | – |" in table
    assert "| `default` | 0.750 [0.30, 0.95] · 25.0% | 2.1750 · 25.0% | niah: +0.000 (1 worse, 1 better) |" in table
    assert "niah: -0.500 (2 worse, 0 better)" in table and "OutOfMemoryError" in table


def test_either_a_file_or_a_run(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([], ["--from", str(file), "MODEL"]):
        with pytest.raises(SystemExit):
            tasks.main(wrong)
    assert tasks.main([str(tmp_path / "none"), "--out", str(tmp_path / "out.jsonl")]) == 2  # as `sparsify eval` ends
    assert "there is no such folder" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()

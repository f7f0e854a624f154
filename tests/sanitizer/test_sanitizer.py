"""The sanitizer's runs are judged by what it says, and its absence is no failure."""

from __future__ import annotations

import json
import re
import stat
import sys
from pathlib import Path

import pytest

from tests.sanitizer import run

CLEAN = "DONE plain\nDONE half\n========= ERROR SUMMARY: 0 errors\n"
RACE = "========= Error: Race reported at score+0x10\nDONE plain\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"

STAND_IN = """\
import sys
race = "racecheck" in sys.argv
print("DONE plain")
print("========= RACECHECK SUMMARY: 1 hazard" if race else "========= ERROR SUMMARY: 0 errors")
sys.exit(99 if race else 0)
"""


@pytest.mark.parametrize(
    "text, code, tool, status",
    [
        (CLEAN, 0, "memcheck", "clean"),
        ("DONE plain\n", 0, None, "clean"),
        (RACE, 99, "racecheck", "found"),
        ("DONE plain\n", None, "racecheck", "late"),
        ("Traceback\nValueError: no\n", 1, None, "failed"),
        ("========= COMPUTE-SANITIZER\n", 0, "memcheck", "failed"),
    ],
)
def test_judge(text, code, tool, status):
    found = run.judge(text, code, tool)
    assert found["status"] == status
    assert ("says" in found) == (status != "clean")
    assert found["done"] == [line[5:] for line in text.splitlines() if line.startswith("DONE")]


def test_absent(monkeypatch, capsys):
    monkeypatch.setattr(run, "find_tool", lambda: None)
    assert run.main([]) == 0
    assert "absent" in json.loads(capsys.readouterr().out)["summary"]


def test_runs_are_put_together(monkeypatch, capsys, tmp_path):
    """With a stand-in for the tool that finds a race, and workers that only say what they ran."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\n{STAND_IN}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("COMPUTE_SANITIZER", str(tool))
    command = run.command
    alone = [sys.executable, "-c", "print('DONE plain')"]
    monkeypatch.setattr(run, "command", lambda family, tool, path: command(family, tool, path) if tool else alone)
    assert run.main(["--families", "select", "--record", str(tmp_path / "out.jsonl")]) == 1
    *found, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert summary["summary"] == {"select memcheck": "clean", "select racecheck": "found"}
    assert [one["reports"] for one in found] == [0, 1]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_every_generated_module_is_in_some_family():
    """By the names under which the backends load them; a selection's goes on with its spec."""
    backends = Path(run.__file__).parents[2] / "backends"
    texts = [path.read_text() for path in backends.rglob("*.py")]
    loaded = {name.rstrip("_") for text in texts for name in re.findall(r"source\.load\(.*f?\"([a-z_]+)[\"{]", text)}
    assert "select" in loaded and "ffn_rows" in loaded
    assert loaded == {name for names in run.FAMILIES.values() for name in names}

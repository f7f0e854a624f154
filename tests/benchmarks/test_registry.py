"""Benchmarks are found in their folders, and what was recorded is what they declare."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.lib import records, registry

FOUND = registry.find()
KINDS = {kind.NAME: kind for one in FOUND for kind in one.records + one.unshown}


def test_every_folder_with_a_report_declares_its_benchmarks() -> None:
    folders = {path.parent.name for path in (Path(command.__file__).parent).glob("*/report.py")}
    assert folders == {one.table.__module__.split(".")[1] for one in FOUND if one.table}
    assert [one.place for one in FOUND] == sorted(one.place for one in FOUND)


@pytest.mark.parametrize("one", FOUND, ids=lambda one: one.name)
def test_a_benchmark_can_be_run_or_its_records_shown(one: registry.Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    assert one.measures and bool(one.table) == bool(one.title) == bool(one.records)
    if one.module:
        with pytest.raises(SystemExit) as left:
            command.main(["run", one.name, "--help"])
        assert left.value.code == 0 and "usage:" in capsys.readouterr().out
        assert importlib.import_module(one.module).main


def test_keys_are_fields() -> None:
    for kind in KINDS.values():
        assert set(kind.KEYS) <= {one.name for one in fields(kind)}, kind


def test_committed_records_hold_what_is_declared() -> None:
    for path in records.RESULTS.glob("*.jsonl"):
        for record in records.read([path]):
            kind = KINDS[record["benchmark"]]
            declared = {one.name for one in fields(kind)}
            assert "more" in declared or record.keys() - {"benchmark", "time", "machine"} <= declared, record
            needed = {one.name for one in fields(kind) if one.default is not None} - {"more"}
            assert needed - record.keys() <= LATER.get(kind.NAME, set()), record


# fields that lines from before they existed lack
LATER = {"decode_model": {"tuned", "ms_per_token_read_back"}, "compile_time": {"repeats"}}


def test_two_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.answers import report

    monkeypatch.setattr(report, "BENCHMARKS", report.BENCHMARKS * 2)
    with pytest.raises(ValueError, match="declared twice: answers"):
        registry.find()


def test_the_command_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(one.name in listed for one in FOUND)
    for wrong in ([], ["run"], ["run", "nothing"], ["run", "soundness"]):
        assert command.main(wrong) == 2
    assert "whole_op" in capsys.readouterr().err


def test_the_page_of_benchmarks_names_every_one() -> None:
    page = (records.RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    assert [one.name for one in FOUND if one.module and f"`python -m benchmarks run {one.name}" not in page] == []

"""What the journal knows as records in benchmarks/results: one line per model type, without what is as it should be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import records
from benchmarks.test_runs import Sweep
from tests.sweep.check import Finding
from tests.sweep.journal import Entry, Subject, open_scenarios, verdict

FILE = records.RESULTS / "sweep.jsonl"
RECORDS = "records.jsonl"  # in a folder of what was found on another machine


def record(known: Mapping[Subject, Mapping[str, Entry]], path: Path = FILE) -> int:
    """Appends a line for each type; 1 where scenarios of some have not been run, which their lines say."""
    unfinished = [subject.model_type for subject, entries in known.items() if open_scenarios(dict(entries))]
    for subject, entries in known.items():
        records.append(path, line(subject, entries))
    print(f"{len(known)} types recorded in {path}; {len(unfinished)} are not finished: {', '.join(unfinished)}")
    return int(bool(unfinished))


def take(brought: Path, path: Path = FILE) -> int:
    """Appends another machine's records that are not there yet, as it wrote them.

    Raises:
        ValueError: a line is no record of a sweep, or does not say of which commit it is.
    """
    lines = list(records.read([brought]))
    for one in lines:
        if one["benchmark"] != Sweep.NAME or not one["machine"].get("commit"):
            raise ValueError(f"{brought}: no record of a sweep with its commit: {one}"[:300])
    known = {json.dumps(one) for one in records.read([path])} if path.exists() else set()
    new = [text for text in map(json.dumps, lines) if text not in known]
    with path.open("a") as stream:
        stream.writelines(text + "\n" for text in new)
    print(f"{len(new)} of {len(lines)} types recorded in {path}")
    return 0


def line(subject: Subject, entries: Mapping[str, Entry]) -> Sweep:
    some = next(iter(entries.values()))
    return Sweep(
        task=subject.which,
        model=subject.model_type,
        attention=subject.attention,
        verdict=verdict(entry.finding for entry in entries.values()),
        trained=some.trained,
        part=some.part or None,
        sees=some.sees or None,
        unrun=open_scenarios(dict(entries)) or None,
        note=entries[""].finding.note if "" in entries else None,
        found={name: _brief(entry.finding) for name, entry in entries.items() if name},
    )


def _brief(finding: Finding) -> dict[str, Any]:
    """Without zeros and what was not found; the error rounded."""
    values = {name: value for name, value in dataclasses.asdict(finding).items() if value not in (None, "", 0, {})}
    if "error" in values:
        values["error"] = float(f"{values['error']:.1e}") if values["error"] < 1e30 else None
    return values

"""Answers of any model by task and setting, as records: what `sparsify eval` asks, beside dense attention on the same questions.

    python -m benchmarks run task_answers MODEL --tasks ruler --lengths 8K --samples 96    # all arguments of `sparsify eval`
    python -m benchmarks run task_answers --from FILE                                      # what `sparsify eval --json FILE` wrote

Appends to benchmarks/results/task_answers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.answers import TaskAnswers
from benchmarks.lib import records
from sparsify.commands import main as command_line
from sparsify.commands.exit_codes import FAILED


def of(found: dict[str, Any]) -> Iterator[tuple[TaskAnswers, dict[str, Any]]]:
    """The records of what `sparsify eval --json` wrote, each with the time and the machine that it names."""
    settings = {one["name"]: one for one in found["settings"]}
    shared = {name: found[name] for name in ("model", "model_digest", "model_sha256", "text_sha256", "dtype", "chat", "samples")}
    for cell in found["cells"]:
        setting = settings[cell["setting"]]
        against = cell["against_dense"] or {}
        record = TaskAnswers(
            **shared,
            **{name: cell[name] for name in ("setting", "task", "metric", "length", "density", "seconds", "error")},
            options=setting.get("options"),
            cache=setting.get("cache"),
            asked=len(cell["scores"]) or None,
            mean=cell.get("mean"),
            interval=cell.get("interval"),
            difference=against.get("mean"),
            difference_interval=against.get("interval"),
            lost=against.get("lost"),
            gained=against.get("gained"),
        )
        yield record, {"time": found["time"], "machine": found["machine"]}


def keep(file: Path, out: Path) -> int:
    """Appends the records of a file that `sparsify eval --json` wrote; returns how many are failures."""
    failed = 0
    for record, where in of(json.loads(file.read_text())):
        records.append(out, record, where)
        failed += record.error is not None
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="other arguments: those of `sparsify eval`")
    parser.add_argument(
        "--from", dest="files", type=Path, action="append", default=[], metavar="FILE", help="what `sparsify eval --json` wrote"
    )
    parser.add_argument("--out", type=Path, default=records.RESULTS / "task_answers.jsonl")
    options, asked = parser.parse_known_args(arguments)
    if bool(options.files) == bool(asked):
        parser.error("either --from FILE, or arguments of `sparsify eval`")
    if options.files:
        return FAILED if sum(keep(file, options.out) for file in options.files) else 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        code = command_line.main(["eval", *asked, "--json", str(file)])
        if file.exists():
            keep(file, options.out)
    return code


if __name__ == "__main__":
    sys.exit(main())

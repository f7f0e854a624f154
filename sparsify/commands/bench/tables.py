"""What every table of results needs: the latest record of a cell, Markdown, and the line that says where numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparsify.commands.bench.records import Record

Found = dict[str, Any]  # a line of results as it was read; older ones lack fields that came later
Row = list[str]


def kind(found: Iterable[Found], *kinds: type[Record]) -> list[Found]:
    """The lines of some kinds."""
    names = {one.NAME for one in kinds}
    return [record for record in found if record["benchmark"] in names]


def latest(found: Iterable[Found], of: type[Record], *keys: str) -> list[Found]:
    """The last line of each cell, a cell being the values of the kind's keys, or of `keys` alone, and the device."""
    cells: dict[str, Found] = {}
    for record in kind(found, of):
        cell = repr([record.get(key) for key in keys or of.KEYS] + [record["machine"]["gpu"]])
        if cell not in cells or record["time"] >= cells[cell]["time"]:
            cells[cell] = record
    return list(cells.values())


def measured(found: Iterable[Found], of: type[Record], *keys: str) -> list[Found]:
    """As `latest`, without the cells that failed."""
    return [record for record in latest(found, of, *keys) if "error" not in record or "ms" in record]


def newest_device(found: Iterable[Found]) -> list[Found]:
    """The lines of the device that the newest one is of."""
    found = list(found)
    device = max(found, key=lambda record: record["time"])["machine"]["gpu"] if found else None
    return [record for record in found if record["machine"]["gpu"] == device]


def by_device(found: Iterable[Found]) -> list[list[Found]]:
    return groups(found, lambda record: record["machine"]["gpu"] or "CPU")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def size(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def failure(message: str) -> str:
    """Why a cell has no number, short enough for a table."""
    return "failed: " + (message.splitlines() or [""])[0][:60].replace("|", "/")


def groups(cells: Iterable[Found], key: Callable[[Found], Any]) -> list[list[Found]]:
    """The records by the value of `key`, in its order."""
    found: dict[Any, list[Found]] = {}
    for record in cells:
        found.setdefault(key(record), []).append(record)
    return [found[name] for name in sorted(found, key=repr)]


def conditions(found: Sequence[Found]) -> str:
    """One line that says where a table's numbers come from; several machines or commits are all named."""
    parts = []
    for name, label in (("gpu", ""), ("driver", "driver "), ("torch", "torch "), ("triton", "triton "), ("transformers", "transformers ")):
        values = sorted({str(record["machine"].get(name)) for record in found} - {"None"})
        parts += [label + ", ".join(values)] if values else (["CPU"] if name == "gpu" else [])
    commits = sorted(set(map(commit, found)))
    return "; ".join([*parts, "commit " + ", ".join(commits)]) + "."


def commit(record: Found) -> str:
    """The commit that a record was measured on, as `short` gives it."""
    return short(record["machine"].get("commit") or "unknown")


def short(commit: str) -> str:
    """Ten digits, and still saying when the code was not quite that commit's."""
    name, plus, changes = commit.partition("+")
    return name[:10] + plus + changes

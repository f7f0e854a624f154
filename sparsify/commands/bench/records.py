"""Results as JSON lines that say where they come from: versions, GPU, driver, commit, digests of model and text, seeds, time.

One record a line, appended as soon as it is measured, so that a run that is cut short loses nothing. Tables and plots are made from these
lines alone.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from sparsify.commands.provenance import machine


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one line says; a subclass lists its fields, with units.

    NAME: the line's `benchmark`. KEYS: the fields that tell cells of a table apart; of several records of one cell the latest counts.
    A field that defaults to None is left out where it is None: it was not measured, or did not exist when older lines were written.
    `more`, where a subclass has it, holds values whose names depend on what ran.
    """

    NAME: ClassVar[str]
    KEYS: ClassVar[tuple[str, ...]] = ()

    def values(self) -> dict[str, Any]:
        pairs = ((one, getattr(self, one.name)) for one in fields(self))
        found = {one.name: value for one, value in pairs if one.default is not None or value is not None}
        return found | found.pop("more", {})


def line_of(record: Record) -> dict[str, Any]:
    """A record with its time and where it was measured."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"benchmark": record.NAME, "time": time, **record.values(), "machine": machine()}


def append(path: Path, record: Record, where: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Appends one line to `path` and returns it as a dictionary. Raises ValueError for NaN and infinities, which are not JSON.

    Args:
        where: `time` and `machine` of what was measured there; None: now and here.
    """
    line = {**line_of(record), **(where or {})}
    text = json.dumps(line, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(text + "\n")
    return line


def read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The lines of the files, oldest file first. Raises ValueError naming the file and line of anything that is no record."""
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                missing = {"benchmark", "time", "machine"} - {*record}
                if missing:
                    raise KeyError(*missing)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is no record: {error}") from error
            yield record

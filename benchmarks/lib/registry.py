"""Benchmarks declare themselves: each folder's report.py lists what it has in BENCHMARKS; the commands and the page find them here."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import benchmarks
from benchmarks.lib.records import Record
from benchmarks.lib.tables import Found


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark: how it is run, what it records, and what is made of its records.

    name: of `python -m benchmarks run NAME`.
    place: benchmarks come in this order, on the page of results and in what other texts quote.
    measures: one line for `python -m benchmarks list`.
    module: has `main(arguments) -> exit status`; None where runs of the tests leave the records.
    records: what its table shows; `beside`: other benchmarks' records that the table compares with; `unshown`: its own without a table.
    title, table: its section on the page, Markdown; without a table it has none.
    plots: by file name without .png, what draws a figure of all records, or None when there is nothing to draw.
    headlines: rows of docs/benchmarks.md: what, measured, beside.
    shortfalls: lines of docs/benchmarks.md: what is slower, worse or missing.
    """

    name: str
    place: int
    measures: str
    module: str | None = None
    records: tuple[type[Record], ...] = ()
    beside: tuple[type[Record], ...] = ()
    unshown: tuple[type[Record], ...] = ()
    title: str = ""
    table: Callable[[list[Found]], str] | None = None
    plots: dict[str, Callable[[list[Found]], Any]] = field(default_factory=dict)
    headlines: Callable[[list[Found]], list[list[str]]] = lambda found: []
    shortfalls: Callable[[list[Found]], list[str]] = lambda found: []


def find() -> list[Benchmark]:
    """Every benchmark of every folder, in order of place. Raises ValueError where two have one name, or show one kind of record."""
    found: list[Benchmark] = []
    for folder in pkgutil.iter_modules(benchmarks.__path__, "benchmarks."):
        if folder.ispkg and importlib.util.find_spec(f"{folder.name}.report"):
            found += importlib.import_module(f"{folder.name}.report").BENCHMARKS
    for names in ([one.name for one in found], [record.NAME for one in found for record in one.records + one.unshown]):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"declared twice: {', '.join(twice)}")
    return sorted(found, key=lambda one: one.place)

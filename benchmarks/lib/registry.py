"""Benchmarks declare themselves: each folder's report.py lists what it has in BENCHMARKS; the commands and the page find them here."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

import benchmarks
from sparsify.commands.bench.registry import Benchmark

__all__ = ["Benchmark", "find"]


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

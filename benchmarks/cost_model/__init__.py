"""Is the cost model right? What it predicts beside what was measured."""

from dataclasses import dataclass
from typing import Any

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class CostGrid(Record):
    """part: "ceilings" begins a run and says what the device can do; "cell" is one call of the run that began at `run`.
    only: parts of the grid that the run measures; None: all."""

    NAME = "cost_grid"
    part: str
    run: str | None = None
    only: list[str] | None = None
    cell: dict[str, Any] | None = None  # a sparsify.costs.samples.Workload
    seconds: float | None = None  # median
    asked: float | None = None  # density that the cell's lists were made for
    error: str | None = None
    flops: float | None = None  # a second, of a large matrix product
    bandwidth: float | None = None  # bytes a second
    launch: float | None = None  # seconds of an empty kernel
    device: str | None = None
    processors: int | None = None
    l2_bytes: int | None = None
    capability: list[int] | None = None

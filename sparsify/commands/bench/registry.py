"""What a benchmark is: what it measures and records, and what is made of its records. Those that measure any model are installed with the
package, for `sparsify bench`; the project's own are in `benchmarks/` of its repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsify.commands.bench.records import Record
from sparsify.commands.bench.tables import Found


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What `sparsify bench` measures.

    model: of transformers, on its device, in evaluation mode.
    name: of the model, in tables.
    ids: int64 [1, tokens], on the model's device; prompts are its beginnings.
    lengths: tokens of the prompts, rising.
    tokens: that a whole call generates.
    variants: of `VARIANTS`, in the order in which they run.
    options: settings of the variant "sparsify", as `sparsify.compile` takes them.
    repeats: timed calls after the first.
    """

    model: Any
    name: str
    ids: Tensor
    lengths: tuple[int, ...]
    tokens: int
    variants: tuple[str, ...]
    options: dict[str, Any]
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark: how it is run, what it records, and what is made of its records.

    name: of `python -m benchmarks run NAME`.
    place: benchmarks come in this order, on the page of results and in what other texts quote.
    measures: one line for `python -m benchmarks list`.
    module: has `main(arguments) -> exit status`; None where runs of the tests leave the records.
    on_model: measures a model of the user's and yields records; None where the benchmark is of something else.
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
    on_model: Callable[[Subject], Iterator[Record]] | None = None
    records: tuple[type[Record], ...] = ()
    beside: tuple[type[Record], ...] = ()
    unshown: tuple[type[Record], ...] = ()
    title: str = ""
    table: Callable[[list[Found]], str] | None = None
    plots: dict[str, Callable[[list[Found]], Any]] = field(default_factory=dict)
    headlines: Callable[[list[Found]], list[list[str]]] = lambda found: []
    shortfalls: Callable[[list[Found]], list[str]] = lambda found: []

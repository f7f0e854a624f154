"""docs/compatibility.md from recorded test runs: torch and triton by transformers, passed, failed or not run, with dates.

make test RECORD=--record-run=quick && python -m benchmarks report
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.test_runs import Compatibility
from sparsify.commands.bench.tables import kind

SUITES = {
    "quick": "The quick suite, `make test`: masks, rewriting, families of models, caches, references, kernels compiled for sm_90",
    "interpreter": "Generated kernels in Triton's interpreter, the second part of `make test`",
    "transformers": "What a release of transformers breaks first, `make test-newest-transformers`: families, names, caches, `generate()`",
    "gpu": "Kernels on a GPU, `make gpu`",
}
HEADER = """# Compatibility

Generated from recorded runs of the tests (`python -m benchmarks report`); nothing here is typed by hand.
A row is a release of torch with its triton, a column one of transformers. A cell is the latest run of that combination.
"""


def page(found: Iterable[dict[str, Any]]) -> str:
    """The page's text."""
    latest: dict[tuple[str, tuple[str, str], str], dict[str, Any]] = {}
    for run in kind(found, Compatibility):
        machine = run["machine"]
        stack = (_release(machine["torch"]), machine["triton"] or "none")
        latest[run["suite"], stack, machine["transformers"] or "none"] = run
    stacks = sorted({stack for _, stack, _ in latest}, key=lambda s: (_order(s[0]), _order(s[1])))
    transformers = sorted({release for *_, release in latest}, key=_order)
    parts = [HEADER]
    for suite, title in SUITES.items():
        if not any(key[0] == suite for key in latest):
            continue
        parts.append(f"## {title}\n")
        parts.append("| torch, triton | " + " | ".join(f"transformers {release}" for release in transformers) + " |")
        parts.append("|---|" + "---|" * len(transformers))
        for stack in stacks:
            cells = (_cell(latest.get((suite, stack, release))) for release in transformers)
            parts.append(f"| {stack[0]}, {stack[1]} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return "not run"
    counts, day = run["counts"], run["time"][:10]
    failed = counts["failed"] + counts["error"]
    return f"{failed} of {failed + counts['passed']} failed, {day}" if failed else f"{counts['passed']} passed, {day}"


def _release(version: str) -> str:
    """Without the build: 2.13.0 of 2.13.0+cpu."""
    return version.split("+")[0]


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())

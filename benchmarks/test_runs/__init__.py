"""What long runs of the tests leave: fuzzing, threads, compute-sanitizer, and the versions that the suites passed on."""

from dataclasses import dataclass
from typing import Any

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class Fuzz(Record):
    """`more`: what was asked and counted; `programs`, `seed`, `sites`, `rewritten` (sites by method)."""

    NAME = "fuzz"
    seconds: int
    wrong: list[Any]
    more: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Soak(Record):
    """`more`: what was asked (`threads`, `calls`, `lower`, `seed`, `switch_s`), and `wrong` and `errors`."""

    NAME = "soak"
    seconds: int
    by_kind: dict[str, int]  # calls
    more: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sanitize(Record):
    """One family of kernels under one tool of compute-sanitizer."""

    NAME = "sanitize"
    KEYS = ("family", "tool")
    family: str
    tool: str  # "none": alone
    status: str  # "clean", "found" (by the tool), "failed" (the run itself) or "late" (killed)
    done: list[str]  # calls
    reports: int
    seconds: float
    not_served: list[str] | None = None
    says: str | None = None  # the tool, unless clean


@dataclass(frozen=True, kw_only=True)
class Compatibility(Record):
    """One run of a suite of tests."""

    NAME = "compatibility"
    suite: str
    counts: dict[str, int]  # passed, failed, error, skipped
    failed: list[str]  # tests


@dataclass(frozen=True, kw_only=True)
class Sweep(Record):
    """One model type under the sweep of transformers' model types."""

    NAME = "sweep"
    KEYS = ("task", "model", "attention")
    task: str  # the list of model types, by its name in tests/sweep/lists.py
    model: str  # type
    attention: str  # "sdpa": what the type takes by itself; "eager": written out
    verdict: str  # of the whole type: the worst of its scenarios
    trained: bool = False  # chooses keys or blocks by itself
    part: str | None = None  # class of the language decoder, where only that was called
    sees: bool | None = None  # got images, with tokens for what its vision tower makes of them
    unrun: list[str] | None = None  # scenarios that were not run
    note: str | None = None  # why it was not built
    found: dict[str, dict[str, Any]]  # by scenario what tests/sweep/check.py's Finding says

"""What is decided at one site, as a record, and which site of a graph it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from pydantic import ConfigDict

from sparsify.matching.base import CACHE_SUFFIX, PlanKind, Site, SiteKind, plan_kind

# plan files are read without conversions between types
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Place(NamedTuple):
    """Which site of a graph: several may have one path, as tied layers, or two attentions of one module.

    kind: "attention", "ffn", "stream", "batch" or "token".
    name: the site's path.
    ordinal: its place among the `count` sites of this kind and path, from 0.
    """

    kind: PlanKind
    name: str
    ordinal: int = 0
    count: int = 1  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.count, which no one calls

    @property
    def site_kind(self) -> SiteKind:
        """What methods' `kinds` call it: plans tell a SparseCache's layer from other attention by its name alone."""
        return "cache" if self.kind == "attention" and self.name.endswith(CACHE_SUFFIX) else self.kind

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name}#{self.ordinal}"


def places(sites: Iterable[Site]) -> list[Place]:
    """The places of a graph's sites, which come in its order."""
    keys: list[tuple[PlanKind, str]] = [(plan_kind(site.kind), site.name) for site in sites]
    counts = Counter(keys)
    seen: Counter[tuple[PlanKind, str]] = Counter()
    found: list[Place] = []
    for key in keys:
        kind, name = key
        found.append(Place(kind, name, seen[key], counts[key]))
        seen[key] += 1
    return found


@dataclass
class Decision:
    """What happens at one site, in words and numbers that survive a round trip through JSON.

    site, ordinal, kind: which site, see `Place`.
    layer: the last integer in the site's path.
    phase: "prefill", "chunk" or "decode".
    sizes: by name, symbolic ones as text.
    mask: what was proved about it, in words.
    method, options: what the site is replaced by; method is None where it stays as it is.
    reason: why that.
    refusals: one line per method that declined.
    seconds, dense_seconds: expected at the example's sizes, None when unknown.
    density: share of causal blocks that is expected; realised_density: the share that a run computed.
    scratch: bytes of memory beside operands, while the site runs.
    error: that calibration measured for the method and options; 0 for exact methods.
    measured: {"method", "options", "error"} of everything that calibration tried here.
    formula, dense_formula: the seconds in letters.
    validation: what running the claim about this site showed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    site: str
    layer: int | None
    phase: str
    sizes: dict[str, str]
    mask: str
    method: str | None
    options: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    refusals: list[str] = field(default_factory=list)
    seconds: float | None = None
    dense_seconds: float | None = None
    density: float | None = None
    scratch: float | None = None
    error: float | None = None
    measured: list[dict[str, Any]] = field(default_factory=list)
    realised_density: float | None = None
    kind: PlanKind = "attention"
    formula: str = ""
    dense_formula: str = ""
    ordinal: int = 0
    validation: str = ""

    def leave(self, reason: str, refusal: str) -> None:
        """Takes back what was decided: the site stays as it is."""
        self.method, self.options, self.reason = None, {}, reason
        self.seconds = self.density = self.scratch = self.error = None
        self.formula = ""
        self.refusals.append(refusal)


def labels(decisions: Sequence[Decision]) -> list[str]:
    """A name for every decision's site: its path, with the ordinal where several have one path."""
    counts = Counter((d.kind, d.site) for d in decisions)
    return [str(Place(d.kind, d.site, d.ordinal, max(counts[d.kind, d.site], d.ordinal + 1))) for d in decisions]

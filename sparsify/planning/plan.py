"""A plan as a record: every site exactly once, rewritten by which method with which options, or left as it is and why. Prints, saves and
loads; given back, it decides."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

import torch
from pydantic import BaseModel, ConfigDict

from sparsify.errors import ConfigError, PlanError, nearest
from sparsify.matching.base import CACHE_SUFFIX, PlanKind, Site, SiteKind, plan_kind
from sparsify.ops import attention
from sparsify.planning.config import config
from sparsify.planning.method import Pass
from sparsify.planning.registry import discover

FORMAT = 1
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Place(NamedTuple):
    """Which site of a graph: several may have one path, as tied layers, or two attentions of one module.

    kind: "attention" or "ffn".
    name: the site's path.
    ordinal: its place among the `count` sites of this kind and path, from 0.
    """

    kind: PlanKind
    name: str
    ordinal: int = 0
    count: int = 1

    @property
    def site_kind(self) -> SiteKind:
        """What methods' `kinds` call it: plans tell a SparseCache's layer from other attention by its name alone."""
        return "cache" if self.kind == "attention" and self.name.endswith(CACHE_SUFFIX) else self.kind

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name}#{self.ordinal}"


def places(sites: Iterable[Site]) -> list[Place]:
    """The places of a graph's sites, which come in its order."""
    keys = [(plan_kind(site.kind), site.name) for site in sites]
    counts, seen = Counter(keys), Counter()
    found = []
    for key in keys:
        found.append(Place(*key, seen[key], counts[key]))
        seen[key] += 1
    return found


@dataclass
class Decision:
    """What happens at one site, in words and numbers that survive a round trip through JSON.

    site, ordinal, kind: see `Place`. method: None where the site stays as it is. refusals: one line per method that declined.
    measured: {"method", "options", "error"} of everything that calibration tried here. seconds, dense_seconds: expected, at the example's
    sizes, None when unknown. density: share of causal blocks, expected before a run and realised after one. formula, dense_formula: the
    same seconds in letters. validation: what running the claim about this site showed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
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


@dataclass
class Plan:
    """The decisions for one graph, in graph order."""

    decisions: list[Decision] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {"torch": torch.__version__, "ops": str(attention.VERSION)})
    fallback: str = ""  # why the whole graph was left untouched, empty otherwise
    device: str = ""  # whose profile the seconds come from, and what that is worth

    @property
    def rewritten(self) -> list[Decision]:
        return [d for d in self.decisions if d.method is not None]

    def labels(self) -> list[str]:
        """A name for every decision's site: its path, with the ordinal where several have one path."""
        counts = Counter((d.kind, d.site) for d in self.decisions)
        return [str(Place(d.kind, d.site, d.ordinal, max(counts[d.kind, d.site], d.ordinal + 1))) for d in self.decisions]

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        for decision in data["decisions"]:  # a cost may have no bound, which JSON has no number for
            decision.update({key: None for key, value in decision.items() if isinstance(value, float) and not math.isfinite(value)})
        return json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Raises PlanError for text that is not a plan of this format, in every detail."""
        try:
            data = json.loads(text, parse_constant=_no_number)
            if not isinstance(data, dict):
                raise ConfigError("must be a table")
            if data.get("format", FORMAT) != FORMAT:
                raise PlanError(f"plan of format {data['format']!r}", where=where, hint=f"this version reads format {FORMAT}")
            file = config.validate(_File, data, "")
            for i, decision in enumerate(file.decisions):
                for j, one in enumerate(decision.measured):
                    config.validate(_Measured, one, "", f"decisions[{i}].measured[{j}]")
        except (ValueError, RecursionError, ConfigError) as error:
            hint = getattr(error, "hint", "") or "save one with Plan.save"
            place, what = getattr(error, "where", "").removeprefix(": "), getattr(error, "what", error)
            raise PlanError(f"not a plan file: {place + ': ' if place else ''}{what}", where=where, hint=hint) from None
        return cls(file.decisions, file.versions, file.fallback, file.device)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises PlanError where the file cannot be read or is no plan."""
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise PlanError(f"cannot read the plan: {error.strerror}", where=str(path)) from None
        except UnicodeDecodeError:
            raise PlanError("not a plan file: not UTF-8 text", where=str(path), hint="save one with Plan.save") from None
        return cls.from_json(text, str(path))

    def __str__(self) -> str:
        from sparsify.planning.report import table

        return table(self)


class _Measured(BaseModel):
    model_config = _STRICT
    method: str
    options: dict[str, Any]
    error: float


class _File(BaseModel):
    model_config = _STRICT
    format: Literal[1]
    decisions: list[Decision]
    versions: dict[str, str] = {}
    fallback: str = ""
    device: str = ""


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON knows")


class Followed:
    """A plan that decides, by site.

    Args:
        where: its file, for messages.

    Raises:
        PlanError: a method or option that does not exist, or two decisions for one site that differ.
    """

    def __init__(self, plan: Plan, where: str):
        self.plan, self.where = plan, where
        self._decisions: dict[tuple[str, str], list[Decision]] = defaultdict(list)
        methods = discover()
        for index, (decision, label) in enumerate(zip(plan.decisions, plan.labels(), strict=True)):
            _check(decision, methods, where, f"decisions[{index}]")
            others = self._decisions[decision.kind, decision.site]
            if any(other.ordinal == decision.ordinal and _says(other) != _says(decision) for other in others):
                what = f"ambiguous: two decisions for site {label} differ"
                raise PlanError(what, where=where, hint="save the plan of one call, as sparsify.explain makes it")
            others.append(decision)

    def has(self, place: Place) -> bool:
        return (place.kind, place.name) in self._decisions

    def find(self, place: Place) -> Decision:
        """The decision for a site.

        Raises:
            PlanError: there is none, or the plan has another number of sites of this path, so that which is which cannot be told.
        """
        found = self._decisions.get((place.kind, place.name), [])
        if not found:
            hint = "make a plan for this model with sparsify.explain"
            raise PlanError(f"the plan has no entry for site {place}", where=self.where, hint=hint)
        if all(_says(one) == _says(found[0]) for one in found) and (len(found) > 1 or place.count == 1):
            return found[0]
        if {one.ordinal for one in found} != set(range(place.count)):
            what = f"ambiguous: {len(found)} decisions for site {place.name or '(a function)'}, of which the graph has {place.count}"
            raise PlanError(what, where=self.where, hint="make a plan for this model and call with sparsify.explain")
        return next(one for one in found if one.ordinal == place.ordinal)


def follow(path: Path | None) -> Followed | None:
    """The plan of a file, checked in full; None without a file. Raises PlanError."""
    return None if path is None else Followed(Plan.load(path), str(path))


def _says(decision: Decision) -> tuple[Any, ...]:
    return decision.method, decision.options, decision.measured


def _check(decision: Decision, methods: Mapping[str, type[Pass]], where: str, key: str) -> None:
    """Raises PlanError unless every method that is named exists, serves such sites and takes the options."""
    entries = [(key, decision.method, decision.options)] if decision.method is not None else []
    entries += [(f"{key}.measured[{i}]", one["method"], one["options"]) for i, one in enumerate(decision.measured)]
    for place, name, options in entries:
        if name not in methods:
            raise PlanError(f"unknown method {name!r}", where=f"{where}: {place}", hint=nearest(name, methods))
        if decision.kind not in map(plan_kind, methods[name].kinds):
            raise PlanError(f"{name} is no method for {decision.kind} sites", where=f"{where}: {place}")
        try:
            config.validate(methods[name], options, where, f"{place}.options")
        except ConfigError as error:
            raise PlanError(error.what, where=error.where, hint=error.hint) from None

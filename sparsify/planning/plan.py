"""A plan as a record: every site exactly once, rewritten by which method with which options, or left as it is and why. Prints, saves and
loads; given back (`planning.saved_plan`), it decides."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, Field

from sparsify import releases
from sparsify.errors import ConfigError, PlanError
from sparsify.graph.module_paths import layer_number
from sparsify.ops import attention
from sparsify.ops.block_maps import BlockMap
from sparsify.planning import report
from sparsify.planning.config import config
from sparsify.planning.config.values import is_table
from sparsify.planning.decision import STRICT, Decision
from sparsify.planning.page import page
from sparsify.planning.provenance import Calibration, Provenance

FORMAT = 1


def _versions() -> dict[str, str]:
    packages = {"sparsify": releases.DISTRIBUTION, "torch": "torch", "transformers": "transformers"}
    found = {name: version for name, package in packages.items() if (version := releases.installed(package)) is not None}
    return {**found, "ops": str(attention.VERSION)}


@dataclass
class Plan:
    """The decisions for one graph.

    decisions: one for each site, in the graph's order.
    versions: with which it was made, of packages and of our ops.
    fallback: why the whole graph was left untouched, empty otherwise.
    device: whose profile the seconds come from, and what that is worth.
    capture: how the model was captured where that was sparsify's choice: whole and why, or as regions.
    serves: layers for which the graph is called, each with its decisions here; 0 where it is no region.
    min_length: key length in tokens from which the plan's lossy methods act, unless the configuration names one; None: each method's own.
    provenance: which model it was made for; None where that is not known, as of a single graph.
    calibration: how it was calibrated; None where it was not.
    beside: expected seconds of what the graph computes beside its attention, by part (`sparsify.matching.beside.PARTS`), every feed-forward
        block computed; empty where nobody looked.
    block_maps: which blocks a run selected, by the site's label (`decision.labels`). Not saved as JSON.
    """

    decisions: list[Decision] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=_versions)
    fallback: str = ""
    device: str = ""
    capture: str = ""
    serves: int = 0
    min_length: int | None = None
    provenance: Provenance | None = None
    calibration: Calibration | None = None
    beside: dict[str, float] = field(default_factory=dict)
    block_maps: dict[str, BlockMap] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rewritten(self) -> list[Decision]:
        return [d for d in self.decisions if d.method is not None]

    def repeated(self, paths: Sequence[str]) -> Plan:
        """The same decisions for every module that the graph serves; it was named after the first of `paths`."""
        decisions: list[Decision] = []
        for path in paths:
            for decision in self.decisions:
                site = path + decision.site.removeprefix(paths[0]) if decision.site.startswith(paths[0]) else decision.site
                decisions.append(dataclasses.replace(copy.deepcopy(decision), site=site, layer=layer_number(site)))
        capture = f"one region for {len(paths)} layers" if len(paths) > 1 else "one region for 1 layer"
        beside = {part: seconds * len(paths) for part, seconds in self.beside.items()}
        return dataclasses.replace(self, decisions=decisions, capture=capture, serves=len(paths), beside=beside)

    def to_json(self) -> str:
        data = dataclasses.asdict(dataclasses.replace(self, block_maps={}))
        del data["block_maps"]
        for decision in data["decisions"]:  # a cost may have no bound, which JSON has no number for
            decision.update({key: None for key, value in decision.items() if isinstance(value, float) and not math.isfinite(value)})
        return _compact(json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=False))

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Raises PlanError for text that is not a plan of this format, in every detail."""
        try:
            data = json.loads(text, parse_constant=_no_number)
            if not is_table(data):
                raise ConfigError("must be a table")
            if data.get("format", FORMAT) != FORMAT:
                raise PlanError(f"plan of format {data['format']!r}", where=where, hint=f"this version reads format {FORMAT}")
            file = config.validate(_File, _split(data), "")
            for i, decision in enumerate(file.decisions):
                for j, one in enumerate(decision.measured):
                    config.validate(_Measured, one, "", f"decisions[{i}].measured[{j}]")
        except (ValueError, RecursionError, ConfigError) as error:
            hint = getattr(error, "hint", "") or "save one with Plan.save"
            place, what = getattr(error, "where", "").removeprefix(": "), getattr(error, "what", error)
            raise PlanError(f"not a plan file: {place + ': ' if place else ''}{what}", where=where, hint=hint) from None
        return cls(**{name: getattr(file, name) for name in _File.model_fields if name != "format"})

    def to_html(self, title: str = "") -> str:
        """The plan as one page that needs nothing else: decisions, reasons, costs, densities and maps of blocks.

        Args:
            title: what was looked at, such as the model's name.
        """
        return page.render(self, title)

    def save(self, path: str | Path) -> None:
        """Writes the plan: a page for people where the name ends in `.html`, else JSON, which `Plan.load` and the setting `plan` read."""
        text = self.to_html() if Path(path).suffix.lower() in (".html", ".htm") else self.to_json() + "\n"
        Path(path).write_text(text, encoding="utf-8")

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
        if self.fallback:
            return f"the graph was left untouched: {self.fallback}"
        return report.table(self.decisions, self.device, self.capture) if self.decisions else "no attention site was found"


class _Measured(BaseModel):
    model_config = STRICT
    method: str
    options: dict[str, Any]
    error: float


class _File(BaseModel):
    model_config = STRICT
    format: Literal[1]
    decisions: list[Decision]
    versions: dict[str, str] = {}
    fallback: str = ""
    device: str = ""
    capture: str = ""
    serves: int = 0
    min_length: int | None = Field(None, ge=0)
    provenance: Provenance | None = None
    calibration: Calibration | None = None
    beside: dict[str, float] = {}


_NUMBERS = re.compile(r"\[\s+(-?[\d.eE+-]+(?:,\s+-?[\d.eE+-]+)*)\s+\]")


def _compact(text: str) -> str:
    """JSON with every list of numbers on one line, so that one line of a difference is one layer's option."""
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def _split(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file's table as it is written now: before, `provenance` was how a plan was calibrated and a digest of the model, which changed with
    how that runs and is not compared any more."""
    found = data.get("provenance")
    if not is_table(found) or "text" not in found or "calibration" in data:
        return data
    calibration = {key: value for key, value in found.items() if key not in ("model", "model_type", "versions")}
    return {**data, "provenance": {"model_type": found.get("model_type")}, "calibration": calibration}


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON knows")

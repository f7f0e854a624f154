"""What a page about a plan shows, as plain records: the page's template decides nothing but how it looks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparsify.graph.typed_torch import as_floats
from sparsify.matching.beside import FEED_FORWARD, PARTS
from sparsify.ops.block_maps import SIDE, BlockMap
from sparsify.planning.decision import Decision, Place, labels
from sparsify.planning.provenance import Calibration, Provenance
from sparsify.planning.report import SITES, sizes_text, time_text

CELLS = 1 << 20  # of all maps together, one character each: they are what makes a page large
_SIDES = (SIDE, 48, 32, 24, 16, 12, 8)
_LEVELS = "0123456789abcdef"
NOTHING = "."  # a cell where no block is possible

KINDS = {
    "attention": "attention",
    "cache": "cache",
    "ffn": "feed-forward",
    "stream": "residual stream",
    "batch": "padded batch",
    "token": "generated tokens",
}


class Described(Protocol):
    """What a page needs of a plan; `sparsify.planning.plan.Plan` says what each is."""

    decisions: list[Decision]
    versions: dict[str, str]
    fallback: str
    device: str
    capture: str
    min_length: int | None
    provenance: Provenance | None
    calibration: Calibration | None
    beside: dict[str, float]
    block_maps: dict[str, BlockMap]


@dataclass(frozen=True)
class Cost:
    """A candidate's expected time at a site.

    name: "dense" or the method. seconds: in words. formula: the same in letters, empty where there is none.
    """

    name: str
    seconds: str
    formula: str


@dataclass(frozen=True)
class Row:
    """One site.

    label: its path, with an ordinal where several have one path. kind: a key of `KINDS`. phase, sizes, mask, reason: in words.
    choice: the method, or "left as is". rewritten: whether there is a method.
    refusals: of methods that declined, beside the reason.
    dense, chosen, gain, density: in words, empty where unknown.
    costs: with formulas. facts: (name, value) of everything else that is known, such as the method's options.
    """

    label: str
    layer: int | None
    kind: str
    phase: str
    sizes: str
    mask: str
    choice: str
    rewritten: bool
    reason: str
    refusals: tuple[str, ...]
    dense: str
    chosen: str
    gain: str
    density: str
    costs: tuple[Cost, ...]
    facts: tuple[tuple[str, str], ...]

    @property
    def state(self) -> str:
        return "rewritten" if self.rewritten else "left"


@dataclass(frozen=True)
class Part:
    """Expected time of one part of the call. dense, chosen: seconds; width_dense, width_chosen: in percent of the longest part."""

    name: str
    dense: float
    chosen: float
    width_dense: float
    width_chosen: float

    @property
    def words(self) -> tuple[str, str]:
        return time_text(self.dense), time_text(self.chosen)


@dataclass(frozen=True)
class HeatRow:
    """Densities of one attention site.

    label: of the site. name: the layer's number, or the label where it has none.
    heads: share of the causal blocks by query head, in percent; empty where no selection was recorded, and `whole` says what is known.
    map: index of the site's map in the page's data, None without one.
    """

    label: str
    name: str
    heads: tuple[float, ...]
    whole: str
    map: int | None


@dataclass(frozen=True)
class Page:
    """Everything on the page.

    title: what was looked at, empty where nobody said. fallback: why the whole graph was left untouched.
    tiles: (name, value, more) of what matters most.
    rows: the sites. kinds: of these that occur. parts: of the call's time; total: their sum. heat: densities; heads: the most of a row.
    maps: the maps as JSON takes them, see `maps_data`. facts: (name, value) about the plan as a whole.
    """

    title: str
    fallback: str
    tiles: tuple[tuple[str, str, str], ...]
    rows: tuple[Row, ...]
    kinds: tuple[str, ...]
    parts: tuple[Part, ...]
    total: Part | None
    heat: tuple[HeatRow, ...]
    heads: int
    maps: dict[str, Any]
    facts: tuple[tuple[str, str], ...]


def page(plan: Described, title: str = "") -> Page:
    """What the page of a plan shows."""
    names = labels(plan.decisions)
    rows = tuple(_row(d, name) for d, name in zip(plan.decisions, names, strict=True))
    heat = tuple(_heat(plan, names))
    parts = _parts(plan)
    total = _part("all parts", sum(p.dense for p in parts), sum(p.chosen for p in parts), math.inf) if len(parts) > 1 else None
    return Page(
        title=title,
        fallback=plan.fallback,
        tiles=tuple(_tiles(plan, total or next(iter(parts), None))),
        rows=rows,
        kinds=tuple(kind for kind in KINDS if any(row.kind == kind for row in rows)),
        parts=parts,
        total=total,
        heat=heat,
        heads=max((len(row.heads) for row in heat), default=0),
        maps=maps_data(plan.block_maps),
        facts=tuple(_facts(plan)),
    )


def _row(d: Decision, label: str) -> Row:
    known = d.dense_seconds is not None and d.seconds is not None and d.method is not None
    costs = (("dense", d.dense_seconds, d.dense_formula), (d.method or "", d.seconds, d.formula))
    return Row(
        label=label,
        layer=d.layer,
        kind=Place(d.kind, d.site).site_kind,
        phase=d.phase,
        sizes=sizes_text(d),
        mask=d.mask,
        choice=d.method or "left as is",
        rewritten=d.method is not None,
        reason=d.reason,
        refusals=tuple(r for r in d.refusals if r != d.reason),
        dense=time_text(d.dense_seconds),
        chosen=time_text(d.seconds),
        gain=f"{d.dense_seconds / d.seconds:.2f}×" if known and d.dense_seconds is not None and d.seconds else "",
        density=_density(d),
        costs=tuple(Cost(name, time_text(seconds), formula) for name, seconds, formula in costs if formula),
        facts=tuple(_row_facts(d)),
    )


def _row_facts(d: Decision) -> Iterator[tuple[str, str]]:
    if d.options:
        yield "options", ", ".join(f"{key} = {json.dumps(value)}" for key, value in d.options.items())
    if d.validation:
        yield "validation", d.validation
    if d.scratch:
        yield "scratch memory", f"{d.scratch / 1e6:.3g} MB"
    if d.error is not None:
        yield "error", f"{d.error:.3g}"
    for one in d.measured:
        options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in one["options"].items())
        yield "measured", f"{one['method']}, {options}: error {one['error']:.3g}"


def _density(d: Decision) -> str:
    if d.realised_density is not None:
        return f"{d.realised_density:.1%}"
    return "" if d.density is None else f"≈{d.density:.0%}"


# -- time ------------------------------------------------------------------------------------------------------------------------------


_PARTS = {"attention": "attention", "ffn": FEED_FORWARD}  # of which kind of site's time


def _parts(plan: Described) -> tuple[Part, ...]:
    """Attention by its sites; what lies beside it as the plan says, with what was decided for feed-forward blocks."""
    dense: dict[str, float] = {}
    for d in plan.decisions:
        if d.kind == "attention" and d.dense_seconds is not None:
            dense["attention"] = dense.get("attention", 0.0) + d.dense_seconds
    dense |= {name: plan.beside[name] for name in PARTS if name in plan.beside}
    chosen = dict(dense)
    for d in plan.decisions:
        name = _PARTS.get(d.kind, "")
        if d.method is not None and d.seconds is not None and d.dense_seconds is not None and name in chosen:
            chosen[name] += d.seconds - d.dense_seconds
    longest = max((*dense.values(), *chosen.values()), default=0.0)
    return tuple(_part(name, dense[name], chosen[name], longest) for name in dense)


def _part(name: str, dense: float, chosen: float, longest: float) -> Part:
    return Part(name, dense, chosen, *(round(100 * seconds / longest, 2) if longest else 0.0 for seconds in (dense, chosen)))


# -- densities and maps ----------------------------------------------------------------------------------------------------------------


def _heat(plan: Described, names: Sequence[str]) -> Iterator[HeatRow]:
    order = {label: i for i, label in enumerate(plan.block_maps)}
    for d, label in zip(plan.decisions, names, strict=True):
        if Place(d.kind, d.site).site_kind != "attention":
            continue
        found = plan.block_maps.get(label)
        heads = () if found is None else tuple(round(100 * one, 2) for one in found.density)
        if d.density is not None:
            whole = f"≈{d.density:.0%} expected by {d.method}" if d.method else ""
        else:
            whole = "all blocks" if d.method in (None, "dense") else f"{d.method}: not recorded"
        yield HeatRow(label, label if d.layer is None else str(d.layer), heads, whole, order.get(label))


def maps_data(maps: dict[str, BlockMap]) -> dict[str, Any]:
    """The maps as JSON takes them, in as fine a grid as `CELLS` allows.

    Returns:
        {"sites": [{"label", "query_len", "key_len", "block_size", "rows", "columns", "density": [percent by head], "heads": [cells by
        head]}]}. Cells are one character each, row after row: a hexadecimal digit for the visited share of the possible blocks, 0 for none
        and f for all, and `NOTHING` where no block is possible.
    """
    heads = sum(len(one.density) for one in maps.values())
    side = next((side for side in _SIDES if heads * side * side <= CELLS), _SIDES[-1])
    return {"sites": [_map_data(label, one, side) for label, one in maps.items()]}


def _map_data(label: str, one: BlockMap, side: int) -> dict[str, Any]:
    shares = one.shares(side)
    return {
        "label": label,
        "query_len": one.query_len,
        "key_len": one.key_len,
        "block_size": one.block_size,
        "rows": shares.shape[-2],
        "columns": shares.shape[-1],
        "density": [round(100 * density, 2) for density in one.density],
        "heads": [_cells(head) for head in shares],
    }


def _cells(shares: Tensor) -> str:
    return "".join(NOTHING if math.isnan(share) else _level(share) for share in as_floats(shares.flatten()))


def _level(share: float) -> str:
    """The nearest of sixteen levels; only no block at all is 0, and only every block is f."""
    if share in (0.0, 1.0):
        return _LEVELS[-1 if share else 0]
    return _LEVELS[min(max(round(15 * share), 1), 14)]


# -- the plan as a whole ---------------------------------------------------------------------------------------------------------------


def _tiles(plan: Described, time: Part | None) -> Iterator[tuple[str, str, str]]:
    for kind, words in SITES.items():
        mine = [d for d in plan.decisions if d.kind == kind]
        if mine:
            yield f"{words} rewritten", f"{sum(d.method is not None for d in mine)} of {len(mine)}", ""
    if time is not None and time.chosen:
        dense, chosen = time.words
        yield "expected time", chosen, f"dense {dense}, {time.dense / time.chosen:.2f}×"
    densities = [d.realised_density for d in plan.decisions if d.realised_density is not None]
    if densities:
        spread = f"{min(densities):.1%} to {max(densities):.1%} by site"
        yield "of the causal blocks visited", f"{sum(densities) / len(densities):.1%}", spread
    refused = sum(d.method is None for d in plan.decisions)
    if refused:
        yield "sites left as they are", str(refused), "each with its reason below"


def _facts(plan: Described) -> Iterator[tuple[str, str]]:
    if plan.device:
        yield "costs on", plan.device
    if plan.capture:
        yield "captured", plan.capture
    yield "versions", ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    if plan.min_length is not None:
        yield "lossy methods act from", f"{plan.min_length} tokens"
    if plan.provenance is not None:
        yield "made for", f"a {plan.provenance.model_type}"
    if (how := plan.calibration) is not None:
        budget = ", ".join(f"{key} = {value:g}" for key, value in how.budget.items())
        yield "calibrated", f"at {how.at} tokens on {how.target}, {budget}"

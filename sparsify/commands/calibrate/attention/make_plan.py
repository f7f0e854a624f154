"""A choice as a plan: one decision for each site, options compact where heads agree, and where it comes from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch import Tensor, nn

from sparsify import api
from sparsify.commands.calibrate.attention.choose import DENSE, Budget, Choice, Chooser, Chosen
from sparsify.commands.calibrate.attention.run import Asked, Measured
from sparsify.commands.calibrate.attention.settings import Grid
from sparsify.errors import UnsupportedError
from sparsify.generation.regions.shared import MOST_KINDS
from sparsify.planning.decision import Decision
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import Calibration, provenance_of
from sparsify.planning.registry import discover

_EXACT = ("dense", "kv_evict", "ffn_parts")


def method_of(chosen: Chosen, grid: Grid) -> tuple[str, dict[str, Any]]:
    """The method and the options, those that are not defaults, that do what was chosen for a layer. ("dense", {}): nothing lossy."""
    if chosen.dense:
        return "dense", {}
    windows = [int(setting.value) if setting.family is None else 0 for setting in chosen.settings]
    if chosen.way is None:
        same = len(set(windows)) == 1
        return "sink_window", {"sinks": grid.sinks, "window": windows[0] if same else windows, "decode": False}
    way = grid.ways[chosen.way]
    values = [None if setting.family is None else setting.value for setting in chosen.settings]
    return way.method.name, way.options(values, windows, grid.sinks, (chosen.density_8k, chosen.power))


def kinds(choice: Choice, grid: Grid) -> int:
    """How many regions a compiled model needs for the layers: those that differ in their heads' numbers alone share one."""
    found = set()
    for one in choice.layers:
        method, options = method_of(one, grid)
        found.add((method, repr(discover()[method].kind(options))))
    return len(found)


def choose_shared(chooser: Chooser, budget: Budget, exact: bool = True) -> tuple[Choice, str]:
    """The best choice of which `sparsify.compile` makes regions: one without windows where these make too many kinds of layers, unless the
    budget needs them. And what that costs, in words; empty where it costs nothing. exact: as `Chooser.choose` has it.

    Raises:
        UnsupportedError: no choice keeps the budget, with windows or without.
    """
    choice = chooser.choose(budget, exact)
    count = kinds(choice, chooser.grid)
    if count <= MOST_KINDS:
        return choice, ""
    whole = f"{count} kinds of layers, of which {MOST_KINDS} can share regions: the model is captured whole"
    if not chooser.grid.windows:
        return choice, whole
    try:
        shared = chooser.choose(budget, exact, windows=False)
    except UnsupportedError as error:
        return choice, f"{whole}; {error.what}"
    more = f"{shared.seconds * 1e3:.3g} ms instead of {choice.seconds * 1e3:.3g}"
    if budget.kind in ("density", "speedup"):
        what = "error" if choice.loss(chooser.longest) is None else "predicted loss"
        more = f"{what} {shared.bounded(chooser.longest):.4g} instead of {choice.bounded(chooser.longest):.4g}"
    return shared, f"without windows, which would make {count} kinds of layers where {MOST_KINDS} can share regions: {more}"


def make_plan(
    model: nn.Module,
    ids: Tensor,
    options: dict[str, Any],
    asked: Asked,
    measured: Measured,
    chooser: Chooser,
    choice: Choice,
    lost: float | None = None,
) -> Plan:
    """The plan that `options={"plan": ...}` loads.

    Args:
        ids: int64 [1, tokens]; one prompt of it is looked at, so that sites that were not calibrated stand in the plan too.
        lost: nats a token that the text lost by the choice, where it was run.
    """
    exact = {key: value for key, value in options.items() if key not in ("passes", "rules", "plan", "objective", "max_error")}
    looked_at = ids[:, : max(asked.lengths)]
    plan = api.explain(model, options={**exact, "passes": list(_EXACT)}, input_ids=looked_at, use_cache=False)
    by_site = {(one.layer.site.place.name, one.layer.site.place.ordinal): one for one in choice.layers}
    decisions = []
    for decision in plan.decisions:
        chosen = by_site.get((decision.site, decision.ordinal)) if decision.kind == "attention" else None
        decisions.append(decision if chosen is None else _decided(decision, chosen, chooser))
    return dataclasses.replace(
        plan,
        decisions=decisions,
        device=choice.layers[0].layer.seconds.device.describe(),
        min_length=chooser.shortest(choice),
        provenance=provenance_of(model, measured=True),
        calibration=_calibration(asked, measured, choice, lost),
    )


def _decided(decision: Decision, chosen: Chosen, chooser: Chooser) -> Decision:
    dense_seconds = chosen.layer.seconds.dense()
    known = {"seconds": chosen.seconds, "dense_seconds": dense_seconds, "formula": "", "dense_formula": "", "refusals": []}
    error = chosen.error[chooser.longest]
    if chosen.dense:
        return dataclasses.replace(decision, **known, reason=f"calibrated: dense; {decision.reason}", density=1.0, error=0.0)
    method, options = method_of(chosen, chooser.grid)
    return dataclasses.replace(
        decision,
        **known,
        method=method,
        options=options,
        reason=f"calibrated: {describe(chosen, chooser.grid)}",
        density=float(chosen.density.mean()),
        error=error,
        scratch=None,
        measured=[{"method": method, "options": options, "error": error}],
    )


def describe(chosen: Chosen, grid: Grid) -> str:
    """What a layer does, in words."""
    dense = sum(setting == DENSE for setting in chosen.settings)
    windows = sum(setting.family is None for setting in chosen.settings) - dense
    words = Counter(grid.families[s.family].word(s.value) for s in chosen.settings if s.family is not None)
    parts = [f"{count} {name}" for name, count in (("dense", dense), ("sinks + window", windows), *sorted(words.items())) if count]
    name = "" if chosen.way is None else f", {grid.ways[chosen.way].name}"
    return f"heads {', '.join(parts)}{name}"


def _calibration(asked: Asked, measured: Measured, choice: Choice, lost: float | None) -> Calibration:
    pieces = [sum(done[0] == length for done in measured.done) for length in asked.lengths]
    return Calibration(
        text=measured.identity["text"],
        settings=measured.identity["settings"],
        lengths=list(asked.lengths),
        pieces=pieces,
        seed=asked.seed,
        budget={choice.budget.kind: float(choice.budget.value)},
        at=choice.at,
        target=choice.layers[0].layer.seconds.device.name,
        seconds=_short(choice.seconds),
        dense_seconds=_short(choice.dense_seconds),
        density=_short(choice.density),
        errors={str(length): _short(choice.error(length)) for length in choice.lengths},
        gap=_short(choice.gap),
        last=asked.last,
        losses={str(n): _short(loss) for n in choice.lengths if (loss := choice.loss(n)) is not None},
        lost=None if lost is None else _short(lost),
    )


def _short(number: float) -> float:
    return float(f"{number:.5g}")

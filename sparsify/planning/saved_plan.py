"""A saved plan that decides: its methods and options checked, its decisions found by site."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import ConfigError, PlanError, nearest
from sparsify.matching.base import plan_kind
from sparsify.planning.config import config
from sparsify.planning.decision import Decision, Place, labels
from sparsify.planning.method import Pass
from sparsify.planning.plan import Plan
from sparsify.planning.registry import discover


class SavedPlan:
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
        for index, (decision, name) in enumerate(zip(plan.decisions, labels(plan.decisions), strict=True)):
            _check(decision, methods, where, f"decisions[{index}]")
            others = self._decisions[decision.kind, decision.site]
            if any(other.ordinal == decision.ordinal and _content(other) != _content(decision) for other in others):
                what = f"ambiguous: two decisions for site {name} differ"
                raise PlanError(what, where=where, hint="save the plan of one call, as sparsify.explain makes it")
            others.append(decision)

    def has(self, place: Place) -> bool:
        return (place.kind, place.name) in self._decisions

    def decisions_in(self, path: str, measured: bool = True) -> tuple[Any, ...]:
        """What the plan says of the sites of a module, equal for modules of which it says the same, up to numbers that a graph takes as
        operands. measured: errors count as well."""
        return tuple(
            (kind, site.removeprefix(path), tuple((one.ordinal, repr(_kind(one, measured, _takes_operands(kind, found)))) for one in found))
            for (kind, site), found in sorted(self._decisions.items())
            if site == path or site.startswith(f"{path}.")
        )

    def head_numbers(self, path: str) -> dict[tuple[str, str], tuple[float, ...]]:
        """By site (relative to a module's path) and option, numbers of the heads that a graph takes as operands."""
        methods = discover()
        numbers: dict[tuple[str, str], tuple[float, ...]] = {}
        for (kind, site), found in self._decisions.items():
            if _takes_operands(kind, found) and found[0].method is not None and (site == path or site.startswith(f"{path}.")):
                method = config.validate(methods[found[0].method], found[0].options, self.where)
                numbers |= {(site.removeprefix(path), option): values for option, values in method.head_numbers().items()}
        return numbers

    def recalled(self, plan: Plan) -> Plan:
        """A plan that was made for several layers at once, with what this one says of each."""
        decisions: list[Decision] = []
        for one in plan.decisions:
            found = self._decisions.get((one.kind, one.site), [])
            if len(found) == 1 and found[0].method == one.method and found[0].options != one.options:
                own = found[0]
                one = dataclasses.replace(one, options=own.options, error=own.error, density=own.density, measured=own.measured)
            decisions.append(one)
        return dataclasses.replace(plan, decisions=decisions)

    def find(self, place: Place) -> Decision:
        """The decision for a site.

        Raises:
            PlanError: there is none, or the plan has another number of sites of this path, so that which is which cannot be told.
        """
        found = self._decisions.get((place.kind, place.name), [])
        if not found:
            hint = "make a plan for this model with sparsify.explain"
            raise PlanError(f"the plan has no entry for site {place}", where=self.where, hint=hint)
        if all(_content(one) == _content(found[0]) for one in found) and (len(found) > 1 or place.count == 1):
            return found[0]
        if {one.ordinal for one in found} != set(range(place.count)):
            what = f"ambiguous: {len(found)} decisions for site {place.name or '(a function)'}, of which the graph has {place.count}"
            raise PlanError(what, where=self.where, hint="make a plan for this model and call with sparsify.explain")
        return next(one for one in found if one.ordinal == place.ordinal)


def load_saved_plan(path: Path | None) -> SavedPlan | None:
    """The plan of a file, checked in full; None without a file. Raises PlanError."""
    return None if path is None else SavedPlan(Plan.load(path), str(path))


def _content(decision: Decision) -> tuple[Any, ...]:
    return decision.method, decision.options, decision.measured


def _takes_operands(kind: str, found: Sequence[Decision]) -> bool:
    """Whether the sites of one path may take numbers of their heads as operands: names tell operands apart, and several share theirs."""
    return kind == "attention" and len(found) == 1


def _kind(decision: Decision, measured: bool, operands: bool) -> tuple[Any, ...]:
    options = decision.options
    if operands and decision.method is not None:
        options = discover()[decision.method].kind(options)
    return (decision.method, options, decision.measured) if measured else (decision.method, options)


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

"""How far lossy attention methods leave the exact result, site by site, on a text: what `max_error` is compared with.

Every site is given the exact model's own operands, so that its error is its own and not that of the layers before it. The error is
‖o' - o‖ / ‖o‖ over all outputs of a site on the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify import api, backends, pipeline
from sparsify.errors import UnsupportedError
from sparsify.graph import isolated
from sparsify.matching.attention import find_attention
from sparsify.matching.base import Site
from sparsify.matching.sites import AttentionSite
from sparsify.planning import registry
from sparsify.planning.config import config
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Place, places
from sparsify.planning.method import Context, Pass, Refusal
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import provenance_of
from sparsify.rewriting.editor import Editor

# what decides a choice has no say in what is measured
_NEUTRAL = {"min_length": 0, "objective": None, "max_error": None, "plan": None, "lower": "eager"}


@dataclass
class Errors:
    """Sums of squares by graph, place and method; refusals by place, in words."""

    sums: dict[tuple[int, Place, Pass], list[float]] = field(default_factory=dict)
    refusals: dict[Place, list[str]] = field(default_factory=dict)

    def add(self, graph: int, place: Place, tried: Pass, exact: Tensor, lossy: Tensor) -> None:
        exact, lossy = exact.float(), lossy.float()
        found = self.sums.setdefault((graph, place, tried), [0.0, 0.0])
        found[0] += float((lossy - exact).square().sum())
        found[1] += float(exact.square().sum())

    def measured_at(self, site: str, ordinal: int = 0) -> list[dict[str, Any]]:
        """As `Decision.measured` holds them: the worst of the graphs that have such a site. What is not finite is not recorded."""
        worst: dict[Pass, float] = {}
        for (_, place, tried), (off, whole) in self.sums.items():
            if (place.name, place.ordinal) == (site, ordinal):
                error = (off / whole) ** 0.5 if whole else 0.0 if not off else math.inf
                worst[tried] = max(worst.get(tried, 0.0), error if math.isfinite(error) else math.inf)
        return [
            {"method": tried.name, "options": tried.options(), "error": error} for tried, error in worst.items() if math.isfinite(error)
        ]


class _Observer(Editor):
    """Computes what a method would put in a site's place, and leaves the site where it is."""

    made: fx.Node | None = None

    def replace(self, site: Site, value: fx.Node) -> None:
        self.made = value


@torch.no_grad()
def measure(
    model: nn.Module, ids: Tensor, options: dict[str, Any], *, chunk: int = 4096, progress: Callable[[int, int], None] | None = None
) -> Errors:
    """Errors of the configured lossy attention methods on prompts of `chunk` tokens.

    Args:
        ids: int64 [1, tokens]; a last piece shorter than `chunk` is left out unless it is the only one.
        progress: called with (pieces done, pieces).

    Raises:
        UnsupportedError: no site takes any of the methods. ConfigError: impossible options.
    """
    settings = config.load({**options, **_NEUTRAL}, method_models=registry.discover())
    pieces = [piece for piece in ids.split(chunk, 1) if piece.shape[1] == min(chunk, ids.shape[1])]
    errors, graphs = Errors(), itertools.count()
    tried: list[tuple[int, Place, Pass]] = []

    def record(index: int, exact: Tensor, lossy: Tensor) -> None:
        errors.add(*tried[index], exact, lossy)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        sites = find_attention(gm)
        editor, graph = _Observer(gm.graph), next(graphs)
        for site, place in zip(sites, places(sites), strict=True):
            for one in _lossy(site, place, settings, pipeline.make_context(sites[0].device, settings), errors):
                one.rewrite(editor, editor.converted(site))
                tried.append((graph, place, one))
                with gm.graph.inserting_after(site.output):
                    gm.graph.call_function(record, (len(tried) - 1, site.output, editor.made))
        gm.recompile()
        return gm.forward

    with isolated.compiled(model.forward, backend, dynamic=False) as forward, backends.serving(settings.kernels):
        for done, piece in enumerate(pieces, 1):
            forward(input_ids=piece, use_cache=False)
            if progress is not None:
                progress(done, len(pieces))
    if not errors.sums:
        reasons = sorted({reason for found in errors.refusals.values() for reason in found})
        raise UnsupportedError(f"nothing to measure: {reasons[0] if reasons else 'no lossy attention method is configured'}")
    return errors


def _lossy(site: AttentionSite, place: Place, settings: Config, context: Context, errors: Errors) -> Iterator[Pass]:
    """The configured lossy methods that take a site."""
    known = registry.discover()
    kind = {name for name, one in known.items() if site.kind in one.kinds and one.lossy}
    for name, options in settings.for_layer(site.name, site.layer, kind, place.ordinal):
        one = known[name](**options)
        answer = one.refuse(site.near_miss) if site.near_miss else one.propose(site, context)
        answer = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(answer, Refusal):
            errors.refusals.setdefault(place, []).append(str(answer))
        else:
            yield answer.method


def plan_for(model: nn.Module, ids: Tensor, options: dict[str, Any], errors: Errors, before: Plan | None = None) -> Plan:
    """The plan that the configuration makes for `ids`, with the errors at each site.

    before: a plan whose errors are kept, but for those that were measured again.
    """
    plan = api.explain(model, options=options, input_ids=ids, use_cache=False)
    kept = {(d.kind, d.site, d.ordinal): d.measured for d in before.decisions} if before else {}
    decisions = []
    for decision in plan.decisions:
        new = errors.measured_at(decision.site, decision.ordinal) if decision.kind == "attention" else []
        again = [(one["method"], one["options"]) for one in new]
        before_now = kept.get((decision.kind, decision.site, decision.ordinal), [])
        old = [one for one in before_now if (one["method"], one["options"]) not in again]
        decisions.append(dataclasses.replace(decision, measured=[*old, *new]))
    return dataclasses.replace(plan, decisions=decisions, provenance=provenance_of(model, measured=True))


def data(errors: Errors) -> list[dict[str, Any]]:
    """What was measured at every site, and who refused there, as JSON takes it."""
    places = dict.fromkeys([*(place for _, place, _ in errors.sums), *errors.refusals])
    return [
        {"site": str(place), "measured": errors.measured_at(place.name, place.ordinal), "refusals": errors.refusals.get(place, [])}
        for place in places
    ]


def table(errors: Errors) -> str:
    """One line per method: the median over the sites, the worst site, and who refused."""
    lines = []
    by_method: dict[str, list[tuple[float, str]]] = {}
    for place in dict.fromkeys(place for _, place, _ in errors.sums):
        for one in errors.measured_at(place.name, place.ordinal):
            by_method.setdefault(f"{one['method']} {one['options']}", []).append((one["error"], str(place)))
    for name, found in by_method.items():
        worst, site = max(found)
        lines.append(f"{name}: median {sorted(found)[len(found) // 2][0]:.4f}, worst {worst:.4f} at {site} ({len(found)} sites)")
    return "\n".join([*lines, *sorted({reason for found in errors.refusals.values() for reason in found})])

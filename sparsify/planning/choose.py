"""Which method acts at which site: what the configuration and a plan file say, what the methods propose, and what that costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.sym_node import SymNode

from sparsify.costs.device import Device
from sparsify.costs.seconds import value_at
from sparsify.costs.sizes import as_text
from sparsify.errors import SparsifyError
from sparsify.graph import unforeseen
from sparsify.graph.compat import symbol_values
from sparsify.graph.typed_torch import symbolic_node
from sparsify.matching.base import CACHE_SUFFIX, Site, SiteKind
from sparsify.planning import misfits, objective
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Decision, Place, places
from sparsify.planning.method import Context, Pass, Proposal, Refusal
from sparsify.planning.plan import Plan
from sparsify.planning.registry import discover
from sparsify.planning.saved_plan import SavedPlan, load_saved_plan


@dataclass
class Choice:
    """A site with the proposal that won, or None, and the decision as a record.

    later: the most wanted proposal that nothing but the length spoke against, None where there is none.
    """

    site: Site
    proposal: Proposal | None
    decision: Decision
    later: Proposal | None = None


def named_methods(config: Config) -> dict[str, type[Pass]]:
    """The methods that the configuration, or its plan file, names."""
    named = {*config.every_pass, *(m for rule in config.rules for m in rule.method)}
    if (followed := load_saved_plan(config.plan)) is not None:
        saved = {d.method for d in followed.plan.rewritten}
        named = saved | named if config.objective is not None or config.max_error is not None else saved
    return {name: method for name, method in discover().items() if name in named}


def acts_on(kind: SiteKind, config: Config, device: Device | None = None) -> bool:
    """Whether the configuration, or its plan file, names a method for this kind of site that may act.

    Args:
        device: of the graph's attention, None without any.
    """
    ruled = {name for rule in config.rules for name in rule.method}
    methods = {name: method for name, method in named_methods(config).items() if kind in method.kinds}
    return any(name in ruled or method(**config.methods.get(name, {})).looks_for_sites(device) for name, method in methods.items())


def leave_out_untouched_ffn(plan: Plan, choices: list[Choice], config: Config) -> tuple[Plan, list[Choice]]:
    """Leaves feed-forward blocks that no method acts on out of the plan and the choices, unless a setting, a rule or a plan file asks for
    them: with the defaults they would be rows of a table that say nothing."""
    asked = config.plan is not None or "ffn_parts" in config.methods or config.passes != Config.model_fields["passes"].default
    if asked or any("ffn" in method.kinds for rule in config.rules for name in rule.method if (method := discover().get(name))):
        return plan, choices
    kept = [choice for choice in choices if choice.site.kind != "ffn" or choice.proposal is not None]
    return dataclasses.replace(plan, decisions=[choice.decision for choice in kept]), kept


def make_plan(
    sites: list[Site], config: Config, context: Context, at: Sequence[Place] | None = None, alone: bool = True
) -> tuple[Plan, list[Choice]]:
    """Asks the configured methods at every site and chooses.

    Order in the configuration is preference; a proposal with `min_key_len` is eligible from that key length on, and asking a
    symbolic length installs a guard, so that torch compiles one graph on each side of it.

    Args:
        at: the sites' places, where they are not those of a whole graph.
        alone: whether options are for these sites alone, and not for other graphs of the same model as well.

    Raises:
        ConfigError: an option by head fits none of the causal sites of `alone`.
        PlanError: `config.plan` names a file that cannot be read or lacks one of the sites.
    """
    saved_plan = load_saved_plan(config.plan)
    if saved_plan is not None and context.min_length is None:
        context = dataclasses.replace(context, min_length=saved_plan.plan.min_length)
    regimes = _Regimes()
    choices: list[Choice] = []
    by_head: list[tuple[Pass, int]] = []
    for site, place in zip(sites, places(sites) if at is None else at, strict=True):
        saved = _saved(place, saved_plan)
        candidates, measured = _candidates(site, place, config, saved), saved.measured if saved else []
        by_head += [(method, heads) for method in candidates if method.by_head for heads in _heads_of_model(site, context)]
        try:
            choices.append(_choose(site, place, candidates, config, context, measured, regimes))
        except SparsifyError:
            raise
        except Exception as error:
            reason = unforeseen.reason(error, site.name)
            choices.append(Choice(site, None, Decision(site.name, site.layer, "", {}, "", None, kind=place.kind, ordinal=place.ordinal)))
            choices[-1].decision.reason = reason
    if alone:
        misfits.check_sites(by_head)
    return Plan([c.decision for c in choices], device=context.device.describe()), choices


def _heads_of_model(site: Site, context: Context) -> set[int]:
    """Query heads that a causal attention site may have in all processes; none of another one, as a tower may have beside the decoder."""
    local, mask = getattr(site, "query_heads", None), getattr(site, "mask", None)
    if not isinstance(local, int) or not getattr(mask, "causal", False):
        return set()
    # a layer may be divided otherwise than by heads: then its site has all of them
    return {local} if context.heads is None else {local, local * context.heads.size}


def _saved(place: Place, saved_plan: SavedPlan | None) -> Decision | None:
    """What a plan file says of a site. It is made for a prompt with an ordinary cache; a SparseCache's sites come on top of it."""
    if saved_plan is None:
        return None
    if not saved_plan.has(place) and saved_plan.has(place._replace(name=place.name.removesuffix(CACHE_SUFFIX))):
        return None
    return saved_plan.find(place)


def _candidates(site: Site, place: Place, config: Config, saved: Decision | None) -> list[Pass]:
    methods = discover()
    serving = {name for name, method in methods.items() if site.kind in method.kinds}
    configured = config.for_layer(site.name, site.layer, serving, place.ordinal)
    if saved is None:
        wanted = configured
    else:
        wanted = [(saved.method, saved.options)] if saved.method else []
        if config.objective is not None or config.max_error is not None:
            extra = [one for one in wanted if one[0] not in dict(configured)]
            wanted = extra + _with_measured(configured, saved.measured)
        elif saved.method and methods[saved.method].lossy and "dense" in serving:
            wanted += [("dense", {})]
    made = list(dict.fromkeys(methods[name](**options) for name, options in wanted))
    return [m for m in made if not (config.exact and m.lossy)]


def _with_measured(configured: list[tuple[str, dict[str, Any]]], measured: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The configured methods, each followed by the other options of it that were measured."""
    wanted: list[tuple[str, dict[str, Any]]] = []
    for name, options in configured:
        wanted += [(name, options), *((name, one["options"]) for one in measured if one["method"] == name)]
    return wanted


class _Regimes:
    """Solved crossovers that a graph's sites ask a symbolic length for: two, so that there are three regimes, however shapes differ."""

    def __init__(self) -> None:
        self._asked: dict[str, list[int]] = {}

    def start(self, site: Site, proposal: Proposal) -> int | None:
        """The length from which the proposal is eligible: its own, or the next that another site asked for; None beyond the last."""
        if not proposal.solved or not proposal.min_key_len:
            return proposal.min_key_len
        size = site.example_length
        asked = self._asked.setdefault(str(size), [])
        if isinstance(size, int) or proposal.min_key_len in asked:
            return proposal.min_key_len
        if len(asked) < objective.MOST_REGIMES - 1:
            asked.append(proposal.min_key_len)
            return proposal.min_key_len
        return min((bound for bound in asked if bound > proposal.min_key_len), default=None)


def _choose(
    site: Site,
    place: Place,
    candidates: list[Pass],
    config: Config,
    context: Context,
    measured: list[dict[str, Any]],
    regimes: _Regimes,
) -> Choice:
    decision, dense = _described(site, place, context)
    decision.measured = measured
    proposed = _proposed(site, candidates, config, context, decision)
    pending: list[Proposal] = []
    later: Proposal | None = None
    while True:
        pending += proposed if config.objective else [*itertools.islice(proposed, 1)]  # order asks no further than it must
        if not pending:
            break
        proposal = pending.pop(_best(pending, site, config, dense))
        start = regimes.start(site, proposal)
        if start is None or not (context.tokens >= start if context.sequence else site.reaches(start)):
            later = later or (proposal if start is not None else None)
            what = f"key_len below {proposal.min_key_len if start is None else start}, where it starts to pay"
            decision.refusals.append(str(proposal.method.refuse(what, "set min_length to force it" if proposal.method.lossy else "")))
            continue
        _accept(decision, proposal, pending, size_hints(site), config)
        return Choice(site, proposal, decision, later)
    decision.reason = decision.refusals[0] if decision.refusals else "no method is enabled here"
    return Choice(site, None, decision, later)


def _proposed(site: Site, candidates: list[Pass], config: Config, context: Context, decision: Decision) -> Iterator[Proposal]:
    """What the methods propose, in their order; who refuses is noted."""
    for method in candidates:
        refusal = Refusal(method.name, site.near_miss) if site.near_miss else None
        refusal = refusal or objective.refuse_error(method, decision.measured, config.max_error)
        answer = _asked(method, site, context) if refusal is None else refusal
        for one in answer if isinstance(answer, tuple) else (answer,):
            if isinstance(one, Refusal):
                decision.refusals.append(str(one))
            else:
                yield one


def _asked(method: Pass, site: Site, context: Context) -> Proposal | Refusal | tuple[Proposal, ...]:
    try:
        local = getattr(site, "query_heads", None)
        if context.heads is not None and isinstance(local, int):
            method = method.of_heads(context.heads, local)
        return method.propose(site, context)
    except SparsifyError:
        raise
    except Exception as error:
        return Refusal(method.name, unforeseen.reason(error, site.name))


def _best(proposals: list[Proposal], site: Site, config: Config, dense: Any) -> int:
    """Without an objective the first: order is preference."""
    if config.objective is None or len(proposals) == 1:
        return 0
    return objective.select(
        proposals,
        config.objective,
        key_len=site.planned_length,
        hints=size_hints(site),
        operands=site.sizes.operand_bytes,
        dense=dense,
        reaches=site.reaches,
    )


def _accept(decision: Decision, proposal: Proposal, others: list[Proposal], hints: dict[Any, int], config: Config) -> None:
    method = proposal.method
    decision.method, decision.options, decision.reason = method.name, method.options(), proposal.note
    decision.seconds, decision.scratch, decision.formula = (
        value_at(proposal.seconds, hints),
        value_at(proposal.scratch, hints),
        proposal.formula,
    )
    decision.density = proposal.density
    decision.error = objective.measured_error(method, decision.measured)
    if config.max_error is not None:
        decision.reason += f"; error {decision.error:.3g}, at most {config.max_error:g}"
    if config.objective is not None:
        decision.reason += f"; least {'time and memory' if config.objective == 'balanced' else config.objective}"
        cost = f"{method.name} {objective.cost_text(decision.seconds, decision.scratch)}"
        for other in others:
            time, scratch = value_at(other.seconds, hints), value_at(other.scratch, hints)
            decision.refusals.append(f"{other.method.name}: {other.note}: {objective.cost_text(time, scratch)} against {cost}")


def _described(site: Site, place: Place, context: Context) -> tuple[Decision, Any]:
    """The site as a decision that is still open, and dense seconds as an expression."""
    decision = Decision(
        site=site.name,
        ordinal=place.ordinal,
        layer=site.layer,
        phase=site.phase,
        sizes=as_text(site.sizes),
        mask=site.mask_text,
        method=None,
        kind=place.kind,
    )
    seconds = site.dense_seconds(context.device)
    decision.dense_formula = site.dense_formula(context.device) if context.formulas else ""
    decision.dense_seconds = value_at(seconds, size_hints(site))
    return decision, seconds


def size_hints(site: Site) -> dict[Any, int]:
    """The example's numbers for the site's symbols."""
    hints: dict[Any, int] = {}
    for node in site.hint_nodes:
        for size in node.meta["example_value"].shape:
            if isinstance(size, torch.SymInt) and (node := symbolic_node(size)).hint is not None:
                hints |= _solve(node)
    return hints


def _solve(node: SymNode) -> dict[Any, int]:
    env = node.shape_env
    found: dict[Any, int] = {}
    for symbol in node.expr.free_symbols:
        table = symbol_values(env)
        if symbol in table:
            found[symbol] = int(table[symbol])
    return found

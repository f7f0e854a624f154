"""Every site exactly once: rewritten by which method with which options, or left as it is and why. Prints, saves and loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsify import costs, objective, ops, work
from sparsify.compat import symbol_values
from sparsify.config import Config
from sparsify.costs import number
from sparsify.errors import PlanError
from sparsify.method import Context, Pass, Proposal, Refusal, discover
from sparsify.sites import AttentionSite, FeedForwardSite, Size

FORMAT = 1


@dataclass
class Decision:
    """What happens at one site, in words and numbers that survive a round trip through JSON.

    method: None where the site stays as it is. refusals: one line per method that declined. seconds, dense_seconds: expected, at
    the example's sizes, None when unknown. density: share of causal blocks, expected before a run and realised after one.
    formula, dense_formula: the same seconds in letters. kind: "attention" or "ffn".
    """

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
    kind: str = "attention"
    formula: str = ""
    dense_formula: str = ""


@dataclass
class Plan:
    """The decisions for one graph, in graph order."""

    decisions: list[Decision] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {"torch": torch.__version__, "ops": str(ops.VERSION)})
    fallback: str = ""  # why the whole graph was left untouched, empty otherwise
    device: str = ""  # whose profile the seconds come from, and what that is worth

    @property
    def rewritten(self) -> list[Decision]:
        return [d for d in self.decisions if d.method is not None]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Raises PlanError for text that is not a plan of this format."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise PlanError("plan of another format", where=where, hint=f"this version reads format {FORMAT}")
            decisions = [Decision(**d) for d in data.pop("decisions")]
            return cls(decisions=decisions, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan file: {error}", where=where, hint="save one with Plan.save") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            return cls.from_json(Path(path).read_text(), str(path))
        except OSError as error:
            raise PlanError(f"cannot read the plan: {error.strerror}", where=str(path)) from error

    def __str__(self) -> str:
        from sparsify.report import table

        return table(self)


@dataclass
class Choice:
    """A site with the proposal that won, or None, and the decision as a record."""

    site: AttentionSite | FeedForwardSite
    proposal: Proposal | None
    decision: Decision


def acts_on(site_type: type, config: Config) -> bool:
    """Whether the configuration, or its plan file, names a method for this type of site."""
    methods = discover()
    named = {*config.passes, *(m for rule in config.rules for m in rule.method)}
    if config.plan:
        saved = {d.method for d in Plan.load(config.plan).rewritten}
        named = saved | named if config.objective is not None or config.max_error is not None else saved
    return any(methods[name].site_type is site_type for name in named if name in methods)


def make_plan(sites: list[AttentionSite | FeedForwardSite], config: Config, context: Context) -> tuple[Plan, list[Choice]]:
    """Asks the configured methods at every site and chooses.

    Order in the configuration is preference; a proposal with `min_key_len` is eligible from that key length on, and asking a
    symbolic length installs a guard, so that torch compiles one graph on each side of it.

    Raises:
        PlanError: `config.plan` names a file that cannot be read or lacks one of the sites.
    """
    saved = {d.site: d for d in Plan.load(config.plan).decisions} if config.plan else None
    regimes = _Regimes()
    choices = [_choose(site, _candidates(site, config, saved), config, context, _measured(site, saved), regimes) for site in sites]
    return Plan([c.decision for c in choices], device=context.device.describe()), choices


def _measured(site: AttentionSite | FeedForwardSite, saved: dict[str, Decision] | None) -> list[dict[str, Any]]:
    return saved[site.name].measured if saved is not None and site.name in saved else []


_ATTENTION_SIZES = ("batch", "query_heads", "kv_heads", "query_len", "key_len", "qk_head_dim", "v_head_dim")
_FFN_SIZES = ("rows", "hidden", "intermediate")


def _candidates(site: AttentionSite | FeedForwardSite, config: Config, saved: dict[str, Decision] | None) -> list[Pass]:
    methods = discover()
    kind = {name for name, method in methods.items() if isinstance(site, method.site_type)}
    configured = config.for_layer(site.name, site.layer, kind)
    # a plan is made for a prompt with an ordinary cache; a SparseCache's sites come on top of it
    if saved is None or (site.name not in saved and site.name.removesuffix(".cache") in saved):
        wanted = configured
    elif site.name in saved:
        decision = saved[site.name]
        wanted = [(decision.method, decision.options)] if decision.method else []
        if config.objective is not None or config.max_error is not None:
            extra = [one for one in wanted if one[0] not in dict(configured)]
            wanted = extra + _with_measured(configured, decision.measured)
        elif decision.method and methods.get(decision.method) and methods[decision.method].lossy and isinstance(site, AttentionSite):
            wanted += [("dense", {})]
    else:
        raise PlanError(
            f"the plan has no entry for site {site.name}", where=str(config.plan), hint="make a plan for this model with sparsify.explain"
        )
    unknown = [name for name, _ in wanted if name not in methods]
    if unknown:
        raise PlanError(f"unknown method {unknown[0]!r}", where=str(config.plan or site.name), hint="known: " + ", ".join(sorted(methods)))
    made = list(dict.fromkeys(methods[name](**options) for name, options in wanted))
    return [m for m in made if not (config.exact and m.lossy)]


def _with_measured(configured: list[tuple[str, dict[str, Any]]], measured: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The configured methods, each followed by the other options of it that were measured."""
    wanted = []
    for name, options in configured:
        wanted += [(name, options), *((name, one["options"]) for one in measured if one["method"] == name)]
    return wanted


class _Regimes:
    """Solved crossovers that a graph's sites ask a symbolic length for: two, so that there are three regimes, however shapes differ."""

    def __init__(self) -> None:
        self._asked: dict[str, list[int]] = {}

    def start(self, site: AttentionSite | FeedForwardSite, proposal: Proposal) -> int | None:
        """The length from which the proposal is eligible: its own, or the next that another site asked for; None beyond the last."""
        if not proposal.solved or not proposal.min_key_len:
            return proposal.min_key_len
        size = site.key.meta["example_value"].shape[2]
        asked = self._asked.setdefault(str(size), [])
        if isinstance(size, int) or proposal.min_key_len in asked:
            return proposal.min_key_len
        if len(asked) < objective.MOST_REGIMES - 1:
            asked.append(proposal.min_key_len)
            return proposal.min_key_len
        return min((bound for bound in asked if bound > proposal.min_key_len), default=None)


def _choose(
    site: AttentionSite | FeedForwardSite,
    candidates: list[Pass],
    config: Config,
    context: Context,
    measured: list[dict[str, Any]],
    regimes: _Regimes,
) -> Choice:
    decision, dense = _described(site, context)
    decision.measured = measured
    proposed = _proposed(site, candidates, config, context, decision)
    pending: list[Proposal] = []
    while True:
        pending += proposed if config.objective else [*itertools.islice(proposed, 1)]  # order asks no further than it must
        if not pending:
            break
        proposal = pending.pop(_best(pending, site, config, dense))
        start = regimes.start(site, proposal)
        if start is None or (start and not at_least(site.key, 2, start)):
            what = f"key_len below {proposal.min_key_len if start is None else start}, where it starts to pay"
            decision.refusals.append(str(proposal.method.refuse(what, "set min_length to force it" if proposal.method.lossy else "")))
            continue
        _take(decision, proposal, pending, size_hints(site), config)
        return Choice(site, proposal, decision)
    decision.reason = decision.refusals[0] if decision.refusals else "no method is enabled here"
    return Choice(site, None, decision)


def _proposed(
    site: AttentionSite | FeedForwardSite, candidates: list[Pass], config: Config, context: Context, decision: Decision
) -> Iterator[Proposal]:
    """What the methods propose, in their order; who refuses is noted."""
    for method in candidates:
        refusal = Refusal(method.name, site.near_miss) if site.near_miss else None
        refusal = refusal or objective.refuse_error(method, decision.measured, config.max_error)
        answer = method.propose(site, context) if refusal is None else refusal
        for one in answer if isinstance(answer, tuple) else (answer,):
            if isinstance(one, Refusal):
                decision.refusals.append(str(one))
            else:
                yield one


def _best(proposals: list[Proposal], site: AttentionSite | FeedForwardSite, config: Config, dense: Any) -> int:
    """Without an objective the first: order is preference."""
    if config.objective is None or len(proposals) == 1:
        return 0
    ffn = isinstance(site, FeedForwardSite)
    return objective.select(
        proposals,
        config.objective,
        key_len=0 if ffn else site.key_len,
        hints=size_hints(site),
        operands=site.weight_bytes if ffn else work.operand_bytes(site),
        dense=dense,
        reaches=(lambda bound: False) if ffn else lambda bound: at_least(site.key, 2, bound),
    )


def _take(decision: Decision, proposal: Proposal, others: list[Proposal], hints: dict[Any, int], config: Config) -> None:
    method = proposal.method
    decision.method, decision.options, decision.reason = method.name, method.options(), proposal.note
    decision.seconds, decision.scratch, decision.formula = (
        number(proposal.seconds, hints),
        number(proposal.scratch, hints),
        proposal.formula,
    )
    decision.density = proposal.density
    decision.error = objective.measured_error(method, decision.measured)
    if config.max_error is not None:
        decision.reason += f"; error {decision.error:.3g}, at most {config.max_error:g}"
    if config.objective is not None:
        decision.reason += f"; least {'time and memory' if config.objective == 'balanced' else config.objective}"
        cost = f"{method.name} {objective.words(decision.seconds, decision.scratch)}"
        for other in others:
            time, scratch = number(other.seconds, hints), number(other.scratch, hints)
            decision.refusals.append(f"{other.method.name}: {other.note}: {objective.words(time, scratch)} against {cost}")


def _described(site: AttentionSite | FeedForwardSite, context: Context) -> tuple[Decision, Any]:
    """The site as a decision that is still open, and dense seconds as an expression."""
    ffn = isinstance(site, FeedForwardSite)
    decision = Decision(
        site=site.name,
        layer=site.layer,
        phase=site.phase,
        sizes={n: str(getattr(site, n)) for n in (_FFN_SIZES if ffn else _ATTENTION_SIZES)},
        mask="" if ffn else site.mask.describe(),
        method=None,
        kind="ffn" if ffn else "attention",
    )
    if ffn:
        seconds = costs.ffn_seconds(site, context.device)
    else:
        dense = lambda sizes: (work.attention(sizes, "sdpa"),)
        seconds = costs.seconds(dense(work.sizes_of(site)), context.device)
        decision.dense_formula = costs.formula(dense, site, context.device) if context.formulas and not site.near_miss else ""
    decision.dense_seconds = number(seconds, size_hints(site))
    return decision, seconds


def at_least(node: torch.fx.Node, dim: int, bound: int) -> bool:
    """Whether a dimension reaches a bound; on a symbolic size the answer becomes a guard of the compiled graph."""
    return bound <= 0 or bool(node.meta["example_value"].shape[dim] >= bound)


def size_hints(site: AttentionSite | FeedForwardSite) -> dict[Any, int]:
    """The example's numbers for the site's symbols."""
    hints: dict[Any, int] = {}
    for node in (site.output,) if isinstance(site, FeedForwardSite) else (site.query, site.key, site.value):
        for size in node.meta["example_value"].shape:
            if isinstance(size, torch.SymInt) and size.node.hint is not None:
                hints |= _solve(size.node.expr, size.node)
    return hints


def _solve(expr: Size, node: Any) -> dict[Any, int]:
    env = node.shape_env
    found = {}
    for symbol in getattr(expr, "free_symbols", ()):
        table = symbol_values(env)
        if symbol in table:
            found[symbol] = int(table[symbol])
    return found

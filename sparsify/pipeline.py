"""Compiles one graph: capture → match → plan → validate → rewrite → verify → lower. A failure in a stage leaves the graph as it was."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis

import sparsify.backends as backends
from sparsify.backends import predict
from sparsify.costs import device as hardware
from sparsify.distributed import shards
from sparsify.distributed.shards import Shard
from sparsify.errors import ConfigError, RewriteError, SparsifyError, UnsupportedError, VerifyError
from sparsify.graph import module_paths, unforeseen
from sparsify.masks.symbolic import find_shape_env
from sparsify.matching import beside, stream, token
from sparsify.matching.attention import find_attention
from sparsify.matching.base import PlanKind, Site, SiteKind
from sparsify.matching.cache import find_cache, made_inside, stores_many
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.matching.sites import AttentionSite
from sparsify.planning import unmatched
from sparsify.planning.choose import Choice, acts_on, leave_out_untouched_ffn, make_plan, named_methods
from sparsify.planning.config.config import Config
from sparsify.planning.decision import Decision
from sparsify.planning.method import Context
from sparsify.planning.plan import Plan
from sparsify.planning.saved_plan import load_saved_plan
from sparsify.rewriting import few_rows, ffn_runs, layers, observed_masks, one_token, small_sums, verify
from sparsify.rewriting.assumed import Assumed
from sparsify.rewriting.copies import copy_graph
from sparsify.rewriting.editor import Editor
from sparsify.rewriting.observed_masks import Assumption
from sparsify.rewriting.trace import Trace
from sparsify.rewriting.validate import Validator

log = logging.getLogger(__name__)

# List that receives every plan while it is set, for `explain` and `testing.compare`.
collector: contextvars.ContextVar[list[Plan] | None] = contextvars.ContextVar("sparsify_plans", default=None)

# Whether plans tell what a graph costs beside its sites, for `explain`.
costs_beside: contextvars.ContextVar[bool] = contextvars.ContextVar("sparsify_costs_beside", default=False)


# How many forms of the masks that arrive as inputs one captured graph is compiled for; further ones are not observed.
MOST_FORMS = 4


@dataclass(frozen=True)
class Part:
    """What a process's graphs have of a model and a text that several processes share.

    heads: which of the model's heads; None: all.
    sequence: name of the group among whose processes the text is divided; empty: all of it.
    tokens: of the text that processes share, by which they choose methods alike; 0: it is not divided.
    processes: that share it.
    """

    heads: Shard | None = None
    sequence: str = ""
    tokens: int = 0
    processes: int = 1


WHOLE = Part()


@dataclass(frozen=True)
class Retraced:
    """Of a graph that is captured once more because its masks are no longer what they were observed to say.

    forms: how many forms of masks it may still be compiled for.
    names: kind, path and layer of the sites, which capturing a graph loses.
    """

    forms: int
    names: tuple[tuple[SiteKind, str, int | None], ...]

    def named(self, sites: list[Site]) -> list[Site]:
        """The sites under their names; none where they are others."""
        if [site.kind for site in sites] != [kind for kind, _, _ in self.names]:
            log.warning("a graph that was captured again has other sites than before, and is left as it is")
            return []
        return [
            dataclasses.replace(cast(Any, site), name=name, layer=layer) for site, (_, name, layer) in zip(sites, self.names, strict=True)
        ]


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    compilation: Any = None,
    serves: Sequence[str] = (),
    retraced: Retraced | None = None,
    part: Part = WHOLE,
    alone: bool = True,
) -> Callable[..., Any]:
    """Compiles one graph that Dynamo captured. A failure of a stage leaves the graph untouched, with one warning; `strict` raises instead.

    Args:
        gm: the captured graph; lowering consumes it.
        example_inputs: its inputs, real or fake tensors and sizes.
        config: settings of this compilation.
        compilation: any object that all graphs of one torch.compile call share, such as its options; warnings are given once for it.
        serves: paths of the modules that the graph will be called for, where it is a part of a model's call and not all of it.
        retraced: what is known of a graph that was captured from another.
        part: of the model and the text that the graph computes; heads that tensor parallelism divides are found from its inputs.
        alone: whether options are for this graph, where it serves no modules, and not for others of the same model as well.

    Returns:
        a callable with the graph's inputs and outputs.
    """
    trace = Trace(config.trace)
    part = part if part.heads else dataclasses.replace(part, heads=shards.find(example_inputs))
    assumption = None
    try:
        with module_paths.outermost_module(serves[0]) if serves else contextlib.nullcontext():
            ahead = config.compile_ahead and config.lower == "inductor"
            longer: list[fx.GraphModule] | None = [] if ahead and serves else None
            assumption, (plan, rewritten, kept) = _rewritten(
                gm, example_inputs, config, trace, longer, retraced, part, alone and not serves
            )
            for graph in (rewritten, *(longer or ())):
                if ahead and graph is not None:
                    predict.compile_ahead(graph, config.kernels)
            if serves:
                plan = plan.repeated(serves)
                if how := small_sums.told(gm.graph, config.peer_sums):
                    plan = dataclasses.replace(plan, capture=f"{plan.capture}; {how}")
                if (saved := load_saved_plan(config.plan)) is not None:
                    plan = saved.recalled(plan)
            else:
                _refuse_between(plan, config)
            unmatched.warn(gm, plan, config, compilation, ends=not serves)
    except ConfigError:  # what is written wrongly is no failure of ours
        raise
    except Exception as error:
        if config.strict or part.sequence:  # the graph as it was would see a part of the text
            raise
        plan, rewritten, kept, assumption = _warn_fallback(error), None, None, None
    if (plans := collector.get()) is not None:
        plans.append(plan)
    if rewritten is None:
        return lower(gm, example_inputs, config)
    runs = ffn_runs.owner(gm, rewritten)
    pristine = copy_graph(gm) if config.verify or assumption else gm  # rewriting works on copies; only lowering consumes a graph
    try:
        check = None if assumption is None else _lower_check(assumption, example_inputs, config)
        compiled = lower(rewritten, example_inputs, config)
    except RestartAnalysis:  # how lower stages ask Dynamo to trace again, knowing more: no failure
        if plans is not None:
            plans.pop()  # the next trace makes its own
        raise
    except Exception as error:
        if config.strict or part.sequence:
            raise
        plan.fallback = _warn_fallback(error).fallback
        return lower(gm, example_inputs, config)
    if config.verify and kept is not None:
        compiled = _verify_first_call(compiled, pristine, kept, config, example_inputs)
    served = _with_serving(compiled, config, runs)
    if assumption is None or check is None:
        return served
    forms = MOST_FORMS if retraced is None else retraced.forms
    names = tuple(_name(site) for site in _sites(assumption.graph, config, assumption.attention))
    again = lambda graph, inputs: compile_graph(graph, inputs, config, compilation, serves, Retraced(forms - 1, names), part, alone)
    return Assumed(check, assumption.places, served, pristine, again)


# kinds of sites between layers: why a whole graph has none, and what a plan records of one of which nothing is known
_BETWEEN: dict[PlanKind, tuple[str, Callable[[], dict[str, str]]]] = {
    "stream": ("within which the number of rows does not change", stream.sizes),
    "token": ("which runs all of them", token.sizes),
}


def _refuse_between(plan: Plan, config: Config) -> None:
    """Says in the plan of a prompt's whole graph that no method acts between its layers.

    Raises:
        UnsupportedError: under `strict`.
    """
    if config.exact or not any(decision.kind == "attention" and decision.phase == "prefill" for decision in plan.decisions):
        return
    for kind, (what, unknown) in _BETWEEN.items():
        reason, hint = f"layers are captured in one graph, {what}", "use sparsify.compile(model)"
        for name in (name for name, method in named_methods(config).items() if kind in method.kinds):
            if config.strict:
                raise UnsupportedError(reason, where=name, hint=hint)
            refusal = f"{name}: {reason} ({hint})"
            log.warning("%s", refusal)
            plan.decisions.append(
                Decision("", None, "prefill", unknown(), "", None, reason="no method acts", refusals=[refusal], kind=kind)
            )


def _name(site: Site) -> tuple[SiteKind, str, int | None]:
    return site.kind, site.name, site.layer


def _rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    trace: Trace,
    longer: list[fx.GraphModule] | None,
    retraced: Retraced | None,
    part: Part,
    alone: bool,
) -> tuple[Assumption | None, tuple[Plan, fx.GraphModule | None, fx.GraphModule | None]]:
    """`rewrite_graph`, under an assumption about the graph's inputs where a site that is rewritten needs one."""
    attention = find_attention(gm)
    assumption, attention = _assumption(gm, attention, example_inputs, config, retraced)
    if assumption is not None:
        result = rewrite_graph(assumption.graph, config, trace, longer, assumption.attention, retraced, part, alone)
        if _counts_on(result[0], assumption):
            return assumption, result
        for index in assumption.counting:  # their masks were read: what is in the way is another thing
            attention[index] = observed_masks.tell(attention[index], result[0].decisions[index].reason)
    return None, rewrite_graph(gm, config, trace, longer, attention, retraced, part, alone)


def _assumption(
    gm: fx.GraphModule, attention: list[AttentionSite], example_inputs: Sequence[Any], config: Config, retraced: Retraced | None
) -> tuple[Assumption | None, list[AttentionSite]]:
    """What the masks that arrive as inputs were observed to say, where that lets a site be described; and the sites, with reasons."""
    if retraced is not None and retraced.forms < 1:
        return None, attention
    try:
        return observed_masks.find(gm, attention, example_inputs)
    except Exception as error:
        if config.strict:
            raise
        log.warning("masks that arrive as inputs are not observed: %s", unforeseen.reason(error))
        return None, attention


def _counts_on(plan: Plan, assumption: Assumption) -> bool:
    """Whether a plan for the assumption's graph rewrites a site that was not described without it; the plan then says so."""
    decisions = [plan.decisions[index] for index in assumption.counting]
    for decision in decisions:
        decision.mask += f" ({observed_masks.LOOKED_AT})"
    return any(decision.method is not None for decision in decisions)


def _lower_check(assumption: Assumption, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Compiles what compares masks with what they were observed to say: a callable that returns a sequence of one bool []."""
    if config.lower == "eager":
        return assumption.check.forward
    from torch._inductor.compile_fx import compile_fx

    patches = {**config.inductor_patches(), "triton.cudagraphs": False}  # its result is waited for
    return cast(Callable[..., Any], compile_fx(assumption.check, [example_inputs[i] for i in assumption.places], config_patches=patches))


def rewrite_graph(
    gm: fx.GraphModule,
    config: Config,
    trace: Trace,
    longer: list[fx.GraphModule] | None = None,
    attention: list[AttentionSite] | None = None,
    retraced: Retraced | None = None,
    part: Part = WHOLE,
    alone: bool = True,
) -> tuple[Plan, fx.GraphModule | None, fx.GraphModule | None]:
    """Matches, plans, validates, rewrites and verifies; nothing is lowered.

    Args:
        attention: what `find_attention` found in the graph, where that was asked already.
        retraced, part, alone: as in `compile_graph`.
        longer: gets the graph as it will be rewritten for lengths from which other proposals win, where there are any.

    Returns:
        the plan; the rewritten graph, None when nothing changed; with `config.verify` the rewriting under keep-all settings, else None.
    """
    trace.stage("captured", lambda: gm.print_readable(print_output=False))
    sites = _sites(gm, config, attention)
    if retraced is not None:
        sites = retraced.named(sites)
    if not sites:
        log.info("no site in this graph")
        return Plan(), None, None
    context = dataclasses.replace(
        make_context(sites[0].device, config), heads=part.heads, sequence=part.sequence, tokens=part.tokens, processes=part.processes
    )
    validator = Validator(gm.graph, functools.partial(backends.serving, "reference"))
    plan, choices = leave_out_untouched_ffn(*make_plan(sites, config, context, alone=alone), config)
    if config.validation:
        validate(choices, validator, config.strict)
    if costs_beside.get():
        plan.beside = _seconds_beside(gm, sites, context)
    trace.plan(plan)
    log.info("%d of %d sites will be rewritten", len(plan.rewritten), len(plan.decisions))
    for decision in plan.decisions:
        log.debug("%s: %s; %s", decision.site, decision.method or "left as is", decision.reason)
    rewritten = rewrite_where_possible(gm, choices, config.strict, part.sequence) if plan.rewritten else None
    if part.sequence:
        _check_divided(choices)
    # after the rewriting that counts: what fake tensors compute while guards are suppressed they remember, and ask for no guard again
    if longer is not None:
        longer.extend(_rewritten_for_more(gm, choices, part.sequence))
    if rewritten is None:
        return plan, None, None
    trace.stage("rewritten", lambda: rewritten.print_readable(print_output=False))
    kept = rewrite_copy(gm, choices, keep_all=True) if config.verify else None
    if kept is not None:
        kept.meta[_EMPTY_ROWS] = any(_may_see_nothing(site) for site in sites)
    return plan, rewritten, kept


# in the `meta` of a graph that is compared: whether attention in it may have rows that see no key
_EMPTY_ROWS = "sparsify_empty_rows"


def _may_see_nothing(site: Site) -> bool:
    mask = getattr(site, "mask", None)
    return mask is not None and (mask.opaque or getattr(site, "empty_rows", "impossible") != "impossible")


def _sites(gm: fx.GraphModule, config: Config, attention: list[AttentionSite] | None) -> list[Site]:
    """Everything in a graph that methods may act on. attention: as in `rewrite_graph`."""
    over_keys = [*(find_attention(gm) if attention is None else attention), *find_cache(gm)]
    device = hardware.describe(over_keys[0].device) if over_keys else None
    return [*over_keys, *(find_feed_forward(gm, over_keys) if acts_on("ffn", config, device) else ())]


def _check_divided(choices: list[Choice]) -> None:
    """Raises UnsupportedError where attention over a text that is divided among processes would stay as it is, and see a part of it."""
    for choice in choices:
        if choice.site.kind == "attention" and choice.proposal is None and choice.site.phase != "decode":
            what = f"no method acts here, and the text is divided among processes: {choice.decision.reason}"
            raise UnsupportedError(what, where=choice.site.name, hint='add "dense" to passes')


def _seconds_beside(gm: fx.GraphModule, sites: list[Site], context: Context) -> dict[str, float]:
    try:
        return beside.seconds_beside(gm, sites, context.device)
    except Exception as error:  # numbers for people alone
        log.info("what this graph costs beside its attention is unknown: %s", unforeseen.reason(error))
        return {}


def _rewritten_for_more(gm: fx.GraphModule, choices: list[Choice], sequence: str) -> list[fx.GraphModule]:
    """The graph as it will be for longer calls, only to be looked at: what it assumes of sizes is not asked."""
    if not any(choice.later for choice in choices):
        return []
    later = [dataclasses.replace(c, proposal=c.later or c.proposal) for c in choices]
    env = find_shape_env(gm.graph)
    try:
        with env.suppress_guards() if env is not None else contextlib.nullcontext():
            return [rewrite_copy(gm, later, sequence=sequence)]
    except SparsifyError as error:
        log.debug("no kernels of longer calls are compiled ahead", exc_info=error)
        return []


def validate(choices: list[Choice], validator: Validator, strict: bool) -> None:
    """Executes each site and its rewriting on small random instances. A site where they differ, or that cannot be run, stays as it is.

    Raises:
        VerifyError: with `strict`, they differ: a proof of ours is wrong.
    """
    for choice in choices:
        if choice.proposal is None or not choice.site.proved:
            continue
        outcome = validator.check(choice.site, choice.proposal.method)
        choice.decision.validation = outcome.describe()
        if outcome.verdict == "agrees":
            continue
        if strict and outcome.verdict == "differs":
            raise VerifyError(choice.decision.validation, where=choice.site.name)
        choice.proposal = None
        choice.decision.leave(choice.decision.validation, f"validation: {choice.decision.validation}")
        log.warning("%s: %s", choice.site.name or "attention", choice.decision.validation)


def make_context(device: torch.device, config: Config) -> Context:
    """What methods may ask about the machine: its cost profile, which kernels serve it, and the configured thresholds."""
    kernels, reason = backends.available(device, config.kernels)
    log.debug("kernels: %s (%s)", kernels, reason)
    family, why = backends.attention_family(device, config.kernels)
    min_length = None if config.min_length == "auto" else config.min_length
    return Context(hardware.describe(device), kernels, min_length, family, config.max_cost_ratio, obstacle=why)


def context_of_call(device: torch.device, config: Config) -> Context:
    """For methods that are asked at every call of a model: costs are wanted where a plan tells them, and take longer than all else."""
    return dataclasses.replace(make_context(device, config), formulas=False, costs=collector.get() is not None)


class _SiteFailed(Exception):
    """The rewriting of one site failed; `error` says why."""

    def __init__(self, choice: Choice, error: SparsifyError):
        super().__init__(str(error))
        self.choice, self.error = choice, error


def rewrite_where_possible(gm: fx.GraphModule, choices: list[Choice], strict: bool, sequence: str = "") -> fx.GraphModule | None:
    """`rewrite_copy`, repeated without the sites where it fails; these stay as they are, and their decisions say why.

    Returns:
        the rewritten graph; None when no site is left to rewrite.

    Raises:
        SparsifyError: with `strict`, a method failed. A site with operands that an op does not take is left even then.
    """
    while any(choice.proposal is not None for choice in choices):
        try:
            return _try_rewrite(gm, choices, False, sequence)
        except _SiteFailed as failed:
            if isinstance(failed.error, UnsupportedError):
                log.info("%s: %s", failed.choice.site.name, failed.error)
            elif strict:
                raise failed.error from failed.error.__cause__
            else:
                warnings.warn(f"sparsify left a site untouched: {failed.error} (strict = true raises instead)", stacklevel=2)
                log.debug("site left untouched", exc_info=failed.error)
            decision, failed.choice.proposal = failed.choice.decision, None
            decision.leave(str(failed.error), f"{decision.method}: {failed.error}")
    return None


def rewrite_copy(gm: fx.GraphModule, choices: list[Choice], keep_all: bool = False, sequence: str = "") -> fx.GraphModule:
    """A copy of the graph in which every chosen site is rewritten, with its structure verified.

    Raises:
        SparsifyError: a site could not be rewritten.
    """
    try:
        return _try_rewrite(gm, choices, keep_all, sequence)
    except _SiteFailed as failed:
        raise failed.error from failed.error.__cause__


def _try_rewrite(gm: fx.GraphModule, choices: list[Choice], keep_all: bool, sequence: str) -> fx.GraphModule:
    mapping: dict[fx.Node, fx.Node] = {}
    copy = copy_graph(gm, mapping)
    editor = Editor(copy.graph, sequence=sequence)
    chosen = [c for c in choices if c.proposal is not None]
    for choice, proposal in ((c, c.proposal) for c in choices if c.proposal is not None):
        method = proposal.method.keep_all() if keep_all else proposal.method
        try:
            method.rewrite(editor, editor.converted(choice.site.mapped(mapping)))
        except SparsifyError as error:
            raise _SiteFailed(choice, error) from error
        except Exception as error:
            what = RewriteError(f"{method.name} failed: {type(error).__name__}: {error}", where=choice.site.name)
            what.__cause__ = error
            raise _SiteFailed(choice, what) from error
    editor.erase_orphans([c.site.mapped(mapping) for c in chosen])
    copy.recompile()
    try:
        verify.structure(gm, copy, editor, len(chosen))
    except VerifyError as error:
        for choice in chosen:
            if choice.site.output.name == error.where:
                raise _SiteFailed(choice, error) from error
        raise
    return copy


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Compiles a graph with Inductor under the configured mode and options, or returns its forward with `lower = "eager"`.

    Raises:
        UnsupportedError: CUDA graphs are requested, and a SparseCache allocates its buffers within the graph.
    """
    gm = _with_steps_written_out(_with_small_sums(_with_few_rows(gm, config), config), config)
    if config.lower == "eager":
        return gm.forward
    if config.inductor_patches().get("triton.cudagraphs") and (node := made_inside(gm)) is not None:
        what = "a SparseCache that is allocated within a compiled call would live in memory that CUDA graphs take back"
        hint = "make it with SparseCache(model.config, ..., batch_size=..., device=..., dtype=...), or run the prompt uncompiled"
        raise UnsupportedError(what, where=node.name, hint=hint)
    from torch._inductor.compile_fx import compile_fx

    patches = config.inductor_patches()
    if stores_many(gm):
        # attention that sinks to where its result is used, past the store, reads what the store would overwrite: a copy of all keys
        patches = {"reorder_for_locality": False, **patches}
    if config.share_layers and not patches.get("triton.cudagraphs"):

        def compile_piece(piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return cast(Callable[..., Any], compile_fx(piece, list(inputs), config_patches=patches))

        compiled = layers.compile_by_layers(gm, compile_piece)
        if compiled is not None:
            return compiled
    return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches))


def _with_few_rows(gm: fx.GraphModule, config: Config) -> fx.GraphModule:
    """The graph with linear layers of few rows joined, where kernels serve them; itself without any, or where that failed."""
    if config.linear_kernels == "never":
        return gm
    always = config.linear_kernels == "always"
    serves = lambda device: always or (device.type == "cuda" and backends.available(device, config.kernels)[0] == "triton")
    try:
        if not few_rows.finds_any(gm.graph, serves):
            return gm
        joined = copy_graph(gm)
        calls = few_rows.join(joined, serves)
    except UnsupportedError as error:
        log.info("linear layers of few rows are left as they are: %s", error)
        return gm
    except Exception as error:
        if config.strict:
            raise
        log.warning("linear layers of few rows are left as they are: %s", unforeseen.reason(error))
        return gm
    if not calls:
        return gm
    log.info("%d calls of linear layers with few rows", calls)
    if config.compile_ahead and config.lower == "inductor":
        predict.compile_ahead(joined, config.kernels)
    return joined


def _with_small_sums(gm: fx.GraphModule, config: Config) -> fx.GraphModule:
    """The graph with sums over processes read from peers where these serve them; itself without any, or where that failed."""
    if not config.peer_sums or not small_sums.any_found(gm.graph):
        return gm
    try:
        replaced = copy_graph(gm)
        count = small_sums.replace(replaced)
    except Exception as error:
        if config.strict:
            raise
        log.warning("small sums go through NCCL: %s", unforeseen.reason(error))
        return gm
    return replaced if count else gm


def _with_steps_written_out(gm: fx.GraphModule, config: Config) -> fx.GraphModule:
    """The graph with decode steps on a CPU as torch's own operations, where it is told how many slots are filled; else itself."""
    serves = lambda device: device.type == "cpu" and backends.attention_family(device, config.kernels)[0] == "cpp"
    try:
        if not one_token.finds_any(gm.graph, serves):
            return gm
        written = copy_graph(gm)
        one_token.write_out(written, serves)
    except Exception as error:
        if config.strict:
            raise
        log.warning("decode steps stay calls of an op: %s", unforeseen.reason(error))
        return gm
    return written


def _with_serving(compiled: Callable[..., Any], config: Config, runs: ffn_runs.Owner | None) -> Callable[..., Any]:
    """Wraps a compiled graph: `kernels` and `strict` hold during its calls alone, and generated tokens are counted for its model."""
    if config.kernels == "auto" and not config.strict and runs is None:
        return compiled

    def call(*inputs: Any) -> Any:
        with backends.serving(config.kernels, config.strict), runs.counting(inputs) if runs else contextlib.nullcontext():
            return compiled(*inputs)

    return call


def _warn_fallback(error: Exception) -> Plan:
    """Warns that the graph stays untouched, and returns a plan that says so."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # torch's errors may hold whole tracebacks
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    warnings.warn(f"sparsify left a graph untouched: {reason} (strict = true raises instead)", stacklevel=2)
    log.debug("graph left untouched", exc_info=error)
    return Plan(fallback=reason)


def _verify_first_call(
    compiled: Callable[..., Any], pristine: fx.GraphModule, kept: fx.GraphModule, config: Config, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Wraps a compiled graph: its first call compares the untouched graph with the keep-all rewriting on the call's inputs.

    Where they differ, `strict` raises; otherwise the untouched graph is compiled and used from then on.
    """
    state: dict[str, Callable[..., Any] | None] = {"run": None}

    def checked(*inputs: Any) -> Any:
        if state["run"] is None:
            state["run"] = compiled
            try:
                verify.numbers(pristine.forward, kept.forward, inputs, kept.meta[_EMPTY_ROWS])
            except Exception as error:
                if config.strict:
                    raise
                _warn_fallback(error)
                state["run"] = lower(copy_graph(pristine), example_inputs, config)
        return state["run"](*inputs)

    setattr(checked, "_boxed_call", False)  # noqa: B010  (a function declares no attributes)
    return checked

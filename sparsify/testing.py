"""Differential testing: the same model and inputs eager and compiled, compared on the rows that somebody reads.

    result = compare(model, {"input_ids": ids}, options={"passes": ["dense"]})
    assert result.close, result

A row is visible when its own position is not padding. Errors are differences of logits divided by the largest finite eager logit.
"""

from __future__ import annotations

import copy
import glob
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify import api, pipeline
from sparsify.errors import UnsupportedError
from sparsify.graph import isolated
from sparsify.ops import block_lists
from sparsify.ops.limits import cdiv
from sparsify.ops.selection import observing
from sparsify.planning import registry
from sparsify.planning.config import config
from sparsify.planning.decision import labels
from sparsify.planning.plan import Plan
from sparsify.planning.saved_plan import SavedPlan
from sparsify.rewriting.verify import TOLERANCE

_ROWS = 512  # rows compared at once: a vocabulary of 128K in float32 is 0.5 MB a row


@dataclass(frozen=True)
class Comparison:
    """Eager and compiled results of one call, compared.

    error: largest difference between logits.
    relative_error: `error` divided by the largest eager logit; infinite when only one of the two has a NaN or infinity somewhere.
    bound: largest `relative_error` that counts as close.
    token_agreement: share of rows with the same most likely token, 0 to 1.
    kl: mean KL divergence of the compiled model's next-token distribution from eager's, in nats.
    rows: number of visible rows compared.
    kept: sites that ran a lossy method with everything kept, where keep-all settings were asked for; else None.
    density: mean selected share of the causal blocks over all block selections, 0 to 1; None without selections.
    plan: the plan of the compiled call.
    """

    error: float
    relative_error: float
    bound: float
    token_agreement: float
    kl: float
    rows: int
    density: float | None
    plan: Plan = field(repr=False)
    kept: int | None = None

    @property
    def close(self) -> bool:
        return self.relative_error <= self.bound

    @property
    def rewritten(self) -> int:
        return len(self.plan.rewritten)

    def __str__(self) -> str:
        verdict = "same" if self.close else "DIFFERS"
        density = "" if self.density is None else f", density {self.density:.1%}"
        fallback = f"; left untouched: {self.plan.fallback}" if self.plan.fallback else ""
        kept = "" if self.kept is None else f", {self.kept} by a lossy method with everything kept"
        nothing = f"\nNOTHING WAS SHOWN OF ANY LOSSY METHOD: {_why_nothing_kept(self.plan)}" if self.kept == 0 else ""
        return (
            f"{verdict}: relative error {self.relative_error:.2e} (allowed {self.bound:.0e}), largest difference {self.error:.2e}, "
            f"tokens equal {self.token_agreement:.2%}, KL {self.kl:.2e}, {self.rows} rows, "
            f"{self.rewritten} of {len(self.plan.decisions)} sites rewritten{kept}{density}{fallback}{nothing}"
        )


@dataclass(frozen=True)
class Tokens:
    """Greedy continuations [batch, new tokens] by the eager and by the compiled model."""

    eager: Tensor
    compiled: Tensor
    plan: Plan = field(repr=False)

    @property
    def agreement(self) -> float:
        """Share of positions with the same token; a continuation that ends early disagrees about the rest."""
        length = min(self.eager.shape[1], self.compiled.shape[1])
        total = max(self.eager.shape[1], self.compiled.shape[1]) * self.eager.shape[0]
        return (self.eager[:, :length] == self.compiled[:, :length]).sum().item() / total if total else 1.0

    @property
    def same(self) -> bool:
        return torch.equal(self.eager, self.compiled)


@dataclass(frozen=True)
class Selection:
    """Block lists that one call made, on the CPU.

    counts, indices: the block lists, as `sparsify.ops.block_lists` describes them.
    block_size: tokens per block.
    density: selected share of the causal blocks, 0 to 1.
    key_blocks: that there are.
    """

    counts: Tensor
    indices: Tensor
    block_size: int
    density: float
    key_blocks: int

    def mask(self) -> Tensor:
        """The lists as a block mask, bool [batch, query_heads, query_blocks, key_blocks]; True where a block is visited."""
        return block_lists.to_dense(self.counts, self.indices, self.key_blocks)


@contextmanager
def record_blocks() -> Generator[list[Selection]]:
    """Collects every block selection that runs inside the block, in order of execution, in compiled graphs too."""
    selections: list[Selection] = []

    def observe(call: block_lists.Listing, counts: Tensor, indices: Tensor) -> None:
        density, key_blocks = block_lists.call_density(call, counts), cdiv(int(call.key_len), call.block_size)
        lists = counts.detach().cpu().clone(), indices.detach().cpu().clone()
        selections.append(Selection(*lists, call.block_size, density, key_blocks))

    with observing(observe):
        yield selections


@torch.no_grad()
def compare(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    keep_all: bool = False,
    tolerance: float | None = None,
    fullgraph: bool = False,
) -> Comparison:
    """Runs one forward call eager and compiled, each on its own copy of the inputs, and compares. Leaves the model as it was.

    Args:
        inputs: keyword arguments of the call, or its `input_ids`. A 2-D `attention_mask` excludes padding rows from the comparison.
        options: as in docs/configuration.md.
        keep_all: replace every lossy method's options by those under which it must equal dense attention, and let it act at any length:
            whether the rewriting itself is right.
        tolerance: largest relative error that counts as close; the dtype's bound when None.
        fullgraph: as for torch.compile.

    Raises:
        ConfigError: unknown or impossible options.
        UnsupportedError: the model returns neither logits nor a tensor; or, with `keep_all` under `strict`, no site ran a lossy method.
    """
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    followed = api.check_settings(model, config.load(options, method_models=registry.discover()))
    with settings(options, keep_all) as chosen:
        eager = _logits(model.forward(**_clone_inputs(inputs)))
        return _compare_with_eager(eager, model, inputs, chosen, tolerance, fullgraph, keep_all, followed)


def _compare_with_eager(
    eager: Tensor,
    model: nn.Module,
    inputs: dict[str, Any],
    options: dict[str, Any],
    tolerance: float | None,
    fullgraph: bool = False,
    keep_all: bool = False,
    followed: SavedPlan | None = None,
) -> Comparison:
    with (
        isolated.compiled(model.forward, _backend(options), fullgraph=fullgraph) as forward,
        api.collect_plans() as plans,
        record_blocks() as selections,
    ):
        compiled = _logits(forward(**_clone_inputs(inputs)))
    bound = TOLERANCE.get(eager.dtype, 1e-6) if tolerance is None else tolerance
    measured = _difference(eager, compiled, visible_rows(eager, inputs.get("attention_mask")))
    density = sum(s.density for s in selections) / len(selections) if selections else None
    kept = _kept(plans, options) if keep_all else None
    return Comparison(**measured, bound=bound, density=density, plan=merge_plans(plans, model, None if keep_all else followed), kept=kept)


def _kept(plans: list[Plan], options: Mapping[str, Any]) -> int:
    """Sites that ran a lossy method, whose settings keep everything. Raises UnsupportedError where none did, under `strict`."""
    methods = registry.discover()
    count = sum(methods[d.method].lossy for plan in plans if not plan.fallback for d in plan.rewritten if d.method is not None)
    if not count and config.load(options, method_models=methods).strict:
        what = f"no site ran a lossy method with everything kept, which would show nothing of it: {_why_nothing_kept(merge_plans(plans))}"
        raise UnsupportedError(what, where="keep_all")
    return count


def _why_nothing_kept(plan: Plan) -> str:
    """Why no lossy method acts, as the plan of a call under keep-all settings tells it, in words."""
    lossy = [name for name, method in registry.discover().items() if method.lossy]
    refusals = [refusal for d in plan.decisions for refusal in d.refusals if refusal.partition(":")[0] in lossy]
    return plan.fallback or next(iter(refusals), "none comes to act at a site of this call, by the options")


@torch.no_grad()
def compare_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    keep_all: bool = False,
    max_new_tokens: int = 16,
    **generate: Any,
) -> Tokens:
    """Runs greedy `generate()` with the eager model and with the compiled one. Leaves the model as it was.

    Args:
        inputs: keyword arguments of `generate`, or its `input_ids`.
        options: as for `compare`.
        keep_all: as for `compare`.
        generate: further arguments of `generate`.

    Raises:
        UnsupportedError: with `keep_all` under `strict`, no site ran a lossy method.
    """
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    followed = api.check_settings(model, config.load(options, method_models=registry.discover()))
    prompt_len = inputs["input_ids"].shape[1]
    call = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
    # transformers' own loop and cache for both, whatever `sparsify.compile` put there
    generate_once: Callable[..., Tensor] = cast(Any, type(model)).generate
    before, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        eager = generate_once(model, **_clone_inputs(inputs), **_clone_inputs(call))[:, prompt_len:]
        with (
            settings(options, keep_all) as chosen,
            isolated.compiled(model._call_impl, _backend(chosen)) as model._compiled_call_impl,
            api.collect_plans() as plans,
        ):
            compiled = generate_once(model, **_clone_inputs(inputs), **_clone_inputs(call))[:, prompt_len:]
        if keep_all:
            _kept(plans, chosen)
    finally:
        model._compiled_call_impl = before
    return Tokens(eager, compiled, merge_plans(plans, model, None if keep_all else followed))


def _backend(options: Mapping[str, Any]) -> Callable[..., Any]:
    loaded = config.load(options, method_models=registry.discover())
    return lambda gm, example_inputs: pipeline.compile_graph(gm, example_inputs, loaded, loaded)


def merge_plans(plans: list[Plan], model: nn.Module | None = None, followed: SavedPlan | None = None) -> Plan:
    """One plan with the decisions of several graphs. model: whose these are. followed: the plan file that decided."""
    fallback = "; ".join(dict.fromkeys(p.fallback for p in plans if p.fallback))
    merged = Plan([d for plan in plans for d in plan.decisions], fallback=fallback)
    if model is not None:
        api.name_model(merged, model, followed)
    return merged


def visible_rows(logits: Tensor, attention_mask: Any) -> Tensor:
    """Which rows of the logits belong to tokens and not to padding, bool [batch, rows].

    Args:
        logits: [batch, rows, ...]; may hold only the call's last rows (`logits_to_keep`).
        attention_mask: 2-D, nonzero for tokens; may cover earlier positions too (a cache). Anything else counts as no padding.
    """
    shape = logits.shape[:2]
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or logits.dim() < 3:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    return (attention_mask[:, -shape[1] :] != 0).to(logits.device).expand(shape)


def _difference(eager: Tensor, compiled: Tensor, visible: Tensor) -> dict[str, Any]:
    if eager.shape != compiled.shape or eager.dtype != compiled.dtype:
        raise UnsupportedError(
            f"eager gives {list(eager.shape)} {eager.dtype}, compiled {list(compiled.shape)} {compiled.dtype}", where="compare"
        )
    eager, compiled = eager[visible], compiled[visible]
    rows = eager.shape[0]
    error, scale, equal, kl, broken = 0.0, 0.0, 0, 0.0, False
    for start in range(0, rows, _ROWS):
        want, got = eager[start : start + _ROWS].float(), compiled[start : start + _ROWS].float()
        finite = torch.isfinite(want)
        broken |= bool((torch.isfinite(got) != finite).any())
        if finite.any():
            error = max(error, (want - got)[finite].abs().nan_to_num(nan=torch.inf).max().item())
            scale = max(scale, want[finite].abs().max().item())
        equal += int((want.argmax(-1) == got.argmax(-1)).sum())
        usual, other = (x.masked_fill(~finite, torch.finfo(x.dtype).min).log_softmax(-1) for x in (want, got))
        kl += nn.functional.kl_div(other, usual, log_target=True, reduction="sum").item()
    relative = torch.inf if broken else error / max(scale, 1e-30)
    return {"error": error, "relative_error": relative, "token_agreement": equal / max(rows, 1), "kl": kl / max(rows, 1), "rows": rows}


def _logits(output: Any) -> Tensor:
    """The logits that a call returned, else its last hidden state, else its first floating-point tensor of two or more dimensions."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 2:
            return leaf
    raise UnsupportedError(f"the model returns no logits but {type(output).__name__}", hint="compare() needs a tensor [batch, rows, ...]")


def _clone_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Deep copies of the inputs: caches and in-place changes of one run must not reach the other."""
    return {key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in inputs.items()}


@contextmanager
def settings(options: Mapping[str, Any] | None, keep_all: bool) -> Generator[dict[str, Any]]:
    """The options unchanged, or with `keep_all` the same choice of methods under keep-all options, by preference and at any length: what
    keeps everything pays nowhere, and no error of it was measured.

    A plan file is then copied to a temporary file that exists as long as the context.
    """
    if not keep_all:
        yield dict(options or {})
        return
    models = registry.discover()

    def kept(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return models[name](**given).keep_all().options()

    found = config.load(options, method_models=models)
    names = {*found.passes, *found.methods} & models.keys()
    chosen = found.as_options() | {name: kept(name, found.methods.get(name, {})) for name in names}
    chosen |= {"min_length": 0, "objective": None, "max_error": None}
    # under an objective order says nothing
    ordered = lambda passes: list(passes) if found.objective is None else sorted(passes, key=lambda name: not models[name].lossy)
    chosen["passes"] = ordered(found.passes)
    chosen["rules"] = [
        {"layers": list(rule.layers), "method": ordered(rule.method)}
        | {name: kept(name, {**found.methods.get(name, {}), **rule.options.get(name, {})}) for name in rule.method}
        for rule in found.rules
    ]
    with tempfile.TemporaryDirectory() as folder:
        if found.plan is not None:
            plan = Plan.load(found.plan)
            plan.decisions = [replace(d, options=kept(d.method, d.options)) if d.method else d for d in plan.decisions]
            chosen["plan"] = str(Path(folder) / "plan.json")
            plan.save(chosen["plan"])
        yield chosen


@dataclass(frozen=True)
class Culprit:
    """The first cause of a difference beyond the tolerance.

    kind: "compiler" when the model differs without any method of sparsify, else "site".
    options: smallest configuration found that still differs.
    comparison: the comparison under these options.
    method, site: names; empty for kind "compiler".
    alone: True when rewriting this site alone exceeds the tolerance, False when only together with the sites before it.
    """

    kind: str
    options: dict[str, Any]
    comparison: Comparison
    method: str = ""
    site: str = ""
    alone: bool = True

    def __str__(self) -> str:
        if self.kind == "compiler":
            return "the model differs under Inductor alone, before any pass of sparsify"
        accumulated = "" if self.alone else " (only together with the sites before it: errors add up)"
        return f"{self.method} at {self.site}{accumulated}"


@torch.no_grad()
def bisect(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    keep_all: bool = False,
    tolerance: float | None = None,
    on_step: Callable[[str, Comparison], None] = lambda step, result: None,
) -> tuple[Culprit | None, Comparison]:
    """Finds the first method, and its first site in order of execution, that makes the model exceed the tolerance.

    Compiles about 2 + methods + log2(sites) times. The binary search over sites assumes that more rewritten sites differ more.

    Args:
        inputs: as for `compare`.
        options: as for `compare`.
        keep_all: as for `compare`.
        tolerance: as for `compare`.
        on_step: called with the name and the result of every comparison.

    Returns:
        the culprit, None when the model stays within the tolerance; and the comparison under all options.

    Raises:
        UnsupportedError: with `keep_all` under `strict`, no site ran a lossy method.
    """
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    api.check_settings(model, config.load(options, method_models=registry.discover()))
    with settings(options, keep_all) as chosen:
        return _bisect(model, inputs, chosen, keep_all, tolerance, on_step)


def _bisect(
    model: nn.Module,
    inputs: dict[str, Any],
    options: dict[str, Any],
    keep_all: bool,
    tolerance: float | None,
    on_step: Callable[[str, Comparison], None],
) -> tuple[Culprit | None, Comparison]:
    base = config.load(options, method_models=registry.discover()).as_options() | {"plan": None}
    eager = _logits(model.forward(**_clone_inputs(inputs)))

    def test(step: str, decisions: list[Any]) -> tuple[dict[str, Any], Comparison]:
        chosen = base | {"passes": [], "rules": [_site_rule(d) for d in decisions]}
        result = _compare_with_eager(eager, model, inputs, chosen, tolerance)
        on_step(step, result)
        return chosen, result

    whole = _compare_with_eager(eager, model, inputs, options, tolerance, keep_all=keep_all)
    on_step("everything", whole)
    if whole.close:
        return None, whole
    found, result = test("no pass", [])
    decisions = whole.plan.rewritten
    if not result.close or not decisions:
        return Culprit("compiler", found, result), whole
    for name in dict.fromkeys(d.method for d in decisions):
        mine = [d for d in decisions if d.method == name]
        if len(mine) < len(decisions) and not test(f"{name} alone", mine)[1].close:
            decisions = mine
            break
    good, bad = 0, len(decisions)  # the first `good` sites are within the tolerance, the first `bad` are not
    while bad - good > 1:
        middle = (good + bad) // 2
        close = test(f"first {middle} of {len(decisions)} sites", decisions[:middle])[1].close
        good, bad = (middle, bad) if close else (good, middle)
    last = decisions[bad - 1]
    name = next(label for one, label in zip(whole.plan.decisions, labels(whole.plan.decisions), strict=True) if one is last)
    found, result = test(f"{name} alone", [last])
    alone = not result.close
    if not alone:
        found, result = test(f"{name} and those before it", decisions[:bad])
    return Culprit("site", found, result, last.method or "", name, alone), whole


def _site_rule(decision: Any) -> dict[str, Any]:
    """A configuration rule for one site. Its path is escaped, since rules take patterns, and numbered, since sites may share a path."""
    return {"layers": [f"{glob.escape(decision.site)}#{decision.ordinal}"], "method": [decision.method], decision.method: decision.options}

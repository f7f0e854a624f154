"""Values for `ffn_skip` from a model's own text: how much each feed-forward block turns the residual stream, and what that allows."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify import api
from sparsify.backends.ffn.reference import similarity
from sparsify.errors import UnsupportedError
from sparsify.graph import isolated
from sparsify.matching.attention import find_attention
from sparsify.matching.feed_forward import find_feed_forward
from sparsify.planning.plan import Plan
from sparsify.planning.provenance import provenance_of

# Skips per trigger that are tried.
SKIPS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Proposal:
    """Options of `ffn_skip` and what they do on the calibration text. share: of all blocks of all tokens; lost: see `lost_turn`, by
    skipped block. prefill_share: of the blocks between the cold ones, what the cost of skipping within prompts counts with."""

    cold_first: int
    cold_last: int
    threshold: float
    skip: int
    share: float
    lost: float
    prefill_share: float

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("cold_first", "cold_last", "threshold", "skip", "prefill_share")}


@contextmanager
def _recording(model: nn.Module) -> Generator[tuple[Callable[..., Any], dict[int, list[Tensor]]]]:
    """The model's forward with every feed-forward block observed: similarities [tokens] by block."""
    found: dict[int, list[Tensor]] = {}

    def record(index: int, output: Tensor, *residuals: Tensor) -> None:
        before = residuals[0]
        for term in residuals[1:]:
            before = before + term
        found.setdefault(index, []).append(similarity(before, output).flatten().cpu())

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        sites = find_feed_forward(gm, find_attention(gm))
        readable = [site for site in sites if not site.near_miss]
        if not readable:
            reason = sites[0].near_miss if sites else "none was found"
            raise UnsupportedError(f"no feed-forward block can be calibrated: {reason}", where=type(model).__name__)
        for site in readable:
            with gm.graph.inserting_after(site.output):
                gm.graph.call_function(record, (site.index, site.output, *site.residuals))
        gm.recompile()
        return gm.forward

    with isolated.compiled(model.forward, backend, fullgraph=True) as forward:
        yield forward, found


@torch.no_grad()
def similarities(model: nn.Module, ids: Tensor, *, chunk: int = 1024, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Cosine of the residual stream before and after each block, float32 [blocks, tokens], on pieces of `chunk` tokens.

    Args:
        ids: int64 [1, tokens]; a last piece shorter than `chunk` is left out unless it is the only one.
        progress: called with (pieces done, pieces).

    Raises:
        UnsupportedError: no block can be read, or they are not the same in every piece.
    """
    pieces = [p for p in ids.split(chunk, 1) if p.shape[1] == min(chunk, ids.shape[1])]
    with _recording(model) as (forward, found):
        for done, piece in enumerate(pieces, 1):
            forward(input_ids=piece, use_cache=False)
            if progress is not None:
                progress(done, len(pieces))
    lengths = {sum(map(len, parts)) for parts in found.values()}
    if len(lengths) != 1 or sorted(found) != list(range(len(found))):
        raise UnsupportedError("some feed-forward blocks cannot be read", hint="sparsify explain -o passes=['ffn_skip'] says which")
    return torch.stack([torch.cat(found[i]) for i in range(len(found))])


def simulate(table: Tensor, cold_first: int, cold_last: int, threshold: float, skip: int) -> Tensor:
    """Which blocks each token skips, bool [blocks, tokens], when similarities stay what they are in the dense model."""
    blocks, tokens = table.shape
    skipped = torch.zeros(blocks, tokens, dtype=torch.bool)
    left = torch.zeros(tokens, dtype=torch.long)
    for block in range(cold_first, blocks - cold_last):
        skipped[block] = left > 0
        reached = torch.where(table[block] >= threshold, skip, 0)
        left = torch.where(skipped[block], left - 1, reached)
    return skipped


def lost_turn(table: Tensor, skipped: Tensor) -> float:
    """Mean over skipped blocks of half the squared angle that the stream did not turn, where the angles of blocks that are skipped in a row
    add up: 1 - cosine for one block by itself, k times that by block for k alike ones. Two in a row lose more than two apart."""
    angles = torch.sqrt(2 * (1 - table).clamp(min=0))
    run, total = torch.zeros(table.shape[1]), torch.zeros(())
    for block, left_out in enumerate(skipped):
        total += (run[~left_out] ** 2).sum() / 2
        run = torch.where(left_out, run + angles[block], 0.0)
    total += (run**2).sum() / 2
    return (total / skipped.sum().clamp(min=1)).item()


def cold_regions(table: Tensor) -> tuple[int, int]:
    """Leading and trailing blocks that turn the stream more than the median block does: at least one each, at most a quarter."""
    means = table.mean(1)
    blocks = len(means)
    if blocks < 3:
        return 0, 0
    most = max(1, blocks // 4)
    median = means.median()
    below = [bool(m < median) for m in means]
    first = next((i for i, cold in enumerate(below) if not cold), blocks)
    last = next((i for i, cold in enumerate(reversed(below)) if not cold), blocks)
    return min(max(first, 1), most), min(max(last, 1), most)


def propose(table: Tensor, share: float, cold: tuple[int, int] | None = None) -> Proposal:
    """The threshold and k that skip `share` of all blocks and, among such, lose the least similarity.

    Raises:
        UnsupportedError: so many blocks cannot be skipped between the cold regions.
    """
    first, last = cold_regions(table) if cold is None else cold
    tried = []
    for skip in SKIPS:
        low, high = -1.0, 1.0  # the share falls as the threshold rises
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if simulate(table, first, last, middle, skip).float().mean() >= share else (low, middle)
        skipped = simulate(table, first, last, low, skip)
        reached = skipped.float().mean().item()
        if reached >= share:
            warm = skipped[first : len(table) - last].float().mean().item()
            tried.append(Proposal(first, last, low, skip, reached, lost_turn(table, skipped), round(warm, 4)))
    if not tried:
        reach = simulate(table, first, last, -1.0, SKIPS[-1]).float().mean().item()
        raise UnsupportedError(
            f"{share:.0%} of the blocks cannot be skipped", hint=f"with {first} + {last} cold blocks at most {reach:.0%}"
        )
    return min(tried, key=lambda one: one.lost)


def plan_for(model: nn.Module, ids: Tensor, proposal: Proposal, options: dict[str, Any], warmup: int, table: Tensor | None = None) -> Plan:
    """A plan with the configured methods on attention and the proposal on every feed-forward block that it may act on.

    table: from `similarities`; each block's error is then recorded for `max_error`: the mean of 1 - cosine over the tokens that skip it.
    """
    passes = [name for name in options.get("passes", ("xattention", "dense")) if name != "ffn_skip"]
    plan = api.explain(model, options={**options, "passes": [*passes, "ffn_skip"]}, input_ids=ids, use_cache=False)
    blocks = [d for d in plan.decisions if d.kind == "ffn"]
    chosen = proposal.options() | {"warmup": warmup}
    skipped = None if table is None else simulate(table, proposal.cold_first, proposal.cold_last, proposal.threshold, proposal.skip)
    for index, decision in enumerate(blocks):
        if proposal.cold_first <= index < len(blocks) - proposal.cold_last:
            measured = []
            if table is not None and skipped is not None:
                error = (1 - table[index][skipped[index]]).mean().item() if skipped[index].any() else 0.0
                measured = [{"method": "ffn_skip", "options": chosen, "error": error}]
            reason = f"calibrated for a skip share of {proposal.share:.0%}"
            decision.method, decision.options, decision.reason = "ffn_skip", chosen, reason
            decision.refusals, decision.measured = [], measured
    plan.provenance = provenance_of(model, measured=True)
    return plan


def plot(table: Tensor, proposal: Proposal, path: str | Path) -> None:
    """Similarity over blocks: mean, the middle 80 % of the tokens, the threshold, and the cold regions.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a window system for the whole process
    except ImportError:
        raise UnsupportedError("a plot needs matplotlib", hint='pip install "sparsify-compiler[plot]"') from None

    blocks = range(len(table))
    low, high = table.quantile(torch.tensor([0.1, 0.9]), dim=1)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(blocks, low, high, alpha=0.25, label="80 % of the tokens")
    axis.plot(blocks, table.mean(1), marker="o", markersize=3, label="mean")
    axis.axhline(proposal.threshold, linestyle="--", color="black", linewidth=1, label=f"threshold {proposal.threshold:.4f}")
    for begin, end in ((-0.5, proposal.cold_first - 0.5), (len(table) - proposal.cold_last - 0.5, len(table) - 0.5)):
        axis.axvspan(begin, end, color="#9db8d2", alpha=0.3)
    axis.set_xlabel("feed-forward block (shaded: cold)")
    axis.set_ylabel("cosine before and after")
    axis.legend()
    figure.savefig(path, dpi=120)

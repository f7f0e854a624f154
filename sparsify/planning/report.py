"""Decisions as a table for people."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from sparsify.matching.base import PlanKind
from sparsify.planning.decision import Decision, labels

LETTERS = "B batch, H and G query and KV heads, Q and N query and key length"  # of cost formulas


def table(decisions: Sequence[Decision], device: str, capture: str = "", width: int = 180) -> str:
    """One row per site; equal neighbours are folded (`layers 4-27`). device: whose costs they are. capture: as in a plan."""
    grid = Table(title=_title(decisions) + (f" ({capture})" if capture else ""), title_justify="left")
    columns: tuple[tuple[str, Literal["left", "right"]], ...]
    columns = (("site", "left"), ("sizes B·Hq/Hkv·Q×K·D", "left"), ("mask", "left"), ("decision", "left"), ("reason", "left"),
               ("dense", "right"), ("chosen", "right"), ("density", "right"))  # fmt: skip
    for name, justify in columns:
        grid.add_column(name, justify=justify, overflow="fold")
    names = dict(zip(map(id, decisions), labels(decisions), strict=True))
    for group in _folded(decisions):
        grid.add_row(*_row(group, names[id(group[0])], names[id(group[-1])]))
    text = io.StringIO()
    console = Console(file=text, width=width)
    console.print(grid)
    for line in _formulas(decisions, device):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return text.getvalue().rstrip()


def _title(decisions: Sequence[Decision]) -> str:
    counts: list[str] = []
    for kind, words in SITES.items():
        of_kind = [d for d in decisions if d.kind == kind]
        if of_kind or kind == "attention":
            counts.append(f"{sum(d.method is not None for d in of_kind)} of {len(of_kind)} {words} rewritten")
    known = [(d, d.dense_seconds) for d in decisions if d.dense_seconds is not None]
    if known:
        chosen = sum(dense if d.method is None or d.seconds is None else d.seconds for d, dense in known)
        counts.append(f"{time_text(sum(dense for _, dense in known))} expected dense, {time_text(chosen)} as chosen")
    return ", ".join(counts)


def _formulas(decisions: Sequence[Decision], device: str) -> list[str]:
    """Formula and number of every distinct cost, and whose numbers they are."""
    lines: dict[str, None] = {}
    for d in decisions:
        for name, formula, seconds in (("dense", d.dense_formula, d.dense_seconds), (d.method, d.formula, d.seconds)):
            if formula:
                lines[f"  {name}, {d.phase} {d.sizes['query_len']}×{d.sizes['key_len']}: {time_text(seconds) or '?'} = {formula}"] = None
    return [f"costs on {device}; {LETTERS}; seconds:", *lines] if lines else []


def _folded(decisions: Sequence[Decision]) -> list[list[Decision]]:
    groups: list[list[Decision]] = []
    for d in decisions:
        key = (d.sizes, d.mask, d.method, d.options, d.reason, d.phase, d.refusals)
        last = groups[-1][-1] if groups else None
        if last and key == (last.sizes, last.mask, last.method, last.options, last.reason, last.phase, last.refusals):
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups


def _row(group: list[Decision], label: str, last_label: str) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    until = last_label if last.layer is None or last.layer == first.layer else last.layer
    name = label if len(group) == 1 else f"{label} … {until} ({len(group)})"
    sizes = f"{sizes_text(first)} {first.phase}"
    reason = first.reason
    others = [r for r in first.refusals if r != first.reason]
    if others:
        reason += "\n" + "\n".join(others)
    densities = [d.realised_density for d in group if d.realised_density is not None]
    if densities:
        density = f"{sum(densities) / len(densities):.1%}"
    else:
        density = "" if first.density is None else f"≈{first.density:.0%}"
    return name, sizes, first.mask, first.method or "left as is", reason, time_text(first.dense_seconds), time_text(first.seconds), density


def _attention_sizes(s: Mapping[str, str]) -> str:
    dims = s["qk_head_dim"] if s["qk_head_dim"] == s["v_head_dim"] else f"{s['qk_head_dim']}/{s['v_head_dim']}"
    return f"{s['batch']}·{s['query_heads']}/{s['kv_heads']}·{s['query_len']}×{s['key_len']}·{dims}"


def _feed_forward_sizes(s: Mapping[str, str]) -> str:
    return f"{s['rows']} rows·{s['hidden']}→{s['intermediate']}"


def _stream_sizes(s: Mapping[str, str]) -> str:
    return f"{s['batch']}·{s['tokens']}→{s['kept']} tokens, {s['layers']} layers"


def _batch_sizes(s: Mapping[str, str]) -> str:
    return f"{s['batch']}·{s['columns']}→{s['rows']}·{s['length']} tokens, {s['layers']} layers"


def _token_sizes(s: Mapping[str, str]) -> str:
    return f"{s['batch']}·1×{s['keys']}, {s['layers']} layers, {s['bypassed']} bypassed"


def sizes_text(decision: Decision) -> str:
    """The numbers that a site's cost depends on, in one word."""
    return _SIZES[decision.kind](decision.sizes)


_SIZES: dict[PlanKind, Callable[[Mapping[str, str]], str]] = {
    "attention": _attention_sizes,
    "ffn": _feed_forward_sizes,
    "stream": _stream_sizes,
    "batch": _batch_sizes,
    "token": _token_sizes,
}
# what sites of each kind are called together
SITES: dict[PlanKind, str] = {
    "attention": "attention sites",
    "ffn": "feed-forward blocks",
    "stream": "residual streams",
    "batch": "padded batches",
    "token": "generated tokens",
}


def time_text(seconds: float | None) -> str:
    """Seconds as people read them; empty where they are unknown."""
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds * 1e6:.0f} µs"

"""A forecast as a table, as a picture, and as plain data."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsify.commands.cost.records import DECODE, PREFILL, Forecast, Row, Side
from sparsify.errors import UnsupportedError

_COLUMNS = (
    *("length", "prefill\ndense", "\nchosen", "\ngain", "ms/token\ndense", "\nchosen"),
    *("weights\nGB", "KV\nGB", "scratch\nGB", "peak\nGB", "choice in prefill", "choice in decode", "density"),
)


def table(forecast: Forecast, width: int | None = 160, why: bool = False) -> str:
    """One row per length, then the crossovers and what the numbers rest on. why: also each group of layers with its reasons."""
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, markup=False)
    console.print(_title(forecast))
    grid = Table()
    for name in _COLUMNS:
        grid.add_column(name, justify="left" if name.startswith("choice") else "right", overflow="fold")
    for row in forecast.rows:
        grid.add_row(*_cells(row))
    console.print(grid)
    for line in [*_crossovers(forecast), *(_reasons(forecast) if why else ()), *_notes(forecast)]:
        console.print(line, soft_wrap=True)
    return text.getvalue().rstrip()


def _title(forecast: Forecast) -> str:
    batch = f", batch {forecast.batch}" if forecast.batch > 1 else ""
    cache = f", {forecast.cache}" if forecast.cache else ""
    device = forecast.device + ("" if forecast.measured else " (estimate)")
    return f"{forecast.model}: {forecast.parameters / 1e9:.2f} B parameters in {forecast.dtype}{batch}{cache}, on {device}"


def _cells(row: Row) -> tuple[str, ...]:
    dense, chosen = row.dense, row.chosen
    memory = [f"{size / 1e9:.3g}" for size in (chosen.memory.weights, chosen.memory.cache, chosen.memory.scratch, chosen.memory.peak)]
    densities = {f"≈{group.density:.1%}" for group in chosen.groups if group.density is not None and group.phase == PREFILL}
    return (
        length_words(row.length),
        time_words(dense.prefill.total),
        time_words(chosen.prefill.total),
        f"{dense.prefill.total / chosen.prefill.total:.2f}×",
        f"{dense.decode.total * 1e3:.2f}",
        f"{chosen.decode.total * 1e3:.2f}",
        *memory,
        choices(chosen, PREFILL),
        choices(chosen, DECODE),
        ", ".join(sorted(densities)),
    )


def choices(side: Side, phase: str) -> str:
    """The choices of a phase; with the number of layers where they differ."""
    counts: dict[tuple[bool, str, str], int] = {}
    for group in side.groups:
        if group.phase == phase:
            key = (group.what == "ffn", group.choice, group.sees)
            counts[key] = counts.get(key, 0) + len(group.layers)
    attention = {key: count for key, count in counts.items() if not key[0]}
    if len(attention) == 1:
        words = [choice for _, choice, _ in attention]
    else:
        words = [f"{choice} ×{count}" + (f" ({sees})" if sees else "") for (_, choice, sees), count in attention.items()]
    if not words and phase == PREFILL:
        words = ["the cache's policy"]
    return "\n".join([*words, *(f"{choice} ×{count}" for (ffn, choice, _), count in counts.items() if ffn and choice != "as it is")])


def _crossovers(forecast: Forecast) -> list[str]:
    lines = []
    for one in forecast.crossovers:
        where = f"layers {layers_words(one.layers)}" + (f" ({one.sees})" if one.sees else "")
        lines.append(f"{one.phase}, {where}: from {one.length} tokens on {one.after} instead of {one.before}")
    return lines or ["no crossover: the choice is the same at every length"]


def _reasons(forecast: Forecast) -> list[str]:
    last = forecast.rows[-1]
    lines = [f"at {last.length} tokens:"]
    for group in last.chosen.groups:
        lines.append(f"  {group.phase}, {group.what} of layers {layers_words(group.layers)}: {group.choice}; {group.reason}")
        lines += [f"    {refusal}" for refusal in group.refusals if refusal != group.reason]
    return lines


def _notes(forecast: Forecast) -> list[str]:
    kind = "measured" if forecast.measured else "estimates, `sparsify calibrate device` measures them"
    source = f" ({forecast.source})" if forecast.source else ""
    lines = [f"the device's numbers are {kind}{source}; times and memory are predictions, and nothing was run"]
    if any(group.density is not None for row in forecast.rows for group in row.chosen.groups):
        lines.append("density is what published prompts keep on average (arXiv 2503.16428), or what was asked for; yours may differ")
    return [*lines, *_eviction(forecast.rows[-1]), *forecast.notes]


def _eviction(row: Row) -> list[str]:
    """From which generated token on a cache with a budget has paid for choosing what to keep."""
    paid, saved = row.chosen.prefill.cache, row.dense.decode.total - row.chosen.decode.total
    if not paid:
        return []
    what = f"after a prompt of {length_words(row.length)} tokens choosing what to keep takes {time_words(paid)}"
    if saved <= 0:
        return [f"{what} and saves no time"]
    return [f"{what} and saves {time_words(saved)} a token: it pays from token {math.ceil(paid / saved)} on"]


def length_words(length: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def layers_words(layers: tuple[int, ...]) -> str:
    """`0-4, 6-10, 12`."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def time_words(seconds: float) -> str:
    for unit, scale in (("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= (180 if unit == "min" else scale):
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def data(forecast: Forecast) -> dict[str, Any]:
    """Everything, with totals, in JSON's types."""
    found = dataclasses.asdict(forecast)
    for row, plain in zip(forecast.rows, found["rows"], strict=True):
        for name in ("dense", "chosen"):
            side: Side = getattr(row, name)
            plain[name]["prefill"]["total"], plain[name]["decode"]["total"] = side.prefill.total, side.decode.total
            plain[name]["memory"]["peak"] = side.memory.peak
    return found


def plot(forecast: Forecast, path: str | Path) -> None:
    """Prefill, decode and memory over length; crossovers as dotted lines.

    Raises:
        UnsupportedError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a window system for the whole process
    except ImportError:
        raise UnsupportedError("a plot needs matplotlib", hint='pip install "sparsify-compiler[plot]"') from None
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    lengths = [row.length for row in forecast.rows]
    for axis, phase, scale, unit in ((axes[0], PREFILL, 1.0, "s"), (axes[1], DECODE, 1e3, "ms per token")):
        for name, style in (("dense", "o--"), ("chosen", "o-")):
            values = [getattr(getattr(row, name), phase).total * scale for row in forecast.rows]
            axis.plot(lengths, values, style, markersize=4, label=name, color="#888888" if name == "dense" else "#1f6fb4")
        axis.set_ylabel(f"{phase}, {unit}")
        axis.set_yscale("log" if phase == PREFILL else "linear")
        axis.set_ylim(bottom=0 if phase == DECODE else None)
        inside = [one for one in forecast.crossovers if one.phase == phase and lengths[0] <= one.length <= lengths[-1]]
        for place, one in enumerate(inside):
            axis.axvline(one.length, linestyle=":", linewidth=1, color="black")
            where = (one.length, 0.02 + 0.12 * (place % 3))
            axis.annotate(f" {one.after}\n from {one.length}", where, xycoords=("data", "axes fraction"), fontsize=7)
    memory = [row.chosen.memory for row in forecast.rows]
    parts = {name: [getattr(one, name) / 1e9 for one in memory] for name in ("weights", "cache", "scratch")}
    axes[2].stackplot(lengths, *parts.values(), labels=["weights", "KV cache", "scratch"], colors=["#c7d7e8", "#7fb0d8", "#e8c39a"])
    axes[2].plot(lengths, [row.dense.memory.peak / 1e9 for row in forecast.rows], "--", color="#888888", label="peak, dense")
    axes[2].set_ylabel("memory in prefill, GB")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [length_words(length) for length in lengths], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("prompt length, tokens")
        axis.legend(fontsize=8, loc="upper left")
    figure.suptitle(_title(forecast), fontsize=9)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"cannot write the plot: {getattr(error, 'strerror', None) or error}", where=str(path)) from None

"""What was found, as a table, as JSON, and as heat maps of needles over depth and length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsify.commands.eval.cells import Cell, Difference, differences, worst
from sparsify.commands.eval.intervals import wilson
from sparsify.commands.eval.settings import DENSE
from sparsify.errors import UnsupportedError

BINS = 10  # of depth
FORMAT = 1


def size(length: int | None) -> str:
    """8192 as 8K."""
    return "–" if length is None else f"{length >> 10}K" if length % 1024 == 0 else str(length)


def _interval(bounds: Sequence[float], form: str) -> str:
    return "[" + ", ".join(format(bound, form) for bound in bounds) + "]"


def _difference(one: Difference | None) -> tuple[str, str]:
    if one is None:
        return "", ""
    form = "+.4f" if one.cell.metric == "nll" else "+.3f"
    mean = -one.mean if one.cell.metric == "nll" else one.mean  # a loss in nats reads better upwards
    bounds = sorted((-one.interval[0], -one.interval[1])) if one.cell.metric == "nll" else one.interval
    return f"{mean:{form}} {_interval(bounds, form)}" + (" *" if one.sure else ""), f"{one.lost} / {one.gained}"


def _row(cell: Cell, one: Difference | None) -> list[str]:
    name = cell.task + ("" if cell.metric in ("score", "nll") else f" ({cell.metric})")
    if not cell.scores:
        return [name, size(cell.length), cell.setting, cell.error or "no scores", "", "", "", ""]
    form = ".4f" if cell.metric == "nll" else ".3f"
    density = "" if cell.density is None else f"{cell.density:.1%}"
    seconds = "" if cell.seconds is None else f"{cell.seconds:.0f}"
    value = f"{cell.mean:{form}} {_interval(cell.interval, form)}"
    return [name, size(cell.length), cell.setting, value, *_difference(one), density, seconds]


def table(cells: Sequence[Cell], width: int | None = None) -> str:
    """One row a task, length and setting, dense attention first, and what each setting loses most."""
    against = {(one.cell.setting, one.cell.place): one for one in differences(cells, DENSE)}
    grid = Table(caption_justify="left")
    for heading in ("task", "length", "setting", "score [95 %]", "against dense [95 %]", "worse / better", "density", "s"):
        grid.add_column(heading, overflow="fold", justify="right" if heading in ("length", "density", "s") else "left")
    places = list(dict.fromkeys(cell.place for cell in cells))
    for place in places:
        rows = [cell for cell in cells if cell.place == place]
        for cell in sorted(rows, key=lambda cell: cell.setting != DENSE):
            grid.add_row(*_row(cell, against.get((cell.setting, cell.place))), end_section=cell is rows[-1])
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(grid)
    return captured.get() + "\n".join(conclusions(cells))


def conclusions(cells: Sequence[Cell]) -> list[str]:
    """A line for each setting: its worst task, and where nothing was left out."""
    found = differences(cells, DENSE)
    lines = []
    for setting, one in worst(found).items():
        sure = "the interval leaves 0 out" if one.sure else "the interval holds 0"
        changed, _ = _difference(one)
        lines.append(
            f"worst of {setting}: {one.cell.task} at {size(one.cell.length)}: {changed.removesuffix(' *')} "
            f"against dense's {one.dense.mean:.3f}, "
            f"{one.lost} of {len(one.cell.scores)} worse, {one.gained} better; {sure}"
        )
    for setting in dict.fromkeys(cell.setting for cell in cells):
        mine = [cell for cell in cells if cell.setting == setting and cell.scores]
        stayed = sorted({cell.length for cell in mine if cell.density is None and cell.length is not None})
        if stayed and setting != DENSE and "question" not in setting and setting != "eager":
            lines.append(
                f"{setting}: no blocks were selected at {', '.join(map(size, stayed))}: attention stayed dense there, or needs no lists"
            )
    return lines


def data(cells: Sequence[Cell], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON takes it: facts, the cells with the scores of all questions, differences and worst tasks."""
    found = differences(cells, DENSE)
    against = {(one.cell.setting, one.cell.place): one.data() for one in found}
    listed = [cell.data() | {"against_dense": against.get((cell.setting, cell.place))} for cell in cells]
    lost = {
        setting: {"task": one.cell.task, "length": one.cell.length, "metric": one.cell.metric, **one.data()}
        for setting, one in worst(found).items()
    }
    return {"format": FORMAT, **facts, "worst": lost, "cells": listed}


def by_depth(cells: Iterable[Cell]) -> dict[tuple[str, str], dict[int, list[tuple[float, int]]]]:
    """For each task and setting with needles, for each length, (mean score, questions) by depth from the prompt's start."""
    found: dict[tuple[str, str], dict[int, list[tuple[float, int]]]] = {}
    for cell in cells:
        if not cell.depths or cell.length is None:
            continue
        bins: list[list[float]] = [[] for _ in range(BINS)]
        for score, depth in zip(cell.scores, cell.depths, strict=True):
            bins[min(BINS - 1, int(depth * BINS))].append(score)
        means = [(sum(bin_) / len(bin_) if bin_ else float("nan"), len(bin_)) for bin_ in bins]
        found.setdefault((cell.task, cell.setting), {})[cell.length] = means
    return found


def plot(cells: Sequence[Cell], path: str) -> None:
    """Draws scores over depth and length: a row a task, a column a setting.

    Raises:
        UnsupportedError: no task has needles, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("matplotlib is not installed", hint='pip install "sparsify-compiler[eval]"') from None
    found = by_depth(cells)
    if not found:
        raise UnsupportedError("no task says where its needles stand", where="--plot", hint="niah_single_1 and needles do")
    tasks, settings = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    figure = Figure(figsize=(1.6 + 2.4 * len(settings), 0.9 + 2.1 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(settings), squeeze=False)
    image: Any = None
    for row, task in enumerate(tasks):
        for column, setting in enumerate(settings):
            axis, panel = axes[row][column], found.get((task, setting))
            axis.set_axis_off() if panel is None else axis.set_title(f"{task}\n{setting}", fontsize=8)
            if panel is None:
                continue
            lengths = sorted(panel)
            grid = [[panel[length][depth][0] for length in lengths] for depth in range(BINS)]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_xticks(range(len(lengths)), [size(length) for length in lengths], fontsize=7)
            axis.set_yticks([0, BINS - 1], ["start", "end"], fontsize=7)
            for x, length in enumerate(lengths):
                for y, (mean, count) in enumerate(panel[length]):
                    if count and mean < 1:
                        low, high = wilson(min(mean * count, count), count)
                        shade = "white" if mean < 0.6 else "black"
                        axis.text(x, y, f"{mean:.2f}\n±{(high - low) / 2:.2f}", ha="center", va="center", fontsize=5, color=shade)
    figure.colorbar(image, ax=axes, label="score", shrink=0.6)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"cannot draw: {error}", where=path) from None

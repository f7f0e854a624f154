"""Draws the feed-forward records: milliseconds a token over the share of skipped blocks, and NLL and answers over it.

python -m benchmarks.ffn_plot --out FOLDER    # `python -m benchmarks.tables` draws them beside the records
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.cells import Record, latest

_COLOURS = {"similarity": "#14406b", "random": "#c0722a", "layers": "#7a9a4f"}


def time_plot(found: list[Record], path: Path) -> bool:
    """The whole model and the stack of blocks; dotted, what is left when skipped weights cost nothing at the rate they are read at.

    That rate is the stack's own with nothing skipped. Of a whole model only the blocks' bytes count, at copy bandwidth.
    """
    from matplotlib import pyplot

    runs = latest([r for r in found if r["benchmark"] in ("ffn-model", "ffn-stack")], "benchmark", "variant", "rows", "share", "pattern")
    panels = [("whole model, 1 row", "ffn-model", 1)] + [
        (f"32 blocks, {rows} row{'s' * (rows > 1)}", "ffn-stack", rows) for rows in (1, 8, 32)
    ]
    panels = [p for p in panels if any((r["benchmark"], r["rows"]) == p[1:] for r in runs)]
    if not panels:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (title, benchmark, rows) in zip(axes[0], panels, strict=True):
        _time_panel(axis, [r for r in runs if (r["benchmark"], r["rows"]) == (benchmark, rows)])
        axis.set(title=title, xlabel="share of blocks skipped")
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    axes[0][0].set_ylabel("ms a token")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _time_panel(axis: Any, mine: list[Record]) -> None:
    for variant, pattern in sorted({(r["variant"], r["pattern"]) for r in mine}):
        line = sorted((r["share"], r["ms"]) for r in mine if (r["variant"], r["pattern"]) == (variant, pattern))
        if variant == "inductor":
            axis.axhline(line[0][1], color="#888888", linewidth=1, label="Inductor, nothing skipped")
            continue
        axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"sparsify, {pattern}")
        if line[0][0] == 0 and line[-1][0] > 0:
            one = mine[0]
            saved = line[0][1] if one["benchmark"] == "ffn-stack" else 1e3 * one["bytes"] / one["bandwidth"]
            ends = [line[0][1], line[0][1] - saved * line[-1][0]]
            axis.plot([0, line[-1][0]], ends, linestyle=":", color="black", linewidth=1, label="skipped weights cost nothing")


def quality_plot(found: list[Record], path: Path) -> bool:
    from matplotlib import pyplot

    runs = latest(
        [r for r in found if r["benchmark"] == "ffn-quality"], "policy", "threshold", "skip", "probability", "layers", "seed", "length"
    )
    if not runs:
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for policy, colour in _COLOURS.items():
        mine = [r for r in runs if r["policy"] == policy]
        axes[0].scatter([r["share"] for r in mine], [r["nll"] for r in mine], s=14, color=colour, label=policy)
        axes[1].scatter([r["share"] for r in mine], [r["right"] / r["asked"] for r in mine], s=14, color=colour, label=policy)
    for dense in (r for r in runs if r["policy"] == "dense"):
        axes[0].axhline(dense["nll"], color="black", linewidth=0.8)
        axes[1].axhline(dense["right"] / dense["asked"], color="black", linewidth=0.8)
    axes[0].set_ylabel("NLL, nats a byte")
    axes[1].set_ylabel("answers right")
    for axis in axes:
        axis.set_xlabel("share of blocks skipped (line: dense)")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def plot(found: list[Record], folder: Path) -> list[Path]:
    """Draws what there are records of, and returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [folder / name for draw, name in ((time_plot, "ffn-time.png"), (quality_plot, "ffn-quality.png")) if draw(found, folder / name)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=records.RESULTS / "ffn.jsonl")
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    for path in plot(list(records.read([options.results])), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

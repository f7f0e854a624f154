"""Draws the feed-forward records: milliseconds a token over the share of skipped blocks, and NLL and answers over it.

python -m benchmarks.ffn.plot --out FOLDER    # `python -m benchmarks.report.tables` draws them beside the records
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.lib import records
from benchmarks.lib.tables import QUALITY_KEYS, Record, latest

_COLOURS = {
    "similarity": ("#14406b", "similarity"),
    "random": ("#c0722a", "at random"),
    "layers": ("#7a9a4f", "the same blocks for all"),
    "whole_layers": ("#8a4f7a", "whole layers"),
}


def time_plot(found: list[Record], path: Path) -> bool:
    """The whole model and the stack of blocks; dotted, what is left when skipped weights cost nothing at the rate they are read at.

    That rate is the stack's own with nothing skipped. Of a whole model only the blocks' bytes count, at the run's bandwidth.
    """
    from matplotlib import pyplot

    runs = latest([r for r in found if r["benchmark"] in ("ffn-model", "ffn-stack")], "benchmark", "variant", "rows", "share", "pattern")
    kinds = [("whole model", "ffn-model"), ("blocks alone", "ffn-stack")]
    kinds = [kind for kind in kinds if any(r["benchmark"] == kind[1] for r in runs)]
    batches = sorted({r["rows"] for r in runs})
    if not kinds:
        return False
    size = (4.2 * len(batches), 3.6 * len(kinds))
    figure, axes = pyplot.subplots(len(kinds), len(batches), figsize=size, squeeze=False, layout="constrained")
    panels = [(f"{what}, {rows} row{'s' * (rows > 1)}", benchmark, rows) for what, benchmark in kinds for rows in batches]
    for axis, (title, benchmark, rows) in zip(axes.flat, panels, strict=True):
        _time_panel(axis, [r for r in runs if (r["benchmark"], r["rows"]) == (benchmark, rows)])
        axis.set(title=title, xlabel="share of blocks skipped")
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    for row in axes:
        row[0].set_ylabel("ms a token")
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
            label = "skipped blocks cost nothing" if one["benchmark"] == "ffn-stack" else "skipped bytes at the bandwidth"
            ends = [line[0][1], line[0][1] - saved * line[-1][0]]
            axis.plot([0, line[-1][0]], ends, linestyle=":", color="black", linewidth=1, label=label)


def quality_plot(found: list[Record], path: Path) -> bool:
    """A row of panels for each model: NLL and answers over the share that was skipped."""
    from matplotlib import pyplot

    runs = latest([r for r in found if r["benchmark"] == "ffn-quality"], "model_sha256", *QUALITY_KEYS)
    models = list(dict.fromkeys((r["model_sha256"], r["model"]) for r in runs))
    if not runs:
        return False
    figure, axes = pyplot.subplots(len(models), 2, figsize=(8, 3.4 * len(models)), squeeze=False, layout="constrained")
    for (digest, name), pair in zip(models, axes, strict=True):
        _quality_panels(pair, [r for r in runs if r["model_sha256"] == digest])
        pair[0].set_title(name)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _quality_panels(pair: Any, runs: list[Record]) -> None:
    for policy, (colour, label) in _COLOURS.items():
        for rows, marker in (("generated", "o"), ("all", "x")):
            mine = [r for r in runs if r["policy"] == policy and (r.get("rows") or "generated") == rows]
            if not mine:
                continue
            style = {"s": 14, "color": colour, "marker": marker, "label": label + (", prompt too" if rows == "all" else "")}
            pair[0].scatter([r["share"] for r in mine], [r["nll"] for r in mine], **style)
            pair[1].scatter([r["share"] for r in mine], [r["right"] / r["asked"] for r in mine], **style)
    dense = [r for r in runs if r["policy"] == "dense"]
    for record in dense:
        pair[0].axhline(record["nll"], color="black", linewidth=0.8)
        pair[1].axhline(record["right"] / record["asked"], color="black", linewidth=0.8)
    if dense:  # what leaves no language is off the scale
        low = min(r["nll"] for r in runs)
        pair[0].set_ylim(low - 0.1, min(max(r["nll"] for r in runs), dense[0]["nll"] + 3) + 0.1)
    pair[0].set_ylabel("NLL, nats a byte")
    pair[1].set_ylabel("answers right")
    for axis in pair:
        axis.set_xlabel("share of blocks skipped (line: dense)")
    pair[1].legend(fontsize=7)


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

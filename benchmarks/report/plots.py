"""Plots of answers, prefill and attention kernels. `benchmarks.report.tables` draws them beside the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.lib.tables import PEERS, Record, latest, size


def plot(found: list[Record], folder: Path) -> list[Path]:
    """Draws what there are records of, and returns the files. Of several devices the one with the newest record is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, draw in (("answers", _answers), ("prefill", _prefill), ("kernels", _kernels)):
        figure = draw(pyplot, newest_device([record for record in found if record["benchmark"] == name]))
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=120)
            pyplot.close(figure)
    return made


def newest_device(found: list[Record]) -> list[Record]:
    """The records of the device that the newest one is of."""
    device = max(found, key=lambda record: record["time"])["machine"]["gpu"] if found else None
    return [record for record in found if record["machine"]["gpu"] == device]


def _answers(pyplot: Any, found: list[Record]) -> Any:
    """Needles right over density, one panel a length, with what eager answers as a line."""
    answers = [r for r in latest(found, "model_sha256", "method", "parameters", "length") if "right" in r]
    if not answers:
        return None
    lengths = sorted({record["length"] for record in answers})
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(4.6 * len(lengths), 4), squeeze=False, sharey=True, layout="constrained")
    for axis, length in zip(axes[0], lengths, strict=True):
        _answer_curves(axis, [record for record in answers if record["length"] == length])
        axis.set(title=f"{size(length)} bytes", xlabel="density", xscale="log")
        ticks = (0.03, 0.05, 0.1, 0.2, 0.4, 1)
        axis.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axis.minorticks_off()
        axis.set(xlim=(0.03, 1.1), ylim=(0, 1.03))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("needles right")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


def _answer_curves(axis: Any, found: list[Record]) -> None:
    for record in found:
        if record["method"] == "eager":
            axis.axhline(record["right"] / record["asked"], color="black", linewidth=0.8, label="eager")
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in found:
        parameters = record["parameters"]
        name = f"{parameters['pool']}, stride {parameters['stride']}" if record["method"] == "xattention" else record["method"]
        if name not in ("eager", "dense"):
            curves.setdefault(name, []).append((record["density"], record["right"] / record["asked"]))
    for name in sorted(curves):
        style = {"linestyle": "--", "color": "grey"} if name == "sink_window" else {}
        axis.plot(*zip(*sorted(curves[name]), strict=True), marker="o", markersize=4, label=name, **style)


def _prefill(pyplot: Any, found: list[Record]) -> Any:
    """Milliseconds over length, and speed against eager where that was measured."""
    runs = [r for r in latest(found, "shape", "layers", "variant", "length", "requested_density") if "ms" in r]
    if not runs:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    eager = {record["length"]: record["ms"] for record in runs if record["variant"] == "eager"}
    order = ("eager", "inductor", "default", "dense", "xattention")
    for variant, density in sorted({(r["variant"], r["requested_density"] or 0) for r in runs}, key=lambda v: (order.index(v[0]), v[1])):
        chosen = (r for r in runs if (r["variant"], r["requested_density"] or 0) == (variant, density))
        points = sorted((r["length"], r["ms"]) for r in chosen)
        label = {"inductor": "Inductor", "dense": "sparsify, dense", "default": "sparsify, no options"}.get(variant, variant) + (
            f", density {density:g}" if density else ""
        )
        axes[0].plot(*zip(*points, strict=True), marker="o", label=label)
        ratios = [(length, eager[length] / ms) for length, ms in points if length in eager]
        if ratios:
            axes[1].plot(*zip(*ratios, strict=True), marker="o", label=label)
    lengths = sorted({record["length"] for record in runs})
    for axis, label in zip(axes, ("prefill, ms", "× eager"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [size(length) for length in lengths])
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return figure


def _kernels(pyplot: Any, found: list[Record]) -> Any:
    """TFLOP/s over visited blocks of each timed case, sparsify beside its peers; a case without a peer shows sparsify alone."""
    cells = [r for r in latest(found, "section", "case") if r["section"] in ("table", "short", "dims") and "ours_tflops" in r]
    if not cells:
        return None
    names = [name for name in ("ours", "fa4", "cudnn", "flex") if any(f"{name}_tflops" in r for r in cells)]
    figure, axis = pyplot.subplots(figsize=(max(6, 1.35 * len(cells)), 4.2), layout="constrained")
    width = 0.8 / len(names)
    shown = [[name for name in names if f"{name}_tflops" in record] for record in cells]
    for name in names:
        at = [(row, row + (mine.index(name) - (len(mine) - 1) / 2) * width) for row, mine in enumerate(shown) if name in mine]
        bars = [(place, cells[row][f"{name}_tflops"]) for row, place in at]
        drawn = axis.bar(*zip(*bars, strict=True), width=width, label=PEERS[name])
        axis.bar_label(drawn, fontsize=8)
    for row, mine in enumerate(shown):
        if mine == ["ours"]:
            axis.text(row, 30, "no peer ran", ha="center", fontsize=7, color="white", rotation=90)
    axis.set_xticks(range(len(cells)), [_title(record) for record in cells], fontsize=8)
    axis.set_ylabel("TFLOP/s over visited blocks")
    axis.set_ylim(0, 1.2 * axis.dataLim.y1)
    axis.legend(fontsize=8, ncols=len(names), loc="upper right")
    return figure


def _title(record: Record) -> str:
    if record["case"].startswith("sink_window"):
        return f"sinks + window {record['case'].rpartition('_')[2]}\n(peers: dense)"
    words = record["case"].split("_")
    if "density" in record:  # the exact one instead of the one asked for
        words = [word for word in words if not word.startswith(".")] + [f"{record['density']:.1%}"]
    return words[0] + "\n" + " ".join(words[1:])

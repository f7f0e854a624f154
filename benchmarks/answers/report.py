"""Needles answered by method: table, plot, and what other texts quote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.answers import Answers, code_report, tasks_report, tokens_report
from benchmarks.lib.needles import wilson
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, Row, conditions, failure, groups, kind, latest, markdown, measured, newest_device, size
from sparsify.ops.estimate import label, parse_label
from sparsify.passes.xattention import XAttention

_METHOD = XAttention()
DEFAULT = {
    "pool": label(_METHOD.pool, _METHOD.variants, _METHOD.refine_stride or 0, _METHOD.coarse_threshold, _METHOD.min_share),
    "stride": _METHOD.stride,
    "threshold": _METHOD.threshold,
}
FEW_LOST = 0.01  # answers that an estimate may lose and still be said to keep them
Estimate = tuple[str, int]  # pool and stride
_CURVES = ("model_sha256", "method", "parameters", "length")


def _method(record: Found) -> str:
    parameters = record.get("parameters") or {}
    if record["method"] == "xattention":
        return f"xattention, {parameters['pool']}, stride {parameters['stride']}, τ {parameters['threshold']:g}"
    if record["method"] == "sink_window":
        return f"sink_window, {parameters['sinks']} + {parameters['window']} tokens"
    if record["method"] == "minference":
        return f"minference, {parameters['columns']} + {parameters['diagonals']} tokens"
    if record["method"] == "plan":
        return f"calibrated, {parameters['plan']}"
    return {"eager": "eager", "dense": "sparsify, dense"}[record["method"]]


def _rank(record: Found) -> tuple[Any, ...]:
    parameters = record.get("parameters") or {}
    order = ["eager", "dense", "plan", "xattention", "minference", "sink_window"].index(record["method"])
    numbers = (parameters.get(name, 0) for name in ("stride", "threshold", "columns", "diagonals", "window"))
    return order, parameters.get("pool", ""), *numbers


def table(found: Iterable[Found]) -> str:
    """Share of needles right, its 95 % interval, density and NLL: one row a method, one column a length, one table a model and device."""
    cells = latest(found, Answers)
    parts = []
    for group in groups(
        cells,
        lambda r: (
            *(r[key] for key in ("model", "model_sha256", "text_sha256", "needles", "dtype")),
            r.get("form") or "",
            r["machine"]["gpu"] or "CPU",
        ),
    ):
        lengths = sorted({record["length"] for record in group})
        methods = {_method(record): _rank(record) for record in group}
        rows = []
        for method in sorted(methods, key=methods.__getitem__):
            by_length = {record["length"]: record for record in group if _method(record) == method}
            rows.append([method, *(_answer_cell(by_length.get(length)) for length in lengths)])
        first = group[0]
        asked = sorted({record["asked"] for record in group if "asked" in record})
        needles = f"{first['needles']} needles a prompt" + (f", written as `{first['form']}`" if first.get("form") else "")
        head = (
            f"### {first['model']} ({first['dtype']}): {needles}, {'/'.join(map(str, asked))} asked a cell\n\n"
            "Share right [95 % Wilson interval] · density over causal blocks (sink_window: tokens) · NLL in nats a byte. "
            f"{conditions(group)} "
            f"Model `{first['model_sha256'][:12]}`, text `{first['text_sha256'][:12]}`."
        )
        parts.append(head + "\n\n" + markdown(["method", *(f"{size(length)} bytes" for length in lengths)], rows))
    return "\n\n".join(parts)


def _answer_cell(record: Found | None) -> str:
    if record is None:
        return "–"
    if "error" in record:
        return failure(record["error"])
    low, high = wilson(record["right"], record["asked"])
    return f"{record['right'] / record['asked']:.3f} [{low:.2f}, {high:.2f}] · {record['density']:.1%} · {record['nll']:.3f}"


def plot(found: list[Found]) -> Any:
    """Needles right over density, one panel a length, with what eager answers as a line."""
    from matplotlib import pyplot

    answers = [r for r in latest(_as_trained(newest_device(kind(found, Answers))), Answers, *_CURVES) if "right" in r]
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


def _as_trained(found: Iterable[Found]) -> list[Found]:
    """Without questions of another form than the model was trained on, and other kinds' records."""
    return [record for record in kind(found, Answers) if not record.get("form")]


def _answer_curves(axis: Any, found: list[Found]) -> None:
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


def lost(found: list[Found]) -> dict[Estimate, float]:
    """For each estimate that was asked the exact one's longest prompts of its stride: the share of answers that it loses to it."""
    cells = [r for r in measured(_as_trained(found), Answers, *_CURVES, "seeds") if r["method"] == "xattention"]
    right: dict[Estimate, dict[tuple, Found]] = {}
    for record in (r for r in cells if "right" in r):
        cell = (record["model_sha256"], record["length"], record["parameters"]["threshold"], *record["seeds"])
        right.setdefault((record["parameters"]["pool"], record["parameters"]["stride"]), {})[cell] = record
    shares = {}
    for (pool, stride), mine in right.items():
        exact = right.get((parse_label(pool)["pool"], stride), {})
        shared = [(mine[cell], exact[cell]) for cell in mine.keys() & exact.keys()]
        longest = max((one["length"] for one in exact.values()), default=None)
        if longest in {one["length"] for _, one in shared}:
            shares[pool, stride] = sum(e["right"] - m["right"] for m, e in shared) / sum(e["asked"] for _, e in shared)
    return shares


def _answer_cells(found: list[Found]) -> tuple[Found | None, Found | None]:
    """Eager's and the default estimate's needles at the longest length both have, of the run that asked most."""
    cells = [r for r in measured(_as_trained(found), Answers, *_CURVES, "seeds") if "right" in r]
    default = [r for r in cells if r["method"] == "xattention" and r["parameters"] == DEFAULT]
    for record in sorted(default, key=lambda r: (-r["length"], -r["asked"])):
        eager = [r for r in cells if r["method"] == "eager" and all(r[k] == record[k] for k in ("length", "model_sha256", "seeds"))]
        if eager:
            return eager[0], record
    return None, None


def _share(record: Found) -> str:
    low, high = wilson(record["right"], record["asked"])
    return f"{record['right']} of {record['asked']} [{low:.0%}, {high:.0%}]"


def comparison(found: list[Found]) -> str:
    """README.md's table: facts answered by dense attention, by the default settings, and from first and last tokens alone, by length.

    The window is the one whose share of the keys comes nearest to the default's share of the blocks.
    """
    cells = [r for r in measured(_as_trained(found), Answers, *_CURVES, "seeds") if "right" in r]
    asked = {(r["model_sha256"], r["length"], *r["seeds"]) for r in cells if r["method"] == "eager"}
    default = [r for r in cells if r["parameters"] == DEFAULT and (r["model_sha256"], r["length"], *r["seeds"]) in asked]
    most: dict[tuple[str, int], Found] = {}
    for record in sorted(default, key=lambda r: r["asked"]):
        most[record["model_sha256"], record["length"]] = record
    rows = []
    for (model, length), record in sorted(most.items(), key=lambda item: item[0][1]):
        alike = [r for r in cells if (r["model_sha256"], r["length"]) == (model, length)]
        (eager,) = (r for r in alike if r["method"] == "eager" and r["seeds"] == record["seeds"])
        windows = sorted((r for r in alike if r["method"] == "sink_window"), key=lambda r: abs(r["density"] - record["density"]))
        cell = lambda r: f"{_share(r)}; {r['density']:.0%} of all pairs"
        rows.append([f"{size(length)} bytes", _share(eager), cell(record), cell(windows[0]) if windows else "–"])
    if not rows:
        return ""
    return markdown(["prompt", "dense attention", "`xattention`, default settings", "`sink_window`: first and last tokens"], rows)


def headlines(found: list[Found]) -> list[Row]:
    eager, default = _answer_cells(found)
    if eager is None or default is None:
        return []
    what = f"needles answered in {size(default['length'])} bytes, small model, default settings, {default['density']:.0%} of the blocks"
    return [[what, _share(default), f"eager: {_share(eager)}"]]


def shortfalls(found: list[Found]) -> list[str]:
    eager, default = _answer_cells(found)
    if eager is None or default is None or default["right"] >= eager["right"]:
        return []
    return [f"Answers at {size(default['length'])} bytes: {_share(default)} with the default settings, {_share(eager)} eager."]


BENCHMARKS = (
    Benchmark(
        name="answers",
        place=3,
        measures="needles answered and NLL over density: eager, dense, xattention by pool, stride and threshold, sink_window",
        module="benchmarks.answers.run",
        records=(Answers,),
        title="Answers",
        table=table,
        plots={"answers": plot},
        headlines=headlines,
        shortfalls=shortfalls,
    ),
    Benchmark(
        name="train_demo_model",
        place=90,
        measures="trains the bundled model of bytes, which the tutorial uses",
        module="benchmarks.answers.train_demo_model",
    ),
    *code_report.BENCHMARKS,
    *tasks_report.BENCHMARKS,
    *tokens_report.BENCHMARKS,
)

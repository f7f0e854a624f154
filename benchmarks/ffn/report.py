"""Feed-forward skipping: tables, plots over the share of skipped blocks, and what other texts quote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.ffn import FfnModel, FfnPrefill, FfnPrefillTilings, FfnQuality, FfnStack, FfnTilings
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, Row, by_device, conditions, groups, kind, latest, markdown, measured, size

_COLOURS = {
    "similarity": ("#14406b", "similarity"),
    "random": ("#c0722a", "at random"),
    "layers": ("#7a9a4f", "the same blocks for all"),
    "whole_layers": ("#8a4f7a", "whole layers"),
}


def time_plot(found: list[Found]) -> Any:
    """The whole model and the stack of blocks; dotted, what is left when skipped weights cost nothing at the rate they are read at.

    That rate is the stack's own with nothing skipped. Of a whole model only the blocks' bytes count, at the run's bandwidth.
    """
    from matplotlib import pyplot

    runs = latest(found, FfnModel) + latest(found, FfnStack)
    kinds = [("whole model", "ffn-model"), ("blocks alone", "ffn-stack")]
    kinds = [kind for kind in kinds if any(r["benchmark"] == kind[1] for r in runs)]
    batches = sorted({r["rows"] for r in runs})
    if not kinds:
        return None
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
    return figure


def _time_panel(axis: Any, mine: list[Found]) -> None:
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


def quality_plot(found: list[Found]) -> Any:
    """A row of panels for each model: NLL and answers over the share that was skipped."""
    from matplotlib import pyplot

    runs = latest(found, FfnQuality)
    models = list(dict.fromkeys((r["model_sha256"], r["model"]) for r in runs))
    if not runs:
        return None
    figure, axes = pyplot.subplots(len(models), 2, figsize=(8, 3.4 * len(models)), squeeze=False, layout="constrained")
    for (digest, name), pair in zip(models, axes, strict=True):
        _quality_panels(pair, [r for r in runs if r["model_sha256"] == digest])
        pair[0].set_title(name)
    return figure


def _quality_panels(pair: Any, runs: list[Found]) -> None:
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


def table(found: Iterable[Found]) -> str:
    """Milliseconds by skipped share beside Inductor's and beside what the weights' bytes allow; answers and NLL; the tilings' best."""
    found = list(found)
    parts = []
    for record, title in ((FfnModel, "A whole model"), (FfnStack, "32 blocks alone")):
        for group in by_device(kind(found, record)):
            parts += [f"### {title}", *_ffn_times(latest(group, record), latest(found, FfnStack))]
    for group in by_device(kind(found, FfnPrefill)):
        parts += ["### One block over a prompt", *_ffn_prefill(latest(group, FfnPrefill))]
    for group in groups(kind(found, FfnQuality), lambda r: (r["model_sha256"], r["machine"]["gpu"] or "CPU")):
        parts += ["### Answers and NLL", *_ffn_quality(latest(group, FfnQuality))]
    return "\n\n".join(parts)


def ffn_saved(cells: Iterable[Found], record: Found) -> float | None:
    """Time saved over the saved blocks' share of the time that all blocks take: 1 where skipped weights cost nothing at all.

    That time is the one of the blocks alone with nothing skipped; of a whole model that was measured without them, the time of the blocks'
    bytes at the run's bandwidth, which is less.
    """
    if record["variant"] != "sparsify" or not record["share"]:
        return None
    same = [r for r in cells if r["variant"] == "sparsify" and r["rows"] == record["rows"] and not r["share"]]
    base = [r["ms"] for r in same if r["benchmark"] == record["benchmark"]]
    if not base:
        return None
    alone = [r["ms"] for r in same if r["benchmark"] == "ffn-stack" and r["bytes"] == record["bytes"] and r["machine"] == record["machine"]]
    blocks = alone[0] if alone else 1e3 * record["bytes"] / record["bandwidth"]
    return (base[0] - record["ms"]) / (record["share"] * blocks)


def _ffn_times(cells: list[Found], stacks: list[Found]) -> list[str]:
    rows = []
    for record in sorted(cells, key=lambda r: (r["rows"], r["variant"], r["pattern"], r["share"])):
        inductor = [r["ms"] for r in cells if r["variant"] == "inductor" and r["rows"] == record["rows"]]
        name = "Inductor" if record["variant"] == "inductor" else f"sparsify, {record['pattern']}"
        saved = ffn_saved([*cells, *stacks], record)
        rows.append([str(record["rows"]), name, f"{record['share']:.0%}", f"{record['ms']:.3f}",
                     f"{record['ms'] / inductor[0]:.2f}" if inductor else "–", f"{saved:.0%}" if saved is not None else "–",
                     f"{1e3 * record['bytes'] * (1 - record['share']) / record['bandwidth']:.2f}"])  # fmt: skip
    copies = sorted({round(r["bandwidth"] / 1e9) for r in cells})
    way = "the fastest of a copy, a sum and a matrix-vector product" if all("bandwidths" in r for r in cells) else "a copy's, no bound"
    note = (
        "Saved: time saved over the time that the skipped blocks take when the blocks run alone. Bytes: milliseconds that the "
        f"blocks' remaining weights take at the bandwidth of the same run, {', '.join(map(str, copies))} GB/s: {way}. "
        f"Where rows decide each by itself, a block's weights are saved only when all rows skip it. {conditions(cells)}"
    )
    return [note, markdown(["rows", "call", "skipped", "ms", "÷ Inductor", "saved", "bytes, ms"], rows)]


def _ffn_prefill(cells: list[Found]) -> list[str]:
    rows = []
    for record in sorted(cells, key=lambda r: (r["rows"], r["variant"], r["share"])):
        name = "Inductor, dense" if record["variant"] == "inductor" else "sparsify, compacted"
        error = f"{record['error']:.1e}" if "error" in record else "–"
        rows.append([size(record["rows"]), name, f"{record['share']:.0%}", f"{record['ms']:.3f}", f"{record['over_dense']:.2f}",
                     f"{record['tflops']:.0f}", error])  # fmt: skip
    note = "Rows that skip are random; TFLOP/s count the computed rows. " + conditions(cells)
    return [note, markdown(["rows", "call", "skipped", "ms", "÷ Inductor", "TFLOP/s", "largest error"], rows)]


def _ffn_quality(cells: list[Found]) -> list[str]:
    named: dict[tuple[str, str], list[Found]] = {}
    for record in sorted(cells, key=lambda r: (r["policy"] != "dense", r["policy"], r.get("rows") or "", r["share"])):
        name = record["policy"].replace("_", " ") + (", prompt too" if record.get("rows") == "all" else "")
        # many sets of layers have one share
        apart = record["policy"].endswith("layers") or f"{record.get('threshold')} {record.get('seed')}"
        named.setdefault((name, f"{record['share']:.1%} {apart}"), []).append(record)
    rows = []
    for (name, _), same in named.items():
        ranked = sorted(same, key=lambda r: r["nll"])
        picked = [("", ranked[0])] if len(ranked) < 3 else [(f", best of {len(ranked)}", ranked[0]), (", median", ranked[len(ranked) // 2])]
        for suffix, record in picked:
            right = f"{record['right'] / record['asked']:.3f}"
            rows.append([name + suffix, f"{record['share']:.1%}", f"{record['nll']:.3f}", right])
    asked = ", ".join(sorted({str(record["asked"]) for record in cells}))
    model = f"`{cells[0]['model']}`, {cells[0]['length']} bytes, {asked} questions a row. "
    return [model + conditions(cells), markdown(["policy", "skipped", "NLL, nats a byte", "answers right"], rows)]


def headlines(found: list[Found]) -> list[Row]:
    cells = measured(found, FfnStack) + measured(found, FfnModel)
    rows = []
    for record in (r for r in cells if (r["rows"], r["share"], r["variant"]) == (1, 0.25, "sparsify")):
        inductor = [r["ms"] for r in cells if (r["benchmark"], r["rows"], r["variant"]) == (record["benchmark"], 1, "inductor")]
        saved = ffn_saved(cells, record)
        what = "feed-forward blocks alone" if record["benchmark"] == "ffn-stack" else "a whole model's token"
        beside = f"Inductor, nothing skipped: {inductor[0]:.2f} ms" if inductor else "–"
        beside += f"; {saved:.0%} of the skipped weights' time saved" if saved is not None else ""
        rows.append([f"decode, {what}, a quarter skipped, batch 1", f"{record['ms']:.2f} ms", beside])
    return rows


def shortfalls(found: list[Found]) -> list[str]:
    cells = measured(found, FfnStack)
    whole = bool(kind(found, FfnModel))
    lines = ["Feed-forward skipping in a whole model is not recorded."] if cells and not whole else []
    for record in cells:
        saved = ffn_saved(cells, record)
        if saved is not None and saved < 0.5 and record["share"] == 0.25:
            lines.append(
                f"Feed-forward skipping, {record['rows']} rows, {record['pattern']}, {record['share']:.0%} skipped: {saved:.0%} of the "
                "skipped weights' time is saved."
            )
    return lines


BENCHMARKS = (
    Benchmark(
        name="ffn",
        place=8,
        measures="feed-forward blocks left out: tilings, 32 blocks alone, a whole model, rows of a prompt, answers and NLL",
        module="benchmarks.ffn.run",
        records=(FfnModel, FfnStack, FfnPrefill, FfnQuality),
        unshown=(FfnTilings, FfnPrefillTilings),
        title="Feed-forward skipping",
        table=table,
        plots={"ffn-time": time_plot, "ffn-quality": quality_plot},
        headlines=headlines,
        shortfalls=shortfalls,
    ),
)

"""Tables and plots out of the recorded results: no number is typed by hand.

    python -m benchmarks.tables             # writes results/README.md and results/*.png
    python -m benchmarks.tables --check     # fails when results/README.md is not what the records say

The latest record of a cell on a device counts; failures stay visible.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.needles import wilson

Record = dict[str, Any]


def latest(found: Iterable[Record], *keys: str) -> list[Record]:
    """The last record of each cell, a cell being the values of `keys` and the device."""
    cells: dict[str, Record] = {}
    for record in found:
        cell = repr([record.get(key) for key in keys] + [record["machine"]["gpu"]])
        if cell not in cells or record["time"] >= cells[cell]["time"]:
            cells[cell] = record
    return list(cells.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _size(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _method(record: Record) -> str:
    parameters = record.get("parameters") or {}
    if record["method"] == "xattention":
        return f"xattention, {parameters['pool']}, stride {parameters['stride']}, τ {parameters['threshold']:g}"
    if record["method"] == "sink_window":
        return f"sink_window, {parameters['sinks']} + {parameters['window']} tokens"
    return {"eager": "eager", "dense": "sparsify, dense"}[record["method"]]


def _rank(record: Record) -> tuple[Any, ...]:
    parameters = record.get("parameters") or {}
    order = ["eager", "dense", "xattention", "sink_window"].index(record["method"])
    return order, parameters.get("pool", ""), parameters.get("stride", 0), parameters.get("threshold", 0), parameters.get("window", 0)


def _conditions(found: Sequence[Record]) -> str:
    """One line that says where a table's numbers come from; several machines or commits are all named."""
    parts = []
    for name, label in (("gpu", ""), ("driver", "driver "), ("torch", "torch "), ("triton", "triton "), ("transformers", "transformers ")):
        values = sorted({str(record["machine"].get(name)) for record in found} - {"None"})
        parts += [label + ", ".join(values)] if values else (["CPU"] if name == "gpu" else [])
    commits = sorted({_short(record["machine"].get("commit") or "unknown") for record in found})
    return "; ".join([*parts, "commit " + ", ".join(commits)]) + "."


def _short(commit: str) -> str:
    """Ten digits, and still saying when the code was not quite that commit's."""
    name, plus, changes = commit.partition("+")
    return name[:10] + plus + changes


def answers_table(found: Iterable[Record]) -> str:
    """Share of needles right, its 95 % interval, density and NLL: one row a method, one column a length, one table a model and device."""
    cells = latest(found, "model_sha256", "text_sha256", "method", "parameters", "length", "needles", "seeds")
    parts = []
    for group in _groups(
        cells, lambda r: (r["model"], r["model_sha256"], r["text_sha256"], r["needles"], r["dtype"], r["machine"]["gpu"] or "CPU")
    ):
        lengths = sorted({record["length"] for record in group})
        methods = {_method(record): _rank(record) for record in group}
        rows = []
        for method in sorted(methods, key=methods.__getitem__):
            by_length = {record["length"]: record for record in group if _method(record) == method}
            rows.append([method, *(_answer_cell(by_length.get(length)) for length in lengths)])
        first = group[0]
        asked = sorted({record["asked"] for record in group if "asked" in record})
        head = (
            f"### {first['model']} ({first['dtype']}): {first['needles']} needles a prompt, {'/'.join(map(str, asked))} asked a cell\n\n"
            "Share right [95 % Wilson interval] · density over causal blocks (sink_window: tokens) · NLL in nats a byte. "
            f"{_conditions(group)} "
            f"Model `{first['model_sha256'][:12]}`, text `{first['text_sha256'][:12]}`."
        )
        parts.append(head + "\n\n" + markdown(["method", *(f"{_size(length)} bytes" for length in lengths)], rows))
    return "\n\n".join(parts)


def _answer_cell(record: Record | None) -> str:
    if record is None:
        return "–"
    if "error" in record:
        return "failed: " + record["error"].splitlines()[0][:60].replace("|", "/")
    low, high = wilson(record["right"], record["asked"])
    return f"{record['right'] / record['asked']:.3f} [{low:.2f}, {high:.2f}] · {record['density']:.1%} · {record['nll']:.3f}"


def prefill_table(found: Iterable[Record]) -> str:
    """Milliseconds, speed against eager and peak memory: one row a variant and length."""
    cells = latest(found, "shape", "layers", "variant", "length", "requested_density")
    parts = []
    for group in _groups(cells, lambda r: (r["shape"], r["layers"], r["machine"]["gpu"] or "CPU")):
        eager = {record["length"]: record["ms"] for record in group if record["variant"] == "eager" and "ms" in record}
        order = {"eager": 0, "inductor": 1, "dense": 2, "xattention": 3}
        rows = []
        for record in sorted(group, key=lambda r: (r["length"], order[r["variant"]], r["requested_density"] or 0)):
            name = {"dense": "sparsify, dense", "inductor": "Inductor"}.get(record["variant"], record["variant"])
            if record["variant"] == "xattention":
                name += f", density {record['requested_density']:g}"
            if "error" in record:
                rows.append([_size(record["length"]), name, _answer_cell(record), "–", "–", "–"])
                continue
            base = eager.get(record["length"])
            peak = f"{record['peak_bytes'] / 2**30:.1f}" if record["peak_bytes"] else "–"
            density = f"{record['density']:.1%}" if record["density"] is not None else "–"
            rows.append(
                [_size(record["length"]), name, f"{record['ms']:.1f}", f"{base / record['ms']:.2f}" if base else "–", peak, density]
            )
        first = group[0]
        head = (
            f"### Prefill of one prompt, shape {first['shape']}, {first['layers']} layers, random weights\n\n"
            f"Cache on, logits of the last token, medians. {_conditions(group)}"
        )
        parts.append(head + "\n\n" + markdown(["tokens", "variant", "ms", "× eager", "peak GiB", "density"], rows))
    return "\n\n".join(parts)


def _groups(cells: Iterable[Record], key: Any) -> list[list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in cells:
        groups.setdefault(key(record), []).append(record)
    return [groups[name] for name in sorted(groups, key=repr)]


SECTIONS = {"answers": ("Answers", answers_table), "prefill": ("Prefill", prefill_table)}


def page(folder: Path) -> str:
    """The whole README.md of the results folder."""
    found = list(records.read(sorted(folder.glob("*.jsonl"))))
    parts = ["# Results", "Made by `python -m benchmarks.tables` from the JSON lines in this folder; do not edit."]
    for benchmark, (title, table) in SECTIONS.items():
        chosen = [record for record in found if record["benchmark"] == benchmark]
        if chosen:
            parts += [f"## {title}", table(chosen)]
            parts += [f"![{title}]({benchmark}.png)"] if (folder / f"{benchmark}.png").exists() else []
    return "\n\n".join(parts) + "\n"


def plot(folder: Path) -> list[Path]:
    """Answers against density, and prefill time against length, as PNG files beside the records. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = list(records.read(sorted(folder.glob("*.jsonl"))))
    made = []
    answers = [
        r
        for r in latest((r for r in found if r["benchmark"] == "answers"), "model_sha256", "method", "parameters", "length")
        if "right" in r
    ]
    if answers:
        lengths = sorted({record["length"] for record in answers})
        figure, axes = pyplot.subplots(1, len(lengths), figsize=(4.5 * len(lengths), 3.6), squeeze=False, sharey=True, layout="constrained")
        for axis, length in zip(axes[0], lengths, strict=True):
            _plot_answers(axis, [record for record in answers if record["length"] == length])
            axis.set(title=f"{_size(length)} bytes", xlabel="density", xscale="log")
        axes[0][0].set_ylabel("needles right")
        axes[0][-1].legend(fontsize=7)
        made.append(folder / "answers.png")
        figure.savefig(made[-1], dpi=120)
    prefill = [r for r in latest((r for r in found if r["benchmark"] == "prefill"), "shape", "layers", "variant", "length") if "ms" in r]
    if prefill:
        figure, axis = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
        for variant in sorted({record["variant"] for record in prefill}):
            points = sorted((record["length"], record["ms"]) for record in prefill if record["variant"] == variant)
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.set(xlabel="tokens", ylabel="prefill, ms", xscale="log", yscale="log")
        axis.legend()
        made.append(folder / "prefill.png")
        figure.savefig(made[-1], dpi=120)
    return made


def _plot_answers(axis: Any, found: list[Record]) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in found:
        parameters = record["parameters"]
        name = f"{parameters['pool']}, stride {parameters['stride']}" if record["method"] == "xattention" else record["method"]
        curves.setdefault(name, []).append((record["density"], record["right"] / record["asked"]))
    for name in sorted(curves):
        axis.plot(*zip(*sorted(curves[name]), strict=True), marker="o", label=name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=records.RESULTS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    readme = options.folder / "README.md"
    if options.check:
        if not readme.exists() or readme.read_text() != page(options.folder):
            print(f"{readme} is not what the records say: run python -m benchmarks.tables", file=sys.stderr)
            return 1
        return 0
    plot(options.folder)
    readme.write_text(page(options.folder))
    print(readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())

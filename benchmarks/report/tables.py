"""Tables and plots out of the recorded results: no number is typed by hand.

    python -m benchmarks.report.tables  # writes results/README.md, results/*.png, the marked parts of README.md and docs/benchmarks.md
    python -m benchmarks.report.tables --check     # fails when one of the texts is not what the records say

The latest record of a cell on a device counts; failures stay visible.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cache import report as tables_cache
from benchmarks.cost_model import report as tables_cost
from benchmarks.cost_model import run
from benchmarks.ffn import plot as ffn_plot
from benchmarks.lib import records
from benchmarks.lib.needles import wilson
from benchmarks.lib.tables import Record, conditions, failure, groups, latest, markdown, short, size
from benchmarks.model import compile_time
from benchmarks.report import headlines, plots, soundness
from benchmarks.report import kernels as tables_kernels
from benchmarks.whole_op import report as plots_whole_op

ROOT = records.RESULTS.parent.parent


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


def answers_table(found: Iterable[Record]) -> str:
    """Share of needles right, its 95 % interval, density and NLL: one row a method, one column a length, one table a model and device."""
    cells = latest(found, "model_sha256", "text_sha256", "method", "parameters", "length", "needles", "seeds")
    parts = []
    for group in groups(
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
            f"{conditions(group)} "
            f"Model `{first['model_sha256'][:12]}`, text `{first['text_sha256'][:12]}`."
        )
        parts.append(head + "\n\n" + markdown(["method", *(f"{size(length)} bytes" for length in lengths)], rows))
    return "\n\n".join(parts)


def _answer_cell(record: Record | None) -> str:
    if record is None:
        return "–"
    if "error" in record:
        return failure(record["error"])
    low, high = wilson(record["right"], record["asked"])
    return f"{record['right'] / record['asked']:.3f} [{low:.2f}, {high:.2f}] · {record['density']:.1%} · {record['nll']:.3f}"


def prefill_table(found: Iterable[Record]) -> str:
    """Milliseconds, speed against eager and peak memory: one row a variant and length."""
    cells = latest(found, "shape", "layers", "variant", "length", "requested_density")
    parts = []
    for group in groups(cells, lambda r: (r["shape"], r["layers"], r["machine"]["gpu"] or "CPU")):
        eager = {record["length"]: record["ms"] for record in group if record["variant"] == "eager" and "ms" in record}
        order = {"eager": 0, "inductor": 1, "default": 2, "dense": 3, "xattention": 4}
        rows = []
        for record in sorted(group, key=lambda r: (r["length"], order[r["variant"]], r["requested_density"] or 0)):
            name = {"dense": "sparsify, dense", "default": "sparsify, no options", "inductor": "Inductor"}.get(
                record["variant"], record["variant"]
            )
            if record["variant"] == "xattention":
                name += f", density {record['requested_density']:g}"
            if "error" in record:
                rows.append([size(record["length"]), name, _answer_cell(record), *["–"] * 5, _commit(record)])
                continue
            base = eager.get(record["length"])
            peak = f"{record['peak_bytes'] / 2**30:.1f}" if record["peak_bytes"] else "–"
            density = f"{record['density']:.1%}" if record["density"] is not None else "–"
            ratio = f"{base / record['ms']:.2f}" if base else "–"
            rows.append([size(record["length"]), name, f"{record['ms']:.1f}", ratio, peak, density, *_logits(record), _commit(record)])
        first = group[0]
        head = (
            f"### Prefill of one prompt, shape {first['shape']}, {first['layers']} layers, random weights\n\n"
            "Cache on, logits of the last token, medians. Logits: the largest difference from eager's over their standard deviation, and "
            f"whether the likeliest token is the same; random weights give flat logits, and ties turn on rounding. {conditions(group)}"
        )
        header = ["tokens", "variant", "ms", "× eager", "peak GiB", "density", "logits", "same token", "commit"]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def _commit(record: Record) -> str:
    return short(record["machine"].get("commit") or "unknown")


def _logits(record: Record) -> list[str]:
    """Only exact variants are compared with eager."""
    if record.get("logits_error") is None or record["variant"] == "eager":
        return ["–", "–"]
    return [f"{record['logits_error'] / record['logits_std']:.2f}", "yes" if record["same_token"] else "no"]


@dataclass(frozen=True)
class Section:
    """A part of the page: `table` gets the records of `names`, and of `beside` for comparison; shown when there are any of `names`."""

    title: str
    names: tuple[str, ...]
    table: Callable[[Iterable[Record]], str]
    pictures: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


_FFN = ("ffn-model", "ffn-stack", "ffn-prefill", "ffn-quality")
SECTIONS = (
    Section("Answers", ("answers",), answers_table, ("answers",)),
    Section("Prefill", ("prefill",), prefill_table, ("prefill",)),
    Section(plots_whole_op.TITLE, ("whole_op",), plots_whole_op.table, ("whole_op",), beside=("kernels",)),
    Section("Attention kernels", ("kernels",), tables_kernels.kernels, ("kernels",)),
    Section("Kernels under compute-sanitizer", ("sanitize",), tables_kernels.sanitize),
    Section("Decode over kept keys", ("decode_kernel",), tables_kernels.decode),
    Section(tables_cache.TITLE, tables_cache.NAMES, tables_cache.table, beside=("prefill",)),
    Section("Feed-forward skipping", _FFN, tables_kernels.ffn, ("ffn-time", "ffn-quality")),
    Section(tables_cost.TITLE, (run.NAME,), tables_cost.table, ("cost_grid",), beside=("prefill", "decode_model")),
    Section("Time to compile, CPU seconds", ("compile_time",), compile_time.table),
    Section(soundness.TITLE, soundness.NAMES, soundness.table),
)
WITHOUT_A_TABLE = {"ffn-tilings", "ffn-prefill-tilings"}  # they choose what the other records of that benchmark then run with


def page(folder: Path) -> str:
    """The whole README.md of the results folder."""
    found = read(folder)
    parts = ["# Results", "Made by `python -m benchmarks.report.tables` from the JSON lines in this folder; do not edit. "
             "[docs/benchmarks.md](../../docs/benchmarks.md) says how each was measured and what falls short."]  # fmt: skip
    for section in SECTIONS:
        if any(record["benchmark"] in section.names for record in found):
            parts += [
                f"## {section.title}",
                section.table([record for record in found if record["benchmark"] in section.names + section.beside]),
            ]
            parts += [f"![{name}]({name}.png)" for name in section.pictures if (folder / f"{name}.png").exists()]
    shown = {name for section in SECTIONS for name in section.names} | WITHOUT_A_TABLE
    if missed := sorted({record["benchmark"] for record in found} - shown):
        parts += ["## Records without a table", ", ".join(f"`{name}`" for name in missed)]
    return "\n\n".join(parts) + "\n"


def read(folder: Path) -> list[Record]:
    return list(records.read(sorted(folder.glob("*.jsonl"))))


def plot(folder: Path) -> list[Path]:
    """Every picture of the page, as PNG files beside the records. Needs matplotlib."""
    found = read(folder)
    return [*plots.plot(found, folder), *plots_whole_op.plot(folder), *ffn_plot.plot(found, folder), *tables_cost.plot(found, folder)]


def blocks(found: list[Record]) -> dict[Path, tuple[str, str]]:
    """Files outside the results folder with a generated part: the part's name and its text."""
    return {
        ROOT / "README.md": ("results", headlines.table(found)),
        ROOT / "docs" / "benchmarks.md": ("shortfalls", headlines.shortfalls(found)),
    }


def filled(text: str, name: str, part: str) -> str:
    """`text` with `part` between `<!-- name -->` and `<!-- /name -->`. Raises ValueError where the marks are not there once each."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{begin} and {end} have to be there once each, in this order")
    return f"{text[: text.index(begin)]}{begin}\n{part}\n{text[text.index(end) :]}"


def texts(folder: Path) -> dict[Path, str]:
    """Every generated text by file: the page and, for the repository's own results, the marked parts of other files."""
    found = {folder / "README.md": page(folder)}
    if folder.resolve() == records.RESULTS.resolve():
        found |= {path: filled(path.read_text(), *part) for path, part in blocks(read(folder)).items()}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=records.RESULTS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.check:
        stale = [path for path, text in texts(options.folder).items() if not path.exists() or path.read_text() != text]
        for path in stale:
            print(f"{path} is not what the records say: run python -m benchmarks.report.tables", file=sys.stderr)
        return 1 if stale else 0
    plot(options.folder)
    for path, text in texts(options.folder).items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

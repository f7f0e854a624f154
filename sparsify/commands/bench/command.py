"""`sparsify bench`: the benchmarks that measure any model, on the user's own model and machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify import progress
from sparsify.commands import arguments, loading
from sparsify.commands.exit_codes import DIFFERS, DONE
from sparsify.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from sparsify.commands.bench.registry import Benchmark

NAMES = ("prefill", "whole_call")
VARIANTS = ("eager", "inductor", "sparsify", "exact")
DEFAULT_LENGTHS = "4K,16K"


def add(commands: Any) -> None:
    """Declares the command. commands: argparse's subparsers."""
    bench = commands.add_parser(
        "bench", parents=[arguments.common_options()], help="seconds of your model on your machine: eager, Inductor, sparsify"
    )
    bench.add_argument("model", metavar="MODEL", help="a folder or hub name for AutoModelForCausalLM")
    bench.add_argument("--only", action="append", choices=NAMES, help="one of the benchmarks (default: all)")
    bench.add_argument(
        "--lengths", metavar="LENGTHS", default=DEFAULT_LENGTHS, help="tokens: 4K..32K doubles, 4096,6K lists (default: %(default)s)"
    )
    bench.add_argument("--prompt", metavar="FILE", help="text whose beginnings are the prompts (default: random tokens)")
    bench.add_argument(
        "--tokens", metavar="N", type=arguments.tokens, default=64, help="that a whole call generates (default: %(default)s)"
    )
    bench.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:3]), help="how the model runs (default: all but exact)"
    )
    bench.add_argument("--repeats", metavar="N", type=arguments.tokens, default=3, help="timed calls of each (default: %(default)s)")
    bench.add_argument("--out", metavar="FOLDER", help="write results.jsonl, report.md and plots there; otherwise nothing is written")
    bench.add_argument("--json", action="store_true", help="print the records as JSON instead of tables")
    arguments.add_device_and_dtype(bench)
    bench.add_argument("--attention", metavar="NAME", default="sdpa", help="transformers' attention implementation (default: %(default)s)")
    bench.set_defaults(run=run)


def benchmarks() -> list[Benchmark]:
    """Those that measure any model, in the order in which they run."""
    from sparsify.commands.bench import prefill, whole_call

    return sorted((prefill.BENCHMARK, whole_call.BENCHMARK), key=lambda one: one.place)


def run(given: argparse.Namespace) -> int:
    from sparsify.commands.bench import records
    from sparsify.commands.bench.registry import Subject
    from sparsify.commands.cost.command import parse_lengths

    lengths = parse_lengths(given.lengths)
    _, options = loading.load_config(given)
    out = None if given.out is None else _folder(given.out)
    given.length, given.max_tokens = lengths[-1], lengths[-1]
    model, ids = loading.load_model_and_tokens(given)
    if ids.shape[1] < lengths[-1]:
        raise UnsupportedError(f"the prompt has {ids.shape[1]} tokens", where=given.prompt, hint=f"--lengths {ids.shape[1]}")
    subject = Subject(
        model=model,
        name=Path(given.model).name or given.model,
        ids=ids,
        lengths=tuple(lengths),
        tokens=given.tokens,
        variants=tuple(dict.fromkeys(given.variants)),
        options=options,
        repeats=given.repeats,
    )
    chosen = [one for one in benchmarks() if not given.only or one.name in given.only]
    lines: list[dict[str, Any]] = []
    for one in chosen:
        assert one.on_model is not None
        found = one.on_model(subject)
        while True:
            with progress.task(f"{one.name}, {len(lines)} of {len(chosen) * len(subject.variants) * len(lengths)} measured"):
                record = next(found, None)
            if record is None:
                break
            lines.append(records.line_of(record) if out is None else records.append(out / "results.jsonl", record))
    print(json.dumps(lines, indent=1) if given.json else report(chosen, lines))
    if out is not None:
        _write(chosen, lines, out)
    return DIFFERS if any("error" in line for line in lines) else DONE


def report(chosen: Iterable[Benchmark], lines: list[dict[str, Any]]) -> str:
    """The tables, as Markdown."""
    from sparsify.commands.bench.tables import kind

    return "\n\n".join(one.table(mine) for one in chosen if one.table is not None and (mine := kind(lines, *one.records)))


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=f"--out {name}") from None
    return folder


def _write(chosen: Iterable[Benchmark], lines: list[dict[str, Any]], folder: Path) -> None:
    (folder / "report.md").write_text(report(chosen, lines) + "\n")
    try:
        import matplotlib
    except ImportError:
        print('sparsify: no plots: matplotlib is not installed (pip install "sparsify-compiler[plot]")', file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for one in chosen:
        for name, draw in one.plots.items():
            if (figure := draw(lines)) is not None:
                figure.savefig(folder / f"{name}.png", dpi=110)
                pyplot.close(figure)

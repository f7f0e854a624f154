"""Tables and plots out of the recorded results: no number is typed by hand.

    python -m benchmarks report            # results/README.md, *.png, docs/compatibility.md, parts of README.md and docs
    python -m benchmarks report --check    # fails when one of the texts is not what the records say

The latest record of a cell on a device counts; failures stay visible.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.answers import code_report
from benchmarks.answers import report as answers_report
from benchmarks.cache import quoted
from benchmarks.lib import records, registry
from benchmarks.lib.pages import filled
from benchmarks.test_runs import compatibility, sweep_report
from sparsify.commands.bench.tables import Found, conditions, kind, markdown

ROOT = records.RESULTS.parent.parent
_ABSENT = "No results are recorded yet."


def read(folder: Path) -> list[Found]:
    return list(records.read(sorted(folder.glob("*.jsonl"))))


def page(folder: Path) -> str:
    """The whole README.md of the results folder."""
    found = read(folder)
    parts = ["# Results", "Made by `python -m benchmarks report` from the JSON lines in this folder; do not edit. "
             "[docs/benchmarks.md](../../docs/benchmarks.md) says how each was measured and what falls short."]  # fmt: skip
    for one in registry.find():
        if one.table and kind(found, *one.records):
            parts += [f"## {one.title}", one.table(kind(found, *one.records, *one.beside))]
            parts += [f"![{name}]({name}.png)" for name in one.plots if (folder / f"{name}.png").exists()]
    known = {record.NAME for one in registry.find() for record in one.records + one.unshown}
    if missed := sorted({record["benchmark"] for record in found} - known):
        parts += ["## Records without a table", ", ".join(f"`{name}`" for name in missed)]
    return "\n\n".join(parts) + "\n"


def plot(folder: Path) -> list[Path]:
    """Every picture of the page, as PNG files beside the records. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, made = read(folder), []
    for name, draw in ((name, draw) for one in registry.find() for name, draw in one.plots.items()):
        figure = draw(found)
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=120)
            pyplot.close(figure)
    return made


def headlines(found: list[Found]) -> str:
    """docs/benchmarks.md's table: one row a result, on the device of the newest GPU record; a row whose records are absent is left out."""
    mine = _newest_gpu(found)
    rows = [row for one in registry.find() for row in one.headlines(mine)]
    if not rows:
        return _ABSENT
    used = kind(mine, *(record for one in registry.find() for record in one.records))
    return "\n\n".join([markdown(["what", "measured", "beside"], rows), conditions(used)])


def answers(found: list[Found]) -> str:
    """README.md's table of answers, on the device of the newest GPU record."""
    return answers_report.comparison(_newest_gpu(found)) or _ABSENT


def shortfalls(found: list[Found]) -> str:
    """docs/benchmarks.md's list of what is slower, worse or missing, on the device of the newest GPU record."""
    lines = [line for one in registry.find() for line in one.shortfalls(_newest_gpu(found))]
    return "\n".join(f"- {line}" for line in lines) or _ABSENT


def seconds(found: list[Found]) -> str:
    """docs/generate.md's tables: from a process's first prompt on, and by token, on the device of the newest GPU record."""
    mine = _newest_gpu(found)
    of = {one.name: one for one in registry.find()}
    return "\n\n".join(one.table(kind(mine, *one.records)) for one in (of["generate_seconds"], of["generate"]) if one.table) or _ABSENT


# file, name of its marks, what stands between them
MARKED: tuple[tuple[str, str, Callable[[list[Found]], str]], ...] = (
    ("README.md", "answers", answers),
    ("docs/benchmarks.md", "results", headlines),
    ("docs/cache.md", "answers", lambda found: quoted.answers(_newest_gpu(found)) or _ABSENT),
    ("docs/cache.md", "reading", lambda found: quoted.reading(_newest_gpu(found)) or _ABSENT),
    ("docs/cache.md", "keeping", lambda found: quoted.keeping(_newest_gpu(found)) or _ABSENT),
    ("docs/benchmarks.md", "shortfalls", shortfalls),
    ("docs/generate.md", "seconds", seconds),
    ("docs/models.md", "code-model", lambda _: code_report.trained()),
    ("docs/support.md", "sweep", sweep_report.part),
)


def _newest_gpu(found: list[Found]) -> list[Found]:
    """Records of the GPU that was measured last."""
    newest = max((r for r in found if r["machine"]["gpu"]), key=lambda r: r["time"], default=None)
    return [r for r in found if newest and r["machine"]["gpu"] == newest["machine"]["gpu"]]


def texts(folder: Path) -> dict[Path, str]:
    """Every generated text by file: the page and, for the repository's own results, other pages and marked parts of them."""
    made = {folder / "README.md": page(folder)}
    if folder.resolve() == records.RESULTS.resolve():
        found = read(folder)
        made[ROOT / "docs" / "compatibility.md"] = compatibility.page(found)
        for path, name, part in MARKED:
            made[ROOT / path] = filled(made.get(ROOT / path) or (ROOT / path).read_text(), name, part(found))
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=records.RESULTS, help="of records (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a text is not what the records say")
    options = parser.parse_args(arguments)
    if options.check:
        stale = [path for path, text in texts(options.folder).items() if not path.exists() or path.read_text() != text]
        for path in stale:
            print(f"{path} is not what the records say: run python -m benchmarks report", file=sys.stderr)
        return 1 if stale else 0
    plot(options.folder)
    for path, text in texts(options.folder).items():
        path.write_text(text)
        print(path)
    return 0

"""Table and plot of whole_op records: speed-up of the whole sparse call over the fastest dense one, and the bound that arithmetic sets.

python -m benchmarks.plots_whole_op     # prints the table, writes results/whole_op.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.tables import Record, latest, markdown

TITLE = "The whole op"


def table(found: Iterable[Record]) -> str:
    """One row a call, dense ones first at each length; failures stay visible."""
    cells = _cells(found)
    rows = []
    for length in sorted({record["length"] for record in cells}):
        here = [record for record in cells if record["length"] == length]
        for record in (r for r in here if r["kind"] == "dense"):
            rows.append([_tokens(length), record["name"], _milliseconds(record), "–", "–", "1", "–", "–"])
        for record in sorted((r for r in here if r["kind"] == "sparse"), key=lambda r: (-r["stride"], r["pool"], r["target"])):
            rows.append(_sparse_row(record))
    header = ["tokens", "call", "ms", "× fastest dense", "bound", "density", "mass kept", "scratch MiB"]
    return markdown(header, rows)


def _sparse_row(record: Record) -> list[str]:
    name = f"{record['pool']}, stride {record['stride']}"
    if "error" in record:
        return [_tokens(record["length"]), name, _milliseconds(record), "–", "–", f"{record['target']:.1%}", "–", "–"]
    return [
        _tokens(record["length"]),
        name,
        f"{record['ms']:.2f} ({record['select_ms']:.2f} + {record['attend_ms']:.2f})",
        f"{record['speedup']:.2f}" if "speedup" in record else "–",
        f"{record['bound']:.1f}",
        f"{record['density']:.1%}",
        f"{record['kept_mass']:.3f}",
        f"{record['scratch_bytes'] / 2**20:.0f}" if "scratch_bytes" in record else "–",
    ]


def _cells(found: Iterable[Record]) -> list[Record]:
    chosen = (r for r in found if r["benchmark"] == "whole_op" and r["kind"] in ("dense", "sparse"))
    return latest(chosen, "kind", "length", "name", "stride", "pool", "target", "heads", "kv_heads")


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _milliseconds(record: Record) -> str:
    return f"{record['ms']:.2f}" if "ms" in record else "failed: " + record.get("error", "")[:60].replace("|", "/")


def plot(folder: Path) -> list[Path]:
    """Speed-up over length, one line a density, with the bound 1 / (density + estimate share) dashed; bars by estimate at one density.

    Needs matplotlib. Writes `whole_op.png` beside the records; nothing when there are none.
    """
    sparse = [r for r in _cells(records.read(sorted(folder.glob("*.jsonl")))) if r["kind"] == "sparse" and "speedup" in r]
    if not sparse:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _by_length(axes[0], [r for r in sparse if (r["stride"], r["pool"]) == (16, "max")])
    longest = max(r["length"] for r in sparse)
    _by_estimate(axes[1], [r for r in sparse if r["length"] == longest])
    path = folder / "whole_op.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return [path]


def _by_length(axis: Any, found: list[Record]) -> None:
    for number, density in enumerate(sorted({record["target"] for record in found})):
        points = sorted((r["length"], r["speedup"], r["bound"]) for r in found if r["target"] == density)
        lengths, speedups, bounds = zip(*points, strict=True)
        axis.plot(lengths, speedups, marker="o", color=f"C{number}", label=f"density {density:.0%}")
        axis.plot(lengths, bounds, linestyle="--", color=f"C{number}", linewidth=1)
    axis.plot([], [], linestyle="--", color="grey", label="1 / (density + estimate share)")
    lengths = sorted({record["length"] for record in found})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_tokens(length) for length in lengths])
    axis.set(xlabel="tokens", ylabel="× the fastest dense causal attention", title="exact estimate, stride 16, everything counted")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def _by_estimate(axis: Any, found: list[Record]) -> None:
    counts: dict[float, int] = {}
    for record in found:
        counts[record["target"]] = counts.get(record["target"], 0) + 1
    target = max(counts, key=counts.__getitem__)  # the density that all estimates were measured at
    chosen = sorted((r for r in found if r["target"] == target), key=lambda r: r["speedup"])
    names = [f"{r['pool']}, stride {r['stride']}" for r in chosen]
    axis.barh(names, [r["speedup"] for r in chosen], color="C0")
    axis.plot([r["bound"] for r in chosen], names, "k|", markersize=12, label="bound")
    axis.set(xlabel="× the fastest dense causal attention", title=f"{_tokens(chosen[0]['length'])} tokens, density {target:.0%}")
    axis.legend(fontsize=8)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    print(table(records.read(sorted(options.folder.glob("*.jsonl")))))
    print(*plot(options.folder))
    return 0


if __name__ == "__main__":
    main()

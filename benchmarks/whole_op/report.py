"""Table and plot of whole_op records: speed-up of the whole sparse call over the fastest dense one, and the bound that arithmetic sets.

python -m benchmarks.whole_op.report     # prints the table, writes results/whole_op.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.lib import records
from benchmarks.lib.tables import PEERS, Record, conditions, failure, fastest_dense, groups, latest, markdown, size

TITLE = "The whole sparse attention call"


def table(found: Iterable[Record]) -> str:
    """One row a call, dense ones first at each length; failures stay visible. `kernels` records among `found` are compared with too."""
    found = list(found)
    return "\n\n".join(_device_table(cells, found) for cells in groups(_cells(found), lambda r: r["machine"]["gpu"] or "CPU"))


def _device_table(cells: list[Record], found: list[Record]) -> str:
    fastest = fastest_dense(found, cells[0]["machine"]["gpu"])
    rows = []
    for length in sorted({record["length"] for record in cells}):
        here = [record for record in cells if record["length"] == length]
        for record in (r for r in here if r["kind"] == "dense"):
            best = f"{fastest[length][0] / record['ms']:.2f}" if length in fastest and "ms" in record else "–"
            rows.append([size(length), f"dense: {PEERS.get(record['name'], record['name'])}", _milliseconds(record),
                         _over_peers(record, here), best, "1.0", "100.0%", "–", "–"])  # fmt: skip
        for record in sorted((r for r in here if r["kind"] == "sparse"), key=lambda r: (-r["stride"], r["pool"], r["target"])):
            rows.append(_sparse_row(record, fastest.get(length)))
    header = ["tokens", "call", "ms (select + attend)", "× peers of the run", "× fastest dense", "bound", "density", "mass kept"]
    header.append("scratch MiB")
    return "\n\n".join([_note(cells, fastest), markdown(header, rows)])


def _note(cells: list[Record], fastest: dict[int, tuple[float, str, str]]) -> str:
    lengths = sorted({record["length"] for record in cells})
    absent = sorted({PEERS.get(r["name"], r["name"]) for r in cells if r["kind"] == "dense" and "error" in r})
    known = [f"{size(n)}: {fastest[n][1]}, {fastest[n][0]:.1f} ms (`{fastest[n][2]}` records)" for n in lengths if n in fastest]
    parts = [
        "Estimate, selection, index building and attention timed as one call, on structured queries and keys; the parts in brackets are "
        "timed apart and not added up. **Peers of the run**: over the fastest dense causal attention by others that ran beside it."
    ]
    parts += [f"**{', '.join(absent)} did not run there**, so that column flatters."] if absent else []
    parts.append(
        "**Fastest dense**: over the least time that any dense kernel, sparsify's own among them, took at this length in any recorded run, "
        "which need not be this run nor these data" + (f" ({'; '.join(known)})." if known else ": none is recorded for this shape.")
    )
    parts.append(
        "Bound: 1 / (density + the estimate's share of dense attention's operations), what arithmetic allows over dense attention at the "
        "same rate; over a slower peer it can be passed. Mass kept: mean share of a row's softmax mass in the visited blocks. "
        + conditions(cells)
    )
    return " ".join(parts)


def _over_peers(record: Record, here: list[Record]) -> str:
    peers = [r["ms"] for r in here if r["kind"] == "dense" and "ms" in r and not r["name"].startswith("ours")]
    return f"{min(peers) / record['ms']:.2f}" if peers and "ms" in record else "–"


def _sparse_row(record: Record, fastest: tuple[float, str, str] | None) -> list[str]:
    name = f"{record['pool']}, stride {record['stride']}"
    if "error" in record:
        return [size(record["length"]), name, failure(record["error"]), "–", "–", "–", f"{record['target']:.1%}", "–", "–"]
    return [
        size(record["length"]),
        name,
        f"{record['ms']:.2f} ({record['select_ms']:.2f} + {record['attend_ms']:.2f})",
        f"{record['speedup']:.2f}" if "speedup" in record else "–",
        f"{fastest[0] / record['ms']:.2f}" if fastest else "–",
        f"{record['bound']:.1f}",
        f"{record['density']:.1%}",
        f"{record['kept_mass']:.3f}",
        f"{record['scratch_bytes'] / 2**20:.0f}" if "scratch_bytes" in record else "–",
    ]


def _cells(found: Iterable[Record]) -> list[Record]:
    chosen = (r for r in found if r["benchmark"] == "whole_op" and r["kind"] in ("dense", "sparse"))
    return latest(chosen, "kind", "length", "name", "stride", "pool", "target", "heads", "kv_heads")


def _milliseconds(record: Record) -> str:
    return f"{record['ms']:.2f}" if "ms" in record else failure(record.get("error", ""))


def plot(folder: Path) -> list[Path]:
    """Speed-up over density, one line a length, with the bound 1 / (density + estimate share) dashed; bars by estimate at one density.

    Over the fastest dense kernel of all records on the device where there is one for the shape, else over the run's fastest peer. Needs
    matplotlib. Writes `whole_op.png` beside the records; nothing when there are none.
    """
    found = list(records.read(sorted(folder.glob("*.jsonl"))))
    sparse = [r for r in _cells(found) if r["kind"] == "sparse" and "speedup" in r]
    if not sparse:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    newest = max(sparse, key=lambda r: r["time"])["machine"]["gpu"]
    fastest = fastest_dense(found, newest)
    sparse = [r | {"best": fastest[r["length"]][0] / r["ms"] if r["length"] in fastest else r["speedup"]} for r in sparse]
    sparse = [r for r in sparse if r["machine"]["gpu"] == newest]
    lengths = sorted({r["length"] for r in sparse})
    figure, axes = pyplot.subplots(1, 1 + len(lengths), figsize=(5.2 * (1 + len(lengths)), 4.6), squeeze=False, layout="constrained")
    _by_density(axes[0][0], [r for r in sparse if (r["stride"], r["pool"]) == (16, "max")])
    for axis, length in zip(axes[0][1:], lengths, strict=True):
        _by_estimate(axis, [r for r in sparse if r["length"] == length])
    widest = max(max(r["speedup"], r["bound"], r["best"]) for r in sparse)
    for axis in axes[0][1:]:
        axis.set_xlim(0, 1.25 * widest)  # room for the mass kept
    figure.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, loc="outside lower right", ncols=3)
    path = folder / "whole_op.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return [path]


def _by_density(axis: Any, found: list[Record]) -> None:
    for number, length in enumerate(sorted({record["length"] for record in found})):
        points = sorted((r["density"], r["best"], r["bound"]) for r in found if r["length"] == length)
        densities, speedups, bounds = zip(*points, strict=True)
        axis.plot(densities, speedups, marker="o", color=f"C{number}", label=f"{size(length)} tokens")
        axis.plot(densities, bounds, linestyle="--", color="grey", linewidth=1, label="bound" if number == 0 else None)
    axis.set_xscale("log", base=2)
    ticks = sorted({record["target"] for record in found})
    axis.set_xticks(ticks, [f"{density:.0%}" for density in ticks])
    axis.minorticks_off()
    axis.set(xlabel="density", ylabel="× the fastest dense kernel measured", title="max, stride 16, everything counted")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _by_estimate(axis: Any, found: list[Record]) -> None:
    counts: dict[float, int] = {}
    for record in found:
        counts[record["target"]] = counts.get(record["target"], 0) + 1
    target = max(counts, key=counts.__getitem__)  # the density that all estimates were measured at
    chosen = sorted((r for r in found if r["target"] == target), key=lambda r: r["best"])
    names = [f"{r['pool']}, stride {r['stride']}" for r in chosen]
    axis.barh(names, [r["best"] for r in chosen], color="C0", label="× the fastest dense kernel measured")
    axis.plot([r["speedup"] for r in chosen], names, "o", color="C1", markersize=4, label="× the run's fastest peer")
    axis.plot([r["bound"] for r in chosen], names, "k|", markersize=12, label="bound")
    for row, record in enumerate(chosen):
        axis.text(record["best"] - 0.2, row, f"{record['best']:.1f}", va="center", ha="right", fontsize=8, color="white")
        axis.text(0.99, row, f"{record['kept_mass']:.2f}", va="center", ha="right", fontsize=8, transform=axis.get_yaxis_transform())
    axis.set(xlabel="speed-up (right column: mass kept)")
    axis.set_title(f"{size(chosen[0]['length'])} tokens, density {target:.0%}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    print(table(records.read(sorted(options.folder.glob("*.jsonl")))))
    print(*plot(options.folder))
    return 0


if __name__ == "__main__":
    main()

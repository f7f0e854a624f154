"""Speed-up of the whole sparse call over the fastest dense one, and the bound that arithmetic sets: table, plot, and what is quoted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.answers.report import DEFAULT, FEW_LOST, lost
from benchmarks.attention import Kernels
from benchmarks.attention.report import dense_length
from benchmarks.lib.peers import NAMES
from benchmarks.lib.registry import Benchmark
from benchmarks.whole_op import WholeOp
from sparsify.commands.bench.tables import Found, Row, by_device, conditions, failure, latest, markdown, measured, size

_QUOTED = ((16, "max"), (16, "max+pair+int8"), (8, "max+pair+int8"))  # stride and pool


def table(found: Iterable[Found]) -> str:
    """One row a call, dense ones first at each length; failures stay visible. `kernels` records among `found` are compared with too."""
    found = list(found)
    return "\n\n".join(_device_table(cells, found) for cells in by_device(_cells(found)))


def _device_table(cells: list[Found], found: list[Found]) -> str:
    fastest = fastest_dense(found, cells[0]["machine"]["gpu"])
    rows = []
    for length in sorted({record["length"] for record in cells}):
        here = [record for record in cells if record["length"] == length]
        for record in (r for r in here if r["kind"] == "dense"):
            best = f"{fastest[length][0] / record['ms']:.2f}" if length in fastest and "ms" in record else "–"
            rows.append([size(length), f"dense: {NAMES.get(record['name'], record['name'])}", _milliseconds(record),
                         _over_peers(record, here), best, "1.0", "100.0%", "–", "–"])  # fmt: skip
        for record in sorted((r for r in here if r["kind"] == "sparse"), key=lambda r: (-r["stride"], r["pool"], r["target"])):
            rows.append(_sparse_row(record, fastest.get(length)))
    header = ["tokens", "call", "ms (select + attend)", "× peers of the run", "× fastest dense", "bound", "density", "mass kept"]
    header.append("scratch MiB")
    return "\n\n".join([_note(cells, fastest), markdown(header, rows)])


def _note(cells: list[Found], fastest: dict[int, tuple[float, str, str]]) -> str:
    lengths = sorted({record["length"] for record in cells})
    absent = sorted({NAMES.get(r["name"], r["name"]) for r in cells if r["kind"] == "dense" and "error" in r})
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


def _over_peers(record: Found, here: list[Found]) -> str:
    peers = [r["ms"] for r in here if r["kind"] == "dense" and "ms" in r and not r["name"].startswith("ours")]
    return f"{min(peers) / record['ms']:.2f}" if peers and "ms" in record else "–"


def _sparse_row(record: Found, fastest: tuple[float, str, str] | None) -> list[str]:
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


def _cells(found: Iterable[Found]) -> list[Found]:
    return [record for record in latest(found, WholeOp) if record["kind"] in ("dense", "sparse")]


def _milliseconds(record: Found) -> str:
    return f"{record['ms']:.2f}" if "ms" in record else failure(record.get("error", ""))


def plot(found: list[Found]) -> Any:
    """Speed-up over density, one line a length, with the bound 1 / (density + estimate share) dashed; bars by estimate at one density.

    Over the fastest dense kernel of all records on the device where there is one for the shape, else over the run's fastest peer.
    """
    from matplotlib import pyplot

    sparse = [r for r in _cells(found) if r["kind"] == "sparse" and "speedup" in r]
    if not sparse:
        return None
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
    return figure


def _by_density(axis: Any, found: list[Found]) -> None:
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


def _by_estimate(axis: Any, found: list[Found]) -> None:
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


def fastest_dense(found: Iterable[Found], gpu: str | None) -> dict[int, tuple[float, str, str]]:
    """By length, the least milliseconds that dense causal attention took in any run on `gpu`, whose kernel it was, and which run.

    Only the shape of the whole-op benchmark counts: 32 query heads, 8 KV heads, head dim 128, bf16, batch 1.
    """
    fastest: dict[int, tuple[float, str, str]] = {}
    for record in found:
        if record["machine"]["gpu"] != gpu:
            continue
        for length, name, milliseconds in _dense_times(record):
            if length not in fastest or milliseconds < fastest[length][0]:
                fastest[length] = (milliseconds, name, record["benchmark"])
    return fastest


def _dense_times(record: Found) -> Iterable[tuple[int, str, float]]:
    if record["benchmark"] == "whole_op" and record["kind"] == "dense" and "ms" in record:
        if (record["heads"], record["kv_heads"], record["head_dim"], record["dtype"]) == (32, 8, 128, "bfloat16"):
            yield record["length"], NAMES.get(record["name"], record["name"]), record["ms"]
    elif record["benchmark"] == "kernels" and record["section"] in ("table", "short"):
        length = dense_length(record["case"])
        for name in ("ours", "fa4", "cudnn", "flex"):
            # in the windowed case only the peers are dense
            if length and f"{name}_ms" in record and (name != "ours" or record["case"].startswith("dense_")):
                yield length, NAMES[name], record[f"{name}_ms"]


def _estimate(record: Found) -> tuple[str, int]:
    return record["pool"], record["stride"]


def _sparse(found: list[Found]) -> dict[int, list[Found]]:
    """Whole-op cells by length, at the density that most estimates were measured at."""
    cells = [r for r in measured(found, WholeOp) if r["kind"] == "sparse" and "ms" in r]
    by_length: dict[int, list[Found]] = {}
    for length in sorted({r["length"] for r in cells}):
        targets = [r["target"] for r in cells if r["length"] == length]
        common = max(set(targets), key=targets.count)
        by_length[length] = [r for r in cells if r["length"] == length and r["target"] == common]
    return by_length


def headlines(found: list[Found]) -> list[Row]:
    """The default estimate, and the quickest one of those that keep the exact one's answers."""
    rows = []
    keeping = {estimate for estimate, share in lost(found).items() if share <= FEW_LOST}
    for length, cells in _sparse(found).items():
        fastest = fastest_dense(found, cells[0]["machine"]["gpu"]).get(length)
        default = [r for r in cells if _estimate(r) == (DEFAULT["pool"], DEFAULT["stride"])]
        quickest = min((r for r in cells if _estimate(r) in keeping), key=lambda r: r["ms"], default=None)
        for record in {r["ms"]: r for r in (*default, quickest) if r}.values():
            if fastest is None or "speedup" not in record:
                continue
            what = f"sparse attention, estimate and selection included, {size(length)} tokens, {record['density']:.0%} of the blocks"
            estimate = f"{record['pool']}, stride {record['stride']}" + (" (default estimate)" if record in default else "")
            peer = min((ms, name) for name, ms in ((n, record["ms"] * ratio) for n, ratio in record["speedups"].items()))[1]
            beside = (
                f"{fastest[0] / record['ms']:.1f} × the fastest dense kernel measured ({fastest[1]}), "
                f"{record['speedup']:.1f} × {NAMES.get(peer, peer)} in the same run; {record['kept_mass']:.0%} of the softmax mass kept"
            )
            rows.append([what, f"{record['ms']:.1f} ms, {estimate}", beside])
    return rows


def shortfalls(found: list[Found]) -> list[str]:
    cells = latest(found, WholeOp)
    absent = sorted({(r["length"], NAMES.get(r["name"], r["name"])) for r in cells if r["kind"] == "dense" and "error" in r})
    lines = [f"The whole sparse call at {size(length)}: {name} did not run beside it." for length, name in absent]
    for length, sparse in _sparse(found).items():
        fastest = fastest_dense(found, sparse[0]["machine"]["gpu"]).get(length)
        for record in (r for r in sparse if (r["stride"], r["pool"]) in _QUOTED):
            if fastest:
                best = fastest[0] / record["ms"]
                lines.append(
                    f"The whole sparse call at {size(length)}, {record['pool']}, stride {record['stride']}, {record['density']:.1%}: "
                    f"{best:.1f} × the fastest dense kernel, {best / record['bound']:.0%} of what arithmetic allows; "
                    f"{record['select_ms']:.1f} ms of {record['ms']:.1f} are estimate and selection, and "
                    f"{1 - record['kept_mass']:.0%} of the softmax mass is lost."
                )
    timed, shares = {_estimate(r) for cells in _sparse(found).values() for r in cells}, lost(found)
    unknown = timed - shares.keys()
    if lossy := {estimate for estimate in timed - unknown if shares[estimate] > FEW_LOST}:
        names = ", ".join(f"{pool} at stride {stride}" for pool, stride in sorted(lossy))
        lines.append(f"Estimates that lose more than one answer in a hundred to the exact one of their stride: {names}.")
    if unknown:
        names = ", ".join(f"{pool} at stride {stride}" for pool, stride in sorted(unknown))
        lines.append(f"Estimates that were timed, but whose effect on the answers of long prompts is not recorded: {names}.")
    return lines


BENCHMARKS = (
    Benchmark(
        name="whole_op",
        place=1,
        measures="one layer's sparse attention as one call, estimate, selection and lists included, beside dense causal attention",
        module="benchmarks.whole_op.run",
        records=(WholeOp,),
        beside=(Kernels,),
        title="The whole sparse attention call",
        table=table,
        plots={"whole_op": plot},
        headlines=headlines,
        shortfalls=shortfalls,
    ),
)

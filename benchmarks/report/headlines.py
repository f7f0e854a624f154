"""The few lines of results that README.md and docs/benchmarks.md quote: `tables` writes them there, out of the records."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cache import report as tables_cache
from benchmarks.lib.needles import wilson
from benchmarks.lib.tables import PEERS, Record, conditions, fastest_dense, latest, markdown, size
from benchmarks.report.kernels import ffn_saved, full_read, rate_beside_dense

_DEFAULT = {"pool": "max+pair+int8", "stride": 8}  # of the method xattention
_DEFAULT_THRESHOLD = 0.95
_FEW = 0.01  # answers that an estimate may lose and still be said to keep them
_QUOTED = ((16, "max"), (16, "max+pair+int8"), (8, "max+pair+int8"))  # of the whole call: stride and pool
Row = list[str]


def table(found: list[Record]) -> str:
    """One row a result, on the device of the newest GPU record; a row whose records are absent is left out."""
    mine = _newest_gpu(found)
    parts: list[Callable[[list[Record]], list[Row]]] = [
        _whole_op,
        _prefill,
        _answers,
        _kernels,
        _decode,
        tables_cache.headlines,
        _ffn,
        _checks,
    ]
    rows = [row for part in parts for row in part(mine)]
    if not rows:
        return "No results are recorded yet."
    used = [r for r in mine if r["benchmark"] != "ffn-tilings"]
    where = "[All results](benchmarks/results/README.md), [how they were measured and what falls short](docs/benchmarks.md)."
    return "\n\n".join([markdown(["what", "measured", "beside"], rows), f"{conditions(used)} {where}"])


def shortfalls(found: list[Record]) -> str:
    """What is slower, worse or missing, as a list, on the device of the newest GPU record."""
    mine = _newest_gpu(found)
    parts: list[Callable[[list[Record]], list[str]]] = [_short_kernels, _short_whole_op, _short_prefill]
    parts += [_short_answers, _short_decode, tables_cache.shortfalls, _short_ffn]
    lines = [line for part in parts for line in part(mine)]
    return "\n".join(f"- {line}" for line in lines) or "No results are recorded yet."


def _newest_gpu(found: list[Record]) -> list[Record]:
    """Records of the GPU that was measured last."""
    newest = max((r for r in found if r["machine"]["gpu"]), key=lambda r: r["time"], default=None)
    return [r for r in found if newest and r["machine"]["gpu"] == newest["machine"]["gpu"]]


def _of(found: list[Record], benchmark: str, *keys: str) -> list[Record]:
    return [r for r in latest((r for r in found if r["benchmark"] == benchmark), *keys) if "error" not in r or "ms" in r]


def _sparse(found: list[Record]) -> dict[int, list[Record]]:
    """Whole-op cells by length, at the density that most estimates were measured at."""
    cells = [r for r in _of(found, "whole_op", "kind", "length", "name", "stride", "pool", "target") if r["kind"] == "sparse" and "ms" in r]
    by_length: dict[int, list[Record]] = {}
    for length in sorted({r["length"] for r in cells}):
        targets = [r["target"] for r in cells if r["length"] == length]
        common = max(set(targets), key=targets.count)
        by_length[length] = [r for r in cells if r["length"] == length and r["target"] == common]
    return by_length


def _estimate(record: Record) -> tuple[str, int]:
    return record["pool"], record["stride"]


def _lost(found: list[Record]) -> dict[tuple[str, int], float]:
    """For each estimate that was asked the exact one's longest prompts of its stride: the share of answers that it loses to it."""
    cells = [r for r in _of(found, "answers", "model_sha256", "method", "parameters", "length", "seeds") if r["method"] == "xattention"]
    right: dict[tuple[str, int], dict[tuple, Record]] = {}
    for record in (r for r in cells if "right" in r):
        cell = (record["model_sha256"], record["length"], record["parameters"]["threshold"], *record["seeds"])
        right.setdefault(_estimate(record["parameters"]), {})[cell] = record
    lost = {}
    for (pool, stride), mine in right.items():
        exact = right.get((pool.split("+")[0], stride), {})
        shared = [(mine[cell], exact[cell]) for cell in mine.keys() & exact.keys()]
        longest = max((one["length"] for one in exact.values()), default=None)
        if longest in {one["length"] for _, one in shared}:
            lost[pool, stride] = sum(e["right"] - m["right"] for m, e in shared) / sum(e["asked"] for _, e in shared)
    return lost


def _keeping(found: list[Record]) -> set[tuple[str, int]]:
    """Estimates that lose at most one answer in a hundred."""
    return {estimate for estimate, lost in _lost(found).items() if lost <= _FEW}


def _whole_op(found: list[Record]) -> list[Row]:
    """The default estimate, and the quickest one of those that keep the exact one's answers."""
    rows = []
    keeping = _keeping(found)
    for length, cells in _sparse(found).items():
        fastest = fastest_dense(found, cells[0]["machine"]["gpu"]).get(length)
        default = [r for r in cells if _estimate(r) == tuple(_DEFAULT.values())]
        quickest = min((r for r in cells if _estimate(r) in keeping), key=lambda r: r["ms"], default=None)
        for record in {r["ms"]: r for r in (*default, quickest) if r}.values():
            if fastest is None or "speedup" not in record:
                continue
            what = f"sparse attention, estimate and selection included, {size(length)} tokens, {record['density']:.0%} of the blocks"
            estimate = f"{record['pool']}, stride {record['stride']}" + (" (default estimate)" if record in default else "")
            peer = min((ms, name) for name, ms in ((n, record["ms"] * ratio) for n, ratio in record["speedups"].items()))[1]
            beside = (
                f"{fastest[0] / record['ms']:.1f} × the fastest dense kernel measured ({fastest[1]}), "
                f"{record['speedup']:.1f} × {PEERS.get(peer, peer)} in the same run; {record['kept_mass']:.0%} of the softmax mass kept"
            )
            rows.append([what, f"{record['ms']:.1f} ms, {estimate}", beside])
    return rows


def _prefill(found: list[Record]) -> list[Row]:
    cells = [r for r in _of(found, "prefill", "shape", "layers", "variant", "length", "requested_density") if "ms" in r]
    if not cells:
        return []
    longest = max(r["length"] for r in cells)
    eager = [r["ms"] for r in cells if r["length"] == longest and r["variant"] == "eager"]
    rows = []
    for record in sorted((r for r in cells if r["length"] == longest and r["variant"] in ("dense", "xattention")), key=lambda r: -r["ms"]):
        how = "exact" if record["variant"] == "dense" else f"{record['density']:.0%} of the blocks"
        beside = f"{eager[0] / record['ms']:.2f} × eager" if eager else "–"
        rows.append(
            [f"prefill of an {record['shape'].upper()} shape, {size(longest)} tokens, {how}", f"{record['ms'] / 1e3:.2f} s", beside]
        )
    return rows


def _answer_cells(found: list[Record]) -> tuple[Record | None, Record | None]:
    """Eager's and the default estimate's needles at the longest length both have."""
    cells = [r for r in _of(found, "answers", "model_sha256", "method", "parameters", "length") if "right" in r]
    default = [r for r in cells if r["method"] == "xattention" and r["parameters"] == {**_DEFAULT, "threshold": _DEFAULT_THRESHOLD}]
    for record in sorted(default, key=lambda r: -r["length"]):
        eager = [r for r in cells if r["method"] == "eager" and all(r[k] == record[k] for k in ("length", "model_sha256", "seeds"))]
        if eager:
            return eager[0], record
    return None, None


def _share(record: Record) -> str:
    low, high = wilson(record["right"], record["asked"])
    return f"{record['right']} of {record['asked']} [{low:.0%}, {high:.0%}]"


def _answers(found: list[Record]) -> list[Row]:
    eager, default = _answer_cells(found)
    if eager is None or default is None:
        return []
    what = f"needles answered in {size(default['length'])} bytes, small model, default settings, {default['density']:.0%} of the blocks"
    return [[what, _share(default), f"eager: {_share(eager)}"]]


def _kernels(found: list[Record]) -> list[Row]:
    cells = [r for r in _of(found, "kernels", "section", "case") if r["section"] == "table" and "ours_ms" in r]
    rows = []
    for record in cells:
        if record["case"] in ("dense_128k", "sink_window_128k") and "ratio" in record:
            dense = record["case"] == "dense_128k"
            what = "dense causal attention, 128K tokens" if dense else "sinks and window by token, 4 + 4096 of 128K"
            against = "the fastest peer" if dense else "the fastest dense peer"
            rows.append([what, f"{record['ours_ms']:.1f} ms, {record['ours_tflops']} TFLOP/s", f"{record['ratio']:.2f} × {against}"])
    return rows


def _decode(found: list[Record]) -> list[Row]:
    cells = _of(found, "decode_kernel", "variant", "batch", "length", "share", "tiling")
    rows = []
    for record in (r for r in cells if r["variant"] == "sparsify" and r["share"] == 1 and not r.get("tiling")):
        same = [r for r in cells if (r["batch"], r["length"], r["share"]) == (record["batch"], record["length"], 1) and r is not record]
        beside = ", ".join(f"{PEERS.get(r['variant'], r['variant'])} {r['gb_per_s']:.0f}" for r in same if r["variant"] != "sparsify")
        what = f"decode over a cache of {size(record['length'])} tokens, one layer"
        rows.append([what, f"{record['gb_per_s']:.0f} GB/s", beside or "–"])
    return rows


def _ffn(found: list[Record]) -> list[Row]:
    cells = _of(found, "ffn-stack", "variant", "rows", "share", "pattern") + _of(found, "ffn-model", "variant", "rows", "share", "pattern")
    rows = []
    for record in (r for r in cells if (r["rows"], r["share"], r["variant"]) == (1, 0.25, "sparsify")):
        inductor = [r["ms"] for r in cells if (r["benchmark"], r["rows"], r["variant"]) == (record["benchmark"], 1, "inductor")]
        saved = ffn_saved(cells, record)
        what = "feed-forward blocks alone" if record["benchmark"] == "ffn-stack" else "a whole model's token"
        beside = f"Inductor, nothing skipped: {inductor[0]:.2f} ms" if inductor else "–"
        beside += f"; {saved:.0%} of the skipped weights' time saved" if saved is not None else ""
        rows.append([f"decode, {what}, a quarter skipped, batch 1", f"{record['ms']:.2f} ms", beside])
    return rows


def _checks(found: list[Record]) -> list[Row]:
    checks = [r for r in latest((r for r in found if r["benchmark"] == "kernels"), "section", "case") if r["section"] == "check"]
    passed = sum(bool(r.get("ok")) for r in checks)
    commits = ", ".join(sorted({str(r["machine"].get("commit") or "unknown")[:10] for r in checks}))
    return (
        [["Hopper attention kernel against the reference", f"{passed} of {len(checks)} checks passed", f"commit {commits}"]]
        if checks
        else []
    )


def _short_kernels(found: list[Record]) -> list[str]:
    kernels = [r for r in found if r["benchmark"] == "kernels"]
    lines = []
    for record, ours, dense in rate_beside_dense(kernels):
        lines.append(
            f"Block-sparse attention, `{record['case']}` ({record['density']:.1%} of the blocks): {ours} TFLOP/s, {ours / dense:.0%} of "
            f"the rate of the fastest dense kernel ({dense})." + ("" if "ratio" in record else " No block-sparse peer ran beside it.")
        )
    for record in latest(kernels, "section", "case"):
        if record.get("ratio", 1) < 1:
            lines.append(f"`{record['case']}`: the fastest peer needs {record['ratio']:.1%} of sparsify's time.")
        if record["case"].startswith("sink_window") and "ours_tflops" in record and "fa4_tflops" in record:
            lines.append(
                f"`{record['case']}`: {record['ratio']:.1f} × the fastest dense peer, at {record['ours_tflops']} TFLOP/s over visible "
                f"pairs where FlashAttention-4's dense kernel reaches {record['fa4_tflops']}."
            )
    return lines


def _short_whole_op(found: list[Record]) -> list[str]:
    cells = latest((r for r in found if r["benchmark"] == "whole_op"), "kind", "length", "name", "stride", "pool", "target")
    absent = sorted({(r["length"], PEERS.get(r["name"], r["name"])) for r in cells if r["kind"] == "dense" and "error" in r})
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
    timed, lost = {_estimate(r) for cells in _sparse(found).values() for r in cells}, _lost(found)
    unknown = timed - lost.keys()
    if lossy := {estimate for estimate in timed - unknown if lost[estimate] > _FEW}:
        names = ", ".join(f"{pool} at stride {stride}" for pool, stride in sorted(lossy))
        lines.append(f"Estimates that lose more than one answer in a hundred to the exact one of their stride: {names}.")
    if unknown:
        names = ", ".join(f"{pool} at stride {stride}" for pool, stride in sorted(unknown))
        lines.append(f"Estimates that were timed, but whose effect on the answers of long prompts is not recorded: {names}.")
    return lines


def _short_prefill(found: list[Record]) -> list[str]:
    cells = _of(found, "prefill", "shape", "layers", "variant", "length", "requested_density")
    if not cells:
        return []
    lines = [] if any(r["variant"] == "inductor" for r in cells) else ["Prefill: plain Inductor was not timed."]
    for record in cells:
        if record["variant"] == "dense" and not record["same_token"]:
            lines.append(
                f"Prefill, exact, {size(record['length'])}: the likeliest token differs from eager's on random weights; the largest "
                f"difference of a logit is {record['logits_error'] / record['logits_std']:.2f} standard deviations."
            )
    return lines


def _short_answers(found: list[Record]) -> list[str]:
    eager, default = _answer_cells(found)
    if eager is None or default is None or default["right"] >= eager["right"]:
        return []
    return [f"Answers at {size(default['length'])} bytes: {_share(default)} with the default settings, {_share(eager)} eager."]


def _short_decode(found: list[Record]) -> list[str]:
    cells = _of(found, "decode_kernel", "variant", "batch", "length", "share", "tiling")
    lines = []
    for record in sorted((r for r in cells if r["share"] < 1), key=lambda r: (r["length"], -r["share"])):
        full = full_read(cells, record)
        if full and record["ms"] / full > 1.5 * record["share"]:
            lines.append(
                f"Decode over {record['share']:.0%} of {size(record['length'])} slots takes {record['ms']:.3f} ms, "
                f"{record['ms'] / full:.0%} of a full read and not {record['share']:.0%}."
            )
    return lines


def _short_ffn(found: list[Record]) -> list[str]:
    cells = _of(found, "ffn-stack", "variant", "rows", "share", "pattern")
    whole = any(r["benchmark"] == "ffn-model" for r in found)
    lines = ["Feed-forward skipping in a whole model is not recorded."] if cells and not whole else []
    for record in cells:
        saved = ffn_saved(cells, record)
        if saved is not None and saved < 0.5 and record["share"] == 0.25:
            lines.append(
                f"Feed-forward skipping, {record['rows']} rows, {record['pattern']}, {record['share']:.0%} skipped: {saved:.0%} of the "
                "skipped weights' time is saved."
            )
    return lines

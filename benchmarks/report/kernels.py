"""Tables of attention kernels, decode and feed-forward skipping. `benchmarks.report.tables` puts them on the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.lib.tables import PEERS, QUALITY_KEYS, Record, conditions, dense_length, failure, groups, latest, markdown, size

_RIVALS = ("fa4", "cudnn", "flex")
_SECTIONS = {"table": "Long prompts", "short": "Short prompts", "dims": "Other head dims and fp16"}


def kernels(found: Iterable[Record]) -> str:
    """Checks as a count, milliseconds and TFLOP/s beside the peers, and the kernel's variants."""
    parts = []
    for group in groups(latest(found, "section", "case"), lambda r: r["machine"]["gpu"] or "CPU"):
        by_section = {name: [r for r in group if r["section"] == name] for name in ("check", *_SECTIONS, "tune")}
        if by_section["check"]:
            parts.append(checks(by_section["check"]))
        for name, title in _SECTIONS.items():
            if by_section[name]:
                parts += [f"### {title}", _kernel_note(by_section[name]), _kernel_rows(by_section[name])]
        if by_section["tune"]:
            parts += ["### Variants of the kernel", "TFLOP/s, fastest first. " + conditions(by_section["tune"])]
            parts.append(markdown(["case", "variants"], [[f"`{r['case']}`", _variants(r)] for r in by_section["tune"]]))
    return "\n\n".join(parts)


def checks(found: Sequence[Record]) -> str:
    """`n of m checks passed`, and every one that did not by name."""
    passed = [record for record in found if record.get("ok")]
    errors = [record["error"] for record in passed if isinstance(record.get("error"), float)]
    text = f"{len(passed)} of {len(found)} checks passed"
    unserved = sum(record.get("served") is False for record in found)
    text += f", {unserved} of them calls that the kernel leaves to another one" if unserved else ""
    text += f"; largest relative error of an output {max(errors):.1e}" if errors else ""
    lines = [f"{text}. {conditions(found)}"]
    for record in found:
        if not record.get("ok"):
            lines.append(f"- `{record['case']}`: {failure(str(record.get('problems') or record.get('error')))}")
    return "\n".join(lines)


def _kernel_note(found: Sequence[Record]) -> str:
    return (
        "Milliseconds (TFLOP/s over visited blocks). Ratio: the fastest peer's time over sparsify's, in one process; over 1, sparsify is "
        "faster. In `sink_window` the peers do dense causal attention, which is what a model without sparsify runs. " + conditions(found)
    )


def _kernel_rows(found: Sequence[Record]) -> str:
    rows = []
    for record in found:
        if "error" in record:
            rows.append([f"`{record['case']}`", "–", failure(record["error"]), *["–"] * (len(_RIVALS) + 1)])
            continue
        density = f"{record['density']:.1%}" if "density" in record else "dense"
        density = "sinks, window" if record["case"].startswith("sink_window") else density
        times = [_kernel_cell(record, name) for name in ("ours", *_RIVALS)]
        rows.append([f"`{record['case']}`", density, *times, f"{record['ratio']:.2f}" if "ratio" in record else "no peer ran"])
    return markdown(["case", "blocks", *(PEERS[name] for name in ("ours", *_RIVALS)), "ratio"], rows)


def _kernel_cell(record: Record, name: str) -> str:
    if f"{name}_ms" in record:
        return f"{record[f'{name}_ms']:.2f} ({record[f'{name}_tflops']})"
    return failure(record[f"{name}_absent"]) if f"{name}_absent" in record else "–"


def _variants(record: Record) -> str:
    if "error" in record:
        return failure(record["error"])
    rates = {key.removesuffix("_tflops"): value for key, value in record.items() if key.endswith("_tflops")}
    return ", ".join(f"{name} {rates[name]}" for name in sorted(rates, key=rates.__getitem__, reverse=True))


def rate_beside_dense(found: Iterable[Record]) -> list[tuple[Record, float, float]]:
    """Each block-sparse record of the kernels' table, its TFLOP/s, and those of the fastest dense kernel at the longest length."""
    cells = [r for r in latest(found, "section", "case") if r["section"] == "table" and "error" not in r]
    lengths = [dense_length(r["case"]) for r in cells if r["case"].startswith("dense_")]
    longest = max(filter(None, lengths), default=None)
    dense = [r[f"{n}_tflops"] for r in cells if dense_length(r["case"]) == longest and longest for n in _RIVALS if f"{n}_tflops" in r]
    return [(r, r["ours_tflops"], max(dense)) for r in cells if "density" in r and "ours_tflops" in r] if dense else []


def decode(found: Iterable[Record]) -> str:
    """The kernel's bandwidth beside SDPA's."""
    parts = []
    for group in groups(found, lambda r: r["machine"]["gpu"] or "CPU"):
        parts += ["### One layer's attention over kept keys", *_decode_kernel(group)]
    return "\n\n".join(parts)


def _decode_kernel(found: list[Record]) -> list[str]:
    cells = latest(found, "variant", "batch", "length", "share", "tiling")
    copies = sorted({round(r["gb_per_s"] / r["share_of_copy"]) for r in cells if r.get("share_of_copy")})
    rows = []
    for record in sorted(cells, key=lambda r: (r["length"], r["batch"], -r["share"], r["ms"])):
        full = full_read(cells, record)
        name = PEERS.get(record["variant"], record["variant"]) + (f" {record['tiling']}" if record.get("tiling") else "")
        error = f"{record['error']:.1e}" if "error" in record else "–"
        rows.append([size(record["length"]), str(record["batch"]), name, f"{record['share']:.0%}", f"{record['ms']:.3f}",
                     f"{record['gb_per_s']:.0f}", f"{record['ms'] / full:.2f}" if full else "–", error])  # fmt: skip
    note = (
        "GB/s count the kept keys and values. Over full: milliseconds over those of the fastest call that reads everything; a share that "
        f"cost what it reads would have its share there. A copy in the same run moved {', '.join(map(str, copies))} GB/s, reads and writes "
        f"together: reads alone are faster, so this is no ceiling. {conditions(cells)}"
    )
    return [note, markdown(["tokens", "batch", "call", "kept", "ms", "GB/s", "over full", "largest error"], rows)]


def full_read(cells: Iterable[Record], record: Record) -> float | None:
    """Milliseconds of the fastest decode call of the record's shape that reads every key."""
    same = [r["ms"] for r in cells if (r["length"], r["batch"], r["share"]) == (record["length"], record["batch"], 1.0)]
    return min(same, default=None)


def ffn(found: Iterable[Record]) -> str:
    """Milliseconds by skipped share beside Inductor's and beside what the weights' bytes allow; answers and NLL; the tilings' best."""
    found = list(found)
    parts = []
    for name, title in (("ffn-model", "A whole model"), ("ffn-stack", "32 blocks alone")):
        for group in groups((r for r in found if r["benchmark"] == name), lambda r: r["machine"]["gpu"] or "CPU"):
            stacks = latest((r for r in found if r["benchmark"] == "ffn-stack"), "variant", "rows", "share", "pattern")
            parts += [f"### {title}", *_ffn_times(group, stacks)]
    for group in groups((r for r in found if r["benchmark"] == "ffn-prefill"), lambda r: r["machine"]["gpu"] or "CPU"):
        parts += ["### One block over a prompt", *_ffn_prefill(group)]
    for group in groups((r for r in found if r["benchmark"] == "ffn-quality"), lambda r: (r["model_sha256"], r["machine"]["gpu"] or "CPU")):
        parts += ["### Answers and NLL", *_ffn_quality(group)]
    return "\n\n".join(parts)


def ffn_saved(cells: Iterable[Record], record: Record) -> float | None:
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


def _ffn_times(found: list[Record], stacks: list[Record]) -> list[str]:
    cells = latest(found, "variant", "rows", "share", "pattern")
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


def _ffn_prefill(found: list[Record]) -> list[str]:
    cells = latest(found, "variant", "rows", "share")
    rows = []
    for record in sorted(cells, key=lambda r: (r["rows"], r["variant"], r["share"])):
        name = "Inductor, dense" if record["variant"] == "inductor" else "sparsify, compacted"
        error = f"{record['error']:.1e}" if "error" in record else "–"
        rows.append([size(record["rows"]), name, f"{record['share']:.0%}", f"{record['ms']:.3f}", f"{record['over_dense']:.2f}",
                     f"{record['tflops']:.0f}", error])  # fmt: skip
    note = "Rows that skip are random; TFLOP/s count the computed rows. " + conditions(cells)
    return [note, markdown(["rows", "call", "skipped", "ms", "÷ Inductor", "TFLOP/s", "largest error"], rows)]


def _ffn_quality(found: list[Record]) -> list[str]:
    cells = latest(found, *QUALITY_KEYS)
    named: dict[tuple[str, str], list[Record]] = {}
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


def sanitize(found: Iterable[Record]) -> str:
    """What compute-sanitizer said of each kernel family."""
    cells = latest(found, "family", "tool")
    rows = [[record["family"], str(record["tool"] or "none"), record["status"]] for record in cells]
    return conditions(cells) + "\n\n" + markdown(["kernels", "tool", "status"], sorted(rows))

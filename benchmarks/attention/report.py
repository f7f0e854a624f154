"""The attention kernels: table, plot, and what other texts quote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.attention import Kernels
from benchmarks.lib.peers import NAMES
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, Row, by_device, conditions, failure, kind, latest, markdown, measured, newest_device

_RIVALS = ("fa4", "cudnn", "flex")
_SECTIONS = {"table": "Long prompts", "short": "Short prompts", "dims": "Other head dims and fp16"}


def table(found: Iterable[Found]) -> str:
    """Checks as a count, milliseconds and TFLOP/s beside the peers, and the kernel's variants."""
    parts = []
    for group in by_device(latest(found, Kernels)):
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


def checks(found: Sequence[Found]) -> str:
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


def _kernel_note(found: Sequence[Found]) -> str:
    return (
        "Milliseconds (TFLOP/s over visited blocks). Ratio: the fastest peer's time over sparsify's, in one process; over 1, sparsify is "
        "faster. In `sink_window` the peers do dense causal attention, which is what a model without sparsify runs. " + conditions(found)
    )


def _kernel_rows(found: Sequence[Found]) -> str:
    rows = []
    for record in found:
        if "error" in record:
            rows.append([f"`{record['case']}`", "–", failure(record["error"]), *["–"] * (len(_RIVALS) + 1)])
            continue
        density = f"{record['density']:.1%}" if "density" in record else "dense"
        density = "sinks, window" if record["case"].startswith("sink_window") else density
        times = [_kernel_cell(record, name) for name in ("ours", *_RIVALS)]
        rows.append([f"`{record['case']}`", density, *times, f"{record['ratio']:.2f}" if "ratio" in record else "no peer ran"])
    return markdown(["case", "blocks", *(NAMES[name] for name in ("ours", *_RIVALS)), "ratio"], rows)


def _kernel_cell(record: Found, name: str) -> str:
    if f"{name}_ms" in record:
        return f"{record[f'{name}_ms']:.2f} ({record[f'{name}_tflops']})"
    return failure(record[f"{name}_absent"]) if f"{name}_absent" in record else "–"


def _variants(record: Found) -> str:
    if "error" in record:
        return failure(record["error"])
    rates = {key.removesuffix("_tflops"): value for key, value in record.items() if key.endswith("_tflops")}
    return ", ".join(f"{name} {rates[name]}" for name in sorted(rates, key=rates.__getitem__, reverse=True))


def rate_beside_dense(found: Iterable[Found]) -> list[tuple[Found, float, float]]:
    """Each block-sparse record of the kernels' table, its TFLOP/s, and those of the fastest dense kernel at the longest length."""
    cells = [r for r in latest(found, Kernels) if r["section"] == "table" and "error" not in r]
    lengths = [dense_length(r["case"]) for r in cells if r["case"].startswith("dense_")]
    longest = max(filter(None, lengths), default=None)
    dense = [r[f"{n}_tflops"] for r in cells if dense_length(r["case"]) == longest and longest for n in _RIVALS if f"{n}_tflops" in r]
    return [(r, r["ours_tflops"], max(dense)) for r in cells if "density" in r and "ours_tflops" in r] if dense else []


def dense_length(case: str) -> int | None:
    """Tokens of a kernels case whose peers are dense causal attention over a whole prompt: dense_64k, sink_window_128k; else None."""
    name, _, kilo = case.rpartition("_")
    return int(kilo[:-1]) * 1024 if name in ("dense", "sink_window") and kilo.endswith("k") and kilo[:-1].isdigit() else None


def plot(found: list[Found]) -> Any:
    """TFLOP/s over visited blocks of each timed case, sparsify beside its peers; a case without a peer shows sparsify alone."""
    from matplotlib import pyplot

    cells = latest(newest_device(kind(found, Kernels)), Kernels)
    cells = [r for r in cells if r["section"] in _SECTIONS and "ours_tflops" in r]
    if not cells:
        return None
    names = [name for name in ("ours", "fa4", "cudnn", "flex") if any(f"{name}_tflops" in r for r in cells)]
    figure, axis = pyplot.subplots(figsize=(max(6, 1.35 * len(cells)), 4.2), layout="constrained")
    width = 0.8 / len(names)
    shown = [[name for name in names if f"{name}_tflops" in record] for record in cells]
    for name in names:
        at = [(row, row + (mine.index(name) - (len(mine) - 1) / 2) * width) for row, mine in enumerate(shown) if name in mine]
        bars = [(place, cells[row][f"{name}_tflops"]) for row, place in at]
        drawn = axis.bar(*zip(*bars, strict=True), width=width, label=NAMES[name])
        axis.bar_label(drawn, fontsize=8)
    for row, mine in enumerate(shown):
        if mine == ["ours"]:
            axis.text(row, 30, "no peer ran", ha="center", fontsize=7, color="white", rotation=90)
    axis.set_xticks(range(len(cells)), [_title(record) for record in cells], fontsize=8)
    axis.set_ylabel("TFLOP/s over visited blocks")
    axis.set_ylim(0, 1.2 * axis.dataLim.y1)
    axis.legend(fontsize=8, ncols=len(names), loc="upper right")
    return figure


def _title(record: Found) -> str:
    if record["case"].startswith("sink_window"):
        return f"sinks + window {record['case'].rpartition('_')[2]}\n(peers: dense)"
    words = record["case"].split("_")
    if "density" in record:  # the exact one instead of the one asked for
        words = [word for word in words if not word.startswith(".")] + [f"{record['density']:.1%}"]
    return words[0] + "\n" + " ".join(words[1:])


def headlines(found: list[Found]) -> list[Row]:
    cells = [r for r in measured(found, Kernels) if r["section"] == "table" and "ours_ms" in r]
    rows = []
    for record in cells:
        if record["case"] in ("dense_128k", "sink_window_128k") and "ratio" in record:
            dense = record["case"] == "dense_128k"
            what = "dense causal attention, 128K tokens" if dense else "sinks and window by token, 4 + 4096 of 128K"
            against = "the fastest peer" if dense else "the fastest dense peer"
            rows.append([what, f"{record['ours_ms']:.1f} ms, {record['ours_tflops']} TFLOP/s", f"{record['ratio']:.2f} × {against}"])
    checks = [r for r in latest(found, Kernels) if r["section"] == "check"]
    passed = sum(bool(r.get("ok")) for r in checks)
    commits = ", ".join(sorted({str(r["machine"].get("commit") or "unknown")[:10] for r in checks}))
    if checks:
        rows.append(["Hopper attention kernel against the reference", f"{passed} of {len(checks)} checks passed", f"commit {commits}"])
    return rows


def shortfalls(found: list[Found]) -> list[str]:
    lines = []
    for record, ours, dense in rate_beside_dense(found):
        lines.append(
            f"Block-sparse attention, `{record['case']}` ({record['density']:.1%} of the blocks): {ours} TFLOP/s, {ours / dense:.0%} of "
            f"the rate of the fastest dense kernel ({dense})." + ("" if "ratio" in record else " No block-sparse peer ran beside it.")
        )
    for record in latest(found, Kernels):
        if record.get("ratio", 1) < 1:
            lines.append(f"`{record['case']}`: the fastest peer needs {record['ratio']:.1%} of sparsify's time.")
        if record["case"].startswith("sink_window") and "ours_tflops" in record and "fa4_tflops" in record:
            lines.append(
                f"`{record['case']}`: {record['ratio']:.1f} × the fastest dense peer, at {record['ours_tflops']} TFLOP/s over visible "
                f"pairs where FlashAttention-4's dense kernel reaches {record['fa4_tflops']}."
            )
    return lines


BENCHMARKS = (
    Benchmark(
        name="attention",
        place=4,
        measures="the Hopper attention kernel, beside FlashAttention-4, cuDNN and FlexAttention",
        module="benchmarks.attention.run",
        records=(Kernels,),
        title="Attention kernels",
        table=table,
        plots={"kernels": plot},
        headlines=headlines,
        shortfalls=shortfalls,
    ),
)

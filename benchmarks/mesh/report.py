"""The table of several GPUs, and what other texts quote."""

from __future__ import annotations

from benchmarks.lib.registry import Benchmark
from benchmarks.mesh import Mesh
from sparsify.commands.bench.tables import Found, Row, conditions, failure, groups, latest, markdown, measured, size

_WHAT = {
    "prefill": "prompt",
    "ring": "one layer's dense attention",
    "sums": "one sum of the tokens' rows",
    "decode": "a token, every key kept",
}


def table(found: list[Found]) -> str:
    parts = []
    for group in groups(latest(found, Mesh), lambda r: (r["shape"], r["layers"], r["machine"]["gpu"] or "CPU")):
        rows = []
        for one in sorted(group, key=lambda r: (list(_WHAT).index(r["part"]), r["length"], r.get("requested_density") or 1, r["gpus"])):
            name = f"{_WHAT[one['part']]}, {one['variant']}"
            if one.get("requested_density"):
                name += f", {one['requested_density']:.0%} of the blocks"
            if "error" in one:
                rows.append([size(one["length"]), name, str(one["gpus"]), failure(one["error"]), "–", "–", "–"])
                continue
            base = _alone(group, one)
            ratio = f"{base['ms'] / one['ms']:.2f}" if base else "–"
            bytes_sent = sum((one.get("sent_bytes") or {}).values())
            sent = f"{bytes_sent / 2**30:.2f}" if bytes_sent else "–"
            if one.get("ring_bytes"):
                sent += f" ({bytes_sent / one['ring_bytes']:.2f})"
            peak = f"{one['peak_bytes'] / 2**30:.1f}" if one.get("peak_bytes") else "–"
            rows.append([size(one["length"]), name, str(one["gpus"]), f"{one['ms']:.{3 if one['ms'] < 1 else 1}f}", ratio, sent, peak])
        header = ["tokens", "what", "GPUs", "ms", "× one GPU", "GiB sent by all (× a dense ring)", "peak GiB of one"]
        head = f"### {group[0]['shape']} shape, {group[0]['layers']} layers\n\nThe slowest process counts. {conditions(group)}"
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def _alone(group: list[Found], one: Found) -> Found | None:
    """What one GPU takes for the same."""
    same = ("part", "length", "requested_density")
    kind = lambda r: r["variant"].partition(", ")[0]  # how sums are made is no difference on one GPU
    alone = (r for r in group if r["gpus"] == 1 and "ms" in r and one["gpus"] > 1 and kind(r) == kind(one))
    return next((r for r in alone if all(r.get(name) == one.get(name) for name in same)), None)


def headlines(found: list[Found]) -> list[Row]:
    cells = [r for r in measured(found, Mesh) if "ms" in r and r["shape"] == "8b"]
    rows = []
    for one in (r for r in cells if r["gpus"] > 1):
        base = _alone(cells, one)
        if one["part"] == "prefill" and base:
            how = f"{one['requested_density']:.0%} of the blocks" if one.get("requested_density") else "exact"
            what = f"prefill of an 8B shape shared by {one['gpus']} GPUs, {size(one['length'])} tokens, {how}"
            rows.append([what, f"{one['ms'] / 1e3:.2f} s", f"{base['ms'] / one['ms']:.2f} × one GPU"])
        if one["part"] == "decode" and base:
            how = one["variant"].partition(", ")[2]
            what = f"a token of an 8B model on {one['gpus']} GPUs by tensor parallelism, after {size(one['length'])}{how and f', {how}'}"
            rows.append([what, f"{one['ms']:.1f} ms", f"{one['ms'] / base['ms']:.2f} of one GPU's time"])
        if one["part"] == "ring" and one["variant"] == "sparsify":
            torchs = [r for r in cells if r["part"] == "ring" and r["variant"] != "sparsify" and r["length"] == one["length"]]
            beside = f"{torchs[0]['ms'] / one['ms']:.2f} × torch's context parallelism" if torchs else "–"
            rows.append([f"dense attention around a ring of {one['gpus']}, {size(one['length'])} tokens", f"{one['ms']:.1f} ms", beside])
    return rows


BENCHMARKS = (
    Benchmark(
        name="mesh",
        place=16,
        measures="several GPUs: prompts shared by context parallelism, dense attention around a ring, decoding by tensor parallelism, sums",
        module="benchmarks.mesh.run",
        records=(Mesh,),
        title="Several GPUs",
        table=table,
        headlines=headlines,
    ),
)

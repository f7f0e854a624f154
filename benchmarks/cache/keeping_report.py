"""Tables of prompts that are kept: files, clusters, and what memory holds beside what was promised."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cache import CacheKeeping, CacheMemory
from benchmarks.lib.registry import Benchmark
from benchmarks.model import Prefill
from sparsify.commands.bench.tables import Found, Row, by_device, conditions, kind, latest, markdown, size

KEPT = 1.05  # goal: of the promised bytes
NEAR = 1.5  # goal: of the time that the file or the bus takes, whichever is slower
_GIB = 2**30
_EXACT = "dense"  # of the prefill records
_WHAT = {"save": "to a file", "load": "from a file", "prepare": "clusters of it"}


def recomputed(found: Iterable[Found], record: Found) -> float | None:
    """Seconds of the fastest recorded exact prefill of the record's prompt."""
    same = (record["shape"], record["layers"], record["length"])
    mine = [r for r in kind(found, Prefill) if "ms" in r and r["variant"] == _EXACT and (r["shape"], r["layers"], r["length"]) == same]
    return min((r["ms"] / 1e3 for r in mine), default=None)


def bound(record: Found) -> float | None:
    """Seconds that the file or the bus takes for as many bytes, whichever is slower."""
    return max((record[name] for name in ("file_seconds", "bus_seconds") if record.get(name)), default=None)


def table(found: Iterable[Found]) -> str:
    found = list(found)
    parts: list[str] = []
    for group in by_device(kind(found, CacheKeeping)):
        beside = [r for r in found if r["machine"]["gpu"] == group[0]["machine"]["gpu"]]
        parts += ["### A prompt in a file, and in clusters", *_keeping(group, beside)]
    for group in by_device(kind(found, CacheMemory)):
        parts += ["### Memory kept beside what is promised", *_memory(group)]
    return "\n\n".join(parts)


def _keeping(found: list[Found], beside: list[Found]) -> list[str]:
    cells = latest(found, CacheKeeping)
    rows: list[Row] = []
    seconds = lambda number: "–" if number is None else f"{number:.2f}"
    for r in sorted(cells, key=lambda r: (r["shape"], r["length"], -r["bytes"], r["variant"], r["operation"] != "save")):
        again = recomputed(beside, r)
        share = f"{r['seconds'] / again:.0%} of {again:.1f} s" if again else "–"
        peak = "–" if r.get("peak_bytes") is None else f"{r['peak_bytes'] / _GIB:.2f}"
        rate = f"{r['bytes'] / r['seconds'] / 1e9:.1f}"
        what = f"{r['variant']}, {_WHAT[r['operation']]}"
        rows.append([r["shape"], size(r["length"]), what, f"{r['bytes'] / _GIB:.2f}", seconds(r["seconds"]), rate,
                     seconds(r.get("file_seconds")), seconds(r.get("bus_seconds")), share, peak])  # fmt: skip
    note = (
        "`SparseCache.save` and `load`, and `prepare`. File: as many bytes between the host's memory and a file in the same folder, in as "
        "many threads; what was just written lies in the system's memory, here and there. Bus: between pinned memory and the device. Of "
        "computing it again: of the fastest exact prefill of the prompt on record. Peak: device memory beside the cache itself. "
        f"{conditions(cells)}"
    )
    header = ["shape", "tokens", "cache", "GiB", "s", "GB/s", "file, s", "bus, s", "of computing it again", "peak, GiB"]
    return [note, markdown(header, rows)]


def _memory(found: list[Found]) -> list[str]:
    cells = latest(found, CacheMemory)
    mib = lambda count: "–" if count is None else f"{count / 2**20:.2f}"
    rows = [
        [r["variant"], size(r["slots"]), mib(r["promised_bytes"]), mib(r["kept_bytes"]), f"{r['kept_bytes'] / r['promised_bytes']:.3f}",
         mib(r.get("device_bytes"))]
        for r in sorted(cells, key=lambda r: r["variant"])
    ]  # fmt: skip
    first = cells[0]
    note = (
        f"All buffers of {first['layers']} layers of the shape {first['shape']} after a prompt of {size(first['length'])} tokens, beside "
        "the keys and values of as many tokens a head as the budget and `every` allow; of codes with their scales and the newest tokens as "
        f"they came, of pages with their bounds. Allocator: what it has given out for the cache. {conditions(cells)}"
    )
    return [note, markdown(["policy", "tokens", "promised, MiB", "kept, MiB", "kept ÷ promised", "allocator, MiB"], rows)]


def headlines(found: list[Found]) -> list[Row]:
    """Rows of (what, measured, beside)."""
    rows: list[Row] = []
    for r in sorted(latest(found, CacheKeeping), key=lambda r: (-r["bytes"], r["variant"], r["operation"] != "save")):
        again = recomputed(found, r)
        if r["shape"] == "8b" and r["operation"] != "prepare" and again:
            what = f"a prompt of {size(r['length'])} tokens {_WHAT[r['operation']]}, 8B shape, {r['variant']}"
            rows.append([what, f"{r['seconds']:.2f} s, {r['bytes'] / _GIB:.1f} GiB", f"computing it again, exact: {again:.1f} s"])
    return rows


def shortfalls(found: list[Found]) -> list[str]:
    """Goals that the latest records miss."""
    lines = []
    for r in sorted(latest(found, CacheKeeping), key=lambda r: (-r["bytes"], r["variant"], r["operation"] != "save")):
        limit = bound(r)
        if r["operation"] != "prepare" and limit and r["seconds"] > NEAR * limit:
            what = f"{size(r['length'])} tokens {_WHAT[r['operation']]} ({r['variant']})"
            lines.append(f"{what} take {r['seconds']:.2f} s, {r['seconds'] / limit:.1f} × the time of the file or the bus.")
    for r in sorted(latest(found, CacheMemory), key=lambda r: r["variant"]):
        if r["kept_bytes"] > KEPT * r["promised_bytes"]:
            over = r["kept_bytes"] / r["promised_bytes"]
            lines.append(f"A cache under {r['variant']} of {r['slots']} tokens takes {over:.3f} times their bytes.")
    return lines


KEEPING = Benchmark(
    name="keeping",
    place=18,
    measures="a prompt's cache to a file and back, beside the file's and the bus' time; clusters of it; memory beside what is promised",
    module="benchmarks.cache.keeping",
    records=(CacheKeeping, CacheMemory),
    beside=(Prefill,),
    title="A prompt that is kept",
    table=table,
    headlines=headlines,
    shortfalls=shortfalls,
)

"""What docs/cache.md quotes of the records: answers by policy, a token's attention that reads less, and prompts in files."""

from __future__ import annotations

from benchmarks.cache import CacheKeeping, CacheMemory, DecodeReading, EvictionAnswers
from benchmarks.cache.keeping_report import bound, recomputed
from sparsify.commands.bench.tables import Found, Row, conditions, latest, markdown, size

_SHAPE, _LENGTH = "8b", 131072
_SHARES = (0.25, 0.05, 0.02)


def answers(found: list[Found]) -> str:
    """Share of right answers over what is kept of the longest text, asked before and after the policy chooses."""
    cells = latest(found, EvictionAnswers)
    if not cells:
        return ""
    longest = max(r["length"] for r in cells)
    known = {(r["policy"], r["asked"], r["share"]): r for r in cells if r["length"] == longest}
    share = lambda r: "–" if r is None else f"{r['right'] / r['questions']:.2f}"
    order = lambda name: -sum(known[key]["right"] / known[key]["questions"] for key in known if key[0] == name and key[2] in _SHARES)
    rows: list[Row] = []
    for name in sorted({policy for policy, _, _ in known} - {"full"}, key=lambda name: (order(name), name)):
        mine = [known.get((name, asked, kept)) for asked in ("end", "blind") for kept in _SHARES]
        if any(mine):
            rows.append([f"`{name}`" if " " not in name else name, *map(share, mine)])
    whole = [share(known.get(("full", asked, 1.0))) for asked in ("end", "blind")]
    header = ["policy", *(f"{when}, {kept:.0%}" for when in ("asked before", "after") for kept in _SHARES)]
    asked = " or ".join(map(str, sorted({r["questions"] for r in known.values()})))
    note = f"Facts in {size(longest)} bytes, {asked} questions a number; everything kept answers {whole[0]} and {whole[1]} of them."
    return f"{markdown(header, rows)}\n\n{note} {conditions(list(known.values()))}"


def reading(found: list[Found]) -> str:
    """Milliseconds of a token's attention over 128K tokens by what is read."""
    cells = [r for r in latest(found, DecodeReading) if (r["shape"], r["length"]) == (_SHAPE, _LENGTH) and "at once" not in r["variant"]]
    known = {(r["variant"], r["batch"]): r for r in cells}
    batches = sorted({r["batch"] for r in cells})
    most = lambda name: max(r["bytes_read"] for r in cells if r["variant"] == name)
    rows: list[Row] = []
    for name in sorted({r["variant"] for r in cells}, key=lambda name: (-most(name), name)):
        row = [name]
        for batch in batches:
            mine, whole = known.get((name, batch)), known.get(("16 bits", batch))
            if mine is None:
                row += ["–", "–"]
                continue
            of = f"{mine['ms'] / whole['ms']:.2f} for {mine['bytes_read'] / whole['bytes_read']:.2f}" if whole else "–"
            row += [f"{mine['ms_all_layers']:.2f}", of]
        rows.append(row)
    header = [
        "what a token reads",
        *(text for batch in batches for text in (f"batch {batch}, ms", "of the time, for so much of the bytes")),
    ]
    return f"{markdown(header, rows)}\n\n{conditions(cells)}" if rows else ""


def keeping(found: list[Found]) -> str:
    """Seconds of a prompt of 128K tokens to a file and back, and what memory caches take beside what is promised."""
    cells = [r for r in latest(found, CacheKeeping) if (r["shape"], r["length"]) == (_SHAPE, _LENGTH)]
    known = {(r["variant"], r["operation"]): r for r in cells}
    rows: list[Row] = []
    for name in dict.fromkeys(r["variant"] for r in sorted(cells, key=lambda r: (-r["bytes"], r["variant"]))):
        both = [known.get((name, operation)) for operation in ("save", "load")]
        if all(both):
            times = [text for r in both if r for text in (f"{r['seconds']:.2f}", f"{bound(r):.2f}" if bound(r) else "–")]
            rows.append([name, f"{both[0]['bytes'] / 2**30:.1f}" if both[0] else "–", *times])
    if not rows:
        return ""
    again = recomputed(found, cells[0])
    computed = f" Computing the prompt again takes {again:.1f} s." if again else ""
    prepared = known.get(("clusters", "prepare"))
    clusters = f" `prepare()` of all its keys takes {prepared['seconds']:.1f} s." if prepared else ""
    weighed = latest(found, CacheMemory)
    most = max(weighed, key=lambda r: (r["kept_bytes"] / r["promised_bytes"], r["variant"]), default=None)
    memory = (
        f" Memory beside what is promised: {most['kept_bytes'] / most['promised_bytes']:.3f} × at most, {most['variant']}." if most else ""
    )
    header = ["128K tokens, 8B shape", "GiB", "save, s", "file or bus, s", "load, s", "file or bus, s"]
    return f"{markdown(header, rows)}\n\n{conditions([*cells, *weighed])}{computed}{clusters}{memory}"

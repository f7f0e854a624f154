"""Tables of a cache that evicts: one layer's decode, a whole model's tokens and prompts, scoring, answers, text; and what is quoted."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cache import (
    CachePrefill,
    DecodeAppend,
    DecodeFull,
    DecodeKernel,
    DecodeModel,
    DecodeOffloaded,
    DecodeReading,
    DecodeStore,
    EvictionAnswers,
    EvictionBlind,
    EvictionNeedles,
    EvictionStream,
    plots,
)
from benchmarks.cache.asking import ASKED
from benchmarks.cache.keeping_report import KEEPING
from benchmarks.lib.needles import wilson
from benchmarks.lib.peers import NAMES
from benchmarks.lib.registry import Benchmark
from benchmarks.model import Prefill
from sparsify.commands.bench.tables import Found, Row, by_device, conditions, failure, kind, latest, markdown, measured, size

TOKEN_MS, STORE_SHARE, KEPT = 5.5, 0.03, 1.05  # goals: a token at batch 1 on an 8B model, of a prefill, of the budget's bytes
PAGES_SHARE, PAGES_ANSWERS = 0.05, 0.97  # goal: of the pages a token reads so much, and answers so much of what everything answers
_ASKED = {
    "end": "Asked at the end of the text, before anything goes",
    "blind": "Asked after the policy has chosen",
    "second turn": "Another question, behind the answer to the one that was asked at the end",
}
_SAVED = 1.2  # times the share of the bytes: a step that takes longer saves less than it reads less
_CALLS = {"sparsify": "SparseCache, sparsify", "sparse+inductor": "SparseCache, Inductor", "static+inductor": "StaticCache, Inductor"}


def _known(found: Iterable[Found]) -> list[Found]:
    """Records with what early ones did not say: nothing was tuned, and texts went through StreamingLLM."""
    usual = {"decode_model": {"tuned": False}, "eviction_stream": {"policy": "streaming_llm"}}
    return [
        usual.get(r["benchmark"], {}) | {k: v for k, v in r.items() if v is not None or k not in usual.get(r["benchmark"], {})}
        for r in found
    ]


def table(found: Iterable[Found]) -> str:
    found = _known(found)
    parts = []
    for record, title, part in (
        (DecodeModel, "A whole model, a token at a time", _model),
        (CachePrefill, "A whole prompt, uncompiled", _prefill),
        (DecodeStore, "Scoring and eviction of one layer", _store),
        (DecodeAppend, "Several tokens over kept keys, one layer", _append),
        (EvictionAnswers, "Answers over what is kept, or read, of a text", _answers),
        (EvictionStream, "A long text through a cache that evicts", _stream),
    ):
        for group in by_device(kind(found, record)):
            parts += [f"### {title}", *part(group, [r for r in found if r["machine"]["gpu"] == group[0]["machine"]["gpu"]])]
    return "\n\n".join(parts)


def _model(found: list[Found], beside: list[Found]) -> list[str]:
    cells = latest(found, DecodeModel)
    rows = []
    for r in sorted(cells, key=lambda r: (r["prompt"], r["batch"], r["variant"])):
        read = f"{r['ms_per_token_read_back']:.2f}" if "ms_per_token_read_back" in r else "–"
        loop = f"{r['ms_per_token']:.2f}" if "ms_per_token_read_back" in r else "–"
        if "ms_per_token_read_back" not in r:  # early records read every token back
            read = f"{r['ms_per_token']:.2f}"
        over = f"{r['kept_over_budget']:.3f}" if r.get("kept_over_budget") else "–"
        peak = f"{r['peak_bytes'] / 2**30:.1f}" if r.get("peak_bytes") else "–"
        rows.append(
            [r["shape"], size(r["prompt"]), str(r["batch"]), _CALLS.get(r["variant"], r["variant"]), _kept(r), loop, read, over, peak]
        )
    note = (
        "Milliseconds a token in a loop that feeds itself, and in one that reads each token back before the next; caches hold random keys. "
        f"Kept ÷ budget counts every buffer. Tuned: Inductor's coordinate descent, which takes minutes to compile. {conditions(cells)}"
    )
    header = ["shape", "prompt", "batch", "call", "policy, kept", "ms a token", "read back", "kept ÷ budget", "peak GiB"]
    return [note, markdown(header, rows)]


def _kept(record: Found) -> str:
    return f"{record['policy']}, {record['budget']}" if record["policy"] else "everything"


def fastest_prefill(found: Iterable[Found], record: Found) -> tuple[float, str] | None:
    """Least milliseconds of any recorded prefill of the record's shape, layers and length, and whose it was."""
    same = [
        (r["ms"], r["variant"])
        for r in found
        if r["benchmark"] == Prefill.NAME
        and "ms" in r
        and (r["shape"], r["layers"], r["length"]) == (record["shape"], record["layers"], record["length"])
    ]
    return min(same, default=None)


def _prefill(found: list[Found], beside: list[Found]) -> list[str]:
    cells = latest(found, CachePrefill)
    rows = []
    for r in sorted(cells, key=lambda r: (r["length"], r["policy"] or "~")):
        fastest = fastest_prefill(beside, r)
        of_fastest = f"{r['store_ms'] / fastest[0]:.1%} ({fastest[1]})" if r["policy"] and fastest else "–"
        share = f"{r['store_ms'] / r['ms']:.1%}" if r["policy"] else "–"
        memory = f"{(r['peak_bytes'] - r['weight_bytes']) / 2**30:.1f}" if r["peak_bytes"] else "–"
        store, cache = f"{r['store_ms']:.1f}" if r["policy"] else "–", f"{r['cache_bytes'] / 2**30:.2f}"
        rows.append([size(r["length"]), _kept(r), f"{r['ms']:.0f}", store, share, of_fastest, memory, cache])
    note = (
        "Share: scoring and eviction of all layers, of this prompt and of the fastest prefill recorded at that length. Peak: the most that "
        f"was allocated beside the weights, keys that one layer scores before it evicts them included. {conditions(cells)}"
    )
    header = ["tokens", "policy, kept", "ms", "scoring + eviction, ms", "share", "of the fastest", "peak GiB", "cache GiB"]
    return [note, markdown(header, rows)]


def _store(found: list[Found], beside: list[Found]) -> list[str]:
    cells = latest(found, DecodeStore)
    rows = [[size(r["length"]), str(r["batch"]), r["policy"], str(r["budget"]), f"{r['ms']:.2f}"] for r in cells]
    return [conditions(cells), markdown(["tokens", "batch", "policy", "kept", "ms"], sorted(rows))]


def _append(found: list[Found], beside: list[Found]) -> list[str]:
    cells = latest(found, DecodeAppend)
    rows = []
    for r in sorted(cells, key=lambda r: (r["length"], r["count"], r["batch"], r["variant"])):
        error = f"{r['error']:.1e}" if "error" in r else "–"
        call = {"sdpa": "SDPA, every key visible"}.get(r["variant"], r["variant"])
        rows.append([size(r["length"]), str(r["count"]), str(r["batch"]), call, f"{r['ms']:.3f}", f"{r['tflops']:.0f}", error])
    header = ["kept", "tokens", "batch", "call", "ms", "TFLOP/s", "largest error"]
    return [f"SDPA gets keys that were put together before. {conditions(cells)}", markdown(header, rows)]


def _answers(found: list[Found], beside: list[Found]) -> list[str]:
    cells = latest(found, EvictionAnswers)
    shares = sorted({r["share"] for r in cells}, reverse=True)
    lengths = sorted({r["length"] for r in cells})
    parts = []
    for asked in ASKED:
        mine = {(r["policy"], r["length"], r["share"]): r for r in cells if r["asked"] == asked}
        order = sorted({policy for policy, _, _ in mine}, key=lambda policy: (-_all_right(mine, policy), policy))
        rows = [
            [size(length), policy, *(_right(mine.get((policy, length, share))) for share in shares)]
            for length in lengths
            for policy in order
            if any((policy, length, share) in mine for share in shares)
        ]
        parts += [f"{_ASKED[asked]}:", markdown(["bytes", "policy", *(f"{share:.0%}" for share in shares)], rows)]
    note = (
        "Share of the answers right [95 % Wilson interval] by the share of the text that is kept, on the mean of all heads and layers, or "
        "that is read by each token (`pages`, `clusters`: everything is kept; under `pages` a question, as a call of several tokens, reads "
        "all of it). The text is read in one call, before whose end nothing goes. SnapKV, where nothing else is said, and what is made of "
        "it score by the question's 12 bytes (or the text's last ones), smoothed over 15 where the paper's words take 5; under `duo` half "
        f"of the heads stream; `locret`'s heads were trained on other facts of this form. {conditions(cells)}"
    )
    return [note, *parts]


def _all_right(cells: dict[tuple[str, int, float], Found], policy: str) -> float:
    """Mean share of right answers over a policy's cells."""
    mine = [r["right"] / r["questions"] for (name, _, _), r in cells.items() if name == policy]
    return sum(mine) / len(mine)


def _right(record: Found | None) -> str:
    if record is None:
        return "–"
    low, high = wilson(record["right"], record["questions"])
    return f"{record['right'] / record['questions']:.2f} [{low:.2f}, {high:.2f}]"


def ratios(record: Found, cells: Iterable[Found]) -> list[float] | None:
    """NLL over that of text recomputed without a cache, by stretch; None without such a record."""
    keys = [key for key in EvictionStream.KEYS if key not in ("positions", "policy")]
    same = [r for r in cells if r["positions"] == "recomputed" and all(r[key] == record[key] for key in keys)]
    return [a / b for a, b in zip(record["nll"], same[0]["nll"])] if same else None


def _stream(found: list[Found], beside: list[Found]) -> list[str]:
    cells = latest(found, EvictionStream)
    rows = []
    mean = lambda r: sum(r["nll"]) / len(r["nll"])
    for r in sorted(cells, key=lambda r: (r["positions"] != "recomputed", r["policy"] != "full", mean(r))):
        over = ratios(r, cells)
        values = [f"{nll:.3f}" + (f" ({over[i]:.3f})" if over and r["positions"] != "recomputed" else "") for i, nll in enumerate(r["nll"])]
        name = r["policy"] + (f", {r['positions']}" if r["policy"] == "streaming_llm" else "")
        kept = "everything" if r["policy"] == "full" else f"{r['sinks'] + r['window']}"
        rows.append([kept, "no cache" if r["positions"] == "recomputed" else name, f"{mean(r):.3f}", *values])
    first = cells[0]
    note = (
        f"NLL in nats a byte, of all and by stretch of {first['stretch']} bytes, of a text that is read in calls of 512; in parentheses "
        "over that of the same text recomputed without a cache from as many bytes: the text itself is harder here and easier there. "
        f"Policies that select have room for one call beside what is kept. {conditions(cells)}"
    )
    most = max(len(r["nll"]) for r in cells)
    rows = [row + ["–"] * (most + 3 - len(row)) for row in rows]
    return [note, markdown(["kept", "policy", "all", *(str(i + 1) for i in range(most))], rows)]


def headlines(found: list[Found]) -> list[Row]:
    """Rows of (what, measured, beside)."""
    found = _known(found)
    cells = latest(found, DecodeModel)
    rows = []
    for r in (r for r in cells if r["variant"] == "sparsify" and r["shape"] == "8b"):
        dense = [
            d
            for d in cells
            if d["variant"] == "static+inductor" and (d["batch"], d["prompt"], d["shape"]) == (r["batch"], r["prompt"], "8b")
        ]
        tuned = ", tuned" if r.get("tuned") else ""
        what = f"a token of an 8B model after {size(r['prompt'])}, {r['budget']} kept, batch {r['batch']}{tuned}"
        # records without a time in a queue waited for the host after each token
        waited = ", each token read back" if dense and "ms_per_token_read_back" not in dense[0] else ""
        against = f"Inductor, every key kept{waited}: {dense[0]['ms_per_token']:.1f} ms" if dense else "–"
        back = f", {r['ms_per_token_read_back']:.2f} with each token read back" if r.get("ms_per_token_read_back") else ""
        rows.append([what, f"{r['ms_per_token']:.2f} ms{back}", against])
    return rows


def shortfalls(found: list[Found]) -> list[str]:
    """Goals that the latest records miss."""
    found, lines = _known(found), []
    for r in latest(found, DecodeModel):
        if r["shape"] == "8b" and r["variant"] == "sparsify" and r["batch"] == 1 and r["ms_per_token"] > TOKEN_MS:
            lines.append(
                f"A token after {size(r['prompt'])} with {r['budget']} kept takes {r['ms_per_token']:.2f} ms; {TOKEN_MS} was the goal."
            )
        if (r.get("kept_over_budget") or 0) > KEPT:
            lines.append(f"A cache of {r['budget']} tokens takes {r['kept_over_budget']:.3f} times their bytes.")
    for r in latest(found, CachePrefill):
        fastest = fastest_prefill(found, r)
        least = min(r["ms"], fastest[0] if fastest else r["ms"])
        if r["policy"] and r["store_ms"] > STORE_SHARE * least:
            lines.append(
                f"Scoring and eviction under {r['policy']} take {r['store_ms'] / least:.1%} of the fastest prefill of {size(r['length'])}; "
                f"{STORE_SHARE:.0%} was the goal."
            )
    return lines + _short_pages(found)


def _short_pages(found: list[Found]) -> list[str]:
    """Where few pages answer less of what everything answers than was the goal."""
    cells, lines = latest(found, EvictionAnswers), []
    whole = {(r["length"], r["asked"]): r["right"] / r["questions"] for r in cells if r["policy"] == "full"}
    for r in sorted(cells, key=lambda r: (r["length"], ASKED.index(r["asked"]))):
        full = whole.get((r["length"], r["asked"]))
        if (r["policy"], r["share"]) == ("pages", PAGES_SHARE) and full and r["right"] / r["questions"] < PAGES_ANSWERS * full:
            what = f"Tokens that read {PAGES_SHARE:.0%} of the pages of {size(r['length'])} bytes ({r['asked']})"
            goal = f"{PAGES_ANSWERS} of that was the goal"
            lines.append(f"{what} answer {r['right']} of {r['questions']}; everything read, {full:.2f} of them: {goal}.")
    return lines


def decode_table(found: Iterable[Found]) -> str:
    """The kernel's bandwidth beside SDPA's."""
    parts = []
    for group in by_device(found):
        parts += ["### One layer's attention over kept keys", *_decode_kernel(group)]
    return "\n\n".join(parts)


def _decode_kernel(found: list[Found]) -> list[str]:
    cells = latest(found, DecodeKernel)
    copies = sorted({round(r["gb_per_s"] / r["share_of_copy"]) for r in cells if r.get("share_of_copy")})
    rows = []
    for record in sorted(cells, key=lambda r: (r["length"], r["batch"], -r["share"], r["ms"])):
        full = full_read(cells, record)
        name = NAMES.get(record["variant"], record["variant"]) + (f" {record['tiling']}" if record.get("tiling") else "")
        error = f"{record['error']:.1e}" if "error" in record else "–"
        rows.append([size(record["length"]), str(record["batch"]), name, f"{record['share']:.0%}", f"{record['ms']:.3f}",
                     f"{record['gb_per_s']:.0f}", f"{record['ms'] / full:.2f}" if full else "–", error])  # fmt: skip
    note = (
        "GB/s count the kept keys and values. Over full: milliseconds over those of the fastest call that reads everything; a share that "
        f"cost what it reads would have its share there. A copy in the same run moved {', '.join(map(str, copies))} GB/s, reads and writes "
        f"together: reads alone are faster, so this is no ceiling. {conditions(cells)}"
    )
    return [note, markdown(["tokens", "batch", "call", "kept", "ms", "GB/s", "over full", "largest error"], rows)]


def full_read(cells: Iterable[Found], record: Found) -> float | None:
    """Milliseconds of the fastest decode call of the record's shape that reads every key."""
    same = [r["ms"] for r in cells if (r["length"], r["batch"], r["share"]) == (record["length"], record["batch"], 1.0)]
    return min(same, default=None)


def decode_headlines(found: list[Found]) -> list[Row]:
    cells = measured(found, DecodeKernel)
    rows = []
    for record in (r for r in cells if r["variant"] == "sparsify" and r["share"] == 1 and not r.get("tiling")):
        same = [r for r in cells if (r["batch"], r["length"], r["share"]) == (record["batch"], record["length"], 1) and r is not record]
        beside = ", ".join(f"{NAMES.get(r['variant'], r['variant'])} {r['gb_per_s']:.0f}" for r in same if r["variant"] != "sparsify")
        what = f"decode over a cache of {size(record['length'])} tokens, one layer"
        rows.append([what, f"{record['gb_per_s']:.0f} GB/s", beside or "–"])
    return rows


def decode_shortfalls(found: list[Found]) -> list[str]:
    cells = measured(found, DecodeKernel)
    lines = []
    for record in sorted((r for r in cells if r["share"] < 1), key=lambda r: (r["length"], -r["share"])):
        full = full_read(cells, record)
        if full and record["ms"] / full > 1.5 * record["share"]:
            lines.append(
                f"Decode over {record['share']:.0%} of {size(record['length'])} slots takes {record['ms']:.3f} ms, "
                f"{record['ms'] / full:.0%} of a full read and not {record['share']:.0%}."
            )
    return lines


def full_table(found: Iterable[Found]) -> str:
    """What a layer's step costs over each kind of cache that keeps every token."""
    parts = []
    for group in by_device(found):
        cells = latest(group, DecodeFull)
        rows = [
            [f"{r['batch']} x {size(r['length'])}{', padded' * r['padded']}", NAMES.get(r["variant"], r["variant"]), f"{r['ms']:.3f}",
             f"{r['gb_per_s']:.0f}", f"{r['error']:.1e}"]
            for r in sorted(cells, key=lambda r: (r["shape"], r["length"], r["batch"], r["padded"], r["ms"]))
        ]  # fmt: skip
        note = f"GB/s count the keys and values in use: not empty slots, not padding. {conditions(cells)}"
        parts += [note, markdown(["call", "cache", "ms", "GB/s", "largest error"], rows)]
    return "\n\n".join(parts)


def reading_table(found: Iterable[Found]) -> str:
    """What a layer's step costs that reads fewer bits, or fewer pages."""
    parts = []
    for group in by_device(found):
        cells = latest(group, DecodeReading)
        rows = [
            [f"{r['batch']} x {size(r['length'])}", r["variant"], f"{r['ms']:.3f}", f"{r['ms_all_layers']:.2f}",
             f"{r['bytes_read'] / r['ms'] / 1e6:.0f}", f"{r['error']:.1e}"]
            for r in sorted(cells, key=lambda r: (r["shape"], r["length"], r["batch"], r["ms"]))
        ]  # fmt: skip
        note = f"GB/s count what a step must read: codes with their scales, or bounds and the pages that are listed. {conditions(cells)}"
        parts += [note, markdown(["call", "cache", "ms a layer", "ms a token, all layers", "GB/s", "largest error"], rows)]
    return "\n\n".join(parts)


def reading_shortfalls(found: list[Found]) -> list[str]:
    """Where reading fewer bytes does not save the time of what is left out."""
    lines = []
    cells = latest(found, DecodeReading)
    whole = {(r["shape"], r["length"], r["batch"]): r for r in cells if r["variant"] == "16 bits"}
    for record in sorted(cells, key=lambda r: (r["length"], r["batch"], -r["bytes_read"])):
        full = whole.get((record["shape"], record["length"], record["batch"]))
        # several tokens at once are bound by their products
        if full is None or record is full or record["variant"].endswith("at once"):
            continue
        time, read = record["ms"] / full["ms"], record["bytes_read"] / full["bytes_read"]
        if time > _SAVED * read:
            call = f"{record['batch']} x {size(record['length'])}"
            lines.append(
                f"A layer's step over {call} tokens, {record['variant']}: {time:.2f} of the time of 16 bits for {read:.2f} of the bytes."
            )
    return lines


def offloaded_table(found: Iterable[Found]) -> str:
    """Tokens over keys in the host's memory, and what is left of them on the device."""
    parts = []
    for group in by_device(found):
        cells = latest(group, DecodeOffloaded)
        gib = lambda count: "–" if count is None else f"{count / 2**30:.2f}"
        rows = [
            [r["shape"], size(r["length"]), r["variant"], f"{r['ms']:.2f}" if r.get("ms") else failure(r.get("error") or ""),
             f"{r['limit_ms']:.2f}" if r.get("limit_ms") else "–",
             *(gib(r.get(name)) for name in ("cache_bytes", "host_bytes", "peak_bytes"))]
            for r in sorted(cells, key=lambda r: (r["shape"], r["length"], r["variant"]))
        ]  # fmt: skip
        header = ["shape", "after", "cache", "ms a token", "bus' time, ms", "on the device, GiB", "in the host's memory, GiB", "peak, GiB"]
        parts += [conditions(cells), markdown(header, rows)]
    return "\n\n".join(parts)


BENCHMARKS = (
    Benchmark(
        name="decode",
        place=6,
        measures="decode over kept keys: a layer's bandwidth, several tokens, scoring and eviction, a whole prompt, a whole model's tokens",
        module="benchmarks.cache.run",
        records=(DecodeKernel,),
        title="Decode over kept keys",
        table=decode_table,
        headlines=decode_headlines,
        shortfalls=decode_shortfalls,
    ),
    Benchmark(
        name="full",
        place=12,
        measures="decode where every key stays: one layer's step over full, static and dynamic caches, padded too",
        module="benchmarks.cache.full",
        records=(DecodeFull,),
        title="Decode over everything",
        table=full_table,
    ),
    Benchmark(
        name="reading",
        place=15,
        measures="decode that reads less: one layer's step over 16, 8 and 4 bits, 5 % of the pages or clusters, and several tokens at once",
        module="benchmarks.cache.reading",
        records=(DecodeReading,),
        title="Decode that reads less",
        table=reading_table,
        shortfalls=reading_shortfalls,
    ),
    Benchmark(
        name="offload",
        place=17,
        measures="tokens over keys and values in the host's memory, beside a cache on the device and transformers' offloaded one",
        module="benchmarks.cache.offload",
        records=(DecodeOffloaded,),
        title="Keys in the host's memory",
        table=offloaded_table,
    ),
    KEEPING,
    Benchmark(
        name="train_retaining_heads",
        place=92,
        measures="trains the small networks by which the policy `locret` scores tokens, for a model of bytes",
        module="benchmarks.cache.train_retaining_heads",
    ),
    Benchmark(
        name="eviction",
        place=7,
        measures="answers when a cache evicts; NLL of a long text beside the same text recomputed without a cache",
        module="benchmarks.cache.eviction",
        records=(DecodeModel, CachePrefill, DecodeStore, DecodeAppend, EvictionAnswers, EvictionStream),
        beside=(Prefill,),
        unshown=(EvictionNeedles, EvictionBlind),  # of the same questions, one after the other, under other conditions
        title="A cache that evicts",
        table=table,
        plots={"eviction": plots.eviction},
        headlines=headlines,
        shortfalls=shortfalls,
    ),
)

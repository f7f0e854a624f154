"""Tables of a cache that evicts: a whole model's tokens and prompts, scoring, answers, text. `report.tables` puts them on the page."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.lib.needles import wilson
from benchmarks.lib.tables import Record, conditions, groups, latest, markdown, size

TITLE = "A cache that evicts"
NAMES = ("decode_model", "cache_prefill", "decode_store", "decode_append", "eviction_needles", "eviction_stream")
TOKEN_MS, STORE_SHARE, KEPT = 5.5, 0.03, 1.05  # goals: a token at batch 1 on an 8B model, of a prefill, of the budget's bytes
_MODEL = ("shape", "layers", "variant", "tuned", "batch", "prompt", "budget", "policy", "mode")
_PROMPT = ("shape", "layers", "policy", "budget", "length", "batch")
_NEEDLES = ("model_sha256", "text_sha256", "policy", "length", "share", "window", "kernel")
_STREAM = ("model_sha256", "text_sha256", "positions", "sinks", "window", "stretch")
_CALLS = {"sparsify": "SparseCache, sparsify", "sparse+inductor": "SparseCache, Inductor", "static+inductor": "StaticCache, Inductor"}


def _known(found: Iterable[Record]) -> list[Record]:
    """Records with what early ones did not say: nothing was tuned, and SnapKV's smoothing was the paper's."""
    usual = {"decode_model": {"tuned": False}, "eviction_needles": {"kernel": 5}}
    return [usual.get(r["benchmark"], {}) | {k: v for k, v in r.items() if v is not None or k not in ("tuned", "kernel")} for r in found]


def table(found: Iterable[Record]) -> str:
    found = _known(found)
    parts = []
    for name, title, part in (
        ("decode_model", "A whole model, a token at a time", _model),
        ("cache_prefill", "A whole prompt, uncompiled", _prefill),
        ("decode_store", "Scoring and eviction of one layer", _store),
        ("decode_append", "Several tokens over kept keys, one layer", _append),
        ("eviction_needles", "One needle, asked at the end of the prompt", _needles),
        ("eviction_stream", "Text under StreamingLLM", _stream),
    ):
        for group in groups((r for r in found if r["benchmark"] == name), lambda r: r["machine"]["gpu"] or "CPU"):
            parts += [f"### {title}", *part(group, [r for r in found if r["machine"]["gpu"] == group[0]["machine"]["gpu"]])]
    return "\n\n".join(parts)


def _model(found: list[Record], beside: list[Record]) -> list[str]:
    cells = latest(found, *_MODEL)
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


def _kept(record: Record) -> str:
    return f"{record['policy']}, {record['budget']}" if record["policy"] else "everything"


def fastest_prefill(found: Iterable[Record], record: Record) -> tuple[float, str] | None:
    """Least milliseconds of any recorded prefill of the record's shape, layers and length, and whose it was."""
    same = [
        (r["ms"], r["variant"])
        for r in found
        if r["benchmark"] == "prefill"
        and "ms" in r
        and (r["shape"], r["layers"], r["length"]) == (record["shape"], record["layers"], record["length"])
    ]
    return min(same, default=None)


def _prefill(found: list[Record], beside: list[Record]) -> list[str]:
    cells = latest(found, *_PROMPT)
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


def _store(found: list[Record], beside: list[Record]) -> list[str]:
    cells = latest(found, "policy", "batch", "length", "budget")
    rows = [[size(r["length"]), str(r["batch"]), r["policy"], str(r["budget"]), f"{r['ms']:.2f}"] for r in cells]
    return [conditions(cells), markdown(["tokens", "batch", "policy", "kept", "ms"], sorted(rows))]


def _append(found: list[Record], beside: list[Record]) -> list[str]:
    cells = latest(found, "variant", "batch", "count", "length")
    rows = []
    for r in sorted(cells, key=lambda r: (r["length"], r["count"], r["batch"], r["variant"])):
        error = f"{r['error']:.1e}" if "error" in r else "–"
        call = {"sdpa": "SDPA, every key visible"}.get(r["variant"], r["variant"])
        rows.append([size(r["length"]), str(r["count"]), str(r["batch"]), call, f"{r['ms']:.3f}", f"{r['tflops']:.0f}", error])
    header = ["kept", "tokens", "batch", "call", "ms", "TFLOP/s", "largest error"]
    return [f"SDPA gets keys that were put together before. {conditions(cells)}", markdown(header, rows)]


def _needles(found: list[Record], beside: list[Record]) -> list[str]:
    cells = latest(found, *_NEEDLES)
    rows = []
    shares = sorted({r["share"] for r in cells}, reverse=True)
    setting = lambda r: (r["length"], r["policy"], r.get("window"), r.get("kernel"))
    for length, policy, window, kernel in sorted(set(map(setting, cells)), key=repr):
        mine = {r["share"]: r for r in cells if setting(r) == (length, policy, window, kernel)}
        name = policy + (f", window {window}, kernel {kernel or 5}" if policy == "snapkv" else "")
        rows.append([size(length), name, *(_right(mine.get(share)) for share in shares)])
    note = (
        "Share of the answers right [95 % Wilson interval] by the share of the prompt kept per KV head. SnapKV's paper smooths scores over "
        f"5 tokens; this model's tokens are bytes. {conditions(cells)}"
    )
    return [note, markdown(["bytes", "policy", *(f"{share:.0%} kept" for share in shares)], rows)]


def _right(record: Record | None) -> str:
    if record is None:
        return "–"
    low, high = wilson(record["right"], record["asked"])
    return f"{record['right'] / record['asked']:.2f} [{low:.2f}, {high:.2f}]"


def ratios(record: Record, cells: Iterable[Record]) -> list[float] | None:
    """NLL over that of text recomputed without a cache, by stretch; None without such a record."""
    keys = [key for key in _STREAM if key != "positions"]
    same = [r for r in cells if r["positions"] == "recomputed" and all(r[key] == record[key] for key in keys)]
    return [a / b for a, b in zip(record["nll"], same[0]["nll"])] if same else None


def _stream(found: list[Record], beside: list[Record]) -> list[str]:
    cells = latest(found, *_STREAM)
    rows = []
    for r in sorted(cells, key=lambda r: (r["positions"] != "recomputed", r["positions"])):
        over = ratios(r, cells)
        values = [f"{nll:.3f}" + (f" ({over[i]:.3f})" if over and r["positions"] != "recomputed" else "") for i, nll in enumerate(r["nll"])]
        rows.append([f"{r['sinks']} + {r['window']}", r["positions"], *values])
    first = cells[0]
    note = (
        f"NLL in nats a byte by stretch of {first['stretch']} bytes, and in parentheses over that of the same text recomputed without a "
        f"cache from as many bytes: the text itself is harder here and easier there. {conditions(cells)}"
    )
    most = max(len(r["nll"]) for r in cells)
    rows = [row + ["–"] * (most + 2 - len(row)) for row in rows]
    return [note, markdown(["kept", "positions", *(str(i + 1) for i in range(most))], rows)]


# --- what README.md and docs/benchmarks.md quote ---


def headlines(found: list[Record]) -> list[list[str]]:
    """Rows of (what, measured, beside)."""
    found = _known(found)
    cells = latest((r for r in found if r["benchmark"] == "decode_model"), *_MODEL)
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


def shortfalls(found: list[Record]) -> list[str]:
    """Goals that the latest records miss."""
    found, lines = _known(found), []
    for r in latest((r for r in found if r["benchmark"] == "decode_model"), *_MODEL):
        if r["shape"] == "8b" and r["variant"] == "sparsify" and r["batch"] == 1 and r["ms_per_token"] > TOKEN_MS:
            lines.append(
                f"A token after {size(r['prompt'])} with {r['budget']} kept takes {r['ms_per_token']:.2f} ms; {TOKEN_MS} was the goal."
            )
        if (r.get("kept_over_budget") or 0) > KEPT:
            lines.append(f"A cache of {r['budget']} tokens takes {r['kept_over_budget']:.3f} times their bytes.")
    for r in latest((r for r in found if r["benchmark"] == "cache_prefill"), *_PROMPT):
        fastest = fastest_prefill(found, r)
        least = min(r["ms"], fastest[0] if fastest else r["ms"])
        if r["policy"] and r["store_ms"] > STORE_SHARE * least:
            lines.append(
                f"Scoring and eviction under {r['policy']} take {r['store_ms'] / least:.1%} of the fastest prefill of {size(r['length'])}; "
                f"{STORE_SHARE:.0%} was the goal."
            )
    return lines + _short_needles(found)


def _short_needles(found: list[Record]) -> list[str]:
    """By share, the best setting of SnapKV against everything kept."""
    cells = [r for r in latest((r for r in found if r["benchmark"] == "eviction_needles"), *_NEEDLES) if r["policy"] == "snapkv"]
    lines = []
    for length in sorted({r["length"] for r in cells}):
        mine = [r for r in cells if r["length"] == length]
        full = max((r["right"] / r["asked"] for r in mine if r["share"] == 1), default=None)
        for share in sorted({r["share"] for r in mine} - {1.0}, reverse=True):
            best = max((r for r in mine if r["share"] == share), key=lambda r: r["right"] / r["asked"])
            if full is not None and best["right"] / best["asked"] < full:
                kernel = f" (kernel {best['kernel']})" if best.get("kernel") else ""
                lines.append(
                    f"SnapKV keeping {share:.0%} of {size(length)} bytes{kernel} answers {best['right']} of {best['asked']}; "
                    f"everything kept, {full:.2f} of them."
                )
    return lines

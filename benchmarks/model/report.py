"""Prefill and time to compile: tables, plot, and what other texts quote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.lib.models import SHAPES
from benchmarks.lib.registry import Benchmark
from benchmarks.model import Calibrating, CompileTime, Generate, GenerateSeconds, LongPrompt, Padded, Prefill, Speculation, Visual
from sparsify.commands.bench import prefill, whole_call
from sparsify.commands.bench.tables import (
    Found,
    Row,
    by_device,
    commit,
    conditions,
    failure,
    groups,
    kind,
    latest,
    markdown,
    measured,
    newest_device,
    size,
)
from sparsify.commands.bench.whole_call import Bar

_NEAR = 1.15  # times the bytes' time: nearer, a token counts as fast as memory allows


def prefill_table(found: Iterable[Found]) -> str:
    return prefill.table(
        found, "shape {shape}, {layers} layers, random weights", "; random weights give flat logits, and ties turn on rounding"
    )


def prefill_headlines(found: list[Found]) -> list[Row]:
    cells = [r for r in measured(found, Prefill) if "ms" in r]
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


def prefill_shortfalls(found: list[Found]) -> list[str]:
    cells = measured(found, Prefill)
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


def generate_table(found: Iterable[Found]) -> str:
    """Milliseconds a token through generate(), beside the bytes' time."""
    names = {
        "eager": "eager, DynamicCache",
        "inductor": "Inductor, StaticCache",
        "sparsify": "sparsify",
        "sparsify tuned": "sparsify, tuned",
        "sparsify sparse": "sparsify",
    }
    order = list(names)
    parts = []
    for group in groups(latest(found, Generate), lambda r: (r["shape"], r["layers"], r["machine"]["gpu"] or "CPU")):
        rows = []
        for record in sorted(group, key=lambda r: (r["batch"], r["length"], r["tokens"], r["sampled"], order.index(r["variant"]))):
            call = f"{size(record['length'])}, batch {record['batch']}" + ", padded" * record["padded"] + ", sampled" * record["sampled"]
            call += f", {record['tokens']} tokens"
            name = names[record["variant"]] + (f", {record['density']:.0%} of the blocks" if record.get("density") else "")
            if record.get("error"):
                rows.append([call, name, failure(record["error"]), *["–"] * 4, commit(record)])
                continue
            ratio, first = f"{record['ms'] / record['limit_ms']:.2f}", f"{record['first_call_s']:.1f}"
            whole = f"{record['whole_s']:.2f}" if record.get("whole_s") else "–"
            rows.append([call, name, f"{record['ms']:.2f}", f"{record['limit_ms']:.2f}", ratio, first, whole, commit(record)])
        first_of_group = group[0]
        head = (
            f"### A token through generate(), shape {first_of_group['shape']}, {first_of_group['layers']} layers, random weights\n\n"
            f"Whole calls over a cache that holds the prompt, everything counted, medians. {conditions(group)}"
        )
        header = ["call", "variant", "ms a token", "bytes' time, ms", "× bytes' time", "first call, s", "with its prompt, s", "commit"]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def generate_shortfalls(found: list[Found]) -> list[str]:
    """Exact tokens that take longer than their bytes, and where the GPU's time goes."""
    lines = []
    for record in latest(found, Generate):
        if record["variant"] != "sparsify" or not record.get("ms") or record["ms"] <= _NEAR * record["limit_ms"]:
            continue
        call = f"{size(record['length'])}, batch {record['batch']}{', padded' * record['padded']}, {record['tokens']} tokens"
        line = (
            f"A token through generate() ({call}): {record['ms']:.2f} ms, {record['ms'] / record['limit_ms']:.2f} × the time of its bytes"
        )
        if parts := record.get("gpu_ms"):
            known = ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items())
            line += f"; the GPU is busy for {sum(parts.values()):.2f} ms of it ({known})"
        lines.append(f"{line}.")
    return lines


def generate_headlines(found: list[Found]) -> list[Row]:
    """The exact token after the shortest and the longest prompt of one sequence, beside the fastest peer that was timed."""
    single = [r for r in measured(found, Generate) if r.get("ms") and r["batch"] == 1 and not r["sampled"]]
    cells = [r for r in single if not r.get("whole_s")]
    rows = []
    for length in sorted({r["length"] for r in cells}):
        ms = {r["variant"]: r["ms"] for r in cells if r["length"] == length}
        peers = {name: ms[name] for name in ("eager", "inductor") if name in ms}
        if "sparsify" not in ms or not peers:
            continue
        best = min(peers, key=peers.__getitem__)
        name = {"eager": "eager", "inductor": "Inductor over a static cache"}[best]
        tuned = f"; {ms['sparsify tuned']:.1f} ms tuned" if "sparsify tuned" in ms else ""
        limit = next(r["limit_ms"] for r in cells if r["length"] == length)
        rows.append(
            [
                f"an exact token through generate() after {size(length)} tokens, {cells[0]['shape'].upper()} shape, everything counted",
                f"{ms['sparsify']:.1f} ms{tuned}",
                f"{peers[best] / ms['sparsify']:.1f} × the fastest of eager and Inductor ({name}); the bytes' time is {limit:.1f} ms",
            ]
        )
    return rows + [row for length in sorted({r["length"] for r in single if r.get("whole_s")}) for row in _whole_calls(single, length)]


def _whole_calls(cells: list[Found], length: int) -> list[Row]:
    """Calls that read their prompt and generate, beside the fastest peer's and our own with the default settings."""
    found = {r["variant"]: r for r in cells if r["length"] == length and r.get("whole_s")}
    peers = [found[name]["whole_s"] for name in ("eager", "inductor") if name in found]
    if "sparsify sparse" not in found or not peers:
        return []
    ours, default = found["sparsify sparse"], found.get("sparsify")
    what = f"a whole generate() call: {size(length)} tokens read at {ours['density']:.0%} of the blocks, {ours['tokens']} generated"
    beside = f"{min(peers) / ours['whole_s']:.1f} × the fastest of eager and Inductor"
    return [[what, f"{ours['whole_s']:.2f} s", beside + (f"; {default['whole_s']:.2f} s with the default settings" if default else "")]]


_CALLS = {"eager": "eager", "inductor": "Inductor,\nstatic cache", "sparsify": "sparsify,\ndefaults", "sparsify sparse": "sparsify"}


def whole_call_bars(found: list[Found]) -> tuple[Found, list[Bar]] | None:
    """The longest whole call of sparsify's that was timed, and a bar a variant.

    Where a peer's whole call was not timed its prompt is eager's, since transformers compiles the tokens over a static cache and nothing
    else, and its tokens are those after a prompt of this length. Of a call with the default settings the share of blocks is that of the
    prefill's record.
    """
    cells = [r for r in latest(found, Generate) if r.get("ms") and r["batch"] == 1 and not r["sampled"]]
    ours = [r for r in cells if r.get("whole_s") and r["variant"].startswith("sparsify")]
    if not ours:
        return None
    call = max(ours, key=lambda r: (r["length"], r["time"]))
    alike = [r for r in cells if all(r[key] == call[key] for key in ("shape", "layers", "length"))]
    prompts: dict[str, Found] = {
        r["variant"]: r
        for r in latest(found, Prefill)
        if "ms" in r and r["requested_density"] is None and all(r[key] == call[key] for key in ("shape", "layers", "length"))
    }
    visited = prompts.get("default", {}).get("density")
    bars = []
    for variant, name in _CALLS.items():
        mine = sorted((r for r in alike if r["variant"] == variant), key=lambda r: (bool(r.get("whole_s")), r["tokens"] == call["tokens"]))
        if not mine:
            continue
        record = mine[-1]
        density = record.get("density") or (visited if variant == "sparsify" else None)
        label = name + (f",\n{density:.0%} of the blocks" if density else "")
        tokens = record["ms"] * call["tokens"] / 1e3
        if record.get("whole_s") and record["tokens"] == call["tokens"]:
            bars.append(Bar(label, record["whole_s"] - tokens, tokens, timed=True))
        elif variant in ("eager", "inductor") and "eager" in prompts:
            bars.append(Bar(label, prompts["eager"]["ms"] / 1e3, tokens, timed=False))
    return call, bars


def whole_call_plot(found: list[Found]) -> Any:
    """Seconds of a call that reads a prompt and generates, one bar a variant."""
    if (calls := whole_call_bars(newest_device(kind(found, Generate, Prefill)))) is None:
        return None
    call, bars = calls
    where = call["machine"]["gpu"] or "CPU"
    return whole_call.draw(bars, f"{size(call['length'])} tokens read, {call['tokens']} generated, {call['shape'].upper()} shape, {where}")


def generate_seconds_headlines(found: list[Found]) -> list[Row]:
    cells = {(r["way"], r["state"]): r for r in measured(found, GenerateSeconds) if r["layers"] >= 32}
    rows = []
    for state in ("cold", "warm"):
        if (record := cells.get(("regions", state))) is not None and (eager := cells.get(("eager", "cold"))) is not None:
            count, total = len(record["prompts_s"]), sum(record["prompts_s"])
            rows.append(
                [
                    f"`sparsify.compile`, {record['layers']} layers, {state} caches: first answer, then {count} prompts of other lengths",
                    f"{record['first_s']:.1f} s, then {total:.1f} s",
                    f"uncompiled {eager['first_s']:.1f} s, then {sum(eager['prompts_s']):.1f} s",
                ]
            )
    return rows


def long_prompt_headlines(found: list[Found]) -> list[Row]:
    cells = [r for r in measured(found, LongPrompt) if r.get("s") and r["variant"] == "parts" and r.get("peak_bytes")]
    if not cells:
        return []
    record = max(cells, key=lambda r: r["length"])
    return [
        [
            f"a prompt of {size(record['length'])} into a SparseCache of {record['budget']}, {record['density']:.0%} of the blocks",
            f"{record['s']:.1f} s",
            f"{record['peak_bytes'] / 2**30:.0f} GiB at most, weights included",
        ]
    ]


def long_prompt_plot(found: list[Found]) -> Any:
    """Memory of long prompts as measured, and what gate and up of all rows at once would take beside it where they were made in parts."""
    from matplotlib import pyplot

    cells = [one for one in newest_device(measured(found, LongPrompt)) if one["variant"] == "parts" and one.get("peak_bytes")]
    if not cells:
        return None
    cells.sort(key=lambda one: one["length"])
    gib = 1 << 30
    weights = [one["weight_bytes"] / gib for one in cells]
    rest = [one["peak_bytes"] / gib - held for one, held in zip(cells, weights, strict=True)]
    peak = [one["peak_bytes"] / gib for one in cells]
    # bf16: gate and up of all rows, without those of a part, which the peak holds
    spared = [2 * 2 * one["length"] * SHAPES[one["shape"]]["intermediate_size"] / gib if one["blocks_in_parts"] else 0.0 for one in cells]
    figure, axis = pyplot.subplots(figsize=(6.4, 2.6), layout="constrained")
    names = [f"{size(one['length'])} tokens, {one['s']:.1f} s" for one in cells]
    axis.barh(names, weights, color="0.35", label="weights")
    axis.barh(names, rest, left=weights, color="0.65", label="everything else, measured")
    axis.barh(names, spared, left=peak, color="white", edgecolor="0.3", hatch="//", label="gate and up of all rows at once, calculated")
    axis.set(xlabel="GiB at the peak")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def long_prompt_table(found: Iterable[Found]) -> str:
    """Seconds and memory of a prompt, one row a length and variant."""
    gib = lambda number: f"{number / 2**30:.1f}" if number else "–"
    parts = []
    for group in groups(latest(found, LongPrompt), lambda r: (r["shape"], r["layers"], r["budget"], r["machine"]["gpu"] or "CPU")):
        rows = []
        for r in sorted(group, key=lambda r: (r["length"], r["density"], r["variant"], r["allocator"])):
            call = [size(r["length"]), f"{r['density']:.0%}", r["variant"], r["allocator"] or "–"]
            if r.get("error"):
                rows.append([*call, failure(r["error"]), *["–"] * 3, gib(r["weight_bytes"]), commit(r)])
                continue
            reserved = max(r.get(name) or 0 for name in ("reserved_bytes", "first_reserved_bytes"))
            memory = [gib(r.get("peak_bytes")), gib(reserved), gib(r["weight_bytes"])]
            rows.append([*call, f"{r['s']:.2f}", f"{r['first_call_s']:.1f}", *memory, commit(r)])
        head = (
            f"### A long prompt, shape {group[0]['shape']}, {group[0]['layers']} layers, random weights\n\n"
            f"Into a SparseCache of {group[0]['budget']} tokens, logits of the last token, medians. Peak: of tensors, weights included; "
            f"reserved: by the allocator, the first call included. {conditions(group)}"
        )
        header = ["prompt", "blocks", "feed-forward", "allocator", "s", "first call, s", "peak, GiB", "reserved, GiB", "weights", "commit"]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def padded_table(found: Iterable[Found]) -> str:
    """Seconds of a batch of prompts of different lengths, by variant."""
    parts = []
    sort = lambda r: (r["shape"], r["layers"], r["prompts"], r["shortest"], r["longest"], r["machine"]["gpu"] or "CPU")
    for group in groups(latest(found, Padded), sort):
        seconds = {r["variant"]: r["s"] for r in group if r.get("s")}
        rows = []
        for r in sorted(group, key=lambda r: -(r.get("s") or 0)):
            if r.get("error"):
                rows.append([r["variant"], failure(r["error"]), *["–"] * 3, commit(r)])
                continue
            beside = [f"{seconds[one] / r['s']:.2f}" if one in seconds else "–" for one in ("eager", "alone")]
            rows.append(
                [r["variant"], f"{r['s']:.3f}", *beside, f"{r['peak_bytes'] / 2**30:.1f}" if r.get("peak_bytes") else "–", commit(r)]
            )
        first = group[0]
        share = 1 - first["tokens"] / (first["prompts"] * first["longest"])
        head = (
            f"### {first['prompts']} prompts of {size(first['shortest'])} to {size(first['longest'])} tokens, shape {first['shape']}, "
            f"{first['layers']} layers\n\n{share:.0%} of the padded batch is padding. {conditions(group)}"
        )
        parts.append(head + "\n\n" + markdown(["variant", "s", "× eager", "× each prompt alone", "peak, GiB", "commit"], rows))
    return "\n\n".join(parts)


def calibrating_table(found: Iterable[Found]) -> str:
    """Seconds of calibrations, by what settings are compared by."""
    parts = []
    for group in groups(latest(found, Calibrating), lambda r: (r["shape"], r["layers"], r["machine"]["gpu"] or "CPU")):
        rows = []
        for r in sorted(group, key=lambda r: (r["lengths"], r["pieces"], r["settings"], r["variant"])):
            prompts = f"{r['pieces']} of each of {', '.join(map(size, r['lengths']))}"
            settings = ", ".join(r["settings"]) or "–"
            if r.get("error"):
                rows.append([prompts, settings, r["variant"], failure(r["error"]), *["–"] * 2, commit(r)])
                continue
            peak = f"{r['peak_bytes'] / 2**30:.1f}" if r.get("peak_bytes") else "–"
            rows.append([prompts, settings, r["variant"], f"{r['s']:.0f}", peak, str(r["heads"]), commit(r)])
        head = f"### Calibrating attention, shape {group[0]['shape']}, {group[0]['layers']} layers"
        head += f"\n\nLoading the model included. {conditions(group)}"
        header = ["prompts, tokens", "settings", "compared by", "s", "peak, GiB", "heads with a threshold", "commit"]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def visual_table(found: Iterable[Found]) -> str:
    """Seconds of a prompt with images, by variant."""
    parts = []
    for group in groups(latest(found, Visual), lambda r: (r["shape"], r["layers"], r["tokens"], r["machine"]["gpu"] or "CPU")):
        seconds = {r["variant"]: r["s"] for r in group if r.get("s")}
        rows = []
        for r in sorted(group, key=lambda r: -(r.get("s") or 0)):
            name = r["variant"] + (f", {r['keep']:.0%} of the image tokens" if r["keep"] < 1 else "")
            if r.get("error"):
                rows.append([name, failure(r["error"]), *["–"] * 3, commit(r)])
                continue
            faster = f"{seconds['eager'] / r['s']:.2f}" if "eager" in seconds else "–"
            peak = f"{r['peak_bytes'] / 2**30:.1f}" if r["peak_bytes"] else "–"
            rows.append([name, f"{r['s']:.3f}", faster, f"{r['cached']:.0f}", peak, commit(r)])
        first = group[0]
        head = (
            f"### {first['image_tokens']} image tokens of {first['tokens']}, LLaVA of shape {first['shape']}, {first['layers']} layers, "
            f"random weights\n\n{conditions(group)}"
        )
        parts.append(head + "\n\n" + markdown(["variant", "s", "× eager", "cached by layer", "peak, GiB", "commit"], rows))
    return "\n\n".join(parts)


def generate_seconds_table(found: Iterable[Found]) -> str:
    """Seconds of the first answer, of the same once more, and of answers to prompts of other lengths; one row a way and state."""
    ways = {"eager": "uncompiled", "regions": "sparsify.compile", "whole": "sparsify.compile(whole=True)"}
    order = list(ways)
    parts = []
    for group in groups(latest(found, GenerateSeconds), lambda r: (r["hidden"], r["tokens"], r["length"], r["machine"]["gpu"] or "CPU")):
        rows = []
        for record in sorted(group, key=lambda r: (-r["layers"], order.index(r["way"]), r["state"])):
            later = sorted(record["prompts_s"])
            rows.append(
                [
                    f"{record['layers']}",
                    ways[record["way"]],
                    record["state"] if record["way"] != "eager" else "–",
                    *(f"{record[name]:.2f}" for name in ("first_s", "again_s", "beyond_s")),
                    f"{sum(later):.1f}" if later else "–",
                    f"{later[len(later) // 2]:.2f}" if later else "–",
                    f"{record['graphs']}",
                    commit(record),
                ]
            )
        first = group[0]
        head = (
            f"### Seconds from a process's first prompt on, {first['hidden']} wide, random weights\n\n"
            f"A prompt of {size(first['length'])} and {first['tokens']} tokens, the same again, then {len(first['prompts_s'])} prompts of "
            f"other lengths ({min(first['lengths'])} to {max(first['lengths'])}), once each. Cold: empty cache folders. {conditions(group)}"
        )
        header = [
            "layers",
            "way",
            "caches",
            "first, s",
            "again, s",
            "compiling, s",
            "other prompts, s",
            "median of them",
            "graphs",
            "commit",
        ]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def compile_time_table(found: Iterable[Found]) -> str:
    """One row per model; the latest record of each counts."""
    last = {(r["layers"], r["hidden"], r["length"], r["machine"]["torch"]): r for r in found}
    rows = [
        [
            f"{layers} layers, {hidden} wide, {length} tokens, torch {release}",
            *(f"{r[f'{backend}_{state}_s']:.1f}" for state in ("cold", "warm") for backend in ("inductor", "sparsify")),
            f"{r['own_s']:.2f}",
            f"{r['validate_s']:.2f}, {r['validate_share']:.1%} / {r['validate_warm_share']:.1%}" if "validate_s" in r else "–",
        ]
        for (layers, hidden, length, release), r in sorted(last.items())
    ]
    columns = [f"{backend}, {state}, s" for state in ("cold", "warm") for backend in ("Inductor", "sparsify")]
    return markdown(["llama, prompt and next token", *columns, "own stages, s", "of them validation, s, share of cold / warm"], rows)


def speculation_table(found: Iterable[Found]) -> str:
    """A token with and without drafts; of random weights a round's time alone says something."""
    parts = []
    for group in by_device(found):
        cells = latest(group, Speculation)
        plain = {(r["shape"], r["layers"], r["length"], r["tokens"]): r["ms"] for r in cells if r["drafts"] == "0" and r.get("ms")}
        rows = []
        for r in sorted(cells, key=lambda r: (r["shape"], r["length"], r["drafts"] == "auto", r["drafts"].zfill(2))):
            beside, kept = plain.get((r["shape"], r["layers"], r["length"], r["tokens"])), r.get("kept")
            rows.append(
                [
                    r["shape"],
                    size(r["length"]),
                    "none" if r["drafts"] == "0" else r["drafts"],
                    f"{r['share']:.0%}" if r["drafts"] != "0" else "–",
                    f"{r['ms']:.2f}" if r.get("ms") else failure(r.get("error") or ""),
                    f"{beside / r['ms']:.2f}" if beside and r.get("ms") else "–",
                    f"{r['ms_a_round']:.2f}" if r.get("ms_a_round") else "–",
                    f"{kept:.0%}" if kept is not None and r["trained"] else "–",
                    f"{r['same_tokens']} of {r['tokens']}" if r.get("same_tokens") is not None else "–",
                ]
            )
        header = ["model", "after", "drafted", "pages read", "ms a token", "× none", "ms a round", "kept", "same tokens"]
        parts += [conditions(cells), markdown(header, rows)]
    return "\n\n".join(parts)


BENCHMARKS = (
    Benchmark(
        name="prefill",
        place=2,
        measures="prefill of an 8B-shaped Llama with random weights: eager, Inductor, dense, xattention at a fixed density",
        module="benchmarks.model.prefill",
        records=(Prefill,),
        title="Prefill",
        table=prefill_table,
        plots={"prefill": prefill.plot},
        headlines=prefill_headlines,
        shortfalls=prefill_shortfalls,
    ),
    Benchmark(
        name="generate",
        place=12,
        measures="milliseconds a token through generate() after long prompts: eager, Inductor over a static cache, sparsify",
        module="benchmarks.model.generate",
        records=(Generate,),
        title="Tokens through generate()",
        table=generate_table,
        plots={"whole_call": whole_call_plot},
        headlines=generate_headlines,
        shortfalls=generate_shortfalls,
    ),
    Benchmark(
        name="speculation",
        place=16,
        measures="self-speculation through generate(): drafts over 5 % of the pages, verified over everything, by how many are drafted",
        module="benchmarks.model.speculation",
        records=(Speculation,),
        title="Drafts over an exact cache",
        table=speculation_table,
    ),
    Benchmark(
        name="generate_seconds",
        place=11,
        measures="seconds of a process's first prompts: uncompiled, compiled by regions and as a whole, cold and warm",
        module="benchmarks.model.generate_seconds",
        records=(GenerateSeconds,),
        title="From the first prompt on",
        table=generate_seconds_table,
        headlines=generate_seconds_headlines,
    ),
    Benchmark(
        name="long_prompt",
        place=13,
        measures="seconds and memory of prompts of 128K to 1M tokens into a SparseCache, feed-forward blocks in parts or whole",
        module="benchmarks.model.long_prompt",
        records=(LongPrompt,),
        title="Long prompts",
        table=long_prompt_table,
        plots={"long-prompt": long_prompt_plot},
        headlines=long_prompt_headlines,
    ),
    Benchmark(
        name="padded",
        place=17,
        measures="a batch of prompts of different lengths: padded eager and compiled, unpad, sparsify.pack, each prompt alone",
        module="benchmarks.model.padded",
        records=(Padded,),
        title="Prompts of different lengths",
        table=padded_table,
    ),
    Benchmark(
        name="visual",
        place=18,
        measures="a prompt with images, all of its tokens and some (fastv, divprune), beside eager PyTorch",
        module="benchmarks.model.visual",
        records=(Visual,),
        title="Prompts with images",
        table=visual_table,
    ),
    Benchmark(
        name="calibrating",
        place=19,
        measures="seconds of `sparsify calibrate attention` on a model of a real size, from the command to the plan",
        module="benchmarks.model.calibrating",
        records=(Calibrating,),
        title="Time to calibrate",
        table=calibrating_table,
    ),
    Benchmark(
        name="compile_time",
        place=10,
        measures="CPU seconds of compiling a prompt and a token, cold and warm, beside Inductor alone",
        module="benchmarks.model.compile_time",
        records=(CompileTime,),
        title="Time to compile, CPU seconds",
        table=compile_time_table,
    ),
)

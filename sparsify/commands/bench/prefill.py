"""A whole model's prefill of prompts of several lengths, as each variant runs it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.api import record_density
from sparsify.commands.bench import variants
from sparsify.commands.bench.clock import Clock, clean, peak_bytes, reason
from sparsify.commands.bench.records import Record
from sparsify.commands.bench.registry import Benchmark, Subject
from sparsify.commands.bench.tables import Found, commit, conditions, failure, groups, kind, latest, markdown, newest_device, size


@dataclass(frozen=True, kw_only=True)
class Prefill(Record):
    """One variant's prefill of one prompt."""

    NAME = "prefill"
    KEYS = ("shape", "layers", "variant", "length", "requested_density")
    shape: str  # of benchmarks.lib.models, or a model's name
    layers: int
    parameters: int  # of the model
    variant: str  # of `VARIANTS` or of benchmarks.model.prefill; of token_select and minference with their numbers: `token_select 12:8192`
    length: int  # tokens
    requested_density: float | None
    seed: int
    dynamic: bool  # compiled once for all lengths
    density: float | None  # visited share of the causal blocks; None where no blocks were chosen
    peak_bytes: int | None  # most device memory of a call; None on a CPU
    ms: float | None = None  # median
    times_ms: list[float] | None = None
    first_call_ms: float | None = None  # compilation included
    logits_error: float | None = None  # largest difference from eager's, last token
    logits_std: float | None = None  # of eager's
    same_token: bool | None = None
    estimate: list[str] | None = None  # of xattention: variants of the estimate
    error: str | None = None


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, repeats: int, device: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Median and all times in milliseconds, peak memory in bytes, realised density where blocks were chosen; and the last logits."""
    clock = Clock(device)

    def prefill() -> torch.Tensor:
        return model(ids, use_cache=True, logits_to_keep=1).logits

    clean(device)
    with record_density() as found:
        first, logits = clock.once(prefill)
    if ids.shape[1] < 65536:  # a call of seconds is its own warm-up
        clock.once(prefill)
    clean(device)  # compilation may need more memory than a call
    times = [clock.once(prefill)[0] for _ in range(repeats)]
    density = sum(found) / len(found) if found else None
    values = {
        "ms": statistics.median(times),
        "times_ms": times,
        "first_call_ms": first,
        "peak_bytes": peak_bytes(device),
        "density": density,
    }
    return values, logits.float()


def compare(logits: torch.Tensor, reference: torch.Tensor | None) -> dict[str, Any]:
    """Error of the last token's logits against eager's, for the exact variants a check and for the sparse one a description."""
    if reference is None:
        return {}
    error = (logits - reference).abs().max().item()
    return {
        "logits_error": error,
        "logits_std": reference.std().item(),
        "same_token": bool((logits.argmax(-1) == reference.argmax(-1)).all()),
    }


def on_model(subject: Subject) -> Iterator[Prefill]:
    """One record a variant and length; a variant that fails says so in its own."""
    model, device = subject.model, subject.ids.device.type
    references: dict[int, torch.Tensor] = {}
    facts = {
        "shape": subject.name,
        "layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "requested_density": None,
        "seed": 0,
        "dynamic": True,
    }
    for variant in subject.variants:
        with variants.compiled(subject, variant):
            for length in subject.lengths:
                found: dict[str, Any] = {"density": None, "peak_bytes": None}
                try:
                    values, logits = measure(model, subject.ids[:, :length], subject.repeats, device)
                    if variant == "eager":
                        references[length] = logits
                    found |= values | compare(logits, references.get(length))
                except Exception as error:
                    found["error"] = reason(error)
                    clean(device)
                yield Prefill(**facts, **found, variant=variant, length=length)


def table(found: Iterable[Found], what: str = "{shape}, {layers} layers", note: str = "") -> str:
    """Milliseconds, speed against eager and peak memory: one row a variant and length.

    Args:
        what: was measured, in the heading; fields of a record in braces.
        note: about the columns of logits.
    """
    cells = latest(found, Prefill)
    parts = []
    for group in groups(cells, lambda r: (r["shape"], r["layers"], r["machine"]["gpu"] or "CPU")):
        eager = {record["length"]: record["ms"] for record in group if record["variant"] == "eager" and "ms" in record}
        rows = []
        for record in sorted(group, key=lambda r: (r["length"], _place(r["variant"]), r["requested_density"] or 0)):
            name = _name(record["variant"])
            if record["requested_density"] is not None:
                name += f", density {record['requested_density']:g}"
            if "error" in record:
                rows.append([size(record["length"]), name, failure(record["error"]), *["–"] * 5, commit(record)])
                continue
            base = eager.get(record["length"])
            peak = f"{record['peak_bytes'] / 2**30:.1f}" if record["peak_bytes"] else "–"
            density = f"{record['density']:.1%}" if record["density"] is not None else "–"
            ratio = f"{base / record['ms']:.2f}" if base else "–"
            rows.append([size(record["length"]), name, f"{record['ms']:.1f}", ratio, peak, density, *_logits(record), commit(record)])
        first = group[0]
        head = (
            f"### Prefill of one prompt, {what.format(**first)}\n\n"
            "Cache on, logits of the last token, medians. Logits: the largest difference from eager's over their standard deviation, and "
            f"whether the likeliest token is the same{note}. {conditions(group)}"
        )
        header = ["tokens", "variant", "ms", "× eager", "peak GiB", "density", "logits", "same token", "commit"]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


_ORDER = ("eager", "inductor", "default", "dense", "exact", "xattention", "sparsify", "minference", "token_select")
_NAMES = {"dense": "sparsify, dense", "exact": "sparsify, exact", "default": "sparsify, no options", "inductor": "Inductor"}


def _place(variant: str) -> tuple[int, str]:
    return _ORDER.index(variant.partition(" ")[0]), variant


def _name(variant: str) -> str:
    kind, _, numbers = variant.partition(" ")
    first, _, second = numbers.partition(":")
    if kind == "minference":
        return f"minference, {first} tokens in columns, {second} in diagonals"
    if kind == "token_select":
        return f"token_select, {second} tokens behind layer {first}"
    return _NAMES.get(variant, variant)


def _logits(record: Found) -> list[str]:
    """Only exact variants are compared with eager."""
    if record.get("logits_error") is None or record["variant"] == "eager":
        return ["–", "–"]
    return [f"{record['logits_error'] / record['logits_std']:.2f}", "yes" if record["same_token"] else "no"]


def plot(found: list[Found]) -> Any:
    """Milliseconds over length, and speed against eager where that was measured."""
    from matplotlib import pyplot

    runs = [r for r in latest(newest_device(kind(found, Prefill)), Prefill) if "ms" in r]
    if not runs:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    eager = {record["length"]: record["ms"] for record in runs if record["variant"] == "eager"}
    for variant, density in sorted({(r["variant"], r["requested_density"] or 0) for r in runs}, key=lambda v: (_place(v[0]), v[1])):
        chosen = (r for r in runs if (r["variant"], r["requested_density"] or 0) == (variant, density))
        points = sorted((r["length"], r["ms"]) for r in chosen)
        label = _name(variant) + (f", density {density:g}" if density else "")
        axes[0].plot(*zip(*points, strict=True), marker="o", label=label)
        ratios = [(length, eager[length] / ms) for length, ms in points if length in eager]
        if ratios:
            axes[1].plot(*zip(*ratios, strict=True), marker="o", label=label)
    lengths = sorted({record["length"] for record in runs})
    for axis, label in zip(axes, ("prefill, ms", "× eager"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [size(length) for length in lengths])
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return figure


BENCHMARK = Benchmark(
    name="prefill",
    place=1,
    measures="the prompt alone, by length: milliseconds, memory, and how far the last token's logits are from eager's",
    on_model=on_model,
    records=(Prefill,),
    title="Prefill",
    table=table,
    plots={"prefill": plot},
)

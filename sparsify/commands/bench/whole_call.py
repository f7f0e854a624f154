"""A whole call of `generate()`: reading a prompt, then some tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsify.api import record_density
from sparsify.commands.bench import variants
from sparsify.commands.bench.clock import Clock, clean, reason
from sparsify.commands.bench.records import Record
from sparsify.commands.bench.registry import Benchmark, Subject
from sparsify.commands.bench.tables import Found, conditions, failure, groups, latest, markdown, newest_device, size


@dataclass(frozen=True, kw_only=True)
class WholeCall(Record):
    """One variant's calls of `generate()` with one prompt, greedy."""

    NAME = "whole_call"
    KEYS = ("model", "variant", "length", "tokens")
    model: str
    variant: str
    length: int  # tokens of the prompt
    tokens: int  # generated
    first_call_s: float | None = None  # compilation included
    whole_s: float | None = None  # median of later calls
    prompt_s: float | None = None  # of calls that generate one token
    density: float | None = None  # visited share of the prompt's causal blocks; None where no blocks were chosen
    same_tokens: int | None = None  # from the first on, as eager's
    error: str | None = None


@dataclass(frozen=True)
class Bar:
    """Seconds of one call of `generate()` that reads its prompt. timed: as one call; else its two parts were timed apart."""

    name: str
    prompt: float
    tokens: float
    timed: bool


def on_model(subject: Subject) -> Iterator[WholeCall]:
    """One record a variant and length; a variant that fails says so in its own."""
    answers: dict[int, list[int]] = {}
    for variant in subject.variants:
        with variants.compiled(subject, variant):
            values: dict[str, Any]
            for length in subject.lengths:
                try:
                    values, answer = measure(subject, subject.ids[:, :length])
                    if variant == "eager":
                        answers[length] = answer
                    if length in answers:
                        values["same_tokens"] = _same(answer, answers[length])
                except Exception as error:
                    values = {"error": reason(error)}
                    clean(subject.ids.device.type)
                yield WholeCall(model=subject.name, variant=variant, length=length, tokens=subject.tokens, **values)


def _same(tokens: Sequence[int], others: Sequence[int]) -> int:
    return next((at for at, (one, other) in enumerate(zip(tokens, others, strict=True)) if one != other), len(tokens))


@torch.no_grad()
def measure(subject: Subject, ids: torch.Tensor) -> tuple[dict[str, Any], list[int]]:
    """Seconds of calls, realised density, and the tokens."""
    clock = Clock(ids.device.type)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def call(tokens: int) -> tuple[float, list[int]]:
        ms, found = clock.once(lambda: subject.model.generate(ids, max_new_tokens=tokens, **given))
        return ms / 1e3, found[0, ids.shape[1] :].tolist()

    clean(ids.device.type)
    with record_density() as found:
        first, answer = call(subject.tokens)
    call(1)
    times = {tokens: statistics.median(call(tokens)[0] for _ in range(subject.repeats)) for tokens in (subject.tokens, 1)}
    values = {"first_call_s": first, "whole_s": times[subject.tokens], "prompt_s": times[1]}
    return values | {"density": sum(found) / len(found) if found else None}, answer


def table(found: Iterable[Found]) -> str:
    """Seconds by variant and length."""
    parts = []
    for group in groups(latest(found, WholeCall), lambda r: (r["model"], r["machine"]["gpu"] or "CPU")):
        eager = {r["length"]: r["whole_s"] for r in group if r["variant"] == "eager" and r.get("whole_s")}
        rows = []
        for record in sorted(group, key=lambda r: (r["length"], list(variants.VARIANTS).index(r["variant"]))):
            start = [size(record["length"]), record["variant"]]
            if record.get("error"):
                rows.append([*start, failure(record["error"]), *["–"] * 6])
                continue
            whole, prompt = record["whole_s"], record["prompt_s"]
            ratio = f"{eager[record['length']] / whole:.2f}" if record["length"] in eager else "–"
            each = f"{1e3 * (whole - prompt) / (record['tokens'] - 1):.2f}" if record["tokens"] > 1 and whole > prompt else "–"
            density = f"{record['density']:.1%}" if record.get("density") is not None else "–"
            same = f"{record['same_tokens']} of {record['tokens']}" if record.get("same_tokens") is not None else "–"
            rows.append([*start, f"{whole:.2f}", ratio, f"{prompt:.2f}", each, density, same, f"{record['first_call_s']:.1f}"])
        head = (
            f"### Whole calls of generate(), {group[0]['model']}\n\n"
            f"A prompt and {group[0]['tokens']} tokens, greedy, medians. Prompt: of calls that generate one "
            f"token. Same tokens: as eager's, up to the first that differs. {conditions(group)}"
        )
        header = ["tokens", "variant", "s", "× eager", "prompt, s", "ms a token", "density", "same tokens", "first call, s"]
        parts.append(head + "\n\n" + markdown(header, rows))
    return "\n\n".join(parts)


def plot(found: list[Found]) -> Any:
    """The longest prompt's calls, one bar a variant."""
    cells = [r for r in latest(newest_device([r for r in found if r["benchmark"] == WholeCall.NAME]), WholeCall) if r.get("whole_s")]
    if not cells:
        return None
    longest = max(cells, key=lambda r: (r["length"], r["time"]))
    alike = [r for r in cells if all(r[key] == longest[key] for key in ("model", "length", "tokens"))]
    bars = []
    for record in sorted(alike, key=lambda r: list(variants.VARIANTS).index(r["variant"])):
        name = record["variant"] + (f",\n{record['density']:.0%} of the blocks" if record.get("density") is not None else "")
        bars.append(Bar(name, record["prompt_s"], max(0.0, record["whole_s"] - record["prompt_s"]), timed=True))
    where = longest["machine"]["gpu"] or "CPU"
    return draw(bars, f"{size(longest['length'])} tokens read, {longest['tokens']} generated, {longest['model']}, {where}")


def draw(bars: Sequence[Bar], title: str) -> Any:
    """A figure with one bar a variant."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 0.7 * len(bars) + 1.3), layout="constrained")
    names = [bar.name + ("" if bar.timed else " *") for bar in bars]
    axis.barh(names, [bar.prompt for bar in bars], label="prompt", color="#4c72b0")
    axis.barh(names, [bar.tokens for bar in bars], left=[bar.prompt for bar in bars], label="tokens", color="#dd8452")
    for row, bar in enumerate(bars):
        axis.text(bar.prompt + bar.tokens, row, f" {bar.prompt + bar.tokens:.1f}", va="center")
    axis.invert_yaxis()
    axis.set_xlim(right=1.08 * max(bar.prompt + bar.tokens for bar in bars))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("seconds" + ("" if all(bar.timed for bar in bars) else "      * prompt and tokens timed apart"))
    axis.legend(fontsize=8)
    return figure


BENCHMARK = Benchmark(
    name="whole_call",
    place=2,
    measures="a call of generate(), prompt and tokens: seconds, and whether the tokens are eager's",
    on_model=on_model,
    records=(WholeCall,),
    title="Whole calls",
    table=table,
    plots={"whole_call": plot},
)

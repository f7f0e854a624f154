"""The tables of sparse attention, generated tokens and narrowed prompts on CPUs."""

from __future__ import annotations

from typing import Any

from benchmarks.cpu import Cpu, CpuDecode, CpuTokensOn
from benchmarks.lib.registry import Benchmark
from sparsify.commands.bench.tables import Found, latest, markdown


def table(found: list[Found]) -> str:
    rows = [
        [
            one["what"],
            f"{one['length']}",
            f"{one['heads']} × {one['head_dim']}",
            f"{one['density']:.1%}",
            f"{one['dense_cpu_s']:.2f} s",
            f"{one['sparse_cpu_s']:.2f} s",
            f"{one['ratio']:.2f}",
            f"{one['first_call_s']:.1f} s",
        ]
        for one in latest(found, Cpu)
    ]
    head = [
        "what",
        "tokens",
        "heads × dim",
        "blocks visited",
        "dense, processor time",
        "sparse",
        "ratio",
        "first sparse call, by the clock",
    ]
    return "Processor time of all threads: what else runs on the machine does not count in it.\n\n" + markdown(head, rows)


def decode_table(found: list[Found]) -> str:
    rows = [
        [
            f"{one['layers']} × {one['hidden']}",
            f"{one['prompt']}",
            "forward calls" if one["way"] == "forward" else "`generate()`",
            one["variant"],
            f"{one['cpu_ms']:.2f}",
            f"{one['ratio']:.2f}",
            f"{one['first_s']:.1f}" if one.get("first_s") is not None else "–",
        ]
        for one in latest(found, CpuDecode)
    ]
    head = ["layers × width", "tokens before", "way", "variant", "ms a token, processor time", "× Inductor's faster", "first call, s"]
    text = (
        "One token of a model with random weights, medians of rounds by turns, each variant in a process of its own. "
        "Inductor is `torch.compile` over the model. "
        "First call: a prompt and a token, compilation included, by the clock, with whatever else ran on the machine."
    )
    return text + "\n\n" + markdown(head, rows)


def tokens_on_table(found: list[Found]) -> str:
    cells = sorted(latest(found, CpuTokensOn), key=lambda one: (one["length"], one["layer"], one["keep"]))
    rows = [
        [
            f"{one['length']}",
            f"{one['layers']} × {one['hidden']}",
            f"{one['layer']}",
            f"{one['keep']:.0%}",
            f"{one['cpu_s']:.2f} s",
            f"{one['ratio']:.2f}",
            f"{one['cache_share']:.2f}",
        ]
        for one in cells
    ]
    head = ["tokens", "layers × width", "chosen by layer", "go on", "processor time", "÷ all go on", "keys in the cache, ÷ all"]
    return "A prompt of a model with random weights through `token_select`; seconds do not depend on which tokens go on.\n\n" + markdown(
        head, rows
    )


def tokens_on_plot(found: list[Found]) -> Any:
    """Processor time over the share of tokens that go on, a line for each layer that chooses, and what the layers before it take."""
    from matplotlib import pyplot

    cells = latest(found, CpuTokensOn)
    if not cells:
        return None
    longest = max(one["length"] for one in cells)
    cells = [one for one in cells if one["length"] == longest]
    figure, axis = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for layer, marker in zip(sorted({one["layer"] for one in cells}), "osD^v*", strict=False):
        points = sorted((one["keep"], one["ratio"]) for one in cells if one["layer"] == layer)
        (line,) = axis.plot(*zip(*points, strict=True), marker=marker, label=f"chosen by layer {layer}")
        least = (layer + 1) / cells[0]["layers"]
        axis.axhline(least, color=line.get_color(), linestyle=":", label=f"{layer + 1} of {cells[0]['layers']} layers")
    axis.set(xlabel="share of the prompt's tokens that go on", ylabel="processor time ÷ that with all tokens", ylim=(0, 1.05))
    axis.set_title(f"a prompt of {longest} tokens on a CPU", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


BENCHMARKS = (
    Benchmark(
        name="cpu",
        place=14,
        measures="sparse attention on a CPU beside SDPA, and the prefill of a small model beside eager",
        module="benchmarks.cpu.run",
        records=(Cpu,),
        title="Sparse attention on CPUs",
        table=table,
    ),
    Benchmark(
        name="cpu_decode",
        place=15,
        measures="a token of a small model on a CPU: eager, by Inductor, by sparsify; own calls and generate()",
        module="benchmarks.cpu.decode",
        records=(CpuDecode,),
        title="Tokens on CPUs",
        table=decode_table,
    ),
    Benchmark(
        name="cpu_tokens_on",
        place=16,
        measures="a prompt of which few tokens go on behind a layer, on a CPU, beside all of them",
        module="benchmarks.cpu.tokens_on",
        records=(CpuTokensOn,),
        title="Tokens that go on, on a CPU",
        table=tokens_on_table,
        plots={"tokens-on": tokens_on_plot},
    ),
)

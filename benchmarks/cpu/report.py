"""The tables of sparse attention and of generated tokens on CPUs."""

from __future__ import annotations

from benchmarks.cpu import Cpu, CpuDecode
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
)

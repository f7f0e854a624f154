"""The table of sparse attention on CPUs."""

from __future__ import annotations

from benchmarks.cpu import Cpu
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
)

"""What sparse attention saves on a CPU: the op alone, and the prefill of a small model."""

from dataclasses import dataclass

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class Cpu(Record):
    """Dense and sparse by turns in one process. Processor seconds are those of its threads, which other work does not change."""

    NAME = "cpu"
    KEYS = ("what", "length", "heads", "head_dim", "requested_density", "threads")
    what: (
        str  # "attention": the op along given lists beside SDPA; otherwise the model whose prompt is read, estimate and selection included
    )
    length: int  # tokens
    heads: int  # query heads
    head_dim: int
    threads: int
    requested_density: float | None  # of the lists; None: chosen by the model's settings
    density: float  # visited share of the causal blocks
    dense_s: float  # medians: of the clock
    sparse_s: float
    dense_cpu_s: float  # and of processor time
    sparse_cpu_s: float
    ratio: float  # sparse_cpu_s over dense_cpu_s
    first_call_s: float  # of the sparse variant, compilation included

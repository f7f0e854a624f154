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


@dataclass(frozen=True, kw_only=True)
class CpuDecode(Record):
    """A token of a small model with random weights. Variants by turns, each in a process of its own, on one thread."""

    NAME = "cpu_decode"
    KEYS = ("layers", "hidden", "prompt", "threads", "way", "variant")
    layers: int
    hidden: int
    prompt: int  # tokens before
    threads: int
    way: str  # "forward": the caller's own calls over a cache; "generate": the tokens of generate()
    variant: str
    cpu_ms: float  # processor time of a token, of the calling thread, median
    ratio: float  # over the faster of Inductor's
    first_s: float | None = None  # the prompt and the first token, compilation included, by the clock


@dataclass(frozen=True, kw_only=True)
class CpuTokensOn(Record):
    """A prompt of a small model with random weights, of which some tokens go on behind a layer. Variants by turns in one process."""

    NAME = "cpu_tokens_on"
    KEYS = ("length", "layers", "hidden", "threads", "layer", "keep")
    length: int  # tokens
    layers: int
    hidden: int
    threads: int
    layer: int  # that chooses, from 0
    keep: float  # share of the tokens that go on
    cpu_s: float  # processor time of a call, of all threads, median
    dense_cpu_s: float  # of one in which all tokens go on
    ratio: float
    cache_share: float  # keys in the cache over those of the other call

"""What is a cache that evicts worth? Decode over kept keys, scoring and eviction of a prompt, and whether the answers survive."""

from dataclasses import dataclass

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class DecodeKernel(Record):
    """One token's attention of one layer over kept keys."""

    NAME = "decode_kernel"
    KEYS = ("variant", "batch", "length", "share", "tiling")
    variant: str  # "sparsify" or a peer
    batch: int
    length: int  # slots of the cache
    share: float  # of the slots that hold a key
    ms: float  # median
    gb_per_s: float  # of the kept keys and values
    share_of_copy: float  # of the bytes per second that a copy reads and writes
    error: float | None = None  # largest, against SDPA in fp32
    tiling: dict[str, int] | None = None  # None: the one that is chosen by itself


@dataclass(frozen=True, kw_only=True)
class DecodeFull(Record):
    """One token's attention of one layer over a cache from which nothing is evicted."""

    NAME = "decode_full"
    KEYS = ("variant", "shape", "batch", "length", "capacity", "padded")
    variant: str  # a kind of cache, or a peer; behind "full cache" a tiling that was asked for
    shape: str  # of benchmarks.lib.models
    batch: int
    length: int  # tokens of the longest row
    capacity: int  # slots
    padded: bool  # rows of half to all of the length
    ms: float  # median
    gb_per_s: float  # of the keys and values in use
    error: float  # largest, against SDPA in fp32


@dataclass(frozen=True, kw_only=True)
class DecodeReading(Record):
    """Attention of one token, or of several, of one layer over a cache of fewer bits, or over some of its pages."""

    NAME = "decode_reading"
    KEYS = ("variant", "shape", "batch", "length")
    variant: (
        str  # "16 bits", "fp8", "int4", "pages" and the share that is read, of 16 bits or codes; and how many tokens, where more than one
    )
    shape: str  # of benchmarks.lib.models
    batch: int
    length: int  # tokens
    ms: float  # median
    ms_all_layers: float  # of as many layers as the shape has
    bytes_read: int  # that a step cannot do without
    error: float  # largest, against SDPA in fp32 over all keys as they came


@dataclass(frozen=True, kw_only=True)
class DecodeOffloaded(Record):
    """One sequence's token where keys and values lie in the host's memory."""

    NAME = "decode_offloaded"
    KEYS = ("variant", "shape", "layers", "length")
    variant: str  # of benchmarks.cache.offload.VARIANTS
    shape: str  # of benchmarks.lib.models
    layers: int
    length: int  # tokens stored
    limit_ms: float | None  # of the bytes of all keys and values over the bus; None on a CPU
    ms: float | None = None  # a token that is read back, median
    peak_bytes: int | None = None  # most device memory; None on a CPU
    cache_bytes: int | None = None  # of the cache on the device
    host_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class DecodeModel(Record):
    """A whole model, compiled, a token at a time."""

    NAME = "decode_model"
    KEYS = ("shape", "layers", "variant", "tuned", "batch", "prompt", "budget", "policy", "mode")
    variant: str  # of benchmarks.cache.model.VARIANTS
    tuned: bool  # by Inductor's coordinate descent
    batch: int
    prompt: int  # tokens before the first timed one
    budget: int | None  # tokens kept; None keeps all
    policy: str | None
    shape: str  # of benchmarks.lib.models
    layers: int
    mode: str  # of torch.compile
    ms_per_token: float  # in a loop that feeds itself, median
    ms_per_token_read_back: float  # where the host reads each token before the next, median
    slowest_ms: float
    compile_s: float
    weight_bytes: int
    cache_bytes: int
    kept_over_budget: float | None  # all buffers over the keys and values of `budget` tokens
    peak_bytes: int | None
    graphs: int  # that Dynamo made
    cudagraph_skips: int


@dataclass(frozen=True, kw_only=True)
class CachePrefill(Record):
    """A whole prompt through an uncompiled model."""

    NAME = "cache_prefill"
    KEYS = ("shape", "layers", "policy", "budget", "length", "batch")
    policy: str | None  # None: a DynamicCache
    budget: int | None
    length: int  # tokens
    batch: int
    shape: str
    layers: int
    ms: float
    store_ms: float  # scoring and eviction of all layers
    peak_bytes: int | None
    weight_bytes: int
    cache_bytes: int
    kept_over_budget: float | None
    finite: bool  # the logits


@dataclass(frozen=True, kw_only=True)
class DecodeStore(Record):
    """Scoring and eviction of one layer after a prompt."""

    NAME = "decode_store"
    KEYS = ("policy", "batch", "length", "budget")
    policy: str
    batch: int
    length: int  # tokens of the prompt
    budget: int  # tokens kept
    ms: float


@dataclass(frozen=True, kw_only=True)
class DecodeAppend(Record):
    """Attention of several tokens over a full cache, one layer."""

    NAME = "decode_append"
    KEYS = ("variant", "batch", "count", "length")
    variant: str  # "sparsify" or "sdpa"
    batch: int
    count: int  # tokens
    length: int  # keys kept
    ms: float
    tflops: float
    error: float | None = None  # largest, of the last token, against SDPA in fp32


@dataclass(frozen=True, kw_only=True)
class EvictionAnswers(Record):
    """Answers over caches that keep, or read, a share of a text."""

    NAME = "eviction_answers"
    KEYS = ("model_sha256", "text_sha256", "policy", "asked", "length", "share")
    policy: str  # of benchmarks.cache.asking.settings
    options: dict[str, object]  # of the policy
    asked: str  # of benchmarks.cache.asking.ASKED
    length: int  # bytes of a text with its questions
    share: float  # of the text that is kept, or of what is kept that a token reads
    right: int
    questions: int
    interval: list[float]  # of right / questions: Wilson, 95 %
    kept: float  # share that was really kept, the mean of all heads and layers
    seconds: float  # of all ways to ask together
    seeds: list[int]
    model: str
    model_sha256: str
    text_sha256: str
    heads_sha256: str | None = None  # of locret: its trained heads


@dataclass(frozen=True, kw_only=True)
class EvictionNeedles(Record):
    """Answers of prompts that end in one question each, a question at a time; `EvictionAnswers` took its place."""

    NAME = "eviction_needles"
    KEYS = ("model_sha256", "text_sha256", "policy", "length", "share", "window", "kernel")
    policy: str
    length: int  # bytes of a prompt
    share: float  # of the prompt that is kept
    right: int
    asked: int
    interval: list[float]  # of right / asked: Wilson, 95 %
    kept: float  # share that was really kept
    seconds: float
    seeds: list[int]
    model: str
    model_sha256: str
    text_sha256: str
    window: int | None = None  # of snapkv: queries that score
    kernel: int | None = None  # of snapkv: keys that the smoothing spans


@dataclass(frozen=True, kw_only=True)
class EvictionBlind(Record):
    """Answers to questions that are asked after the text was read, each over the same cache; `EvictionAnswers` took its place."""

    NAME = "eviction_blind"
    KEYS = ("model_sha256", "text_sha256", "policy", "length", "share")
    policy: str  # or "pages" and "clusters": everything is kept, and read by those
    length: int  # bytes of a text with its questions
    share: float  # of the text that is kept, or of what is kept that a token reads
    every: int  # bytes of the calls in which the text is read; 0: one call
    right: int
    asked: int
    interval: list[float]  # of right / asked: Wilson, 95 %
    seconds: float
    seeds: list[int]
    model: str
    model_sha256: str
    text_sha256: str
    heads_sha256: str | None = None  # of locret: its trained heads


@dataclass(frozen=True, kw_only=True)
class EvictionStream(Record):
    """A long text under a policy."""

    NAME = "eviction_stream"
    KEYS = ("model_sha256", "text_sha256", "policy", "positions", "sinks", "window", "stretch")
    positions: str  # "in_cache", "absolute", or "recomputed" without a cache
    sinks: int
    window: int
    stretch: int  # bytes that one NLL is taken over
    nll: list[float]  # nats a byte, by stretch
    model: str
    model_sha256: str
    text_sha256: str
    bytes: int | None = None  # of the text
    seconds: float | None = None
    policy: str | None = None  # of benchmarks.cache.asking.settings, whose budget is sinks and window together; None: "streaming_llm"


@dataclass(frozen=True, kw_only=True)
class CacheKeeping(Record):
    """A prompt's cache that goes to a file and comes back, or is prepared."""

    NAME = "cache_keeping"
    KEYS = ("shape", "layers", "length", "variant", "operation")
    shape: str  # of benchmarks.lib.models
    layers: int
    length: int  # tokens of the prompt
    variant: str  # of benchmarks.cache.keeping.variants
    operation: str  # "save", "load" or "prepare"
    seconds: float  # the least of some
    bytes: int  # of the file; of the keys that are prepared
    file_seconds: float | None  # of as many bytes between the host's memory and a file in the same folder, in as many threads
    bus_seconds: float | None  # of as many bytes between pinned memory and the device; None on a CPU
    peak_bytes: int | None  # most device memory beside what was held before, and for "load" beside what is held afterwards; None on a CPU


@dataclass(frozen=True, kw_only=True)
class CacheMemory(Record):
    """What a cache holds after a prompt, beside the bytes of the tokens that it may keep."""

    NAME = "cache_memory"
    KEYS = ("shape", "layers", "length", "variant")
    shape: str  # of benchmarks.lib.models
    layers: int
    length: int  # tokens of the prompt
    variant: str  # of benchmarks.cache.keeping.memory_variants
    slots: int  # tokens that may be kept of each head, on the mean
    promised_bytes: int  # of the keys and values of so many, with bounds of pages, or with scales of codes and the newest tokens in 16 bits
    kept_bytes: int  # of all buffers
    device_bytes: int | None  # what the allocator has given out for them; None on a CPU

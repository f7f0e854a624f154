"""What a user waits for in a whole model: the prefill of a prompt, the tokens of an answer, and compiling."""

from dataclasses import dataclass

from benchmarks.lib.records import Record
from sparsify.commands.bench.prefill import Prefill

__all__ = ["Calibrating", "CompileTime", "Generate", "GenerateSeconds", "LongPrompt", "Padded", "Prefill", "Speculation"]


@dataclass(frozen=True, kw_only=True)
class Generate(Record):
    """One variant's tokens through `generate()` after a prompt whose keys are in the cache."""

    NAME = "generate"
    KEYS = ("shape", "layers", "variant", "length", "batch", "padded", "sampled", "tokens", "density")
    shape: str  # of benchmarks.lib.models
    layers: int
    variant: str  # of benchmarks.model.generate.VARIANTS
    length: int  # tokens before the call, padding included
    batch: int
    padded: bool  # rows begin with padding, up to half of them
    tokens: int  # new ones of each call
    sampled: bool
    limit_ms: float  # of the bytes of weights, keys and values, at the memory's bandwidth
    peak_bytes: int | None  # most device memory; None on a CPU
    ms: float | None = None  # a token: median of the calls' times, everything counted, over `tokens`
    times_s: list[float] | None = None  # of calls
    first_call_s: float | None = None  # compilation included
    gpu_ms: dict[str, float] | None = None  # a token's kernels, by what they compute, of one call more under the profiler
    whole_first_s: float | None = None  # a call that reads its prompt, the first one
    whole_s: float | None = None  # and the next one
    density: float | None = None  # share of a prompt's causal blocks that is visited; None: all
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Speculation(Record):
    """One sequence's tokens through `generate()` where tokens are drafted over some pages and verified over everything."""

    NAME = "speculation"
    KEYS = ("shape", "layers", "length", "tokens", "drafts", "share")
    shape: str  # of benchmarks.lib.models, or a trained model's name
    layers: int
    length: int  # tokens before the call
    tokens: int  # new ones of each call
    drafts: str  # tokens that are drafted before each verification: a number, "auto", or "0" for none
    share: float  # of the pages that a drafted token reads
    trained: bool  # else weights and keys are random, and what is kept means nothing
    ms: float | None = None  # a token: median of the calls, over `tokens`
    ms_a_round: float | None = None  # of drafts and their verification
    kept: float | None = None  # share of the drafted tokens
    same_tokens: int | None = None  # that agree with those without drafts, up to the first that does not
    first_call_s: float | None = None  # compilation included
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class LongPrompt(Record):
    """One variant's reading of a long prompt into a cache that evicts."""

    NAME = "long_prompt"
    KEYS = ("shape", "layers", "variant", "length", "budget", "density", "allocator")
    shape: str  # of benchmarks.lib.models
    layers: int
    variant: str  # of benchmarks.model.long_prompt.VARIANTS
    length: int  # tokens
    budget: int  # tokens that the cache keeps per KV head
    density: float  # share of the causal blocks that attention visits
    allocator: str  # settings of torch's allocator, empty without any
    weight_bytes: int
    s: float | None = None  # median of the calls after the first
    times_s: list[float] | None = None
    first_call_s: float | None = None  # compilation included
    peak_bytes: int | None = None  # most memory of tensors, weights included, in the calls after the first; None on a CPU
    reserved_bytes: int | None = None  # most that the allocator held, fragments included
    first_peak_bytes: int | None = None  # the same of the first call
    first_reserved_bytes: int | None = None
    graphs: int | None = None  # that the first call compiled
    blocks_in_parts: int | None = None  # feed-forward blocks of these that ffn_parts rewrote; none where the graph was compiled before
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Padded(Record):
    """One variant's reading of prompts of different lengths."""

    NAME = "padded"
    KEYS = ("shape", "layers", "variant", "prompts", "shortest", "longest")
    shape: str  # of benchmarks.lib.models
    layers: int
    variant: str  # of benchmarks.model.padded.VARIANTS
    prompts: int
    shortest: int  # tokens; lengths between are evenly spread
    longest: int
    tokens: int  # of all prompts together
    peak_bytes: int | None  # most device memory; None on a CPU
    s: float | None = None  # median of the calls after the first
    times_s: list[float] | None = None
    first_call_s: float | None = None  # compilation included
    difference: float | None = None  # largest of the last tokens' logits from those of each prompt alone
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Visual(Record):
    """A prompt with images, its vision tower included; seconds of the call."""

    NAME = "visual"
    KEYS = ("shape", "layers", "tokens", "image_tokens", "keep", "variant")
    shape: str
    layers: int  # of the decoder
    tokens: int  # of the prompt
    image_tokens: int  # of those
    keep: float  # share of the image tokens that go on
    variant: str
    peak_bytes: int | None  # most device memory; None on a CPU
    s: float | None = None  # median of the calls after the first
    times_s: list[float] | None = None
    first_call_s: float | None = None  # compilation included
    cached: float | None = None  # tokens that a layer's cache holds, on average over layers
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Calibrating(Record):
    """`sparsify calibrate attention`, from the command to the plan."""

    NAME = "calibrating"
    KEYS = ("shape", "layers", "variant", "lengths", "pieces", "settings")
    shape: str  # of benchmarks.lib.models
    layers: int
    variant: str  # of benchmarks.model.calibrating.VARIANTS
    lengths: list[int]  # of the prompts, tokens
    pieces: int  # prompts of each length
    settings: list[str]  # options of methods that were given
    peak_bytes: int | None  # most device memory, weights included; None on a CPU
    s: float | None = None
    heads: int | None = None  # that got a threshold of their own
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompileTime(Record):
    """Seconds of CPU time, of this process and its children, that compiling a prompt and a token takes; medians of `repeats`."""

    NAME = "compile_time"
    KEYS = ("layers", "hidden", "length")
    layers: int
    length: int  # tokens
    hidden: int
    repeats: int
    inductor_cold_s: float  # cold: with empty caches
    inductor_cold_wall_s: float
    inductor_warm_s: float
    inductor_warm_wall_s: float
    sparsify_cold_s: float
    sparsify_cold_wall_s: float
    sparsify_warm_s: float
    sparsify_warm_wall_s: float
    own_s: float  # sparsify's own stages, without lowering
    own_warm_s: float
    sparsify_lower_s: float
    cold_ratio: float  # sparsify over Inductor
    warm_ratio: float
    validate_s: float | None = None  # of own_s: checking the rewritten graph
    validate_share: float | None = None  # of sparsify_cold_s
    validate_warm_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateSeconds(Record):
    """Wall seconds of `generate()` in a fresh process: one prompt twice, then prompts of other lengths once each."""

    NAME = "generate_seconds"
    KEYS = ("layers", "hidden", "way", "state", "exact")
    layers: int
    hidden: int
    length: int  # tokens of the first prompt
    tokens: int  # generated for each prompt
    way: str  # eager, regions (sparsify.compile) or whole
    state: str  # cold: empty cache folders; warm: those that the cold process left
    exact: bool  # only methods that keep the result
    first_s: float  # the first answer, compilation included
    again_s: float  # the same once more
    beyond_s: float  # first_s - again_s
    lengths: list[int]  # tokens of the other prompts
    prompts_s: list[float]  # their answers
    graphs: int  # that sparsify compiled
    compiled_layers: int  # attention and feed-forward sites in them
    capture: str  # how sparsify captured the model

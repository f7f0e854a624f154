"""What does skipping feed-forward blocks save, and what does it do to answers?"""

from dataclasses import dataclass
from typing import Any

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class FfnStack(Record):
    """A token through the blocks of a model alone."""

    NAME = "ffn-stack"
    KEYS = ("variant", "rows", "share", "pattern")
    variant: str  # "inductor" or "sparsify"
    rows: int  # batch
    share: float  # of the blocks that are skipped
    pattern: str  # "all rows" skip the same blocks, or "each row by itself"
    layers: int
    shape: dict[str, int]
    ms: float  # median
    times_ms: list[float]
    bytes: int  # of the blocks' weights
    bandwidth: float  # bytes a second, the fastest of `bandwidths`
    bandwidths: dict[str, float]  # by way to move memory
    error: float | None = None  # relative, largest
    blocks_without_rows: float | None = None  # share of the blocks that every row skips


@dataclass(frozen=True, kw_only=True)
class FfnModel(FfnStack):
    """A token through a whole model."""

    NAME = "ffn-model"
    prompt: int  # tokens before it


@dataclass(frozen=True, kw_only=True)
class FfnPrefill(Record):
    """One block over the rows of a prompt."""

    NAME = "ffn-prefill"
    KEYS = ("variant", "rows", "share")
    variant: str
    rows: int
    share: float  # of the rows that skip
    ms: float  # median
    times_ms: list[float]
    tflops: float  # of the computed rows
    over_dense: float  # time over Inductor's
    efficiency: float  # Inductor's time times the computed share, over ours
    shape: dict[str, int]
    bandwidths: dict[str, float]
    error: float | None = None  # relative, largest


@dataclass(frozen=True, kw_only=True)
class FfnQuality(Record):
    """Answers and text of a model that skips."""

    NAME = "ffn-quality"
    KEYS = ("model_sha256", "policy", "threshold", "skip", "probability", "layers", "seed", "length", "rows")
    model: str
    model_sha256: str
    text_sha256: str
    blocks: int
    length: int  # bytes of a prompt
    policy: str  # of benchmarks.ffn.quality.Skipper
    nll: float  # nats a byte
    right: int  # answers
    asked: int
    interval: list[float]  # of right / asked: Wilson, 95 %
    share: float  # of the blocks that eligible rows skipped
    similarity_by_block: list[float] | None = None  # of the dense model
    rows: str | None = None  # which may skip: "generated" or "all"
    threshold: float | None = None  # of "similarity", as skip
    skip: int | None = None
    probability: float | None = None  # of "random", as seed
    seed: int | None = None
    layers: list[int] | None = None  # that are left out


@dataclass(frozen=True, kw_only=True)
class FfnTilings(Record):
    """One tiling of the kernel for few rows."""

    NAME = "ffn-tilings"
    KEYS = ("rows", "tiling")
    rows: int
    tiling: dict[str, Any]
    ms_per_block: float


@dataclass(frozen=True, kw_only=True)
class FfnPrefillTilings(Record):
    """One tiling of the kernel for many rows."""

    NAME = "ffn-prefill-tilings"
    KEYS = ("rows", "tiling")
    rows: int
    tiling: dict[str, Any]
    name: str
    ms: float

"""Is sparse attention faster when all of it is counted? Estimate, selection, index building and attention as one call."""

from dataclasses import dataclass

from benchmarks.lib.records import Record


@dataclass(frozen=True, kw_only=True)
class WholeOp(Record):
    """One call at one length. kind: "dense" (a peer, or sparsify's dense kernel, by `name`), "sparse", "chunks" (selection in parts) or
    "failure"."""

    NAME = "whole_op"
    KEYS = ("kind", "length", "name", "stride", "pool", "target", "heads", "kv_heads")
    kind: str
    length: int  # tokens
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    name: str | None = None
    stride: int | None = None  # of the estimate, as pool
    pool: str | None = None
    target: float | None = None  # density asked for
    threshold: float | None = None  # that gives it
    density: float | None = None  # visited share of the causal blocks
    ms: float | None = None  # median
    samples: list[float] | None = None  # ms
    select_ms: float | dict[str, float] | None = None  # estimate, selection and lists alone; of "chunks" by MiB of scratch
    attend_ms: float | None = None  # attention along the lists alone
    speedup: float | None = None  # over the run's fastest dense peer
    speedups: dict[str, float] | None = None  # by peer
    estimate_share: float | None = None  # operations of the estimate over those of dense attention
    bound: float | None = None  # 1 / (density + estimate_share)
    kept_mass: float | None = None  # mean share of a row's softmax mass in the visited blocks
    scratch_bytes: int | None = None  # device memory beside inputs and outputs
    error: str | None = None

"""Calls that can be both predicted and measured, as plain data: what calibration runs, and what a benchmark's records say they ran."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch

from sparsify.costs import work
from sparsify.costs.device import Device
from sparsify.costs.seconds import expected_density, seconds
from sparsify.costs.sizes import AttentionSizes
from sparsify.costs.work import TILE, Work
from sparsify.errors import ProfileError
from sparsify.ops.estimate import Estimate, Pool

Kind = Literal["attention", "select", "whole", "decode", "ffn", "linear", "elementwise"]
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Workload:
    """One call.

    kind: "attention" (prefill or chunk), "select" (estimate, choice and lists), "whole" (selection, then attention along its lists),
        "decode" (one row of each sequence), "ffn" (blocks of ffn_skip), "linear" (one weight), "elementwise" (a sum of two tensors).
    kernel: whose, as in `sparsify.costs.work`; in a decode step "masked" is SDPA with a mask tensor.
    batch: sequences.
    query_heads, kv_heads: heads.
    query_len, key_len: query rows and keys, tokens.
    head_dim: elements of a query, key or value vector.
    density: of block lists over causal blocks, None without lists; of a selection in two stages, what it keeps, None before it was run.
    window: last keys that a row sees, tokens, 0: all.
    sinks: first keys that a window does not hide, tokens.
    stride: tokens that one score of the estimate spans.
    variants: of the estimate.
    pool: how a query block's cells are combined; under "row" by thresholds, of structured operands, under the others a share of the blocks
        is kept.
    threshold, min_share: under "row", shares of a cell's mass, as in `sparsify.ops.selection.SelectCall`.
    refine_stride, coarse_threshold: likewise, of two stages.
    listed: share of the causal blocks that the first of two stages lists, None before it was run.
    rows: activations of a product or a feed-forward block.
    inputs, outputs: of a weight; a feed-forward block is gated and goes inputs → outputs → inputs.
    skipped: share of the feed-forward calls that is left out.
    size: bytes that an elementwise call moves.
    dtype: of all operands.
    """

    kind: Kind
    kernel: str = ""
    batch: int = 1
    query_heads: int = 32
    kv_heads: int = 8
    query_len: int = 1
    key_len: int = 1
    head_dim: int = 128
    density: float | None = None
    window: int = 0
    sinks: int = 0
    stride: int = 0
    variants: tuple[str, ...] = ()
    pool: Pool = "max"
    threshold: float = 0.9
    min_share: float = 0.0
    refine_stride: int = 0
    coarse_threshold: float = 0.95
    listed: float | None = None
    rows: int = 0
    inputs: int = 0
    outputs: int = 0
    skipped: float = 0.0
    size: int = 0
    dtype: Dtype = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def attention(self) -> AttentionSizes:
        numbers = (self.batch, self.query_heads, self.kv_heads, self.query_len, self.key_len, self.head_dim, self.head_dim)
        return AttentionSizes(*numbers, self.torch_dtype)

    def works(self) -> tuple[Work, ...]:
        """What the call does, kernels one after the other."""
        listed = self.density is not None
        attend = lambda: work.attention(
            self.attention, self.kernel, share=self.density if listed else 1, listed=listed, window=self.window + self.sinks or None
        )
        if self.kind == "attention":
            return (attend(),)
        if self.kind == "select":
            return self._selecting()
        if self.kind == "whole":
            return *self._selecting(), attend()
        if self.kind == "decode":
            return (work.decode(self.attention, self.kernel),)
        if self.kind == "ffn":
            size = 3 * self.inputs * self.outputs * self.torch_dtype.itemsize
            return (work.skipped_ffn(self.rows, size, self.torch_dtype, 1 - self.skipped),)
        if self.kind == "linear":
            product = work.stream if self.rows <= FEW_ROWS else work.linear
            return (product(self.rows, self.inputs, self.outputs, self.torch_dtype),)
        return (work.elementwise(self.size),)

    def _selecting(self) -> tuple[Work, ...]:
        kept = expected_density(sympy.Integer(self.key_len)) if self.density is None else self.density
        estimate = Estimate.from_names(self.variants)
        return work.selections(self.attention, self.stride, TILE, estimate, self.pool, self.refine_stride, kept, self.listed)

    def as_record(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Workload:
        """The workload that `as_record` wrote; other keys are ignored. Raises ProfileError for a record without a kind."""
        names = {f.name for f in dataclasses.fields(cls)}
        fields = {name: value for name, value in record.items() if name in names}
        if "variants" in fields:
            fields["variants"] = tuple(fields["variants"])
        if "kind" not in fields:
            raise ProfileError("a record that says no kind of call", where=str(record)[:80])
        return cls(**fields)


# up to here a weight is streamed for all rows at once, and time does not depend on them
FEW_ROWS = 64


@dataclass(frozen=True)
class Sample:
    """A measured call.

    seconds: median of one call.
    """

    workload: Workload
    seconds: float


def predict(workload: Workload, device: Device) -> float:
    """Seconds that the device's profile gives a call."""
    return float(sympy.N(seconds(workload.works(), device)))

"""`sparsify::attention`: schema and fake kernel.

One attention op carries everything that methods may combine on a site. For query row q of head h of batch row b, with
start = query_start (key_len - query_len when None), key k is visible when all of these hold:

    causal                k <= q + start
    windows[h] = w > 0    k > q + start - w, or k is a sink
    key_flags             bit 0 of key_flags[b, k] is set
    segments              segments[b, k] == segments[b, q + start]
    block lists           k // block_size is among block_indices[b, h, q // block_size, :block_counts[b, h, q // block_size]]

A sink is a key with bit 1 of key_flags set; without key_flags, a key k < sinks. `windows` is empty (none), one number for all
heads, or one per query head (0 = none for that head). A row without a visible key has LSE -inf and holds what `empty_rows` says:

    zero    0, as scaled_dot_product_attention gives it for a boolean mask
    nan     NaN, as the softmax of -inf alone
    mean    the average of all keys' values: `lowest`, the finite number that hides, swallows every score beside it
    fused   as mean, but 0 where mean gives NaN, as scaled_dot_product_attention does

With one of the last three and a bias, rows whose visible keys all have a bias that hides (LSE below SUNK) are among them: they hold the
average that is weighted by the softmax of the bias over visible keys and of lowest + hidden_bias (-inf for "nan") over the others.

Rows that only block lists leave without a key hold 0 in any case.

    logit = softcap(scale · q·k) + alibi_slopes[b, h] · k + bias[b, h, q, k];  softcap(x) = c · tanh(x / c) when softcap = c > 0

A batch of 1 broadcasts in key_flags, segments, alibi_slopes, bias and hidden_bias; one head and one query row in the last two.

`sink_logits[h]` joins the softmax's denominator (and the LSE) with no value.

`sparsify.ops.selection` makes block lists for it; `sparsify.ops.sparse_attention` is both in one call.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsify.ops.call import OpCall, Operand
from sparsify.ops.library import define
from sparsify.ops.limits import cdiv

# Inductor and AOTAutograd cache compiled graphs by op name and constants, not by kernel source: raise this when semantics change.
VERSION = 4

# a log of a sum of exponentials below this is made of numbers that hide, not of scores
SUNK = -1e30
EMPTY_ROWS = ("zero", "nan", "mean", "fused")


@dataclass(frozen=True, eq=False)
class AttentionCall(OpCall):
    """One call of `sparsify::attention`; the module says what is computed.

    query: [batch, query_heads, query_len, head_dim], floating point; key and value have its dtype.
    key: [batch, kv_heads, key_len, head_dim].
    value: [batch, kv_heads, key_len, v_head_dim].
    key_flags: bit 0: a key is visible, bit 1: it is a sink.
    segments: a row sees keys of its own segment; a row's segment is that of the key at its position.
    query_start: key position of query row 0; None: key_len - query_len.
    block_counts: how many key blocks each query block of each head visits.
    block_indices: which key blocks those are, rising.
    sink_logits: joins each row's denominator with no value.
    alibi_slopes: times the key position, added to the logits.
    bias: added to the logits; of one query row: whatever the row.
    hidden_bias: added to `lowest` at hidden keys of rows without a visible one.
    scale: of the logits.
    causal: whether later keys are hidden from a row.
    windows: last keys that a row sees: empty (all), one number for all heads, or one per query head (0 = all keys).
    sinks: first keys that a window does not hide, without key_flags.
    softcap: bound of the logits, 0 for none.
    block_size: query rows and keys of a block of the block lists.
    seq_major: the output is the transpose of a contiguous [batch, query_len, heads, dim].
    empty_rows: what rows without a visible key hold, one of EMPTY_ROWS.
    lowest: the finite number that hides, for "mean" and "fused".
    sequence: name of the group of processes among which the text is divided (`sparsify.distributed.sequence`): operands and result are
        this process's part of it, and the call is over all of it. Empty: the operands are the text.
    """

    NAME: ClassVar[str] = "attention"
    VERSION: ClassVar[int] = VERSION
    UNREAD: ClassVar[tuple[str, ...]] = ("seq_major", "empty_rows", "lowest", "hidden_bias")

    query: Annotated[Tensor, Operand("batch query_heads query_len head_dim")]
    key: Annotated[Tensor, Operand("batch kv_heads key_len head_dim")]
    value: Annotated[Tensor, Operand("batch kv_heads key_len v_head_dim")]
    _: KW_ONLY
    key_flags: Annotated[Tensor | None, Operand("batch|1 key_len", "integers")] = None
    segments: Annotated[Tensor | None, Operand("batch|1 key_len", "integers")] = None
    query_start: Annotated[Tensor | None, Operand("", "integers", anywhere=True)] = None
    block_counts: Annotated[Tensor | None, Operand("batch query_heads query_blocks", "integers")] = None
    block_indices: Annotated[Tensor | None, Operand("batch query_heads query_blocks *", "integers")] = None
    sink_logits: Annotated[Tensor | None, Operand("query_heads", "floats")] = None
    alibi_slopes: Annotated[Tensor | None, Operand("batch|1 query_heads", "floats")] = None
    bias: Annotated[Tensor | None, Operand("batch|1 query_heads|1 query_len|1 key_len", "floats")] = None
    hidden_bias: Annotated[Tensor | None, Operand("batch|1 query_heads|1 query_len|1 key_len", "floats")] = None
    scale: float
    causal: bool
    windows: tuple[int, ...] = ()
    sinks: int = 0
    softcap: float = 0.0
    block_size: int = 128
    seq_major: bool = False
    empty_rows: str = "zero"
    lowest: float = 0.0
    sequence: str = ""

    @property
    def listed(self) -> bool:
        """Whether block lists say which keys are visited."""
        return self.block_counts is not None

    @property
    def windowed(self) -> bool:
        """Whether a window hides keys from some head."""
        return any(self.windows)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key.shape[1]

    def check(self) -> None:
        """Checks that operands and numbers fit together.

        Raises:
            UnsupportedError: says what is wrong.
        """
        super().check()
        (heads, query_len), need = self.query.shape[1:3], self.need
        need(
            len(self.windows) in (0, 1, heads) and all(window >= 0 for window in self.windows),
            f"{len(self.windows)} windows {self.windows[:4]} for {heads} query heads",
        )
        need(
            self.softcap >= 0 and math.isfinite(self.scale),
            f"softcap {self.softcap}, scale {self.scale}",
            "a softcap is positive or 0 for none",
        )
        need((self.block_counts is None) == (self.block_indices is None), "block_counts and block_indices come together")
        if self.block_counts is not None:
            need(self.block_size > 0, f"block size {self.block_size}")
            found, blocks = self.block_counts.shape[2], cdiv(query_len, self.block_size)
            need(found == blocks, f"block_counts has {found} query blocks, not {blocks}")
        hides = self.empty_rows not in ("mean", "fused") or -math.inf < self.lowest < 0.0
        need(self.empty_rows in EMPTY_ROWS and hides, f"empty rows hold {self.empty_rows!r}, hidden by {self.lowest}")

    def in_dtype(self, dtype: torch.dtype) -> AttentionCall:
        """The same call with query, key and value in another dtype."""
        return dataclasses.replace(self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        return empty_outputs(self.query, self.value, self.seq_major)


def empty_outputs(query: Tensor, value: Tensor, seq_major: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs.

    Returns:
        output: query's dtype, [batch, query_heads, query_len, v_head_dim]; with seq_major the transpose of a contiguous
            [batch, query_len, heads, dim].
        lse: float32, [batch, query_heads, query_len].
    """
    batch, heads, query_len, _ = query.shape
    lse = query.new_empty(batch, heads, query_len, dtype=torch.float32)
    if seq_major:
        return query.new_empty(batch, query_len, heads, value.shape[-1]).transpose(1, 2), lse
    return query.new_empty(batch, heads, query_len, value.shape[-1]), lse


attention = define(AttentionCall, AttentionCall.empty_outputs)

"""What attention over a text that is divided among processes is made of: this process's rows in chunks, and parts that are merged by LSE.

The parts of a softmax over disjoint keys, output o and LSE l each, make up the whole: l = log(e^l1 + e^l2) and
o = e^(l1 - l) o1 + e^(l2 - l) o2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify.backends import registration
from sparsify.distributed import exchange
from sparsify.distributed.sequence import Division
from sparsify.errors import UnsupportedError
from sparsify.ops.attention import AttentionCall
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.sparse_attention import SparseAttentionCall


def refuse(call: AttentionCall | SparseAttentionCall | PatternAttentionCall) -> None:
    """Raises UnsupportedError for what is not served."""
    given = {
        "attention that is not causal": not call.causal,
        "queries that begin elsewhere than their keys": call.query_start is not None or call.query.shape[2] != call.key.shape[2],
        "packed documents": call.segments is not None,
        "rows without a key that hold something else than 0": call.empty_rows not in ("zero", "fused"),
    }
    if isinstance(call, SparseAttentionCall):
        given["columns and diagonals of some heads"] = call.patterned
    if isinstance(call, AttentionCall):
        given["block lists of one process"] = call.listed
        given["a bias, or ALiBi"] = call.bias is not None or call.alibi_slopes is not None
    for what, holds in given.items():
        if holds:
            raise UnsupportedError(f"{what} over a text that is divided among processes", where=f"sparsify::{call.NAME}")


def chunks(division: Division) -> Iterator[tuple[slice, int]]:
    """This process's rows, a chunk after the other, and where the keys end that they see."""
    at = 0
    for first, last in division.spans():
        yield slice(at, at + last - first), last
        at += last - first


def all_flags(division: Division, call: Any) -> Tensor | None:
    """The flags of all keys, sinks marked anew: by its own tokens a process does not know which of the text's are first."""
    if call.key_flags is None:
        return None
    flags = exchange.gathered(division, call.key_flags, 1, "padding") & 1
    if call.sinks:
        flags = flags + 2 * ((flags != 0) & (flags.cumsum(-1) <= call.sinks)).to(flags.dtype)
    return flags.contiguous()


def attend_into(part: AttentionCall, output: Tensor, lse: Tensor, rows: slice) -> None:
    """Attention of some rows, written where they are in the whole output and LSE."""
    found = lse.new_empty(*part.query.shape[:3])  # kernels fill one without gaps
    registration.attend(part, into=(output[:, :, rows], found))
    lse[:, :, rows] = found


class Merged:
    """Attention to some keys, to which attention to others is added, in fp32 until the end."""

    def __init__(self, output: Tensor, lse: Tensor):
        self.output, self.lse = output, lse
        self.sum: Tensor | None = None

    def add(self, rows: slice, output: Tensor, lse: Tensor) -> None:
        if self.sum is None:
            self.sum = self.output.float()
        before = self.lse[:, :, rows]
        after = torch.logaddexp(before, lse)
        whole = after.masked_fill(after == -torch.inf, 0)
        kept, added = (before - whole).exp_()[..., None], (lse - whole).exp_()[..., None]
        part = self.sum[:, :, rows]
        part.mul_(kept).addcmul_(output.float(), added)
        self.lse[:, :, rows] = after

    def finish(self) -> tuple[Tensor, Tensor]:
        if self.sum is not None:
            self.output.copy_(self.sum)
        return self.output, self.lse

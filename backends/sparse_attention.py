"""Serves `sparsify::sparse_attention`: selection and attention, a part of the heads after the other where block lists would be large.

Parts are independent: what a head's rows get does not depend on which heads are served beside it. Nothing is read from the device and
parts follow from shapes alone, so that a CUDA graph can hold the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsify.backends import divided_lists, registration
from sparsify.ops import scratch, selection
from sparsify.ops.selection import Observer
from sparsify.ops.sparse_attention import SparseAttentionCall


def sparse_attention(call: SparseAttentionCall, *, limit: int = scratch.LIST_BYTES) -> tuple[Tensor, Tensor]:
    """The op, of a call that was checked.

    Args:
        limit: bytes of block lists at a time, for tests.
    """
    each = scratch.list_bytes(call.query_len, call.key_len, call.block_size)
    parts = list(scratch.parts(call.batch, call.heads, call.kv_heads, each, limit, not call.estimate.group))
    if len(parts) <= 1:
        return _select_and_attend(call, None, selection.observers())
    output, lse = call.empty_outputs()
    seen: list[tuple[Tensor, Tensor]] = []
    collect = [lambda _, *lists: seen.append(lists)] if selection.observers() else []
    for part in parts:
        rows, served = slice(*part.batch), slice(*part.heads)
        _select_and_attend(call.part(part), (output[rows, served], lse[rows, served]), collect)
    if seen:
        _observe(call, parts, seen)
    return output, lse


def _select_and_attend(
    call: SparseAttentionCall, into: tuple[Tensor, Tensor] | None, observers: Sequence[Observer]
) -> tuple[Tensor, Tensor]:
    chosen = call.selection()
    lists = registration.select(chosen)
    for observer in observers:
        observer(chosen, *lists)
    return registration.attend(call.attention(*lists), into=into)


def _observe(call: SparseAttentionCall, parts: list[scratch.Part], seen: list[tuple[Tensor, Tensor]]) -> None:
    """What observers of one selection see: all heads' lists, whatever memory that takes."""
    chosen = call.selection()
    counts, indices = chosen.empty_lists()
    for part, (some_counts, some_indices) in zip(parts, seen, strict=True):
        counts[slice(*part.batch), slice(*part.heads)] = some_counts
        indices[slice(*part.batch), slice(*part.heads)] = some_indices
    selection.observed(chosen, counts, indices)


def _serve(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = SparseAttentionCall.bind(*args, **options)
    call.check()
    return divided_lists.sparse_attention(call) if call.sequence else sparse_attention(call)


registration.register("sparse_attention", _serve)

"""Serves `sparsify::sparse_attention`: selection and attention, a part of the heads after the other where block lists would be large. Other
ops that make lists and attend along them do likewise (`in_parts`).

Parts are independent: what a head's rows get does not depend on which heads are served beside it. Nothing is read from the device and
parts follow from shapes alone, so that a CUDA graph can hold the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sparsify.backends import divided_lists, registration
from sparsify.ops import scratch, selection
from sparsify.ops.pattern_attention import PatternAttentionCall
from sparsify.ops.selection import Observer
from sparsify.ops.sparse_attention import SparseAttentionCall

Listed = SparseAttentionCall | PatternAttentionCall


def sparse_attention(call: SparseAttentionCall, *, limit: int = scratch.LIST_BYTES) -> tuple[Tensor, Tensor]:
    """The op, of a call that was checked.

    Args:
        limit: bytes of block lists at a time, for tests.
    """
    each = scratch.list_bytes(call.query_len, call.key_len, call.block_size)
    if call.patterned:
        each += scratch.list_bytes(call.query_len, call.pattern.width * call.block_size, call.block_size)
    apart = not (call.estimate.group or call.refine_stride)  # what heads of a group share needs all of them
    return in_parts(call, registration.select, each, limit, apart)


def in_parts(
    call: Listed, select: Callable[[Any], tuple[Tensor, Tensor]], head_bytes: int, limit: int, splits_groups: bool = True
) -> tuple[Tensor, Tensor]:
    """Selection and attention of a call that was checked, in as many parts as its lists need.

    Args:
        select: makes the block lists of `call.selection()`.
        head_bytes: bytes of lists that a query head takes. limit: of lists at a time.
        splits_groups: as of `scratch.parts`.
    """
    parts = list(scratch.parts(call.batch, call.heads, call.kv_heads, head_bytes, limit, splits_groups))
    if len(parts) <= 1:
        return _select_and_attend(call, select, None, selection.observers())
    output, lse = call.empty_outputs()
    seen: list[tuple[Tensor, Tensor]] = []
    collect = [lambda _, *lists: seen.append(lists)] if selection.observers() else []
    for part in parts:
        rows, served = slice(*part.batch), slice(*part.heads)
        _select_and_attend(call.part(part), select, (output[rows, served], lse[rows, served]), collect)
    if seen:
        _observe(call, parts, seen)
    return output, lse


def _select_and_attend(
    call: Listed, select: Callable[[Any], tuple[Tensor, Tensor]], into: tuple[Tensor, Tensor] | None, observers: Sequence[Observer]
) -> tuple[Tensor, Tensor]:
    chosen = call.selection()
    lists = select(chosen)
    for observer in observers:
        observer(chosen, *lists)
    return registration.attend(call.attention(*lists), into=into)


def _observe(call: Listed, parts: list[scratch.Part], seen: list[tuple[Tensor, Tensor]]) -> None:
    """What observers of one selection see: all heads' lists, whatever memory that takes."""
    chosen = call.selection()
    counts, indices = chosen.empty_lists()
    for part, (some_counts, some_indices) in zip(parts, seen, strict=True):
        into = indices[slice(*part.batch), slice(*part.heads)]
        counts[slice(*part.batch), slice(*part.heads)] = some_counts
        into[..., : some_indices.shape[-1]] = some_indices  # heads that visit less have shorter lists
    selection.observed(chosen, counts, indices)


def _serve(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = SparseAttentionCall.bind(*args, **options)
    call.check()
    return divided_lists.sparse_attention(call) if call.sequence else sparse_attention(call)


registration.register("sparse_attention", _serve)

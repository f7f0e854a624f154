"""Serves `sparsify::sparse_attention`: selection and attention, a part of the heads after the other where block lists would be large.

Parts are independent: what a head's rows get does not depend on which heads are served beside it. Nothing is read from the device and
parts follow from shapes alone, so that a CUDA graph can hold the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.backends import registration
from sparsify.ops import attention, scratch
from sparsify.ops.attention import AttentionCall

_SELECTION = ("pool", "stride", "threshold", "density")
_ATTENTION = ("seq_major", "empty_rows", "lowest")  # what selection does not read
_ROWS = ("key_flags", "segments")  # operands with a batch row, or one for all


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, *, limit: int = scratch.LIST_BYTES, **options) -> tuple[Tensor, Tensor]:
    """The op of `sparsify.ops.attention`.

    Args:
        limit: bytes of block lists at a time, for tests.
    """
    options = dict.fromkeys(("key_flags", "segments", "query_start")) | options  # the dispatcher leaves out what has its default
    (batch, heads, query_len, _), (kv_heads, key_len) = query.shape, key.shape[1:3]
    each = scratch.list_bytes(query_len, key_len, options["block_size"])
    parts = list(scratch.parts(batch, heads, kv_heads, each, limit, "group" not in options["pool"].split("+")))
    if len(parts) <= 1:
        return _both(query, key, value, options, None, attention.select_observers())
    output = attention.empty_output(query, value, options["seq_major"])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []
    collect = [lambda *call, **_: seen.append(call[2:])] if attention.select_observers() else []
    for part in parts:
        rows, owners, served = (slice(*bounds) for bounds in (part.batch, part.kv_heads, part.heads))
        into = output[rows, served], lse[rows, served]
        _both(query[rows, served], key[rows, owners], value[rows, owners], _of(options, part, heads), into, collect)
    if seen:
        _observe(query, key, options, parts, seen)
    return output, lse


def _both(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], into: tuple[Tensor, Tensor] | None, observers: Sequence):
    common = {name: option for name, option in options.items() if name not in (*_SELECTION, *_ATTENTION)}
    call = common | {name: options[name] for name in _SELECTION}
    counts, indices = registration.select_blocks(query, key, **call)
    for observer in observers:
        observer(query, key, counts, indices, **call)
    attend = common | {name: options[name] for name in _ATTENTION if name in options}
    attend["version"] = attention.VERSION
    return registration.attend(AttentionCall.bind(query, key, value, block_counts=counts, block_indices=indices, **attend), into=into)


def _of(options: dict[str, Any], part: scratch.Part, heads: int) -> dict[str, Any]:
    """The options as a part of the heads and batch rows sees them."""
    changed = {name: options[name] for name in ("windows", "threshold")}
    changed = {name: numbers[slice(*part.heads)] if len(numbers) == heads > 1 else numbers for name, numbers in changed.items()}
    for name in _ROWS:
        operand = options[name]
        changed[name] = operand if operand is None or operand.shape[0] == 1 else operand[slice(*part.batch)]
    return options | changed


def _observe(query: Tensor, key: Tensor, options: dict[str, Any], parts: list[scratch.Part], seen: list[tuple[Tensor, Tensor]]) -> None:
    """What observers of one selection see: all heads' lists, whatever memory that takes."""
    counts, indices = attention.empty_block_lists(query, key, options["block_size"])
    for part, (some_counts, some_indices) in zip(parts, seen, strict=True):
        counts[slice(*part.batch), slice(*part.heads)] = some_counts
        indices[slice(*part.batch), slice(*part.heads)] = some_indices
    call = {name: option for name, option in options.items() if name not in _ATTENTION}
    for observer in attention.select_observers():
        observer(query, key, counts, indices, **call)


registration.register("sparse_attention", sparse_attention)

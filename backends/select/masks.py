"""Masks of a selection summed up per cell and block, for all of its kernels. Nothing here synchronises with the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.selection import SelectCall

_FAR = (1 << 31) - 1
Ranges = tuple[Tensor, Tensor]  # lowest and highest of each group


def real_keys(call: SelectCall) -> Tensor | None:
    """Bool [batch or 1, key_len]: keys that take part. None: all. A cache's slots past the last query row never do."""
    return _written_keys(call) if call.key_flags is None else _real_by_flags(call, call.key_flags)


def _real_by_flags(call: SelectCall, key_flags: Tensor) -> Tensor:
    real, written = key_flags & 1 != 0, _written_keys(call)
    return real if written is None else real & written


def _written_keys(call: SelectCall) -> Tensor | None:
    """Bool [1, key_len]: keys up to the last query row's. None: all."""
    if not call.causal or call.query_start is None:
        return None
    return (torch.arange(call.key_len, device=call.key.device) < call.start + call.query_len)[None]


def real_queries(call: SelectCall) -> Tensor | None:
    """Bool [batch or 1, query_len]: rows that are not padding, so whose own key is visible. Rows outside of the keys are real."""
    if call.key_flags is None:
        return None
    own, inside = own_key(call)
    return (call.key_flags[:, own] & 1 != 0) | ~inside


def keys_mean(call: SelectCall, keys: Tensor, real: Tensor | None) -> Tensor:
    """Mean of the keys that take part, fp32 [batch, kv_heads, head_dim]; 0 where it is not finite.

    keys: [batch, kv_heads, tokens, head_dim], 0 where a key does not take part. real: as `real_keys`, of these batch rows.
    Taking any one vector from all keys moves all logits of a row alike, so that it never changes the softmax, only what rounding loses.
    """
    count = call.key_len if real is None else real.sum(1).clamp(min=1)[:, None, None]
    return (keys.sum(2, dtype=torch.float32) / count).nan_to_num(0.0, 0.0, 0.0).contiguous()


def own_key(call: SelectCall) -> tuple[Tensor, Tensor]:
    """Key position of every query row, clamped to the keys, and whether it lies inside: [query_len] each."""
    position = torch.arange(call.query_len, device=call.query.device) + call.start
    return position.clamp(0, call.key_len - 1), (position >= 0) & (position < call.key_len)


def grouped(values: Tensor, size: int, used: int, fill: int | bool) -> Tensor:
    """[rows, n] to [rows, ceil(n / size), used]: the first `used` of every `size` entries; missing ones are `fill`."""
    missing = -values.shape[1] % size
    values = torch.nn.functional.pad(values, (0, missing), value=fill)
    return values.unflatten(1, (-1, size))[..., :used]


def key_bits(call: SelectCall, size: int) -> Tensor | None:
    """uint8 [batch or 1, ceil(key_len / size)]: bit 0: a group of keys has a real one, bit 1: it has a sink. None without key_flags."""
    if call.key_flags is None:
        return None
    real = _real_by_flags(call, call.key_flags)
    sink = real & (call.key_flags & 2 != 0)
    return (
        grouped(real, size, size, False).any(-1).to(torch.uint8) + 2 * grouped(sink, size, size, False).any(-1).to(torch.uint8)
    ).contiguous()


def cell_bits(call: SelectCall) -> tuple[Tensor, Tensor] | None:
    """`key_bits` of key cells, and uint8 [batch or 1, query_cells]: 1 when a scored cell has a real row. None without key_flags."""
    bits, real = key_bits(call, call.stride), real_queries(call)
    if bits is None or real is None:
        return None
    return bits, grouped(real, call.span, call.stride, False).any(-1).to(torch.uint8).contiguous()


def sink_block(call: SelectCall) -> Tensor | None:
    """int32 [batch or 1]: the block of the first visible key, key_blocks without any. None: block 0."""
    if call.key_flags is None:
        return None
    real = _real_by_flags(call, call.key_flags)
    first = real.to(torch.uint8).argmax(-1) // call.block_size
    return torch.where(real.any(-1), first, call.key_blocks).to(torch.int32)


def cell_segments(call: SelectCall) -> tuple[Ranges, Ranges] | None:
    """`segments` of scored query cells and of key cells."""
    return segments(call, call.span, call.stride, call.stride)


def block_segments(call: SelectCall) -> tuple[Ranges, Ranges] | None:
    """`segments` of query blocks and of key blocks."""
    return segments(call, call.block_size, call.block_size, call.block_size)


def segments(call: SelectCall, rows: int, used: int, keys: int) -> tuple[Ranges, Ranges] | None:
    """Lowest and highest segment among the first `used` of every `rows` query rows, and among every `keys` keys that are real: int32 [batch
    or 1, groups]; an empty range without any. None without segments.

    A row's segment is its own key's; a row outside of the keys may match anything.
    """
    if call.segments is None:
        return None
    own, inside = own_key(call)
    low, high = _ranges(call.segments[:, own], real_queries(call), rows, used)
    outside = grouped(~inside[None], rows, used, False).any(-1)
    # one short of the ends, where the empty ranges are
    of_rows = low.masked_fill(outside, 1 - _FAR), high.masked_fill(outside, _FAR - 1)
    return of_rows, _ranges(call.segments, real_keys(call), keys, keys)


def _ranges(segments: Tensor, real: Tensor | None, size: int, used: int) -> Ranges:
    # int32 halves the kernels' registers; clamping keeps order, so ranges that overlap still do
    segments = segments.long().clamp(1 - _FAR, _FAR - 1).to(torch.int32)
    low = segments if real is None else segments.where(real, _FAR)
    high = segments if real is None else segments.where(real, -_FAR)
    return grouped(low, size, used, _FAR).amin(-1).contiguous(), grouped(high, size, used, -_FAR).amax(-1).contiguous()

"""Masks of a selection summed up per cell and block, for all of its kernels. Nothing here synchronises with the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.selection import SelectCall

_FAR = (1 << 31) - 1


def real_keys(call: SelectCall) -> Tensor | None:
    """Bool [batch or 1, key_len]: keys that take part. None: all. A cache's slots past the last query row never do."""
    real = None if call.key_flags is None else call.key_flags & 1 != 0
    if call.causal and call.query_start is not None:
        written = (torch.arange(call.key_len, device=call.key.device) < call.start + call.query_len)[None]
        real = written if real is None else real & written
    return real


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
    real = real_keys(call)
    sink = real & (call.key_flags & 2 != 0)
    return (
        grouped(real, size, size, False).any(-1).to(torch.uint8) + 2 * grouped(sink, size, size, False).any(-1).to(torch.uint8)
    ).contiguous()


def query_bits(call: SelectCall) -> Tensor | None:
    """uint8 [batch or 1, query_cells]: 1 when a scored cell has a real row. None without key_flags."""
    real = real_queries(call)
    return None if real is None else grouped(real, call.span, call.stride, False).any(-1).to(torch.uint8).contiguous()


def sink_block(call: SelectCall) -> Tensor | None:
    """int32 [batch or 1]: the block of the first visible key, key_blocks without any. None: block 0."""
    if call.key_flags is None:
        return None
    real = real_keys(call)
    first = real.to(torch.uint8).argmax(-1) // call.block_size
    return torch.where(real.any(-1), first, call.key_blocks).to(torch.int32)


def key_segments(call: SelectCall, size: int) -> tuple[Tensor, Tensor] | None:
    """Lowest and highest segment of the real keys of each group: int32 [batch or 1, ceil(key_len / size)]; an empty range without any."""
    return None if call.segments is None else _ranges(call.segments, real_keys(call), size, size)


def query_segments(call: SelectCall, size: int, used: int) -> tuple[Tensor, Tensor] | None:
    """The same for each group of query rows, whose segment is their own key's; a row outside of the keys may match anything."""
    if call.segments is None:
        return None
    own, inside = own_key(call)
    low, high = _ranges(call.segments[:, own], real_queries(call), size, used)
    outside = grouped(~inside[None], size, used, False).any(-1)
    # one short of the ends, where the empty ranges are
    return low.masked_fill(outside, 1 - _FAR), high.masked_fill(outside, _FAR - 1)


def _ranges(segments: Tensor, real: Tensor | None, size: int, used: int) -> tuple[Tensor, Tensor]:
    # int32 halves the kernels' registers; clamping keeps order, so ranges that overlap still do
    segments = segments.long().clamp(1 - _FAR, _FAR - 1).to(torch.int32)
    low = segments if real is None else segments.where(real, _FAR)
    high = segments if real is None else segments.where(real, -_FAR)
    return grouped(low, size, used, _FAR).amin(-1).contiguous(), grouped(high, size, used, -_FAR).amax(-1).contiguous()

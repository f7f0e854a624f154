"""Keys and values in 8 or 4 bits in plain PyTorch, without reading a value back to the host. `sparsify.ops.quantised` has the format."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsify.backends.cache import packed
from sparsify.ops.cache import CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.quantised import FP8_LARGEST, GROUP, LARGEST_EXPONENT, LARGEST_STEP, LEAST_EXPONENT, LEAST_STEP
from sparsify.ops.reselection import CacheReselectCall

AnyCall = CacheStoreCall | CacheDecodeCall | CacheAttentionCall | CacheReselectCall | CacheBoundsCall


def scales_of(least: Tensor, largest: Tensor, codes: str, dtype: torch.dtype) -> Tensor:
    """Scales [..., 1 or 2, n] for numbers between `least` and `largest`, fp32 [..., n], as they are stored in `dtype`."""
    if codes == "fp8":
        bits = (torch.maximum(largest.abs(), least.abs()) * (1 / FP8_LARGEST)).view(torch.int32)
        exponent = ((bits + 0x7FFFFF) >> 23).clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
        scale = (exponent << 23).view(torch.float32)
        # what is no number stays none
        return torch.where(largest == largest, scale, largest)[..., None, :].to(dtype)
    low = least.to(dtype)
    # multiplied by hand: torch divides by a number exactly on a CPU and by its reciprocal on a GPU
    scale = ((largest - low.float()) * (1 / 15)).to(dtype).clamp(LEAST_STEP, LARGEST_STEP)
    return torch.stack((scale, low), -2)


def encode(numbers: Tensor, scales: Tensor, codes: str) -> Tensor:
    """Codes, uint8 [..., dim or dim / 2], of fp32 numbers [..., dim]; scales [..., 1 or 2, dim or 1], which say what is no number."""
    scale = scales[..., 0, :].float()
    if codes == "fp8":
        found = (numbers / scale).nan_to_num(0).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return found.masked_fill(found == 0x80, 0)  # one zero
    steps = ((numbers - scales[..., 1, :].float()) / scale + 0.5).floor().clamp(0, 15).nan_to_num(0).to(torch.uint8)
    first, second, third, fourth = steps.chunk(4, -1)
    return torch.stack((first | (second << 4), third | (fourth << 4)), -1).flatten(-2)


def decode(stored: Tensor, scales: Tensor, codes: str) -> Tensor:
    """The fp32 numbers [..., dim] of codes."""
    scale = scales[..., 0, :].float()
    if codes == "fp8":
        return stored.view(torch.float8_e4m3fn).float() * scale
    low, high = stored.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((low & 15, low >> 4, high & 15, high >> 4), -1).float() * scale + scales[..., 1, :].float()


def coded(call: AnyCall) -> dict[str, object]:
    """What ops are told of how a call's keys and values are stored."""
    names = ("codes", "values", "key_scales", "value_scales", "recent_keys", "recent_values", "staged")
    return {name: getattr(call, name) for name in names} if call.codes else {}


def head_states(call: AnyCall) -> dict[str, Tensor]:
    """Codes, scales and positions with the slots of each head on their own, by name: the call's own buffers where all have as many."""
    starts = getattr(call, "starts", None)
    if starts is not None:
        return packed.spread_state(call, starts)
    return {name: getattr(call, name) for name in ("keys", "values", "positions", "key_scales", "value_scales")}


def _over(state: Tensor, slots: Tensor) -> Tensor:
    """state [batch, kv_heads, n, ...] at slots [batch, kv_heads, m]."""
    return state.gather(2, _index(state, slots))


def _index(state: Tensor, slots: Tensor) -> Tensor:
    return slots.view(*slots.shape, *(1,) * (state.dim() - 3)).expand(*slots.shape, *state.shape[3:])


def lies_as_it_came(call: AnyCall, slots: Tensor) -> Tensor:
    """Which slots [batch, kv_heads, m] lie in the recent buffers."""
    assert call.staged is not None, "given with codes"
    return (slots >= call.staged[..., :1]) & (slots < call.staged[..., 1:])


def numbers_at(call: AnyCall, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of slots [batch, kv_heads, m], fp32 [batch, kv_heads, m, dim]; of slots beyond the capacity anything."""
    assert call.key_scales is not None and call.value_scales is not None, "given with codes"
    assert call.recent_keys is not None and call.recent_values is not None, "given with codes"
    at, staged = slots.clamp(max=call.keys.shape[2] - 1), lies_as_it_came(call, slots)[..., None]
    assert call.values is not None, "given with codes"
    keys = decode(_over(call.keys, at), _over(call.key_scales, at // GROUP), call.codes)
    values = decode(_over(call.values, at), _over(call.value_scales, at)[..., None], call.codes)
    recent = slots % GROUP
    return (
        torch.where(staged, _over(call.recent_keys, recent).float(), keys),
        torch.where(staged, _over(call.recent_values, recent).float(), values),
    )


def everything(call: AnyCall) -> tuple[Tensor, Tensor]:
    """Keys and values of all slots, fp32."""
    batch, kv_heads, capacity = call.keys.shape[:3]
    return numbers_at(call, torch.arange(capacity, device=call.keys.device).expand(batch, kv_heads, -1))


def store_numbers(call: AnyCall, slots: Tensor, keys: Tensor, values: Tensor, *, where: Tensor, held: Tensor, fresh: Tensor) -> None:
    """Quantises whole groups.

    Args:
        slots: int64 [batch, kv_heads, n * GROUP], whole groups; beyond the capacity nothing is stored.
        keys, values: fp32 [batch, kv_heads, n * GROUP, dim].
        where: bool [batch, kv_heads, n]: the groups that are written.
        held: bool [batch, kv_heads, n * GROUP]: what counts for the keys' scales.
        fresh: bool [batch, kv_heads, n * GROUP]: whose values are not in codes yet; a token's do not depend on its neighbours.
    """
    assert call.key_scales is not None and call.value_scales is not None and call.values is not None, "given with codes"
    capacity, dtype, codes = call.keys.shape[2], call.key_scales.dtype, call.codes
    grouped = keys.unflatten(2, (-1, GROUP))
    outside = ~held.unflatten(2, (-1, GROUP))[..., None]
    none = outside.all(3)
    least = grouped.masked_fill(outside, torch.inf).amin(3).masked_fill(none, 0)
    largest = grouped.masked_fill(outside, -torch.inf).amax(3).masked_fill(none, 0)
    key_scales = scales_of(least, largest, codes, dtype)
    key_codes = encode(grouped, key_scales[:, :, :, None], codes).flatten(2, 3)
    value_scales = scales_of(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True), codes, dtype)
    value_codes = encode(values, value_scales, codes)
    inside = where.repeat_interleave(GROUP, 2) & (slots < capacity)
    _put(call.keys, slots, key_codes, inside)
    for state, new in ((call.values, value_codes), (call.value_scales, value_scales[..., 0])):
        _put(state, slots, new, inside & fresh)
    first = slots[:, :, ::GROUP] // GROUP
    _put(call.key_scales, first, key_scales, where & (first * GROUP < capacity))


def _put(state: Tensor, places: Tensor, new: Tensor, inside: Tensor) -> None:
    """Writes new [batch, kv_heads, m, ...] to neighbouring places [batch, kv_heads, m] of a state where they are inside.

    Places behind the last repeat what is written to it, so that all that goes to one place is the same.
    """
    last, first = state.shape[2] - 1, places[:, :, :1]
    source = (places.clamp(max=last) - first).clamp(min=0)
    at = (first + source).clamp(max=last)
    index = _index(state, at)
    inside = inside.gather(2, source).view(*at.shape, *(1,) * (state.dim() - 3))
    state.scatter_(2, index, torch.where(inside, new.gather(2, _index(new, source)).to(state.dtype), state.gather(2, index)))


def append(call: CacheStoreCall | CacheDecodeCall, slot: Tensor, value: Tensor, room: Tensor) -> None:
    """One token of each row into the recent buffers, from which a full group went into codes before.

    slot: int64 [batch, kv_heads, 1], counted from the head's first one.
    room: int [batch, kv_heads], slots of each head.
    """
    assert call.staged is not None and call.recent_keys is not None and call.recent_values is not None, "given with codes"
    held = dataclasses.replace(call, **head_states(call), starts=None)
    _close(held, call.staged, room[..., None])
    if call.starts is not None:
        packed.gather_codes(call, call.starts, vars(held))
    stores = torch.ones_like(slot, dtype=torch.bool) if call.is_token is None else call.is_token[:, :1, None].expand_as(slot)
    for state, new in ((call.recent_keys, call.key), (call.recent_values, value)):
        index = _index(state, slot % GROUP)
        state.scatter_(2, index, torch.where(stores[..., None], new.to(state.dtype), state.gather(2, index)))
    begin, end = call.staged[..., :1], call.staged[..., 1:]
    call.staged.copy_(torch.where(stores, torch.cat((torch.where(begin == end, slot, begin), slot + 1), -1), call.staged))


def _close(call: CacheStoreCall | CacheDecodeCall, staged: Tensor, room: Tensor) -> None:
    """Where the recent buffers have the last slot of a group, the group becomes codes."""
    begin, last = staged[..., :1].long(), staged[..., 1:].long() - 1
    ends = (last >= begin) & ((last % GROUP == GROUP - 1) | (last == room - 1))
    slots = last.clamp(min=0) // GROUP * GROUP + torch.arange(GROUP, device=staged.device)
    held = (call.positions.gather(2, slots.clamp(max=call.capacity - 1)) >= 0) & (slots < call.capacity)
    store_numbers(call, slots, *numbers_at(call, slots), where=ends, held=held, fresh=lies_as_it_came(call, slots))
    staged.masked_fill_(ends, 0)


def append_all(call: CacheStoreCall, key: Tensor, value: Tensor, at: Tensor) -> None:
    """Several tokens of each row behind those that are stored, none of which goes: whole groups into codes, the rest as it came.

    Args:
        key, value: [batch, kv_heads, query_len, dim].
        at: int [batch, query_len], slot of each token; padding repeats another token's, and is -1 in rows of padding alone.
    """
    assert call.staged is not None and call.recent_keys is not None and call.recent_values is not None, "given with codes"
    _close(call, call.staged, torch.full_like(call.counts, call.capacity)[..., None])  # what lies there is about to be replaced
    counts = call.counts.long()
    total = torch.maximum(at.amax(-1)[:, None] + 1, call.counts).long()  # [batch, kv_heads]
    span = (key.shape[2] + 2 * GROUP - 2) // GROUP * GROUP
    first = (counts // GROUP * GROUP)[..., None]
    slots = first + torch.arange(span, device=key.device)
    place = at[:, None].long() - first
    place = torch.where((place >= 0) & (place < span), place, span)
    numbers: list[Tensor] = []
    for new, old in zip((key, value), numbers_at(call, slots[..., :GROUP]), strict=True):
        room = old.new_zeros(*old.shape[:2], span + 1, old.shape[3])
        room[:, :, :GROUP] = old
        room.scatter_(2, _index(room, place), new.float())
        numbers.append(room[:, :, :span])
    fresh = lies_as_it_came(call, slots) | (slots >= counts[..., None])
    whole = slots[:, :, GROUP - 1 :: GROUP] < total[..., None]
    store_numbers(call, slots, *numbers, where=whole, held=slots < total[..., None], fresh=fresh)
    begin = (total // GROUP * GROUP)[..., None]
    window = (begin - first).clamp(0, span - GROUP) + torch.arange(GROUP, device=key.device)
    for recent, room in zip((call.recent_keys, call.recent_values), numbers, strict=True):
        recent.copy_(_over(room, window))
    call.staged.copy_(torch.where(total[..., None] < call.capacity, torch.cat((begin, total[..., None]), -1), 0))


def store_in_order(call: CacheReselectCall, keys: Tensor, values: Tensor, counts: Tensor) -> None:
    """Whole groups of what is kept into codes, what is left of it as it comes.

    Args:
        keys, values: [batch, kv_heads, n, dim], in the order of slots; beyond `counts` anything.
        counts: int [batch, kv_heads].
    """
    assert call.staged is not None and call.recent_keys is not None and call.recent_values is not None, "given with codes"
    states = head_states(call)
    width = max(GROUP, -(-states["keys"].shape[2] // GROUP) * GROUP)
    at = torch.arange(width, device=keys.device).expand(*counts.shape, -1)
    held = at < counts[..., None]
    numbers = []
    for new in (keys, values):
        new = new[:, :, :width].float()
        new = torch.nn.functional.pad(new, (0, 0, 0, width - new.shape[2]))
        numbers.append(new.masked_fill(~held[..., None], 0))
    begin = (counts // GROUP * GROUP)[..., None]
    fresh = torch.ones_like(held)
    view = dataclasses.replace(call, **states, starts=None)
    store_numbers(view, at, *numbers, where=at[:, :, GROUP - 1 :: GROUP] < begin, held=held, fresh=fresh)
    if call.starts is not None:
        packed.gather_codes(call, call.starts, states)
    window = begin.clamp(max=width - GROUP).long() + torch.arange(GROUP, device=keys.device)
    for recent, new in zip((call.recent_keys, call.recent_values), numbers, strict=True):
        recent.copy_(_over(new, window))
    call.staged.copy_(torch.cat((begin, counts[..., None]), -1).masked_fill((begin == counts[..., None]), 0))


def store_all(call: CacheStoreCall, keys: Tensor, values: Tensor, rows: Tensor | None) -> None:
    """Quantises what is kept, [batch, kv_heads, slots, dim], but for the last group of heads that still have room: it lies as it came.

    Args:
        rows: bool [batch]; None: all.
    """
    assert call.staged is not None and call.recent_keys is not None and call.recent_values is not None, "given with codes"
    batch, kv_heads, slots = keys.shape[:3]
    missing = -slots % GROUP
    keys, values = (torch.nn.functional.pad(t.float(), (0, 0, 0, missing)) for t in (keys, values))
    at = torch.arange(slots + missing, device=keys.device).expand(batch, kv_heads, -1)
    held = torch.nn.functional.pad(call.positions[:, :, :slots] >= 0, (0, missing))
    counts = held.sum(-1, keepdim=True)
    begin = torch.where(counts < call.capacity, counts // GROUP * GROUP, slots + missing)
    some = torch.ones_like(counts, dtype=torch.bool) if rows is None else rows[:, None, None]
    first = at[:, :, ::GROUP]
    store_numbers(call, at, keys, values, where=some & (first < begin), held=held, fresh=torch.ones_like(held))
    window = begin.clamp(max=slots + missing - GROUP) + torch.arange(GROUP, device=keys.device)
    for recent, new in ((call.recent_keys, keys), (call.recent_values, values)):
        recent.copy_(torch.where(some[..., None], _over(new, window).to(recent.dtype), recent))
    waiting = torch.cat((begin, counts), -1).masked_fill(begin >= counts, 0).to(call.staged.dtype)
    call.staged.copy_(torch.where(some, waiting, call.staged))

"""Slots of KV heads that have numbers of their own (`starts` in `sparsify.ops.cache`), in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.ops.quantised import GROUP


def sizes(starts: Tensor) -> Tensor:
    """Slots of each head, [batch, kv_heads]."""
    return starts[:, 1:] - starts[:, :-1]


def widest(starts: Tensor, total: int) -> int:
    """At least the slots of the head that has most. Waits for the device where no CUDA graph is being recorded; else `total`."""
    if starts.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return total
    return int(sizes(starts).max())


def spread(state: Tensor, starts: Tensor, width: int, nothing: float) -> Tensor:
    """A buffer [batch, kv_heads, capacity, ...] with the slots of each head on their own, [batch, kv_heads, width, ...]; `nothing` behind
    them."""
    return _spread(state, starts[:, :-1], starts[:, 1:], width, nothing)


def _spread(state: Tensor, first: Tensor, end: Tensor, width: int, nothing: float) -> Tensor:
    flat = state.flatten(1, 2)
    at = first[..., None] + torch.arange(width, device=first.device)
    index = at.clamp(max=flat.shape[1] - 1).long().flatten(1)
    own = over_dims(at < end[..., None], state.dim())
    return (
        flat.gather(1, over_dims(index, flat.dim()).expand(-1, -1, *flat.shape[2:])).unflatten(1, at.shape[1:]).masked_fill(~own, nothing)
    )


def over_dims(index: Tensor, dims: int) -> Tensor:
    """With as many dimensions as a tensor of `dims`."""
    return index.view(*index.shape, *(1,) * (dims - index.dim()))


def spread_state(call: Any, starts: Tensor) -> dict[str, Tensor]:
    """Keys, values and positions of a call, and the scales of codes, by name."""
    width = widest(starts, call.keys.shape[1] * call.keys.shape[2])
    names = ["keys", "values", "positions", *(["value_scales"] if call.codes else [])]
    found = {name: spread(getattr(call, name), starts, width, -1 if name == "positions" else 0) for name in names}
    if call.codes:
        found["key_scales"] = _spread(call.key_scales, *_groups(starts), -(-width // GROUP), 0)
    return found


def _groups(starts: Tensor) -> tuple[Tensor, Tensor]:
    """The first group of each head and the one behind its last, [batch, kv_heads] (`sparsify.ops.quantised`)."""
    first = starts[:, :-1] // GROUP + torch.arange(starts.shape[1] - 1, device=starts.device)
    return first, first + (sizes(starts) + GROUP - 1) // GROUP


def gather_codes(call: Any, starts: Tensor, held: dict[str, Tensor]) -> None:
    """Writes codes and their scales back that `spread_state` took apart, [batch, kv_heads, width, ...] by name."""
    for name in ("keys", "values", "value_scales"):
        _gather(getattr(call, name), held[name], starts[:, :-1], starts[:, 1:])
    _gather(call.key_scales, held["key_scales"], *_groups(starts))


def _gather(state: Tensor, held: Tensor, first: Tensor, end: Tensor) -> None:
    batch, kv_heads, width = held.shape[:3]
    at = torch.arange(state.shape[1] * state.shape[2], device=first.device, dtype=first.dtype).expand(batch, -1).contiguous()
    head = torch.searchsorted(first[:, 1:].contiguous(), at, right=True).clamp(max=kv_heads - 1)
    place = at - first.gather(1, head)
    own = over_dims(at < end.gather(1, head), state.dim() - 1)
    index = over_dims((head * width + place.clamp(0, width - 1)).long(), state.dim() - 1).expand(-1, -1, *state.shape[3:])
    flat = state.flatten(1, 2)
    state.copy_(torch.where(own, held.flatten(1, 2).gather(1, index), flat).unflatten(1, state.shape[1:3]))


def pack(state: Tensor, source: Tensor, order: Tensor, counts: Tensor, starts: Tensor, nothing: float) -> None:
    """Fills a buffer [batch, kv_heads, capacity, ...]: the first counts [batch, kv_heads] of each head's candidates in `order` [batch,
    kv_heads, n] of source [batch, kv_heads, candidates, ...], `nothing` behind them."""
    batch, kv_heads, count = order.shape
    at = torch.arange(kv_heads * state.shape[2], device=starts.device, dtype=starts.dtype).expand(batch, -1).contiguous()
    head = torch.searchsorted(starts[:, 1:].contiguous(), at, right=True).clamp(max=kv_heads - 1)
    slot = at - starts.gather(1, head)
    filled = slot < counts.gather(1, head)
    candidate = order.flatten(1).gather(1, head * count + slot.clamp(0, count - 1))
    index = over_dims(head * source.shape[2] + candidate, state.dim() - 1).expand(-1, -1, *state.shape[3:])
    chosen = source.flatten(1, 2).gather(1, index).masked_fill(~over_dims(filled, state.dim() - 1), nothing)
    state.copy_(chosen.unflatten(1, (kv_heads, -1)))

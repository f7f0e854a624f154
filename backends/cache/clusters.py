"""Several tokens over a prefix that lies in clusters: what some of them choose together is copied, and read with what came after it.

A kernel over lists of a query block's own would save the copy, which is of the share that is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.ops import cache
from sparsify.ops.cache import CacheAttentionCall
from sparsify.ops.pages import Clusters

# queries that choose together
ROWS = 64
# what is read is a whole multiple of so many slots, which kernels may rely on
_STEP = 64


def cache_attention(call: CacheAttentionCall, attend: Callable[[CacheAttentionCall], Tensor]) -> Tensor:
    """The op for calls of several tokens that are not stored yet. Reads two numbers from the device.

    Args:
        call: its `pages` are `Clusters`.
        attend: the op over slots that are all read.
    """
    pages, new_key, new_value = call.pages, call.new_key, call.new_value
    assert isinstance(pages, Clusters) and new_key is not None and new_value is not None, "who calls looks"
    everything = dataclasses.replace(call, pages=None, bounds=None, prepared=None)
    listed = None if _recording(call) else _listed(call, pages)
    if listed is None:
        return attend(everything)
    chosen, fixed = listed
    output, query_len = cache.empty_output(call), call.query.shape[2]
    is_token = call.is_token
    at = (torch.arange(query_len, device=fixed.device) if is_token is None else is_token.cumsum(-1) - 1) + call.seen[:, None]
    at = at.to(call.positions.dtype)
    if is_token is not None:
        at = at.masked_fill(~is_token, -1)
    for first in range(0, query_len, ROWS):
        part = slice(first, min(first + ROWS, query_len))
        own = None if is_token is None else is_token[:, part]
        best = choose(call, pages, part, *chosen)
        read = torch.cat((fixed.expand(*best.shape[:2], -1), best), 2)
        slots = (read[..., None] * pages.size + torch.arange(pages.size, device=read.device)).flatten(2)
        before = at[:, None, :first].expand(-1, call.keys.shape[1], -1)
        keys, values, positions = _gathered(call, slots, new_key[:, :, :first], new_value[:, :, :first], before)
        seen = call.seen + (first if is_token is None else is_token[:, :first].sum(-1, dtype=call.seen.dtype))
        block = dataclasses.replace(
            everything, query=call.query[:, :, part], keys=keys, values=values, positions=positions, seen=seen.to(call.seen.dtype),
            new_key=new_key[:, :, part], new_value=new_value[:, :, part], is_token=own,
        )  # fmt: skip
        output[:, :, part] = attend(block)
    return output


def _recording(call: CacheAttentionCall) -> bool:
    """Whether a CUDA graph is recorded, which can't wait for the device: it reads everything."""
    return call.query.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _listed(call: CacheAttentionCall, pages: Clusters) -> tuple[tuple[int, int, int], Tensor] | None:
    """Clusters [first, end) of which so many are read, and the numbers of the pages that are read always; None: all pages are read."""
    assert call.prepared is not None, "what lies in clusters is given with them"
    held = (call.positions >= 0).sum(-1).amax()
    prepared, filled = torch.stack((call.prepared.amin().to(held.dtype), held)).tolist()
    first, end, total = pages.first, prepared // pages.size, pages.of(filled)
    count = pages.chosen(total)
    if end - first <= count:
        return None
    fixed = torch.cat((torch.arange(first), torch.arange(end, total)))
    return (first, end, count), fixed.to(call.query.device)


def choose(call: CacheAttentionCall, pages: Clusters, part: slice, first: int, end: int, count: int) -> Tensor:
    """The clusters to which any of some queries would give the largest weights, if the means were all keys: int64 [batch, kv_heads, count]
    in order of place.

    Args:
        part: of the queries.
        first, end, count: clusters that there are, and how many are read.
    """
    assert call.bounds is not None, "bounds are given with pages"
    math = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    means = call.bounds[:, :, first:end, 0].to(math)
    query = call.query[:, :, part].to(math).unflatten(1, (means.shape[1], -1))
    logits = call.scale * (query @ means[:, :, None].transpose(-1, -2))
    weights = logits.log_softmax(-1)
    if call.is_token is not None:
        weights = weights.masked_fill(~call.is_token[:, None, None, part, None], -torch.inf)
    return weights.amax((2, 3)).topk(count, -1).indices.sort(-1).values + first


def _gathered(call: CacheAttentionCall, slots: Tensor, new_key: Tensor, new_value: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of some slots and of tokens of the call, filled up to a whole multiple.

    Args:
        slots: int64 [batch, kv_heads, slots], which may lie behind the last one.
        at: positions of the tokens, int32 [batch, kv_heads, tokens].
    """
    capacity = call.keys.shape[2]
    inside, behind = slots.clamp(max=capacity - 1), slots >= capacity
    batch, kv_heads, count = slots.shape
    missing = -(count + at.shape[2]) % _STEP
    positions, found = call.positions.gather(2, inside).masked_fill(behind, -1), []
    for state, new in ((call.keys, new_key), (call.values, new_value)):
        held = state.gather(2, inside[..., None].expand(-1, -1, -1, state.shape[3])).masked_fill((positions < 0)[..., None], 0)
        found.append(torch.cat((held, new, held.new_zeros(batch, kv_heads, missing, state.shape[3])), 2))
    return *found, torch.cat((positions, at, at.new_full((batch, kv_heads, missing), -1)), 2)

"""Several tokens over a prefix that lies in clusters: what some of them choose together is copied, and read with what came after it.

A kernel over lists of a query block's own would save the copy, which is of the share that is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.backends.cache import pages_reference
from sparsify.ops import cache
from sparsify.ops.cache import CacheAttentionCall
from sparsify.ops.pages import Clusters

# queries that choose together
ROWS = 64
# what is read is a whole multiple of so many slots, which kernels may rely on
_STEP = 64


def cache_attention(call: CacheAttentionCall, attend: Callable[[CacheAttentionCall], Tensor]) -> Tensor:
    """The op for calls of several tokens that are not stored yet. Reads three numbers from the device.

    Args:
        call: its `pages` are `Clusters`.
        attend: the op over slots that are all read.
    """
    pages, new_key, new_value = call.pages, call.new_key, call.new_value
    assert isinstance(pages, Clusters) and new_key is not None and new_value is not None, "who calls looks"
    everything = dataclasses.replace(call, pages=None, bounds=None, prepared=None)
    prefix = None if _recording(call) else _Prefix.look(call, pages)
    if prefix is None:
        return attend(everything)
    output, query_len = cache.empty_output(call), call.query.shape[2]
    is_token = call.is_token
    at = (torch.arange(query_len, device=call.query.device) if is_token is None else is_token.cumsum(-1) - 1) + call.seen[:, None]
    at = at.to(call.positions.dtype)
    if is_token is not None:
        at = at.masked_fill(~is_token, -1)
    for first in range(0, query_len, ROWS):
        part = slice(first, min(first + ROWS, query_len))
        own = None if is_token is None else is_token[:, part]
        read = choose(call, prefix, part)
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


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """What every block of queries chooses from: each head of each row by what it has itself, whatever the others of a batch hold.

    clusters, held: bool [batch, kv_heads, pages]: which pages are clusters, and which hold tokens.
    end: pages that are a cluster of some head lie before it.
    most: pages that any head reads.
    """

    pages: Clusters
    clusters: Tensor
    held: Tensor
    end: int
    most: int

    @classmethod
    def look(cls, call: CacheAttentionCall, pages: Clusters) -> _Prefix | None:
        """None: some head reads all of its pages, or as many as the longest one holds."""
        assert call.prepared is not None, "what lies in clusters is given with them"
        number = torch.arange(pages.of(call.positions.shape[2]), device=call.positions.device)
        clusters = (number >= pages.first) & ((number + 1) * pages.size <= call.prepared[..., None])
        filled = -((call.positions >= 0).sum(-1) // -pages.size)
        found = clusters.sum(-1)
        read = filled - found + torch.minimum(pages_reference.wanted(filled, pages), found)
        end = (call.prepared.amax() // pages.size).to(filled.dtype)
        last, most, total = torch.stack((end, read.amax(), filled.amax())).tolist()
        if most >= total:
            return None
        return cls(pages, clusters[..., :total], number[:total] < filled[..., None], last, most)


def choose(call: CacheAttentionCall, prefix: _Prefix, part: slice) -> Tensor:
    """The pages that some queries read, int64 [batch, kv_heads, most], -1 for none: what is no cluster, and the clusters to which any of
    the queries would give the largest weights, if the means were all keys.

    Args:
        part: of the queries.
    """
    assert call.bounds is not None, "bounds are given with pages"
    math, span = torch.float64 if call.query.dtype == torch.float64 else torch.float32, slice(prefix.pages.first, prefix.end)
    means, clusters = call.bounds[:, :, span, 0].to(math), prefix.clusters[..., span]
    query = call.query[:, :, part].to(math).unflatten(1, (means.shape[1], -1))
    logits = call.scale * (query @ means[:, :, None].transpose(-1, -2))
    weights = logits.masked_fill(~clusters[:, :, None, None], -torch.inf).log_softmax(-1)
    if call.is_token is not None:
        weights = weights.masked_fill(~call.is_token[:, None, None, part, None], -torch.inf)
    score = torch.zeros(prefix.held.shape, dtype=math, device=means.device)
    score[..., span] = pages_reference.usable(weights.flatten(2, 3))
    return pages_reference.best(score, prefix.held & ~prefix.clusters, prefix.held, prefix.pages)[..., : prefix.most]


def _gathered(call: CacheAttentionCall, slots: Tensor, new_key: Tensor, new_value: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of some slots and of tokens of the call, filled up to a whole multiple.

    Args:
        slots: int64 [batch, kv_heads, slots], which may lie behind the last one, or before the first.
        at: positions of the tokens, int32 [batch, kv_heads, tokens].
    """
    capacity = call.keys.shape[2]
    inside, nothing = slots.clamp(0, capacity - 1), (slots < 0) | (slots >= capacity)
    batch, kv_heads, count = slots.shape
    missing = -(count + at.shape[2]) % _STEP
    positions, found = call.positions.gather(2, inside).masked_fill(nothing, -1), []
    for state, new in ((call.keys, new_key), (call.values, new_value)):
        held = state.gather(2, inside[..., None].expand(-1, -1, -1, state.shape[3])).masked_fill((positions < 0)[..., None], 0)
        found.append(torch.cat((held, new, held.new_zeros(batch, kv_heads, missing, state.shape[3])), 2))
    return *found, torch.cat((positions, at, at.new_full((batch, kv_heads, missing), -1)), 2)

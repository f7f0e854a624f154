"""Pages of keys in plain PyTorch, without reading a value back to the host: their bounds, which a token reads, and what lies there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.backends.cache import quantised_reference
from sparsify.ops import cache
from sparsify.ops.cache import CacheAttentionCall, CacheBoundsCall, CacheDecodeCall, CacheStoreCall
from sparsify.ops.pages import GROUP as CLUSTERS
from sparsify.ops.pages import Clusters, Pages
from sparsify.ops.quantised import GROUP

# a bound that is no number hides nothing: its page is read
_HIGHEST = 3e38


def cache_bounds(call: CacheBoundsCall) -> None:
    """The bounds of all pages but those that did not change."""
    keys = quantised_reference.everything(call)[0].to(call.bounds.dtype) if call.codes else call.keys
    found = _bounds(_cut(keys, call.size), _cut(call.positions, call.size, -1) >= 0).to(call.bounds.dtype)
    if call.since is not None:
        ends = (torch.arange(found.shape[2], device=found.device) + 1) * call.size
        found = torch.where((ends > call.since[..., None])[..., None, None], found, call.bounds)
    call.bounds.copy_(found)


def renew(call: CacheStoreCall | CacheDecodeCall, slot: Tensor, closed: Tensor | None) -> None:
    """The bounds of the pages that one token of each row went to.

    slot: int64 [batch, kv_heads, 1].
    closed: a slot of the group that may have become codes before; None: there are no codes.
    """
    bounds, pages = call.bounds, call.pages
    if bounds is None or pages is None:
        return
    if closed is not None:
        for one in (closed, slot):
            _renew_group(call, pages, bounds, one // GROUP * GROUP)
        return
    page = slot // pages.size
    at = page * pages.size + torch.arange(pages.size, device=slot.device)
    inside = at < call.capacity
    at = at.clamp(max=call.capacity - 1)
    held = (call.positions.gather(2, at) >= 0) & inside
    keys = call.keys.gather(2, at[..., None].expand(-1, -1, -1, call.keys.shape[3]))
    index = page[..., None, None].expand(-1, -1, -1, *bounds.shape[3:])
    bounds.scatter_(2, index, _bounds(keys[:, :, None], held[:, :, None]).to(bounds.dtype))


def _renew_group(call: CacheStoreCall | CacheDecodeCall, pages: Pages, bounds: Tensor, first: Tensor) -> None:
    """The bounds of the pages of one group of codes of each head, of keys as they are read. first: int64 [batch, kv_heads, 1]."""
    at = first + torch.arange(GROUP, device=first.device)
    keys = quantised_reference.numbers_at(call, at)[0]
    held = (call.positions.gather(2, at.clamp(max=call.capacity - 1)) >= 0) & (at < call.capacity)
    found = _bounds(_cut(keys, pages.size), _cut(held.to(torch.int32), pages.size) > 0).to(bounds.dtype)
    # pages behind the last one repeat what goes to it
    page = at[:, :, :: pages.size] // pages.size
    source = (page.clamp(max=bounds.shape[2] - 1) - page[:, :, :1]).clamp(min=0)
    over = lambda index: index[..., None, None].expand(-1, -1, -1, *bounds.shape[3:])
    bounds.scatter_(2, over(page[:, :, :1] + source), found.gather(2, over(source)))


def _bounds(keys: Tensor, held: Tensor) -> Tensor:
    """[batch, kv_heads, pages, 2, head_dim] of keys [batch, kv_heads, pages, size, head_dim]; 0 where no slot of a page is held."""
    least = keys.masked_fill(~held[..., None], torch.inf).amin(3)
    largest = keys.masked_fill(~held[..., None], -torch.inf).amax(3)
    return torch.stack((least, largest), 3).masked_fill(~held.any(3)[..., None, None], 0)


def _cut(state: Tensor, size: int, fill: int = 0) -> Tensor:
    """[batch, kv_heads, slots, ...] as [batch, kv_heads, pages, size, ...], filled up to whole pages."""
    missing = -state.shape[2] % size
    if missing:
        state = F.pad(state, (0,) * 2 * (state.dim() - 3) + (0, missing), value=fill)
    return state.unflatten(2, (-1, size))


def choose(call: CacheAttentionCall, pages: Pages, bounds: Tensor) -> Tensor:
    """The pages that a call of one token reads, int64 [batch, kv_heads, at most pages.most]; -1 for none."""
    math = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    batch, kv_heads, capacity = call.keys.shape[:3]
    query, ends = call.query.to(math).reshape(batch, kv_heads, -1, call.query.shape[3]), bounds.to(math)
    if isinstance(pages, Clusters):
        return _choose_clusters(call, pages, query, ends)
    highest = query.clamp(min=0) @ ends[:, :, :, 1].transpose(-1, -2) + query.clamp(max=0) @ ends[:, :, :, 0].transpose(-1, -2)
    score = usable(highest)  # [batch, kv_heads, pages]
    at = _cut(call.positions, pages.size, -1)
    newest = call.seen[:, None, None, None] - 1
    always = (at >= 0) & ((at < max(pages.sinks, call.sinks)) | (at > newest - pages.recent))
    if call.staged is not None:  # what lies as it came is read with its page
        slots = torch.arange(capacity, device=at.device).expand_as(call.positions)
        always = always | ((at >= 0) & _cut(quantised_reference.lies_as_it_came(call, slots).to(torch.int32), pages.size).bool())
    held, always = (at >= 0).any(3), always.any(3)
    most = pages.most(capacity, call.sinks, in_order=False, staged=GROUP if call.codes else 0)
    return best(score, always, held, pages)[..., :most]


def usable(scores: Tensor) -> Tensor:
    """The largest of a group's queries [batch, kv_heads, group, pages]: numbers, between those that say that a page is read or is not."""
    return scores.nan_to_num(nan=_HIGHEST).amax(2).clamp(-_HIGHEST, _HIGHEST)


def best(score: Tensor, always: Tensor, held: Tensor, pages: Pages) -> Tensor:
    """The pages that are read, by falling score, int64 [batch, kv_heads, pages]; -1 for none."""
    score = score.masked_fill(always, torch.inf).masked_fill(~held, -torch.inf)
    filled, fixed = held.sum(-1, keepdim=True), always.sum(-1, keepdim=True)
    listed = fixed + torch.minimum(wanted(filled, pages), filled - fixed)
    # stable: of equal pages the first
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return order.masked_fill(torch.arange(order.shape[2], device=order.device) >= listed, -1)


def wanted(filled: Tensor, pages: Pages) -> Tensor:
    """Pages that are chosen where so many hold tokens, beside those that are always read."""
    return torch.full_like(filled, pages.count) if pages.count else -(filled * pages.parts // -(10**6))


def _choose_clusters(call: CacheAttentionCall, pages: Clusters, query: Tensor, means: Tensor) -> Tensor:
    """As `choose`. query: [batch, kv_heads, group, head_dim]; means: as `bounds`."""
    assert call.prepared is not None, "what lies in clusters is given with them"
    number = torch.arange(means.shape[2], device=means.device)
    clusters = (number >= pages.first) & ((number + 1) * pages.size <= call.prepared[..., None])
    held = (_cut(call.positions, pages.size, -1) >= 0).any(3)
    score = usable(query @ means[:, :, :, 0].transpose(-1, -2))
    if pages.groups is not None:
        # of each group the first cluster knows its mean
        begin = number[::CLUSTERS]
        first = begin.clamp(min=pages.first, max=len(number) - 1).expand(*clusters.shape[:2], -1)
        some = clusters.gather(2, first) & (first < begin + CLUSTERS)
        found = usable(query @ means[:, :, :, 1].transpose(-1, -2)).gather(2, first)
        listed = best(found, torch.zeros_like(some), some, pages.groups)
        looked_at = found.masked_fill(~some, -torch.inf)
        least = looked_at.gather(2, listed.clamp(min=0)).masked_fill(listed < 0, torch.inf).amin(-1, keepdim=True)
        reached = (looked_at >= least).repeat_interleave(CLUSTERS, 2)[..., : len(number)]
        score = score.masked_fill(~reached, -_HIGHEST)
    return best(score, held & ~clusters, held, pages)


def gathered(call: CacheAttentionCall, pages: Pages, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and positions of the slots that a call of one token reads, -1 for none, [batch, kv_heads, slots, ...]."""
    capacity, listed = call.keys.shape[2], choose(call, pages, bounds)
    at = (listed[..., None] * pages.size + torch.arange(pages.size, device=listed.device)).flatten(2)
    nothing = (at < 0) | (at >= capacity)
    at = at.clamp(0, capacity - 1)
    over = lambda state: state.gather(2, at[..., None].expand(-1, -1, -1, state.shape[3]))
    keys, values = quantised_reference.numbers_at(call, at) if call.codes else (over(call.keys), over(call.values))
    return keys, values, call.positions.gather(2, at).masked_fill(nothing, -1)


def renew_all(call: CacheStoreCall, since: Tensor | None) -> None:
    """The bounds of the pages that several tokens went to. since: as in `CacheBoundsCall`."""
    if call.bounds is not None and call.pages is not None:
        if call.prepared is not None:
            since = call.prepared if since is None else torch.maximum(since, call.prepared)
        coded = quantised_reference.coded(call)
        cache.bounds(call.keys, call.positions, call.bounds, since=since, size=call.pages.size, version=cache.VERSION, **coded)

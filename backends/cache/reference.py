"""The cache ops of `sparsify.ops.cache` in plain PyTorch, on any device, without reading a value back to the host: the oracle of the
decode kernels, and what serves stores of many tokens everywhere (policies are PyTorch code).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsify import policies
from sparsify.backends.cache import clusters, packed, pages_reference, quantised_reference
from sparsify.ops import cache
from sparsify.ops.cache import CacheAttentionCall, CacheDecodeCall, CacheMassCall, CacheStoreCall
from sparsify.ops.pages import Clusters
from sparsify.ops.quantised import GROUP
from sparsify.ops.reselection import CacheReselectCall
from sparsify.policies import Candidates

# elements of one chunk's score matrix over all heads: 64 MB in fp32
_CHUNK_ELEMENTS = 1 << 24


def cache_store(call: CacheStoreCall) -> None:
    """Adds the call's tokens to the state."""
    if call.empty:
        call.positions.fill_(-1)
        if call.staged is not None:
            call.staged.zero_()
        for state in (call.values, call.counts, call.seen, call.length)[call.pinned == cache.NEVER_OVERWRITTEN :]:
            state.zero_()
    if call.pinned == cache.NEVER_OVERWRITTEN and call.query_len > 1:
        before = call.counts.clone() if call.bounds is not None else None
        if before is not None and call.codes:  # the keys of a group take part in its scales, and a full one becomes codes only now
            before = (before - 1).clamp(min=0) // GROUP * GROUP
        _append_all(call)
        pages_reference.renew_all(call, before)
    elif call.query_len == 1:
        _append(call)
    else:
        _keep_the_best(call)
        pages_reference.renew_all(call, None)
    call.seen.add_(call.query_len if call.is_token is None else call.is_token.sum(-1, dtype=call.seen.dtype))
    call.length.add_(call.query_len)


def _append(call: CacheStoreCall | CacheDecodeCall) -> None:
    """One token per row; padding writes back what is there."""
    slot, value = cache.next_slot(call.counts, call.capacity, call.pinned), call.value
    room = torch.full_like(call.counts, call.capacity) if call.starts is None else packed.sizes(call.starts)
    if call.pinned == cache.NEVER_OVERWRITTEN:
        value = value.masked_fill((call.counts >= room)[..., None, None], torch.nan)
    closed = None if call.staged is None else (call.staged[..., 1:] - 1).clamp(min=0).long()
    if call.codes:
        place = slot if call.starts is None else torch.minimum(call.counts, room - 1).long()[..., None]
        quantised_reference.append(call, place, value, room)
    fresh = (call.key, value, call.seen[:, None, None].expand_as(slot).to(call.positions.dtype))
    states = call.keys, call.values, call.positions
    if call.starts is not None:  # a row's slots as those of one head, with a token for each head
        slot = (call.starts[:, None, :-1] + torch.minimum(call.counts, room - 1)[:, None]).long()
        states, fresh = (state.flatten(1, 2)[:, None] for state in states), (new.transpose(1, 2) for new in fresh)
    for state, new in list(zip(states, fresh, strict=True))[2 if call.codes else 0 :]:
        index = _over_dims(state, slot)
        if call.is_token is not None:
            new = torch.where(_like(call.is_token[:, 0], state), new, state.gather(2, index))
        state.scatter_(2, index, new)
    pages_reference.renew(call, slot, closed)
    call.counts.add_(1 if call.is_token is None else call.is_token.to(call.counts.dtype))


def _append_all(call: CacheStoreCall) -> None:
    """Several tokens per row behind those that are stored, none of which goes; nothing else of the buffers is read or written."""
    key, value, is_token, seen, count, capacity = call.key, call.value, call.is_token, call.seen, call.query_len, call.capacity
    at = torch.arange(count, device=key.device, dtype=torch.int32)
    if call.empty and is_token is None and count <= capacity and not call.codes:
        for state, new in ((call.keys, key), (call.values, value), (call.positions, at)):
            state[:, :, :count].copy_(new)
        call.counts.add_(count)
        return
    total = count if is_token is None else is_token.sum(-1, dtype=seen.dtype)[:, None]
    if is_token is not None:
        # padding repeats the row's last token, which leaves nothing of it; a row of padding alone writes back what is there
        last = torch.where(is_token, at, 0).amax(-1, keepdim=True)
        source = torch.where(is_token, at, last).long()[:, None].expand(-1, key.shape[1], -1)
        key, value = gather_slots(key, source), gather_slots(value, source)
        at = torch.where(is_token, is_token.cumsum(-1, dtype=at.dtype), total) - 1
    place = call.counts[..., None] + at[:, None] if is_token is not None else call.counts[..., None] + at  # tokens were evicted before
    at = seen[:, None] + at
    slot = place.clamp(0, capacity - 1).long()
    value = value.masked_fill((place >= capacity)[..., None], torch.nan)
    if call.codes:
        stored_at = at.clamp(max=capacity - 1)
        some = None if is_token is None else is_token.any(-1, keepdim=True)
        quantised_reference.append_all(call, key, value, stored_at if some is None else torch.where(some, stored_at, -1))
    fresh = [(call.keys, key), (call.values, value), (call.positions, at[:, None].expand_as(slot))]
    for state, new in fresh[2:] if call.codes else fresh:
        index = _over_dims(state, slot)
        if is_token is not None:
            new = torch.where(_like(is_token.any(-1), state), new, state.gather(2, index[:, :, :1]))
        state.scatter_(2, index, new.to(state.dtype))
    call.counts.add_(total)


def _keep_the_best(call: CacheStoreCall) -> None:
    """Several tokens per row and those that are stored: as many as there are slots stay."""
    merged = Merge(call)
    if merged.candidates > merged.capacity:
        merged.score(call)
    # in a row to which padding leaves one token or none it is a call of that one token
    alone = None if call.empty or call.is_token is None else call.is_token
    several = None if alone is None else alone.sum(-1) > 1
    arranged = (*merged.arranged(call.pinned, call.recent), merged.total.clamp(max=merged.capacity))
    fresh = list(zip((call.keys, call.values, call.positions, call.counts), arranged, strict=True))
    for state, chosen in fresh[2:] if call.codes else fresh:
        part = state[:, :, : chosen.shape[2]] if state.dim() > 2 else state
        part.copy_(chosen if several is None else torch.where(_like(several, part), chosen, part))
    if call.codes:
        quantised_reference.store_all(call, arranged[0], arranged[1], several)
    if alone is not None and several is not None:
        first = alone.to(torch.uint8).argmax(-1)[:, None, None].expand(-1, call.kv_heads, -1)
        single = (alone.any(-1) & ~several)[:, None]
        key, value = gather_slots(call.key, first), gather_slots(call.value, first)
        _append(dataclasses.replace(call, key=key, value=value, is_token=single))


def _like(rows: Tensor, state: Tensor) -> Tensor:
    """[batch] as [batch, 1, ...], to go with a tensor of the state."""
    return rows.view(-1, *(1,) * (state.dim() - 1))


class Merge:
    """The tokens of a layer and those of a call, of which a cache keeps as many as it has slots: empty slots and padding first, then the
    tokens side by side in order of position."""

    def __init__(self, call: CacheStoreCall | CacheReselectCall):
        key, seen, is_token = call.key, call.seen, call.is_token
        kv_heads, count = key.shape[1:3]
        self.capacity, self.is_token = call.capacity, is_token
        if is_token is None:
            at = seen[:, None] + torch.arange(count, device=key.device, dtype=torch.int32)
        else:
            at = torch.where(is_token, seen[:, None] + is_token.cumsum(-1, dtype=torch.int32) - 1, -1)
        self.call_positions = at.to(torch.int32)  # [batch, query_len], -1 for padding
        self.newest = seen - 1 + (count if is_token is None else is_token.sum(-1, dtype=seen.dtype))
        at = self.call_positions[:, None].expand(-1, kv_heads, -1)
        self.keys, self.values, self.positions = key, call.value, at
        if not call.empty:
            keys, values = call.keys, call.values
            if call.codes:
                keys, values = (t.to(key.dtype) for t in quantised_reference.everything(call))
            self.keys, self.values = torch.cat((keys, key), 2), torch.cat((values, call.value), 2)
            self.positions = torch.cat((call.positions, at), 2)
        self.order: Tensor | None = None
        if not call.empty or is_token is not None:
            self.order = self.positions.argsort(dim=-1, stable=True)
            self.keys, self.values, self.positions = map(self.in_order, (self.keys, self.values, self.positions))
        self.candidates = self.keys.shape[2]
        self.total = (self.positions >= 0).sum(-1, dtype=torch.int32)  # [batch, kv_heads]
        self.scores: Tensor | None = None

    def in_order(self, held: Tensor) -> Tensor:
        """What stored tokens hold, then those of the call, by candidate."""
        return held if self.order is None else gather_slots(held, self.order)

    def usable(self, found: Tensor, recent: int) -> Tensor:
        """A policy's scores with what is not its to say."""
        newest = self.positions > (self.newest - recent)[:, None, None]
        # a NaN score would win every comparison; the policy's word counts only between tokens that exist
        found = found.float().nan_to_num(nan=-3e38, neginf=-3e38, posinf=3e38).clamp(-3e38, 3e38)
        return found.masked_fill(newest, torch.inf).masked_fill(self.positions < 0, -torch.inf)

    def score(self, call: CacheStoreCall) -> None:
        policy, query, queries, at = policies.parse(call.policy), call.query, None, None
        if policy.observed:
            assert query is not None, "the policy reads queries, which the op was not given"
            at = self.call_positions
            if self.is_token is None:
                queries, at = query[:, :, -policy.observed :], at[:, -policy.observed :]
            else:  # the last queries of each row that are no padding, wherever padding stands
                last = self.is_token.to(torch.int8).argsort(dim=-1, stable=True)[:, -policy.observed :]
                queries, at = gather_slots(query, last[:, None].expand(-1, query.shape[1], -1)), at.gather(1, last)
        found = policy.score(Candidates(self.keys, self.values, self.positions, queries, at, self.newest, call.scale, call.softcap))
        self.scores = self.usable(found, call.recent)

    def arranged(self, pinned: int, recent: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions by slot, [batch, kv_heads, at most capacity, ...]."""
        if self.scores is None:
            # stable, so that of the -1 entries nothing but their number matters
            order = torch.where(self.positions < 0, torch.iinfo(torch.int32).max, self.positions).argsort(dim=-1, stable=True)
        else:
            order = self._by_slot(self.scores, pinned, recent)
        at = gather_slots(self.positions, order)
        nothing = (at < 0)[..., None]
        # empty slots are hidden by a mask; zeros there keep a NaN of a padding token out of sums
        return gather_slots(self.keys, order).masked_fill(nothing, 0), gather_slots(self.values, order).masked_fill(nothing, 0), at

    def _by_slot(self, scores: Tensor, pinned: int, recent: int) -> Tensor:
        """Candidate of each slot, [batch, kv_heads, capacity]; the order is described in `sparsify.ops.cache`."""
        # the recent ones first, then by falling score; of equal ones the older, so that padding around them cannot decide
        kept = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.capacity]
        at = gather_slots(self.positions, kept)
        rank = torch.arange(self.capacity, device=at.device) - recent
        ring = self.capacity - recent + pinned - 1 - rank  # worst first
        chosen = torch.where(rank < pinned, rank, ring)
        newest = at - self.newest[:, None, None] + self.capacity - 1
        overfull = torch.where(rank < 0, newest, chosen)
        by_position = torch.where(at < 0, torch.iinfo(torch.int32).max, at).argsort(dim=-1, stable=True)
        fits = torch.empty_like(by_position).scatter_(-1, by_position, torch.arange(self.capacity, device=at.device).expand_as(by_position))
        slot = torch.where((self.total > self.capacity)[..., None], overfull, fits)
        return torch.empty_like(kept).scatter_(-1, slot, kept)


def ranked(scores: Tensor) -> Tensor:
    """Rank of each candidate, 0 for the best; of equal ones the older is better."""
    best = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(best).scatter_(-1, best, torch.arange(best.shape[-1], device=best.device).expand_as(best))


def gather_slots(source: Tensor, index: Tensor) -> Tensor:
    """source [batch, heads, n] or [batch, heads, n, dim] at index [batch, heads, m] along n."""
    return source.gather(2, _over_dims(source, index))


def _over_dims(state: Tensor, slots: Tensor) -> Tensor:
    """Slots [batch, heads, m] as an index along dimension 2 of a state [batch, heads, n] or [batch, heads, n, dim]."""
    return slots if state.dim() == 3 else slots[..., None].expand(-1, -1, -1, state.shape[-1])


def cache_attention(call: CacheAttentionCall) -> Tensor:
    """Output [batch, query_heads, query_len, v_head_dim] in query's dtype. fp32 math (fp64 for fp64 inputs)."""
    query, keys, values, positions, sinks, window = call.query, call.keys, call.values, call.positions, call.sinks, call.window
    if call.starts is not None:
        call = dataclasses.replace(call, **packed.spread_state(call, call.starts), starts=None)
        keys, values, positions = call.keys, call.values, call.positions
    if isinstance(call.pages, Clusters) and call.new_key is not None:
        return clusters.cache_attention(call, cache_attention)
    if call.pages is not None and call.bounds is not None:
        keys, values, positions = pages_reference.gathered(call, call.pages, call.bounds)
    elif call.codes:
        keys, values = quantised_reference.everything(call)
    batch, heads, query_len, _ = query.shape
    math = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = cache.empty_output(call)
    query_positions = find_query_positions(call)
    if call.new_key is not None:
        assert call.new_value is not None, "new_key and new_value come together"
        at = query_positions if call.is_token is None else query_positions.masked_fill(~call.is_token, -1)
        keys, values = torch.cat((keys, call.new_key), 2), torch.cat((values, call.new_value), 2)
        positions = torch.cat((positions, at[:, None].expand(-1, keys.shape[1], -1).to(positions.dtype)), 2)
    nothing = (positions < 0)[..., None]
    keys, values = (t.to(math).masked_fill(nothing, 0).unsqueeze(2) for t in (keys, values))
    positions = positions[:, :, None, None]  # [batch, kv_heads, 1, 1, keys]
    grouped = query.to(math).reshape(batch, keys.shape[1], -1, query_len, query.shape[-1])
    chunk = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * keys.shape[3]))
    for first in range(0, query_len, chunk):
        part = slice(first, first + chunk)
        rows, p = grouped[..., part, :], query_positions[:, None, None, part, None]
        logits = call.scale * (rows @ keys.transpose(-1, -2))
        if call.inverse_frequencies is not None:
            rotated = rotate(rows, -(query_positions[:, part] + 1 - sinks - window).clamp(min=0)[:, None, None], call.inverse_frequencies)
            logits = torch.where(positions < sinks, call.scale * (rotated @ keys.transpose(-1, -2)), logits)
        visible = (positions >= 0) & (positions <= p)
        if window:
            visible = visible & ((positions > p - window) | (positions < sinks))
        weights = _softmax(logits, visible.expand_as(logits), call.softcap, call.sink_logits)
        output[:, :, part] = (weights @ values).flatten(1, 2).to(output.dtype)
    return output


def find_query_positions(call: CacheAttentionCall) -> Tensor:
    """Position of each query of a call in its row, [batch, query_len]; padding has that of the token before it.

    `seen` counts the call's tokens when they are stored already, which only a call of one token is.
    """
    seen, is_token = call.seen, call.is_token
    if call.new_key is None:
        return seen[:, None] - 1
    if is_token is None:
        return seen[:, None] + torch.arange(call.query.shape[2], device=seen.device, dtype=seen.dtype)
    return seen[:, None] + is_token.cumsum(-1, dtype=seen.dtype) - 1


def rotate(rows: Tensor, steps: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """`rows` [..., dim] rotated by `steps` [...] positions of a rotary embedding in half-split layout."""
    # fp32 angles lose the fraction of the rotation after some 100 000 positions
    angles = steps[..., None].double() * inverse_frequencies.double()
    cos, sin, half = angles.cos().to(rows.dtype), angles.sin().to(rows.dtype), inverse_frequencies.numel()
    a, b, rest = rows[..., :half], rows[..., half : 2 * half], rows[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def cache_length(length: Tensor) -> Tensor:
    """A copy of the length, computed where it stands."""
    return length.clone()


def _softmax(logits: Tensor, visible: Tensor, softcap: float, sink_logits: Tensor | None) -> Tensor:
    """Weights of logits [batch, kv_heads, group, rows, keys]; a row that sees nothing gets 0."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(logits.dtype).view(1, logits.shape[1], logits.shape[2], 1, 1)
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + (sink - top).exp()
    return weights / total.masked_fill(total == 0, 1)


def cache_mass(call: CacheMassCall) -> Tensor:
    """Weights that keys get of the queries' attention, of one KV head and of some queries at a time, which bounds the logits' memory."""
    query, keys, positions = call.query, call.keys, call.positions
    math = torch.float64 if query.dtype == torch.float64 else torch.float32
    (batch, heads, query_len, _), (kv_heads, key_len) = query.shape, keys.shape[1:3]
    group = heads // kv_heads
    mass = query.new_zeros(batch, heads, key_len, dtype=torch.float32)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, batch * group * key_len))
    for head in range(kv_heads):
        members = slice(head * group, (head + 1) * group)
        at = positions[:, None, head : head + 1]
        # a hidden key may hold anything
        known = keys[:, head, None].to(math).masked_fill((at < 0).transpose(-1, -2), 0)
        for first in range(0, query_len, chunk):
            part = slice(first, first + chunk)
            visible = (at >= 0) & (at <= call.query_positions[:, None, part, None])  # [batch, 1, queries, keys]
            logits = call.scale * (query[:, members, part].to(math) @ known.transpose(-1, -2))
            mass[:, members] += _softmax(logits[:, :, None], visible[:, :, None], call.softcap, None)[:, :, 0].sum(2)
    return mass


def cache_decode(call: CacheDecodeCall) -> Tensor:
    """One token stored, then attention over the filled slots."""
    _append(call)
    call.seen.add_(1 if call.is_token is None else call.is_token[:, 0].to(call.seen.dtype))
    call.length.add_(1)
    return cache_attention(CacheAttentionCall(**call.common(CacheAttentionCall)))

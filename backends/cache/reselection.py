"""The ops of `sparsify.ops.reselection` in plain PyTorch, on any device, without reading a value back to the host."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsify import policies
from sparsify.backends.cache import packed, quantised_reference
from sparsify.backends.cache.reference import Merge, gather_slots, ranked
from sparsify.ops.reselection import CacheObserveCall, CacheReselectCall
from sparsify.policies import Candidates


def cache_observe(call: CacheObserveCall) -> None:
    """Notes the call's queries."""
    place = (call.seen % call.queries.shape[2]).long()
    at, query = call.seen.to(call.query_positions.dtype), call.query.to(call.queries.dtype)
    index = place[:, None, None, None].expand_as(query)
    if call.is_token is not None:
        real = call.is_token[:, 0].to(torch.bool)
        at = torch.where(real, at, call.query_positions.gather(1, place[:, None])[:, 0])
        query = torch.where(real[:, None, None, None], query, call.queries.gather(2, index))
    call.queries.scatter_(2, index, query)
    call.query_positions.scatter_(1, place[:, None], at[:, None])


def cache_reselect(call: CacheReselectCall) -> None:
    """Adds the call's tokens; where a row has more than `limit`, the policy selects."""
    if call.empty:
        call.positions.fill_(-1)
        for state in (call.values, call.counts, call.seen, call.length):
            state.zero_()
        if call.staged is not None:
            call.staged.zero_()
        if call.carried is not None:
            call.carried.zero_()
        if call.query_positions is not None:
            call.query_positions.fill_(-1)
    starts, policy, capacity = call.starts, policies.parse(call.policy), call.capacity
    if starts is not None and call.empty:
        starts.copy_((torch.arange(starts.shape[1], device=starts.device) * capacity).expand_as(starts))
    held = call if starts is None or call.empty else dataclasses.replace(call, **packed.spread_state(call, starts))
    merged = Merge(held)
    if starts is None:
        over = merged.total > call.limit
    else:
        over = (merged.total > packed.sizes(starts) + (call.limit - capacity)).any(1, keepdim=True).expand_as(merged.total)
    carried, kept = _carried(call, merged, held.capacity), torch.full_like(merged.total, call.kept)
    queries, at = _queries(call, merged, policy.observed)
    keep = ~over[..., None].expand_as(merged.positions)
    if policy.carries or merged.candidates > call.kept:
        last = slice(-policy.observed, None)
        seen_by = (None, None) if queries is None or at is None else (queries[:, :, last], at[:, last])
        held = merged.keys, merged.values, merged.positions
        candidates = Candidates(*held, *seen_by, merged.newest, call.scale, call.softcap, carried)
        found = policy.score(candidates)
        if carried is not None:
            carried = policy.carry(candidates, found)
        found = merged.usable(found, call.recent)
        if starts is not None:
            kept = policy.share(found, call.kept, call.recent).to(kept.dtype)
        keep = keep | (ranked(found) < kept[..., None])
    order = _by_position(merged, keep)
    counts = torch.where(over, torch.minimum(kept, merged.total), merged.total)
    chosen = [(call.positions, merged.positions, -1)]
    if not call.codes:
        chosen += [(call.keys, merged.keys, 0), (call.values, merged.values, 0)]
    if call.carried is not None and carried is not None:
        chosen.append((call.carried, carried.to(call.carried.dtype), 0))
    if starts is not None:
        room = capacity - call.kept
        ends = torch.where(over, kept + room, packed.sizes(starts)).cumsum(-1, dtype=starts.dtype)
        starts[:, 1:].copy_(ends)
        for state, source, nothing in chosen:
            packed.pack(state, source, order, counts, starts, nothing)
        chosen = []
    if call.codes:
        quantised_reference.store_in_order(call, gather_slots(merged.keys, order), gather_slots(merged.values, order), counts)
    order = order[..., :capacity]
    gone = gather_slots(torch.where(keep, merged.positions, -1), order) < 0
    count = order.shape[2]
    for state, source, nothing in chosen:
        hidden = gone if state.dim() == 3 else gone[..., None]
        state[:, :, :count].copy_(gather_slots(source, order).masked_fill(hidden, nothing))
        state[:, :, count:].fill_(nothing)
    call.counts.copy_(counts)
    call.seen.copy_(merged.newest + 1)
    call.length.add_(call.query_len)
    if call.queries is not None and call.query_positions is not None and queries is not None and at is not None:
        _note(call.queries, call.query_positions, queries, at, merged.newest, policy.carries)


def _by_position(merged: Merge, keep: Tensor) -> Tensor:
    """The candidates that stay in order of position, then the others."""
    last = torch.iinfo(torch.int32).max
    return torch.where(keep & (merged.positions >= 0), merged.positions, last).argsort(dim=-1, stable=True)


def _carried(call: CacheReselectCall, merged: Merge, width: int) -> Tensor | None:
    """By candidate, 0 for the call's own tokens."""
    if call.carried is None:
        return None
    fresh = call.carried.new_zeros(*call.carried.shape[:2], call.query_len)
    if call.empty:
        return merged.in_order(fresh)
    held = call.carried if call.starts is None else packed.spread(call.carried, call.starts, width, 0)
    return merged.in_order(torch.cat((held, fresh), 2))


def _queries(call: CacheReselectCall, merged: Merge, observed: int) -> tuple[Tensor | None, Tensor | None]:
    """Queries that are known and their positions, in order, behind those that are none: of the call's the last `observed`."""
    if call.queries is None or call.query_positions is None:
        return None, None
    known = _ordered(call.queries, call.query_positions)
    if call.query is None:
        return known
    query, at = call.query.to(call.queries.dtype), merged.call_positions
    if call.is_token is not None:
        query, at = _ordered(query, at, observed)
    query, at = query[:, :, -observed:], at[:, -observed:]
    if call.empty:  # a long prompt's queries are not copied
        return query, at
    query, at = torch.cat((known[0], query), 2), torch.cat((known[1], at), 1)
    return (query, at) if call.is_token is None else _ordered(query, at)


def _ordered(query: Tensor, at: Tensor, last: int = 1 << 30) -> tuple[Tensor, Tensor]:
    """Queries by rising position, and of them the last ones."""
    order = at.argsort(dim=-1, stable=True)[:, -last:]
    return gather_slots(query, order[:, None].expand(-1, query.shape[1], -1)), at.gather(1, order)


def _note(queries: Tensor, query_positions: Tensor, known: Tensor, at: Tensor, newest: Tensor, forget: bool) -> None:
    """Keeps the last of the queries that are known, each at its place."""
    if forget:
        query_positions.fill_(-1)
        return
    size, count = queries.shape[2], known.shape[2]
    before = (newest[:, None] - torch.arange(size, device=at.device)) % size  # how far before the newest the query of each place lies
    entry = count - 1 - before
    there = (entry >= 0) & (before < (at >= 0).sum(-1, keepdim=True))
    entry = entry.clamp(min=0).long()
    queries.copy_(gather_slots(known, entry[:, None].expand(-1, known.shape[1], -1)))
    query_positions.copy_(torch.where(there, at.gather(1, entry), -1))

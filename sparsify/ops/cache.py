"""Custom ops of the evicting cache, beside those of `sparsify.ops.attention`. Schemas and fake kernels only; kernels register from
`sparsify.backends`.

State of one layer (`sparsify.generation.caches.layer`), all on one device, changed in place only:

    keys, values    [batch, kv_heads, capacity, head_dim]
    positions       int32 [batch, kv_heads, capacity]  which real token of its row a slot holds, counted from 0; -1 for an empty slot
    counts          int32 [batch, kv_heads]            tokens written in slot order: the next one goes to slot_of(counts)
    seen            int32 [batch]                      real (unpadded) tokens of the row so far
    length          int64 []                           tokens so far, padding included: what transformers calls the sequence length

The first `pinned` slots are written once, the others are a ring: slot_of(n) = n for n < pinned, else
pinned + (n - pinned) mod (capacity - pinned). Slots below min(counts, capacity) are filled, the others hold
zeros. Padding never takes a slot.

With pinned = NEVER_OVERWRITTEN nothing is evicted: slot_of(n) = n, and slots beyond the filled ones may hold anything. Who calls makes
room beforehand. A token for which there is none takes the last slot with a value of NaN, so that every later output says so: ops cannot
raise without waiting for the device.

`cache_store` adds query_len tokens. One token overwrites the ring's oldest slot. Of more, while they fit, slots stay in order of
position; beyond that the newest `recent` tokens stay, the policy's scores choose the rest, the best `pinned` of those go to the pinned
slots and the others to the ring's start, worst first, so that later tokens replace the worst first. What is counted is tokens, never
columns: a row to which padding leaves one token, or none, is served as a call of one token would be (callers of `cache_attention` hide what
that token overwrites).

`cache_attention` attends to the filled slots and, when `new_key` is given, to the tokens that are about to be stored. For a query at
position p of its row, a key at position k is visible when

    k <= p  and  (window = 0  or  k > p - window  or  k < sinks)

With `inverse_frequencies` the sinks stand directly before the window (positions inside the cache, arXiv 2309.17453, section 3.2):
they are seen by the query turned back by max(0, p + 1 - sinks - window) positions of a rotary embedding in half-split layout over the
first 2 * len(inverse_frequencies) dimensions. A row without a visible key gives 0.

`cache_decode` is cache_store of one token, then cache_attention without new keys: the fusion that decode kernels serve. For it every
filled slot is visible, which one-token stores guarantee (a ring of `window` slots holds exactly the window).

`cache_mass` is what policies that look at queries score by: fp32 [batch, query_heads, keys], the sum over the queries (query [batch,
query_heads, queries, head_dim] at query_positions int32 [batch, queries], -1 for none) of the weight that each key gets, of keys [batch,
kv_heads, keys, head_dim] at positions int32 [batch, kv_heads, keys], those at 0 <= position <= the query's.

`cache_length` copies the length. It is an op of its own because Inductor (torch 2.13) may inline a pointwise read of a tensor into a
kernel that runs after a custom op has mutated that tensor; the output of an op is computed where it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops.library import TAGS, library, traced

# Compiled graphs are cached by op name and constants, not by kernel source: raise this when semantics change.
VERSION = 2

# `pinned` of a state from which no token is ever evicted
NEVER_OVERWRITTEN = -1

_STATE = "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, Tensor(d!) counts, Tensor(e!) seen, Tensor(f!) length"

library.define(
    f"cache_store(Tensor? query, Tensor key, Tensor value, {_STATE}, *, Tensor? real=None, "
    "Tensor? tickets=None, int pinned, int recent, bool empty, str policy, float scale, float softcap, int version) -> ()",
    tags=TAGS,
)
library.define(
    "cache_attention(Tensor query, Tensor keys, Tensor values, Tensor positions, Tensor seen, *, Tensor? new_key=None, "
    "Tensor? new_value=None, Tensor? real=None, Tensor? sink_logits=None, Tensor? inverse_frequencies=None, "
    "float scale, float softcap, int window, int sinks, int version) -> Tensor",
    tags=TAGS,
)
library.define(
    f"cache_decode(Tensor query, Tensor key, Tensor value, {_STATE}, *, Tensor? real=None, Tensor? sink_logits=None, "
    "Tensor? inverse_frequencies=None, Tensor(g!)? tickets=None, int pinned, float scale, float softcap, int window, int sinks, "
    "int version) -> Tensor",
    tags=TAGS,
)
library.define(
    "cache_mass(Tensor query, Tensor keys, Tensor positions, Tensor query_positions, *, float scale, float softcap, int version) -> Tensor",
    tags=TAGS,
)
library.define("cache_length(Tensor length) -> Tensor", tags=TAGS)


def _output(query: Tensor, values: Tensor) -> Tensor:
    """[batch, query_heads, query_len, v_head_dim], the transpose of a contiguous [batch, query_len, heads, dim]."""
    batch, heads, query_len, _ = query.shape
    return query.new_empty(batch, query_len, heads, values.shape[-1]).transpose(1, 2)


def _store_fake(query: Tensor | None, key: Tensor, *state: Tensor, **options: object) -> None:
    return None


def _attention_fake(query: Tensor, keys: Tensor, values: Tensor, *state: Tensor, **options: object) -> Tensor:
    return _output(query, values)


def _decode_fake(query: Tensor, key: Tensor, value: Tensor, *state: Tensor, **options: object) -> Tensor:
    return _output(query, value)


def _mass_fake(query: Tensor, keys: Tensor, *positions: Tensor, **options: object) -> Tensor:
    return query.new_empty(*query.shape[:2], keys.shape[2], dtype=torch.float32)


traced("cache_mass", _mass_fake)
traced("cache_length", torch.empty_like)
traced("cache_store", _store_fake)
traced("cache_attention", _attention_fake)
traced("cache_decode", _decode_fake)


def next_slot(counts: Tensor, capacity: int, pinned: int) -> Tensor:
    """Slot that the next token of each row takes, int64 [batch, kv_heads, 1]."""
    if pinned == NEVER_OVERWRITTEN:
        return counts.clamp(max=capacity - 1).long()[..., None]
    ring = max(capacity - pinned, 1)
    return torch.where(counts < pinned, counts, pinned + (counts - pinned) % ring).long()[..., None]


empty_output = _output
store = torch.ops.sparsify.cache_store.default
attention = torch.ops.sparsify.cache_attention.default
mass = torch.ops.sparsify.cache_mass.default
length = torch.ops.sparsify.cache_length.default
decode = torch.ops.sparsify.cache_decode.default

"""Custom ops of the evicting cache, beside those of `sparsify.ops.attention`. Schemas and fake kernels only; kernels register from
`sparsify.backends`.

State of one layer (`sparsify.generation.caches.layer`), all on one device, changed in place only:

    keys, values    [batch, kv_heads, capacity, head_dim]
    positions       int32 [batch, kv_heads, capacity]  which token of its row a slot holds, counted from 0; -1 for an empty slot
    counts          int32 [batch, kv_heads]            tokens written in slot order: the next one goes to slot_of(counts)
    seen            int32 [batch]                      tokens of the row so far, without padding
    length          int64 []                           tokens so far, padding included: what transformers calls the sequence length

The first `pinned` slots are written once, the others are a ring: slot_of(n) = n for n < pinned, else
pinned + (n - pinned) mod (capacity - pinned). Slots below min(counts, capacity) are filled, the others hold
zeros. Padding never takes a slot.

With `starts` [batch, kv_heads + 1], which needs pinned = NEVER_OVERWRITTEN, KV heads share a row's kv_heads * capacity slots: head h has
those from starts[h] to starts[h + 1] of keys[b], values[b] and positions[b] taken as one sequence, and they are its capacity.

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

With `pages` a call of one token reads some of the slots only, by KV head: those of the pages with the highest bounds, which slots
[i * size, (i + 1) * size) are for page i, and those of the pages that are always read (`sparsify.ops.pages.Pages`). Of a page that holds
tokens, `bounds` [batch, kv_heads, pages, 2, head_dim] has the least and the largest number of each channel of its keys. A page counts by
the largest of its bounds for the group's queries; of equal pages the first is read. Every op that stores tokens renews the bounds of
the pages that they go to; `cache_bounds` computes those of all pages that hold a slot from `since` [batch, kv_heads] on, by `positions`.
Pages whose token is seen by rotated queries are always read.

With `pages` that are `Clusters` the slots below `prepared` [batch, kv_heads], a multiple of `size`, lie in clusters, one a page: those
behind the pages of the first `sinks` slots. Of such a page `bounds` has the mean of its keys, then that of the keys of its group, of
which each 16 neighbouring pages are one. A page counts by the largest product of a query of the KV head with its mean, among the pages
of the groups whose means have the largest products; of pages that are no clusters all are read. A call of several tokens chooses for
64 queries at once, by the largest weight that any of them would give to a page, if it had the means alone for keys. Ops that store
tokens leave the bounds of clusters as they are. Clusters need pinned = NEVER_OVERWRITTEN; until there are any, everything is read.

`cache_mass` is what policies that look at queries score by: fp32 [batch, query_heads, keys], the sum over the queries (query [batch,
query_heads, queries, head_dim] at query_positions int32 [batch, queries], -1 for none) of the weight that each key gets, of keys [batch,
kv_heads, keys, head_dim] at positions int32 [batch, kv_heads, keys], those at 0 <= position <= the query's.

`cache_length` copies the length. It is an op of its own because Inductor (torch 2.13) may inline a pointwise read of a tensor into a
kernel that runs after a custom op has mutated that tensor; the output of an op is computed where it stands.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sparsify.graph.typed_torch import define_op
from sparsify.ops.call import OpCall, Operand
from sparsify.ops.library import TAGS, define, library, traced
from sparsify.ops.pages import Pages

# Compiled graphs are cached by op name and constants, not by kernel source: raise this when semantics change.
VERSION = 6

# `pinned` of a state from which no token is ever evicted
NEVER_OVERWRITTEN = -1


@dataclass(frozen=True, eq=False)
class WritingCall(OpCall):
    """A call that stores tokens in a layer: its operands by position.

    query: [batch, query_heads, query_len, head_dim], floating point.
    key: [batch, kv_heads, query_len, head_dim], of the tokens to store.
    value: [batch, kv_heads, query_len, v_head_dim].
    keys, values, positions, counts, seen, length: the layer's state, changed in place; the module describes it.
    """

    VERSION: ClassVar[int] = VERSION

    query: Annotated[Tensor | None, Operand("batch query_heads query_len head_dim", "floats")]
    key: Annotated[Tensor, Operand("batch kv_heads query_len head_dim", "floats")]
    value: Annotated[Tensor, Operand("batch kv_heads query_len v_head_dim", "floats")]
    keys: Annotated[Tensor, Operand("batch kv_heads capacity *", "anything", written=True)]
    values: Annotated[Tensor, Operand("batch kv_heads capacity *", "anything", written=True)]
    positions: Annotated[Tensor, Operand("batch kv_heads capacity", "integers", written=True)]
    counts: Annotated[Tensor, Operand("batch kv_heads", "integers", written=True)]
    seen: Annotated[Tensor, Operand("batch", "integers", written=True)]
    length: Annotated[Tensor, Operand("", "integers", written=True)]

    @property
    def state(self) -> tuple[Tensor, ...]:
        """keys, values, positions, counts, seen, length."""
        return self.keys, self.values, self.positions, self.counts, self.seen, self.length

    @property
    def query_len(self) -> int:
        return self.key.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Slots of each KV head."""
        return self.keys.shape[2]


@dataclass(frozen=True, eq=False)
class CacheStoreCall(WritingCall):
    """One call of `sparsify::cache_store`; the module says what is computed.

    query: None for policies that observe no queries.
    is_token: bool [batch, query_len], False for padding, which is not stored; None: no padding.
    starts: int32 [batch, kv_heads + 1], where each head's slots begin and the last one's end; None: all have `capacity`.
    tickets: int32, of no use to this op: a decode step that is fused from it passes them on.
    pinned: slots that are written once, or NEVER_OVERWRITTEN.
    recent: newest tokens that no score evicts.
    empty: nothing is stored yet, whatever a call that failed may have left in the buffers.
    codes: "fp8" or "int4" where keys and values are codes; then the buffers that `sparsify.ops.quantised` describes are given, too.
    bounds: of the keys of pages, renewed; given with `pages`.
    filled: as in `CacheDecodeCall`, to which a decode step that is fused from this op passes it on.
    prepared: int32 [batch, kv_heads], slots that lie in clusters; given with `pages` that are `Clusters`.
    policy: `sparsify.policies.Policy.describe`'s text.
    scale: of the attention's logits, for policies that observe queries.
    softcap: bound of those logits, 0 for none.
    pages: how the slots are cut into pages; None: not at all.
    """

    NAME: ClassVar[str] = "cache_store"
    UNREAD: ClassVar[tuple[str, ...]] = ("filled",)

    _: KW_ONLY
    is_token: Annotated[Tensor | None, Operand("batch query_len", "integers")] = None
    starts: Annotated[Tensor | None, Operand("batch kv_heads_and_one", "integers")] = None
    tickets: Annotated[Tensor | None, Operand("*", "integers")] = None
    bounds: Annotated[Tensor | None, Operand("batch kv_heads pages ends head_dim", "floats", written=True)] = None
    prepared: Annotated[Tensor | None, Operand("batch kv_heads", "integers")] = None
    pages: Pages | None = None
    codes: str = ""
    key_scales: Annotated[Tensor | None, Operand("batch kv_heads groups parts head_dim", "floats", written=True)] = None
    value_scales: Annotated[Tensor | None, Operand("batch kv_heads capacity parts", "floats", written=True)] = None
    recent_keys: Annotated[Tensor | None, Operand("batch kv_heads recent head_dim", "floats", written=True)] = None
    recent_values: Annotated[Tensor | None, Operand("batch kv_heads recent v_head_dim", "floats", written=True)] = None
    staged: Annotated[Tensor | None, Operand("batch kv_heads ends", "integers", written=True)] = None
    filled: int | None = None
    pinned: int
    recent: int
    empty: bool
    policy: str
    scale: float
    softcap: float


@dataclass(frozen=True, eq=False)
class CacheDecodeCall(WritingCall):
    """One call of `sparsify::cache_decode`: query_len is 1.

    is_token: bool [batch, 1], False for padding, which is not stored; None: no padding.
    sink_logits: joins each row's denominator with no value.
    inverse_frequencies: of the rotary embedding that puts the sinks directly before the window; None: keys stay at their own positions.
    starts: int32 [batch, kv_heads + 1], where each head's slots begin and the last one's end; None: all have `capacity`.
    tickets: int32 [batch * kv_heads + 1], zeros before and after the call, by which a kernel's last program knows itself.
    codes: "fp8" or "int4" where keys and values are codes; then the buffers that `sparsify.ops.quantised` describes are given, too.
    bounds: of the keys of pages, renewed; given with `pages`.
    prepared: int32 [batch, kv_heads], slots that lie in clusters; given with `pages` that are `Clusters`.
    pages: which slots are read; None: all.
    filled: slots that hold tokens in every row and head before the call, fewer than there are, where the host knows that number; None: it
        does not. It repeats what the state says, so that no kernel has to read it; a graph that has it needs no kernel
        (`sparsify.rewriting.one_token`).
    pinned: slots that are written once, or NEVER_OVERWRITTEN.
    scale: of the logits.
    softcap: bound of the logits, 0 for none.
    window, sinks: as in `CacheAttentionCall`.
    """

    NAME: ClassVar[str] = "cache_decode"
    UNREAD: ClassVar[tuple[str, ...]] = ("filled",)

    query: Annotated[Tensor, Operand("batch query_heads 1 head_dim", "floats")]
    key: Annotated[Tensor, Operand("batch kv_heads 1 head_dim", "floats")]
    value: Annotated[Tensor, Operand("batch kv_heads 1 v_head_dim", "floats")]
    _: KW_ONLY
    is_token: Annotated[Tensor | None, Operand("batch 1", "integers")] = None
    starts: Annotated[Tensor | None, Operand("batch kv_heads_and_one", "integers")] = None
    sink_logits: Annotated[Tensor | None, Operand("query_heads", "floats")] = None
    inverse_frequencies: Annotated[Tensor | None, Operand("*", "floats")] = None
    tickets: Annotated[Tensor | None, Operand("*", "integers", written=True)] = None
    bounds: Annotated[Tensor | None, Operand("batch kv_heads pages ends head_dim", "floats", written=True)] = None
    prepared: Annotated[Tensor | None, Operand("batch kv_heads", "integers")] = None
    pages: Pages | None = None
    codes: str = ""
    key_scales: Annotated[Tensor | None, Operand("batch kv_heads groups parts head_dim", "floats", written=True)] = None
    value_scales: Annotated[Tensor | None, Operand("batch kv_heads capacity parts", "floats", written=True)] = None
    recent_keys: Annotated[Tensor | None, Operand("batch kv_heads recent head_dim", "floats", written=True)] = None
    recent_values: Annotated[Tensor | None, Operand("batch kv_heads recent v_head_dim", "floats", written=True)] = None
    staged: Annotated[Tensor | None, Operand("batch kv_heads ends", "integers", written=True)] = None
    filled: int | None = None
    pinned: int
    scale: float
    softcap: float
    window: int
    sinks: int


@dataclass(frozen=True, eq=False)
class CacheAttentionCall(OpCall):
    """One call of `sparsify::cache_attention`; the module says what is computed.

    query: [batch, query_heads, query_len, head_dim], floating point.
    keys, values, positions, seen: of the layer's state, read only.
    new_key: [batch, kv_heads, query_len, head_dim], of the call's own tokens, which are not stored yet; None: they are.
    new_value: [batch, kv_heads, query_len, v_head_dim]; given with new_key.
    is_token: bool [batch, query_len], False for padding; None: no padding.
    starts: int32 [batch, kv_heads + 1], where each head's slots begin and the last one's end; None: all have `capacity`.
    sink_logits: joins each row's denominator with no value.
    inverse_frequencies: of the rotary embedding that puts the sinks directly before the window; None: keys stay at their own positions.
    scale: of the logits.
    softcap: bound of the logits, 0 for none.
    window: last tokens that a query sees, its own included; 0: all.
    sinks: first tokens that a window does not hide.
    codes: "fp8" or "int4" where keys and values are codes; then the buffers that `sparsify.ops.quantised` describes are given, too.
    bounds: of the keys of pages; given with `pages`.
    prepared: int32 [batch, kv_heads], slots that lie in clusters; given with `pages` that are `Clusters`.
    pages: which slots are read, in a call of one token that is stored already, and with `Clusters` in one of several, too; None: all.
    """

    NAME: ClassVar[str] = "cache_attention"
    VERSION: ClassVar[int] = VERSION

    query: Annotated[Tensor, Operand("batch query_heads query_len head_dim", "floats")]
    keys: Annotated[Tensor, Operand("batch kv_heads capacity *", "anything")]
    values: Annotated[Tensor, Operand("batch kv_heads capacity *", "anything")]
    positions: Annotated[Tensor, Operand("batch kv_heads capacity", "integers")]
    seen: Annotated[Tensor, Operand("batch", "integers")]
    _: KW_ONLY
    new_key: Annotated[Tensor | None, Operand("batch kv_heads query_len head_dim", "floats")] = None
    new_value: Annotated[Tensor | None, Operand("batch kv_heads query_len v_head_dim", "floats")] = None
    is_token: Annotated[Tensor | None, Operand("batch query_len", "integers")] = None
    starts: Annotated[Tensor | None, Operand("batch kv_heads_and_one", "integers")] = None
    sink_logits: Annotated[Tensor | None, Operand("query_heads", "floats")] = None
    inverse_frequencies: Annotated[Tensor | None, Operand("*", "floats")] = None
    bounds: Annotated[Tensor | None, Operand("batch kv_heads pages ends head_dim", "floats")] = None
    prepared: Annotated[Tensor | None, Operand("batch kv_heads", "integers")] = None
    pages: Pages | None = None
    codes: str = ""
    key_scales: Annotated[Tensor | None, Operand("batch kv_heads groups parts head_dim", "floats")] = None
    value_scales: Annotated[Tensor | None, Operand("batch kv_heads capacity parts", "floats")] = None
    recent_keys: Annotated[Tensor | None, Operand("batch kv_heads recent head_dim", "floats")] = None
    recent_values: Annotated[Tensor | None, Operand("batch kv_heads recent v_head_dim", "floats")] = None
    staged: Annotated[Tensor | None, Operand("batch kv_heads ends", "integers")] = None
    scale: float
    softcap: float
    window: int
    sinks: int


@dataclass(frozen=True, eq=False)
class CacheBoundsCall(OpCall):
    """One call of `sparsify::cache_bounds`; the module says what is computed.

    keys, positions: of the layer's state, read only.
    bounds: written.
    codes: "fp8" or "int4" where keys are codes; then `values` and the buffers that `sparsify.ops.quantised` describes are given, too.
    since: int32 [batch, kv_heads], slots below which nothing has changed: pages that lie wholly below keep their bounds; None: all slots
        may have.
    size: slots of a page.
    """

    NAME: ClassVar[str] = "cache_bounds"
    VERSION: ClassVar[int] = VERSION

    keys: Annotated[Tensor, Operand("batch kv_heads capacity *", "anything")]
    positions: Annotated[Tensor, Operand("batch kv_heads capacity", "integers")]
    bounds: Annotated[Tensor, Operand("batch kv_heads pages ends head_dim", written=True)]
    _: KW_ONLY
    since: Annotated[Tensor | None, Operand("batch kv_heads", "integers")] = None
    codes: str = ""
    values: Annotated[Tensor | None, Operand("batch kv_heads capacity *", "anything")] = None
    key_scales: Annotated[Tensor | None, Operand("batch kv_heads groups parts head_dim", "floats")] = None
    value_scales: Annotated[Tensor | None, Operand("batch kv_heads capacity parts", "floats")] = None
    recent_keys: Annotated[Tensor | None, Operand("batch kv_heads recent head_dim", "floats")] = None
    recent_values: Annotated[Tensor | None, Operand("batch kv_heads recent v_head_dim", "floats")] = None
    staged: Annotated[Tensor | None, Operand("batch kv_heads ends", "integers")] = None
    size: int


@dataclass(frozen=True, eq=False)
class CacheMassCall(OpCall):
    """One call of `sparsify::cache_mass`; the module says what is computed.

    query: [batch, query_heads, queries, head_dim], floating point.
    keys: [batch, kv_heads, keys, head_dim].
    positions: int32 [batch, kv_heads, keys], -1 for a key that does not exist.
    query_positions: int32 [batch, queries], -1 for a query that does not exist.
    scale: of the logits.
    softcap: bound of the logits, 0 for none.
    """

    NAME: ClassVar[str] = "cache_mass"
    VERSION: ClassVar[int] = VERSION

    query: Annotated[Tensor, Operand("batch query_heads queries head_dim", "floats")]
    keys: Annotated[Tensor, Operand("batch kv_heads keys head_dim", "floats")]
    positions: Annotated[Tensor, Operand("batch kv_heads keys", "integers")]
    query_positions: Annotated[Tensor, Operand("batch queries", "integers")]
    _: KW_ONLY
    scale: float
    softcap: float


def empty_output(call: CacheAttentionCall | CacheDecodeCall) -> Tensor:
    """Uninitialised [batch, query_heads, query_len, v_head_dim], the transpose of a contiguous [batch, query_len, heads, dim]."""
    batch, heads, query_len, _ = call.query.shape
    return call.query.new_empty(batch, query_len, heads, v_head_dim(call)).transpose(1, 2)


def v_head_dim(call: CacheAttentionCall | CacheDecodeCall) -> int:
    """Numbers of a value."""
    return (call.values if call.recent_values is None else call.recent_values).shape[-1]


def _empty_mass(call: CacheMassCall) -> Tensor:
    return call.query.new_empty(*call.query.shape[:2], call.keys.shape[2], dtype=torch.float32)


store = define(CacheStoreCall, lambda _: None, "()")
attention = define(CacheAttentionCall, empty_output, "Tensor")
decode = define(CacheDecodeCall, empty_output, "Tensor")
mass = define(CacheMassCall, _empty_mass, "Tensor")
bounds = define(CacheBoundsCall, lambda _: None, "()")
define_op(library, "cache_length(Tensor length) -> Tensor", TAGS)
traced("cache_length", torch.empty_like)
length = torch.ops.sparsify.cache_length.default


def next_slot(counts: Tensor, capacity: int, pinned: int) -> Tensor:
    """Slot that the next token of each row takes, int64 [batch, kv_heads, 1]."""
    if pinned == NEVER_OVERWRITTEN:
        return counts.clamp(max=capacity - 1).long()[..., None]
    ring = max(capacity - pinned, 1)
    return torch.where(counts < pinned, counts, pinned + (counts - pinned) % ring).long()[..., None]

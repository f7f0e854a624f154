"""One layer of a SparseCache: its buffers, how they grow, and transformers' operations on them (reorder, select, crop, reset, offload)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsify.distributed.shards import Shard
from sparsify.errors import CacheError, UnsupportedError
from sparsify.generation.caches import clusters, cropping, provisional
from sparsify.generation.caches.offloading import Offloader, Rest
from sparsify.generation.caches.running_call import MASK_SIZE, CallState, autocast_dtype, mark
from sparsify.ops import cache, quantised, reselection
from sparsify.ops.cache import NEVER_OVERWRITTEN
from sparsify.ops.limits import cdiv
from sparsify.ops.pages import Clusters, Pages
from sparsify.policies import Layout, Policy
from sparsify.policies.full import STEP

log = logging.getLogger(__name__)

_STATE = ("keys", "values", "positions", "counts", "seen", "length")
# of keys and values in 8 or 4 bits (`sparsify.ops.quantised`)
_CODED = ("key_scales", "value_scales", "recent_keys", "recent_values", "staged")
_BUFFERS = (*_STATE, "tickets", "bounds", "prepared", *_CODED)
# buffers whose dimension 2 is slots, and what an empty slot holds
_BY_SLOT = (("keys", 0), ("values", 0), ("positions", -1))
# of a layer whose policy selects anew, by row; `sparsify.ops.reselection` describes them
_KNOWN = ("carried", "queries", "query_positions", "starts")
# queries that are kept for policies that observe all of them and forget none
_OBSERVED = 64
# tokens that a growing cache of unknown length has room for at first
_LEAST = 1024


def _roomy(tokens: int) -> int:
    """Slots for `tokens` and half as many to come, so that growing again and again copies each token three times at most."""
    return cdiv(max(tokens + tokens // 2, _LEAST), STEP) * STEP


def _longer(old: Tensor, size: int, fill: int) -> Tensor:
    """A buffer [batch, kv_heads, n, ...] with more places, which hold `fill`."""
    kept = old.shape[2]
    grown = old.new_empty(*old.shape[:2], size, *old.shape[3:])
    grown[:, :, :kept].copy_(old)
    grown[:, :, kept:].fill_(fill)
    return grown


def divided_by(config: Any) -> int:
    """Processes among which transformers' tensor parallelism divides the heads of a model's attention."""
    return getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1


class SparseLayer(CacheLayerMixin):
    """Slots of one attention layer; `sparsify.ops.cache` describes the buffers.

    Args:
        index: number of the layer.
        config: the model's text configuration.
        policy: decides which tokens stay.
        budget: tokens per KV head; a float is a share of the first call's tokens, and `layout` stays None until that call.
        sliding: the layer has a sliding window of the model's own, which is kept exactly.
        frequencies: inverse frequencies of the rotary embedding, fp32 [rotated dimensions / 2], where sinks are rotated; else None.
        read: the pages that one token reads; None: everything that is kept.
        draft: the pages that a drafted token reads, of the size that `read` has; None: no tokens are drafted.
        codes: "fp8" or "int4", as which keys and values are stored; "": as they come.
        every: tokens beyond the budget that are stored before the policy selects anew; 0: tokens replace others one by one.
    """

    is_compileable = False  # generate() would then build 4-D masks and compile by itself

    def __init__(
        self,
        index: int,
        config: Any,
        policy: Policy,
        budget: Any,
        *,
        sliding: bool,
        frequencies: Tensor | None,
        read: Pages | None = None,
        draft: Pages | None = None,
        codes: str = "",
        every: int = 0,
    ):
        super().__init__()
        self.index, self.config, self.policy, self.budget = index, config, policy, budget
        self.is_sliding, self.inverse_frequencies = sliding, frequencies
        self.read, self.read_text = read, "" if read is None else str(read)
        self.draft = draft
        self.bounds: Tensor | None = None
        self.prepared: Tensor | None = None  # int32 [batch, kv_heads], slots that lie in clusters
        self.final = False  # nothing is evicted from now on, whatever the policy
        self.codes, self.head_dims = codes, (0, 0)
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        self.recent_keys: Tensor | None = None
        self.recent_values: Tensor | None = None
        self.staged: Tensor | None = None
        self.policy_text, self.observes = policy.scorer.describe(), policy.observed > 0
        self.every, self.asked_every, self.told = every, every, True  # told: what the policy awaits of the last call has come
        self.logits = (1.0, 0.0)  # scale and softcap of the layer's attention
        self.carried: Tensor | None = None
        self.queries: Tensor | None = None
        self.query_positions: Tensor | None = None
        self.starts: Tensor | None = None
        self.layout: Layout | None = None if isinstance(budget, float) else self.lay_out(budget)
        self.call, self.is_first, self.is_last = CallState(), True, True  # as `link_layers` says for the layers of a cache
        self.used: int | None = 0  # columns stored so far as the host counts them, for layers that grow; None: only the device knows
        self.left_out, self.fixed = 0, 0  # columns of the text that the layer was not given; tokens that cannot be cropped then
        self.shard: Shard | None = None  # this process's share of the text; None: it has all of it
        self.elsewhere = 0  # tokens of the prompt that other processes have
        self.offloader: Offloader | None = None  # keys and values lie in the host's memory
        self.rest: Rest | None = None
        self.held: provisional.Held | None = None  # tokens of the last call that may be cropped
        self.record_past, self.awaiting = False, False  # tokens may be cropped; no call has come since that was said
        self.before_drafts: int | None = None  # tokens of the text before the first draft, where that was said
        self.started = False  # a host-side bool, so that compiled code has one graph for the first call and one for later ones

    def lay_out(self, budget: int | None) -> Layout:
        """How the policy uses a budget, with room for `every` tokens beside it."""
        layout = self.policy.layout(budget)
        return layout.with_room(self.every) if self.every else layout

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates all slots, for the batch, heads, dtype and device of `key_states` [batch, kv_heads, tokens, head_dim]."""
        self.allocate(key_states, value_states, key_states.shape[2])

    def allocate(self, key_states: Tensor, value_states: Tensor, tokens: int) -> None:
        """Allocates all slots.

        Args:
            key_states: [batch, kv_heads, any, head_dim]; sets batch, heads, dtype and device.
            value_states: [batch, kv_heads, any, v_head_dim].
            tokens: number of tokens that a budget given as a share refers to.
        """
        layout = self.layout
        if layout is None:  # and stays so until all buffers are there: another call's tokens would give another share
            layout = self.lay_out(max(1, cdiv(tokens * round(self.budget * 10**6), 10**6)))
        batch, kv_heads, _, head_dim = key_states.shape
        capacity = layout.capacity
        if layout.grows and (capacity < tokens or not capacity):
            capacity = _roomy(tokens)
        self.batch_size, self.dtype, self.device = batch, key_states.dtype, key_states.device
        slots = batch, kv_heads, capacity
        # tensors, as all other buffers are: the base class has None until here, where `is_initialized` says that there are none
        self.head_dims = head_dim, value_states.shape[-1]
        (width, v_width), stored_as = self.head_dims, key_states.dtype
        if self.codes:
            if not (quantised.words(width, self.codes) and quantised.words(v_width, self.codes)):
                what = f"{self.codes} codes of head dims {width} and {v_width} do not fill whole words of 16 bits"
                raise UnsupportedError(what, where=f"layer {self.index}")
            self._allocate_coded(key_states, slots)
            width, v_width, stored_as = quantised.packed(width, self.codes), quantised.packed(v_width, self.codes), torch.uint8
        self.keys: Tensor = key_states.new_zeros(*slots, width, dtype=stored_as)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.values: Tensor = value_states.new_zeros(*slots, v_width, dtype=stored_as)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.positions = key_states.new_full(slots, -1, dtype=torch.int32)
        self.counts = key_states.new_zeros(batch, kv_heads, dtype=torch.int32)
        self.seen = key_states.new_zeros(batch, dtype=torch.int32)
        self.length = key_states.new_zeros((), dtype=torch.int64)
        self.tickets = key_states.new_zeros(batch * kv_heads + 1, dtype=torch.int32)
        if self.read is not None:
            self.bounds = key_states.new_zeros(batch, kv_heads, self.read.of(capacity), 2, head_dim)
            if isinstance(self.read, Clusters):
                self.prepared = torch.zeros_like(self.counts)
        if layout.room:
            self._allocate_known(key_states)
            self.used = None
        if self.inverse_frequencies is not None:
            self.inverse_frequencies = self.inverse_frequencies.to(self.device)
        self.layout, self.is_initialized = layout, True
        if self.offloader is None:
            self.mark_static()
        else:
            self.offloader.take(self)

    @contextlib.contextmanager
    def present(self) -> Generator[None]:
        """Between calls: within the block keys and values are where they can be read and changed."""
        if self.offloader is None or self.rest is None:
            yield
            return
        self.offloader.bring(self)
        yield
        self.offloader.put_back(self, 0, False)

    def at_rest(self, name: str) -> Tensor:
        """The buffer of that name as it is between calls; keys and values may lie in the host's memory."""
        if self.offloader is None or self.rest is None or name not in self.rest.tensors:
            return getattr(self, name)
        self.offloader.wait()
        return self.rest.tensors[name]

    def _allocate_coded(self, key_states: Tensor, slots: tuple[int, int, int]) -> None:
        """What goes with keys and values in few bits."""
        rows, (dim, v_dim), parts, zeros = slots[:2], self.head_dims, quantised.parts(self.codes), key_states.new_zeros
        groups = quantised.packed_groups if self.policy.by_head else quantised.groups
        self.key_scales = zeros(*rows, groups(slots[2]), parts, dim)
        self.value_scales = zeros(*slots, parts)
        self.recent_keys, self.recent_values = zeros(*rows, quantised.GROUP, dim), zeros(*rows, quantised.GROUP, v_dim)
        self.staged = zeros(*rows, 2, dtype=torch.int32)

    def _allocate_known(self, key_states: Tensor) -> None:
        """Room for what the policy is told when it selects anew."""
        batch, kv_heads, capacity = self.positions.shape
        if self.policy.by_head:
            self.starts = (
                (torch.arange(kv_heads + 1, device=key_states.device, dtype=torch.int32) * capacity).expand(batch, -1).contiguous()
            )
        if self.policy.carries:
            self.carried = key_states.new_zeros(batch, kv_heads, capacity, dtype=torch.float32)
        if self.observes:
            observed = min(self.policy.observed, max(self.every, _OBSERVED))
            heads = self.config.num_attention_heads // divided_by(self.config)
            self.queries = key_states.new_zeros(batch, heads, observed, key_states.shape[-1])
            self.query_positions = key_states.new_full((batch, observed), -1, dtype=torch.int32)

    def known(self) -> list[tuple[str, Tensor]]:
        """What the policy is told when it selects anew, by attribute."""
        return [(name, tensor) for name in _KNOWN if (tensor := getattr(self, name)) is not None]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.rest is not None:
            state |= {name: self.at_rest(name) for name in self.rest.tensors} | {"rest": None}
        if self.is_initialized and self.keys.device == self.device:
            state["device"] = None  # where they are put when they are loaded
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.is_initialized and self.offloader is not None:
            self.device = self.device or self.positions.device
            self.offloader.take(self)
        elif self.is_initialized:
            self.device = self.device or self.keys.device
            self.mark_static()

    def mark_static(self) -> None:
        """Marks the buffers as inputs with a fixed address: CUDA graphs are skipped for other mutated inputs.

        Without a guard, so that another cache records a new CUDA graph but compiles nothing.
        """
        if not torch.compiler.is_dynamo_compiling():
            for buffer in self.buffers():
                torch._dynamo.mark_static_address(buffer, guard=False)
            if self.grows:  # one graph serves caches of all sizes
                for name in ("keys", "values", "positions", *self.growing()):
                    torch._dynamo.maybe_mark_dynamic(getattr(self, name), 2)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.positions, self.counts, self.seen, self.length

    def buffers(self) -> list[Tensor]:
        """All tensors of the layer."""
        return [*self.state, self.tickets, *self._extras(), *(tensor for _, tensor in self.known())]

    def _extras(self) -> list[Tensor]:
        """Buffers by row and slot or page that not every layer has."""
        return [buffer for name in ("bounds", "prepared", *_CODED) if (buffer := getattr(self, name)) is not None]

    def growing(self) -> list[str]:
        """Buffers that are made larger together with keys, values and positions, where the layer has them."""
        return [name for name in ("bounds", "key_scales", "value_scales") if getattr(self, name) is not None]

    def reading(self) -> dict[str, Any]:
        """What ops are told of the slots that a token reads, beside `coded`."""
        if self.starts is not None:
            return {"starts": self.starts}
        if self.read is None:
            return {}
        clusters = {} if self.prepared is None else {"prepared": self.prepared}
        return {"bounds": self.bounds, "pages": self.read_text, **clusters}

    def coded(self) -> dict[str, Any]:
        """What ops are told of how keys and values are stored."""
        return {"codes": self.codes, **{name: getattr(self, name) for name in _CODED}} if self.codes else {}

    def renew_bounds(self) -> None:
        """After slots were changed by something else than an op that stores tokens."""
        if self.bounds is not None and self.read is not None:  # within `present`
            coded = self.coded() | {"values": self.values} if self.codes else {}
            cache.bounds(self.keys, self.positions, self.bounds, size=self.read.size, version=cache.VERSION, **coded)
            if self.final:
                clusters.write_means(self)

    def prepare(self) -> None:
        """Puts what is kept into clusters, after which nothing is evicted; nothing in layers that read no clusters."""
        if not isinstance(self.read, Clusters) or not self.is_initialized:
            return
        self.finish()
        with torch.no_grad(), self.present():
            clusters.prepare(self)
            self.renew_bounds()
        self.fixed = int(self.length)

    def finish(self) -> None:
        """From now on nothing is evicted, and the layer grows. Reads counts from the device."""
        self.layout = Layout(self.keys.shape[2], pinned=NEVER_OVERWRITTEN, recent=0)
        self.final, self.every, self.observes, self.told, self.used = True, 0, False, True, None
        self.carried = self.queries = self.query_positions = None
        self.elsewhere = int(self.length) - min(self.fullest(), self.keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Checks the new keys and values and returns them unchanged, or under autocast in the cache's dtype. Attention stores them later.

        Raises:
            CacheError: they do not fit this cache, or the model's previous layer did not use sparsify's attention.
        """
        pending = self.call.pending
        if pending is not None:
            raise CacheError(
                "the model's attention did not take the keys that it gave to the cache",
                where=f"layer {pending.index}",
                hint="make it with SparseCache(model.config, ...) of this very model, whose attention must go through AttentionInterface; "
                "reset() the cache first",
            )
        autocast = autocast_dtype(key_states)
        if autocast is not None:  # as attention itself would at every call: rotary embeddings give float32 keys beside bfloat16 values
            autocast = self.dtype if self.is_initialized else autocast
            key_states, value_states = key_states.to(autocast), value_states.to(autocast)
        if key_states.dtype != value_states.dtype:
            raise CacheError(f"keys are {key_states.dtype}, values {value_states.dtype}", where=f"layer {self.index}")
        if self.layout is not None and not self.is_initialized:  # a share waits for the mask, which attention gets
            self.lazy_initialization(key_states, value_states)
        if self.held is not None and not torch.compiler.is_dynamo_compiling():
            self.settle_past()
        if self.is_initialized:
            self._check(key_states, value_states)
            if self.grows:
                self.make_room(key_states.shape[2])
            elif self.every:
                self.make_way(key_states.shape[2])
        self.call.pending = self
        mark(key_states, self)
        return key_states, value_states

    def _check(self, key: Tensor, value: Tensor) -> None:
        where, hint = f"layer {self.index}", "make a new SparseCache for this model and batch, or call reset() before another shape"
        if key.shape[0] != self.keys.shape[0]:
            raise CacheError(f"the cache holds a batch of {self.keys.shape[0]}, the call has {key.shape[0]}", where=where, hint=hint)
        if key.shape[1] != self.keys.shape[1] or (key.shape[3], value.shape[3]) != self.head_dims:
            found = f"{key.shape[1]} KV heads of {key.shape[3]} and {value.shape[3]}"
            kept = f"{self.keys.shape[1]} of {self.head_dims[0]} and {self.head_dims[1]}"
            raise CacheError(f"the call has {found}, the cache holds {kept}", where=where, hint=hint)
        if not torch.compiler.is_dynamo_compiling() and self.keys.is_inference() and not torch.is_inference_mode_enabled():
            what = "the cache was allocated under torch.inference_mode(), whose tensors cannot change outside of it"
            raise CacheError(what, where=where, hint="run all calls under inference_mode, or none (generate() runs under no_grad)")
        if key.dtype != self.dtype or key.device != self.keys.device:
            found, kept = f"{key.dtype} on {key.device}", f"{self.dtype} on {self.keys.device}"
            raise CacheError(f"the call has {found}, the cache holds {kept}", where=where, hint=hint)

    def stored(self) -> int:
        """Columns stored so far, of a layer that grows; reads them from the device where the host does not know."""
        if self.used is None:
            self.used = int(self.length) if self.started else 0
        return self.used

    def make_room(self, tokens: int) -> None:
        """Makes room for the tokens of a call; compiled code, which cannot, leaves counting to whoever comes next."""
        if torch.compiler.is_dynamo_compiling():
            self.used = None
            return
        self.used = self.stored() + tokens
        own = self.used - self.elsewhere
        if own > self.keys.shape[2]:
            self.reserve(_roomy(own) + self.elsewhere)

    def make_way(self, tokens: int) -> None:
        """Before a call: where it would find no room, the policy selects. Compiled code leaves that to whoever calls it."""
        if torch.compiler.is_dynamo_compiling():
            self.used = None
            return
        if self.policy.awaits:
            self.check_awaited(tokens)
        used = self.settle(tokens) + tokens
        self.used = None if used > self.keys.shape[2] else used

    def check_awaited(self, tokens: int) -> None:
        """Before a call of which the policy awaits what is said.

        Raises:
            CacheError: it has more tokens than there is room for until then, or nothing was said of the call before.
        """
        if tokens > self.every:
            where, hint = f"layer {self.index}", "read it in several calls and observe each, or give a larger `every`"
            raise CacheError(f"{tokens} tokens at once, policy {self.policy.name} has room for {self.every}", where=where, hint=hint)
        self.check_told()
        self.call.columns = tokens

    def settle(self, tokens: int = 1) -> int:
        """Selects where the fullest row has no room for a token, or for all of them where the policy awaits what is said of them.

        Returns:
            `taken` afterwards, or more.
        """
        if self.used is None or not self.started:
            self.used = self.taken()
        free = tokens if self.policy.awaits else 1
        if self.used + free > self.keys.shape[2]:
            self.select(self.keys.shape[2] - free)
            self.used = self.taken()
        return self.used

    def select(self, limit: int) -> None:
        """In rows with more than `limit` tokens the policy's choice stays."""
        if self.layout is None or not self.layout.room or not self.started:
            return
        self.check_told()
        keys, values = self.keys, self.values
        if self.recent_keys is not None and self.recent_values is not None:
            keys, values = self.recent_keys, self.recent_values
        nothing = keys[:, :, :0], values[:, :, :0]
        with torch.no_grad(), self.call.changing(), self.present():
            reselection.reselect(None, *nothing, *self.state, empty=False, **self.selecting(limit, *self.logits))
            self.renew_bounds()
        self.used = None

    def check_told(self) -> None:
        """Raises CacheError where the policy awaits what is said of the last call."""
        if not self.told:
            where, hint = f"layer {self.index}", "call cache.observe(logits, input_ids) after every call"
            raise CacheError(f"policy {self.policy.name} was not told the logits of the last call", where=where, hint=hint)

    def selecting(self, limit: int, scale: float, softcap: float) -> dict[str, Any]:
        """What the op that selects is told beside tokens and state."""
        layout = self.layout
        if layout is None:
            raise CacheError("the layer is not allocated", where=f"layer {self.index}")
        how = {"limit": limit, "kept": layout.kept, "recent": layout.recent, "policy": self.policy_text, "scale": scale, "softcap": softcap}
        return {**how, "version": reselection.VERSION, **{name: getattr(self, name) for name in _KNOWN}, **self.coded()}

    def tell(self, numbers: Tensor, is_token: Tensor | None) -> None:
        """What the last call's tokens carry from now on, fp32 [batch, tokens]; is_token as attention had it."""
        if self.carried is None:
            return
        count = numbers.shape[1]
        tokens = self.seen.new_full(self.seen.shape, count) if is_token is None else is_token.sum(-1, dtype=self.seen.dtype)
        if is_token is not None:  # padding in front
            order = is_token.to(torch.uint8).argsort(dim=-1, stable=True)
            numbers = numbers.gather(1, order)
        # the last column is the newest token
        column = self.positions - (self.seen - count)[:, None, None]
        told = (column >= count - tokens[:, None, None]) & (self.positions >= 0)
        rows = numbers[:, None].expand(-1, column.shape[1], -1).gather(2, column.clamp(0, count - 1).long())
        self.carried.copy_(torch.where(told, rows, self.carried))
        self.told = True

    def forget_a_turn(self) -> None:
        """At the end of a turn: what tokens carry fades."""
        if self.carried is not None and self.policy.decay != 1:
            self.carried.mul_(self.policy.decay)

    def divide(self, tokens: int, shard: Shard) -> None:
        """After a prompt of `tokens` tokens of which this process was given its share: later ones are stored in turns."""
        own = int(self.length)
        self.shard, self.elsewhere, self.used = shard, tokens - own, tokens
        self.length.fill_(tokens)

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` tokens in all, of which other processes may have some; larger buffers take over what the old ones hold, one of
        them at a time."""
        capacity = cdiv(tokens - self.elsewhere, STEP) * STEP
        if not self.grows or not self.is_initialized or capacity <= self.keys.shape[2]:
            return
        with self.call.changing():
            if self.offloader is not None:
                self.offloader.grow(self, capacity)
            for name, fill in _BY_SLOT:
                if self.rest is None or name not in self.rest.tensors:
                    setattr(self, name, _longer(getattr(self, name), capacity, fill))
            if self.bounds is not None and self.read is not None:
                self.bounds = _longer(self.bounds, self.read.of(capacity), 0)
            if self.key_scales is not None and self.value_scales is not None:
                self.key_scales = _longer(self.key_scales, quantised.groups(capacity), 0)
                self.value_scales = _longer(self.value_scales, capacity, 0)
            self.mark_static()

    @property
    def grows(self) -> bool:
        """Whether nothing is evicted."""
        return self.layout is not None and self.layout.grows

    @property
    def overflowed(self) -> bool:
        """Whether compiled code, which makes no room, was given more tokens than there was room for. Reads from the device."""
        never_overwritten = self.layout is not None and self.layout.pinned == cache.NEVER_OVERWRITTEN
        return never_overwritten and self.is_initialized and self.fullest() > self.keys.shape[2]

    def fullest(self) -> int:
        """Tokens that the fullest head holds, where all heads have as many slots; reads from the device."""
        if self.starts is None:
            return int(self.counts.max())
        return self.keys.shape[2] + int((self.counts - (self.starts[:, 1:] - self.starts[:, :-1])).max())

    def taken(self) -> int:
        """Of as many tokens as there are slots, how many have come before the policy has to be asked: slots of the fullest head, and where
        every query counts, places for those of single tokens. Reads from the device."""
        full, capacity = self.fullest() if self.started else 0, self.keys.shape[2]
        if self.queries is None or self.query_positions is None or not self.policy.carries or self.policy.observed <= self.queries.shape[2]:
            return full
        waiting = int((self.query_positions >= 0).sum(-1).max()) if self.started else 0
        return max(full, capacity - self.queries.shape[2] + waiting)

    def get_seq_length(self) -> Any:
        """Tokens so far, padding included: an int, or within a compiled graph a tensor."""
        if not self.started:  # whatever a prompt that failed may have left in the buffers
            return 0
        return cache.length(self.length) if torch.compiler.is_dynamo_compiling() else int(self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        return MASK_SIZE, MASK_SIZE

    def get_max_length(self) -> int:
        return -1

    @property
    def record_past(self) -> bool:
        """Whether tokens of a call may be taken back after it. Where transformers or users set it to False, those that
        were kept apart stay: compiled code that comes next knows of none."""
        return self._record_past

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self._record_past = recording
        if not recording:
            self.settle_past()

    def settle_past(self, taken_back: int = 0) -> None:
        """Tokens that were kept apart are taken back, or stay."""
        held, self.held = self.held, None
        if held is not None:
            with torch.no_grad(), self.call.changing(), self.present():
                held.settle(self, taken_back)

    def reset(self) -> None:
        """Empties the layer. A budget given as a share refers to the next call's tokens, and that call may have any batch size."""
        self.held, self.record_past, self.awaiting, self.before_drafts = None, False, False, None
        self.started, self.used, self.told, self.left_out, self.fixed = False, 0, True, 0, 0
        self.shard, self.elsewhere = None, 0
        if self.final:
            self.final, self.every, self.observes = False, self.asked_every, self.policy.observed > 0
            layout = None if isinstance(self.budget, float) else self.lay_out(self.budget)
            if layout is None or not layout.grows:  # other buffers than those that grew
                self.layout = layout
                self.discard()
        if isinstance(self.budget, float):
            self.layout = None
            self.discard()
        if self.is_initialized:
            self._empty()

    def discard(self) -> None:
        """Lets the buffers go, whatever is left of them: the next call allocates new ones."""
        self.is_initialized, self.rest = False, None

    def _empty(self) -> None:
        """As the buffers were when they were allocated."""
        with self.present():
            self.positions.fill_(-1)
            for name in ("keys", "values", "counts", "seen", "length"):
                getattr(self, name).zero_()
        for name, tensor in self.known():
            if name == "starts":
                tensor.copy_(torch.arange(tensor.shape[1], device=tensor.device) * self.keys.shape[2])
            else:
                tensor.fill_(-1 if name == "query_positions" else 0)
        for marks in (self.staged, self.prepared):
            if marks is not None:
                marks.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place: row b becomes row beam_idx[b]."""
        self.settle_past()
        if not self.is_initialized:
            return
        with self.present():
            growing = {id(getattr(self, name)) for name in ("keys", "values", "positions", *self.growing())}
            for state in (*self.state[:-1], *self._extras()):
                if self.grows and self.used is not None and id(state) in growing:  # what lies behind is nobody's
                    state = state[:, :, : self.used]
                state.copy_(state.index_select(0, beam_idx.to(state.device)))
            for _, tensor in self.known():
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda state: state[indices.to(state.device)])

    def _map_rows(self, change: Any) -> None:
        self.settle_past()
        if self.is_initialized:
            if self.offloader is not None:
                self.offloader.bring(self)
                self.rest = None
            for name in (*_STATE[:-1], "bounds", "prepared", *_CODED):
                if getattr(self, name) is not None:
                    setattr(self, name, change(getattr(self, name)))
            for name, tensor in self.known():
                setattr(self, name, change(tensor))
            self.batch_size = self.keys.shape[0]
            self.tickets = self.tickets.new_zeros(self.batch_size * self.keys.shape[1] + 1)
            if self.offloader is None:
                self.mark_static()
            else:
                self.offloader.take(self)

    def offload(self) -> None:
        # an asynchronous copy to the CPU could be read, to reorder rows or for the length, before it is there
        self._move("cpu", non_blocking=False)

    def prefetch(self) -> None:
        self._move(self.device if self.is_initialized else None, non_blocking=True)

    def _move(self, device: Any, non_blocking: bool) -> None:
        self.settle_past()
        if self.offloader is not None:  # it moves them by itself
            return
        if self.is_initialized and self.keys.device != torch.device(device):
            with self.call.changing():
                for name in _BUFFERS:
                    if getattr(self, name) is not None:
                        setattr(self, name, getattr(self, name).to(device, non_blocking=non_blocking))
                for name, tensor in self.known():
                    setattr(self, name, tensor.to(device, non_blocking=non_blocking))
                self.mark_static()

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back; assisted decoding asks after the prompt. Reads lengths from the device."""
        if not self.is_initialized:
            return True
        reason = provisional.unrecorded(self)
        if not reason:
            return True
        if cropping.sums_queries(self):
            log.info("the cache cannot be cropped: the policy counts the queries of drafts; %s", reason)
            return False
        try:
            self.check_crop(0)
        except CacheError as error:
            log.info("the cache cannot be cropped: %s", error)
            return False
        return True

    def check_crop(self, tokens: int) -> None:
        """Raises CacheError when the last `tokens` tokens cannot be taken back exactly; changes nothing."""
        cropping.check(self, tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens.

        Raises:
            CacheError: something was evicted already, or the batch is padded.
        """
        cropping.crop(self, tokens_to_remove)

    def activate_past_recording(self, prompt_len: int | None = None) -> None:
        """From now on tokens of a call can be taken back after it, also where the cache evicts (`provisional`), until a call of many tokens
        comes, or `record_past` is set to False.

        Args:
            prompt_len: as `SparseCache.activate_past_recording` takes it.
        """
        self.record_past = self.awaiting = True
        self.before_drafts = self.before_drafts if prompt_len is None else prompt_len

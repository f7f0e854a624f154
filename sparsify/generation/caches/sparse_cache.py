"""SparseCache: a transformers Cache that keeps a budget of tokens and still knows how many it has seen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparsify import policies
from sparsify.distributed.shards import Shard
from sparsify.errors import CacheError, ConfigError, UnsupportedError
from sparsify.generation.caches import attention as cache_attention
from sparsify.generation.caches import checks, cropping, drafting, files
from sparsify.generation.caches.layer import SparseLayer, divided_by
from sparsify.generation.caches.offloading import Offloader, check_offloading
from sparsify.generation.caches.outlook import Outlook
from sparsify.generation.caches.rope import inverse_frequencies
from sparsify.generation.caches.running_call import MASK_SIZE, link_layers
from sparsify.ops.pages import Clusters, Pages
from sparsify.ops.taking_back import Places
from sparsify.policies import LayerFacts, Policy

__all__ = ["SparseCache", "SparseLayer"]


class SparseCache(Cache):
    """A cache for `model(...)` and `model.generate(...)` that stores at most `budget` tokens per KV head in preallocated buffers;
    under the policy "full", which evicts nothing, `budget` is what room is made for at first.

        cache = sparsify.SparseCache(model.config, policy="snapkv", budget=4096)
        model.generate(**inputs, cache=cache)    # past_key_values=cache before transformers 5.24

    It reports the logical length, padding included, so that positions, later turns and own loops need no care. Layers with a sliding
    window of the model's own keep exactly that window. Making one sets the attention implementation of `config` to sparsify's, which
    is the model's former one wherever no SparseCache is used.

    Args:
        config: `model.config` of the model that will use the cache: this object, not a copy.
        policy: name or instance of an eviction policy; `options` go to the named one.
        budget: tokens kept per KV head, padding not counted; a float is a share of `prompt_len` or, without that, of the
            tokens of the first call's longest row (in compiled code of its columns). None where the policy's options say it all.
        every: tokens beyond the budget that are stored before the policy selects anew, with the queries since then; None: it selects at the
            end of calls of several tokens alone, and others replace the worst. At most budget + every tokens are kept between calls.
        prompt_len: tokens that a budget given as a share refers to.
        batch_size: allocates at once, given together with `device`. CUDA graphs (`mode="reduce-overhead"`) need that when the first
            call is compiled too.
        dtype: of what is allocated at once; None: the configuration's. "fp8" or "int4": keys and values are kept in 8 or 4 bits, keys with
            scales per channel and group of 64 slots, values per token (KIVI, arXiv 2402.02750), tokens of the newest group as they come.
        device: where it is allocated.
        read: "pages" or a `sparsify.Pages`: each token reads the pages of what is kept whose keys may get the most weight, and forgets
            none (Quest, arXiv 2406.10774); calls of several tokens read everything. "clusters" or a `sparsify.Clusters`: after `prepare`
            all calls read the clusters of the prefix that are near to their queries, and what came after it (Squeezed Attention, arXiv
            2411.09688). None: everything.
        draft: "pages" or a `sparsify.Pages`, with policy "full": `generate()` of a model that `sparsify.compile` compiled drafts tokens
            that read these pages alone, and verifies several at once over everything (self-speculation). All other calls read everything.
        draft_tokens: drafted before each verification; None: as many as are expected to pay.
        offloading: keys and values lie in the host's memory, and come to the device a layer ahead of its attention; layers with a sliding
            window of the model's own stay on the device.

    Attributes:
        draft_rounds: verifications over this cache so far.
        drafted, drafts_kept: places for which tokens were drafted in them, for all rows at once, and those that were kept.

    Raises:
        ConfigError: unknown policy or option, or a budget that the policy cannot work with.
        UnsupportedError: a model that cannot be served exactly, with the reason.
    """

    layers: list[SparseLayer]  # pyright: ignore[reportIncompatibleVariableOverride]  # nobody puts another kind of layer there

    def __init__(
        self,
        config: Any,
        policy: str | Policy = "streaming_llm",
        budget: int | float | None = None,
        *,
        every: int | None = None,
        prompt_len: int | None = None,
        batch_size: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        read: str | Pages | None = None,
        draft: str | Pages | None = None,
        draft_tokens: int | None = None,
        offloading: bool = False,
        **options: Any,
    ):
        config = checks.text_config(config)
        checks.check_model(config)
        policy = policies.make(policy, **options)
        budget, pages = checks.checked_budget(budget, prompt_len), checks.checked_read(read)
        drafts = drafting.checked(draft, draft_tokens, policy, dtype, pages)
        if drafts is not None:
            pages = drafting.exact(drafts)
        if offloading:
            check_offloading(policy, drafts)
        checks.check_clusters(pages, policy, dtype)
        every = checks.checked_every(every, policy, budget)
        codes = checks.checked_codes(dtype)
        checks.check_divided(config, policy)
        if policy.by_head and pages is not None:
            what = f"{policy.name} packs slots by head; pages are of heads with as many each"
            raise ConfigError(what, where="read", hint="leave it out")
        stock = DynamicCache(config=config).layers
        evicting = [i for i, layer in enumerate(stock) if type(layer) is DynamicLayer]
        layers = [_make_layer(i, layer, config, policy, budget, evicting, every, pages, codes, drafts) for i, layer in enumerate(stock)]
        if drafts is not None:
            drafting.check_layers(layers)
        if (batch_size is None) != (device is None):
            raise ConfigError("batch_size and device allocate the cache together", where="SparseCache", hint="give both or neither")
        cache_attention.use_sparse_attention(config)
        super().__init__(layers=[*layers])
        self.offloader = Offloader([layer.index for layer in layers if not layer.is_sliding]) if offloading else None
        for layer in layers:
            layer.offloader = None if layer.is_sliding else self.offloader
        self.config, self.policy, self.budget, self.read, self.call = config, policy, budget, pages, link_layers(layers)
        self.every, self.outlook, self.codes = every, Outlook(), codes
        self.draft, self.draft_tokens, self.places = drafts, draft_tokens, Places()
        self.draft_rounds = self.drafted = self.drafts_kept = 0
        if batch_size is not None and device is not None:
            heads, head_dim = checks.kv_head_sizes(config)
            given = dtype if isinstance(dtype, torch.dtype) else None
            stored_as = given or getattr(config, "dtype", None) or torch.float32
            self.early_initialization(batch_size, heads, head_dim, stored_as, torch.device(device))

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """A MaskSizeGuard: only ordinary masks need the offset, and reading the length here would synchronise with the device."""
        return MASK_SIZE

    def attach(self, config: Any) -> SparseCache:
        """Sets the attention of `config` up for this cache and returns the cache: needed for a cache loaded from a file.

        Raises:
            CacheError: the cache was made for another model.
            UnsupportedError: as for a new cache.
        """
        config = checks.text_config(config)
        checks.check_model(config)
        if not cache_attention.same_model(config, self.config):
            raise CacheError(
                "this cache was made for another model", where="SparseCache", hint="make one with SparseCache(model.config, ...)"
            )
        cache_attention.use_sparse_attention(config)
        for holder in (self, *self.layers):
            holder.config = config
        return self

    def save(self, path: str | Path, model: Any) -> None:
        """Writes the tokens stored so far to a file (safetensors), to go on from it in another process or on another device. What `observe`
        was told last is not part of it: the file's next token begins a turn.

        Args:
            path: of the file; one that is there is replaced.
            model: that computed them; only this model, with these weights, will load the file.

        Raises:
            CacheError: an earlier call stopped halfway.
            UnsupportedError: tensor parallelism divides the heads.
            OSError: the file cannot be written.
        """
        self.check_consistent(True)
        self.settle_past()
        if any(layer.shard is not None for layer in self.layers):
            raise UnsupportedError("the text is divided among processes, and a file holds all of it", where="SparseCache.save")
        if (ranks := divided_by(self.config)) > 1:
            what = f"each of {ranks} processes holds some of the heads, and a file all of them"
            raise UnsupportedError(what, where="SparseCache.save", hint="save the text, and read it again")
        drafts = self.draft, self.draft_tokens
        how = files.How(self.policy.describe(), self.budget, self.every, self.read, self.codes, *drafts, self.offloader is not None)
        files.write(Path(path), self.layers, how, model)

    @classmethod
    def load(cls, path: str | Path, model: Any, device: torch.device | str | None = None) -> SparseCache:
        """The cache that `save` wrote, for the same model.

        Args:
            path: of the file.
            model: that will use it; making the cache sets its attention implementation, as making a new one does.
            device: of the buffers; None: the model's.

        Raises:
            CacheError: not such a file, damaged, of another model or a newer sparsify.
            UnsupportedError: as for a new cache.
            OSError: the file cannot be read.
        """
        if divided_by(model.config) > 1:
            raise UnsupportedError("a file holds all heads, and each process some", where="SparseCache.load", hint="read the text again")
        header, file = files.read_header(Path(path), model)
        how = files.How.of(header)
        cache = cls(
            model.config,
            policies.parse(how.policy),
            how.budget,
            every=how.every or None,
            read=None if how.draft is not None else how.read,
            dtype=how.codes or None,
            draft=how.draft,
            draft_tokens=how.draft_tokens,
            offloading=how.offloading,
        )
        if len(cache.layers) != len(header.layers):
            raise CacheError(f"it holds {len(header.layers)} layers, the model has {len(cache.layers)}", where=str(path))
        files.fill(file, header, cache.layers, device or model.device)
        cache.check_consistent(True)
        return cache

    def drafting(self) -> contextlib.AbstractContextManager[None]:
        """Within the block single tokens read the pages that `draft` names."""
        return drafting.reading_drafts(self.layers)

    def take_back(self, tokens: Tensor, most: int) -> None:
        """Takes back the last tokens of every row, which are none of its first, without waiting for the device.

        `crop` looks whether that can be done; here nothing is asked, so that a CUDA graph can hold it: only for caches that draft.

        Args:
            tokens: how many, int64 [], on the cache's device.
            most: that they are at most.
        """
        drafting.take_back(self.layers, tokens, most, self.places)

    def fork(self) -> SparseCache:
        """An independent copy: another continuation of the same prompt."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseCache:
        """An independent copy with the tokens stored so far, for the same model: one prompt, many continuations."""
        memo = {**memo, **{id(layer.policy): layer.policy for layer in self.layers}}  # the caller's may go on to copy the model
        memo.setdefault(id(self.config), self.config)
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling: the model that was loaded together with the cache uses sparsify's attention again."""
        self.__dict__.update(state)
        cache_attention.use_sparse_attention(self.config)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `SparseLayer.update`.

        Raises:
            CacheError: also when an earlier call stopped between two layers. Where layers were compiled as one graph, a failure leaves no
                trace in Python; uncompiled code then compares the layers' lengths, unless that needs a synchronisation of its own.
        """
        if self.offloader is not None and torch.compiler.is_dynamo_compiling():
            _refuse_whole()
        if layer_idx == 0:
            self.check_consistent(key_states.shape[2] > 1 or key_states.device.type == "cpu")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_consistent(self, read_lengths: bool) -> None:
        """Raises CacheError when layers are seen to hold different tokens, or more than there is room for.

        Args:
            read_lengths: also compare the lengths on the device, in uncompiled code.
        """
        consistent = self.call.idle
        read_lengths = read_lengths and not _recording()
        if consistent and not torch.compiler.is_dynamo_compiling():
            started = {layer.started for layer in self.layers}
            consistent = len(started) == 1 and not (read_lengths and started == {True} and len(set(self._lengths())) > 1)
        if not consistent:
            _refuse_halfway()
        if read_lengths and not torch.compiler.is_dynamo_compiling():
            growing = next((layer for layer in self.layers if layer.grows or layer.every), None)  # all of them hold as many tokens
            if growing is not None and growing.overflowed:
                _refuse_overflow(growing)

    def settle(self, tokens: int = 1) -> None:
        """Before a compiled call that is not sparsify's own: where no room is left for another token, the policy selects (`every`).

        Uncompiled calls, models compiled by `sparsify.compile` and `generate()` do that by themselves.

        Args:
            tokens: of the call, for policies that await `observe`.
        """
        for layer in self.layers:
            if layer.every and layer.is_initialized:
                layer.used = None
                layer.settle(tokens)

    def end_turn(self) -> None:
        """The policy selects now: what is kept goes back to the budget. Under "sirllm", what is known of tokens fades.

        Raises:
            ConfigError: the cache has no room beside its budget (`every`).
            CacheError: an earlier call stopped halfway, or the policy awaits `observe`.
        """
        if not self.every:
            raise ConfigError(
                "the policy selects in every call of several tokens", where="every", hint="SparseCache(..., every=tokens of a turn)"
            )
        self.check_consistent(True)
        self.settle_past()
        for layer in self.layers:
            layer.check_told()
        with self.call.changing():
            for layer in self.layers:
                if layer.every and layer.layout is not None and layer.is_initialized:
                    layer.select(layer.layout.kept)
                    layer.forget_a_turn()
            self.outlook.forget()

    def prepare(self) -> None:
        """The text so far is a fixed prefix: its keys are put into clusters, once (`read="clusters"`). From then on nothing is evicted,
        tokens that come are kept whole beside what the policy has left, and calls read the clusters that are near to their queries.
        Files and copies are prepared, too. What came before can't be cropped any more. Called again, it prepares all that is stored.

        Raises:
            ConfigError: the cache reads no clusters.
            CacheError: an earlier call stopped halfway, or nothing is stored.
            UnsupportedError: the text is divided among processes.
        """
        if not isinstance(self.read, Clusters):
            raise ConfigError("the cache reads no clusters", where="prepare", hint='SparseCache(..., read="clusters")')
        self.check_consistent(True)
        self.settle_past()
        if not all(layer.started for layer in self.layers):
            raise CacheError("nothing is stored that could be prepared", where="prepare", hint="give the model the prefix first")
        if any(layer.shard is not None for layer in self.layers):
            raise UnsupportedError("the text is divided among processes, and clusters are of all of it", where="prepare")
        with self.call.changing():
            for layer in self.layers:
                layer.prepare()

    def observe(self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Tells a policy that scores by them ("sirllm") what the model made of the last call; others ignore it.

        The first token of a turn, which nothing foretold, gets the largest number of its call.

        Args:
            logits: of the call, [batch, tokens, vocabulary], floating point.
            input_ids: its tokens, int64 [batch, tokens].
            attention_mask: as the call was given it.

        Raises:
            CacheError: not as many as the call had, or an earlier call stopped halfway.
        """
        if not self.policy.awaits:
            return
        self.check_consistent(False)
        waiting = [layer for layer in self.layers if layer.carried is not None]
        if not waiting and any(layer.final for layer in self.layers):
            return
        if all(layer.told for layer in waiting):
            raise CacheError("nothing was stored of which it was not told", where="observe", hint="call it once after every call")
        batch, count = input_ids.shape
        held = next((layer.keys.shape[0] for layer in self.layers if layer.is_initialized), batch)
        if logits.shape[:2] != input_ids.shape or (held, self.call.columns or count) != (batch, count):
            said = f"logits {list(logits.shape)} of tokens {list(input_ids.shape)}"
            raise CacheError(
                f"{said}, and the last call had {self.call.columns or count} of each of {held} rows",
                where="observe",
                hint="give the logits of all of its tokens",
            )
        is_token = None if attention_mask is None else attention_mask[:, -count:].bool()
        with self.call.changing():
            surprise = self.outlook.surprise(logits, input_ids, is_token)
            for layer in waiting:
                layer.tell(surprise, is_token)

    def _lengths(self) -> list[int]:
        """Tokens of the text that each layer's buffers have seen, or that the layer was not given, padding included."""
        lengths = [layer.length + layer.left_out for layer in self.layers]
        if len({length.device for length in lengths}) == 1:
            return torch.stack(lengths).tolist()
        return [int(length) for length in lengths]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens so far, padding and what the layer was not given included: an int, or within a compiled graph a tensor.

        Raises:
            CacheError: between calls, when an earlier one stopped between two layers.
        """
        if (self.call.idle or self.call.broken) and not torch.compiler.is_dynamo_compiling():
            self.check_consistent(True)
        return self.layers[layer_idx].get_seq_length() + self.layers[layer_idx].left_out

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens from every layer, or from none.

        Raises:
            CacheError: a positive number, something was evicted already, the batch is padded, the policy awaits `observe`, or an earlier
                call failed halfway.
        """
        cropping.check_amount(tokens_to_remove)
        self.check_consistent(True)
        for layer in self.layers:
            if layer.is_initialized and tokens_to_remove < 0:
                layer.check_crop(-tokens_to_remove)
        with self.call.changing():
            super().crop(tokens_to_remove)
            if tokens_to_remove < 0:  # it was of a token that is gone
                self.outlook.forget()

    def activate_past_recording(self, prompt_len: int | None = None) -> None:
        """From now on tokens that are no more than drafts can be taken back, also where the cache evicts: transformers says this before it
        drafts.

        Args:
            prompt_len: tokens of the text before the first draft, padding and what the cache holds already included; None: what was said
                before, and else not known. `generate()` of a model that `sparsify.compile` compiled says it by itself.
        """
        for layer in self.layers:
            layer.activate_past_recording(prompt_len)

    def settle_past(self) -> None:
        """Tokens that were kept apart, since transformers said that they may be cropped, stay."""
        for layer in self.layers:
            layer.settle_past()

    def reset(self) -> None:
        """Empties the cache, also after something failed halfway; then its buffers are allocated anew. A budget given as a share refers to
        the next call's tokens."""
        with self.call.changing():
            if self.call.broken:  # sizes of buffers may not go together
                for layer in self.layers:
                    layer.discard()
            super().reset()
            self.outlook.forget()
        self.call.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        with self.call.changing():
            super().reorder_cache(cast("torch.LongTensor", beam_idx))
            self.outlook.map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self.call.changing():
            super().batch_repeat_interleave(repeats)
            self.outlook.map_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        with self.call.changing():
            super().batch_select_indices(indices)
            self.outlook.map_rows(lambda rows: rows[indices.to(rows.device)])

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` tokens in all, padding included, in layers that never evict (policy "full"); nothing in others.

        Uncompiled calls make room by themselves. Compiled ones cannot: call this before a text outgrows the budget, since tokens for which
        there is no room give NaN, and an error at the next look at the cache. It copies what the buffers hold, and CUDA graphs that
        read them have to be recorded anew.
        """
        for layer in self.layers:
            layer.reserve(tokens)

    def room(self) -> int | None:
        """Tokens, with padding and those that some layers were not given, after which layers that never evict have to grow, or the policy
        selects anew (`every`); None without such layers or before they are allocated."""
        held = [layer for layer in self.layers if layer.is_initialized]
        free = [layer.keys.shape[2] + layer.elsewhere for layer in held if layer.grows]
        free += [int(layer.length) + layer.left_out + layer.keys.shape[2] - layer.taken() for layer in held if layer.every]
        return min(free, default=None)

    def divide(self, tokens: int, shard: Shard) -> None:
        """Says that the prompt which was just stored is this process's share of one of `tokens` tokens. Each later token goes to one of
        the processes, and attention is over what all of them hold."""
        with self.call.changing():
            for layer in self.layers:
                layer.divide(tokens, shard)

    def recount(self, tokens: int | None = None) -> None:
        """Says that tokens were stored or taken back by what runs no Python, as a CUDA graph.

        Args:
            tokens: columns of the text that every layer holds now; None: the next uncompiled call reads lengths from the device.
        """
        for layer in self.layers:
            layer.used = tokens

    def read_lengths(self) -> None:
        """Reads from the device how many tokens layers hold where the host does not know: a CUDA graph cannot, once it is recorded."""
        for layer in self.layers:
            if layer.grows:
                layer.stored()

    def kept_bytes(self) -> int:
        """Bytes of all buffers that are allocated on the device."""
        held = [t for layer in self.layers if layer.is_initialized for t in layer.buffers()[2 if layer.rest is not None else 0 :]]
        places = 0 if self.offloader is None else self.offloader.bytes()
        return places + sum(t.numel() * t.element_size() for t in held)

    def host_bytes(self) -> int:
        """Bytes of keys and values that lie in the host's memory (`offloading`)."""
        return 0 if self.offloader is None else self.offloader.host_bytes()


def _recording() -> bool:
    """Whether a CUDA graph is being recorded, while which nothing may be asked of the device."""
    return not torch.compiler.is_dynamo_compiling() and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _raise_halfway() -> None:
    raise CacheError(
        "an earlier call, or a change of the cache, failed halfway: its layers may hold different tokens",
        where="SparseCache",
        hint="reset() the cache, or make a new one, and give it the whole text",
    )


# torch 2.11 fails where compiled code raises
_refuse_halfway = cast("Callable[[], None]", torch.compiler.disable(_raise_halfway))


def _raise_whole() -> None:
    what = "one graph of the whole model leaves no room to move keys and values between its layers (`offloading`)"
    raise UnsupportedError(what, where="SparseCache", hint="sparsify.compile(model), which compiles layer by layer, or no compilation")


_refuse_whole = cast("Callable[[], None]", torch.compiler.disable(_raise_whole))


def _refuse_overflow(layer: SparseLayer) -> None:
    raise CacheError(
        f"compiled calls stored more tokens than the {layer.keys.shape[2]} that there is room for: what they returned since then is NaN",
        where=f"layer {layer.index}",
        hint='SparseCache(..., "full", budget=prompt + new tokens), or cache.reserve(tokens) before them',
    )


def _make_layer(
    index: int,
    stock: Any,
    config: Any,
    policy: Policy,
    budget: Any,
    evicting: list[int],
    every: int,
    read: Pages | None,
    codes: str,
    draft: Pages | None,
) -> SparseLayer:
    """The SparseLayer that replaces one layer of an ordinary cache.

    Args:
        stock: the layer that DynamicCache has at this index.
        evicting: numbers of the layers that the policy serves.
        every: tokens beyond the budget that are stored before the policy selects anew; 0: it does not.

    Raises:
        UnsupportedError: a kind of layer that cannot be replaced.
    """
    types = getattr(config, "layer_types", None)
    where = f"layer {index}" + (f" ({types[index]})" if types else "")
    if type(stock) is DynamicSlidingWindowLayer:
        window = int(stock.sliding_window)
        own = policies.make("streaming_llm", sinks=0, window=window)
        return SparseLayer(index, config, own, None, sliding=True, frequencies=None)
    if type(stock) is not DynamicLayer:
        raise UnsupportedError(f"{type(stock).__name__} is not served", where=where, hint="use an ordinary cache")
    frequencies_of = lambda purpose, hint: inverse_frequencies(config, types[index] if types else None, purpose, hint)
    turned = lambda: frequencies_of(f"policy {policy.name} cannot turn queries back", "another policy")
    policy = policy.bind(LayerFacts(evicting.index(index), len(evicting), turned, checks.model_kv_heads(config)))
    layout = None if isinstance(budget, float) else policy.layout(budget)
    rotates = layout.rotate_sinks if layout is not None else getattr(policy, "positions", "") == "in_cache"
    frequencies = None
    if rotates:
        frequencies = frequencies_of("sinks cannot be moved along", 'positions="absolute" works with every rotary embedding')
    return SparseLayer(
        index,
        config,
        policy,
        budget,
        sliding=False,
        frequencies=frequencies,
        read=read,
        draft=draft,
        codes=codes,
        every=every,
    )

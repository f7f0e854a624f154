"""Attention for models that use a SparseCache: registered with transformers as `sparsify_sdpa`, `sparsify_eager` and `sparsify`, by what
serves calls without one.

transformers does not pass the cache to attention. `SparseLayer.update` therefore marks the key tensor with its layer. Keys without a mark
go to the attention implementation that the model was loaded with.
"""

from __future__ import annotations

import copyreg
import functools
import sys
from collections.abc import Callable
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparsify.backends  # noqa: F401  # pyright: ignore[reportUnusedImport]  # registers what serves the cache's ops
from sparsify.distributed import collectives
from sparsify.distributed.shards import Shard
from sparsify.errors import CacheError, UnsupportedError
from sparsify.generation import interface
from sparsify.generation.caches import provisional
from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.caches.running_call import MaskSizeGuard, autocast_dtype, layer_from_keys, packing_from_keys
from sparsify.generation.regions import masks
from sparsify.generation.regions.packed import unpack_heads
from sparsify.ops import cache, reselection
from sparsify.ops.attention import AttentionCall, attention


class _Saved(str):
    """Attention name of a configuration while it is copied or pickled.

    A deep copy keeps sparsify's name, since the copied model is used with the copied caches. A pickle stores `base`, the implementation
    that the model was loaded with, so that it can be loaded where sparsify is not installed.
    """

    base: str

    def __deepcopy__(self, memo: Any) -> str:
        return str(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, (self.base,)


# the model's own implementation -> name of sparsify's function that wraps it; plain strings, because compiled code compares them
NAMES = {"sdpa": "sparsify_sdpa", "eager": "sparsify_eager", interface.NAME: interface.NAME}


def _reduce_config(config: Any) -> Any:
    """`copyreg` reducer of configurations: the default one, with the attention name replaced by `_Saved`."""
    make, arguments, state, *rest = config.__reduce_ex__(4)
    for base, name in NAMES.items():
        if config._attn_implementation == name:
            saved = _Saved(name)
            saved.base = base
            state = {**state, "_attn_implementation_internal": saved}
    return make, arguments, state, *rest


# Fields in which the configurations of two models differ as far as a cache is concerned; file names differ between copies of one model.
_MODEL_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "max_position_embeddings",
)

_IGNORED = ("is_causal", "output_attentions", "position_ids", "use_cache", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")


# argument of attention under which a region that chooses tokens asks what keys get of some queries' attention: a list, to which that is
# appended, and the queries, as `regions.narrowed.Narrowed.observation` describes them
OBSERVED = "sparsify_observed"


def register_attention() -> None:
    """Registers the attention functions with transformers."""
    for base, name in NAMES.items():
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(attention_forward, base))
            masks_of = "sdpa" if base == interface.NAME else base
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, functools.partial(mask_function, masks_of))


def use_sparse_attention(config: Any) -> None:
    """Sets the attention implementation of `config` to sparsify's, which passes calls without a SparseCache on to the former one."""
    register_attention()
    base = config._attn_implementation or "sdpa"
    if base in NAMES:
        config._attn_implementation = NAMES[base]
    copyreg.pickle(type(config), _reduce_config)


def same_model(one: Any, other: Any) -> bool:
    """Whether two configurations describe one model: the same object, a copy, or the same checkpoint loaded twice."""
    if one is other:
        return True
    return type(one) is type(other) and all(getattr(one, name, None) == getattr(other, name, None) for name in _MODEL_FIELDS)


def mask_function(base: str, *, kv_length: Any, attention_mask: Tensor | None = None, **call: Any) -> Any:
    """The mask that transformers hands to attention.

    Returns:
        with a SparseCache the 2-D padding mask unchanged, [batch, tokens so far] or None; otherwise the mask of `base`.

    Raises:
        UnsupportedError: the model asks for more than causality, its sliding window and padding.
    """
    if not isinstance(kv_length, MaskSizeGuard):
        function, call = ALL_MASK_ATTENTION_FUNCTIONS[base], {"kv_length": kv_length, "attention_mask": attention_mask, **call}
        if not torch.compiler.is_dynamo_compiling() and masks.postponing.get():
            return masks.postpone(base, function, call)
        return function(**call)
    if call.get("use_vmap") or not call.get("allow_is_causal_skip", False):
        raise UnsupportedError("the model's mask is more than causal, window and padding", hint="use an ordinary cache")
    return attention_mask


def attention_forward(
    base: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    sparsify_observed: tuple[list[Tensor], dict[str, Tensor]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the cache and the call's own tokens; then stores these.

    Args:
        base: implementation that serves keys without a SparseCache.
        module: the model's attention module.
        query: [batch, query_heads, query_len, head_dim].
        key, value: [batch, kv_heads, query_len, head_dim].
        attention_mask: 2-D padding mask, or None.
        s_aux: sink logits, [query_heads].
        sparsify_observed: see `OBSERVED`.

    Returns:
        output [batch, query_len, query_heads, v_head_dim], and None in place of the attention weights.

    Raises:
        CacheError: the call does not fit the cache.
        UnsupportedError: the cache cannot compute this attention exactly.
    """
    layer = layer_from_keys(key)
    if sparsify_observed is not None:
        found, queries = sparsify_observed
        found.append(_observed_mass(query, key, scaling, softcap, **queries))
    if layer is None:
        given = {"softcap": softcap, "sliding_window": sliding_window, "s_aux": s_aux}
        given = {name: value for name, value in given.items() if value is not None}
        function = _base_attention(base, module)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given, **kwargs)
    layer.call.pending = None
    _check_call(layer, module, query, attention_mask, dropout, sliding_window, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    packing = packing_from_keys(key)
    is_token = None if attention_mask is None else _token_flags(layer, attention_mask, query.shape[2])
    if packing is not None:
        is_token = packing["is_token"]
    prompt = None if torch.compiler.is_dynamo_compiling() or packing is not None else provisional.prompt_of(layer, query.shape[2])
    if not layer.is_initialized:
        if layer.policy.awaits and not torch.compiler.is_dynamo_compiling():
            layer.check_awaited(query.shape[2])
        shaped = (key, value) if packing is None else (unpack_heads(key, packing), unpack_heads(value, packing))
        layer.allocate(*shaped, _longest_row(query[:, :, :prompt], None if is_token is None else is_token[:, :prompt]))
    if layer.is_first:
        layer.call.storing = True
    autocast = autocast_dtype(query)
    if autocast is not None:
        query = query.to(key.dtype)
    if layer.offloader is not None:
        if layer.rest is None:  # when it was allocated, the host's memory had no room for it
            layer.offloader.take(layer)
        layer.offloader.bring(layer)
    if prompt is None:
        output = _attend(layer, query, key, value, is_token, scale, softcap or 0.0, s_aux, packing)
    else:
        output = _attend_with_drafts(layer, prompt, query, key, value, is_token, scale, softcap or 0.0, s_aux)
    if layer.offloader is not None:
        # a prompt whose storing waits has stored nothing yet, and a policy that has moved its tokens has no more than there are slots
        layer.offloader.put_back(layer, query.shape[2], is_token is None and query.shape[2] == 1)
    if autocast is not None:
        output = output.to(autocast)
    if layer.is_last:
        layer.call.storing = False
    return output.transpose(1, 2), None


def _observed_mass(
    query: Tensor, key: Tensor, scaling: float | None, softcap: float | None, columns: Tensor, query_positions: Tensor, positions: Tensor
) -> Tensor:
    """What each key gets of some queries' attention, fp32 [batch, query_heads, key_len]. Sink logits take no part."""
    rows = columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    observed = query.gather(2, rows).to(key.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    numbers = {"scale": scale, "softcap": softcap or 0.0, "version": cache.VERSION}
    return cache.mass(observed, key, positions[:, None].expand(-1, key.shape[1], -1), query_positions, **numbers)


def _base_attention(base: str, module: torch.nn.Module) -> Callable[..., Any]:
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return interface.attend if base == interface.NAME else ALL_ATTENTION_FUNCTIONS[base]


def _check_call(
    layer: SparseLayer, module: Any, query: Tensor, mask: Tensor | None, dropout: float, window: int | None, kwargs: dict[str, Any]
) -> None:
    where = f"layer {layer.index}"
    if not same_model(getattr(module, "config", layer.config), layer.config):
        raise CacheError("this cache was made for another model", where=where, hint="make one with SparseCache(model.config, ...)")
    if torch.is_grad_enabled() and query.requires_grad:
        raise UnsupportedError("gradients do not flow through a SparseCache", where=where, hint="run under torch.no_grad()")
    if dropout:
        raise UnsupportedError(f"attention dropout of {dropout:g}", where=where, hint="call model.eval()")
    if kwargs.get("is_causal") is False:
        raise UnsupportedError("attention is not causal", where=where, hint="use an ordinary cache")
    if kwargs.get("output_attentions"):
        raise UnsupportedError("attention weights of evicted keys do not exist", where=where, hint="leave output_attentions off")
    # position_bias, head_mask and the like change the result; a flag or None does not
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in _IGNORED:
            raise UnsupportedError(f"attention takes a tensor {name!r} that a SparseCache does not serve", where=where)
    if mask is not None and mask.dim() != 2:
        raise UnsupportedError("a mask of four dimensions", where=where, hint="give the 2-D attention_mask, 1 for real tokens")
    if window is not None and not (layer.is_sliding and layer.layout is not None and layer.layout.window == window):
        raise CacheError(f"the model's window of {window} is not the cache's", where=where, hint="make a new cache from model.config")


def _token_flags(layer: SparseLayer, mask: Tensor, query_len: int) -> Tensor:
    """Which of the call's columns hold a token and not padding, bool [batch, query_len].

    Raises:
        CacheError: the mask does not cover the tokens before this call, or hides tokens that earlier calls showed.
    """
    where, hint = f"layer {layer.index}", "attention_mask covers all tokens so far, [batch, tokens before + tokens of this call]"
    width = mask.shape[1]
    if (width <= query_len) if layer.started else (width != query_len):
        raise CacheError(f"attention_mask has {width} columns for {query_len} new tokens", where=where, hint=hint)
    if layer.started and query_len > 1 and layer.index == 0 and not torch.compiler.is_dynamo_compiling():
        before = mask[:, :-query_len]
        if before.shape[1] != int(layer.length):
            raise CacheError(f"attention_mask covers {before.shape[1]} earlier tokens of {int(layer.length)}", where=where, hint=hint)
        if not torch.equal(before.sum(-1).to(layer.seen.dtype), layer.seen):
            raise CacheError(
                "attention_mask hides tokens that earlier calls had shown", where=where, hint="what is stored cannot be masked later"
            )
    return (mask[:, -query_len:] if layer.started else mask).to(torch.bool)


def _longest_row(query: Tensor, is_token: Tensor | None) -> int:
    """Number of tokens in the longest row. Compiled code counts padding too, because reading the mask would break the graph."""
    if is_token is None:
        return query.shape[2]
    return is_token.shape[1] if torch.compiler.is_dynamo_compiling() else int(is_token.sum(-1).max())


class _Scores(TypedDict):
    """How scores become weights, as the ops take it."""

    sink_logits: Tensor | None
    scale: float
    softcap: float


class _Window(TypedDict):
    """The tokens that a query sees beside the last `window`, as the ops take it."""

    window: int
    sinks: int


def _attend(
    layer: SparseLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_token: Tensor | None,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    packing: dict[str, Tensor] | None = None,
) -> Tensor:
    """Attention output [batch, query_heads, query_len, v_head_dim]. The call's tokens are stored after it was computed.

    packing: where the tokens lie in query, key and value, which a first call may have in packed rows; `is_token` is of the padded batch.
    """
    layout, empty = layer.layout, not layer.started
    if layout is None:
        raise CacheError("the layer is not allocated", where=f"layer {layer.index}")
    if empty:  # compiled code would write it back at every token
        layer.started = True
    shape: _Window = {"window": layout.window, "sinks": layout.sinks if layout.window else 0}
    how: _Scores = {"sink_logits": sink_logits, "scale": scale, "softcap": softcap}
    coded = layer.coded()
    pages = layer.reading() | coded
    rotation = {"inverse_frequencies": layer.inverse_frequencies if layout.rotate_sinks else None}
    stored = {
        "pinned": layout.pinned,
        "recent": layout.recent,
        "policy": layer.policy_text,
        "scale": scale,
        "softcap": softcap,
        "version": cache.VERSION,
        **pages,
    }
    if layout.room:
        if layer.logits != (scale, softcap):  # compiled code would write it back at every token
            layer.logits = (scale, softcap)
        if layer.policy.awaits:
            layer.told = False
            if torch.compiler.is_dynamo_compiling():
                layer.call.columns = None
        if query.shape[2] == 1 and not empty and layer.queries is not None:
            reselection.observe(query, layer.queries, layer.query_positions, layer.seen, is_token=is_token, version=reselection.VERSION)
    if not torch.compiler.is_dynamo_compiling() and provisional.begin(layer, query.shape[2], empty):
        step = {"tickets": layer.tickets, "pinned": layout.pinned, "version": cache.VERSION}
        return provisional.attend(layer, query, key, value, is_token, {**how, **shape, **rotation, **step, **pages}, stored)
    if layer.shard is not None:
        return _attend_divided(layer, layer.shard, query, key, value, is_token, stored, **how)
    if query.shape[2] == 1 and not empty and not torch.compiler.is_dynamo_compiling():
        step = {"is_token": is_token, "tickets": layer.tickets, "pinned": layout.pinned, "version": cache.VERSION}
        return cache.decode(query, key, value, *layer.state, **how, **shape, **rotation, **step, **pages)
    if query.shape[2] == 1 and not (empty and layout.room):  # two ops, by which graphs are matched: the method kv_evict makes one of them
        told = {} if empty or layer.call.filled is None else {"filled": layer.call.filled}
        cache.store(None, key, value, *layer.state, is_token=is_token, empty=empty, tickets=layer.tickets, **told, **stored)
        keys, values, positions, _, seen, _ = layer.state
        return cache.attention(query, keys, values, positions, seen, **how, **shape, **rotation, **pages, version=cache.VERSION)
    if packing is not None:
        output = _attend_packed(query, key, value, packing, **how, **shape)
        query, key, value = (unpack_heads(tensor, packing) for tensor in (query, key, value))
    elif empty and not layout.rotate_sinks:
        output = _attend_prompt(query, key, value, is_token, **how, **shape)
    else:
        keys, values, positions, _, seen, _ = layer.state
        if empty:  # whatever a prompt that failed may have left in the buffers
            positions, seen = torch.full_like(positions, -1), torch.zeros_like(seen)
        elif is_token is not None and not layout.window and layout.pinned != cache.NEVER_OVERWRITTEN:
            positions = _positions_after_overwrite(layer, layout.pinned, is_token)
        output = cache.attention(
            query,
            keys,
            values,
            positions,
            seen,
            new_key=key,
            new_value=value,
            starts=layer.starts,
            is_token=is_token,
            **how,
            **shape,
            **rotation,
            **coded,
            **(layer.reading() if layer.prepared is not None else {}),
            version=cache.VERSION,
        )
    observed = query if layer.observes else None
    if layout.room:
        how_chosen = layer.selecting(layer.keys.shape[2], scale, softcap)
        reselection.reselect(observed, key, value, *layer.state, is_token=is_token, empty=empty, **how_chosen)
        layer.renew_bounds()
        return output
    if not torch.compiler.is_dynamo_compiling() and provisional.defers(layer, key.shape[2], empty):
        layer.held = provisional.Deferred(observed, key, value, is_token, empty, stored)
        layer.length.add_(key.shape[2])
        return output
    cache.store(observed, key, value, *layer.state, is_token=is_token, empty=empty, **stored)
    return output


def _attend_with_drafts(
    layer: SparseLayer, prompt: int, query: Tensor, key: Tensor, value: Tensor, is_token: Tensor | None, *numbers: Any
) -> Tensor:
    """As `_attend`, of a call whose tokens behind the first `prompt` are drafts: as two calls, the first of which is stored as without
    drafts."""
    flags = (None, None) if is_token is None else (is_token[:, :prompt], is_token[:, prompt:])
    with provisional.reading_prompt(layer):
        output = _attend(layer, query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], flags[0], *numbers)
    if prompt == query.shape[2]:
        return output
    drafts = _attend(layer, query[:, :, prompt:], key[:, :, prompt:], value[:, :, prompt:], flags[1], *numbers)
    return torch.cat((output, drafts), 2)


def _attend_divided(
    layer: SparseLayer,
    shard: Shard,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_token: Tensor | None,
    stored: dict[str, Any],
    *,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """One token over a text that processes share: one of them stores it, and what each finds over its own is merged.

    Raises:
        UnsupportedError: several tokens.
    """
    if query.shape[2] != 1:
        what = f"{query.shape[2]} tokens at once after a prompt that is divided among processes"
        raise UnsupportedError(what, where=f"layer {layer.index}", hint="generate tokens one by one, or give the whole text as one prompt")
    mine = (cache.length(layer.length) % shard.size == shard.rank).expand(query.shape[0], 1)
    is_token = mine if is_token is None else mine & is_token
    cache.store(None, key, value, *layer.state, is_token=is_token, empty=False, tickets=layer.tickets, **stored)
    output, lse = attention(
        query,
        layer.keys,
        layer.values,
        key_flags=(layer.positions[:, 0] >= 0).to(torch.uint8),
        sink_logits=sink_logits if shard.rank == 0 else None,
        scale=scale,
        causal=False,
        softcap=softcap,
        version=AttentionCall.VERSION,
    )
    return collectives.merged(output, lse, shard.size, shard.group)


def _positions_after_overwrite(layer: SparseLayer, pinned: int, is_token: Tensor) -> Tensor:
    """Slot positions for rows that hold one token beside padding: the slot that this token overwrites reads -1 (hidden).

    `cache_attention` runs before `cache_store`, while a call of one token stores first; both must see the same keys.
    """
    capacity = layer.keys.shape[2]
    slot = cache.next_slot(layer.counts, capacity, pinned)
    gone = (torch.arange(capacity, device=slot.device) == slot) & (is_token.sum(-1) == 1)[:, None, None]
    return layer.positions.masked_fill(gone, -1)


def _attend_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_token: Tensor | None,
    *,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    sinks: int,
) -> Tensor:
    """Attention of the first call. Nothing is stored yet, so it is ordinary attention, which prefill methods may make sparse."""
    plain = not window and not softcap and sink_logits is None
    if plain and (is_token is None or torch.compiler.is_dynamo_compiling()):
        return _attend_plain(query, key, value, None if is_token is None else is_token[:, None, None, :], scale)
    order = flags = None
    if is_token is not None:
        if window:  # the window counts tokens, the op counts columns: move the padding behind the tokens
            order = is_token.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
            query, key, value = (_gather_columns(tensor, order) for tensor in (query, key, value))
            is_token = is_token.gather(1, order)
        flags = is_token.to(torch.uint8)
        if sinks:
            flags = flags + 2 * (is_token & (is_token.cumsum(-1) <= sinks)).to(torch.uint8)
    how = {"sink_logits": sink_logits, "scale": scale, "softcap": softcap}
    output = _attend_clauses(query, key, value, window, sinks, key_flags=flags, **how)
    return output if order is None else _gather_columns(output, order.argsort(-1))


def _attend_plain(query: Tensor, key: Tensor, value: Tensor, shown: Tensor | None, scale: float) -> Tensor:
    """Causal attention, written as transformers does, so that the matcher recognises it and prefill methods may act on it.

    shown: which keys may be seen beside causality, bool, broadcastable to [batch, 1, query_len, key_len].
    """
    seen = None
    if shown is not None:
        at = torch.arange(query.shape[2], device=query.device)
        seen = (at[None, :] <= at[:, None])[None, None] & shown
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None, scale=scale, **grouped)


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: dict[str, Tensor],
    *,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    sinks: int,
) -> Tensor:
    """`_attend_prompt` over packed rows, each of whose texts sees itself alone, with sinks of its own."""
    documents, places = packing["documents"], packing["places"]
    if not window and not softcap and sink_logits is None:
        return _attend_plain(query, key, value, (documents[:, :, None] == documents[:, None, :])[:, None], scale)
    flags = 1 + 2 * (places < sinks).to(torch.uint8) if sinks else None
    how = {"sink_logits": sink_logits, "scale": scale, "softcap": softcap}
    return _attend_clauses(query, key, value, window, sinks, key_flags=flags, segments=documents, **how)


def _attend_clauses(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, **clauses: Any) -> Tensor:
    """Causal attention of a prompt by the op. clauses: further arguments of it."""
    output, _ = attention(
        query,
        key,
        value,
        **clauses,
        causal=True,
        windows=[window] if window else [],
        sinks=sinks,
        seq_major=True,
        version=AttentionCall.VERSION,
    )
    return output


def _gather_columns(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorders the tokens of each row.

    Args:
        tensor: [batch, heads, n, dim].
        order: int64 [batch, n], source column of each column.

    Returns:
        [batch, heads, n, dim], the transpose of a contiguous [batch, n, heads, dim].
    """
    rows = tensor.transpose(1, 2)
    return rows.gather(1, order[:, :, None, None].expand_as(rows)).transpose(1, 2)


register_attention()

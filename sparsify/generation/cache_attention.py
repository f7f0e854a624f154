"""Attention of models that hold a SparseCache: two functions that transformers calls by the name `sparsify` (or `sparsify_eager`).

transformers tells attention nothing about the cache: the keys that a layer's `update` gives out say whose they are. For other keys both
functions are the implementation that the model was loaded with.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsify.errors import CacheError, UnsupportedError
from sparsify.generation.cache_layer import SparseLayer, StockMask, autocast_dtype, layer_of
from sparsify.ops import attention as ops
from sparsify.ops import cache


class _Saved(str):
    """The name of one of the two functions in a configuration that is copied or pickled: a deep copy of a model is used with its caches,
    and a model that is loaded elsewhere finds `base`, which it was loaded with, and needs no sparsify there."""

    base: str

    def __deepcopy__(self, memo: Any) -> str:
        return str(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, (self.base,)


# implementation that a model was loaded with -> the name under which sparsify serves it; plain strings, which compiled code compares
NAMES = {"sdpa": "sparsify", "eager": "sparsify_eager"}


def _reduced(config: Any) -> Any:
    """How configurations are copied and pickled: as always, but for the name of their attention."""
    make, arguments, state, *rest = config.__reduce_ex__(4)
    for base, name in NAMES.items():
        if config._attn_implementation == name:
            saved = _Saved(name)
            saved.base = base
            state = {**state, "_attn_implementation_internal": saved}
    return make, arguments, state, *rest


# What tells two models' configurations apart as far as a cache is concerned; names and paths of files differ between copies of one model.
_SHAPE = (
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


def install() -> None:
    """Registers both functions with transformers, and sparsify's kernels with torch."""
    importlib.import_module("sparsify.backends.cache.dispatch")
    for base, name in NAMES.items():
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(attention_forward, base))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, functools.partial(mask_function, base))


def serve(config: Any) -> None:
    """Makes the model of `config` call sparsify's attention, which is its own one for calls without a SparseCache."""
    install()
    base = config._attn_implementation or "sdpa"
    if base in NAMES:
        config._attn_implementation = NAMES[base]
    copyreg.pickle(type(config), _reduced)


def same_model(one: Any, other: Any) -> bool:
    """Whether two configurations are those of one model, of a copy of it or of the same model loaded again."""
    if one is other:
        return True
    return type(one) is type(other) and all(getattr(one, name, None) == getattr(other, name, None) for name in _SHAPE)


def mask_function(base: str, *, kv_length: Any, attention_mask: Tensor | None = None, **call: Any) -> Any:
    """With a SparseCache the 2-D padding mask as it is, [batch, tokens so far] or None; else the mask of `base`.

    Raises:
        UnsupportedError: the model asks for more than causality, its sliding window and padding.
    """
    if not isinstance(kv_length, StockMask):
        return ALL_MASK_ATTENTION_FUNCTIONS[base](kv_length=kv_length, attention_mask=attention_mask, **call)
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends and stores. query [batch, query_heads, query_len, head_dim], key and value [batch, kv_heads, query_len, head_dim].

    Returns:
        output [batch, query_len, query_heads, v_head_dim] and None for the weights.

    Raises:
        CacheError, UnsupportedError: the call cannot be served exactly.
    """
    layer = layer_of(key)
    if layer is None:
        given = {"softcap": softcap, "sliding_window": sliding_window, "s_aux": s_aux}
        given = {name: value for name, value in given.items() if value is not None}
        function = _base_attention(base, module)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given, **kwargs)
    layer.call.waiting = None
    _check(layer, module, query, attention_mask, dropout, sliding_window, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    real = None if attention_mask is None else _real(layer, attention_mask, query.shape[2])
    if not layer.is_initialized:
        layer.allocate(key, value, _tokens(query, real))
    if layer.is_first:
        layer.call.storing = True
    wanted = autocast_dtype(query)
    if wanted is not None:
        query = query.to(key.dtype)
    output = _attend(layer, query, key, value, real, scale, softcap or 0.0, s_aux)
    if wanted is not None:
        output = output.to(wanted)
    if layer.is_last:
        layer.call.storing = False
    return output.transpose(1, 2), None


def _base_attention(base: str, module: torch.nn.Module) -> Callable[..., Any]:
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _check(
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
    if window is not None and not (layer.is_sliding and layer.layout.window == window):
        raise CacheError(f"the model's window of {window} is not the cache's", where=where, hint="make a new cache from model.config")


def _real(layer: SparseLayer, mask: Tensor, query_len: int) -> Tensor:
    """Which tokens of this call are not padding, bool [batch, query_len].

    Raises:
        CacheError: the mask does not cover the tokens before this call, or now says otherwise about them.
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


def _tokens(query: Tensor, real: Tensor | None) -> int:
    """Tokens of a call's longest row; compiled code has to know them beforehand and counts padding too."""
    return query.shape[2] if real is None or torch.compiler.is_dynamo_compiling() else int(real.sum(-1).max())


def _attend(
    layer: SparseLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Output [batch, query_heads, query_len, v_head_dim]; the call's tokens are stored after their queries attended."""
    layout, empty = layer.layout, not layer.started
    if empty:  # compiled code would write it back at every token
        layer.started = True
    shape = {"window": layout.window, "sinks": layout.sinks if layout.window else 0}
    how = {"sink_logits": sink_logits, "scale": scale, "softcap": softcap}
    turning = {"inverse_frequencies": layer.inverse_frequencies if layout.turn_sinks else None}
    stored = {
        "pinned": layout.pinned,
        "recent": layout.recent,
        "policy": layer.policy_text,
        "scale": scale,
        "softcap": softcap,
        "version": cache.VERSION,
    }
    if query.shape[2] == 1:
        cache.store(None, key, value, *layer.state, real=real, empty=empty, tickets=layer.tickets, **stored)
        keys, values, positions, _, seen, _ = layer.state
        return cache.attention(query, keys, values, positions, seen, **how, **shape, **turning, version=cache.VERSION)
    if empty and not layout.turn_sinks:
        output = _prompt(query, key, value, real, **how, **shape)
    else:
        keys, values, positions, _, seen, _ = layer.state
        if empty:  # whatever a prompt that failed may have left in the buffers
            positions, seen = torch.full_like(positions, -1), torch.zeros_like(seen)
        elif real is not None and not layout.window:
            positions = _before_single_tokens(layer, real)
        output = cache.attention(
            query,
            keys,
            values,
            positions,
            seen,
            new_key=key,
            new_value=value,
            real=real,
            **how,
            **shape,
            **turning,
            version=cache.VERSION,
        )
    observed = query if layer.policy.observed else None
    cache.store(observed, key, value, *layer.state, real=real, empty=empty, **stored)
    return output


def _before_single_tokens(layer: SparseLayer, real: Tensor) -> Tensor:
    """The slots' positions, in rows to which padding leaves one token without what it overwrites: it is stored before it is attended to."""
    slot = cache.next_slot(layer.counts, layer.layout.capacity, layer.layout.pinned)
    gone = (torch.arange(layer.layout.capacity, device=slot.device) == slot) & (real.sum(-1) == 1)[:, None, None]
    return layer.positions.masked_fill(gone, -1)


def _prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    *,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    sinks: int,
) -> Tensor:
    """The first call: nothing is stored yet, so this is ordinary attention, which other passes may make sparse."""
    plain = not window and not softcap and sink_logits is None
    if plain and (real is None or torch.compiler.is_dynamo_compiling()):
        seen = None
        if real is not None:  # written as transformers does, so that matchers read it and other methods may act on the prompt
            at = torch.arange(query.shape[2], device=query.device)
            seen = (at[None, :] <= at[:, None])[None, None] & real[:, None, None, :]
        grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None, scale=scale, **grouped)
    order = flags = None
    if real is not None:
        if window:  # counted in tokens, and the op counts columns: tokens come to stand side by side, padding behind them
            order = real.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
            query, key, value = (_columns(tensor, order) for tensor in (query, key, value))
            real = real.gather(1, order)
        flags = real.to(torch.uint8)
        if sinks:
            flags = flags + 2 * (real & (real.cumsum(-1) <= sinks)).to(torch.uint8)
    output, _ = ops.attention(
        query,
        key,
        value,
        key_flags=flags,
        sink_logits=sink_logits,
        scale=scale,
        causal=True,
        windows=[window] if window else [],
        sinks=sinks,
        softcap=softcap,
        block_size=128,
        seq_major=True,
        version=ops.VERSION,
    )
    return output if order is None else _columns(output, order.argsort(-1))


def _columns(tensor: Tensor, order: Tensor) -> Tensor:
    """tensor [batch, heads, n, dim] with its columns in the order [batch, n], as the transpose of a contiguous [batch, n, heads, dim]."""
    rows = tensor.transpose(1, 2)
    return rows.gather(1, order[:, :, None, None].expand_as(rows)).transpose(1, 2)

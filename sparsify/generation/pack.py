"""`sparsify.pack`: prompts of different lengths read in one pass, each into a cache of its own.

Prepacking (arXiv 2404.09529): prompts lie side by side in rows of about equal length, with positions that begin anew and masks by document,
so that nothing is computed for padding. Which rows, `regions.bins` says; that layers compute packed rows, `regions.packing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparsify.errors import CacheError, UnsupportedError
from sparsify.generation import compat
from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.caches.outlook import Outlook
from sparsify.generation.caches.running_call import link_layers
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.regions import packing
from sparsify.generation.regions.regional import RegionalModel, WholeModel

WHERE = "sparsify.pack"


class PackedPrompt(NamedTuple):
    """One of several prompts that were read together.

    cache: what reading it alone would have stored, for a batch of one.
    logits: of its last token, [1, vocabulary].
    """

    cache: Any
    logits: Tensor


@torch.no_grad()
def pack(model: Any, prompts: Sequence[Sequence[int] | Tensor], *, cache: SparseCache | None = None) -> list[PackedPrompt]:
    """Reads prompts of different lengths in one pass, as if each were read alone. Exact.

        for prompt, (cache, logits) in zip(prompts, sparsify.pack(model, prompts)):
            whole = torch.cat([prompt, logits.argmax(-1)])
            model.generate(whole[None], cache=cache, max_new_tokens=64)   # past_key_values=cache before transformers 5.24

    Args:
        model: a causal language model after `sparsify.compile(model)`, whose layers are compiled one by one.
        prompts: token ids of each, a list or int64 [tokens] or [1, tokens], none of them empty.
        cache: an empty `SparseCache(model.config, ...)`, as which each prompt's cache is made; it is used up. None: the model's ordinary
            caches.

    Returns:
        for each prompt, in their order, its cache and the logits of its last token.

    Raises:
        UnsupportedError: the model is not compiled, or captured whole; its layers cannot be packed, with the reason; another kind of
            cache; a prompt that is no row of integers.
        CacheError: the cache holds tokens, or has a budget that is a share of what it is given.
    """
    _check(model, cache)
    rows = [_ids(number, prompt) for number, prompt in enumerate(prompts)]
    if not rows:
        return []
    lengths = [len(row) for row in rows]
    if not min(lengths):
        raise UnsupportedError(f"prompt {lengths.index(0)} has no tokens", where=WHERE)
    columns = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(row, (columns - len(row), 0)) for row in rows]).to(model.device)
    mask = torch.stack([(torch.arange(columns) >= columns - length).long() for length in lengths]).to(model.device)
    held = DynamicCache(config=model.config) if cache is None else cache
    names = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "logits_to_keep": 1}
    more = {name: value for name, value in more.items() if name in names}
    with packing.required():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=True, **compat.with_cache(model, held), **more).logits[:, -1]
    return [PackedPrompt(one, row) for one, row in zip(_caches(held, lengths), logits.split(1), strict=True)]


def _ids(number: int, prompt: Sequence[int] | Tensor) -> Tensor:
    """A prompt's tokens, int64 [tokens]."""
    ids = torch.as_tensor(prompt)
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise UnsupportedError(f"prompt {number} is {ids.dtype}, and token ids are integers", where=WHERE)
    if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        what = f"prompt {number} is {tuple(ids.shape)}, not [tokens] or [1, tokens]"
        raise UnsupportedError(what, where=WHERE, hint="give each row as a prompt of its own, without padding")
    return ids.to(torch.int64).flatten()


def _check(model: Any, cache: Any) -> None:
    compiled = getattr(model, "_compiled_call_impl", None)
    if isinstance(compiled, WholeModel):
        raise UnsupportedError(f"the model is captured whole: {compiled.reason or 'that was asked for'}", where=WHERE)
    if not isinstance(compiled, RegionalModel):
        raise UnsupportedError("the model is not compiled layer by layer", where=WHERE, hint="sparsify.compile(model)")
    if compiled.reason:
        raise UnsupportedError(f"the model is captured whole: {compiled.reason}", where=WHERE)
    if cache is None:
        return
    if not isinstance(cache, SparseCache):
        raise UnsupportedError(f"a cache that is a {type(cache).__name__}", where=WHERE, hint="SparseCache, or none")
    if isinstance(cache.budget, float):
        raise CacheError("a budget that is a share, of the longest prompt's tokens", where=WHERE, hint="give tokens")
    if any(layer.started for layer in cache.layers):
        raise CacheError("the cache holds tokens", where=WHERE, hint="give an empty one")


def _caches(held: Cache, lengths: Sequence[int]) -> list[Any]:
    """A cache for each row of a batch with padding on the left, of these lengths without it; `held` is used up, layer by layer."""
    layers: list[list[Any]] = [[] for _ in lengths]
    for number, layer in enumerate(held.layers):
        for row, length in enumerate(lengths):
            layers[row].append(_sparse_row(layer, row, length) if isinstance(layer, SparseLayer) else _row(layer, row, length))
        held.layers[number] = None  # pyright: ignore[reportArgumentType, reportCallIssue]  # lets go of the batch's tokens
    return [_cache_like(held, mine) for mine in layers]


def _row(layer: Any, row: int, length: int) -> Any:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UnsupportedError(f"a cache with a {type(layer).__name__}", where=WHERE)
    mine = object.__new__(type(layer))
    kept = min(length, layer.keys.shape[2])
    own = {name: getattr(layer, name)[row : row + 1, :, -kept:].clone() for name in ("keys", "values")}
    vars(mine).update(vars(layer), **own)
    if isinstance(layer, DynamicSlidingWindowLayer):
        mine.cumulative_length = length
    return mine


def _sparse_row(layer: SparseLayer, row: int, length: int) -> SparseLayer:
    mine = object.__new__(SparseLayer)
    vars(mine).update(vars(layer))
    mine.batch_select_indices(torch.tensor([row]))
    mine.length = torch.full_like(layer.length, length)
    if not mine.every:
        mine.used = None  # read when it is needed
    mine.mark_static()
    return mine


def _cache_like(held: Cache, layers: list[Any]) -> Any:
    mine = object.__new__(type(held))
    vars(mine).update(vars(held), layers=layers)
    if isinstance(mine, SparseCache):
        mine.call, mine.outlook = link_layers(mine.layers), Outlook()
    return mine

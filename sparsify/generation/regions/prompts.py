"""What a prompt's call is made of, asked before the first layer runs: its cache, its padding, arguments whose rows are known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.regions.masks import PostponedMask


def is_empty(cache: Any) -> bool:
    """Whether a cache is known to hold no tokens."""
    first = cache.layers[0] if cache.layers else None
    if first is None:
        return True
    if isinstance(first, SparseLayer):
        return not first.started
    return not first.is_initialized or (type(first.get_seq_length()) is int and first.get_seq_length() == 0)


def is_rotary(tables: Any, tokens: int) -> bool:
    """Whether these are rotary tables, one angle for each token: two of [batch or 1, tokens, dim]."""
    return (
        type(tables) is tuple and len(tables) == 2 and all(isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == tokens for t in tables)
    )


def find_tokens(mask: Any, tokens: int) -> Tensor | None:
    """Which columns hold a token, bool [batch, tokens]; None where all do."""
    padding = mask.recipe.call.get("attention_mask") if isinstance(mask, PostponedMask) else mask
    if padding is None or bool((padding != 0).all()):
        return None
    return padding != 0


def holds_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(holds_tensors, value))
    if isinstance(value, dict):
        return any(map(holds_tensors, value.values()))
    return isinstance(value, Tensor)

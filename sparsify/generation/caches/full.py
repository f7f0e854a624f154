"""The exact cache that `generate()` works best with: allocated at once, so that nothing is copied and a CUDA graph can be replayed."""

from __future__ import annotations

from typing import Any

import torch

from sparsify.generation.caches.sparse_cache import SparseCache


def full_cache(
    config: Any, batch_size: int, capacity: int, device: torch.device | str | None, dtype: torch.dtype | None = None
) -> SparseCache:
    """A cache that evicts nothing, allocated for a whole call of `generate()`.

    Args:
        config: `model.config` of the model that will use the cache: this object, not a copy.
        batch_size: rows, as the model sees them: prompts times beams or returned sequences.
        capacity: tokens per row, padding included: prompt + max_new_tokens. Uncompiled calls may go on beyond it.
        device: where keys and values lie. None: that of the first call, which then allocates.
        dtype: of keys and values; None takes the configuration's.

    Raises:
        UnsupportedError: a model that no SparseCache serves, with the reason; use a cache of transformers.
    """
    if device is None:
        return SparseCache(config, "full", capacity, dtype=dtype)
    return SparseCache(config, "full", capacity, batch_size=batch_size, device=device, dtype=dtype)

"""Exact caches that `generate()` borrows. They are kept between calls, so that CUDA graphs recorded over them can be replayed."""

from __future__ import annotations

import threading
from typing import Any

import torch

from sparsify.generation.caches.full import full_cache
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.ops.limits import cdiv

# a cache is kept where it takes no more than this share of the device's memory
_SHARE = 0.125
# a cache of so many times the tokens is used rather than another made
_LARGER = 4
_LEAST = 4096  # or of no more than so many


class KeptCaches:
    """At most one idle cache of a model."""

    def __init__(self) -> None:
        self._idle: SparseCache | None = None
        self._lock = threading.Lock()

    def borrow(self, model: Any, rows: int, tokens: int) -> SparseCache:
        """An empty cache with room for `tokens` of each row, which no other call uses until it is given back.

        Raises:
            UnsupportedError: no SparseCache serves the model.
        """
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None:
            batch, room = idle.layers[0].keys.shape[0], idle.room()
            if batch == rows and (room is None or tokens <= room <= max(_LARGER * tokens, _LEAST)):
                idle.reset()
                return idle
        del idle  # its memory may be needed
        return full_cache(model.config, rows, _rounded(tokens), model.device, model.dtype)

    def give_back(self, cache: SparseCache) -> None:
        """Keeps a cache that nobody else holds for the next call, unless it is too large."""
        device = cache.layers[0].keys.device
        if device.type == "cuda" and cache.kept_bytes() > _SHARE * torch.cuda.get_device_properties(device).total_memory:
            return
        with self._lock:
            self._idle = cache


def _rounded(tokens: int) -> int:
    """`tokens` rounded up by a quarter at most to one of few numbers, so that calls of slightly other lengths find the same cache."""
    step = max(256, 1 << max(tokens.bit_length() - 3, 0))
    return cdiv(tokens, step) * step

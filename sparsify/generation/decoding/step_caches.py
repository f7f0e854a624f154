"""The caches over which a step can be recorded: what the model is given beside a token, and how much room there is for more.

A cache is held weakly: steps are kept for as long as it lives, and must not keep it alive.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from sparsify.generation import compat
from sparsify.generation.caches.sparse_cache import SparseCache
from sparsify.generation.decoding.model_state import address


class StepCache(Protocol):
    """A cache as a step uses it."""

    def begin(self, rows: int, mask: Tensor | None, stored: int) -> None:
        """After a prompt: the cache holds `stored` columns of each row; mask [rows, stored] is 0 for padding."""

    def stored(self) -> int:
        """Columns of each row that the cache holds; may wait for the device."""
        ...

    def inputs(self) -> dict[str, Any]:
        """What the model is given beside the token and its position; may be recorded."""
        ...

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` of each row where the cache can grow, and for some where its policy selects anew."""

    def room(self) -> int | None:
        """Tokens of each row beyond which `reserve` is needed; None where it never is."""

    def forget(self) -> None:
        """Recording was given up between two layers, before anything was stored."""

    def finish(self) -> None:
        """After the last step. Replayed graphs have stored tokens without running the cache's Python code."""

    def state(self) -> Any:
        """Where the buffers lie; None before they are allocated."""


C = TypeVar("C", bound=Cache)


class _WeakCache(Generic[C]):
    """Holds the cache weakly."""

    def __init__(self, cache: C):
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> C:
        """Raises ReferenceError when nobody holds the cache any more."""
        cache = self._cache()
        if cache is None:
            raise ReferenceError("the cache of a recorded step is gone")
        return cache


class SparseStep(_WeakCache[SparseCache]):
    """A SparseCache: it knows its padding and makes its own masks, so that a token needs none."""

    def begin(self, rows: int, mask: Tensor | None, stored: int) -> None:
        self.cache.read_lengths()

    def stored(self) -> int:
        return int(self.cache.get_seq_length())

    def inputs(self) -> dict[str, Any]:
        return {compat.CACHE_NAME: self.cache}

    def reserve(self, tokens: int) -> None:
        self.cache.reserve(tokens)
        self.cache.settle()

    def room(self) -> int | None:
        return self.cache.room()

    def forget(self) -> None:
        self.cache.call.forget()

    def finish(self) -> None:
        self.cache.recount()

    def state(self) -> Any:
        return tuple((layer.layout, *map(address, layer.buffers())) for layer in self.cache.layers)


class StaticStep(_WeakCache[StaticCache]):
    """A StaticCache of transformers without windows: its slots are columns, and the mask of a row says which of them are tokens.

    The mask is a buffer, bool [rows, 1, 1, slots], in which each token marks its own slot.
    """

    def __init__(self, cache: StaticCache):
        super().__init__(cache)
        self._mask: Tensor | None = None

    def begin(self, rows: int, mask: Tensor | None, stored: int) -> None:
        if self._mask is None:
            keys, _, _ = _buffers(self.cache.layers[0])
            self._mask = torch.zeros(rows, 1, 1, keys.shape[2], dtype=torch.bool, device=keys.device)
        self._mask.zero_()
        self._mask[:, 0, 0, :stored] = True if mask is None else mask.bool()

    def stored(self) -> int:
        return int(self.cache.get_seq_length())

    def inputs(self) -> dict[str, Any]:
        if self._mask is None:
            raise RuntimeError("a step runs before its prompt")
        _, _, length = _buffers(self.cache.layers[0])
        self._mask.index_fill_(3, length.reshape(1), True)
        return {compat.CACHE_NAME: self.cache, "attention_mask": self._mask}

    def reserve(self, tokens: int) -> None:
        pass

    def room(self) -> int | None:
        return None

    def forget(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def state(self) -> Any:
        return tuple(tuple(map(address, _buffers(layer))) for layer in self.cache.layers)


def _buffers(layer: object) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the number of tokens of a static layer, int64 []."""
    if not isinstance(layer, StaticLayer) or layer.keys is None or layer.values is None:
        raise TypeError(f"not a static layer with buffers: {type(layer).__name__}")
    return layer.keys, layer.values, layer.cumulative_length


def refusal(cache: Any, model: Any) -> str:
    """Why a step over this cache cannot be recorded; empty where it can."""
    if isinstance(cache, SparseCache):
        return ""
    if type(cache) is StaticCache and all(type(layer) is StaticLayer for layer in cache.layers) and not cache.offloading:
        written = model.config.get_text_config(decoder=True)._attn_implementation
        return "" if written in ("sdpa", "sparsify_sdpa", "sparsify") else f"of a StaticCache under attention {written!r}"
    return f"of the cache, a {type(cache).__name__}"


def step_cache(cache: Any) -> StepCache:
    """What steps use in place of a cache that `refusal` does not refuse."""
    return SparseStep(cache) if isinstance(cache, SparseCache) else StaticStep(cache)

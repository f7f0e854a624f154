"""Caches that hold every token of a long text, filled at random: a token costs what it costs over a prompt's keys, and none is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sparsify import SparseCache

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def filled(model: LlamaForCausalLM, room: int, batch: int, device: str) -> SparseCache:
    """A cache with room for so many tokens, full of random numbers."""
    cache = SparseCache(model.config, "full", room, batch_size=batch, device=device, dtype=model.dtype)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def put_back(cache: SparseCache, length: int, counts: Sequence[int], device: str) -> SparseCache:
    """Makes the cache hold `length` tokens, of which each row has so many that are no padding."""
    held = torch.tensor(counts, dtype=torch.int32, device=device)
    for layer in cache.layers:
        slots = torch.arange(layer.keys.shape[2], dtype=torch.int32, device=device)
        layer.positions.copy_(torch.where(slots < held[:, None], slots, -1)[:, None])
        layer.counts.copy_(held[:, None])
        layer.seen.copy_(held)
        layer.length.fill_(length)
        layer.started = True
    cache.recount()
    return cache

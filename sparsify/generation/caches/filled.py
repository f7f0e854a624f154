"""How many slots of a SparseCache hold tokens, where that is one number: what a CPU can be asked before a token, and no GPU."""

from __future__ import annotations

import torch

from sparsify.generation.caches.layer import SparseLayer
from sparsify.generation.caches.sparse_cache import SparseCache

# sizes of 0 and 1 are constants of a graph
LEAST = 2


def filled(cache: SparseCache) -> int | None:
    """Slots that hold tokens in every row, head and layer, all of which the next token sees and behind which there is room for it; None
    where that is not one number, where something hides or moves keys, or where nobody should wait for the answer."""
    layers = cache.layers
    if not all(map(_plain, layers)):
        return None
    found = torch.cat([layer.counts.flatten() for layer in layers]).tolist()
    count = found[0] if found else 0
    if count < LEAST or min(found) != max(found) or any(count >= layer.keys.shape[2] for layer in layers):
        return None
    # what graphs that were told the number have stored since lies behind what was looked at
    if count != cache.call.looked and any(int(layer.positions[:, :, :count].amin()) < 0 for layer in layers):
        return None
    cache.call.looked = count
    return count


def stored_one(cache: SparseCache, filled: int) -> None:
    """After a call of one token over so many filled slots."""
    cache.call.looked = filled + 1


def _plain(layer: SparseLayer) -> bool:
    layout = layer.layout
    if layout is None or not layer.grows or not layer.started or layout.window or layout.rotate_sinks or layout.room:
        return False
    if layer.codes or layer.read is not None or layer.starts is not None or layer.shard is not None or layer.offloader is not None:
        return False
    return layer.held is None and layer.keys.device.type == "cpu" and layer.keys.dtype == layer.values.dtype == torch.float32

"""`sparsify::cache_decode` on CPUs where every stored token is seen: the filled slots alone, by torch's own attention.

The reference computes over all slots and hides the empty ones, in some fifteen operations: it neither waits for the device nor asks
anything of the values. A CPU answers such questions at once, and there the operations are most of a small model's token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.backends.cache import reference
from sparsify.ops import cache
from sparsify.ops.cache import CacheDecodeCall


def cache_decode(call: CacheDecodeCall) -> Tensor:
    """As `reference.cache_decode`, which serves what this does not."""
    filled = _filled(call)
    if filled is None:
        return reference.cache_decode(call)
    place = slice(filled, filled + 1)
    call.keys[:, :, place].copy_(call.key)
    call.values[:, :, place].copy_(call.value)
    call.positions[:, :, place].copy_(call.seen[:, None, None])
    for count in (call.counts, call.seen, call.length):
        count.add_(1)
    keys, values = (state[:, :, : filled + 1] for state in (call.keys, call.values))
    grouped = keys.shape[1] != call.query.shape[1]
    found = torch.nn.functional.scaled_dot_product_attention(call.query, keys, values, scale=call.scale, enable_gqa=grouped)
    return cache.empty_output(call).copy_(found)


def _filled(call: CacheDecodeCall) -> int | None:
    """Slots that hold tokens, in every row and head, all of which the new token sees and behind which it is stored; None: it is not so."""
    hiding = call.window or call.is_token is not None
    moving = call.starts is not None or call.inverse_frequencies is not None
    reading = call.codes or call.pages is not None or call.bounds is not None
    weighing = call.softcap or call.sink_logits is not None
    # other dtypes are computed in float32, which torch's attention does not promise
    if hiding or moving or reading or weighing or call.query.device.type != "cpu" or call.query.dtype != torch.float32:
        return None
    if call.keys.dtype != torch.float32 or call.values.dtype != torch.float32 or call.counts.numel() == 0:
        return None
    counts = call.counts.flatten().tolist()
    filled = counts[0]
    if min(counts) != max(counts) or not 0 < filled < call.capacity:
        return None
    if int(call.positions[:, :, :filled].amin()) < 0:
        return None
    return filled

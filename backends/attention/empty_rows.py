"""What `sparsify::attention` leaves in rows that see no key: average or NaN, written after the attention kernel into its output.

Rows are known by their LSE, so no kernel of attention changes for it, and where every row sees a key one pass over the LSE is all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.backends.attention import reference
from sparsify.ops.attention import SUNK, AttentionCall


def fill(output: Tensor, lse: Tensor, call: AttentionCall) -> None:
    """Writes the rows of output that see no key, as `sparsify.ops.attention` says.

    Args:
        output: [batch, query_heads, query_len, v_head_dim], written.
        lse: fp32 [batch, query_heads, query_len], read.
    """
    if call.empty_rows == "zero" or output.numel() == 0 or call.key.shape[2] == 0:
        return
    empty, value = unseen(lse, call), call.value
    if output.device.type == "cpu" and not empty.any():  # elsewhere asking costs a synchronisation
        return
    if call.bias is not None:
        _fill_weighted(output, empty, call)
    elif call.empty_rows == "nan":
        output.masked_fill_(empty[..., None], torch.nan)
    else:
        mean = value.mean(2, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32)
        mean = mean.repeat_interleave(call.group, 1)[:, :, None]
        output.copy_(torch.where(empty[..., None], mean.to(output.dtype), output))


def unseen(lse: Tensor, call: AttentionCall) -> Tensor:
    """Bool like the LSE: rows to fill. Kernels in base 2 take the lowest finite bias for -inf."""
    if call.bias is not None:
        return lse < SUNK
    empty = lse == -torch.inf
    if call.listed:
        empty &= unlisted(call)
    return empty


def unlisted(call: AttentionCall) -> Tensor:
    """Bool [batch or 1, query_heads or 1, query_len]: rows that see no key even where every block is listed.

    Keys are sorted by segment, so that the last key of a row's segment at or before its position is found by a running maximum.
    """
    key, segments, flags, start = call.key, call.segments, call.key_flags, call.query_start
    query_len, key_len = call.query.shape[2], key.shape[2]
    ids = torch.zeros(1, key_len, dtype=torch.int32, device=key.device) if segments is None else segments
    shown = torch.ones_like(ids, dtype=torch.bool) if flags is None else flags & 1 != 0
    batch = max(ids.shape[0], shown.shape[0])
    ids, shown = (x.expand(batch, -1).contiguous() for x in (ids, shown))
    ordered, order = ids.sort(dim=-1, stable=True)
    at = torch.arange(key_len, device=key.device).expand(batch, -1)
    last = torch.where(shown.gather(1, order), at, -1).cummax(-1).values
    position = torch.arange(query_len, device=key.device) + (key_len - query_len if start is None else start.reshape(()))
    own = position.clamp(0, key_len - 1).expand(batch, -1)
    if call.causal:
        bound = torch.empty_like(order).scatter_(1, order, at).gather(1, own)
    else:
        bound = torch.searchsorted(ordered, ids.gather(1, own), right=True) - 1
    found = last.gather(1, bound)
    nearest = order.gather(1, found.clamp(min=0))
    seen = (found >= 0) & (ids.gather(1, nearest) == ids.gather(1, own))
    inside = position >= 0 if call.causal or segments is not None else torch.ones_like(position, dtype=torch.bool)
    if segments is not None:
        inside = inside & (position < key_len)
    windows = torch.tensor(call.windows or (0,), device=key.device)[None, :, None]
    near = (nearest[:, None] > position - windows) | (windows <= 0)
    return ~((seen & inside)[:, None] & near)


def _fill_weighted(output: Tensor, empty: Tensor, call: AttentionCall) -> None:
    """Averages weighted by the softmax of what biases and mask add: scores are lost beside it."""
    batch, heads, query_len, _ = output.shape
    value, mask = call.value, reference.Mask.from_call(call)
    key_len = value.shape[2]
    keys = torch.arange(key_len, device=value.device)
    assert call.bias is not None
    lowest = call.lowest if call.empty_rows != "nan" else -torch.inf
    values = value.float().repeat_interleave(call.group, 1)
    chunk = max(1, min(query_len, reference.CHUNK_ELEMENTS // (batch * heads * key_len)))
    for first in range(0, query_len, chunk):
        part = slice(first, min(first + chunk, query_len))
        if output.device.type == "cpu" and not empty[:, :, part].any():
            continue
        seen = mask.visible(torch.arange(first, part.stop, device=value.device), keys)
        shown = reference.bias_rows(call.bias, part).float()
        hidden = lowest + (0.0 if call.hidden_bias is None else reference.bias_rows(call.hidden_bias, part).float())
        weights = torch.where(seen, shown, hidden).expand(batch, heads, -1, -1).softmax(-1)
        weights = weights.nan_to_num(0.0) if call.empty_rows == "fused" else weights
        output[:, :, part] = torch.where(empty[:, :, part, None], (weights @ values).to(output.dtype), output[:, :, part])

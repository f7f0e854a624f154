"""What `sparsify::attention` leaves in rows that see no key: average or NaN, written after the attention kernel into its output.

Rows are known by their LSE, so no kernel of attention changes for it, and where every row sees a key one pass over the LSE is all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.backends.attention import reference
from sparsify.errors import UnsupportedError
from sparsify.ops.attention import SUNK

FORMS = ("zero", "mean", "nan")


def fill(
    output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *, empty_rows: str, lowest: float, hidden_bias: Tensor | None,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the rows of output that see no key, as `sparsify.ops.attention` says.

    Args:
        output: [batch, query_heads, query_len, v_head_dim], written. lse: fp32 [batch, query_heads, query_len], read.
        options: the other operands of the call, all of them.

    Raises:
        UnsupportedError: another word than those of FORMS, or a number that hides nothing beside "mean".
    """
    check(empty_rows, lowest)
    if empty_rows == "zero" or output.numel() == 0 or key.shape[2] == 0:
        return
    empty = unseen(lse, query, key, options)
    if output.device.type == "cpu" and not empty.any():  # elsewhere asking costs a synchronisation
        return
    if options["key_bias"] is not None:
        _fill_weighted(output, empty, value, lowest if empty_rows == "mean" else -torch.inf, hidden_bias, options)
    elif empty_rows == "nan":
        output.masked_fill_(empty[..., None], torch.nan)
    else:
        mean = value.mean(2, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32)
        mean = mean.repeat_interleave(output.shape[1] // value.shape[1], 1)[:, :, None]
        output.copy_(torch.where(empty[..., None], mean.to(output.dtype), output))


def check(empty_rows: str, lowest: float) -> None:
    if empty_rows not in FORMS or (empty_rows == "mean" and not -torch.inf < lowest < 0.0):
        raise UnsupportedError(f"empty rows hold {empty_rows!r}, hidden by {lowest}", where="sparsify::attention")


def unseen(lse: Tensor, query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """Bool like the LSE: rows to fill. Kernels in base 2 take the lowest finite bias for -inf."""
    if options["key_bias"] is not None:
        return lse < SUNK
    empty = lse == -torch.inf
    if options["block_counts"] is not None:
        empty &= unlisted(query, key, options)
    return empty


def unlisted(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """Bool [batch or 1, query_heads or 1, query_len]: rows that see no key even where every block is listed.

    Keys are sorted by segment, so that the last key of a row's segment at or before its position is found by a running maximum.
    """
    segments, flags, start = options["segments"], options["key_flags"], options["query_start"]
    query_len, key_len = query.shape[2], key.shape[2]
    ids = torch.zeros(1, key_len, dtype=torch.int32, device=key.device) if segments is None else segments
    shown = torch.ones_like(ids, dtype=torch.bool) if flags is None else flags & 1 != 0
    batch = max(ids.shape[0], shown.shape[0])
    ids, shown = (x.expand(batch, -1).contiguous() for x in (ids, shown))
    ordered, order = ids.sort(dim=-1, stable=True)
    at = torch.arange(key_len, device=key.device).expand(batch, -1)
    last = torch.where(shown.gather(1, order), at, -1).cummax(-1).values
    position = torch.arange(query_len, device=key.device) + (key_len - query_len if start is None else start.reshape(()))
    own = position.clamp(0, key_len - 1).expand(batch, -1)
    if options["causal"]:
        bound = torch.empty_like(order).scatter_(1, order, at).gather(1, own)
    else:
        bound = torch.searchsorted(ordered, ids.gather(1, own), right=True) - 1
    found = last.gather(1, bound)
    nearest = order.gather(1, found.clamp(min=0))
    seen = (found >= 0) & (ids.gather(1, nearest) == ids.gather(1, own))
    inside = position >= 0 if options["causal"] or segments is not None else torch.ones_like(position, dtype=torch.bool)
    if segments is not None:
        inside = inside & (position < key_len)
    windows = torch.tensor(options["windows"] or [0], device=key.device)[None, :, None]
    near = (nearest[:, None] > position - windows) | (windows <= 0)
    return ~((seen & inside)[:, None] & near)


def _fill_weighted(
    output: Tensor, empty: Tensor, value: Tensor, lowest: float, hidden_bias: Tensor | None, options: dict[str, Any]
) -> None:
    """Averages weighted by the softmax of what biases and mask add: scores are lost beside it."""
    batch, heads, query_len, _ = output.shape
    key_len = value.shape[2]
    start = options["query_start"]
    mask = reference.Mask(
        options["key_flags"], options["segments"], options["block_counts"], options["block_indices"],
        key_len - query_len if start is None else int(start.item()),
        options["causal"], tuple(options["windows"]), options["sinks"], options["block_size"], key_len,
    )  # fmt: skip
    keys = torch.arange(key_len, device=value.device)
    shown = options["key_bias"][:, :, None].float()
    hidden = lowest + (0.0 if hidden_bias is None else hidden_bias[:, :, None].float())
    values = value.float().repeat_interleave(heads // value.shape[1], 1)
    chunk = max(1, min(query_len, reference.CHUNK_ELEMENTS // (batch * heads * key_len)))
    for first in range(0, query_len, chunk):
        part = slice(first, min(first + chunk, query_len))
        if output.device.type == "cpu" and not empty[:, :, part].any():
            continue
        seen = mask.visible(torch.arange(first, part.stop, device=value.device), keys)
        weights = torch.where(seen, shown, hidden).expand(batch, heads, -1, -1).softmax(-1)
        output[:, :, part] = torch.where(empty[:, :, part, None], (weights @ values).to(output.dtype), output[:, :, part])

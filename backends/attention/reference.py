"""`sparsify::attention` in plain PyTorch, on any device: what every other kernel is compared with.

fp32 math (fp64 for fp64 inputs), a chunk of query rows at a time, so that memory is O(chunk · key_len). Block lists, windows and
causality are masks here; only keys that no row of a chunk can see are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.ops import block_lists
from sparsify.ops.attention import AttentionCall
from sparsify.ops.limits import cdiv

# elements of one chunk's score matrix over all heads: 64 MB in fp32
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Mask:
    """The clauses of a call that say which keys a query row sees. start: key position of query row 0."""

    call: AttentionCall
    start: int

    @classmethod
    def from_call(cls, call: AttentionCall) -> Mask:
        """Reads `query_start` where there is one, which synchronises."""
        return cls(call, call.key.shape[2] - call.query.shape[2] if call.query_start is None else int(call.query_start.item()))

    @property
    def key_len(self) -> int:
        return self.call.key.shape[2]

    def key_range(self, first: int, last: int) -> tuple[int, int]:
        """Keys outside of this range are invisible to every query row in [first, last]."""
        end = min(self.key_len, last + self.start + 1) if self.call.causal else self.key_len
        begin = 0
        sink_possible = self.call.sinks > 0 or self.call.key_flags is not None
        if self.call.windows and all(self.call.windows) and not sink_possible:
            begin = min(max(0, first + self.start - max(self.call.windows) + 1), self.key_len)
        return begin, max(begin, end)

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Bool, broadcastable to [batch, query_heads, rows, keys]."""
        position = (rows + self.start)[:, None]
        seen = torch.ones(1, 1, rows.numel(), keys.numel(), dtype=torch.bool, device=keys.device)
        if self.call.causal:
            seen = seen & (keys <= position)
        if any(self.call.windows):
            window = torch.tensor(self.call.windows, device=keys.device)[None, :, None, None]
            seen = seen & ((keys > position - window) | (window <= 0) | self._sink(keys))
        if self.call.key_flags is not None:
            seen = seen & (self.call.key_flags[:, keys] & 1 != 0)[:, None, None]
        if self.call.segments is not None:
            inside = (position >= 0) & (position < self.key_len)
            own = self.call.segments[:, (rows + self.start).clamp(0, self.key_len - 1)]
            seen = seen & ((own[:, :, None] == self.call.segments[:, None, keys]) & inside)[:, None]
        if self.call.block_counts is not None:
            seen = seen & self._listed(rows)[..., keys // self.call.block_size]
        return seen

    def _sink(self, keys: Tensor) -> Tensor:
        if self.call.key_flags is None:
            return keys < self.call.sinks
        return (self.call.key_flags[:, keys] & 2 != 0)[:, None, None]

    def _listed(self, rows: Tensor) -> Tensor:
        """Bool [batch, query_heads, rows, key_blocks]: the block lists of each row's query block as a table."""
        block = rows // self.call.block_size
        first, last = int(block[0]), int(block[-1]) + 1
        counts, indices = self.call.block_counts, self.call.block_indices
        assert counts is not None and indices is not None
        lists = counts[:, :, first:last], indices[:, :, first:last]
        return block_lists.to_dense(*lists, cdiv(self.key_len, self.call.block_size))[:, :, block - first]


def attention(call: AttentionCall, *, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The attention op of `sparsify.ops.attention`.

    Args:
        into: output and LSE to fill instead of new ones.

    Returns:
        output [batch, query_heads, query_len, v_head_dim] in query's dtype, and LSE (natural log) fp32 [batch, query_heads, query_len].
        A value that is not finite makes NaN of that column of exactly the rows that see its key.
    """
    query, key, value = call.query, call.key, call.value
    batch, heads, query_len, _ = query.shape
    kv_heads, key_len = key.shape[1:3]
    output, lse = into or call.empty_outputs()
    if key_len == 0 or output.numel() == 0:
        return output.zero_(), lse.fill_(-torch.inf)
    mask = Mask.from_call(call)
    math = torch.float64 if query.dtype == torch.float64 else torch.float32
    # [batch, kv_heads, group, rows, dim] against [batch, kv_heads, 1, keys, dim]: KV heads are never repeated
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, query_len, -1)
    keys, values = key.to(math).unsqueeze(2), value.to(math).unsqueeze(2)
    tainted = ~values.isfinite() if not values.isfinite().all() else None
    values = values if tainted is None else values.masked_fill(tainted, 0)
    chunk = max(1, min(query_len, CHUNK_ELEMENTS // (batch * heads * key_len)))
    for first in range(0, query_len, chunk):
        part = slice(first, min(first + chunk, query_len))
        begin, end = mask.key_range(first, part.stop - 1)
        if begin == end:
            output[:, :, part], lse[:, :, part] = 0, -torch.inf
            continue
        logits = (grouped[:, :, :, part].to(math) * call.scale) @ keys[..., begin:end, :].transpose(-1, -2)
        seen = mask.visible(torch.arange(first, part.stop, device=query.device), torch.arange(begin, end, device=query.device))
        bias = None if call.bias is None else bias_rows(call.bias, part)[..., begin:end].to(math)
        seen = seen if bias is None else seen & (bias != -torch.inf)
        weights, lse[:, :, part] = _softmax(call, logits.flatten(1, 2), seen, end - 1, bias)
        result = weights.view_as(logits) @ values[..., begin:end, :]
        if tainted is not None:
            regrouped = seen.expand(batch, heads, -1, -1).reshape(logits.shape).to(math)
            result[regrouped @ tainted[..., begin:end, :].to(math) > 0] = torch.nan
        output[:, :, part] = result.flatten(1, 2).to(output.dtype)
    return output, lse


def bias_rows(bias: Tensor, rows: slice) -> Tensor:
    """Of a bias [batch or 1, heads or 1, query_len or 1, key_len] what these query rows get."""
    return bias if bias.shape[2] == 1 else bias[:, :, rows]


def _softmax(call: AttentionCall, logits: Tensor, seen: Tensor, anchor: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [batch, heads, rows, keys] and LSE [batch, heads, rows] of logits whose last key is `anchor`; unseen rows get 0 and -inf."""
    softcap = call.softcap
    slopes = None if call.alibi_slopes is None else call.alibi_slopes.to(logits.dtype)
    sink_logits = None if call.sink_logits is None else call.sink_logits.to(logits.dtype)[:, None]
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if slopes is not None:
        # a softmax does not feel a constant: counting from the last key keeps slope · k small where weights are large
        distance = torch.arange(1 - logits.shape[-1], 1, device=logits.device, dtype=logits.dtype)
        logits = logits + slopes[..., None, None] * distance
        if sink_logits is not None:
            sink_logits = sink_logits - slopes[..., None] * anchor
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~seen, -torch.inf)
    top = logits.amax(-1) if sink_logits is None else torch.maximum(logits.amax(-1), sink_logits)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (logits - top[..., None]).exp_()
    total = weights.sum(-1)
    if sink_logits is not None:
        total = total + (sink_logits - top).exp()
    any_seen = seen.any(-1)
    lse = top + total.log()
    if slopes is not None:
        lse = lse + slopes[..., None] * anchor
    return weights.div_(total.masked_fill(~any_seen, 1)[..., None]), lse.masked_fill(~any_seen, -torch.inf)

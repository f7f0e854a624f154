"""Columns and diagonals of key blocks, in PyTorch's own operations on every device: the scores are those of a few rows.

Some heads are served after the others, so that no more than `SCORE_BYTES` of scores exist at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.ops import block_lists
from sparsify.ops.limits import cdiv
from sparsify.ops.patterns import SelectPatternCall

SCORE_BYTES = 256 << 20


def select_pattern(call: SelectPatternCall, *, limit: int = SCORE_BYTES) -> tuple[Tensor, Tensor]:
    """The op, of a call that was checked.

    Args:
        limit: bytes of scores at a time, for tests.
    """
    counts, indices = call.empty_lists()
    if 0 in counts.shape or call.key_len == 0:
        return counts.zero_(), indices.zero_()
    rows, known = last_rows(call)
    kv_heads = call.key.shape[1]
    group = call.heads // kv_heads
    each = 4 * call.query.shape[0] * group * rows.shape[1] * call.key_len
    step = max(1, min(kv_heads, limit // each))
    columns, diagonals = (_per_head(numbers, call) for numbers in (call.columns, call.diagonals))
    for begin in range(0, kv_heads, step):
        heads = slice(begin * group, min(kv_heads, begin + step) * group)
        mass = block_mass(call, rows, known, slice(begin, begin + step), heads)
        some_counts, some_indices = _lists(call, mass, rows, columns[heads], diagonals[heads])
        counts[:, heads], indices[:, heads] = some_counts, some_indices
    return counts, indices


def _per_head(numbers: tuple[int, ...], call: SelectPatternCall) -> list[int]:
    return list(numbers) if len(numbers) > 1 else [*numbers] * call.heads


def last_rows(call: SelectPatternCall) -> tuple[Tensor, Tensor]:
    """The query rows that choose, int64 [batch, rows], rising, and whether each is a token, bool of that shape: a row of the batch may have
    fewer tokens than rows are asked for."""
    batch, device = call.query.shape[0], call.query.device
    count = min(call.queries, call.query_len)
    at = torch.arange(call.query_len, device=device)
    if call.key_flags is None:
        rows = at[-count:].expand(batch, count)
        return rows, torch.ones_like(rows, dtype=torch.bool)
    own = (at + call.start).clamp(0, call.key_len - 1)
    visible = (call.key_flags[:, own] & 1 != 0).expand(batch, -1)
    rank = torch.where(visible, at + call.query_len, at)  # tokens before padding, later before earlier
    rows = rank.topk(count, dim=-1).indices.sort(-1).values
    return rows, visible.gather(1, rows)


def block_mass(call: SelectPatternCall, rows: Tensor, known: Tensor, owners: slice, heads: slice) -> Tensor:
    """What the choosing rows give each key block, fp32 [batch, heads, rows, key_blocks]; nothing from rows that are no tokens."""
    key = call.key[:, owners]
    batch, kv_heads, key_len, dim = key.shape
    index = rows[:, None, :, None].expand(batch, heads.stop - heads.start, rows.shape[1], dim)
    query = call.query[:, heads].gather(2, index).reshape(batch, kv_heads, -1, dim)
    scores = (query @ key.mT).float().view(batch, heads.stop - heads.start, rows.shape[1], key_len)
    hidden = torch.arange(key_len, device=key.device) > (rows + call.start)[:, None, :, None]
    if call.key_flags is not None:
        hidden = hidden | (call.key_flags & 1 == 0)[:, None, None]
    scores = scores.mul_(call.scale).masked_fill_(hidden, -torch.inf).softmax(-1)
    scores = scores.nan_to_num_(0.0).mul_(known[:, None, :, None])
    blocks = cdiv(key_len, call.block_size)
    return torch.nn.functional.pad(scores, (0, blocks * call.block_size - key_len)).unflatten(-1, (blocks, call.block_size)).sum(-1)


def _lists(call: SelectPatternCall, mass: Tensor, rows: Tensor, columns: list[int], diagonals: list[int]) -> tuple[Tensor, Tensor]:
    batch, heads, _, blocks = mass.shape
    device = mass.device
    first = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    if call.key_flags is not None:
        first = ((call.key_flags & 1 != 0).int().argmax(-1, keepdim=True) // call.block_size).expand(batch, 1)
    at = torch.arange(blocks, device=device)
    own = torch.div(rows + call.start, call.block_size, rounding_mode="floor").clamp(max=blocks - 1)
    distance = own[:, None, :, None] - at
    by_distance = torch.zeros(batch, heads, blocks, device=device)
    by_distance.scatter_add_(2, distance.clamp(min=0).expand_as(mass).flatten(2), mass.masked_fill(distance < 0, 0).flatten(2))
    by_column = mass.sum(2).masked_fill(at == first[:, :, None], -1.0)
    visited = _best(by_column, columns)  # [batch, heads, most], `blocks` where a head takes fewer
    steps = _best(by_distance.masked_fill(at < 2, -1.0), diagonals)
    steps = torch.cat((torch.arange(2, device=device).expand(batch, heads, 2), steps), -1)
    last = block_lists.last_positions(call.query_len, call.start, call.block_size, device=device)
    own = torch.div(last, call.block_size, rounding_mode="floor").clamp(max=blocks - 1)[:, None]
    shape = (batch, heads, own.shape[0], -1)
    visited = torch.cat((first[:, None].expand(batch, heads, 1), visited), -1)[:, :, None].expand(shape)
    behind = own - steps[:, :, None]
    listed = torch.cat((visited.masked_fill(visited > own, blocks), behind.masked_fill(behind < 0, blocks)), -1).sort(-1).values
    twice = listed[..., 1:] == listed[..., :-1]
    listed = torch.cat((listed[..., :1], listed[..., 1:].masked_fill(twice, blocks)), -1).sort(-1).values
    listed = listed[..., : call.width]
    if listed.shape[-1] < call.width:  # no more are there
        listed = torch.nn.functional.pad(listed, (0, call.width - listed.shape[-1]), value=blocks)
    counts = (listed < blocks).sum(-1, dtype=torch.int32)
    return counts, listed.clamp(max=blocks - 1).to(torch.int16)


def _best(score: Tensor, counts: list[int]) -> Tensor:
    """The indices of the highest scores, int64 [batch, heads, most]: of each head so many; past them the number of scores, as for scores
    below 0."""
    most = min(max(counts), score.shape[-1])
    found = score.topk(most, dim=-1)
    rank = torch.arange(most, device=score.device)
    beyond = rank >= torch.tensor(counts, device=score.device)[:, None]
    return found.indices.masked_fill(beyond | (found.values < 0), score.shape[-1])

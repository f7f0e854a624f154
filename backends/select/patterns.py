"""Columns and diagonals of key blocks, in PyTorch's own operations on every device: the scores are those of a few rows.

Some heads are served after the others, so that no more than `SCORE_BYTES` of scores exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.backends.codegen.launch import on_device
from sparsify.backends.select import block_means
from sparsify.ops import block_lists
from sparsify.ops.limits import cdiv
from sparsify.ops.patterns import SelectPatternCall

SCORE_BYTES = 256 << 20
_SORTED = 8  # numbers of 4 bytes for a place of a table that is sorted
_TABLE_BYTES = 20  # of a block in a table of lists that are being made


Choosing = Callable[[SelectPatternCall, Tensor, Tensor, slice], tuple[Tensor, Tensor]]
Listing = Callable[[SelectPatternCall, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def listed(
    call: SelectPatternCall, columns: Tensor, distances: Tensor, own_choice: Tensor | None = None, *, limit: int = SCORE_BYTES
) -> tuple[Tensor, Tensor]:
    """Block lists of what was chosen, rising.

    Args:
        columns: which key blocks all query blocks visit, bool [batch, heads, blocks of the text], of which the call may have the first.
        distances: at which distances, in blocks, each query block visits one, of the same shape.
        own_choice: what query blocks visit beside, bool [batch, heads, query_blocks, key_blocks].
        limit: bytes of a table at a time, for tests.

    Returns:
        counts: int32 [batch, heads, query_blocks].
        indices: int16 [batch, heads, query_blocks, width]; 0 past the count.
    """
    width, blocks, device = call.width, call.key_blocks, columns.device
    own, at = own_block(call), torch.arange(blocks, device=device)
    behind, seen = (own[:, None] - at).clamp(min=0), at <= own[:, None]
    columns, distances = columns.flatten(0, 1), distances.flatten(0, 1)
    step = max(1, limit // (_TABLE_BYTES * max(1, seen.numel())))
    counts, indices = [], []
    for begin in range(0, columns.shape[0], step):
        table = columns[begin : begin + step, None, :blocks] | distances[begin : begin + step][:, behind]
        if own_choice is not None:
            table = table | own_choice.flatten(0, 1)[begin : begin + step]
        table = table & seen
        place = table.cumsum(-1) - 1
        into = torch.zeros(*table.shape[:2], width + 1, dtype=torch.int16, device=device)
        place = torch.where(table, place.clamp_(max=width), width)
        indices.append(into.scatter_(-1, place, at.to(torch.int16).expand_as(table))[..., :width])
        counts.append(table.sum(-1, dtype=torch.int32).clamp_(max=width))
    shape = (call.query.shape[0], -1, *seen.shape[:1])
    return torch.cat(counts).view(shape), torch.cat(indices).view(*shape, width)


def own_block(call: SelectPatternCall) -> Tensor:
    """The block of keys that each query block's last row is in, int64 [query_blocks]."""
    last = block_lists.last_positions(call.query_len, call.start, call.block_size, device=call.query.device)
    return torch.div(last, call.block_size, rounding_mode="floor").clamp(max=call.key_blocks - 1)


def select_pattern(
    call: SelectPatternCall, *, limit: int = SCORE_BYTES, choosing: Choosing | None = None, listing: Listing = listed
) -> tuple[Tensor, Tensor]:
    """The op, of a call that was checked.

    Args:
        limit: bytes of scores at a time, for tests.
        choosing: as `chosen`, which serves where there is none. listing: makes lists of what was chosen.
    """
    choosing = choosing or chosen
    counts, indices = call.empty_lists()
    if 0 in counts.shape or call.key_len == 0:
        return counts.zero_(), indices.zero_()
    rows, known = last_rows(call)
    kv_heads = call.key.shape[1]
    group = call.heads // kv_heads
    places = max(rows.shape[1] * call.key_len, call.by_block * _SORTED * call.query_blocks * call.key_blocks)
    each = 4 * call.query.shape[0] * group * places
    step = max(1, min(kv_heads, limit // each))
    first, found = first_block(call), []
    for begin in range(0, kv_heads, step):
        heads = slice(begin * group, min(kv_heads, begin + step) * group)
        mass = block_mass(call, rows, known, slice(begin, begin + step), heads)
        at = torch.arange(call.key_blocks, device=mass.device)
        sums = summed(mass, own_blocks(call, rows), at, call.key_blocks)
        columns, distances = choosing(call, sums, first, heads)
        if not call.by_block:
            found.append((columns, distances))
            continue
        own_choice = _own_choice(call, sums[0], (rows, known), first, (heads, slice(begin, begin + step)))
        if call.divergence:
            blocks_alone = own_choice.flatten(2).any(-1)[..., None]
            columns, distances = columns & ~blocks_alone | _first(at, first), distances & ~blocks_alone | (at < 2)
        found.append((columns, distances, own_choice))
    return listing(call, *(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _own_choice(
    call: SelectPatternCall, by_column: Tensor, choosing: tuple[Tensor, Tensor], first: Tensor, part: tuple[slice, slice]
) -> Tensor:
    """What query blocks visit by their own choice, bool [batch, heads, query_blocks, key_blocks]. Under a divergence it is all that a head
    visits, or nothing, as of heads that have no blocks to choose.

    Args:
        by_column: of `summed`, of these heads. choosing: of `last_rows`. first: of `first_block`.
        part: query heads and KV heads.
    """
    heads, owners = part
    at, own = torch.arange(call.key_blocks, device=by_column.device), own_block(call)
    key = block_means.means(call.key[:, owners], None if call.key_flags is None else call.key_flags & 1 != 0, call.block_size)
    visible = None
    if call.key_flags is not None:
        visible = call.key_flags[:, (torch.arange(call.query_len, device=at.device) + call.start).clamp(0, call.key_len - 1)] & 1 != 0
    query = block_means.means(call.query[:, heads], visible, call.block_size)
    weights = block_means.estimate(call, query, key, own)
    behind = own[:, None] - at
    always = (_first(at, first)[:, :, None] | ((behind == 0) | (behind == 1))).expand_as(weights)
    most = head_counts(call, at.device)[2, heads, None, None]
    found = _best(weights, always, most, call.mass)
    if not call.divergence:
        return found
    rows, known = choosing
    last = rows_at(call.query[:, heads], rows).float().mul_(known[:, None, :, None]).sum(2, keepdim=True)
    last = last / known.sum(-1).clamp(min=1)[:, None, None, None]
    guessed = block_means.estimate(call, last, key, own_blocks(call, rows).amax(-1, keepdim=True))[:, :, 0]
    near = block_means.divergence(guessed, by_column / by_column.sum(-1, keepdim=True).clamp(min=1e-30)) < call.divergence
    return (found | always) & near[..., None, None] & (most > 0)


def _first(at: Tensor, first: Tensor) -> Tensor:
    """The column that is visited in any case, bool [batch, 1, blocks]."""
    return at == first[:, :, None]


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
    key, positions = call.key[:, owners], torch.arange(call.key_len, device=call.key.device)
    query = rows_at(call.query[:, heads], rows)
    weights = scores(query, key, rows + call.start, positions, call.key_flags, call.scale).softmax(-1)
    return in_blocks(weights.nan_to_num_(0.0).mul_(known[:, None, :, None]), call.block_size)


def rows_at(query: Tensor, rows: Tensor) -> Tensor:
    """Rows of [batch, heads, query_len, head_dim], by their numbers, int64 [batch, rows]."""
    batch, heads, _, dim = query.shape
    return query.gather(2, rows[:, None, :, None].expand(batch, heads, rows.shape[1], dim))


def scores(query: Tensor, key: Tensor, rows: Tensor, positions: Tensor, key_flags: Tensor | None, scale: float) -> Tensor:
    """Logits of choosing rows, fp32 [batch, heads, rows, keys], -inf at keys that a row does not see.

    Args:
        query: [batch, heads, rows, head_dim].
        key: [batch, kv_heads, keys, head_dim].
        rows: positions of the rows among all keys, int64 [batch, rows].
        positions: of these keys among all, int64 [keys], rising.
        key_flags: of these keys, [batch or 1, keys].
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    found = (grouped @ key.mT).float().view(*query.shape[:3], key.shape[2])
    hidden = positions > rows[:, None, :, None]
    if key_flags is not None:
        hidden = hidden | (key_flags & 1 == 0)[:, None, None]
    return found.mul_(scale).masked_fill_(hidden, -torch.inf)


def in_blocks(weights: Tensor, block: int) -> Tensor:
    """[..., keys] summed up to [..., blocks]."""
    blocks = cdiv(weights.shape[-1], block)
    return torch.nn.functional.pad(weights, (0, blocks * block - weights.shape[-1])).unflatten(-1, (blocks, block)).sum(-1)


def own_blocks(call: SelectPatternCall, rows: Tensor) -> Tensor:
    """The key block that each row is in, int64 of the shape of `rows`."""
    return torch.div(rows + call.start, call.block_size, rounding_mode="floor").clamp(max=call.key_blocks - 1)


def first_block(call: SelectPatternCall) -> Tensor:
    """The block of each batch row's first visible key, int64 [batch, 1]."""
    batch = call.query.shape[0]
    if call.key_flags is None:
        return torch.zeros(batch, 1, dtype=torch.int64, device=call.query.device)
    return ((call.key_flags & 1 != 0).int().argmax(-1, keepdim=True) // call.block_size).expand(batch, 1)


def summed(mass: Tensor, own: Tensor, at: Tensor, blocks: int) -> Tensor:
    """What key blocks get of all choosing rows, by column and by distance from the row's own block, fp32 [2, batch, heads, blocks].

    Args:
        mass: [batch, heads, rows, n].
        own: of each row, int64 [batch, rows].
        at: which blocks the mass is of, int64 [n].
        blocks: of the whole text.
    """
    found = mass.new_zeros(2, *mass.shape[:2], blocks)
    found[0].index_copy_(-1, at, mass.sum(2))
    distance = own[:, None, :, None] - at
    found[1].scatter_add_(2, distance.clamp(min=0).expand_as(mass).flatten(2), mass.masked_fill(distance < 0, 0).flatten(2))
    return found


def chosen(call: SelectPatternCall, sums: Tensor, first: Tensor, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Which columns and which distances some heads visit, bool [batch, heads, blocks] each: those that are always visited too.

    Args:
        call: whose numbers these are.
        sums: of `summed`, over all blocks of the text and of these heads.
        first: of `first_block`, of the whole text.
    """
    at = torch.arange(sums.shape[-1], device=sums.device)
    always = _first(at, first), at < 2
    counts = head_counts(call, sums.device)[:2, heads]
    found = []
    for score, forced, most in zip(sums, always, counts, strict=True):
        forced = forced.expand_as(score)
        found.append(forced | _best(score, forced, most[:, None], call.mass))
    return found[0], found[1]


def head_counts(call: SelectPatternCall, device: torch.device) -> Tensor:
    """Columns, diagonals and blocks of their own choice that each head may have, integers [3, heads]."""
    if call.head_columns is not None and call.head_diagonals is not None:
        blocks = torch.zeros_like(call.head_columns) if call.head_blocks is None else call.head_blocks
        return torch.stack((call.head_columns, call.head_diagonals, blocks))
    numbers = call.columns, call.diagonals, call.blocks or (0,)
    return torch.stack([on_device(one, device).expand(call.heads) for one in numbers])


def _best(score: Tensor, forced: Tensor, most: Tensor, mass: float) -> Tensor:
    """Which are the highest scores beside forced ones, bool of their shape [batch, heads, ..., blocks]; of equal ones the earlier.

    most: how many, [heads, ..., 1]. mass: where positive, as few as hold this share together with the forced ones.
    """
    found = score.masked_fill(forced, -1.0).sort(dim=-1, descending=True, stable=True)
    kept = (torch.arange(score.shape[-1], device=score.device) < most) & (found.values >= 0)
    if mass:
        values = found.values.clamp(min=0).double()
        before = values.cumsum(-1) - values + score.masked_fill(~forced, 0).sum(-1, keepdim=True)
        kept &= before < mass * score.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(kept).scatter_(-1, found.indices, kept)

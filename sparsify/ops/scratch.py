"""Memory that block-sparse attention needs beside its operands and its output, and how it is kept small by serving some heads at a time.

Block lists are rectangles of int16, 2 · (length / block)² bytes for each head: 4.3 GB for 32 heads at a million tokens. Beyond
`LIST_BYTES` they are made and used for some batch rows, KV heads or query heads after the others. Block sums of the estimate have a
limit of their own (`SUM_BYTES`), beyond which they are served in parts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from sparsify.ops.estimate import EXACT, Estimate, Pool
from sparsify.ops.limits import SCORE_TILE, SCORE_TILE_INT8, WIDEST_ROW, cdiv
from sparsify.ops.streaming import faster, too_long

LIST_BYTES = 9 << 26  # a group of four heads at a million tokens, counts included
SUM_BYTES = 5 << 27  # 32 heads at 128K tokens and stride 16
_CELL_TILE = min(SCORE_TILE[1], SCORE_TILE_INT8[1])
_BAND_CELLS = 16 * 128  # the fewest query cells that are served at once

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Part:
    """What is selected and attended at once, as half-open ranges.

    batch: batch rows.
    kv_heads: KV heads.
    heads: the query heads that read them.
    """

    batch: tuple[int, int]
    kv_heads: tuple[int, int]
    heads: tuple[int, int]

    def of_heads(self, query: Tensor) -> Tensor:
        """Of an operand [batch, heads, ...]."""
        return query[slice(*self.batch), slice(*self.heads)]

    def of_kv_heads(self, operand: Tensor) -> Tensor:
        """Of an operand [batch, kv_heads, ...]."""
        return operand[slice(*self.batch), slice(*self.kv_heads)]

    def of_rows(self, operand: Tensor | None) -> Tensor | None:
        """Of an operand [batch or 1, ...]."""
        return operand if operand is None or operand.shape[0] == 1 else operand[slice(*self.batch)]

    def numbers(self, numbers: tuple[N, ...], heads: int) -> tuple[N, ...]:
        """Of numbers that are one for all of `heads` heads, or one each."""
        return numbers[slice(*self.heads)] if len(numbers) == heads > 1 else numbers


def list_bytes(query_len: int, key_len: int, block: int) -> int:
    """Bytes of the counts and indices of one query head.

    Args:
        query_len, key_len: tokens.
        block: query rows and keys of a block.
    """
    return cdiv(query_len, block) * (4 + 2 * cdiv(key_len, block))


def parts(batch: int, heads: int, kv_heads: int, head_bytes: int, limit: int, splits_groups: bool = True) -> Iterator[Part]:
    """Everything at once when its lists fit in `limit` bytes; else whole batch rows, else whole KV heads of one batch row, else query
    heads of one KV head. A single head is served whatever it takes, and a group where `splits_groups` is false.

    Args:
        batch: batch rows.
        heads, kv_heads: query heads, and KV heads.
        head_bytes: bytes that one query head of one batch row takes.
        limit: bytes that one part may take.
        splits_groups: whether query heads of one KV head may be apart: an estimate that they share needs all of them.
    """
    group = heads // kv_heads
    if batch * heads * head_bytes <= limit:
        yield Part((0, batch), (0, kv_heads), (0, heads))
        return
    rows = limit // (heads * head_bytes)
    if rows:
        for b in range(0, batch, rows):
            yield Part((b, min(b + rows, batch)), (0, kv_heads), (0, heads))
        return
    whole = limit // (group * head_bytes)
    for b in range(batch):
        if whole or not splits_groups:
            step = _even(kv_heads, max(1, whole))
            for g in range(0, kv_heads, step):
                end = min(g + step, kv_heads)
                yield Part((b, b + 1), (g, end), (g * group, end * group))
            continue
        step = _even(group, max(1, limit // head_bytes))
        for g in range(kv_heads):
            for h in range(0, group, step):
                yield Part((b, b + 1), (g, g + 1), (g * group + h, g * group + min(h + step, group)))


def _even(count: int, step: int) -> int:
    """The step that makes no more parts than `step`, of nearly equal size."""
    return cdiv(count, cdiv(count, min(step, count)))


def places(first: int, last: int, query_len: int, key_blocks: int, start: int | None, block: int) -> int:
    """Key blocks that the query blocks from `first` to before `last` of one head see, together.

    Args:
        start: key position of query row 0, under causality; None: every block counts for all keys.
    """
    blocks = last - first
    if start is None:
        return blocks * key_blocks
    seen = max(0, cdiv(min((first + 1) * block, query_len) + start, block))
    return blocks * seen + blocks * (blocks - 1) // 2


@dataclass(frozen=True)
class Logs:
    """Logarithms of masses, fp16, that kernels whose query cells stay while keys pass by write at once.

    place_bytes: for a key block, of all query heads of a KV head and all cells of a query block.
    places: of one head.
    blocks, key_blocks: of a head.
    """

    place_bytes: int
    places: int
    blocks: int
    key_blocks: int

    @property
    def head_bytes(self) -> int:
        """Of a KV head."""
        return self.place_bytes * self.places

    def at_once(self, batch: int, kv_heads: int, limit: int, unit: int = 1) -> tuple[int, int, int]:
        """Batch rows, KV heads and query blocks that are served at once: all, else some KV heads of one batch row, else some blocks of one.

        Args:
            limit: bytes. unit: query blocks of a tile.
        """
        if self.head_bytes * kv_heads * batch <= limit:
            return batch, kv_heads, self.blocks
        if self.head_bytes <= limit:
            return 1, _even(kv_heads, limit // self.head_bytes), self.blocks
        step = max(1, limit // (self.place_bytes * self.key_blocks * unit)) * unit
        return 1, 1, cdiv(_even(self.blocks, step), unit) * unit


def scratch_bytes(
    batch: int,
    heads: int,
    kv_heads: int,
    query_len: int,
    key_len: int,
    head_dim: int,
    *,
    stride: int,
    block: int,
    estimate: Estimate = EXACT,
    pool: Pool = "max",
    refine_stride: int = 0,
    item_bytes: int = 2,
) -> int:
    """Bytes of device memory that xattention needs at most at a causal site beside query, key, value, output and LSE.

    The block lists of one part, those of a first stage, and what the estimate needs: block sums and maxima or logarithms of masses, a
    group's mean queries, means of neighbours, copies in 8 bits. Not counted: masks of padding and segments, some bytes for each key, a
    mean of the keys, and copies of queries and keys where there is padding, where kernels cannot read their strides, or where the exact
    estimate's last cell is not whole.

    Args:
        stride: tokens that one score spans.
        block: query rows and keys of a block.
        pool: how a query block's cells are combined.
        refine_stride: of a second stage; 0: none.
        item_bytes: bytes of a number of query and key.
    """
    shared = estimate.group
    each = list_bytes(query_len, key_len, block)
    # what heads of a group share needs all of them
    found = parts(batch, heads, kv_heads, each, LIST_BYTES, not (shared or refine_stride))
    part = max(found, key=lambda part: (part.batch[1] - part.batch[0]) * (part.heads[1] - part.heads[0]))
    rows, served, owners = (last - first for first, last in (part.batch, part.heads, part.kv_heads))
    lists = rows * served * each
    long = too_long(cdiv(key_len, block))
    if refine_stride and long:
        stride, refine_stride = refine_stride, 0
    sizes = _Sizes(rows, owners, served // owners, query_len, key_len, head_dim, block, estimate, item_bytes)
    if refine_stride:
        return lists + rows * owners * each + sizes.streamed(stride, refine_stride)
    if faster(pool, estimate, stride, head_dim) and not shared and not long:
        return lists + sizes.streamed(stride)
    return lists + sizes.passed_over(stride, heads // kv_heads)


@dataclass(frozen=True)
class _Sizes:
    """What a part's estimate is of: batch rows, KV heads, query heads of each, tokens, head dim, a block's tokens, bytes of a number."""

    batch: int
    kv_heads: int
    group: int
    query_len: int
    key_len: int
    head_dim: int
    block: int
    estimate: Estimate
    item_bytes: int

    def streamed(self, stride: int, refine_stride: int = 0) -> int:
        """By kernels whose query cells stay while keys pass by, in one stage or two: logarithms, and cells that are made first, of as many
        heads as the first stage scores at once."""
        strides = (stride, refine_stride) if refine_stride else (stride,)
        rows, kv_heads, _ = self._logs(stride).at_once(self.batch, self.kv_heads, SUM_BYTES)
        kept = max(self._log_bytes(one, rows, kv_heads) for one in strides)
        # the second stage's cells are cut out of the first's, but of every second query cell, which are others
        made = strides if self.estimate.half else strides[:1]
        return kept + max(self.cells(one, rows * kv_heads, self.group) for one in made)

    def _logs(self, stride: int) -> Logs:
        blocks, key_blocks = cdiv(self.query_len, self.block), cdiv(self.key_len, self.block)
        seen = places(0, blocks, self.query_len, key_blocks, self.key_len - self.query_len, self.block)
        return Logs(2 * self.group * (self.block // self.estimate.span(stride)), seen, blocks, key_blocks)

    def _log_bytes(self, stride: int, batch: int, kv_heads: int) -> int:
        logs = self._logs(stride)
        if logs.head_bytes > SUM_BYTES:
            return max(SUM_BYTES, logs.place_bytes * logs.key_blocks)
        rows, owners, _ = logs.at_once(batch, kv_heads, SUM_BYTES)
        return rows * owners * logs.head_bytes

    def passed_over(self, stride: int, shared: int) -> int:
        """By kernels that read the keys anew for each tile of query cells: block sums and maxima, and what the estimate makes first.

        Args:
            shared: query heads of a KV head, all of them, which may have one estimate.
        """
        estimate = self.estimate
        cells = cdiv(self.query_len, estimate.span(stride))
        scored = 1 if estimate.group else self.group  # heads of one KV head
        # as the launcher shares sums out: all, else some KV heads of one batch row, else some rows of one
        cell_bytes = _cell_bytes(self.key_len, stride, self.block, shared if estimate.group else 1, self.query_len, cells)
        owner_sums = scored * cells * cell_bytes
        owners = self.batch * self.kv_heads
        at_once = owners if owners * owner_sums <= SUM_BYTES else max(1, min(self.kv_heads, SUM_BYTES // owner_sums))
        band = owner_sums * min(1.0, _BAND_CELLS / cells)
        sums = at_once * owner_sums if owner_sums <= SUM_BYTES else int(max(SUM_BYTES, band))
        means = at_once * scored * self.query_len * self.head_dim * self.item_bytes if estimate.group else 0
        return sums + means + self.cells(stride, at_once, scored)

    def cells(self, stride: int, kv_heads: int, scored: int) -> int:
        """Cells that are made before they are multiplied, with their scales. scored: heads of a KV head."""
        if not self.estimate.prepared:
            return 0
        numbers = stride // self.estimate.merge * cdiv(self.head_dim, 16) * 16
        count = scored * cdiv(self.query_len, self.estimate.span(stride)) + cdiv(self.key_len, stride)
        return kv_heads * count * (numbers + 4 if self.estimate.int8 else numbers * self.item_bytes)


def _cell_bytes(key_len: int, stride: int, block: int, shared: int, query_len: int, cells: int) -> int:
    """Block sums (fp16) and tile maxima (fp32) of one query cell, and its part of the importances (fp32) where rows are long."""
    tiles = cdiv(key_len, stride * _CELL_TILE)
    blocks = (1 << (tiles - 1).bit_length()) * (_CELL_TILE * stride // block)
    importances = 4 * cdiv(key_len, block) * shared * cdiv(query_len, block) // cells if blocks > WIDEST_ROW else 0
    return tiles * (2 * _CELL_TILE * stride // block + 4) + importances

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

from sparsify.ops.estimate import EXACT, Estimate
from sparsify.ops.limits import SCORE_TILE, SCORE_TILE_INT8, cdiv

LIST_BYTES = 9 << 26  # a group of four heads at a million tokens, counts included
SUM_BYTES = 5 << 27  # 32 heads at 128K tokens and stride 16
WIDEST_ROW = 8192  # key blocks of a row that the choice keeps in registers
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
    item_bytes: int = 2,
) -> int:
    """Bytes of device memory that xattention needs at most at a site beside query, key, value, output and LSE.

    The block lists of one part, and what its estimate needs: block sums and maxima, a group's mean queries, means of neighbours, copies
    in 8 bits. Not counted: masks of padding and segments, some bytes for each key, and copies of queries and keys where there is padding,
    where kernels cannot read their strides, or where the exact estimate's last cell is not whole.

    Args:
        stride: tokens that one score spans.
        block: query rows and keys of a block.
        item_bytes: bytes of a number of query and key.
    """
    group, shared = heads // kv_heads, estimate.group
    each = list_bytes(query_len, key_len, block)
    found = parts(batch, heads, kv_heads, each, LIST_BYTES, not shared)
    part = max(found, key=lambda part: (part.batch[1] - part.batch[0]) * (part.heads[1] - part.heads[0]))
    rows, served, owners = (last - first for first, last in (part.batch, part.heads, part.kv_heads))
    lists = rows * served * each
    cells = cdiv(query_len, estimate.span(stride))
    scored = 1 if shared else served // owners  # heads of one KV head
    # as the launcher shares sums out: all, else some KV heads of one batch row, else some rows of one
    owner_sums = scored * cells * _cell_bytes(key_len, stride, block, group if shared else 1, query_len, cells)
    at_once = rows * owners if rows * owners * owner_sums <= SUM_BYTES else max(1, min(owners, SUM_BYTES // owner_sums))
    band = owner_sums * min(1.0, _BAND_CELLS / cells)
    sums = at_once * owner_sums if owner_sums <= SUM_BYTES else int(max(SUM_BYTES, band))
    copies = at_once * scored * query_len * head_dim * item_bytes if shared else 0
    if estimate.int8 and not shared:  # logarithms of masses take 2 bytes for each block that a causal row sees, so that more fit
        at_once = max(at_once, min(rows * owners, 3 * SUM_BYTES // owner_sums))
    if estimate.prepared:
        numbers = stride // estimate.merge * cdiv(head_dim, 16) * 16
        key_cells = cdiv(key_len, stride)
        copies += at_once * (scored * cells + key_cells) * (numbers + 4 if estimate.int8 else numbers * item_bytes)
    return lists + sums + copies


def _cell_bytes(key_len: int, stride: int, block: int, shared: int, query_len: int, cells: int) -> int:
    """Block sums (fp16) and tile maxima (fp32) of one query cell, and its part of the importances (fp32) where rows are long."""
    tiles = cdiv(key_len, stride * _CELL_TILE)
    blocks = (1 << (tiles - 1).bit_length()) * (_CELL_TILE * stride // block)
    importances = 4 * cdiv(key_len, block) * shared * cdiv(query_len, block) // cells if blocks > WIDEST_ROW else 0
    return tiles * (2 * _CELL_TILE * stride // block + 4) + importances

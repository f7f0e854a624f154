"""What a block selection chose, small enough to be looked at: visited blocks counted by cell of a coarse grid, for every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.graph.typed_torch import as_floats
from sparsify.ops import block_lists
from sparsify.ops.block_lists import Listing
from sparsify.ops.limits import cdiv

SIDE = 64  # cells of a map along queries and along keys, at most
_AT_ONCE = 1 << 22  # list entries that are counted at once


@dataclass(frozen=True)
class BlockMap:
    """Visited blocks of one call that makes block lists, summed over the batch, on the CPU.

    visited: int32 [query_heads, rows, columns], blocks that are listed, by cell; cells divide query and key blocks evenly.
    possible: int32 [rows, columns], blocks that causality allows there.
    density: visited share of the possible blocks by query head, 0 to 1.
    query_len, key_len: tokens.
    block_size: tokens of a block.
    """

    visited: Tensor
    possible: Tensor
    density: tuple[float, ...]
    query_len: int
    key_len: int
    block_size: int

    @property
    def weight(self) -> int:
        """How many blocks its heads could visit, in comparison with other maps."""
        return int(self.possible.sum()) * self.visited.shape[0]

    def shares(self, side: int) -> Tensor:
        """Visited share of the possible blocks in a grid of at most `side` rows and columns.

        Returns:
            float32 [query_heads, rows, columns], 0 to 1; NaN where no block is possible.
        """
        visited, possible = (_coarser(counts, side).float() for counts in (self.visited, self.possible))
        return torch.where(possible > 0, visited / possible.clamp(min=1), torch.nan)


def block_map(call: Listing, counts: Tensor, indices: Tensor, side: int = SIDE) -> BlockMap:
    """The map of one call. Reads device tensors: synchronises.

    Args:
        counts, indices: the block lists that the call gave, as `sparsify.ops.block_lists` describes them.
        side: cells along queries and along keys, at most.
    """
    query_blocks, key_blocks = indices.shape[-2], cdiv(int(call.key_len), call.block_size)
    allowed = block_lists.causal_blocks(call.query_len, call.key_len, call.start, call.block_size, device=counts.device)
    if not call.causal:
        allowed = torch.full_like(allowed, key_blocks)
    every = torch.arange(key_blocks, device=counts.device).expand(query_blocks, -1)
    cells = _cells(counts.flatten(0, -2), indices.flatten(0, -3), key_blocks, side)
    visited = cells.reshape(*counts.shape[:-1], *cells.shape[1:]).sum(0, dtype=torch.int32)
    possible = _cells(allowed[None], every[None], key_blocks, side)[0] * counts.shape[0]
    per_head = visited.sum((-1, -2)).double() / possible.sum().clamp(min=1)
    return BlockMap(visited.cpu(), possible.cpu(), tuple(as_floats(per_head)), int(call.query_len), int(call.key_len), call.block_size)


def _cells(counts: Tensor, indices: Tensor, key_blocks: int, side: int) -> Tensor:
    """How many listed blocks fall into each cell: int32 [heads, rows, columns] for lists [heads, query_blocks] and [..., width]."""
    heads, query_blocks, width = indices.shape
    rows, columns = min(side, query_blocks), min(side, key_blocks)
    cells = torch.zeros(heads * rows * columns, dtype=torch.int32, device=counts.device)
    row = torch.arange(query_blocks, device=counts.device) * rows // query_blocks
    first = (torch.arange(heads, device=counts.device)[:, None] * rows + row).flatten() * columns
    counts, indices = counts.flatten(), indices.flatten(0, 1)
    place = torch.arange(width, device=counts.device)
    step = max(1, _AT_ONCE // width)
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        listed = place < counts[part, None]
        # entries past the count are unspecified: they count 0, wherever they point
        column = torch.where(listed, indices[part].long(), 0) * columns // key_blocks
        cells.scatter_add_(0, (first[part, None] + column).flatten(), listed.flatten().int())
    return cells.view(heads, rows, columns)


def _coarser(counts: Tensor, side: int) -> Tensor:
    """Neighbouring cells summed until no dimension has more than `side`."""
    for dim in (-2, -1):
        size = counts.shape[dim]
        if size > side:
            to = torch.arange(size) * side // size
            shape = list(counts.shape)
            shape[dim] = side
            counts = torch.zeros(shape, dtype=counts.dtype).index_add_(dim, to, counts)
    return counts

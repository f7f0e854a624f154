"""Maps of chosen blocks against tables of all blocks."""

from __future__ import annotations

import pytest
import torch

from sparsify.ops import block_lists
from sparsify.ops.block_maps import _AT_ONCE, block_map
from sparsify.ops.selection import SelectCall


def lists(query_blocks: int, key_blocks: int, *, batch: int = 2, heads: int = 3, causal: bool = True):
    """A call, its lists and the table of all blocks; entries past the counts point anywhere."""
    block, generator = 64, torch.Generator().manual_seed(query_blocks)
    query = torch.empty(batch, heads, block * query_blocks - 5, 8, device="meta")
    key = torch.empty(batch, heads, block * key_blocks - 5, 8, device="meta")
    call = SelectCall(query, key, scale=1.0, causal=causal, block_size=block, threshold=(0.9,))
    possible = block_lists.causal_blocks(call.query_len, call.key_len, call.start, block)
    possible = possible if causal else torch.full_like(possible, key_blocks)
    allowed = torch.arange(key_blocks) < possible[:, None]
    keep = (torch.rand(batch, heads, query_blocks, key_blocks, generator=generator) < 0.3) & allowed
    counts, indices = block_lists.from_dense(keep)
    indices[torch.arange(key_blocks) >= counts[..., None]] = -7
    return call, counts, indices, keep, allowed


@pytest.mark.parametrize(("query_blocks", "key_blocks", "side"), [(5, 5, 64), (9, 9, 4), (3, 11, 4), (40, 40, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_cells_count_the_blocks_in_them(query_blocks, key_blocks, side, causal):
    call, counts, indices, keep, allowed = lists(query_blocks, key_blocks, causal=causal)
    found = block_map(call, counts, indices, side)
    rows, columns = min(side, query_blocks), min(side, key_blocks)
    assert found.visited.shape == (3, rows, columns)
    row, column = torch.arange(query_blocks) * rows // query_blocks, torch.arange(key_blocks) * columns // key_blocks
    for y in range(rows):
        for x in range(columns):
            inside = (row == y)[:, None] & (column == x)
            assert found.visited[:, y, x].tolist() == keep[..., inside].sum((0, 2)).tolist()
            assert found.possible[y, x] == 2 * allowed[inside].sum()
    per_head, _ = block_lists.density(counts, call.query_len, call.key_len, int(call.start), 64, causal=causal)
    assert torch.allclose(torch.tensor(found.density, dtype=torch.float64), per_head.mean(0))


def test_long_lists_are_counted_in_pieces(monkeypatch):
    call, counts, indices, keep, _ = lists(40, 40)
    whole = block_map(call, counts, indices, 8)
    monkeypatch.setattr("sparsify.ops.block_maps._AT_ONCE", 100)
    pieces = block_map(call, counts, indices, 8)
    assert torch.equal(whole.visited, pieces.visited) and int(whole.visited.sum()) == int(keep.sum()) and keep.numel() < _AT_ONCE


def test_coarser_maps_hold_the_same_blocks():
    call, counts, indices, keep, allowed = lists(40, 40)
    fine = block_map(call, counts, indices, 40)
    shares = fine.shares(40)
    assert torch.equal(shares.isnan()[0], ~allowed) and torch.equal(shares[:, allowed] > 0, keep.any(0)[:, allowed])
    assert torch.equal(fine.shares(8).nan_to_num(-1), block_map(call, counts, indices, 8).shares(8).nan_to_num(-1))

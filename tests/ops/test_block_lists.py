from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import VerifyError
from sparsify.ops import block_lists


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_lists_and_tables_are_two_views_of_one_thing(rows):
    keep = torch.tensor(rows)[None, None]
    counts, indices = block_lists.from_dense(keep)
    assert counts.dtype == torch.int32 and indices.dtype == torch.int16
    assert torch.equal(block_lists.to_dense(counts, indices, 5), keep)
    block_lists.check(counts, indices, 10 * len(rows), 50, 0, 10, causal=False)


def test_entries_past_the_count_are_ignored():
    indices = torch.tensor([[[[0, 32000, -7]]]], dtype=torch.int16)
    assert block_lists.to_dense(torch.tensor([[[1]]]), indices, 3).tolist() == [[[[True, False, False]]]]
    block_lists.check(torch.tensor([[[1]]]), indices, 8, 24, 0, 8)


@pytest.mark.parametrize(
    "query_len, key_len, start, want", [(40, 40, 0, [1, 2, 3]), (20, 60, 40, [4, 4]), (20, 60, 7, [2, 2]), (40, 10, -30, [0, 1, 1])]
)
def test_causal_blocks(query_len, key_len, start, want):
    assert block_lists.causal_blocks(query_len, key_len, start, 16).tolist() == want
    by_hand = [
        len({k // 16 for k in range(key_len) for q in range(i, min(i + 16, query_len)) if k <= q + start}) for i in range(0, query_len, 16)
    ]
    assert by_hand == want


def test_density_counts_causal_blocks():
    counts = torch.tensor([[[1, 2, 3, 4], [1, 1, 1, 2]]])
    per_head, mean = block_lists.density(counts, 64, 64, 0, 16)
    assert per_head.tolist() == [[1.0, 0.5]] and mean == 0.75
    assert block_lists.density(counts, 64, 64, 0, 16, causal=False)[1] == pytest.approx(7.5 / 16)


@pytest.mark.parametrize(
    "counts, indices, match",
    [
        ([1, 3], [[0, 1], [0, 1]], "count is out of range"),
        ([1, 2], [[0, 1], [0, 2]], "index is out of range"),
        ([1, 2], [[0, 1], [1, 0]], "do not rise"),
        ([1, 2], [[0, 1], [1, 1]], "do not rise"),
        ([2, 2], [[0, 1], [0, 1]], "no row of its query block"),
        ([1], [[0, 1]], "do not fit"),
    ],
)
def test_bad_lists_are_found(counts, indices, match):
    with pytest.raises(VerifyError, match=match):
        block_lists.check(torch.tensor(counts), torch.tensor(indices), 32, 32, 0, 16)

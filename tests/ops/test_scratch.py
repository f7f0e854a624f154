"""Memory of block-sparse attention: how heads are parted, and what the parts need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.ops.estimate import EXAMPLES
from sparsify.ops.scratch import LIST_BYTES, list_bytes, parts, scratch_bytes

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5))


@given(SIZES, st.integers(1, 100), st.integers(1, 5000), st.booleans())
def test_parts_cover_every_head_once_and_stay_below_the_limit(sizes, head_bytes, limit, splits):
    batch, kv_heads, group = sizes
    seen = []
    for part in parts(batch, kv_heads * group, kv_heads, head_bytes, limit, splits):
        rows, heads = range(*part.batch), range(*part.heads)
        seen += [(b, h) for b in rows for h in heads]
        assert [h // group for h in (heads[0], heads[-1])] == [part.kv_heads[0], part.kv_heads[1] - 1]
        whole = len(heads) == group * (part.kv_heads[1] - part.kv_heads[0])
        assert whole or (splits and part.kv_heads[1] - part.kv_heads[0] == 1)
        # an LSE's rows of several batch rows lie side by side for all heads alone
        assert len(rows) == 1 or len(heads) == kv_heads * group
        smallest = 1 if splits else group
        assert len(rows) * len(heads) * head_bytes <= limit or (len(rows), len(heads)) == (1, smallest)
    assert sorted(seen) == [(b, h) for b in range(batch) for h in range(kv_heads * group)]


def test_lists_that_fit_are_made_at_once():
    found = list(parts(2, 32, 8, list_bytes(131072, 131072, 128), LIST_BYTES))
    assert len(found) == 1 and found[0].heads == (0, 32) and found[0].batch == (0, 2)
    assert len(list(parts(1, 32, 8, list_bytes(1 << 20, 1 << 20, 128), LIST_BYTES))) == 8


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("estimate", EXAMPLES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 8, 32])
def test_two_gigabytes_are_enough_for_a_million_tokens(stride, estimate, kv_heads):
    needed = scratch_bytes(1, 32, kv_heads, 1 << 20, 1 << 20, 128, stride=stride, block=128, estimate=estimate)
    if estimate.group and kv_heads == 1:
        assert needed > 2e9, "all query heads share one estimate: they cannot be parted"
    else:
        assert needed <= 2e9


def test_memory_grows_with_the_prompt_until_it_is_parted():
    needed = [scratch_bytes(1, 32, 8, n, n, 128, stride=16, block=128) for n in (1 << 14, 1 << 17, 1 << 18, 1 << 20)]
    assert needed[0] < 20e6 < needed[1] and max(needed) < 1.4e9

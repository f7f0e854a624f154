"""How a text is divided: every token once, as even as causal attention asks, in blocks where there are enough of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.distributed import exchange, sequence
from sparsify.distributed.sequence import BLOCK, Division
from sparsify.distributed.shards import Shard
from sparsify.errors import DistributedError

sizes = st.integers(1, 9)
tokens = st.integers(1, 5000)


def divisions(count: int, size: int) -> list[Division]:
    return [Division.of(count, Shard(rank, size, "group")) for rank in range(size)]


@given(tokens, sizes)
def test_every_token_has_one_process_that_has_two_at_least(count, size):
    if count < 4 * size:
        for rank in range(size):
            with pytest.raises(DistributedError, match=f"{count} tokens is shorter than 4 for each of the {size} processes"):
                Division.of(count, Shard(rank, size, "group"))
        return
    parts = [division.positions("cpu") for division in divisions(count, size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert all(len(part) == division.count() >= 2 for part, division in zip(parts, divisions(count, size), strict=True))
    assert all((part[1:] > part[:-1]).all() for part in parts)
    assert parts[0][0] == 0


@given(st.integers(1, 9), st.integers(1, 40))
def test_causal_attention_is_as_much_for_each(size, chunk):
    whole = chunk * BLOCK * 2 * size
    work = [int((division.positions("cpu") + 1).sum()) for division in divisions(whole, size)]
    assert max(work) == min(work)
    assert all(division.aligned and division.chunk == chunk * BLOCK for division in divisions(whole, size))


@given(tokens, sizes)
def test_parts_go_back_in_order(count, size):
    if count < 4 * size:
        return
    found = divisions(count, size)
    text = torch.arange(count)[None].expand(2, -1)
    parts = [torch.nn.functional.pad(division.own(text, 1), (0, rank)) for rank, division in enumerate(found)]
    assert torch.equal(exchange.in_order(found[0], parts, 1), text)


def test_a_call_over_another_text_is_told():
    division = Division.of(1000, Shard(0, 2, "a"))
    with pytest.raises(DistributedError, match="no part of a text that is being read"):
        sequence.current("a", division.count())
    with sequence.dividing(division):
        assert sequence.current("a", division.count()) is division
        for group, count in (("b", division.count()), ("a", 3)):
            with pytest.raises(DistributedError, match=r"not|no part"):
                sequence.current(group, count)


@given(st.integers(1, 1 << 22))
def test_a_regime_is_a_power_of_two_below(count):
    regime = Division(count, Shard(0, 1, ""), 1).regime
    assert regime <= count < 2 * regime and regime & (regime - 1) == 0

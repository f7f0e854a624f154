"""What processes send each other: every block that is asked for arrives, none that is not, and none twice."""

from __future__ import annotations

import random

import pytest
import torch

from sparsify.distributed.sequence import Division
from sparsify.distributed.shards import Shard
from sparsify.ops.limits import cdiv
from tests.support import divided, processes

BATCH, HEADS = 2, 3


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("tokens, block", [(1024, 128), (1500, 128), (1500, 64), (4097, 128), (50, 1)])
def test_blocks_arrive_once(count, tokens, block):
    draw = random.Random(tokens * count)
    blocks = cdiv(tokens, block)
    every = [(b, h, i) for b in range(BATCH) for h in range(HEADS) for i in range(blocks)]
    for share in (0.0, 0.3, 1.0):
        wanted = [[one for one in every if draw.random() < share] for _ in range(count)]
        found = processes.run(count, divided.fetch, tokens, block, wanted, BATCH, HEADS)
        sent = sum(bytes_of["blocks"] for _, bytes_of in found)
        asked = 0
        for rank, ((whole,), _) in enumerate(found):
            own = {at // block for first, last in Division.of(tokens, Shard(rank, count, "")).spans() for at in range(first, last)}
            for b, h, i in wanted[rank]:
                part = whole[b, h, i * block : (i + 1) * block]
                at = torch.arange(i * block, i * block + part.shape[0])
                assert torch.equal(part, torch.stack((torch.full_like(at, b), torch.full_like(at, h), at), -1).float())
            asked += sum(i not in own for _, _, i in wanted[rank])
        assert sent == asked * block * 3 * 4  # three numbers of four bytes, each block once


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_ring_passes_everything_by(count):
    for tokens in (1024, 777, 20):
        found = processes.run(count, divided.passed_around, tokens)
        for rank, turns in enumerate(found):
            assert [one for one, _ in turns] == [(rank - turn) % count for turn in range(count)]
            for one, numbers in turns:
                assert numbers == Division.of(tokens, Shard(one, count, "")).positions("cpu").tolist()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_what_is_small_is_gathered(count):
    for tokens in (1024, 777, 20):
        for whole in processes.run(count, divided.whole_of, tokens):
            assert whole[0].tolist() == list(range(tokens))

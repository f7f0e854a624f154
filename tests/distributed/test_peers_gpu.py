"""Sums that two GPUs read from each other's memory are NCCL's, also in CUDA graphs and in a divided model's tokens."""

from __future__ import annotations

import pytest
import torch

from tests.support import peers, processes
from tests.support.cache_reference import left_padded, text

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.fixture(scope="module")
def pool():
    pool = processes.Pool(2, patience=100, gpus=True)
    yield pool
    pool.end()


@pytest.fixture(scope="module")
def most(pool):
    """Bytes that are read from peers at most; where none are, says why not."""
    (most, obstacle), *others = pool.run(peers.prepared)
    assert all(one == (most, obstacle) for one in others)
    if not most:
        pytest.skip(f"through NCCL: {obstacle}")
    return most


def test_sums_are_nccls(pool, most):
    shapes = [(1, 1, 8), (1, 1, 4096), (3, 1, 4096), (8, 1, 4096), (1, 5, 1024), (1, most // 4 // 64, 64)]
    for found in pool.run(peers.differences, shapes, 3):
        assert len(found) == 2 * len(shapes)
        for name, called, replayed in found:
            assert called == 0, name  # of two parts there is one sum, whoever rounds it
            assert replayed <= 2e-5, name  # / and + of the chain are the same kernels over the same numbers


def test_tokens_of_a_divided_model(pool, most):
    prompt, mask = text(2, 200), left_padded([200, 139])
    dense = {"passes": ["dense"]}
    cases = {
        f"{name}{padding}": (prompt, given, dense | options, None)
        for name, options in (("peers", {}), ("nccl", {"peer_sums": False}))
        for padding, given in (("", None), (" padded", mask))
    }
    for found in pool.run(peers.tokens, "llama", cases, {}):
        for padding in ("", " padded"):
            (ours, told), (theirs, others) = found[f"peers{padding}"], found[f"nccl{padding}"]
            assert torch.equal(ours, theirs)
            assert any("read from peers up to" in one for one in told), told
            assert not any("read from peers" in one for one in others), others

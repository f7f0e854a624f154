"""Tokens that lie far from each other: in plain PyTorch, by a kernel in Triton's interpreter (TRITON_INTERPRET=1), compiled without a GPU,
and on one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsify  # noqa: F401  (registers the ops)
from sparsify.backends import farthest
from sparsify.backends.codegen import source
from sparsify.errors import UnsupportedError
from sparsify.ops.farthest import FarthestFirstCall
from tests.support.offline import compile_kernel


def drawn(batch=2, tokens=40, counts=(40, 7), steps=12, seed=0, device="cpu"):
    """Distances of random points. What no token is holds nonsense."""
    points = torch.randn(batch, tokens, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distances = torch.cdist(points, points).float()
    numbers = torch.tensor(counts)
    absent = torch.arange(tokens) >= numbers[:, None]
    distances.masked_fill_(absent[:, None] | absent[:, :, None], torch.nan)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.nan)
    return FarthestFirstCall(distances.to(device), numbers.to(device), steps=steps)


def slowly(call: FarthestFirstCall) -> torch.Tensor:
    """The definition, token by token."""
    found = []
    for far, count in zip(call.distances.tolist(), call.counts.tolist(), strict=True):
        taken: list[int] = []
        for _ in range(min(call.steps, count)):
            beside = taken or range(count)
            free = [token for token in range(count) if token not in taken]
            taken.append(max(free, key=lambda token: min([far[token][other] for other in beside if other != token], default=0.0)))
        found.append(taken + [-1] * (call.steps - len(taken)))
    return torch.tensor(found)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 99))
def test_reference(tokens, count, steps, seed):
    call = drawn(2, tokens, (tokens, min(count, tokens)), min(steps, tokens), seed)
    assert torch.equal(farthest.reference(call), slowly(call))


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens, counts, steps", [(40, (40, 7), 12), (33, (1, 0), 5), (5, (5, 5), 5), (3, (3, 2), 0)])
def test_kernel(tokens, counts, steps):
    call = drawn(2, tokens, counts, steps)
    assert torch.equal(farthest.by_kernel(call), farthest.reference(call))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, counts, steps", [(2880, (2880, 1000), 720), (9000, (9000, 3), 50)])
def test_kernel_on_a_gpu(tokens, counts, steps):
    call = drawn(2, tokens, counts, steps, device="cuda")
    assert torch.equal(farthest.by_kernel(call), farthest.reference(call))
    assert torch.equal(call.run(), farthest.reference(call))


@pytest.mark.parametrize("width", [64, 4096, 16384])
def test_no_register_spills(width):
    kernel = source.load(farthest.farthest_first_source(width), "farthest_first").farthest_first
    used = compile_kernel(kernel, farthest.arguments(), arch=90, num_warps=farthest.warps(width), num_stages=1)
    assert used.spilled == 0


def test_what_it_refuses():
    call = drawn()
    with pytest.raises(UnsupportedError, match="41 of 40 tokens"):
        FarthestFirstCall(call.distances, call.counts, steps=41).run()
    with pytest.raises(UnsupportedError, match="float64"):
        FarthestFirstCall(call.distances.double(), call.counts, steps=1).run()
    with pytest.raises(UnsupportedError, match="tokens a row"):
        farthest.by_kernel(FarthestFirstCall(torch.empty(1, 20000, 20000, device="meta"), torch.ones(1, dtype=torch.int64), steps=1))

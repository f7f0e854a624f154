"""Ops over DTensors give what they give over whole tensors, by heads, by batch and whole; anything else is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from sparsify.ops import block_lists
from tests.support import dtensors, processes


def same(name: str, found, wanted) -> None:
    if name == "select_blocks":
        found, wanted = ([block_lists.to_dense(*lists, 4)] for lists in (found, wanted))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(dtensors.OPTIONS))
def test_parts_make_up_the_whole(name):
    wanted = dtensors.call_of(name).run()
    for by in ("heads", "batch", ""):
        for found in processes.run(2, dtensors.outputs, name, by):
            assert all(came for _, came in found)
            same(name, [one for one, _ in found], wanted)


@pytest.mark.slow
def test_two_dimensions_of_a_mesh():
    wanted = dtensors.call_of("attention").run()
    for found in processes.run(4, dtensors.outputs, "attention", "batch heads"):
        same("attention", [one for one, _ in found], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, what",
    [
        ("linear", "sparsify::linear: operands are DTensors"),
        ("by tokens", "sparsify::attention: query is placed as S(2)"),
        ("mixed", "key is no DTensor, and query is placed as S(1)"),
        ("otherwise", "key is placed as R, query as S(1)"),
        ("uneven", "query does not divide evenly among 2 processes"),
    ],
)
def test_what_is_divided_otherwise_says_so(kind, what):
    for told in processes.run(2, dtensors.told, kind):
        assert told.startswith("UnsupportedError: ") and what in told, told

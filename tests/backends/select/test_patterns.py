"""Block lists of columns and distances by the Triton kernel: its text, equal to the reference in the interpreter, compiled for Hopper."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.codegen import source
from sparsify.backends.select import patterns, patterns_triton
from sparsify.ops import block_lists
from sparsify.ops.patterns import SelectPatternCall
from tests.support.goldens import check_kernel_text

BLOCK = 64


def call(query_len: int, key_len: int, **numbers) -> SelectPatternCall:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, query_len, 16), torch.randn(2, 2, key_len, 16)
    found = SelectPatternCall(query, key, scale=0.25, **{"queries": 8, "block_size": BLOCK, **numbers})
    found.check()
    return found


def test_kernel_text():
    check_kernel_text("list_pattern", patterns_triton.list_source())


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "query_len, key_len, numbers",
    [
        (300, 300, {"columns": (1, 0, 2, 0), "diagonals": (0, 2, 1, 0)}),
        (130, 700, {"columns": (1,), "diagonals": (2,)}),
        (257, 600, {"columns": (1 << 15, 0, 1, 0), "diagonals": (0,), "query_start": torch.tensor(100)}),
        (64 * 40, 64 * 40, {"columns": (3,), "diagonals": (2,), "key_flags": (torch.arange(64 * 40) > 150).to(torch.uint8)[None]}),
    ],
)
def test_lists_are_those_of_the_reference(query_len, key_len, numbers, monkeypatch):
    monkeypatch.setattr(patterns_triton, "_WIDEST_TILE", 16)  # several tiles of a row
    one = call(query_len, key_len, **numbers)
    want, found = patterns.select_pattern(one), patterns_triton.select_pattern(one)
    assert found[1].shape == want[1].shape and int(want[0].min()) > 0
    assert torch.equal(found[0], want[0])
    assert torch.equal(*(block_lists.to_dense(*lists, one.key_blocks) for lists in (want, found)))
    listed = torch.arange(one.width) < found[0][..., None]
    assert torch.equal(found[1][listed], want[1][listed])


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.samples(1)
def test_it_compiles_without_spills(arch):
    pytest.importorskip("triton")
    from tests.support.offline import compile_kernel

    kernel = source.load(patterns_triton.list_source(), "list_pattern").list_pattern
    used = compile_kernel(kernel, patterns_triton.ARGUMENTS, arch=arch, num_warps=4, num_stages=1, constexprs={"TILE": 1024})
    assert used.spilled == 0 and used.registers <= 64


def test_tables_of_the_reference_are_made_in_parts():
    one = call(300, 300, columns=(1, 0, 2, 0), diagonals=(0, 2, 1, 0))
    rows, known = patterns.last_rows(one)
    mass = patterns.block_mass(one, rows, known, slice(None), slice(None))
    sums = patterns.summed(mass, patterns.own_blocks(one, rows), torch.arange(one.key_blocks), one.key_blocks)
    chosen = patterns.chosen(one, sums, patterns.first_block(one))
    for got, want in zip(patterns.listed(one, *chosen, limit=1), patterns.listed(one, *chosen), strict=True):
        assert torch.equal(got, want)

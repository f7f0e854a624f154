"""Columns, distances and their block lists by Triton kernels: the text, equal to the reference when interpreted, compiled for Hopper."""

from __future__ import annotations

import pytest
import torch

from sparsify.backends.codegen import source
from sparsify.backends.select import patterns, patterns_triton
from sparsify.errors import UnsupportedError
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
    check_kernel_text("pattern", patterns_triton.pattern_source(True, True))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "query_len, key_len, numbers",
    [
        (300, 300, {"columns": (1, 0, 2, 0), "diagonals": (0, 2, 1, 0)}),
        (130, 700, {"columns": (1,), "diagonals": (2,)}),
        (257, 600, {"columns": (1 << 15, 0, 1, 0), "diagonals": (0,), "query_start": torch.tensor(100)}),
        (300, 300, {"columns": (5, 1, 0, 2), "diagonals": (5, 0, 5, 1), "mass": 0.7}),
        (130, 700, {"columns": (1 << 15,), "diagonals": (9,), "mass": 0.9}),
        (300, 400, {"columns": (1,), "diagonals": (0,), "blocks": (0, 2, 0, 3)}),
        (300, 300, {"columns": (1,), "diagonals": (2,), "blocks": (2,), "divergence": 0.2, "mass": 0.8}),
        (300, 300, {"columns": (1 << 15, 0, 1, 0), "diagonals": (1,), "blocks": (0, 2, 0, 3), "divergence": 9.0}),
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


def test_a_divergence_lets_heads_choose_blocks_that_have_some():
    """However well means estimate: a head that sees every key goes on doing so, beside one whose query blocks choose."""
    numbers = {"columns": (1 << 15, 1, 1, 0), "diagonals": (0, 1, 1, 0)}
    one = call(600, 600, **numbers, blocks=(0, 0, 2, 1), divergence=9.0)
    alone = call(600, 600, **numbers)
    found, plain = (block_lists.to_dense(*patterns.select_pattern(each), each.key_blocks) for each in (one, alone))
    assert torch.equal(found[:, :2], plain[:, :2]) and torch.equal(found[:, 0].sum(-1)[0], torch.arange(1, 11))
    assert not torch.equal(found[:, 2], plain[:, 2]) and not torch.equal(found[:, 3], plain[:, 3])


@pytest.mark.interpreter
@pytest.mark.parametrize("mass", [0.0, 0.5, 0.95, 1.0])
def test_choices_are_those_of_the_reference(mass):
    """Equal scores, of which the earlier go first; heads that take none, some and all; a text of one block."""
    torch.manual_seed(0)
    numbers = {"columns": (0, 3, 1 << 15, 7), "diagonals": (2, 0, 5, 1 << 15)}
    for blocks in (1, 2, 13, 40) if mass == 0.5 else (13,):
        one = call(64, 64 * blocks, **numbers, mass=mass)
        sums = torch.randn(2, 2, 4, blocks).exp()
        sums[:, 1] = sums[:, 1].round()
        first = torch.tensor([[0], [min(1, blocks - 1)]])
        for want, found in zip(patterns.chosen(one, sums, first), patterns_triton.chosen(one, sums, first), strict=True):
            assert torch.equal(want, found)
            assert blocks < 5 or not torch.equal(found[:, 0], found[:, 2])


def test_texts_of_more_blocks_than_a_program_holds_are_left_to_the_reference():
    one = call(64, 64, columns=(1,), diagonals=(1,))
    with pytest.raises(UnsupportedError, match="8193 key blocks"):
        patterns_triton.chosen(one, torch.zeros(2, 2, 4, 8193), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.samples(1)
def test_they_compile_without_spills(arch):
    pytest.importorskip("triton")
    from tests.support.offline import compile_kernel

    def compiled(mass, kernel, arguments, warps, by_block=True, **constexprs):
        module = source.load(patterns_triton.pattern_source(mass, by_block), "pattern")
        return compile_kernel(getattr(module, kernel), arguments, arch=arch, num_warps=warps, num_stages=1, constexprs=constexprs)

    for by_block in (False, True):
        used = compiled(True, "list_pattern", patterns_triton.listing_arguments(by_block), 4, by_block, TILE=1024)
        assert used.spilled == 0 and used.registers <= 64
    for mass, width, warps in ((True, 1024, 1), (True, 8192, 8), (False, 8192, 8), (True, 1, 1)):
        used = compiled(mass, "choose_pattern", patterns_triton.CHOOSING, warps, WIDTH=width)
        assert used.spilled == 0 and used.registers <= 255


def test_tables_of_the_reference_are_made_in_parts():
    one = call(300, 300, columns=(1, 0, 2, 0), diagonals=(0, 2, 1, 0))
    rows, known = patterns.last_rows(one)
    mass = patterns.block_mass(one, rows, known, slice(None), slice(None))
    sums = patterns.summed(mass, patterns.own_blocks(one, rows), torch.arange(one.key_blocks), one.key_blocks)
    chosen = patterns.chosen(one, sums, patterns.first_block(one))
    for got, want in zip(patterns.listed(one, *chosen, limit=1), patterns.listed(one, *chosen), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "numbers",
    [
        {"columns": (8,), "diagonals": (32,)},
        {"columns": (1 << 15, 0, 2, 8) * 2, "diagonals": (0, 16, 0, 8) * 2, "blocks": (0, 0, 0, 5) * 2},
        {"columns": (64,), "diagonals": (64,), "mass": 0.9},
    ],
)
def test_a_gpu_chooses_what_the_reference_chooses(numbers):
    """Sums in another order may move a block whose score lies at the bound."""
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 8, 32768, 128, device="cuda"), torch.randn(1, 2, 32768, 128, device="cuda")
    one = SelectPatternCall(query.bfloat16(), key.bfloat16(), scale=128**-0.5, **numbers)
    one.check()
    want, found = (block_lists.to_dense(*by(one), one.key_blocks) for by in (patterns.select_pattern, patterns_triton.select_pattern))
    assert (want != found).sum() <= 1e-3 * want.sum() and 0 < int(want.sum()) < want.numel() // 2

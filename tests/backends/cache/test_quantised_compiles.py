"""Decode kernels over codes compile for a GPU, without one: within shared memory and without spills."""

from __future__ import annotations

import re

import pytest

from sparsify.backends.cache import pages, quantised
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, compile_kernel, within_budget

pytest.importorskip("triton")


def check_instructions(used, threads, codes, most=3.0, flags=0):
    """Of the loop that reads a tile of so many codes, `most` for each, and of bytes from shared memory so many `flags`: it is these, and
    not the codes' bytes, that bound a kernel that turns codes into numbers one by one (7 instructions a code, one of them a conversion of
    a sixteenth of the others' rate, made both kinds as slow as 16 bits)."""
    one_by_one = {name: count for name, count in used.loop.items() if re.match(r"cvt\.(rn\.)?b?f16\.(?!x2)", name)}
    bytes_read = sum(count for name, count in used.loop.items() if name.startswith(("ld.shared.b8", "ld.shared.u8")))
    assert not one_by_one and bytes_read <= flags
    moves = sum(count for name, count in used.loop.items() if name.startswith("mov."))
    assert (sum(used.loop.values()) - moves) * threads <= most * codes


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("clauses", [{"grows": True}, {"softcap": True, "sink_logits": True, "padded": True}], ids=["full", "all"])
@pytest.mark.samples(1)
def test_without_spills(codes, clauses):
    spec = quantised.QuantisedSpec("bf16", codes, 128, 128, 4, **clauses)
    module = source.load(quantised.quantised_source(spec), "quantised")
    used = compile_kernel(module.split, quantised.arguments(spec, "split"), arch=90, num_warps=spec.warps, num_stages=spec.stages)
    within_budget(f"quantised split {codes}{'' if 'grows' in clauses else ' all'} sm_90", used)
    assert used.spilled == 0 and used.mma > 0 and used.shared <= SHARED_LIMIT[90] // 2
    assert used.cp_async > 0, "loads run ahead of the arithmetic"
    check_instructions(used, 32 * spec.warps, 64 * 2 * 128)
    options = {"arch": 90, "num_stages": 3, "num_warps": 4, "constexprs": {"SPLITS": 64}}
    assert compile_kernel(module.combine, quantised.arguments(spec, "combine"), **options).spilled == 0
    options = {"arch": 90, "num_stages": 1, "num_warps": 8}
    assert compile_kernel(module.close_group, quantised.arguments(spec, "close_group"), **options).spilled == 0


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.parametrize("page", [8, 16, 64])
@pytest.mark.parametrize("clauses", [{"grows": True}, {"softcap": True, "sink_logits": True, "padded": True}], ids=["full", "all"])
@pytest.mark.samples(1)
def test_over_a_list_of_pages(codes, page, clauses):
    spec = quantised.QuantisedSpec("bf16", codes, 128, 128, 4, **quantised.paged_options(codes, page, 4), **clauses)
    module = source.load(quantised.quantised_source(spec), "quantised")
    used = compile_kernel(module.split, quantised.arguments(spec, "split"), arch=90, num_warps=spec.warps, num_stages=spec.stages)
    within_budget(f"quantised split {codes} pages of {page}{'' if 'grows' in clauses else ' all'} sm_90", used)
    # two numbers of a thread, where 4-bit codes and several pages take all of its registers
    assert used.spilled <= (8 if (codes, page) == ("int4", 16) else 0)
    assert used.mma + used.wgmma > 0 and used.shared <= SHARED_LIMIT[90] // 4
    assert used.cp_async > 0, "codes that are found along the list run ahead of the arithmetic, too"
    if page == 16:  # queries are scaled once for each page of a tile; which slots are seen goes through shared memory
        check_instructions(used, 32 * spec.warps, 64 * 2 * 128, most=5.5, flags=32)
    options = {"arch": 90, "num_stages": 3, "num_warps": 4, "constexprs": {"SPLITS": 64}}
    assert compile_kernel(module.combine, quantised.arguments(spec, "combine"), **options).spilled == 0
    used = compile_kernel(module.close_group, quantised.arguments(spec, "close_group"), arch=90, num_stages=1, num_warps=8)
    assert used.spilled <= 8, "once in 64 tokens"


@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.samples(1)
def test_bounds(codes):
    spec = pages.BoundsSpec("bf16", 128, 16, True, codes)
    kernel = source.load(pages.bounds_source(spec), "bounds").bounds_of
    used = compile_kernel(kernel, pages.bounds_arguments(spec), arch=90, num_warps=4, num_stages=2)
    within_budget(f"pages bounds {codes} sm_90", used)
    assert used.spilled == 0

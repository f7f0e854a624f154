"""Decode kernels over codes compile for a GPU, without one: within shared memory and without spills."""

from __future__ import annotations

import re

import pytest

from sparsify.backends.cache import quantised
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, compile_kernel, within_budget

pytest.importorskip("triton")


def check_instructions(used, threads, codes):
    """Of the loop that reads a tile of so many codes: it is these, and not bytes, that bound a kernel that turns codes into numbers one by
    one (7 instructions a code, one of them a conversion of a sixteenth of the others' rate, made both kinds as slow as 16 bits)."""
    one_by_one = {name: count for name, count in used.loop.items() if re.match(r"cvt\.(rn\.)?b?f16\.(?!x2)", name)}
    assert not one_by_one and not any(name.startswith(("ld.shared.b8", "ld.shared.u8")) for name in used.loop)
    moves = sum(count for name, count in used.loop.items() if name.startswith("mov."))
    assert (sum(used.loop.values()) - moves) * threads <= 3 * codes


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

"""Kernels that write rows without a key compile for real GPUs, without one: without spills."""

from __future__ import annotations

import pytest

from sparsify.backends.attention.empty_rows_triton import EmptyRowsSpec, arguments, empty_rows_source
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, compile_kernel, within_budget

pytest.importorskip("triton")

ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]
EVERY_CLAUSE = dict.fromkeys(("causal", "windowed", "key_flags", "segments", "has_start", "hidden"), True)
SPECS = {
    "sums": EmptyRowsSpec("bf16", 128, 4, "mean"),
    "mean": EmptyRowsSpec("bf16", 128, 4, "mean"),
    "nan": EmptyRowsSpec("fp16", 80, 1, "nan"),
    "weighted": EmptyRowsSpec("bf16", 128, 4, "weighted", causal=True, hidden=True),
    "weighted, all clauses": EmptyRowsSpec("fp32", 256, 8, "weighted", **EVERY_CLAUSE),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SPECS)
def test_without_spills(name, arch):
    spec, kernel = SPECS[name], "sums" if name == "sums" else "write"
    used = compile_kernel(
        getattr(source.load(empty_rows_source(spec), "empty_rows"), kernel),
        arguments(spec, kernel),
        arch=arch,
        num_warps=4,
        num_stages=1,
    )
    within_budget(f"rows without keys, {name} sm_{arch}", used)
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[arch]

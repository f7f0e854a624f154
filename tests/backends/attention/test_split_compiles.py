"""Kernels that split the keys of few queries compile for real GPUs, without one: two programs a multiprocessor, and no spills."""

from __future__ import annotations

import pytest

from sparsify.backends.attention.triton_source import AttentionSpec, arguments, attention_source, choose_tiling, combine_arguments
from sparsify.backends.codegen import source
from sparsify.releases import triton_release
from tests.support.offline import SHARED_LIMIT, Resources, compile_kernel, within_budget

pytest.importorskip("triton")

ONE = {"packed": True, "split_keys": True, "uniform": True}
FEW = {"packed": True, "split_keys": True}
CLAUSES = {
    "static cache": {**ONE, "has_start": True},
    "static cache, padded": {**ONE, "has_start": True, "key_flags": True},
    "padded": {**ONE, "key_flags": True},
    "window": {**ONE, "has_start": True, "window": "one"},
    "window, sinks, padded": {**ONE, "has_start": True, "window": "one", "sinks": "flags", "key_flags": True},
    "logits": {**ONE, "softcap": True, "alibi": True, "sink_logits": True, "has_start": True},
    "few queries": {**FEW, "has_start": True},
    "few queries, padded": {**FEW, "has_start": True, "key_flags": True},
}


def compiled(clause: str, arch: int, kernel: str = "split", dtype: str = "bf16", dims: tuple[int, int] = (128, 128)) -> Resources:
    rows = 4 if CLAUSES[clause].get("uniform") else 20
    tiling = choose_tiling(dtype, *dims, (arch // 10, arch % 10), packed_rows=rows, split=True)
    chosen = AttentionSpec(dtype, *dims, 4, tiling, **CLAUSES[clause])
    return compile_kernel(
        getattr(source.load(attention_source(chosen, triton_release()), "attention"), kernel),
        arguments(chosen) if kernel == "split" else combine_arguments(chosen),
        arch=arch,
        num_warps=tiling.warps if kernel == "split" else 4,
        num_stages=tiling.stages if kernel == "split" else 3,
        constexprs={"SPLITS": 64} if kernel == "combine" else {},
    )


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.samples(2)
def test_split(clause):
    used = compiled(clause, 90)
    within_budget(f"attention split {clause} sm_90", used)
    assert used.spilled == 0 and used.mma > 0
    assert used.cp_async > 0, "loads run ahead of the arithmetic"
    assert 2 * used.shared <= SHARED_LIMIT[90] and 2 * 128 * used.registers <= 65536


@pytest.mark.parametrize("clause", ["static cache", "logits"])
def test_join(clause):
    used = compiled(clause, 90, "combine")
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[90]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("clause", ["static cache, padded", "few queries, padded"])
def test_head_dims_and_dtypes(arch, dims, dtype, clause):
    used = compiled(clause, arch, "split", dtype, dims)
    assert used.shared <= SHARED_LIMIT[arch]
    # ptxas stays at 128 registers for 8 warps, and then leaves up to four values of wide heads on the stack
    assert used.spilled <= (16 if max(dims) > 128 else 0) or dtype == "fp32"

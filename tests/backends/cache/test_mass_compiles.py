"""Kernels that sum the attention that keys get compile for real GPUs, without one: within shared memory and without spills."""

from __future__ import annotations

import pytest

from sparsify.backends.cache.mass import MassSpec, arguments, choose_tiling, mass_source
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, Resources, compile_kernel, within_budget

pytest.importorskip("triton")

ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]


def compiled(spec: MassSpec, arch: int, kernel: str) -> Resources:
    return compile_kernel(
        getattr(source.load(mass_source(spec), "mass"), kernel),
        arguments(spec, kernel),
        arch=arch,
        num_warps=spec.tiling.warps,
        num_stages=3 if kernel == "row_sums" else 1,
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["row_sums", "key_sums"])
def test_snapkv_of_an_8b_shape(kernel, arch):
    used = compiled(MassSpec("bf16", 128, 4, choose_tiling("bf16", 128, 4, 32)), arch, kernel)
    within_budget(f"mass {kernel} sm_{arch}", used)
    assert used.spilled == 0 and used.mma + used.wgmma > 0
    assert used.shared <= SHARED_LIMIT[arch]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim, group, queries", [(64, 1, 1), (80, 7, 32), (256, 8, 64), (128, 2, 4096)])
def test_dims_and_groups(dim, group, queries, dtype):
    for kernel in ("row_sums", "key_sums"):
        used = compiled(MassSpec(dtype, dim, group, choose_tiling(dtype, dim, group, queries), softcap=True), 90, kernel)
        assert used.shared <= SHARED_LIMIT[90] and used.spilled == 0

"""Generated decode kernels compile for real GPUs, without one: within shared memory and without spills."""

from __future__ import annotations

import pytest

from sparsify.backends.cache.decode import DecodeSpec, arguments, choose_tiling, decode_source
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, Resources, compile_kernel, within_budget

pytest.importorskip("triton")

ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]


def compiled(spec: DecodeSpec, arch: int, kernel: str) -> Resources:
    return compile_kernel(
        getattr(source.load(decode_source(spec), "decode"), kernel),
        arguments(spec, kernel),
        arch=arch,
        num_warps=spec.tiling.warps if kernel == "split" else 4,
        num_stages=spec.tiling.stages if kernel == "split" else 3,
        constexprs={"SPLITS": 64} if kernel == "combine" else {"SPLITS": 32, "MEMBERS": 4} if spec.fused else {},
    )


def spec(dtype="bf16", dim=128, group=4, **clauses) -> DecodeSpec:
    return DecodeSpec(dtype, dim, dim, group, choose_tiling(dtype, dim), **clauses)


ALL = {"softcap": True, "sink_logits": True, "padded": True, "rotate_sinks": True}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("clauses", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("fused", [False, True])
def test_split(arch, clauses, fused):
    used = compiled(spec(**clauses, fused=fused, whole=fused), arch, "split")
    within_budget(f"decode split {'all' if clauses else 'plain'}{' fused' if fused else ''} sm_{arch}", used)
    assert used.registers * spec().tiling.warps * 32 * spec().tiling.programs <= 65536
    assert used.spilled == 0 and used.mma > 0
    assert used.cp_async > 0, "loads run ahead of the arithmetic"
    # two thread blocks a multiprocessor share its memory
    assert 2 * used.shared <= SHARED_LIMIT[arch] or arch == 80
    assert used.shared <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("fused", [False, True])
def test_split_over_a_cache_that_evicts_nothing(fused):
    used = compiled(spec(fused=fused, grows=True, padded=True), 90, "split")
    within_budget(f"decode split full{' fused' if fused else ''} sm_90", used)
    assert used.spilled == 0 and used.mma > 0 and used.cp_async > 0
    assert 2 * used.shared <= SHARED_LIMIT[90]


def test_split_over_packed_heads():
    used = compiled(spec(fused=True, grows=True, packed=True), 90, "split")
    within_budget("decode split packed fused sm_90", used)
    assert used.spilled == 0 and used.mma > 0 and used.cp_async > 0
    assert 2 * used.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_combine(arch):
    used = compiled(spec(**ALL), arch, "combine")
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[arch]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("group", [1, 8, 32])
def test_dims_and_groups(dtype, dim, group):
    for kernel in ("split", "combine"):
        assert compiled(spec(dtype, dim, group), 90, kernel).shared <= SHARED_LIMIT[90]

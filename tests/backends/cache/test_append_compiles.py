"""Generated kernels for calls of several tokens compile for real GPUs, without one: within shared memory and without spills."""

from __future__ import annotations

import pytest

from sparsify.backends.cache.append import AppendSpec, append_source, arguments, choose_tiling
from sparsify.backends.codegen import source
from tests.support.offline import SHARED_LIMIT, Resources, compile_kernel, within_budget

pytest.importorskip("triton")

ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]

ALL = {"windowed": True, "padded": True, "rotate_sinks": True, "softcap": True, "sink_logits": True}


def compiled(spec: AppendSpec, arch: int, kernel: str = "split") -> Resources:
    return compile_kernel(
        getattr(source.load(append_source(spec), "append"), kernel),
        arguments(spec, kernel),
        arch=arch,
        num_warps=spec.tiling.warps if kernel == "split" else 4,
        num_stages=spec.tiling.stages if kernel == "split" else 3,
        constexprs={"SPLITS": 64} if kernel == "combine" else {},
    )


def spec(rows: int, dtype: str = "bf16", dim: int = 128, arch: int = 90, **clauses) -> AppendSpec:
    tiling = choose_tiling(dtype, dim, rows, divmod(arch, 10), clauses.get("rotate_sinks", False), clauses.get("codes", ""))
    return AppendSpec(dtype, dim, dim, 4, tiling, **clauses)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", [20, 4096])
def test_split(rows, arch):
    used = compiled(spec(rows, arch=arch, single=rows > 128), arch)
    within_budget(f"append {rows} rows sm_{arch}", used)
    assert used.spilled == 0 and used.mma + used.wgmma > 0
    assert used.shared <= SHARED_LIMIT[arch]


def test_every_clause():
    used = compiled(spec(4096, **ALL), 90)
    within_budget("append all sm_90", used)
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[90]
    assert compiled(spec(20, single=False, **ALL), 90, "combine").spilled == 0


@pytest.mark.parametrize("rows", [20, 4096])
@pytest.mark.parametrize("codes", ["fp8", "int4"])
@pytest.mark.samples(2)
def test_codes(codes, rows):
    used = compiled(spec(rows, single=rows > 128, codes=codes), 90)
    within_budget(f"append {codes} {rows} rows sm_90", used)
    assert used.spilled == 0 and used.mma + used.wgmma > 0
    assert used.shared <= SHARED_LIMIT[90]
    used = compiled(spec(rows, single=rows > 128, codes=codes, windowed=True, padded=True, softcap=True, sink_logits=True, packed=True), 90)
    assert used.shared <= SHARED_LIMIT[90] and used.spilled <= 64


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("rows", [4, 40, 4096])
def test_dims_and_rows(rows, dim, dtype):
    used = compiled(spec(rows, dtype, dim), 90)
    assert used.shared <= SHARED_LIMIT[90] and used.spilled <= 64

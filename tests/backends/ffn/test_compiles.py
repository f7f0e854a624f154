"""Generated feed-forward kernels compile for real GPUs, without one: tensor cores, asynchronous copies, no spills, within shared memory."""

from __future__ import annotations

import pytest

from sparsify.backends.codegen import source
from sparsify.backends.ffn.source import (
    MANY,
    START_ARGUMENTS,
    FfnSpec,
    activation_arguments,
    activation_source,
    arguments,
    choose_rows_tiling,
    choose_tiling,
    ffn_source,
    needs_normalise,
    rows_source,
    start_source,
)  # fmt: skip
from tests.support.offline import SHARED_LIMIT, Resources, compile_kernel, within_budget

pytest.importorskip("triton")

_PROCESSORS = {80: 108, 90: 132, 100: 148}
FAMILIES = {
    "llama": {},
    "phi3": {"hidden": 3072, "intermediate": 8192},
    "gemma": {"activation": "gelu_tanh", "norm": "rms_offset", "post_norm": "rms_offset", "hidden": 2304, "intermediate": 9216},
    "gpt2": {"activation": "gelu_tanh", "norm": "layer", "norm_bias": True, "up_bias": True, "down_bias": True, "gated": False,
             "transposed": True, "hidden": 768, "intermediate": 3072},
    "neox": {"activation": "gelu", "norm": "layer", "norm_bias": True, "up_bias": True, "down_bias": True, "gated": False,
             "hidden": 5120, "intermediate": 20480},
}  # fmt: skip


def spec(family: str, dtype: str = "bf16", rows: int = 16, arch: int = 90) -> FfnSpec:
    fields = {"hidden": 4096, "intermediate": 14336, "gated": True, **FAMILIES[family]}
    tiling = choose_tiling(dtype, rows, fields["hidden"], fields["intermediate"], fields["gated"], _PROCESSORS[arch])
    return FfnSpec(dtype, rows, tiling=tiling, **fields)


def compiled(chosen: FfnSpec, arch: int, ones: tuple[str, ...] = ()) -> dict[str, Resources]:
    """ones: numbers that are 1 in the call, which Triton makes constants."""
    module = source.load(ffn_source(chosen), "ffn")
    found = {}
    for name in ("normalise", "project_up", "project_down", "finish"):
        if name == "normalise" and not needs_normalise(chosen):
            continue
        kernel = getattr(module, name)
        by_row = name in ("normalise", "finish")
        found[name] = compile_kernel(
            kernel,
            arguments(chosen, name),
            arch=arch,
            num_warps=8 if by_row else chosen.tiling.warps,
            num_stages=3,
            constexprs={a: 1 for a in ones if a in kernel.arg_names},
        )
    return found


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.samples(3)
def test_hopper(family, rows):
    used = compiled(spec(family, rows=rows), 90)
    for name, resources in used.items():
        within_budget(f"ffn {name} {family} {rows} rows sm_90", resources)
        assert resources.spilled == 0, name
        assert resources.shared <= SHARED_LIMIT[90]
    for name in ("project_up", "project_down"):
        assert used[name].mma + used[name].wgmma > 0
        assert used[name].cp_async > 0
        # two programs share a processor
        assert 2 * used[name].shared <= SHARED_LIMIT[90]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_other_architectures_and_dtypes(arch, dtype, family):
    for resources in compiled(spec(family, dtype, arch=arch), arch).values():
        assert resources.shared <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch):
    for resources in compiled(spec("llama", arch=arch), arch).values():
        assert resources.shared <= SHARED_LIMIT[arch]


def test_one_row():
    for resources in compiled(spec("llama"), 90, ones=("rows", "skip_next")).values():
        assert resources.spilled == 0


def compiled_rows(family: str, arch: int) -> dict[str, Resources]:
    """The kernels for many rows; all but `project_up` and `project_down` read and write plain pointers."""
    fields = {"hidden": 4096, "intermediate": 14336, "gated": True, **FAMILIES[family]}
    tiling = choose_rows_tiling("bf16", fields["gated"])
    chosen = FfnSpec("bf16", MANY, tiling=tiling, **fields)
    module = source.load(rows_source(chosen), "ffn_rows")
    found = {}
    for name in ("compact", "normalise", "project_up", "project_down", "finish"):
        warps = tiling.warps if name in ("project_up", "project_down") else 8
        found[name] = compile_kernel(getattr(module, name), arguments(chosen, name), arch=arch, num_warps=warps, num_stages=3)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.samples(1)
def test_many_rows_on_hopper(family):
    used = compiled_rows(family, 90)
    for name, resources in used.items():
        within_budget(f"ffn rows {name} {family} sm_90", resources)
        assert resources.spilled == 0, name
        assert resources.shared <= SHARED_LIMIT[90]
    assert used["project_up"].wgmma > 0 and used["project_down"].wgmma > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma", "neox"])
def test_many_rows_on_blackwell(family):
    used = compiled_rows(family, 100)
    assert used["project_up"].mma > 0 and used["project_down"].mma > 0
    assert all(r.shared <= SHARED_LIMIT[100] for r in used.values())


@pytest.mark.parametrize("ones", [(), ("rows", "count", "warmup", "most", "length", "slot")])
@pytest.mark.parametrize("reads", [True, False])
def test_the_counters_kernel(ones, reads):
    kernel = source.load(start_source(), "ffn_start").start
    constants = {"BLOCK": 16, "READS": reads} | dict.fromkeys(ones, 1)
    assert compile_kernel(kernel, START_ARGUMENTS, arch=90, num_warps=4, num_stages=3, constexprs=constants).spilled == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("activation, gated", [("silu", True), ("gelu", False)])
def test_the_activation_between_products(activation, gated, arch):
    kernel = source.load(activation_source("bf16", activation, gated), "ffn_activation").activate_rows
    assert compile_kernel(kernel, activation_arguments("bf16"), arch=arch, num_warps=4, num_stages=3).spilled == 0

"""The generated kernels of linear layers compile for real GPUs, without one: no spills, and weights in lines of 16 bytes a thread."""

from __future__ import annotations

import pytest

from sparsify.backends.codegen import source
from sparsify.backends.linear.source import TENSOR_ROWS, LinearSpec, arguments, choose_tiling, linear_source
from tests.support.offline import SHARED_LIMIT, Resources, compile_kernel, within_budget

pytest.importorskip("triton")

# what a token of an 8B model multiplies
LAYERS = {
    "qkv": {"inputs": 4096, "outputs": (4096, 1024, 1024), "norm": "rms"},
    "gate_up": {"inputs": 4096, "outputs": (14336, 14336), "norm": "rms", "activation": "silu"},
    "down": {"inputs": 14336, "outputs": (4096,), "residual": True},
    "biased": {"inputs": 3584, "outputs": (3584, 512, 512), "norm": "rms", "biased": True},
}


def spec(layer: str, rows: int, arch: int = 90, dtype: str = "bf16") -> LinearSpec:
    fields = LAYERS[layer]
    tiling = choose_tiling(dtype, rows, fields["inputs"], "activation" in fields, "norm" in fields)
    if tiling.tensor:
        fields, rows = fields | {"norm": "none"}, next(tile for tile in TENSOR_ROWS if tile >= rows)
    return LinearSpec(dtype, rows, tiling=tiling, early=arch >= 90 and not tiling.tensor, **fields)


def compiled(chosen: LinearSpec, arch: int) -> Resources:
    kernel = source.load(linear_source(chosen), "linear").linear
    return compile_kernel(kernel, arguments(chosen), arch=arch, num_warps=chosen.tiling.warps, num_stages=1)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_hopper(layer, rows):
    used = compiled(spec(layer, rows), 90)
    within_budget(f"linear {layer} {rows} rows sm_90", used)
    assert used.spilled == 0
    assert used.shared <= SHARED_LIMIT[90] // 2  # two programs share a processor
    assert used.wide_streams + used.cp_async > 0 and used.narrow_streams == 0


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("rows", [1, 8])
def test_other_architectures(rows, arch):
    used = compiled(spec("gate_up", rows, arch), arch)
    assert used.spilled == 0 and used.shared <= SHARED_LIMIT[arch]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_number_of_rows(layer, dtype, rows):
    assert compiled(spec(layer, rows, dtype=dtype), 90).spilled == 0

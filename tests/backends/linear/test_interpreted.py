"""The generated kernels of linear layers in Triton's interpreter against float64, and against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsify.backends.linear import reference
from sparsify.backends.linear import triton as kernels
from sparsify.backends.linear.source import LinearTiling
from sparsify.errors import UnsupportedError
from sparsify.ops.linear import LinearCall

pytestmark = pytest.mark.interpreter

VECTOR, WHOLE = LinearTiling(8, 64, 4), LinearTiling(4, 128, 4)
TENSOR, FEWER = LinearTiling(16, 16, 4, stages=2), LinearTiling(16, 32, 2, stages=3)
CASES = {
    "plain": {},
    "bias": {"bias": True},
    "three": {"outputs": (48, 16, 16), "norm": "rms"},
    "two_biased": {"outputs": (40, 24), "bias": True},
    "gate": {"outputs": (48, 48), "norm": "rms", "activation": "silu"},
    "gate_biased": {"outputs": (37, 37), "norm": "rms_offset", "activation": "gelu_tanh", "bias": True},
    "sum": {"residual": True},
    "odd": {"inputs": 77, "outputs": (53, 19), "norm": "rms_fp32"},
    "odd_sum": {"inputs": 101, "outputs": (35,), "residual": True, "bias": True},
}


def make_call(
    rows: int,
    dtype: torch.dtype = torch.float32,
    inputs: int = 128,
    outputs: tuple[int, ...] = (48,),
    bias: bool = False,
    residual: bool = False,
    norm: str = "none",
    activation: str = "none",
) -> LinearCall:
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape, scale=1.0: (torch.randn(*shape, generator=generator) * scale).to(dtype)
    names = ("", "_2", "_3")
    given = {f"weight{name}": draw(n, inputs, scale=inputs**-0.5) for name, n in zip(names, outputs, strict=False)}
    if bias:
        given |= {f"bias{name}": draw(n) for name, n in zip(names, outputs, strict=False)}
    if residual:
        given["residual"] = draw(rows, outputs[0])
    if norm != "none":
        given["norm_weight"] = draw(inputs)
    return LinearCall(draw(rows, inputs), **given, norm=norm, eps=1e-5 if norm != "none" else 0.0, activation=activation)


def run(call: LinearCall, tiling: LinearTiling | None = None) -> list[torch.Tensor]:
    call.check()
    outputs = [output.fill_(float("nan")) for output in call.empty_outputs()]
    kernels.run(kernels.kernel_spec(call, tiling=tiling), call, outputs)
    return outputs


@pytest.mark.parametrize("tiling, rows", [(VECTOR, 1), (WHOLE, 1), (TENSOR, 2), (TENSOR, 5), (FEWER, 16)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.samples(6)
def test_it_equals_float64(case, tiling, rows):
    call = make_call(rows, **(CASES[case] if not tiling.tensor else CASES[case] | {"norm": "none"}))
    wanted = reference.linear(call.map_tensors(torch.Tensor.double))
    for got, right in zip(run(call, tiling), wanted, strict=True):
        torch.testing.assert_close(got.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", range(1, 17))
@pytest.mark.samples(4)
def test_every_number_of_rows(rows):
    call = make_call(rows, inputs=72, outputs=(33, 8), norm="rms" if rows == 1 else "none")
    for got, right in zip(run(call), reference.linear(call.map_tensors(torch.Tensor.double)), strict=True):
        torch.testing.assert_close(got.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiling, rows", [(VECTOR, 1), (FEWER, 7)])
@pytest.mark.parametrize("case", ["three", "gate", "sum"])
@pytest.mark.samples(3)
def test_short_dtypes_are_no_further_from_float64_than_the_reference(case, tiling, rows, dtype):
    call = make_call(rows, dtype, **(CASES[case] if not tiling.tensor else CASES[case] | {"norm": "none"}))
    flat = lambda outputs: torch.cat([output.double().flatten() for output in outputs])
    right = flat(reference.linear(call.map_tensors(torch.Tensor.double)))
    error = lambda outputs: (flat(outputs) - right).norm() / right.norm()
    # the interpreter rounds to bf16 towards zero, by up to a whole unit in the last place, and does so three times with a gate
    assert error(run(call, tiling)) <= (4 if dtype == torch.bfloat16 else 1.2) * error(reference.linear(call)) + 1e-6


def test_a_row_does_not_read_another():
    call = make_call(8)
    spoilt = dataclasses.replace(call, input=call.input.clone().index_fill_(0, torch.tensor(3), float("nan")))
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(run(spoilt)[0][kept], run(call)[0][kept]) and run(spoilt)[0][3].isnan().all()


def test_an_input_with_strides():
    call = make_call(4)
    wide = torch.zeros(4, 2 * call.input.shape[1])
    wide[:, ::2] = call.input
    assert torch.equal(run(dataclasses.replace(call, input=wide[:, ::2]))[0], run(call)[0])


def test_what_no_kernel_takes():
    call = make_call(2, outputs=(16, 16), bias=True)
    for other in (
        dataclasses.replace(call, bias_2=None),
        dataclasses.replace(call, weight=call.weight.t().contiguous().t()),
        call.map_tensors(torch.Tensor.double),
        make_call(8, norm="rms"),
    ):
        with pytest.raises(UnsupportedError):
            kernels.linear(other)


def test_more_rows_are_the_librarys():
    call = make_call(17)
    assert torch.equal(kernels.linear(call)[0], reference.linear(call)[0])

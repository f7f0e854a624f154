"""Products of a weight with one row, written out as sums: the same values, and only where there is one row of half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsify.rewriting.products import write_out_single_rows


def rewritten(function, *inputs, device_type="cpu"):
    """The function's result with products written out, and how many were."""
    counts = []

    def backend(gm, example_inputs):
        counts.append(write_out_single_rows(gm.graph, device_type))
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return result, sum(counts)


def operands(*shape, dtype=torch.bfloat16, out=24):
    generator = torch.Generator().manual_seed(0)
    make = lambda *sizes: torch.randn(*sizes, generator=generator).to(dtype)
    return make(*shape), make(out, shape[-1]), make(out)


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 64), (64,), (1, 1, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_row_gives_the_same_values(shape, dtype, with_bias):
    x, weight, bias = operands(*shape, dtype=dtype)
    program = lambda x, w, b: F.linear(x, w, b) if with_bias else F.linear(x, weight=w)
    with torch.no_grad():
        got, count = rewritten(program, x, weight, bias)
    assert count == 1
    want = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert got.shape == want.shape and got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.1)


def test_modules_and_chains():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.SiLU(), torch.nn.Linear(32, 64, bias=False)).bfloat16()
    x = operands(1, 1, 64)[0]
    with torch.no_grad():
        got, count = rewritten(model, x)
        assert count == 2
        torch.testing.assert_close(got, model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "change",
    ["rows", "batch", "fp32", "gradient", "transposed", "device"],
)
def test_everything_else_stays(change):
    x, weight, bias = operands(*{"rows": (1, 2, 64), "batch": (3, 1, 64)}.get(change, (1, 1, 64)))
    if change == "fp32":
        x, weight, bias = x.float(), weight.float(), bias.float()
    if change == "gradient":
        weight.requires_grad_()
    if change == "transposed":
        weight = weight.t().contiguous().t()
    got, count = rewritten(F.linear, x, weight, bias, device_type="cuda" if change == "device" else "cpu")
    assert count == 0
    torch.testing.assert_close(got, F.linear(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [True, False])
def test_inductor_makes_a_reduction_of_it(asked):
    from torch._inductor.utils import run_and_get_code

    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2)))
    x = torch.randn(1, 1, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        run = torch.compile(model, backend="sparsify", options={"single_row_products": asked})
        got, (code, *_) = run_and_get_code(run, x)
        torch.testing.assert_close(got, model(x), rtol=0.03, atol=0.03)
    assert ("extern_kernels.addmm" in code) != asked and ("triton_red" in code or "triton_per" in code) == asked

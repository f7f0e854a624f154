"""Runs `sparsify::linear` for up to 16 rows by generated Triton kernels; more rows are the library's. Nothing synchronises."""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.launch import DTYPES, launch, launching, meant, need, overlaps
from sparsify.backends.linear import reference
from sparsify.backends.linear.source import TENSOR_ROWS, LinearSpec, LinearTiling, arguments, choose_tiling, linear_source
from sparsify.ops.limits import LINEAR_MAX_ROWS
from sparsify.ops.linear import LinearCall

_WHERE = "sparsify::linear"


def linear(call: LinearCall) -> list[Tensor]:
    """Outputs of a call that was checked.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: the kernel could not be compiled or launched.
    """
    if call.rows > LINEAR_MAX_ROWS:
        return reference.linear(call)
    outputs = call.empty_outputs()
    if call.rows == 0:
        return outputs
    need(call.input.dtype in DTYPES and all(weight.is_contiguous() for weight in call.weights), f"weights in {call.input.dtype}", _WHERE)
    need(len({bias is None for bias in call.biases}) == 1, "some of the weights have a bias", _WHERE)
    device = meant(call.device)
    early = call.early and overlaps(device)
    run(kernel_spec(call, early), call, outputs)
    return outputs


def kernel_spec(call: LinearCall, early: bool = False, tiling: LinearTiling | None = None) -> LinearSpec:
    """The spec of a call.

    Args:
        early: kernels may overlap.
        tiling: in place of the one that is chosen.
    """
    outputs = tuple(weight.shape[0] for weight in call.weights)
    key = DTYPES[call.input.dtype], call.rows, call.input.shape[1], outputs
    return _spec(*key, call.bias is not None, call.residual is not None, call.norm, call.eps, call.activation, early, tiling)


@functools.lru_cache(maxsize=1024)
def _spec(
    dtype: str,
    rows: int,
    inputs: int,
    outputs: tuple[int, ...],
    biased: bool,
    residual: bool,
    norm: str,
    eps: float,
    activation: str,
    early: bool,
    tiling: LinearTiling | None,
) -> LinearSpec:
    tiling = tiling or choose_tiling(dtype, rows, inputs, activation != "none", norm != "none")
    rows = next(tile for tile in TENSOR_ROWS if tile >= rows) if tiling.tensor else 1
    return LinearSpec(dtype, rows, inputs, outputs, tiling, biased, residual, norm, eps, activation, early and not tiling.tensor)


@functools.lru_cache(maxsize=512)
def kernels(spec: LinearSpec) -> ModuleType:
    """The module of a spec's kernel."""
    return source.load(linear_source(spec), "linear")


def run(spec: LinearSpec, call: LinearCall, outputs: list[Tensor]) -> None:
    """Fills the outputs of a call by the kernel of a spec."""
    given: dict[str, Tensor | int | None] = {"input": call.input.contiguous(), "rows": call.rows, "norm_weight": call.norm_weight}
    given["residual"] = None if call.residual is None else call.residual.contiguous()
    for i, (weight, bias) in enumerate(zip(call.weights, call.biases, strict=True), 1):
        given |= {f"weight_{i}": weight, f"bias_{i}": bias}
    given |= {f"out_{i}": output for i, output in enumerate(outputs, 1)}
    options = {"launch_pdl": True} if spec.early else {}
    with launching(call.input.device, lambda: f"{_WHERE} ({spec.describe()})"):
        launch(kernels(spec).linear, (spec.programs,), arguments(spec), given, num_warps=spec.tiling.warps, num_stages=1, **options)

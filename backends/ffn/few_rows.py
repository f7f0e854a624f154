"""Runs `sparsify::ffn` and `sparsify::ffn_start` by generated Triton kernels: up to 32 rows share one stream of the weights here, more go
to `many_rows`. Nothing synchronises."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import padded
from sparsify.backends.codegen.launch import DTYPES, launch, launching, need, processors
from sparsify.backends.ffn import many_rows
from sparsify.backends.ffn.source import (
    START_ARGUMENTS,
    FfnSpec,
    FfnTiling,
    arguments,
    choose_tiling,
    ffn_source,
    needs_normalise,
    start_source,
)  # fmt: skip
from sparsify.errors import UnsupportedError
from sparsify.ops import feed_forward, limits

MAX_START_ROWS = 4096
_WHERE = "sparsify::ffn"

# tilings that a benchmark or a test sets, by (dtype, hidden, intermediate); others are chosen
tilings: dict[tuple[str, int, int], FfnTiling] = {}


def ffn_start(like: Tensor, positions: Tensor | None, slot: int, *, warmup: int, most: int, length: int, key: int, version: int) -> Tensor:
    """See `sparsify.ops.feed_forward`. Raises UnsupportedError for more than 4096 rows or positions that are counted, KernelError for a
    failed kernel."""
    rows = feed_forward.rows_of(like)
    if positions is None and slot < 0:
        # nothing is counted: every run is in its first step
        return like.new_full((rows,), -1 if warmup else 0 if length else most, dtype=torch.int32)
    count = 0 if positions is None else positions.numel()
    need(max(rows, count) <= MAX_START_ROWS, f"{max(rows, count)} rows", "sparsify::ffn_start")
    out = like.new_empty(rows, dtype=torch.int32)
    state = feed_forward.run_state(like.device, key)
    given = {
        "positions": out if positions is None else positions.contiguous(), "state": state, "out": out, "count": count, "slot": slot,
        "rows": rows, "warmup": warmup, "most": most, "length": length, "BLOCK": padded(max(rows, count)), "READS": positions is not None,
    }  # fmt: skip
    with launching(like.device, lambda: "sparsify::ffn_start"):
        launch(_start_kernel(), (1,), START_ARGUMENTS, given)
    return out


@functools.cache
def _start_kernel() -> Any:
    return source.load(start_source(), "ffn_start").start


def ffn(residual: Tensor, input: Tensor, remaining: Tensor, up: Tensor, down: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """See `sparsify.ops.feed_forward`; operands as in the reference.

    Raises:
        UnsupportedError: another dtype, weights that are not contiguous, or more than 32 rows where `many_rows` does not take them.
        KernelError: a kernel could not be compiled or launched.
    """
    rows = feed_forward.rows_of(residual)
    weights = [w for w in (up, down, call.get("gate")) if w is not None]
    if rows == 0:
        return torch.empty_like(residual), torch.empty_like(remaining)
    contiguous = residual.dtype in DTYPES and all(w.dtype == residual.dtype and w.is_contiguous() for w in weights)
    need(contiguous, f"weights are not contiguous {residual.dtype}", _WHERE)
    biases = [call.get(name) is not None for name in ("up_bias", "gate_bias")]
    need(call.get("gate") is None or biases[0] == biases[1], "only one of gate and up has a bias", _WHERE)
    spec = _kernel_spec(residual, down, rows, call)
    operands = residual.contiguous(), input.contiguous(), remaining, *_halves(spec, up, call)
    with launching(residual.device, lambda: f"{_WHERE} ({spec.describe()})"):
        if rows > limits.FFN_MAX_ROWS:
            return many_rows.run(spec, *operands, down, call)
        return _run(spec, *operands, down, rows, call)


def _kernel_spec(residual: Tensor, down: Tensor, rows: int, call: dict[str, Any]) -> FfnSpec:
    dtype, hidden = DTYPES[residual.dtype], residual.shape[-1]
    intermediate = down.shape[0] if call["transposed"] else down.shape[1]
    gated = call["layout"] != "plain"
    options = tuple((name, call[name]) for name in ("transposed", "activation", "norm", "eps", "post_norm", "post_eps", "scale"))
    options += tuple((bias, call.get(bias) is not None) for bias in ("norm_bias", "up_bias", "down_bias", "post_bias"))
    if rows > limits.FFN_MAX_ROWS:
        return many_rows.kernel_spec(dtype, hidden, intermediate, gated, options, many_rows.tilings.get(dtype))
    tile = 16 if rows <= 16 else 32
    return _spec(dtype, tile, hidden, intermediate, processors(residual.device), gated, options, tilings.get((dtype, hidden, intermediate)))


@functools.lru_cache(maxsize=4096)
def _spec(
    dtype: str,
    rows: int,
    hidden: int,
    intermediate: int,
    processors: int,
    gated: bool,
    options: tuple[tuple[str, Any], ...],
    tiling: FfnTiling | None,
) -> FfnSpec:
    tiling = tiling or choose_tiling(dtype, rows, hidden, intermediate, gated, processors)
    return FfnSpec(dtype, rows, hidden, intermediate, tiling, gated, **dict(options))


@functools.lru_cache(maxsize=256)
def kernels(spec: FfnSpec) -> Any:
    """The module of a spec's kernels."""
    return source.load(ffn_source(spec), "ffn")


def _run(
    spec: FfnSpec,
    residual: Tensor,
    input: Tensor,
    remaining: Tensor,
    gates: tuple[Tensor, Tensor | None],
    ups: tuple[Tensor, Tensor | None],
    down: Tensor,
    rows: int,
    call: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    module, tiling = kernels(spec), spec.few
    wide = residual.new_empty(rows, spec.intermediate)
    partial = residual.new_empty(tiling.parts, rows, spec.hidden, dtype=torch.float32)
    out, after = torch.empty_like(residual), torch.empty_like(remaining)
    (gate, gate_bias), (up, up_bias) = gates, ups
    weight = _given_or(call.get("norm_weight"), up)
    row_warps = 8 if spec.hidden >= 2048 else 4
    start = lambda kernel, programs, values, warps: launch(
        getattr(module, kernel), (programs,), arguments(spec, kernel), {"remaining": remaining, "rows": rows, **values}, num_warps=warps
    )
    if needs_normalise(spec):
        normal = torch.empty_like(input)
        norm = {"source": input, "out": normal, "weight": weight, "bias": _given_or(call.get("norm_bias"), weight)}
        start("normalise", rows, norm, row_warps)
        input = normal
    biases = {"up_bias": _given_or(up_bias, up), "gate_bias": _given_or(gate_bias, up)}
    projected_up = {"source": input, "out": wide, "weight": weight, "up": up, "gate": gate, **biases}
    start("project_up", spec.up_programs, projected_up, tiling.warps)
    start("project_down", spec.down_programs, {"source": wide, "partial": partial, "down": down}, tiling.warps)
    finished = {"residual": residual, "partial": partial, "out": out, "after": after, "bias": _given_or(call.get("down_bias"), down)}
    finished |= {name: _given_or(call.get(name), down) for name in ("post_weight", "post_bias")}
    finished |= {name: call[name] for name in ("threshold", "skip_next")}
    start("finish", rows, finished, row_warps)
    return out, after


def _halves(spec: FfnSpec, up: Tensor, call: dict[str, Any]) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """(gate, its bias), (up, its bias): views of one weight when both are fused. Without a gate, up stands in for it."""
    up_bias = call.get("up_bias")
    if call["layout"] == "plain":
        return (up, None), (up, up_bias)
    if call["layout"] == "split":
        return (call["gate"], call.get("gate_bias")), (up, up_bias)
    if call["transposed"]:
        raise UnsupportedError("fused gate and up in transposed layout", where=_WHERE)
    half = spec.intermediate
    halves = [(up[i : i + half], None if up_bias is None else up_bias[i : i + half]) for i in (0, half)]
    return (halves[0], halves[1]) if call["layout"] == "gate_up" else (halves[1], halves[0])


def _given_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An operand that the kernel has no use for still needs a pointer."""
    return other if tensor is None else tensor

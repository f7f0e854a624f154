"""Runs `sparsify::ffn` and `sparsify::ffn_start` by generated Triton kernels: up to 32 rows share one stream of the weights here, more go
to `triton_ffn_rows`. Nothing synchronises."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import padded
from sparsify.backends.ffn import many_rows
from sparsify.backends.ffn.few_rows_template import START
from sparsify.backends.ffn.source import FfnSpec, FfnTiling, choose_tiling, ffn_source, needs_normalise
from sparsify.errors import KernelError, SparsifyError, UnsupportedError
from sparsify.ops import feed_forward

MAX_ROWS = 32
MAX_START_ROWS = 4096
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
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
    if max(rows, count) > MAX_START_ROWS:
        raise UnsupportedError(f"{max(rows, count)} rows", where="sparsify::ffn_start")
    out = like.new_empty(rows, dtype=torch.int32)
    state = feed_forward.run_state(like.device, key)
    block = padded(max(rows, count))
    read = positions.contiguous() if positions is not None else out
    try:
        with _on(like):
            _start_kernel()[(1,)](read, state, out, count, slot, rows, warmup, most, length, BLOCK=block, READS=positions is not None)
    except Exception as error:
        raise KernelError(f"{type(error).__name__}: {error}", where="sparsify::ffn_start") from error
    return out


@functools.cache
def _start_kernel() -> Any:
    return source.load(START, "ffn_start").start


def ffn(residual: Tensor, input: Tensor, remaining: Tensor, up: Tensor, down: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """See `sparsify.ops.feed_forward`; operands as in the reference.

    Raises:
        UnsupportedError: another dtype, weights that are not contiguous, or more than 32 rows where `triton_ffn_rows` does not take them.
        KernelError: a kernel could not be compiled or launched.
    """
    rows = feed_forward.rows_of(residual)
    weights = [w for w in (up, down, call.get("gate")) if w is not None]
    if rows == 0:
        return torch.empty_like(residual), torch.empty_like(remaining)
    if residual.dtype not in _DTYPES or any(w.dtype != residual.dtype or not w.is_contiguous() for w in weights):
        raise UnsupportedError(f"weights are not contiguous {residual.dtype}", where=_WHERE)
    if (call.get("gate") is not None) and (call.get("up_bias") is None) != (call.get("gate_bias") is None):
        raise UnsupportedError("only one of gate and up has a bias", where=_WHERE)
    spec = _spec_of(residual, down, rows, call)
    operands = residual.contiguous(), input.contiguous(), remaining, *_halves(spec, up, call)
    try:
        with _on(residual):
            if rows > MAX_ROWS:
                return many_rows.run(spec, *operands, down, _processors(residual.device), call)
            return _run(spec, *operands, down, rows, call)
    except SparsifyError:
        raise
    except Exception as error:
        raise KernelError(f"{type(error).__name__}: {error}", where=f"{_WHERE} ({spec.describe()})") from error


def _spec_of(residual: Tensor, down: Tensor, rows: int, call: dict[str, Any]) -> FfnSpec:
    dtype, hidden = _DTYPES[residual.dtype], residual.shape[-1]
    intermediate = down.shape[0] if call["transposed"] else down.shape[1]
    gated = call["layout"] != "plain"
    options = tuple((name, call[name]) for name in ("transposed", "activation", "norm", "eps", "post_norm", "post_eps", "scale"))
    present = zip(("norm_bias", "wide_bias", "down_bias", "post_bias"), ("norm_bias", "up_bias", "down_bias", "post_bias"), strict=True)
    options += tuple((field, call.get(operand) is not None) for field, operand in present)
    if rows > MAX_ROWS:
        return many_rows.spec_of(dtype, hidden, intermediate, gated, options, many_rows.tilings.get(dtype))
    tile = 16 if rows <= 16 else 32
    return _spec(
        dtype, tile, hidden, intermediate, _processors(residual.device), gated, options, tilings.get((dtype, hidden, intermediate))
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


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
    module, tiling = kernels(spec), spec.tiling
    wide = residual.new_empty(rows, spec.intermediate)
    partial = residual.new_empty(tiling.parts, rows, spec.hidden, dtype=torch.float32)
    out, after = torch.empty_like(residual), torch.empty_like(remaining)
    (gate, gate_bias), (up, up_bias) = gates, ups
    weight = call.get("norm_weight")
    row_warps = 8 if spec.hidden >= 2048 else 4
    if needs_normalise(spec):
        normal = torch.empty_like(input)
        module.normalise[(rows,)](input, remaining, normal, weight, _or(call.get("norm_bias"), weight), num_warps=row_warps)
        input = normal
    module.widen[(spec.wide_programs,)](
        input, remaining, wide, _or(weight, up), up, gate, _or(up_bias, up), _or(gate_bias, up), rows, num_warps=tiling.warps
    )
    module.narrow[(spec.narrow_programs,)](wide, remaining, partial, down, rows, num_warps=tiling.warps)
    module.finish[(rows,)](
        residual,
        remaining,
        partial,
        out,
        after,
        _or(call.get("down_bias"), down),
        _or(call.get("post_weight"), down),
        _or(call.get("post_bias"), down),
        call["threshold"],
        call["skip_next"],
        rows,
        num_warps=row_warps,
    )
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


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An operand that the kernel has no use for still needs a pointer."""
    return other if tensor is None else tensor


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()

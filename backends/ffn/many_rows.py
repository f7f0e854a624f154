"""Runs `sparsify::ffn` for more rows than share one stream of the weights: the rows that compute are compacted, and the products are over
those alone. How many they are is known on the device only; nothing synchronises."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.ffn.source import MANY, STRETCH, FfnSpec, RowsTiling, choose_rows_tiling, rows_source
from sparsify.errors import UnsupportedError
from sparsify.ops import feed_forward

_WHERE = "sparsify::ffn"
# the first compute capability with tensor descriptors in hardware
MIN_CAPABILITY = (9, 0)
_INTERPRETER_PROGRAMS = 3

# tilings that a benchmark or a test sets, by dtype; others are chosen
tilings: dict[str, RowsTiling] = {}


@functools.lru_cache(maxsize=4096)
def spec_of(
    dtype: str, hidden: int, intermediate: int, gated: bool, options: tuple[tuple[str, Any], ...], tiling: RowsTiling | None
) -> FfnSpec:
    return FfnSpec(dtype, MANY, hidden, intermediate, tiling or choose_rows_tiling(dtype, gated), gated, **dict(options))


@functools.lru_cache(maxsize=256)
def kernels(spec: FfnSpec) -> Any:
    """The module of a spec's kernels."""
    return source.load(rows_source(spec), "ffn_rows")


def check(residual: Tensor, weights: list[Tensor]) -> None:
    """Raises UnsupportedError for what tensor descriptors cannot read (rows of no multiple of 16 bytes), an older GPU, and float32."""
    if residual.is_cuda and torch.cuda.get_device_capability(residual.device) < MIN_CAPABILITY:
        raise UnsupportedError("many rows need tensor descriptors, from compute capability 9.0 on", where=_WHERE)
    if residual.is_cuda and residual.dtype == torch.float32:
        raise UnsupportedError("many rows are computed in half precision", where=_WHERE)
    unit = 16 // residual.element_size()
    if residual.shape[-1] % unit or any(w.shape[-1] % unit or w.data_ptr() % 16 for w in weights):
        raise UnsupportedError("rows of the weights are no multiple of 16 bytes", where=_WHERE)


def run(
    spec: FfnSpec,
    residual: Tensor,
    input: Tensor,
    remaining: Tensor,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    down: Tensor,
    processors: int,
    call: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out, remaining) as `sparsify.ops.feed_forward` says. gate, up: weight and bias; without a gate, up stands in for it."""
    module, tiling, rows = kernels(spec), spec.tiling, feed_forward.rows_of(residual)
    check(residual, [gate[0], up[0], down])
    order, slots, after = (torch.empty_like(remaining) for _ in range(3))
    count = remaining.new_empty(1)
    compacted = residual.new_empty(rows, spec.hidden)
    wide = residual.new_empty(rows, spec.intermediate)
    updates, out = residual.new_empty(rows, spec.hidden), torch.empty_like(residual)
    row_warps = 8 if spec.hidden >= 2048 else 4
    tile, step = tiling.row_tile, tiling.step
    turn = lambda box: box[::-1] if spec.transposed else box
    unused = down  # an operand that the kernel has no use for still needs a pointer
    or_unused = lambda tensor: unused if tensor is None else tensor
    module.compact[(-(-rows // STRETCH),)](remaining, order, slots, count, rows, num_warps=8)
    module.normalise[(rows,)](
        input, order, count, compacted, or_unused(call.get("norm_weight")), or_unused(call.get("norm_bias")), num_warps=row_warps
    )
    weight_box = turn([tiling.wide_tile, step])
    module.widen[(_programs(rows, tile, spec.intermediate, tiling.wide_tile, processors),)](
        _descriptor(compacted, [tile, step]),
        _descriptor(up[0], weight_box),
        _descriptor(gate[0], weight_box),
        _descriptor(wide, [tile, tiling.wide_tile]),
        count,
        or_unused(up[1]),
        or_unused(gate[1]),
        num_warps=tiling.warps,
    )
    module.narrow[(_programs(rows, tile, spec.hidden, tiling.narrow_tile, processors),)](
        _descriptor(wide, [tile, step]),
        _descriptor(down, turn([tiling.narrow_tile, step])),
        _descriptor(updates, [tile, tiling.narrow_tile // 2]),
        count,
        or_unused(call.get("down_bias")),
        num_warps=tiling.warps,
    )
    posts = (or_unused(call.get("post_weight")), or_unused(call.get("post_bias")))
    module.finish[(rows,)](
        residual, remaining, slots, updates, out, after, *posts, call["threshold"], call["skip_next"], num_warps=row_warps
    )
    return out, after


def _programs(rows: int, row_tile: int, columns: int, tile: int, processors: int) -> int:
    return min(processors, -(-rows // row_tile) * -(-columns // tile))


def _descriptor(matrix: Tensor, box: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box)

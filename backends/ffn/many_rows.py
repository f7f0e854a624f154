"""Runs `sparsify::ffn` for more rows than share one stream of the weights: the rows that compute are compacted, and the products are over
those alone. How many they are is known on the device only; nothing synchronises."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.launch import capability, launch, need, processors
from sparsify.backends.ffn.source import CHUNK, MANY, FfnSpec, RowsTiling, arguments, choose_rows_tiling, rows_source
from sparsify.ops import feed_forward, limits
from sparsify.ops.limits import cdiv

_WHERE = "sparsify::ffn"

# tilings that a benchmark or a test sets, by dtype; others are chosen
tilings: dict[str, RowsTiling] = {}


@functools.lru_cache(maxsize=4096)
def kernel_spec(
    dtype: str, hidden: int, intermediate: int, gated: bool, options: tuple[tuple[str, Any], ...], tiling: RowsTiling | None
) -> FfnSpec:
    return FfnSpec(dtype, MANY, hidden, intermediate, tiling or choose_rows_tiling(dtype, gated), gated, **dict(options))


@functools.lru_cache(maxsize=256)
def kernels(spec: FfnSpec) -> Any:
    """The module of a spec's kernels."""
    return source.load(rows_source(spec), "ffn_rows")


def check(residual: Tensor, weights: list[Tensor]) -> None:
    """Raises UnsupportedError for what tensor descriptors cannot read (rows of no multiple of 16 bytes), an older GPU, and float32."""
    if residual.is_cuda:
        served = capability(residual.device) >= limits.DESCRIPTOR_CAPABILITY
        need(served, "many rows need tensor descriptors, from compute capability 9.0 on", _WHERE)
        need(residual.dtype != torch.float32, "many rows are computed in half precision", _WHERE)
    unit = 16 // residual.element_size()
    whole = residual.shape[-1] % unit == 0 and all(w.shape[-1] % unit == 0 and w.data_ptr() % 16 == 0 for w in weights)
    need(whole, "rows of the weights are no multiple of 16 bytes", _WHERE)


def run(
    spec: FfnSpec,
    residual: Tensor,
    input: Tensor,
    remaining: Tensor,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    down: Tensor,
    call: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out, remaining) as `sparsify.ops.feed_forward` says. gate, up: weight and bias; without a gate, up stands in for it."""
    module, tiling, rows = kernels(spec), spec.many, feed_forward.rows_of(residual)
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
    programs = lambda columns, up_tile: min(processors(residual.device), cdiv(rows, tile) * cdiv(columns, up_tile))
    shared = {"remaining": remaining, "order": order, "slots": slots, "count": count, "rows": rows}
    start = lambda kernel, grid, values, warps: launch(
        getattr(module, kernel), (grid,), arguments(spec, kernel), shared | values, num_warps=warps
    )
    start("compact", cdiv(rows, CHUNK), {}, 8)
    norm = {name: or_unused(call.get(f"norm_{name}")) for name in ("weight", "bias")}
    start("normalise", rows, {"source": input, "out": compacted, **norm}, row_warps)
    weight_box = turn([tiling.up_tile, step])
    projected_up = {
        "source": _descriptor(compacted, [tile, step]), "up": _descriptor(up[0], weight_box), "gate": _descriptor(gate[0], weight_box),
        "out": _descriptor(wide, [tile, tiling.up_tile]), "up_bias": or_unused(up[1]), "gate_bias": or_unused(gate[1]),
    }  # fmt: skip
    start("project_up", programs(spec.intermediate, tiling.up_tile), projected_up, tiling.warps)
    projected_down = {
        "source": _descriptor(wide, [tile, step]), "down": _descriptor(down, turn([tiling.down_tile, step])),
        "out": _descriptor(updates, [tile, tiling.down_tile // 2]), "bias": or_unused(call.get("down_bias")),
    }  # fmt: skip
    start("project_down", programs(spec.hidden, tiling.down_tile), projected_down, tiling.warps)
    finished = {"residual": residual, "updates": updates, "out": out, "after": after}
    finished |= {name: or_unused(call.get(name)) for name in ("post_weight", "post_bias")}
    finished |= {name: call[name] for name in ("threshold", "skip_next")}
    start("finish", rows, finished, row_warps)
    return out, after


def _descriptor(matrix: Tensor, box: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box)

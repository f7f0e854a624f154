"""What it costs and saves to compact the rows of a prompt that do not skip a feed-forward block.

    dense     = max(FLOPs / (ceiling · PRODUCT), weights' bytes / bandwidth) + pass over the wide activations + 3 launches
    compacted = max(computed FLOPs / (ceiling · COMPACTED), weights' bytes / bandwidth) + 5 launches

Norm, gather and residual sum move the same bytes on both sides. The generated kernels compute the activation beside the products; Inductor
reads and writes the wide activations once more for it.
"""

from __future__ import annotations

from typing import Any

import sympy

from sparsify.costs.device import Device
from sparsify.costs.sizes import FeedForwardSizes

# Share of the matrix ceiling that the library's products sustain, and the generated ones over compacted rows, gather and sum included.
# COMPACTED is the lowest of the benchmark's cells on an H200 (4K rows, a tenth of them skipping; 16K rows reach 0.97).
PRODUCT, COMPACTED = 1.0, 0.92
_MOST_ROWS = 1 << 22


def _flops(block: FeedForwardSizes) -> Any:
    """Of a row."""
    return 2 * sympy.sympify(block.weight_bytes) / block.dtype.itemsize


def _pass_bytes(block: FeedForwardSizes) -> Any:
    """Of a row, for activation and gate after the products."""
    return block.matrices * sympy.sympify(block.intermediate) * block.dtype.itemsize


def dense_seconds(rows: Any, block: FeedForwardSizes, device: Device) -> sympy.Expr:
    products = sympy.Max(_flops(block) * rows / (device.flops * PRODUCT), sympy.sympify(block.weight_bytes) / device.bandwidth)
    return products + _pass_bytes(block) * rows / device.bandwidth + 3 * device.launch


def compacted_seconds(rows: Any, block: FeedForwardSizes, device: Device, share: float) -> sympy.Expr:
    """share: of the rows that skip the block."""
    computed = _flops(block) * rows * (1 - share) / (device.flops * COMPACTED)
    return sympy.Max(computed, sympy.sympify(block.weight_bytes) / device.bandwidth) + 5 * device.launch


def break_even(block: FeedForwardSizes, device: Device) -> float:
    """Share of rows that must skip so that compacting the rest costs no time, of a prompt that is long enough."""
    dense = _flops(block) / (device.flops * PRODUCT) + _pass_bytes(block) / device.bandwidth
    return max(0.0, float(1 - dense * device.flops * COMPACTED / _flops(block)))


def rows_from(block: FeedForwardSizes, device: Device, share: float) -> int | None:
    """Smallest power of two of rows from which on compacting pays when `share` of them skip; None where no number does."""
    if share <= break_even(block, device):
        return None
    rows = 64
    while rows <= _MOST_ROWS:
        if compacted_seconds(rows, block, device, share) < dense_seconds(rows, block, device):
            return rows
        rows *= 2
    return None

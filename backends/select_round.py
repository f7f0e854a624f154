"""Cells in 8 bits for the estimate's products, which run at twice the rate of 16 bits: the kernel's text and its launch.

A cell gets a scale of its own, so that one large token does not cost its neighbours their bits. Of keys, a mean is taken away first: many
models give all keys of a head a common offset, large in a few channels, and taking it away changes no softmax over keys (Zhang et al.,
"SageAttention", arXiv 2410.02367).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUND = '''

@triton.jit(do_not_specialize=["heads", "length", "cells"])
def round_cells(x, out, scales, mean, x_b, x_h, x_n, heads, length, cells, APART: tl.constexpr, SHIFTED: tl.constexpr):
    """CELLS cells of one head, cell i from token i * APART on.

    out: int8 [batch * heads, cells, STRIDE, PITCH], 0 past HEAD_DIM. scales: fp32 [batch * heads, cells], NaN where a number is not finite.
    """
    bh = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    r = tl.arange(0, STRIDE)
    d = tl.arange(0, WIDTH)
    token = cell[:, None] * APART + r[None, :]
    real = (token < length)[:, :, None] & (d < HEAD_DIM)[None, None, :]
    head = x + (bh // heads).to(tl.int64) * x_b + (bh % heads).to(tl.int64) * x_h
    y = tl.load(head + token.to(tl.int64)[:, :, None] * x_n + d[None, None, :], mask=real, other=0.0).to(tl.float32)
    if SHIFTED:
        y -= tl.load(mean + bh * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)[None, None, :]
    # sizes as integers are in the order of the numbers, and whatever is not finite lies above them all
    size = tl.max(tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), 1)
    whole = size < 0x7F800000
    size = tl.where(whole, tl.maximum(size.to(tl.float32, bitcast=True), 1e-20), 1.0)
    # 1.5 · 2^23 leaves no room for a fraction: the sum's last byte is the number, rounded to nearest even, without a conversion
    y = y * (127.0 / size)[:, None, None] + 12582912.0
    at = (bh.to(tl.int64) * cells + cell)[:, None, None] * (STRIDE * PITCH) + r[None, :, None] * PITCH + d[None, None, :]
    tl.store(out + at, y.to(tl.int32, bitcast=True).to(tl.int8), mask=(cell < cells)[:, None, None] & (d < PITCH)[None, None, :])
    tl.store(scales + bh.to(tl.int64) * cells + cell, tl.where(whole, size / 127.0, float("nan")), mask=cell < cells)
'''

# what a program holds in registers: 32 numbers a thread
_NUMBERS = 8192
_WARPS = 8


def constants(head_dim: int, stride: int) -> dict[str, int]:
    """What the text of `round_cells` is filled in with: WIDTH, PITCH (a row of 16 bytes' multiple, for tensor descriptors) and CELLS."""
    pitch = -(-head_dim // 16) * 16
    width = 1 << (pitch - 1).bit_length()
    return {"width": width, "pitch": pitch, "part": max(1, _NUMBERS // (width * stride))}


def launch(module: Any, values: Tensor, mean: Tensor | None, cells: int, apart: int, stride: int) -> tuple[Tensor, Tensor]:
    """int8 [batch, heads, cells · stride, head_dim], whose rows lie a multiple of 16 bytes apart, and fp32 scales [batch, heads, cells].

    Args:
        module: generated, with `round_cells`.
        values: [batch, heads, length, head_dim]; tokens past `length` count as 0.
        mean: fp32 [batch, heads, head_dim], taken from every token.
        apart: tokens from one cell's first to the next one's.
    """
    batch, heads, length, head_dim = values.shape
    sizes = constants(head_dim, stride)
    out = torch.empty(batch, heads, cells * stride, sizes["pitch"], dtype=torch.int8, device=values.device)
    scales = torch.empty(batch, heads, cells, dtype=torch.float32, device=values.device)
    arguments = (values, out, scales, scales if mean is None else mean, *values.stride()[:3], heads, length, cells)
    module.round_cells[(-(-cells // sizes["part"]), batch * heads)](*arguments, APART=apart, SHIFTED=mean is not None, num_warps=_WARPS)
    return out[..., :head_dim], scales

"""Cells as the estimate multiplies them where those are not the tokens as they lie: means of neighbours, 8 bits, or both.

The mean of two or four neighbouring tokens stands for them all, among queries and among keys: a half or a quarter of the products, each
of which speaks of four or sixteen pairs of tokens. 8-bit products run at twice the rate of 16 bits. There a cell gets a scale of its own,
so that one large token does not cost its neighbours their bits (the keys of a block share one where integers of a block are compared), and
of keys a mean is taken away first: many models give all keys of a
head a common offset, large in a few channels, and taking it away changes no softmax over keys (Zhang et al., "SageAttention", arXiv
2410.02367).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen.arguments import Argument, constexprs, integers, pointers
from sparsify.backends.codegen.launch import launch, power_of_two, stride_values
from sparsify.ops.limits import cdiv

PREPARE = '''

@triton.jit
def tokens_of(head, token, d, x_n, length):
    """fp32 [CELLS, STEPS, WIDTH]: tokens [CELLS, STEPS] of a head, 0 past its length."""
    real = (token < length)[:, :, None] & (d < HEAD_DIM)[None, None, :]
    return tl.load(head + token.to(tl.int64)[:, :, None] * x_n + d[None, None, :], mask=real, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=[${unspecialised}])
def prepare_cells(${parameters}):
    """CELLS cells of one head, cell i from token i * APART on.

    out: [batch * heads, cells, STEPS, PITCH], 0 past HEAD_DIM.
%if int8
    scales: fp32 [batch * heads, cells], NaN where a number is not finite; SHARING neighbouring cells have one.
%end
    """
    bh = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    r = tl.arange(0, STEPS)
    d = tl.arange(0, WIDTH)
    head = x + (bh // heads).to(tl.int64) * x_b + (bh % heads).to(tl.int64) * x_h
    token = cell[:, None] * APART + MERGED * r[None, :]
    y = tokens_of(head, token, d, x_n, length)
    for i in tl.static_range(1, MERGED):
        y += tokens_of(head, token + i, d, x_n, length)
    y *= 1.0 / MERGED
    if SHIFTED:
        y -= tl.load(mean + bh * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)[None, None, :]
    at = (bh.to(tl.int64) * cells + cell)[:, None, None] * (STEPS * PITCH) + r[None, :, None] * PITCH + d[None, None, :]
    kept = (cell < cells)[:, None, None] & (d < PITCH)[None, None, :]
%if int8
    # sizes as integers are in the order of the numbers, and whatever is not finite lies above them all
    size = tl.max(tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), 1)
    if SHARING > 1:
        shared = tl.max(tl.reshape(size, [CELLS // SHARING, SHARING]), 1)
        size = tl.reshape(tl.broadcast_to(shared[:, None], [CELLS // SHARING, SHARING]), [CELLS])
    whole = size < 0x7F800000
    size = tl.where(whole, tl.maximum(size.to(tl.float32, bitcast=True), 1e-20), 1.0)
    # 1.5 · 2^23 leaves no room for a fraction: the sum's last byte is the number, rounded to nearest even, without a conversion
    y = y * (127.0 / size)[:, None, None] + 12582912.0
    tl.store(out + at, y.to(tl.int32, bitcast=True).to(tl.int8), mask=kept)
    tl.store(scales + bh.to(tl.int64) * cells + cell, tl.where(whole, size / 127.0, float("nan")), mask=cell < cells)
%else
    tl.store(out + at, y.to(tl.${number}), mask=kept)
%end
'''

# what a program holds in registers: 32 numbers a thread
_NUMBERS = 8192
_WARPS = 8


def arguments(dtype: str, int8: bool) -> tuple[Argument, ...]:
    """Of `prepare_cells`, in order. dtype: of the tokens."""
    tensors = [*pointers(dtype, "x"), *pointers("i8" if int8 else dtype, "out"), *pointers("fp32", "scales", "mean")]
    sizes = [*integers("x_b", "x_h", "x_n", aligned=True), *integers("heads", "length", "cells", specialised=False)]
    return (*tensors, *sizes, *constexprs("APART", "SHIFTED", "SHARING"))


def constants(head_dim: int, steps: int, sharing: int = 1) -> dict[str, int]:
    """What the text of `prepare_cells` is filled in with: WIDTH, PITCH (a row of 16 bytes' multiple, for tensor descriptors) and CELLS, no
    fewer than may share a scale."""
    pitch = cdiv(head_dim, 16) * 16
    width = power_of_two(pitch)
    return {"width": width, "pitch": pitch, "part": max(sharing, _NUMBERS // (width * steps))}


def prepare_cells(
    module: Any, dtype: str, values: Tensor, mean: Tensor | None, cells: int, apart: int, steps: int, int8: bool, sharing: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Cells side by side, and their scales if they are rounded.

    Args:
        module: generated, with the kernel `prepare_cells`.
        dtype: of `values`, as specs name it.
        values: [batch, heads, length, head_dim]; tokens past `length` count as 0.
        mean: fp32 [batch, heads, head_dim], taken from every token.
        apart: tokens from one cell's first to the next one's.
        steps: tokens or means of a cell.
        sharing: neighbouring cells with one scale; the module was generated for no fewer.

    Returns:
        [batch, heads, cells · steps, head_dim] in int8 or the dtype of `values`, rows a multiple of 16 bytes apart; fp32 scales [batch,
        heads, cells], None without int8.
    """
    batch, heads, length, head_dim = values.shape
    sizes = constants(head_dim, steps, module.SHARED_CELLS)
    out = values.new_empty(batch, heads, cells * steps, sizes["pitch"], dtype=torch.int8 if int8 else values.dtype)
    scales = values.new_empty(batch, heads, cells, dtype=torch.float32) if int8 else None
    given = {"x": values, "out": out, "scales": out if scales is None else scales, "mean": out if mean is None else mean}
    given |= {"heads": heads, "length": length, "cells": cells, "APART": apart, "SHIFTED": mean is not None, "SHARING": sharing}
    given |= stride_values(x=(values, "bhn"))
    launch(module.prepare_cells, (cdiv(cells, sizes["part"]), batch * heads), arguments(dtype, int8), given, num_warps=_WARPS)
    return out[..., :head_dim], scales

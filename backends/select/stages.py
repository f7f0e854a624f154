"""`sparsify::select_blocks` in one stage or two: a coarse one lists blocks, a finer one scores those alone and chooses among them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen.launch import launch, launching, power_of_two
from sparsify.backends.select import source as select_source
from sparsify.backends.select import triton
from sparsify.backends.select.source import SelectSpec, SelectTiling
from sparsify.backends.select.triton import LIMITS, Limits
from sparsify.errors import UnsupportedError
from sparsify.ops.limits import cdiv
from sparsify.ops.selection import SelectCall

_WHERE = "sparsify::select_blocks"
# key cells that are multiplied at once, and the fewest query cells that tensor cores take
_COLS, _LEAST_ROWS = 128, 16
# places of a list up to which a narrow launch of `choose` serves it
_NARROW = 256


def select_blocks(call: SelectCall, *, limits: Limits = LIMITS) -> tuple[Tensor, Tensor]:
    """As `triton.select_blocks`, of calls with a second stage too."""
    if not call.refine_stride or call.empty:
        return triton.select_blocks(call, limits=limits)
    coarse, fine = call.stages
    spec = listed_spec(fine, limits)
    listed = triton.select_blocks(coarse, limits=limits)
    lists = call.empty_lists()
    with launching(call.device, lambda: f"{_WHERE} ({spec.describe()})"):
        refine(fine, spec, listed, lists, None, limits)
    return lists


def listed_spec(call: SelectCall, limits: Limits) -> SelectSpec:
    """The kernels of a second stage.

    Raises:
        UnsupportedError: no kernel serves this call: the reference does.
    """
    rows = call.block_size // call.span
    tiling = SelectTiling(rows, max(_COLS, call.block_size // call.stride), 4, 3, 1, False)
    spec = triton.kernel_spec(call, tiling, limits.fused_width)
    masked = {"padding": spec.key_flags, "segments": spec.segments, "windows": spec.window != "none"}
    obstacles = [
        *(name for name, has in masked.items() if has),
        *(["an estimate shared by a group"] if call.estimate.group else []),
        *([f"{rows} cells of a query block"] if rows < _LEAST_ROWS else []),
        *([f"rows of {call.key_blocks} blocks"] if spec.wide else []),
    ]
    if obstacles:
        raise UnsupportedError(f"a second stage beside {', '.join(obstacles)}", where=_WHERE)
    return dataclasses.replace(spec, listed=True)


def refine(
    call: SelectCall,
    spec: SelectSpec,
    listed: tuple[Tensor, Tensor],
    lists: tuple[Tensor, Tensor],
    importances: Tensor | None,
    limits: Limits,
) -> None:
    """Chooses among listed blocks.

    Args:
        call: with the finer stride, in one stage.
        listed: block lists of the coarse stage.
        lists: block lists to write.
        importances: fp32 [batch, query_heads, query_blocks, cells, key_blocks], 0 throughout: gets each cell's masses, for tests.
    """
    module = triton.load_module(spec)
    tiles = cdiv(call.key_cells, spec.tiling.cols)
    per_block = call.block_size // call.span
    sums = tops = None
    operands, mean = triton.mask_operands(call, spec), triton.whole_mean(call, spec)
    for _, chunks in itertools.groupby(triton.plan_chunks(call, spec, limits.scratch_bytes), lambda chunk: (chunk.batch, chunk.kv_heads)):
        first, *more = chunks
        scales: dict[str, Tensor | None] = {}
        queries, keys = triton.chunk_operands(call, spec, first)
        if spec.estimate.prepared:
            queries, keys, scales = triton.prepared_operands(call, spec, module, first, queries, keys, mean)
        for chunk in (first, *more):
            (b0, b1), (g0, g1) = chunk.batch, chunk.kv_heads
            heads, rows = slice(g0 * call.group, g1 * call.group), chunk.cells[1] - chunk.cells[0]
            served = (b1 - b0) * (heads.stop - heads.start)
            if sums is None or tops is None:  # no chunk is larger than the first
                sums = queries.new_empty(served * rows * tiles * spec.tile_blocks, dtype=torch.float16)
                tops = queries.new_empty(served * rows * tiles, dtype=torch.float32)
            values: dict[str, Any] = {"sums": sums, "tops": tops, **scales, **triton.chunk_masks(operands, call, spec, chunk)}
            values |= triton.chunk_numbers(call, spec, chunk, queries, keys)
            values |= dict(zip(("listed_counts", "listed_indices"), (one[b0:b1, heads] for one in listed), strict=True))
            values |= dict(zip(("counts", "indices"), (one[b0:b1, heads] for one in lists), strict=True))
            values |= {
                "first_block": chunk.cells[0] // per_block,
                "importances": None if importances is None else importances[b0:b1, heads],
            }
            grid = (cdiv(rows, per_block), served)
            launch(module.score, grid, select_source.arguments(spec, "score"), values, num_warps=4, num_stages=spec.tiling.stages)
            whole, narrow, least = power_of_two(tiles) * spec.tile_blocks, max(_NARROW, spec.tile_blocks), -1
            for width in (narrow, whole) if narrow < whole else (whole,):
                values |= {"TILES": width // spec.tile_blocks, "LEAST": least}
                warps = triton.choosing_warps(width, limits)
                launch(module.choose, grid, select_source.arguments(spec, "choose"), values, num_warps=warps)
                least = width
        del queries, keys, scales

"""Runs selections whose query cells stay while keys pass by (`stream_template`): of all blocks, of groups of heads, or of listed blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen.launch import launch, meant, power_of_two, shared_bytes
from sparsify.backends.select import source as select_source
from sparsify.backends.select import triton
from sparsify.backends.select.source import SelectSpec, SelectTiling
from sparsify.backends.select.triton import Cells, Chunk, Limits
from sparsify.errors import UnsupportedError
from sparsify.ops import scratch
from sparsify.ops.limits import STREAMED_CELL, cdiv
from sparsify.ops.selection import SelectCall

_WHERE = "sparsify::select_blocks"
Lists = tuple[Tensor, Tensor]
# (query cells, key cells, warps, stages) of a tile, and of one of listed blocks, whose query cells are those of several heads, by the most
# bytes of a cell: the fastest of those tried on an H200
TILES = {
    128: ((128, 128, 8, 3), (128, 128, 4, 3)),
    256: ((128, 128, 8, 2), (128, 128, 8, 2)),
    # a tile has to be read often; few key cells at a time took three times as long
    select_source.WHOLE_CELL: ((256, 64, 8, 3), (64, 32, 4, 3)),
}
# of cells that are not multiplied whole
PIECES = ((128, 64, 4, 3), (128, 64, 4, 3))
# of the largest cells and more key blocks than this, what threads exchange leaves no room for a third stage
_EXCHANGED_BLOCKS = 4
# where shared memory is small
SMALL = ((128, 32, 4, 2), (64, 32, 4, 3))
_SMALL_SHARED = 227 << 10
# places up to which a launch of `choose` serves a row, and logarithms of masses that a thread of it holds
PLACES = (64, 128, 256, 512, 1024)
NUMBERS = 128
# most warps of a program of `choose`; most cells of a place that a thread reads at once, and of its places whose marks make a number
WARPS, VECTOR, WORD = 8, 2, 16


def spec_of(
    call: SelectCall, limits: Limits, tiling: SelectTiling | None = None, *, grouped: bool = False, listed: bool = False
) -> SelectSpec:
    """The kernels of a call.

    Args:
        tiling: instead of the device's, for tests and tuning.
        grouped: the heads of a group get one list.
        listed: the heads of a group have one already, which is chosen among.

    Raises:
        UnsupportedError: no kernel of this sort serves the call.
    """
    obstacles = call.unstreamed(listed=listed, widest=limits.fused_width)
    if call.pool != "row":
        obstacles += (f"under the rule {call.pool}",)
    if obstacles:
        raise UnsupportedError(f"a tile that stays {', '.join(obstacles)}", where=_WHERE)
    spec = triton.kernel_spec(call, tiling or _tiling(call, call.block_size // call.span, listed), limits.fused_width)
    return dataclasses.replace(spec, streamed=True, grouped=grouped, listed=listed, finer=call.finer, wide=False)


def cell_bytes(call: SelectCall) -> int:
    """Of a query or key cell as it is multiplied."""
    return call.steps * call.query.shape[3] * (1 if call.estimate.int8 else call.query.element_size())


def _tiling(call: SelectCall, rows: int, listed: bool) -> SelectTiling:
    """rows: query cells of a block."""
    device = meant(call.device)
    size = cell_bytes(call)
    if device.type == "cuda" and shared_bytes(device) < _SMALL_SHARED:
        tiles = SMALL
    else:
        tiles = next((tiles for most, tiles in TILES.items() if size <= most), PIECES)
    most, cols, warps, stages = tiles[listed]
    if STREAMED_CELL < size <= select_source.WHOLE_CELL and cols * call.stride > _EXCHANGED_BLOCKS * call.block_size:
        stages = min(stages, 2)
    if listed:
        most = min(power_of_two(call.group), max(1, most // rows)) * rows
    return SelectTiling(max(most, rows), max(cols, call.block_size // call.stride), warps, stages, 1, False)


def serve(
    call: SelectCall,
    spec: SelectSpec,
    chunk: Chunk,
    cells: Cells,
    masks: dict[str, Any],
    lists: Lists,
    limits: Limits,
    listed: Lists | None = None,
    importances: Tensor | None = None,
) -> None:
    """Scores and chooses for some batch rows and KV heads.

    Args:
        cells: of these alone.
        masks: of the whole call, as `triton.mask_operands`.
        lists: block lists to write, of the whole call; by KV head where heads of a group get one.
        listed: of the whole call and by KV head, what is chosen among.
        importances: fp32 [batch, query_heads, query_blocks, cells, key_blocks], 0 throughout: gets each cell's masses, for tests.
    """
    module, per_block, kv_blocks = triton.load_module(spec), call.block_size // call.span, call.kv_heads * call.query_blocks
    room, shares = functools.partial(_places, call, spec), list(parts(call, spec, chunk, limits.scratch_bytes))
    logs = cells.queries.new_empty(max(_numbers(call, spec, part) for part in shares), dtype=torch.float16)
    for part in shares:
        (b0, b1), (g0, g1), (first, last) = part.batch, part.kv_heads, part.cells
        heads, served = slice(g0 * call.group, g1 * call.group), (b1 - b0) * (g1 - g0)
        some = cells.of(b0 - chunk.batch[0], b1 - chunk.batch[0], g0 - chunk.kv_heads[0], g1 - chunk.kv_heads[0], call.group)
        values: dict[str, Any] = {"logs": logs, **some.scales, **triton.chunk_masks(masks, call, spec, part)}
        values |= triton.chunk_numbers(call, spec, part, some.queries, some.keys)
        values |= {"first_block": first, "blocks": last - first, "first_seen": room(first, first + 1), "lists_batch": kv_blocks}
        if listed is not None:
            values |= dict(zip(("listed_counts", "listed_indices"), (one[b0:b1, g0:g1] for one in listed), strict=True))
            grid = (last - first, served * cdiv(call.group, spec.tile_heads))
        else:
            grid = (served * call.group, cdiv(last * per_block, spec.tiling.rows) - first * per_block // spec.tiling.rows)
        options = {"num_warps": spec.tiling.warps, "num_stages": spec.tiling.stages}
        launch(module.score, grid, select_source.arguments(spec, "score"), values, **options)
        owners = slice(g0, g1) if spec.grouped else heads
        values |= dict(zip(("counts", "indices"), (one[b0:b1, owners] for one in lists), strict=True))
        values["importances"] = None if importances is None else importances[b0:b1, heads]
        if spec.grouped:
            values |= {"heads": g1 - g0, "counts_batch": kv_blocks}
        programs = served * (1 if spec.grouped else call.group)
        for begin, end, places, least in _widths(call, spec, first, last):
            constants, warps = choosing(places, per_block)
            values |= {"begin": begin, "PLACES": places, "LEAST": least, **constants}
            launch(module.choose, (end - begin, programs), select_source.arguments(spec, "choose"), values, num_warps=warps)


def choosing(places: int, cells: int) -> tuple[dict[str, int], int]:
    """For rows of so many places, and so many cells of a block: what `choose` takes as constants, and its warps.

    CELLS: those that it takes at once. VECTOR: those that lie in one thread. SPREAD: threads beside each other along the places. WORD:
    places of a thread whose marks are packed into one number.
    """
    warps = min(WARPS, max(1, places * cells // (32 * NUMBERS)))
    at_once = max(1, min(cells, 32 * warps * NUMBERS // places))
    vector = min(VECTOR, at_once)
    spread = min(places, max(1, 32 * warps * vector // at_once))
    return {"CELLS": at_once, "VECTOR": vector, "SPREAD": spread, "WORD": min(WORD, places // spread)}, warps


def _widths(call: SelectCall, spec: SelectSpec, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
    """Query blocks of each launch of `choose`, its places, and how many places a row has at least that it serves, less 1."""
    longest, least = power_of_two(call.key_blocks), -1
    for places in (*(width for width in PLACES if width < longest), longest):
        begin, end = first, last
        if spec.triangular:  # block i sees `seen + i` blocks, the last one perhaps one less, and lists no more
            seen = cdiv(call.block_size + int(call.start), call.block_size)
            begin = max(first, least + 1 - seen) if least >= 0 else first  # the first launch has blocks of rows before all keys too
            end = last if spec.listed else min(last, places + 2 - seen)
        if begin < end:
            yield begin, end, places, least
        least = places


def _places(call: SelectCall, spec: SelectSpec, first: int, last: int) -> int:
    """Places of scratch for query blocks from `first` to before `last` of a head, as `row_at` counts them."""
    start = int(call.start) if spec.triangular else None
    return scratch.places(first, last, call.query_len, call.key_blocks, start, call.block_size)


def _numbers(call: SelectCall, spec: SelectSpec, part: Chunk) -> int:
    """Logarithms of a part."""
    (b0, b1), (g0, g1) = part.batch, part.kv_heads
    return (b1 - b0) * (g1 - g0) * call.group * _places(call, spec, *part.cells) * (call.block_size // call.span)


def parts(call: SelectCall, spec: SelectSpec, chunk: Chunk, scratch_bytes: int) -> Iterator[Chunk]:
    """Batch rows, KV heads and query blocks, instead of cells, of a chunk that are served at once: as many KV heads as scratch allows, else
    some blocks of one, in whole tiles."""
    per_block = call.block_size // call.span
    (b0, b1), (g0, g1), blocks = chunk.batch, chunk.kv_heads, call.query_blocks
    logs = scratch.Logs(2 * call.group * per_block, _places(call, spec, 0, blocks), blocks, call.key_blocks)
    unit = 1 if spec.listed else max(1, spec.tiling.rows // per_block)
    rows, count, step = logs.at_once(b1 - b0, g1 - g0, scratch_bytes, unit)
    for b in range(b0, b1, rows):
        for g in range(g0, g1, count):
            for block in range(0, blocks, step):
                yield Chunk((b, b + rows), (g, min(g + count, g1)), (block, min(block + step, blocks)))

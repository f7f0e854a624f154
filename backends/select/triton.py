"""Runs `sparsify::select_blocks` by generated Triton kernels: operands, scratch, chunks of heads and rows, launches.

No step reads the device, and grids depend on shapes alone, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.launch import (
    DTYPES,
    LOG2E,
    capability,
    launch,
    launching,
    meant,
    power_of_two,
    processors,
    shared_bytes,
    stride_values,
)  # fmt: skip
from sparsify.backends.select import masks, prepare
from sparsify.backends.select import source as select_source
from sparsify.backends.select.source import SelectSpec, SelectTiling
from sparsify.errors import UnsupportedError
from sparsify.ops.limits import WIDEST_ROW, cdiv
from sparsify.ops.scratch import SUM_BYTES
from sparsify.ops.selection import RULES, RuleArgument, SelectCall

_WHERE = "sparsify::select_blocks"
_MAX_HEAD_DIM = 512
# a position that no token has, as in the kernels
_NEVER = 1 << 30
# key blocks below which a narrower launch of `choose` gains nothing
_LEAST_WIDTH = 128
# so that a masked logit, minus infinity, never meets a scale of 0
_LEAST_SCALE = 1e-12


@dataclass(frozen=True)
class Limits:
    """scratch_bytes: of one launch; at 128K tokens and stride 16 a head takes 18 MB, so that one launch serves 32 heads.
    fused_width: key blocks of a row that stay in registers, 32 numbers a thread with 8 warps. part: key blocks at a time beyond.
    numbers: key blocks of a row for each warp of `choose`. Under the row rule two or four cells at once were slower on an
    H200, by a seventh and more, and so were fewer numbers a warp."""

    scratch_bytes: int = SUM_BYTES
    fused_width: int = WIDEST_ROW
    part: int = 2048
    numbers: int = 1024


LIMITS = Limits()


@dataclass(frozen=True)
class Chunk:
    """What one pair of launches serves: batch rows, KV heads and query cells, as half-open ranges."""

    batch: tuple[int, int]
    kv_heads: tuple[int, int]
    cells: tuple[int, int]


@dataclass(frozen=True)
class Cells:
    """What is multiplied, of some batch rows and KV heads.

    queries: [batch, scored heads, tokens or means of neighbours, head_dim]. keys: [batch, kv_heads, likewise, head_dim].
    scales: the arguments that scale them, [batch, heads, cells] each.
    """

    queries: Tensor
    keys: Tensor
    scales: dict[str, Tensor | None]

    def of(self, b0: int, b1: int, g0: int, g1: int, group: int) -> Cells:
        """Those of fewer batch rows and KV heads, counted from the first ones here."""
        heads = slice(g0 * group, g1 * group)
        ranges = {"query_scales": heads, "key_scales": slice(g0, g1)}
        scales = {name: None if found is None else found[b0:b1, ranges[name]] for name, found in self.scales.items()}
        return Cells(self.queries[b0:b1, heads], self.keys[b0:b1, g0:g1], scales)


def select_blocks(call: SelectCall, *, tiling: SelectTiling | None = None, limits: Limits = LIMITS) -> tuple[Tensor, Tensor]:
    """The op by generated kernels, of a call that was checked.

    Args:
        tiling: instead of the device's, for tests and tuning.
        limits: on scratch and widths, for tests.

    Returns:
        counts int32 [batch, query_heads, query_blocks], rising indices int16 [batch, query_heads, query_blocks, key_blocks]; entries
        past the count are whatever lay in memory.

    Raises:
        UnsupportedError: no kernel takes this call.
        KernelError: a kernel could not be compiled or launched.
    """
    counts, indices = call.empty_lists()
    if call.empty:
        return counts.zero_(), indices
    if call.refine_stride:
        raise UnsupportedError("a second, finer stage of the estimate", where=_WHERE, hint="the reference serves it")
    spec = kernel_spec(call, tiling or _tiling(meant(call.device), call.estimate.int8), limits.fused_width)
    with launching(call.device, lambda: f"{_WHERE} ({spec.describe()})"):
        _run(call, spec, counts, indices, None, limits)
    return counts, indices


def importance(call: SelectCall, *, tiling: SelectTiling | None = None) -> Tensor:
    """As the reference's `importance`, as the kernels compute it, for tests."""
    counts, indices = call.empty_lists()
    cells = (call.block_size // call.span,) if call.pool == "row" else ()
    result = torch.zeros(*counts.shape, *cells, call.key_blocks, dtype=torch.float32, device=call.device)
    spec = replace(kernel_spec(call, tiling or _tiling(meant(call.device), call.estimate.int8), LIMITS.fused_width), importance=True)
    _run(call, spec, counts, indices, result, LIMITS)
    return result


def tiling_for(capability: tuple[int, int], shared_bytes: int, int8: bool = False) -> SelectTiling:
    """The tiling for a device with this compute capability and this much shared memory per thread block; its name never matters."""
    if capability >= (9, 0) and shared_bytes >= 200 * 1024:
        return select_source.INT8_TILING if int8 else select_source.TMA_TILING
    return select_source.POINTER_TILING


@functools.cache
def _tiling(device: torch.device, int8: bool) -> SelectTiling:
    if device.type != "cuda":
        return select_source.POINTER_TILING
    return tiling_for(capability(device), shared_bytes(device), int8)


def kernel_spec(call: SelectCall, tiling: SelectTiling, fused_width: int) -> SelectSpec:
    """The kernels that a call needs.

    Raises:
        UnsupportedError: its dtype or head dim.
    """
    if call.query.dtype not in DTYPES:
        raise UnsupportedError(f"dtype {call.query.dtype}", where=_WHERE, hint=f"one of {', '.join(map(str, DTYPES))}")
    head_dim = call.query.shape[3]
    if not 0 < head_dim <= _MAX_HEAD_DIM:
        raise UnsupportedError(f"head dim {head_dim}", where=_WHERE, hint=f"at most {_MAX_HEAD_DIM}")
    tiles = cdiv(call.key_cells, tiling.cols)
    width = power_of_two(tiles) * (tiling.cols * call.stride // call.block_size)
    return SelectSpec(
        dtype=DTYPES[call.query.dtype],
        head_dim=head_dim,
        group=call.group,
        stride=call.stride,
        block=call.block_size,
        tiling=tiling,
        estimate=call.estimate,
        reduce=call.pool,
        causal=call.causal,
        window="none" if not call.bounded_windows else "one" if len(set(call.bounded_windows)) == 1 else "per_head",
        key_flags=call.key_flags is not None,
        segments=call.segments is not None,
        has_start=call.query_start is not None,
        rule=call.rule,
        wide=width > fused_width,
        min_share=call.min_share > 0,
    )


@functools.lru_cache(maxsize=256)
def load_module(spec: SelectSpec) -> Any:
    return source.load(select_source.generate(spec), f"select_{spec.dtype}_{spec.head_dim}_s{spec.stride}")


def _run(call: SelectCall, spec: SelectSpec, counts: Tensor, indices: Tensor, importances: Tensor | None, limits: Limits) -> None:
    module = load_module(spec)
    tiles = cdiv(call.key_cells, spec.tiling.cols)
    sums = tops = None
    operands, tiling = mask_operands(call, spec), spec.tiling
    mean = whole_mean(call, spec)
    for _, chunks in itertools.groupby(plan_chunks(call, spec, limits.scratch_bytes), lambda chunk: (chunk.batch, chunk.kv_heads)):
        first, *more = chunks
        cells = chunk_cells(call, spec, module, first, mean)
        for chunk in (first, *more):
            heads, rows = cells.queries.shape[0] * cells.queries.shape[1], chunk.cells[1] - chunk.cells[0]
            if sums is None:  # no chunk is larger than the first
                sums = counts.new_empty(heads * rows * tiles * spec.tile_blocks, dtype=torch.float16)
                tops = counts.new_empty(heads * rows * tiles, dtype=torch.float32)
            values = {"sums": sums, "tops": tops, **cells.scales, **chunk_masks(operands, call, spec, chunk)}
            values |= chunk_numbers(call, spec, chunk, cells.queries, cells.keys)
            grid = (min(processors(call.query.device) * tiling.per_sm, heads * cdiv(rows, tiling.rows) * tiles),)
            scored = {**values, "windows": values.get("scored_windows")}
            launch(module.score, grid, select_source.arguments(spec, "score"), scored, num_warps=tiling.warps, num_stages=tiling.stages)
            _choose(call, spec, module, chunk, values, counts, indices, importances, limits)
        del cells  # these copies make room for the next ones


def _choose(
    call: SelectCall,
    spec: SelectSpec,
    module: Any,
    chunk: Chunk,
    values: dict[str, Any],
    counts: Tensor,
    indices: Tensor,
    importances: Tensor | None,
    limits: Limits,
) -> None:
    (b0, b1), (g0, g1) = chunk.batch, chunk.kv_heads
    heads = slice(g0 * call.group, g1 * call.group)
    per_block = call.block_size // call.span
    blocks = cdiv(chunk.cells[1] - chunk.cells[0], per_block)
    first, served = chunk.cells[0] // per_block, (b1 - b0) * (heads.stop - heads.start)
    grid = (blocks, served)
    values = {**values, "counts": counts[b0:b1, heads], "indices": indices[b0:b1, heads], "first_block": first}
    tiles = cdiv(call.key_cells, spec.tiling.cols)
    padded = power_of_two(tiles)
    if not spec.wide:
        values["importances"] = None if importances is None else importances[b0:b1, heads]
        for begin, end, width in _widths(call, spec, first, first + blocks, padded):
            values |= {"TILES": width, "first_block": begin}
            warps = choosing_warps(width * spec.tile_blocks, limits)
            launch(module.choose, (end - begin, served), select_source.arguments(spec, "choose"), values, num_warps=warps)
        return
    values["importances"] = counts.new_empty(grid[0] * grid[1] * call.key_blocks, dtype=torch.float32)
    values |= {"TILES": padded, "PART": max(1, limits.part // spec.tile_blocks), "WIDTH": limits.part}
    launch(module.pool, grid, select_source.arguments(spec, "pool"), values, num_warps=4)
    launch(module.pick, grid, select_source.arguments(spec, "pick"), values, num_warps=8)


def choosing_warps(blocks: int, limits: Limits) -> int:
    """Warps of `choose` for rows of so many key blocks."""
    return min(8, max(1, blocks // limits.numbers))


def _widths(call: SelectCall, spec: SelectSpec, begin: int, end: int, tiles: int) -> Iterator[tuple[int, int, int]]:
    """Query blocks that one launch of `choose` serves, first and past the last, and how many column tiles it holds.

    The row rule goes over a row's columns again and again for each of its cells, so that rows which see half of them, or a quarter, are
    served apart.
    """
    if spec.reduce == "row" and call.causal and isinstance(call.start, int):
        for part in (4, 2):
            seen = tiles // part * spec.tiling.cols * call.stride  # keys
            last = min(end, max(begin, (seen - call.start) // call.block_size))
            if tiles % part == 0 and tiles // part * spec.tile_blocks >= _LEAST_WIDTH and last > begin:
                yield begin, last, tiles // part
                begin = last
    if begin < end:
        yield begin, end, tiles


def plan_chunks(call: SelectCall, spec: SelectSpec, scratch_bytes: int) -> Iterator[Chunk]:
    """Everything at once when its scratch fits; else batch rows one by one, some KV heads at a time; else some rows of one KV head."""
    tiles = cdiv(call.key_cells, spec.tiling.cols)
    importance_bytes = 4 * call.key_blocks * spec.shared / (call.block_size // call.span) if spec.wide else 0
    cell_bytes = tiles * (2 * spec.tile_blocks + 4) + importance_bytes
    kv_bytes = cell_bytes * call.query_cells * (1 if spec.shared > 1 else call.group)
    if kv_bytes * call.kv_heads * call.batch <= scratch_bytes:
        yield Chunk((0, call.batch), (0, call.kv_heads), (0, call.query_cells))
        return
    count = max(1, min(call.kv_heads, int(scratch_bytes // kv_bytes)))
    count = cdiv(call.kv_heads, cdiv(call.kv_heads, count))
    step = call.query_cells
    if kv_bytes > scratch_bytes:
        unit = spec.tiling.band * spec.tiling.rows
        step = max(1, int(scratch_bytes * call.query_cells // (kv_bytes * unit))) * unit
    for b in range(call.batch):
        for g in range(0, call.kv_heads, count):
            for cell in range(0, call.query_cells, step):
                yield Chunk((b, b + 1), (g, min(g + count, call.kv_heads)), (cell, min(cell + step, call.query_cells)))


def chunk_operands(call: SelectCall, spec: SelectSpec, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """[batch, scored heads, query_len, head_dim] and [batch, kv_heads, key_len, head_dim] of a chunk, copied only where kernels need it:
    to zero what is padding, to fill the last cell, for a scale below 0, or because of strides. Cells that are prepared are filled up by
    what prepares them."""
    (b0, b1), (g0, g1) = chunk.batch, chunk.kv_heads
    queries = call.query[b0:b1, g0 * call.group : g1 * call.group]
    if call.estimate.group:
        queries = queries.unflatten(1, (g1 - g0, -1)).mean(2)
    if call.scale < 0:  # kernels multiply by its size
        queries = -queries
    real = _batch_rows(masks.real_queries(call), b0, b1)
    queries = _ready(queries, real, call.query_cells, call.span, call.stride, spec.estimate.prepared)
    if call.prepared_keys is not None:
        rows = call.prepared_keys[b0:b1, g0:g1]
        return queries, _ready(rows, None, rows.shape[2], 1, 1, False)
    real = _batch_rows(masks.real_keys(call), b0, b1)
    keys = call.key[b0:b1, g0:g1]
    return queries, _ready(keys, real, call.key_cells, call.stride, call.stride, spec.estimate.prepared)


def chunk_cells(call: SelectCall, spec: SelectSpec, module: Any, chunk: Chunk, mean: Tensor | None) -> Cells:
    """What is multiplied of a chunk. mean: as `whole_mean`."""
    queries, keys = chunk_operands(call, spec, chunk)
    return prepared_operands(call, spec, module, chunk, queries, keys, mean) if spec.estimate.prepared else Cells(queries, keys, {})


def whole_mean(call: SelectCall, spec: SelectSpec) -> Tensor | None:
    """The mean that is taken from the keys of all chunks, by one pass for all of them; None where keys are copied first or prepared."""
    if call.key_mean is not None or call.prepared_keys is not None:
        return call.key_mean
    return masks.keys_mean(call, call.key, None) if spec.estimate.int8 and masks.real_keys(call) is None else None


def prepared_operands(
    call: SelectCall, spec: SelectSpec, module: Any, chunk: Chunk, queries: Tensor, keys: Tensor, mean: Tensor | None
) -> Cells:
    """The operands as means of neighbours, in 8 bits, or both, cells side by side.

    mean: as `whole_mean`.
    """
    queries, query_scales = _prepared(call, spec, module, queries, None, call.query_cells, call.span, 1)
    if call.prepared_scales is not None:
        key_scales: Tensor | None = call.prepared_scales[slice(*chunk.batch), slice(*chunk.kv_heads)].contiguous()
    elif call.prepared_keys is not None:
        key_scales = None
    else:
        keys, key_scales = prepared_key_operands(call, spec, module, chunk, keys, mean)
    return Cells(queries, keys, {"query_scales": query_scales, "key_scales": key_scales} if spec.estimate.int8 else {})


def prepared_key_operands(
    call: SelectCall, spec: SelectSpec, module: Any, chunk: Chunk, keys: Tensor, mean: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of `prepared_operands` the keys and their scales."""
    if mean is not None:
        mean = mean[slice(*chunk.batch), slice(*chunk.kv_heads)].contiguous()
    elif spec.estimate.int8:
        mean = masks.keys_mean(call, keys, _batch_rows(masks.real_keys(call), *chunk.batch))
    return _prepared(call, spec, module, keys, mean, call.key_cells, call.stride, spec.sharing)


def _prepared(
    call: SelectCall, spec: SelectSpec, module: Any, values: Tensor, mean: Tensor | None, cells: int, apart: int, sharing: int
) -> tuple[Tensor, Tensor | None]:
    return prepare.prepare_cells(module, spec.dtype, values, mean, cells, apart, call.steps, spec.estimate.int8, sharing)


def prepare_keys(call: SelectCall) -> tuple[Tensor, Tensor | None]:
    """As the reference's, by the kernel that prepares the cells of a selection.

    Raises:
        UnsupportedError: no kernel takes this call. KernelError: it could not be compiled or launched.
    """
    spec = kernel_spec(call, _tiling(meant(call.device), call.estimate.int8), LIMITS.fused_width)
    everything = Chunk((0, call.batch), (0, call.kv_heads), (0, call.query_cells))
    with launching(call.device, lambda: f"{_WHERE} ({spec.describe()})"):
        keys = _ready(call.key, masks.real_keys(call), call.key_cells, call.stride, call.stride, True)
        return prepared_key_operands(call, spec, load_module(spec), everything, keys, whole_mean(call, spec))


def _batch_rows(mask: Tensor | None, first: int, last: int) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[first:last]


def _ready(values: Tensor, real: Tensor | None, cells: int, span: int, used: int, prepared: bool) -> Tensor:
    """`values`, or a copy with whole cells and strides that tensor descriptors take, in which everything else is zero.

    prepared: what reads them fills up the last cell and takes any stride of tokens.
    """
    readable = values.stride(-1) == 1 if prepared else (cells - 1) * span + used <= values.shape[2] and _aligned(values)
    if real is None and readable:
        return values
    batch, heads, length, dim = values.shape
    unit = 16 // values.element_size()
    room = values.new_empty(batch, heads, (cells - 1) * span + span, cdiv(dim, unit) * unit)
    room[:, :, length:].zero_()
    room[:, :, :length, dim:].zero_()
    target = room[:, :, :length, :dim]
    if real is None:
        target.copy_(values)
    else:
        torch.where(real[:, None, :, None], values, values.new_zeros(()), out=target)
    return room[..., :dim]


def _aligned(values: Tensor) -> bool:
    size = values.element_size()
    steps = all(n == 1 or (stride > 0 and stride * size % 16 == 0) for n, stride in zip(values.shape[:-1], values.stride()[:-1]))
    return steps and values.stride(-1) == 1 and values.data_ptr() % 16 == 0


def _descriptor(values: Tensor, cells: int, span: int, used: int, rows: int, depth: int) -> Any:
    """Tensor descriptor [batch, heads, tokens of a cell, cells, head_dim]: an antidiagonal is token S - 1 - r against r, no copies."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, heads, _, dim = values.shape
    unit = 16 // values.element_size()
    # a stride of a dimension of size 1 is never used, but has to be valid
    b, h, n = (stride if size > 1 else max(unit, cdiv(stride, unit) * unit) for size, stride in zip(values.shape, values.stride()[:3]))
    return TensorDescriptor(values, [batch, heads, used, cells, dim], [b, h, n, span * n, 1], [1, 1, 1, rows, depth])


def mask_operands(call: SelectCall, spec: SelectSpec) -> dict[str, Any]:
    """Mask operands of the whole call, by argument name; `chunk_masks` cuts them for a chunk."""
    rows, cols = spec.tiling.rows, spec.tiling.cols
    values: dict[str, Any] = {}
    if (bits := masks.cell_bits(call)) is not None:
        key_bits, query_bits = bits
        cells = torch.arange(call.key_cells, device=call.key.device)
        first = cells * call.stride if call.causal else cells * 0
        values["key_first"] = _padded(first.where(key_bits & 1 != 0, _NEVER), cols, _NEVER)
        last = ((cells + 1) * call.stride).clamp(max=call.key_len) - 1
        values["key_last"] = _padded(last.masked_fill(key_bits & 2 != 0, _NEVER), cols, 0)
        cells = torch.arange(call.query_cells, device=call.key.device)
        last = (cells * call.span + call.stride).clamp(max=call.query_len) - 1 + call.start if call.causal else cells * 0
        values["query_last"] = _padded(last.where(query_bits != 0, -_NEVER), rows, -_NEVER)
        values["block_bits"], values["sink_blocks"] = masks.key_bits(call, call.block_size), masks.sink_block(call)
    cell_ranges, block_ranges = masks.cell_segments(call), masks.block_segments(call)
    if cell_ranges is not None and block_ranges is not None:
        (low, high), (key_low, key_high) = cell_ranges
        values["query_low"], values["query_high"] = _padded(low, rows, _NEVER), _padded(high, rows, -_NEVER)
        values["key_low"], values["key_high"] = _padded(key_low, cols, _NEVER), _padded(key_high, cols, -_NEVER)
        (values["rows_low"], values["rows_high"]), (values["block_low"], values["block_high"]) = block_ranges
    if call.query_start is not None:  # of any kind of integers, on any device
        values["start_at"] = call.query_start.to(call.device, torch.int64)
    if spec.window == "per_head":
        values["windows"] = _per_head(call.bounded_windows, torch.int32, call.query.device)
        groups = [call.bounded_windows[i : i + spec.shared] for i in range(0, call.heads, spec.shared)]
        values["scored_windows"] = _per_head(tuple(0 if 0 in g else max(g) for g in groups), torch.int32, call.query.device)
    for argument in _rule_arguments(spec, per_head=True):
        values[argument.name] = _per_head(argument.value(call), torch.float32, call.query.device)
    return values


def _rule_arguments(spec: SelectSpec, per_head: bool) -> list[RuleArgument]:
    """What the rule's kernels read: one number per query head each, or a single number."""
    return [argument for argument in RULES[spec.rule].arguments if argument.type.startswith("*") == per_head]


def _padded(values: Tensor, size: int, fill: int) -> Tensor:
    """int32, filled up to whole tiles, so that kernels load without a mask."""
    return torch.nn.functional.pad(values.to(torch.int32), (0, -values.shape[1] % size), value=fill)


def chunk_masks(masks: dict[str, Any], call: SelectCall, spec: SelectSpec, chunk: Chunk) -> dict[str, Any]:
    per_head = {"windows", *(argument.name for argument in _rule_arguments(spec, per_head=True))}
    (b0, b1), (g0, g1) = chunk.batch, chunk.kv_heads
    values = {}
    for name, mask in masks.items():
        if name in per_head:
            values[name] = mask[g0 * call.group : g1 * call.group]
        elif name == "scored_windows":
            scored = mask.numel() // call.kv_heads
            values[name] = mask[g0 * scored : g1 * scored]
        elif name == "start_at":
            values[name] = mask
        else:
            values[name] = _batch_rows(mask, b0, b1)
    for name, example in (("flags_batch", "key_first"), ("segments_batch", "key_low")):
        if example in masks:
            values[name] = int(masks[example].shape[0] > 1)
    return values


def chunk_numbers(call: SelectCall, spec: SelectSpec, chunk: Chunk, queries: Tensor, keys: Tensor) -> dict[str, Any]:
    tiling, span, steps = spec.tiling, call.span, call.steps
    if tiling.tma:
        q = _descriptor(queries, call.query_cells, steps if spec.estimate.prepared else span, steps, tiling.rows, spec.depth)
        k = _descriptor(keys, call.key_cells, steps, steps, tiling.cols, spec.depth)
    else:
        q, k = queries, keys
    scale = max(abs(call.scale), _LEAST_SCALE) * LOG2E / steps
    values = {"q": q, "k": k, "scale": scale, "batch": queries.shape[0], "scored_heads": queries.shape[1]}
    values |= stride_values(q=(queries, "bhn"), k=(keys, "bhn"))
    values |= {"query_len": call.query_len, "key_len": call.key_len, "query_cells": call.query_cells, "first_cell": chunk.cells[0]}
    values |= {"end_cell": chunk.cells[1], "row_count": chunk.cells[1] - chunk.cells[0], "counts_batch": call.heads * call.query_blocks}
    values |= {"heads": queries.shape[1] * spec.shared, "window": call.bounded_windows[0] if call.bounded_windows else 0}
    values |= {argument.name: argument.value(call) for argument in _rule_arguments(spec, per_head=False)}
    values |= {"min_share": call.min_share} if spec.min_share else {}
    if not spec.has_start:
        values["start"] = call.start
    return values


def _per_head(values: tuple[float, ...] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(dtype).contiguous()
    host = _host_values(values, dtype, device.type == "cuda")
    return host.to(device, non_blocking=True)


@functools.lru_cache(maxsize=4096)
def _host_values(values: tuple[float, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Kept for as long as a captured graph may copy from it, in pinned memory, so that the copy does not wait."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory() if pinned else host

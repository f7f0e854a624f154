"""Columns and distances by Triton kernels: which a head visits, and the block lists of that.

What is chosen is found by halving the range of scores, as integers in their order, without a sort. Of lists one pass over a query block's
keys counts places: no table of query blocks and key blocks exists, so that memory is that of the lists, whatever a head visits.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import Argument, constexprs, floats, integers, parameters, pointers, unspecialised
from sparsify.backends.codegen.launch import launch, launching, need, power_of_two
from sparsify.backends.codegen.template import header, render
from sparsify.backends.select import patterns
from sparsify.ops.limits import WIDEST_ROW
from sparsify.ops.patterns import SelectPatternCall

CHOOSE = '''\
@triton.jit(do_not_specialize=[${unspecialised}])
def choose_pattern(
    ${parameters},
):
    """The columns (program_id(1) 0) or the distances (1) of one head. sums: fp32 [2, batch * heads, blocks], none negative. kept: u8."""
    row = tl.program_id(0)
    kind = tl.program_id(1)
    head = row % heads
    start = (kind * tl.num_programs(0) + row).to(tl.int64) * blocks
    at = tl.arange(0, WIDTH)
    here = at < blocks
    score = tl.load(sums + start + at, mask=here, other=0.0)
    earliest = tl.load(first + row // heads).to(tl.int32)
    forced = here & tl.where(kind == 0, at == earliest, at < 2)
    free = here & (forced == 0)
    most = tl.load(counts + kind * heads + head).to(tl.int32)
    base = tl.sum(tl.where(forced, score, 0.0))
%if mass
    wanted = mass * tl.sum(score)
%else
    wanted = float("inf")
%end
    # scores are in the order of their bits; the range that holds the last one chosen is halved
    bits = score.to(tl.int32, bitcast=True)
    low = tl.zeros([], tl.int32)
    high = tl.full([], 0x7F800000, tl.int32)
    for _ in range(31):
        middle = low + (high - low) // 2
        over = free & (bits >= middle)
        enough = (base + tl.sum(tl.where(over, score, 0.0)) >= wanted) | (tl.sum(over.to(tl.int32)) >= most)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = free & (bits > low)
    equal = free & (bits == low)
    before = tl.cumsum(equal.to(tl.int32), 0) - 1
    held = base + tl.sum(tl.where(above, score, 0.0))
    taken = tl.sum(above.to(tl.int32)) + before
    tie = equal & (taken < most) & (held + before.to(tl.float32) * low.to(tl.float32, bitcast=True) < wanted)
    # where nothing at all is asked for, no score is the last one
    some = (most > 0) & (base < wanted)
    tl.store(kept + start + at, (forced | ((above | tie) & some)).to(tl.uint8), mask=here)
'''
LIST = '''\
@triton.jit(do_not_specialize=[${unspecialised}])
def list_pattern(
    ${parameters},
):
    """The list of one query block of one head. columns, distances: u8 [heads, text_blocks].
%if by_block
    own_choice: u8 [heads, query_blocks, key_blocks].
%end
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    last = tl.load(own + block).to(tl.int32)
    row = head * tl.num_programs(0) + block
    count = tl.zeros([], tl.int32)
    for first in tl.range(0, last + 1, TILE):
        at = first + tl.arange(0, TILE)
        seen = at <= last
        column = tl.load(columns + head * text_blocks + at, mask=seen, other=0)
        distance = tl.load(distances + head * text_blocks + last - at, mask=seen, other=0)
%if by_block
        column |= tl.load(own_choice + row * key_blocks + at, mask=seen, other=0)
%end
        kept = ((column | distance) != 0).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(indices + row * width + place, at.to(tl.int16), mask=(kept != 0) & (place < width))
        count += tl.sum(kept)
    tl.store(counts + row, tl.minimum(count, width))
'''


def listing_arguments(by_block: bool) -> tuple[Argument, ...]:
    """Of `list_pattern`, in order. by_block: whether query blocks choose some by themselves."""
    more = [*pointers("u8", "own_choice"), *integers("key_blocks", specialised=False)] if by_block else []
    return (*_LISTING, *more, *constexprs("TILE"))


_LISTING: tuple[Argument, ...] = (
    *pointers("u8", "columns", "distances"),
    *pointers("i64", "own"),
    *pointers("i32", "counts"),
    *pointers("i16", "indices"),
    *integers("text_blocks", "width", specialised=False),
)
CHOOSING: tuple[Argument, ...] = (
    *pointers("fp32", "sums"),
    *pointers("i64", "first"),
    *pointers("i32", "counts"),
    *pointers("u8", "kept"),
    *integers("heads", "blocks", specialised=False),
    *floats("mass"),
    *constexprs("WIDTH"),
)
_WHERE = "sparsify::select_pattern"
_WIDEST_TILE, _WARPS = 1024, 4
_NUMBERS = 1024  # scores of a warp, 32 numbers a thread


def pattern_source(mass: bool, by_block: bool) -> str:
    """Module text with `choose_pattern` (grid: batch * query_heads, 2) and `list_pattern` (grid: query blocks, batch * query_heads).

    mass: whether a share of the scores is enough. by_block: whether query blocks choose some by themselves.
    """
    texts = [(CHOOSE, CHOOSING), (LIST, listing_arguments(by_block))]
    clauses = {"mass": mass, "by_block": by_block}
    kernels = [render(text, {"parameters": parameters(a), "unspecialised": unspecialised(a), **clauses}) for text, a in texts]
    return "\n\n".join([header("Columns and distances of key blocks", {}), *kernels])


@functools.cache
def _module(mass: bool, by_block: bool) -> ModuleType:
    return source.load(pattern_source(mass, by_block), "pattern")


def chosen(call: SelectPatternCall, sums: Tensor, first: Tensor, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """`backends.select.patterns.chosen` by a kernel.

    Raises:
        UnsupportedError: more blocks than a program holds.
        KernelError: it could not be compiled or launched.
    """
    blocks = sums.shape[-1]
    need(blocks <= WIDEST_ROW, f"{blocks} key blocks", _WHERE)
    kept = torch.empty_like(sums, dtype=torch.uint8)
    counts = patterns.head_counts(call, sums.device)[:2, heads].int().contiguous()
    width = power_of_two(blocks)
    given: dict[str, Any] = {
        "sums": sums.contiguous(), "first": first.contiguous(), "counts": counts, "kept": kept, "heads": sums.shape[2], "blocks": blocks,
        "mass": call.mass, "WIDTH": width,
    }  # fmt: skip
    grid = (sums.shape[1] * sums.shape[2], 2)
    with launching(sums.device, lambda: f"{_WHERE} (of {blocks} key blocks)"):
        launch(_module(call.mass > 0, call.by_block).choose_pattern, grid, CHOOSING, given, num_warps=max(1, min(8, width // _NUMBERS)))
    columns, distances = kept.view(torch.bool)
    return columns, distances


def listed(call: SelectPatternCall, columns: Tensor, distances: Tensor, own_choice: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`backends.select.patterns.listed` by a kernel; entries past the count are whatever lay in memory.

    Raises:
        KernelError: it could not be compiled or launched.
    """
    counts = columns.new_empty(*columns.shape[:2], call.query_blocks, dtype=torch.int32)
    indices = columns.new_empty(*counts.shape, call.width, dtype=torch.int16)
    given: dict[str, Any] = {
        "columns": columns.contiguous().view(torch.uint8), "distances": distances.contiguous().view(torch.uint8),
        "own": patterns.own_block(call), "counts": counts, "indices": indices, "text_blocks": columns.shape[-1], "width": call.width,
        "TILE": min(_WIDEST_TILE, power_of_two(call.key_blocks)),
    }  # fmt: skip
    if own_choice is not None:
        given |= {"own_choice": own_choice.contiguous().view(torch.uint8), "key_blocks": call.key_blocks}
    grid = (call.query_blocks, columns.shape[0] * columns.shape[1])
    arguments, module = listing_arguments(own_choice is not None), _module(call.mass > 0, own_choice is not None)
    with launching(call.query.device, lambda: f"{_WHERE} ({call.query_blocks} query blocks, lists of {call.width})"):
        launch(module.list_pattern, grid, arguments, given, num_warps=_WARPS)
    return counts, indices


select_pattern = functools.partial(patterns.select_pattern, choosing=chosen, listing=listed)

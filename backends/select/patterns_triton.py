"""Block lists of columns and distances that were chosen, by a Triton kernel: one pass over a query block's keys counts places.

No table of query blocks and key blocks exists, so that memory is that of the lists, whatever a head visits.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import source
from sparsify.backends.codegen.arguments import Argument, constexprs, integers, parameters, pointers, unspecialised
from sparsify.backends.codegen.launch import launch, launching, power_of_two
from sparsify.backends.codegen.template import header, render
from sparsify.backends.select import patterns
from sparsify.ops.patterns import SelectPatternCall

LIST = '''\
@triton.jit(do_not_specialize=[${unspecialised}])
def list_pattern(
    ${parameters},
):
    """The list of one query block of one head. columns, distances: u8 [heads, text_blocks]."""
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
        kept = ((column | distance) != 0).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(indices + row * width + place, at.to(tl.int16), mask=(kept != 0) & (place < width))
        count += tl.sum(kept)
    tl.store(counts + row, tl.minimum(count, width))
'''
ARGUMENTS: tuple[Argument, ...] = (
    *pointers("u8", "columns", "distances"),
    *pointers("i64", "own"),
    *pointers("i32", "counts"),
    *pointers("i16", "indices"),
    *integers("text_blocks", "width", specialised=False),
    *constexprs("TILE"),
)
_WHERE = "sparsify::select_pattern"
_WIDEST_TILE, _WARPS = 1024, 4


def list_source() -> str:
    """Module text with `list_pattern` (grid: query blocks, batch * query_heads)."""
    values = {"parameters": parameters(ARGUMENTS), "unspecialised": unspecialised(ARGUMENTS)}
    return "\n\n".join([header("Block lists of columns and distances", {}), render(LIST, values)])


@functools.cache
def _module() -> ModuleType:
    return source.load(list_source(), "list_pattern")


def listed(call: SelectPatternCall, columns: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
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
    grid = (call.query_blocks, columns.shape[0] * columns.shape[1])
    with launching(call.query.device, lambda: f"{_WHERE} ({call.query_blocks} query blocks, lists of {call.width})"):
        launch(_module().list_pattern, grid, ARGUMENTS, given, num_warps=_WARPS)
    return counts, indices


select_pattern = functools.partial(patterns.select_pattern, listing=listed)

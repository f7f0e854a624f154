"""`sparsify::select_blocks` in one stage or two: a coarse one lists blocks for the heads of a group, a finer one scores those alone and
chooses among them for each head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.backends.codegen.launch import launching
from sparsify.backends.select import streamed, triton
from sparsify.backends.select.source import SelectSpec, SelectTiling
from sparsify.backends.select.triton import LIMITS, Chunk, Limits
from sparsify.errors import UnsupportedError
from sparsify.ops import block_lists
from sparsify.ops.selection import SelectCall
from sparsify.ops.streaming import faster

_WHERE = "sparsify::select_blocks"


def select_blocks(call: SelectCall, *, limits: Limits = LIMITS) -> streamed.Lists:
    """As `triton.select_blocks`, of calls with a second stage too."""
    if call.empty:
        return triton.select_blocks(call, limits=limits)
    spec = None if call.refine_stride else streaming(call, limits)
    if not (call.refine_stride or spec):
        return triton.select_blocks(call, limits=limits)
    lists = call.empty_lists()
    if spec is None:
        two_stages(call, lists, None, limits)
    else:
        one_stage(call, spec, lists, None, limits)
    return lists


def streaming(call: SelectCall, limits: Limits, tiling: SelectTiling | None = None) -> SelectSpec | None:
    """The kernels that keep query cells while keys pass by, where those are the faster ones for a call of one stage."""
    if not faster(call.pool, call.estimate, call.stride, call.query.shape[3]):
        return None
    try:
        return streamed.spec_of(call, limits, tiling)
    except UnsupportedError:
        return None


def one_stage(call: SelectCall, spec: SelectSpec, lists: streamed.Lists, importances: Tensor | None, limits: Limits) -> None:
    """importances: as `two_stages`."""
    if importances is not None:
        spec = dataclasses.replace(spec, importance=True)
    with launching(call.device, lambda: f"{_WHERE} ({spec.describe()})"):
        module, masks = triton.load_module(spec), triton.mask_operands(call, spec)
        mean = triton.whole_mean(call, spec)
        for chunk in _chunks(call, spec, limits):
            cells = triton.chunk_cells(call, spec, module, chunk, mean)
            streamed.serve(call, spec, chunk, cells, masks, lists, limits, importances=importances)
            del cells  # these copies make room for the next ones


def two_stages(
    call: SelectCall,
    lists: streamed.Lists,
    importances: Tensor | None,
    limits: Limits,
    tilings: tuple[SelectTiling | None, SelectTiling | None] = (None, None),
) -> streamed.Lists:
    """Both stages.

    Args:
        lists: block lists to write.
        importances: fp32 [batch, query_heads, query_blocks, cells, key_blocks], 0 throughout: gets each cell's masses in the second stage,
            for tests.
        tilings: of the stages, instead of the device's, for tests and tuning.

    Returns:
        The lists of the first stage, by KV head.

    Raises:
        UnsupportedError: no kernel serves this call: the reference does.
    """
    coarse, fine = call.stages
    first = streamed.spec_of(coarse, limits, tilings[0], grouped=True)
    second = streamed.spec_of(fine, limits, tilings[1], listed=True)
    if importances is not None:
        second = dataclasses.replace(second, importance=True)
    counts = coarse.query.new_empty(call.batch, call.kv_heads, call.query_blocks, dtype=torch.int32)
    listed = counts, coarse.query.new_empty(*counts.shape, call.key_blocks, dtype=torch.int16)
    with launching(call.device, lambda: f"{_WHERE} ({second.describe()})"):
        module, mean = triton.load_module(first), triton.whole_mean(coarse, first)
        masks = triton.mask_operands(coarse, first), triton.mask_operands(fine, second)
        for chunk in _chunks(coarse, first, limits):
            cells = triton.chunk_cells(coarse, first, module, chunk, mean)
            streamed.serve(coarse, first, chunk, cells, masks[0], listed, limits)
            if fine.whole is fine:
                del cells
                cells = triton.chunk_cells(fine, second, triton.load_module(second), chunk, mean)
            streamed.serve(fine, second, chunk, cells, masks[1], lists, limits, listed, importances)
            del cells
    _keep_everything(call, lists)
    return listed


def _keep_everything(call: SelectCall, lists: streamed.Lists) -> None:
    """Writes the lists of heads with a threshold of 1 or more, whatever the first of two stages listed for their group: all blocks that may
    be seen. No call of two stages has padding, segments or windows. Nothing waits for the device."""
    (counts, indices), thresholds, device = lists, call.thresholds, call.device
    if isinstance(thresholds, tuple) and max(thresholds) < 1:
        return
    every = torch.arange(call.key_blocks, device=device, dtype=indices.dtype)
    seen = torch.full((call.query_blocks,), call.key_blocks, device=device, dtype=counts.dtype)
    if call.causal:
        seen.copy_(block_lists.causal_blocks(call.query_len, call.key_len, call.start, call.block_size, device=device))
    if isinstance(thresholds, tuple):
        whole = [head for head, threshold in enumerate(thresholds * (call.heads // len(thresholds))) if threshold >= 1]
        for head in whole:
            counts[:, head], indices[:, head] = seen, every
        return
    keep = (thresholds >= 1)[:, None]
    torch.where(keep, seen, counts, out=counts)
    torch.where(keep[..., None], every, indices, out=indices)


def _chunks(call: SelectCall, spec: SelectSpec, limits: Limits) -> Iterator[Chunk]:
    """Batch rows and KV heads whose cells are prepared at once: as many as are scored at once."""
    everything = Chunk((0, call.batch), (0, call.kv_heads), (0, call.query_cells))
    last = None
    for part in streamed.parts(call, spec, everything, limits.scratch_bytes):
        if (part.batch, part.kv_heads) != last:
            last = part.batch, part.kv_heads
            yield dataclasses.replace(everything, batch=part.batch, kv_heads=part.kv_heads)

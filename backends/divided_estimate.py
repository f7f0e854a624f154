"""Block lists of a text that is divided among processes, from the estimate's cells of all keys, which each process prepares of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.backends import registration
from sparsify.distributed import collectives, exchange
from sparsify.distributed.sequence import Division
from sparsify.ops.limits import cdiv
from sparsify.ops.selection import SelectCall
from sparsify.ops.sparse_attention import SparseAttentionCall


class Estimated:
    """The lists of some heads of a call."""

    def __init__(self, division: Division, call: SparseAttentionCall, flags: Tensor | None):
        """flags: of all keys."""
        self.division, self.call, self.flags = division, call, flags
        self._gathered: Callable[[], SelectCall] | None = None
        self._whole: SelectCall | None = None

    def gather(self) -> None:
        """The estimate's cells begin to travel."""
        self._gathered = _cells(self.division, self.call)

    def lists(self, rows: slice, end: int) -> tuple[SelectCall, Tensor, Tensor]:
        """The selection of some of this process's rows, which see the keys before `end`, and its block lists."""
        if self._whole is None:
            assert self._gathered is not None
            self._whole, self._gathered = self._gathered(), None
        chosen = _for_rows(self._whole, self.call.query[:, :, rows], end, self.flags)
        return chosen, *registration.select(chosen)

    def drop(self) -> None:
        """No more lists are asked for."""
        self._whole = None


def _for_rows(whole: SelectCall, query: Tensor, end: int, flags: Tensor | None) -> SelectCall:
    """The selection of some rows, which see the keys before `end`, from one over all keys."""
    call = dataclasses.replace(whole, query=query, key=whole.key[:, :, :end], key_flags=None if flags is None else flags[:, :end])
    if call.prepared_keys is None:
        return call
    rows, scales = call.prepared_keys[:, :, : call.key_cells * call.steps], call.prepared_scales
    return dataclasses.replace(call, prepared_keys=rows, prepared_scales=None if scales is None else scales[:, :, : call.key_cells])


def _cells(division: Division, call: SparseAttentionCall) -> Callable[[], SelectCall]:
    """Begins to gather what the estimate multiplies: cells as it prepares them, in the fewest bytes that say the same, else the keys.

    Returns:
        waits, and gives the selection over all keys, whose query is this process's.
    """
    what = "the estimate's cells"
    # of the keys nothing but their number is read where cells travel
    unread = call.key.new_empty(1).expand(*call.key.shape[:2], division.tokens, call.key.shape[3])
    # rows that see part of the text have as many stages as a call over all of it
    own = dataclasses.replace(dataclasses.replace(call.selection(), key=unread).served, key=call.key)
    if not own.estimate.prepared or (own.refine_stride and own.estimate.half):
        keys = exchange.gathering(division, call.key, 2, what)
        return lambda: dataclasses.replace(own, key=keys())
    rows, scales = registration.prepare_keys(own)
    # chunks begin at blocks, and so at cells; a block's cells share a scale with the variant peak
    cells = exchange.gathering(division.scaled(own.steps, own.stride), rows, 2, what)
    shared = own.sharing
    by = division.scaled(1, own.stride * shared)
    sizes = None if scales is None else exchange.gathering(by, scales[:, :, ::shared].contiguous(), 2, what)
    count = cdiv(division.tokens, own.stride)

    def gathered() -> SelectCall:
        found = None if sizes is None else sizes().repeat_interleave(shared, 2)[:, :, :count]
        return dataclasses.replace(own, key=unread, prepared_keys=cells(), prepared_scales=found)

    return gathered


def mean(division: Division, call: SparseAttentionCall, flags: Tensor | None) -> Tensor:
    """The mean of all keys that are not hidden, fp32 [batch, kv_heads, head_dim]; 0 where it is not finite."""
    keys, count = call.key, division.tokens
    if call.key_flags is None:
        total = keys.sum(2, dtype=torch.float32)
    else:
        total = keys.masked_fill((call.key_flags & 1 == 0)[:, None, :, None], 0).sum(2, dtype=torch.float32)
    total = collectives.all_reduce(total, division.shard.group)
    division.note("the estimate's cells", total)
    if flags is not None:
        return total.div_((flags & 1 != 0).sum(1).clamp(min=1)[:, None, None]).nan_to_num_(0.0, 0.0, 0.0)
    return total.div_(count).nan_to_num_(0.0, 0.0, 0.0)

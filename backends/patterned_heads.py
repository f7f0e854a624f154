"""Block lists of heads that choose differently: by an estimate of all rows' scores, or columns and diagonals that the last rows look at.

Each head's list is the one that its own way gives. Which heads go which way may be known on the device alone, so that both lists are made
for all heads and one of them is taken. In the estimate heads of columns and diagonals keep everything, which asks for no choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.backends import dispatch
from sparsify.backends.codegen.launch import on_device
from sparsify.ops.selection import SelectCall

Select = Callable[[SelectCall], tuple[Tensor, Tensor]]

_select_blocks: Select = dispatch.serve("select_blocks")
_select_pattern = dispatch.serve("select_pattern")


def select_blocks(call: SelectCall) -> tuple[Tensor, Tensor]:
    """`sparsify::select_blocks` of a call that was checked."""
    if not call.patterned:
        return _select_blocks(call)
    columns = on_device(call.columns, call.device) if call.head_columns is None else call.head_columns
    patterned = (columns >= 0)[:, None]
    every = call.head_columns is None and min(call.columns) >= 0
    counts, indices = call.empty_lists() if every else _select_blocks(estimated(call, patterned[:, 0]))
    some, listed = _select_pattern(call.pattern)
    torch.where(patterned, some, counts, out=counts)
    into = indices[..., : listed.shape[-1]]
    torch.where(patterned[..., None], listed, into, out=into)
    return counts, indices


def estimated(call: SelectCall, patterned: Tensor) -> SelectCall:
    """The call of the estimate alone. patterned: bool [query_heads]."""
    changed = {"columns": (), "diagonals": (), "head_columns": None, "head_diagonals": None, "most": 0}
    if call.density:
        return dataclasses.replace(call, **changed)
    if call.head_thresholds is None and call.head_columns is None:
        every = call.threshold * (call.heads // len(call.threshold))
        own = tuple(1.0 if columns >= 0 else threshold for columns, threshold in zip(call.columns, every, strict=True))
        return dataclasses.replace(call, **changed, threshold=own)
    if call.head_thresholds is None:
        thresholds = torch.tensor(call.threshold, device=call.device).expand(call.heads)
    else:
        thresholds = call.head_thresholds
    return dataclasses.replace(call, **changed, head_thresholds=thresholds.masked_fill(patterned, 1.0))

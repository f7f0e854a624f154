"""What the selection kernels whose query cells stay while keys pass by are for, and what they do not serve, and so what two stages cannot:
said once, for methods while a graph is made, for a call while it runs, for the kernels and for their costs."""

from __future__ import annotations

from typing import Any

from sparsify.ops.estimate import Estimate
from sparsify.ops.limits import LEAST_LISTED_CELLS, STREAMED_CELL, WIDEST_ROW


def too_long(key_blocks: int, widest: int | None = None) -> bool:
    """Whether rows have too many key blocks.

    Args:
        widest: as many as a kernel serves; None: `WIDEST_ROW`.
    """
    return key_blocks > (WIDEST_ROW if widest is None else widest)


def faster(pool: str, estimate: Estimate, stride: int, head_dim: Any) -> bool:
    """Whether these kernels are the faster ones of one stage, where nothing speaks against them: under the row rule, of small cells in 8
    bits. head_dim: may be a formula."""
    return pool == "row" and estimate.int8 and stride // estimate.merge * head_dim <= STREAMED_CELL


def obstacles(
    *,
    padding: bool,
    documents: bool,
    windows: bool,
    shared: bool,
    listed_cells: int | None = None,
    key_blocks: int = 0,
    widest: int | None = None,
) -> tuple[str, ...]:
    """What speaks against these kernels, in words that follow "two stages"; none where they serve.

    Args:
        padding, documents, windows: whether there are key flags, packed documents, or windows of the site or of some head.
        shared: whether the heads of a group share an estimate.
        listed_cells: query cells of a block, where listed blocks are scored; None: all blocks are.
        key_blocks: of a row; 0 where nobody knows it yet.
        widest: as of `too_long`.
    """
    found = {
        "beside padding": padding,
        "beside packed documents": documents,
        "beside a window": windows,
        "of an estimate that a group shares": shared,
        f"of {listed_cells} cells of a query block": listed_cells is not None and listed_cells < LEAST_LISTED_CELLS,
        f"over rows of {key_blocks} blocks": too_long(key_blocks, widest),
    }
    return tuple(what for what, holds in found.items() if holds)

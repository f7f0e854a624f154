"""What the selection kernels whose query cells stay while keys pass by do not serve, and so what two stages cannot: said once, for methods
while a graph is made, for a call while it runs, and for the kernels."""

from __future__ import annotations

from sparsify.ops.limits import LEAST_LISTED_CELLS, WIDEST_ROW


def too_long(key_blocks: int, widest: int | None = None) -> bool:
    """Whether rows have too many key blocks.

    Args:
        widest: as many as a kernel serves; None: `WIDEST_ROW`.
    """
    return key_blocks > (WIDEST_ROW if widest is None else widest)


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

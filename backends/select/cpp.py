"""`sparsify::select_blocks` on CPUs, by a C++ kernel that keeps no scores: every clause, rule and variant of the op, in fp32.

Cells are made by the reference's own code, in passes over queries and keys alone, so that only scores, their sums and the choice are
computed a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.backends.codegen import cpp
from sparsify.backends.select import cpp_text, masks, reference
from sparsify.ops import block_lists
from sparsify.ops.selection import DENSITY_BITS, SelectCall

# of query rows times keys: fewer the reference scores as fast. Heads do not count, so that serving some at a time changes no answer.
LEAST_PAIRS = 1 << 20


def select_blocks(call: SelectCall) -> tuple[Tensor, Tensor]:
    """The op by the kernel; small calls by the reference.

    Raises:
        KernelError: the kernel could not be compiled, or memory ran out.
    """
    if call.query_len * call.key_len < LEAST_PAIRS or call.empty:
        return reference.select_blocks(call)
    return launch(call)


def launch(call: SelectCall, *, importances: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The op by the kernel whatever its size, but for empty operands; as `select_blocks` otherwise.

    Args:
        importances: fp32, 0 throughout, as `reference.importance` returns them: gets those that were compared, for tests. With a second
            stage these are the finer ones, shares of the mass over what the first stage lists.
    """
    possible, forced = reference.candidates(call)
    if call.refine_stride:
        coarse, call = call.stages
        listed = block_lists.to_dense(*launch(coarse), call.key_blocks)
        # under the row rule a cell's masses are compared with each other alone, so that blocks which are not listed need no scores
        possible = reference.among_lists(possible, reference.of_groups(listed, call), call)
        forced = forced & possible
    lists = call.empty_lists()
    cpp.call(cpp_text.TEXT, "sparsify_select_blocks", cpp_text.FIELDS, _values(call, possible, forced, lists, importances))
    return lists


def _values(call: SelectCall, possible: Tensor, forced: Tensor, lists: tuple[Tensor, Tensor], importances: Tensor | None) -> dict[str, Any]:
    """The struct's fields by name."""
    query, key = reference.query_cells(call).contiguous(), reference.key_cells(call).contiguous()
    bits, segments = masks.cell_bits(call), masks.cell_segments(call)
    key_bits, query_bits = bits or (None, None)
    (row_low, row_high), (col_low, col_high) = segments or ((None, None), (None, None))
    by_density = call.rule == "density"  # without thresholds, perhaps
    thresholds = torch.as_tensor(0.0 if by_density else call.thresholds, dtype=torch.float64).expand(call.heads).contiguous()
    tables: dict[str, Any] = {"possible": possible, "forced": forced}
    for name, table in tables.copy().items():
        tables[name] = table = table.expand(-1, -1, call.query_blocks, call.key_blocks).contiguous()
        tables |= {f"{name}_{letter}": 0 if table.shape[at] == 1 else table.stride(at) for at, letter in enumerate("bh")}
    return tables | {
        "query": query,
        "key": key,
        "batch": call.batch,
        "heads": call.heads,
        "scored_heads": query.shape[1],
        "kv_heads": call.kv_heads,
        "query_len": call.query_len,
        "key_len": call.key_len,
        "width": query.shape[-1],
        "start": int(call.start),
        "query_cells": call.query_cells,
        "key_cells": call.key_cells,
        "query_blocks": call.query_blocks,
        "key_blocks": call.key_blocks,
        "stride": call.stride,
        "span": call.span,
        "block_size": call.block_size,
        "causal": call.causal,
        "windows": _windows(call, query.shape[1]),
        "key_bits": key_bits,
        "query_bits": query_bits,
        "bits_b": key_bits is not None and key_bits.shape[0] > 1,
        "row_low": row_low,
        "row_high": row_high,
        "col_low": col_low,
        "col_high": col_high,
        "segments_b": row_low is not None and row_low.shape[0] > 1,
        "pool": cpp_text.POOLS[call.pool],
        "peak": call.estimate.peak,
        "thresholds": thresholds,
        "share": int(call.density * (1 << DENSITY_BITS)) if by_density else -1,
        "min_share": call.min_share,
        "counts": lists[0],
        "indices": lists[1],
        "importances": importances,
        "threads": torch.get_num_threads(),
    }


def _windows(call: SelectCall, scored_heads: int) -> Tensor | None:
    """int64 [scored_heads], 0: none. An estimate that serves several heads covers what any of them may see."""
    if not call.bounded_windows:
        return None
    windows = torch.tensor(call.bounded_windows).expand(call.heads).unflatten(0, (scored_heads, -1))
    return windows.amax(1).masked_fill((windows == 0).any(1), 0).contiguous()

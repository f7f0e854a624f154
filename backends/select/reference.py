"""`sparsify::select_blocks` in plain PyTorch, on any device: what the generated kernels are compared with.

Antidiagonal scoring after Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428, section 2, with
these differences: tokens that do not exist take no part in the softmax, the causal offset is the true one, selection is per batch row, and
the column of the first visible key is forced, not a row. With S = stride, per head:

    score(i, j) = sum over r < S of query[i·span + S - 1 - r] · key[j·S + r],    logit = score · scale / S

1. Softmax of each query cell's logits over the key cells it may see, fp32. Padding contributes zero to a score; a cell of padding
   alone is excluded. The cell on the diagonal includes products of keys up to S - 1 after their query, as published.
2. The probabilities of a key block's cells are added; then those of a query block's cells are added, or their maximum is taken:
   the importance. Under the row rule each cell keeps importances of its own.
3. Forced: the block of the batch row's first visible key, and every key block that overlaps the query block's own positions. The
   others are added by falling importance (equal ones by rising index) while the mass before a candidate is below τ · the row's sum.
   Under the row rule every cell adds blocks in this way, all that equal the last one included, and the query block visits what some cell
   added: a cell that finds nothing is wrong however much its neighbours find. With a least share a cell also adds every block that holds
   that share of its sum: τ alone takes many light blocks where mass is spread, and leaves out heavy ones where it is gathered.

With two stages, 1 to 3 with the row rule and a threshold of their own list blocks, and what is listed for a head is listed for all heads of
its group; a kernel may list more. 1 to 3 with a finer stride choose again, among those alone: what is not listed is not possible, and τ is
a share of a cell's mass over the list. Cells that are rounded are rounded once: the finer ones are cut out of the first stage's.

A query block with a visible logit that is not finite keeps every block it may see.

With the variant pair (quad) the mean of M = 2 (4) neighbouring tokens, counted from the cell's first, stands for them, among queries and
among keys, so that a score is a sum over S / M products of means and logit = score · scale · M / S: a mean over S · M products of tokens
instead of S.

With peak the mass of a key block is that of its highest visible logit: in step 1 the softmax runs over key blocks with the highest of
their visible logits, and step 2 adds nothing over keys. A block of many middling cells counts for less, and one that a single cell needs
for as much as before.

With int8 the cells, padding's zeros included, are rounded to symmetric 8-bit numbers, each cell with a scale of its own (with peak the key
cells of a block share one), after the keys' mean is taken from every token of every key cell. The mean moves all logits of a row alike
(Zhang et al., "SageAttention", arXiv 2410.02367, smooth their keys in this way).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.backends.select import masks
from sparsify.ops import block_lists
from sparsify.ops.selection import DENSITY_BITS, SelectCall

# elements of one chunk's score matrix over all heads: 4 MB in fp32. A chunk multiplies the keys up to its last row alone, so that few rows
# save what causality hides, and stays in a CPU's cache while it is worked on; products of 128 rows or more run at the rate of large ones.
_CHUNK_ELEMENTS = 1 << 20


def select_blocks(call: SelectCall) -> tuple[Tensor, Tensor]:
    """The op, of a call that was checked.

    Returns:
        counts int32 [batch, query_heads, query_blocks], rising indices int16 [batch, query_heads, query_blocks, key_blocks]; entries
        past the count are in range.
    """
    if call.empty:
        counts, indices = call.empty_lists()
        return counts.zero_(), indices.zero_()
    possible, forced = candidates(call)
    if call.refine_stride:
        coarse, call = call.stages
        possible = among_lists(possible, group_lists(coarse), call)
        forced = forced & possible
    kept = [choose(mass, possible[:, :, blocks], forced[:, :, blocks], call) for blocks, mass in importances(call)]
    return block_lists.from_dense(torch.cat(kept, 2))


def group_lists(coarse: SelectCall) -> Tensor:
    """What the first of two stages lists for the heads of a group: bool [batch, kv_heads, query_blocks, key_blocks]."""
    return of_groups(block_lists.to_dense(*select_blocks(coarse), coarse.key_blocks), coarse)


def of_groups(table: Tensor, call: SelectCall) -> Tensor:
    """By KV head what some query head of its group keeps."""
    return table.unflatten(1, (call.kv_heads, -1)).any(2)


def among_lists(possible: Tensor, listed: Tensor, call: SelectCall) -> Tensor:
    """What heads may keep of what is `possible` where the first of two stages `listed` so much, by KV head: a head that keeps everything
    all of it."""
    return possible & (for_heads(listed, call) | (_thresholds(call, listed.device) >= 1)[:, None, None])


def for_heads(table: Tensor, call: SelectCall) -> Tensor:
    """A table by KV head as one by query head."""
    return table.repeat_interleave(call.group, 1)


def importance(call: SelectCall) -> Tensor:
    """fp32 [batch, query_heads, query_blocks, key_blocks], 0 where nothing is visible; NaN in rows with a visible non-finite logit.

    Under the row rule [batch, query_heads, query_blocks, cells of a block, key_blocks].
    """
    return torch.cat([mass for _, mass in importances(call)], 2)


def importances(call: SelectCall) -> Iterator[tuple[slice, Tensor]]:
    """`importance` of some query blocks after the others, and which blocks those are."""
    queries, keys = query_cells(call), key_cells(call)
    batch, heads, cells, width = queries.shape
    per_block = call.block_size // call.span
    chunk = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * call.key_cells * per_block)) * per_block
    for first in range(0, cells, chunk):
        rows = torch.arange(first, min(first + chunk, cells), device=queries.device)
        limit = _visible_cells(call, int(first + len(rows)))
        cols = torch.arange(limit, device=queries.device)
        grouped_rows = queries[:, :, rows].reshape(batch, call.kv_heads, -1, width)
        logits = (grouped_rows @ keys[:, :, :limit].transpose(-1, -2)).view(batch, heads, len(rows), limit)
        mass = _block_masses(call, logits, _visible(call, rows, cols))
        mass = torch.nn.functional.pad(mass, (0, 0, 0, -len(rows) % per_block)).unflatten(2, (-1, per_block))
        mass = mass if call.pool == "row" else mass.sum(3) if call.pool == "sum" else mass.amax(3)
        yield slice(first // per_block, first // per_block + mass.shape[2]), mass.repeat_interleave(call.heads // heads, 1)


def candidates(call: SelectCall) -> tuple[Tensor, Tensor]:
    """Which blocks a query block may list, and which it must: bool, broadcastable to [batch, query_heads, query_blocks, key_blocks].

    A block is possible unless no query-key pair in it can be visible: by causality, padding, window, or segments whose ranges do not
    overlap. A forced sink block may lie outside of the window, because it may hold sinks.
    """
    device = call.query.device
    rows = torch.arange(call.query_blocks, device=device)[:, None] * call.block_size
    cols = torch.arange(call.key_blocks, device=device)
    low = rows + call.start
    high = (rows + call.block_size).clamp(max=call.query_len) - 1 + call.start
    reachable = torch.ones(1, 1, call.query_blocks, call.key_blocks, dtype=torch.bool, device=device)
    if call.causal:
        reachable = reachable & (cols * call.block_size <= high)
    bits = masks.key_bits(call, call.block_size)
    if bits is not None:
        reachable = reachable & (bits[:, None, None] & 1 != 0)
    if (ranges := masks.block_segments(call)) is not None:
        reachable = reachable & _overlap(*ranges)[:, None]
    possible = reachable & _in_window(call, rows + call.start, cols, call.block_size, bits)
    sink = masks.sink_block(call)
    is_sink = (cols == 0) if sink is None else (cols == sink[:, None])[:, None, None]
    own = ((cols + 1) * call.block_size > low) & (cols * call.block_size <= high)
    forced = (is_sink | own) & reachable
    return possible | forced, forced


def choose(importance: Tensor, possible: Tensor, forced: Tensor, call: SelectCall) -> Tensor:
    """Bool table of kept blocks, by the call's rule.

    Args:
        importance: [batch, query_heads, query_blocks, key_blocks], not negative; see `importance`.
        possible, forced: broadcastable to the table; see `candidates`. Forced blocks are possible.
        call: "tau", "taus": its threshold is the share of each row's mass to keep; 1 or more keeps all that is possible. "density": its
            density is the share of each row's possible blocks to keep, forced ones counted.
    """
    if call.pool == "row":
        return _union_of_cells(importance, possible, forced, call)
    possible, forced = possible.expand_as(importance), forced.expand_as(importance)
    broken = ~importance.isfinite().all(-1, keepdim=True)
    mass = importance.masked_fill(broken | ~possible, 0).double()
    others = mass.masked_fill(~possible | forced, -1)
    ranked, order = others.sort(dim=-1, descending=True, stable=True)
    if call.rule == "density":
        share = int(call.density * (1 << DENSITY_BITS))
        wanted = (possible.sum(-1, keepdim=True) * share + (1 << DENSITY_BITS) - 1) >> DENSITY_BITS
        rank = torch.arange(importance.shape[-1], device=importance.device)
        take = (rank < wanted - forced.sum(-1, keepdim=True)) & (ranked >= 0)
        everything = broken
    else:
        tau = _thresholds(call, importance.device)[:, None, None]
        gains = ranked.clamp(min=0)
        before = (mass * forced).sum(-1, keepdim=True) + gains.cumsum(-1) - gains
        take = (before < tau * mass.sum(-1, keepdim=True)) & (ranked > 0)
        everything = broken | (tau >= 1)
    keep = torch.zeros_like(possible).scatter_(-1, order, take) | forced
    return torch.where(everything, possible, keep)


def _thresholds(call: SelectCall, device: torch.device) -> Tensor:
    """fp64 [1 or query_heads]."""
    return torch.as_tensor(call.thresholds, dtype=torch.float64, device=device)


def _union_of_cells(importance: Tensor, possible: Tensor, forced: Tensor, call: SelectCall) -> Tensor:
    """`choose` under the row rule: what some cell of [..., cells, key_blocks] needs for its own threshold."""
    broken = ~importance.isfinite().all(-1).all(-1)[..., None]
    mass = importance.masked_fill(broken[..., None] | ~possible[..., None, :], 0).double()
    tau = _thresholds(call, importance.device)[:, None, None]
    others = mass.masked_fill(forced[..., None, :], 0)
    ranked = others.sort(dim=-1, descending=True).values
    before = (mass * forced[..., None, :]).sum(-1, keepdim=True) + ranked.cumsum(-1) - ranked
    taken = (before < tau[..., None] * mass.sum(-1, keepdim=True)) & (ranked > 0)
    last = ranked.masked_fill(~taken, torch.inf).amin(-1, keepdim=True)
    if call.min_share:
        last = last.clamp(max=call.min_share * mass.sum(-1, keepdim=True))
    return torch.where(broken | (tau >= 1), possible, forced | ((others >= last) & (others > 0)).any(-2))


def query_cells(call: SelectCall) -> Tensor:
    """fp32 [batch, query_heads (KV heads with the estimate's variant group), query_cells, steps · head_dim], tokens reversed, scaled."""
    values = call.query.float()
    if call.estimate.group:
        values = values.unflatten(1, (call.kv_heads, -1)).mean(2)
    real = masks.real_queries(call)
    values = values if real is None else values.where(real[:, None, :, None], 0)
    whole, width = call.whole, call.query.shape[3]
    cells = _merged(whole, _cells(values, whole.span)[..., : whole.stride, :])
    if call.estimate.int8:
        numbers, scales = _rounded(cells.flatten(3))
        cells = numbers.mul_(scales[..., None]).unflatten(3, (-1, width))
    cells = cells.flatten(2, 3).unflatten(2, (-1, call.steps))[:, :, : call.query_cells]
    return cells.flip(3).flatten(3).mul_(call.scale / call.steps)


def _block_masses(call: SelectCall, logits: Tensor, visible: Tensor) -> Tensor:
    """Each key block's share of a query cell's mass, [..., query cells, key_blocks], of logits of all or the first key cells."""
    blocks = lambda values, fill: torch.nn.functional.pad(
        values, (0, call.key_blocks * (call.block_size // call.stride) - values.shape[-1]), value=fill
    ).unflatten(-1, (call.key_blocks, -1))
    if call.estimate.peak:
        if not _whole(logits):  # what is not finite must not vanish beside a higher score of its block
            logits = logits.masked_fill_(~logits.isfinite(), torch.nan)
        return _softmax(blocks(logits.masked_fill_(~visible, -torch.inf), -torch.inf).amax(-1), blocks(visible, False).any(-1))
    return blocks(_softmax(logits, visible), 0.0).sum(-1)


def key_cells(call: SelectCall) -> Tensor:
    """fp32 [batch, kv_heads, key_cells, steps · head_dim]."""
    if call.prepared_keys is None:
        cells, scales = _key_cells(call.whole)
        cells = cells.unflatten(3, (-1, call.query.shape[3])).flatten(2, 3)
    else:
        cells, scales = call.prepared_keys.float(), call.prepared_scales
    cells = cells.unflatten(2, (-1, call.steps))[:, :, : call.key_cells].flatten(3)
    return cells if scales is None else cells.mul_(scales.repeat_interleave(call.finer, 2)[:, :, : call.key_cells, None])


def _key_cells(call: SelectCall) -> tuple[Tensor, Tensor | None]:
    """`key_cells` before they are scaled, and their scales [batch, kv_heads, key_cells]; None without int8."""
    real = masks.real_keys(call)
    values = call.key.float()
    values = values if real is None else values.where(real[:, None, :, None], 0)
    cells = _cells(values, call.stride)
    if call.estimate.int8:
        mean = masks.keys_mean(call, values, real) if call.key_mean is None else call.key_mean
        cells = cells - mean[:, :, None, None]
        return _rounded(_merged(call, cells).flatten(3), call.sharing)
    return _merged(call, cells).flatten(3), None


def prepare_keys(call: SelectCall) -> tuple[Tensor, Tensor | None]:
    """The operands `prepared_keys` and `prepared_scales` of a call with an estimate that is prepared: int8 or the keys' dtype."""
    cells, scales = _key_cells(call)
    rows = cells.unflatten(3, (call.steps, -1)).flatten(2, 3)
    return rows.to(torch.int8 if call.estimate.int8 else call.key.dtype), scales


def _merged(call: SelectCall, cells: Tensor) -> Tensor:
    """Cells [..., tokens, head_dim] as scores multiply them: tokens, or neighbours' means, in the operands' dtype without int8."""
    if call.estimate.merge == 1:
        return cells
    first, *others = cells.unflatten(-2, (-1, call.estimate.merge)).unbind(-2)  # sums of so few, one by one, are slow on a CPU
    means = functools.reduce(torch.Tensor.add_, others[1:], first + others[0]).div_(call.estimate.merge)
    return means if call.estimate.int8 else means.to(call.key.dtype).float()


def _rounded(cells: Tensor, sharing: int = 1) -> tuple[Tensor, Tensor]:
    """Each cell [..., cells, numbers] rounded to 255 steps between minus and plus the largest size in `sharing` neighbouring cells, which
    share a scale; and these scales [..., cells], NaN when one of these is not finite."""
    size = torch.maximum(cells.amax(-1, keepdim=True), -cells.amin(-1, keepdim=True))  # a seventh of a norm's time on a CPU; NaN stays NaN
    if sharing > 1:
        shared = torch.nn.functional.pad(size, (0, 0, 0, -size.shape[-2] % sharing)).unflatten(-2, (-1, sharing)).amax(-2)
        size = shared.repeat_interleave(sharing, -2)[..., : size.shape[-2], :]
    size = size.clamp(min=1e-20)
    return (cells * (127 / size)).round_(), torch.where(size.isfinite(), size / 127, torch.nan)[..., 0]


def _cells(values: Tensor, size: int) -> Tensor:
    missing = -values.shape[2] % size
    return (torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values).unflatten(2, (-1, size))


def _visible_cells(call: SelectCall, end: int) -> int:
    """Key cells that query cells before `end` may see, as far as it is known without reading the device."""
    if not call.causal or call.query_start is not None:
        return call.key_cells
    last = min(end * call.span, call.query_len) - 1 + call.key_len - call.query_len
    return min(call.key_cells, max(0, last // call.stride + 1))


def _visible(call: SelectCall, rows: Tensor, cols: Tensor) -> Tensor:
    """Bool, broadcastable to [batch, heads, rows, cols]: key cells that a query cell may see."""
    first = (rows * call.span)[:, None] + call.start
    last = (rows * call.span + call.stride).clamp(max=call.query_len)[:, None] - 1 + call.start
    seen = torch.ones(1, 1, len(rows), len(cols), dtype=torch.bool, device=rows.device)
    if call.causal:
        seen = seen & (cols * call.stride <= last)
    key_bits = None
    if (bits := masks.cell_bits(call)) is not None:
        key_bits, query_bits = bits
        seen = seen & (key_bits[:, None, None, cols] & 1 != 0) & (query_bits[:, None, rows, None] != 0)
    if (ranges := masks.cell_segments(call)) is not None:
        (row_low, row_high), (low, high) = ranges
        seen = seen & _overlap((row_low[:, rows], row_high[:, rows]), (low[:, cols], high[:, cols]))[:, None]
    seen = seen & _in_window(call, first, cols, call.stride, key_bits)
    if call.estimate.group and seen.shape[1] > 1:
        # one estimate serves all heads of a group: it covers what any of them may see
        seen = seen.unflatten(1, (call.kv_heads, -1)).any(2)
    return seen


def _overlap(rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor]) -> Tensor:
    return (rows[0][..., :, None] <= cols[1][..., None, :]) & (rows[1][..., :, None] >= cols[0][..., None, :])


def _in_window(call: SelectCall, first: Tensor, cols: Tensor, size: int, bits: Tensor | None) -> Tensor:
    """Whether some key of a group lies in the window of the row at key position `first` (or later), or is a sink."""
    if not call.bounded_windows:
        return torch.ones((), dtype=torch.bool, device=cols.device)
    window = torch.tensor(call.bounded_windows, device=cols.device)[None, :, None, None]
    inside = ((cols + 1) * size).clamp(max=call.key_len) - 1 > first - window
    seen = inside | (window == 0)
    return seen if bits is None else seen | (bits[:, None, None, cols] & 2 != 0)


def _whole(logits: Tensor) -> bool:
    """Whether all are known to be finite."""
    # a sum is finite only where every term is: one pass where the question took four. Elsewhere asking would synchronise.
    return logits.device.type == "cpu" and bool(logits.sum().isfinite())


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Rows without a visible cell become 0; rows with a visible logit that is not finite become NaN. Written over the logits."""
    broken = None if _whole(logits) else (~logits.isfinite() & visible).any(-1, keepdim=True)
    logits = logits.masked_fill_(~visible, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    weights = weights.div_(total.masked_fill(total == 0, 1))
    return weights if broken is None else weights.masked_fill_(broken, torch.nan)

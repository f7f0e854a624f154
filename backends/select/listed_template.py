"""The text of the second, finer stage: scores of the listed blocks alone, and the row rule among them.

Scratch is as in one stage, with a place in a row's list where that has a key block: a column tile is TILE_BLOCKS places.
"""

SCORE_LISTED = '''

@triton.jit(do_not_specialize=[${unspecialised}])
def score(${parameters}):
    """One query block of one head: its cells against the key cells of its listed blocks, TILE_BLOCKS of them at a time.

    sums: fp16 [heads, end_cell - first_cell, column tiles * TILE_BLOCKS]. tops: fp32 [heads, column tiles, end_cell - first_cell].
    """
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block = first_block + tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    head = tl.program_id(1)
    b = head // heads
    h = head % heads
    row = b.to(tl.int64) * counts_batch + h * ((query_len + BLOCK - 1) // BLOCK) + block
    key_blocks = (key_len + BLOCK - 1) // BLOCK
    key_cells = (key_len + STRIDE - 1) // STRIDE
    tiles = column_tiles(key_len)
    row_count = end_cell - first_cell
    count = tl.load(listed_counts + row)
    rows = block * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DEPTH)
    q_tile = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + rows.to(tl.int64)[:, None] * (${query_step} * q_n) + dims[None, :]
    k_head = k + b.to(tl.int64) * k_b + (h // GROUP).to(tl.int64) * k_h + dims[None, :]
    row_mask = (rows < query_cells)[:, None]
    row_last = ${"tl.minimum(rows * SPAN + STRIDE, query_len) - 1 + start" if causal else "rows * 0"}
%if int8
    row_scale = tl.load(query_scales + head * query_cells + rows, mask=rows < query_cells, other=0.0) * scale
%end
    at = head.to(tl.int64) * row_count + rows - first_cell
    for first in range(0, count, TILE_BLOCKS):
        slot = first + tl.arange(0, TILE_BLOCKS)
        listed = tl.load(listed_indices + row * key_blocks + slot, mask=slot < count, other=32767).to(tl.int32)
        cols = tl.reshape(listed[:, None] * COL_CELLS + tl.arange(0, COL_CELLS)[None, :], [COLS])
        k_tile = k_head + cols.to(tl.int64)[:, None] * (STEPS * k_n)
        col_mask = (cols < key_cells)[:, None]
        acc = tl.zeros([ROWS, COLS], ${"tl.int32" if int8 else "tl.float32"})
        for i in tl.range(0, STEPS * CHUNKS, num_stages=STAGES):
            r = i // CHUNKS
            c = (i - r * CHUNKS) * DEPTH
%if chunks * depth != head_dim
            inside = (dims < HEAD_DIM - c)[None, :]
            x = tl.load(q_tile + (STEPS - 1 - r) * q_n + c, mask=row_mask & inside, other=0.0)
            y = tl.load(k_tile + r * k_n + c, mask=col_mask & inside, other=0.0)
%else
            x = tl.load(q_tile + (STEPS - 1 - r) * q_n + c, mask=row_mask, other=0.0)
            y = tl.load(k_tile + r * k_n + c, mask=col_mask, other=0.0)
%end
            acc = tl.dot(x, y.T, acc${", out_dtype=tl.int32" if int8 else ""})
%if int8 and peak
        s = acc
%elif int8
        col_scale = tl.load(key_scales + (b * (heads // GROUP) + h // GROUP) * key_cells + cols, mask=cols < key_cells, other=0.0)
        s = acc.to(tl.float32) * col_scale[None, :]
%else
        s = acc + acc * 0.0
%end
%if negative
        s = -s
%end
        col_first = tl.where(cols < key_cells, ${"cols * STRIDE" if causal else "0"}, NEVER)
        s = tl.where(col_first[None, :] <= row_last[:, None], s, ${lowest})
%if int8 and peak
        block_cells = listed * COL_CELLS
        scales_at = key_scales + (b * (heads // GROUP) + h // GROUP) * key_cells + block_cells
        block_scale = tl.load(scales_at, mask=block_cells < key_cells, other=0.0)
%end
        top, p = pooled(s, ${scales})
        kept = rows < end_cell
        tl.store(tops + (head * tiles + first // TILE_BLOCKS).to(tl.int64) * row_count + rows - first_cell, top, mask=kept)
        tl.store(sums + at[:, None] * (tiles * TILE_BLOCKS) + slot[None, :], p.to(tl.float16), mask=kept[:, None])
'''

CHOOSE_LISTED = '''

@triton.jit(do_not_specialize=[${unspecialised}])
def choose(${parameters}):
    """As the one stage's, of the query blocks that list more than LEAST blocks and no more than the columns held here."""
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block, b, h, scratch_head, _seen = place(first_block, heads, query_len, key_len, start)
    row = b.to(tl.int64) * counts_batch + h * ((query_len + BLOCK - 1) // BLOCK) + block
    count = tl.load(listed_counts + row)
    if (count > LEAST) & (count <= TILES * TILE_BLOCKS):
        tiles = column_tiles(key_len)
        key_blocks = (key_len + BLOCK - 1) // BLOCK
        slot = tl.arange(0, TILES * TILE_BLOCKS)
        possible = slot < count
        col = tl.load(listed_indices + row * key_blocks + slot, mask=possible, other=32767).to(tl.int32)
        _possible, forced = candidates(col, block, b, h, ${candidate_arguments})
        forced = forced & possible
        other = possible & (forced == 0)
%if rule == "taus"
        tau = tl.load(thresholds + h)
%end
        least = tl.maximum(1.0 - tau, 0.0) * (0.5 / (TILES * TILE_BLOCKS))
        wanted = tl.zeros([TILES * TILE_BLOCKS], tl.int32)
        everything = tl.where(tau >= 1.0, 1, 0)
        for r in range(ROW_CELLS):
            cell = block * ROW_CELLS + r
            inside = possible & (cell < query_cells)
            p = masses(tops, sums, scratch_head, cell - first_cell, slot, inside, row_count, tiles)
            everything = tl.maximum(everything, tl.max((p != p).to(tl.int32), 0))
%if importance
            tl.store(importances + (row * ROW_CELLS + r) * key_blocks + col, p, mask=possible)
%end
            wanted |= needed(p, other, forced, tau, least)
        kept = tl.where(everything > 0, possible, (wanted > 0) | forced).to(tl.int32)
        tl.store(counts + row, tl.sum(kept))
        tl.store(indices + row * key_blocks + tl.cumsum(kept, 0) - 1, col.to(tl.int16), mask=kept > 0)
'''

"""The text of the block selection kernels, with every clause of the op; `select_source` keeps the clauses that a spec has."""

HEADER = '''\
"""Antidiagonal block selection: ${description}.

A cell is STRIDE consecutive tokens; a query cell starts every SPAN rows. `score` writes, for every query cell and column tile, the
highest logit and the sums of exp2(logit - highest) over each key block; `choose` turns them into importances and block lists.
"""

import triton
import triton.language as tl

STRIDE = tl.constexpr(${stride})
STEPS = tl.constexpr(${steps})  # tokens of a cell that are multiplied, or means of neighbours
SPAN = tl.constexpr(${span})
BLOCK = tl.constexpr(${block})
HEAD_DIM = tl.constexpr(${head_dim})
GROUP = tl.constexpr(${group})  # scored heads per KV head
ROWS = tl.constexpr(${rows})  # query cells of a tile
COLS = tl.constexpr(${cols})  # key cells of a tile
DEPTH = tl.constexpr(${depth})  # numbers of a token that one step multiplies
CHUNKS = tl.constexpr(${chunks})  # steps per token
STAGES = tl.constexpr(${stages})
BAND = tl.constexpr(${band})  # row tiles that are walked together, column by column, so that neighbours in time share the L2 cache
ROW_CELLS = tl.constexpr(${row_cells})  # scored query cells of a block
COL_CELLS = tl.constexpr(${col_cells})  # key cells of a block
TILE_BLOCKS = tl.constexpr(${tile_blocks})  # key blocks of a column tile
NEVER = tl.constexpr(1 << 30)  # a position that no token has
TILE_SHIFT = tl.constexpr(${tile_shift})  # log2 of the keys of a column tile
%if prepared
MERGED = tl.constexpr(${merged})  # tokens that one mean stands for
WIDTH = tl.constexpr(${width})  # numbers of a token that a program prepares, some past the head dim
PITCH = tl.constexpr(${pitch})  # numbers from one prepared token to the next
CELLS = tl.constexpr(${part})  # cells that a program prepares
SHARED_CELLS = ${sharing}  # of a scale of keys
%end
%if streamed
HEADS = tl.constexpr(${heads})  # of a group, in a tile
PARTS = tl.constexpr(${parts})  # tiles for a group
DIMS = tl.constexpr(${dims})  # numbers of a token in a tile, some past the head dim
PAIR = tl.constexpr(${pair})  # neighbouring columns of a tile whose products one thread gets
LANES = tl.constexpr(${lanes})  # key blocks that neighbouring threads get
FOLDS = tl.constexpr(${folds})  # key blocks of one thread
FINER = tl.constexpr(${finer})  # cells cut out of one whose scale they share
OCTAVE = tl.constexpr(64)  # steps of a mass that doubles
STEEP = tl.constexpr(256.0)  # a step of a mass makes more than 2 of it, and the errors of exponentials less than 1
COARSE = tl.constexpr(4)  # those that the cutoffs of a first stage are rounded down to: lists need not be the shortest
%end
'''

WALK = '''

@triton.jit
def column_tiles(key_len):
    return (key_len + COLS * STRIDE - 1) // (COLS * STRIDE)


@triton.jit
def tiles_seen(row_tile, query_len, key_len, start):
    """How many column tiles some row of a row tile may see; never less for a later row tile."""
%if causal
    last = tl.minimum((row_tile + 1) * (ROWS * SPAN), query_len) - 1 + start
    # the shift rounds down, below zero too
    return tl.minimum(tl.maximum((last >> TILE_SHIFT) + 1, 0), column_tiles(key_len))
%else
    return row_tile * 0 + column_tiles(key_len)
%end


@triton.jit
def band_tiles(band, first_tile, end_tile, query_len, key_len, start):
    """Tiles of a band of row tiles."""
    rows = first_tile + band * BAND + tl.arange(0, BAND)
    return tl.sum(tl.where(rows < end_tile, tiles_seen(rows, query_len, key_len, start), 0))


@triton.jit
def settle(head, band, offset, size, bands, heads, first_tile, end_tile, query_len, key_len, start):
    """Moves on to the band that holds `offset`: bands from the last to the first, then the next head."""
    while (offset >= size) & (head < heads):
        offset -= size
        head = tl.where(band == 0, head + 1, head)
        band = tl.where(band == 0, bands, band) - 1
        size = band_tiles(band, first_tile, end_tile, query_len, key_len, start)
    return head, band, offset, size


@triton.jit
def locate(band, offset, first_tile, end_tile, query_len, key_len, start):
    """Row tile and column tile of a band's tile: first the columns that all its rows see, then what is left, row by row."""
    first = first_tile + band * BAND
    count = tl.minimum(end_tile - first, BAND)
    shared = tiles_seen(first, query_len, key_len, start)
    rows = first + tl.arange(0, BAND)
    left = tl.where(rows < end_tile, tiles_seen(rows, query_len, key_len, start) - shared, 0)
    before = tl.cumsum(left, 0) - left
    rest = offset - shared * count
    here = (before <= rest) & (rest < before + left)
    row = tl.where(rest < 0, first + offset % count, tl.sum(tl.where(here, rows, 0)))
    col = tl.where(rest < 0, offset // count, shared + rest - tl.sum(tl.where(here, before, 0)))
    return row, col
'''

# a tile's numbers by key block, of tiles whose columns lie in order
BY_BLOCK = '''

@triton.jit
def most(s):
    """[ROWS, TILE_BLOCKS]: of a tile's numbers the largest of each key block."""
    return tl.max(tl.reshape(s, [ROWS, TILE_BLOCKS, COL_CELLS]), 2)


@triton.jit
def added(s):
    """[ROWS, TILE_BLOCKS]: the sums of each key block's numbers."""
    return tl.sum(tl.reshape(s, [ROWS, TILE_BLOCKS, COL_CELLS]), 2)
'''

POOLED = '''
%if peak

@triton.jit
def highest(s, ${scales}):
    """fp32 [ROWS, TILE_BLOCKS]: the highest logit of each key block, of scores that are ${lowest} where masked."""
    # of a block the highest score alone goes on: nothing but a comparison for each of the others
    peak = most(s)
%if int8
    return tl.where(peak == ${lowest}, float("-inf"), peak.to(tl.float32) * (row_scale[:, None] * block_scale[None, :]))
%else
    # NaN, which a maximum passes over, has to stay; masked scores are minus infinity, of which that would make NaN
    return peak * scale + added(tl.where(s == float("-inf"), 0.0, s * 0.0))
%end

%end

@triton.jit
def pooled(s, ${scales}):
    """From a tile's scores, ${lowest} where masked, to each row's highest logit and each key block's sum of exp2(logit - highest)."""
%if peak
    peak = highest(s, ${scales})
    top = tl.max(peak, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.exp2(peak - base[:, None])
%else
    # multiplied after the maximum, and below beside the subtraction: one operation less for each score
    top = tl.max(s, 1) * ${"row_scale" if int8 else "scale"}
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * ${"row_scale[:, None]" if int8 else "scale"} - base[:, None])
    return top, added(p)
%end
'''

FINISH = '''

@triton.jit
def finish(acc, head, row_tile, col_tile, ${finish_arguments}):
    """From a tile's products to each row's highest logit and each key block's sum."""
    b = head // scored_heads
    h = head % scored_heads
    m0 = row_tile * ROWS
    n0 = col_tile * COLS
    rows = m0 + tl.arange(0, ROWS)
    cols = n0 + tl.arange(0, COLS)
    tiles = column_tiles(key_len)
    key_cells = (key_len + STRIDE - 1) // STRIDE
    row_count = end_cell - first_cell
%if key_flags or segments
    # masks per cell fill whole tiles
    padded_rows = (query_cells + ROWS - 1) // ROWS * ROWS
%end
%if key_flags
    cells_first = key_first + b * flags_batch * (tiles * COLS) + cols
    cells_last = query_last + b * flags_batch * padded_rows + rows
%end
%if window == "per_head"
    window = tl.load(windows + h)
%end
%if int8
    row_scale = tl.load(query_scales + head * query_cells + rows, mask=rows < query_cells, other=0.0) * scale
%if peak
    s = acc
%else
    col_scale = tl.load(key_scales + head // GROUP * key_cells + cols, mask=cols < key_cells, other=0.0)
    s = acc.to(tl.float32) * col_scale[None, :]
%end
%else
    # makes NaN of what is not finite, so that `choose` keeps the whole row
    s = acc + acc * 0.0
%end
%if key_flags or segments or window != "none"
    edge = True
%elif causal
    edge = (n0 + COLS > key_cells) | ((n0 + COLS - 1) * STRIDE > tl.minimum(m0 * SPAN + STRIDE, query_len) - 1 + start)
%else
    edge = n0 + COLS > key_cells
%end
    if edge:
        # one comparison of a row's number with a column's after the other, as a tile's worth of masks needs many registers
%if key_flags and not segments
        # loaded again: registers are scarce while tiles are multiplied
        col_first = tl.load(cells_first)
        row_last = tl.load(cells_last)
%else
        col_first = tl.where(cols < key_cells, ${"cols * STRIDE" if causal else "0"}, NEVER)
        row_last = ${"tl.minimum(rows * SPAN + STRIDE, query_len) - 1 + start" if causal else "rows * 0"}
%end
        s = tl.where(col_first[None, :] <= row_last[:, None], s, ${lowest})
%if segments
        # a cell of padding alone has an empty range
        ours = b * segments_batch * padded_rows + rows
        theirs = b * segments_batch * (tiles * COLS) + cols
        s = tl.where(tl.load(query_low + ours)[:, None] <= tl.load(key_high + theirs)[None, :], s, ${lowest})
        s = tl.where(tl.load(query_high + ours)[:, None] >= tl.load(key_low + theirs)[None, :], s, ${lowest})
%end
%if window != "none"
        row_floor = tl.where(window > 0, rows * SPAN + start - window, -NEVER)
%if key_flags
        col_last = tl.load(key_last + b * flags_batch * (tiles * COLS) + cols)
%else
        col_last = tl.minimum((cols + 1) * STRIDE, key_len) - 1
%end
        s = tl.where(col_last[None, :] > row_floor[:, None], s, ${lowest})
%end
    blocks = col_tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
%if int8 and peak
    first_cols = blocks * COL_CELLS
    block_scale = tl.load(key_scales + head // GROUP * key_cells + first_cols, mask=first_cols < key_cells, other=0.0)
%end
    top, p = pooled(s, ${scales})
    kept = rows < end_cell
    at = head.to(tl.int64) * row_count + rows - first_cell
    tl.store(tops + (head * tiles + col_tile).to(tl.int64) * row_count + rows - first_cell, top, mask=kept)
    tl.store(sums + at[:, None] * (tiles * TILE_BLOCKS) + blocks[None, :], p.to(tl.float16), mask=kept[:, None])
'''

SCORE = '''

@triton.jit(do_not_specialize=[${unspecialised}])
def score(${parameters}):
    """Persistent: program p takes tiles p, p + P, ... of all heads' tiles that causality allows.

    sums: fp16 [heads, end_cell - first_cell, column tiles * TILE_BLOCKS]. tops: fp32 [heads, column tiles, end_cell - first_cell].
    """
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    first_tile = first_cell // ROWS
    end_tile = (end_cell + ROWS - 1) // ROWS
    bands = (end_tile - first_tile + BAND - 1) // BAND
    heads = batch * scored_heads
    size = band_tiles(bands - 1, first_tile, end_tile, query_len, key_len, start)
    head, band, offset, size = settle(
        tl.program_id(0) * 0, bands - 1, tl.program_id(0), size, bands, heads, first_tile, end_tile, query_len, key_len, start
    )
    tiles = column_tiles(key_len)
%if key_flags
    padded_rows = (query_cells + ROWS - 1) // ROWS * ROWS
%end
    while head < heads:
        row_tile, col_tile = locate(band, offset, first_tile, end_tile, query_len, key_len, start)
        b = head // scored_heads
        h = head % scored_heads
        m0 = row_tile * ROWS
        n0 = col_tile * COLS
%if not tma or key_flags
        rows = m0 + tl.arange(0, ROWS)
        cols = n0 + tl.arange(0, COLS)
%end
        steps = STEPS * CHUNKS
%if key_flags
        cells_first = key_first + b * flags_batch * (tiles * COLS) + cols
        cells_last = query_last + b * flags_batch * padded_rows + rows
        # nothing of the tile is real
        steps = tl.where((tl.min(tl.load(cells_first)) < NEVER) & (tl.max(tl.load(cells_last)) > -NEVER), steps, 0)
%end
%if window == "per_head"
        window = tl.load(windows + h)
%end
%if window != "none" and not key_flags
        # nothing of the tile lies in any row's window
        steps = tl.where((window > 0) & ((n0 + COLS) * STRIDE - 1 <= m0 * SPAN + start - window), 0, steps)
%end
%if tma
        acc = tl.zeros([ROWS, COLS], ${"tl.int32" if int8 else "tl.float32"})
        for i in tl.range(0, steps, num_stages=STAGES):
            r = i // CHUNKS
            c = (i - r * CHUNKS) * DEPTH
            x = q.load([b, h, STEPS - 1 - r, m0, c]).reshape(ROWS, DEPTH)
            y = k.load([b, h // GROUP, r, n0, c]).reshape(COLS, DEPTH)
            acc = tl.dot(x, y.T, acc${", out_dtype=tl.int32" if int8 else ""})
%else
        dims = tl.arange(0, DEPTH)
        q_tile = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + rows.to(tl.int64)[:, None] * (${query_step} * q_n) + dims[None, :]
        k_tile = k + b.to(tl.int64) * k_b + (h // GROUP).to(tl.int64) * k_h + cols.to(tl.int64)[:, None] * (STEPS * k_n) + dims[None, :]
        row_mask = (rows < query_cells)[:, None]
        col_mask = (cols < (key_len + STRIDE - 1) // STRIDE)[:, None]
        acc = tl.zeros([ROWS, COLS], ${"tl.int32" if int8 else "tl.float32"})
        for i in tl.range(0, steps, num_stages=STAGES):
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
%end

        finish(acc, head, row_tile, col_tile, ${finish_arguments})

        offset += tl.num_programs(0)
        head, band, offset, size = settle(
            head, band, offset, size, bands, heads, first_tile, end_tile, query_len, key_len, start
        )
'''

CANDIDATES = '''

@triton.jit
def candidates(col, block, b, h, ${candidate_arguments}):
    """Which key blocks the query block may list, and which it must; see the reference."""
    key_blocks = (key_len + BLOCK - 1) // BLOCK
    low = block * BLOCK + start
    high = tl.minimum((block + 1) * BLOCK, query_len) - 1 + start
    reachable = col < key_blocks
%if causal
    reachable = reachable & (col * BLOCK <= high)
%end
%if key_flags
    bits = tl.load(block_bits + b * flags_batch * key_blocks + col, mask=col < key_blocks, other=0).to(tl.int32)
    reachable = reachable & (bits & 1 != 0)
    sink = tl.load(sink_blocks + b * flags_batch)
%else
    sink = 0
%end
%if segments
    at = b * segments_batch * ((query_len + BLOCK - 1) // BLOCK) + block
    theirs_low = tl.load(block_low + b * segments_batch * key_blocks + col, mask=col < key_blocks, other=0)
    theirs_high = tl.load(block_high + b * segments_batch * key_blocks + col, mask=col < key_blocks, other=0)
    reachable = reachable & (tl.load(rows_low + at) <= theirs_high) & (tl.load(rows_high + at) >= theirs_low)
%end
    possible = reachable
%if window != "none"
%if window == "per_head"
    window = tl.load(windows + h)
%end
    last_key = tl.minimum((col + 1) * BLOCK, key_len) - 1
    inside = (window <= 0) | (last_key > low - window)
%if key_flags
    inside = inside | (bits & 2 != 0)
%end
    possible = possible & inside
%end
    own = ((col + 1) * BLOCK > low) & (col * BLOCK <= high)
    forced = ((col == sink) | own) & reachable
    return possible | forced, forced
'''

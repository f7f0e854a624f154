"""The text of kernels that keep a tile of query cells while key cells pass by: those of all blocks that it may see, or of listed ones alone.

A place is a key block's position in the list that the heads of a group share; without lists it is the key block itself. What lies in scratch
is the logarithm of a block's mass to the base 2, below that of the first tile where the cell sees something, so that 16 bits are most
precise where masses are large. Cells lie side by side there, so that one thread has a cell's masses, or many of them, and adds alone.
"""

BY_BLOCK = '''

@triton.jit
def columns(first):
    """[COLS]: of each column of a tile that begins at place `first`, its place and its cell of that place's block.

    Of a product's rows, tensor cores give PAIR columns of every four times PAIR to one thread. A block's cells lie in the columns of one thread,
    or of as few as may be: it compares or adds them alone.
    """
    column = tl.arange(0, COLS)
    lane = column // PAIR % 4
    place = first + column // (4 * PAIR) % FOLDS * LANES + lane % LANES
    return place, (column // (4 * PAIR * FOLDS) * (4 // LANES) + lane // LANES) * PAIR + column % PAIR


@triton.jit
def most(s):
    """[ROWS, TILE_BLOCKS]: of a tile's numbers the largest of each key block."""
    apart = tl.reshape(s, [ROWS, COLS // (4 * PAIR * FOLDS), FOLDS, 4 // LANES, LANES, PAIR])
    return tl.reshape(tl.max(tl.max(tl.max(apart, 5), 1), 2), [ROWS, TILE_BLOCKS])


@triton.jit
def added(s):
    """[ROWS, TILE_BLOCKS]: the sums of each key block's numbers."""
    apart = tl.reshape(s, [ROWS, COLS // (4 * PAIR * FOLDS), FOLDS, 4 // LANES, LANES, PAIR])
    return tl.reshape(tl.sum(tl.sum(tl.sum(apart, 5), 1), 2), [ROWS, TILE_BLOCKS])
'''

SCORE_STREAM = '''

@triton.jit
def tile_masses(acc, first, base, blocks, cols, rows, row_last, row_scale, key_scales, scale, key_cells, edge, EDGE: tl.constexpr):
    """fp32 [ROWS, TILE_BLOCKS]: the logarithm of each block's mass below `base`, and the new base.

    first: the tile's first place. blocks: [TILE_BLOCKS], key blocks. cols: [COLS], their cells. EDGE: some cells may be hidden, in tiles from place `edge` on.
    """
%if int8 and peak
    s = acc
%elif int8
    s = acc.to(tl.float32) * tl.load(key_scales + tl.minimum(cols, key_cells - 1) // FINER)[None, :]
%else
    # makes NaN of what is not finite, so that `choose` keeps the whole row
    s = acc + acc * 0.0
%end
    if EDGE:
        if first >= edge:
            col_first = tl.where(cols < key_cells, ${"cols * STRIDE" if causal else "0"}, NEVER)
            s = tl.where(col_first[None, :] <= row_last[:, None], s, ${lowest})
%if int8 and peak
    block_scale = tl.load(key_scales + tl.minimum(blocks * COL_CELLS, key_cells - 1) // FINER)
%end
%if peak
    masses = highest(s, ${scales})
%else
    top, sums = pooled(s, ${scales})
    masses = tl.where(top == float("-inf"), 0.0, top)[:, None] + tl.log2(sums)
%end
%if int8 and peak
    # who sees nothing of the first places sees nothing of others
    if first == 0:
        top = tl.max(masses, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
    below = masses - base[:, None]
%else
%if peak
    top = tl.max(masses, 1)
%end
    base = tl.where(base == float("-inf"), top, base)
    below = masses - tl.where(base == float("-inf"), 0.0, base)[:, None]
%end
    # 1.5 · 2^23 steps leave no room for a fraction of one; where numbers of 16 bits are further apart, they are whole steps too
    grid = 12582912.0 / OCTAVE
    return (below + grid) - grid, base


%if causal
@triton.jit
def seen_blocks(end, query_len, key_len, start):
    """Key blocks that the query rows before `end` may see."""
    keys = tl.minimum(tl.maximum(tl.minimum(end, query_len) + start, 0), key_len)
    return (keys + BLOCK - 1) // BLOCK


%end
@triton.jit
def row_at(i, first_seen, key_blocks):
    """Places of scratch before those of block i of the launch: each block has as many as it may see."""
    i = i.to(tl.int64)
    return ${"i * first_seen + i * (i - 1) // 2" if triangular else "i * key_blocks"}


@triton.jit
def blocks_of(list_at, place, count, EDGE: tl.constexpr):
    """Key blocks in some places; the last one again in those past the end, of which there are none unless EDGE."""
    if EDGE:
        place = tl.minimum(place, count - 1)
%if listed
    return tl.load(list_at + place).to(tl.int32)
%else
    return place
%end


%if whole
@triton.jit
def tile(first, base, x, k_head, k_n, list_at, count, out, row_count, rows, row_last, row_scale, key_scales, scale, key_cells, edge, EDGE: tl.constexpr):
    """TILE_BLOCKS places from `first` on: their scores, and the new base."""
    in_place, cell = columns(first)
    cols = blocks_of(list_at, in_place, count, EDGE) * COL_CELLS + cell
    number = tl.arange(0, STEPS * DIMS)
    y_number = number // DIMS * k_n + number % DIMS
    real = tl.minimum(cols, key_cells - 1) if EDGE else cols
    at = k_head + real.to(tl.int64)[:, None] * (STEPS * k_n) + y_number[None, :]
%if dims != head_dim
    y = tl.load(at, mask=(number % DIMS < HEAD_DIM)[None, :], other=0.0)
%else
    y = tl.load(at)
%end
    acc = tl.dot(x, y.T${", out_dtype=tl.int32" if int8 else ""})
    place = first + tl.arange(0, TILE_BLOCKS)
    blocks = blocks_of(list_at, place, count, EDGE)
    masses, base = tile_masses(acc, first, base, blocks, cols, rows, row_last, row_scale, key_scales, scale, key_cells, edge, EDGE)
    seen = place[None, :] < row_count[:, None] if EDGE else (row_count > 0)[:, None]
    tl.store(out + place[None, :] * ROW_CELLS, masses.to(tl.float16), mask=seen)
    return base
%end


@triton.jit(do_not_specialize=[${unspecialised}])
def score(${parameters}):
%if listed
    """One query block of HEADS heads that share keys: its cells against the key cells of listed blocks, TILE_BLOCKS blocks at a time.
%else
    """ROWS query cells of one head against the key cells of all blocks that they may see, TILE_BLOCKS blocks at a time.
%end

    logs: fp16 [batch * heads, query blocks of the launch, key_blocks, ROW_CELLS], written as far as blocks are listed or seen${", of heads that need them" if skips else ""}.
    """
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    query_blocks = (query_len + BLOCK - 1) // BLOCK
    key_blocks = (key_len + BLOCK - 1) // BLOCK
    key_cells = (key_len + STRIDE - 1) // STRIDE
    m = tl.arange(0, ROWS)
%if listed
    block = first_block + tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    owner = tl.program_id(1) // PARTS
    list_row = (owner // (heads // GROUP)).to(tl.int64) * lists_batch + owner % (heads // GROUP) * query_blocks + block
    count = tl.load(listed_counts + list_row)
    list_at = listed_indices + list_row * key_blocks
    member = tl.program_id(1) % PARTS * HEADS + m // ROW_CELLS
    rows = block * ROW_CELLS + m % ROW_CELLS
    row_count = tl.where((member < GROUP) & (rows < query_cells), count, 0)
    head = owner * GROUP + tl.minimum(member, GROUP - 1)
    # lists rise: blocks that overlap the rows' own positions, or where keys end, are in the last two places
    inner = tl.maximum(count - 2, 0) // TILE_BLOCKS * TILE_BLOCKS
%else
    # long rows of all heads first
    first_row = (first_block * ROW_CELLS // ROWS + tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    head = tl.program_id(0)
    owner = head // GROUP
    rows = first_row + m
    alive = rows < tl.minimum(query_cells, (first_block + blocks) * ROW_CELLS)
    list_at = logs
%if causal
    count = seen_blocks((first_row + ROWS) * SPAN, query_len, key_len, start)
    row_count = tl.where(alive, seen_blocks((rows // ROW_CELLS + 1) * BLOCK, query_len, key_len, start), 0)
    inner = tl.minimum(tl.maximum(tl.minimum(first_row * SPAN + STRIDE, query_len) + start, 0), key_len) // (BLOCK * TILE_BLOCKS) * TILE_BLOCKS
%else
    count = key_blocks
    row_count = tl.where(alive, key_blocks, 0)
    inner = key_len // (BLOCK * TILE_BLOCKS) * TILE_BLOCKS
%end
%if skips
    # a head that keeps everything needs no scores
    needless = tl.load(thresholds + head % heads) >= 1.0
    count = tl.where(needless, 0, count)
    inner = tl.where(needless, 0, inner)
%end
%end
    b = owner // (heads // GROUP)
    g = owner % (heads // GROUP)
    q_rows = q + b.to(tl.int64) * q_b + (head - b * heads).to(tl.int64) * q_h${"" if listed else " + tl.zeros([ROWS], tl.int64)"}
    q_rows += tl.minimum(rows, query_cells - 1).to(tl.int64) * (${query_step} * q_n)
    k_head = k + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    row_last = ${"tl.minimum(rows * SPAN + STRIDE, query_len) - 1 + start" if causal else "rows * 0"}
%if int8
    scaled_cells = (query_cells + FINER - 1) // FINER
    row_scale = tl.load(query_scales + head * scaled_cells + tl.minimum(rows, query_cells - 1) // FINER) * scale
    key_scales += owner.to(tl.int64) * ((key_cells + FINER - 1) // FINER)
%else
    row_scale = scale
    key_scales = k  # is not read
%end
    before = head * row_at(blocks, first_seen, key_blocks) + row_at(rows // ROW_CELLS - first_block, first_seen, key_blocks)
    out = logs + (before * ROW_CELLS + rows % ROW_CELLS)[:, None]
    base = tl.full([ROWS], ${"0.0" if int8 and peak else 'float("-inf")'}, tl.float32)
%if whole
    number = tl.arange(0, STEPS * DIMS)
    # an antidiagonal: the last query against the first key
    x_number = (STEPS - 1) * q_n - number // DIMS * q_n + number % DIMS
    x_at = q_rows[:, None] + x_number[None, :]
%if dims != head_dim
    x = tl.load(x_at, mask=(number % DIMS < HEAD_DIM)[None, :], other=0.0)
%else
    x = tl.load(x_at)
%end
%if listed
    # rows of few tiles: the last ones are fetched ahead as the others are
    for first in tl.range(0, count, TILE_BLOCKS, num_stages=STAGES):
        base = tile(first, base, x, k_head, k_n, list_at, count, out, row_count, rows, row_last, row_scale, key_scales, scale, key_cells, inner, True)
%else
    for first in tl.range(0, inner, TILE_BLOCKS, num_stages=STAGES):
        base = tile(first, base, x, k_head, k_n, list_at, count, out, row_count, rows, row_last, row_scale, key_scales, scale, key_cells, inner, False)
    for first in tl.range(inner, count, TILE_BLOCKS, num_stages=1):
        base = tile(first, base, x, k_head, k_n, list_at, count, out, row_count, rows, row_last, row_scale, key_scales, scale, key_cells, inner, True)
%end
%else
    dims = tl.arange(0, DEPTH)
    for first in range(0, count, TILE_BLOCKS):
        in_place, cell = columns(first)
        cols = blocks_of(list_at, in_place, count, True) * COL_CELLS + cell
        k_tile = k_head + tl.minimum(cols, key_cells - 1).to(tl.int64)[:, None] * (STEPS * k_n) + dims[None, :]
        acc = tl.zeros([ROWS, COLS], ${"tl.int32" if int8 else "tl.float32"})
        for i in tl.range(0, STEPS * CHUNKS, num_stages=STAGES):
            r = i // CHUNKS
            c = (i - r * CHUNKS) * DEPTH
%if chunks * depth != head_dim
            inside = (dims < HEAD_DIM - c)[None, :]
            x = tl.load(q_rows[:, None] + dims[None, :] + (STEPS - 1 - r) * q_n + c, mask=inside, other=0.0)
            y = tl.load(k_tile + r * k_n + c, mask=inside, other=0.0)
%else
            x = tl.load(q_rows[:, None] + dims[None, :] + (STEPS - 1 - r) * q_n + c)
            y = tl.load(k_tile + r * k_n + c)
%end
            acc = tl.dot(x, y.T, acc${", out_dtype=tl.int32" if int8 else ""})
        place = first + tl.arange(0, TILE_BLOCKS)
        listed = blocks_of(list_at, place, count, True)
        masses, base = tile_masses(acc, first, base, listed, cols, rows, row_last, row_scale, key_scales, scale, key_cells, inner, True)
        tl.store(out + place[None, :] * ROW_CELLS, masses.to(tl.float16), mask=place[None, :] < row_count[:, None])
%end
'''

NEEDED = '''

@triton.jit
def masses_of(s):
    """Masses of each cell [places, CELLS] beside the largest, from their logarithms in steps of an octave's OCTAVEth part; their sums, NaN
    where one is not finite."""
    top = tl.max(s, 0)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[None, :])
    return p, tl.sum(p, 0)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def packed(marks, SPREAD: tl.constexpr, WORD: tl.constexpr):
    """int32 [PLACES // (SPREAD * WORD), SPREAD]: marks [PLACES, CELLS] of 0.0 or 1.0, joined over the cells.

    Those of WORD places that one thread has become bits of one number first, so that threads exchange little.
    """
    PLACES: tl.constexpr = marks.shape[0]
    apart = tl.reshape(marks, [PLACES // (SPREAD * WORD), WORD, SPREAD, marks.shape[1]])
    bits = tl.sum(apart * (1 << tl.arange(0, WORD)).to(tl.float32)[None, :, None, None], 1)
    return tl.reduce(bits.to(tl.int32), 2, either)


@triton.jit
def unpacked(words, PLACES: tl.constexpr, SPREAD: tl.constexpr, WORD: tl.constexpr):
    """int32 [PLACES]: of `packed`, 1 in marked places."""
    return tl.reshape((words[:, None, :] >> tl.arange(0, WORD)[None, :, None]) & 1, [PLACES])


@triton.jit
def needed(p, total, alive, forced, tau, least, ${"min_share, " if min_share else ""}PARTS_OF_OCTAVE: tl.constexpr):
    """fp32 [places, CELLS]: 1 where a cell needs a block: each takes the fewest and heaviest of those that are not forced which reach, with
    the forced ones, tau of its mass.${" And all that hold min_share of it." if min_share else ""}

    p, total: [places, CELLS] and [CELLS], as `masses_of` gives them. alive: [CELLS], cells that there are. least: a share of all mass below
    any that can be needed. PARTS_OF_OCTAVE: cutoffs are whole numbers of these below the largest mass, rounded down.
    """
    gain = tl.where(forced[:, None], 0.0, p)
    need = tau * total - (total - tl.sum(gain, 0))
    # who sees anything has a mass of 1
    size = tl.where(total > 1.0, total, 1.0)
    cut = tl.floor(tl.log2(least * size) * PARTS_OF_OCTAVE)
%if min_share
    # a mass of 0 is no share of 0
    line = tl.where(total == 0.0, 1.0, min_share * total)
    enough = tl.sum(tl.where(gain >= line[None, :], gain, 0.0), 0) >= need
    steps = tl.where(enough, 0.0, tl.minimum(tl.floor(tl.log2(line) * PARTS_OF_OCTAVE), 0.0) - cut)
%else
    steps = -cut
%end
    # all cells seek at once, by halving steps of the logarithm: as many for each of them, up to one above the largest mass
    most_steps = tl.max(tl.where(alive & (total == total), steps, 0.0), 0)
    step = 0.5
    while 2.0 * step <= most_steps + 1.0:
        step *= 2.0
    while step >= 1.0:  # those >= cut have the mass needed
        # masses are steps of an octave's OCTAVEth part apart, so that this is 1 for those that reach cut + step and 0 for others: one
        # multiplication that saturates, where a comparison and a selection run at half its rate
        slope = tl.exp2((cut + step) * (-1.0 / PARTS_OF_OCTAVE)) * STEEP
        above = tl.minimum(tl.maximum(gain * slope[None, :] - (STEEP - 2.0), 0.0), 1.0)
        reached = tl.sum(gain * above, 0)
        cut = tl.where(reached >= need, cut + step, cut)
        step *= 0.5
    cutoff = tl.exp2(cut * (1.0 / PARTS_OF_OCTAVE))
%if min_share
    cutoff = tl.where(enough, line, tl.minimum(cutoff, line))
%end
    # nothing reaches NaN: what lies where no cell is may be anything
    return tl.where(gain >= tl.where(alive, cutoff, float("nan"))[None, :], 1.0, 0.0)
'''

CHOOSE_STREAM = '''

@triton.jit(do_not_specialize=[${unspecialised}])
def choose(${parameters}):
%if listed
    """One query block of one head, of those that list more than LEAST blocks and no more than PLACES: CELLS cells at once."""
%else
    """One query block of one head, of those that see more than LEAST blocks and no more than PLACES: CELLS cells at once."""
%end
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block = begin + tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    query_blocks = (query_len + BLOCK - 1) // BLOCK
    key_blocks = (key_len + BLOCK - 1) // BLOCK
%if listed
    list_row = b.to(tl.int64) * lists_batch + h // GROUP * query_blocks + block
    count = tl.load(listed_counts + list_row)
%else
    count = ${"seen_blocks((block + 1) * BLOCK, query_len, key_len, start)" if causal else "key_blocks"}
%end
    if (count > LEAST) & (count <= PLACES):
        row = b.to(tl.int64) * counts_batch + h * query_blocks + block
        place = tl.arange(0, PLACES)
        inside = place < count
%if listed
        col = tl.load(listed_indices + list_row * key_blocks + place, mask=inside, other=32767).to(tl.int32)
%else
        col = place
%end
        _possible, forced = candidates(col, block, b, h, ${candidate_arguments})
        forced = forced & inside
        wanted = tl.zeros([PLACES // (SPREAD * WORD), SPREAD], tl.int32)
%if rule == "taus"
        tau = tl.load(thresholds + ${"h * GROUP" if grouped else "h"})
%end
        everything = tl.where(tau >= 1.0, 1, 0)
        # all that lies below is less than may be left out, and a cell's mass is at least its largest one
        least = tl.maximum(tl.maximum(1.0 - tau, 0.0) * (0.5 / PLACES), 1e-12)
%if grouped
        # one list for all heads of a group, of what a cell of one of them needs
        for member in range(0, GROUP):
%if rule == "taus"
            tau = tl.load(thresholds + h * GROUP + member)
            everything = tl.maximum(everything, tl.where(tau >= 1.0, 1, 0))
            least = tl.maximum(tl.maximum(1.0 - tau, 0.0) * (0.5 / PLACES), 1e-12)
%end
            head = tl.program_id(1) * GROUP + member
            at = logs + (head * row_at(blocks, first_seen, key_blocks) + row_at(block - first_block, first_seen, key_blocks)) * ROW_CELLS
            for first in range(0, ROW_CELLS, CELLS):
                cell = first + tl.arange(0, CELLS)
                alive = block * ROW_CELLS + cell < query_cells
                s_at = tl.max_contiguous(at + place[:, None] * ROW_CELLS + cell[None, :], [1, VECTOR])
                s = tl.load(s_at, mask=inside[:, None], other=float("-inf")).to(tl.float32)
                p, total = masses_of(s)
                everything = tl.maximum(everything, tl.max((alive & (total != total)).to(tl.int32), 0))
                wanted |= packed(needed(p, total, alive, forced, tau, least, COARSE), SPREAD, WORD)
%else
        before = tl.program_id(1) * row_at(blocks, first_seen, key_blocks) + row_at(block - first_block, first_seen, key_blocks)
        at = logs + before * ROW_CELLS
        for first in range(0, ROW_CELLS, CELLS):
            cell = first + tl.arange(0, CELLS)
            alive = block * ROW_CELLS + cell < query_cells
            s_at = tl.max_contiguous(at + place[:, None] * ROW_CELLS + cell[None, :], [1, VECTOR])
            s = tl.load(s_at, mask=inside[:, None], other=float("-inf")).to(tl.float32)
            p, total = masses_of(s)
            everything = tl.maximum(everything, tl.max((alive & (total != total)).to(tl.int32), 0))
%if importance
            shares = p * tl.where(total == 0.0, 0.0, 1.0 / total)[None, :]
            kept = inside[:, None] & alive[None, :]
            tl.store(importances + (row * ROW_CELLS + cell)[None, :] * key_blocks + col[:, None], shares, mask=kept)
%end
            wanted |= packed(needed(p, total, alive, forced, tau, least, ${"min_share, " if min_share else ""}OCTAVE), SPREAD, WORD)
%end
        kept = tl.where(everything > 0, inside, (unpacked(wanted, PLACES, SPREAD, WORD) > 0) | forced).to(tl.int32)
        tl.store(counts + row, tl.sum(kept))
        tl.store(indices + row * key_blocks + tl.cumsum(kept, 0) - 1, col.to(tl.int16), mask=kept > 0)
'''

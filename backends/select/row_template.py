"""The text of the kernels that choose under the row rule: every query cell finds its own cutoff, the block's list is their union.

A cell keeps what is at or above its cutoff, so that nothing is sorted and no cell's choice is written down: a block's cells are read one
after the other, and what is kept of them is one bit a column in registers.
"""

NEEDED = '''

@triton.jit
def add_pairs(x, count, y, more):
    return x + y, count + more


@triton.jit
def masses(tops, sums, scratch_head, cell, place, inside, row_count, tiles):
    """fp32 [places]: one cell's masses in the places of its row of sums, normalised, NaN where one is not finite."""
    top = tl.load(tops + (scratch_head * tiles + place // TILE_BLOCKS).to(tl.int64) * row_count + cell, mask=inside, other=float("-inf"))
    highest = tl.max(top, 0)
    at = sums + (scratch_head.to(tl.int64) * row_count + cell) * (tiles * TILE_BLOCKS) + place
    p = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    # 0 where the cell sees nothing, which keeps a sum's NaN
    p = p * tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(p, 0)
    return p * tl.where(total == 0.0, 0.0, 1.0 / total)


@triton.jit
def needed(p, other, forced, tau, least${", min_share" if min_share else ""}):
    """1 for the fewest and heaviest of `other` that reach, with the forced ones, tau of one cell's mass: bisection on the bits of the cutoff.

    p: the cell's masses. least: as a share of all mass, less than any that can be needed.
%if min_share
    min_share: what holds this share of all mass is marked in any case, so that most cells need no bisection.
%end
    """
    gain = tl.where(other, p, 0.0)
    rest = tl.sum(gain, 0)
    must = tl.sum(tl.where(forced, p, 0.0), 0)
    need = tau * (rest + must) - must
    # the order of the bits is the order of the values, as none is negative
    bits = gain.to(tl.int32, bitcast=True)
    high = tl.max(bits, 0) + 1
%if min_share
    # a mass of 0 is no share of 0
    line = tl.maximum((min_share * (rest + must)).to(tl.int32, bitcast=True), 1)
    large = bits >= line
    reached, above_high = tl.reduce((tl.where(large, gain, 0.0), large.to(tl.int32)), 0, add_pairs)
    enough = reached >= need
    high = tl.where(enough, line, tl.minimum(high, line))
    low = tl.where(enough, line, tl.minimum(tl.maximum((least * (rest + must)).to(tl.int32, bitcast=True), 1), high))
    above_low = tl.sum((bits >= low).to(tl.int32), 0)
%else
    low = tl.where(need > 0.0, tl.maximum((least * (rest + must)).to(tl.int32, bitcast=True), 1), high)
    above_low = tl.sum((bits >= low).to(tl.int32), 0)
    above_high = 0
%end
    while (high - low > 1) & (above_low - above_high > 1):  # those >= low have the mass needed, those >= high have not
        middle = low + (high - low) // 2
        above = bits >= middle
        # one wait for both sums
        reached, count = tl.reduce((tl.where(above, gain, 0.0), above.to(tl.int32)), 0, add_pairs)
        enough = reached >= need
        above_low = tl.where(enough, count, above_low)
        above_high = tl.where(enough, above_high, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return (bits >= low).to(tl.int32)
'''

CHOOSE_ROWS = '''

@triton.jit(do_not_specialize=[${unspecialised}])
def choose(${parameters}):
    """One query block of one head: rescales each cell's sums, finds its cutoff by bisection on the bits, writes the list of their union."""
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block, b, h, scratch_head, seen = place(first_block, heads, query_len, key_len, start)
    tiles = column_tiles(key_len)
    col = tl.arange(0, TILES * TILE_BLOCKS)
    possible, forced = candidates(col, block, b, h, ${candidate_arguments})
    other = possible & (forced == 0)
    row = b.to(tl.int64) * counts_batch + h * ((query_len + BLOCK - 1) // BLOCK) + block
    key_blocks = (key_len + BLOCK - 1) // BLOCK
%if rule == "taus"
    tau = tl.load(thresholds + h)
%end
    # what lies below cannot be needed: all of it together is less than may be left out
    least = tl.maximum(1.0 - tau, 0.0) * (0.5 / (TILES * TILE_BLOCKS))
    wanted = tl.zeros([TILES * TILE_BLOCKS], tl.int32)
    everything = tl.where(tau >= 1.0, 1, 0)
    for r in range(ROW_CELLS):
        cell = block * ROW_CELLS + r
        inside = (col < seen * TILE_BLOCKS) & (cell < query_cells)
        p = masses(tops, sums, scratch_head, cell - first_cell, col, inside, row_count, tiles)
        everything = tl.maximum(everything, tl.max((p != p).to(tl.int32), 0))
%if importance
        tl.store(importances + (row * ROW_CELLS + r) * key_blocks + col, p, mask=col < key_blocks)
%end
        wanted |= needed(p, other, forced, tau, least${", min_share" if min_share else ""})
    kept = tl.where(everything > 0, possible, (wanted > 0) | forced).to(tl.int32)
    tl.store(counts + row, tl.sum(kept))
    tl.store(indices + row * key_blocks + tl.cumsum(kept, 0) - 1, col.to(tl.int16), mask=kept > 0)
'''

POOL_ROWS = '''

@triton.jit
def gains_of(at_top, at_sum, t, seen, alive, row_count, highest, block, b, h, ${candidate_arguments}):
    """Unnormalised masses of some column tiles of one cell, of the blocks that are possible without being forced and of the forced ones."""
    top = tl.load(at_top + t.to(tl.int64) * row_count, mask=(t < seen) & alive, other=float("-inf"))
    col = t[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]
    p = tl.load(at_sum + col, mask=((t < seen) & alive)[:, None], other=0.0).to(tl.float32) * tl.exp2(top - highest)[:, None]
    possible, forced = candidates(col, block, b, h, ${candidate_arguments})
    return p, tl.where(possible & (forced == 0), p, 0.0), tl.where(forced, p, 0.0), col


@triton.jit(do_not_specialize=[${unspecialised}])
def pool(${parameters}):
    """1 where some cell of one query block of one head keeps a key block, NaN throughout where a cell is not finite, PART column tiles at a
    time. An element stays with its thread: no barrier."""
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block, b, h, scratch_head, seen = place(first_block, heads, query_len, key_len, start)
    tiles = column_tiles(key_len)
    key_blocks = (key_len + BLOCK - 1) // BLOCK
%if rule == "taus"
    tau = tl.load(thresholds + h)
%end
    # marks of this launch alone: [programs of axis 1, blocks of the launch, key_blocks]
    out = importances + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block - first_block) * key_blocks
    part = tl.arange(0, PART)
    for r in range(ROW_CELLS):
        cell = block * ROW_CELLS + r
        alive = cell < query_cells
        every = tl.arange(0, TILES)
        at_top = tops + (scratch_head * tiles).to(tl.int64) * row_count + cell - first_cell
        at_sum = sums + (scratch_head.to(tl.int64) * row_count + cell - first_cell) * (tiles * TILE_BLOCKS)
        highest = tl.max(tl.load(at_top + every.to(tl.int64) * row_count, mask=(every < seen) & alive, other=float("-inf")), 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        total = 0.0
        rest = 0.0
        must = 0.0
        high = 0
        for first in range(0, tiles, PART):
            p, gain, forced_mass, col = gains_of(at_top, at_sum, first + part, seen, alive, row_count, highest, block, b, h, ${candidate_arguments})
            total += tl.sum(p)
            rest += tl.sum(gain)
            must += tl.sum(forced_mass)
            high = tl.maximum(high, tl.max(gain.to(tl.int32, bitcast=True)))
        high += 1
        need = tau * (rest + must) - must
%if min_share
        line = tl.maximum((min_share * (rest + must)).to(tl.int32, bitcast=True), 1)
        large = 0.0
        for first in range(0, tiles, PART):
            p, gain, forced_mass, col = gains_of(at_top, at_sum, first + part, seen, alive, row_count, highest, block, b, h, ${candidate_arguments})
            large += tl.sum(tl.where(gain.to(tl.int32, bitcast=True) >= line, gain, 0.0))
        low = tl.where(large >= need, line, 1)
        high = tl.where(large >= need, line, tl.minimum(high, line))
%else
        low = tl.where(need > 0.0, 1, high)
%end
        while high - low > 1:
            middle = low + (high - low) // 2
            reached = 0.0
            for first in range(0, tiles, PART):
                p, gain, forced_mass, col = gains_of(at_top, at_sum, first + part, seen, alive, row_count, highest, block, b, h, ${candidate_arguments})
                reached += tl.sum(tl.where(gain.to(tl.int32, bitcast=True) >= middle, gain, 0.0))
            low = tl.where(reached >= need, middle, low)
            high = tl.where(reached >= need, high, middle)
        broken = tl.where(total != total, 1, 0)
        for first in range(0, tiles, PART):
            p, gain, forced_mass, col = gains_of(at_top, at_sum, first + part, seen, alive, row_count, highest, block, b, h, ${candidate_arguments})
            old = tl.load(out + col, mask=(col < key_blocks) & (r > 0), other=0.0)
            mark = tl.where(gain.to(tl.int32, bitcast=True) >= low, 1.0, old)
            tl.store(out + col, tl.where((broken > 0) | (old != old), float("nan"), mark), mask=col < key_blocks)
'''

PICK_ROWS = '''
@triton.jit(do_not_specialize=[${unspecialised}])
def pick(${parameters}):
    """The list of one query block of one head from stored marks, WIDTH key blocks at a time."""
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block, b, h, _scratch_head, _seen = place(first_block, heads, query_len, key_len, start)
    key_blocks = (key_len + BLOCK - 1) // BLOCK
    row = b.to(tl.int64) * counts_batch + h * ((query_len + BLOCK - 1) // BLOCK) + block
    slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block - first_block
    lane = tl.arange(0, WIDTH)
%if rule == "taus"
    tau = tl.load(thresholds + h)
%end
    # a row that is not finite is marked so in every column
    first_mark = tl.load(importances + slot * key_blocks)
    everything = tl.where(tau >= 1.0, 1, 0)
    everything = tl.where(first_mark != first_mark, 1, everything)
    count = 0
    for first in range(0, key_blocks, WIDTH):
        mark = tl.load(importances + slot * key_blocks + first + lane, mask=first + lane < key_blocks, other=0.0)
        possible, forced = candidates(first + lane, block, b, h, ${candidate_arguments})
        kept = tl.where(everything > 0, possible, (mark > 0.0) | forced).to(tl.int32)
        tl.store(indices + row * key_blocks + count + tl.cumsum(kept, 0) - 1, (first + lane).to(tl.int16), mask=kept > 0)
        count += tl.sum(kept)
    tl.store(counts + row, count)
'''

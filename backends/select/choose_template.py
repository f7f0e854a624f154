"""The text of the kernels that turn scores into block lists: fused for rows that fit in registers, in column loops for longer ones."""

LOADS = '''

@triton.jit
def tile_scale(tops, scratch_head, row, inside, row_count, tiles, TILES: tl.constexpr):
    """exp2(top - highest top) of every column tile of one query cell: 0 where the cell sees nothing, which keeps a sum's NaN."""
    at = tops + (scratch_head * tiles + tl.arange(0, TILES)).to(tl.int64) * row_count + row
    top = tl.load(at, mask=inside, other=float("-inf"))
    highest = tl.max(top, 0)
    return tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))


@triton.jit
def place(first_block, heads, query_len, key_len, start):
    """Block, batch row, head, scratch head and column tiles seen, of this program: long rows first."""
    block = first_block + tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    scratch_head = b * (heads // ${shared}) + h // ${shared}
    seen = tiles_seen(block // (ROWS // ROW_CELLS), query_len, key_len, start)
    return block, b, h, scratch_head, seen
'''

CHOOSE = '''

@triton.jit(do_not_specialize=[${unspecialised}])
def choose(${parameters}):
    """One query block of one head: rescales its cells' sums, pools them, finds the cutoff by bisection on the bits, writes the list."""
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block, b, h, scratch_head, seen = place(first_block, heads, query_len, key_len, start)
    tiles = column_tiles(key_len)
    t = tl.arange(0, TILES)
    col = t[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]
    mass = tl.zeros([TILES, TILE_BLOCKS], tl.float32)
    broken = 0
    for r in range(ROW_CELLS):
        cell = block * ROW_CELLS + r
        inside = (t < seen) & (cell < query_cells)
        factor = tile_scale(tops, scratch_head, cell - first_cell, inside, row_count, tiles, TILES)
        at = sums + (scratch_head.to(tl.int64) * row_count + cell - first_cell) * (tiles * TILE_BLOCKS) + col
        p = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32) * factor[:, None]
        total = tl.sum(tl.sum(p, 1), 0)
        broken = tl.where(total != total, 1, broken)
        p = p * tl.where(total == 0.0, 0.0, 1.0 / total)
%if reduce == "sum"
        mass += p
%else
        mass = tl.maximum(mass, p)
%end
    mass = tl.reshape(mass, [TILES * TILE_BLOCKS])
    col = tl.arange(0, TILES * TILE_BLOCKS)
    row = b.to(tl.int64) * counts_batch + h * ((query_len + BLOCK - 1) // BLOCK) + block
    key_blocks = (key_len + BLOCK - 1) // BLOCK
%if importance
    tl.store(importances + row * key_blocks + col, tl.where(broken > 0, float("nan"), mass), mask=col < key_blocks)
%end

    possible, forced = candidates(col, block, b, h, ${candidate_arguments})
    mass = tl.where(broken > 0, 0.0, tl.where(possible, mass, 0.0))
    other = possible & (forced == 0)
    # the order of the bits is the order of the values, as none is negative; what is no candidate comes below all
    bits = tl.where(other, mass.to(tl.int32, bitcast=True), -1)
    low = 0
    high = tl.max(bits) + 1
    # candidates at or above each bound: with one left between them, it is the cutoff
    above_low = tl.sum((bits >= 0).to(tl.int32))
    above_high = 0
%if rule == "density"
    # a density is a fixed-point number of ${density_bits} bits
    wanted = (tl.sum(possible.to(tl.int64)) * share + ((1 << ${density_bits}) - 1)) >> ${density_bits}
    wanted = (wanted - tl.sum(forced.to(tl.int64))).to(tl.int32)
    while (high - low > 1) & (above_low - above_high > 1):  # at least `wanted` are >= low, or low = 0; fewer are >= high
        middle = low + (high - low) // 2
        count = tl.sum((bits >= middle).to(tl.int32))
        enough = count >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        above_low = tl.where(enough, count, above_low)
        above_high = tl.where(enough, above_high, count)
    low = tl.maximum(low, tl.max(tl.where(bits < high, bits, -1)))
    # when nothing is wanted, low is the highest and no equal one passes either
    equal = (bits == low).to(tl.int32)
    missing = wanted - tl.sum((bits > low).to(tl.int32))
    keep = (bits > low) | ((equal > 0) & (tl.cumsum(equal, 0) <= missing))
    everything = broken
%else
%if rule == "taus"
    tau = tl.load(thresholds + h)
%end
    gain = tl.where(other, mass, 0.0)
    need = tau * tl.sum(mass) - tl.sum(tl.where(forced, mass, 0.0))
    while (high - low > 1) & (above_low - above_high > 1):  # those >= low have the mass needed, or low = 0; those >= high have not
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(bits >= middle, gain, 0.0)) >= need
        count = tl.sum((bits >= middle).to(tl.int32))
        above_low = tl.where(enough, count, above_low)
        above_high = tl.where(enough, above_high, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    low = tl.maximum(low, tl.max(tl.where(bits < high, bits, -1)))
    equal = (bits == low).to(tl.int32)
    before = tl.sum(tl.where(bits > low, gain, 0.0)) + (tl.cumsum(equal, 0) - 1).to(tl.float32) * gain
    keep = (gain > 0.0) & ((bits > low) | ((equal > 0) & (before < need)))
    everything = tl.where(tau >= 1.0, 1, broken)
%end
    keep = tl.where(everything > 0, possible, keep | forced)
    kept = keep.to(tl.int32)
    tl.store(counts + row, tl.sum(kept))
    tl.store(indices + row * key_blocks + tl.cumsum(kept, 0) - 1, col.to(tl.int16), mask=keep)
'''

POOL = '''

@triton.jit(do_not_specialize=[${unspecialised}])
def pool(${parameters}):
    """Importances of one query block of one head, PART column tiles at a time. An element stays with its thread: no barrier."""
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block, b, h, scratch_head, seen = place(first_block, heads, query_len, key_len, start)
    tiles = column_tiles(key_len)
    key_blocks = (key_len + BLOCK - 1) // BLOCK
    # importances of this launch alone: [programs of axis 1, blocks of the launch, key_blocks]
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
        for first in range(0, tiles, PART):
            t = first + part
            top = tl.load(at_top + t.to(tl.int64) * row_count, mask=(t < seen) & alive, other=float("-inf"))
            col = t[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]
            p = tl.load(at_sum + col, mask=((t < seen) & alive)[:, None], other=0.0).to(tl.float32)
            total += tl.sum(tl.sum(p * tl.exp2(top - highest)[:, None], 1), 0)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        for first in range(0, tiles, PART):
            t = first + part
            top = tl.load(at_top + t.to(tl.int64) * row_count, mask=(t < seen) & alive, other=float("-inf"))
            col = t[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]
            p = tl.load(at_sum + col, mask=((t < seen) & alive)[:, None], other=0.0).to(tl.float32)
            # NaN has to reach every column, and to survive the maximum
            p = p * tl.exp2(top - highest)[:, None] * inverse + inverse * 0.0
            old = tl.load(out + col, mask=(col < key_blocks) & (r > 0), other=0.0)
%if reduce == "sum"
            tl.store(out + col, old + p, mask=col < key_blocks)
%else
            tl.store(out + col, tl.where((old != old) | (old > p), old, p), mask=col < key_blocks)
%end
'''

PICK = '''

@triton.jit
def mass_of(importances, slot, col, key_blocks, block, b, h, ${candidate_arguments}):
    """Masses, bits, possible, forced of some columns, and whether the row is broken."""
    mass = tl.load(importances + slot * key_blocks + col, mask=col < key_blocks, other=0.0)
    broken = tl.max((mass != mass).to(tl.int32))
    possible, forced = candidates(col, block, b, h, ${candidate_arguments})
    mass = tl.where(possible & (mass == mass), mass, 0.0)
    bits = tl.where(possible & (forced == 0), mass.to(tl.int32, bitcast=True), -1)
    return mass, bits, possible, forced, broken


@triton.jit(do_not_specialize=[${unspecialised}])
def pick(${parameters}):
    """`choose` from stored importances, WIDTH key blocks at a time."""
%if has_start
    start = tl.load(start_at).to(tl.int32)
%end
    block, b, h, _scratch_head, _seen = place(first_block, heads, query_len, key_len, start)
    key_blocks = (key_len + BLOCK - 1) // BLOCK
    row = b.to(tl.int64) * counts_batch + h * ((query_len + BLOCK - 1) // BLOCK) + block
    slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block - first_block
    lane = tl.arange(0, WIDTH)
    high = 0
    low = 0
    broken = 0
%if rule == "density"
    wanted = 0
    must = 0
%else
    total = 0.0
    must = 0.0
%end
    for first in range(0, key_blocks, WIDTH):
        mass, bits, possible, forced, bad = mass_of(importances, slot, first + lane, key_blocks, block, b, h, ${candidate_arguments})
        high = tl.maximum(high, tl.max(bits) + 1)
        broken = tl.maximum(broken, bad)
%if rule == "density"
        wanted += tl.sum(possible.to(tl.int32))
        must += tl.sum(forced.to(tl.int32))
%else
        total += tl.sum(mass)
        must += tl.sum(tl.where(forced, mass, 0.0))
%end
%if rule == "density"
    need = ((wanted.to(tl.int64) * share + ((1 << ${density_bits}) - 1)) >> ${density_bits}).to(tl.int32) - must
    everything = broken
%else
%if rule == "taus"
    tau = tl.load(thresholds + h)
%end
    need = tau * total - must
    everything = tl.where(tau >= 1.0, 1, broken)
%end
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = ${"0" if rule == 'density' else "0.0"}
        for first in range(0, key_blocks, WIDTH):
            mass, bits, possible, forced, bad = mass_of(importances, slot, first + lane, key_blocks, block, b, h, ${candidate_arguments})
            reached += tl.sum(${"(bits >= middle).to(tl.int32)" if rule == 'density' else "tl.where(bits >= middle, mass, 0.0)"})
        low = tl.where(reached >= need, middle, low)
        high = tl.where(reached >= need, high, middle)
    above = ${"0" if rule == 'density' else "0.0"}
    for first in range(0, key_blocks, WIDTH):
        mass, bits, possible, forced, bad = mass_of(importances, slot, first + lane, key_blocks, block, b, h, ${candidate_arguments})
        above += tl.sum(${"(bits > low).to(tl.int32)" if rule == 'density' else "tl.where(bits > low, mass, 0.0)"})
    count = 0
    ties = 0
    for first in range(0, key_blocks, WIDTH):
        mass, bits, possible, forced, bad = mass_of(importances, slot, first + lane, key_blocks, block, b, h, ${candidate_arguments})
        equal = (bits == low).to(tl.int32)
        rank = ties + tl.cumsum(equal, 0) - 1
%if rule == "density"
        keep = (bits > low) | ((equal > 0) & (rank < need - above))
%else
        keep = (bits > 0) & ((bits > low) | ((equal > 0) & (above + rank.to(tl.float32) * mass < need)))
%end
        keep = tl.where(everything > 0, possible, keep | forced)
        kept = keep.to(tl.int32)
        tl.store(indices + row * key_blocks + count + tl.cumsum(kept, 0) - 1, (first + lane).to(tl.int16), mask=keep)
        count += tl.sum(kept)
        ties += tl.sum(equal)
    tl.store(counts + row, count)
'''

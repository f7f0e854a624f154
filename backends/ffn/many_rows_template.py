"""The text of the feed-forward kernels for many rows, of which those that compute are compacted first; see `source.rows_source`."""

COMPACT = """\
@triton.jit
def compact(${compact_parameters}):
    \"\"\"A chunk of rows a program, each counting the computing rows before its own: order[slot] = row, slots[row] = slot or -1.\"\"\"
    first = tl.program_id(0) * CHUNK
    offset = tl.arange(0, CHUNK)
    seen = tl.zeros([CHUNK], tl.int32)
    for begin in range(0, first, CHUNK):
        seen += (tl.load(remaining + begin + offset) <= 0).to(tl.int32)
    row = first + offset
    computes = tl.load(remaining + row, mask=row < rows, other=1) <= 0
    before = tl.sum(seen, 0)
    slot = before + tl.cumsum(computes.to(tl.int32), 0) - 1
    tl.store(slots + row, tl.where(computes, slot, -1), mask=row < rows)
    tl.store(order + slot, row, mask=computes)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count, before + tl.sum(computes.to(tl.int32), 0))
"""

PLACE = """\
@triton.jit
def place(tile, row_tiles, col_tiles):
    \"\"\"Row and column tile of a number: bands of BAND row tiles, walked column by column, so that neighbours in time share the L2 cache.\"\"\"
    size = BAND * col_tiles
    first = tile // size * BAND
    height = tl.minimum(row_tiles - first, BAND)
    return first + tile % size % height, tile % size // height
"""

PROJECT_UP = """\
@triton.jit
def project_up(${project_up_parameters}):
    \"\"\"Persistent: tiles of activation(gate) * up, or of activation(up), over the compacted rows. source, out: descriptors.\"\"\"
    row_tiles = tl.cdiv(tl.load(count), ROW_TILE)
    col_tiles = tl.cdiv(INTERMEDIATE, UP_TILE)
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)${", flatten=True" if flatten else ""}):
        row_tile, col_tile = place(tile, row_tiles, col_tiles)
        row = row_tile * ROW_TILE
        column = col_tile * UP_TILE
        up_acc = tl.zeros([ROW_TILE, UP_TILE], tl.float32)
%if gated
        gate_acc = tl.zeros([ROW_TILE, UP_TILE], tl.float32)
%end
        for first in tl.range(0, HIDDEN, STEP, num_stages=${up_stages}):
            x = source.load([row, first])
%if transposed
            up_acc = tl.dot(x, up.load([first, column]), up_acc${precision})
%if gated
            gate_acc = tl.dot(x, gate.load([first, column]), gate_acc${precision})
%end
%else
            up_acc = tl.dot(x, up.load([column, first]).T, up_acc${precision})
%if gated
            gate_acc = tl.dot(x, gate.load([column, first]).T, gate_acc${precision})
%end
%end
        kind = out.dtype
%if up_bias
        place_in = column + tl.arange(0, UP_TILE)
        up_acc += tl.load(up_bias + place_in, mask=place_in < INTERMEDIATE, other=0.0).to(tl.float32)[None, :]
%if gated
        gate_acc += tl.load(gate_bias + place_in, mask=place_in < INTERMEDIATE, other=0.0).to(tl.float32)[None, :]
%end
%end
        result = up_acc.to(kind).to(tl.float32)
%if gated
        result = activate(gate_acc.to(kind).to(tl.float32)).to(kind).to(tl.float32) * result
%else
        result = activate(result)
%end
        out.store([row, column], result.to(kind))
"""

PROJECT_DOWN = """\
@triton.jit
def project_down(${project_down_parameters}):
    \"\"\"Persistent: tiles of the down projection over the compacted rows. source, down, out: descriptors, out's of half a tile's columns.\"\"\"
    row_tiles = tl.cdiv(tl.load(count), ROW_TILE)
    col_tiles = tl.cdiv(HIDDEN, DOWN_TILE)
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)${", flatten=True" if flatten else ""}):
        row_tile, col_tile = place(tile, row_tiles, col_tiles)
        row = row_tile * ROW_TILE
        column = col_tile * DOWN_TILE
        acc = tl.zeros([ROW_TILE, DOWN_TILE], tl.float32)
        for first in tl.range(0, INTERMEDIATE, STEP, num_stages=${down_stages}):
            x = source.load([row, first])
%if transposed
            acc = tl.dot(x, down.load([first, column]), acc${precision})
%else
            acc = tl.dot(x, down.load([column, first]).T, acc${precision})
%end
%if down_bias
        place_in = column + tl.arange(0, DOWN_TILE)
        acc += tl.load(bias + place_in, mask=place_in < HIDDEN, other=0.0).to(tl.float32)[None, :]
%end
        # in halves: a whole tile would not fit beside the pipeline's buffers
        left, right = tl.split(tl.permute(tl.reshape(acc, [ROW_TILE, 2, DOWN_TILE // 2]), [0, 2, 1]))
        out.store([row, column], left.to(out.dtype))
        out.store([row, column + DOWN_TILE // 2], right.to(out.dtype))
"""

"""The text of the feed-forward kernels for few rows, and what those for many share; `source` keeps the parts that a spec has."""

FLAGS = """\
    row = tl.arange(0, ROWS)
    real = row < rows
    # rows past the end count as skipping
    left = tl.load(remaining + row, mask=real, other=1)
    if tl.min(left, 0) > 0:
        return
    active = real & (left <= 0)
"""

NORMALISE = """\
@triton.jit
def normalise(${normalise_parameters}):
%if many
    \"\"\"One program a slot: the compacted row and its norm.\"\"\"
    slot = tl.program_id(0)
    if slot >= tl.load(count):
        return
    row = tl.load(order + slot).to(tl.int64)
%else
    \"\"\"One program a row: the block's norm, where it is not folded into the product.\"\"\"
    row = tl.program_id(0)
    if tl.load(remaining + row) > 0:
        return
    slot = row
%end
    column = tl.arange(0, HIDDEN_PADDED)
    inside = column < HIDDEN
    x = tl.load(source + row * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
%if norm != "none"
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
%end
%if norm == "layer"
    x = tl.where(inside, x - tl.sum(x, 0) / HIDDEN, 0.0)
    x = x / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + EPS)
    x = x * scale
%if norm_bias
    x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
%end
%elif norm != "none"
    x = x / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + EPS)
%if norm == "rms"
    x = x.to(out.dtype.element_ty).to(tl.float32) * scale
%elif norm == "rms_offset"
    x = x * (1.0 + scale)
%else
    x = x * scale
%end
%end
    tl.store(out + slot.to(tl.int64) * HIDDEN + column, x.to(out.dtype.element_ty), mask=inside)
"""

ACTIVATE = """\
@triton.jit
def activate(x):
%if activation == "silu"
    return x / (1.0 + tl.exp(-x))
%elif activation == "gelu"
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
%elif activation == "gelu_tanh"
    # tanh(y) = 1 - 2 / (1 + exp(2y))
    y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * y)))
%else
    return tl.where(x > 0, x, tl.where(x != x, x, 0.0))
%end
"""

ACTIVATE_ROWS = """\
@triton.jit
def activate_rows(${activate_rows_parameters}):
    \"\"\"x = activation(x)${" * factor" if gated else ""}, one row and BLOCK columns a program.\"\"\"
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    y = activate(tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32))
%if gated
    y *= tl.load(factor + row * factor_row + column, mask=inside, other=0.0).to(tl.float32)
%end
    tl.store(x + row * x_row + column, y.to(x.dtype.element_ty), mask=inside)
"""

PROJECT_UP = """\
@triton.jit
def project_up(${project_up_parameters}):
    \"\"\"One program a tile of the intermediate dimension, for all rows${": norm, " if fused_norm else ": "}${"gate, " if gated else ""}up, activation.\"\"\"
${flags}
    column = tl.program_id(0) * UP_TILE + tl.arange(0, UP_TILE)
    part = tl.arange(0, UP_STEP)
    offsets = column.to(tl.int64)[:, None] * ${up_stride_n} + part[None, :] * ${up_stride_k}
    x_offsets = row[None, :] * HIDDEN + part[:, None]
    up_acc = tl.zeros([UP_TILE, ROWS], tl.float32)
%if gated
    gate_acc = tl.zeros([UP_TILE, ROWS], tl.float32)
%end
%if fused_norm
    squares = tl.zeros([ROWS], tl.float32)
%end
    for first in tl.range(0, HIDDEN, UP_STEP, num_stages=${up_stages}):
%if up_ragged
        fits = (column < INTERMEDIATE)[:, None] & (first + part < HIDDEN)[None, :]
        u = tl.load(up + offsets + first * ${up_stride_k}, mask=fits, other=0.0)
%if gated
        g = tl.load(gate + offsets + first * ${up_stride_k}, mask=fits, other=0.0)
%end
        x = tl.load(source + x_offsets + first, mask=active[None, :] & (first + part < HIDDEN)[:, None], other=0.0)
%else
        u = tl.load(up + offsets + first * ${up_stride_k}, eviction_policy="evict_first")
%if gated
        g = tl.load(gate + offsets + first * ${up_stride_k}, eviction_policy="evict_first")
%end
        x = tl.load(source + x_offsets + first, mask=active[None, :], other=0.0)
%end
%if fused_norm
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 0)
%if up_ragged
        scale = tl.load(weight + first + part, mask=first + part < HIDDEN, other=0.0).to(tl.float32)
%else
        scale = tl.load(weight + first + part).to(tl.float32)
%end
        # the row's own factor commutes with the product and follows after the loop
        x = (wide * ${"(1.0 + scale)" if norm == "rms_offset" else "scale"}[:, None]).to(x.dtype)
%end
        up_acc = tl.dot(u, x, up_acc${precision})
%if gated
        gate_acc = tl.dot(g, x, gate_acc${precision})
%end
%if fused_norm
    unit = 1.0 / tl.sqrt(squares / HIDDEN + EPS)
    up_acc *= unit[None, :]
%if gated
    gate_acc *= unit[None, :]
%end
%end
%if up_bias
    up_acc += tl.load(up_bias + column, mask=column < INTERMEDIATE, other=0.0).to(tl.float32)[:, None]
%if gated
    gate_acc += tl.load(gate_bias + column, mask=column < INTERMEDIATE, other=0.0).to(tl.float32)[:, None]
%end
%end
    kind = out.dtype.element_ty
    result = up_acc.to(kind).to(tl.float32)
%if gated
    result = activate(gate_acc.to(kind).to(tl.float32)).to(kind).to(tl.float32) * result
%else
    result = activate(result)
%end
    inside = active[None, :] & (column < INTERMEDIATE)[:, None]
    tl.store(out + row[None, :] * INTERMEDIATE + column[:, None], result.to(kind), mask=inside)
"""

PROJECT_DOWN = """\
@triton.jit
def project_down(${project_down_parameters}):
    \"\"\"One program a tile of the hidden dimension and a part of the intermediate one: its share of the down projection, in float32.\"\"\"
${flags}
    tiles = tl.cdiv(HIDDEN, DOWN_TILE)
    column = (tl.program_id(0) % tiles) * DOWN_TILE + tl.arange(0, DOWN_TILE)
    share = tl.program_id(0) // tiles
    begin = share * PART
    part = tl.arange(0, DOWN_STEP)
    offsets = column.to(tl.int64)[:, None] * ${down_stride_n} + part[None, :] * ${down_stride_k}
    down += begin.to(tl.int64) * ${down_stride_k}
    x_offsets = row[None, :] * INTERMEDIATE + begin + part[:, None]
    acc = tl.zeros([DOWN_TILE, ROWS], tl.float32)
    for first in tl.range(0, PART, DOWN_STEP, num_stages=${down_stages}):
%if down_ragged
        inside = (first + part < PART) & (begin + first + part < INTERMEDIATE)
        w = tl.load(down + offsets + first * ${down_stride_k}, mask=(column < HIDDEN)[:, None] & inside[None, :], other=0.0)
        x = tl.load(source + x_offsets + first, mask=active[None, :] & inside[:, None], other=0.0)
%else
        w = tl.load(down + offsets + first * ${down_stride_k}, eviction_policy="evict_first")
        x = tl.load(source + x_offsets + first, mask=active[None, :], other=0.0)
%end
        acc = tl.dot(w, x, acc${precision})
    inside = active[None, :] & (column < HIDDEN)[:, None]
    tl.store(partial + (share * rows + row)[None, :] * HIDDEN + column[:, None], acc, mask=inside)
"""

FINISH = """\
@triton.jit
def finish(${finish_parameters}):
%if many
    \"\"\"One program a row: adds the row's update to the residual and sets its counter; a row that skips keeps the residual.\"\"\"
    row = tl.program_id(0).to(tl.int64)
%else
    \"\"\"One program a row: sums the parts in order, adds the residual, and sets the row's counter.\"\"\"
    row = tl.program_id(0)
%end
    column = tl.arange(0, HIDDEN_PADDED)
    inside = column < HIDDEN
    kind = out.dtype.element_ty
    left = tl.load(remaining + row)
    before = tl.load(residual + row * HIDDEN + column, mask=inside, other=0.0)
    if left > 0:
        tl.store(out + row * HIDDEN + column, before, mask=inside)
        tl.store(after + row, left - 1)
        return
%if many
    slot = tl.load(slots + row).to(tl.int64)
    update = tl.load(updates + slot * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
%else
    update = tl.zeros([HIDDEN_PADDED], tl.float32)
    for share in tl.static_range(PARTS):
        update += tl.load(partial + (share * rows + row) * HIDDEN + column, mask=inside, other=0.0)
%if down_bias
    update += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
%end
    update = update.to(kind).to(tl.float32)
%end
%if scale != 1.0
    update = (update * SCALE).to(kind).to(tl.float32)
%end
%if post_norm != "none"
    weight = tl.load(post_weight + column, mask=inside, other=0.0).to(tl.float32)
%if post_norm == "layer"
    update = tl.where(inside, update - tl.sum(update, 0) / HIDDEN, 0.0)
%end
    update = update / tl.sqrt(tl.sum(update * update, 0) / HIDDEN + POST_EPS)
%if post_norm == "rms"
    update = update.to(kind).to(tl.float32)
%end
    update = update * ${"(1.0 + weight)" if post_norm == "rms_offset" else "weight"}
%if post_bias
    update += tl.load(post_bias + column, mask=inside, other=0.0).to(tl.float32)
%end
    update = update.to(kind).to(tl.float32)
%end
    before = before.to(tl.float32)
    result = (before + update).to(kind)
    tl.store(out + row * HIDDEN + column, result, mask=inside)
    result = result.to(tl.float32)
    lengths = tl.sqrt(tl.sum(before * before, 0) * tl.sum(result * result, 0))
    alike = tl.sum(before * result, 0) / tl.maximum(lengths, 1e-30)
    # clamped to [-1, 1] as a cosine; NaN reaches nothing
    alike = tl.where(alike > 1.0, 1.0, tl.where(alike < -1.0, -1.0, alike))
    tl.store(after + row, tl.where((left == 0) & (alike >= threshold), skip_next, left))
"""

START = '''\
"""Counters of one forward from positions. Generated by sparsify."""

import triton
import triton.language as tl


@triton.jit
def start(${start_parameters}):
    offset = tl.arange(0, BLOCK)
    position = tl.cast(slot, tl.int64)
    if READS:
        position = tl.max(tl.load(positions + offset, mask=offset < count, other=0).to(tl.int64), 0)
    last = tl.load(state)
    first = tl.load(state + 1)
    first = tl.where(position == last + 1, first, position)
    tl.store(state, position)
    tl.store(state + 1, first)
    age = position - first
    skipped = tl.cast(most, tl.int64)
    if length > 0:
        skipped = tl.minimum(age, length) * most // length
    value = tl.where(age < warmup, -1, skipped).to(tl.int32)
    tl.store(out + offset, tl.zeros([BLOCK], tl.int32) + value, mask=offset < rows)
'''

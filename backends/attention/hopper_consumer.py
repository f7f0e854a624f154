"""Templates of the Hopper kernel's consumer warpgroups and of the kernel that starts all; `attention.hopper_source` expands them."""

CONSUMER = '''@gluon.jit
def _read(message):
    """A message of one integer, as a scalar."""
    return gl.max(message.load(FOUR_WARPS), 0)


%if softcap
@gluon.jit
def _capped(s, scale, cap):
    """cap · tanh(s · scale / cap), with cap in units of log2: from here on scale is 1."""
    return cap - 2.0 * cap / (gl.exp2(s * scale) + 1.0)


%end
@gluon.jit
def _masked(s, block, rows, key_len, clauses):
    """S with -inf where a row at position rows[i] does not see a key of tile `block`."""
    offsets = gl.arange(0, KEY_TILE, layout=COLUMNS)
    columns = block * KEY_TILE + offsets
    inside = columns < key_len
%if bounded
    # all clauses that depend on the key alone, and the window, as one number a key: the last position that sees it
%if windows != "none"
    window, sinks = clauses[2]
    bound = columns + window - 1
%if sinks
    bound = gl.where(columns < sinks, 1 << 30, bound)
%end
%else
    bound = columns + (1 << 30)
%end
%if key_flags
    flag = gl.load(clauses[0] + block * KEY_TILE + offsets).to(gl.int32)
%if flag_sinks
    bound = gl.where((flag & 2) != 0, 1 << 30, bound)
%end
    bound = gl.where((flag & 1) != 0, bound, -(1 << 30))
%else
    bound = gl.where(inside, bound, -(1 << 30))
%end
    visible = rows[:, None] <= bound[None, :]
%else
    visible = inside[None, :]
%end
%if causal
    visible = visible & (columns[None, :] <= rows[:, None])
%end
%if segments
    segment = gl.load(clauses[1] + block * KEY_TILE + offsets)
    row_inside = (rows >= 0) & (rows < key_len)
    row_segment = gl.load(clauses[1] + rows, mask=row_inside, other=0)
    visible = visible & (segment[None, :] == row_segment[:, None]) & row_inside[:, None]
%end
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def _softmax(s, top, total, scale, MASKED: gl.constexpr):
    """One step of the online softmax in units of log2: the rows' references, their sums by thread, weights, and how the past shrinks.

    A row's reference moves only when it is outgrown by 2**8, which few blocks do. Its four threads compare their own columns, and only in
    a warp where one of them is too large do they tell each other.
    """
    columns = gl.convert_layout(gl.reshape(s, [64, KEY_TILE // 8, 4, 2]), COLUMNS_APART)
    peak = gl.max(gl.max(columns, 3), 1) * scale
    new_top, moved = gl.inline_asm_elementwise("${move}", "${move_operands}", [peak, top], (gl.float32, gl.int32), is_pure=False, pack=2)
    safe = new_top
    if MASKED:  # a row that has seen no key yet
        safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = gl.exp2(top - safe)
    p = gl.exp2(columns * scale - safe[:, None, :][:, :, :, None])
    total = total * shrink + gl.sum(gl.sum(p, 3), 1)
    return new_top, total, gl.reshape(p.to(DTYPE), [64, KEY_TILE]), shrink, moved


@gluon.jit
def _shrunk(acc, shrink, moved):
    """acc · shrink, left out by warps in which no row's reference moved."""
    columns = gl.convert_layout(gl.reshape(acc, [64, VALUE_DIM // 8, 4, 2]), OUTPUT_APART)
    shrink = gl.convert_layout(shrink, OUTPUT_SUMS)[:, None, :][:, :, :, None]
    moved = gl.convert_layout(moved, OUTPUT_SUMS)[:, None, :][:, :, :, None]
    shrink, columns = gl.broadcast(shrink, columns)
    moved, columns = gl.broadcast(moved, columns)
    operands = [columns, shrink, moved]
    columns = gl.inline_asm_elementwise("${shrink}", "${shrink_operands}", operands, gl.float32, is_pure=False, pack=${shrink_pack})
    return gl.convert_layout(gl.reshape(columns, [64, VALUE_DIM]), OUTPUT)


@gluon.jit
def _turn(query, rings, barriers, state, rows, key_len, clauses, scale, cap, MASKED: gl.constexpr):
    """This block's Q·K and the last block's P·V, together in flight."""
    key_ring, value_ring, block_message = rings
    key_full, key_empty, value_full, value_empty = barriers
    key_stage, key_phase, value_stage, value_phase, top, total, acc, weights = state
    mbarrier.wait(key_full.index(key_stage), key_phase)
    message = _read(block_message.index(key_stage))
    zero = gl.zeros([64, KEY_TILE], gl.float32, SCORES)
    s_token = warpgroup_mma(query, key_ring.index(key_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(value_full.index(value_stage), value_phase)
    acc_token = warpgroup_mma(weights, value_ring.index(value_stage), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.arrive(key_empty.index(key_stage), count=1)
    key_stage, key_phase = _next(key_stage, key_phase, KEY_STAGES)
%if softcap
    s = _capped(s, scale, cap)
%end
    if MASKED:
        s = _masked(s, message >> 2, rows, key_len, clauses)
%if softcap
    top, total, p, shrink, moved = _softmax(s, top, total, 1.0, MASKED)
%else
    top, total, p, shrink, moved = _softmax(s, top, total, scale, MASKED)
%end
    acc = warpgroup_mma_wait(0, deps=[acc_token])
    mbarrier.arrive(value_empty.index(value_stage), count=1)
    value_stage, value_phase = _next(value_stage, value_phase, VALUE_STAGES)
    acc = _shrunk(acc, shrink, moved)
    weights = gl.convert_layout(p, WEIGHTS)
    return message & 3, (key_stage, key_phase, value_stage, value_phase, top, total, acc, weights)


@gluon.jit
def _consumer(PART: gl.constexpr, rings, barriers, descriptors, sizes, start, operands):
    """One warpgroup: 64 query rows of each tile. While its softmax runs, the other warpgroup's products do."""
    query_ring, key_ring, value_ring, output_ring, tile_message, block_message = rings
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    queries, keys, values, outputs = descriptors
    query_len, key_len, batch, heads, kv_heads = sizes
    lse, flags, segments, windows, sinks, sink_logits, scale, cap = operands
    tiles = (query_len + 127) // 128 * batch * heads
    turn_rings = (key_ring, value_ring, block_message)
    turn_barriers = (key_full, key_empty, value_full, value_empty)
    key_stage, key_phase = 0, 0
    value_stage, value_phase = 0, 0
    query_stage, query_phase = 0, 0
%if late_release
    before = -1
%end
    mbarrier.wait(query_full.index(0), 0)
    t = _read(tile_message.index(0))
    while t < tiles:
        batch_row, query_block, head, kv_head = _tile(t, sizes)
        row = query_block * 128 + PART * 64
        rows = row + start + gl.arange(0, 64, layout=ROWS)
        padded_len = ((key_len + KEY_TILE - 1) // KEY_TILE + 1) * KEY_TILE  # of flags and segments, so that no load needs a mask
        clause_flags = 0
        clause_segments = 0
        clause_window = 0
%if key_flags
        clause_flags = flags + batch_row * padded_len
%end
%if segments
        clause_segments = segments + batch_row * padded_len
%end
%if windows != "none"
%if windows == "heads"
        window = gl.load(windows + head)
        window = gl.where(window > 0, window, 1 << 30)
%else
        window = windows
%end
        clause_window = (window, sinks)
%end
        clauses = (clause_flags, clause_segments, clause_window)
        query = query_ring.index(2 * query_stage + PART)
%if query_registers
        left = query.load(QUERY)
%else
        left = query
%end
        # the tile's first block: the only one without a P·V beside it
        mbarrier.wait(key_full.index(key_stage), key_phase)
        message = _read(block_message.index(key_stage))
        zero = gl.zeros([64, KEY_TILE], gl.float32, SCORES)
        s_token = warpgroup_mma(left, key_ring.index(key_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
%if late_release
        tma.store_wait(0)  # the last tile's output has left the query's slot
        ${barrier}()
        mbarrier.arrive(query_empty.index(gl.maximum(before, 0)), count=1, pred=before >= 0)
        before = query_stage
%end
        s = warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(key_empty.index(key_stage), count=1)
        key_stage, key_phase = _next(key_stage, key_phase, KEY_STAGES)
        top = gl.full([64, 4], float("-inf"), gl.float32, SUMS)
        total = gl.zeros([64, 4], gl.float32, SUMS)
%if softcap
        s = _masked(_capped(s, scale, cap), message >> 2, rows, key_len, clauses)
        top, total, p, shrink, moved = _softmax(s, top, total, 1.0, True)
%else
        s = _masked(s, message >> 2, rows, key_len, clauses)
        top, total, p, shrink, moved = _softmax(s, top, total, scale, True)
%end
        weights = gl.convert_layout(p, WEIGHTS)
        acc = gl.zeros([64, VALUE_DIM], gl.float32, OUTPUT)
        follows = message & 3
        state = (key_stage, key_phase, value_stage, value_phase, top, total, acc, weights)
        while follows != 0:
            while follows == 1:
                follows, state = _turn(left, turn_rings, turn_barriers, state, rows, key_len, clauses, scale, cap, True)
            while follows == 2:
                follows, state = _turn(left, turn_rings, turn_barriers, state, rows, key_len, clauses, scale, cap, False)
        key_stage, key_phase, value_stage, value_phase, top, total, acc, weights = state
%if not output_in_query
        mbarrier.arrive(query_empty.index(query_stage), count=1)
%end
        mbarrier.wait(value_full.index(value_stage), value_phase)
        acc_token = warpgroup_mma(weights, value_ring.index(value_stage), acc, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), ROWS)
        top = gl.convert_layout(gl.max(top, 1), ROWS)
%if sink_logits
        # one more logit in the denominator; a row that sees no key stays empty
        sink = gl.load(sink_logits + head) * 1.4426950408889634
        new_top = gl.where(top == float("-inf"), top, gl.maximum(top, sink))
        safe = gl.where(top == float("-inf"), 0.0, new_top)
        shrink = gl.exp2(top - safe)
        total = gl.where(top == float("-inf"), 0.0, total * shrink + gl.exp2(sink - safe))
        top = new_top
        factor = gl.where(total > 0.0, shrink / total, 0.0)
%else
        factor = gl.where(total > 0.0, 1.0 / total, 0.0)
%end
        lse_rows = row + gl.arange(0, 64, layout=ROWS)
        lse_at = lse + (batch_row * heads + head).to(gl.int64) * query_len
        gl.store(lse_at + lse_rows, (top + gl.log2(total)) * 0.6931471805599453, mask=lse_rows < query_len)
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        mbarrier.arrive(value_empty.index(value_stage), count=1)
        value_stage, value_phase = _next(value_stage, value_phase, VALUE_STAGES)
%if output_in_query
        output = query
%else
        output = output_ring.index(PART)
        tma.store_wait(0)  # the last tile's output has left the buffer
        ${barrier}()
%end
        output.store((acc * gl.convert_layout(factor, OUTPUT_ROWS)[:, None]).to(DTYPE))
        fence_async_shared()
        ${barrier}()
        ${store}(outputs, [batch_row, head, row, 0], output${view}(DTYPE, [1, 1, 64, VALUE_DIM], SHARED4))
%if output_in_query
%if not late_release
        tma.store_wait(0)
        ${barrier}()
        mbarrier.arrive(query_empty.index(query_stage), count=1)
%end
%end
        query_stage, query_phase = _next(query_stage, query_phase, QUERY_STAGES)
        mbarrier.wait(query_full.index(query_stage), query_phase)
        t = _read(tile_message.index(query_stage))
    tma.store_wait(0)


@gluon.jit
def _first_consumer(rings, barriers, descriptors, sizes, start, operands):
    _consumer(0, rings, barriers, descriptors, sizes, start, operands)


@gluon.jit
def _second_consumer(rings, barriers, descriptors, sizes, start, operands):
    _consumer(1, rings, barriers, descriptors, sizes, start, operands)


'''

KERNEL = """@gluon.jit(do_not_specialize=[${unspecialised}])
def attention(
    ${parameters},
):
    query_ring = gl.allocate_shared_memory(DTYPE, [2 * QUERY_STAGES, 64, HEAD_DIM], SHARED)
    key_ring = gl.allocate_shared_memory(DTYPE, [KEY_STAGES, KEY_TILE, HEAD_DIM], SHARED)
    value_ring = gl.allocate_shared_memory(DTYPE, [VALUE_STAGES, KEY_TILE, VALUE_DIM], SHARED)
%if output_in_query
    output_ring = query_ring
%else
    output_ring = gl.allocate_shared_memory(DTYPE, [2, 64, VALUE_DIM], SHARED)
%end
    tile_message = gl.allocate_shared_memory(gl.int32, [QUERY_STAGES, 1], MESSAGE)
    block_message = gl.allocate_shared_memory(gl.int32, [KEY_STAGES, 1], MESSAGE)
    query_full = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [QUERY_STAGES, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    # full: the producer arrives; empty: each consumer does
    for i in gl.static_range(QUERY_STAGES):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=2)
    for i in gl.static_range(KEY_STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=2)
    for i in gl.static_range(VALUE_STAGES):
        mbarrier.init(value_full.index(i), count=1)
        mbarrier.init(value_empty.index(i), count=2)
%if start
    start = gl.load(starts).to(gl.int32)
%end
    rings = (query_ring, key_ring, value_ring, output_ring, tile_message, block_message)
    barriers = (query_full, query_empty, key_full, key_empty, value_full, value_empty)
    descriptors = (queries, keys, values, outputs)
    sizes = (query_len, key_len, batch, heads, kv_heads)
%if not lists
    counts, indices, list_len = 0, 0, 0
%end
%if not key_flags
    flags, flag_tiles = 0, 0
%end
%if not flag_sinks
    sink_tiles = 0
%end
%if not segments
    segments, segment_low, segment_high = 0, 0, 0
%end
%if windows != "heads"
%if windows != "none"
    windows = window
%else
    windows = 0
%end
%end
%if not sinks
    sinks = 0
%end
%if not sink_logits
    sink_logits = 0
%end
%if not softcap
    cap = 0.0
%end
    lists = (counts, indices, list_len)
    produced = (counter, lists, flag_tiles, sink_tiles, (segment_low, segment_high), windows, sinks)
    consumed = (lse, flags, segments, windows, sinks, sink_logits, scale, cap)
    gl.warp_specialize(
        [
            (_first_consumer, (rings, barriers, descriptors, sizes, start, consumed)),
            (_second_consumer, (rings, barriers, descriptors, sizes, start, consumed)),
            (_producer, (rings, barriers, descriptors, sizes, start, produced)),
        ],
        [4, 1],
        [${consumer_registers}, ${producer_registers}],
    )
"""

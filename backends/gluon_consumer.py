"""Template of the Hopper kernel's consumer warpgroups. `gluon_source` expands it."""

CONSUMER = '''@gluon.jit
def _read(message):
    """A message of one integer, as a scalar."""
    return gl.max(message.load(FOUR_WARPS), 0)


#if softcap
@gluon.jit
def _capped(s, scale, cap):
    """cap · tanh(s · scale / cap), with cap in units of log2: from here on scale is 1."""
    return cap - 2.0 * cap / (gl.exp2(s * scale) + 1.0)


#end
@gluon.jit
def _masked(s, block, rows, key_len, clauses):
    """S with -inf where a row at position rows[i] does not see a key of tile `block`."""
    offsets = gl.arange(0, KEY_TILE, layout=COLUMNS)
    columns = block * KEY_TILE + offsets
    inside = columns < key_len
#if bounded
    # all clauses that depend on the key alone, and the window, as one number a key: the last position that sees it
#if window
    window, sinks = clauses[2]
    bound = columns + window - 1
#if sinks
    bound = gl.where(columns < sinks, 1 << 30, bound)
#end
#else
    bound = columns + (1 << 30)
#end
#if key_flags
    flag = gl.load(clauses[0] + block * KEY_TILE + offsets).to(gl.int32)
#if flag_sinks
    bound = gl.where((flag & 2) != 0, 1 << 30, bound)
#end
    bound = gl.where((flag & 1) != 0, bound, -(1 << 30))
#else
    bound = gl.where(inside, bound, -(1 << 30))
#end
    visible = rows[:, None] <= bound[None, :]
#else
    visible = inside[None, :]
#end
#if causal
    visible = visible & (columns[None, :] <= rows[:, None])
#end
#if segments
    segment = gl.load(clauses[1] + block * KEY_TILE + offsets)
    row_inside = (rows >= 0) & (rows < key_len)
    row_segment = gl.load(clauses[1] + rows, mask=row_inside, other=0)
    visible = visible & (segment[None, :] == row_segment[:, None]) & row_inside[:, None]
#end
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def _softmax(s, top, total, scale, MASKED: gl.constexpr):
    """One step of the online softmax in units of log2: new maximum, new sum, weights, and what the past shrinks by."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    safe = new_top
    if MASKED:  # a row that has seen no key yet
        safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = gl.exp2(top - safe)
    p = gl.exp2(s * scale - safe[:, None])
    return new_top, total * shrink + gl.sum(p, 1), p, shrink


@gluon.jit
def _turn(query, rings, barriers, state, rows, key_len, clauses, scale, cap, release, MASKED: gl.constexpr, RELEASES: gl.constexpr):
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
    if RELEASES:
        _release_query(release)
    s = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.arrive(key_empty.index(key_stage), count=1)
    key_stage, key_phase = _next(key_stage, key_phase, KEY_STAGES)
#if softcap
    s = _capped(s, scale, cap)
#end
    if MASKED:
        s = _masked(s, message >> 2, rows, key_len, clauses)
#if softcap
    top, total, p, shrink = _softmax(s, top, total, 1.0, MASKED)
#else
    top, total, p, shrink = _softmax(s, top, total, scale, MASKED)
#end
#if pinned
    # never true, which ptxas cannot know: where a basic block ends, it does not move the wait up before the exponentials
    while message < 0:
        message = _read(block_message.index(key_stage))
#end
    acc = warpgroup_mma_wait(0, deps=[acc_token])
    mbarrier.arrive(value_empty.index(value_stage), count=1)
    value_stage, value_phase = _next(value_stage, value_phase, VALUE_STAGES)
    acc = acc * gl.convert_layout(shrink, OUTPUT_ROWS)[:, None]
    weights = gl.convert_layout(p.to(DTYPE), WEIGHTS)
    return message & 3, (key_stage, key_phase, value_stage, value_phase, top, total, acc, weights)


@gluon.jit
def _release_query(release):
    """Gives back a query slot once the output that leaves through it is gone."""
    query_empty, stage = release
    tma.store_wait(0)
    $BARRIER()
    mbarrier.arrive(query_empty.index(gl.maximum(stage, 0)), count=1, pred=stage >= 0)


@gluon.jit
def _first_softmax(s, block, rows, key_len, clauses, scale, cap):
    """The online softmax's beginning, from a tile's first block."""
    top = gl.full([64], float("-inf"), gl.float32, ROWS)
    total = gl.zeros([64], gl.float32, ROWS)
#if softcap
    s = _masked(_capped(s, scale, cap), block, rows, key_len, clauses)
    top, total, p, shrink = _softmax(s, top, total, 1.0, True)
#else
    s = _masked(s, block, rows, key_len, clauses)
    top, total, p, shrink = _softmax(s, top, total, scale, True)
#end
    return top, total, gl.convert_layout(p.to(DTYPE), WEIGHTS)


@gluon.jit
def _rows_of(PART: gl.constexpr, t, sizes, start, operands):
    """This warpgroup's share of a tile: its place in the output, its rows' positions, and the clauses of their mask."""
    query_len, key_len, batch, heads, kv_heads = sizes
    lse, flags, segments, windows, sinks, sink_logits, scale, cap = operands
    batch_row, query_block, head, kv_head = _tile(t, sizes)
    row = query_block * 128 + PART * 64
    rows = row + start + gl.arange(0, 64, layout=ROWS)
    padded_len = ((key_len + KEY_TILE - 1) // KEY_TILE + 1) * KEY_TILE  # of flags and segments, so that no load needs a mask
    clause_flags = 0
    clause_segments = 0
    clause_window = 0
#if key_flags
    clause_flags = flags + batch_row * padded_len
#end
#if segments
    clause_segments = segments + batch_row * padded_len
#end
#if window
#if window_per_head
    window = gl.load(windows + head)
    window = gl.where(window > 0, window, 1 << 30)
#else
    window = windows
#end
    clause_window = (window, sinks)
#end
    return (batch_row, head, row), rows, (clause_flags, clause_segments, clause_window)


@gluon.jit
def _factor_and_lse(top, total, place, query_len, heads, lse, sink_logits):
    """What the accumulator is multiplied with at a tile's end; writes the LSE."""
    batch_row, head, row = place
#if sink_logits
    # one more logit in the denominator; a row that sees no key stays empty
    sink = gl.load(sink_logits + head) * 1.4426950408889634
    new_top = gl.where(top == float("-inf"), top, gl.maximum(top, sink))
    safe = gl.where(top == float("-inf"), 0.0, new_top)
    shrink = gl.exp2(top - safe)
    total = gl.where(top == float("-inf"), 0.0, total * shrink + gl.exp2(sink - safe))
    top = new_top
    factor = gl.where(total > 0.0, shrink / total, 0.0)
#else
    factor = gl.where(total > 0.0, 1.0 / total, 0.0)
#end
    lse_rows = row + gl.arange(0, 64, layout=ROWS)
    lse_at = lse + (batch_row * heads + head).to(gl.int64) * query_len
    gl.store(lse_at + lse_rows, (top + gl.log2(total)) * 0.6931471805599453, mask=lse_rows < query_len)
    return factor


@gluon.jit
def _consumer(PART: gl.constexpr, rings, barriers, descriptors, sizes, start, operands):
    """One warpgroup: 64 query rows of each tile. While its softmax runs, the other warpgroup's products do."""
    query_ring, key_ring, value_ring, output_ring, tile_message, block_message, walk_ring = rings
    query_full, query_empty, key_full, key_empty, value_full, value_empty, walk_full, walk_empty = barriers
    queries, keys, values, outputs = descriptors
    query_len, key_len, batch, heads, kv_heads = sizes
    lse, flags, segments, windows, sinks, sink_logits, scale, cap = operands
    tiles = (query_len + 127) // 128 * batch * heads
    turn_rings = (key_ring, value_ring, block_message)
    turn_barriers = (key_full, key_empty, value_full, value_empty)
    key_stage, key_phase = 0, 0
    value_stage, value_phase = 0, 0
    query_stage, query_phase = 0, 0
    before = -1  # the stage of the tile before this one
    mbarrier.wait(query_full.index(0), 0)
    t = _read(tile_message.index(0))
#if across_tiles
    place, rows, clauses = _rows_of(PART, t, sizes, start, operands)
    query = query_ring.index(PART)
    mbarrier.wait(key_full.index(0), 0)
    message = _read(block_message.index(0))
    zero = gl.zeros([64, KEY_TILE], gl.float32, SCORES)
    s_token = warpgroup_mma(query, key_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_token])
    mbarrier.arrive(key_empty.index(0), count=1)
    key_stage, key_phase = _next(key_stage, key_phase, KEY_STAGES)
    top, total, weights = _first_softmax(s, message >> 2, rows, key_len, clauses, scale, cap)
#end
    while t < tiles:
#if not across_tiles
        place, rows, clauses = _rows_of(PART, t, sizes, start, operands)
        query = query_ring.index(2 * query_stage + PART)
        # the tile's first block: the only one without a P·V beside it
        mbarrier.wait(key_full.index(key_stage), key_phase)
        message = _read(block_message.index(key_stage))
        zero = gl.zeros([64, KEY_TILE], gl.float32, SCORES)
        s_token = warpgroup_mma(query, key_ring.index(key_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
#if late_release
        _release_query((query_empty, before))
#end
        s = warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(key_empty.index(key_stage), count=1)
        key_stage, key_phase = _next(key_stage, key_phase, KEY_STAGES)
        top, total, weights = _first_softmax(s, message >> 2, rows, key_len, clauses, scale, cap)
#end
        acc = gl.zeros([64, VALUE_DIM], gl.float32, OUTPUT)
        follows = message & 3
        state = (key_stage, key_phase, value_stage, value_phase, top, total, acc, weights)
        release = (query_empty, before)
#if across_tiles
#if output_in_query
        # the output of the tile before leaves its slot while this tile's first products run
        if follows != 0:
            follows, state = _turn(query, turn_rings, turn_barriers, state, rows, key_len, clauses, scale, cap, release, True, True)
        else:
            _release_query(release)
#end
#end
        while follows != 0:
            while follows == 1:
                follows, state = _turn(query, turn_rings, turn_barriers, state, rows, key_len, clauses, scale, cap, release, True, False)
            while follows == 2:
                follows, state = _turn(query, turn_rings, turn_barriers, state, rows, key_len, clauses, scale, cap, release, False, False)
#if twice
                if follows == 2:
                    follows, state = _turn(
                        query, turn_rings, turn_barriers, state, rows, key_len, clauses, scale, cap, release, False, False
                    )
#end
        key_stage, key_phase, value_stage, value_phase, top, total, acc, weights = state
        before = query_stage
        query_stage, query_phase = _next(query_stage, query_phase, QUERY_STAGES)
#if not output_in_query
        mbarrier.arrive(query_empty.index(before), count=1)
#end
#if across_tiles
        # the next tile's first Q·K beside this tile's last P·V; past the last tile both are of no use to anyone
        mbarrier.wait(query_full.index(query_stage), query_phase)
        t = _read(tile_message.index(query_stage))
        next_place, rows, clauses = _rows_of(PART, gl.minimum(t, tiles - 1), sizes, start, operands)
        next_query = query_ring.index(2 * query_stage + PART)
        mbarrier.wait(key_full.index(key_stage), key_phase)
        message = _read(block_message.index(key_stage))
        zero = gl.zeros([64, KEY_TILE], gl.float32, SCORES)
        s_token = warpgroup_mma(next_query, key_ring.index(key_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
#end
        mbarrier.wait(value_full.index(value_stage), value_phase)
        acc_token = warpgroup_mma(weights, value_ring.index(value_stage), acc, is_async=True)
        factor = _factor_and_lse(top, total, place, query_len, heads, lse, sink_logits)
#if across_tiles
        s = warpgroup_mma_wait(1, deps=[s_token])
        mbarrier.arrive(key_empty.index(key_stage), count=1)
        key_stage, key_phase = _next(key_stage, key_phase, KEY_STAGES)
        top, total, next_weights = _first_softmax(s, message >> 2, rows, key_len, clauses, scale, cap)
#if pinned
        while message < 0:
            message = _read(block_message.index(key_stage))
#end
#end
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        mbarrier.arrive(value_empty.index(value_stage), count=1)
        value_stage, value_phase = _next(value_stage, value_phase, VALUE_STAGES)
#if output_in_query
        output = query
#else
        output = output_ring.index(PART)
        tma.store_wait(0)  # the last tile's output has left the buffer
        $BARRIER()
#end
        output.store((acc * gl.convert_layout(factor, OUTPUT_ROWS)[:, None]).to(DTYPE))
        fence_async_shared()
        $BARRIER()
        batch_row, head, row = place
        $STORE(outputs, [batch_row, head, row, 0], output$VIEW(DTYPE, [1, 1, 64, VALUE_DIM], SHARED4))
#if output_in_query
#if not late_release
        tma.store_wait(0)
        $BARRIER()
        mbarrier.arrive(query_empty.index(before), count=1)
#end
#end
#if across_tiles
        place = next_place
        query = next_query
        weights = next_weights
#else
        mbarrier.wait(query_full.index(query_stage), query_phase)
        t = _read(tile_message.index(query_stage))
#end
    tma.store_wait(0)


@gluon.jit
def _first_consumer(rings, barriers, descriptors, sizes, start, operands):
    _consumer(0, rings, barriers, descriptors, sizes, start, operands)


@gluon.jit
def _second_consumer(rings, barriers, descriptors, sizes, start, operands):
    _consumer(1, rings, barriers, descriptors, sizes, start, operands)


'''

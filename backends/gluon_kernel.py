"""Template of the Hopper kernel itself: its arguments, shared memory and barriers, and the partitions that it starts. `gluon_source` expands it."""

KERNEL = """@gluon.jit(do_not_specialize=[$RUNTIME])
def attention(
    queries,
    keys,
    values,
    outputs,
    lse,
    counter,
#if lists
    counts,
    indices,
#end
#if key_flags
    flags,
    flag_tiles,
#end
#if flag_sinks
    sink_tiles,
#end
#if segments
    segments,
    segment_low,
    segment_high,
#end
#if window_per_head
    windows,
#end
#if start
    starts,
#end
#if sink_logits
    sink_logits,
#end
    query_len,
    key_len,
    batch,
    heads,
    kv_heads,
#if lists
    list_len,
#end
#if not start
    start,
#end
#if window
#if not window_per_head
    window,
#end
#end
#if sinks
    sinks,
#end
    scale,
#if softcap
    cap,
#end
):
    query_ring = gl.allocate_shared_memory(DTYPE, [2 * QUERY_STAGES, 64, HEAD_DIM], SHARED)
    key_ring = gl.allocate_shared_memory(DTYPE, [KEY_STAGES, KEY_TILE, HEAD_DIM], SHARED)
    value_ring = gl.allocate_shared_memory(DTYPE, [VALUE_STAGES, KEY_TILE, VALUE_DIM], SHARED)
#if output_in_query
    output_ring = query_ring
#else
    output_ring = gl.allocate_shared_memory(DTYPE, [2, 64, VALUE_DIM], SHARED)
#end
    tile_message = gl.allocate_shared_memory(gl.int32, [QUERY_STAGES, 1], MESSAGE)
    block_message = gl.allocate_shared_memory(gl.int32, [KEY_STAGES, 1], MESSAGE)
#if walker
    walk_ring = gl.allocate_shared_memory(gl.int32, [2 * WALK_STAGES, 1], MESSAGE)
    walk_full = gl.allocate_shared_memory(gl.int64, [WALK_STAGES, 1], mbarrier.MBarrierLayout())
    walk_empty = gl.allocate_shared_memory(gl.int64, [WALK_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WALK_STAGES):
        mbarrier.init(walk_full.index(i), count=1)
        mbarrier.init(walk_empty.index(i), count=1)
#else
    walk_ring, walk_full, walk_empty = block_message, 0, 0
#end
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
#if start
    start = gl.load(starts).to(gl.int32)
#end
    rings = (query_ring, key_ring, value_ring, output_ring, tile_message, block_message, walk_ring)
    barriers = (query_full, query_empty, key_full, key_empty, value_full, value_empty, walk_full, walk_empty)
    descriptors = (queries, keys, values, outputs)
    sizes = (query_len, key_len, batch, heads, kv_heads)
#if not lists
    counts, indices, list_len = 0, 0, 0
#end
#if not key_flags
    flags, flag_tiles = 0, 0
#end
#if not flag_sinks
    sink_tiles = 0
#end
#if not segments
    segments, segment_low, segment_high = 0, 0, 0
#end
#if not window_per_head
#if window
    windows = window
#else
    windows = 0
#end
#end
#if not sinks
    sinks = 0
#end
#if not sink_logits
    sink_logits = 0
#end
#if not softcap
    cap = 0.0
#end
    lists = (counts, indices, list_len)
    produced = (counter, lists, flag_tiles, sink_tiles, (segment_low, segment_high), windows, sinks)
    consumed = (lse, flags, segments, windows, sinks, sink_logits, scale, cap)
    gl.warp_specialize(
        [
            (_first_consumer, (rings, barriers, descriptors, sizes, start, consumed)),
            (_second_consumer, (rings, barriers, descriptors, sizes, start, consumed)),
            (_producer, (rings, barriers, descriptors, sizes, start, produced)),
#if walker
            (_walker, (rings, barriers, descriptors, sizes, start, produced)),
        ],
        [4, 1, 1],
        [$CONSUMER_REGISTERS, $PRODUCER_REGISTERS, $PRODUCER_REGISTERS],
#else
        ],
        [4, 1],
        [$CONSUMER_REGISTERS, $PRODUCER_REGISTERS],
#end
    )
"""

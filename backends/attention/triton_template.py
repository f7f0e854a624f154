"""The text of the attention kernel, with every clause of the op; `triton_source` keeps the clauses that a spec has."""

FOLD_TILE = '''\
@triton.jit
def fold_tile(${state}, q, key_head, value_head, key_n, value_n, first, end, ${context}, TILE: tl.constexpr, EDGE: tl.constexpr):
    """Folds keys [first, first + TILE) into the running softmax. Only EDGE keys need the mask${flags_note}."""
    offsets = tl.arange(0, TILE)
    keys = first + offsets
    qk_dims = tl.arange(0, QK_DIM)
    v_dims = tl.arange(0, V_DIM)
    # a 64-bit step to the tile, 32-bit steps within it
    key_tile = key_head + tl.cast(first, tl.int64) * key_n + offsets[:, None] * key_n + qk_dims[None, :]
    value_tile = value_head + tl.cast(first, tl.int64) * value_n + offsets[:, None] * value_n + v_dims[None, :]
%if uniform
    # what all rows do not see is not read
    readable = keys < end
%if key_flags
    flags = tl.load(flags_row + keys, mask=readable, other=0).to(tl.int32)
    readable = readable & ${"((flags & bits) == bits)" if sinks == "flags" else "((flags & 1) != 0)"}
%end
%if segments
    readable = readable & has_one_segment & (tl.load(segments_row + keys, mask=readable, other=0) == one_segment)
%end
    k = tl.load(key_tile, mask=readable[:, None]${qk_guard}, other=0.0)
%else
    if EDGE:
        k = tl.load(key_tile, mask=(keys < end)[:, None]${qk_guard}, other=0.0)
    else:
        k = tl.load(key_tile${", mask=" + qk_guard[3:] + ", other=0.0" if qk_guard else ""})
%end
    s = tl.dot(q, tl.trans(k)${precision})
%if softcap
    # cap * tanh(scale * s / cap) in units of log2; tanh(y) = 1 - 2 / (1 + exp(2y))
    s = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%end
%if alibi
%if packed
    s = ${"s" if softcap else "s * scale"} + slope[:, None] * (keys - anchor)[None, :]
%else
    s = ${"s" if softcap else "s * scale"} + (slope * (keys - anchor))[None, :]
%end
%end
%if key_bias
%if packed
    bias = tl.load(bias_row[:, None] + keys[None, :], mask=(keys < end)[None, :], other=0.0)
%else
    bias = tl.load(bias_row + keys, mask=keys < end, other=0.0)[None, :]
%end
    s = ${"s" if softcap or alibi else "s * scale"} + bias * LOG2E
%end
%if bias
    if EDGE:
        more = tl.load(bias_rows[:, None] + keys[None, :], mask=(keys < end)[None, :], other=0.0)
    else:
        more = tl.load(bias_rows[:, None] + keys[None, :])
    s = ${"s" if softcap or alibi else "s * scale"} + more.to(tl.float32) * LOG2E
%end

%if uniform
    s = tl.where(readable[None, :], s, float("-inf"))
%else
%if key_flags
%if lean
    if EDGE:
        flags = tl.load(flags_row + keys, mask=keys < end, other=0).to(tl.int32)
    else:
        flags = tl.load(flags_row + keys).to(tl.int32)
%else
    flags = tl.load(flags_row + keys, mask=keys < end, other=0).to(tl.int32)
%end
    readable = (flags & 1) != 0
%else
    readable = keys < end
%end
    if EDGE:
        visible = readable[None, :]
%if causal
        visible = visible & (keys[None, :] <= position[:, None])
%end
%if windowed
        in_window = keys[None, :] > ${"(position - window)[:, None]"}
%if sinks == "flags"
        in_window = in_window | ((flags & 2) != 0)[None, :]
%elif sinks == "count"
        in_window = in_window | (keys < sinks)[None, :]
%end
        visible = visible & in_window
%end
%if segments
        key_segment = tl.load(segments_row + keys, mask=keys < end, other=0)
        visible = visible & (key_segment[None, :] == segment[:, None]) & has_segment[:, None]
%end
        s = tl.where(visible, s, float("-inf"))
%if key_flags
    else:
        s = tl.where(readable[None, :], s, float("-inf"))
%end
%end
%if raw
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
%else
    m_new = tl.maximum(m, tl.max(s, 1))
%end
    base = m_new
%if key_flags or key_bias or bias or uniform
    # a row may have seen nothing yet: -inf - -inf is NaN
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
%else
    if EDGE:  # a row may have seen nothing yet: -inf - -inf is NaN
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
%end
    p = tl.exp2(${"s * scale" if raw else "s"} - base[:, None])
    alpha = tl.exp2(m - base)
    l = l * alpha + tl.sum(p, 1)

%if key_flags or uniform
    v = tl.load(value_tile, mask=readable[:, None]${v_guard}, other=0.0)
%else
    if EDGE:
        v = tl.load(value_tile, mask=readable[:, None]${v_guard}, other=0.0)
    else:
        v = tl.load(value_tile${", mask=" + v_guard[3:] + ", other=0.0" if v_guard else ""})
%end
%if exposed
    if EDGE:  # 0 * NaN is NaN: rows that do not see a key must not feel its value
        sound = tl.abs(v.to(tl.float32)) < float("inf")
        unsound = tl.min(sound.to(tl.int32), 1) == 0
        poisoned = tl.maximum(poisoned, tl.max((visible & unsound[None, :]).to(tl.int32), 1))
        v = tl.where(sound, v, 0.0)
%end
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None]${precision})
    return acc, m_new, l${", poisoned" if exposed else ""}
'''

KERNEL = """\
@triton.jit${jit}
def ${"split" if split_keys else "attention"}(
    ${parameters},
):
    pid = tl.program_id(0)
%if split_keys
    part = pid % splits
    pid = pid // splits
%end
%if packed
    # the rows of a tile are (query, head of the group) pairs, so one tile serves a KV head
    tiles = tl.cdiv(query_len * GROUP, QUERIES)
    tile = tiles - 1 - pid % tiles
    row = tile * QUERIES + tl.arange(0, QUERIES)
    index = row // GROUP
    member = row % GROUP
    kv = pid // tiles
    first_query = tile * QUERIES // GROUP
    last_query = tl.minimum((tile * QUERIES + QUERIES - 1) // GROUP, query_len - 1)
%else
    # KV head outermost and its group innermost, so that a group shares what L2 holds; long rows first
    tiles = tl.cdiv(query_len, QUERIES)
    tile = tiles - 1 - (pid // GROUP) % tiles
    index = tile * QUERIES + tl.arange(0, QUERIES)
    member = pid % GROUP
    kv = pid // GROUP // tiles
    first_query = tile * QUERIES
    last_query = tl.minimum(first_query + QUERIES, query_len) - 1
%end
    batch = kv // kv_heads
    kv_head = kv % kv_heads
    head = kv_head * GROUP + member
    inside = index < query_len
    batch_wide = tl.cast(batch, tl.int64)
%if has_start
    start = tl.load(query_start).to(tl.int32)
%else
    start = key_len - query_len
%end
    position = index + start
    qk_dims = tl.arange(0, QK_DIM)
    v_dims = tl.arange(0, V_DIM)
    query_row = batch_wide * query_b + tl.cast(head, tl.int64) * query_h + index.to(tl.int64) * query_m
    q = tl.load(query + query_row[:, None] + qk_dims[None, :], mask=inside[:, None]${qk_guard}, other=0.0)
    key_head = key + batch_wide * key_b + tl.cast(kv_head, tl.int64) * key_h
    value_head = value + batch_wide * value_b + tl.cast(kv_head, tl.int64) * value_h
%if key_flags
    flags_row = key_flags + batch_wide * flags_b
%end
%if segments
    segments_row = segments + batch_wide * segments_b
    has_segment = inside & (position >= 0) & (position < key_len)
    segment = tl.load(segments_row + position, mask=has_segment, other=0)
%if uniform
    has_one_segment = (start >= 0) & (start < key_len)
    one_segment = tl.load(segments_row + start, mask=has_one_segment, other=0)
%end
%end
%if window == "per_head"
    window = tl.load(windows + head)
    window = tl.where(window > 0, window, 1 << 30)
%end
%if alibi
    # a softmax does not feel a constant: counting from the tile's last key keeps slope * k small
    slope = tl.load(alibi_slopes + batch_wide * alibi_b + head) * LOG2E
    anchor = tl.minimum(${"query_len - 1" if split_keys else "last_query"} + start, key_len - 1)
%end
%if key_bias
    bias_row = key_bias + batch_wide * bias_b + head * bias_h
%end
%if bias
    # rows past the last read the last one's
    bias_rows = tl.minimum(index, query_len - 1).to(tl.int64) * bias_m
    bias_rows = bias + batch_wide * bias_b + tl.cast(head, tl.int64) * bias_h + bias_rows
%end

    # some row may see keys [begin, end); every row sees keys [full_begin, full_end)
%if bounded
    begin = tl.load(flag_bounds + batch * 4)
    end = tl.load(flag_bounds + batch * 4 + 1)
%else
    begin = 0
    end = key_len
%end
%if causal
    end = tl.minimum(end, last_query + start + 1)
%end
    end = tl.maximum(end, 0)
%if uniform and key_flags and not bounded
    # slots behind the last visible key, as those of a static cache that are still empty, are no part's: look for it from the end
    last = -1
    strip = tl.cdiv(end, STRIP)
    while (strip > 0) & (last < 0):
        strip -= 1
        at = strip * STRIP + tl.arange(0, STRIP)
        shown = (tl.load(flags_row + at, mask=at < end, other=0).to(tl.int32) & 1) != 0
        last = tl.max(tl.where(shown, at, -1), 0)
    end = last + 1
%end
    full_end = end
%if causal
    full_end = tl.minimum(end, first_query + start + 1)
%end
%if windowed
    full_begin = last_query + start - ${"tl.min(window, 0)" if per_row_window else "window"} + 1
    begin = tl.maximum(begin, first_query + start - ${"tl.max(window, 0)" if per_row_window else "window"} + 1)
%end
    begin = tl.minimum(begin, end)
%if windowed
    full_begin = tl.maximum(begin, full_begin)
%else
    full_begin = begin
%end

    m = tl.full([QUERIES], float("-inf"), tl.float32)
    l = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, V_DIM], tl.float32)
%if exposed
    poisoned = tl.zeros([QUERIES], tl.int32)
%end
%if block_lists
    query_blocks = tl.cdiv(query_len, BLOCK)
    listed = tl.cast(batch * kv_heads * GROUP + head, tl.int64) * query_blocks + first_query // BLOCK
    count = tl.load(block_counts + listed)
    entries = block_indices + listed * list_len
%if segments
    for i in tl.range(0, count * ${edge_split}, num_stages=1):
        first = ${edge_entry}
        ${state} = fold_tile(${call}, TILE=EDGE_KEYS, EDGE=True)
%else
    # entries rise: the first ones may cross the lower edge of what every row sees, the last ones its upper edge
    lead = 0
%if windowed
    while (lead < count) & (tl.load(entries + lead, mask=lead < count, other=0).to(tl.int32) * BLOCK < full_begin):
        lead += 1
%end
    tail = count
    while (tail > lead) & (tl.load(entries + tail - 1, mask=tail > 0, other=0).to(tl.int32) * BLOCK + BLOCK > full_end):
        tail -= 1
    for i in tl.range(lead * ${split}, tail * ${split}):
        first = ${entry}
        ${state} = fold_tile(${call}, TILE=KEYS, EDGE=False)
    for j in tl.range(0, (lead + count - tail) * ${edge_split}, num_stages=1):
        i = tl.where(j < lead * ${edge_split}, j, j + (tail - lead) * ${edge_split})
        first = ${edge_entry}
        ${state} = fold_tile(${call}, TILE=EDGE_KEYS, EDGE=True)
%end
%else
%if sinks == "flags"
    sink_begin = tl.load(flag_bounds + batch * 4 + 2) // EDGE_KEYS * EDGE_KEYS
    sink_end = tl.load(flag_bounds + batch * 4 + 3)
%elif sinks == "count"
    sink_begin = 0
    sink_end = sinks
%end
%if split_keys
    # parts share what some row may see, not the capacity: a quarter full cache must cost a quarter
    lower = begin${"" if uniform else " // EDGE_KEYS * EDGE_KEYS"}
    share = tl.cdiv(tl.cdiv(end - lower, KEYS), splits) * KEYS
%if uniform
    begin = tl.minimum(lower + part * share, end)
%if sinks == "none"
    end = tl.minimum(begin + share, end)
    for first in tl.range(begin, end, KEYS):
%else
    own_end = tl.minimum(begin + share, end)
    # the first part has the sinks below the window before its own keys
    sink_end = tl.where(part == 0, tl.minimum(sink_end, lower), 0)
    sink_tiles = tl.cdiv(tl.maximum(sink_end - sink_begin, 0), KEYS)
    for i in tl.range(0, sink_tiles + tl.cdiv(own_end - begin, KEYS)):
        first = tl.where(i < sink_tiles, sink_begin + i * KEYS, begin + (i - sink_tiles) * KEYS)
        end = tl.where(i < sink_tiles, sink_end, own_end)
%if sinks == "flags"
        bits = tl.where(i < sink_tiles, 3, 1)
%end
%end
        ${state} = fold_tile(${call}, TILE=KEYS, EDGE=True)
%else
%if sinks != "none"
    sink_end = tl.where(part == 0, tl.minimum(sink_end, lower), 0)
%end
    begin = tl.minimum(lower + part * share, tl.cdiv(end, EDGE_KEYS) * EDGE_KEYS)
    end = tl.minimum(begin + share, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(begin, end))
    full_end = tl.minimum(full_end, end)
%end
%end
%if not uniform
    begin = begin // EDGE_KEYS * EDGE_KEYS
%if segments
    # rows of one tile differ everywhere
    full_begin = begin
    full_end = begin
%else
%if windowed
    full_begin = tl.minimum(tl.cdiv(full_begin, EDGE_KEYS), tl.cdiv(end, EDGE_KEYS)) * EDGE_KEYS
%else
    full_begin = begin
%end
    full_end = full_begin + tl.maximum(full_end - full_begin, 0) // KEYS * KEYS
    for first in tl.range(full_begin, full_end, KEYS):
        ${state} = fold_tile(${call}, TILE=KEYS, EDGE=False)
%end
    # what needs the mask: ${edges}
%if sinks != "none"
    sink_tiles = tl.cdiv(tl.maximum(tl.minimum(sink_end, begin) - sink_begin, 0), EDGE_KEYS)
%end
    upper_tiles = tl.cdiv(tl.maximum(end - full_end, 0), EDGE_KEYS)
%if windowed
    lower_tiles = (full_begin - begin) // EDGE_KEYS
    for i in tl.range(0, ${"sink_tiles + " if sinks != "none" else ""}lower_tiles + upper_tiles, num_stages=1):
%if sinks != "none"
        j = i - sink_tiles
        first = tl.where(j < lower_tiles, begin + j * EDGE_KEYS, full_end + (j - lower_tiles) * EDGE_KEYS)
        first = tl.where(j < 0, sink_begin + i * EDGE_KEYS, first)
%else
        first = tl.where(i < lower_tiles, begin + i * EDGE_KEYS, full_end + (i - lower_tiles) * EDGE_KEYS)
%end
%else
    for i in tl.range(0, upper_tiles, num_stages=1):
        first = full_end + i * EDGE_KEYS
%end
        ${state} = fold_tile(${call}, TILE=EDGE_KEYS, EDGE=True)
%end
%end

%if split_keys
%if exposed
    acc = tl.where((poisoned != 0)[:, None], float("nan"), acc)
%end
    at = (tl.cast(kv, tl.int64) * query_len * GROUP + row) * splits + part
    tl.store(part_m + at, m, mask=inside)
    tl.store(part_l + at, l, mask=inside)
    tl.store(part_acc + at[:, None] * ${v_head_dim} + v_dims[None, :], acc, mask=inside[:, None]${v_guard})
%else
    seen = l != 0.0
%if sink_logits
    sink = tl.load(sink_logits + head).to(tl.float32) * LOG2E${" - slope * anchor" if alibi else ""}
    top = tl.maximum(m, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    l = l * tl.exp2(m - top) + tl.exp2(sink - top)
    acc = acc * tl.exp2(m - top)[:, None]
    m = top
%end
    result = acc / tl.where(seen, l, 1.0)[:, None]
%if exposed
    result = tl.where((poisoned != 0)[:, None], float("nan"), result)
%end
    out_row = batch_wide * out_b + tl.cast(head, tl.int64) * out_h + index.to(tl.int64) * out_m
    tl.store(out + out_row[:, None] + v_dims[None, :], result.to(out.dtype.element_ty), mask=inside[:, None]${v_guard})
    # natural logarithm; a row that saw no key has none
    total = m + tl.log2(tl.where(seen, l, 1.0))${" + slope * anchor" if alibi else ""}
    lse_row = tl.cast(batch * kv_heads * GROUP + head, tl.int64) * query_len + index
    tl.store(lse + lse_row, tl.where(seen, total * LN2, float("-inf")), mask=inside)
%end
"""

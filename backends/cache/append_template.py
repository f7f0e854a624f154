"""The text of the kernels for calls of several tokens over an evicting cache; `backends.cache.append` keeps the clauses that a spec has."""

FOLD_TILE = '''\
@triton.jit
def weigh(m, l, s, at, p, ${context}):
    """A tile's products as weights, and what the rows' running softmax becomes: maximum, sum, weights, factor of the old. `at` holds positions."""
%if softcap
    # cap * tanh(scale * s / cap) in units of log2; tanh(y) = 1 - 2 / (1 + exp(2y))
    s = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%else
    s = s * scale
%end
    visible = (at >= 0)[None, :] & (at[None, :] <= p[:, None])
%if windowed
    visible = visible & ((at[None, :] > (p - window)[:, None]) | (at < sinks)[None, :])
%end
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # a row may have seen nothing yet: -inf - -inf is NaN
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    weight = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    return m_new, l * alpha + tl.sum(weight, 1), weight, alpha


@triton.jit
def fold_tile(m, l, ${accs}, ${qs}, ${"q_rotated, near_sinks, " if rotate_sinks else ""}key_head, value_head, key_n, value_n, at_head, first, ${"begin, " if codes else ""}end, p, ${context}):
    """Folds keys [first, first + KEYS), of which those below `end`${" and from `begin` on" if codes else ""} exist, into the running softmax of each row; `at_head` holds positions."""
    offsets = tl.arange(0, KEYS)
    qk_dims = tl.arange(0, ${"QK_WIDTH" if codes else "QK_DIM"})
    v_dims = tl.arange(0, ${"V_WIDTH" if codes else "V_DIM"})
    readable = ${"(first + offsets >= begin) & (first + offsets < end)" if codes else "first + offsets < end"}
    at = tl.load(at_head + first + offsets, mask=readable, other=-1)
    # a 64-bit step to the tile, 32-bit steps within it
    key_tile = key_head + tl.cast(first, tl.int64) * key_n + offsets[:, None] * key_n
    value_tile = value_head + tl.cast(first, tl.int64) * value_n + offsets[:, None] * value_n
%for i in pieces
    k${i} = tl.load(key_tile + ${key_dims(i)}[None, :], mask=readable[:, None]${qk_guard}, other=0.0)
%if padded
    # a padding token's value may be anything, and 0 times NaN is no 0
    v${i} = tl.load(value_tile + ${value_dims(i)}[None, :], mask=(at >= 0)[:, None]${v_guard}, other=0.0)
%else
    v${i} = tl.load(value_tile + ${value_dims(i)}[None, :], mask=readable[:, None]${v_guard}, other=0.0)
%end
%end
    s = tl.dot(q0, tl.trans(k0)${precision})
%for i in pieces[1:]
    s = tl.dot(q${i}, tl.trans(k${i}), s${precision})
%end
%if rotate_sinks
    if near_sinks:
        s = tl.where((at < sinks)[None, :], tl.dot(q_rotated, tl.trans(k0)${precision}), s)
%end
    m, l, weight, alpha = weigh(m, l, s, at, p, ${context})
%for i in pieces
    acc${i} = tl.dot(weight.to(v${i}.dtype), v${i}, acc${i} * alpha[:, None]${precision})
%end
    return m, l, ${accs}
'''

FOLD_CODES = '''\
@triton.jit
def fold_codes(m, l, ${accs}, ${qs}, key_codes, key_scales, value_codes, value_scales, at_head, first, end, recent_begin, recent_end, p, ${context}):
    """Folds the slots [first, first + KEYS) of one head, all of one group, into the running softmax of each row, but for those that lie as
    they came. Codes become numbers here, a tile at a time, and nowhere else."""
    offsets = tl.arange(0, KEYS)
    qk_dims = tl.arange(0, QK_WIDTH)
    v_dims = tl.arange(0, V_WIDTH)
    slots = first + offsets
    readable = slots < end
    at = tl.load(at_head + slots, mask=readable & ((slots < recent_begin) | (slots >= recent_end)), other=-1)
    wide = tl.cast(first, tl.int64)
    k = tl.load(key_codes + wide * QK_WIDTH + offsets[:, None] * QK_WIDTH + qk_dims[None, :], mask=readable[:, None], other=0)
    v = tl.load(value_codes + wide * V_WIDTH + offsets[:, None] * V_WIDTH + v_dims[None, :], mask=readable[:, None], other=0)
    group = key_scales + first // 64 * ${parts * qk_head_dim}
    own = value_scales + (wide + offsets) * ${parts}
    # a hidden value may be anything, and so may its scale
    scale_v = tl.load(own, mask=at >= 0, other=0.0).to(tl.float32)
%if codes == "int4"
    least_v = tl.load(own + 1, mask=at >= 0, other=0.0).to(tl.float32)
%end
%for i in pieces
    scale_k = tl.load(group + ${key_dims(i)}).to(tl.float32)
%if codes == "fp8"
    k${i} = k.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale_k[None, :]
    v${i} = v.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale_v[:, None]
%else
    least_k = tl.load(group + ${qk_head_dim} + ${key_dims(i)}).to(tl.float32)
    k${i} = piece(k, ${i}).to(tl.float32) * (scale_k * ${1 / unit(i)})[None, :] + least_k[None, :]
    v${i} = piece(v, ${i}).to(tl.float32) * (scale_v * ${1 / unit(i)})[:, None] + least_v[:, None]
%end
%end
    s = tl.dot(q0, tl.trans(k0.to(q0.dtype))${precision})
%for i in pieces[1:]
    s = tl.dot(q${i}, tl.trans(k${i}.to(q${i}.dtype)), s${precision})
%end
    m, l, weight, alpha = weigh(m, l, s, at, p, ${context})
%for i in pieces
    acc${i} = tl.dot(weight.to(q0.dtype), v${i}.to(q0.dtype), acc${i} * alpha[:, None]${precision})
%end
    return m, l, ${accs}
'''

SPLIT = '''\
@triton.jit
def split(
    ${split_parameters},
):
    """One program folds one split of a KV head's slots into the softmax of one tile of (query, head of the group) rows; that of the last
    split folds the call's own keys, too."""
    tile = tl.program_id(0) // splits
    split_id = tl.program_id(0) % splits
    row = tl.program_id(1)  # batch row and KV head
    batch = tl.cast(row // kv_heads, tl.int64)
    kv_head = row % kv_heads
    flat = tile * ROWS + tl.arange(0, ROWS)
    i = flat // GROUP
    head = tl.cast(kv_head, tl.int64) * GROUP + flat % GROUP
    inside = i < query_len
    qk_dims = tl.arange(0, ${"QK_WIDTH" if codes else "QK_DIM"})
    v_dims = tl.arange(0, ${"V_WIDTH" if codes else "V_DIM"})
    query_row = batch * query_b + head * query_h + tl.cast(i, tl.int64) * query_m
%for i in pieces
    q${i} = tl.load(query + query_row[:, None] + ${key_dims(i)}[None, :], mask=inside[:, None]${qk_guard}, other=0.0)
%end
%if rotate_sinks
    rotated_row = ((batch * kv_heads * GROUP + head) * query_len + i) * ${qk_head_dim}
    q_rotated = tl.load(rotated + rotated_row[:, None] + qk_dims[None, :], mask=inside[:, None]${qk_guard}, other=0.0)
%end
    p = tl.load(query_positions + batch * query_len + i, mask=inside, other=-1)
    before = tl.load(seen + batch)
%if packed
    bound = starts + batch * (kv_heads + 1) + kv_head
    size = tl.load(bound + 1) - tl.load(bound)
    first_slot = tl.cast(batch, tl.int64) * kv_heads * capacity + tl.load(bound)
%end
    filled = tl.minimum(before, ${size})
    split_len = tl.cdiv(tl.cdiv(filled, KEYS), splits) * KEYS
    begin = split_id * split_len
    end = tl.minimum(begin + split_len, filled)
    slot_row = ${place}

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
%for i in pieces
    acc${i} = tl.zeros([ROWS, ${"V_WIDTH" if codes else "V_DIM"}], tl.float32)
%end
%if codes
    group_row = ${group_place}
    recent_begin = tl.load(staged + row * 2)
    recent_end = tl.load(staged + row * 2 + 1)
    for first in tl.range(begin, end, KEYS):
        m, l, ${accs} = fold_codes(
            m, l, ${accs}, ${qs}, key_codes + slot_row * QK_WIDTH, key_scales + group_row * ${parts * qk_head_dim}, value_codes + slot_row * V_WIDTH,
            value_scales + slot_row * ${parts}, positions + slot_row, first, end, recent_begin, recent_end, p, ${context},
        )
    # what lies as it came: some slots of one group
    group_begin = recent_begin // 64 * 64
    recent_stop = tl.where(split_id == splits - 1, recent_end - group_begin, 0)
    for first in tl.range(0, recent_stop, KEYS):
        m, l, ${accs} = fold_tile(
            m, l, ${accs}, ${qs}, recent_keys + tl.cast(row, tl.int64) * ${64 * qk_head_dim}, recent_values + tl.cast(row, tl.int64) * ${64 * v_head_dim},
            ${qk_head_dim}, ${v_head_dim}, positions + slot_row + group_begin, first, recent_begin - group_begin, recent_stop, p, ${context},
        )
%else
    for first in tl.range(begin, end, KEYS):
        m, l, ${accs} = fold_tile(
            m, l, ${accs}, ${qs}, ${"q_rotated, first < sinks, " if rotate_sinks else ""}keys + slot_row * ${qk_head_dim}, values + slot_row * ${v_head_dim},
            ${qk_head_dim}, ${v_head_dim}, positions + slot_row, first, end, p, ${context},
        )
%end
%if has_new
    new_key_head = new_key + batch * key_b + tl.cast(kv_head, tl.int64) * key_h
    new_value_head = new_value + batch * value_b + tl.cast(kv_head, tl.int64) * value_h
    at_row = at + batch * query_len
    stop = tl.minimum((tile * ROWS + ROWS - 1) // GROUP + 1, query_len)
    stop = tl.where(split_id == splits - 1, stop, 0)
%if windowed
    # of the call's own keys [start, stop) hold the window of every row of the tile, [0, sinks_end) what of the sinks lies before it
    bound = (batch * tl.cdiv(query_len * GROUP, ROWS) + tile) * 2
    start = tl.load(bounds + bound)
    sinks_end = tl.where(split_id == splits - 1, tl.load(bounds + bound + 1), 0)
    for first in tl.range(0, sinks_end, KEYS):
        m, l, ${accs} = fold_tile(
            m, l, ${accs}, ${qs}, ${"q_rotated, True, " if rotate_sinks else ""}new_key_head, new_value_head, key_n, value_n, at_row, first, ${"0, " if codes else ""}sinks_end, p, ${context},
        )
%else
    start = 0
%end
    for first in tl.range(start, stop, KEYS):
        m, l, ${accs} = fold_tile(
            m, l, ${accs}, ${qs}, ${"q_rotated, before < sinks, " if rotate_sinks else ""}new_key_head, new_value_head, key_n, value_n, at_row, first, ${"0, " if codes else ""}stop, p, ${context},
        )
%end
%if single
%if sink_logits
    sink = tl.load(sink_logits + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
    top = tl.maximum(m, sink)
    l = l * tl.exp2(m - top) + tl.exp2(sink - top)
%for i in pieces
    acc${i} = acc${i} * tl.exp2(m - top)[:, None]
%end
%end
    out_row = batch * out_b + head * out_h + tl.cast(i, tl.int64) * out_m
%for i in pieces
    acc${i} = acc${i} / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(out + out_row[:, None] + ${value_dims(i)}[None, :], acc${i}.to(out.dtype.element_ty), mask=inside[:, None]${v_guard})
%end
%else
    part = (tl.cast(row, tl.int64) * query_len * GROUP + flat) * splits + split_id
    tl.store(part_m + part, m, mask=inside)
    tl.store(part_l + part, l, mask=inside)
%for i in pieces
    tl.store(part_acc + part[:, None] * ${v_head_dim} + ${value_dims(i)}[None, :], acc${i}, mask=inside[:, None]${v_guard})
%end
%end
'''

COMBINE = '''\
@triton.jit
def combine(
    ${combine_parameters},
):
    """One program joins the splits of one query of one head."""
    flat = tl.program_id(0)
    row = tl.program_id(1)
    batch = tl.cast(row // kv_heads, tl.int64)
    head = tl.cast(row % kv_heads, tl.int64) * GROUP + flat % GROUP
    v_dims = tl.arange(0, V_DIM)
    split_id = tl.arange(0, SPLITS)
    held = split_id < splits
    part = (tl.cast(row, tl.int64) * query_len * GROUP + flat) * splits + split_id
    m = tl.load(part_m + part, mask=held, other=float("-inf"))
    l = tl.load(part_l + part, mask=held, other=0.0)
    acc = tl.load(part_acc + part[:, None] * ${v_head_dim} + v_dims[None, :], mask=held[:, None]${v_guard}, other=0.0)
    top = tl.max(m, 0)
%if sink_logits
    sink = tl.load(sink_logits + head).to(tl.float32) * LOG2E
    top = tl.maximum(top, sink)
%end
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(m - top)
    total = tl.sum(l * weight, 0)
%if sink_logits
    total += tl.exp2(sink - top)
%end
    result = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_row = batch * out_b + head * out_h + tl.cast(flat // GROUP, tl.int64) * out_m
    tl.store(out + out_row + v_dims, result.to(out.dtype.element_ty)${v_store})
'''

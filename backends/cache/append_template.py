"""The text of the kernels for calls of several tokens over an evicting cache; `backends.cache.append` keeps the clauses that a spec has."""

FOLD_TILE = '''\
@triton.jit
def fold_tile(m, l, acc, q, ${"q_rotated, near_sinks, " if rotate_sinks else ""}key_head, value_head, key_n, value_n, at_head, first, end, p, ${context}):
    """Folds keys [first, first + KEYS), of which those below `end` exist, into the running softmax of each row; `at_head` holds positions."""
    offsets = tl.arange(0, KEYS)
    qk_dims = tl.arange(0, QK_DIM)
    v_dims = tl.arange(0, V_DIM)
    readable = first + offsets < end
    at = tl.load(at_head + first + offsets, mask=readable, other=-1)
    # a 64-bit step to the tile, 32-bit steps within it
    key_tile = key_head + tl.cast(first, tl.int64) * key_n + offsets[:, None] * key_n + qk_dims[None, :]
    value_tile = value_head + tl.cast(first, tl.int64) * value_n + offsets[:, None] * value_n + v_dims[None, :]
    k = tl.load(key_tile, mask=readable[:, None]${qk_guard}, other=0.0)
%if padded
    # a padding token's value may be anything, and 0 times NaN is no 0
    v = tl.load(value_tile, mask=(at >= 0)[:, None]${v_guard}, other=0.0)
%else
    v = tl.load(value_tile, mask=readable[:, None]${v_guard}, other=0.0)
%end
    s = tl.dot(q, tl.trans(k)${precision})
%if rotate_sinks
    if near_sinks:
        s = tl.where((at < sinks)[None, :], tl.dot(q_rotated, tl.trans(k)${precision}), s)
%end
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
    l = l * alpha + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * alpha[:, None]${precision})
    return m_new, l, acc
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
    qk_dims = tl.arange(0, QK_DIM)
    v_dims = tl.arange(0, V_DIM)
    query_row = batch * query_b + head * query_h + tl.cast(i, tl.int64) * query_m
    q = tl.load(query + query_row[:, None] + qk_dims[None, :], mask=inside[:, None]${qk_guard}, other=0.0)
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
    acc = tl.zeros([ROWS, V_DIM], tl.float32)
    for first in tl.range(begin, end, KEYS):
        m, l, acc = fold_tile(
            m, l, acc, q, ${"q_rotated, first < sinks, " if rotate_sinks else ""}keys + slot_row * ${qk_head_dim}, values + slot_row * ${v_head_dim},
            ${qk_head_dim}, ${v_head_dim}, positions + slot_row, first, end, p, ${context},
        )
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
        m, l, acc = fold_tile(
            m, l, acc, q, ${"q_rotated, True, " if rotate_sinks else ""}new_key_head, new_value_head, key_n, value_n, at_row, first, sinks_end, p, ${context},
        )
%else
    start = 0
%end
    for first in tl.range(start, stop, KEYS):
        m, l, acc = fold_tile(
            m, l, acc, q, ${"q_rotated, before < sinks, " if rotate_sinks else ""}new_key_head, new_value_head, key_n, value_n, at_row, first, stop, p, ${context},
        )
%end
%if single
%if sink_logits
    sink = tl.load(sink_logits + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
    top = tl.maximum(m, sink)
    l = l * tl.exp2(m - top) + tl.exp2(sink - top)
    acc = acc * tl.exp2(m - top)[:, None]
%end
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out_row = batch * out_b + head * out_h + tl.cast(i, tl.int64) * out_m
    tl.store(out + out_row[:, None] + v_dims[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None]${v_guard})
%else
    part = (tl.cast(row, tl.int64) * query_len * GROUP + flat) * splits + split_id
    tl.store(part_m + part, m, mask=inside)
    tl.store(part_l + part, l, mask=inside)
    tl.store(part_acc + part[:, None] * ${v_head_dim} + v_dims[None, :], acc, mask=inside[:, None]${v_guard})
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

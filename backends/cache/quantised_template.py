"""The text of the decode kernels over keys and values in 8 or 4 bits; `quantised` keeps the clauses that a spec has.

What turns a key's codes into numbers is the same for all keys of a tile, so that it goes into the query: q · (code * scale + least) is
(q * scale) · code + q · least. Of values it goes into the weights.
"""

FOLD_CODES = '''\
@triton.jit
def weigh(m, l, s, visible, ${context}):
    """A tile's products of queries and keys as weights, and what the rows' running softmax becomes: maximum, sum, weights, factor of the old."""
%if softcap
    s = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%else
    s = s * scale
%end
    s = tl.where(visible[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    l = l * alpha + tl.sum(p, 1)
    return m_new, l, p, alpha


@triton.jit
def fold_codes(m, l, acc, ${"acc_high, " if codes == "int4" else ""}q, ${"q_high, " if codes == "int4" else ""}keys, key_scales, values, value_scales, first, end, visible, ${context}):
    """Folds the slots [first, first + KEYS) of one head, a group of keys, into the running softmax of each row."""
    at = first + tl.arange(0, KEYS)
    readable = at < end
    qk_dims = tl.arange(0, QK_BYTES)
    v_dims = tl.arange(0, V_BYTES)
    group = tl.cast(first // KEYS, tl.int64) * ${parts * qk_head_dim}
    key_codes = tl.load(keys + tl.cast(first, tl.int64) * QK_BYTES + tl.arange(0, KEYS)[:, None] * QK_BYTES + qk_dims[None, :], mask=readable[:, None], other=0)
    value_codes = tl.load(values + tl.cast(first, tl.int64) * V_BYTES + tl.arange(0, KEYS)[:, None] * V_BYTES + v_dims[None, :], mask=readable[:, None], other=0)
    scale_k = tl.load(key_scales + group + qk_dims).to(tl.float32)
    # a hidden value may be anything, and so may its scale
    scale_v = tl.load(value_scales + tl.cast(at, tl.int64) * ${parts}, mask=readable & visible, other=0.0).to(tl.float32)
%if codes == "fp8"
    scaled = (q.to(tl.float32) * scale_k[None, :]).to(q.dtype)
    s = tl.dot(scaled, tl.trans(key_codes.to(tl.float8e4nv, bitcast=True).to(q.dtype))${precision})
%else
    scale_high = tl.load(key_scales + group + QK_BYTES + qk_dims).to(tl.float32)
    least = tl.load(key_scales + group + ${qk_head_dim} + qk_dims).to(tl.float32)
    least_high = tl.load(key_scales + group + ${qk_head_dim} + QK_BYTES + qk_dims).to(tl.float32)
    wide = q.to(tl.float32)
    wide_high = q_high.to(tl.float32)
    s = tl.dot((wide * scale_k[None, :]).to(q.dtype), tl.trans((key_codes & 15).to(q.dtype))${precision})
    s = tl.dot((wide_high * scale_high[None, :]).to(q.dtype), tl.trans((key_codes >> 4).to(q.dtype)), s${precision})
    s += tl.sum(wide * least[None, :] + wide_high * least_high[None, :], 1)[:, None]
%end
    m_new, l, p, alpha = weigh(m, l, s, visible, ${context})
    weighted = (p * scale_v[None, :]).to(q.dtype)
%if codes == "fp8"
    acc = tl.dot(weighted, value_codes.to(tl.float8e4nv, bitcast=True).to(q.dtype), acc * alpha[:, None]${precision})
    return m_new, l, acc
%else
    least_v = tl.load(value_scales + tl.cast(at, tl.int64) * ${parts} + 1, mask=readable & visible, other=0.0).to(tl.float32)
    beside = tl.sum(p * least_v[None, :], 1)[:, None]
    acc = tl.dot(weighted, (value_codes & 15).to(q.dtype), acc * alpha[:, None] + beside${precision})
    acc_high = tl.dot(weighted, (value_codes >> 4).to(q.dtype), acc_high * alpha[:, None] + beside${precision})
    return m_new, l, acc, acc_high
%end


@triton.jit
def fold_recent(m, l, acc, ${"acc_high, " if codes == "int4" else ""}q, ${"q_high, " if codes == "int4" else ""}recent_keys, recent_values, begin, end, slot, ${context}):
    """Folds what lies as it came of one head, the slots [begin, end) of one group, into the running softmax of each row."""
    offsets = tl.arange(0, KEYS)
    at = begin // KEYS * KEYS + offsets
    visible = (at >= begin) & (at < end) & (at != slot)
    qk_dims = tl.arange(0, QK_BYTES)
    v_dims = tl.arange(0, V_BYTES)
    k = tl.load(recent_keys + offsets[:, None] * ${qk_head_dim} + qk_dims[None, :], mask=visible[:, None], other=0.0)
    v = tl.load(recent_values + offsets[:, None] * ${v_head_dim} + v_dims[None, :], mask=visible[:, None], other=0.0)
    s = tl.dot(q, tl.trans(k)${precision})
%if codes == "int4"
    k_high = tl.load(recent_keys + offsets[:, None] * ${qk_head_dim} + QK_BYTES + qk_dims[None, :], mask=visible[:, None], other=0.0)
    v_high = tl.load(recent_values + offsets[:, None] * ${v_head_dim} + V_BYTES + v_dims[None, :], mask=visible[:, None], other=0.0)
    s = tl.dot(q_high, tl.trans(k_high), s${precision})
%end
    m_new, l, p, alpha = weigh(m, l, s, visible, ${context})
    acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None]${precision})
%if codes == "fp8"
    return m_new, l, acc
%else
    acc_high = tl.dot(p.to(q.dtype), v_high, acc_high * alpha[:, None]${precision})
    return m_new, l, acc, acc_high
%end
'''

SPLIT = '''\
@triton.jit
def split(
    ${split_parameters},
):
    """One program folds one split of one KV head's slots into a softmax of its own, for all query heads of the group; that of the first
    split folds what lies as it came, too. The slot that the new token is about to take is left out: `combine` adds that token."""
    split_id = tl.program_id(0)
    row = tl.program_id(1)  # batch row and KV head
    batch = row // kv_heads
    kv_head = row % kv_heads
    count = tl.load(counts + row)
%if padded
    stores = tl.load(is_token + batch * is_token_b).to(tl.int32)
%else
    stores = 1
%end
%if grows
    slot = tl.minimum(count, capacity - 1)
%else
    slot = tl.where(count < pinned, count, pinned + (count - pinned) % (capacity - pinned))
%end
    slot = tl.where(stores != 0, slot, -1)
    filled = tl.minimum(count, capacity)
    split_len = tl.cdiv(tl.cdiv(filled, KEYS), splits) * KEYS
    begin = split_id * split_len
    end = tl.minimum(begin + split_len, filled)
    if split_id == 0:
        tl.store(slots + row, ${"tl.where(stores != 0, count, -1)" if grows else "slot"})
        if stores != 0:
            tl.store(positions + tl.cast(row, tl.int64) * capacity + slot, tl.load(seen + batch))
    recent_begin = tl.load(staged + row * 2)
    recent_end = tl.load(staged + row * 2 + 1)

    members = tl.arange(0, ROWS)
    heads = kv_head * GROUP + members
    qk_dims = tl.arange(0, QK_BYTES)
    v_dims = tl.arange(0, V_BYTES)
    query_row = tl.cast(batch, tl.int64) * query_b + heads * query_h
    inside = members < GROUP
    q = tl.load(query + query_row[:, None] + qk_dims[None, :], mask=inside[:, None], other=0.0)
    acc = tl.zeros([ROWS, V_BYTES], tl.float32)
%if codes == "int4"
    q_high = tl.load(query + query_row[:, None] + QK_BYTES + qk_dims[None, :], mask=inside[:, None], other=0.0)
    acc_high = tl.zeros([ROWS, V_BYTES], tl.float32)
%end
    slot_row = tl.cast(row, tl.int64) * capacity
    group_row = tl.cast(row, tl.int64) * groups * ${parts * qk_head_dim}
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for first in tl.range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        visible = (at < end) & (at != slot) & ((at < recent_begin) | (at >= recent_end))
        m, l, acc${", acc_high" if codes == "int4" else ""} = fold_codes(
            m, l, acc, ${"acc_high, " if codes == "int4" else ""}q, ${"q_high, " if codes == "int4" else ""}keys + slot_row * QK_BYTES, key_scales + group_row,
            values + slot_row * V_BYTES, value_scales + slot_row * ${parts}, first, end, visible, ${context},
        )
    if split_id == 0:
        if recent_begin < recent_end:
            m, l, acc${", acc_high" if codes == "int4" else ""} = fold_recent(
                m, l, acc, ${"acc_high, " if codes == "int4" else ""}q, ${"q_high, " if codes == "int4" else ""}recent_keys + tl.cast(row, tl.int64) * ${64 * qk_head_dim},
                recent_values + tl.cast(row, tl.int64) * ${64 * v_head_dim}, recent_begin, recent_end, slot, ${context},
            )
    part = (tl.cast(row, tl.int64) * GROUP + members) * splits + split_id
    tl.store(part_m + part, m, mask=inside)
    tl.store(part_l + part, l, mask=inside)
    tl.store(part_acc + part[:, None] * ${v_head_dim} + v_dims[None, :], acc, mask=inside[:, None])
%if codes == "int4"
    tl.store(part_acc + part[:, None] * ${v_head_dim} + V_BYTES + v_dims[None, :], acc_high, mask=inside[:, None])
%end
'''

# runs before `split`, which reads what it wrote
KEEP = '''\
@triton.jit
def steps(least, largest):
    """Scale and least number of numbers in this range, as they are stored."""
%if codes == "fp8"
    bits = (tl.maximum(tl.abs(largest), tl.abs(least)) * ${fp8_step}).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits + 0x7FFFFF) >> 23, ${least_exponent}), ${largest_exponent})
    return (exponent << 23).to(tl.float32, bitcast=True), least
%else
    low = least.to(${number}).to(tl.float32)
    step = ((largest - low) / 15.0).to(${number}).to(tl.float32)
    return tl.where(step == 0.0, 1.0, step), low
%end


@triton.jit
def numbers(codes, step, least):
%if codes == "fp8"
    return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * step
%else
    return codes.to(tl.float32) * step + least
%end


@triton.jit
def encoded(x, step, least):
%if codes == "fp8"
    x = tl.minimum(tl.maximum(x / step, -448.0), 448.0)
    # rounded here to three bits behind the first, or to the smallest step, so that the conversion has nothing to round
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, rounded)
    x = tl.where(x == 0.0, 0.0, x)  # one zero
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
%else
    found = tl.minimum(tl.maximum(tl.floor((x - least) / step + 0.5), 0.0), 15.0)
    return tl.where(found == found, found, 0.0).to(tl.uint8)
%end


@triton.jit
def channels(keys, key_scales, recent_keys, old, first, last, held, recent, at, channel):
    """Codes [KEYS, QK_BYTES] of the keys of a group, by channel, and their scales, which are stored."""
    offsets = tl.arange(0, KEYS)
    place = key_scales + channel
    step = tl.load(place).to(tl.float32)
    least = step
%if codes == "int4"
    least = tl.load(place + ${qk_head_dim}).to(tl.float32)
%end
    x = numbers(old, step[None, :], least[None, :])
    x = tl.where(recent[:, None], tl.load(recent_keys + offsets[:, None] * ${qk_head_dim} + channel[None, :]).to(tl.float32), x)
    low = tl.min(tl.where(held[:, None], x, float("inf")), 0)
    high = tl.max(tl.where(held[:, None], x, float("-inf")), 0)
    step, least = steps(low, high)
    tl.store(place, step.to(${number}))
%if codes == "int4"
    tl.store(place + ${qk_head_dim}, least.to(${number}))
%end
    return encoded(x, step[None, :], least[None, :])


@triton.jit
def close_group(
    ${close_parameters},
):
    """One program: where the recent buffers have the last slot of a group, the group becomes codes."""
    row = tl.program_id(0)
    first = tl.load(staged + row * 2)
    last = tl.load(staged + row * 2 + 1) - 1
    if (last >= first) & ((last % KEYS == KEYS - 1) | (last == capacity - 1)):
        offsets = tl.arange(0, KEYS)
        at = last // KEYS * KEYS + offsets
        recent = (at >= first) & (at <= last)
        slot_row = tl.cast(row, tl.int64) * capacity
        held = tl.load(positions + slot_row + at, mask=at < capacity, other=-1) >= 0
        group_keys = key_scales + (tl.cast(row, tl.int64) * groups + last // KEYS) * ${parts * qk_head_dim}
        row_recent = recent_keys + tl.cast(row, tl.int64) * ${64 * qk_head_dim}
        row_values = recent_values + tl.cast(row, tl.int64) * ${64 * v_head_dim}
        qk_bytes = tl.arange(0, QK_BYTES)
        v_bytes = tl.arange(0, V_BYTES)
        place = keys + (slot_row + at[:, None]) * QK_BYTES + qk_bytes[None, :]
        old = tl.load(place, mask=held[:, None], other=0)
%if codes == "fp8"
        found = channels(keys, group_keys, row_recent, old, first, last, held, recent, at, qk_bytes)
%else
        found = channels(keys, group_keys, row_recent, old & 15, first, last, held, recent, at, qk_bytes)
        found |= channels(keys, group_keys, row_recent, old >> 4, first, last, held, recent, at, qk_bytes + QK_BYTES) << 4
%end
        tl.store(place, found, mask=held[:, None])
        v = tl.load(row_values + offsets[:, None] * ${v_head_dim} + v_bytes[None, :]).to(tl.float32)
        low = tl.min(v, 1)
        high = tl.max(v, 1)
%if codes == "int4"
        v_high = tl.load(row_values + offsets[:, None] * ${v_head_dim} + V_BYTES + v_bytes[None, :]).to(tl.float32)
        low = tl.minimum(low, tl.min(v_high, 1))
        high = tl.maximum(high, tl.max(v_high, 1))
%end
        step, least = steps(low, high)
        # what is no number stays none
        step = tl.where(tl.sum(v, 1) == tl.sum(v, 1), step, float("nan"))
        scales = value_scales + (slot_row + at) * ${parts}
        tl.store(scales, step.to(${number}), mask=recent)
%if codes == "fp8"
        found = encoded(v, step[:, None], least[:, None])
%else
        tl.store(scales + 1, least.to(${number}), mask=recent)
        found = encoded(v, step[:, None], least[:, None]) | (encoded(v_high, step[:, None], least[:, None]) << 4)
%end
        tl.store(values + (slot_row + at[:, None]) * V_BYTES + v_bytes[None, :], found, mask=recent[:, None])
        tl.store(staged + row * 2, 0)
        tl.store(staged + row * 2 + 1, 0)
'''

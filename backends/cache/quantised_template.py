"""The text of the decode kernels over keys and values in 8 or 4 bits; `quantised` keeps the clauses that a spec has.

What turns a key's codes into numbers is the same for all keys of a tile, so that it goes into the query: q · (code * scale + least) is
(q * scale) · code + q · least. Of values it goes into the weights. Products have keys in rows and query heads in columns, of which few exist:
values, whose channels lie side by side, are then the operand that shared memory hands out transposed, two codes or four at a time.
"""

SPLIT = '''\
@triton.jit
def logits(s, ${context}):
    """Of products of queries and keys, in base 2."""
%if softcap
    # cap * tanh(scale * s / cap) in units of log2; tanh(y) = 1 - 2 / (1 + exp(2y))
    return cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%else
    return s * scale
%end


@triton.jit
def weigh(m, t, visible):
    """Logits [KEYS, ROWS] as weights of up to 2^14, which fp16 holds with 38 bits below the largest, and what the rows' running softmax
    becomes: its base, weights, factor of the old sums."""
    t = tl.where(visible[:, None], t, float("-inf"))
    m_new = tl.maximum(m, tl.max(t, 0) - 14.0)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(t - base[None, :]), tl.exp2(m - base)


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
%if packed
    bound = starts + batch * (kv_heads + 1) + kv_head
    size = tl.load(bound + 1) - tl.load(bound)
    first_slot = tl.cast(batch, tl.int64) * kv_heads * capacity + tl.load(bound)
%end
    count = tl.load(counts + row)
%if padded
    stores = tl.load(is_token + batch * is_token_b).to(tl.int32)
%else
    stores = 1
%end
%if grows
    slot = tl.minimum(count, ${size} - 1)
%else
    slot = tl.where(count < pinned, count, pinned + (count - pinned) % (capacity - pinned))
%end
    slot = tl.where(stores != 0, slot, -1)
    filled = tl.minimum(count, ${size})
%if page
%if early
    # programs come while those that choose are still at work
    tl.extra.cuda.gdc_wait()
%end
    # slots of the pages that are read, in the list's order
    extent = tl.load(chosen + row) * PAGE
    row_listed = listed + tl.cast(row, tl.int64) * most
%else
    extent = filled
%end
    split_len = tl.cdiv(tl.cdiv(extent, KEYS), splits) * KEYS
    begin = split_id * split_len
    end = tl.minimum(begin + split_len, extent)
    slot_row = ${place}
    group_row = ${group_place}
    if split_id == 0:
        tl.store(slots + row, ${"tl.where(stores != 0, count, -1)" if grows else "slot"})
        if stores != 0:
            tl.store(positions + slot_row + slot, tl.load(seen + batch))
    recent_begin = tl.load(staged + row * 2)
    recent_end = tl.load(staged + row * 2 + 1)
%if grows and not page
    # what lies as it came is last, and the slot that the new token takes lies behind it
    end = tl.where(recent_begin < recent_end, tl.minimum(end, recent_begin), end)
%end

    members = tl.arange(0, ROWS)
    heads = kv_head * GROUP + members
    inside = members < GROUP
    offsets = tl.arange(0, KEYS)
    qk_dims = tl.arange(0, QK_WIDTH)
    v_dims = tl.arange(0, V_WIDTH)
    query_row = query + tl.cast(batch, tl.int64) * query_b + heads[:, None] * query_h
%for i in key_pieces
    q${i} = tl.load(query_row + ${key_dims(i)}[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
%end
    # queries below 1 times scales of up to 2^15 stay within fp16
    top = tl.max(tl.abs(q0), 1)
%for i in key_pieces[1:]
    top = tl.maximum(top, tl.max(tl.abs(q${i}), 1))
%end
    exponent = tl.minimum(top.to(tl.int32, bitcast=True) >> 23, 252) + 1
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    shrink = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
%for i in key_pieces
    q${i} = q${i} * shrink[:, None]
%end
    m = tl.full([ROWS], float("-inf"), tl.float32)
    # sums over keys are left to the end
    l = tl.zeros([KEYS, ROWS], tl.float32)
%if codes == "int4"
    beside = tl.zeros([KEYS, ROWS], tl.float32)
%end
%for i in value_pieces
    acc${i} = tl.zeros([V_WIDTH, ROWS], tl.float32)
%end
    key_head = key_codes + slot_row * QK_WORDS
    value_head = value_words + slot_row * V_WIDTH
    scales_k = key_scales + group_row * ${parts * qk_head_dim}
    scales_v = value_scales + slot_row * ${parts}
    # two bytes a token are too few to be copied ahead of the loop by itself
%if page
    following = tl.load(row_listed + (begin + offsets) // PAGE, mask=begin + offsets < end, other=0) * PAGE + offsets % PAGE
%else
    following = begin + offsets
%end
    ahead = tl.load(scales_v + following * ${parts}, mask=begin + offsets < end, other=0.0)
%if codes == "int4"
    ahead_least = tl.load(scales_v + following * ${parts} + 1, mask=begin + offsets < end, other=0.0)
%end
    for first in tl.range(begin, end, KEYS):
        at = first + offsets
        readable = at < end
%if page
        at = tl.load(row_listed + at // PAGE, mask=readable, other=0) * PAGE + at % PAGE
        readable = readable & (at < filled)
        visible = readable & (at != slot) & ((at < recent_begin) | (at >= recent_end))
        k = tl.load(key_head + at[:, None] * QK_WORDS + qk_dims[None, :], mask=readable[:, None], other=0)
        v = tl.load(value_head + at[None, :] * V_WIDTH + v_dims[:, None], mask=readable[None, :], other=0)
%else
        visible = readable${"" if grows else " & (at != slot) & ((at < recent_begin) | (at >= recent_end))"}
        wide = tl.cast(first, tl.int64)
        k = tl.load(key_head + wide * QK_WORDS + offsets[:, None] * QK_WORDS + qk_dims[None, :], mask=readable[:, None], other=0)
        v = tl.load(value_head + wide * V_WIDTH + offsets[None, :] * V_WIDTH + v_dims[:, None], mask=readable[None, :], other=0)
%end
        # codes of values are numbers always, the scale of what is not seen may be none
        scale_v = ${"ahead.to(tl.float32)" if grows and not page else "tl.where(visible, ahead.to(tl.float32), 1.0)"}
%if page
        next = first + KEYS + offsets
        following = tl.load(row_listed + next // PAGE, mask=next < end, other=0) * PAGE + offsets % PAGE
        later = next < end
%else
        following = at + KEYS
        later = following < end
%end
        ahead = tl.load(scales_v + following * ${parts}, mask=later, other=0.0)
%if codes == "int4"
        least_v = ${"ahead_least.to(tl.float32)" if grows and not page else "tl.where(visible, ahead_least.to(tl.float32), 0.0)"}
        ahead_least = tl.load(scales_v + following * ${parts} + 1, mask=later, other=0.0)
%end
        # what turns a key's codes into numbers is the same for all keys of ${"a page" if spread > 1 else "the tile"}, so that it goes into the query${", once for each page" if spread > 1 else ""}
%if page
        of_page = first // PAGE + tl.arange(0, SPREAD)
        of_page = tl.load(row_listed + of_page, mask=of_page * PAGE < end, other=0) * PAGE // 64
        group = (scales_k + of_page * ${parts * qk_head_dim})[:, None, None]
%for i in key_pieces
        scaled = q${i}[None, :, :] * tl.load(group + ${key_dims(i)}[None, None, :]).to(tl.float32)
        folded${i} = tl.reshape(scaled, [SPREAD * ROWS, QK_WIDTH])
%end
%else
        group = scales_k + first // KEYS * ${parts * qk_head_dim}
%for i in key_pieces
        folded${i} = q${i} * tl.load(group + ${key_dims(i)}).to(tl.float32)[None, :]
%end
%end
%for i in key_pieces
        operand${i} = tl.trans(${"folded%d" % i if unit(i) == unit(0) else "(folded%d * %r)" % (i, unit(0) / unit(i))}.to(tl.${operand}))
%end
        s = tl.dot(${key_numbers(0, "k")}, operand0${precision})
%for i in key_pieces[1:]
        s = tl.dot(${key_numbers(i, "k")}, operand${i}, s${precision})
%end
%if spread > 1
        # columns are (page, query head): each slot's row keeps those of its own page
        own_page = (offsets // PAGE)[:, None] == tl.arange(0, SPREAD)[None, :]
        s = tl.reshape(s, [KEYS, SPREAD, ROWS])
%if codes == "int4"
        folded0 = q0[None, :, :] * tl.load(group + ${qk_head_dim} + ${key_dims(0)}[None, None, :]).to(tl.float32)
%for i in key_pieces[1:]
        folded0 += q${i}[None, :, :] * tl.load(group + ${qk_head_dim} + ${key_dims(i)}[None, None, :]).to(tl.float32)
%end
        s = s * ${1 / unit(0)} + tl.sum(folded0, 2)[None, :, :]
%end
        s = tl.sum(tl.where(own_page[:, :, None], s, 0.0), 1) * unit[None, :]
%elif codes == "fp8"
        s = s * unit[None, :]
%elif page
        folded0 = q0[None, :, :] * tl.load(group + ${qk_head_dim} + ${key_dims(0)}[None, None, :]).to(tl.float32)
%for i in key_pieces[1:]
        folded0 += q${i}[None, :, :] * tl.load(group + ${qk_head_dim} + ${key_dims(i)}[None, None, :]).to(tl.float32)
%end
        s = s * (unit * ${1 / unit(0)})[None, :] + (tl.reshape(tl.sum(folded0, 2), [ROWS]) * unit)[None, :]
%else
        folded0 = q0 * tl.load(group + ${qk_head_dim} + ${key_dims(0)}).to(tl.float32)[None, :]
%for i in key_pieces[1:]
        folded0 += q${i} * tl.load(group + ${qk_head_dim} + ${key_dims(i)}).to(tl.float32)[None, :]
%end
        s = s * (unit * ${1 / unit(0)})[None, :] + (tl.sum(folded0, 1) * unit)[None, :]
%end
        # scales of values go into the weights: powers of two into the logits, so that weights are of one size whatever the values are
        power = scale_v.to(tl.int32, bitcast=True) >> 23
        back = ((254 - power) << 23).to(tl.float32, bitcast=True)
        bits = tl.where(scale_v == scale_v, (power - 127).to(tl.float32), scale_v)
        m, w, alpha = weigh(m, logits(s, ${context}) + bits[:, None], visible)
        own = w * back[:, None]
        l = l * alpha[None, :] + own
%if codes == "int4"
        beside = beside * alpha[None, :] + own * least_v[:, None]
%end
        weights = ${"w" if codes == "fp8" else "(w * (scale_v * back)[:, None])"}.to(tl.${operand})
%for i in value_pieces
        acc${i} = tl.dot(piece(v, ${i}), weights, acc${i} * alpha[None, :]${precision})
%end
    if split_id == 0:
        if recent_begin < recent_end:
            at = recent_begin // KEYS * KEYS + offsets
            visible = (at >= recent_begin) & (at < recent_end) & (at != slot)
            recent_k = recent_keys + tl.cast(row, tl.int64) * ${64 * qk_head_dim} + offsets[:, None] * ${qk_head_dim}
            recent_v = recent_values + tl.cast(row, tl.int64) * ${64 * v_head_dim} + offsets[None, :] * ${v_head_dim}
            s = tl.zeros([KEYS, ROWS], tl.float32)
%for i in key_pieces
            k_recent = tl.load(recent_k + ${key_dims(i)}[None, :], mask=visible[:, None], other=0.0)
            q_plain = tl.load(query_row + ${key_dims(i)}[None, :], mask=inside[:, None], other=0.0)
            s = tl.dot(k_recent, tl.trans(q_plain), s${precision})
%end
            m, w, alpha = weigh(m, logits(s, ${context}), visible)
            l = l * alpha[None, :] + w
%if codes == "int4"
            beside = beside * alpha[None, :]
%end
%for i in value_pieces
            v_recent = tl.load(recent_v + ${value_dims(i)}[:, None], mask=visible[None, :], other=0.0)
            acc${i} = acc${i} * alpha[None, :] + tl.dot(v_recent, w.to(v_recent.dtype)${precision}) * ${unit(i)}
%end
    part = (tl.cast(row, tl.int64) * GROUP + members) * splits + split_id
    tl.store(part_m + part, m, mask=inside)
    tl.store(part_l + part, tl.sum(l, 0), mask=inside)
    place = part_acc + part[None, :] * ${v_head_dim}
%for i in value_pieces
    tl.store(place + ${value_dims(i)}[:, None], acc${i} * ${1 / unit(i)}${" + tl.sum(beside, 0)[None, :]" if codes == "int4" else ""}, mask=inside[None, :])
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
    step = ((largest - low) * ${1 / 15}).to(${number}).to(tl.float32)
    step = tl.where(step < ${least_step}, ${least_step}, step)
    return tl.where(step > ${largest_step}, ${largest_step}, step), low
%end


@triton.jit
def encoded(x, step, least):
%if codes == "fp8"
    x = tl.minimum(tl.maximum(x / step, -448.0), 448.0)
    # rounded here to three bits behind the first, or to the smallest step, so that the conversion has nothing to round
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, rounded)
    x = tl.where((x == 0.0) | (x != x), 0.0, x)  # one zero; scales say what is no number
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
%else
    # halves go where the reference's exact division puts them
    found = tl.minimum(tl.maximum(tl.floor(tl.div_rn(x - least, step) + 0.5), 0.0), 15.0)
    return tl.where(found == found, found, 0.0).to(tl.uint8)
%end


@triton.jit
def channels(keys, key_scales, recent_keys, old, first, last, held, recent, at, channel${", group_bounds, left" if page else ""}):
    """Codes [KEYS, QK_BYTES] of the keys of a group, by channel, and their scales${" and bounds" if page else ""}, which are stored."""
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
    total = tl.sum(tl.where(held[:, None], x, 0.0), 0)
    step = tl.where(total == total, step, float("nan"))
    tl.store(place, step.to(${number}))
%if codes == "int4"
    tl.store(place + ${qk_head_dim}, least.to(${number}))
%end
    found = encoded(x, step[None, :], least[None, :])
%if page
    # of keys as they are read from now on
    x = numbers(found, step[None, :], least[None, :])
    page = tl.arange(0, ${64 // page})
    inside = tl.reshape(held, [${64 // page}, PAGE])
    some = tl.max(inside.to(tl.int32), 1) > 0
    low = tl.min(tl.reshape(tl.where(held[:, None], x, float("inf")), [${64 // page}, PAGE, ${qk_head_dim if codes == "fp8" else qk_head_dim // 4}]), 1)
    high = tl.max(tl.reshape(tl.where(held[:, None], x, float("-inf")), [${64 // page}, PAGE, ${qk_head_dim if codes == "fp8" else qk_head_dim // 4}]), 1)
    ends = group_bounds + page[:, None] * ${2 * qk_head_dim} + channel[None, :]
    tl.store(ends, tl.where(some[:, None], low, 0.0).to(${number}), mask=(page < left)[:, None])
    tl.store(ends + ${qk_head_dim}, tl.where(some[:, None], high, 0.0).to(${number}), mask=(page < left)[:, None])
%end
    return found


@triton.jit
def close_group(
    ${close_parameters},
):
    """One program: where the recent buffers have the last slot of a group, the group becomes codes."""
    row = tl.program_id(0)
    first = tl.load(staged + row * 2)
    last = tl.load(staged + row * 2 + 1) - 1
%if packed
    batch = row // kv_heads
    kv_head = row % kv_heads
    bound = starts + batch * (kv_heads + 1) + kv_head
    size = tl.load(bound + 1) - tl.load(bound)
    first_slot = tl.cast(batch, tl.int64) * kv_heads * capacity + tl.load(bound)
%end
    if (last >= first) & ((last % KEYS == KEYS - 1) | (last == ${size} - 1)):
        offsets = tl.arange(0, KEYS)
        at = last // KEYS * KEYS + offsets
        recent = (at >= first) & (at <= last)
        slot_row = ${place}
        held = tl.load(positions + slot_row + at, mask=at < ${size}, other=-1) >= 0
        group_keys = key_scales + (${group_place} + last // KEYS) * ${parts * qk_head_dim}
%if page
        # of the group's pages those that there are
        group_bounds = bounds + (tl.cast(row, tl.int64) * pages + last // KEYS * ${64 // page}) * ${2 * qk_head_dim}
        left = pages - last // KEYS * ${64 // page}
%end
        row_recent = recent_keys + tl.cast(row, tl.int64) * ${64 * qk_head_dim}
        row_values = recent_values + tl.cast(row, tl.int64) * ${64 * v_head_dim} + offsets[:, None] * ${v_head_dim}
        key_place = keys + (slot_row + at[:, None]) * ${qk_bytes}
        value_place = values + (slot_row + at[:, None]) * ${v_bytes}
%if codes == "fp8"
        dims = tl.arange(0, ${qk_head_dim})
        old = tl.load(key_place + dims[None, :], mask=held[:, None], other=0)
        found = channels(keys, group_keys, row_recent, old, first, last, held, recent, at, dims${paged})
        tl.store(key_place + dims[None, :], found, mask=held[:, None])
        dims = tl.arange(0, ${v_head_dim})
        v = tl.load(row_values + dims[None, :]).to(tl.float32)
        low = tl.min(v, 1)
        high = tl.max(v, 1)
        total = tl.sum(v, 1)
%else
%for byte in range(2)
        dims = tl.arange(0, ${qk_head_dim // 4})
        old = tl.load(key_place + 2 * dims[None, :] + ${byte}, mask=held[:, None], other=0)
        found = channels(keys, group_keys, row_recent, old & 15, first, last, held, recent, at, ${qk_head_dim // 2 * byte} + dims${paged})
        found |= channels(keys, group_keys, row_recent, old >> 4, first, last, held, recent, at, ${qk_head_dim // 2 * byte + qk_head_dim // 4} + dims${paged}) << 4
        tl.store(key_place + 2 * dims[None, :] + ${byte}, found, mask=held[:, None])
%end
        dims = tl.arange(0, ${v_head_dim // 4})
%for i in value_pieces
        v${i} = tl.load(row_values + ${i * v_head_dim // 4} + dims[None, :]).to(tl.float32)
%end
        low = tl.minimum(tl.minimum(tl.min(v0, 1), tl.min(v1, 1)), tl.minimum(tl.min(v2, 1), tl.min(v3, 1)))
        high = tl.maximum(tl.maximum(tl.max(v0, 1), tl.max(v1, 1)), tl.maximum(tl.max(v2, 1), tl.max(v3, 1)))
        total = tl.sum(v0 + v1 + v2 + v3, 1)
%end
        step, least = steps(low, high)
        # what is no number stays none, by its scale: codes of a token that is not seen any more meet weights of 0
        step = tl.where(total == total, step, float("nan"))
        scales = value_scales + (slot_row + at) * ${parts}
        tl.store(scales, step.to(${number}), mask=recent)
%if codes == "fp8"
        tl.store(value_place + dims[None, :], encoded(v, step[:, None], least[:, None]), mask=recent[:, None])
%else
        tl.store(scales + 1, least.to(${number}), mask=recent)
%for byte in range(2)
        found = encoded(v${2 * byte}, step[:, None], least[:, None]) | (encoded(v${2 * byte + 1}, step[:, None], least[:, None]) << 4)
        tl.store(value_place + 2 * dims[None, :] + ${byte}, found, mask=recent[:, None])
%end
%end
        tl.store(staged + row * 2, 0)
        tl.store(staged + row * 2 + 1, 0)
'''

"""The text of the decode kernels; `decode` keeps the clauses that a spec has."""

RENEW_BOUNDS = '''\
@triton.jit
def page_keys(keys, ${"key_scales, recent_keys, staged, groups, " if codes else ""}row, slot, filled, capacity):
    """Key numbers of the page that `slot` lies in; anything at `slot` and where there is none."""
    at = slot // PAGE * PAGE + tl.arange(0, PAGE)
    dims = tl.arange(0, QK_DIM)
    wide = tl.cast(row, tl.int64)
%if codes
    return keys_at(keys, key_scales, recent_keys, staged, row, wide * capacity, wide * groups, at, (at < filled) & (at != slot), dims)
%else
    others = ((at < filled) & (at != slot))[:, None]${qk_guard.replace('qk_dims', 'dims')}
    return tl.load(keys + (wide * capacity + at)[:, None] * ${qk_head_dim} + dims[None, :], mask=others, other=0.0)
%end


@triton.jit
def renew_bounds(bounds, neighbours, row, slot, filled, k, pages):
    """The least and the largest number of each channel, of the keys of the page that `slot` lies in, `k` in its place."""
    page = slot // PAGE
    at = page * PAGE + tl.arange(0, PAGE)
    dims = tl.arange(0, QK_DIM)
    others = ((at < filled) & (at != slot))[:, None]
    old = neighbours.to(tl.float32)
    own = k.to(tl.float32)
    least = tl.minimum(tl.min(tl.where(others, old, float("inf")), 0), own)
    largest = tl.maximum(tl.max(tl.where(others, old, float("-inf")), 0), own)
    ends = bounds + (tl.cast(row, tl.int64) * pages + page) * ${2 * qk_head_dim} + dims
    tl.store(ends, least.to(bounds.dtype.element_ty)${qk_store.replace('qk_dims', 'dims')})
    tl.store(ends + ${qk_head_dim}, largest.to(bounds.dtype.element_ty)${qk_store.replace('qk_dims', 'dims')})
'''

FINISH = '''\
@triton.jit
def finish(
    row, slot, count, position, query, key, value, keys, values, positions, counts, seen, length, part_m, part_l, part_acc, tickets, out,
    ${finish_context}, query_b, query_h, key_b, key_h, value_b, value_h, out_b, out_h, kv_heads, capacity, splits, SPLITS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """The last program of a KV head joins the head's splits with the new token and stores it; that of the last head counts the token.
    What is read is asked for at once, before anything waits."""
    batch = row // kv_heads
    kv_head = row % kv_heads
    batch_wide = tl.cast(batch, tl.int64)
    qk_dims = tl.arange(0, QK_DIM)
    v_dims = tl.arange(0, V_DIM)
%if packed
    bound = starts + batch * (kv_heads + 1) + kv_head
    size = tl.load(bound + 1) - tl.load(bound)
    first_slot = tl.cast(batch, tl.int64) * kv_heads * capacity + tl.load(bound)
%end
    k = tl.load(key + batch_wide * key_b + kv_head * key_h + qk_dims${qk_mask})
    v = tl.load(value + batch_wide * value_b + kv_head * value_h + v_dims${v_mask})
%if page
    neighbours = page_keys(keys, row, slot, tl.minimum(count, capacity), capacity)
%end
    members = tl.arange(0, MEMBERS)
    split_id = tl.arange(0, SPLITS)
    for first in tl.static_range(0, GROUP, MEMBERS):
        member = first + members
        inside = member < GROUP
        held = inside[:, None] & (split_id < splits)[None, :]
        part = (tl.cast(row, tl.int64) * GROUP + member)[:, None] * splits + split_id[None, :]
        # written by other multiprocessors: not from this one's own cache
        m = tl.load(part_m + part, mask=held, other=float("-inf"), cache_modifier=".cg")
        l = tl.load(part_l + part, mask=held, other=0.0, cache_modifier=".cg")
        acc_at = part[:, :, None] * ${v_head_dim} + v_dims[None, None, :]
        acc = tl.load(part_acc + acc_at, mask=held[:, :, None]${v_guard3}, other=0.0, cache_modifier=".cg")
        heads = kv_head * GROUP + member
        query_row = batch_wide * query_b + heads * query_h
        q = tl.load(query + query_row[:, None] + qk_dims[None, :], mask=inside[:, None]${qk_guard}, other=0.0)
        if first == 0:
            if slot >= 0:
                tl.store(positions + ${place} + slot, position)
                tl.store(counts + row, count + 1)
            # the ticket's order says that `position` has been read: the last head changes `seen` only when all heads have
            rows = tl.num_programs(1)
            if tl.atomic_add(tickets + rows, 1, sem="acq_rel") == rows - 1:
                tl.store(tickets + rows, 0)
                for one in tl.range(0, rows // kv_heads):
%if padded
                    tl.store(seen + one, tl.load(seen + one) + tl.where(tl.load(is_token + one * is_token_b) != 0, 1, 0))
%else
                    tl.store(seen + one, tl.load(seen + one) + 1)
%end
                tl.store(length, tl.load(length) + 1)
%if grows
            # there is no room: every output says so from now on
            v = tl.where(count < ${size}, v, float("nan"))
%end
        s = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1)
%if softcap
        s = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%else
        s = s * scale
%end
        s = tl.where(slot >= 0, s, float("-inf"))
        top = tl.maximum(tl.max(m, 1), s)
%if sink_logits
        sink = tl.load(sink_logits + heads, mask=inside, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
%end
        top = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(m - top[:, None])
        own = tl.exp2(s - top)
        total = tl.sum(l * weight, 1) + own
%if sink_logits
        total += tl.exp2(sink - top)
%end
        # a padding token's value may be anything; its weight is 0
        fresh = tl.where(slot >= 0, own[:, None] * v.to(tl.float32)[None, :], 0.0)
        result = (tl.sum(acc * weight[:, :, None], 1) + fresh) / tl.where(total == 0.0, 1.0, total)[:, None]
        out_row = batch_wide * out_b + heads * out_h
        tl.store(out + out_row[:, None] + v_dims[None, :], result.to(out.dtype.element_ty), mask=inside[:, None]${v_guard})
    if slot >= 0:
%if page
        renew_bounds(bounds, neighbours, row, slot, tl.minimum(count, capacity), k, pages)
%end
        place = ${place} + slot
        tl.store(keys + place * ${qk_head_dim} + qk_dims, k${qk_store})
        tl.store(values + place * ${v_head_dim} + v_dims, v${v_store})
'''

SPLIT = '''\
@triton.jit
def split(
    ${split_parameters},
):
    """One program folds one split of one KV head's slots into a softmax of its own, for all query heads of the group.

    The slot that the new token is about to take is left out: `${"finish" if fused else "combine"}` adds that token and writes it, after
    every read is done.
    """
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
%if fused
    position = tl.load(seen + batch)
%end
%if page
    # tiles of a list go round the splits, so that none has to know how long the list is before it asks for its first pages
%if early
    # programs come while those that choose are still at work
    tl.extra.cuda.gdc_wait()
%end
    extent = tl.load(chosen + row) * PAGE
    row_listed = listed + tl.cast(row, tl.int64) * most
    begin = split_id * KEYS
    stride = splits * KEYS
%end
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
    end = extent
%elif whole
    # a short cache is read whole: no load of keys waits for the count; empty slots hold zeros
    extent = capacity
%else
    # splits share what is filled, not the capacity: a quarter full cache must cost a quarter
    extent = filled
%end
%if not page
    split_len = tl.cdiv(tl.cdiv(extent, KEYS), splits) * KEYS
    begin = split_id * split_len
    end = tl.minimum(begin + split_len, extent)
%end
%if not fused
    if split_id == 0:
        tl.store(slots + row, ${"tl.where(stores != 0, count, -1)" if grows else "slot"})
        if stores != 0:
            tl.store(positions + ${place} + slot, tl.load(seen + batch))
%end

    members = tl.arange(0, ROWS)
    heads = kv_head * GROUP + members
    qk_dims = tl.arange(0, QK_DIM)
    v_dims = tl.arange(0, V_DIM)
    query_row = tl.cast(batch, tl.int64) * query_b + heads * query_h
    inside = members < GROUP
    q = tl.load(query + query_row[:, None] + qk_dims[None, :], mask=inside[:, None]${qk_guard}, other=0.0)
%if rotate_sinks
    rotated_row = (tl.cast(batch, tl.int64) * kv_heads * GROUP + heads) * ${qk_head_dim}
    q_rotated = tl.load(rotated + rotated_row[:, None] + qk_dims[None, :], mask=inside[:, None]${qk_guard}, other=0.0)
%end
    key_head = keys + ${place} * ${qk_head_dim}
    value_head = values + ${place} * ${v_head_dim}
    offsets = tl.arange(0, KEYS)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_DIM], tl.float32)
    for first in tl.range(begin, end, ${"stride" if page else "KEYS"}):
        at = first + offsets
        readable = at < end
%if page
        at = tl.load(row_listed + at // PAGE, mask=at // PAGE < most, other=0) * PAGE + at % PAGE
        readable = readable & (at < filled)
%end
        k = tl.load(key_head + at[:, None] * ${qk_head_dim} + qk_dims[None, :], mask=readable[:, None]${qk_guard}, other=0.0)
        v = tl.load(value_head + at[:, None] * ${v_head_dim} + v_dims[None, :], mask=readable[:, None]${v_guard}, other=0.0)
        s = tl.dot(q, tl.trans(k)${precision})
%if rotate_sinks
        ${"if tl.min(at, 0) < sinks:" if page else "if first < sinks:"}
            s = tl.where((at < sinks)[None, :], tl.dot(q_rotated, tl.trans(k)${precision}), s)
%end
%if softcap
        # cap * tanh(scale * s / cap) in units of log2; tanh(y) = 1 - 2 / (1 + exp(2y))
        s = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%else
        s = s * scale
%end
        s = tl.where((readable${" & (at < filled)" if whole else ""} & (at != slot))[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None]${precision})
        m = m_new
    part = (tl.cast(row, tl.int64) * GROUP + members) * splits + split_id
    tl.store(part_m + part, m, mask=inside)
    tl.store(part_l + part, l, mask=inside)
    tl.store(part_acc + part[:, None] * ${v_head_dim} + v_dims[None, :], acc, mask=inside[:, None]${v_guard})
%if fused
    # all threads have written before one of them takes the ticket, whose order makes that visible to the program with the last one
    tl.debug_barrier()
    if tl.atomic_add(tickets + row, 1, sem="acq_rel") == splits - 1:
        tl.store(tickets + row, 0)
        finish(
            row, slot, count, position, query, key, value, keys, values, positions, counts, seen, length, part_m, part_l, part_acc, tickets, out,
            ${finish_context}, query_b, query_h, key_b, key_h, value_b, value_h, out_b, out_h, kv_heads, capacity, splits, SPLITS, MEMBERS,
        )
%end
'''

COMBINE = '''\
@triton.jit
def combine(
    ${combine_parameters},
):
    """One program joins the splits of one query head with the new token; the group's first one stores that token."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    batch = row // kv_heads
    kv_head = row % kv_heads
%if packed
    bound = starts + batch * (kv_heads + 1) + kv_head
    size = tl.load(bound + 1) - tl.load(bound)
    first_slot = tl.cast(batch, tl.int64) * kv_heads * capacity + tl.load(bound)
%end
    slot = tl.load(slots + row)
    qk_dims = tl.arange(0, QK_DIM)
    v_dims = tl.arange(0, V_DIM)
    batch_wide = tl.cast(batch, tl.int64)
    k = tl.load(key + batch_wide * key_b + kv_head * key_h + qk_dims${qk_mask})
    v = tl.load(value + batch_wide * value_b + kv_head * value_h + v_dims${v_mask})
%if grows
    # there is no room: every output says so from now on
    v = tl.where(slot < ${size}, v, float("nan"))
    slot = tl.minimum(slot, ${size} - 1)
%end
    q = tl.load(query + batch_wide * query_b + (kv_head * GROUP + head) * query_h + qk_dims${qk_mask})
    s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 0)
%if softcap
    s = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%else
    s = s * scale
%end
    s = tl.where(slot >= 0, s, float("-inf"))

    split_id = tl.arange(0, SPLITS)
    held = split_id < splits
    part = (tl.cast(row, tl.int64) * GROUP + head) * splits + split_id
    m = tl.load(part_m + part, mask=held, other=float("-inf"))
    l = tl.load(part_l + part, mask=held, other=0.0)
    acc = tl.load(part_acc + part[:, None] * ${v_head_dim} + v_dims[None, :], mask=held[:, None]${v_guard}, other=0.0)
    top = tl.maximum(tl.max(m, 0), s)
%if sink_logits
    sink = tl.load(sink_logits + kv_head * GROUP + head).to(tl.float32) * LOG2E
    top = tl.maximum(top, sink)
%end
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(m - top)
    own = tl.exp2(s - top)
    total = tl.sum(l * weight, 0) + own
%if sink_logits
    total += tl.exp2(sink - top)
%end
    # a padding token's value may be anything; its weight is 0
    result = tl.sum(acc * weight[:, None], 0) + tl.where(slot >= 0, own * v.to(tl.float32), 0.0)
    result = result / tl.where(total == 0.0, 1.0, total)
    out_row = batch_wide * out_b + (kv_head * GROUP + head) * out_h
    tl.store(out + out_row + v_dims, result.to(out.dtype.element_ty)${v_store})

    if head == 0:
        if slot >= 0:
%if page
            stored = tl.minimum(tl.load(counts + row), capacity)
            neighbours = page_keys(keys, ${"key_scales, recent_keys, staged, groups, " if codes else ""}row, slot, stored, capacity)
            renew_bounds(bounds, neighbours, row, slot, stored, k, pages)
%end
%if codes
            # as it came, until its group of slots is full
            place = tl.cast(row, tl.int64) * 64 + slot % 64
            tl.store(recent_keys + place * ${qk_head_dim} + qk_dims, k)
            tl.store(recent_values + place * ${v_head_dim} + v_dims, v)
            if tl.load(staged + row * 2) == tl.load(staged + row * 2 + 1):
                tl.store(staged + row * 2, slot)
            tl.store(staged + row * 2 + 1, slot + 1)
%else
            place = ${place} + slot
            tl.store(keys + place * ${qk_head_dim} + qk_dims, k${qk_store})
            tl.store(values + place * ${v_head_dim} + v_dims, v${v_store})
%end
            tl.store(counts + row, tl.load(counts + row) + 1)
            if kv_head == 0:
                tl.store(seen + batch, tl.load(seen + batch) + 1)
        if row == 0:
            tl.store(length, tl.load(length) + 1)
'''

"""The text of the kernels that write rows without a visible key; `backends.attention.empty_rows_triton` keeps the clauses that a spec has."""

SUMS = '''\
@triton.jit
def sums(
    ${sums_parameters},
):
    """One program sums one split of a KV head's values, where a row of its group sees no key."""
    split_id = tl.program_id(0)
    row = tl.program_id(1)  # batch row and KV head
    if tl.load(wanted + row) != 0:
        head = value + tl.cast(row // kv_heads, tl.int64) * value_b + tl.cast(row % kv_heads, tl.int64) * value_h
        dims = tl.arange(0, DIM)
        offsets = tl.arange(0, KEYS)
        begin = split_id * split_len
        end = tl.minimum(begin + split_len, key_len)
        total = tl.zeros([KEYS, DIM], tl.float32)
        for first in tl.range(begin, end, KEYS):
            at = first + offsets
            tile = head + at.to(tl.int64)[:, None] * value_n + dims[None, :]
            total += tl.load(tile, mask=(at < end)[:, None]${guard}, other=0.0).to(tl.float32)
        tl.store(parts + (tl.cast(row, tl.int64) * splits + split_id) * DIM + dims, tl.sum(total, 0))
'''

WRITE = '''\
@triton.jit
def write(
    ${write_parameters},
):
    """One program writes the rows of one tile that see no key."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1)  # batch row and query head
    hit = tl.load(empty + tl.cast(row, tl.int64) * query_len + index, mask=index < query_len, other=0) != 0
    if tl.sum(hit.to(tl.int32)) > 0:
        dims = tl.arange(0, DIM)
        batch = row // heads
        out_head = out + tl.cast(batch, tl.int64) * out_b + tl.cast(row % heads, tl.int64) * out_h
%if form == "nan"
        held = tl.full([ROWS, DIM], float("nan"), tl.float32)
%elif form == "mean"
        total = tl.zeros([DIM], tl.float32)
        for split_id in tl.range(0, splits):
            total += tl.load(parts + (tl.cast(row // GROUP, tl.int64) * splits + split_id) * DIM + dims)
        held = tl.broadcast_to((total / key_len)[None, :], [ROWS, DIM])
%else
        # scores are lost beside what biases and the mask add: a softmax without a product
        kv_head = tl.cast(row % heads // GROUP, tl.int64)
        value_head = value + tl.cast(batch, tl.int64) * value_b + kv_head * value_h
        bias_row = bias + tl.cast(batch, tl.int64) * bias_b + tl.cast(row % heads, tl.int64) * bias_h + index.to(tl.int64) * bias_m
%if hidden
        hidden_row = hidden_bias + tl.cast(batch, tl.int64) * hidden_b + tl.cast(row % heads, tl.int64) * hidden_h
        hidden_row = hidden_row + index.to(tl.int64) * hidden_m
%end
        position = index + ${"tl.load(query_start).to(tl.int32)" if has_start else "key_len - query_len"}
%if segments
        segments_row = segments + tl.cast(batch, tl.int64) * segments_b
        has_segment = (position >= 0) & (position < key_len)
        own = tl.load(segments_row + position, mask=has_segment, other=0)
%end
        offsets = tl.arange(0, KEYS)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for first in tl.range(0, key_len, KEYS):
            at = first + offsets
            present = at < key_len
            held_here = (index < query_len)[:, None] & present[None, :]
            shown = tl.load(bias_row[:, None] + at[None, :], mask=held_here, other=float("-inf"))
%if hidden
            low = tl.load(hidden_row[:, None] + at[None, :], mask=held_here, other=0.0) + lowest
%else
            low = tl.full([ROWS, KEYS], 0.0, tl.float32) + lowest
%end
            seen = (index[:, None] >= 0) & present[None, :]
%if causal
            seen = seen & (at[None, :] <= position[:, None])
%end
%if key_flags
            flag = tl.load(key_flags + tl.cast(batch, tl.int64) * flags_b + at, mask=present, other=0)
            seen = seen & ((flag & 1) != 0)[None, :]
%end
%if windowed
            near = at[None, :] > position[:, None] - window
%if key_flags
            seen = seen & (near | ((flag & 2) != 0)[None, :])
%else
            seen = seen & (near | (at < sinks)[None, :])
%end
%end
%if segments
            other = tl.load(segments_row + at, mask=present, other=0)
            seen = seen & (own[:, None] == other[None, :]) & has_segment[:, None]
%end
            s = tl.where(present[None, :], tl.where(seen, shown, low), float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # a row may have met -inf alone: -inf - -inf is NaN
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp(s - base[:, None])
            shrink = tl.exp(m - base)
            tile = value_head + at.to(tl.int64)[:, None] * value_n + dims[None, :]
            v = tl.load(tile, mask=present[:, None]${guard}, other=0.0)
            l = l * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v${precision})
            m = m_new
        held = acc / l[:, None]
%end
        tile = out_head + index.to(tl.int64)[:, None] * out_m + dims[None, :]
        tl.store(tile, held.to(out.dtype.element_ty), mask=hit[:, None]${guard})
'''

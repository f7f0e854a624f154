"""The text of the kernels that sum what each key gets of some queries' attention; `mass` keeps the clauses that a spec has."""

LOGITS = '''\
@triton.jit
def logits(q, k, at, p, ${context}):
    """Logits of query rows and keys in units of log2; keys at positions above the row's own, or at -1, are hidden."""
    s = tl.dot(q, tl.trans(k)${precision})
%if softcap
    # cap * tanh(scale * s / cap); tanh(y) = 1 - 2 / (1 + exp(2y))
    s = cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * tanh_scale)))
%else
    s = s * scale
%end
    return tl.where((at >= 0)[None, :] & (at[None, :] <= p[:, None]), s, float("-inf"))
'''

ROW_SUMS = '''\
@triton.jit
def row_sums(
    ${row_sums_parameters},
):
    """One program folds one split of a KV head's keys into the softmax sums of one tile of its (head of the group, query) rows."""
    split_id = tl.program_id(0)
    tiles = tl.cdiv(GROUP * query_len, ROWS)
    row = tl.program_id(1) // tiles  # batch row and KV head
    flat = tl.program_id(1) % tiles * ROWS + tl.arange(0, ROWS)
    batch = tl.cast(row // kv_heads, tl.int64)
    inside = flat < GROUP * query_len
    dims = tl.arange(0, DIM)
    own = tl.cast(row, tl.int64) * GROUP * query_len + flat
    q = tl.load(query + own[:, None] * ${head_dim} + dims[None, :], mask=inside[:, None]${guard}, other=0.0)
    p = tl.load(query_positions + batch * query_len + flat % query_len, mask=inside, other=-1)
    key_head = keys + batch * key_b + tl.cast(row % kv_heads, tl.int64) * key_h
    at_head = positions + tl.cast(row, tl.int64) * key_len
    offsets = tl.arange(0, KEYS)
    begin = split_id * split_len
    end = tl.minimum(begin + split_len, key_len)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for first in tl.range(begin, end, KEYS):
        readable = first + offsets < end
        tile = key_head + tl.cast(first, tl.int64) * key_n + offsets[:, None] * key_n + dims[None, :]
        k = tl.load(tile, mask=readable[:, None]${guard}, other=0.0)
        at = tl.load(at_head + first + offsets, mask=readable, other=-1)
        s = logits(q, k, at, p, ${context})
        m_new = tl.maximum(m, tl.max(s, 1))
        # a row may have seen nothing yet: -inf - -inf is NaN
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        m = m_new
    tl.store(part_m + own * splits + split_id, m, mask=inside)
    tl.store(part_l + own * splits + split_id, l, mask=inside)
'''

KEY_SUMS = '''\
@triton.jit
def key_sums(
    ${key_sums_parameters},
):
    """One program sums the weights of one tile of a KV head's keys over the queries, for each head of the group."""
    first = tl.program_id(0) * KEYS
    row = tl.program_id(1)
    batch = tl.cast(row // kv_heads, tl.int64)
    offsets = tl.arange(0, KEYS)
    rows = tl.arange(0, WINDOW)
    dims = tl.arange(0, DIM)
    readable = first + offsets < key_len
    key_head = keys + batch * key_b + tl.cast(row % kv_heads, tl.int64) * key_h
    tile = key_head + tl.cast(first, tl.int64) * key_n + offsets[:, None] * key_n + dims[None, :]
    k = tl.load(tile, mask=readable[:, None]${guard}, other=0.0)
    at = tl.load(positions + tl.cast(row, tl.int64) * key_len + first + offsets, mask=readable, other=-1)
    for member in tl.range(0, GROUP):
        head = tl.cast(row, tl.int64) * GROUP + member
        total = tl.zeros([KEYS], tl.float32)
        for start in tl.range(0, query_len, WINDOW):
            inside = start + rows < query_len
            own = head * query_len + start + rows
            q = tl.load(query + own[:, None] * ${head_dim} + dims[None, :], mask=inside[:, None]${guard}, other=0.0)
            p = tl.load(query_positions + batch * query_len + start + rows, mask=inside, other=-1)
            sums = tl.load(lse + own, mask=inside, other=0.0)
            # a row that sees nothing has no key above -inf either: 0, not NaN
            sums = tl.where(sums == float("-inf"), 0.0, sums)
            total += tl.sum(tl.exp2(logits(q, k, at, p, ${context}) - sums[:, None]), 0)
        tl.store(mass + head * key_len + first + offsets, total, mask=readable)
'''

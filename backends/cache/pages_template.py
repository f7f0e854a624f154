"""The text of the kernels for pages of keys; `pages` keeps the clauses that a spec has."""

BOUNDS = '''\
@triton.jit
def bounds_of(
    ${parameters},
):
    """One program: the least and the largest key number of each channel, of PAGES pages of one KV head."""
    row = tl.program_id(1)  # batch row and KV head
    first = tl.program_id(0) * PAGES
%if since
    if (first + PAGES) * SIZE <= tl.load(since + row):
        return
%end
    page = first + tl.arange(0, PAGES)
    dims = tl.arange(0, DIM)
    slots = tl.cast(row, tl.int64) * capacity
    least = tl.full([PAGES, DIM], float("inf"), tl.float32)
    largest = tl.full([PAGES, DIM], float("-inf"), tl.float32)
    held = tl.zeros([PAGES], tl.int32)
    for i in tl.range(0, SIZE):
        at = page * SIZE + i
        here = tl.load(positions + slots + at, mask=at < capacity, other=-1) >= 0
%if codes
        k = keys_at(keys, key_scales, recent_keys, staged, row, slots, tl.cast(row, tl.int64) * groups, at, here, dims)
%else
        k = tl.load(keys + slots * ${head_dim} + at[:, None] * ${head_dim} + dims[None, :], mask=here[:, None]${guard}, other=0.0).to(tl.float32)
%end
        least = tl.minimum(least, tl.where(here[:, None], k, float("inf")))
        largest = tl.maximum(largest, tl.where(here[:, None], k, float("-inf")))
        held += here.to(tl.int32)
    some = (held > 0)[:, None]
    place = bounds + (tl.cast(row, tl.int64) * pages + page[:, None]) * ${2 * head_dim} + dims[None, :]
%if since
    # what lies wholly below has not changed, and may not be bounds of its keys
    inside = ((page < pages) & ((page + 1) * SIZE > tl.load(since + row)))[:, None]${guard}
%else
    inside = (page < pages)[:, None]${guard}
%end
    tl.store(place, tl.where(some, least, 0.0).to(bounds.dtype.element_ty), mask=inside)
    tl.store(place + ${head_dim}, tl.where(some, largest, 0.0).to(bounds.dtype.element_ty), mask=inside)
'''

SCORE = '''\
@triton.jit
def score(
    ${score_parameters},
):
    """One program bounds the logits of PAGES pages of one KV head: the largest for any query of the group. What is read always is
    infinite, what holds no token minus infinity. The new token is counted as stored."""
    row = tl.program_id(1)  # batch row and KV head
    batch = row // kv_heads
    kv_head = row % kv_heads
    count = tl.load(counts + row)
%if padded
    stores = (tl.load(is_token + batch * is_token_b) != 0).to(tl.int32)
%else
    stores = 1
%end
%if grows
    slot = tl.minimum(count, capacity - 1)
%else
    slot = tl.where(count < pinned, count, pinned + (count - pinned) % (capacity - pinned))
%end
    slot = tl.where(stores != 0, slot, -1)
    filled = tl.minimum(count + stores, capacity)
    newest = tl.load(seen + batch) + stores - 1
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    held = page * SIZE < filled
%if grows
    # the newest tokens lie in the last slots, which are fewer than tokens where a policy has selected
    always = (page * SIZE < always_sinks) | ((page + 1) * SIZE > filled - recent)
%else
    at = page[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    position = tl.load(positions + tl.cast(row, tl.int64) * capacity + at, mask=at < filled, other=-1)
    position = tl.where(at == slot, newest, position)
    always = tl.max(((position >= 0) & ((position < always_sinks) | (position > newest - recent))).to(tl.int32), 1) > 0
%end
%if coded
    # what lies as it came is read with its page
    staged_begin = tl.load(staged + row * 2)
    staged_end = tl.load(staged + row * 2 + 1)
    always = always | ((staged_begin < staged_end) & (page * SIZE < staged_end) & ((page + 1) * SIZE > staged_begin))
%end
    members = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    query_row = tl.cast(batch, tl.int64) * query_b + (kv_head * GROUP + members) * query_h
    q = tl.load(query + query_row[:, None] + dims[None, :], mask=(members < GROUP)[:, None]${guard}, other=0.0)
    place = bounds + (tl.cast(row, tl.int64) * pages + page[:, None]) * ${2 * head_dim} + dims[None, :]
    # of the page of the new token, which is read always, nobody may have said anything yet
    known = (held & ((slot < page * SIZE) | (slot >= (page + 1) * SIZE)))[:, None]${guard}
    least = tl.load(place, mask=known, other=0.0)
    largest = tl.load(place + ${head_dim}, mask=known, other=0.0)
    positive = tl.where(q > 0.0, q, 0.0).to(q.dtype)
    negative = tl.where(q < 0.0, q, 0.0).to(q.dtype)
    highest = tl.dot(positive, tl.trans(largest)${precision}) + tl.dot(negative, tl.trans(least)${precision})
    # what is no number hides nothing
    highest = tl.where(highest == highest, highest, 3e38)
    highest = tl.max(tl.where((members < GROUP)[:, None], highest, float("-inf")), 0)
    highest = tl.minimum(tl.maximum(highest, -3e38), 3e38)
    # one zero
    highest = tl.where(highest == 0.0, 0.0, highest)
    found = tl.where(held, tl.where(always, float("inf"), highest), float("-inf"))
    tl.store(scores + tl.cast(row, tl.int64) * pages + page, found, mask=page < pages)
'''

SCORE_CLUSTERS = '''\
@triton.jit
def nearness(query, means, known, batch, kv_head, query_b, query_h):
    """The largest product of a query of the group with each mean; numbers, with one zero."""
    members = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    query_row = tl.cast(batch, tl.int64) * query_b + (kv_head * GROUP + members) * query_h
    q = tl.load(query + query_row[:, None] + dims[None, :], mask=(members < GROUP)[:, None]${guard}, other=0.0)
    mean = tl.load(means + dims[None, :], mask=known[:, None]${guard}, other=0.0)
    found = tl.dot(q, tl.trans(mean)${precision})
    found = tl.where(found == found, found, 3e38)
    found = tl.max(tl.where((members < GROUP)[:, None], found, float("-inf")), 0)
    found = tl.minimum(tl.maximum(found, -3e38), 3e38)
    return tl.where(found == 0.0, 0.0, found)


@triton.jit
def score_groups(
    ${groups_parameters},
):
    """One program scores PAGES groups of clusters of one KV head by the means of their keys, which lie with the first page of each."""
    row = tl.program_id(1)  # batch row and KV head
    group = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    page = tl.maximum(group * CLUSTERS, first_page)
    some = (page < (group + 1) * CLUSTERS) & (page < tl.load(prepared + row) // SIZE)
    means = bounds + (tl.cast(row, tl.int64) * pages + page[:, None]) * ${2 * head_dim} + ${head_dim}
    found = nearness(query, means, some, row // kv_heads, row % kv_heads, query_b, query_h)
    tl.store(group_scores + tl.cast(row, tl.int64) * groups + group, tl.where(some, found, float("-inf")), mask=group < groups)


@triton.jit
def score_clusters(
    ${score_parameters},
):
    """One program scores PAGES pages of one KV head: clusters by their means, where those of their groups reach the limit. What is no
    cluster is infinite, what holds no token minus infinity. The new token is counted as stored."""
    row = tl.program_id(1)  # batch row and KV head
    batch = row // kv_heads
    count = tl.load(counts + row)
%if padded
    stores = (tl.load(is_token + batch * is_token_b) != 0).to(tl.int32)
%else
    stores = 1
%end
    filled = tl.minimum(count + stores, capacity)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    held = page * SIZE < filled
    cluster = (page >= first_page) & ((page + 1) * SIZE <= tl.load(prepared + row))
%if reach
    near = cluster & (ordered(group_scores + tl.cast(row, tl.int64) * groups, page // CLUSTERS, groups) >= tl.load(limits + row))
%else
    near = cluster
%end
    means = bounds + (tl.cast(row, tl.int64) * pages + page[:, None]) * ${2 * head_dim}
    found = tl.where(near, nearness(query, means, near, batch, row % kv_heads, query_b, query_h), -3e38)
    found = tl.where(held, tl.where(cluster, found, float("inf")), float("-inf"))
    tl.store(scores + tl.cast(row, tl.int64) * pages + page, found, mask=page < pages)
'''

ORDERED = '''\
@triton.jit
def ordered(scores, at, pages):
    """Scores as whole numbers in the same order."""
    bits = tl.load(scores + at, mask=at < pages, other=float("-inf")).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
'''

CHOOSE = '''\
@triton.jit
def choose(
    ${choose_parameters},
):
    """One program lists the pages of one KV head with the highest scores, in order of place; of equal ones the first.

    The score of the last page that is taken is found bit by bit, by counting the pages that reach it.
    """
    row = tl.program_id(0)
    row_scores = scores + tl.cast(row, tl.int64) * pages
    row_listed = listed + tl.cast(row, tl.int64) * most
    lanes = tl.arange(0, LANES)
    infinite = 0x7F800000
    # minus infinity as `ordered` writes it
    nothing = -2139095041
%if single
    keys = ordered(row_scores, lanes, pages)
    always = tl.sum((keys == infinite).to(tl.int32), 0)
    held = tl.sum((keys != nothing).to(tl.int32), 0)
%else
    always = tl.sum(tl.zeros([LANES], tl.int32), 0)
    held = always
    for first in tl.range(0, pages, LANES):
        keys = ordered(row_scores, first + lanes, pages)
        always += tl.sum((keys == infinite).to(tl.int32), 0)
        held += tl.sum((keys != nothing).to(tl.int32), 0)
%end
%if counted
    wanted = number
%else
    wanted = ((tl.cast(held, tl.int64) * number + 999999) // 1000000).to(tl.int32)
%end
    wanted = tl.minimum(always + tl.minimum(wanted, held - always), most)
    least = tl.where(wanted > 0, -2147483648, infinite)
    for i in tl.range(0, 32):
        # the sign first: what is not below 0, then ever smaller steps
        higher = tl.where(i == 0, 0, least + (1 << (31 - tl.maximum(i, 1))))
%if single
        reach = tl.sum((keys >= higher).to(tl.int32), 0)
%else
        reach = tl.sum(tl.zeros([LANES], tl.int32), 0)
        for first in tl.range(0, pages, LANES):
            reach += tl.sum((ordered(row_scores, first + lanes, pages) >= higher).to(tl.int32), 0)
%end
        least = tl.where((wanted > 0) & (reach >= wanted), higher, least)
%if single
    above = tl.sum((keys > least).to(tl.int32), 0)
    equal = (keys == least).to(tl.int32)
    taken = (keys > least) | ((equal > 0) & (tl.cumsum(equal, 0) <= wanted - above))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(row_listed + place, lanes, mask=taken & (place < most))
%else
    above = tl.sum(tl.zeros([LANES], tl.int32), 0)
    for first in tl.range(0, pages, LANES):
        above += tl.sum((ordered(row_scores, first + lanes, pages) > least).to(tl.int32), 0)
    equals = tl.sum(tl.zeros([LANES], tl.int32), 0)
    places = equals
    for first in tl.range(0, pages, LANES):
        keys = ordered(row_scores, first + lanes, pages)
        equal = (keys == least).to(tl.int32)
        taken = (keys > least) | ((equal > 0) & (equals + tl.cumsum(equal, 0) <= wanted - above))
        place = places + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(row_listed + place, first + lanes, mask=taken & (place < most))
        equals += tl.sum(equal, 0)
        places += tl.sum(taken.to(tl.int32), 0)
%end
    tl.store(chosen + row, wanted)
%if limits
    tl.store(limits + row, least)
%end
'''

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
def usable(found):
    """The largest of a group's products [ROWS, PAGES] for each page: numbers, with one zero."""
    found = tl.where(found == found, found, 3e38)  # what is no number hides nothing
    found = tl.max(tl.where((tl.arange(0, ROWS) < GROUP)[:, None], found, float("-inf")), 0)
    found = tl.minimum(tl.maximum(found, -3e38), 3e38)
    return tl.where(found == 0.0, 0.0, found)


@triton.jit(do_not_specialize=[${unspecialised}])
def score(
    ${score_parameters},
):
%if kind == "bounds"
    """One program bounds the logits of PAGES pages of one KV head: the largest for any query of the group. What is read always is
    infinite, what holds no token minus infinity. The new token is counted as stored.
%elif kind == "groups"
    """One program scores PAGES groups of clusters of one KV head by the means of their keys, which lie with the first page of each.
%else
    """One program scores PAGES pages of one KV head: clusters by their means, where those of their groups reach the limit. What is no
    cluster is infinite, what holds no token minus infinity. The new token is counted as stored.
%end
    """
%if early
    tl.extra.cuda.gdc_launch_dependents()
%end
    row = tl.program_id(1)  # batch row and KV head
    batch = row // kv_heads
    members = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    query_row = tl.cast(batch, tl.int64) * query_b + (row % kv_heads * GROUP + members) * query_h
    q = tl.load(query + query_row[:, None] + dims[None, :], mask=(members < GROUP)[:, None]${guard}, other=0.0)
%if kind == "groups"
    group = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    page = tl.maximum(group * CLUSTERS, first_page)
    near = (page < (group + 1) * CLUSTERS) & (page < tl.load(prepared + row) // SIZE)
%else
    count = tl.load(counts + row)
%if padded
    stores = (tl.load(is_token + batch * is_token_b) != 0).to(tl.int32)
%else
    stores = 1
%end
    filled = tl.minimum(count + stores, capacity)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    held = page * SIZE < filled
%end
    ends = bounds + (tl.cast(row, tl.int64) * pages + page[:, None]) * ${2 * head_dim} + dims[None, :]
%if kind == "bounds"
%if grows
    slot = tl.minimum(count, capacity - 1)
%else
    slot = tl.where(count < pinned, count, pinned + (count - pinned) % (capacity - pinned))
%end
    slot = tl.where(stores != 0, slot, -1)
    # of the page of the new token, which is read always, nobody may have said anything yet
    known = (held & ((slot < page * SIZE) | (slot >= (page + 1) * SIZE)))[:, None]${guard}
    least = tl.load(ends, mask=known, other=0.0)
    largest = tl.load(ends + ${head_dim}, mask=known, other=0.0)
%if grows
    # the newest tokens lie in the last slots, which are fewer than tokens where a policy has selected
    always = (page * SIZE < always_sinks) | ((page + 1) * SIZE > filled - recent)
%else
    newest = tl.load(seen + batch) + stores - 1
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
    positive = tl.where(q > 0.0, q, 0.0).to(q.dtype)
    negative = tl.where(q < 0.0, q, 0.0).to(q.dtype)
    found = usable(tl.dot(positive, tl.trans(largest)${precision}) + tl.dot(negative, tl.trans(least)${precision}))
    found = tl.where(held, tl.where(always, float("inf"), found), float("-inf"))
%elif kind == "groups"
    found = tl.where(near, usable(tl.dot(q, tl.trans(tl.load(ends + ${head_dim}, mask=near[:, None]${guard}, other=0.0))${precision})), float("-inf"))
%else
    cluster = (page >= first_page) & ((page + 1) * SIZE <= tl.load(prepared + row))
%if reach
    group = page // CLUSTERS
    looked_at = tl.load(group_scores + tl.cast(row, tl.int64) * group_span + ${lane_of("group", reach, lanes)}, mask=cluster, other=0.0)
    near = cluster & (looked_at >= tl.load(limits + row))
%else
    near = cluster
%end
    found = usable(tl.dot(q, tl.trans(tl.load(ends, mask=near[:, None]${guard}, other=0.0))${precision}))
    found = tl.where(held, tl.where(cluster, tl.where(near, found, -3e38), float("inf")), float("-inf"))
%end
    own = ${"group" if kind == "groups" else "page"}
    tl.store(scores + tl.cast(row, tl.int64) * span + ${lane_of("own", pieces, lanes)}, found, mask=own < ${listed})
'''

CHOOSE = '''\
@triton.jit
def whole(numbers):
    """Numbers as whole numbers in the same order."""
    bits = numbers.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def fraction(wholes):
    """What `whole` takes."""
    return tl.where(wholes < 0, wholes ^ 0x7FFFFFFF, wholes).to(tl.float32, bitcast=True)


@triton.jit
def part_of(row_scores, first, BEGIN: tl.constexpr, COUNT: tl.constexpr, pages):
    """Numbers of pages and their scores [LANES, COUNT], of the pieces from BEGIN on; PIECES neighbours are in one lane, which is a thread's."""
    part = BEGIN + tl.arange(0, COUNT)[None, :]
    lane = tl.arange(0, LANES)[:, None]
    page = first + lane * PIECES + part
    found = tl.load(row_scores + first + part * LANES + lane, mask=page < pages, other=float("-inf"))
    return page, found


@triton.jit
def two_counts(numbers, low, high):
    """For each lane how many numbers reach `low` and, 65536 times as much, `high`."""
    return tl.sum(tl.where(numbers >= low, 1.0, 0.0) + tl.where(numbers >= high, 65536.0, 0.0), 1)


@triton.jit
def summed(counts):
    """`two_counts` of all lanes. The last bits of a number with 2^23 are its whole ones."""
    return tl.sum((counts + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000, 0)


@triton.jit
def higher_and_equal(numbers, low):
    """1 for those above `low`, 65536 for those that are equal."""
    return tl.where(numbers > low, 1, tl.where(numbers == low, 65536, 0))


@triton.jit
def finite_edges(numbers):
    """For each lane the least and the largest of the numbers that are finite."""
    lowest = tl.min(tl.where(numbers == float("-inf"), float("inf"), numbers), 1)
    return lowest, tl.max(tl.where(numbers == float("inf"), float("-inf"), numbers), 1)


@triton.jit
def edges(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit(do_not_specialize=[${unspecialised}])
def choose(
    ${choose_parameters},
):
    """One program lists the pages of one KV head with the highest scores, in order of place; of equal ones the first.

    Between two numbers lies the score of the last page that is taken. Pages that reach either of two others between them are counted, until
    just those reach the lower one that are taken, or there is no other number between them.
    """
    row = tl.program_id(0)
%if early
    # programs of what reads the list come, and wait for this kernel, as this one does for the one that scores
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
%end
%if kind == "groups"
    pages = groups
%end
    row_scores = scores + tl.cast(row, tl.int64) * span
    row_listed = listed + tl.cast(row, tl.int64) * most
    infinity = float("inf")
%if single
%for begin in begins
    page${begin}, s${begin} = part_of(row_scores, 0, ${begin}, ${sizes[begin]}, pages)
%end
    both = two_counts(s0, -3e38, infinity)
    lowest, highest = finite_edges(s0)
%for begin in begins[1:]
    both += two_counts(s${begin}, -3e38, infinity)
    lowest, highest = edges(lowest, highest, *finite_edges(s${begin}))
%end
    found = summed(both)
    held = found & 0xFFFF
    always = found >> 16
    least, largest = tl.reduce((lowest, highest), 0, edges)
%else
    least = infinity
    largest = -infinity
    held = 0
    always = 0
    for first in tl.range(0, pages, SPAN):
        page, s = part_of(row_scores, first, 0, PIECES, pages)
        found = summed(two_counts(s, -3e38, infinity))
        held += found & 0xFFFF
        always += found >> 16
        lowest, highest = finite_edges(s)
        lowest, highest = tl.reduce((lowest, highest), 0, edges)
        least = tl.minimum(least, lowest)
        largest = tl.maximum(largest, highest)
%end
%if counted
    wanted = number
%else
    wanted = ((tl.cast(held, tl.int64) * number + 999999) // 1000000).to(tl.int32)
%end
    wanted = tl.minimum(always + tl.minimum(wanted, held - always), most)
    # `reached` pages reach the lower number, at least as many as are wanted; `passed` the upper one, fewer
    some = wanted > always
    low = tl.where(some, least, infinity)
    high = tl.where(some, fraction(whole(largest) + 1), infinity)
    reached = tl.where(some, held, always)
    passed = tl.where(some, always, 0)
    gap = (whole(high) - whole(low)).to(tl.uint32, bitcast=True)
    by_bits = wanted < 0
    while (reached != wanted) & (gap > 1):
        # thirds of what lies between them, or, where those don't help, of the numbers that can be written
        step = tl.maximum(gap // 3, 1).to(tl.int32, bitcast=True)
        first_third = tl.minimum(tl.maximum(low * ${2 / 3} + high * ${1 / 3}, low), high)
        second_third = tl.minimum(tl.maximum(low * ${1 / 3} + high * ${2 / 3}, low), high)
        first_third = tl.where(by_bits, fraction(whole(low) + step), first_third)
        second_third = tl.where(by_bits, fraction(whole(high) - step), second_third)
%if single
        both = two_counts(s0, first_third, second_third)
%for begin in begins[1:]
        both += two_counts(s${begin}, first_third, second_third)
%end
        found = summed(both)
        reach_first = found & 0xFFFF
        reach_second = found >> 16
%else
        reach_first = 0
        reach_second = 0
        for first in tl.range(0, pages, SPAN):
            page, s = part_of(row_scores, first, 0, PIECES, pages)
            found = summed(two_counts(s, first_third, second_third))
            reach_first += found & 0xFFFF
            reach_second += found >> 16
%end
        between = reached - passed
        upper = reach_second >= wanted
        lower = reach_first < wanted
        low = tl.where(upper, second_third, tl.where(lower, low, first_third))
        reached = tl.where(upper, reach_second, tl.where(lower, reached, reach_first))
        high = tl.where(lower, first_third, tl.where(upper, high, second_third))
        passed = tl.where(lower, reach_first, tl.where(upper, passed, reach_second))
        narrower = (whole(high) - whole(low)).to(tl.uint32, bitcast=True)
        by_bits = (not by_bits) & (narrower > gap // 2) & ((reached - passed) * 2 > between)
        gap = narrower
    # of those that are equal to the lower number so many
    equals = tl.where(reached == wanted, pages, wanted - passed)
%if single
    total = tl.sum(higher_and_equal(s0, low), 1)
%for begin in begins[1:]
    total += tl.sum(higher_and_equal(s${begin}, low), 1)
%end
    # of the lanes before
    before = tl.cumsum(total, 0) - total
%for begin in begins
    own = higher_and_equal(s${begin}, low)
    higher = before[:, None] + tl.cumsum(own, 1) - own
    equal = higher >> 16
    place = (higher & 0xFFFF) + tl.minimum(equal, equals)
    taken = (s${begin} > low) | ((s${begin} == low) & (equal < equals))
    tl.store(row_listed + place, page${begin}, mask=taken & (place < most))
%if begin != begins[-1]
    before += tl.sum(own, 1)
%end
%end
%else
    higher_before = 0
    equal_before = 0
    for first in tl.range(0, pages, SPAN):
        page, s = part_of(row_scores, first, 0, PIECES, pages)
        own = higher_and_equal(s, low)
        total = tl.sum(own, 1)
        higher = (tl.cumsum(total, 0) - total)[:, None] + tl.cumsum(own, 1) - own
        equal = equal_before + (higher >> 16)
        place = higher_before + (higher & 0xFFFF) + tl.minimum(equal, equals)
        taken = (s > low) | ((s == low) & (equal < equals))
        tl.store(row_listed + place, page, mask=taken & (place < most))
        total = tl.sum(total, 0)
        higher_before += total & 0xFFFF
        equal_before += total >> 16
%end
    tl.store(chosen + row, wanted)
%if kind == "groups"
    tl.store(limits + row, low)
%end
'''

"""C++ of the block selection for CPUs; `cpp.py` calls it.

A thread takes the cells of a query block, of as many heads of one KV head as fill its registers, and walks the key blocks that these may
list. A tile of scores lies keys by queries, as in the attention kernel. Of each key block a query cell keeps the highest score and the
exponentials' sum beside it; when all are there, these are brought to one scale, and blocks are chosen. No score is written to memory.
"""

# the struct's fields, in order: C types by name. Strides count entries; a stride of 0 broadcasts. bits_b, segments_b: 1 where batch rows
# have their own, else 0.
FIELDS: dict[str, str] = {
    **dict.fromkeys(("query", "key"), "const float*"),
    **dict.fromkeys(("possible", "forced"), "const uint8_t*"),
    **{name: "int64_t" for table in ("possible", "forced") for name in (f"{table}_b", f"{table}_h")},
    **dict.fromkeys(("batch", "heads", "scored_heads", "kv_heads", "query_len", "key_len", "width", "start"), "int64_t"),
    **dict.fromkeys(("query_cells", "key_cells", "query_blocks", "key_blocks", "stride", "span", "block_size", "causal"), "int64_t"),
    "windows": "const int64_t*",
    **dict.fromkeys(("key_bits", "query_bits"), "const uint8_t*"),
    "bits_b": "int64_t",
    **dict.fromkeys(("row_low", "row_high", "col_low", "col_high"), "const int32_t*"),
    "segments_b": "int64_t",
    **dict.fromkeys(("pool", "peak"), "int64_t"),
    "thresholds": "const double*",
    "share": "int64_t",
    "min_share": "double",
    "counts": "int32_t*",
    "indices": "int16_t*",
    "importances": "float*",
    "threads": "int64_t",
}
# `pool` as numbers
POOLS = {"sum": 0, "max": 1, "row": 2}

TEXT = """
constexpr int64_t COLUMNS = 128;  // query cells that are in hand at once, where one head has fewer
constexpr int64_t SUM = 0, MAX = 1, ROW = 2;

struct Scratch {
    std::vector<float> queries, scores, tops, sums, top, total, mass;
    std::vector<float> order;
    std::vector<std::pair<float, int64_t>> ranked;
    std::vector<uint8_t> broken, kept;
};

struct Tile {  // what is in hand: the cells of a query block, of some heads of one KV head
    const Call& c;
    Scratch& s;
    int64_t b, head, heads, block;  // heads that have an estimate of their own
    int64_t cells, first, rows, wide;  // cells of a block, the first one's number, how many of them exist; columns, padded
    const uint8_t *key_bits, *query_bits;
    const int32_t *row_low, *row_high, *col_low, *col_high;

    int64_t served() const { return c.heads / c.scored_heads; }  // query heads of an estimate
    int64_t window(int64_t h) const { return c.windows ? c.windows[head + h] : 0; }
    int64_t first_position(int64_t cell) const { return cell * c.span + c.start; }
    int64_t last_position(int64_t cell) const { return std::min(cell * c.span + c.stride, c.query_len) - 1 + c.start; }
    const uint8_t* table(const uint8_t* of, int64_t of_b, int64_t of_h, int64_t h) const {
        return of + b * of_b + h * of_h + block * c.key_blocks;
    }
    const uint8_t* possible(int64_t h) const { return table(c.possible, c.possible_b, c.possible_h, h); }
    const uint8_t* forced(int64_t h) const { return table(c.forced, c.forced_b, c.forced_h, h); }
    bool listed(int64_t h, int64_t k) const {  // by one of the query heads of an estimate
        for (int64_t i = 0; i < served(); i++)
            if (possible((head + h) * served() + i)[k]) return true;
        return false;
    }
    bool listed(int64_t k) const {
        for (int64_t h = 0; h < heads; h++)
            if (listed(h, k)) return true;
        return false;
    }
};

static bool visible(const Tile& t, int64_t window, int64_t cell, int64_t k) {
    const Call& c = t.c;
    if (c.causal && k * c.stride > t.last_position(cell)) return false;
    if (t.key_bits && !((t.key_bits[k] & 1) && t.query_bits[cell])) return false;
    if (t.row_low && !(t.row_low[cell] <= t.col_high[k] && t.row_high[cell] >= t.col_low[k])) return false;
    const bool sink = t.key_bits && (t.key_bits[k] & 2);
    return window == 0 || sink || std::min((k + 1) * c.stride, c.key_len) - 1 > t.first_position(cell) - window;
}

// whether every cell that exists sees every key cell; no: perhaps
static bool every(const Tile& t, int64_t begin, int64_t end) {
    const Call& c = t.c;
    const int64_t last = t.first + t.rows - 1;
    if (t.rows < t.cells || (c.causal && (end - 1) * c.stride > t.last_position(t.first))) return false;
    if (c.windows)
        for (int64_t h = 0; h < t.heads; h++)
            if (t.window(h) && std::min((begin + 1) * c.stride, c.key_len) - 1 <= t.first_position(last) - t.window(h)) return false;
    if (t.key_bits) {
        for (int64_t k = begin; k < end; k++)
            if (!(t.key_bits[k] & 1)) return false;
        for (int64_t i = t.first; i <= last; i++)
            if (!t.query_bits[i]) return false;
    }
    if (t.row_low) {
        const int32_t low = *std::max_element(t.row_low + t.first, t.row_low + last + 1);
        const int32_t high = *std::min_element(t.row_high + t.first, t.row_high + last + 1);
        if (low > *std::min_element(t.col_high + begin, t.col_high + end)) return false;
        if (high < *std::max_element(t.col_low + begin, t.col_low + end)) return false;
    }
    return true;
}

// scores[key, query] of hidden pairs become -inf
static void hide(const Tile& t, int64_t begin, int64_t end) {
    float* scores = t.s.scores.data();
    for (int64_t k = begin; k < end; k++)
        for (int64_t h = 0; h < t.heads; h++)
            for (int64_t i = 0; i < t.cells; i++) {
                const int64_t column = h * t.cells + i;
                float& score = scores[(k - begin) * t.wide + column];
                if (i < t.rows && visible(t, t.window(h), t.first + i, k))
                    t.s.broken[column] |= !std::isfinite(score);
                else
                    score = -INFINITE;
            }
}

static void score(const Tile& t, const float* key, int64_t block) {
    const Call& c = t.c;
    const int64_t per_block = c.block_size / c.stride, begin = block * per_block, end = std::min(begin + per_block, c.key_cells);
    const int64_t keys = end - begin, wide = t.wide;
    float *scores = t.s.scores.data(), *tops = t.s.tops.data() + block * wide, *sums = t.s.sums.data() + block * wide;
    product(key + begin * c.width, c.width, 1, t.s.queries.data(), scores, wide, keys, wide, c.width, false);
    const bool whole = every(t, begin, end);
    if (!whole) hide(t, begin, end);
    for (int64_t q = 0; q < wide; q += W) {
        V highest = all(-INFINITE), sum = all(0.0f), faults = all(0.0f);
        for (int64_t k = 0; k < keys; k++) highest = larger(load(scores + k * wide + q), highest);
        if (whole) {
            for (int64_t k = 0; k < keys; k++) faults += load(scores + k * wide + q) * all(0.0f);
            for (int i = 0; i < W; i++)
                if (faults[i] != 0.0f) t.s.broken[q + i] = 1;
        }
        const V base = highest == -INFINITE ? all(0.0f) : highest;
        if (c.peak)
            sum = highest == -INFINITE ? all(0.0f) : all(1.0f);
        else
            for (int64_t k = 0; k < keys; k++) sum += exponential(load(scores + k * wide + q) - base);
        store(tops + q, highest);
        store(sums + q, sum);
    }
    for (int64_t h = 0; h < t.heads; h++)  // what another head lists is nothing to this one
        if (!t.listed(h, block)) {
            std::fill_n(tops + h * t.cells, t.cells, -INFINITE);
            std::fill_n(sums + h * t.cells, t.cells, 0.0f);
        }
}

// sums become shares of each cell's mass
static void share(const Tile& t) {
    const int64_t wide = t.wide, blocks = t.c.key_blocks;
    float *tops = t.s.tops.data(), *sums = t.s.sums.data();
    for (int64_t q = 0; q < wide; q += W) {
        V top = all(-INFINITE), total = all(0.0f);
        for (int64_t k = 0; k < blocks; k++) top = larger(load(tops + k * wide + q), top);
        top = top == -INFINITE ? all(0.0f) : top;
        for (int64_t k = 0; k < blocks; k++) {
            const V mass = load(sums + k * wide + q) * exponential(load(tops + k * wide + q) - top);
            total += mass;
            store(sums + k * wide + q, mass);
        }
        const V part = all(1.0f) / (total == 0.0f ? all(1.0f) : total);
        for (int64_t k = 0; k < blocks; k++) store(sums + k * wide + q, load(sums + k * wide + q) * part);
    }
}

// marks what one cell needs for its own threshold, all that equal the last block included, and what holds the least share of its mass
static void need(const Tile& t, const float* mass, const uint8_t* possible, const uint8_t* forced, double tau) {
    const int64_t blocks = t.c.key_blocks;
    std::vector<float>& order = t.s.order;
    order.clear();
    double before = 0.0, total = 0.0;
    for (int64_t k = 0; k < blocks; k++) {
        if (!possible[k]) continue;
        total += mass[k];
        if (forced[k]) before += mass[k];
        else if (mass[k] > 0.0f) order.push_back(mass[k]);
    }
    const double wanted = tau * total;
    double last = t.c.min_share > 0.0 ? t.c.min_share * total : INFINITE;
    if (order.empty() || !(before < wanted || last < INFINITE)) return;
    if (before < wanted) std::make_heap(order.begin(), order.end());
    for (auto end = order.end(); end != order.begin() && before < wanted; --end) {
        last = std::min(last, double(order.front()));
        before += order.front();
        std::pop_heap(order.begin(), end);
    }
    for (int64_t k = 0; k < blocks; k++) t.s.kept[k] |= possible[k] && !forced[k] && mass[k] > 0.0f && mass[k] >= last;
}

// marks what a query block keeps by its cells' masses together; equal ones go by rising index
static void rank(const Tile& t, const float* mass, const uint8_t* possible, const uint8_t* forced, double tau) {
    const int64_t blocks = t.c.key_blocks;
    auto& ranked = t.s.ranked;
    ranked.clear();
    double before = 0.0, total = 0.0;
    int64_t count = 0, held = 0;
    for (int64_t k = 0; k < blocks; k++) {
        if (!possible[k]) continue;
        count++, total += mass[k];
        if (forced[k]) before += mass[k], held++;
        else ranked.emplace_back(-mass[k], k);
    }
    std::sort(ranked.begin(), ranked.end());
    if (t.c.share >= 0) {
        const int64_t wanted = ((count * t.c.share + (int64_t(1) << 24) - 1) >> 24) - held;
        for (int64_t i = 0; i < std::min(wanted, int64_t(ranked.size())); i++) t.s.kept[ranked[i].second] = 1;
        return;
    }
    for (auto [negative, k] : ranked) {
        if (!(before < tau * total && negative < 0.0f)) break;
        t.s.kept[k] = 1;
        before += -negative;
    }
}

static void list(const Tile& t, int64_t h, int64_t column) {
    const Call& c = t.c;
    const int64_t blocks = c.key_blocks, row = (t.b * c.heads + h) * c.query_blocks + t.block;
    const uint8_t *possible = t.possible(h), *forced = t.forced(h);
    const double tau = c.thresholds[h];
    std::vector<uint8_t>& kept = t.s.kept;
    float *mass = t.s.mass.data(), *told = nullptr;
    const float* sums = t.s.sums.data() + column;
    bool broken = false;
    for (int64_t i = 0; i < t.cells; i++) broken |= t.s.broken[column + i];
    if (c.importances) told = c.importances + row * blocks * (c.pool == ROW ? t.cells : 1);
    kept.assign(forced, forced + blocks);
    const bool whole = broken || (c.share < 0 && tau >= 1.0);
    if (whole) kept.assign(possible, possible + blocks);
    if (c.pool == ROW) {
        for (int64_t i = 0; i < t.rows && (told || !whole); i++) {
            for (int64_t k = 0; k < blocks; k++) mass[k] = sums[k * t.wide + i];
            if (told)
                for (int64_t k = 0; k < blocks; k++) told[i * blocks + k] = t.s.broken[column + i] ? NAN : mass[k];
            if (!whole) need(t, mass, possible, forced, tau);
        }
    } else if (told || !whole) {
        for (int64_t k = 0; k < blocks; k++) {
            mass[k] = 0.0f;
            for (int64_t i = 0; i < t.cells; i++) {
                const float x = sums[k * t.wide + i];
                mass[k] = c.pool == SUM ? mass[k] + x : std::max(mass[k], x);
            }
            if (told) told[k] = broken ? NAN : mass[k];
        }
        if (!whole) rank(t, mass, possible, forced, tau);
    }
    int16_t* indices = c.indices + row * blocks;
    int32_t count = 0;
    for (int64_t k = 0; k < blocks; k++)
        if (kept[k]) indices[count++] = k;
    c.counts[row] = count;
    std::fill(indices + count, indices + blocks, 0);  // places past the count are in range
}

static void choose(const Call& c, Scratch& s, int64_t b, int64_t head, int64_t heads, int64_t block) {
    const int64_t cells = c.block_size / c.span, wide = rounded_up(heads * cells, PANEL), first = block * cells;
    const auto row = [&](auto* of, int64_t varies, int64_t each) { return of ? of + b * varies * each : nullptr; };
    const Tile t{c, s, b, head, heads, block, cells, first, std::min(cells, c.query_cells - first), wide,
                 row(c.key_bits, c.bits_b, c.key_cells), row(c.query_bits, c.bits_b, c.query_cells),
                 row(c.row_low, c.segments_b, c.query_cells), row(c.row_high, c.segments_b, c.query_cells),
                 row(c.col_low, c.segments_b, c.key_cells), row(c.col_high, c.segments_b, c.key_cells)};
    s.queries.assign(c.width * wide, 0.0f);
    s.scores.resize(c.block_size / c.stride * wide);
    s.tops.assign(c.key_blocks * wide, -INFINITE);
    s.sums.assign(c.key_blocks * wide, 0.0f);
    s.broken.assign(wide, 0);
    s.mass.resize(c.key_blocks);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < t.rows; i++) {
            const float* query = c.query + ((b * c.scored_heads + head + h) * c.query_cells + first + i) * c.width;
            pack(query, c.width, s.queries.data(), h * cells + i);
        }
    const float* key = c.key + (b * c.kv_heads + head / (c.scored_heads / c.kv_heads)) * c.key_cells * c.width;
    for (int64_t k = 0; k < c.key_blocks; k++)
        if (t.listed(k)) score(t, key, k);
    share(t);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < t.served(); i++) list(t, (head + h) * t.served() + i, h * cells);
}

extern "C" int sparsify_select_blocks(const Call* call) {
    const Call& c = *call;
    const int64_t group = c.scored_heads / c.kv_heads, cells = c.block_size / c.span;
    const int64_t most = std::min(group, std::max(int64_t(1), COLUMNS / cells)), chunks = (group + most - 1) / most;
    const int64_t each = c.kv_heads * chunks;
    return !spread<Scratch>(c.query_blocks * c.batch * each, c.threads, [&](int64_t i, Scratch& s) {
        const int64_t place = i % (c.batch * each), block = c.query_blocks - 1 - i / (c.batch * each);  // rows with the most keys first
        const int64_t b = place / each, head = place % each / chunks * group + place % chunks * most;
        choose(c, s, b, head, std::min(most, (place % each / chunks + 1) * group - head), block);
    });
}
"""

"""C++ of the attention kernel for CPUs; `cpp.py` calls it.

A thread takes a tile of query rows of one head and walks the key blocks that its list, or causality and window, leave. A tile of scores is
transposed, keys by queries: then queries are packed once a tile and keys never, the softmax's sums run over whole vectors, and a mask
hides pieces of rows. Online softmax after Dao et al. 2022, arXiv:2205.14135.
"""

# the struct's fields, in order: C types by name. Strides count numbers; a stride of 0 broadcasts.
FIELDS: dict[str, str] = {
    **dict.fromkeys(("query", "key", "value"), "const float*"),
    **dict.fromkeys(("output", "lse"), "float*"),
    **{name: "int64_t" for tensor in ("query", "key", "value", "output") for name in (f"{tensor}_b", f"{tensor}_h", f"{tensor}_n")},
    **dict.fromkeys(("lse_b", "lse_h", "batch", "heads", "kv_heads", "query_len", "key_len", "head_dim", "v_head_dim", "start"), "int64_t"),
    **dict.fromkeys(("causal", "sinks", "block_size", "query_blocks", "listed", "threads"), "int64_t"),
    "windows": "const int64_t*",
    "flags": "const uint8_t*",
    "flags_b": "int64_t",
    "segments": "const int64_t*",
    "segments_b": "int64_t",
    "counts": "const int32_t*",
    "indices": "const int32_t*",
    "sink_logits": "const float*",
    "slopes": "const float*",
    "slopes_b": "int64_t",
    "bias": "const float*",
    "bias_b": "int64_t",
    "bias_h": "int64_t",
    "bias_n": "int64_t",
    "scale": "float",
    "softcap": "float",
}

TEXT = """
constexpr int64_t TILE = 128;  // query rows, and keys, that are in hand at once

struct Scratch {
    std::vector<float> queries, scores, keys, values, sums, top, total, factor;
};

struct Tile {  // what is in hand: rows of one head
    const Call& c;
    Scratch& s;
    int64_t b, h, first, rows, wide, pitch, v_wide, position, last;
    const float *key, *value;
    const uint8_t* flags;
    const int64_t* segments;
    int64_t window;
};

enum Seen { NONE, SOME, EVERY };

static Seen seen(const Tile& t, int64_t begin, int64_t end) {
    bool every = true;
    if (t.c.causal) {
        if (begin > t.last) return NONE;
        every &= end - 1 <= t.position;
    }
    if (t.window > 0) {
        bool sink = !t.flags && begin < t.c.sinks;
        if (t.flags)
            for (int64_t k = begin; k < end; k++) sink |= (t.flags[k] & 2) != 0;
        if (!sink && end - 1 <= t.position - t.window) return NONE;
        every &= begin > t.last - t.window;
    }
    if (t.flags) {
        int64_t real = 0;
        for (int64_t k = begin; k < end; k++) real += t.flags[k] & 1;
        if (!real) return NONE;
        every &= real == end - begin;
    }
    if (t.segments) {
        const bool inside = t.position >= 0 && t.last < t.c.key_len;
        int64_t low = INT64_MAX, high = INT64_MIN, least = INT64_MAX, most = INT64_MIN;
        for (int64_t p = std::max(t.position, int64_t(0)); p <= std::min(t.last, t.c.key_len - 1); p++) {
            low = std::min(low, t.segments[p]);
            high = std::max(high, t.segments[p]);
        }
        int64_t equal = 0;
        for (int64_t k = begin; k < end; k++) {
            least = std::min(least, t.segments[k]);
            most = std::max(most, t.segments[k]);
            equal += t.segments[k] == low;
        }
        const bool same = inside && low == high;
        if (least > high || most < low || (same && !equal)) return NONE;
        every &= same && equal == end - begin;
    }
    return every ? EVERY : SOME;
}

// scores[key, query] of hidden pairs become -inf
static void hide(const Tile& t, float* scores, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++) {
        float* row = scores + (k - begin) * t.pitch;
        int64_t low = 0, high = t.rows;  // queries that see the key, as a range
        if (t.c.causal) low = std::max(low, k - t.position);
        const bool sink = t.flags ? (t.flags[k] & 2) != 0 : k < t.c.sinks;
        if (t.window > 0 && !sink) high = std::min(high, k + t.window - t.position);
        if (t.flags && !(t.flags[k] & 1)) high = 0;
        low = std::min(low, t.rows);
        for (int64_t q = 0; q < low; q++) row[q] = -INFINITE;
        for (int64_t q = std::max(high, low); q < t.rows; q++) row[q] = -INFINITE;
        if (t.segments)
            for (int64_t q = low; q < high; q++) {
                const int64_t p = t.position + q;
                if (p < 0 || p >= t.c.key_len || t.segments[p] != t.segments[k]) row[q] = -INFINITE;
            }
    }
}

static void visit(const Tile& t, int64_t begin, int64_t end) {
    const Seen which = seen(t, begin, end);
    if (which == NONE) return;
    const Call& c = t.c;
    const int64_t keys = end - begin, wide = t.wide, pitch = t.pitch, dim = c.head_dim;
    float *scores = t.s.scores.data(), *top = t.s.top.data(), *total = t.s.total.data(), *factor = t.s.factor.data();
    const float* key = t.key + begin * c.key_n;
    int64_t key_n = c.key_n;
    if (key_n != dim) {  // rows far apart fall on the same lines of the cache
        for (int64_t k = 0; k < keys; k++) memcpy(t.s.keys.data() + k * dim, key + k * key_n, dim * sizeof(float));
        key = t.s.keys.data(), key_n = dim;
    }
    product(key, key_n, 1, t.s.queries.data(), scores, pitch, keys, wide, dim, false);
    const float* bias = c.bias ? c.bias + t.b * c.bias_b + t.h * c.bias_h : nullptr;
    const float slope = c.slopes ? c.slopes[t.b * c.slopes_b + t.h] : 0.0f;
    const bool per_key = bias && c.bias_n == 0;
    if (c.softcap > 0 || per_key || c.slopes)
        for (int64_t k = 0; k < keys; k++) {
            // counted from the tile's last row, so that slope * distance is small where weights are large
            const V more = all((per_key ? bias[begin + k] : 0.0f) + slope * float(begin + k - t.last));
            for (float *at = scores + k * pitch, *stop = at + wide; at < stop; at += W) {
                V x = load(at);
                if (c.softcap > 0) x = hyperbolic_tangent(x / all(c.softcap)) * all(c.softcap);
                store(at, x + more);
            }
        }
    if (bias && !per_key)
        for (int64_t q = 0; q < t.rows; q++) {
            const float* of_row = bias + (t.first + q) * c.bias_n + begin;
            for (int64_t k = 0; k < keys; k++) scores[k * pitch + q] += of_row[k];
        }
    if (which == SOME) hide(t, scores, begin, end);
    bool moved = false;
    for (int64_t q = 0; q < wide; q += W) {
        V highest = load(top + q);
        for (int64_t k = 0; k < keys; k++) highest = larger(load(scores + k * pitch + q), highest);
        const V before = load(top + q), base = highest == -INFINITE ? all(0.0f) : highest;
        const V kept = exponential(before - base);
        V sum = load(total + q) * kept;
        for (int64_t k = 0; k < keys; k++) {
            const V weight = exponential(load(scores + k * pitch + q) - base);
            sum += weight;
            store(scores + k * pitch + q, weight);
        }
        store(top + q, highest);
        store(total + q, sum);
        store(factor + q, kept);
        for (int i = 0; i < W; i++) moved |= !(kept[i] == 1.0f);
    }
    float* sums = t.s.sums.data();
    if (moved)
        for (int64_t q = 0; q < t.rows; q++)
            if (factor[q] != 1.0f)
                for (float *at = sums + q * t.v_wide, *stop = at + t.v_wide; at < stop; at += W) store(at, load(at) * all(factor[q]));
    float* values = t.s.values.data();
    for (int64_t k = 0; k < keys; k++) pack_row(t.value + (begin + k) * c.value_n, c.v_head_dim, keys, values, k);
    product(scores, 1, pitch, values, sums, t.v_wide, t.rows, t.v_wide, keys, true);
}

static void attend(const Call& c, Scratch& s, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t block) {
    const int64_t g = h / (c.heads / c.kv_heads), wide = rounded_up(rows, PANEL), v_wide = rounded_up(c.v_head_dim, PANEL);
    s.queries.assign(c.head_dim * wide, 0.0f);
    const int64_t pitch = wide / PANEL % 2 ? wide : wide + PANEL;  // rows a power of two apart fall on the same lines of the cache
    s.scores.resize(TILE * pitch);
    if (c.key_n != c.head_dim) s.keys.resize(TILE * c.head_dim);
    s.values.resize(TILE * v_wide);  // columns past the last are whatever they were: nothing reads their sums
    s.sums.assign(rows * v_wide, 0.0f);
    s.top.assign(wide, -INFINITE);
    s.total.assign(wide, 0.0f);
    s.factor.resize(wide);
    const float* query = c.query + b * c.query_b + h * c.query_h + first * c.query_n;
    for (int64_t q = 0; q < rows; q++) pack(query + q * c.query_n, c.head_dim, s.queries.data(), q);
    for (float& x : s.queries) x *= c.scale;
    const Tile t{c, s, b, h, first, rows, wide, pitch, v_wide, first + c.start, first + c.start + rows - 1,
                 c.key + b * c.key_b + g * c.key_h, c.value + b * c.value_b + g * c.value_h,
                 c.flags ? c.flags + b * c.flags_b : nullptr, c.segments ? c.segments + b * c.segments_b : nullptr,
                 c.windows ? c.windows[h] : 0};
    const auto piece = [&](int64_t begin, int64_t end) {
        for (; begin < end; begin += TILE) visit(t, begin, std::min(begin + TILE, end));
    };
    if (c.counts) {
        const int64_t row = (b * c.heads + h) * c.query_blocks + block;
        for (int64_t i = 0; i < c.counts[row]; i++) {
            const int64_t begin = c.indices[row * c.listed + i] * c.block_size;
            piece(begin, std::min(begin + c.block_size, c.key_len));
        }
    } else {
        piece(0, c.causal ? std::max(int64_t(0), std::min(c.key_len, t.last + 1)) : c.key_len);
    }
    float *output = c.output + b * c.output_b + h * c.output_h + first * c.output_n, *lse = c.lse + b * c.lse_b + h * c.lse_h + first;
    const float shift = c.slopes ? c.slopes[b * c.slopes_b + h] * float(t.last) : 0.0f;
    for (int64_t q = 0; q < rows; q++) {
        float top = s.top[q], total = s.total[q], share = 1.0f;
        const bool nothing = total == 0.0f;
        if (c.sink_logits && !nothing) {
            const float sink = c.sink_logits[h] - shift, above = std::max(top, sink);
            share = std::exp(top - above);
            total = total * share + std::exp(sink - above);
            top = above;
        }
        lse[q] = nothing ? -INFINITE : top + std::log(total) + shift;
        share = nothing ? 0.0f : share / total;
        for (int64_t d = 0; d < c.v_head_dim; d++) output[q * c.output_n + d] = s.sums[q * v_wide + d] * share;
    }
}

extern "C" int sparsify_attention(const Call* call) {
    const Call& c = *call;
    const int64_t block = c.counts ? c.block_size : TILE, tile = std::min(block, TILE);
    const int64_t tiles = (block + tile - 1) / tile, blocks = (c.query_len + block - 1) / block;
    const int64_t each = blocks * tiles;
    return !spread<Scratch>(c.batch * c.heads * each, c.threads, [&](int64_t i, Scratch& s) {
        const int64_t head = i / each, place = each - 1 - i % each;  // rows with the most keys first
        const int64_t first = place / tiles * block + place % tiles * tile;
        const int64_t end = std::min({first + tile, (place / tiles + 1) * block, c.query_len});
        if (first < end) attend(c, s, head / c.heads, head % c.heads, first, end - first, place / tiles);
    });
}
"""

"""What the C++ of every kernel begins with: vectors of whatever width the compiler knows here, products, exponentials, threads."""

# a vector type's arithmetic, comparison and conversion are the compiler's own (GCC and Clang): no intrinsics, any architecture
TEXT = """\
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 12;  // numbers of a vector; rows of a product that stay in registers
#elif defined(__AVX__)
constexpr int W = 8, ROWS = 6;
#else
constexpr int W = 4, ROWS = 8;
#endif
typedef float V __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * W), aligned(4), may_alias));
constexpr int PANEL = 2 * W;  // columns of a product that stay in registers
constexpr float INFINITE = std::numeric_limits<float>::infinity();

static inline V load(const float* at) { return *(const V*)at; }
static inline void store(float* at, V value) { *(V*)at = value; }
// less zero, which compilers leave out: more would turn -0 into 0, and a broadcast from memory into three instructions
static inline V all(float number) { V zero = {}; return number - zero; }
static inline V larger(V a, V b) { return a > b ? a : b; }
static inline int64_t rounded_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// exp of numbers that are not positive: 0 below -87, NaN of NaN. x = n ln 2 + r, and a polynomial in r.
static inline V exponential(V x) {
    const V low = all(-87.0f);
    const I gone = x < low;
    const V y = x < low ? low : x;
    const V shifter = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const V shifted = y * all(1.44269504f) + shifter;
    const V n = shifted - shifter;
    const V r = (y - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
    V p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    const I power = ((I)shifted - 0x4B400000 + 127) << 23;
    return gone ? all(0.0f) : p * (V)power;
}

static inline V hyperbolic_tangent(V x) {
    const V size = x < 0.0f ? -x : x;
    const V e = exponential(size * all(-2.0f));
    const V t = (all(1.0f) - e) / (all(1.0f) + e);
    return x < 0.0f ? -t : t;
}

// C[R, PANEL] = A[R, depth] B[depth, PANEL], or that added to C. A's strides are free; B lies in one piece.
template <int R>
__attribute__((noinline)) static void micro(
    const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc, int64_t depth, bool add) {
    V sum[R][2];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = add ? load(c + i * ldc + j * W) : all(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        const V left = load(b + k * PANEL), right = load(b + k * PANEL + W);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            const V one = all(a[i * row + k * step]);
            sum[i][0] += one * left;
            sum[i][1] += one * right;
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 2; j++) store(c + i * ldc + j * W, sum[i][j]);
}

// C[rows, columns] = A B or += A B; columns a multiple of PANEL. B lies in panels [columns / PANEL, depth, PANEL]: one stays in the nearest
// cache while all rows meet it, where rows a power of two apart would push each other out.
static void product(
    const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc,
    int64_t rows, int64_t columns, int64_t depth, bool add) {
    for (int64_t j = 0; j < columns; j += PANEL, b += depth * PANEL) {
        int64_t i = 0;
        const auto at = [&](auto multiply) { multiply(a + i * row, row, step, b, c + i * ldc + j, ldc, depth, add); };
        // four rows twice keep the arithmetic units as busy as six do, and one or two by themselves do not
        for (; i + ROWS <= rows && !(ROWS == 6 && rows - i == 8); i += ROWS) at(micro<ROWS>);
        for (; i + 4 <= rows; i += 4) at(micro<4>);
        for (; i < rows; i++) at(micro<1>);
    }
}

// Writes `depth` numbers as one column of a matrix in panels.
static void pack(const float* from, int64_t depth, float* panels, int64_t column) {
    float* to = panels + column / PANEL * depth * PANEL + column % PANEL;
    for (int64_t d = 0; d < depth; d++) to[d * PANEL] = from[d];
}

// Writes `columns` numbers as row `at` of a matrix of `depth` rows in panels.
static void pack_row(const float* from, int64_t columns, int64_t depth, float* panels, int64_t at) {
    for (int64_t j = 0; j < columns; j += PANEL, panels += depth * PANEL)
        memcpy(panels + at * PANEL, from + j, std::min(int64_t(PANEL), columns - j) * sizeof(float));
}

// Calls work(index, scratch) for every index in some thread; false where memory ran out.
template <class Scratch, class Work>
static bool spread(int64_t count, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> enough{true};
    auto run = [&] {
        try {
            Scratch scratch;
            for (int64_t i; enough && (i = next++) < count;) work(i, scratch);
        } catch (const std::bad_alloc&) {
            enough = false;
        }
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < std::min(threads, count); i++) others.emplace_back(run);
    } catch (...) {
    }  // fewer threads than were asked for
    run();
    for (auto& other : others) other.join();
    return enough;
}
"""

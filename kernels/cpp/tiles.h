// The building block of every product: a tile of ROWS x 2 vectors of sums, held in registers (Goto & van de Geijn,
// 2008), and the packing of its operands, which puts the numbers that are used together side by side in memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "vectors.h"

// Memory for `size` numbers that begins at a cache line: a vector of it never lies in two lines.
constexpr int64_t LINE = 64;
struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;
static inline Buffer buffer(int64_t size) {
    void* p = std::aligned_alloc(LINE, (std::max<int64_t>(size, 1) * sizeof(float) + LINE - 1) / LINE * LINE);
    if (!p) throw std::bad_alloc();
    return Buffer(static_cast<float*>(p));
}

struct Matrix {  // fp32 or bf16; `row` and `column` are its strides, counted in numbers
    const void* data;
    int64_t rows, width, row, column;
    bool bf16;

    float at(int64_t i, int64_t k) const {
        const int64_t where = i * row + k * column;
        if (!bf16) return static_cast<const float*>(data)[where];
        const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[where]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
};

// Pack W rows of LANES numbers as [LANES][W]; row(i) is a vector.
template <int W, class Row>
static inline __attribute__((always_inline)) void pack_square(const Row& row, float* out) {
    for (int i = 0; i < W; i += LANES) {
        Vec square[LANES]{};
        for (int j = 0; j < std::min(LANES, W - i); j++) square[j] = row(i + j);
        transpose(square);
        for (int j = 0; j < LANES; j++) std::memcpy(out + j * W + i, &square[j], std::min(LANES, W - i) * 4);
    }
}

// Pack rows [first, first + W) and columns [k0, k0 + K) of m, as [K][W]. Past the last row the numbers are 0.
template <int W, bool BF16>
static void pack_as(const Matrix& m, int64_t first, int64_t k0, int64_t K, float* out) {
    const Matrix x{m.data, m.rows, m.width, m.row, m.column, BF16};
    const int64_t rows = std::min<int64_t>(W, m.rows - first);
    if (!BF16 && m.row == 1 && rows == W) {  // rows are adjacent in memory already
        const float* from = static_cast<const float*>(m.data) + first + k0 * m.column;
        for (int64_t k = 0; k < K; k++) std::memcpy(out + k * W, from + k * m.column, W * sizeof(float));
        return;
    }
    int64_t start = 0;
    if (!BF16 && m.column == 1 && rows == W) {
        const float* from = static_cast<const float*>(m.data) + first * m.row + k0;
        for (; start + LANES <= K; start += LANES) {
            pack_square<W>([&](int64_t i) { return load(from + i * m.row + start); }, out + start * W);
        }
    }
    constexpr int64_t BLOCK = 16;  // columns at a time: a cache line of each row
    for (int64_t k = start; k < K; k += BLOCK) {
        const int64_t end = std::min(k + BLOCK, K);
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = k; j < end; j++) out[j * W + i] = x.at(first + i, k0 + j);
        }
        for (int64_t i = rows; i < W; i++) {
            for (int64_t j = k; j < end; j++) out[j * W + i] = 0.0f;
        }
    }
}

template <int W>
static void pack(const Matrix& m, int64_t first, int64_t k0, int64_t K, float* out) {
    m.bf16 ? pack_as<W, true>(m, first, k0, K, out) : pack_as<W, false>(m, first, k0, K, out);
}

struct Tile {
    Vec at[ROWS][2];
};

// Write the first `count` rows and `width` columns of a tile to memory, or add them to what is there.
static inline __attribute__((always_inline)) void put(const Tile& t, int64_t count, int64_t width, bool add, float* out,
                                                      int64_t stride) {
    const auto whole = [&](int64_t rows) __attribute__((always_inline)) {
        for (int64_t i = 0; i < rows; i++) {
            for (int half = 0; half < 2; half++) {
                float* to = out + i * stride + half * LANES;
                store(to, add ? load(to) + t.at[i][half] : t.at[i][half]);
            }
        }
    };
    if (width >= PANEL) return count == ROWS ? whole(ROWS) : whole(count);  // a known number stays in registers
    for (int64_t i = 0; i < count; i++) {
        float row[PANEL];
        store(row, t.at[i][0]);
        store(row + LANES, t.at[i][1]);
        float* to = out + i * stride;
        for (int64_t j = 0; j < width; j++) to[j] = add ? to[j] + row[j] : row[j];
    }
}

// t += a b, where a is ROWS x K and b is K x PANEL. b(k, j) is at b[k * PANEL + j]. If the rows of a column of a are
// TOGETHER in memory, a(i, k) is at a[k * stride + i], otherwise at a[i * stride + k].
template <bool TOGETHER>
static inline __attribute__((always_inline)) void add_product(Tile& t, const float* a, int64_t stride, const float* b,
                                                              int64_t K) {
    for (int64_t k = 0; k < K; k++) {
        const Vec b0 = load(b + k * PANEL), b1 = load(b + k * PANEL + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Vec x = splat(TOGETHER ? a[k * stride + i] : a[i * stride + k]);
            t.at[i][0] += x * b0;
            t.at[i][1] += x * b1;
        }
    }
}

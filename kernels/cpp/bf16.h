// Packed operands of either kind, fp32 or bf16. Products of bf16 numbers are summed in fp32. They need half the memory
// and, on processors with AVX512-BF16, run at twice the rate. bf16 numbers are packed in pairs of neighbouring k: one
// 32-bit lane holds both, the one with the smaller k in its lower half.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "tiles.h"

typedef uint32_t Pairs __attribute__((vector_size(LANES * 4)));

// The upper half of the result is x rounded to bf16, ties to even; the lower half is undefined. NaN stays NaN.
template <class Bits, class X>
static inline Bits rounded(X x, Bits bits) {
    const Bits up = bits + 0x7fff + ((bits >> 16) & 1);
    return x == x ? up : bits | 0x400000;
}

static inline Pairs rounded(Vec x) { return rounded(x, (Pairs)x); }

static inline uint32_t pair(float low, float high) {
    uint32_t bits[2];
    const float x[2] = {low, high};
    std::memcpy(bits, x, 8);
    return (rounded(low, bits[0]) >> 16) | (rounded(high, bits[1]) & 0xffff0000u);
}

static inline Pairs pair(Vec low, Vec high) {
#if defined(__AVX512BF16__)
    const auto half = [](Vec x) { return (Pairs)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); };
    return half(low) | (half(high) << 16);
#endif
    return (rounded(low) >> 16) | (rounded(high) & 0xffff0000u);
}

// The pairs of 2 LANES adjacent numbers.
static inline Vec pairs_at(const float* x) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_cvtne2ps_pbh((__m512)load(x + LANES), (__m512)load(x));
#endif
    Pairs p;
    for (int i = 0; i < LANES; i++) p[i] = pair(x[2 * i], x[2 * i + 1]);
    return (Vec)p;
}

static inline Vec pairs_at(const uint16_t* x) {
    Vec v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

// Pack rows [first, first + W) and columns [k0, k0 + K) of m, as [K / 2, rounded up][W] pairs. Past the last row or
// column the numbers are 0.
template <int W>
static void pack_pairs(const Matrix& m, int64_t first, int64_t k0, int64_t K, uint32_t* out) {
    const int64_t rows = std::min<int64_t>(W, m.rows - first), full_pairs = K / 2;
    const float* x = static_cast<const float*>(m.data) + first * m.row + k0 * m.column;
    const auto value = [&](int64_t i, int64_t k) { return i < rows && k < K ? m.at(first + i, k0 + k) : 0.0f; };
    int64_t k = 0;
    if (!m.bf16 && rows == W && m.row == 1) {  // rows are adjacent in memory: two columns make pairs
        for (; k < full_pairs; k++) {
            for (int i = 0; i < W; i += LANES) {
                const int size = (W - i < LANES ? W - i : LANES) * 4;
                Vec low{}, high{};
                std::memcpy(&low, x + 2 * k * m.column + i, size);
                std::memcpy(&high, x + (2 * k + 1) * m.column + i, size);
                const Pairs p = pair(low, high);
                std::memcpy(out + k * W + i, &p, size);
            }
        }
    } else if (rows == W && m.column == 1) {
        const uint16_t* half = static_cast<const uint16_t*>(m.data) + first * m.row + k0;
        for (; k + LANES <= full_pairs; k += LANES) {
            float* to = reinterpret_cast<float*>(out + k * W);
            if (m.bf16) pack_square<W>([&](int64_t i) { return pairs_at(half + i * m.row + 2 * k); }, to);
            else pack_square<W>([&](int64_t i) { return pairs_at(x + i * m.row + 2 * k); }, to);
        }
    }
    for (; k < (K + 1) / 2; k++) {
        for (int64_t i = 0; i < W; i++) out[k * W + i] = pair(value(i, 2 * k), value(i, 2 * k + 1));
    }
}

// Adds the two products of each lane to the sum.
static inline __attribute__((always_inline)) Vec add_pairs(Vec sum, Pairs a, Pairs b) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const Pairs upper = Pairs{} + 0xffff0000u;
    return sum + (Vec)(a << 16) * (Vec)(b << 16) + (Vec)(a & upper) * (Vec)(b & upper);
#endif
}

// t += a b, for a [pairs][ROWS] and b [pairs][PANEL].
static inline __attribute__((always_inline)) void add_product_pairs(Tile& t, const uint32_t* a, const uint32_t* b,
                                                                    int64_t pairs) {
    for (int64_t k = 0; k < pairs; k++) {
        Pairs b0, b1;
        std::memcpy(&b0, b + k * PANEL, sizeof b0);
        std::memcpy(&b1, b + k * PANEL + LANES, sizeof b1);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Pairs x = a[k * ROWS + i] - Pairs{};
            t.at[i][0] = add_pairs(t.at[i][0], x, b0);
            t.at[i][1] = add_pairs(t.at[i][1], x, b1);
        }
    }
}

// --- either kind: fp32, or pairs of bf16 in 32-bit words of the same arrays -------------------------

// The words that K numbers of a row take.
static inline int64_t depth(int64_t K, bool pairs) { return pairs ? (K + 1) / 2 : K; }

template <int W>
static void pack_any(const Matrix& m, int64_t first, int64_t k0, int64_t K, bool pairs, float* out) {
    if (pairs) pack_pairs<W>(m, first, k0, K, reinterpret_cast<uint32_t*>(out));
    else pack<W>(m, first, k0, K, out);
}

// t += a b, for packed operands.
static inline __attribute__((always_inline)) void add_packed(Tile& t, const float* a, const float* b, int64_t K,
                                                             bool pairs) {
    if (pairs) {
        add_product_pairs(t, reinterpret_cast<const uint32_t*>(a), reinterpret_cast<const uint32_t*>(b),
                          depth(K, true));
    } else {
        add_product<true>(t, a, ROWS, b, K);
    }
}

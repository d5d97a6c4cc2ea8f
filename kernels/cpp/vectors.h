// Vectors as wide as the processor's, by means of the compiler's vector extensions. So there are no intrinsics here,
// and the code compiles for any processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;  // a tile takes 24 of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;  // 12 of 16 registers
#else
constexpr int LANES = 4, ROWS = 8;  // 16 of 32 registers (NEON)
#endif
constexpr int PANEL = 2 * LANES;  // the columns of a tile

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));

static inline Vec splat(float x) { return x - Vec{}; }

static inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// The first halves of a and b, or their second halves, interleaved: a0 b0 a1 b1 ...
#if defined(__AVX512F__)
static inline Vec first_halves(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static inline Vec second_halves(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX__)
static inline Vec first_halves(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
static inline Vec second_halves(Vec a, Vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
static inline Vec first_halves(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static inline Vec second_halves(Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Swap rows and columns of the LANES x LANES numbers of `rows`: log2(LANES) perfect shuffles of all numbers.
static inline __attribute__((always_inline)) void transpose(Vec (&rows)[LANES]) {
#pragma GCC unroll 4
    for (int done = 1; done < LANES; done *= 2) {
        Vec next[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = first_halves(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = second_halves(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

// e^x for x <= 0, and 0 for x < -87. With x = n ln 2 + r, it is 2^n times the polynomial of the Cephes library for e^r.
// NaN stays NaN.
static inline Vec exp_(Vec x) {
    const Int small = x < splat(-87.0f);
    const Vec bounded = small ? splat(-87.0f) : x;
    const Vec shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Int power = ((Int)shifted << 23) + (127 << 23);  // the bits of 2^n
    return small ? Vec{} : p * (Vec)power;
}

static inline float exp_(float x) { return std::exp(x); }

static inline Vec max_(Vec a, Vec b) { return a > b ? a : b; }
static inline float max_(float a, float b) { return b > a || b != b ? b : a; }

static inline Vec sigmoid(Vec x) {  // 1 / (1 + e^-x)
    const Int positive = x > 0.0f;
    const Vec e = exp_(positive ? -x : x), inverse = 1.0f / (1.0f + e);
    return positive ? inverse : e * inverse;
}

static inline float sum(Vec v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

static inline float dot(const float* a, const float* b, int64_t n) {
    Vec total{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return sum(total) + rest;
}

static inline float most(Vec v) {
    float largest = v[0];
    for (int lane = 1; lane < LANES; lane++) largest = max_(largest, v[lane]);
    return largest;
}

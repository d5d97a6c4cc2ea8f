// The KV cache of generation: keys and values of texts that grow by one token a step, and attention of one query of
// each text to them. Its speed is limited by the memory that it reads, so the cache may also be bf16, which is half as
// large as fp32. For each slot and head, keys are stored as [block of LANES tokens][d][LANES], so that one vector holds
// the scores of LANES tokens, and values as [token][d].

#pragma once

#include "bf16.h"

typedef uint16_t Half;

static inline float number(float x) { return x; }
static inline float number(Half x) { return Matrix{&x, 1, 1, 1, 1, true}.at(0, 0); }
static inline void set(float& to, float x) { to = x; }
static inline void set(Half& to, float x) { to = Half(pair(x, 0.0f)); }

static inline Vec numbers(const float* from) { return load(from); }
static inline Vec numbers(const Half* from) {
    typedef Half Halves __attribute__((vector_size(LANES * 2)));
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return (Vec)(__builtin_convertvector(h, Pairs) << 16);
}

template <class X>
struct Cache {  // one layer
    X *keys, *values;
    int64_t heads, length, d;  // length: tokens that a slot has room for, a multiple of LANES

    X* keys_of(int64_t slot, int64_t head) const { return keys + (slot * heads + head) * length * d; }
    X* values_of(int64_t slot, int64_t head) const { return values + (slot * heads + head) * length * d; }

    void put(int64_t slot, int64_t head, int64_t at, const float* k, const float* v) const {
        X* to = keys_of(slot, head) + at / LANES * LANES * d + at % LANES;
        for (int64_t i = 0; i < d; i++) set(to[i * LANES], k[i]);
        to = values_of(slot, head) + at * d;
        for (int64_t i = 0; i < d; i++) set(to[i], v[i]);
    }
};

// softmax(q k^T / sqrt(d)) v over `count` tokens. `scores` has room for them, rounded up to whole vectors.
template <class X>
static void one_query(const float* q, const X* keys, const X* values, int64_t count, int64_t d, float* scores,
                      float* out) {
    const float scale = 1 / std::sqrt(float(d));
    Vec top = splat(-1e30f), total{};
    for (int64_t t = 0; t < count; t += LANES) {
        Vec z{};
        for (int64_t i = 0; i < d; i++) z += q[i] * numbers(keys + (t / LANES * d + i) * LANES);
        z *= scale;
        for (int64_t lane = count - t; lane < LANES; lane++) z[lane] = -1e30f;
        store(scores + t, z);
        top = max_(top, z);
    }
    const float m = most(top);
    for (int64_t t = 0; t < count; t += LANES) {
        const Vec e = exp_(load(scores + t) - m);
        store(scores + t, e);
        total += e;
    }
    const float inverse = 1 / sum(total);
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        Vec o[4]{};  // four sums, so that no addition has to wait for the one before
        int64_t t = 0;
        for (; t + 4 <= count; t += 4) {
            for (int k = 0; k < 4; k++) o[k] += scores[t + k] * numbers(values + (t + k) * d + i);
        }
        for (; t < count; t++) o[0] += scores[t] * numbers(values + t * d + i);
        store(out + i, (o[0] + o[1] + (o[2] + o[3])) * inverse);
    }
    for (; i < d; i++) {
        float o = 0;
        for (int64_t t = 0; t < count; t++) o += scores[t] * number(values[t * d + i]);
        out[i] = o * inverse;
    }
}

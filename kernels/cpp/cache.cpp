// Keys and values of texts that grow by a token a step, and one query a text against them: what
// generation does, limited by the memory that it reads: fp32, or bf16 for half as much. For each slot and head,
// keys are [block of LANES tokens][d][LANES], so that LANES scores appear side by side, and values [token][d].

#include "bf16.h"

namespace {

typedef uint16_t Half;

float number(float x) { return x; }
float number(Half x) { return Matrix{&x, 1, 1, 1, 1, true}.at(0, 0); }
void set(float& to, float x) { to = x; }
void set(Half& to, float x) { to = Half(pair(x, 0.0f)); }

Vec numbers(const float* from) { return load(from); }
Vec numbers(const Half* from) {
    typedef Half Halves __attribute__((vector_size(LANES * 2)));
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return (Vec)(__builtin_convertvector(h, Pairs) << 16);
}

template <class X>
struct Cache {  // one layer
    X *keys, *values;
    int64_t heads, length, d;  // length: room for tokens, a multiple of LANES

    X* keys_of(int64_t slot, int64_t head) const { return keys + (slot * heads + head) * length * d; }
    X* values_of(int64_t slot, int64_t head) const { return values + (slot * heads + head) * length * d; }

    void put(int64_t slot, int64_t head, int64_t at, const float* k, const float* v) const {
        X* to = keys_of(slot, head) + at / LANES * LANES * d + at % LANES;
        for (int64_t i = 0; i < d; i++) set(to[i * LANES], k[i]);
        to = values_of(slot, head) + at * d;
        for (int64_t i = 0; i < d; i++) set(to[i], v[i]);
    }
};

// softmax(q k) v over `count` tokens; scores has room for all.
template <class X>
void one_query(const float* q, const X* keys, const X* values, int64_t count, int64_t d, float* scores, float* out) {
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
        Vec o[4]{};  // four sums, so that no addition waits for the one before
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

template <class X>
void fill(const Cache<X>& cache, const float* k, const float* v, const int64_t* lengths, int64_t S, int threads) {
    int64_t start = 0;
    for (int64_t s = 0; s < S; s++) {
#pragma omp parallel for num_threads(threads)
        for (int64_t head = 0; head < cache.heads; head++) {
            for (int64_t t = 0; t < lengths[s]; t++) {
                const int64_t at = ((start + t) * cache.heads + head) * cache.d;
                cache.put(s, head, t, k + at, v + at);
            }
        }
        start += lengths[s];
    }
}

template <class X>
void attend(const Cache<X>& cache, const float* q, const float* k, const float* v, const int64_t* slots,
            const int64_t* lengths, int64_t B, int64_t H, int threads, float* out) {
    const int64_t heads = cache.heads, groups = H / heads, d = cache.d;
#pragma omp parallel num_threads(threads)
    {
        const Buffer scores = buffer(cache.length);
#pragma omp for schedule(dynamic, 4) collapse(2)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t head = 0; head < heads; head++) {
                const int64_t at = (b * heads + head) * d, slot = slots[b];
                cache.put(slot, head, lengths[b], k + at, v + at);
                for (int64_t h = head * groups; h < (head + 1) * groups; h++) {
                    one_query(q + (b * H + h) * d, cache.keys_of(slot, head), cache.values_of(slot, head), lengths[b] + 1, d,
                              scores.get(), out + (b * H + h) * d);
                }
            }
        }
    }
}

}  // namespace

// The beginnings of S texts, packed end to end: k, v (N, heads, d).
extern "C" void cache_fill(void* keys, void* values, const float* k, const float* v, const int64_t* lengths, int64_t S,
                           int64_t heads, int64_t length, int64_t d, int64_t bf16, int64_t threads) {
    if (bf16) fill(Cache<Half>{(Half*)keys, (Half*)values, heads, length, d}, k, v, lengths, S, threads);
    else fill(Cache<float>{(float*)keys, (float*)values, heads, length, d}, k, v, lengths, S, threads);
}

// One more token of B texts, of which `lengths` are there: stored, then attended from. q, out (B, H, d).
extern "C" void cache_attend(void* keys, void* values, const float* q, const float* k, const float* v,
                             const int64_t* slots, const int64_t* lengths, int64_t B, int64_t H, int64_t heads,
                             int64_t length, int64_t d, int64_t bf16, int64_t threads, float* out) {
    if (bf16) {
        attend(Cache<Half>{(Half*)keys, (Half*)values, heads, length, d}, q, k, v, slots, lengths, B, H, threads, out);
    } else {
        attend(Cache<float>{(float*)keys, (float*)values, heads, length, d}, q, k, v, slots, lengths, B, H, threads, out);
    }
}

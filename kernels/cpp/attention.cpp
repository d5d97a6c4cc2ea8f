// Attention within packed texts (../packing.py). A query sees all keys of its segment's parent, and those of its own
// segment up to itself.
//
// One task is one segment and one head of keys. Its keys and values are packed once for all the query heads that share
// them. Only the scores of a few queries exist at a time, in the processor's cache. The backward pass computes them
// again from the log-sum-exp of each query's scores (FlashAttention, 2205.14135).

#include <vector>

#include "bf16.h"

namespace {

constexpr int64_t SCORES = 32 * 1024;  // in one block of queries of the backward pass: 128 KB

// n, rounded up to whole panels.
int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

struct Shape {
    int64_t N, S, H, KV, d;  // tokens, segments, query heads, key heads, width of a head
    bool pairs;              // whether products over d round their operands to bf16
    const int64_t *lengths, *parents;
    std::vector<int64_t> starts, roots;  // where each segment begins; the segments that are roots, and then S

    Shape(int64_t N, int64_t S, int64_t H, int64_t KV, int64_t d, bool pairs, const int64_t* lengths,
          const int64_t* parents)
        : N(N), S(S), H(H), KV(KV), d(d), pairs(pairs), lengths(lengths), parents(parents), starts(S) {
        int64_t start = 0;
        for (int64_t s = 0; s < S; s++) {
            starts[s] = start;
            start += lengths[s];
            if (parents[s] < 0) roots.push_back(s);
        }
        roots.push_back(S);
    }

    int64_t groups() const { return H / KV; }  // query heads that share a head of keys
};

// The keys that a segment sees: P of its parent, then T of its own.
struct Seen {
    int64_t P, T, parent, own;  // how many there are, and the tokens at which they begin

    Seen(const Shape& s, int64_t segment)
        : P(s.parents[segment] < 0 ? 0 : s.lengths[s.parents[segment]]),
          T(s.lengths[segment]),
          parent(P ? s.starts[s.parents[segment]] : 0),
          own(s.starts[segment]) {}

    int64_t all() const { return P + T; }
    int64_t token(int64_t key) const { return key < P ? parent + key : own + key - P; }
};

// Copy one head's rows of x, for the L keys that are seen, to `out` (L, d).
void gather(const float* x, int64_t stride, const Seen& seen, int64_t d, float* out) {
    for (int64_t key = 0; key < seen.all(); key++) std::memcpy(out + key * d, x + seen.token(key) * stride, d * 4);
}

// Pack x (L, d) as [panel of keys][depth][PANEL]: the right operand of a product over d.
void pack_across(const float* x, int64_t L, int64_t d, bool pairs, float* out) {
    const Matrix m{x, L, d, d, 1, false};
    for (int64_t key = 0; key < L; key += PANEL) pack_any<PANEL>(m, key, 0, d, pairs, out + key * depth(d, pairs));
}

// Pack x (L, d), of any stride, as [panel of d][L][PANEL]: the right operand of a product over L.
void pack_along(const float* x, int64_t L, int64_t d, int64_t stride, float* out) {
    for (int64_t first = 0; first < d; first += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, d - first);
        for (int64_t i = 0; i < L; i++) {
            float* to = out + first * L + i * PANEL;
            std::memcpy(to, x + i * stride + first, width * 4);
            std::fill(to + width, to + PANEL, 0.0f);
        }
    }
}

// out = scale x keys^T, a product over d: rows [first, first + ROWS) of x (T, d), and the first `valid` keys, rounded
// up to whole panels. `out` has rows of `wide` columns; `room` holds the packed rows of x.
void product_across(const float* x, int64_t T, int64_t d, int64_t stride, int64_t first, float scale, bool pairs,
                    const float* keys, int64_t valid, float* room, float* out, int64_t wide) {
    pack_any<ROWS>(Matrix{x, T, d, stride, 1, false}, first, 0, d, pairs, room);
    for (int64_t column = 0; column < valid; column += PANEL) {
        Tile t{};
        add_packed(t, room, keys + column * depth(d, pairs), d, pairs);
        for (auto& row : t.at) row[0] *= scale, row[1] *= scale;
        put(t, ROWS, PANEL, false, out + column, wide);
    }
}

// Turn scores z into softmax weights, in place: e^(z - m) for the `visible` keys, 0 from there up to `end`. Returns
// {m, sum}: the largest score, and the sum of the weights, by which they have yet to be divided.
std::pair<float, float> exponentials(float* row, int64_t visible, int64_t end) {
    std::fill(row + visible, row + end, -1e30f);
    Vec top = splat(-1e30f), total{};
    for (int64_t j = 0; j < end; j += LANES) top = max_(top, load(row + j));
    const float m = most(top);
    for (int64_t j = 0; j < end; j += LANES) {
        const Vec e = exp_(load(row + j) - m);
        store(row + j, e);
        total += e;
    }
    return {m, sum(total)};
}

struct Forward {
    const float *q, *k, *v;
    float *out, *lse;  // (N, H, d), (N, H)

    void segment(const Shape& s, int64_t number, int64_t kv) const {
        const Seen seen(s, number);
        const int64_t d = s.d, L = seen.all(), wide = padded(L), query_stride = s.H * d, key_stride = s.KV * d;
        const Buffer rows = buffer(L * d), keys = buffer(wide * d), values = buffer(L * padded(d));
        const Buffer scores = buffer(ROWS * wide), packed = buffer(ROWS * d);
        gather(k + kv * d, key_stride, seen, d, rows.get());
        pack_across(rows.get(), L, d, s.pairs, keys.get());
        gather(v + kv * d, key_stride, seen, d, rows.get());
        pack_along(rows.get(), L, d, d, values.get());
        for (int64_t h = kv * s.groups(); h < (kv + 1) * s.groups(); h++) {
            const float* queries = q + seen.own * query_stride + h * d;
            for (int64_t first = 0; first < seen.T; first += ROWS) {
                const int64_t count = std::min<int64_t>(ROWS, seen.T - first), visible = seen.P + first + count;
                product_across(queries, seen.T, d, query_stride, first, 1 / std::sqrt(float(d)), s.pairs, keys.get(),
                               visible, packed.get(), scores.get(), wide);
                float scale[ROWS];
                for (int64_t i = 0; i < count; i++) {
                    const auto [m, total] =
                        exponentials(scores.get() + i * wide, seen.P + first + i + 1, padded(visible));
                    scale[i] = 1 / total;
                    lse[(seen.own + first + i) * s.H + h] = m + std::log(total);
                }
                for (int64_t at = 0; at < d; at += PANEL) {
                    Tile t{};
                    add_product<false>(t, scores.get(), wide, values.get() + at * L, visible);
                    for (int64_t i = 0; i < count; i++) {
                        t.at[i][0] *= scale[i];
                        t.at[i][1] *= scale[i];
                    }
                    put(t, count, d - at, false, out + (seen.own + first) * query_stride + h * d + at, query_stride);
                }
            }
        }
    }
};

// With scores S = Q K^T / sqrt(d) and output O = P V:
//   P = e^(S - lse), dP = dO V^T, dS = P (dP - delta), where delta is the dot product of each query's dO and O;
//   dQ = dS K, dK = dS^T Q (both / sqrt(d)), dV = P^T dO.
// All of this is done for one block of queries at a time.
struct Backward {
    const float *q, *k, *v, *out, *lse, *d_out;
    float *dq, *dk, *dv;

    void segment(const Shape& s, int64_t number, int64_t kv) const {
        const Seen seen(s, number);
        const int64_t d = s.d, L = seen.all(), wide = padded(L), query_stride = s.H * d, key_stride = s.KV * d;
        const int64_t block = std::max<int64_t>(1, std::min(seen.T + ROWS - 1, SCORES / wide) / ROWS) * ROWS;
        const Buffer rows = buffer(L * d), keys = buffer(wide * d), values = buffer(wide * d);
        const Buffer along = buffer(L * padded(d));  // the keys, as operand of a product over keys
        const Buffer weights = buffer(block * wide), slopes = buffer(block * wide), packed = buffer(ROWS * d);
        const Buffer queries = buffer(block * padded(d)), outs = buffer(block * padded(d));
        gather(v + kv * d, key_stride, seen, d, rows.get());
        pack_across(rows.get(), L, d, s.pairs, values.get());
        gather(k + kv * d, key_stride, seen, d, rows.get());
        pack_across(rows.get(), L, d, s.pairs, keys.get());
        pack_along(rows.get(), L, d, d, along.get());
        const float scale = 1 / std::sqrt(float(d));
        for (int64_t h = kv * s.groups(); h < (kv + 1) * s.groups(); h++) {
            const int64_t offset = seen.own * query_stride + h * d;
            for (int64_t start = 0; start < seen.T; start += block) {
                const int64_t size = std::min(block, seen.T - start), visible = seen.P + start + size;
                for (int64_t first = start; first < start + size; first += ROWS) {
                    const int64_t count = std::min<int64_t>(ROWS, start + size - first), at = (first - start) * wide;
                    float *w = weights.get() + at, *slope = slopes.get() + at;
                    product_across(q + offset, seen.T, d, query_stride, first, scale, s.pairs, keys.get(),
                                   seen.P + first + count, packed.get(), w, wide);
                    product_across(d_out + offset, seen.T, d, query_stride, first, 1.0f, s.pairs, values.get(),
                                   seen.P + first + count, packed.get(), slope, wide);
                    for (int64_t i = 0; i < count; i++) {
                        row(s, seen.own + first + i, h, seen.P + first + i + 1, padded(visible), scale, w + i * wide,
                            slope + i * wide);
                    }
                    for (int64_t panel = 0; panel < d; panel += PANEL) {
                        Tile t{};
                        add_product<false>(t, slope, wide, along.get() + panel * L, seen.P + first + count);
                        put(t, count, d - panel, false, dq + offset + first * query_stride + panel, query_stride);
                    }
                }
                pack_along(q + offset + start * query_stride, size, d, query_stride, queries.get());
                pack_along(d_out + offset + start * query_stride, size, d, query_stride, outs.get());
                to_keys(seen, kv, d, key_stride, size, visible, slopes.get(), wide, queries.get(), dk);
                to_keys(seen, kv, d, key_stride, size, visible, weights.get(), wide, outs.get(), dv);
            }
        }
    }

    // For one query, in place: turn its scores (w) into P, and its dP (slope) into dS / sqrt(d).
    void row(const Shape& s, int64_t token, int64_t h, int64_t visible, int64_t end, float scale, float* w,
             float* slope) const {
        const int64_t at = token * s.H + h;
        const float delta = dot(d_out + at * s.d, out + at * s.d, s.d);
        std::fill(w + visible, w + end, -1e30f);
        std::fill(slope + visible, slope + end, 0.0f);
        for (int64_t j = 0; j < end; j += LANES) {
            const Vec p = exp_(load(w + j) - lse[at]);
            store(w + j, p);
            store(slope + j, p * (load(slope + j) - delta) * scale);
        }
    }

    // Add a^T b to the rows of x that belong to the keys: a (size, keys), b (size, d).
    static void to_keys(const Seen& seen, int64_t kv, int64_t d, int64_t stride, int64_t size, int64_t visible,
                        const float* a, int64_t wide, const float* b, float* x) {
        for (int64_t from = 0; from < visible;) {  // no tile has keys of both the parent and the segment itself
            const int64_t until = from < seen.P ? seen.P : visible, count = std::min<int64_t>(ROWS, until - from);
            float* to = x + seen.token(from) * stride + kv * d;
            for (int64_t panel = 0; panel < d; panel += PANEL) {
                Tile t{};
                add_product<true>(t, a + from, wide, b + panel * size, size);
                put(t, count, d - panel, true, to + panel, stride);
            }
            from += count;
        }
    }
};

}  // namespace

extern "C" void attention(const float* q, const float* k, const float* v, const int64_t* lengths,
                          const int64_t* parents, int64_t N, int64_t S, int64_t H, int64_t KV, int64_t d, int64_t bf16,
                          int64_t threads, float* out, float* lse) {
    const Shape s(N, S, H, KV, d, bf16, lengths, parents);
    const Forward forward{q, k, v, out, lse};
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
    for (int64_t segment = 0; segment < S; segment++) {
        for (int64_t kv = 0; kv < KV; kv++) forward.segment(s, segment, kv);
    }
}

// The caller passes dk and dv as zeros.
extern "C" void attention_backward(const float* q, const float* k, const float* v, const float* out, const float* lse,
                                   const float* d_out, const int64_t* lengths, const int64_t* parents, int64_t N,
                                   int64_t S, int64_t H, int64_t KV, int64_t d, int64_t bf16, int64_t threads,
                                   float* dq, float* dk, float* dv) {
    const Shape s(N, S, H, KV, d, bf16, lengths, parents);
    const Backward backward{q, k, v, out, lse, d_out, dq, dk, dv};
    const int64_t trees = int64_t(s.roots.size()) - 1;  // a root and its children
    // A tree is one task, since all its segments add to the gradients of the root's keys and values.
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
    for (int64_t tree = 0; tree < trees; tree++) {
        for (int64_t kv = 0; kv < KV; kv++) {
            for (int64_t i = s.roots[tree]; i < s.roots[tree + 1]; i++) backward.segment(s, i, kv);
        }
    }
}

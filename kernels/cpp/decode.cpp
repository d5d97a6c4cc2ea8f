// One more token of each of B texts, through all layers of a transformer. See `decoder` in ../reference.py.
//
// All of it is one call and one parallel region. With few rows a step is short, and separate calls and waiting threads
// would take much of its time.

#include "cache.h"

namespace {

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

struct Layer {  // the weights of products are packed; in the order of LayerWeights (../reference.py), then the cache
    const float *attention_norm, *q, *k, *v, *o, *mlp_norm, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *q_norm, *k_norm;  // null where there is none
    void *keys, *values;
};

struct Step {
    int64_t B, D, H, KV, d, F;
    float eps;
    bool pairs;
    const float *cos, *sin;  // (B, d / 2)
    const int64_t *slots, *lengths;
    int64_t room;  // tokens that a slot of the cache has room for

    // What the threads share: rows (B, ...), and the packed left operand of the next product.
    Buffer x, qkv, attended, inner, packed;

    int64_t widest() const { return std::max(std::max(D, H * d), F); }

    static int64_t in_whole_tiles(int64_t rows) { return (rows + ROWS - 1) / ROWS * ROWS; }

    // Pack rows [row, row + ROWS) of m (B, K) as a left operand.
    void pack_tile(const float* m, int64_t K, int64_t row) const {
        pack_any<ROWS>(Matrix{m, B, K, K, 1, false}, row, 0, K, pairs, packed.get() + row * depth(K, pairs));
    }

    // Pack the same rows of x after an RMSNorm with this weight.
    void pack_normed(const float* weight, int64_t row, float* scratch) const {
        for (int64_t b = row; b < std::min(B, row + ROWS); b++) norm(b, weight, scratch + (b - row) * D);
        const Matrix m{scratch, std::min<int64_t>(ROWS, B - row), D, D, 1, false};
        pack_any<ROWS>(m, 0, 0, D, pairs, packed.get() + row * depth(D, pairs));
    }

    void norm(int64_t b, const float* weight, float* out) const {
        const float* row = x.get() + b * D;
        const float inverse = 1 / std::sqrt(dot(row, row, D) / D + eps);
        for (int64_t i = 0; i < D; i++) out[i] = row[i] * inverse * weight[i];
    }

    Tile tile(int64_t row, const float* weight, int64_t column, int64_t K) const {
        Tile t{};
        add_packed(t, packed.get() + row * depth(K, pairs), weight + column * depth(K, pairs), K, pairs);
        return t;
    }

    // Columns [column, column + PANEL) of the packed operand times a weight (N, K). They are written to `out`, or added
    // to it; its rows are `stride` apart.
    void panel(const float* weight, int64_t N, int64_t K, int64_t column, bool add, float* out, int64_t stride) const {
        for (int64_t row = 0; row < B; row += ROWS) {
            put(tile(row, weight, column, K), std::min<int64_t>(ROWS, B - row), N - column, add,
                out + row * stride + column, stride);
        }
    }

    // Columns [column, column + PANEL) of silu(gate) * up.
    void gated_panel(const Layer& layer, int64_t column) const {
        for (int64_t row = 0; row < B; row += ROWS) {
            Tile gate = tile(row, layer.gate, column, D);
            const Tile up = tile(row, layer.up, column, D);
            for (int i = 0; i < ROWS; i++) {
                for (int half = 0; half < 2; half++) gate.at[i][half] *= sigmoid(gate.at[i][half]) * up.at[i][half];
            }
            put(gate, std::min<int64_t>(ROWS, B - row), F - column, false, inner.get() + row * F + column, F);
        }
    }

    // Add a bias to one head, and norm it, if the layer does so; in place.
    void finish_head(const float* bias, const float* weight, float* x) const {
        for (int64_t i = 0; bias && i < d; i++) x[i] += bias[i];
        if (!weight) return;
        const float inverse = 1 / std::sqrt(dot(x, x, d) / d + eps);
        for (int64_t i = 0; i < d; i++) x[i] *= inverse * weight[i];
    }

    // Rotate one head by the angles of row b, in place.
    void rotate_head(int64_t b, float* x) const {
        for (int64_t i = 0; i < d / 2; i++) {
            const float c = cos[b * d / 2 + i], s = sin[b * d / 2 + i], first = x[i], second = x[i + d / 2];
            x[i] = first * c - second * s;
            x[i + d / 2] = second * c + first * s;
        }
    }

    template <class X>
    void attend(const Layer& layer, int64_t b, int64_t head, float* scores) const {
        const Cache<X> cache{static_cast<X*>(layer.keys), static_cast<X*>(layer.values), KV, room, d};
        float* row = qkv.get() + b * (H + 2 * KV) * d;
        float *k = row + (H + head) * d, *v = k + KV * d;
        finish_head(layer.k_bias ? layer.k_bias + head * d : nullptr, layer.k_norm, k);
        finish_head(layer.v_bias ? layer.v_bias + head * d : nullptr, nullptr, v);
        rotate_head(b, k);
        cache.put(slots[b], head, lengths[b], k, v);
        for (int64_t h = head * (H / KV); h < (head + 1) * (H / KV); h++) {
            finish_head(layer.q_bias ? layer.q_bias + h * d : nullptr, layer.q_norm, row + h * d);
            rotate_head(b, row + h * d);
            one_query(row + h * d, cache.keys_of(slots[b], head), cache.values_of(slots[b], head), lengths[b] + 1, d,
                      scores, attended.get() + (b * H + h) * d);
        }
    }

    // One layer, called by all threads of a parallel region. `x` is its input and becomes its output.
    template <class X>
    void layer(const Layer& l, float* scratch) const {
        const int64_t all = (H + 2 * KV) * d, of_q = H * d, of_k = KV * d;
#pragma omp for
        for (int64_t row = 0; row < B; row += ROWS) pack_normed(l.attention_norm, row, scratch);
#pragma omp for
        for (int64_t p = 0; p < panels(of_q) + 2 * panels(of_k); p++) {
            const int64_t k = p - panels(of_q), v = k - panels(of_k);
            if (k < 0) panel(l.q, of_q, D, p * PANEL, false, qkv.get(), all);
            else if (v < 0) panel(l.k, of_k, D, k * PANEL, false, qkv.get() + of_q, all);
            else panel(l.v, of_k, D, v * PANEL, false, qkv.get() + of_q + of_k, all);
        }
#pragma omp for schedule(dynamic, 4) collapse(2)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t head = 0; head < KV; head++) attend<X>(l, b, head, scratch);
        }
#pragma omp for
        for (int64_t row = 0; row < B; row += ROWS) pack_tile(attended.get(), of_q, row);
#pragma omp for
        for (int64_t column = 0; column < D; column += PANEL) panel(l.o, D, of_q, column, true, x.get(), D);
#pragma omp for
        for (int64_t row = 0; row < B; row += ROWS) pack_normed(l.mlp_norm, row, scratch);
#pragma omp for
        for (int64_t column = 0; column < F; column += PANEL) gated_panel(l, column);
#pragma omp for
        for (int64_t row = 0; row < B; row += ROWS) pack_tile(inner.get(), F, row);
#pragma omp for
        for (int64_t column = 0; column < D; column += PANEL) panel(l.down, D, F, column, true, x.get(), D);
    }

    static int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }
};

}  // namespace

// Store the beginnings of S texts, packed end to end, in the cache of one layer: k, v (N, heads, d).
extern "C" void cache_fill(void* keys, void* values, const float* k, const float* v, const int64_t* lengths, int64_t S,
                           int64_t heads, int64_t room, int64_t d, int64_t bf16, int64_t threads) {
    if (bf16) fill(Cache<Half>{(Half*)keys, (Half*)values, heads, room, d}, k, v, lengths, S, threads);
    else fill(Cache<float>{(float*)keys, (float*)values, heads, room, d}, k, v, lengths, S, threads);
}

// From the embeddings x (B, D) of one more token of each text to out (B, D), their hidden states after the last norm.
// Their keys and values are stored in the cache.
extern "C" void decode(const float* x, const Layer* layers, int64_t count, const float* norm, const float* cos,
                       const float* sin, const int64_t* slots, const int64_t* lengths, int64_t B, int64_t D, int64_t H,
                       int64_t KV, int64_t d, int64_t F, float eps, int64_t room, int64_t bf16_cache, int64_t pairs,
                       int64_t threads, float* out) {
    Step s{B, D, H, KV, d, F, eps, bool(pairs), cos, sin, slots, lengths, room, {}, {}, {}, {}, {}};
    s.x = buffer(B * D);
    s.qkv = buffer(B * (H + 2 * KV) * d);
    s.attended = buffer(B * H * d);
    s.inner = buffer(B * F);
    s.packed = buffer(Step::in_whole_tiles(B) * depth(s.widest(), pairs));
    std::copy(x, x + B * D, s.x.get());
#pragma omp parallel num_threads(threads)
    {
        const Buffer scratch = buffer(std::max(ROWS * D, room));  // of each thread: rows after a norm, or scores
        for (int64_t i = 0; i < count; i++) {
            if (bf16_cache) s.layer<Half>(layers[i], scratch.get());
            else s.layer<float>(layers[i], scratch.get());
        }
#pragma omp for
        for (int64_t b = 0; b < B; b++) s.norm(b, norm, out + b * D);
    }
}

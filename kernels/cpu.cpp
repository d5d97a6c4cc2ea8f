// Kernels for CPUs: the head's, and matrix products. See reference.py for what each function means, cpu.py for who calls it.
//
// The head's are all one matrix product, logits = hidden weight^T, whose results are used up where they
// appear: in registers. No N x V array exists. The product is the classical one (Goto & van de Geijn,
// 2008): a tile of ROWS x 2 vectors of accumulators, hidden packed once as [tile][D][ROWS], weight
// packed chunk by chunk as [panel][D][2 vectors] by the thread that multiplies with it. Each of the
// LANES vector lanes keeps an online softmax of its own (Milakov & Gimelshein, 1805.02867); lanes,
// chunks and threads are merged at the end. Inputs are fp32 or bf16, everything else is fp32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;  // 24 of 32 registers accumulate
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;  // 12 of 16
#else
constexpr int LANES = 4, ROWS = 8;  // 16 of 32 (NEON)
#endif
constexpr int PANEL = 2 * LANES;         // columns of a tile
constexpr int CHUNK_BYTES = 512 * 1024;  // packed weights that a core's own cache holds
constexpr float NEVER = -1e30f;          // the logit of a column that does not exist

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));

static inline Vec splat(float x) { return x - Vec{}; }

// e^x for x <= 0, 0 below -87: Cephes' polynomial after x = n ln 2 + r. NaN stays NaN.
static inline Vec exp_(Vec x) {
    const Int small = x < splat(-87.0f);
    const Vec bounded = small ? splat(-87.0f) : x;
    const Vec shifted = bounded * 1.44269504f + 12582912.0f;  // + 1.5 * 2^23 rounds to an integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Int power = ((Int)shifted << 23) + (127 << 23);  // 2^n, bit by bit
    return small ? Vec{} : p * (Vec)power;
}

static inline Vec max_(Vec a, Vec b) { return a > b ? a : b; }

// --- packing ------------------------------------------------------------------------------------

struct Matrix {  // rows x width, row-major, fp32 or bf16
    const void* data;
    int64_t rows, width;
    bool bf16;

    float at(int64_t row, int64_t column) const {
        if (!bf16) return static_cast<const float*>(data)[row * width + column];
        const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[row * width + column]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
};

// Rows [first, first + count) of m times scale, transposed to [width][count]; rows past the end are 0.
template <bool BF16>
static void transpose(const Matrix& m, int64_t first, int count, float scale, float* out) {
    constexpr int64_t BLOCK = 16;  // columns at a time: a cache line of each row
    for (int64_t k0 = 0; k0 < m.width; k0 += BLOCK) {
        const int64_t k1 = std::min(k0 + BLOCK, m.width);
        for (int i = 0; i < count; i++) {
            const int64_t row = first + i;
            if (row >= m.rows) {
                for (int64_t k = k0; k < k1; k++) out[k * count + i] = 0.0f;
            } else {
                for (int64_t k = k0; k < k1; k++) {
                    out[k * count + i] = Matrix{m.data, m.rows, m.width, BF16}.at(row, k) * scale;
                }
            }
        }
    }
}

static void transpose(const Matrix& m, int64_t first, int count, float scale, float* out) {
    m.bf16 ? transpose<true>(m, first, count, scale, out) : transpose<false>(m, first, count, scale, out);
}

using Buffer = std::unique_ptr<float[]>;
static Buffer buffer(int64_t size) { return Buffer(new float[std::max<int64_t>(size, 1)]); }

static Buffer pack_hidden(const Matrix& hidden, float scale, int threads) {
    const int64_t tiles = (hidden.rows + ROWS - 1) / ROWS;
    Buffer packed = buffer(tiles * ROWS * hidden.width);
    float* out = packed.get();
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < tiles; tile++) {
        transpose(hidden, tile * ROWS, ROWS, scale, out + tile * ROWS * hidden.width);
    }
    return packed;
}

// --- the product ----------------------------------------------------------------------------------

struct Tile {
    Vec at[ROWS][2];
};

// ROWS x PANEL logits; a [D][ROWS], b [D][PANEL].
static inline __attribute__((always_inline)) Tile product(const float* a, const float* b, int64_t D) {
    Tile t{};
    for (int64_t k = 0; k < D; k++) {
        Vec b0, b1;
        std::memcpy(&b0, b + k * PANEL, sizeof b0);
        std::memcpy(&b1, b + k * PANEL + LANES, sizeof b1);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Vec x = splat(a[k * ROWS + i]);
            t.at[i][0] += x * b0;
            t.at[i][1] += x * b1;
        }
    }
    return t;
}

// Give the columns from `valid` on the logit NEVER.
static inline void cut(Tile& t, int64_t valid) {
    for (int half = 0; half < 2; half++) {
        for (int lane = 0; lane < LANES; lane++) {
            if (half * LANES + lane >= valid) {
                for (int i = 0; i < ROWS; i++) t.at[i][half][lane] = NEVER;
            }
        }
    }
}

struct Chunks {  // how V columns are shared out: `count` chunks of `size` columns, whole panels
    int64_t size, count;

    Chunks(int64_t V, int64_t D, int threads) {
        const int64_t cached = CHUNK_BYTES / (4 * std::max<int64_t>(D, 1)) / PANEL * PANEL;
        const int64_t fair = (V / (4 * threads) + PANEL) / PANEL * PANEL;  // four chunks a thread or more
        size = std::max<int64_t>(PANEL, std::min(cached, fair));
        count = (V + size - 1) / size;
    }
};

static void pack_weight(const Matrix& weight, int64_t first, int64_t panels, float* out) {
    for (int64_t p = 0; p < panels; p++) transpose(weight, first + p * PANEL, PANEL, 1.0f, out + p * PANEL * weight.width);
}

// --- the online softmax -----------------------------------------------------------------------------

// For one distribution: max m, s = sum e^(z - m), b = sum e^(z - m) (z - m).
// With a reference r: b = sum e^(z - m) ((z - m) - (r - rm)) instead, and a second b for the entropy.
template <class X>
struct State {
    X m, s, b;  // the policy's: b as for one distribution
    X rm, rs, d;  // the reference's; d = sum e^(z - m) ((z - m) - (r - rm))
};

template <class X>
static inline State<X> nothing(X zero) {
    return {zero + NEVER, zero, zero, zero + NEVER, zero, zero};
}

static inline float max_(float a, float b) { return b > a || b != b ? b : a; }
static inline float exp_(float x) { return std::exp(x); }

// Move the maxima up to m and rm.
template <bool REF, class X>
static inline void raise(State<X>& a, X m, X rm) {
    const X up = m - a.m, scale = exp_(-up);
    a.b = scale * (a.b - up * a.s);
    if (REF) {
        const X rup = rm - a.rm;
        a.d = scale * (a.d - (up - rup) * a.s);
        a.rs = exp_(-rup) * a.rs;
        a.rm = rm;
    }
    a.s = scale * a.s;
    a.m = m;
}

template <bool REF, class X>
static inline void merge(State<X>& a, State<X> b) {
    const X m = max_(a.m, b.m), rm = REF ? max_(a.rm, b.rm) : a.rm;
    raise<REF>(a, m, rm);
    raise<REF>(b, m, rm);
    a.s += b.s;
    a.b += b.b;
    if (REF) {
        a.d += b.d;
        a.rs += b.rs;
    }
}

// One more logit a lane. e^-|z - m| serves as the new term or as the old sum's scale, whichever is not 1.
template <bool REF>
static inline __attribute__((always_inline)) void add(State<Vec>& a, Vec z, Vec r) {
    const Vec gap = z - a.m;
    const Int above = gap > 0.0f;
    const Vec one = splat(1.0f), x = exp_(above ? -gap : gap);
    const Vec scale = above ? x : one, term = above ? one : x;
    const Vec up = above ? gap : Vec{}, below = gap - up;  // z - (new m)
    a.b = scale * (a.b - up * a.s) + term * below;
    if (REF) {
        const Vec rgap = r - a.rm;
        const Int rabove = rgap > 0.0f;
        const Vec rx = exp_(rabove ? -rgap : rgap), rup = rabove ? rgap : Vec{};
        a.d = scale * (a.d - (up - rup) * a.s) + term * (below - (rgap - rup));
        a.rs = (rabove ? rx : one) * a.rs + (rabove ? one : rx);
        a.rm = rabove ? r : a.rm;
    }
    a.s = scale * a.s + term;
    a.m = above ? z : a.m;
}

template <bool REF>
static State<float> over_lanes(const State<Vec>& v) {
    State<float> all = nothing(0.0f);
    for (int lane = 0; lane < LANES; lane++) {
        merge<REF>(all, {v.m[lane], v.s[lane], v.b[lane], v.rm[lane], v.rs[lane], v.d[lane]});
    }
    return all;
}

// --- token log-probs, entropy, KL ---------------------------------------------------------------------

struct Side {  // one model
    Matrix hidden, weight;
    Buffer packed;
};

template <bool REF>
static void sweep(Side* sides, const int64_t* targets, State<float>* rows, float* picked, int threads) {
    const int64_t N = sides[0].hidden.rows, V = sides[0].weight.rows, D = sides[0].hidden.width;
    const int64_t RD = REF ? sides[1].hidden.width : 0;
    const Chunks chunks(V, D + RD, threads);
    for (int64_t n = 0; n < N; n++) rows[n] = nothing(0.0f);
#pragma omp parallel num_threads(threads)
    {
        std::vector<State<float>> mine(N, nothing(0.0f));
        Buffer weight = buffer(chunks.size * D), ref_weight = buffer(chunks.size * RD);
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
            const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, V);
            const int64_t panels = (last - first + PANEL - 1) / PANEL;
            pack_weight(sides[0].weight, first, panels, weight.get());
            if (REF) pack_weight(sides[1].weight, first, panels, ref_weight.get());
            for (int64_t row = 0; row < N; row += ROWS) {
                const int count = int(std::min<int64_t>(ROWS, N - row));
                State<Vec> lanes[ROWS];
                for (auto& state : lanes) state = nothing(Vec{});
                for (int64_t p = 0; p < panels; p++) {
                    const int64_t column = first + p * PANEL;
                    Tile z = product(sides[0].packed.get() + row * D, weight.get() + p * PANEL * D, D), r;
                    if (REF) r = product(sides[1].packed.get() + row * RD, ref_weight.get() + p * PANEL * RD, RD);
                    if (last - column < PANEL) {
                        cut(z, last - column);
                        if (REF) cut(r, last - column);
                    }
                    for (int i = 0; i < count; i++) {
                        const int64_t at = targets[row + i] - column;
                        if (at >= 0 && at < PANEL) {
                            picked[row + i] = z.at[i][at / LANES][at % LANES];
                            if (REF) picked[N + row + i] = r.at[i][at / LANES][at % LANES];
                        }
                    }
                    for (int i = 0; i < ROWS; i++) {
                        add<REF>(lanes[i], z.at[i][0], REF ? r.at[i][0] : Vec{});
                        add<REF>(lanes[i], z.at[i][1], REF ? r.at[i][1] : Vec{});
                    }
                }
                for (int i = 0; i < count; i++) merge<REF>(mine[row + i], over_lanes<REF>(lanes[i]));
            }
        }
#pragma omp critical
        for (int64_t n = 0; n < N; n++) merge<REF>(rows[n], mine[n]);
    }
}

extern "C" void token_logprobs(const void* hidden, const void* weight, const int64_t* targets, int64_t N, int64_t D,
                               int64_t V, int64_t bf16, float temperature, int64_t threads, float* logp, float* entropy,
                               float* lse) {
    Side side{{hidden, N, D, bool(bf16)}, {weight, V, D, bool(bf16)}, {}};
    side.packed = pack_hidden(side.hidden, 1 / temperature, threads);
    std::vector<State<float>> rows(N);
    std::vector<float> picked(N);
    sweep<false>(&side, targets, rows.data(), picked.data(), threads);
    for (int64_t n = 0; n < N; n++) {
        const float log_s = std::log(rows[n].s);
        logp[n] = picked[n] - rows[n].m - log_s;
        entropy[n] = log_s - rows[n].b / rows[n].s;
        lse[n] = rows[n].m + log_s;
    }
}

extern "C" void policy_reference(const void* hidden, const void* weight, const void* ref_hidden,
                                 const void* ref_weight, const int64_t* targets, int64_t N, int64_t D, int64_t RD,
                                 int64_t V, int64_t bf16, float temperature, int64_t threads, float* logp, float* ref_logp,
                                 float* kl, float* entropy, float* lse, float* ref_lse) {
    Side sides[2] = {{{hidden, N, D, bool(bf16)}, {weight, V, D, bool(bf16)}, {}},
                     {{ref_hidden, N, RD, bool(bf16)}, {ref_weight, V, RD, bool(bf16)}, {}}};
    for (auto& side : sides) side.packed = pack_hidden(side.hidden, 1 / temperature, threads);
    std::vector<State<float>> rows(N);
    std::vector<float> picked(2 * N);
    sweep<true>(sides, targets, rows.data(), picked.data(), threads);
    for (int64_t n = 0; n < N; n++) {
        const State<float>& row = rows[n];
        const float log_s = std::log(row.s), ref_log_s = std::log(row.rs);
        logp[n] = picked[n] - row.m - log_s;
        ref_logp[n] = picked[N + n] - row.rm - ref_log_s;
        kl[n] = row.d / row.s - log_s + ref_log_s;
        entropy[n] = log_s - row.b / row.s;
        lse[n] = row.m + log_s;
        ref_lse[n] = row.rm + ref_log_s;
    }
}

// --- gradients ------------------------------------------------------------------------------------------

// What the loss's gradient is in the logits of columns [first, first + columns), into out (N, columns):
//   p_v = e^(z_v - lse),  out_v = p_v (of_p[n] + of_log[n] log(p_v / q_v)) / temperature,  q = 1 without a reference.
// The target's own 1 is added by the caller. With these, log p(t) has of_p = -g; KL of_p = -g KL, of_log = g.
template <bool REF>
static void gradient(Side* sides, const float* lse, const float* ref_lse, const float* of_p, const float* of_log,
                     float temperature, int threads, float* out) {
    const int64_t N = sides[0].hidden.rows, V = sides[0].weight.rows, D = sides[0].hidden.width;
    const int64_t RD = REF ? sides[1].hidden.width : 0;
    const Chunks chunks(V, D + RD, threads);
#pragma omp parallel num_threads(threads)
    {
        Buffer weight = buffer(chunks.size * D), ref_weight = buffer(chunks.size * RD);
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
            const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, V);
            const int64_t panels = (last - first + PANEL - 1) / PANEL;
            pack_weight(sides[0].weight, first, panels, weight.get());
            if (REF) pack_weight(sides[1].weight, first, panels, ref_weight.get());
            for (int64_t row = 0; row < N; row += ROWS) {
                const int count = int(std::min<int64_t>(ROWS, N - row));
                for (int64_t p = 0; p < panels; p++) {
                    const int64_t column = first + p * PANEL;
                    const Tile z = product(sides[0].packed.get() + row * D, weight.get() + p * PANEL * D, D);
                    Tile r{};
                    if (REF) r = product(sides[1].packed.get() + row * RD, ref_weight.get() + p * PANEL * RD, RD);
                    for (int i = 0; i < count; i++) {
                        const int64_t n = row + i;
                        for (int half = 0; half < 2; half++) {
                            const Vec logp = z.at[i][half] - lse[n];
                            Vec factor = splat(of_p[n]);
                            if (REF) factor += of_log[n] * (logp - (r.at[i][half] - ref_lse[n]));
                            else if (of_log) factor += of_log[n] * logp;
                            const Vec value = exp_(logp) * factor / temperature;
                            const int64_t at = column + half * LANES;
                            const int64_t width = std::min<int64_t>(LANES, last - at);
                            if (width > 0) std::memcpy(out + n * V + at, &value, width * sizeof(float));
                        }
                    }
                }
            }
        }
    }
}

extern "C" void gradient_in_logits(const void* hidden, const void* weight, const void* ref_hidden,
                                   const void* ref_weight, int64_t N, int64_t D, int64_t RD, int64_t V, int64_t bf16,
                                   float temperature, int64_t threads, const float* lse, const float* ref_lse,
                                   const float* of_p, const float* of_log, float* out) {
    Side sides[2] = {{{hidden, N, D, bool(bf16)}, {weight, V, D, bool(bf16)}, {}},
                     {{ref_hidden, N, RD, bool(bf16)}, {ref_weight, V, RD, bool(bf16)}, {}}};
    sides[0].packed = pack_hidden(sides[0].hidden, 1 / temperature, threads);
    if (ref_hidden) {
        sides[1].packed = pack_hidden(sides[1].hidden, 1 / temperature, threads);
        gradient<true>(sides, lse, ref_lse, of_p, of_log, temperature, threads, out);
    } else {
        gradient<false>(sides, lse, ref_lse, of_p, of_log, temperature, threads, out);
    }
}

// --- sampling -------------------------------------------------------------------------------------------

// By inverting the CDF: while the logits pass by, each panel's maximum and sum are noted; uniform then
// picks a panel, whose few logits are computed once more to pick the token. Draws that token for each row.
extern "C" void sample_tokens(const void* hidden, const void* weight, const float* uniform, int64_t N, int64_t D,
                              int64_t V, int64_t bf16, float temperature, int64_t threads, int64_t* tokens, float* logp) {
    const Matrix h{hidden, N, D, bool(bf16)}, w{weight, V, D, bool(bf16)};
    const Buffer packed = pack_hidden(h, 1 / temperature, threads);
    const Chunks chunks(V, D, threads);
    const int64_t panels = (V + PANEL - 1) / PANEL;
    Buffer maxima = buffer(N * panels), sums = buffer(N * panels);
#pragma omp parallel num_threads(threads)
    {
        Buffer part = buffer(chunks.size * D);
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
            const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, V);
            pack_weight(w, first, (last - first + PANEL - 1) / PANEL, part.get());
            for (int64_t row = 0; row < N; row += ROWS) {
                for (int64_t column = first; column < last; column += PANEL) {
                    Tile z = product(packed.get() + row * D, part.get() + (column - first) * D, D);
                    if (last - column < PANEL) cut(z, last - column);
                    for (int i = 0; i < std::min<int64_t>(ROWS, N - row); i++) {
                        const Vec most = max_(z.at[i][0], z.at[i][1]);
                        float m = most[0], s = 0;
                        for (int lane = 1; lane < LANES; lane++) m = max_(m, most[lane]);
                        const Vec e = exp_(z.at[i][0] - m) + exp_(z.at[i][1] - m);
                        for (int lane = 0; lane < LANES; lane++) s += e[lane];
                        maxima[(row + i) * panels + column / PANEL] = m;
                        sums[(row + i) * panels + column / PANEL] = s;
                    }
                }
            }
        }
#pragma omp for
        for (int64_t n = 0; n < N; n++) {
            const float *m = maxima.get() + n * panels, *s = sums.get() + n * panels;
            const float most = *std::max_element(m, m + panels);
            double total = 0, before = 0;
            for (int64_t p = 0; p < panels; p++) total += double(s[p]) * std::exp(m[p] - most);
            const double goal = double(uniform[n]) * total;
            int64_t chosen = panels - 1;
            for (int64_t p = 0; p < panels; p++) {
                const double weight_of = double(s[p]) * std::exp(m[p] - most);
                if (before + weight_of > goal) {
                    chosen = p;
                    break;
                }
                if (p < panels - 1) before += weight_of;
            }
            float logit = NEVER;
            const float* row = packed.get() + n / ROWS * ROWS * D + n % ROWS;
            for (int64_t v = chosen * PANEL; v < std::min(V, (chosen + 1) * PANEL); v++) {
                float z = 0;
                for (int64_t k = 0; k < D; k++) z += row[k * ROWS] * w.at(v, k);
                const double e = std::exp(z - most);
                if (e > 0 || logit == NEVER) {  // never a token that cannot be, should rounding leave us at the end
                    logit = z;
                    tokens[n] = v;
                }
                before += e;
                if (before > goal) break;
            }
            logp[n] = std::min(0.0f, logit - most - float(std::log(total)));
        }
    }
}

// --- matrix products ------------------------------------------------------------------------------------

// The same blocking for whole products, C (M, N) = A (M, K) B (K, N): all three of a linear layer's are
// this one, with other strides. B is packed block by block; A is read where it lies, unless its rows
// would fall into the same cache sets.
constexpr int64_t BLOCK_K = 256, BLOCK_N = 768 / PANEL * PANEL;

struct Strided {
    const float* data;
    int64_t row, column;  // distances, in numbers

    const float* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

static void pack_block(const Strided& b, int64_t k, int64_t columns, float* out) {  // [k][PANEL], zeros past the end
    for (int64_t j = 0; j < PANEL; j++) {
        if (j >= columns) {
            for (int64_t i = 0; i < k; i++) out[i * PANEL + j] = 0.0f;
        }
    }
    if (b.column == 1) {
        for (int64_t i = 0; i < k; i++) std::memcpy(out + i * PANEL, b.at(i, 0), columns * sizeof(float));
        return;
    }
    for (int64_t i0 = 0; i0 < k; i0 += 16) {
        const int64_t i1 = std::min<int64_t>(i0 + 16, k);
        for (int64_t j = 0; j < columns; j++) {
            for (int64_t i = i0; i < i1; i++) out[i * PANEL + j] = *b.at(i, j);
        }
    }
}

template <bool ROWS_TOGETHER>
static inline __attribute__((always_inline)) void add_product(Tile& t, const float* a, int64_t stride, const float* b,
                                                              int64_t K) {
    for (int64_t k = 0; k < K; k++) {
        Vec b0, b1;
        std::memcpy(&b0, b + k * PANEL, sizeof b0);
        std::memcpy(&b1, b + k * PANEL + LANES, sizeof b1);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Vec x = splat(ROWS_TOGETHER ? a[k * stride + i] : a[i * stride + k]);
            t.at[i][0] += x * b0;
            t.at[i][1] += x * b1;
        }
    }
}

extern "C" void matmul(const float* a_data, const float* b_data, float* c, int64_t M, int64_t N, int64_t K,
                       int64_t a_row, int64_t a_column, int64_t b_row, int64_t b_column, int64_t threads) {
    if (K == 0) std::fill(c, c + M * N, 0.0f);
    const Strided A{a_data, a_row, a_column}, B{b_data, b_row, b_column};
    const int64_t block_n = std::min(BLOCK_N, (N + PANEL - 1) / PANEL * PANEL), block_k = std::min(BLOCK_K, K);
    const Buffer packed = buffer(block_n * block_k);
    const bool together = a_row == 1;
    const bool collide = !together && (a_column != 1 || a_row % 1024 == 0);
#pragma omp parallel num_threads(threads)
    {
        Buffer rows = buffer(ROWS * block_k);
        for (int64_t n0 = 0; n0 < N; n0 += block_n) {
            const int64_t width = std::min(block_n, N - n0), panels = (width + PANEL - 1) / PANEL;
            for (int64_t k0 = 0; k0 < K; k0 += block_k) {
                const int64_t depth = std::min(block_k, K - k0);
#pragma omp for
                for (int64_t p = 0; p < panels; p++) {
                    const Strided part{B.at(k0, n0 + p * PANEL), B.row, B.column};
                    pack_block(part, depth, std::min<int64_t>(PANEL, width - p * PANEL), packed.get() + p * PANEL * depth);
                }
#pragma omp for schedule(dynamic, 2)
                for (int64_t m = 0; m < M; m += ROWS) {
                    const int64_t count = std::min<int64_t>(ROWS, M - m);
                    const bool copy = count < ROWS || collide;
                    if (copy) {
                        for (int64_t k = 0; k < depth; k++) {
                            for (int64_t i = 0; i < ROWS; i++) rows[k * ROWS + i] = i < count ? *A.at(m + i, k0 + k) : 0.0f;
                        }
                    }
                    for (int64_t p = 0; p < panels; p++) {
                        const float* b = packed.get() + p * PANEL * depth;
                        Tile t{};
                        if (copy) add_product<true>(t, rows.get(), ROWS, b, depth);
                        else if (together) add_product<true>(t, A.at(m, k0), A.column, b, depth);
                        else add_product<false>(t, A.at(m, k0), A.row, b, depth);
                        const int64_t left = width - p * PANEL;
                        for (int i = 0; i < count; i++) {
                            float* out = c + (m + i) * N + n0 + p * PANEL;
                            for (int half = 0; half < 2; half++) {
                                const int64_t size = std::min<int64_t>(LANES, left - half * LANES);
                                if (size == LANES) {
                                    Vec v = t.at[i][half], before{};
                                    if (k0) std::memcpy(&before, out + half * LANES, sizeof before);
                                    v += before;
                                    std::memcpy(out + half * LANES, &v, sizeof v);
                                } else {
                                    for (int64_t j = 0; j < size; j++) {
                                        out[half * LANES + j] = t.at[i][half][j] + (k0 ? out[half * LANES + j] : 0.0f);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

// The head's kernels: log-probs, entropy, exact KL, their gradients, sampling. See ../reference.py for
// what each means, ../cpu/head.py for who calls it.
//
// All are one matrix product, logits = hidden weight^T, whose results are used up where they appear: in
// registers. No N x V array exists. hidden is packed once as [tile][D][ROWS], weight chunk by chunk as
// [panel][D][PANEL] by the thread that multiplies with it. Each of the LANES vector lanes keeps an online
// softmax of its own (Milakov & Gimelshein, 1805.02867); lanes, chunks and threads are merged at the
// end. Inputs are fp32 or bf16, everything else is fp32.

#include <limits>
#include <vector>

#include "bf16.h"

constexpr int CHUNK_BYTES = 512 * 1024;  // packed weights that a core's own cache holds
constexpr float NEVER = -1e30f;          // the logit of a column that does not exist

// --- every tile of the logits -------------------------------------------------------------------------

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

struct Side {  // one model
    Matrix hidden, weight;
    bool pairs;          // bf16: products of pairs
    float inverse;       // 1 / temperature
    const float* ready;  // the whole weight packed, or null
    Buffer packed;       // hidden, [tile][depth][ROWS]

    Side(const void* h, const void* w, int64_t N, int64_t D, int64_t V, bool bf16, float temperature, int threads,
         const float* ready = nullptr)
        : hidden{h, N, D, D, 1, bf16},
          weight{w, V, D, D, 1, bf16},
          pairs(bf16),
          inverse(1 / temperature),
          ready(ready),
          packed(buffer((N + ROWS - 1) / ROWS * ROWS * words())) {
#pragma omp parallel for num_threads(threads)
        for (int64_t row = 0; row < N; row += ROWS) pack_any<ROWS>(hidden, row, 0, D, pairs, packed.get() + row * words());
    }

    int64_t words() const { return depth(hidden.width, pairs); }

    // The weights of columns [first, last), packed: into `room` unless they are.
    const float* columns(int64_t first, int64_t last, float* room) const {
        if (ready) return ready + first * words();
        for (int64_t v = first; v < last; v += PANEL) {
            pack_any<PANEL>(weight, v, 0, weight.width, pairs, room + (v - first) * words());
        }
        return room;
    }

    // The logits of rows [row, row + ROWS), columns [column, column + PANEL), whose packed weights are `panel`.
    inline __attribute__((always_inline)) Tile logits(int64_t row, int64_t column, const float* panel) const {
        Tile t{};
        add_packed(t, packed.get() + row * words(), panel, hidden.width, pairs);
        if (inverse != 1.0f) {
            for (auto& vectors : t.at) vectors[0] *= inverse, vectors[1] *= inverse;
        }
        if (weight.rows - column < PANEL) cut(t, weight.rows - column);
        return t;
    }
};

struct Chunks {  // how V columns are shared out: `count` chunks of `size` columns, whole panels
    int64_t size, count;

    Chunks(int64_t V, int64_t D, int threads) {
        const int64_t cached = CHUNK_BYTES / (4 * std::max<int64_t>(D, 1)) / PANEL * PANEL;
        const int64_t fair = (V / (4 * threads) + PANEL) / PANEL * PANEL;  // four chunks a thread or more
        size = std::max<int64_t>(PANEL, std::min(cached, fair));
        count = (V + size - 1) / size;
    }
};

// Show `start.tile` every tile of the logits, of one model or of two. A chunk's tiles of the same rows come one
// after the other, between `begin` and `end`. Each thread has its own copy of `start`, which `join` ends.
template <bool REF, class Work>
static void over_tiles(const Side* sides, int threads, const Work& start) {
    const int64_t N = sides[0].hidden.rows, V = sides[0].weight.rows, D = sides[0].words();
    const int64_t RD = REF ? sides[1].words() : 0;
    const Chunks chunks(V, D + RD, threads);
#pragma omp parallel num_threads(threads)
    {
        Work work = start;
        const Buffer part = buffer(chunks.size * D), ref_part = buffer(chunks.size * RD);
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
            const int64_t first = chunk * chunks.size, last = std::min(first + chunks.size, V);
            const float* weight = sides[0].columns(first, last, part.get());
            const float* ref_weight = REF ? sides[1].columns(first, last, ref_part.get()) : nullptr;
            for (int64_t row = 0; row < N; row += ROWS) {
                const int count = int(std::min<int64_t>(ROWS, N - row));
                work.begin();
                for (int64_t column = first; column < last; column += PANEL) {
                    const Tile z = sides[0].logits(row, column, weight + (column - first) * D);
                    Tile r;
                    if (REF) r = sides[1].logits(row, column, ref_weight + (column - first) * RD);
                    work.tile(row, count, column, z, r);
                }
                work.end(row, count);
            }
        }
#pragma omp critical
        work.join();
    }
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

template <bool REF>
struct Softmax {
    const int64_t* targets;
    std::vector<State<float>>& rows;  // of all threads
    float *picked, *ref_picked;       // the targets' logits
    std::vector<State<float>> mine{rows.size(), nothing(0.0f)};
    State<Vec> lanes[ROWS];

    void begin() {
        for (auto& state : lanes) state = nothing(Vec{});
    }

    inline __attribute__((always_inline)) void tile(int64_t row, int count, int64_t column, const Tile& z, const Tile& r) {
        for (int i = 0; i < count; i++) {
            const int64_t at = targets[row + i] - column;
            if (at >= 0 && at < PANEL) {
                picked[row + i] = z.at[i][at / LANES][at % LANES];
                if (REF) ref_picked[row + i] = r.at[i][at / LANES][at % LANES];
            }
        }
        for (int i = 0; i < ROWS; i++) {
            for (int half = 0; half < 2; half++) add<REF>(lanes[i], z.at[i][half], REF ? r.at[i][half] : Vec{});
        }
    }

    void end(int64_t row, int count) {
        for (int i = 0; i < count; i++) merge<REF>(mine[row + i], over_lanes<REF>(lanes[i]));
    }

    void join() {
        for (size_t n = 0; n < rows.size(); n++) merge<REF>(rows[n], mine[n]);
    }
};

extern "C" void token_logprobs(const void* hidden, const void* weight, const int64_t* targets, int64_t N, int64_t D,
                               int64_t V, int64_t bf16, float temperature, int64_t threads, float* logp, float* entropy,
                               float* lse) {
    const Side side(hidden, weight, N, D, V, bf16, temperature, threads);
    std::vector<State<float>> rows(N, nothing(0.0f));
    over_tiles<false>(&side, threads, Softmax<false>{targets, rows, logp, nullptr});
    for (int64_t n = 0; n < N; n++) {
        const float log_s = std::log(rows[n].s);
        logp[n] = logp[n] - rows[n].m - log_s;  // in this order: m may be large
        entropy[n] = log_s - rows[n].b / rows[n].s;
        lse[n] = rows[n].m + log_s;
    }
}

extern "C" void policy_reference(const void* hidden, const void* weight, const void* ref_hidden, const void* ref_weight,
                                 const int64_t* targets, int64_t N, int64_t D, int64_t RD, int64_t V, int64_t bf16,
                                 float temperature, int64_t threads, float* logp, float* ref_logp, float* kl,
                                 float* entropy, float* lse, float* ref_lse) {
    const Side sides[2] = {{hidden, weight, N, D, V, bool(bf16), temperature, int(threads)},
                           {ref_hidden, ref_weight, N, RD, V, bool(bf16), temperature, int(threads)}};
    std::vector<State<float>> rows(N, nothing(0.0f));
    over_tiles<true>(sides, threads, Softmax<true>{targets, rows, logp, ref_logp});
    for (int64_t n = 0; n < N; n++) {
        const State<float>& row = rows[n];
        const float log_s = std::log(row.s), ref_log_s = std::log(row.rs);
        logp[n] = logp[n] - row.m - log_s;
        ref_logp[n] = ref_logp[n] - row.rm - ref_log_s;
        kl[n] = row.d / row.s - log_s + ref_log_s;
        entropy[n] = log_s - row.b / row.s;
        lse[n] = row.m + log_s;
        ref_lse[n] = row.rm + ref_log_s;
    }
}

// --- gradients ------------------------------------------------------------------------------------------

// What the loss's gradient is in the logits, into out (N, V):
//   p_v = e^(z_v - lse),  out_v = p_v (of_p[n] + of_log[n] log(p_v / q_v)) / temperature; no second term without a reference.
// The target's own 1 is added by the caller. With these, log p(t) has of_p = -g; KL of_p = -g KL, of_log = g.
template <bool REF>
struct Gradient {
    const float *lse, *ref_lse, *of_p, *of_log;
    float temperature;
    float* out;
    int64_t V;

    void begin() {}

    inline __attribute__((always_inline)) void tile(int64_t row, int count, int64_t column, const Tile& z, const Tile& r) {
        for (int i = 0; i < count; i++) {
            const int64_t n = row + i;
            for (int half = 0; half < 2; half++) {
                const Vec logp = z.at[i][half] - lse[n];
                Vec factor = splat(of_p[n]);
                if (REF) factor += of_log[n] * (logp - (r.at[i][half] - ref_lse[n]));
                const Vec value = exp_(logp) * factor / temperature;
                const int64_t at = column + half * LANES, width = std::min<int64_t>(LANES, V - at);
                if (width > 0) std::memcpy(out + n * V + at, &value, width * sizeof(float));
            }
        }
    }

    void end(int64_t, int) {}
    void join() {}
};

extern "C" void gradient_in_logits(const void* hidden, const void* weight, const void* ref_hidden, const void* ref_weight,
                                   int64_t N, int64_t D, int64_t RD, int64_t V, int64_t bf16, float temperature,
                                   int64_t threads, const float* lse, const float* ref_lse, const float* of_p,
                                   const float* of_log, float* out) {
    const Side sides[2] = {{hidden, weight, N, D, V, bool(bf16), temperature, int(threads)},
                           {ref_hidden, ref_weight, ref_hidden ? N : 0, RD, V, bool(bf16), temperature, int(threads)}};
    if (ref_hidden) over_tiles<true>(sides, threads, Gradient<true>{lse, ref_lse, of_p, of_log, temperature, out, V});
    else over_tiles<false>(sides, threads, Gradient<false>{lse, ref_lse, of_p, of_log, temperature, out, V});
}

// --- sampling -------------------------------------------------------------------------------------------

struct Panels {  // of each row and panel: the maximum m and the sum of e^(z - m)
    int64_t count;
    float *maxima, *sums;

    void begin() {}

    inline __attribute__((always_inline)) void tile(int64_t row, int rows, int64_t column, const Tile& z, const Tile&) {
        for (int i = 0; i < rows; i++) {
            const int64_t at = (row + i) * count + column / PANEL;
            const float m = most(max_(z.at[i][0], z.at[i][1]));
            maxima[at] = m;
            sums[at] = sum(exp_(z.at[i][0] - m) + exp_(z.at[i][1] - m));
        }
    }

    void end(int64_t, int) {}
    void join() {}
};

struct Drawn {
    int64_t token;
    float logp;
};

// Row n's token, from its panels and one uniform number.
static Drawn draw(const Side& side, int64_t n, const Panels& panels, float uniform) {
    const float *m = panels.maxima + n * panels.count, *s = panels.sums + n * panels.count;
    const float top = *std::max_element(m, m + panels.count);
    const auto weight_of = [&](int64_t p) { return double(s[p]) * std::exp(m[p] - top); };
    double total = 0, before = 0;
    for (int64_t p = 0; p < panels.count; p++) total += weight_of(p);
    const double goal = double(uniform) * total;
    int64_t chosen = 0;
    while (chosen < panels.count - 1 && before + weight_of(chosen) <= goal) before += weight_of(chosen++);
    const int64_t first = chosen * PANEL, last = std::min(side.weight.rows, first + PANEL);
    const Buffer room = buffer(side.ready ? 0 : PANEL * side.words());
    const Tile tile = side.logits(n / ROWS * ROWS, first, side.columns(first, last, room.get()));
    float logits[PANEL], logit = NEVER;
    std::memcpy(logits, tile.at[n % ROWS], sizeof logits);
    Drawn drawn{0, 0};
    for (int64_t v = first; v < last; v++) {
        const float z = logits[v - first];
        const double e = std::exp(z - top);
        if (e > 0 || logit == NEVER) {  // never a token that cannot be, should rounding leave us at the end
            logit = z;
            drawn.token = v;
        }
        before += e;
        if (before > goal) break;
    }
    drawn.logp = std::min(0.0f, logit - top - float(std::log(total)));
    return drawn;
}

// By inverting the CDF: while the logits pass by, each panel's maximum and sum are noted; uniform then
// picks a panel, whose few logits are computed once more to pick the token. ready: the weight packed, or null.
extern "C" void sample_tokens(const void* hidden, const void* weight, const float* ready, const float* uniform, int64_t N, int64_t D,
                              int64_t V, int64_t bf16, float temperature, int64_t threads, int64_t* tokens, float* logp) {
    const Side side(hidden, weight, N, D, V, bf16, temperature, threads, ready);
    const int64_t count = (V + PANEL - 1) / PANEL;
    const Buffer maxima = buffer(N * count), sums = buffer(N * count);
    const Panels panels{count, maxima.get(), sums.get()};
    over_tiles<false>(&side, threads, panels);
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        const Drawn drawn = draw(side, n, panels, uniform[n]);
        tokens[n] = drawn.token;
        logp[n] = drawn.logp;
    }
}

// Log-probs, entropy, exact KL, and their gradients in the logits. ../reference.py says what each of them means, and
// ../cpu/head.py calls them. Each of the LANES lanes of a vector keeps an online softmax of its own (Milakov &
// Gimelshein, 1805.02867). Lanes, chunks and sections are merged in a fixed order.

#include <vector>

#include "head.h"

// --- the online softmax -----------------------------------------------------------------------------

// The sums over the columns so far, for the policy's logits z and the reference's logits r.
template <class X>
struct State {
    X m, s, b;    // the maximum of z, s = sum e^(z - m), b = sum e^(z - m) (z - m)
    X rm, rs, d;  // the maximum of r, rs = sum e^(r - rm), d = sum e^(z - m) ((z - m) - (r - rm))
};

template <class X>
static inline State<X> nothing(X zero) {
    return {zero + NEVER, zero, zero, zero + NEVER, zero, zero};
}

// Raise the maxima to m and rm, and rescale the sums.
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

// Add one more logit to each lane. Either the new term or the scale of the old sum is 1, and the other is e^-|z - m|,
// so one exponential is enough.
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
    const int64_t *targets, N;
    State<float>* all;               // (sections, N)
    float *picked, *ref_picked;      // the logits of the targets
    State<float>* of_section = all;  // (N,): the states of this section
    State<Vec> lanes[ROWS];

    void section(int64_t number) { of_section = all + number * N; }

    void begin() {
        for (auto& state : lanes) state = nothing(Vec{});
    }

    inline __attribute__((always_inline)) void tile(int64_t row, int count, int64_t column, const Tile& z,
                                                    const Tile& r) {
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
        for (int i = 0; i < count; i++) merge<REF>(of_section[row + i], over_lanes<REF>(lanes[i]));
    }
};

// The state of each row over the whole vocabulary; the logits of the targets go to picked and ref_picked.
template <bool REF>
static std::vector<State<float>> softmax(const Side* sides, const Chunks& chunks, int threads, const int64_t* targets,
                                         float* picked, float* ref_picked) {
    const int64_t N = sides[0].hidden.rows;
    std::vector<State<float>> all(chunks.sections * N, nothing(0.0f));
    over_tiles<REF>(sides, chunks, threads, Softmax<REF>{targets, N, all.data(), picked, ref_picked});
    for (int64_t section = 1; section < chunks.sections; section++) {
        for (int64_t n = 0; n < N; n++) merge<REF>(all[n], all[section * N + n]);
    }
    all.resize(N, nothing(0.0f));  // for V = 0 there is no section
    return all;
}

extern "C" void token_logprobs(const void* hidden, const void* weight, const int64_t* targets, int64_t N, int64_t D,
                               int64_t V, int64_t bf16, float temperature, int64_t threads, float* logp, float* entropy,
                               float* lse) {
    const Side side(hidden, weight, N, D, V, bf16, temperature, threads);
    const auto rows = softmax<false>(&side, Chunks::of(side, threads), threads, targets, logp, nullptr);
    for (int64_t n = 0; n < N; n++) {
        const float log_s = std::log(rows[n].s);
        logp[n] = logp[n] - rows[n].m - log_s;  // in this order, since m may be large
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
    const auto rows = softmax<true>(sides, Chunks::of(sides, threads), threads, targets, logp, ref_logp);
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

// The gradient of a loss in hidden weight^T, to out (N, V). With p_v = e^(z_v - lse):
//   out_v = p_v (of_p[n] + of_log[n] log(p_v / q_v)) / temperature, without the second term if there is no reference.
// For an incoming gradient g, log p(t) needs of_p = -g, and KL needs of_p = -g KL and of_log = g. The g that log p(t)
// adds at the target itself is left to the caller.
template <bool REF>
struct Gradient {
    const float *lse, *ref_lse, *of_p, *of_log;
    float temperature;
    float* out;
    int64_t V;

    void section(int64_t) {}
    void begin() {}

    inline __attribute__((always_inline)) void tile(int64_t row, int count, int64_t column, const Tile& z,
                                                    const Tile& r) {
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
};

extern "C" void gradient_in_logits(const void* hidden, const void* weight, const void* ref_hidden,
                                   const void* ref_weight, int64_t N, int64_t D, int64_t RD, int64_t V, int64_t bf16,
                                   float temperature, int64_t threads, const float* lse, const float* ref_lse,
                                   const float* of_p, const float* of_log, float* out) {
    const Side sides[2] = {{hidden, weight, N, D, V, bool(bf16), temperature, int(threads)},
                           {ref_hidden, ref_weight, ref_hidden ? N : 0, RD, V, bool(bf16), temperature, int(threads)}};
    const Gradient<false> alone{lse, ref_lse, of_p, of_log, temperature, out, V};
    const Gradient<true> compared{lse, ref_lse, of_p, of_log, temperature, out, V};
    if (ref_hidden) over_tiles<true>(sides, Chunks::of(sides, threads), threads, compared);
    else over_tiles<false>(sides, Chunks::of(sides[0], threads), threads, alone);
}

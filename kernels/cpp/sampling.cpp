// Draw tokens from the head's distribution. See `sample_tokens` in ../reference.py.

#include "head.h"

struct Panels {  // for each row and panel, the maximum m of its logits z, and the sum of e^(z - m)
    int64_t count;
    float *maxima, *sums;

    void section(int64_t) {}
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
};

struct Drawn {
    int64_t token;
    float logp;
};

// The token of row n, from its panels and one uniform number.
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
        if (e > 0 || logit == NEVER) {  // so that a token of probability 0 is not drawn where rounding misses the goal
            logit = z;
            drawn.token = v;
        }
        before += e;
        if (before > goal) break;
    }
    drawn.logp = std::min(0.0f, logit - top - float(std::log(total)));
    return drawn;
}

// Inverts the cumulative distribution. A first pass over the logits keeps the maximum and the sum of each panel. Then
// `uniform` picks a panel, and its few logits are computed again to pick the token. `ready` is the weight, packed
// already, or null.
extern "C" void sample_tokens(const void* hidden, const void* weight, const float* ready, const float* uniform,
                              int64_t N, int64_t D, int64_t V, int64_t bf16, float temperature, int64_t threads,
                              int64_t* tokens, float* logp) {
    const Side side(hidden, weight, N, D, V, bf16, temperature, threads, ready);
    const int64_t count = (V + PANEL - 1) / PANEL;
    const Buffer maxima = buffer(N * count), sums = buffer(N * count);
    const Panels panels{count, maxima.get(), sums.get()};
    over_tiles<false>(&side, Chunks::of(side, threads), threads, panels);
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        const Drawn drawn = draw(side, n, panels, uniform[n]);
        tokens[n] = drawn.token;
        logp[n] = drawn.logp;
    }
}

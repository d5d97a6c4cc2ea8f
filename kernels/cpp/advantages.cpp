// From scores, KLs and values to advantages and returns: one pass backwards over each row's tokens, without
// a tensor in between. See ../reference.py.

#include <cmath>
#include <cstdint>

namespace {

struct Rows {
    int64_t B, R;
    const int64_t* lengths;

    template <class F>
    void each(F f) const {  // f(row, where it begins, its length)
        for (int64_t b = 0; b < B; b++) f(b, b * R, lengths[b]);
    }
};

struct Moments {
    double mean, inverse;  // 1 / standard deviation

    template <class Value>
    Moments(const Rows& rows, Value value) : mean(0), inverse(0) {
        double count = 0, squares = 0;
        rows.each([&](int64_t b, int64_t at, int64_t n) {
            for (int64_t t = 0; t < n; t++) mean += value(b, at + t, t == n - 1);
            count += double(n);
        });
        mean /= count > 0 ? count : 1;
        rows.each([&](int64_t b, int64_t at, int64_t n) {
            for (int64_t t = 0; t < n; t++) squares += std::pow(value(b, at + t, t == n - 1) - mean, 2);
        });
        inverse = 1 / std::sqrt(squares / (count > 0 ? count : 1) + 1e-8);
    }
};

}  // namespace

// Outputs come as zeros.
extern "C" void advantages(const float* score, const float* kl, const float* values, const int64_t* lengths, int64_t B,
                           int64_t R, float kl_coef, float gamma, float lam, int64_t whiten_rewards, float* advantages,
                           float* returns, float* whitened) {
    const Rows rows{B, R, lengths};
    const auto shaped = [&](int64_t b, int64_t at, bool last) { return -kl_coef * kl[at] + (last ? score[b] : 0.0f); };
    Moments scale(rows, shaped);
    if (!whiten_rewards) scale.mean = 0, scale.inverse = 1;
    rows.each([&](int64_t b, int64_t at, int64_t n) {
        float running = 0, following = 0;  // A_{t+1}, V_{t+1}
        for (int64_t t = n - 1; t >= 0; t--) {
            const float reward = float((shaped(b, at + t, t == n - 1) - scale.mean) * scale.inverse + scale.mean);
            running = reward + gamma * following - values[at + t] + gamma * lam * running;
            following = values[at + t];
            advantages[at + t] = running;
            returns[at + t] = running + following;
        }
    });
    const Moments found(rows, [&](int64_t, int64_t at, bool) { return advantages[at]; });
    rows.each([&](int64_t, int64_t at, int64_t n) {
        for (int64_t t = at; t < at + n; t++) whitened[t] = float((advantages[t] - found.mean) * found.inverse);
    });
}

// What a transformer computes between its matrix products: RMSNorm, SwiGLU, rotary positions. Each function reads its
// inputs once. The backward passes compute again what is cheap to compute.

#include <vector>

#include "tiles.h"

namespace {

constexpr int64_t GRAIN = 16 * 1024;  // a loop over more numbers than this is divided among threads

// Apply f to vectors of LANES numbers, and to the last, incomplete vector through padded copies.
template <int IN, int OUT, class F>
void map(int64_t n, int threads, const float* const (&in)[IN], float* const (&out)[OUT], F f) {
    const int64_t in_vectors = n / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (n > GRAIN)
    for (int64_t i = 0; i < in_vectors; i += LANES) {
        Vec x[IN], y[OUT];
        for (int k = 0; k < IN; k++) x[k] = load(in[k] + i);
        f(x, y);
        for (int k = 0; k < OUT; k++) store(out[k] + i, y[k]);
    }
    if (in_vectors == n) return;
    Vec x[IN]{}, y[OUT];
    for (int k = 0; k < IN; k++) std::memcpy(&x[k], in[k] + in_vectors, (n - in_vectors) * 4);
    f(x, y);
    for (int k = 0; k < OUT; k++) std::memcpy(out[k] + in_vectors, &y[k], (n - in_vectors) * 4);
}

float dot3(const float* a, const float* b, const float* c, int64_t n) {  // sum of a b c
    Vec total{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total += load(a + i) * load(b + i) * load(c + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i] * c[i];
    return sum(total) + rest;
}

}  // namespace

extern "C" void swiglu(const float* gate, const float* up, int64_t n, int64_t threads, float* out) {
    map<2, 1>(n, threads, {gate, up}, {out}, [](const Vec* x, Vec* y) { y[0] = x[0] * sigmoid(x[0]) * x[1]; });
}

extern "C" void swiglu_backward(const float* gate, const float* up, const float* d_out, int64_t n, int64_t threads,
                                float* d_gate, float* d_up) {
    map<3, 2>(n, threads, {gate, up, d_out}, {d_gate, d_up}, [](const Vec* x, Vec* y) {
        const Vec s = sigmoid(x[0]);
        y[0] = x[2] * x[1] * s * (1.0f + x[0] * (1.0f - s));
        y[1] = x[2] * x[0] * s;
    });
}

extern "C" void rms_norm(const float* x, const float* weight, int64_t N, int64_t D, float eps, int64_t threads,
                         float* out, float* inverse) {
#pragma omp parallel for num_threads(threads) if (N * D > GRAIN)
    for (int64_t n = 0; n < N; n++) {
        const float* row = x + n * D;
        inverse[n] = 1 / std::sqrt(dot(row, row, D) / D + eps);
        for (int64_t i = 0; i < D; i++) out[n * D + i] = row[i] * inverse[n] * weight[i];
    }
}

// With r = 1 / rms: dx = r (w dy - x r^2 mean(w dy x)), dw = sum over rows of dy x r. The caller passes d_weight as
// zeros.
extern "C" void rms_norm_backward(const float* x, const float* weight, const float* inverse, const float* d_out,
                                  int64_t N, int64_t D, int64_t threads, float* dx, float* d_weight) {
    const int64_t blocks = std::min<int64_t>(N, 64);  // of rows; their sums are added in a fixed order
    std::vector<float> sums(blocks * D, 0.0f);
#pragma omp parallel for num_threads(threads) if (N * D > GRAIN)
    for (int64_t block = 0; block < blocks; block++) {
        float* block_sum = sums.data() + block * D;
        for (int64_t n = block * N / blocks; n < (block + 1) * N / blocks; n++) {
            const float *row = x + n * D, *dy = d_out + n * D, r = inverse[n];
            const float pull = dot3(row, dy, weight, D) * r * r / D;
            for (int64_t i = 0; i < D; i++) {
                dx[n * D + i] = r * (weight[i] * dy[i] - row[i] * pull);
                block_sum[i] += dy[i] * row[i] * r;
            }
        }
    }
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t i = 0; i < D; i++) d_weight[i] += sums[block * D + i];
    }
}

// Rotate x (N, H, d) by the angles whose cos and sin are (N, d / 2); with sign -1, by minus these angles.
extern "C" void rotate(const float* x, const float* cos, const float* sin, int64_t N, int64_t H, int64_t d,
                       int64_t threads, float sign, float* out) {
    const int64_t half = d / 2;
#pragma omp parallel for num_threads(threads) if (N * H * d > GRAIN)
    for (int64_t n = 0; n < N; n++) {
        const float *c = cos + n * half, *s = sin + n * half;
        for (int64_t h = 0; h < H; h++) {
            const float* in = x + (n * H + h) * d;
            float* to = out + (n * H + h) * d;
            for (int64_t i = 0; i < half; i++) {
                const float a = in[i], b = in[i + half], t = sign * s[i];
                to[i] = a * c[i] - b * t;
                to[i + half] = b * c[i] + a * t;
            }
        }
    }
}

// Matrix products, C (M, N) = A (M, K) B (K, N): all three of a linear layer's are this one, with other
// strides. B is packed block by block; A is read where it lies, unless its rows would fall into the
// same cache sets.

#include "tiles.h"

constexpr int64_t BLOCK_K = 256, BLOCK_N = 768 / PANEL * PANEL;

// Columns [0, width) of a tile to C, or on top of what is there.
static inline void put(const Tile& t, int64_t count, int64_t width, bool on_top, float* c, int64_t stride) {
    for (int64_t i = 0; i < count; i++) {
        float* out = c + i * stride;
        if (width >= PANEL) {
            for (int half = 0; half < 2; half++) {
                float* to = out + half * LANES;
                store(to, on_top ? load(to) + t.at[i][half] : t.at[i][half]);
            }
        } else {
            for (int64_t j = 0; j < width; j++) out[j] = t.at[i][j / LANES][j % LANES] + (on_top ? out[j] : 0.0f);
        }
    }
}

// Rows [m, m + ROWS) of C, one block of columns: A's rows against each packed panel of B.
static void row_of_tiles(const Matrix& A, int64_t m, int64_t k0, int64_t depth, const float* packed, int64_t width,
                         float* copied, float* c, int64_t stride) {
    const int64_t count = std::min<int64_t>(ROWS, A.rows - m);
    const bool together = A.row == 1;
    const bool collide = !together && (A.column != 1 || A.row % 1024 == 0);
    const bool copy = count < ROWS || collide;
    const float* there = static_cast<const float*>(A.data) + m * A.row + k0 * A.column;
    if (copy) pack<ROWS>(A, m, k0, depth, 1.0f, copied);
    for (int64_t n = 0; n < width; n += PANEL) {
        const float* b = packed + n * depth;
        Tile t{};
        if (copy) add_product<true>(t, copied, ROWS, b, depth);
        else if (together) add_product<true>(t, there, A.column, b, depth);
        else add_product<false>(t, there, A.row, b, depth);
        put(t, count, width - n, k0 > 0, c + m * stride + n, stride);
    }
}

extern "C" void matmul(const float* a, const float* b, float* c, int64_t M, int64_t N, int64_t K, int64_t a_row,
                       int64_t a_column, int64_t b_row, int64_t b_column, int64_t threads) {
    if (K == 0) std::fill(c, c + M * N, 0.0f);
    const Matrix A{a, M, K, a_row, a_column, false}, B{b, N, K, b_column, b_row, false};  // B transposed: rows are columns
    const int64_t block_n = std::min(BLOCK_N, (N + PANEL - 1) / PANEL * PANEL), block_k = std::min(BLOCK_K, K);
    const Buffer packed = buffer(block_n * block_k);
#pragma omp parallel num_threads(threads)
    {
        const Buffer copied = buffer(ROWS * block_k);
        for (int64_t n0 = 0; n0 < N; n0 += block_n) {
            const int64_t width = std::min(block_n, N - n0);
            for (int64_t k0 = 0; k0 < K; k0 += block_k) {
                const int64_t depth = std::min(block_k, K - k0);
#pragma omp for
                for (int64_t n = 0; n < width; n += PANEL) pack<PANEL>(B, n0 + n, k0, depth, 1.0f, packed.get() + n * depth);
#pragma omp for schedule(dynamic, 2)
                for (int64_t m = 0; m < M; m += ROWS) {
                    row_of_tiles(A, m, k0, depth, packed.get(), width, copied.get(), c + n0, N);
                }
            }
        }
    }
}

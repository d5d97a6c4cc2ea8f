// Matrix products C (M, N) = A (M, K) B (K, N), in fp32 or with operands rounded to bf16. The three products of a
// linear layer, forward and backward, are all this one with different strides. B is packed block by block. So is A,
// unless it is fp32 and its rows can be read where they are.

#include "bf16.h"

namespace {

constexpr int64_t BLOCK_K = 256, BLOCK_N = 768 / PANEL * PANEL;  // of B, in 32-bit words

// Rows [m, m + ROWS) and one block of columns of C: these rows of A times each packed panel of B.
void row_of_tiles(const Matrix& A, int64_t m, int64_t k0, int64_t K, bool pairs, const float* packed, int64_t width,
                  float* copied, float* c, int64_t stride) {
    const int64_t count = std::min<int64_t>(ROWS, A.rows - m);
    // Rows that are a multiple of 1024 numbers apart fall into the same sets of the cache, so they are copied, too.
    const bool in_place = !pairs && count == ROWS && A.column == 1 && A.row % 1024 != 0;
    const float* source = static_cast<const float*>(A.data) + m * A.row + k0 * A.column;
    if (!in_place) pack_any<ROWS>(A, m, k0, K, pairs, copied);
    for (int64_t n = 0; n < width; n += PANEL) {
        const float* b = packed + n * depth(K, pairs);
        Tile t{};
        if (in_place) add_product<false>(t, source, A.row, b, K);
        else add_packed(t, copied, b, K, pairs);
        put(t, count, width - n, k0 > 0, c + m * stride + n, stride);
    }
}

}  // namespace

extern "C" void matmul(const float* a, const float* b, float* c, int64_t M, int64_t N, int64_t K, int64_t a_row,
                       int64_t a_column, int64_t b_row, int64_t b_column, int64_t pairs, int64_t threads) {
    if (K == 0) std::fill(c, c + M * N, 0.0f);
    const Matrix A{a, M, K, a_row, a_column, false};
    const Matrix B{b, N, K, b_column, b_row, false};  // transposed, so that its rows are the columns of C
    const int64_t block_n = std::min(BLOCK_N, (N + PANEL - 1) / PANEL * PANEL);
    const int64_t block_k = std::min(pairs ? 2 * BLOCK_K : BLOCK_K, K);
    const Buffer packed = buffer(block_n * depth(block_k, pairs));
#pragma omp parallel num_threads(threads)
    {
        const Buffer copied = buffer(ROWS * depth(block_k, pairs));
        for (int64_t n0 = 0; n0 < N; n0 += block_n) {
            const int64_t width = std::min(block_n, N - n0);
            for (int64_t k0 = 0; k0 < K; k0 += block_k) {
                const int64_t part = std::min(block_k, K - k0);
#pragma omp for
                for (int64_t n = 0; n < width; n += PANEL) {
                    pack_any<PANEL>(B, n0 + n, k0, part, pairs, packed.get() + n * depth(part, pairs));
                }
#pragma omp for schedule(dynamic)
                for (int64_t m = 0; m < M; m += ROWS) {
                    row_of_tiles(A, m, k0, part, pairs, packed.get(), width, copied.get(), c + n0, N);
                }
            }
        }
    }
}

// Pack all of a weight (N, K) as [panel][depth][PANEL], for a weight that is used many times before it changes.
extern "C" void pack_weight(const void* weight, int64_t N, int64_t K, int64_t bf16, int64_t pairs, int64_t threads,
                            float* out) {
    const Matrix m{weight, N, K, K, 1, bool(bf16)};
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n += PANEL) pack_any<PANEL>(m, n, 0, K, pairs, out + n * depth(K, pairs));
}

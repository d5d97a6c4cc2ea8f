// Matrix products C (M, N) = A (M, K) B (K, N), in fp32 or with operands rounded to bf16. The three products of a
// linear layer, forward and backward, are all this one with different strides.
//
// The order is that of Goto & van de Geijn (2008). A block of B is packed, and all rows of A pass by, a group of tiles
// at a time. Each panel of the block is used for the whole group, so that it comes from the L1 cache for all tiles but
// the first. Threads share nothing and do not wait for each other before the end, since one that another job has
// stopped would then stop them all. The order in which k is added up depends on K alone, so neither threads nor the
// other sizes change a result.

#include "bf16.h"

namespace {

constexpr int64_t BLOCK_K = 256;   // in 32-bit words: a panel of so many takes half or two thirds of an L1 cache
constexpr int64_t BLOCK_N = 1024;  // columns of B that are packed at once
constexpr int64_t GROUP = 8;       // tiles of A that use a panel of B one after the other
constexpr int64_t PAYS = 256;      // rows of A for which it pays to pack B

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The size of each part if `size` is divided into `parts` equal parts of whole `unit`s; the last one may be smaller.
int64_t equal_part(int64_t size, int64_t parts, int64_t unit) {
    return ceil_div(ceil_div(size, std::max<int64_t>(parts, 1)), unit) * unit;
}

// Columns [k0, k0 + K) of some rows of A, as the tiles read them.
struct Rows {
    const float* data;
    int64_t stride;  // of a row where the columns of a row are adjacent, or 0: the rows are packed, tile by tile
};

// Rows [m, m + count) of A: where they are, if they can be read there, or a copy.
Rows take_rows(const Matrix& A, int64_t m, int64_t count, int64_t k0, int64_t K, bool pairs, float* copied) {
    const float* source = static_cast<const float*>(A.data) + m * A.row + k0 * A.column;
    if (!pairs && A.column == 1) {
        // Rows a multiple of 512 numbers apart fall into the same few sets of the L1 cache; and a tile has whole rows.
        if (A.row % 512 != 0 && count % ROWS == 0) return {source, A.row};
        const int64_t stride = (K + LANES - 1) / LANES * LANES + LANES;
        for (int64_t i = 0; i < count; i++) std::memcpy(copied + i * stride, source + i * A.row, K * sizeof(float));
        return {copied, stride};
    }
    for (int64_t i = 0; i < count; i += ROWS) pack_any<ROWS>(A, m + i, k0, K, pairs, copied + i * depth(K, pairs));
    return {copied, 0};
}

// One tile: `a` times a panel, to the first `count` rows and `width` columns of `c`, or added to them. Not inlined:
// between other loops, the compiler would not keep all of the sums in registers.
template <bool PACKED>
__attribute__((noinline)) void tile(const float* a, int64_t stride, const float* b, int64_t K, bool pairs,
                                    int64_t count, int64_t width, bool add, float* c, int64_t c_stride) {
    for (int64_t i = 0; i < count; i++) {  // what will be needed last
        __builtin_prefetch(c + i * c_stride);
        __builtin_prefetch(c + i * c_stride + LANES);
    }
    Tile t{};
    if (PACKED) add_packed(t, a, b, K, pairs);
    else add_product<false>(t, a, stride, b, K);
    put(t, count, width, add, c, c_stride);
}

// Rows [m, m + count) of A times a packed block of B with `width` columns, to `c` or added to it.
void group_of_tiles(const Matrix& A, int64_t m, int64_t count, int64_t k0, int64_t K, bool pairs, const float* packed,
                    int64_t width, float* copied, float* c, int64_t stride) {
    const Rows rows = take_rows(A, m, count, k0, K, pairs, copied);
    for (int64_t n = 0; n < width; n += PANEL) {
        const float* b = packed + n * depth(K, pairs);
        for (int64_t i = 0; i < count; i += ROWS) {
            float* to = c + (m + i) * stride + n;
            const int64_t left = std::min<int64_t>(ROWS, count - i);
            const float* a = rows.data + i * (rows.stride ? rows.stride : depth(K, pairs));
            (rows.stride ? tile<false> : tile<true>)(a, rows.stride, b, K, pairs, left, width - n, k0 > 0, to, stride);
        }
    }
}

// Rows [m0, m0 + rows) and columns [n0, n0 + width) of C.
void part_of_product(const Matrix& A, const Matrix& B, int64_t m0, int64_t rows, int64_t n0, int64_t width,
                     int64_t block_k, bool pairs, float* packed, float* copied, float* c, int64_t stride) {
    const int64_t K = A.width, group = GROUP * ROWS;
    for (int64_t k0 = 0; k0 < K; k0 += block_k) {
        const int64_t part = std::min(block_k, K - k0);
        for (int64_t n = 0; n < width; n += PANEL) {
            pack_any<PANEL>(B, n0 + n, k0, part, pairs, packed + n * depth(part, pairs));
        }
        for (int64_t m = m0; m < m0 + rows; m += group) {
            const int64_t count = std::min(group, m0 + rows - m);
            group_of_tiles(A, m, count, k0, part, pairs, packed, width, copied, c + n0, stride);
        }
    }
}

}  // namespace

extern "C" void matmul(const float* a, const float* b, float* c, int64_t M, int64_t N, int64_t K, int64_t a_row,
                       int64_t a_column, int64_t b_row, int64_t b_column, int64_t pairs, int64_t threads) {
    if (K == 0) std::fill(c, c + M * N, 0.0f);
    if (M == 0 || N == 0 || K == 0) return;
    const Matrix A{a, M, K, a_row, a_column, false};
    const Matrix B{b, N, K, b_column, b_row, false};  // transposed, so that its rows are the columns of C
    const int64_t block_k = equal_part(K, ceil_div(K, pairs ? 2 * BLOCK_K : BLOCK_K), LANES);
    // Each thread packs B for itself. Where it has too few rows for that, threads divide the columns, too.
    const int64_t shared = M < PAYS * threads ? std::min(threads, ceil_div(N, 4 * PANEL)) : 1;
    const int64_t width = equal_part(N, std::max(ceil_div(N, BLOCK_N), shared), PANEL), across = ceil_div(N, width);
    const int64_t fewest = ceil_div(threads, across), most = threads == 1 ? 1 : ceil_div(4 * threads, across);
    const int64_t rows = equal_part(M, std::clamp(M / PAYS, fewest, most), ROWS), down = ceil_div(M, rows);
#pragma omp parallel num_threads(threads)
    {
        const Buffer packed = buffer(width * depth(block_k, pairs));
        const Buffer copied = buffer(GROUP * ROWS * (block_k + 2 * LANES));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < down * across; i++) {
            const int64_t m = i / across * rows, n = i % across * width;
            part_of_product(A, B, m, std::min(rows, M - m), n, std::min(width, N - n), block_k, pairs, packed.get(),
                            copied.get(), c, N);
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

// What was compiled, for the rules of ../cpu/binding.py.
extern "C" int64_t lanes() { return LANES; }

extern "C" int64_t multiplies_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// What the head's kernels share (logprobs.cpp, sampling.cpp): a loop over all tiles of the logits.
//
// Each kernel is the matrix product logits = hidden weight^T, whose results are used up in the registers in which
// they appear, so that no N x V array exists. `hidden` is packed once, as [tile][D][ROWS]. `weight` is packed chunk by
// chunk, as [panel][D][PANEL], by the thread that multiplies with it. Inputs are fp32 or bf16; all else is fp32.

#pragma once

#include "bf16.h"

constexpr int CHUNK_BYTES = 512 * 1024;  // of packed weights: so much fits into the cache of one core
constexpr float NEVER = -1e30f;          // the logit of a column beyond the vocabulary

// Set the logits of all columns from `valid` on to NEVER.
static inline void cut(Tile& t, int64_t valid) {
    for (int half = 0; half < 2; half++) {
        for (int lane = 0; lane < LANES; lane++) {
            if (half * LANES + lane >= valid) {
                for (int i = 0; i < ROWS; i++) t.at[i][half][lane] = NEVER;
            }
        }
    }
}

struct Side {  // one of two models that are compared, or the only one
    Matrix hidden, weight;
    bool pairs;          // whether both are bf16, so that operands are packed in pairs
    float inverse;       // 1 / temperature
    const float* ready;  // all of the weight, packed already, or null
    Buffer packed;       // hidden, as [tile][depth][ROWS]

    Side(const void* h, const void* w, int64_t N, int64_t D, int64_t V, bool bf16, float temperature, int threads,
         const float* ready = nullptr)
        : hidden{h, N, D, D, 1, bf16},
          weight{w, V, D, D, 1, bf16},
          pairs(bf16),
          inverse(1 / temperature),
          ready(ready),
          packed(buffer((N + ROWS - 1) / ROWS * ROWS * words())) {
#pragma omp parallel for num_threads(threads)
        for (int64_t row = 0; row < N; row += ROWS) {
            pack_any<ROWS>(hidden, row, 0, D, pairs, packed.get() + row * words());
        }
    }

    int64_t words() const { return depth(hidden.width, pairs); }

    // The packed weights of columns [first, last). They are packed into `room`, unless the weight is packed already.
    const float* columns(int64_t first, int64_t last, float* room) const {
        if (ready) return ready + first * words();
        for (int64_t v = first; v < last; v += PANEL) {
            pack_any<PANEL>(weight, v, 0, weight.width, pairs, room + (v - first) * words());
        }
        return room;
    }

    // The logits of rows [row, row + ROWS) and columns [column, column + PANEL); `panel` has the columns' weights.
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

// How the V columns are divided among threads: into `count` chunks of `size` columns (whole panels), and the chunks
// into `sections` of neighbouring ones. It is chance which thread computes a section, and when. But the order of sums
// within a section is fixed, and so is the order in which sections are merged. So the result is always the same.
struct Chunks {
    int64_t size, count, sections;

    Chunks(int64_t V, int64_t D, int threads) {
        const int64_t cached = CHUNK_BYTES / (4 * std::max<int64_t>(D, 1)) / PANEL * PANEL;
        const int64_t fair = (V / (4 * threads) + PANEL) / PANEL * PANEL;  // at least four chunks for each thread
        size = std::max<int64_t>(PANEL, std::min(cached, fair));
        count = (V + size - 1) / size;
        sections = std::min<int64_t>(count, 8 * threads);
    }

    static Chunks of(const Side& side, int threads) { return {side.weight.rows, side.words(), threads}; }
    static Chunks of(const Side (&sides)[2], int threads) {
        return {sides[0].weight.rows, sides[0].words() + sides[1].words(), threads};
    }
};

// Call initial.tile with every tile of the logits, of one model or (REF) of two. Each thread has its own copy of
// `initial`. Its `section` is called with the number of each section, before the first tile of that section. Within a
// chunk, the tiles of the same rows follow each other, with a call of `begin` before the first and of `end` after the
// last.
template <bool REF, class Work>
static void over_tiles(const Side* sides, const Chunks& chunks, int threads, const Work& initial) {
    const int64_t N = sides[0].hidden.rows, V = sides[0].weight.rows, D = sides[0].words();
    const int64_t RD = REF ? sides[1].words() : 0;
#pragma omp parallel num_threads(threads)
    {
        Work work = initial;
        const Buffer part = buffer(chunks.size * D), ref_part = buffer(chunks.size * RD);
        const auto over_rows = [&](int64_t first, int64_t last) {
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
        };
#pragma omp for schedule(dynamic)
        for (int64_t section = 0; section < chunks.sections; section++) {
            work.section(section);
            const int64_t until = (section + 1) * chunks.count / chunks.sections;
            for (int64_t chunk = section * chunks.count / chunks.sections; chunk < until; chunk++) {
                over_rows(chunk * chunks.size, std::min((chunk + 1) * chunks.size, V));
            }
        }
    }
}

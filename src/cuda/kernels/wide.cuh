// Products for passes of many rows: 64 rows and four tiles a block. Enough blocks come together without sharing
// a tile's columns among the warps.
#pragma once
#include "products.cuh"

#ifdef MOR_TENSOR_CORES
// Tiles and rows of activations that a block of `wide_product` takes: each of its warps a tile and half the
// rows.
constexpr u32 WIDE_TILES = WARPS / 2;
constexpr u32 WIDE = 64;
// Groups of activations that stand in shared memory together, and halves from one row to the next, such that
// eight lanes which read sixteen bytes each meet all banks.
constexpr u32 WIDE_CHUNK = 4;
constexpr u32 WIDE_STRIDE = WIDE_CHUNK * GROUP + 32;

// Brings activations of a block through registers into shared memory: a thread four times eight halves of a
// row, so that those of the next chunk come while this one is used.
struct Loader {
    uint4 quads[WIDE_CHUNK];

    __device__ __forceinline__ void read(const Prepared& x, u32 first, u32 n, u32 group) {
        const u32 row = first + threadIdx.x / 4;
        const u16* from = x.halves + static_cast<u64>(row < n ? row : n - 1) * x.stride + 8 * (threadIdx.x % 4);
#pragma unroll
        for (u32 i = 0; i < WIDE_CHUNK; i++)
            if (GROUP * (group + i) < x.stride)
                quads[i] = *reinterpret_cast<const uint4*>(from + GROUP * (group + i));
    }

    __device__ __forceinline__ void write(u16* chunk) const {
        u16* to = chunk + threadIdx.x / 4 * WIDE_STRIDE + 8 * (threadIdx.x % 4);
#pragma unroll
        for (u32 i = 0; i < WIDE_CHUNK; i++) *reinterpret_cast<uint4*>(to + GROUP * i) = quads[i];
    }
};

// All groups of a warp's tile against rows `first` to `n` of `x`, of which those of the block begin at
// `first_of_block`. `sums` gets them run by run.
template <u32 TYPE, u32 TILES>
__device__ __forceinline__ void multiply_wide(const Matrix& m, u32 tile, u32 groups, u32 each,
                                              const Prepared& x, u32 first_of_block, u32 first, u32 n, u16* chunks,
                                              float sums[TILES][4]) {
    constexpr u32 WORDS = 16, words_each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, 1, WORDS);
    static_assert(WIDE_CHUNK % ahead == 0, "the words of a group have a fixed place");
    u32 words[WORDS];
    read_ahead<TYPE, 1, WORDS>(&m, tile, 0, groups, words);
    Reader<TYPE> reader;
    reader.begin(m, tile, 0);
    Loader loader = {};
    loader.read(x, first_of_block, n, 0);
    float run[TILES][4] = {};
    u32 next = each, run_number = 0;
    const auto finish_run = [&] {
#pragma unroll
        for (u32 c = 0; c < TILES; c++)
            for (u32 i = 0; i < 4; i++) {
                // Beyond the last row that again.
                const u32 column = first + 8 * c + 2 * (lane_index() % 4) + i % 2;
                const float scale = x.scales[(column < n ? column : n - 1) * RUNS + run_number];
                sums[c][i] = fmaf(run[c][i], scale, sums[c][i]);
                run[c][i] = 0;
            }
        next += each;
        run_number++;
    };
    const u32 row = (first - first_of_block + lane_index() / 4) * WIDE_STRIDE;
    for (u32 start = 0, turn = 0; start < groups; start += WIDE_CHUNK, turn ^= 1) {
        u16* chunk = chunks + turn * (WIDE * WIDE_STRIDE);
        loader.write(chunk);
        __syncthreads();
        if (start + WIDE_CHUNK < groups) loader.read(x, first_of_block, n, start + WIDE_CHUNK);
#pragma unroll
        for (u32 i = 0; i < WIDE_CHUNK; i++) {
            const u32 group = start + i, a = i % ahead;
            if (group >= groups) break;
            if (group == next) finish_run();
            u32 b[TILES][2][2];
#pragma unroll
            for (u32 c = 0; c < TILES; c++)
                read_activations<TYPE>(chunk + row + 8 * c * WIDE_STRIDE + GROUP * i, b[c]);
            const Fragments f = unpack<TYPE>(words + a * words_each, (reader.g + i) % Reader<TYPE>::groups);
            if (group + ahead < groups) reader.read(ahead + i, words + a * words_each);
#pragma unroll
            for (u32 c = 0; c < TILES; c++) {
                const float2 of = sums_of_columns<TYPE>(x, first + 8 * c + 2 * (lane_index() % 4), n, group);
                add_products<TYPE>(f, b[c], of.x, of.y, run[c]);
            }
        }
        reader.advance(WIDE_CHUNK);
    }
    finish_run();
}

// Many rows that are ready: blocks enough come together without sharing a tile's columns among the warps, and
// the activations, which all warps of a block need, are read once.
template <u32 TYPE>
__device__ __forceinline__ void wide_product(const ProductParams& p) {
    constexpr u32 TILES = WIDE / 2 / 8;
    // Two chunks: while one is used by slow warps, quick ones write the other.
    __align__(16) __shared__ u16 chunks[2 * WIDE * WIDE_STRIDE];
    enter();
    const u32 n = *p.view.count, first_of_block = blockIdx.y * WIDE;
    if (first_of_block >= n) return;
    const u32 first = first_of_block + warp_index() / WIDE_TILES * (WIDE / 2);
    // All warps bring activations, so that those beyond the last tile do it again.
    u32 tile = blockIdx.x * WIDE_TILES + warp_index() % WIDE_TILES;
    const bool has_tile = tile < p.tiles;
    if (!has_tile) tile = p.tiles - 1;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    float sums[TILES][4] = {};
    multiply_wide<TYPE, TILES>(m, tile, p.groups, p.groups_of_run, p.input, first_of_block, first, n, chunks, sums);
    if (!has_tile) return;
    for (u32 c = 0; c < TILES; c++)
        for (u32 i = 0; i < 4; i++) {
            const u32 row = tile * TILE_ROWS + lane_index() / 4 + i / 2 * 8;
            const u32 column = first + 8 * c + 2 * (lane_index() % 4) + i % 2;
            if (row >= m.rows || column >= n) continue;
            const float value = finished(sums[c][i], p.input.factors[column], m.bias, row);
            float* to = element(m, row, column, m.by_slot ? p.view.slots[column] : 0);
            *to = m.add ? __fadd_rn(*to, value) : value;
        }
}

// grid: (tiles / 4, rows / 64).
#define MOR_WIDE_PRODUCT(TYPE, type) MOR_PRODUCT(mor_wide_product_##type, wide_product<TYPE>)
MOR_EVERY_TYPE(MOR_WIDE_PRODUCT)
#endif

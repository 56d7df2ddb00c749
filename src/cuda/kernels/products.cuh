// Matrix products. Columns are cut into eight runs, whose sums are added in their order. So a result depends
// on the matrix and its own row of activations only, however many rows come along. A block computes sixteen
// rows of a matrix, a tile, for some rows of activations, each warp a run; or for a lone row several tiles,
// each warp several runs of one (lone.cuh); or, for many rows, four tiles (wide.cuh). exact.cuh is for what
// tensor cores cannot do.
#pragma once
#include "fragments.cuh"

struct ProductParams {
    // All of one type, but for single precision.
    Matrix matrices[3];
    // The first tile of each, ~0 where there is none.
    u32 first_tiles[3];
    u32 tiles;
    // Groups of 32 columns, and of those in a run.
    u32 groups;
    u32 groups_of_run;
    // A lone row: its block takes 2^these tiles, up to 8; units in a stage of a warp's ring; and its slot, if
    // that is known.
    u32 log_tiles;
    u32 stage_units;
    u32 slot;
    u32 unused;
    Prepared input;
    View view;
    // A lone row: what it is made of, for the block makes it ready itself.
    Source source;
};

constexpr u32 ANY_SLOT = 0xffffffffu;

// Columns of activations that a block takes at most: with tensor cores, without.
constexpr u32 MANY = 32;
constexpr u32 FEW = 8;

// Words of weights that a lane reads ahead.
constexpr u32 AHEAD_WORDS = 32;

// The matrix of a block's tile; `tile` becomes its number in the matrix.
__device__ __forceinline__ u32 matrix_of(const ProductParams& p, u32& tile) {
    const u32 which = (tile >= p.first_tiles[1]) + (tile >= p.first_tiles[2]);
    tile -= p.first_tiles[which];
    return which;
}

// Where the product of row `row` of a matrix and a row of activations is written or added.
__device__ __forceinline__ float* element(const Matrix& m, u32 row, u32 c, u32 slot) {
    return m.out + static_cast<u64>(m.by_slot ? slot : c) * m.out_stride + row;
}

// A product out of its sum. Rounded after each step in every kernel: where the compiler may fuse it might do so
// in one and not in another.
__device__ __forceinline__ float finished(float sum, float factor, const float* bias, u32 row) {
    const float product = __fmul_rn(sum, factor);
    return bias ? __fadd_rn(product, bias[row]) : product;
}

#ifdef MOR_TENSOR_CORES
// A kernel of which a multiprocessor has registers for two blocks. One for each type: instructions come from
// memory too, and what runs once is waited for, so code has to be short and without jumps.
#define MOR_PRODUCT(name, ...)                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) name(const ProductParams p) { (__VA_ARGS__)(p); } \
    MOR_KERNEL(name)

// A warp's run of a tile, groups `begin` to `end`, against rows `first` to `n` of `x`, at most `TILES` times
// eight.
template <u32 TYPE, u32 TILES, u32 WORDS>
__device__ __forceinline__ void multiply(const Matrix& m, u32 tile, u32 begin, u32 end, const Prepared& x, u32 first,
                                         u32 n, u32 words[WORDS], float sums[TILES][4]) {
    constexpr u32 words_each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, 1, WORDS);
    const u32 used = (n - first + 7) / 8;
    Reader<TYPE> reader;
    reader.begin(m, tile, begin);
    // Beyond the last row that again: what comes of it is not written.
    const u16* rows[TILES];
#pragma unroll
    for (u32 c = 0; c < TILES; c++) {
        const u32 row = first + 8 * c + lane_index() / 4;
        rows[c] = x.halves + static_cast<u64>(row < n ? row : n - 1) * x.stride + GROUP * begin;
    }
    for (u32 start = begin; start < end; start += ahead) {
#pragma unroll
        for (u32 a = 0; a < ahead; a++) {
            const u32 group = start + a;
            if (group >= end) break;
            // All activations at once, for they too come late.
            u32 b[TILES][2][2];
#pragma unroll
            for (u32 c = 0; c < TILES; c++) read_activations<TYPE>(rows[c] + GROUP * a, b[c]);
            const Fragments f = unpack<TYPE>(words + a * words_each, (reader.g + a) % Reader<TYPE>::groups);
            if (group + ahead < end) reader.read(ahead + a, words + a * words_each);
#pragma unroll
            for (u32 c = 0; c < TILES; c++) {
                if (c >= used) continue;
                const float2 of = sums_of_columns<TYPE>(x, first + 8 * c + 2 * (lane_index() % 4), n, group);
                add_products<TYPE>(f, b[c], of.x, of.y, sums[c]);
            }
        }
        reader.advance(ahead);
#pragma unroll
        for (u32 c = 0; c < TILES; c++) rows[c] += GROUP * ahead;
    }
}

// Floats from one column of a warp's sums to the next, so that a warp's writes meet all banks.
constexpr u32 COLUMN_STRIDE = TILE_ROWS + 4;

// Adds up the warps' sums of a matrix, each times its run's scale in `scales` of the column. Thread i gets
// elements i, i + BLOCK, … of the tile, [columns][rows].
template <u32 TILES>
__device__ __forceinline__ void add_warps(const float sums[TILES][4], float* parts, const float* scales, u32 columns_used,
                                          float out[(TILES + 1) / 2]) {
    constexpr u32 columns = 8 * TILES;
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    for (u32 c = 0; c < TILES; c++)
        for (u32 i = 0; i < 4; i++)
            parts[(warp_index() * columns + 8 * c + 2 * t + i % 2) * COLUMN_STRIDE + g + i / 2 * 8] = sums[c][i];
    __syncthreads();
    for (u32 k = 0; k < (TILES + 1) / 2; k++) {
        const u32 i = threadIdx.x + k * BLOCK;
        out[k] = 0;
        const u32 c = i / TILE_ROWS;
        if (i >= TILE_ROWS * columns || c >= columns_used) break;
        for (u32 w = 0; w < WARPS; w++)
            out[k] = fmaf(parts[(w * columns + c) * COLUMN_STRIDE + i % TILE_ROWS], scales[c * RUNS + w], out[k]);
    }
}


// Rows that are ready.
template <u32 TYPE, u32 TILES>
__device__ __forceinline__ void ready_product(const ProductParams& p) {
    // Few words, for the sums and the activations take many registers.
    constexpr u32 WORDS = TILES > 1 ? 16 : AHEAD_WORDS;
    __shared__ float parts[RUNS * 8 * TILES * COLUMN_STRIDE];
    let_next_begin();
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    const u32 each = p.groups_of_run, begin = warp_index() * each;
    const u32 end = begin + each < p.groups ? begin + each : p.groups;
    u32 words[WORDS];
    read_ahead<TYPE, 1, WORDS>(&m, tile, begin, end, words);
    wait_for_previous();
    const u32 n = *p.view.count, first = blockIdx.y * 8 * TILES;
    if (first >= n) return;
    float sums[TILES][4] = {};
    multiply<TYPE, TILES, WORDS>(m, tile, begin, end, p.input, first, n, words, sums);
    constexpr u32 mine = (TILES + 1) / 2;
    float out[mine];
    add_warps<TILES>(sums, parts, p.input.scales + static_cast<u64>(first) * RUNS, n - first, out);
    for (u32 k = 0; k < mine; k++) {
        const u32 i = threadIdx.x + k * BLOCK;
        const u32 row = tile * TILE_ROWS + i % TILE_ROWS, c = first + i / TILE_ROWS;
        if (i >= TILE_ROWS * 8 * TILES || row >= m.rows || c >= n) continue;
        const float value = finished(out[k], p.input.factors[c], m.bias, row);
        float* to = element(m, row, c, m.by_slot ? p.view.slots[c] : 0);
        *to = m.add ? __fadd_rn(*to, value) : value;
    }
}

// Rows that are ready, 8 or 32 a block. grid: (tiles of the matrices, rows / 8 or 32).
#define MOR_READY_PRODUCTS(TYPE, type)                                    \
    MOR_PRODUCT(mor_few_product_##type, ready_product<TYPE, 1>)           \
    MOR_PRODUCT(mor_many_product_##type, ready_product<TYPE, MANY / 8>)
MOR_EVERY_TYPE(MOR_READY_PRODUCTS)
#endif

// Products for a lone row, which the block makes ready itself.
#pragma once
#include "products.cuh"

#ifdef MOR_TENSOR_CORES
// A warp's groups `begin` to `end` of a tile of one or two matrices against a lone row, of which `halves` and
// `group_sums` are; `parts` [MATRICES][RUNS][TILE_ROWS] of this tile gets the sums of its runs, the first of
// them `run`.
template <u32 TYPE, u32 MATRICES>
__device__ __forceinline__ void multiply_lone(Reader<TYPE> readers[MATRICES], u32 begin, u32 end, u32 each,
                                              const u16* halves, const float* group_sums, u32 run, u32 last_run,
                                              u32 words[AHEAD_WORDS], float* parts) {
    constexpr u32 words_each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, MATRICES, AHEAD_WORDS);
    // Groups between two questions whether there are more: runs are whole pairs.
    constexpr u32 pair = ahead > 1 ? 2 : 1;
    float sums[MATRICES][4] = {};
    u32 next = begin + each;
    const auto finish_run = [&] {
        for (u32 i = 0; i < MATRICES; i++) {
            float* to = parts + (i * RUNS + run) * TILE_ROWS + lane_index() / 4;
            // All eight columns are the row's.
            if (lane_index() % 4 == 0) to[0] = sums[i][0], to[8] = sums[i][2];
            for (u32 k = 0; k < 4; k++) sums[i][k] = 0;
        }
        run++;
        next += each;
    };
    const u16* row = halves + GROUP * begin;
    for (u32 start = begin; start < end; start += ahead) {
#pragma unroll
        for (u32 a = 0; a < ahead; a++) {
            const u32 group = start + a;
            if (a % pair == 0) {
                if (a > 0 && group >= end) break;
                if (group == next) finish_run();
            }
            u32 b[2][2];
            read_activations<TYPE>(row + GROUP * a, b);
            const float of_columns = has_min(TYPE) ? group_sums[group] : 0;
            for (u32 i = 0; i < MATRICES; i++) {
                u32* from = words + (a * MATRICES + i) * words_each;
                const Fragments f = unpack<TYPE>(from, (readers[i].g + a) % Reader<TYPE>::groups);
                if (group + ahead < end)
                    readers[i].read(ahead + a, from);
                else
                    no_weights<words_each>(from);
                add_products<TYPE>(f, b, of_columns, of_columns, sums[i]);
            }
        }
        for (u32 i = 0; i < MATRICES; i++) readers[i].advance(ahead);
        row += GROUP * ahead;
    }
    while (run < last_run) finish_run();
}

// A lone row with one matrix of several, or with two that are a gate and what it lets through.
template <u32 TYPE, u32 MAKE, u32 MATRICES>
__device__ __forceinline__ void lone_product(const ProductParams& p) {
    constexpr u32 ahead = groups_ahead(TYPE, MATRICES, AHEAD_WORDS), words_each = 2 * field_words(TYPE);
    __shared__ float parts[WARPS * MATRICES * RUNS * TILE_ROWS], scales[RUNS], squares[RUNS];
    MOR_DYNAMIC_SHARED(float, floats);
    let_next_begin();
    // A warp takes as many runs of its tile as the block has tiles.
    const u32 log = p.log_tiles, place_of_tile = warp_index() << log >> 3;
    const u32 first_run = warp_index() << log & (RUNS - 1), last_run = first_run + (1 << log);
    const u32 each = p.groups_of_run, begin = first_run * each;
    const u32 end = last_run * each < p.groups ? last_run * each : p.groups;
    u32 tile = (blockIdx.x << log) + place_of_tile;
    const bool has_tile = tile < p.tiles;
    if (!has_tile) tile = p.tiles - 1;
    const Matrix* m = p.matrices;
    if constexpr (MATRICES == 1) m += matrix_of(p, tile);
    Reader<TYPE> readers[MATRICES];
    u32 words[AHEAD_WORDS];
    for (u32 i = 0; i < MATRICES; i++) {
        readers[i].begin(m[i], tile, begin);
#pragma unroll
        for (u32 a = 0; a < ahead; a++) {
            u32* to = words + (a * MATRICES + i) * words_each;
            if (begin + a < end)
                readers[i].read(a, to);
            else
                no_weights<words_each>(to);
        }
    }
    prefetch_source(p.source, p.input.columns);
    prefetch_ahead(p);
    wait_for_previous();
    const u32 n = *p.view.count, slot = p.view.slots[0], stride = p.input.stride;
    if (n == 0) return;
    // Half a pair of groups beyond the last is read too; their weights are zero.
    u16* halves = reinterpret_cast<u16*>(floats + stride);
    const Place place = {floats, halves, reinterpret_cast<float*>(halves + stride + GROUP), scales, squares};
    if (threadIdx.x < GROUP) halves[stride + threadIdx.x] = 0;
    if (threadIdx.x == GROUP) place.sums[stride / GROUP] = 0;
    make_run<MAKE>(p.source, 0, slot, p.input.columns, warp_index(), GROUP * each, has_min(TYPE), place);
    // The element of thread i: row i % 16 of tile i / 16.
    u32 my_tile = (blockIdx.x << log) + threadIdx.x / TILE_ROWS;
    const bool has_element = threadIdx.x < TILE_ROWS << log && my_tile < p.tiles;
    const Matrix& mine = p.matrices[MATRICES == 1 ? matrix_of(p, my_tile) : 0];
    const u32 row = my_tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
    const bool writes = has_element && row < mine.rows;
    float* to = element(mine, writes ? row : 0, 0, slot);
    const float before = writes && mine.add ? *to : 0;
    __syncthreads();
    float* sums = parts + place_of_tile * (MATRICES * RUNS * TILE_ROWS);
    multiply_lone<TYPE, MATRICES>(readers, begin, end, each, halves, place.sums, first_run, last_run, words, sums);
    __syncthreads();
    if (!writes) return;
    const float factor = factor_of<MAKE>(p.source, p.input.columns, squares);
    float value[MATRICES];
    for (u32 i = 0; i < MATRICES; i++) {
        const u32 at = (threadIdx.x / TILE_ROWS * MATRICES + i) * (RUNS * TILE_ROWS) + threadIdx.x % TILE_ROWS;
        float sum = 0;
        for (u32 r = 0; r < RUNS; r++) sum = fmaf(parts[at + r * TILE_ROWS], scales[r], sum);
        value[i] = finished(sum, factor, (&mine)[i].bias, row);
    }
    if constexpr (MATRICES == 2) value[0] = swiglu(value[0], value[1]);
    *to = mine.add ? __fadd_rn(before, value[0]) : value[0];
}

// One matrix of several, and a gate with what it lets through. grid: (tiles / tiles of a block); dynamic shared
// memory for the row's floats, halves and sums.
#define MOR_LONE_PRODUCTS(TYPE, type)                                           \
    MOR_PRODUCT(mor_lone_product_norm_##type, lone_product<TYPE, NORM, 1>)      \
    MOR_PRODUCT(mor_lone_product_plain_##type, lone_product<TYPE, PLAIN, 1>)    \
    MOR_PRODUCT(mor_lone_product_attention_##type, lone_product<TYPE, ATTENTION, 1>) \
    MOR_PRODUCT(mor_lone_swiglu_##type, lone_product<TYPE, NORM, 2>)
MOR_EVERY_TYPE(MOR_LONE_PRODUCTS)
#endif

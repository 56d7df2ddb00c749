// Products for a lone row, which the block makes ready itself.
#pragma once
#include "products.cuh"

#ifdef MOR_TENSOR_CORES
// A warp's runs of a tile of one or two matrices against a lone row; `parts` [MATRICES][RUNS][TILE_ROWS] of
// this tile gets the sums.
template <u32 TYPE, u32 MATRICES>
__device__ __forceinline__ void multiply_lone(const Matrix* m, u32 tile, u32 groups, u32 first_run, u32 runs,
                                              const Place& x, u32 words[AHEAD_WORDS], float* parts) {
    constexpr u32 words_each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, MATRICES, AHEAD_WORDS);
    const u32 each = groups_of_run(groups), begin = first_run * each;
    const u32 end = begin + runs * each < groups ? begin + runs * each : groups;
    Reader<TYPE> readers[2] = {Reader<TYPE>(m[0], tile, begin), Reader<TYPE>(m[MATRICES - 1], tile, begin)};
    float sums[MATRICES][4] = {};
    u32 run = first_run, next = begin + each;
    const auto finish_run = [&] {
        for (u32 i = 0; i < MATRICES; i++) {
            float* to = parts + (i * RUNS + run) * TILE_ROWS + lane_index() / 4;
            // All eight columns are the row's.
            if (lane_index() % 4 == 0) to[0] = sums[i][0], to[8] = sums[i][2];
            for (u32 k = 0; k < 4; k++) sums[i][k] = 0;
        }
        run++;
    };
    const u16* row = x.halves + GROUP * begin;
    // One group, number `a` of those that are ahead. `checked`: the one that takes its place may not be there.
    const auto add_group = [&](u32 group, u32 a, bool checked) {
        u32 b[2][2];
        read_activations<TYPE>(row + GROUP * a, b);
        const float of_columns = has_min(TYPE) ? x.sums[group] : 0;
        for (u32 i = 0; i < MATRICES; i++) {
            u32* from = words + (a * MATRICES + i) * words_each;
            const Fragments f = unpack<TYPE>(from, (readers[i].g + a) % Reader<TYPE>::groups);
            if (!checked || group + ahead < end) readers[i].read(ahead + a, from);
            add_products<TYPE>(f, b, of_columns, of_columns, sums[i]);
        }
    };
    for (u32 start = begin; start < end; start += ahead) {
        if (start + 2 * ahead <= end && start + ahead <= next) {
            // Without a question in between, so that the groups' latencies overlap.
#pragma unroll
            for (u32 a = 0; a < ahead; a++) add_group(start + a, a, false);
        } else {
#pragma unroll
            for (u32 a = 0; a < ahead; a++) {
                const u32 group = start + a;
                if (group >= end) break;
                if (group == next) {
                    finish_run();
                    next += each;
                }
                add_group(group, a, true);
            }
        }
        for (u32 i = 0; i < MATRICES; i++) readers[i].advance(ahead);
        row += GROUP * ahead;
        if (start + ahead == next && next < end) {
            finish_run();
            next += each;
        }
    }
    while (run < first_run + runs) finish_run();
}

// A lone row with one matrix of several, or with two that are a gate and what it lets through.
template <u32 MATRICES>
__device__ __forceinline__ void lone_product(const ProductParams& p) {
    __shared__ float parts[WARPS * MATRICES * RUNS * TILE_ROWS];
    MOR_DYNAMIC_SHARED(float, row_room);
    let_next_begin();
    // `runs` runs are a warp's, so that as many tiles are the block's.
    const u32 runs = p.tiles_of_block, warps = WARPS / runs, place_of_tile = warp_index() / warps;
    const u32 first_run = warp_index() % warps * runs, each = groups_of_run(p.groups), begin = first_run * each;
    const u32 end = begin + runs * each < p.groups ? begin + runs * each : p.groups;
    u32 tile = blockIdx.x * runs + place_of_tile;
    const bool has_tile = tile < p.tiles;
    const Matrix* m = p.matrices;
    if constexpr (MATRICES == 1) m += matrix_of(p, tile);
    u32 words[AHEAD_WORDS];
    if (has_tile) {
#define MOR_AHEAD(TYPE) \
    if constexpr (TYPE != F32) read_ahead<TYPE, MATRICES, AHEAD_WORDS>(m, tile, begin, end, words)
        MOR_FOR_TYPE(m->type, MOR_AHEAD)
#undef MOR_AHEAD
    }
    prefetch_source(p.source, p.input.columns);
    wait_for_previous();
    const u32 n = *p.view.count, slot = p.view.slots[0];
    if (n == 0) return;
    Place place;
    const float scale = make_lone_row(p, slot, row_room, place);
    // The element of thread i: row i % 16 of tile i / 16.
    u32 my_tile = blockIdx.x * runs + threadIdx.x / TILE_ROWS;
    const bool has_element = threadIdx.x < runs * TILE_ROWS && my_tile < p.tiles;
    const Matrix& mine = p.matrices[MATRICES == 1 ? matrix_of(p, my_tile) : 0];
    const u32 row = my_tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
    const bool writes = has_element && row < mine.rows;
    float* to = element(mine, writes ? row : 0, 0, slot);
    const float before = writes && mine.add ? *to : 0;
    if (has_tile) {
        float* sums = parts + place_of_tile * (MATRICES * RUNS * TILE_ROWS);
#define MOR_MULTIPLY(TYPE) \
    if constexpr (TYPE != F32) multiply_lone<TYPE, MATRICES>(m, tile, p.groups, first_run, runs, place, words, sums)
        MOR_FOR_TYPE(m->type, MOR_MULTIPLY)
#undef MOR_MULTIPLY
    }
    __syncthreads();
    if (!writes) return;
    float value[MATRICES];
    for (u32 i = 0; i < MATRICES; i++) {
        const u32 place = threadIdx.x / TILE_ROWS * MATRICES + i;
        const float* sums = parts + place * (RUNS * TILE_ROWS) + threadIdx.x % TILE_ROWS;
        float sum = 0;
        for (u32 r = 0; r < RUNS; r++) sum += sums[r * TILE_ROWS];
        value[i] = finished(sum, scale, (&mine)[i].bias, row);
    }
    if constexpr (MATRICES == 2) value[0] = swiglu(value[0], value[1]);
    *to = mine.add ? __fadd_rn(before, value[0]) : value[0];
}
#endif

// One matrix of several, and a gate with what it lets through. grid: (tiles / tiles of a block); dynamic shared
// memory for the row's floats, halves and sums.
MOR_PRODUCT(mor_lone_product, lone_product<1>, 2)
MOR_PRODUCT(mor_lone_swiglu, lone_product<2>, 2)

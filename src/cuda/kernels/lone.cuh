// Products for a lone row, which the block makes ready itself.
#pragma once
#include "ring.cuh"

#ifdef MOR_TENSOR_CORES
// A warp's groups `begin` to `end` of a tile against a lone row, of which `halves` and `group_sums` are; `parts`
// [MATRICES][RUNS][TILE_ROWS] of this tile gets the sums of its runs `run` to `last_run`.
template <u32 TYPE, u32 MATRICES>
__device__ __forceinline__ void multiply_lone(Ring<TYPE, MATRICES>& ring, u32 begin, u32 end, u32 each,
                                              const u16* halves, const float* group_sums, u32 run, u32 last_run,
                                              float* parts) {
    constexpr u32 groups = Unit<TYPE>::groups;
    constexpr u32 step = Ring<TYPE, MATRICES>::step, unit_bytes = Ring<TYPE, MATRICES>::unit_bytes;
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
    const u32 stage_groups = ring.groups_of_stage();
#pragma unroll 1
    for (u32 group = begin, first = begin / groups * groups; group < end; first += stage_groups) {
        const u8* units = ring.take();
        const u32 until = first + stage_groups < end ? first + stage_groups : end;
#pragma unroll 1
        for (; group < until; group += step) {
            if (group == next) finish_run();
            u32 b[step][2][2], words[step][MATRICES][2 * field_words(TYPE)];
            for (u32 k = 0; k < step; k++) {
                const u8* unit = units + (group + k - first) / groups * unit_bytes;
                read_activations<TYPE>(halves + GROUP * (group + k), b[k]);
                for (u32 i = 0; i < MATRICES; i++)
                    Unit<TYPE>::read(unit + i * Unit<TYPE>::bytes, (group + k) % groups, words[k][i]);
            }
            for (u32 k = 0; k < step; k++) {
                const float of_columns = has_min(TYPE) ? group_sums[group + k] : 0;
                for (u32 i = 0; i < MATRICES; i++)
                    add_products<TYPE>(unpack<TYPE>(words[k][i], (group + k) % groups), b[k], of_columns, of_columns,
                                       sums[i]);
            }
        }
        ring.give_back();
    }
#pragma unroll 1
    while (run < last_run) finish_run();
}

// Bytes of shared memory for a row that is made ready, without its scales and squares.
__device__ __forceinline__ u32 row_bytes(u32 stride) {
    return (2 * (stride + GROUP) + 4 * (stride / GROUP + 1) + 15) / 16 * 16;
}

// A lone row with one matrix of several, or with two that are a gate and what it lets through.
template <u32 TYPE, u32 MAKE, u32 MATRICES>
__device__ __forceinline__ void lone_product(const ProductParams& p) {
    MOR_DYNAMIC_SHARED(uint4, room);
    let_next_begin();
    // A warp takes as many runs of its tile as the block has tiles.
    const u32 log = p.log_tiles, place_of_tile = warp_index() << log >> 3;
    const u32 first_run = warp_index() << log & (RUNS - 1), last_run = first_run + (1 << log);
    const u32 each = p.groups_of_run, begin = first_run * each;
    const u32 end = last_run * each < p.groups ? last_run * each : p.groups;
    u32 tile = (blockIdx.x << log) + place_of_tile;
    if (tile >= p.tiles) tile = p.tiles - 1;
    const Matrix* m = p.matrices;
    if constexpr (MATRICES == 1) m += matrix_of(p, tile);
    // As in product.rs: the tiles' sums; the row's scales, squares, halves and sums, with half a pair of groups
    // beyond the last, which is read too (its weights are zero); the rings.
    const u32 stride = p.input.stride;
    float* parts = reinterpret_cast<float*>(room);
    float* scales = parts + (MATRICES * RUNS * TILE_ROWS << log);
    float* squares = scales + RUNS;
    u16* halves = reinterpret_cast<u16*>(squares + RUNS);
    const Place place = {halves, reinterpret_cast<float*>(halves + stride + GROUP), scales, squares, BY_COLUMN};
    u8* rings = reinterpret_cast<u8*>(halves) + row_bytes(stride);
    if (has_no_rows(p, 0)) return;
    Ring<TYPE, MATRICES> ring;
    ring.begin(m, tile, begin, end, p.stage_units, rings);
    if constexpr (MAKE == NORM) prefetch_source(p.source, p.input.columns);
    wait_for_previous();
    const u32 n = *p.view.count;
    u32 slot = p.slot;
    if (slot == ANY_SLOT) {
        // Of a row that is not there it may be any number.
        slot = p.view.slots[0];
        if (n == 0) return wait_for_copies<0>();
    }
    if (threadIdx.x < GROUP) halves[stride + threadIdx.x] = 0;
    if (threadIdx.x == GROUP) place.sums[stride / GROUP] = 0;
    make_run<MAKE>(p.source, 0, slot, p.input.columns, warp_index(), GROUP * each, has_min(TYPE), place);
    // The element of thread i: row i % 16 of tile i / 16.
    u32 my_tile = (blockIdx.x << log) + threadIdx.x / TILE_ROWS;
    const bool has_element = threadIdx.x < TILE_ROWS << log && my_tile < p.tiles;
    const Matrix& mine = p.matrices[MATRICES == 1 ? matrix_of(p, my_tile) : 0];
    const u32 row = my_tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
    const bool writes = has_element && row < mine.rows && n > 0;
    float* to = element(mine, writes ? row : 0, 0, slot);
    const float before = writes && mine.add ? *to : 0;
    __syncthreads();
    mark(READY);
    if (n == 0) return wait_for_copies<0>();
    multiply_lone<TYPE, MATRICES>(ring, begin, end, each, halves, place.sums, first_run, last_run,
                                  parts + place_of_tile * (MATRICES * RUNS * TILE_ROWS));
    __syncthreads();
    mark(MULTIPLIED);
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
// memory as above.
#define MOR_LONE_PRODUCTS(TYPE, type)                                                \
    MOR_PRODUCT(mor_lone_product_norm_##type, lone_product<TYPE, NORM, 1>)           \
    MOR_PRODUCT(mor_lone_product_plain_##type, lone_product<TYPE, PLAIN, 1>)         \
    MOR_PRODUCT(mor_lone_product_attention_##type, lone_product<TYPE, ATTENTION, 1>) \
    MOR_PRODUCT(mor_lone_swiglu_##type, lone_product<TYPE, NORM, 2>)
MOR_EVERY_TYPE(MOR_LONE_PRODUCTS)
#endif

// Products for a lone row, which the block makes ready itself.
#pragma once
#include "ring.cuh"

#ifdef MOR_TENSOR_CORES
// A block has one team of eight warps or two, which take turns with its tiles; a warp has a run of its team's. The last
// team makes the row ready, and brings its weights after that: the first one's keep the memory busy meanwhile.
__device__ __forceinline__ u32 teams() { return blockDim.x / BLOCK; }
__device__ __forceinline__ u32 team_index() { return threadIdx.x / BLOCK; }

// A warp has both groups of a pair in its registers, or a group of both matrices.
template <u32 TYPE, u32 MATRICES>
using LoneRing = Ring<TYPE, MATRICES, 2, MATRICES == 1 ? 2 : 1>;

// The warp's run of a team's tiles, groups `begin` to `end`, against a lone row, of which `halves` and `group_sums` are;
// `parts` [tiles][MATRICES][RUNS][TILE_ROWS] gets the sums.
template <u32 TYPE, u32 MATRICES>
__device__ __forceinline__ void multiply_lone(LoneRing<TYPE, MATRICES>& ring, u32 tiles, u32 run, u32 begin, u32 end,
                                              const u16* halves, const float* group_sums, float* parts) {
    using Of = typename LoneRing<TYPE, MATRICES>::Of;
    constexpr u32 groups = Of::groups, step = LoneRing<TYPE, MATRICES>::step;
    constexpr u32 of_matrix = RUNS * TILE_ROWS, of_tile = MATRICES * of_matrix;
    const u32 stage_groups = ring.groups_of_stage();
    float* to = parts + team_index() * of_tile + run * TILE_ROWS + lane_index() / 4;
#pragma unroll 1
    for (u32 tile = team_index(); tile < tiles; tile += teams(), to += teams() * of_tile) {
        float sums[MATRICES][4] = {};
#pragma unroll 1
        for (u32 group = begin, first = begin / groups * groups; group < end; first += stage_groups) {
            const u8* units = ring.take();
            const u32 until = first + stage_groups < end ? first + stage_groups : end;
#pragma unroll 1
            for (; group < until; group += step) {
                u32 b[step][2][2], words[step][MATRICES][2 * field_words(TYPE)];
                for (u32 k = 0; k < step; k++) {
                    const u8* unit = units + (group + k - first) / groups * ring.unit_bytes;
                    read_activations<TYPE>(halves + GROUP * (group + k), b[k]);
                    for (u32 i = 0; i < MATRICES; i++)
                        Of::read(unit + i * Of::bytes, (group + k) % groups, words[k][i]);
                }
                for (u32 k = 0; k < step; k++) {
                    const float of_columns = has_min(TYPE) ? group_sums[group + k] : 0;
                    for (u32 i = 0; i < MATRICES; i++)
                        add_products<TYPE>(unpack<TYPE>(words[k][i], (group + k) % groups), b[k], of_columns,
                                           of_columns, sums[i]);
                }
            }
            ring.give_back();
        }
        // All eight columns are the row's.
        if (lane_index() % 4 == 0)
            for (u32 i = 0; i < MATRICES; i++) to[i * of_matrix] = sums[i][0], to[i * of_matrix + 8] = sums[i][2];
    }
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
    const u32 block = blockIdx.x, longer = p.longer_blocks;
    const u32 tiles = p.tiles_of_block + (block < longer ? 1 : 0);
    const u32 first_tile = block * p.tiles_of_block + (block < longer ? block : longer);
    const u32 run = warp_index() % RUNS, each = p.groups_of_run, begin = run * each;
    const u32 end = begin + each < p.groups ? begin + each : p.groups;
    // As in product.rs: the tiles' sums; the row's scales, squares, halves and sums, with half a pair of groups
    // beyond the last, which is read too (its weights are zero); the rings.
    const u32 stride = p.input.stride;
    float* parts = reinterpret_cast<float*>(room);
    float* scales = parts + MATRICES * RUNS * TILE_ROWS * (p.tiles_of_block + (longer > 0 ? 1 : 0));
    float* squares = scales + RUNS;
    u16* halves = reinterpret_cast<u16*>(squares + RUNS);
    const Place place = {halves, reinterpret_cast<float*>(halves + stride + GROUP), scales, squares, BY_COLUMN};
    u8* rings = reinterpret_cast<u8*>(halves) + row_bytes(stride);
    // A block that is there only so that each multiprocessor has one.
    if (tiles == 0) return wait_for_previous();
    if (has_no_rows(p, 0)) return;
    LoneRing<TYPE, MATRICES> ring(p, first_tile + team_index(), first_tile + tiles, teams(), begin, end, rings);
    const bool first_team = team_index() == 0, makes = team_index() + 1 == teams();
    if (first_team) ring.fill_all();
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
    if (makes) make_run<MAKE>(p.source, 0, slot, p.input.columns, run, GROUP * each, has_min(TYPE), place);
    if (!first_team) ring.fill_all();
    // The element of thread i: row i % 16 of tile i / 16.
    const bool has_element = threadIdx.x < TILE_ROWS * tiles;
    u32 my_tile = first_tile + (has_element ? threadIdx.x / TILE_ROWS : 0);
    const Matrix& mine = *ring.matrices_of(my_tile);
    const u32 row = my_tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
    const bool writes = has_element && row < mine.rows && n > 0;
    float* to = element(mine, writes ? row : 0, 0, slot);
    const float before = writes && mine.add ? *to : 0;
    __syncthreads();
    mark(READY);
    if (n == 0) return wait_for_copies<0>();
    multiply_lone<TYPE, MATRICES>(ring, tiles, run, begin, end, halves, place.sums, parts);
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

// One matrix of several, and a gate with what it lets through. grid: (blocks); dynamic shared memory as above.
#define MOR_LONE(name, ...) MOR_WORK(name, ProductParams, (2 * BLOCK, 1), __VA_ARGS__)
#define MOR_LONE_PRODUCTS(TYPE, type)                                             \
    MOR_LONE(mor_lone_product_norm_##type, lone_product<TYPE, NORM, 1>)           \
    MOR_LONE(mor_lone_product_plain_##type, lone_product<TYPE, PLAIN, 1>)         \
    MOR_LONE(mor_lone_product_attention_##type, lone_product<TYPE, ATTENTION, 1>) \
    MOR_LONE(mor_lone_swiglu_##type, lone_product<TYPE, NORM, 2>)
MOR_EVERY_TYPE(MOR_LONE_PRODUCTS)
#endif

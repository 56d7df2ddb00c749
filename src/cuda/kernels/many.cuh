// Products for rows that are ready, 8 or 32 a block.
#pragma once
#include "ring.cuh"

#ifdef MOR_TENSOR_CORES
// A warp's run of a tile, groups `begin` to `end`, against rows `first` to `n` of `x`, at most `TILES` times
// eight.
template <u32 TYPE, u32 TILES>
__device__ __forceinline__ void multiply(Ring<TYPE, 1>& ring, u32 begin, u32 end, const Prepared& x, u32 first, u32 n,
                                         float sums[TILES][4]) {
    constexpr u32 groups = Unit<TYPE>::groups;
    const u32 used = (n - first + 7) / 8;
    // Beyond the last row that again: what comes of it is not written.
    const u16* rows[TILES];
#pragma unroll
    for (u32 c = 0; c < TILES; c++) {
        const u32 row = first + 8 * c + lane_index() / 4;
        rows[c] = x.halves + static_cast<u64>(row < n ? row : n - 1) * x.stride;
    }
    // Activations come late too, so those of the next two groups are read meanwhile.
    u32 next[2][TILES][2][2] = {};
    const auto read = [&](u32 group, u32 k) {
        if (group >= end) return;
#pragma unroll
        for (u32 c = 0; c < TILES; c++)
            if (c < used) read_activations<TYPE>(rows[c] + GROUP * group, next[k][c]);
    };
    read(begin, 0);
    read(begin + 1, 1);
    const u32 stage_groups = ring.groups_of_stage();
#pragma unroll 1
    for (u32 group = begin, start = begin / groups * groups; group < end; start += stage_groups) {
        const u8* units = ring.take();
        const u32 until = start + stage_groups < end ? start + stage_groups : end;
#pragma unroll 1
        for (; group < until; group += 2) {
#pragma unroll
            for (u32 k = 0; k < 2; k++) {
                if (group + k >= end) break;
                u32 b[TILES][2][2], words[2 * field_words(TYPE)];
#pragma unroll
                for (u32 c = 0; c < TILES; c++)
                    for (u32 i = 0; i < 4; i++) b[c][i / 2][i % 2] = next[k][c][i / 2][i % 2];
                read(group + k + 2, k);
                const u8* unit = units + (group + k - start) / groups * Unit<TYPE>::bytes;
                Unit<TYPE>::read(unit, (group + k) % groups, words);
                const Fragments f = unpack<TYPE>(words, (group + k) % groups);
#pragma unroll
                for (u32 c = 0; c < TILES; c++) {
                    if (c >= used) continue;
                    const float2 of =
                        sums_of_columns<TYPE>(x, first + 8 * c + 2 * (lane_index() % 4), n, group + k);
                    add_products<TYPE>(f, b[c], of.x, of.y, sums[c]);
                }
            }
        }
        ring.give_back();
    }
}

// Floats from one column of a warp's sums to the next, so that a warp's writes meet all banks.
constexpr u32 COLUMN_STRIDE = TILE_ROWS + 4;

// Adds up the warps' sums of a matrix, each times its run's scale in `scales` of the column. Thread i gets
// elements i, i + BLOCK, … of the tile, [columns][rows].
template <u32 TILES>
__device__ __forceinline__ void add_warps(const float sums[TILES][4], float* parts, const float* scales,
                                          u32 columns_used, float out[(TILES + 1) / 2]) {
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
    // The warps' sums and the rings.
    MOR_DYNAMIC_SHARED(uint4, room);
    float* parts = reinterpret_cast<float*>(room);
    u8* rings = reinterpret_cast<u8*>(parts + WARPS * 8 * TILES * COLUMN_STRIDE);
    let_next_begin();
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    const u32 each = p.groups_of_run, begin = warp_index() * each;
    const u32 end = begin + each < p.groups ? begin + each : p.groups;
    const u32 first = blockIdx.y * 8 * TILES;
    if (has_no_rows(p, first)) return;
    Ring<TYPE, 1> ring;
    ring.begin(&m, tile, begin, end, p.stage_units, rings);
    wait_for_previous();
    const u32 n = *p.view.count;
    if (first >= n) return wait_for_copies<0>();
    float sums[TILES][4] = {};
    multiply<TYPE, TILES>(ring, begin, end, p.input, first, n, sums);
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

// grid: (tiles of the matrices, rows / 8 or 32); dynamic shared memory as above.
#define MOR_READY_PRODUCTS(TYPE, type)                                    \
    MOR_PRODUCT(mor_few_product_##type, ready_product<TYPE, 1>)           \
    MOR_PRODUCT(mor_many_product_##type, ready_product<TYPE, MANY / 8>)
MOR_EVERY_TYPE(MOR_READY_PRODUCTS)
#endif

// Products in single precision throughout.
#pragma once
#include "products.cuh"

// A warp's groups of a tile against up to `COLUMNS` rows of floats.
template <u32 TYPE, u32 COLUMNS>
__device__ __forceinline__ void tile_by_fma(const ProductParams& p, const Matrix& m, const float* floats, u32 tile,
                                            u32 first, u32 n, float sums[2][COLUMNS]) {
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    const u32 each = p.groups_of_run, begin = warp_index() * each, groups = p.groups;
    const u32 end = begin + each < groups ? begin + each : groups;
    for (u32 group = begin; group < end; group++) {
        float w[2][8];
        for (u32 upper = 0; upper < 2; upper++)
            decode<TYPE>(m, tile * TILE_ROWS + g + 8 * upper, group, t, w[upper]);
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++) {
            if (first + c >= n) break;
            const float* x = floats + static_cast<u64>(first + c) * p.input.stride + GROUP * group + 4 * t;
            float4 x0 = *reinterpret_cast<const float4*>(x);
            float4 x1 = *reinterpret_cast<const float4*>(x + 16);
            for (u32 upper = 0; upper < 2; upper++) {
                float s = sums[upper][c];
                s = fmaf(w[upper][0], x0.x, s);
                s = fmaf(w[upper][1], x0.y, s);
                s = fmaf(w[upper][2], x0.z, s);
                s = fmaf(w[upper][3], x0.w, s);
                s = fmaf(w[upper][4], x1.x, s);
                s = fmaf(w[upper][5], x1.y, s);
                s = fmaf(w[upper][6], x1.z, s);
                s = fmaf(w[upper][7], x1.w, s);
                sums[upper][c] = s;
            }
        }
    }
}

// SINGLE: matrices of F32 only, as routers mostly are.
template <bool LONE, bool SINGLE>
__device__ __forceinline__ void product_by_fma(const ProductParams& p) {
    enter();
    constexpr u32 COLUMNS = LONE ? 1 : FEW;
    // The lone row, and the warps' sums, [WARPS][TILE_ROWS][COLUMNS].
    MOR_DYNAMIC_SHARED(float, row_room);
    const u32 n = *p.view.count, first = blockIdx.y * FEW;
    if (first >= n) return;
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    const float* floats = p.input.floats;
    if constexpr (LONE) {
        make_floats<false>(p.source, 0, p.view.slots[0], p.input.columns, p.input.stride, row_room);
        __syncthreads();
        floats = row_room;
    }
    const u32 columns = LONE ? 1 : n;
    float sums[2][COLUMNS] = {};
#define MOR_TILE(TYPE) tile_by_fma<TYPE, COLUMNS>(p, m, floats, tile, first, columns, sums)
    if constexpr (SINGLE) {
        MOR_TILE(F32);
    } else {
        MOR_FOR_TYPE(m.type, MOR_TILE)
    }
#undef MOR_TILE
    float* parts = row_room + (LONE ? p.input.stride : 0);
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    for (u32 upper = 0; upper < 2; upper++)
        for (u32 c = 0; c < COLUMNS; c++) {
            float s = sums[upper][c];
            s += __shfl_xor_sync(ALL_LANES, s, 1);
            s += __shfl_xor_sync(ALL_LANES, s, 2);
            if (t == 0) parts[(warp_index() * TILE_ROWS + g + 8 * upper) * COLUMNS + c] = s;
        }
    __syncthreads();
    if (threadIdx.x >= TILE_ROWS * COLUMNS) return;
    // Neighbouring threads write neighbouring outputs.
    const u32 row = tile * TILE_ROWS + threadIdx.x % TILE_ROWS, c = threadIdx.x / TILE_ROWS;
    if (row >= m.rows || first + c >= columns) return;
    float value = 0;
    for (u32 w = 0; w < WARPS; w++) value += parts[(w * TILE_ROWS + threadIdx.x % TILE_ROWS) * COLUMNS + c];
    if (m.bias) value += m.bias[row];
    float* to = element(m, row, first + c, m.by_slot ? p.view.slots[first + c] : 0);
    *to = m.add ? *to + value : value;
}

// Matrices of F32, rows that are not whole groups, devices without tensor cores for halves. grid: (tiles of
// all matrices, rows / 8); `lone_exact` makes a lone row ready, with shared memory as above.
MOR_WORK(mor_lone_exact, ProductParams, (BLOCK), product_by_fma<true, false>)
MOR_WORK(mor_lone_exact_f32, ProductParams, (BLOCK), product_by_fma<true, true>)
MOR_WORK(mor_exact, ProductParams, (BLOCK), product_by_fma<false, false>)
MOR_WORK(mor_exact_f32, ProductParams, (BLOCK), product_by_fma<false, true>)

// Matrix products. A block computes sixteen rows of a matrix for some rows of activations; its warps
// take the columns in groups of 32 by turns and their sums are added in the order of the warps. So a
// result depends on the matrix and its own row of activations only, however many rows come along.
#pragma once
#include "rows.cuh"

struct ProductParams {
    Matrix matrices[3];
    u32 count;
    // Groups of 32 columns.
    u32 groups;
    Prepared input;
    View view;
};

// Columns of activations that a block takes at most: with tensor cores, without.
constexpr u32 MANY = 64;
constexpr u32 FEW = 8;

#ifdef MOR_TENSOR_CORES
// A warp's groups of a tile against `TILES` times eight rows of activations.
template <u32 TYPE, u32 TILES>
__device__ __forceinline__ void tile_by_tensor_cores(const Matrix& m, const ProductParams& p, u32 tile,
                                                     u32 first, u32 n, float sums[TILES][4]) {
    const u32 lane = lane_index(), g = lane / 4, t = lane % 4;
    const u8* data = m.data + static_cast<u64>(tile) * TILE_ROWS * m.row_bytes;
    const Prepared& x = p.input;
    const u32 used = (n - first + 7) / 8;
#pragma unroll 2
    for (u32 group = warp_index(); group < p.groups; group += WARPS) {
        // Fragments of two steps of sixteen columns: rows g and g + 8.
        u32 a[2][4];
        float scales[2][2], mins[2];
        for (u32 upper = 0; upper < 2; upper++) {
            u32 row = g + 8 * upper;
            if constexpr (block_columns(TYPE) == 1) {
                u32 at = tile * TILE_ROWS + row;
                const u16* w = reinterpret_cast<const u16*>(data + static_cast<u64>(row) * m.row_bytes);
                for (u32 step = 0; step < 2; step++) {
                    uint2 bits = make_uint2(0, 0);
                    if (at < m.rows)
                        bits = *reinterpret_cast<const uint2*>(w + GROUP * group + 16 * step + 4 * t);
                    if constexpr (TYPE == BF16) {
                        bits.x = pair_of_halves(__uint_as_float(bits.x << 16),
                                                __uint_as_float(bits.x & 0xffff0000u));
                        bits.y = pair_of_halves(__uint_as_float(bits.y << 16),
                                                __uint_as_float(bits.y & 0xffff0000u));
                    }
                    a[step][upper] = bits.x;
                    a[step][2 + upper] = bits.y;
                }
            } else {
                Codes w = codes<TYPE>(data, group, row, t);
                u32 halves[2];
                bytes_to_halves<code_offset(TYPE)>(w.low, halves);
                a[0][upper] = halves[0];
                a[0][2 + upper] = halves[1];
                bytes_to_halves<code_offset(TYPE)>(w.high, halves);
                a[1][upper] = halves[0];
                a[1][2 + upper] = halves[1];
                scales[0][upper] = w.low_scale;
                scales[1][upper] = w.high_scale;
                mins[upper] = w.min;
            }
        }
        for (u32 c = 0; c < TILES; c++) {
            if (c >= used) break;
            u32 column = first + 8 * c + g;
            uint2 x0 = make_uint2(0, 0), x1 = x0;
            if (column < n) {
                const u16* from = x.halves + static_cast<u64>(column) * x.stride + GROUP * group + 4 * t;
                x0 = *reinterpret_cast<const uint2*>(from);
                x1 = *reinterpret_cast<const uint2*>(from + 16);
            }
            const u32 b[2][2] = {{x0.x, x0.y}, {x1.x, x1.y}};
            if constexpr (block_columns(TYPE) == 1) {
                multiply_add(sums[c], a[0], b[0]);
                multiply_add(sums[c], a[1], b[1]);
            } else if constexpr (TYPE == Q6_K) {
                float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
                multiply_add(low, a[0], b[0]);
                multiply_add(high, a[1], b[1]);
                for (u32 i = 0; i < 4; i++)
                    sums[c][i] += low[i] * scales[0][i / 2] + high[i] * scales[1][i / 2];
            } else {
                float both[4] = {0, 0, 0, 0};
                multiply_add(both, a[0], b[0]);
                multiply_add(both, a[1], b[1]);
                for (u32 i = 0; i < 4; i++) sums[c][i] += both[i] * scales[0][i / 2];
                if constexpr (has_min(TYPE)) {
                    u32 pair = first + 8 * c + 2 * t;
                    for (u32 i = 0; i < 2; i++) {
                        if (pair + i >= n) break;
                        float sum = x.sums[static_cast<u64>(pair + i) * (x.stride / GROUP) + group];
                        sums[c][i] -= mins[0] * sum;
                        sums[c][2 + i] -= mins[1] * sum;
                    }
                }
            }
        }
    }
}
#endif

// As above with single-precision activations and up to `FEW` rows of them.
template <u32 TYPE>
__device__ __forceinline__ void tile_by_fma(const Matrix& m, const ProductParams& p, u32 tile, u32 first,
                                            u32 n, float sums[2][FEW]) {
    const u32 lane = lane_index(), g = lane / 4, t = lane % 4;
    for (u32 group = warp_index(); group < p.groups; group += WARPS) {
        float w[2][8];
        for (u32 upper = 0; upper < 2; upper++)
            decode<TYPE>(m, tile * TILE_ROWS + g + 8 * upper, group, t, w[upper]);
        for (u32 c = 0; c < FEW; c++) {
            if (first + c >= n) break;
            const float* x = p.input.floats + static_cast<u64>(first + c) * p.input.stride + GROUP * group + 4 * t;
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

// The matrix of a block's tile; `tile` becomes its number in the matrix.
__device__ __forceinline__ u32 matrix_of(const ProductParams& p, u32& tile) {
    u32 which = 0;
    while (which + 1 < p.count) {
        u32 tiles = (p.matrices[which].rows + TILE_ROWS - 1) / TILE_ROWS;
        if (tile < tiles) break;
        tile -= tiles;
        which++;
    }
    return which;
}

// Adds up the warps' sums [WARPS][TILE_ROWS][columns] and writes what comes out.
__device__ __forceinline__ void write_tile(const Matrix& m, const ProductParams& p, const float* parts,
                                           u32 tile, u32 first, u32 n, u32 columns, bool scaled) {
    for (u32 i = threadIdx.x; i < TILE_ROWS * columns; i += BLOCK) {
        // Neighbouring threads write neighbouring outputs.
        u32 row = tile * TILE_ROWS + i % TILE_ROWS, c = first + i / TILE_ROWS;
        if (row >= m.rows || c >= n) continue;
        float sum = 0;
        for (u32 w = 0; w < WARPS; w++)
            sum += parts[(w * TILE_ROWS + i % TILE_ROWS) * columns + i / TILE_ROWS];
        if (scaled) sum *= p.input.scales[c];
        if (m.bias) sum += m.bias[row];
        u32 to = m.by_slot ? p.view.slots[c] : c;
        float* out = m.out + static_cast<u64>(to) * m.out_stride + row;
        *out = m.add ? *out + sum : sum;
    }
}

#ifdef MOR_TENSOR_CORES
template <u32 TILES>
__device__ __forceinline__ void product_by_tensor_cores(const ProductParams& p) {
    const u32 n = *p.view.count, first = blockIdx.y * 8 * TILES;
    if (first >= n) return;
    __shared__ float parts[WARPS * TILE_ROWS * 8 * TILES];
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    float sums[TILES][4] = {};
#define MOR_TILE(TYPE)          \
    if constexpr (TYPE != F32) tile_by_tensor_cores<TYPE, TILES>(m, p, tile, first, n, sums)
    MOR_FOR_TYPE(m.type, MOR_TILE)
#undef MOR_TILE
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    for (u32 c = 0; c < TILES; c++)
        for (u32 i = 0; i < 4; i++)
            parts[(warp_index() * TILE_ROWS + g + i / 2 * 8) * 8 * TILES + 8 * c + 2 * t + i % 2] = sums[c][i];
    __syncthreads();
    write_tile(m, p, parts, tile, first, n, 8 * TILES, true);
}
#endif

// grid: (tiles of all matrices, rows / 8)
extern "C" __global__ void __launch_bounds__(BLOCK) mor_product_few(const ProductParams p) {
#ifdef MOR_TENSOR_CORES
    product_by_tensor_cores<1>(p);
#endif
}
MOR_KERNEL(mor_product_few)

// grid: (tiles of all matrices, rows / 64)
extern "C" __global__ void __launch_bounds__(BLOCK) mor_product_many(const ProductParams p) {
#ifdef MOR_TENSOR_CORES
    product_by_tensor_cores<MANY / 8>(p);
#endif
}
MOR_KERNEL(mor_product_many)

// Single precision throughout: matrices of F32, rows that are not whole groups, devices without tensor
// cores for halves. grid: (tiles of all matrices, rows / 8)
extern "C" __global__ void __launch_bounds__(BLOCK) mor_product_exact(const ProductParams p) {
    const u32 n = *p.view.count, first = blockIdx.y * FEW;
    if (first >= n) return;
    __shared__ float parts[WARPS * TILE_ROWS * FEW];
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    float sums[2][FEW] = {};
#define MOR_TILE(TYPE) tile_by_fma<TYPE>(m, p, tile, first, n, sums)
    MOR_FOR_TYPE(m.type, MOR_TILE)
#undef MOR_TILE
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    for (u32 upper = 0; upper < 2; upper++)
        for (u32 c = 0; c < FEW; c++) {
            float s = sums[upper][c];
            s += __shfl_xor_sync(ALL_LANES, s, 1);
            s += __shfl_xor_sync(ALL_LANES, s, 2);
            if (t == 0) parts[(warp_index() * TILE_ROWS + g + 8 * upper) * FEW + c] = s;
        }
    __syncthreads();
    write_tile(m, p, parts, tile, first, n, FEW, false);
}
MOR_KERNEL(mor_product_exact)

// Matrix products. Columns are cut into eight runs, whose sums are added in their order. So a result depends
// on the matrix and its own row of activations only, however many rows come along. A block computes sixteen
// rows of a matrix, a tile, for some rows of activations, each warp a run (many.cuh); or for a lone row several
// tiles, each warp a run of its team's (lone.cuh); or, for more rows, several tiles without sharing their columns
// among the warps (wide.cuh). exact.cuh is for what tensor cores cannot do.
#pragma once
#include "fragments.cuh"

struct ProductParams {
    // All of one type, but for single precision.
    Matrix matrices[3];
    // The first tile of each, ~0 where there is none.
    u32 first_tiles[3];
    u32 tiles;
    // Groups of 32 columns, and of those in a run: an eighth, in whole pairs. The last runs may have fewer or none.
    u32 groups;
    u32 groups_of_run;
    // A lone row: its blocks take so many tiles each, the first `longer_blocks` one more.
    u32 tiles_of_block;
    u32 longer_blocks;
    // Units in a stage of a warp's ring (ring.cuh).
    u32 stage_units;
    // A lone row's slot, if that is known.
    u32 slot;
    // Zero, which the compiler does not know (wide.cuh, warpgroup.cuh).
    u32 zero;
    // By warpgroups: blocks of rows, if all rows come.
    u32 row_blocks;
    // Few or many rows: how many may come, and groups of activations that a block waits for together.
    u32 rows;
    u32 groups_at_once;
    Prepared input;
    View view;
    // A lone row: what it is made of, for the block makes it ready itself.
    Source source;
};

constexpr u32 ANY_SLOT = 0xffffffffu;

// Rows of activations that a block takes at a time, at most, of many and of few; without tensor cores few.
constexpr u32 MANY = 32;
constexpr u32 FEW = 8;

// The matrix of a block's tile; `tile` becomes its number in the matrix.
__device__ __forceinline__ u32 matrix_of(const ProductParams& p, u32& tile) {
    const u32 which = (tile >= p.first_tiles[1]) + (tile >= p.first_tiles[2]);
    tile -= p.first_tiles[which];
    return which;
}

// Whether a block first looks if it has rows, and then brings weights: where there is no time to win, and where
// it may well have none. `first`: its first row.
__device__ __forceinline__ bool has_no_rows(const ProductParams& p, u32 first) {
    if (KERNELS_OVERLAP && first == 0) return false;
    wait_for_previous();
    return first >= *p.view.count;
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
#define MOR_PRODUCT(name, ...) MOR_WORK(name, ProductParams, (BLOCK, 2), __VA_ARGS__)
#endif

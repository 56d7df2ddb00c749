// Products for passes of many rows on devices of 9.0: as wide.cuh, to the same bits, but four warps multiply together,
// and tensor cores read activations from shared memory themselves. So shared memory gives each warp its weights only,
// and twice as many multiplications fit into a cycle.
//
// A warp waits for its products before it goes on, while the others of the multiprocessor have theirs: ptxas (12.6)
// takes the registers of weights as free as soon as a product has begun, though tensor cores may still read them. So
// nothing may stand between beginning products and waiting for them.
//
// The sums have the same order: Hopper's tensor cores add sixteen products and a sum by one rule for both kinds of
// instructions (Xie et al., MMA-Sim, arXiv:2511.10909: 25 bits below the largest, then cut off), whatever the order of
// the sixteen, so that all that matters is which columns a step has. These are as in fragments.cuh; activations stand
// in the order of its lanes (`Order` in ready.cuh).
//
// The sizes, for halves and a group: 128 × 64 (weights × activations) copies 12 KiB and reads 8 and twice 4 KiB of
// shared memory, which takes 224 cycles, for 128 cycles of tensor cores; 128 × 128 takes 320 for 256.
#pragma once
#include "wide.cuh"

#ifdef MOR_WARPGROUPS
// The next pair's copies are there, and those of one behind it begin.
template <class W>
__device__ __forceinline__ void take_pair(Copies<W>& copies) {
    wait_for_copies<Copies<W>::LEAD - 1>();
    show_tensor_cores();
    __syncthreads();
    copies.next();
}

// Multiplies a pair of a plain type with 8 · C rows, and adds it to the run.
template <class W, u32 C>
__device__ __forceinline__ void multiply_plain(const W& w, u32 pair, u32 tile, u32 zero, float run[C][4]) {
    const SharedRows rows(w.stage(pair));
    const Fragments f[2] = {w.read_weights(pair, tile, 0, zero), w.read_weights(pair, tile, 1, zero)};
    begin_products();
    begin_multiply<C>(run, f[0].a[0], rows.from_step(0), true);
    begin_multiply<C>(run, f[0].a[1], rows.from_step(1), true);
    begin_multiply<C>(run, f[1].a[0], rows.from_step(2), true);
    begin_multiply<C>(run, f[1].a[1], rows.from_step(3), true);
    end_products();
}

// Multiplies a pair of a type of blocks, of which the second group may be missing, and adds it to the run.
template <u32 TYPE, class W, u32 C>
__device__ __forceinline__ void multiply_blocks(const W& w, u32 pair, u32 tile, u32 groups, u32 zero,
                                                float run[C][4]) {
    // Steps that are scaled together.
    constexpr u32 each = has_two_scales(TYPE) ? 1 : 2;
    u8* stage = w.stage(pair);
    const SharedRows rows(stage);
#pragma unroll 1
    for (u32 i = 0; i < 2; i++) {
        if (2 * pair + i >= groups) break;
        const Fragments f = w.read_weights(pair, tile, i, zero);
#pragma unroll
        for (u32 step = 0; step < 2; step += each) {
            float products[C][4];
            begin_products();
            for (u32 k = 0; k < each; k++)
                begin_multiply<C>(products, f.a[step + k], rows.from_step(2 * i + step + k), k > 0);
            end_products();
#pragma unroll
            for (u32 c = 0; c < C; c++) {
                const float2 of = has_min(TYPE) ? pair_of_columns(W::sums(stage) + i * W::rows, 0, c)
                                                : make_float2(0, 0);
                add_scaled<TYPE>(f, step, products[c], of.x, of.y, run[c]);
            }
        }
    }
}

// A warp has one of the block's eight tiles.
template <u32 TYPE, u32 C>
__device__ __forceinline__ void warpgroup_product(const ProductParams& p) {
    using W = Wide<TYPE, WARPS, 8 * C, C == 16 ? (208 << 10) : (104 << 10), true>;
    MOR_DYNAMIC_SHARED(uint4, room);
    let_next_begin();
    const W w(room);
    const u32 pairs = (p.groups + 1) / 2, pairs_of_run = p.groups_of_run / 2;
    const u32 first = blockIdx.y * W::rows, tile = warp_index();
    const u32 n = begin_weights(w, p, first);
    if (n == 0) return;
    Copies<W> copies(w, p, first, n);

    float run[1][C][4], sums[1][C][4];
    clear<1, C>(sums);
#pragma unroll 1
    for (u32 pair = 0; pair < pairs;) {
        const u32 end = pair + pairs_of_run < pairs ? pair + pairs_of_run : pairs;
        clear<1, C>(run);
#pragma unroll 1
        for (; pair < end; pair++) {
            take_pair<W>(copies);
            if constexpr (W::plain)
                multiply_plain<W, C>(w, pair, tile, p.zero, run[0]);
            else
                multiply_blocks<TYPE, W, C>(w, pair, tile, p.groups, p.zero, run[0]);
        }
        add_run<W, 1, C>(w.stage(pair - 1), 0, run, sums);
    }
    write_products<W, 1, C>(p, blockIdx.x, tile, first, n, sums);
}

// grid: (tiles / 8, rows / 64 or 128).
#define MOR_WARPGROUP_PRODUCTS(TYPE, type)                                                              \
    MOR_WORK(mor_warpgroup_product_128x64_##type, ProductParams, (BLOCK, 2), warpgroup_product<TYPE, 8>) \
    MOR_WORK(mor_warpgroup_product_128x128_##type, ProductParams, (BLOCK, 1), warpgroup_product<TYPE, 16>)
MOR_EVERY_TYPE(MOR_WARPGROUP_PRODUCTS)
#endif

// Products for passes of many rows on devices of 9.0: as wide.cuh, to the same bits, but four warps multiply together,
// and tensor cores read activations from shared memory themselves. So shared memory gives each warp its weights only,
// and twice as many multiplications fit into a cycle.
//
// Warps have roles: four bring weights and activations, two warpgroups multiply. What a warp does beside multiplying
// is then little, and a warpgroup's products fill the tensor cores while the other gets its weights. Gates in shared
// memory tell when a stage is full, and when it is free again. A multiprocessor has one block, which goes through its
// part of all products; the next one's first pairs are on their way while results are written.
//
// ptxas (12.6) takes the registers of weights as free as soon as a product has begun, though tensor cores may still
// read them. So either nothing stands between beginning products and waiting for them, or what comes into the registers
// next is computed from what is in them (`KeptWeights`), by which they are not free.
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
// Threads that bring, the first ones; those that multiply come after them.
constexpr u32 BRINGERS = 4 * WARP, WARPGROUPS_BLOCK = BRINGERS + BLOCK;
// Shared memory for a block, as `WideProduct` in functions.rs; also where these kernels are emulated.
constexpr u32 WARPGROUPS_ROOM = 208 << 10;

// Of each stage a gate that opens when it is full, and one that opens when all warps are done with it.
template <class W>
struct Gates {
    u32 full, done;

    __device__ __forceinline__ explicit Gates(const uint4* room)
        : full(only_here(place_in_shared(room))), done(full + W::stages * GATE_BYTES) {
        static_assert(2 * MOST_STAGES * GATE_BYTES <= GATES_BYTES, "as Wide has room for");
    }
};

// The stage of a pair, and how often it was used before. `number` counts the pairs of all parts.
template <class W>
struct Progress {
    u32 number = 0, stage = 0, use = 0;

    __device__ __forceinline__ void next() {
        number++;
        if (++stage == W::stages) stage = 0, use++;
    }
    __device__ __forceinline__ u32 unit() const { return W::pairwise ? stage : W::unit_of(number); }
};

// A block's parts of a product: every `gridDim.x`th of the blocks of tiles and rows. Those with the same tiles stand
// together, so that their weights come from the second cache. Some may have no rows.
template <class W>
__device__ __forceinline__ u32 count_parts(const ProductParams& p) {
    return (p.tiles + W::tiles - 1) / W::tiles * p.row_blocks;
}

// What a thread brings of a block's weights and activations.
template <class W>
struct Bringer {
    // Chunks of a source's unit, and of all that a thread has some of.
    static constexpr u32 each = W::unit_bytes / CHUNK_BYTES, all = W::sources * each;
    static constexpr u32 mine = (all + BRINGERS - 1) / BRINGERS, my_rows = W::rows * W::chunks / BRINGERS;
    static constexpr u32 ROWS_APART = BRINGERS / W::chunks;
    // A stage is brought again when the pair that had it is done; a unit must not have been taken from since.
    static_assert(W::pairwise || W::stages <= W::unit_groups / 2 + 1, "the unit before the last is free");
    static_assert(ROWS_APART % 8 == 0, "a thread's chunks of rows are apart by whole eights of rows");

    const W& w;
    const ProductParams& p;
    // Its chunks of the next unit and of the next pair of rows.
    const uint4 *weights[mine], *rows[my_rows];
    // The block's first row and how many there are from it on.
    u32 first, count;
    // Places of the thread's first chunks in the first unit and stage.
    u32 to_unit, to_stage;

    __device__ __forceinline__ Bringer(const W& w, const ProductParams& p) : w(w), p(p) {
        const u32 row = threadIdx.x / W::chunks, chunk = threadIdx.x % W::chunks;
        to_unit = only_here(place_in_shared(w.weights)) + (W::plain ? place_of_chunk(row, chunk) : CHUNK_BYTES * threadIdx.x);
        to_stage = only_here(place_in_shared(w.activations)) + swizzled_place_of_chunk(row, chunk);
    }

    // Of block `block` of tiles.
    __device__ __forceinline__ void begin_weights(u32 block) {
#pragma unroll
        for (u32 k = 0; k < mine; k++) {
            const u32 i = k * BRINGERS + threadIdx.x, chunk = i < all ? i : 0;
            weights[k] = W::source(p, block, chunk / each) + (W::plain ? W::to_chunk(p, chunk % each) : chunk % each);
        }
    }

    __device__ __forceinline__ void begin_rows(u32 first_row, u32 n) {
        first = first_row, count = n - first_row;
#pragma unroll
        for (u32 k = 0; k < my_rows; k++)
            rows[k] = reinterpret_cast<const uint4*>(p.input.halves) +
                      row(threadIdx.x / W::chunks + k * ROWS_APART) * (p.input.stride / 8) + threadIdx.x % W::chunks;
    }

    // Beyond the last row that again.
    __device__ __forceinline__ u32 row(u32 i) const { return first + (i < count ? i : count - 1); }

    // Whether the group of the thread's chunks of rows exists.
    __device__ __forceinline__ bool exists(u32 pair) const {
        return 2 * pair + threadIdx.x % W::chunks / (W::chunks / 2) < p.groups;
    }

    // The weights of the part's next pair, its number `pair`. Of plain types the second group, if it is missing, is
    // zeros.
    __device__ __forceinline__ void bring_weights(const Progress<W>& at, u32 pair) {
        constexpr u32 pairs_of_unit = W::unit_groups / 2;
        if (pair % pairs_of_unit == 0) {
            const u32 unit = to_unit + at.unit() * W::bytes_of_unit, left = p.matrices[0].row_bytes - pair / pairs_of_unit * each;
#pragma unroll
            for (u32 k = 0; k < mine; k++) {
                const u32 i = k * BRINGERS + threadIdx.x, to = unit + k * BRINGERS * CHUNK_BYTES;
                if constexpr (W::plain)
                    begin_copy<CHUNK_BYTES>(to, weights[k], exists(pair));
                // Of a pair the second group may be missing. A tile has as many chunks as a row bytes.
                else if ((all % BRINGERS == 0 || i < all) && (W::block_groups > 1 || i % each < left))
                    begin_copy<CHUNK_BYTES>(to, weights[k]);
                weights[k] += W::plain ? 2 * W::group_step(p) : each;
            }
        }
    }

    // Its rows; and what its run is scaled by, where the pair is the last of run `run`.
    __device__ __forceinline__ void bring_rows(const Progress<W>& at, u32 pair, bool is_last, u32 run) {
        const u32 stage = to_stage + at.stage * W::stage_bytes;
#pragma unroll
        for (u32 k = 0; k < my_rows; k++) {
            if (exists(pair) || W::plain)
                begin_copy<CHUNK_BYTES>(stage + k * ROWS_APART * PAIR_BYTES, rows[k], exists(pair));
            rows[k] += W::chunks;
        }
        if constexpr (W::has_sums) {
            const Prepared& x = p.input;
#pragma unroll
            for (u32 start = 0; start < 2 * W::rows; start += BRINGERS) {
                const u32 i = start + threadIdx.x, group = 2 * pair + i / W::rows;
                if (group < p.groups)
                    begin_copy<4>(W::sums(w.stage_at(at.stage)) + i, x.sums + row(i % W::rows) * (x.stride / GROUP) + group);
            }
        }
        if (is_last && threadIdx.x < W::rows)
            begin_copy<4>(W::scales(w.stage_at(at.stage)) + threadIdx.x, p.input.scales + row(threadIdx.x) * RUNS + run);
    }
};

template <class W>
__device__ __forceinline__ void bring_all(const W& w, const ProductParams& p, const Gates<W>& gates) {
    const u32 pairs = (p.groups + 1) / 2, pairs_of_run = p.groups_of_run / 2;
    Bringer<W> bringer(w, p);
    // The first weights come before the kernel may look at its rows.
    Progress<W> ahead;
    bringer.begin_weights(blockIdx.x / p.row_blocks);
    for (; ahead.use == 0 && ahead.number < pairs; ahead.next()) bringer.bring_weights(ahead, ahead.number);
    wait_for_previous();
    const u32 n = *p.view.count;
    if (blockIdx.x % p.row_blocks * W::rows >= n) {
        // Nobody wants them: other weights take their places, but not before they are there.
        close_copies();
        wait_for_copies<0>();
    }
    Progress<W> at;
    for (u32 i = blockIdx.x; i < count_parts<W>(p); i += gridDim.x) {
        const u32 first = i % p.row_blocks * W::rows;
        if (first >= n) continue;
        if (i != blockIdx.x) bringer.begin_weights(i / p.row_blocks);
        bringer.begin_rows(first, n);
        u32 run = 0, last = pairs_of_run - 1;
#pragma unroll 1
        for (u32 pair = 0; pair < pairs; pair++, at.next()) {
            if (at.use > 0) wait_at(gates.done + at.stage * GATE_BYTES, at.use - 1);
            if (i != blockIdx.x || pair >= ahead.number) bringer.bring_weights(at, pair);
            const bool is_last = pair == last || pair + 1 == pairs;
            bringer.bring_rows(at, pair, is_last, run);
            if (is_last) run++, last += pairs_of_run;
            copies_arrive_at(gates.full + at.stage * GATE_BYTES);
        }
    }
    close_copies();
    wait_for_copies<0>();
}

// Where a warp that multiplies has its weights, for plain types, and where its block has its rows, in the first stage.
template <class W>
struct Places {
    // The lane's, of both groups.
    u32 weights[2];
    u32 rows;

    __device__ __forceinline__ Places(const W& w, u32 tile) : rows(only_here(place_in_shared(w.activations))) {
        const u32 of_tile = place_in_shared(w.weights) + tile * (TILE_ROWS * PAIR_BYTES);
        const u32 of_lane = place_of_chunk(lane_index() / 4, lane_index() % 4);
        for (u32 i = 0; i < 2; i++) weights[i] = only_here(of_tile + (of_lane ^ i * (PAIR_BYTES / 2)));
    }

    __device__ __forceinline__ SharedRows rows_of(const Progress<W>& at) const {
        return SharedRows(rows + at.stage * W::stage_bytes);
    }

    // The words of a pair, of each group and half of the tile.
    __device__ __forceinline__ void read(const Progress<W>& at, uint4 words[2][2]) const {
#pragma unroll
        for (u32 i = 0; i < 2; i++)
            for (u32 upper = 0; upper < 2; upper++)
                words[i][upper] = load_shared(weights[i] + at.stage * W::bytes_of_unit + upper * (8 * PAIR_BYTES));
    }
};

// Weights of a pair in the registers from which tensor cores take them.
template <u32 TYPE>
struct KeptWeights {
    // By groups and steps.
    u32 a[2][2][4] = {};

    // `zero` is one that the compiler does not know, so that what was in the registers is wanted until now.
    __device__ __forceinline__ void set(const uint4 words[2][2], u32 zero) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const uint4 low = words[i][0], high = words[i][1];
            const u32 all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const Fragments f = unpack<TYPE>(all, 0);
            for (u32 step = 0; step < 2; step++)
                for (u32 k = 0; k < 4; k++) a[i][step][k] = f.a[step][k] ^ (a[i][step][k] & zero);
        }
    }
};

// Multiplies a pair of a type of blocks, which has one group or two, with 8 · C rows, and adds it to the run.
template <class W, u32 C>
__device__ __forceinline__ void multiply_pair(const W& w, const Places<W>& places, const Progress<W>& at, u32 tile, u32 groups,
                                                u32 zero, float run[C][4]) {
    // Steps that are scaled together.
    constexpr u32 TYPE = W::type, each = has_two_scales(TYPE) ? 1 : 2;
    const SharedRows rows = places.rows_of(at);
    const u8* unit = w.weights + at.unit() * W::bytes_of_unit;
#pragma unroll 1
    for (u32 i = 0; i < groups; i++) {
        const Fragments f = W::read_weights(unit, at.number, tile, i, zero);
#pragma unroll
        for (u32 step = 0; step < 2; step += each) {
            float products[C][4];
            begin_products();
            for (u32 k = 0; k < each; k++)
                begin_multiply<C>(products, f.a[step + k], rows.from_step(2 * i + step + k), k > 0);
            close_products();
            wait_for_products();
#pragma unroll
            for (u32 c = 0; c < C; c++) {
                const float2 of = W::has_sums ? pair_of_columns(W::sums(w.stage_at(at.stage)) + i * W::rows, 0, c)
                                              : make_float2(0, 0);
                add_scaled<TYPE>(f, step, products[c], of.x, of.y, run[c]);
            }
        }
    }
}

// Writes, or adds, the products of a tile and 64 rows from `first` on, of `n`. As write_products, but no element is a
// branch, which would be most of the time of a block that has many.
__device__ __forceinline__ void write_tile(const ProductParams& p, u32 tile, u32 first, u32 n, const float sums[8][4]) {
    const Matrix& matrix = p.matrices[matrix_of(p, tile)];
    const u32 r = tile * TILE_ROWS + lane_index() / 4, last = matrix.rows - 1;
    const bool has_bias = matrix.bias != nullptr, adds = matrix.add;
    // Of the lane's two rows of the tile.
    const u32 upper = r + 8 < last ? 8 : last - (r < last ? r : last);
    const float bias[2] = {has_bias ? matrix.bias[r < last ? r : last] : 0, has_bias ? matrix.bias[r + 8 < last ? r + 8 : last] : 0};
    float* to[8][2];
    float factors[8][2], old[8][2][2];
#pragma unroll
    for (u32 c = 0; c < 8; c++)
        for (u32 i = 0; i < 2; i++) {
            const u32 column = first + 8 * c + 2 * (lane_index() % 4) + i, clamped = column < n ? column : n - 1;
            factors[c][i] = p.input.factors[clamped];
            to[c][i] = element(matrix, r < last ? r : last, clamped, matrix.by_slot ? p.view.slots[clamped] : 0);
        }
    if (adds)
#pragma unroll
        for (u32 c = 0; c < 8; c++)
            for (u32 i = 0; i < 2; i++) old[c][i][0] = to[c][i][0], old[c][i][1] = to[c][i][upper];
#pragma unroll
    for (u32 c = 0; c < 8; c++)
        for (u32 i = 0; i < 4; i++) {
            const float product = __fmul_rn(sums[c][i], factors[c][i % 2]);
            float value = has_bias ? __fadd_rn(product, bias[i / 2]) : product;
            value = adds ? __fadd_rn(old[c][i % 2][i / 2], value) : value;
            const bool exists = r + i / 2 * 8 <= last && first + 8 * c + 2 * (lane_index() % 4) + i % 2 < n;
            if (exists) to[c][i % 2][i / 2 * 8] = value;
        }
}

// A warp's part of a product of a plain type: one of the block's eight tiles. The next pair's weights come while
// tensor cores have this one's.
template <class W, u32 C>
__device__ __forceinline__ void multiply_plain(const W& w, const ProductParams& p, const Gates<W>& gates,
                                               const Places<W>& places, Progress<W>& at, float sums[1][C][4]) {
    const u32 pairs = (p.groups + 1) / 2, pairs_of_run = p.groups_of_run / 2;
    KeptWeights<W::type> weights;
    uint4 words[2][2];
    float run[1][C][4];
    wait_at(gates.full + at.stage * GATE_BYTES, at.use);
    places.read(at, words);
    clear<1, C>(run);
    u32 end = pairs_of_run;
#pragma unroll 1
    for (u32 pair = 0; pair < pairs; pair++) {
        const u32 stage = at.stage;
        const SharedRows rows = places.rows_of(at);
        at.next();
        // After the last pair a stage is read that may have anything. (A branch may not stand below, where tensor cores
        // are at work, or ptxas has them work one after another.)
        if (pair + 1 < pairs) wait_at(gates.full + at.stage * GATE_BYTES, at.use);
        show_tensor_cores();
        weights.set(words, p.zero);
        begin_products();
#pragma unroll
        for (u32 step = 0; step < 4; step++)
            begin_multiply<C>(run[0], weights.a[step / 2][step % 2], rows.from_step(step), true);
        close_products();
        places.read(at, words);
        wait_for_products();
        if (pair + 1 == end || pair + 1 == pairs) {
            end += pairs_of_run;
            add_run<W, 1, C>(w.stage_at(stage), 0, run, sums);
            clear<1, C>(run);
        }
        __syncwarp();
        if (lane_index() == 0) arrive_at(gates.done + stage * GATE_BYTES);
    }
}

// The same of a type of blocks, group by group.
template <class W, u32 C>
__device__ __forceinline__ void multiply_blocks(const W& w, const ProductParams& p, const Gates<W>& gates,
                                                const Places<W>& places, u32 tile, Progress<W>& at, float sums[1][C][4]) {
    const u32 pairs = (p.groups + 1) / 2, pairs_of_run = p.groups_of_run / 2;
#pragma unroll 1
    for (u32 pair = 0; pair < pairs;) {
        const u32 end = pair + pairs_of_run < pairs ? pair + pairs_of_run : pairs;
        float run[1][C][4];
        clear<1, C>(run);
#pragma unroll 1
        for (; pair < end; pair++, at.next()) {
            wait_at(gates.full + at.stage * GATE_BYTES, at.use);
            show_tensor_cores();
            multiply_pair<W, C>(w, places, at, tile, 2 * pair + 1 < p.groups ? 2 : 1, p.zero, run[0]);
            if (pair + 1 == end) add_run<W, 1, C>(w.stage_at(at.stage), 0, run, sums);
            __syncwarp();
            if (lane_index() == 0) arrive_at(gates.done + at.stage * GATE_BYTES);
        }
    }
}

template <class W, u32 C>
__device__ __forceinline__ void multiply_all(const W& w, const ProductParams& p, const Gates<W>& gates) {
    wait_for_previous();
    const u32 n = *p.view.count, tile = warp_index() - BRINGERS / WARP;
    const Places<W> places(w, tile);
    Progress<W> at;
    for (u32 i = blockIdx.x; i < count_parts<W>(p); i += gridDim.x) {
        const u32 number = i / p.row_blocks * W::tiles + tile, first = i % p.row_blocks * W::rows;
        if (first >= n) continue;
        float sums[1][C][4];
        clear<1, C>(sums);
        if constexpr (W::plain)
            multiply_plain<W, C>(w, p, gates, places, at, sums);
        else
            multiply_blocks<W, C>(w, p, gates, places, tile, at, sums);
        // As many rows at a time as there are registers for.
#pragma unroll
        for (u32 c = 0; c < C; c += 8)
            if (number < p.tiles) write_tile(p, number, first + 8 * c, n, sums[0] + c);
    }
}

template <u32 TYPE, u32 C>
__device__ __forceinline__ void warpgroup_product(const ProductParams& p) {
    using W = Wide<TYPE, WARPS, 8 * C, WARPGROUPS_ROOM, true>;
    MOR_DYNAMIC_SHARED(uint4, room);
    let_next_begin();
    const W w(room);
    const Gates<W> gates(room);
    if (threadIdx.x < W::stages) {
        begin_gate(gates.full + threadIdx.x * GATE_BYTES, BRINGERS);
        begin_gate(gates.done + threadIdx.x * GATE_BYTES, WARPS);
    }
    __syncthreads();
    // Of 168 registers for each thread.
    if (threadIdx.x < BRINGERS) {
        give_registers_until<W::plain ? 80 : 112>();
        bring_all(w, p, gates);
    } else {
        take_registers_until<W::plain ? 208 : 192>();
        multiply_all<W, C>(w, p, gates);
    }
}

// grid: a block for each multiprocessor, or fewer. Types of blocks need more registers than there are for 128 rows.
#define MOR_WARPGROUP_PRODUCT(ROWS, TYPE, type)                                                      \
    MOR_WORK(mor_warpgroup_product_128x##ROWS##_##type, ProductParams, (WARPGROUPS_BLOCK, 1),        \
             warpgroup_product<TYPE, ROWS / 8>)
#define MOR_WARPGROUP_PRODUCT_OF_64(TYPE, type) MOR_WARPGROUP_PRODUCT(64, TYPE, type)
MOR_EVERY_TYPE(MOR_WARPGROUP_PRODUCT_OF_64)
MOR_WARPGROUP_PRODUCT(128, F16, f16)
MOR_WARPGROUP_PRODUCT(128, BF16, bf16)
#endif

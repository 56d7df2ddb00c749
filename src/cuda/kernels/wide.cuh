// Products for passes of many rows. Weights as they lie in memory and activations come by asynchronous copies
// into shared memory, pairs of groups that are used while those behind them are on their way; every warp
// multiplies some tiles by 32 rows of activations.
//
// The sizes, for halves: a warp of M tiles reads 1 KiB · M of weights and 2 KiB of activations a group for 8 · M
// multiplications. An H100's shared memory gives 128 bytes a cycle, and its tensor cores take four
// multiplications in some six and a half (mma.sync). So blocks of eight warps need, with what the copies
// write, for a group
//     64 × 64 (weights × activations): M = 1, 32 KiB or 256 cycles for  64 multiplications (104 cycles)
//     128 × 64:                        M = 2, 44 KiB or 352 cycles for 128 multiplications (208 cycles)
//     128 × 128:                       M = 4, 64 KiB or 512 cycles for 256 multiplications (416 cycles)
// and the second cache has to give 8, 12 and 16 KiB for each. A lane keeps 16 · M sums of the run and as many of
// the runs before, so that M = 4 leaves room for one block on a multiprocessor, the others for two. The host
// takes the blocks that need the fewest cycles (src/cuda/product.rs).
#pragma once
#include "products.cuh"

#ifdef MOR_TENSOR_CORES
// Shared memory for a block, where two or one stand on a multiprocessor, as `WideProduct` in functions.rs. Devices
// of 9.0 have room for more pairs on their way. Others have 163 KiB for all blocks and for one, but 8.6 and 8.9,
// which share an image with 8.0, 99 KiB: there one block stands alone.
#if __CUDA_ARCH__ == 900
constexpr u32 MOST_OF_TWO = 104 << 10, MOST_OF_ONE = 208 << 10;
#else
constexpr u32 MOST_OF_TWO = 80 << 10, MOST_OF_ONE = 99 << 10;
#endif
// Times eight: rows of activations of a warp.
constexpr u32 WIDE_ROWS = 4;
// Bytes that a thread copies at a time, and of a pair of groups of halves.
constexpr u32 CHUNK_BYTES = 16;
constexpr u32 PAIR_BYTES = 2 * 2 * GROUP;

// Where a chunk of row `row` of a pair stands in shared memory. The lanes of a warp that read together, eight
// with 16 bytes each or sixteen with 8, so meet all banks.
__device__ __forceinline__ u32 place_of_chunk(u32 row, u32 chunk) {
    return row * PAIR_BYTES + CHUNK_BYTES * (chunk ^ (row % 2 * 4 + row / 2 % 2 * 2));
}

// What `of_rows` has for the lane's two columns of its warp's fragment `c`; `row` is the warp's first.
__device__ __forceinline__ float2 pair_of_columns(const float* of_rows, u32 row, u32 c) {
    return *reinterpret_cast<const float2*>(of_rows + row + 8 * c + 2 * (lane_index() % 4));
}

// Stages at most.
constexpr u32 MOST_STAGES = 6;

// As many stages of `each` bytes as there is room for, but two at least and `most` at most.
__device__ constexpr u32 stages_in(u32 bytes, u32 each, u32 most) {
    return bytes / each > most ? most : bytes / each < 2 ? 2 : bytes / each;
}

// The same as a warpgroup reads it (PTX: 128-byte swizzle, K-major), where rows begin at whole KiB.
__device__ __forceinline__ u32 swizzled_place_of_chunk(u32 row, u32 chunk) {
    return row * PAIR_BYTES + CHUNK_BYTES * (chunk ^ row % 8);
}
constexpr u32 SWIZZLED_BYTES = 8 * PAIR_BYTES;
// For the gates of warpgroups.
constexpr u32 GATES_BYTES = 128;

// A block's shared memory, of which it takes `ROOM` bytes at most, and the copies into it: for `TILES` tiles and
// `ROWS` rows of activations. SWIZZLED: these as warpgroups read them.
template <u32 TYPE, u32 TILES, u32 ROWS, u32 ROOM, bool SWIZZLED>
struct Wide {
    static constexpr bool plain = block_columns(TYPE) == 1, has_sums = has_min(TYPE);
    static constexpr u32 type = TYPE, tiles = TILES, rows = ROWS;
    // Groups of a block of the type, and of weights that are copied together: a pair, or a whole block.
    static constexpr u32 block_groups = groups_of_block(TYPE), unit_groups = block_groups > 2 ? block_groups : 2;
    // What is copied together of one source, a row or a tile.
    static constexpr u32 sources = plain ? tiles * TILE_ROWS : tiles;
    static constexpr u32 unit_bytes =
        plain ? PAIR_BYTES : TILE_ROWS * block_bytes(TYPE) * (unit_groups / block_groups);
    // A pair of activations: the halves, then of each row its run's scale, and the sums of its groups.
    static constexpr u32 some_bytes = rows * (PAIR_BYTES + (has_min(TYPE) ? 12 : 4));
    static constexpr u32 stage_bytes =
        SWIZZLED ? (some_bytes + SWIZZLED_BYTES - 1) / SWIZZLED_BYTES * SWIZZLED_BYTES : some_bytes;
    // Pairs of activations and units of weights that are used or on their way: as many as there is room for. Of
    // long blocks the one after that which is used is all that may be on its way, four pairs.
    static constexpr bool pairwise = unit_groups == 2;
    static constexpr u32 fixed_bytes =
        (SWIZZLED ? GATES_BYTES + SWIZZLED_BYTES : sources * 8) + (pairwise ? 0 : 2 * sources * unit_bytes);
    static constexpr u32 stages =
        stages_in(ROOM - fixed_bytes, stage_bytes + (pairwise ? sources * unit_bytes : 0), pairwise ? MOST_STAGES : 5);
    static constexpr u32 units = pairwise ? stages : 2;

    // Where the sources begin, if warps multiply what they copied.
    const uint4** from;
    u8* weights;
    u8* activations;

    __device__ __forceinline__ explicit Wide(uint4* room)
        : from(reinterpret_cast<const uint4**>(room)),
          weights(reinterpret_cast<u8*>(room) + (SWIZZLED ? GATES_BYTES : sources * sizeof(*from))),
          activations(weights + units * sources * unit_bytes) {
        if constexpr (SWIZZLED) activations += -place_in_shared(activations) % SWIZZLED_BYTES;
    }

    // Of pair `pair`, where the first is in the first stage and unit.
    static __device__ __forceinline__ u32 unit_of(u32 pair) { return pair / (unit_groups / 2) % units; }
    static constexpr u32 bytes_of_unit = sources * unit_bytes;
    __device__ __forceinline__ u8* unit(u32 pair) const { return weights + unit_of(pair) * bytes_of_unit; }
    __device__ __forceinline__ u8* stage_at(u32 place) const { return activations + place * stage_bytes; }
    __device__ __forceinline__ u8* stage(u32 pair) const { return stage_at(pair % stages); }

    static __device__ __forceinline__ float* scales(u8* stage) {
        return reinterpret_cast<float*>(stage + rows * PAIR_BYTES);
    }

    // [2][rows].
    static __device__ __forceinline__ float* sums(u8* stage) { return scales(stage) + rows; }

    // Where a source of block `block` begins. Beyond the last one that again: what comes of it is not written.
    static __device__ __forceinline__ const uint4* source(const ProductParams& p, u32 block, u32 i) {
        u32 tile = block * tiles + (plain ? i / TILE_ROWS : i);
        if (tile >= p.tiles) tile = p.tiles - 1;
        const Matrix& m = p.matrices[matrix_of(p, tile)];
        const u32 row = tile * TILE_ROWS + (plain ? i % TILE_ROWS : 0), last = m.rows - 1;
        const u8* tiled = m.data + static_cast<u64>(tile) * TILE_ROWS * m.row_bytes;
        return reinterpret_cast<const uint4*>(plain ? plain_row(m, row < last ? row : last) : tiled);
    }

    // Chunks from a group of a row of a plain type to the next, which is the same for all matrices of a product; and to
    // chunk `i` of a pair.
    static __device__ __forceinline__ u32 group_step(const ProductParams& p) { return p.matrices[0].group_step / CHUNK_BYTES; }
    static __device__ __forceinline__ u32 to_chunk(const ProductParams& p, u32 i) {
        return i / (chunks / 2) * group_step(p) + i % (chunks / 2);
    }

    // The thread's chunk of a pair's halves, and the first of its rows; the others are `ROWS_APART` apart.
    static constexpr u32 chunks = PAIR_BYTES / CHUNK_BYTES, ROWS_APART = BLOCK / chunks;
    static __device__ __forceinline__ u32 chunk() { return threadIdx.x % chunks; }
    static __device__ __forceinline__ u32 first_row() { return threadIdx.x / chunks; }
    static __device__ __forceinline__ u32 group_of_chunk(u32 pair) { return 2 * pair + chunk() / (chunks / 2); }

    __device__ __forceinline__ void copy_weights(const ProductParams& p, u32 pair) const {
        if constexpr (plain) {
            if (2 * pair >= p.groups) return;
            if (group_of_chunk(pair) >= p.groups) return;
            u8* to = unit(pair) + place_of_chunk(first_row(), chunk());
#pragma unroll
            for (u32 row = 0; row < sources; row += ROWS_APART)
                begin_copy<CHUNK_BYTES>(to + row * PAIR_BYTES,
                                        from[first_row() + row] + 2 * pair * group_step(p) + to_chunk(p, chunk()));
        } else {
            // A tile has as many chunks as a row bytes.
            constexpr u32 each = unit_bytes / CHUNK_BYTES, all = sources * each;
            const u32 begin = pair / (unit_groups / 2) * each, end = p.matrices[0].row_bytes;
            if (pair % (unit_groups / 2) != 0 || begin >= end) return;
            u8* to = unit(pair) + CHUNK_BYTES * threadIdx.x;
#pragma unroll
            for (u32 start = 0; start < all; start += BLOCK) {
                const u32 i = start + threadIdx.x, at = begin + i % each;
                // Of a pair the second group may be missing.
                const bool exists = (start + BLOCK <= all || i < all) && (block_groups > 1 || at < end);
                if (exists) begin_copy<CHUNK_BYTES>(to + CHUNK_BYTES * start, from[i / each] + at);
            }
        }
    }

    // Rows `first` to `n`; beyond the last that again.
    __device__ __forceinline__ void copy_activations(const ProductParams& p, u32 first, u32 n, u32 pair,
                                                     u32 run) const {
        const Prepared& x = p.input;
        u8* to = stage(pair);
        const u32 last = n - 1 - first;
        if (group_of_chunk(pair) < p.groups) {
            u8* quad = to + place_of_chunk(first_row(), chunk());
            const uint4* halves = reinterpret_cast<const uint4*>(x.halves);
#pragma unroll
            for (u32 start = 0; start < rows; start += ROWS_APART) {
                const u32 row = first_row() + start, clamped = first + (row < last ? row : last);
                begin_copy<CHUNK_BYTES>(quad + start * PAIR_BYTES,
                                        halves + clamped * (x.stride / 8) + chunks * pair + chunk());
            }
        }
        const u32 row = threadIdx.x % rows, upper = threadIdx.x / rows;
        const u32 clamped = first + (row < last ? row : last), groups = x.stride / GROUP;
        if (upper == 0) begin_copy<4>(scales(to) + row, x.scales + clamped * RUNS + run);
        if constexpr (has_min(TYPE))
            if (upper < 2 && 2 * pair + upper < groups)
                begin_copy<4>(sums(to) + threadIdx.x, x.sums + clamped * groups + 2 * pair + upper);
    }

    // Weights of the lane in a tile of the block, for group `i` of a pair. `zero` is one that the compiler does
    // not know: what comes out of an operation it puts where the multiplication wants it, but what comes out of
    // memory, in another order, it copies for each of them anew.
    static __device__ __forceinline__ Fragments read_weights(const u8* unit, u32 pair, u32 tile, u32 i, u32 zero) {
        const u32 g = lane_index() / 4, t = lane_index() % 4;
        u32 words[2 * field_words(TYPE)];
        if constexpr (plain) {
            const u32 at = place_of_chunk(g, t) ^ i * (PAIR_BYTES / 2);
            const u8* from = unit + tile * (TILE_ROWS * PAIR_BYTES) + at;
            for (u32 upper = 0; upper < 2; upper++) {
                const uint4 bits = *reinterpret_cast<const uint4*>(from + upper * (8 * PAIR_BYTES));
                u32* to = words + 4 * upper;
                to[0] = bits.x ^ zero, to[1] = bits.y ^ zero, to[2] = bits.z ^ zero, to[3] = bits.w ^ zero;
            }
            return unpack<TYPE>(words, 0);
        } else {
            const u32 group = 2 * pair % unit_groups + i;
            const u8* block = unit + tile * unit_bytes + group / block_groups * (TILE_ROWS * block_bytes(TYPE));
            for (u32 upper = 0; upper < 2; upper++) {
                const Fields<TYPE> f = read_fields<TYPE>(block, group % block_groups, g + 8 * upper, t);
                for (u32 k = 0; k < field_words(TYPE); k++) words[upper * field_words(TYPE) + k] = f.words[k];
            }
            return unpack<TYPE>(words, group % block_groups);
        }
    }

    // Activations of the lane, of eight rows of a stage, for group `i` of it: as `read_activations`.
    static __device__ __forceinline__ void read_rows(const u8* eight, u32 i, u32 b[2][2]) {
        const u32 g = lane_index() / 4, t = lane_index() % 4;
        if constexpr (plain) {
            const u32 at = place_of_chunk(g, t) ^ i * (PAIR_BYTES / 2);
            const uint4 bits = *reinterpret_cast<const uint4*>(eight + at);
            b[0][0] = bits.x, b[0][1] = bits.y, b[1][0] = bits.z, b[1][1] = bits.w;
        } else {
            const u32 at = (place_of_chunk(g, t / 2) ^ i * (PAIR_BYTES / 2)) + t % 2 * 8;
            for (u32 step = 0; step < 2; step++) {
                const uint2 bits = *reinterpret_cast<const uint2*>(eight + (at ^ step * (PAIR_BYTES / 4)));
                b[step][0] = bits.x, b[step][1] = bits.y;
            }
        }
    }
};

// A block's copies, pair by pair: which is next, and its run.
template <class W>
struct Copies {
    // Pairs that are on their way while one is used.
    static constexpr u32 LEAD = W::stages - 1;
    const W& w;
    const ProductParams& p;
    // Rows from `first` on, of `n`.
    u32 first, n;
    u32 pair = 0, run = 0, end;

    __device__ __forceinline__ Copies(const W& w, const ProductParams& p, u32 first, u32 n)
        : w(w), p(p), first(first), n(n), end(p.groups_of_run / 2) {
        while (pair < LEAD) next();
    }

    __device__ __forceinline__ void next() {
        if (pair >= LEAD) w.copy_weights(p, pair);
        if (2 * pair < p.groups) w.copy_activations(p, first, n, pair, run);
        close_copies();
        if (++pair == end) run++, end += p.groups_of_run / 2;
    }
};

// Brings the first weights before the kernel may look at its rows, from `first` on; how many there are in all, or 0
// where the block has none.
template <class W>
__device__ __forceinline__ u32 begin_weights(const W& w, const ProductParams& p, u32 first) {
    if (threadIdx.x < W::sources) w.from[threadIdx.x] = W::source(p, blockIdx.x, threadIdx.x);
    __syncthreads();
    if (has_no_rows(p, first)) return 0;
    for (u32 pair = 0; pair < Copies<W>::LEAD; pair++) w.copy_weights(p, pair);
    wait_for_previous();
    const u32 n = *p.view.count;
    if (first < n) return n;
    close_copies();
    wait_for_copies<0>();
    return 0;
}

template <u32 M, u32 C>
__device__ __forceinline__ void clear(float sums[M][C][4]) {
#pragma unroll
    for (u32 m = 0; m < M; m++)
#pragma unroll
        for (u32 c = 0; c < C; c++)
            for (u32 i = 0; i < 4; i++) sums[m][c][i] = 0;
}

// Adds what a warp's M tiles have of a run for 8 · C rows, the first of them `row` of the block, to the runs before.
template <class W, u32 M, u32 C>
__device__ __forceinline__ void add_run(u8* stage, u32 row, float run[M][C][4], float sums[M][C][4]) {
#pragma unroll
    for (u32 c = 0; c < C; c++) {
        const float2 scale = pair_of_columns(W::scales(stage), row, c);
#pragma unroll
        for (u32 m = 0; m < M; m++)
            for (u32 i = 0; i < 4; i++)
                sums[m][c][i] = fmaf(run[m][c][i], i % 2 ? scale.y : scale.x, sums[m][c][i]);
    }
}

// Writes, or adds, the products: of M tiles from the block's `tile` on, for 8 · C rows from `first` on, of `n`.
// Everything is read before the first result is written, for else each would be waited for; and beyond the last row
// that again, so that no read is a branch.
template <class W, u32 M, u32 C>
__device__ __forceinline__ void write_products(const ProductParams& p, u32 block, u32 tile, u32 first, u32 n,
                                               const float sums[M][C][4]) {
    float factors[C][2], old[M][C][4];
    u32 slots[C][2];
#pragma unroll
    for (u32 c = 0; c < C; c++)
        for (u32 i = 0; i < 2; i++) {
            const u32 column = first + 8 * c + 2 * (lane_index() % 4) + i, clamped = column < n ? column : n - 1;
            factors[c][i] = p.input.factors[clamped];
            slots[c][i] = p.view.slots[clamped];
        }
    for (u32 writes = 0; writes < 2; writes++)
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            u32 number = block * W::tiles + tile + m;
            if (number >= p.tiles) continue;
            const Matrix& matrix = p.matrices[matrix_of(p, number)];
            if (!writes && !matrix.add) continue;
#pragma unroll
            for (u32 c = 0; c < C; c++)
                for (u32 i = 0; i < 4; i++) {
                    const u32 r = number * TILE_ROWS + lane_index() / 4 + i / 2 * 8, last = matrix.rows - 1;
                    const u32 column = first + 8 * c + 2 * (lane_index() % 4) + i % 2;
                    float* to = element(matrix, r < last ? r : last, column < n ? column : n - 1, slots[c][i % 2]);
                    if (!writes) {
                        old[m][c][i] = *to;
                    } else if (r <= last && column < n) {
                        const float value = finished(sums[m][c][i], factors[c][i % 2], matrix.bias, r);
                        *to = matrix.add ? __fadd_rn(old[m][c][i], value) : value;
                    }
                }
        }
}

// Warps: M tiles each; `ACROSS` of them have the same tiles and different rows of activations.
template <u32 TYPE, u32 M, u32 ACROSS>
__device__ __forceinline__ void wide_product(const ProductParams& p) {
    using W = Wide<TYPE, WARPS / ACROSS * M, ACROSS * WIDE_ROWS * 8, M == 4 ? MOST_OF_ONE : MOST_OF_TWO, false>;
    MOR_DYNAMIC_SHARED(uint4, room);
    let_next_begin();
    const W w(room);
    const u32 groups = p.groups, pairs = (groups + 1) / 2, pairs_of_run = p.groups_of_run / 2;
    const u32 first = blockIdx.y * W::rows;
    const u32 n = begin_weights(w, p, first);
    if (n == 0) return;
    Copies<W> copies(w, p, first, n);

    const u32 tile = warp_index() / ACROSS * M, row = warp_index() % ACROSS * (8 * WIDE_ROWS);
    float run[M][WIDE_ROWS][4], sums[M][WIDE_ROWS][4];
    clear<M, WIDE_ROWS>(run), clear<M, WIDE_ROWS>(sums);
    u32 end = pairs_of_run;
    for (u32 pair = 0; pair < pairs; pair++) {
        // This pair's copies are all but those of the pairs behind it. Nobody uses the pair before any more.
        wait_for_copies<Copies<W>::LEAD - 1>();
        __syncthreads();
        copies.next();
        u8* stage = w.stage(pair);
        // Where the two groups are of one block, the compiler would keep what they share in too many registers.
#pragma unroll(W::block_groups > 1 ? 1 : 2)
        for (u32 i = 0; i < 2; i++) {
            if (2 * pair + i >= groups) break;
            u32 b[WIDE_ROWS][2][2];
#pragma unroll
            for (u32 c = 0; c < WIDE_ROWS; c++) W::read_rows(stage + (row + 8 * c) * PAIR_BYTES, i, b[c]);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                const Fragments f = W::read_weights(w.unit(pair), pair, tile + m, i, p.zero);
#pragma unroll
                for (u32 c = 0; c < WIDE_ROWS; c++) {
                    const float2 of = has_min(TYPE) ? pair_of_columns(W::sums(stage) + i * W::rows, row, c)
                                                    : make_float2(0, 0);
                    add_products<TYPE>(f, b[c], of.x, of.y, run[m][c]);
                }
            }
        }
        if (pair + 1 != end && pair + 1 != pairs) continue;
        end += pairs_of_run;
        add_run<W, M, WIDE_ROWS>(stage, row, run, sums);
        clear<M, WIDE_ROWS>(run);
    }
    write_products<W, M, WIDE_ROWS>(p, blockIdx.x, tile, first + row, n, sums);
}

// grid: (tiles / 4 or 8, rows / 64 or 128).
#define MOR_WIDE_PRODUCTS(TYPE, type)                                                                     \
    MOR_WORK(mor_wide_product_64x64_##type, ProductParams, (BLOCK, 2), wide_product<TYPE, 1, 2>)  \
    MOR_WORK(mor_wide_product_128x64_##type, ProductParams, (BLOCK, 2), wide_product<TYPE, 2, 2>) \
    MOR_WORK(mor_wide_product_128x128_##type, ProductParams, (BLOCK, 1), wide_product<TYPE, 4, 4>)
MOR_EVERY_TYPE(MOR_WIDE_PRODUCTS)
#endif

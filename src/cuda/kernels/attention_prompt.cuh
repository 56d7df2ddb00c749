// Attention over keys and values in halves by tensor cores, for the many rows of a prompt: as attention_halves.cuh, to
// the same bits, but a block brings its part of the context to shared memory once, and a warp takes tiles of columns
// for itself, the part's entries 32 at a time where there a warp has 32. So nothing is loaded again for each tile, and
// warps do not wait for each other.
//
// Heads have 64 or 128 elements, and rows are of one sequence. By count, for heads of 64: a tile and a part are 64 KiB of
// shared memory to read, 512 cycles of a multiprocessor, and about as many of instructions.
#pragma once
#include "attention_halves.cuh"

#ifdef MOR_WARPGROUPS // no need of them, but measured on these devices only
// Rows of a block at most, and the 32 entries that are taken together, in a part.
constexpr u32 PROMPT_ROWS = 64;
constexpr u32 STRETCHES = PART / WARP_ENTRIES;

// A block's keys, values and queries, as attention_prompt_shared in functions.rs.
template <u32 HEAD_DIM>
struct Prompt {
    // [pages][element][16 entries]; elements change places within fours, so that lanes meet all banks.
    u8* keys;
    // [entries][elements]; eights of elements change places.
    u8* values;
    // Fragments of the queries of a tile of each warp, [WARPS][elements / 16][lanes].
    uint4* q;

    __device__ __forceinline__ explicit Prompt(float4* shared)
        : keys(reinterpret_cast<u8*>(shared)), values(keys + PART * 2 * HEAD_DIM),
          q(reinterpret_cast<uint4*>(values + PART * 2 * HEAD_DIM)) {}

    // Where element `e` of a page's keys begins, 32 bytes; and chunk `chunk` of an entry's value, 16 bytes.
    static __device__ __forceinline__ u32 place_of_key(u32 e) { return (e ^ e / 4 % 4) * (2 * PAGE_TOKENS); }
    static __device__ __forceinline__ u32 place_of_value(u32 entry, u32 chunk) {
        return entry * 2 * HEAD_DIM + 16 * (chunk ^ entry / 8 % 4 * 2);
    }

    // Begins to copy the first `count` entries of a head; of pages, whose numbers these are.
    __device__ __forceinline__ void copy(const Cache& cache, u32 kv_head, const u32* pages, u32 count) const {
        constexpr u32 of_keys = 2 * HEAD_DIM, chunks = HEAD_DIM / 8;
        // Whole stretches, of which the second page may be missing.
        for (u32 page = 0; page / 2 * WARP_ENTRIES < count; page++) {
            const bool is_there = page * PAGE_TOKENS < count;
            const u8* from = cache.pages + static_cast<u64>(pages[is_there ? page : 0]) * cache.page_bytes;
            const u8* key = from + kv_head * PAGE_TOKENS * cache.key_bytes;
            const u8* value = from + cache.kv_heads * PAGE_TOKENS * cache.key_bytes +
                              kv_head * PAGE_TOKENS * cache.value_bytes;
            for (u32 i = threadIdx.x; i < 2 * of_keys; i += BLOCK) {
                if (i < of_keys) {
                    u8* to = keys + page * PAGE_TOKENS * 2 * HEAD_DIM + place_of_key(i / 2) + i % 2 * 16;
                    if (is_there) begin_copy<16>(to, key + 16 * i);
                } else {
                    // What nobody wrote might not be a number.
                    const u32 in_page = (i - of_keys) / chunks, chunk = (i - of_keys) % chunks;
                    const u32 entry = page * PAGE_TOKENS + in_page;
                    const bool exists = entry < count;
                    begin_copy<16>(values + place_of_value(entry, chunk),
                                   value + (exists ? in_page : 0) * cache.value_bytes + 16 * chunk, exists);
                }
            }
        }
        close_copies();
    }

    // The lane's keys of stretch `stretch`, elements `e` to e + 3 of four entries, as `Keys4`.
    __device__ __forceinline__ void read_keys(u32 stretch, u32 e, uint2 k[4]) const {
        const u32 g = lane_index() / 4, page = 2 * stretch + g / 4;
        const u8* from = keys + page * PAGE_TOKENS * 2 * HEAD_DIM + g % 4 * 8;
#pragma unroll
        for (u32 i = 0; i < 4; i++) k[i] = *reinterpret_cast<const uint2*>(from + place_of_key(e + i));
    }

    // The lane's values of stretch `stretch`, four entries from `first` on of its eight, as `load_values`.
    __device__ __forceinline__ void read_values(u32 stretch, u32 first, u32 chunk, uint4 v[4]) const {
        const u32 g = lane_index() / 4, t = lane_index() % 4, entry = stretch * WARP_ENTRIES + 8 * t + first;
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            v[i] = *reinterpret_cast<const uint4*>(values + place_of_value(entry + i, 8 * chunk + g));
    }
};

// A warp puts the queries of a tile into their fragments: lanes take pairs of elements, all columns at once, so that
// they wait once. As `put_query`.
__device__ __forceinline__ void put_queries(const AttentionParams& p, const float* const columns[COLUMNS],
                                            const float2* const angles[COLUMNS], u16* fragments) {
    const u32 pairs = p.input.pairs, hd = p.input.cache.head_dim;
#pragma unroll 1
    for (u32 i = lane_index(); i < pairs; i += WARP) {
        const u32 a = p.input.neighbours ? 2 * i : i, b = p.input.neighbours ? a + 1 : i + pairs;
        float x[COLUMNS], y[COLUMNS];
        float2 angle[COLUMNS];
#pragma unroll
        for (u32 g = 0; g < COLUMNS; g++) x[g] = columns[g][a], y[g] = columns[g][b], angle[g] = angles[g][i];
#pragma unroll
        for (u32 g = 0; g < COLUMNS; g++) {
            put_element(fragments + 32 * g, a, fmaf(x[g], angle[g].x, -y[g] * angle[g].y) * p.factor);
            put_element(fragments + 32 * g, b, fmaf(y[g], angle[g].x, x[g] * angle[g].y) * p.factor);
        }
    }
#pragma unroll 1
    for (u32 e = 2 * pairs + lane_index(); e < hd; e += WARP)
        for (u32 g = 0; g < COLUMNS; g++) put_element(fragments + 32 * g, e, columns[g][e] * p.factor);
}

// The weighted sum of a stretch's values, a chunk of elements, is added to `sums`: the lane's elements 8b + n to
// 8b + n + 3 of its sixteen, n = i % 2 · 4 and b = i / 2, for column g. As `add_values`.
template <u32 HEAD_DIM>
__device__ __forceinline__ void add_stretch(const Prompt<HEAD_DIM>& room, u32 stretch, u32 chunk,
                                            const float weights[8], float sums[4][4]) {
    float o[8][4] = {};
#pragma unroll
    for (u32 step = 0; step < 2; step++) {
        const float* s = weights + 4 * step;
        u32 a[4];
        a[0] = pair_of_halves(s[0], s[1]), a[1] = rest_of(s[0], s[1], a[0]);
        a[2] = pair_of_halves(s[2], s[3]), a[3] = rest_of(s[2], s[3], a[2]);
        uint4 v[4];
        room.read_values(stretch, 4 * step, chunk, v);
        add_value_step(a, v, o);
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        for (u32 k = 0; k < 4; k++) {
            const float* of = o[i % 2 * 4 + k];
            sums[i][k] += of[i / 2] + of[2 + i / 2];
        }
}

template <u32 HEAD_DIM>
__device__ __forceinline__ void attend_prompt(const AttentionParams& p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
    __shared__ u32 slots[PROMPT_ROWS], visible[PROMPT_ROWS], pages[PART / PAGE_TOKENS];
    const StoreParams& in = p.input;
    const Cache& cache = in.cache;
    constexpr u32 hd = HEAD_DIM;
    const u32 w = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const u32 rows = 1u << p.row_shift, first_row = blockIdx.x << p.row_shift, kv_head = blockIdx.y;
    const u32 begin = blockIdx.z * PART, running = *in.view.count;
    if (first_row >= running) return;
    const u32 here = running - first_row < rows ? running - first_row : rows;
    // A thread looks after a row, others after the part's pages, which are the same for all rows; beyond the last that
    // is used their numbers may be anything.
    const u32 r = threadIdx.x, of_pages = BLOCK / 2;
    if (r < rows || (r >= of_pages && r < of_pages + PART / PAGE_TOKENS)) {
        const u32 slot = in.view.slots[first_row + (r < here ? r : 0)];
        const Seat seat = seat_of(cache, in.planes, in.rows[slot], in.states[slot]);
        if (r < rows) {
            slots[r] = slot;
            visible[r] = r < here ? seat.visible : 0;
            if (begin == 0 && kv_head == 0 && r < here) p.visible[first_row + r] = seat.visible;
        } else {
            const u32 page = begin / PAGE_TOKENS + r - of_pages;
            pages[r - of_pages] = seat.table[page < cache.table_pages ? page : 0];
        }
    }
    __syncthreads();
    u32 most = 0;
    for (u32 i = lane; i < rows; i += WARP) most = visible[i] > most ? visible[i] : most;
    most = warp_most(most);
    if (begin >= most) return;
    const u32 count = most - begin < PART ? most - begin : PART;
    const Prompt<HEAD_DIM> room(shared);
    room.copy(cache, kv_head, pages, count);

    uint4* const q = room.q + w * (hd / 16 * WARP);
    const u32 tiles = ((p.heads_of_key << p.row_shift) + COLUMNS - 1) / COLUMNS;
#pragma unroll 1
    for (u32 first_tile = 0; first_tile < tiles; first_tile += WARPS) {
        const u32 tile = first_tile + w;
        if (tile < tiles) {
            // The queries before are read.
            __syncwarp();
            const float* columns[COLUMNS];
            const float2* angles[COLUMNS];
#pragma unroll
            for (u32 k = 0; k < COLUMNS; k++) {
                // A column that is none has the first row's query, and its results are not looked at.
                const u32 column = COLUMNS * tile + k, of = column & (rows - 1), head = column >> p.row_shift;
                const u32 row = of < here ? of : 0;
                columns[k] = in.q + static_cast<u64>((first_row + row) * in.heads + kv_head * p.heads_of_key +
                                                     (head < p.heads_of_key ? head : 0)) * hd;
                angles[k] = in.rope + static_cast<u64>(slots[row]) * in.pairs;
            }
            put_queries(p, columns, angles, reinterpret_cast<u16*>(q));
        }
        // The queries are the warp's, keys and values the block's.
        if (first_tile == 0) {
            wait_for_copies<0>();
            __syncthreads();
        }
        if (tile >= tiles) break;
        __syncwarp();
        const u32 column = COLUMNS * tile + g, row = column & (rows - 1), head = column >> p.row_shift;
        const u32 sees = head < p.heads_of_key ? visible[row] : 0, most_of_tile = warp_most(sees);
        if (begin >= most_of_tile) continue;
        const u32 stretches = (most_of_tile - begin + WARP_ENTRIES - 1) / WARP_ENTRIES;
        // Scores, then weights: s[k][i] is that of entry 8t + i of stretch k for column g.
        float s[STRETCHES][8], max = LEAST, sums[STRETCHES];
#pragma unroll
        for (u32 k = 0; k < STRETCHES; k++) {
            for (u32 i = 0; i < 8; i++) s[k][i] = LEAST;
            if (k >= stretches) continue;
            float d[4][4] = {};
#pragma unroll 1
            for (u32 chunk = 0; chunk < hd; chunk += CHUNK_ELEMENTS)
#pragma unroll
                for (u32 e = 0; e < CHUNK_ELEMENTS; e += 16) {
                    uint2 of[4];
                    room.read_keys(k, chunk + e + 4 * t, of);
                    multiply_key_step(of, q[(chunk + e) / 16 * WARP + lane], d);
                }
            const int seen = static_cast<int>(sees) - static_cast<int>(begin + k * WARP_ENTRIES + 8 * t);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i < seen) s[k][i] = d[i % 4][i / 4] + d[i % 4][2 + i / 4];
                max = fmaxf(max, s[k][i]);
            }
        }
        max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 1));
        max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 2));
#pragma unroll
        for (u32 k = 0; k < STRETCHES; k++) {
            sums[k] = 0;
            if (k >= stretches) continue;
            for (u32 i = 0; i < 8; i++) sums[k] += s[k][i] = exponential(s[k][i] - max);
            sums[k] += __shfl_xor_sync(ALL_LANES, sums[k], 1);
            sums[k] += __shfl_xor_sync(ALL_LANES, sums[k], 2);
        }
        const bool wanted = sees > begin;
        const u32 to = ((first_row + row) * in.heads + kv_head * p.heads_of_key + head) * p.parts + blockIdx.z;
        if (wanted && t == 0) {
            const float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
            p.partial_scales[to] = make_float2(max, sum);
        }
#pragma unroll 1
        for (u32 chunk = 0; chunk < hd / CHUNK_ELEMENTS; chunk++) {
            float result[4][4] = {};
#pragma unroll
            for (u32 k = 0; k < STRETCHES; k++)
                if (k < stretches) add_stretch(room, k, chunk, s[k], result);
            if (!wanted) continue;
            float* partial = p.partial + static_cast<u64>(to) * hd + chunk * CHUNK_ELEMENTS + 16 * t;
            for (u32 i = 0; i < 4; i++)
                *reinterpret_cast<float4*>(partial + i / 2 * 8 + i % 2 * 4) =
                    make_float4(result[i][0], result[i][1], result[i][2], result[i][3]);
        }
    }
}

MOR_WORK(mor_attention_prompt_64, AttentionParams, (BLOCK, 2), attend_prompt<64>)
MOR_WORK(mor_attention_prompt_128, AttentionParams, (BLOCK, 1), attend_prompt<128>)
#endif

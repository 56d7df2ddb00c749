// Attention over keys and values in halves by tensor cores. A block takes one part of the context and some
// rows that share their entries; their query heads of one key head are columns, eight a tile. A warp has 32
// entries for itself, and the block adds up the warps. Every column has its sums in an order of its own, and
// entries that it does not see add zeros, so that the other rows of the block change no bit.
//
// Queries and weights are split into a half and the half of what is left, 22 bits, which stand in rows g and
// g + 8 of the same fragment; so their two sums are only to be added. Lanes number entries and elements in the
// order in which they can load them widest, which products do not mind.
#pragma once
#include "cache.cuh"

#ifdef MOR_TENSOR_CORES

// Columns of a tile, elements of a head that are taken together, and entries of a warp, in two pages.
constexpr u32 COLUMNS = 8;
constexpr u32 CHUNK_ELEMENTS = 64;
constexpr u32 WARP_ENTRIES = 2 * PAGE_TOKENS;
static_assert(PART == WARPS * WARP_ENTRIES && COLUMNS == WARPS, "");
// Floats from one column's result to the next, so that fewer lanes meet in a bank.
constexpr u32 RESULT_STRIDE = CHUNK_ELEMENTS + 8;

// Shared memory of a block, as attention_shared in program.rs.
struct Tile {
    // Fragments of the queries, [elements / 16][lanes], in whole chunks.
    uint4* q;
    // Of each column and warp the largest score and the weights' sum, [COLUMNS][WARPS].
    float* maxima;
    float* sums;
    // [WARPS][COLUMNS][RESULT_STRIDE]
    float* results;
};

__device__ __forceinline__ u32 whole_chunks(u32 head_dim) {
    return (head_dim + CHUNK_ELEMENTS - 1) / CHUNK_ELEMENTS * CHUNK_ELEMENTS;
}

__device__ __forceinline__ Tile tile_of(float4* shared, u32 head_dim) {
    uint4* q = reinterpret_cast<uint4*>(shared);
    float* maxima = reinterpret_cast<float*>(q + whole_chunks(head_dim) / 16 * WARP);
    return {q, maxima, maxima + COLUMNS * WARPS, maxima + 2 * COLUMNS * WARPS};
}

__device__ __forceinline__ float exponential(float x) {
#ifdef MOR_EMULATED
    return expf(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
#endif
}

// Both over the warps.
__device__ __forceinline__ float largest_of(const float maxima[WARPS]) {
    const float4* fours = reinterpret_cast<const float4*>(maxima);
    const float4 a = fours[0], b = fours[1];
    return fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
}

__device__ __forceinline__ float sum_of(const float sums[WARPS]) {
    const float4* fours = reinterpret_cast<const float4*>(sums);
    const float4 a = fours[0], b = fours[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}

// The low (0) or high (1) halves of two words as one word.
__device__ __forceinline__ u32 halves_of(u32 a, u32 b, u32 which) {
    return __byte_perm(a, b, which ? 0x7632u : 0x5410u);
}

// What is left of two numbers when `halves` is taken away.
__device__ __forceinline__ u32 rest_of(float low, float high, u32 halves) {
    return pair_of_halves(low - half_to_float(static_cast<u16>(halves)),
                          high - half_to_float(static_cast<u16>(halves >> 16)));
}

// Element `e` of a query into the fragments of its column.
__device__ __forceinline__ void put_element(u16* fragments, u32 e, float value) {
    // The largest half; what is not a number stays so.
    if (fabsf(value) > 65504.0f) value = copysignf(65504.0f, value);
    const u16 half = float_to_half(value);
    u16* to = fragments + e / 16 * (WARP * 8) + e % 16 / 4 * 8 + e % 4 / 2 * 4 + e % 2;
    to[0] = half;
    to[2] = float_to_half(value - half_to_float(half));
}

// A warp rotates the query of a column of tile `tile`, scales it, and puts it into its fragments. Columns
// without a query keep what is there, and their results are not looked at. `rows`: how many the block has, whose
// slots the lanes know.
__device__ __forceinline__ void put_query(const AttentionParams& p, u32 tile, u32 rows, u32 slots, u16* fragments) {
    const u32 g = warp_index(), column = COLUMNS * tile + g, head = column >> p.row_shift;
    const u32 row = column & ((1u << p.row_shift) - 1), hd = p.input.cache.head_dim;
    const u32 slot = __shfl_sync(ALL_LANES, slots, row);
    if (head >= p.heads_of_key || row >= rows) return;
    const u32 c = (blockIdx.x << p.row_shift) + row, pairs = p.input.pairs;
    const float* q = p.input.q + static_cast<u64>(c * p.input.heads + blockIdx.y * p.heads_of_key + head) * hd;
    const float2* angles = p.input.rope + static_cast<u64>(slot) * pairs;
    fragments += 32 * g;
    for (u32 i = lane_index(); i < pairs; i += WARP) {
        const u32 a = p.input.neighbours ? 2 * i : i, b = p.input.neighbours ? a + 1 : i + pairs;
        const float x = q[a], y = q[b];
        const float2 angle = angles[i];
        put_element(fragments, a, fmaf(x, angle.x, -y * angle.y) * p.factor);
        put_element(fragments, b, fmaf(y, angle.x, x * angle.y) * p.factor);
    }
    for (u32 e = 2 * pairs + lane_index(); e < whole_chunks(hd); e += WARP)
        put_element(fragments, e, e < hd ? q[e] * p.factor : 0);
}

// Values of the lane's eight entries: the elements 8g to 8g + 7 of a chunk, of which `elements` are left.
// What nobody wrote is not read: it might not be a number.
template <bool WHOLE>
__device__ __forceinline__ void load_values(const u8* values, u32 value_bytes, int entries, u32 elements, uint4 v[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (i < entries && (WHOLE || 8 * (lane_index() / 4) < elements))
            v[i] = *reinterpret_cast<const uint4*>(values + i * value_bytes);
    }
}

// Scores of the warp's entries for the columns g: s[i][b] is that of entry 8t + 4b + i. `keys` are those of the
// lane's four entries from its element 4t on.
template <bool WHOLE>
__device__ __forceinline__ void score(const u8* keys, const uint4* q, u32 hd, float s[4][2]) {
    constexpr u32 STEPS = CHUNK_ELEMENTS / 16;
    float d[4][4] = {};
    for (u32 chunk = 0; chunk < hd; chunk += CHUNK_ELEMENTS) {
        uint2 loaded[STEPS][4];
#pragma unroll
        for (u32 i = 0; i < STEPS * 4; i++) {
            const u32 e = chunk + i / 4 * 16 + i % 4;
            const bool inside = WHOLE || e + 4 * (lane_index() % 4) < hd;
            loaded[i / 4][i % 4] = inside ? *reinterpret_cast<const uint2*>(keys + e * PAGE_TOKENS * 2)
                                          : make_uint2(0, 0);
        }
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            const uint4 four = q[(chunk / 16 + step) * WARP + lane_index()];
            const u32 a[4] = {four.x, four.y, four.z, four.w};
            const uint2* k = loaded[step];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 b[2] = {i < 2 ? halves_of(k[0].x, k[1].x, i % 2) : halves_of(k[0].y, k[1].y, i % 2),
                                  i < 2 ? halves_of(k[2].x, k[3].x, i % 2) : halves_of(k[2].y, k[3].y, i % 2)};
                multiply_add(d[i], a, b);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        s[i][0] = d[i][0] + d[i][2];
        s[i][1] = d[i][1] + d[i][3];
    }
}

// The weighted sum of the warp's values, a chunk of elements: the lane's 16t to 16t + 15 of column g. `a` are
// the weights' fragments of entries 8t to 8t + 3 and 8t + 4 to 8t + 7.
__device__ __forceinline__ void add_values(const u32 a[2][4], const uint4 v[8], float* to) {
    float o[8][4] = {};
#pragma unroll
    for (u32 step = 0; step < 2; step++) {
        const uint4* of = v + 4 * step;
        const u32 words[4][4] = {{of[0].x, of[0].y, of[0].z, of[0].w}, {of[1].x, of[1].y, of[1].z, of[1].w},
                                 {of[2].x, of[2].y, of[2].z, of[2].w}, {of[3].x, of[3].y, of[3].z, of[3].w}};
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            const u32 b[2] = {halves_of(words[0][n / 2], words[1][n / 2], n % 2),
                              halves_of(words[2][n / 2], words[3][n / 2], n % 2)};
            multiply_add(o[n], a[step], b);
        }
    }
    // Column n of product number i is element 8n + i.
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 n = i % 2 * 4, b = i / 2;
        *reinterpret_cast<float4*>(to + 8 * b + n) = make_float4(o[n][b] + o[n][2 + b], o[n + 1][b] + o[n + 1][2 + b],
                                                                 o[n + 2][b] + o[n + 2][2 + b],
                                                                 o[n + 3][b] + o[n + 3][2 + b]);
    }
}

// WHOLE: a head is whole chunks.
template <bool WHOLE>
__device__ __forceinline__ void attend_halves(const AttentionParams& p, float4* shared) {
    const StoreParams& in = p.input;
    const Cache& cache = in.cache;
    const u32 hd = cache.head_dim, w = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const u32 kv_head = blockIdx.y, begin = blockIdx.z * PART, rows = 1u << p.row_shift;
    const u32 first_row = blockIdx.x << p.row_shift;
    const Tile room = tile_of(shared, hd);
    // Lane r looks after row r; lanes without a row look at the first, and see nothing.
    const u32 running = load_now(in.view.count);
    u32 here = 1, slot = 0;
    if (!slot_is_known(p)) {
        const u32 place = first_row + (lane < rows && first_row + lane < p.rows ? lane : 0);
        slot = load_now(in.view.slots + place);
        if (first_row >= running) return;
        here = running - first_row < rows ? running - first_row : rows;
        const u32 first_slot = __shfl_sync(ALL_LANES, slot, 0);
        if (lane >= here) slot = first_slot;
    }
    const Seat seat = seat_of(cache, in.planes, in.rows[slot], in.states[slot]);
    // The part's pages, of which a warp has two; beyond the last that is used they may be anything.
    const u32 page = begin / PAGE_TOKENS + lane % (PART / PAGE_TOKENS);
    const u32 page_of_lane = load_now(seat.table + (page < cache.table_pages ? page : 0));
    // A lone row's own entry is stored by the warps that have the least to do.
    constexpr u32 storing = BLOCK / 2;
    u32 e = threadIdx.x - storing;
    const bool stores = p.alone && threadIdx.x >= storing && e < hd;
    Element own = {};
    if (stores) own = read_element(in, first_row, slot, kv_head, e);
    put_query(p, 0, here, slot, reinterpret_cast<u16*>(room.q));
    const u32 visible = lane < here && running > 0 ? seat.visible : 0;
    const u32 most = __reduce_max_sync(ALL_LANES, visible);
    if (begin >= most) return;
    const u32 left = most - begin, count = left < PART ? left : PART;
    if (begin == 0 && kv_head == 0 && w == 0 && visible) p.visible[first_row + lane] = visible;
    const u32 own_number = __shfl_sync(ALL_LANES, page_of_lane, (count - 1) / PAGE_TOKENS);
    if (stores && seat.own && count == left) {
        u8* own_page = cache.pages + static_cast<u64>(own_number) * cache.page_bytes;
        bool finite = true;
        while (true) {
            finite &= store_element<F16>(cache, own_page, kv_head, (count - 1) % PAGE_TOKENS, e, own);
            e += storing;
            if (e >= hd) break;
            own = read_element(in, first_row, slot, kv_head, e);
        }
        if (!finite) report_error(in.report, KEY_NOT_FINITE, slot);
    }
    const u32 warps = (count + WARP_ENTRIES - 1) / WARP_ENTRIES;
    const int first_entry = static_cast<int>(begin + w * WARP_ENTRIES + 8 * t);
    const int entries = static_cast<int>(begin + count) - first_entry;
    // Keys are loaded four entries a lane, values eight. What nobody wrote may be anything in keys, but its page
    // must be one: it is the first page's then.
    const u32 key_page = 2 * w + g / 4;
    const u64 key_number = __shfl_sync(ALL_LANES, page_of_lane, key_page * PAGE_TOKENS < count ? key_page : 0);
    const u64 value_number = __shfl_sync(ALL_LANES, page_of_lane, 2 * w + t / 2);
    const u8* keys = cache.pages + key_number * cache.page_bytes + kv_head * PAGE_TOKENS * cache.key_bytes +
                     4 * t * PAGE_TOKENS * 2 + g % 4 * 8;
    const u8* values = cache.pages + value_number * cache.page_bytes +
                       cache.kv_heads * PAGE_TOKENS * cache.key_bytes +
                       (kv_head * PAGE_TOKENS + t % 2 * 8) * cache.value_bytes + 16 * g;
    const u32 tiles = ((p.heads_of_key << p.row_shift) + COLUMNS - 1) / COLUMNS;
    for (u32 tile = 0; tile < tiles; tile++) {
        if (tile > 0) put_query(p, tile, here, slot, reinterpret_cast<u16*>(room.q));
        // The queries are there, and the lone row's own entry.
        __syncthreads();
        const u32 row = (COLUMNS * tile + g) & (rows - 1);
        const int seen = static_cast<int>(__shfl_sync(ALL_LANES, visible, row)) - first_entry;
        uint4 v[8];
        float s[4][2], max = LEAST, sum = 0;
        if (w < warps) {
            // On their way while there are scores to compute.
            load_values<WHOLE>(values, cache.value_bytes, entries, hd, v);
            score<WHOLE>(keys, room.q, hd, s);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i >= seen) s[i % 4][i / 4] = LEAST;
                max = fmaxf(max, s[i % 4][i / 4]);
            }
        }
        max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 1));
        max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, 2));
        if (t == 0) room.maxima[g * WARPS + w] = max;
        __syncthreads();
        max = largest_of(room.maxima + g * WARPS);
        u32 a[2][4];
        if (w < warps) {
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum += s[i % 4][i / 4] = exponential(s[i % 4][i / 4] - max);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float low = s[i % 2 * 2][i / 2], high = s[i % 2 * 2 + 1][i / 2];
                u32* pair = a[i / 2] + i % 2 * 2;
                pair[0] = pair_of_halves(low, high);
                pair[1] = rest_of(low, high, pair[0]);
            }
        }
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (t == 0) room.sums[g * WARPS + w] = sum;
        // A warp finishes a column.
        const u32 column = COLUMNS * tile + w, its_row = column & (rows - 1), head = column >> p.row_shift;
        const bool wanted = head < p.heads_of_key && __shfl_sync(ALL_LANES, visible, its_row) > begin;
        const u32 to = ((first_row + its_row) * in.heads + kv_head * p.heads_of_key + head) * p.parts + blockIdx.z;
        for (u32 chunk = 0; chunk < hd; chunk += CHUNK_ELEMENTS) {
            if (chunk > 0) {
                if (w < warps) load_values<WHOLE>(values + 2 * chunk, cache.value_bytes, entries, hd - chunk, v);
                // The results of the chunk before are read.
                __syncthreads();
            }
            float* mine = room.results + (w * COLUMNS + g) * RESULT_STRIDE + 16 * t;
            if (w < warps)
                add_values(a, v, mine);
            else
                for (u32 i = 0; i < 16; i += 4) *reinterpret_cast<float4*>(mine + i) = make_float4(0, 0, 0, 0);
            __syncthreads();
            if (!wanted) continue;
            const float* results = room.results + w * RESULT_STRIDE;
            float first = 0, second = 0;
#pragma unroll
            for (u32 k = 0; k < WARPS; k++) {
                first += results[k * COLUMNS * RESULT_STRIDE + lane];
                second += results[k * COLUMNS * RESULT_STRIDE + WARP + lane];
            }
            float* partial = p.partial + static_cast<u64>(to) * hd + chunk + lane;
            if (WHOLE || chunk + lane < hd) partial[0] = first;
            if (WHOLE || chunk + WARP + lane < hd) partial[WARP] = second;
        }
        if (wanted && lane == 0)
            p.partial_scales[to] = make_float2(largest_of(room.maxima + w * WARPS), sum_of(room.sums + w * WARPS));
    }
}
#endif

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

// Shared memory of a block, as attention_shared in functions.rs.
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
__device__ __forceinline__ void put_query(const AttentionParams& p, u32 row_shift, u32 tile, u32 rows, u32 slots,
                                          u16* fragments) {
    // Nothing of this is to stand in the way of a lone row, which has one tile.
    const u32 lane = only_here(lane_index()), g = only_here(warp_index());
    const u32 column = COLUMNS * tile + g, head = column >> row_shift;
    const u32 row = column & ((1u << row_shift) - 1), hd = p.input.cache.head_dim;
    const u32 slot = __shfl_sync(ALL_LANES, slots, row);
    if (head >= p.heads_of_key || row >= rows) return;
    const u32 c = (blockIdx.x << row_shift) + row, pairs = p.input.pairs;
    const float* q = p.input.q + static_cast<u64>(c * p.input.heads + blockIdx.y * p.heads_of_key + head) * hd;
    const float2* angles = p.input.rope + static_cast<u64>(slot) * pairs;
    fragments += 32 * g;
#pragma unroll 1
    for (u32 i = lane; i < pairs; i += WARP) {
        const u32 a = p.input.neighbours ? 2 * i : i, b = p.input.neighbours ? a + 1 : i + pairs;
        const float x = q[a], y = q[b];
        const float2 angle = angles[i];
        put_element(fragments, a, fmaf(x, angle.x, -y * angle.y) * p.factor);
        put_element(fragments, b, fmaf(y, angle.x, x * angle.y) * p.factor);
    }
#pragma unroll 1
    for (u32 e = 2 * pairs + lane; e < whole_chunks(hd); e += WARP)
        put_element(fragments, e, e < hd ? q[e] * p.factor : 0);
}

// Values of the lane's eight entries: the elements 8g to 8g + 7 of a chunk, of which `elements` are left.
// What nobody wrote is not read: it might not be a number.
template <bool WHOLE>
__device__ __forceinline__ void load_values(const u8* values, u32 value_bytes, int entries, u32 elements,
                                            uint4 v[8]) {
    const u32 step = WHOLE ? value_bytes : only_here(value_bytes);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = make_uint4(0, 0, 0, 0);
        if (i < entries && (WHOLE || 8 * (lane_index() / 4) < elements))
            v[i] = *reinterpret_cast<const uint4*>(values + i * step);
    }
}

// Keys of a chunk, of which `elements` are left, as the lane loads them: elements 16i + 4t to 16i + 4t + 3 of
// four entries. `keys` are those of its first element.
struct Keys4 {
    uint2 steps[CHUNK_ELEMENTS / 16][4];
};

template <bool WHOLE>
__device__ __forceinline__ Keys4 load_keys(const u8* keys, u32 elements) {
    Keys4 k;
    // What heads of other sizes must check would take registers all the time.
    const int inside = WHOLE ? CHUNK_ELEMENTS : static_cast<int>(only_here(elements - 4 * (lane_index() % 4)));
#pragma unroll
    for (int i = 0; i < static_cast<int>(CHUNK_ELEMENTS / 4); i++) {
        const int e = i / 4 * 16 + i % 4;
        k.steps[i / 4][i % 4] = make_uint2(0, 0);
        if (e < inside) k.steps[i / 4][i % 4] = *reinterpret_cast<const uint2*>(keys + e * PAGE_TOKENS * 2);
    }
    return k;
}

// Multiplies sixteen elements of the lane's four entries with the queries' fragments: d[i] is the product for entry i.
__device__ __forceinline__ void multiply_key_step(const uint2 of[4], const uint4& q, float d[4][4]) {
    const u32 a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 b[2] = {i < 2 ? halves_of(of[0].x, of[1].x, i % 2) : halves_of(of[0].y, of[1].y, i % 2),
                          i < 2 ? halves_of(of[2].x, of[3].x, i % 2) : halves_of(of[2].y, of[3].y, i % 2)};
        multiply_add(d[i], a, b);
    }
}

__device__ __forceinline__ void multiply_keys(const Keys4& k, const uint4* q, float d[4][4]) {
#pragma unroll
    for (u32 step = 0; step < CHUNK_ELEMENTS / 16; step++)
        multiply_key_step(k.steps[step], q[step * WARP + lane_index()], d);
}

// Adds the weighted values of four of the lane's entries, a chunk of elements: product i of column n is element 8n + i.
__device__ __forceinline__ void add_value_step(const u32 a[4], const uint4 of[4], float o[8][4]) {
    const u32 words[4][4] = {{of[0].x, of[0].y, of[0].z, of[0].w}, {of[1].x, of[1].y, of[1].z, of[1].w},
                             {of[2].x, of[2].y, of[2].z, of[2].w}, {of[3].x, of[3].y, of[3].z, of[3].w}};
#pragma unroll
    for (u32 n = 0; n < 8; n++) {
        const u32 b[2] = {halves_of(words[0][n / 2], words[1][n / 2], n % 2),
                          halves_of(words[2][n / 2], words[3][n / 2], n % 2)};
        multiply_add(o[n], a, b);
    }
}

// The weighted sum of the warp's values, a chunk of elements: the lane's 16t to 16t + 15 of column g. `a` are
// the weights' fragments of entries 8t to 8t + 3 and 8t + 4 to 8t + 7.
__device__ __forceinline__ void add_values(const u32 a[2][4], const uint4 v[8], float* to) {
    float o[8][4] = {};
#pragma unroll
    for (u32 step = 0; step < 2; step++) add_value_step(a[step], v + 4 * step, o);
    // Column n of product number i is element 8n + i.
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 n = i % 2 * 4, b = i / 2;
        *reinterpret_cast<float4*>(to + 8 * b + n) = make_float4(o[n][b] + o[n][2 + b], o[n + 1][b] + o[n + 1][2 + b],
                                                                 o[n + 2][b] + o[n + 2][2 + b],
                                                                 o[n + 3][b] + o[n + 3][2 + b]);
    }
}

// WHOLE: a head is whole chunks. ALONE: a block has one row; known here, it leaves less to execute.
template <bool WHOLE, bool ALONE>
__device__ __forceinline__ void attend_halves(const AttentionParams& p, float4* shared) {
    const StoreParams& in = p.input;
    const Cache& cache = in.cache;
    const u32 hd = cache.head_dim, w = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const u32 kv_head = blockIdx.y, begin = blockIdx.z * PART, row_shift = ALONE ? 0 : p.row_shift;
    const u32 rows = 1u << row_shift, first_row = blockIdx.x << row_shift;
    const Tile room = tile_of(shared, hd);
    // Whether values are loaded together with keys. With more to remember, registers would not do.
    constexpr bool AHEAD = WHOLE && ALONE;
    // Lane r looks after row r; lanes without a row look at the first, and see nothing. A session's rows are in the
    // slots from 0 on, so that all that is a lone row's can be loaded at once, before it is known whether it runs.
    const u32 running = load_now(in.view.count);
    u32 here = 1, slot = 0;
    if (!ALONE || !p.stores || !cache.one_sequence) {
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
    // The row's own entry is stored by the warps that have the least to do.
    constexpr u32 storing = BLOCK / 2;
    u32 e = threadIdx.x - storing;
    const bool stores = ALONE && p.stores && threadIdx.x >= storing && e < hd;
    Element own = {};
    if (stores) own = read_element(in, first_row, slot, kv_head, e);
    put_query(p, row_shift, 0, here, slot, reinterpret_cast<u16*>(room.q));
    const u32 visible = running > 0 && (ALONE || lane < here) ? seat.visible : 0;
    const u32 most = ALONE ? visible : __reduce_max_sync(ALL_LANES, visible);
    if (begin >= most) return;
    const u32 left = most - begin, count = left < PART ? left : PART;
    if (begin == 0 && kv_head == 0 && w == 0 && lane < here && visible > 0) p.visible[first_row + lane] = visible;
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
    const u32 tiles = ((p.heads_of_key << row_shift) + COLUMNS - 1) / COLUMNS;
    for (u32 tile = 0; tile < tiles; tile++) {
        if (tile > 0) put_query(p, row_shift, tile, here, slot, reinterpret_cast<u16*>(room.q));
        // The queries are there, and the row's own entry.
        __syncthreads();
        const u32 row = (COLUMNS * tile + g) & (rows - 1);
        const int seen = static_cast<int>(ALONE ? visible : __shfl_sync(ALL_LANES, visible, row)) - first_entry;
        uint4 v[8];
        // Scores, then weights: s[i] is that of entry 8t + i for column g.
        float s[8], max = LEAST, sum = 0;
        if (w < warps) {
            float d[4][4] = {};
            Keys4 k = load_keys<WHOLE>(keys, hd);
            // On their way while there are scores to compute.
            if (AHEAD) load_values<WHOLE>(values, cache.value_bytes, entries, hd, v);
            multiply_keys(k, room.q, d);
#pragma unroll 1
            for (u32 chunk = CHUNK_ELEMENTS; chunk < hd; chunk += CHUNK_ELEMENTS) {
                k = load_keys<WHOLE>(keys + chunk * PAGE_TOKENS * 2, hd - chunk);
                multiply_keys(k, room.q + chunk / 16 * WARP, d);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                s[i] = i < seen ? d[i % 4][i / 4] + d[i % 4][2 + i / 4] : LEAST;
                max = fmaxf(max, s[i]);
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
            for (u32 i = 0; i < 8; i++) sum += s[i] = exponential(s[i] - max);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float low = s[2 * i], high = s[2 * i + 1];
                u32* pair = a[i / 2] + i % 2 * 2;
                pair[0] = pair_of_halves(low, high);
                pair[1] = rest_of(low, high, pair[0]);
            }
        }
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        if (t == 0) room.sums[g * WARPS + w] = sum;
        // A warp finishes a column.
        const u32 column = COLUMNS * tile + w, its_row = column & (rows - 1), head = column >> row_shift;
        const bool sees = ALONE || __shfl_sync(ALL_LANES, visible, its_row) > begin;
        const bool wanted = head < p.heads_of_key && sees;
        const u32 to = ((first_row + its_row) * in.heads + kv_head * p.heads_of_key + head) * p.parts + blockIdx.z;
#pragma unroll 1
        for (u32 chunk = 0; chunk < hd; chunk += CHUNK_ELEMENTS) {
            if (w < warps && (!AHEAD || chunk > 0))
                load_values<WHOLE>(values + 2 * chunk, cache.value_bytes, entries, hd - chunk, v);
            // The results of the chunk before are read.
            if (chunk > 0) __syncthreads();
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

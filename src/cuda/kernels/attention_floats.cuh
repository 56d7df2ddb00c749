// Attention in single precision, a row a block: over a cache of any type, on any device.
#pragma once
#include "cache.cuh"

// Query heads that go together.
constexpr u32 HEADS_TOGETHER = 4;

// Two numbers as they lie in the cache: F32 one in each half, F16 both in the first, Q8_0 two codes and
// their two scales. All zeros are two zeros.
struct Pair {
    u32 first, second;
};

// Element `e` of the keys of entries 2 · `pair` and the next.
template <u32 TYPE>
__device__ __forceinline__ Pair key_pair(const u8* keys, u32 pair, u32 e) {
    const u32 at = e * PAGE_TOKENS + 2 * pair;
    if constexpr (TYPE == F16) return {*reinterpret_cast<const u32*>(keys + 2 * at), 0};
    if constexpr (TYPE == F32) {
        const uint2 both = *reinterpret_cast<const uint2*>(keys + 4 * at);
        return {both.x, both.y};
    }
    const u8* block = keys + e / 32 * (TILE_ROWS * 34);
    const u8* codes = block + TILE_ROWS * (2 + e % 32 / 4 * 4) + 8 * pair + e % 4;
    return {codes[0] | static_cast<u32>(codes[4]) << 8, *reinterpret_cast<const u32*>(block + 4 * pair)};
}

// Elements `e`, which is even, and the next of a value.
template <u32 TYPE>
__device__ __forceinline__ Pair value_pair(const u8* values, u32 e) {
    if constexpr (TYPE == F16) return {*reinterpret_cast<const u32*>(values + 2 * e), 0};
    if constexpr (TYPE == F32) {
        const uint2 both = *reinterpret_cast<const uint2*>(values + 4 * e);
        return {both.x, both.y};
    }
    const u8* block = values + e / 32 * 34;
    return {*reinterpret_cast<const u16*>(block + 2 + e % 32), *reinterpret_cast<const u16*>(block) * 0x10001u};
}

template <u32 TYPE>
__device__ __forceinline__ float2 numbers(Pair pair) {
    if constexpr (TYPE == F32) return make_float2(__uint_as_float(pair.first), __uint_as_float(pair.second));
    const u16 low = static_cast<u16>(TYPE == F16 ? pair.first : pair.second);
    const u16 high = static_cast<u16>((TYPE == F16 ? pair.first : pair.second) >> 16);
    const float2 halves = make_float2(half_to_float(low), half_to_float(high));
    if constexpr (TYPE == F16) return halves;
    return make_float2(static_cast<float>(static_cast<signed char>(pair.first)) * halves.x,
                       static_cast<float>(static_cast<signed char>(pair.first >> 8)) * halves.y);
}

// Elements of a head that a warp takes at a time, two a lane.
constexpr u32 ELEMENTS = 2 * WARP;

// Shared memory of a block, as attention_shared in functions.rs: queries [elements][HEADS_TOGETHER] in whole
// ELEMENTS, scores [PART][HEADS_TOGETHER], sums [WARPS][HEADS_TOGETHER][ELEMENTS].
struct Room {
    float* q;
    float* scores;
    float* sums;
};

__device__ __forceinline__ u32 whole_elements(u32 head_dim) {
    return (head_dim + ELEMENTS - 1) / ELEMENTS * ELEMENTS;
}

__device__ __forceinline__ Room room_of(float4* shared, u32 head_dim) {
    static_assert(HEADS_TOGETHER == 4, "a float4 has one number for each head");
    float* q = reinterpret_cast<float*>(shared);
    float* scores = q + HEADS_TOGETHER * whole_elements(head_dim);
    return {q, scores, scores + HEADS_TOGETHER * PART};
}

// Adds two numbers of the cache, each times what every head has for it, to the heads' sums of both.
__device__ __forceinline__ void add_for_heads(const float4& heads, const float2& numbers, float a[HEADS_TOGETHER],
                                              float b[HEADS_TOGETHER]) {
    const float of[HEADS_TOGETHER] = {heads.x, heads.y, heads.z, heads.w};
#pragma unroll
    for (u32 h = 0; h < HEADS_TOGETHER; h++) {
        a[h] = fmaf(of[h], numbers.x, a[h]);
        b[h] = fmaf(of[h], numbers.y, b[h]);
    }
}

// A warp scores a page's entries: lane l takes entries 2 (l mod 8) and the next, and of each head the
// elements l / 8, l / 8 + 4, …, whose four sums are put together at the end.
template <u32 TYPE>
__device__ __forceinline__ void score_page(const u8* keys, const Room& room, u32 head_dim, u32 first,
                                           u32 count) {
    // Loads that are under way at the same time; without many the page's latency is all there is.
    constexpr u32 TOGETHER = TYPE == F16 ? 16 : TYPE == F32 ? 8 : 4;
    const u32 pair = lane_index() % 8, from = lane_index() / 8;
    const float4* q = reinterpret_cast<const float4*>(room.q);
    float a[HEADS_TOGETHER] = {}, b[HEADS_TOGETHER] = {};
    for (u32 start = from; start < head_dim; start += 4 * TOGETHER) {
        Pair loaded[TOGETHER];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const u32 e = start + 4 * i;
            // Entries that nobody wrote are not read.
            loaded[i] = e < head_dim && first + 2 * pair < count ? key_pair<TYPE>(keys, pair, e) : Pair{0, 0};
        }
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const float2 key = numbers<TYPE>(loaded[i]);
            const float4 query = q[start + 4 * i];
            add_for_heads(query, key, a, b);
        }
    }
    float* scores = room.scores + (first + 2 * pair) * HEADS_TOGETHER;
#pragma unroll
    for (u32 h = 0; h < HEADS_TOGETHER; h++) {
        a[h] += __shfl_xor_sync(ALL_LANES, a[h], 8);
        b[h] += __shfl_xor_sync(ALL_LANES, b[h], 8);
        a[h] += __shfl_xor_sync(ALL_LANES, a[h], 16);
        b[h] += __shfl_xor_sync(ALL_LANES, b[h], 16);
        if (h == from) {
            scores[h] = a[h];
            scores[HEADS_TOGETHER + h] = b[h];
        }
    }
}

// A warp makes weights of one head's scores; the largest score and the weights' sum.
__device__ __forceinline__ float2 softmax(float* scores, u32 count) {
    float max = LEAST, sum = 0;
    for (u32 j = lane_index(); j < count; j += WARP) max = fmaxf(max, scores[j * HEADS_TOGETHER]);
    max = warp_max(max);
    for (u32 j = lane_index(); j < count; j += WARP) {
        const float weight = expf(scores[j * HEADS_TOGETHER] - max);
        scores[j * HEADS_TOGETHER] = weight;
        sum += weight;
    }
    return make_float2(max, warp_sum(sum));
}

// One part of one row's context for a few query heads of one key head, the first of them `first_head`. Every
// sum has its order, whatever else runs.
template <u32 TYPE>
__device__ __forceinline__ void attend(const AttentionParams& p, const Room& room, u32 c, u32 slot, const Seat& seat,
                                       u32 kv_head, u32 first_head, u32 heads, u32 begin, u32 count) {
    static_assert(PART <= PAGE_TOKENS * WARP, "a lane for each page of a part");
    const Cache& cache = p.input.cache;
    const u32 hd = cache.head_dim, w = warp_index(), lane = lane_index(), part = begin / PART;
    const u32 pages = (count + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const u32 page_of_lane = lane < pages ? seat.table[begin / PAGE_TOKENS + lane] : 0;
    const u64 head = static_cast<u64>(c) * p.input.heads + first_head;
    const float* queries = p.input.q + head * hd;
    // Two warps a head.
    static_assert(WARPS == 2 * HEADS_TOGETHER, "");
    const u32 own_head = w % HEADS_TOGETHER;
    for (u32 e = w / HEADS_TOGETHER * WARP + lane; e < whole_elements(hd); e += 2 * WARP) {
        const bool inside = own_head < heads && e < hd;
        room.q[e * HEADS_TOGETHER + own_head] =
            inside ? rotated(p.input, slot, queries + own_head * hd, e) * p.factor : 0;
    }
    __syncthreads();
    for (u32 page = w; page < pages; page += WARPS) {
        const u64 number = __shfl_sync(ALL_LANES, page_of_lane, page);
        const u8* keys = cache.pages + number * cache.page_bytes + kv_head * PAGE_TOKENS * cache.key_bytes;
        score_page<TYPE>(keys, room, hd, page * PAGE_TOKENS, count);
    }
    __syncthreads();
    if (w < heads) {
        const float2 scales = softmax(room.scores + w, count);
        if (lane == 0) p.partial_scales[(head + w) * p.parts + part] = scales;
    }
    // A warp takes every eighth entry, a lane two elements of it.
    const u8* values = cache.pages + PAGE_TOKENS * (cache.kv_heads * cache.key_bytes + kv_head * cache.value_bytes);
    for (u32 start = 0; start < hd; start += ELEMENTS) {
        __syncthreads();
        constexpr u32 TOGETHER = TYPE == F16 ? 8 : 4;
        const u32 e = start + 2 * lane;
        float a[HEADS_TOGETHER] = {}, b[HEADS_TOGETHER] = {};
        for (u32 first = w; first < count; first += TOGETHER * WARPS) {
            Pair loaded[TOGETHER];
#pragma unroll
            for (u32 i = 0; i < TOGETHER; i++) {
                const u32 j = first + i * WARPS;
                const u64 number = __shfl_sync(ALL_LANES, page_of_lane, j / PAGE_TOKENS);
                const u8* entry = values + number * cache.page_bytes + j % PAGE_TOKENS * cache.value_bytes;
                loaded[i] = j < count && e < hd ? value_pair<TYPE>(entry, e) : Pair{0, 0};
            }
#pragma unroll
            for (u32 i = 0; i < TOGETHER; i++) {
                const u32 j = first + i * WARPS;
                if (j >= count) continue;
                const float2 value = numbers<TYPE>(loaded[i]);
                const float4 weight = reinterpret_cast<const float4*>(room.scores)[j];
                add_for_heads(weight, value, a, b);
            }
        }
        float2* own = reinterpret_cast<float2*>(room.sums + w * HEADS_TOGETHER * ELEMENTS) + lane;
#pragma unroll
        for (u32 h = 0; h < HEADS_TOGETHER; h++) own[h * WARP] = make_float2(a[h], b[h]);
        __syncthreads();
        for (u32 i = threadIdx.x; i < heads * ELEMENTS; i += BLOCK) {
            const u32 h = i / ELEMENTS, element = start + i % ELEMENTS;
            if (element >= hd) continue;
            float sum = 0;
            for (u32 s = 0; s < WARPS; s++) sum += room.sums[s * HEADS_TOGETHER * ELEMENTS + i];
            p.partial[((head + h) * p.parts + part) * hd + element] = sum;
        }
    }
}

// grid: (rows, key heads, parts); dynamic shared memory as `room_of` cuts it.
template <u32 TYPE>
__device__ __forceinline__ void attend_row(const AttentionParams& p, float4* shared) {
    const StoreParams& in = p.input;
    const u32 c = blockIdx.x, kv_head = blockIdx.y, begin = blockIdx.z * PART;
    // As in attention_halves.cuh.
    const bool known = p.stores && in.cache.one_sequence;
    const u32 running = load_now(in.view.count), slot = known ? 0 : load_now(in.view.slots + c);
    if (!known && c >= running) return;
    const Seat seat = seat_of(in.cache, in.planes, in.rows[slot], in.states[slot]);
    if (c >= running || begin >= seat.visible) return;
    if (begin == 0 && kv_head == 0 && threadIdx.x == 0) p.visible[c] = seat.visible;
    const u32 left = seat.visible - begin, count = left < PART ? left : PART;
    if (p.stores && seat.own && count == left) store_head<TYPE>(in, c, slot, seat, kv_head, threadIdx.x, BLOCK);
    const Room room = room_of(shared, in.cache.head_dim);
    for (u32 first = 0; first < p.heads_of_key; first += HEADS_TOGETHER) {
        const u32 heads = p.heads_of_key - first < HEADS_TOGETHER ? p.heads_of_key - first : HEADS_TOGETHER;
        attend<TYPE>(p, room, c, slot, seat, kv_head, kv_head * p.heads_of_key + first, heads, begin, count);
    }
}

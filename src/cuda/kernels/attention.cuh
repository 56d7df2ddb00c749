// Attention over the ragged, paged KV cache. A page has the layout of src/kv.rs: the keys of a head
// are a tile of sixteen entries, element by element; its values are [16][value_bytes].
#pragma once
#include "rows.cuh"

constexpr u32 PAGE_TOKENS = TILE_ROWS;
// Query heads that go together.
constexpr u32 HEADS_TOGETHER = 4;

struct Cache {
    u8* pages;
    // [sequences · planes][table_pages]
    const u32* tables;
    u32 planes;
    u32 table_pages;
    u32 page_bytes;
    u32 key_bytes;
    u32 value_bytes;
    u32 kv_heads;
    u32 head_dim;
    // F32, F16 or Q8_0.
    u32 type;
};

enum Keys : u32 {
    // Every token has an entry: its position is its place.
    ALL_TOKENS = 0,
    // Tokens that were kept have one: `State::entry`.
    KEPT_TOKENS = 1,
    // The plane has every token's; nothing is added.
    READ_ONLY = 2
};

// Where a layer's keys are, by the recursion of the row.
struct Planes {
    // The recursion to look up for every row, or ANY for the row's own.
    u32 recursion;
    u32 keys[MAX_RECURSIONS];
    u32 plane[MAX_RECURSIONS];
};

constexpr u32 ANY = 0xffffffffu;

struct Seat {
    const u32* table;
    u32 visible;
    bool own;
};

__device__ __forceinline__ Seat seat_of(const Cache& cache, const Planes& planes, const Row& row,
                                        const State& state) {
    const u32 r = planes.recursion == ANY ? row.recursion : planes.recursion;
    const u32 keys = planes.keys[r];
    Seat seat;
    seat.table = cache.tables + (static_cast<u64>(row.sequence) * cache.planes + planes.plane[r]) * cache.table_pages;
    seat.visible = (keys == KEPT_TOKENS ? state.entry : row.position) + 1;
    seat.own = keys != READ_ONLY;
    return seat;
}

// What is stored of rows, and where.
struct StoreParams {
    View view;
    const Row* rows;
    const State* states;
    const float2* rope;
    // [rows][heads][head_dim]; rotated in place.
    float* q;
    // [rows][key heads][head_dim]; rotated in place, then stored.
    float* k;
    const float* v;
    Report* report;
    Cache cache;
    Planes planes;
    u32 heads;
    u32 pairs;
    // 1: element 2i goes with 2i + 1; 0: i with i + pairs.
    u32 neighbours;
};

// Rotates heads; `to` may be `from`.
__device__ __forceinline__ void rotate(const StoreParams& p, u32 slot, const float* from, float* to,
                                       u32 heads) {
    const u32 hd = p.cache.head_dim, rest = hd - 2 * p.pairs;
    const float2* angles = p.rope + static_cast<u64>(slot) * p.pairs;
    for (u32 i = threadIdx.x; i < heads * p.pairs; i += BLOCK) {
        const u32 pair = i % p.pairs, head = i / p.pairs * hd;
        const u32 a = head + (p.neighbours ? 2 * pair : pair);
        const u32 b = head + (p.neighbours ? 2 * pair + 1 : pair + p.pairs);
        const float2 angle = angles[pair];
        const float x = from[a], y = from[b];
        // Rounded as written, whichever kernel it stands in.
        to[a] = fmaf(x, angle.x, -__fmul_rn(y, angle.y));
        to[b] = fmaf(y, angle.x, __fmul_rn(x, angle.y));
    }
    if (to == from) return;
    for (u32 i = threadIdx.x; i < heads * rest; i += BLOCK) {
        const u32 e = i / rest * hd + 2 * p.pairs + i % rest;
        to[e] = from[e];
    }
}

// Quantizes 32 elements as Q8_0, one a lane: the scale's bits and the lane's code.
__device__ __forceinline__ u16 quantize_q8(float value, signed char* code) {
    const float largest = warp_max(fabsf(value));
    const float scale = largest / 127.0f;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    *code = static_cast<signed char>(static_cast<int>(roundf(value * inverse)));
    return float_to_half(scale);
}

// Stores keys and values, [heads][head_dim] each, of some key heads of a row's own entry, which is the last
// that it sees.
__device__ __forceinline__ void store_entry(const StoreParams& p, u32 slot, const Seat& seat, const float* k,
                                            const float* v, u32 first_head, u32 heads) {
    const Cache& cache = p.cache;
    const u32 hd = cache.head_dim, width = heads * hd, at = seat.visible - 1, entry = at % PAGE_TOKENS;
    u8* page = cache.pages + static_cast<u64>(seat.table[at / PAGE_TOKENS]) * cache.page_bytes;
    bool bad = false;
    // A warp takes 32 elements of keys and values at a time; a head of Q8_0 is a multiple of 32.
    for (u32 i = threadIdx.x; i < (width + WARP - 1) / WARP * WARP; i += BLOCK) {
        const bool inside = i < width;
        const u32 head = first_head + (inside ? i / hd : 0), e = inside ? i % hd : 0;
        const float key = inside ? k[i] : 0;
        const float value = inside ? v[i] : 0;
        bad |= !is_finite(key) || !is_finite(value);
        u8* keys = page + static_cast<u64>(head) * PAGE_TOKENS * cache.key_bytes;
        u8* values = page + static_cast<u64>(cache.kv_heads) * PAGE_TOKENS * cache.key_bytes +
                     (static_cast<u64>(head) * PAGE_TOKENS + entry) * cache.value_bytes;
        if (cache.type == Q8_0) {
            signed char code;
            u16 scale = quantize_q8(key, &code);
            u8* block = keys + static_cast<u64>(e / 32) * TILE_ROWS * 34;
            u32 j = e % 32;
            if (inside) block[TILE_ROWS * (2 + j / 4 * 4) + 4 * entry + j % 4] = static_cast<u8>(code);
            if (inside && j == 0) *reinterpret_cast<u16*>(block + 2 * entry) = scale;
            scale = quantize_q8(value, &code);
            block = values + e / 32 * 34;
            if (inside) block[2 + j] = static_cast<u8>(code);
            if (inside && j == 0) *reinterpret_cast<u16*>(block) = scale;
        } else if (inside && cache.type == F16) {
            u16 half = float_to_half(key);
            bad |= (half & 0x7c00u) == 0x7c00u;
            reinterpret_cast<u16*>(keys)[e * PAGE_TOKENS + entry] = half;
            half = float_to_half(value);
            bad |= (half & 0x7c00u) == 0x7c00u;
            reinterpret_cast<u16*>(values)[e] = half;
        } else if (inside) {
            reinterpret_cast<float*>(keys)[e * PAGE_TOKENS + entry] = key;
            reinterpret_cast<float*>(values)[e] = value;
        }
    }
    if (bad) report_error(p.report, KEY_NOT_FINITE, slot);
}

// Rotates queries and keys, and stores keys and values. A block a row.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_store(const StoreParams p) {
    enter();
    const u32 c = blockIdx.x;
    if (c >= *p.view.count) return;
    const u32 slot = p.view.slots[c], width = p.cache.kv_heads * p.cache.head_dim;
    float* q = p.q + static_cast<u64>(c) * p.heads * p.cache.head_dim;
    rotate(p, slot, q, q, p.heads);
    const Seat seat = seat_of(p.cache, p.planes, p.rows[slot], p.states[slot]);
    if (!seat.own) return;
    float* k = p.k + static_cast<u64>(c) * width;
    rotate(p, slot, k, k, p.cache.kv_heads);
    __syncthreads();
    store_entry(p, slot, seat, k, p.v + static_cast<u64>(c) * width, 0, p.cache.kv_heads);
}
MOR_KERNEL(mor_store)

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

// Shared memory of a block, as attention_shared in program.rs: queries [elements][HEADS_TOGETHER] in whole
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

struct AttentionParams {
    // What is attended to, and with `stores` the work of mor_store too.
    StoreParams input;
    // [rows][heads][parts][head_dim], and of each the largest score and the sum: [rows][heads][parts].
    float* partial;
    float2* partial_scales;
    // [rows] how many entries each sees.
    u32* visible;
    // Parts of the longest context.
    u32 parts;
    u32 stores;
};

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
    constexpr u32 EACH = PART / WARP;
    float s[EACH], max = LEAST, sum = 0;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 j = i * WARP + lane_index();
        s[i] = j < count ? scores[j * HEADS_TOGETHER] : LEAST;
        max = fmaxf(max, s[i]);
    }
    max = warp_max(max);
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        const u32 j = i * WARP + lane_index();
        if (j >= count) continue;
        const float weight = expf(s[i] - max);
        scores[j * HEADS_TOGETHER] = weight;
        sum += weight;
    }
    return make_float2(max, warp_sum(sum));
}

// One part of one row's context for a few query heads of one key head. Every sum has its order, whatever
// else runs.
template <u32 TYPE>
__device__ __forceinline__ void attend(const AttentionParams& p, const Room& room, const float* queries, u32 c,
                                       const Seat& seat, u32 kv_head, u32 first_head, u32 heads, u32 begin,
                                       u32 count) {
    static_assert(PART == PAGE_TOKENS * WARP, "a lane for each page of a part");
    const Cache& cache = p.input.cache;
    const u32 hd = cache.head_dim, w = warp_index(), lane = lane_index(), part = begin / PART;
    const u32 pages = (count + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const u32 page_of_lane = lane < pages ? seat.table[begin / PAGE_TOKENS + lane] : 0;
    const float factor = 1.0f / sqrtf(static_cast<float>(hd));
    for (u32 i = threadIdx.x; i < HEADS_TOGETHER * whole_elements(hd); i += BLOCK) {
        const u32 h = i % HEADS_TOGETHER, e = i / HEADS_TOGETHER;
        room.q[i] = h < heads && e < hd ? queries[h * hd + e] * factor : 0;
    }
    __syncthreads();
    for (u32 page = w; page < pages; page += WARPS) {
        const u64 number = __shfl_sync(ALL_LANES, page_of_lane, page);
        const u8* keys = cache.pages + number * cache.page_bytes + kv_head * PAGE_TOKENS * cache.key_bytes;
        score_page<TYPE>(keys, room, hd, page * PAGE_TOKENS, count);
    }
    __syncthreads();
    const u64 head = static_cast<u64>(c) * p.input.heads + first_head;
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

// The row's own queries, rotated here, and where this part has its own entry that too is made and stored.
// Nothing is written that another block reads: the blocks of a key head store the same bytes, each for
// itself. `own` has room for the queries and a key.
__device__ __forceinline__ void store_own(const StoreParams& p, float* own, u32 c, u32 slot, const Seat& seat,
                                          u32 kv_head, u32 first_head, u32 heads, bool newest) {
    const u32 hd = p.cache.head_dim;
    rotate(p, slot, p.q + (static_cast<u64>(c) * p.heads + first_head) * hd, own, heads);
    if (seat.own && newest) {
        const u64 at = (static_cast<u64>(c) * p.cache.kv_heads + kv_head) * hd;
        float* key = own + heads * hd;
        rotate(p, slot, p.k + at, key, 1);
        __syncthreads();
        store_entry(p, slot, seat, key, p.v + at, kv_head, 1);
    }
    __syncthreads();
}

// grid: (rows, key heads · groups of query heads, parts); dynamic shared memory as `room_of` cuts it.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_attention(const AttentionParams p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
    const StoreParams& in = p.input;
    const Cache& cache = in.cache;
    const u32 c = blockIdx.x, begin = blockIdx.z * PART;
    if (c >= *in.view.count) return;
    const u32 slot = in.view.slots[c];
    const Seat seat = seat_of(cache, in.planes, in.rows[slot], in.states[slot]);
    if (begin == 0 && blockIdx.y == 0 && threadIdx.x == 0) p.visible[c] = seat.visible;
    if (begin >= seat.visible) return;
    const u32 left = seat.visible - begin, count = left < PART ? left : PART;
    const u32 per_key = in.heads / cache.kv_heads, groups = (per_key + HEADS_TOGETHER - 1) / HEADS_TOGETHER;
    const u32 kv_head = blockIdx.y / groups, within = blockIdx.y % groups * HEADS_TOGETHER;
    const u32 heads = per_key - within < HEADS_TOGETHER ? per_key - within : HEADS_TOGETHER;
    const u32 first = kv_head * per_key + within;
    const Room room = room_of(shared, cache.head_dim);
    const float* queries = in.q + (static_cast<u64>(c) * in.heads + first) * cache.head_dim;
    if (p.stores) {
        // Free until there are scores.
        float* own = room.scores;
        store_own(in, own, c, slot, seat, kv_head, first, heads, count == left);
        queries = own;
    }
    if (cache.type == F16)
        attend<F16>(p, room, queries, c, seat, kv_head, first, heads, begin, count);
    else if (cache.type == Q8_0)
        attend<Q8_0>(p, room, queries, c, seat, kv_head, first, heads, begin, count);
    else
        attend<F32>(p, room, queries, c, seat, kv_head, first, heads, begin, count);
}
MOR_KERNEL(mor_attention)

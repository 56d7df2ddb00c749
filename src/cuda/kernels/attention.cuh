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

struct StoreParams {
    View view;
    const Row* rows;
    const State* states;
    const float2* rope;
    float* q;
    // Rotated in place, then stored.
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

__device__ __forceinline__ void rotate(float* row, u32 heads, u32 head_dim, u32 pairs, u32 neighbours,
                                       const float2* angles) {
    for (u32 i = threadIdx.x; i < heads * pairs; i += BLOCK) {
        float* head = row + i / pairs * head_dim;
        u32 pair = i % pairs;
        float* a = head + (neighbours ? 2 * pair : pair);
        float* b = head + (neighbours ? 2 * pair + 1 : pair + pairs);
        float2 angle = angles[pair];
        float x = *a, y = *b;
        *a = x * angle.x - y * angle.y;
        *b = y * angle.x + x * angle.y;
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

// Rotates queries and keys, and stores keys and values. A block a row.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_store(const StoreParams p) {
    enter();
    const u32 c = blockIdx.x;
    if (c >= *p.view.count) return;
    const u32 slot = p.view.slots[c];
    const Row row = p.rows[slot];
    const Cache& cache = p.cache;
    const u32 hd = cache.head_dim, width = cache.kv_heads * hd;
    const float2* angles = p.rope + static_cast<u64>(slot) * p.pairs;
    rotate(p.q + static_cast<u64>(c) * p.heads * hd, p.heads, hd, p.pairs, p.neighbours, angles);
    const Seat seat = seat_of(cache, p.planes, row, p.states[slot]);
    if (!seat.own) return;
    float* k = p.k + static_cast<u64>(c) * width;
    rotate(k, cache.kv_heads, hd, p.pairs, p.neighbours, angles);
    __syncthreads();
    const u32 at = seat.visible - 1, entry = at % PAGE_TOKENS;
    u8* page = cache.pages + static_cast<u64>(seat.table[at / PAGE_TOKENS]) * cache.page_bytes;
    bool bad = false;
    // A warp takes 32 elements of keys and values at a time; a head of Q8_0 is a multiple of 32.
    for (u32 i = threadIdx.x; i < (width + WARP - 1) / WARP * WARP; i += BLOCK) {
        const bool inside = i < width;
        const u32 head = inside ? i / hd : 0, e = inside ? i % hd : 0;
        const float key = inside ? k[i] : 0;
        const float value = inside ? p.v[static_cast<u64>(c) * width + i] : 0;
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
MOR_KERNEL(mor_store)

template <u32 TYPE>
__device__ __forceinline__ float key_element(const u8* keys, u32 entry, u32 e) {
    if constexpr (TYPE == F32) return reinterpret_cast<const float*>(keys)[e * PAGE_TOKENS + entry];
    if constexpr (TYPE == F16) return half_to_float(reinterpret_cast<const u16*>(keys)[e * PAGE_TOKENS + entry]);
    const u8* block = keys + e / 32 * (TILE_ROWS * 34);
    u32 j = e % 32;
    float code = static_cast<float>(static_cast<signed char>(block[TILE_ROWS * (2 + j / 4 * 4) + 4 * entry + j % 4]));
    return code * half_to_float(*reinterpret_cast<const u16*>(block + 2 * entry));
}

template <u32 TYPE>
__device__ __forceinline__ float value_element(const u8* values, u32 e) {
    if constexpr (TYPE == F32) return reinterpret_cast<const float*>(values)[e];
    if constexpr (TYPE == F16) return half_to_float(reinterpret_cast<const u16*>(values)[e]);
    const u8* block = values + e / 32 * 34;
    float code = static_cast<float>(static_cast<signed char>(block[2 + e % 32]));
    return code * half_to_float(*reinterpret_cast<const u16*>(block));
}

struct AttentionParams {
    View view;
    const Row* rows;
    const State* states;
    // [rows][heads][head_dim]
    const float* q;
    // [rows][heads][parts][head_dim], and of each the largest score and the sum: [rows][heads][parts].
    float* partial;
    float2* partial_scales;
    // [rows] how many entries each sees.
    u32* visible;
    Cache cache;
    Planes planes;
    u32 heads;
    // Parts of the longest context.
    u32 parts;
    u32 unused;
};

// One part of one row's context for a few query heads of one key head.
template <u32 TYPE>
__device__ __forceinline__ void attend(const AttentionParams& p, u32 c, const Seat& seat, u32 kv_head,
                                       u32 first_head, u32 heads, u32 begin, u32 end, u32 part) {
    MOR_DYNAMIC_SHARED(float, shared);
    __shared__ float room[WARPS];
    const Cache& cache = p.cache;
    const u32 hd = cache.head_dim, count = end - begin;
    // [HEADS_TOGETHER][head_dim] queries, then [HEADS_TOGETHER][PART] scores, then sums of subsets.
    float* q = shared;
    float* scores = q + HEADS_TOGETHER * hd;
    float* sums = scores + HEADS_TOGETHER * PART;
    const float factor = 1.0f / sqrtf(static_cast<float>(hd));
    const float* from = p.q + (static_cast<u64>(c) * p.heads + first_head) * hd;
    for (u32 i = threadIdx.x; i < heads * hd; i += BLOCK) q[i] = from[i] * factor;
    __syncthreads();
    for (u32 j = threadIdx.x; j < count; j += BLOCK) {
        const u32 at = begin + j;
        const u8* page = cache.pages + static_cast<u64>(seat.table[at / PAGE_TOKENS]) * cache.page_bytes;
        const u8* keys = page + static_cast<u64>(kv_head) * PAGE_TOKENS * cache.key_bytes;
        float s[HEADS_TOGETHER] = {};
        for (u32 e = 0; e < hd; e++) {
            const float key = key_element<TYPE>(keys, at % PAGE_TOKENS, e);
            for (u32 h = 0; h < HEADS_TOGETHER; h++)
                if (h < heads) s[h] = fmaf(q[h * hd + e], key, s[h]);
        }
        for (u32 h = 0; h < heads; h++) scores[h * PART + j] = s[h];
    }
    __syncthreads();
    for (u32 h = 0; h < heads; h++) {
        float max = LEAST;
        for (u32 j = threadIdx.x; j < count; j += BLOCK) max = fmaxf(max, scores[h * PART + j]);
        max = block_max(max, room);
        __syncthreads();
        float sum = 0;
        for (u32 j = threadIdx.x; j < count; j += BLOCK) {
            float weight = expf(scores[h * PART + j] - max);
            scores[h * PART + j] = weight;
            sum += weight;
        }
        sum = block_sum(sum, room);
        __syncthreads();
        if (threadIdx.x == 0)
            p.partial_scales[(static_cast<u64>(c) * p.heads + first_head + h) * p.parts + part] = make_float2(max, sum);
    }
    // Threads share the entries where the head has fewer elements than there are threads; heads that
    // are wider are taken in several rounds.
    const u32 lanes = hd < BLOCK ? hd : BLOCK, subsets = BLOCK / lanes;
    const u32 subset = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    for (u32 start = 0; start < hd; start += lanes) {
        const u32 e = start + lane;
        float out[HEADS_TOGETHER] = {};
        if (subset < subsets && e < hd)
            for (u32 j = subset; j < count; j += subsets) {
                const u32 at = begin + j;
                const u8* page = cache.pages + static_cast<u64>(seat.table[at / PAGE_TOKENS]) * cache.page_bytes;
                const u8* values = page + static_cast<u64>(cache.kv_heads) * PAGE_TOKENS * cache.key_bytes +
                                   (static_cast<u64>(kv_head) * PAGE_TOKENS + at % PAGE_TOKENS) * cache.value_bytes;
                const float value = value_element<TYPE>(values, e);
                for (u32 h = 0; h < HEADS_TOGETHER; h++)
                    if (h < heads) out[h] = fmaf(scores[h * PART + j], value, out[h]);
            }
        for (u32 h = 0; h < heads; h++) {
            sums[threadIdx.x] = out[h];
            __syncthreads();
            if (subset == 0 && e < hd) {
                float sum = 0;
                for (u32 s = 0; s < subsets; s++) sum += sums[s * lanes + lane];
                p.partial[((static_cast<u64>(c) * p.heads + first_head + h) * p.parts + part) * hd + e] = sum;
            }
            __syncthreads();
        }
    }
}

// grid: (rows, key heads · groups of query heads, parts); dynamic shared memory as `attend` cuts it.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_attention(const AttentionParams p) {
    enter();
    const u32 c = blockIdx.x, part = blockIdx.z;
    if (c >= *p.view.count) return;
    const u32 slot = p.view.slots[c];
    const Seat seat = seat_of(p.cache, p.planes, p.rows[slot], p.states[slot]);
    if (part == 0 && blockIdx.y == 0 && threadIdx.x == 0) p.visible[c] = seat.visible;
    const u32 begin = part * PART;
    if (begin >= seat.visible) return;
    const u32 end = begin + PART < seat.visible ? begin + PART : seat.visible;
    const u32 per_key = p.heads / p.cache.kv_heads, groups = (per_key + HEADS_TOGETHER - 1) / HEADS_TOGETHER;
    const u32 kv_head = blockIdx.y / groups, within = blockIdx.y % groups * HEADS_TOGETHER;
    const u32 heads = per_key - within < HEADS_TOGETHER ? per_key - within : HEADS_TOGETHER;
    const u32 first = kv_head * per_key + within;
    if (p.cache.type == F16)
        attend<F16>(p, c, seat, kv_head, first, heads, begin, end, part);
    else if (p.cache.type == Q8_0)
        attend<Q8_0>(p, c, seat, kv_head, first, heads, begin, end, part);
    else
        attend<F32>(p, c, seat, kv_head, first, heads, begin, end, part);
}
MOR_KERNEL(mor_attention)

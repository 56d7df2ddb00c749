// The ragged, paged KV cache: where a row's entries are, and how its own is stored. A page has the layout of
// src/kv.rs: the keys of a head are a tile of sixteen entries, element by element; its values are
// [16][value_bytes].
#pragma once
#include "rows.cuh"

constexpr u32 PAGE_TOKENS = TILE_ROWS;

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
    // A session: all rows are of sequence 0, and those of a launch have the same plane.
    u32 one_sequence;
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

// In a session the table's place does not wait for `row`.
__device__ __forceinline__ Seat seat_of(const Cache& cache, const Planes& planes, const Row& row,
                                        const State& state) {
    const u32 r = planes.recursion == ANY ? row.recursion : planes.recursion;
    const u32 keys = planes.keys[r], sequence = cache.one_sequence ? 0 : row.sequence;
    Seat seat;
    seat.table = cache.tables + (sequence * cache.planes + planes.plane[r]) * cache.table_pages;
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
    // [rows][heads][head_dim], not yet rotated.
    const float* q;
    // [rows][key heads][head_dim], not yet rotated.
    const float* k;
    const float* v;
    Report* report;
    Cache cache;
    Planes planes;
    u32 heads;
    u32 pairs;
    // 1: element 2i goes with 2i + 1; 0: i with i + pairs.
    u32 neighbours;
};

// Element `e` of a head after its rotation.
__device__ __forceinline__ float rotated(const StoreParams& p, u32 slot, const float* head, u32 e) {
    const float own = head[e];
    if (e >= 2 * p.pairs) return own;
    const bool second = p.neighbours ? e % 2 : e >= p.pairs;
    const u32 distance = p.neighbours ? 1 : p.pairs, pair = p.neighbours ? e / 2 : second ? e - p.pairs : e;
    const float other = head[second ? e - distance : e + distance];
    const float2 angle = p.rope[static_cast<u64>(slot) * p.pairs + pair];
    // Rounded as written, whichever kernel it stands in.
    const float turned = __fmul_rn(other, angle.y);
    return fmaf(own, angle.x, second ? turned : -turned);
}

// Quantizes 32 elements as Q8_0, one a lane: the scale's bits and the lane's code.
__device__ __forceinline__ u16 quantize_q8(float value, signed char* code) {
    const float largest = warp_max(fabsf(value));
    const float scale = largest / 127.0f;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    *code = static_cast<signed char>(static_cast<int>(roundf(value * inverse)));
    return float_to_half(scale);
}

// The key and the value, element `e` of both, of a row's own entry.
struct Element {
    float key;
    float value;
};

// Of head `head` of row `c`; the key is rotated.
__device__ __forceinline__ Element read_element(const StoreParams& p, u32 c, u32 slot, u32 head, u32 e) {
    const u64 at = static_cast<u64>(c * p.cache.kv_heads + head) * p.cache.head_dim;
    const float value = p.v[at + e];
    return {rotated(p, slot, p.k + at, e), value};
}

// Stores it as entry `entry` of a page, and tells whether it is finite. A head of Q8_0 is a multiple of 32, whose
// elements are those of a warp. `stores_key`: or only its value, of F16.
template <u32 TYPE>
__device__ __forceinline__ bool store_element(const Cache& cache, u8* page, u32 head, u32 entry, u32 e,
                                              const Element& element, bool stores_key = true) {
    u8* keys = page + head * PAGE_TOKENS * cache.key_bytes;
    u8* values = page + cache.kv_heads * PAGE_TOKENS * cache.key_bytes +
                 (head * PAGE_TOKENS + entry) * cache.value_bytes;
    if constexpr (TYPE == F16) {
        const u16 key = float_to_half(element.key), value = float_to_half(element.value);
        if (stores_key) reinterpret_cast<u16*>(keys)[e * PAGE_TOKENS + entry] = key;
        reinterpret_cast<u16*>(values)[e] = value;
        return is_finite(half_to_float(key)) && is_finite(half_to_float(value));
    } else if constexpr (TYPE == F32) {
        reinterpret_cast<float*>(keys)[e * PAGE_TOKENS + entry] = element.key;
        reinterpret_cast<float*>(values)[e] = element.value;
    } else {
        signed char code;
        u16 scale = quantize_q8(element.key, &code);
        u8* block = keys + e / 32 * (TILE_ROWS * 34);
        const u32 j = e % 32;
        block[TILE_ROWS * (2 + j / 4 * 4) + 4 * entry + j % 4] = static_cast<u8>(code);
        if (j == 0) *reinterpret_cast<u16*>(block + 2 * entry) = scale;
        scale = quantize_q8(element.value, &code);
        block = values + e / 32 * 34;
        block[2 + j] = static_cast<u8>(code);
        if (j == 0) *reinterpret_cast<u16*>(block) = scale;
    }
    return is_finite(element.key) && is_finite(element.value);
}

// Stores the elements `first`, `first + step`, … of a head as the last entry that row `c` sees.
template <u32 TYPE>
__device__ __forceinline__ void store_head(const StoreParams& p, u32 c, u32 slot, const Seat& seat, u32 head,
                                           u32 first, u32 step) {
    const u32 at = seat.visible - 1;
    u8* page = p.cache.pages + static_cast<u64>(seat.table[at / PAGE_TOKENS]) * p.cache.page_bytes;
    bool finite = true;
    for (u32 e = first; e < p.cache.head_dim; e += step)
        finite &= store_element<TYPE>(p.cache, page, head, at % PAGE_TOKENS, e, read_element(p, c, slot, head, e));
    if (!finite) report_error(p.report, KEY_NOT_FINITE, slot);
}

// Rotates keys, and stores keys and values. grid: (rows, heads / 8); a warp a head.
template <u32 TYPE>
__device__ __forceinline__ void store_row(const StoreParams& p) {
    enter();
    const u32 c = blockIdx.x, running = load_now(p.view.count), slot = load_now(p.view.slots + c);
    if (c >= running) return;
    const Seat seat = seat_of(p.cache, p.planes, p.rows[slot], p.states[slot]);
    if (!seat.own) return;
    const u32 head = blockIdx.y * WARPS + warp_index();
    if (head < p.cache.kv_heads) store_head<TYPE>(p, c, slot, seat, head, lane_index(), WARP);
}

// The same for many rows of a session and a cache of halves: a warp takes the rows whose entries share a page, and 32
// elements of a head. Of an element the keys of a page lie together, so they are written together, not two bytes at a
// time. grid: (pages, heads · parts of 32 elements / 8), of pages one more than the rows fill.
__device__ __forceinline__ void store_pages(const StoreParams& p) {
    enter();
    const u32 running = load_now(p.view.count), hd = p.cache.head_dim;
    if (running == 0) return;
    const auto seat_in = [&](u32 slot) { return seat_of(p.cache, p.planes, p.rows[slot], p.states[slot]); };
    // The first page begins before the first row. Lane l looks after row l of the page.
    const u32 before = (seat_in(p.view.slots[0]).visible - 1) % PAGE_TOKENS, begin = blockIdx.x * PAGE_TOKENS;
    if (begin >= running + before) return;
    const u32 at = lane_index() % PAGE_TOKENS, c = begin + at - before;
    const bool exists = begin + at >= before && c < running;
    const u32 slot = p.view.slots[exists ? c : 0];
    const Seat seat = seat_in(slot);
    const u32 entry = seat.visible - 1, page = seat.table[entry / PAGE_TOKENS];
    const u32 first_page = __shfl_sync(ALL_LANES, page, 0);
    const u32 stores = exists && seat.own;
    const bool whole = __all_sync(ALL_LANES, stores && entry % PAGE_TOKENS == at && page == first_page);
    const u32 parts = (hd + WARP - 1) / WARP, unit = blockIdx.y * WARPS + warp_index();
    const u32 head = unit / parts, e = unit % parts * WARP + lane_index();
    const bool has_element = head < p.cache.kv_heads && e < hd;
    // Rows of which a lane loads its element at a time.
    constexpr u32 some = 8;
#pragma unroll 1
    for (u32 first = 0; first < PAGE_TOKENS; first += some) {
        Element own[some];
        u32 slots[some];
        bool theirs[some];
#pragma unroll
        for (u32 k = 0; k < some; k++) {
            slots[k] = __shfl_sync(ALL_LANES, slot, first + k);
            theirs[k] = __shfl_sync(ALL_LANES, stores, first + k) && has_element;
            own[k] = {};
            if (theirs[k]) own[k] = read_element(p, begin + first + k - before, slots[k], head, e);
        }
        u32 keys[some / 2];
#pragma unroll
        for (u32 k = 0; k < some; k++) {
            const u32 its_entry = __shfl_sync(ALL_LANES, entry, first + k), its_page = __shfl_sync(ALL_LANES, page, first + k);
            const u32 key = float_to_half(own[k].key);
            keys[k / 2] = k % 2 ? keys[k / 2] | key << 16 : key;
            if (!theirs[k]) continue;
            u8* to = p.cache.pages + static_cast<u64>(its_page) * p.cache.page_bytes;
            const bool finite = store_element<F16>(p.cache, to, head, its_entry % PAGE_TOKENS, e, own[k], !whole);
            if (!finite) report_error(p.report, KEY_NOT_FINITE, slots[k]);
        }
        if (!whole || !theirs[0]) continue;
        u8* to = p.cache.pages + static_cast<u64>(page) * p.cache.page_bytes + head * PAGE_TOKENS * p.cache.key_bytes;
        *reinterpret_cast<uint4*>(to + 2 * (e * PAGE_TOKENS + first)) = make_uint4(keys[0], keys[1], keys[2], keys[3]);
    }
}

MOR_WORK(mor_store_f16, StoreParams, (BLOCK), store_row<F16>)
MOR_WORK(mor_store_f16_pages, StoreParams, (BLOCK), store_pages)
MOR_WORK(mor_store_f32, StoreParams, (BLOCK), store_row<F32>)
MOR_WORK(mor_store_q8_0, StoreParams, (BLOCK), store_row<Q8_0>)

// What is attended to, and where the result goes.
struct AttentionParams {
    StoreParams input;
    // [rows][heads][parts][head_dim], and of each the largest score and the sum: [rows][heads][parts].
    float* partial;
    float2* partial_scales;
    // [rows] how many entries each sees.
    u32* visible;
    // Parts of the longest context.
    u32 parts;
    // No row is to see an entry of another: attention does the work of mor_store too. Nothing is written that another
    // block reads.
    u32 stores;
    // Most rows, of which a block takes 2^row_shift: more than one only in a session.
    u32 rows;
    u32 row_shift;
    // Query heads of a key head.
    u32 heads_of_key;
    // What scores are multiplied by.
    float factor;
};

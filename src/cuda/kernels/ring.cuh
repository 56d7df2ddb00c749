// Weights on their way through shared memory, each warp's own into a ring of its own: so that enough of them are
// under way, before a kernel's input is there too, and the code that multiplies is a short loop.
#pragma once
#include "products.cuh"

#ifdef MOR_TENSOR_CORES
// What a warp copies at a time: the tile's blocks of the same columns, which lie together; of plain types a
// group of sixteen rows.
template <u32 TYPE>
struct Unit {
    static constexpr bool plain = block_columns(TYPE) == 1;
    static constexpr u32 groups = groups_of_block(TYPE);
    static constexpr u32 bytes = plain ? TILE_ROWS * GROUP * 2 : TILE_ROWS * block_bytes(TYPE);

    // A lane's place in the next unit: of plain types in the lower and in the upper eight rows.
    const u8* from[2];

    __device__ __forceinline__ void begin(const Matrix& m, u32 tile, u32 unit) {
        if constexpr (plain) {
            for (u32 upper = 0; upper < 2; upper++) {
                // Beyond the last row that again: what comes of it is not written.
                const u32 row = tile * TILE_ROWS + lane_index() / 4 + 8 * upper, last = m.rows - 1;
                from[upper] = m.data + static_cast<u64>(row < last ? row : last) * m.row_bytes +
                              2 * GROUP * unit + 16 * (lane_index() % 4);
            }
        } else {
            from[0] = m.data + static_cast<u64>(tile) * TILE_ROWS * m.row_bytes +
                      static_cast<u64>(unit) * bytes + 16 * lane_index();
        }
    }

    // Copies the next unit, or zeros.
    __device__ __forceinline__ void copy(u8* to, bool wanted) {
        to += 16 * lane_index();
        if constexpr (plain) {
            for (u32 upper = 0; upper < 2; upper++) {
                begin_copy<16>(to + upper * bytes / 2, from[upper], wanted);
                from[upper] += 2 * GROUP;
            }
        } else {
            for (u32 i = 0; i < bytes; i += 16 * WARP) {
                const bool inside = i + 16 * WARP <= bytes || i + 16 * lane_index() < bytes;
                if (inside) begin_copy<16>(to + i, from[0] + i, wanted);
            }
            from[0] += bytes;
        }
    }

    // A lane's fields of group `g` of a unit: of rows lane / 4 and lane / 4 + 8.
    static __device__ __forceinline__ void read(const u8* unit, u32 g, u32 words[2 * field_words(TYPE)]) {
        for (u32 upper = 0; upper < 2; upper++) {
            u32* to = words + upper * field_words(TYPE);
            if constexpr (plain) {
                const uint4 bits = *reinterpret_cast<const uint4*>(unit + 16 * lane_index() + upper * bytes / 2);
                to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
            } else {
                const Fields<TYPE> f =
                    read_fields<TYPE>(unit, g, lane_index() / 4 + 8 * upper, lane_index() % 4);
                for (u32 i = 0; i < field_words(TYPE); i++) to[i] = f.words[i];
            }
        }
    }
};

// A warp's ring, for one or two matrices: stages of units, which stand side by side for both. The host gives
// the number of units in a stage, as product.rs has it. PAIRS: groups of a tile are multiplied two at a time.
constexpr u32 MOST_RING = 72 << 10;

template <u32 TYPE, u32 MATRICES, bool PAIRS = MATRICES == 1>
struct Ring {
    static constexpr u32 unit_bytes = MATRICES * Unit<TYPE>::bytes;
    static constexpr u32 stages = 4 * WARPS * unit_bytes <= MOST_RING ? 4 : 2;
    // Groups of a tile that are multiplied together: runs are whole pairs.
    static constexpr u32 step = PAIRS ? 2 : 1;

    Unit<TYPE> units[MATRICES];
    u8* room;
    u32 stage_units;
    // The stage that is used.
    u32 used;
    // The next unit that is copied, and how many there are; a last half of a pair of groups has zeros beside it.
    u32 next, last;

    __device__ __forceinline__ void begin(const Matrix* m, u32 tile, u32 begin, u32 end, u32 units_of_stage, u8* to) {
        constexpr u32 groups = Unit<TYPE>::groups;
        stage_units = units_of_stage;
        used = 0;
        room = to + warp_index() * (stages * stage_units * unit_bytes);
        next = begin / groups;
        last = begin < end ? (end + groups - 1) / groups : next;
        for (u32 i = 0; i < MATRICES; i++) units[i].begin(m[i], tile, next);
#pragma unroll 1
        for (u32 stage = 0; stage < stages; stage++) fill(stage);
    }

    __device__ __forceinline__ u8* stage(u32 number) const { return room + number * (stage_units * unit_bytes); }

    __device__ __forceinline__ u32 groups_of_stage() const { return stage_units * Unit<TYPE>::groups; }

    // Waits for the stage that comes next.
    __device__ __forceinline__ const u8* take() const {
        wait_for_copies<stages - 1>();
        __syncwarp();
        return stage(used);
    }

    // Nobody uses that stage any more: others come in its place.
    __device__ __forceinline__ void give_back() {
        __syncwarp();
        fill(used);
        used = (used + 1) % stages;
    }

    __device__ __forceinline__ void fill(u32 number) {
        copy(number);
        close_copies();
    }

    // The same as a part of a batch of copies.
    __device__ __forceinline__ void copy(u32 number) {
        u8* to = stage(number);
        const u32 end = last + (groups_are_odd() ? 1 : 0);
#pragma unroll 1
        for (u32 u = 0; u < stage_units && next < end; u++, next++, to += unit_bytes)
            for (u32 i = 0; i < MATRICES; i++) units[i].copy(to + i * Unit<TYPE>::bytes, next < last);
    }

    // Runs begin at even groups.
    __device__ __forceinline__ bool groups_are_odd() const {
        return step == 2 && Unit<TYPE>::groups == 1 && last % 2 == 1;
    }
};
#endif

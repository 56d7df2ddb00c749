// Weights on their way through shared memory, each warp's own into a ring of its own: so that enough of them are
// under way, before a kernel's input is there too, and the code that multiplies is a short loop.
#pragma once
#include "products.cuh"

#ifdef MOR_TENSOR_CORES
// What a warp copies at a time: the tile's blocks of the same columns, which lie together; of plain types PLAIN_GROUPS, one
// or two, of sixteen rows.
template <u32 TYPE, u32 PLAIN_GROUPS>
struct Unit {
    static constexpr bool plain = block_columns(TYPE) == 1;
    static constexpr u32 groups = plain ? PLAIN_GROUPS : groups_of_block(TYPE);
    static constexpr u32 row_bytes = 2 * GROUP * PLAIN_GROUPS;
    static constexpr u32 bytes = TILE_ROWS * (plain ? row_bytes : block_bytes(TYPE));
    // Of plain types: chunks of a row, and the rows that a warp copies at once.
    static constexpr u32 chunks = row_bytes / 16, rows = WARP / chunks;

    // A lane's place in the next unit.
    const u8* from;
    // Of plain types: from a unit to the next, from a lane's row to its next, and which of them there are, a bit each.
    u32 unit_step, row_step, rows_there;

    __device__ __forceinline__ void begin(const Matrix& m, u32 tile, u32 unit) {
        if constexpr (plain) {
            const u32 row = tile * TILE_ROWS + lane_index() / chunks, chunk = lane_index() % chunks;
            unit_step = groups * m.group_step;
            from = plain_row(m, row) + static_cast<u64>(unit) * unit_step + chunk / 4 * m.group_step + chunk % 4 * 16;
            row_step = rows * m.row_step;
            rows_there = 0;
            for (u32 k = 0; k < TILE_ROWS / rows; k++) rows_there |= (row + rows * k < m.rows ? 1u : 0u) << k;
        } else {
            from = m.data + static_cast<u64>(tile) * TILE_ROWS * m.row_bytes + static_cast<u64>(unit) * bytes +
                   16 * lane_index();
        }
    }

    // Where sixteen bytes of a row stand: those that a warp reads together, four of each row, meet all banks. Where a row
    // has eight, every second one has its halves the other way round.
    static __device__ __forceinline__ u32 place(u32 row, u32 chunk) {
        return row * row_bytes + 16 * (PLAIN_GROUPS == 2 ? chunk ^ row % 2 * 4 : chunk);
    }

    // Copies the next unit, of which so many groups are left in the matrix; zeros in the place of what is not there.
    __device__ __forceinline__ void copy(u8* to, u32 left) {
        if constexpr (plain) {
            const u32 chunk = lane_index() % chunks;
            const bool in_matrix = chunk < chunks / groups * left;
            to += place(lane_index() / chunks, chunk);
            for (u32 k = 0; k < TILE_ROWS / rows; k++)
                begin_copy<16>(to + k * rows * row_bytes, from + k * row_step, in_matrix && rows_there >> k & 1);
            from += unit_step;
        } else {
            to += 16 * lane_index();
            for (u32 i = 0; i < bytes; i += 16 * WARP) {
                const bool inside = i + 16 * WARP <= bytes || i + 16 * lane_index() < bytes;
                if (inside) begin_copy<16>(to + i, from + i, left > 0);
            }
            from += bytes;
        }
    }

    // A lane's fields of group `g` of a unit: of rows lane / 4 and lane / 4 + 8.
    static __device__ __forceinline__ void read(const u8* unit, u32 g, u32 words[2 * field_words(TYPE)]) {
        const u32 row = lane_index() / 4, t = lane_index() % 4;
        for (u32 upper = 0; upper < 2; upper++) {
            u32* to = words + upper * field_words(TYPE);
            if constexpr (plain) {
                const uint4 bits = *reinterpret_cast<const uint4*>(unit + place(row, 4 * g + t) + upper * bytes / 2);
                to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
            } else {
                const Fields<TYPE> f = read_fields<TYPE>(unit, g, row + 8 * upper, t);
                for (u32 i = 0; i < field_words(TYPE); i++) to[i] = f.words[i];
            }
        }
    }
};

// As in params.rs.
constexpr u32 MOST_RING = 72 << 10;

// A warp's ring, for one or two matrices: stages of units, which stand side by side for both, and are of one tile. The
// host gives the number of units in a stage, as product.rs has it. STEP: groups that are multiplied together.
template <u32 TYPE, u32 MATRICES, u32 PLAIN_GROUPS, u32 STEP>
struct Ring {
    using Of = Unit<TYPE, PLAIN_GROUPS>;
    static constexpr u32 groups = Of::groups, step = STEP, unit_bytes = MATRICES * Of::bytes;
    static constexpr u32 stages = 4 * WARPS * unit_bytes <= MOST_RING ? 4 : 2;

    const ProductParams& p;
    Of units[MATRICES];
    u8* room;
    // The stage that is used.
    u32 used;
    // The tile that is copied, from one to the next, and the one after the last; of each the units from `first` on, of
    // which `next` is copied next, until `last`.
    u32 tile, tile_step, last_tile;
    u32 first, next, last;

    // Groups `begin` to `end` of tiles from `tile` on.
    __device__ __forceinline__ Ring(const ProductParams& p, u32 tile, u32 last_tile, u32 tile_step, u32 begin, u32 end,
                                    u8* to)
        : p(p), room(to + warp_index() * (stages * p.stage_units * unit_bytes)), used(0), tile(tile),
          tile_step(tile_step), last_tile(last_tile), first(begin / groups), next(first) {
        last = begin < end ? (end + groups - 1) / groups : first;
        // Runs begin at even groups, and a last one without another has zeros beside it.
        if (STEP == 2 && groups == 1) last += last % 2;
        begin_tile();
        if (first == last || tile >= last_tile) this->tile = last_tile, last = first;
    }

    // Whether all that the warp has of a tile is in the ring together.
    __device__ __forceinline__ bool holds_tile() const { return last - first <= stages * p.stage_units; }

    __device__ __forceinline__ u8* stage(u32 number) const { return room + number * (p.stage_units * unit_bytes); }

    __device__ __forceinline__ u32 groups_of_stage() const { return p.stage_units * groups; }

    // Waits for the stage that comes next, where all that is copied are weights; many.cuh counts for itself.
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

    __device__ __forceinline__ void fill_all() {
#pragma unroll 1
        for (u32 number = 0; number < stages; number++) fill(number);
    }

    __device__ __forceinline__ void fill(u32 number) {
        copy(number);
        close_copies();
    }

    // The same as a part of a batch of copies.
    __device__ __forceinline__ void copy(u32 number) {
        if (next >= last) {
            if (tile + tile_step >= last_tile) return;
            tile += tile_step;
            begin_tile();
        }
        u8* to = stage(number);
#pragma unroll 1
        for (u32 u = 0; u < p.stage_units && next < last; u++, next++, to += unit_bytes)
            for (u32 i = 0; i < MATRICES; i++) units[i].copy(to + i * Of::bytes, p.groups - groups * next);
    }

    // The first of the matrices that have a tile abreast; `t` becomes its number there.
    __device__ __forceinline__ const Matrix* matrices_of(u32& t) const {
        return MATRICES == 1 ? p.matrices + matrix_of(p, t) : p.matrices;
    }

    __device__ __forceinline__ void begin_tile() {
        u32 t = tile;
        const Matrix* m = matrices_of(t);
        next = first;
        for (u32 i = 0; i < MATRICES; i++) units[i].begin(m[i], t, first);
    }
};
#endif

// Products for rows that are ready, 8 or 32 at a time: with a tile of one matrix, or of a gate and of what it lets through.
// Activations come through shared memory too, each warp's own to itself, several groups at a time as soon as the kernel
// before allows: of all rows that may come, for how many have come would have to be read first.
#pragma once
#include "ring.cuh"

#ifdef MOR_TENSOR_CORES
// Floats from one column of a warp's sums to the next, so that a warp's writes meet all banks.
constexpr u32 COLUMN_STRIDE = TILE_ROWS + 4;

// A group at a time of plain types, so that two blocks have room on a multiprocessor.
template <u32 TYPE>
using ManyUnit = Unit<TYPE, 1>;
template <u32 TYPE, u32 MATRICES>
using ManyRing = Ring<TYPE, MATRICES, 1, 1>;

// Batches of groups of activations on their way, so that two blocks have room on a multiprocessor if a batch is a group, as
// in params.rs.
__device__ constexpr u32 batches_ahead(u32 matrices) { return matrices == 1 ? 4 : 3; }

// A warp's groups of activations, each [rows][32], and of types with a minimum their sums. AHEAD batches of `at_once`.
template <u32 TYPE, u32 TILES, u32 AHEAD>
struct Activations {
    static constexpr u32 rows = 8 * TILES, row_bytes = 2 * GROUP, eight_rows = 8 * row_bytes;
    static constexpr u32 bytes = rows * (row_bytes + (has_min(TYPE) ? 4 : 0));

    u8* room;
    // What the lane copies of the next group's first eight rows; and where the next sums are.
    const u16* next;
    const float* sums;
    u32 stride, here, at_once, used;

    // Rows from `first` on, of which `here` are there, from group `begin` on.
    __device__ __forceinline__ Activations(u8* to, const Prepared& x, u32 first, u32 begin, u32 here, u32 at_once)
        : room(to + warp_index() * (AHEAD * at_once * bytes)),
          next(x.halves + static_cast<u64>(first + lane_index() / 4) * x.stride + GROUP * begin + 8 * (lane_index() % 4)),
          sums(x.sums + static_cast<u64>(first) * (x.stride / GROUP) + begin), stride(x.stride), here(here),
          at_once(at_once), used(0) {}

    // So many groups have room.
    __device__ __forceinline__ u32 groups() const { return AHEAD * at_once; }

    // Where byte `byte` of the lane's row of the first eight stands. Of types of blocks a lane reads eight: halves of rows
    // change places, so that those that read together meet all banks.
    static __device__ __forceinline__ u32 place(u32 byte) {
        const u32 row = lane_index() / 4;
        return row * row_bytes + (ManyUnit<TYPE>::plain ? byte : byte ^ row / 2 % 2 * (row_bytes / 2));
    }

    // Copies the next group.
    __device__ __forceinline__ void copy(u32 number) {
        u8* to = room + number * bytes;
        u8* of_lane = to + place(16 * (lane_index() % 4));
        const u16* from = next;
#pragma unroll
        for (u32 c = 0; c < TILES; c++, from += 8 * stride)
            if (8 * c + lane_index() / 4 < here) begin_copy<16>(of_lane + c * eight_rows, from);
        next += GROUP;
        if constexpr (has_min(TYPE)) {
            const u32 row = lane_index();
            if (row < here && row < rows)
                begin_copy<4>(to + rows * row_bytes + 4 * row, sums + static_cast<u64>(row) * (stride / GROUP));
            sums++;
        }
    }

    // The lane's part of the row of tile `c`, as `read_activations`.
    __device__ __forceinline__ void read(u32 c, u32 b[2][2]) const {
        const u32 t = lane_index() % 4;
        const u8* group = room + used * bytes;
        if constexpr (ManyUnit<TYPE>::plain) {
            const uint4 bits = *reinterpret_cast<const uint4*>(group + place(16 * t) + c * eight_rows);
            b[0][0] = bits.x, b[0][1] = bits.y, b[1][0] = bits.z, b[1][1] = bits.w;
        } else {
            for (u32 step = 0; step < 2; step++) {
                const uint2 bits = *reinterpret_cast<const uint2*>(group + place(8 * t + 32 * step) + c * eight_rows);
                b[step][0] = bits.x, b[step][1] = bits.y;
            }
        }
    }

    // The sums of the lane's two columns of tile `c`.
    __device__ __forceinline__ float2 sums_of(u32 c) const {
        if constexpr (!has_min(TYPE)) return make_float2(0, 0);
        const u8* group = room + used * bytes;
        return *reinterpret_cast<const float2*>(group + rows * row_bytes + 4 * (8 * c + 2 * (lane_index() % 4)));
    }
};

// A warp's run of a tile, groups `begin` to `end`, against the rows of `x`.
template <u32 TYPE, u32 TILES, u32 MATRICES, u32 AHEAD>
__device__ __forceinline__ void multiply_many(ManyRing<TYPE, MATRICES>& ring, u32 begin, u32 end,
                                              Activations<TYPE, TILES, AHEAD>& x, float sums[MATRICES][TILES][4]) {
    constexpr u32 groups = ManyUnit<TYPE>::groups;
    // A stage's weights come with the activations of its predecessor's last group, and are wanted when those have arrived
    // that came that many groups before; product.rs sees to it for batches of more than a group.
    static_assert((ManyRing<TYPE, MATRICES>::stages - 1) * groups + 1 >= AHEAD, "weights arrive before they are used");
    const u32 tiles = (x.here + 7) / 8, stage_groups = ring.groups_of_stage();
    u32 of_batch = 0;
#pragma unroll 1
    for (u32 group = begin, start = begin / groups * groups; group < end; start += stage_groups) {
        const u8* units = ring.stage(ring.used);
        const u32 until = start + stage_groups < end ? start + stage_groups : end;
#pragma unroll 1
        for (; group < until; group++) {
            // Weights of this group came with activations before, or with these.
            if (of_batch == 0) {
                wait_for_copies<AHEAD - 1>();
                __syncwarp();
            }
            const u8* unit = units + (group - start) / groups * ring.unit_bytes;
            Fragments f[MATRICES];
            for (u32 i = 0; i < MATRICES; i++) {
                u32 words[2 * field_words(TYPE)];
                ManyUnit<TYPE>::read(unit + i * ManyUnit<TYPE>::bytes, group % groups, words);
                f[i] = unpack<TYPE>(words, group % groups);
            }
#pragma unroll
            for (u32 c = 0; c < TILES; c++) {
                if (c >= tiles) continue;
                u32 b[2][2];
                x.read(c, b);
                const float2 of = x.sums_of(c);
                for (u32 i = 0; i < MATRICES; i++) add_products<TYPE>(f[i], b, of.x, of.y, sums[i][c]);
            }
            __syncwarp();
            if (group + 1 == until) ring.copy(ring.used);
            if (group + x.groups() < end) x.copy(x.used);
            if (++of_batch == x.at_once) close_copies(), of_batch = 0;
            if (++x.used == x.groups()) x.used = 0;
        }
        ring.used = (ring.used + 1) % ring.stages;
    }
}

// Rows that are ready, and a tile of each of some matrices.
template <u32 TYPE, u32 TILES, u32 MATRICES>
__device__ __forceinline__ void many_product(const ProductParams& p) {
    constexpr u32 rows = 8 * TILES, ahead = batches_ahead(MATRICES);
    using X = Activations<TYPE, TILES, ahead>;
    // As in product.rs: the scales of runs, [rows][RUNS]; the rings of activations and of weights. The warps' sums,
    // [matrices][RUNS][rows][COLUMN_STRIDE], come in the place of the activations.
    MOR_DYNAMIC_SHARED(uint4, room);
    float* scales = reinterpret_cast<float*>(room);
    u8* activations = reinterpret_cast<u8*>(scales + rows * RUNS);
    float* parts = reinterpret_cast<float*>(activations);
    static_assert(4 * MATRICES * rows * COLUMN_STRIDE <= ahead * X::bytes, "sums have room in the activations' place");
    let_next_begin();
    u32 tile = blockIdx.x;
    const Matrix* m = p.matrices;
    if constexpr (MATRICES == 1) m += matrix_of(p, tile);
    const u32 each = p.groups_of_run, begin = warp_index() * each;
    const u32 end = begin + each < p.groups ? begin + each : p.groups;
    // Those that the block takes, as far as it knows: a choice between numbers of which one is loaded would wait for it.
    u32 first = blockIdx.y * rows, here = p.rows - first, n = 0;
    if (has_no_rows(p, first)) return;
    const u32 at_once = p.groups_at_once;
    ManyRing<TYPE, MATRICES> ring(p, blockIdx.x, blockIdx.x + 1, 1, begin, end,
                                  activations + WARPS * (ahead * at_once * X::bytes));
    // Some rows after others, if the block has more.
#pragma unroll 1
    for (bool again = false;; again = true) {
        // Weights that a warp has in its ring as a whole, or that are none, stay for all rows.
        if (!again || !ring.holds_tile()) {
            if (again) ring.begin_tile();
            ring.fill_all();
        }
        ring.used = 0;
        if (!again) {
            wait_for_previous();
            n = load_now(p.view.count);
        }
        X x(activations, p.input, first, begin, here, at_once);
        // Four scales at a time.
        const u32 quad = threadIdx.x;
        if (quad < rows * RUNS / 4 && quad / (RUNS / 4) < x.here)
            begin_copy<16>(scales + 4 * quad, p.input.scales + static_cast<u64>(first) * RUNS + 4 * quad);
#pragma unroll 1
        for (u32 i = 0, until = at_once; i < x.groups(); until += at_once) {
#pragma unroll 1
            for (; i < until; i++)
                if (begin + i < end) x.copy(i);
            close_copies();
        }
        if (first >= n) return wait_for_copies<0>();
        x.here = here = n - first;
        // Thread i has elements i, i + BLOCK, … of the tile, [rows][TILE_ROWS]; what they want comes meanwhile.
        constexpr u32 mine = (TILES + 1) / 2;
        const u32 thread = only_here(threadIdx.x);
        float* to[mine];
        float factors[mine] = {}, before[mine] = {};
#pragma unroll
        for (u32 k = 0; k < mine; k++) {
            const u32 i = thread + k * BLOCK, row = tile * TILE_ROWS + i % TILE_ROWS, c = first + i / TILE_ROWS;
            const bool writes = i < TILE_ROWS * rows && row < m->rows && c < n;
            to[k] = writes ? element(*m, row, c, m->by_slot ? p.view.slots[c] : 0) : nullptr;
            if (!writes) continue;
            factors[k] = p.input.factors[c];
            if (m->add) before[k] = *to[k];
        }
        float sums[MATRICES][TILES][4] = {};
        multiply_many<TYPE, TILES, MATRICES, ahead>(ring, begin, end, x, sums);
        // Warps without a group have waited for nothing.
        wait_for_copies<0>();
        __syncthreads();
        mark(MULTIPLIED);
        const u32 g = lane_index() / 4, t = lane_index() % 4;
        for (u32 i = 0; i < MATRICES; i++)
            for (u32 c = 0; c < TILES; c++)
                for (u32 k = 0; k < 4; k++)
                    parts[((i * RUNS + warp_index()) * rows + 8 * c + 2 * t + k % 2) * COLUMN_STRIDE + g + k / 2 * 8] =
                        sums[i][c][k];
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < mine; k++) {
            if (!to[k]) continue;
            const u32 i = thread + k * BLOCK, c = i / TILE_ROWS, row = i % TILE_ROWS;
            float value[MATRICES];
            for (u32 j = 0; j < MATRICES; j++) {
                float sum = 0;
                for (u32 r = 0; r < RUNS; r++)
                    sum = fmaf(parts[((j * RUNS + r) * rows + c) * COLUMN_STRIDE + row], scales[c * RUNS + r], sum);
                value[j] = finished(sum, factors[k], m[j].bias, tile * TILE_ROWS + row);
            }
            if constexpr (MATRICES == 2) value[0] = swiglu(value[0], value[1]);
            *to[k] = m->add ? __fadd_rn(before[k], value[0]) : value[0];
        }
        first += gridDim.y * rows;
        if (first >= n) return;
        here = n - first;
        // Activations come in the place of the sums.
        __syncthreads();
    }
}

// grid: (tiles of a matrix or of several, blocks that share the rows); dynamic shared memory as above.
#define MOR_MANY_PRODUCTS(TYPE, type)                                     \
    MOR_PRODUCT(mor_few_product_##type, many_product<TYPE, 1, 1>)         \
    MOR_PRODUCT(mor_few_swiglu_##type, many_product<TYPE, 1, 2>)          \
    MOR_PRODUCT(mor_many_product_##type, many_product<TYPE, MANY / 8, 1>) \
    MOR_PRODUCT(mor_many_swiglu_##type, many_product<TYPE, MANY / 8, 2>)
MOR_EVERY_TYPE(MOR_MANY_PRODUCTS)
#endif

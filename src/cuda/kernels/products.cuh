// Matrix products. Columns are cut into eight runs, whose sums are added in their order. So a result depends
// on the matrix and its own row of activations only, however many rows come along. A block computes sixteen
// rows of a matrix, a tile, for some rows of activations, each warp a run; or for a lone row several tiles,
// each warp several runs of one.
#pragma once
#include "rows.cuh"

struct ProductParams {
    Matrix matrices[3];
    u32 count;
    // Groups of 32 columns.
    u32 groups;
    Prepared input;
    View view;
    // A lone row: what it is made of, for the block makes it ready itself; how many tiles there are, and how
    // many a block takes: 1, 2, 4 or 8.
    Source source;
    u32 tiles;
    u32 tiles_of_block;
};

// Columns of activations that a block takes at most: with tensor cores, without.
constexpr u32 MANY = 32;
constexpr u32 FEW = 8;

// A run: an eighth of the columns.
constexpr u32 RUNS = WARPS;

// Words of weights that a lane reads ahead: one block alone on a multiprocessor keeps 32 KiB of halves on
// their way, about what the memory of an H100 needs to be busy.
constexpr u32 AHEAD_WORDS = 32;

__device__ __forceinline__ u32 groups_of_run(u32 groups) { return (groups + RUNS - 1) / RUNS; }

// The matrix of a block's tile; `tile` becomes its number in the matrix.
__device__ __forceinline__ u32 matrix_of(const ProductParams& p, u32& tile) {
    u32 which = 0;
    while (which + 1 < p.count) {
        u32 tiles = (p.matrices[which].rows + TILE_ROWS - 1) / TILE_ROWS;
        if (tile < tiles) break;
        tile -= tiles;
        which++;
    }
    return which;
}

#ifdef MOR_TENSOR_CORES
// Groups that a lane reads ahead of `MATRICES` matrices with `words` words: a power of two, which runs are
// often multiples of.
__device__ constexpr u32 groups_ahead(u32 type, u32 matrices, u32 words) {
    const u32 each = 2 * matrices * field_words(type);
    return words >= 8 * each ? 8 : words >= 4 * each ? 4 : words >= 2 * each ? 2 : 1;
}

// Reads a lane's parts of a tile's groups, rows g and g + 8 of the fragment. It stands at a group, so that
// those behind it have fixed distances.
template <u32 TYPE>
struct Reader {
    // Plain: of the two rows the lane's eight columns of the group. Else the group's block.
    const u8* from[2];
    // The group's number in its block.
    u32 g;

    static constexpr u32 groups = block_columns(TYPE) == 1 ? 1 : block_columns(TYPE) / GROUP;

    __device__ __forceinline__ Reader(const Matrix& m, u32 tile, u32 group) {
        const u8* data = m.data + static_cast<u64>(tile) * TILE_ROWS * m.row_bytes;
        if constexpr (block_columns(TYPE) == 1) {
            for (u32 upper = 0; upper < 2; upper++) {
                // Beyond the last row that again: what comes of it is not written.
                const u32 row = tile * TILE_ROWS + lane_index() / 4 + 8 * upper, last = m.rows - 1;
                from[upper] = m.data + static_cast<u64>(row < last ? row : last) * m.row_bytes +
                              2 * (GROUP * group + 8 * (lane_index() % 4));
            }
        } else {
            from[0] = from[1] = data + static_cast<u64>(group / groups) * (TILE_ROWS * block_bytes(TYPE));
        }
        g = group % groups;
    }

    // The group `distance` behind that at which it stands.
    __device__ __forceinline__ void read(u32 distance, u32 words[2 * field_words(TYPE)]) const {
        for (u32 upper = 0; upper < 2; upper++) {
            u32* to = words + upper * field_words(TYPE);
            if constexpr (block_columns(TYPE) == 1) {
                const uint4 bits = *reinterpret_cast<const uint4*>(from[upper] + 2 * GROUP * distance);
                to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
            } else {
                const u32 at = g + distance;
                const u8* block = from[0] + at / groups * (TILE_ROWS * block_bytes(TYPE));
                const Fields<TYPE> f =
                    read_fields<TYPE>(block, at % groups, lane_index() / 4 + 8 * upper, lane_index() % 4);
                for (u32 i = 0; i < field_words(TYPE); i++) to[i] = f.words[i];
            }
        }
    }

    __device__ __forceinline__ void advance(u32 distance) {
        if constexpr (block_columns(TYPE) == 1) {
            for (u32 upper = 0; upper < 2; upper++) from[upper] += 2 * GROUP * distance;
        } else {
            from[0] += (g + distance) / groups * (TILE_ROWS * block_bytes(TYPE));
            g = (g + distance) % groups;
        }
    }
};

// Fragments of two steps of sixteen columns, and by what their products are multiplied.
struct Fragments {
    u32 a[2][4];
    float scales[2][2], mins[2];
};

// `g`: the group's number in its block.
template <u32 TYPE>
__device__ __forceinline__ Fragments unpack(const u32 words[2 * field_words(TYPE)], u32 g) {
    Fragments f;
    for (u32 upper = 0; upper < 2; upper++) {
        const u32* from = words + upper * field_words(TYPE);
        if constexpr (block_columns(TYPE) == 1) {
            u32 w[4];
            for (u32 i = 0; i < 4; i++)
                w[i] = TYPE == F16 ? from[i]
                                   : pair_of_halves(__uint_as_float(from[i] << 16),
                                                    __uint_as_float(from[i] & 0xffff0000u));
            f.a[0][upper] = w[0];
            f.a[0][2 + upper] = w[1];
            f.a[1][upper] = w[2];
            f.a[1][2 + upper] = w[3];
        } else {
            Fields<TYPE> fields;
            for (u32 i = 0; i < field_words(TYPE); i++) fields.words[i] = from[i];
            const Codes w = codes<TYPE>(fields, g, lane_index() % 4);
            u32 halves[2];
            bytes_to_halves<code_offset(TYPE)>(w.low, halves);
            f.a[0][upper] = halves[0];
            f.a[0][2 + upper] = halves[1];
            bytes_to_halves<code_offset(TYPE)>(w.high, halves);
            f.a[1][upper] = halves[0];
            f.a[1][2 + upper] = halves[1];
            f.scales[0][upper] = w.low_scale;
            f.scales[1][upper] = w.high_scale;
            f.mins[upper] = w.min;
        }
    }
    return f;
}

// The lane's part of a row of activations for a group: as `Reader` and `codes` order the columns.
template <u32 TYPE>
__device__ __forceinline__ void read_activations(const u16* group, u32 b[2][2]) {
    const u32 t = lane_index() % 4;
    if constexpr (block_columns(TYPE) == 1) {
        const uint4 bits = *reinterpret_cast<const uint4*>(group + 8 * t);
        b[0][0] = bits.x, b[0][1] = bits.y, b[1][0] = bits.z, b[1][1] = bits.w;
        return;
    }
    for (u32 step = 0; step < 2; step++) {
        const uint2 bits = *reinterpret_cast<const uint2*>(group + 4 * t + 16 * step);
        b[step][0] = bits.x, b[step][1] = bits.y;
    }
}

// Adds a group's products to `sums`, 16 × 8; `x0` and `x1` are the group's sums of the activations of the
// lane's two columns.
template <u32 TYPE>
__device__ __forceinline__ void add_products(const Fragments& f, const u32 b[2][2], float x0, float x1,
                                             float sums[4]) {
    if constexpr (block_columns(TYPE) == 1) {
        multiply_add(sums, f.a[0], b[0]);
        multiply_add(sums, f.a[1], b[1]);
    } else if constexpr (TYPE == Q6_K) {
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        multiply_add(low, f.a[0], b[0]);
        multiply_add(high, f.a[1], b[1]);
        for (u32 i = 0; i < 4; i++)
            sums[i] = fmaf(high[i], f.scales[1][i / 2], fmaf(low[i], f.scales[0][i / 2], sums[i]));
    } else {
        float both[4] = {0, 0, 0, 0};
        multiply_add(both, f.a[0], b[0]);
        multiply_add(both, f.a[1], b[1]);
        for (u32 i = 0; i < 4; i++) {
            sums[i] = fmaf(both[i], f.scales[0][i / 2], sums[i]);
            if constexpr (has_min(TYPE)) sums[i] = fmaf(-f.mins[i / 2], i % 2 ? x1 : x0, sums[i]);
        }
    }
}

// What a warp reads ahead of its first groups, `begin` to `end`, before it waits for its input.
template <u32 TYPE, u32 MATRICES, u32 WORDS>
__device__ __forceinline__ void read_ahead(const Matrix* m, u32 tile, u32 begin, u32 end, u32 words[WORDS]) {
    constexpr u32 each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, MATRICES, WORDS);
    for (u32 i = 0; i < MATRICES; i++) {
        const Reader<TYPE> reader(m[i], tile, begin);
#pragma unroll
        for (u32 a = 0; a < ahead; a++)
            if (begin + a < end) reader.read(a, words + (a * MATRICES + i) * each);
    }
}

// The group's sums of the activations of a lane's two columns, the first of them row `row`.
template <u32 TYPE>
__device__ __forceinline__ float2 sums_of_columns(const Prepared& x, u32 row, u32 n, u32 group) {
    if constexpr (!has_min(TYPE)) return make_float2(0, 0);
    const u32 each = x.stride / GROUP, last = n - 1;
    const float* sums = x.sums + group;
    return make_float2(sums[static_cast<u64>(row < last ? row : last) * each],
                       sums[static_cast<u64>(row + 1 < last ? row + 1 : last) * each]);
}

// A warp's run of a tile, groups `begin` to `end`, against rows `first` to `n` of `x`, at most `TILES` times
// eight.
template <u32 TYPE, u32 TILES, u32 WORDS>
__device__ __forceinline__ void multiply(const Matrix& m, u32 tile, u32 begin, u32 end, const Prepared& x, u32 first,
                                         u32 n, u32 words[WORDS], float sums[TILES][4]) {
    constexpr u32 words_each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, 1, WORDS);
    const u32 used = (n - first + 7) / 8;
    Reader<TYPE> reader(m, tile, begin);
    // Beyond the last row that again: what comes of it is not written.
    const u16* rows[TILES];
#pragma unroll
    for (u32 c = 0; c < TILES; c++) {
        const u32 row = first + 8 * c + lane_index() / 4;
        rows[c] = x.halves + static_cast<u64>(row < n ? row : n - 1) * x.stride + GROUP * begin;
    }
    for (u32 start = begin; start < end; start += ahead) {
#pragma unroll
        for (u32 a = 0; a < ahead; a++) {
            const u32 group = start + a;
            if (group >= end) break;
            // All activations at once, for they too come late.
            u32 b[TILES][2][2];
#pragma unroll
            for (u32 c = 0; c < TILES; c++) read_activations<TYPE>(rows[c] + GROUP * a, b[c]);
            const Fragments f = unpack<TYPE>(words + a * words_each, (reader.g + a) % Reader<TYPE>::groups);
            if (group + ahead < end) reader.read(ahead + a, words + a * words_each);
#pragma unroll
            for (u32 c = 0; c < TILES; c++) {
                if (c >= used) continue;
                const float2 of = sums_of_columns<TYPE>(x, first + 8 * c + 2 * (lane_index() % 4), n, group);
                add_products<TYPE>(f, b[c], of.x, of.y, sums[c]);
            }
        }
        reader.advance(ahead);
#pragma unroll
        for (u32 c = 0; c < TILES; c++) rows[c] += GROUP * ahead;
    }
}

// Floats from one column of a warp's sums to the next, so that a warp's writes meet all banks.
constexpr u32 COLUMN_STRIDE = TILE_ROWS + 4;

// Adds up the warps' sums of a matrix. Thread i gets elements i, i + BLOCK, … of the tile, [columns][rows].
template <u32 TILES>
__device__ __forceinline__ void add_warps(const float sums[TILES][4], float* parts, float out[(TILES + 1) / 2]) {
    constexpr u32 columns = 8 * TILES;
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    for (u32 c = 0; c < TILES; c++)
        for (u32 i = 0; i < 4; i++)
            parts[(warp_index() * columns + 8 * c + 2 * t + i % 2) * COLUMN_STRIDE + g + i / 2 * 8] = sums[c][i];
    __syncthreads();
    for (u32 k = 0; k < (TILES + 1) / 2; k++) {
        const u32 i = threadIdx.x + k * BLOCK;
        out[k] = 0;
        if (i >= TILE_ROWS * columns) break;
        for (u32 w = 0; w < WARPS; w++)
            out[k] += parts[(w * columns + i / TILE_ROWS) * COLUMN_STRIDE + i % TILE_ROWS];
    }
}

#endif

// Where the product of row `row` of a matrix and a row of activations is written or added.
__device__ __forceinline__ float* element(const Matrix& m, u32 row, u32 c, u32 slot) {
    return m.out + static_cast<u64>(m.by_slot ? slot : c) * m.out_stride + row;
}

// A product out of its sum. Rounded after each step in every kernel: where the compiler may fuse it might do so
// in one and not in another.
__device__ __forceinline__ float finished(float sum, float scale, const float* bias, u32 row) {
    const float product = __fmul_rn(sum, scale);
    return bias ? __fadd_rn(product, bias[row]) : product;
}

// Makes a lone row ready in shared memory: floats, halves, sums. GELU is not asked for.
__device__ __forceinline__ float make_lone_row(const ProductParams& p, u32 slot, float* shared, Place& place) {
    const u32 stride = p.input.stride;
    u16* halves = reinterpret_cast<u16*>(shared + stride);
    place = {shared, halves, reinterpret_cast<float*>(halves + stride)};
    const float scale = make_row<false>(p.source, 0, slot, p.input.columns, stride, place);
    __syncthreads();
    return scale;
}

#ifdef MOR_TENSOR_CORES
// Rows that are ready.
template <u32 TILES>
__device__ __forceinline__ void product_by_tensor_cores(const ProductParams& p) {
    // Few words, for the sums and the activations take many registers.
    constexpr u32 WORDS = TILES > 1 ? 16 : AHEAD_WORDS;
    __shared__ float parts[RUNS * 8 * TILES * COLUMN_STRIDE];
    let_next_begin();
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    const u32 each = groups_of_run(p.groups), begin = warp_index() * each;
    const u32 end = begin + each < p.groups ? begin + each : p.groups;
    u32 words[WORDS];
#define MOR_AHEAD(TYPE) \
    if constexpr (TYPE != F32) read_ahead<TYPE, 1, WORDS>(&m, tile, begin, end, words)
    MOR_FOR_TYPE(m.type, MOR_AHEAD)
#undef MOR_AHEAD
    wait_for_previous();
    const u32 n = *p.view.count, first = blockIdx.y * 8 * TILES;
    if (first >= n) return;
    float sums[TILES][4] = {};
#define MOR_MULTIPLY(TYPE) \
    if constexpr (TYPE != F32) multiply<TYPE, TILES, WORDS>(m, tile, begin, end, p.input, first, n, words, sums)
    MOR_FOR_TYPE(m.type, MOR_MULTIPLY)
#undef MOR_MULTIPLY
    constexpr u32 mine = (TILES + 1) / 2;
    float out[mine];
    add_warps<TILES>(sums, parts, out);
    for (u32 k = 0; k < mine; k++) {
        const u32 i = threadIdx.x + k * BLOCK;
        const u32 row = tile * TILE_ROWS + i % TILE_ROWS, c = first + i / TILE_ROWS;
        if (i >= TILE_ROWS * 8 * TILES || row >= m.rows || c >= n) continue;
        const float value = finished(out[k], p.input.scales[c], m.bias, row);
        float* to = element(m, row, c, m.by_slot ? p.view.slots[c] : 0);
        *to = m.add ? __fadd_rn(*to, value) : value;
    }
}

// Tiles and rows of activations that a block of `wide_product` takes: each of its warps a tile and half the
// rows.
constexpr u32 WIDE_TILES = WARPS / 2;
constexpr u32 WIDE = 64;
// Groups of activations that stand in shared memory together, and halves from one row to the next, such that
// eight lanes which read sixteen bytes each meet all banks.
constexpr u32 WIDE_CHUNK = 4;
constexpr u32 WIDE_STRIDE = WIDE_CHUNK * GROUP + 32;

// Brings activations of a block through registers into shared memory: a thread four times eight halves of a
// row, so that those of the next chunk come while this one is used.
struct Loader {
    uint4 quads[WIDE_CHUNK];

    __device__ __forceinline__ void read(const Prepared& x, u32 first, u32 n, u32 group) {
        const u32 row = first + threadIdx.x / 4;
        const u16* from = x.halves + static_cast<u64>(row < n ? row : n - 1) * x.stride + 8 * (threadIdx.x % 4);
#pragma unroll
        for (u32 i = 0; i < WIDE_CHUNK; i++)
            if (GROUP * (group + i) < x.stride)
                quads[i] = *reinterpret_cast<const uint4*>(from + GROUP * (group + i));
    }

    __device__ __forceinline__ void write(u16* chunk) const {
        u16* to = chunk + threadIdx.x / 4 * WIDE_STRIDE + 8 * (threadIdx.x % 4);
#pragma unroll
        for (u32 i = 0; i < WIDE_CHUNK; i++) *reinterpret_cast<uint4*>(to + GROUP * i) = quads[i];
    }
};

// All groups of a warp's tile against rows `first` to `n` of `x`, of which those of the block begin at
// `first_of_block`. `sums` gets them run by run.
template <u32 TYPE, u32 TILES>
__device__ __forceinline__ void multiply_wide(const Matrix& m, u32 tile, u32 groups, const Prepared& x,
                                              u32 first_of_block, u32 first, u32 n, u16* chunks,
                                              float sums[TILES][4]) {
    constexpr u32 WORDS = 16, words_each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, 1, WORDS);
    static_assert(WIDE_CHUNK % ahead == 0, "the words of a group have a fixed place");
    u32 words[WORDS];
    read_ahead<TYPE, 1, WORDS>(&m, tile, 0, groups, words);
    Reader<TYPE> reader(m, tile, 0);
    Loader loader = {};
    loader.read(x, first_of_block, n, 0);
    float run[TILES][4] = {};
    const u32 each = groups_of_run(groups);
    u32 next = each;
    const auto finish_run = [&] {
#pragma unroll
        for (u32 c = 0; c < TILES; c++)
            for (u32 i = 0; i < 4; i++) {
                sums[c][i] += run[c][i];
                run[c][i] = 0;
            }
        next += each;
    };
    const u32 row = (first - first_of_block + lane_index() / 4) * WIDE_STRIDE;
    for (u32 start = 0, turn = 0; start < groups; start += WIDE_CHUNK, turn ^= 1) {
        u16* chunk = chunks + turn * (WIDE * WIDE_STRIDE);
        loader.write(chunk);
        __syncthreads();
        if (start + WIDE_CHUNK < groups) loader.read(x, first_of_block, n, start + WIDE_CHUNK);
#pragma unroll
        for (u32 i = 0; i < WIDE_CHUNK; i++) {
            const u32 group = start + i, a = i % ahead;
            if (group >= groups) break;
            if (group == next) finish_run();
            u32 b[TILES][2][2];
#pragma unroll
            for (u32 c = 0; c < TILES; c++)
                read_activations<TYPE>(chunk + row + 8 * c * WIDE_STRIDE + GROUP * i, b[c]);
            const Fragments f = unpack<TYPE>(words + a * words_each, (reader.g + i) % Reader<TYPE>::groups);
            if (group + ahead < groups) reader.read(ahead + i, words + a * words_each);
#pragma unroll
            for (u32 c = 0; c < TILES; c++) {
                const float2 of = sums_of_columns<TYPE>(x, first + 8 * c + 2 * (lane_index() % 4), n, group);
                add_products<TYPE>(f, b[c], of.x, of.y, run[c]);
            }
        }
        reader.advance(WIDE_CHUNK);
    }
    finish_run();
}

// Many rows that are ready: blocks enough come together without sharing a tile's columns among the warps, and
// the activations, which all warps of a block need, are read once.
__device__ __forceinline__ void wide_product(const ProductParams& p) {
    constexpr u32 TILES = WIDE / 2 / 8;
    // Two chunks: while one is used by slow warps, quick ones write the other.
    __align__(16) __shared__ u16 chunks[2 * WIDE * WIDE_STRIDE];
    enter();
    const u32 n = *p.view.count, first_of_block = blockIdx.y * WIDE;
    if (first_of_block >= n) return;
    const u32 first = first_of_block + warp_index() / WIDE_TILES * (WIDE / 2);
    // All warps bring activations, so that those beyond the last tile do it again.
    u32 tile = blockIdx.x * WIDE_TILES + warp_index() % WIDE_TILES;
    const bool has_tile = tile < p.tiles;
    if (!has_tile) tile = p.tiles - 1;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    float sums[TILES][4] = {};
#define MOR_MULTIPLY(TYPE)     \
    if constexpr (TYPE != F32) \
    multiply_wide<TYPE, TILES>(m, tile, p.groups, p.input, first_of_block, first, n, chunks, sums)
    MOR_FOR_TYPE(m.type, MOR_MULTIPLY)
#undef MOR_MULTIPLY
    if (!has_tile) return;
    for (u32 c = 0; c < TILES; c++)
        for (u32 i = 0; i < 4; i++) {
            const u32 row = tile * TILE_ROWS + lane_index() / 4 + i / 2 * 8;
            const u32 column = first + 8 * c + 2 * (lane_index() % 4) + i % 2;
            if (row >= m.rows || column >= n) continue;
            const float value = finished(sums[c][i], p.input.scales[column], m.bias, row);
            float* to = element(m, row, column, m.by_slot ? p.view.slots[column] : 0);
            *to = m.add ? __fadd_rn(*to, value) : value;
        }
}

// A warp's runs of a tile of one or two matrices against a lone row; `parts` [MATRICES][RUNS][TILE_ROWS] of
// this tile gets the sums.
template <u32 TYPE, u32 MATRICES>
__device__ __forceinline__ void multiply_lone(const Matrix* m, u32 tile, u32 groups, u32 first_run, u32 runs,
                                              const Place& x, u32 words[AHEAD_WORDS], float* parts) {
    constexpr u32 words_each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, MATRICES, AHEAD_WORDS);
    const u32 each = groups_of_run(groups), begin = first_run * each;
    const u32 end = begin + runs * each < groups ? begin + runs * each : groups;
    Reader<TYPE> readers[2] = {Reader<TYPE>(m[0], tile, begin), Reader<TYPE>(m[MATRICES - 1], tile, begin)};
    float sums[MATRICES][4] = {};
    u32 run = first_run, next = begin + each;
    const auto finish_run = [&] {
        for (u32 i = 0; i < MATRICES; i++) {
            float* to = parts + (i * RUNS + run) * TILE_ROWS + lane_index() / 4;
            // All eight columns are the row's.
            if (lane_index() % 4 == 0) to[0] = sums[i][0], to[8] = sums[i][2];
            for (u32 k = 0; k < 4; k++) sums[i][k] = 0;
        }
        run++;
    };
    const u16* row = x.halves + GROUP * begin;
    // One group, number `a` of those that are ahead. `checked`: the one that takes its place may not be there.
    const auto add_group = [&](u32 group, u32 a, bool checked) {
        u32 b[2][2];
        read_activations<TYPE>(row + GROUP * a, b);
        const float of_columns = has_min(TYPE) ? x.sums[group] : 0;
        for (u32 i = 0; i < MATRICES; i++) {
            u32* from = words + (a * MATRICES + i) * words_each;
            const Fragments f = unpack<TYPE>(from, (readers[i].g + a) % Reader<TYPE>::groups);
            if (!checked || group + ahead < end) readers[i].read(ahead + a, from);
            add_products<TYPE>(f, b, of_columns, of_columns, sums[i]);
        }
    };
    for (u32 start = begin; start < end; start += ahead) {
        if (start + 2 * ahead <= end && start + ahead <= next) {
            // Without a question in between, so that the groups' latencies overlap.
#pragma unroll
            for (u32 a = 0; a < ahead; a++) add_group(start + a, a, false);
        } else {
#pragma unroll
            for (u32 a = 0; a < ahead; a++) {
                const u32 group = start + a;
                if (group >= end) break;
                if (group == next) {
                    finish_run();
                    next += each;
                }
                add_group(group, a, true);
            }
        }
        for (u32 i = 0; i < MATRICES; i++) readers[i].advance(ahead);
        row += GROUP * ahead;
        if (start + ahead == next && next < end) {
            finish_run();
            next += each;
        }
    }
    while (run < first_run + runs) finish_run();
}

// A lone row with one matrix of several, or with two that are a gate and what it lets through.
template <u32 MATRICES>
__device__ __forceinline__ void lone_product(const ProductParams& p) {
    __shared__ float parts[WARPS * MATRICES * RUNS * TILE_ROWS];
    MOR_DYNAMIC_SHARED(float, row_room);
    let_next_begin();
    // `runs` runs are a warp's, so that as many tiles are the block's.
    const u32 runs = p.tiles_of_block, warps = WARPS / runs, place_of_tile = warp_index() / warps;
    const u32 first_run = warp_index() % warps * runs, each = groups_of_run(p.groups), begin = first_run * each;
    const u32 end = begin + runs * each < p.groups ? begin + runs * each : p.groups;
    u32 tile = blockIdx.x * runs + place_of_tile;
    const bool has_tile = tile < p.tiles;
    const Matrix* m = p.matrices;
    if constexpr (MATRICES == 1) m += matrix_of(p, tile);
    u32 words[AHEAD_WORDS];
    if (has_tile) {
#define MOR_AHEAD(TYPE) \
    if constexpr (TYPE != F32) read_ahead<TYPE, MATRICES, AHEAD_WORDS>(m, tile, begin, end, words)
        MOR_FOR_TYPE(m->type, MOR_AHEAD)
#undef MOR_AHEAD
    }
    prefetch_source(p.source, p.input.columns);
    wait_for_previous();
    const u32 n = *p.view.count, slot = p.view.slots[0];
    if (n == 0) return;
    Place place;
    const float scale = make_lone_row(p, slot, row_room, place);
    // The element of thread i: row i % 16 of tile i / 16.
    u32 my_tile = blockIdx.x * runs + threadIdx.x / TILE_ROWS;
    const bool has_element = threadIdx.x < runs * TILE_ROWS && my_tile < p.tiles;
    const Matrix& mine = p.matrices[MATRICES == 1 ? matrix_of(p, my_tile) : 0];
    const u32 row = my_tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
    const bool writes = has_element && row < mine.rows;
    float* to = element(mine, writes ? row : 0, 0, slot);
    const float before = writes && mine.add ? *to : 0;
    if (has_tile) {
        float* sums = parts + place_of_tile * (MATRICES * RUNS * TILE_ROWS);
#define MOR_MULTIPLY(TYPE) \
    if constexpr (TYPE != F32) multiply_lone<TYPE, MATRICES>(m, tile, p.groups, first_run, runs, place, words, sums)
        MOR_FOR_TYPE(m->type, MOR_MULTIPLY)
#undef MOR_MULTIPLY
    }
    __syncthreads();
    if (!writes) return;
    float value[MATRICES];
    for (u32 i = 0; i < MATRICES; i++) {
        const u32 place = threadIdx.x / TILE_ROWS * MATRICES + i;
        const float* sums = parts + place * (RUNS * TILE_ROWS) + threadIdx.x % TILE_ROWS;
        float sum = 0;
        for (u32 r = 0; r < RUNS; r++) sum += sums[r * TILE_ROWS];
        value[i] = finished(sum, scale, (&mine)[i].bias, row);
    }
    if constexpr (MATRICES == 2) value[0] = swiglu(value[0], value[1]);
    *to = mine.add ? __fadd_rn(before, value[0]) : value[0];
}
#endif

// Kernels by tensor cores: for a lone row, which they make ready, `product` for each matrix and `swiglu` for
// the first two together, grid: (tiles / tiles of a block), dynamic shared memory for the row's floats,
// halves and sums; for 8 and for 32 rows a block, grid: (tiles of the matrices, rows / 8 or 32); for 64 rows and
// four tiles a block, grid: (tiles / 4, rows / 64).
#ifdef MOR_TENSOR_CORES
#define MOR_PRODUCT(name, CALL, BLOCKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) name(const ProductParams p) { CALL(p); } \
    MOR_KERNEL(name)
#else
#define MOR_PRODUCT(name, CALL, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(BLOCK) name(const ProductParams p) {}
#endif
// The last number: blocks that a multiprocessor has registers for.
MOR_PRODUCT(mor_lone_product, lone_product<1>, 2)
MOR_PRODUCT(mor_lone_swiglu, lone_product<2>, 2)
MOR_PRODUCT(mor_few_product, product_by_tensor_cores<1>, 2)
MOR_PRODUCT(mor_many_product, product_by_tensor_cores<MANY / 8>, 2)
MOR_PRODUCT(mor_wide_product, wide_product, 2)
#undef MOR_PRODUCT

// ---- In single precision

// A warp's groups of a tile against up to `COLUMNS` rows of floats.
template <u32 TYPE, u32 COLUMNS>
__device__ __forceinline__ void tile_by_fma(const Matrix& m, u32 groups, const float* floats, u32 stride, u32 tile,
                                            u32 first, u32 n, float sums[2][COLUMNS]) {
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    const u32 each = groups_of_run(groups), begin = warp_index() * each;
    const u32 end = begin + each < groups ? begin + each : groups;
    for (u32 group = begin; group < end; group++) {
        float w[2][8];
        for (u32 upper = 0; upper < 2; upper++)
            decode<TYPE>(m, tile * TILE_ROWS + g + 8 * upper, group, t, w[upper]);
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++) {
            if (first + c >= n) break;
            const float* x = floats + static_cast<u64>(first + c) * stride + GROUP * group + 4 * t;
            float4 x0 = *reinterpret_cast<const float4*>(x);
            float4 x1 = *reinterpret_cast<const float4*>(x + 16);
            for (u32 upper = 0; upper < 2; upper++) {
                float s = sums[upper][c];
                s = fmaf(w[upper][0], x0.x, s);
                s = fmaf(w[upper][1], x0.y, s);
                s = fmaf(w[upper][2], x0.z, s);
                s = fmaf(w[upper][3], x0.w, s);
                s = fmaf(w[upper][4], x1.x, s);
                s = fmaf(w[upper][5], x1.y, s);
                s = fmaf(w[upper][6], x1.z, s);
                s = fmaf(w[upper][7], x1.w, s);
                sums[upper][c] = s;
            }
        }
    }
}

template <bool LONE>
__device__ __forceinline__ void product_by_fma(const ProductParams& p) {
    enter();
    constexpr u32 COLUMNS = LONE ? 1 : FEW;
    __shared__ float parts[WARPS * TILE_ROWS * COLUMNS];
    MOR_DYNAMIC_SHARED(float, row_room);
    const u32 n = *p.view.count, first = blockIdx.y * FEW;
    if (first >= n) return;
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    const float* floats = p.input.floats;
    if constexpr (LONE) {
        Place place;
        make_lone_row(p, p.view.slots[0], row_room, place);
        floats = place.floats;
    }
    const u32 columns = LONE ? 1 : n;
    float sums[2][COLUMNS] = {};
#define MOR_TILE(TYPE) tile_by_fma<TYPE, COLUMNS>(m, p.groups, floats, p.input.stride, tile, first, columns, sums)
    MOR_FOR_TYPE(m.type, MOR_TILE)
#undef MOR_TILE
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    for (u32 upper = 0; upper < 2; upper++)
        for (u32 c = 0; c < COLUMNS; c++) {
            float s = sums[upper][c];
            s += __shfl_xor_sync(ALL_LANES, s, 1);
            s += __shfl_xor_sync(ALL_LANES, s, 2);
            if (t == 0) parts[(warp_index() * TILE_ROWS + g + 8 * upper) * COLUMNS + c] = s;
        }
    __syncthreads();
    if (threadIdx.x >= TILE_ROWS * COLUMNS) return;
    // Neighbouring threads write neighbouring outputs.
    const u32 row = tile * TILE_ROWS + threadIdx.x % TILE_ROWS, c = threadIdx.x / TILE_ROWS;
    if (row >= m.rows || first + c >= columns) return;
    float value = 0;
    for (u32 w = 0; w < WARPS; w++) value += parts[(w * TILE_ROWS + threadIdx.x % TILE_ROWS) * COLUMNS + c];
    if (m.bias) value += m.bias[row];
    float* to = element(m, row, first + c, m.by_slot ? p.view.slots[first + c] : 0);
    *to = m.add ? *to + value : value;
}

// Matrices of F32, rows that are not whole groups, devices without tensor cores for halves. grid: (tiles of
// all matrices, rows / 8); `lone_exact` makes a lone row ready, with shared memory as above.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_lone_exact(const ProductParams p) { product_by_fma<true>(p); }
MOR_KERNEL(mor_lone_exact)

extern "C" __global__ void __launch_bounds__(BLOCK) mor_exact(const ProductParams p) { product_by_fma<false>(p); }
MOR_KERNEL(mor_exact)

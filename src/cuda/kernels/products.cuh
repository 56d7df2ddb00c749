// Matrix products. A block computes sixteen rows of a matrix for some rows of activations; each of its
// warps takes a run of the columns, and their sums are added in the order of the warps. So a result depends
// on the matrix and its own row of activations only, however many rows come along.
#pragma once
#include "rows.cuh"

struct ProductParams {
    Matrix matrices[3];
    u32 count;
    // Groups of 32 columns.
    u32 groups;
    Prepared input;
    View view;
    // What the input is made of, where the block makes it ready itself: a lone row.
    Source source;
};

// Columns of activations that a block takes at most: with tensor cores, without.
constexpr u32 MANY = 64;
constexpr u32 FEW = 8;

// Words of weights that a lane reads ahead: with two blocks on a multiprocessor some 60 KiB are on their
// way, three times what it takes to keep the memory of an H100 busy.
constexpr u32 AHEAD_WORDS = 32;

// The run of groups of this warp.
struct Run {
    u32 begin, end;
};

__device__ __forceinline__ Run run_of_warp(u32 groups) {
    const u32 each = (groups + WARPS - 1) / WARPS;
    const u32 begin = warp_index() * each, end = begin + each;
    return {begin, end < groups ? end : groups};
}

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
// Groups that a lane reads ahead of `MATRICES` matrices with `words` words.
__device__ constexpr u32 groups_ahead(u32 type, u32 matrices, u32 words) {
    const u32 each = 2 * matrices * field_words(type);
    return words / each > 0 ? words / each : 1;
}

// A lane's part of a group of a tile: rows g and g + 8 of the fragment.
template <u32 TYPE>
__device__ __forceinline__ void read_group(const Matrix& m, u32 tile, u32 group, u32 words[2 * field_words(TYPE)]) {
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    const u8* data = m.data + static_cast<u64>(tile) * TILE_ROWS * m.row_bytes;
    for (u32 upper = 0; upper < 2; upper++) {
        const u32 row = g + 8 * upper;
        u32* to = words + upper * field_words(TYPE);
        if constexpr (block_columns(TYPE) == 1) {
            uint4 bits = make_uint4(0, 0, 0, 0);
            if (tile * TILE_ROWS + row < m.rows)
                bits = *reinterpret_cast<const uint4*>(data + static_cast<u64>(row) * m.row_bytes + 2 * (GROUP * group + 8 * t));
            to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
        } else {
            const Fields<TYPE> f = read_fields<TYPE>(data, group, row, t);
            for (u32 i = 0; i < field_words(TYPE); i++) to[i] = f.words[i];
        }
    }
}

// Fragments of two steps of sixteen columns, and by what their products are multiplied.
struct Fragments {
    u32 a[2][4];
    float scales[2][2], mins[2];
};

template <u32 TYPE>
__device__ __forceinline__ Fragments unpack(const u32 words[2 * field_words(TYPE)], u32 group) {
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
            const Codes w = codes<TYPE>(fields, group, lane_index() % 4);
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

// Prepared rows of activations of which a block takes those from `first` on.
struct Columns {
    const u16* halves;
    const float* sums;
    u32 stride;
    u32 first;
    u32 n;
};

// Eight rows of activations, from the `c`th eight on, for a group.
template <u32 TYPE>
__device__ __forceinline__ void read_columns(const Columns& x, u32 c, u32 group, u32 b[2][2]) {
    const u32 column = x.first + 8 * c + lane_index() / 4, t = lane_index() % 4;
    for (u32 step = 0; step < 2; step++) b[step][0] = b[step][1] = 0;
    if (column >= x.n) return;
    const u16* from = x.halves + static_cast<u64>(column) * x.stride + GROUP * group;
    for (u32 step = 0; step < 2; step++) {
        // As `read_group` and `codes` order the columns.
        const u32 at = block_columns(TYPE) == 1 ? 8 * t + 4 * step : 4 * t + 16 * step;
        const uint2 bits = *reinterpret_cast<const uint2*>(from + at);
        b[step][0] = bits.x;
        b[step][1] = bits.y;
    }
}

// Adds a group's products to `sums`, 16 × 8.
template <u32 TYPE>
__device__ __forceinline__ void add_products(const Fragments& f, const u32 b[2][2], const Columns& x, u32 c,
                                             u32 group, float sums[4]) {
    if constexpr (block_columns(TYPE) == 1) {
        multiply_add(sums, f.a[0], b[0]);
        multiply_add(sums, f.a[1], b[1]);
    } else if constexpr (TYPE == Q6_K) {
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        multiply_add(low, f.a[0], b[0]);
        multiply_add(high, f.a[1], b[1]);
        for (u32 i = 0; i < 4; i++) sums[i] += low[i] * f.scales[0][i / 2] + high[i] * f.scales[1][i / 2];
    } else {
        float both[4] = {0, 0, 0, 0};
        multiply_add(both, f.a[0], b[0]);
        multiply_add(both, f.a[1], b[1]);
        for (u32 i = 0; i < 4; i++) sums[i] += both[i] * f.scales[0][i / 2];
        if constexpr (has_min(TYPE)) {
            const u32 pair = x.first + 8 * c + 2 * (lane_index() % 4);
            for (u32 i = 0; i < 2; i++) {
                if (pair + i >= x.n) break;
                const float sum = x.sums[static_cast<u64>(pair + i) * (x.stride / GROUP) + group];
                sums[i] -= f.mins[0] * sum;
                sums[2 + i] -= f.mins[1] * sum;
            }
        }
    }
}

// What a warp reads ahead of its first groups, before it waits for its input.
template <u32 TYPE, u32 MATRICES, u32 WORDS>
__device__ __forceinline__ void read_ahead(const Matrix* m, u32 tile, u32 groups, u32 words[AHEAD_WORDS]) {
    constexpr u32 each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, MATRICES, WORDS);
    const Run run = run_of_warp(groups);
#pragma unroll
    for (u32 a = 0; a < ahead; a++)
        for (u32 i = 0; i < MATRICES; i++)
            if (run.begin + a < run.end) read_group<TYPE>(m[i], tile, run.begin + a, words + (a * MATRICES + i) * each);
}

// A warp's groups of a tile of one or two matrices against `TILES` times eight rows of activations.
template <u32 TYPE, u32 TILES, u32 MATRICES, u32 WORDS>
__device__ __forceinline__ void multiply(const Matrix* m, u32 tile, u32 groups, const Columns& x,
                                         u32 words[AHEAD_WORDS], float sums[MATRICES][TILES][4]) {
    constexpr u32 each = 2 * field_words(TYPE), ahead = groups_ahead(TYPE, MATRICES, WORDS);
    const Run run = run_of_warp(groups);
    const u32 used = (x.n - x.first + 7) / 8;
    for (u32 start = run.begin; start < run.end; start += ahead) {
#pragma unroll
        for (u32 a = 0; a < ahead; a++) {
            const u32 group = start + a;
            if (group >= run.end) break;
            Fragments f[MATRICES];
            for (u32 i = 0; i < MATRICES; i++) {
                u32* from = words + (a * MATRICES + i) * each;
                f[i] = unpack<TYPE>(from, group);
                if (group + ahead < run.end) read_group<TYPE>(m[i], tile, group + ahead, from);
            }
            for (u32 c = 0; c < TILES; c++) {
                if (c >= used) break;
                u32 b[2][2];
                read_columns<TYPE>(x, c, group, b);
                for (u32 i = 0; i < MATRICES; i++) add_products<TYPE>(f[i], b, x, c, group, sums[i][c]);
            }
        }
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

// Where a product of row `row` of a matrix and activations `c` is written or added.
__device__ __forceinline__ float* element(const Matrix& m, const View& view, u32 row, u32 c) {
    const u32 to = m.by_slot ? view.slots[c] : c;
    return m.out + static_cast<u64>(to) * m.out_stride + row;
}

// Makes a lone row ready in shared memory: floats, halves, sums.
__device__ __forceinline__ float make_lone_row(const ProductParams& p, float* shared, Place& place) {
    const u32 stride = p.input.stride;
    u16* halves = reinterpret_cast<u16*>(shared + stride);
    place = {shared, halves, reinterpret_cast<float*>(halves + stride)};
    const float scale = make_row(p.source, 0, p.view.slots[0], p.input.columns, stride, place);
    __syncthreads();
    return scale;
}

#ifdef MOR_TENSOR_CORES
// One matrix of several, or two that are the gate and what it lets through.
template <u32 TILES, u32 MATRICES, bool LONE>
__device__ __forceinline__ void product_by_tensor_cores(const ProductParams& p) {
    // Fewer words where the sums take many registers.
    constexpr u32 WORDS = TILES > 1 ? AHEAD_WORDS / 4 : AHEAD_WORDS;
    __shared__ float parts[WARPS * 8 * TILES * COLUMN_STRIDE];
    MOR_DYNAMIC_SHARED(float, shared);
    let_next_begin();
    u32 tile = blockIdx.x;
    const Matrix* m = p.matrices;
    if constexpr (MATRICES == 1) m += matrix_of(p, tile);
    u32 words[AHEAD_WORDS];
#define MOR_AHEAD(TYPE) \
    if constexpr (TYPE != F32) read_ahead<TYPE, MATRICES, WORDS>(m, tile, p.groups, words)
    MOR_FOR_TYPE(m->type, MOR_AHEAD)
#undef MOR_AHEAD
    wait_for_previous();
    const u32 n = *p.view.count, first = blockIdx.y * 8 * TILES;
    if (first >= n) return;
    Columns x = {p.input.halves, p.input.sums, p.input.stride, first, LONE ? 1 : n};
    float scale = 0;
    if constexpr (LONE) {
        Place place;
        scale = make_lone_row(p, shared, place);
        x.halves = place.halves;
        x.sums = place.sums;
    }
    float sums[MATRICES][TILES][4] = {};
#define MOR_MULTIPLY(TYPE) \
    if constexpr (TYPE != F32) multiply<TYPE, TILES, MATRICES, WORDS>(m, tile, p.groups, x, words, sums)
    MOR_FOR_TYPE(m->type, MOR_MULTIPLY)
#undef MOR_MULTIPLY
    constexpr u32 mine = (TILES + 1) / 2;
    float out[MATRICES][mine];
    for (u32 i = 0; i < MATRICES; i++) {
        if (i > 0) __syncthreads();
        add_warps<TILES>(sums[i], parts, out[i]);
    }
    for (u32 k = 0; k < mine; k++) {
        const u32 i = threadIdx.x + k * BLOCK;
        const u32 row = tile * TILE_ROWS + i % TILE_ROWS, c = first + i / TILE_ROWS;
        if (i >= TILE_ROWS * 8 * TILES || row >= m->rows || c >= x.n) continue;
        if constexpr (!LONE) scale = p.input.scales[c];
        float value = out[0][k] * scale;
        if (m->bias) value += m->bias[row];
        if constexpr (MATRICES == 2) {
            float up = out[1][k] * scale;
            if (m[1].bias) up += m[1].bias[row];
            value = swiglu(value, up);
        }
        float* to = element(*m, p.view, row, c);
        *to = m->add ? *to + value : value;
    }
}
#endif

// Kernels by tensor cores: for a lone row, which they make ready, `product` for each matrix and `swiglu` for
// the first two together; for 8 and for 64 rows a block. grid: (tiles of the matrices, rows / 1, 8, 64);
// dynamic shared memory for a lone row: its floats, halves and sums.
#ifdef MOR_TENSOR_CORES
#define MOR_PRODUCT(name, TILES, MATRICES, LONE)                                                   \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) name(const ProductParams p) {           \
        product_by_tensor_cores<TILES, MATRICES, LONE>(p);                                         \
    }                                                                                              \
    MOR_KERNEL(name)
#else
#define MOR_PRODUCT(name, TILES, MATRICES, LONE) \
    extern "C" __global__ void __launch_bounds__(BLOCK) name(const ProductParams p) {}
#endif
MOR_PRODUCT(mor_lone_product, 1, 1, true)
MOR_PRODUCT(mor_lone_swiglu, 1, 2, true)
MOR_PRODUCT(mor_few_product, 1, 1, false)
MOR_PRODUCT(mor_many_product, MANY / 8, 1, false)
#undef MOR_PRODUCT

// ---- In single precision

// A warp's groups of a tile against up to `COLUMNS` rows of floats.
template <u32 TYPE, u32 COLUMNS>
__device__ __forceinline__ void tile_by_fma(const Matrix& m, u32 groups, const float* floats, u32 stride, u32 tile,
                                            u32 first, u32 n, float sums[2][COLUMNS]) {
    const u32 g = lane_index() / 4, t = lane_index() % 4;
    const Run run = run_of_warp(groups);
    for (u32 group = run.begin; group < run.end; group++) {
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
    MOR_DYNAMIC_SHARED(float, shared);
    const u32 n = *p.view.count, first = blockIdx.y * FEW;
    if (first >= n) return;
    u32 tile = blockIdx.x;
    const Matrix& m = p.matrices[matrix_of(p, tile)];
    const float* floats = p.input.floats;
    if constexpr (LONE) {
        Place place;
        make_lone_row(p, shared, place);
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
    float* to = element(m, p.view, row, first + c);
    *to = m.add ? *to + value : value;
}

// Matrices of F32, rows that are not whole groups, devices without tensor cores for halves. grid: (tiles of
// all matrices, rows / 8); `lone_exact` makes a lone row ready, with shared memory as above.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_lone_exact(const ProductParams p) { product_by_fma<true>(p); }
MOR_KERNEL(mor_lone_exact)

extern "C" __global__ void __launch_bounds__(BLOCK) mor_exact(const ProductParams p) { product_by_fma<false>(p); }
MOR_KERNEL(mor_exact)

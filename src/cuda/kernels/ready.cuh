// Rows made ready for matrix products. Columns are cut into eight runs. A warp makes a run ready on its own:
// halves, divided by a power of two of the run's. So a norm, too, needs no look at the other runs: what it
// divides by, a factor of the whole row, comes in after the product.
#pragma once
#include "rows.cuh"

constexpr u32 RUNS = WARPS;

// Activations ready for products, [rows][stride] each. By tensor cores: halves, times `scales` [rows][RUNS],
// the powers of two that bring the largest element of each run near 2^14: none overflows, and elements keep
// their eleven bits down to 2^-28 of the largest; times `factors` [rows]. `sums` [rows][stride / 32] adds up
// the halves of each group. In single precision: `floats`, zero beyond their columns.
struct Prepared {
    float* floats;
    u16* halves;
    float* scales;
    float* factors;
    float* sums;
    u32 columns;
    u32 stride;
};

// How the halves of a group of 32 stand: as their columns, or as the fragments of weights want the words of two where
// tensor cores read activations from shared memory themselves (warpgroup.cuh), of plain types and of others.
enum Order : u32 { BY_COLUMN = 0, PLAIN_FRAGMENTS = 1, BLOCK_FRAGMENTS = 2 };

enum Make : u32 { NORM = 0, SCALED = 1, GELU = 2, SWIGLU = 3, PLAIN = 4, ATTENTION = 5 };

// What a row is made of.
struct Source {
    // NORM, SCALED: [slots][columns]; ATTENTION: [rows][heads][parts][head_dim]; else [rows][columns].
    const float* a;
    // NORM: the weights [columns]; SWIGLU: [rows][columns].
    const float* b;
    // ATTENTION: of each part the largest score and the sum, [rows][heads][parts]; and [rows] how many
    // entries a row sees.
    const float2* part_scales;
    const u32* visible;
    u32 make;
    // NORM: epsilon. SCALED: divides.
    float number;
    // ATTENTION; `per_head` is 2^32 / head_dim, rounded up: what is multiplied by it has the head above.
    u32 head_dim;
    u32 per_head;
    u32 parts;
    u32 unused;
};

// SwiGLU (Shazeer, 2020) of a gate and what it lets through.
__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// The exact form: x Φ(x) (Hendrycks and Gimpel, 2016).
__device__ __forceinline__ float gelu(float x) {
    return static_cast<float>(0.5 * x * (1.0 + erf(x / 1.4142135623730951)));
}

// Puts the parts of a context together: elements `i` to `i + count` of all heads of row `c`, which are of one
// head.
template <u32 COUNT>
__device__ __forceinline__ void attended(const Source& s, u32 c, u32 columns, u32 i, float v[COUNT]) {
    const u32 h = __umulhi(i, s.per_head), e = i - h * s.head_dim;
    const u64 head = static_cast<u64>(c) * __umulhi(columns, s.per_head) + h;
    const float2* scales = s.part_scales + head * s.parts;
    const float* partial = s.a + head * s.parts * s.head_dim + e;
    // The first part is there in any case, so that nobody waits to learn how many there are.
    float2 of = *scales;
    float sum[COUNT];
    const auto read = [&](u32 part) {
        const float* from = partial + static_cast<u64>(part) * s.head_dim;
        if constexpr (COUNT == 4) {
            const float4 four = *reinterpret_cast<const float4*>(from);
            v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
        } else {
            for (u32 k = 0; k < COUNT; k++) v[k] = from[k];
        }
    };
    read(0);
    const u32 parts = (s.visible[c] + PART - 1) / PART;
    float total = of.y;
    if (parts > 1) {
        float max = of.x;
#pragma unroll 1
        for (u32 part = 1; part < parts; part++) max = fmaxf(max, scales[part].x);
        const float first = expf(of.x - max);
        total = first * of.y;
        for (u32 k = 0; k < COUNT; k++) sum[k] = first * v[k];
#pragma unroll 1
        for (u32 part = 1; part < parts; part++) {
            of = scales[part];
            read(part);
            const float weight = expf(of.x - max);
            total = fmaf(weight, of.y, total);
            for (u32 k = 0; k < COUNT; k++) sum[k] = fmaf(weight, v[k], sum[k]);
        }
        for (u32 k = 0; k < COUNT; k++) v[k] = sum[k];
    }
    const float inverse = 1.0f / total;
    for (u32 k = 0; k < COUNT; k++) v[k] *= inverse;
}

// Element `i` of row `c`, before a norm.
template <u32 MAKE>
__device__ __forceinline__ float source_element(const Source& s, u32 c, u32 slot, u32 columns, u32 i) {
    if constexpr (MAKE == ATTENTION) {
        float v;
        attended<1>(s, c, columns, i, &v);
        return v;
    }
    const u64 row = static_cast<u64>(MAKE == NORM || MAKE == SCALED ? slot : c) * columns;
    const float v = s.a[row + i];
    return MAKE == SCALED ? v / s.number : MAKE == GELU ? gelu(v) : MAKE == SWIGLU ? swiglu(v, s.b[row + i]) : v;
}

// The same of four elements; of a norm times its weights, and `squares` gets their squares before.
template <u32 MAKE>
__device__ __forceinline__ void source_four(const Source& s, u32 c, u32 slot, u32 columns, u32 i, float v[4],
                                            float& squares) {
    if constexpr (MAKE == NORM || MAKE == SWIGLU || MAKE == PLAIN) {
        const float* row = s.a + static_cast<u64>(MAKE == NORM ? slot : c) * columns + i;
        const float4 a = *reinterpret_cast<const float4*>(row);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        if constexpr (MAKE == PLAIN) return;
        const float* other = s.b + i + (MAKE == NORM ? 0 : static_cast<u64>(c) * columns);
        const float4 b = *reinterpret_cast<const float4*>(other);
        const float w[4] = {b.x, b.y, b.z, b.w};
        for (u32 k = 0; k < 4; k++) {
            if constexpr (MAKE == NORM) squares = fmaf(v[k], v[k], squares);
            v[k] = MAKE == NORM ? v[k] * w[k] : swiglu(v[k], w[k]);
        }
    } else {
        if (MAKE == ATTENTION && s.head_dim % 4 == 0) return attended<4>(s, c, columns, i, v);
#pragma unroll 1
        for (u32 k = 0; k < 4; k++) {
            const float one = source_element<MAKE>(s, c, slot, columns, i + k);
            // By constants, so that they stay in registers.
            for (u32 j = 0; j < 4; j++) v[j] = j == k ? one : v[j];
        }
    }
}

#ifdef MOR_TENSOR_CORES
// Where a row is made ready, in shared memory or not: as `Prepared`, but one row; and of each run the squares
// of a norm.
struct Place {
    u16* halves;
    float* sums;
    float* scales;
    float* squares;
    u32 order;
};

// A lane's quads from element `start` on; zeros from `end` on. `largest` becomes the largest of all.
template <u32 MAKE, u32 SOME>
__device__ __forceinline__ void read_some(const Source& s, u32 c, u32 slot, u32 columns, u32 start, u32 end,
                                          float v[SOME][4], float& squares, float& largest) {
#pragma unroll
    for (u32 q = 0; q < SOME; q++) {
        const u32 i = start + q * 4 * WARP + 4 * lane_index();
        for (u32 k = 0; k < 4; k++) v[q][k] = 0;
        if (i < end) source_four<MAKE>(s, c, slot, columns, i, v[q], squares);
    }
#pragma unroll
    for (u32 q = 0; q < SOME; q++)
        for (u32 k = 0; k < 4; k++) largest = fmaxf(largest, fabsf(v[q][k]));
}

// Writes them as halves, and the sums of groups if they are wanted. All lanes of a warp come as often, for they add up
// the groups together: eight lanes one.
template <u32 SOME>
__device__ __forceinline__ void write_some(u32 start, u32 end, const float v[SOME][4], float inverse, bool sums,
                                           const Place& to) {
    // The lane's four columns in their group, which begins with lane 0, 8, …; and where the first two of them stand in
    // fragments (fragments.cuh): of a step, a lane has words t and t + 4.
    const u32 quad = lane_index() % (GROUP / 4);
    const u32 first = to.order == PLAIN_FRAGMENTS ? quad % 2 * 16 + quad / 2 * 2 : quad / 4 * 16 + quad % 4 * 2;
#pragma unroll
    for (u32 q = 0; q < SOME; q++) {
        if (start + q * 4 * WARP >= end) break;
        const u32 i = start + q * 4 * WARP + 4 * lane_index();
        const u32 low = pair_of_halves(v[q][0] * inverse, v[q][1] * inverse);
        const u32 high = pair_of_halves(v[q][2] * inverse, v[q][3] * inverse);
        if (i < end) {
            u16* four = to.halves + i - 4 * quad;
            if (to.order == BY_COLUMN)
                *reinterpret_cast<uint2*>(four + 4 * quad) = make_uint2(low, high);
            else
                *reinterpret_cast<u32*>(four + first) = low, *reinterpret_cast<u32*>(four + first + 8) = high;
        }
        if (!sums) continue;
        float sum = (half_to_float(low & 0xffff) + half_to_float(low >> 16)) +
                    (half_to_float(high & 0xffff) + half_to_float(high >> 16));
        for (u32 distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        if (i < end && i % GROUP == 0) to.sums[i / GROUP] = sum;
    }
}

// A warp makes a run of row `c`, whose slot is `slot`, ready; columns are whole groups. Other warps may look at
// it after a barrier.
template <u32 MAKE>
__device__ __forceinline__ void make_run(const Source& s, u32 c, u32 slot, u32 columns, u32 run, u32 columns_of_run,
                                         bool sums, const Place& to) {
    // Quads of a lane at once, so that it waits once for all of them; what takes many instructions one by one.
    constexpr u32 some = MAKE == GELU || MAKE == SCALED ? 1 : MAKE == ATTENTION ? 2 : MAKE == PLAIN ? 8 : 4,
                  step = some * 4 * WARP;
    const u32 begin = run * columns_of_run, end = begin + columns_of_run < columns ? begin + columns_of_run : columns;
    float squares = 0, largest = 0;
    const auto scale = [&] {
        if constexpr (MAKE == NORM) squares = warp_sum(squares);
        // Of numbers that are not negative the bits have the same order.
        u32 exponent = warp_most(__float_as_uint(largest)) >> 23;
        if (exponent < 27) exponent = 27;
        if (exponent == 255) exponent = 127 + 14;
        if (lane_index() == 0) {
            to.scales[run] = __uint_as_float((exponent - 14) << 23);
            if constexpr (MAKE == NORM) to.squares[run] = squares;
        }
        // 2^(14 - e), where 2^e is in the largest.
        return __uint_as_float((127 + 14 + 127 - exponent) << 23);
    };
    float v[some][4];
    if (columns_of_run <= step) {
        read_some<MAKE, some>(s, c, slot, columns, begin, end, v, squares, largest);
        write_some<some>(begin, end, v, scale(), sums, to);
        return;
    }
    // More than fits into registers is read twice.
#pragma unroll 1
    for (u32 start = begin; start < end; start += step)
        read_some<MAKE, some>(s, c, slot, columns, start, end, v, squares, largest);
    const float inverse = scale();
#pragma unroll 1
    for (u32 start = begin; start < end; start += step) {
        read_some<MAKE, some>(s, c, slot, columns, start, end, v, squares, largest);
        write_some<some>(start, end, v, inverse, sums, to);
    }
}

// What a row's products are multiplied by. RMSNorm (Zhang and Sennrich, 2019): y = x / sqrt(mean(x²) + ε) · w.
template <u32 MAKE>
__device__ __forceinline__ float factor_of(const Source& s, u32 columns, const float squares[RUNS]) {
    if constexpr (MAKE != NORM) return 1;
    float sum = 0;
    for (u32 r = 0; r < RUNS; r++) sum += squares[r];
    return inverse_root(__fdividef(sum, static_cast<float>(columns)) + s.number);
}

#endif

// Has the norm's weights brought near while a kernel waits for the one before.
__device__ __forceinline__ void prefetch_source(const Source& s, u32 columns) {
    // Floats that come together.
    constexpr u32 line = 32;
    for (u32 i = threadIdx.x * line; s.make == NORM && i < columns; i += blockDim.x * line) prefetch(s.b + i);
}

struct ReadyParams {
    View view;
    Source source;
    Prepared out;
    u32 columns_of_run;
    // Whether `sums` are wanted.
    u32 sums;
    // `Order`.
    u32 order;
    u32 unused;
};

#ifdef MOR_TENSOR_CORES
template <u32 MAKE>
__device__ __forceinline__ void ready(const ReadyParams& p) {
    let_next_begin();
    prefetch_source(p.source, p.out.columns);
    wait_for_previous();
    __shared__ float squares[RUNS];
    const u32 c = blockIdx.x, slot = p.view.slots[c];
    if (c >= *p.view.count) return;
    const Prepared& out = p.out;
    const u64 row = static_cast<u64>(c) * out.stride;
    const Place place = {out.halves + row, out.sums + row / GROUP, out.scales + c * RUNS, squares, p.order};
    make_run<MAKE>(p.source, c, slot, out.columns, warp_index(), p.columns_of_run, p.sums, place);
    if constexpr (MAKE == NORM) __syncthreads();
    if (threadIdx.x == 0) out.factors[c] = factor_of<MAKE>(p.source, out.columns, squares);
}

// Rows for tensor cores. A block a row.
MOR_WORK(mor_ready_norm, ReadyParams, (BLOCK), ready<NORM>)
MOR_WORK(mor_ready_scaled, ReadyParams, (BLOCK), ready<SCALED>)
MOR_WORK(mor_ready_gelu, ReadyParams, (BLOCK), ready<GELU>)
MOR_WORK(mor_ready_swiglu, ReadyParams, (BLOCK), ready<SWIGLU>)
MOR_WORK(mor_ready_plain, ReadyParams, (BLOCK), ready<PLAIN>)
MOR_WORK(mor_ready_attention, ReadyParams, (BLOCK), ready<ATTENTION>)
#endif

// Makes a row ready for single precision: `floats` [stride], of which thread i has elements i, i + BLOCK, …
// GELUS: GELU is among what may be asked for; it takes many registers.
template <bool GELUS>
__device__ __forceinline__ void make_floats(const Source& s, u32 c, u32 slot, u32 columns, u32 stride,
                                            float* floats) {
    __shared__ float room[WARPS];
    float squares = 0;
    for (u32 i = threadIdx.x; i < stride; i += BLOCK) {
        float v = 0;
#define MOR_ELEMENT(MAKE) \
    case MAKE: v = source_element<MAKE>(s, c, slot, columns, i); break;
        if (i < columns) switch (s.make) {
            MOR_ELEMENT(NORM) MOR_ELEMENT(SCALED) MOR_ELEMENT(SWIGLU) MOR_ELEMENT(PLAIN) MOR_ELEMENT(ATTENTION)
            default: if constexpr (GELUS) v = source_element<GELU>(s, c, slot, columns, i);
        }
#undef MOR_ELEMENT
        squares = fmaf(v, v, squares);
        floats[i] = v;
    }
    if (s.make != NORM) return;
    const float scale = 1.0f / sqrtf(block_sum(squares, room) / static_cast<float>(columns) + s.number);
    for (u32 i = threadIdx.x; i < columns; i += BLOCK) floats[i] = floats[i] * scale * s.b[i];
}

// Rows for single precision. A block a row.
__device__ __forceinline__ void make_floats(const ReadyParams& p) {
    let_next_begin();
    prefetch_source(p.source, p.out.columns);
    wait_for_previous();
    const u32 c = blockIdx.x, slot = p.view.slots[c];
    if (c >= *p.view.count) return;
    float* floats = p.out.floats + static_cast<u64>(c) * p.out.stride;
    make_floats<true>(p.source, c, slot, p.out.columns, p.out.stride, floats);
}
MOR_WORK(mor_floats, ReadyParams, (BLOCK), make_floats)

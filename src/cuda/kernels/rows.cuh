// Rows on their way: how they enter, and how they are made ready for matrix products.
#pragma once
#include "report.cuh"
#include "weights.cuh"

// A token on its way through the layers, by its slot. The host writes it when the token enters.
struct Row {
    u32 sequence;
    u32 position;
    u32 token;
    // The recursion that it stands before.
    u32 recursion;
    // The least score with which it goes on, and the most recursions that it takes.
    float least_score;
    u32 depth_limit;
    // Whether what follows it is wanted.
    u32 wants_logits;
    u32 unused;
};

// What the device knows of a row besides.
struct State {
    // Recursions that it ran or, as soon as that is decided, will run.
    u32 depth;
    // IN_RECURSIONS, LEFT or DONE.
    u32 stage;
    // Its entry in the planes of the recursion that runs.
    u32 entry;
    // What the block's result is multiplied by.
    float weight;
};

// Entries of a context that a block of attention looks at. Longer contexts are cut into such parts, always
// at the same places.
constexpr u32 PART = 256;

enum Stage : u32 { IN_RECURSIONS = 1, LEFT = 2, DONE = 3 };

// Some rows by their slots; how many there are is known on the device only.
struct View {
    const u32* slots;
    const u32* count;
};

// Activations ready for matrix products, [rows][stride] each, zero beyond their columns. The halves are
// the row divided by `scales[row]`, a power of two that brings its largest element near 2^14: none
// overflows, and elements keep their eleven bits down to 2^-28 of the largest. `sums` [rows]
// [stride / 32] adds up the halves of each group.
struct Prepared {
    float* floats;
    u16* halves;
    float* scales;
    float* sums;
    u32 columns;
    u32 stride;
};

// ---- Entering

// The head of what the host sends with a launch; `Row`s, slots and changes follow it.
struct Input {
    // Rows that enter, and rows that were in the recursions before.
    u32 entering;
    u32 flying;
    // Rows that have left the recursions and wait for others.
    u32 waiting;
    // Changes of the page tables.
    u32 changes;
    // Rows that are in no recursion and whose logits are wanted, all that this launch is for.
    u32 asked;
    // The paper's top-k over the whole text, not the threshold.
    u32 by_capacity;
    u32 unused[2];
};

// A page of a list: `tables[index] = page`.
struct Change {
    u32 index;
    u32 page;
};

enum Error : u32 { NO_ERROR = 0, SCORE_NOT_FINITE = 1, KEY_NOT_FINITE = 2, LOGIT_NOT_FINITE = 3 };

__device__ __forceinline__ void report_error(Report* report, u32 error, u32 slot) {
    if (atomicCAS(&report->error, 0u, error) == 0u) report->culprit = slot;
}

struct BeginParams {
    const Input* input;
    // [batch], with their slots.
    const Row* new_rows;
    const u32* new_slots;
    // [batch] slots of the rows in the recursions, and [slots] of those that wait.
    const u32* old_active;
    const u32* old_waiting;
    const Change* changes;
    u32* tables;
    Row* rows;
    State* states;
    u32* entering;
    u32* active;
    u32* waiting;
    u32* wanted;
    Report* report;
    // [sequences][context] tokens.
    u32* tokens;
    u32 context;
    u32 unused;
};

// Takes what the host sent. One block.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_begin(const BeginParams p) {
    enter();
    const Input in = *p.input;
    for (u32 i = threadIdx.x; i < in.changes; i += BLOCK) p.tables[p.changes[i].index] = p.changes[i].page;
    for (u32 i = threadIdx.x; i < in.flying; i += BLOCK) p.active[i] = p.old_active[i];
    for (u32 i = threadIdx.x; i < in.waiting; i += BLOCK) p.waiting[i] = p.old_waiting[i];
    for (u32 i = threadIdx.x; i < in.entering; i += BLOCK) {
        const Row row = p.new_rows[i];
        const u32 slot = p.new_slots[i];
        p.rows[slot] = row;
        p.states[slot] = State{0, IN_RECURSIONS, 0, 1.0f};
        p.entering[i] = slot;
        p.active[in.flying + i] = slot;
        p.tokens[static_cast<u64>(row.sequence) * p.context + row.position] = row.token;
    }
    for (u32 i = threadIdx.x; i < in.asked; i += BLOCK) p.wanted[i] = p.new_slots[i];
    if (threadIdx.x == 0) {
        Report r = {};
        r.flying = in.flying + in.entering;
        r.waiting = in.waiting;
        r.entering = in.entering;
        r.wanted = in.asked;
        *p.report = r;
    }
}
MOR_KERNEL(mor_begin)

struct EmbedParams {
    View view;
    const Row* rows;
    Matrix embedding;
    // [slots][hidden]
    float* h;
    // [slots][pairs] cosine and sine.
    float2* rope;
    // [pairs] divisors of the frequencies, or null.
    const float* factors;
    double base;
    double scale;
    u32 pairs;
    u32 unused;
};

template <u32 TYPE>
__device__ __forceinline__ void embed_row(const Matrix& m, u32 token, float* h) {
    const u32 groups = (m.columns + GROUP - 1) / GROUP;
    for (u32 i = threadIdx.x; i < groups * 4; i += BLOCK) {
        float w[8];
        decode<TYPE>(m, token, i / 4, i % 4, w);
        for (u32 j = 0; j < 8; j++) {
            u32 column = column_of(i / 4, i % 4, j);
            if (column < m.columns) h[column] = w[j];
        }
    }
}

// Token embeddings and rotary angles. A block a row.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_embed(const EmbedParams p) {
    enter();
    if (blockIdx.x >= *p.view.count) return;
    const u32 slot = p.view.slots[blockIdx.x];
    const Row row = p.rows[slot];
    float* h = p.h + static_cast<u64>(slot) * p.embedding.columns;
#define MOR_EMBED(TYPE) embed_row<TYPE>(p.embedding, row.token, h)
    MOR_FOR_TYPE(p.embedding.type, MOR_EMBED)
#undef MOR_EMBED
    // In double precision, as src/cpu/ops.rs.
    for (u32 i = threadIdx.x; i < p.pairs; i += BLOCK) {
        double exponent = 2.0 * i / (2.0 * p.pairs);
        double factor = p.factors ? p.factors[i] : 1.0;
        double angle = row.position / p.scale / pow(p.base, exponent) / factor;
        p.rope[static_cast<u64>(slot) * p.pairs + i] =
            make_float2(static_cast<float>(cos(angle)), static_cast<float>(sin(angle)));
    }
}
MOR_KERNEL(mor_embed)

struct CopyRowsParams {
    View view;
    const float* from;
    float* to;
    u32 width;
    u32 unused;
};

// Rows by slot from one buffer to another. A block a row.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_copy_rows(const CopyRowsParams p) {
    enter();
    if (blockIdx.x >= *p.view.count) return;
    const u64 start = static_cast<u64>(p.view.slots[blockIdx.x]) * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += BLOCK) p.to[start + i] = p.from[start + i];
}
MOR_KERNEL(mor_copy_rows)

// ---- Making rows ready for products

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
    // ATTENTION
    u32 head_dim;
    u32 parts;
};

// Where a row is made ready, in shared memory or not: as `Prepared`, but one row.
struct Place {
    float* floats;
    u16* halves;
    float* sums;
};

// SwiGLU (Shazeer, 2020) of a gate and what it lets through.
__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// Four elements of a row from the `i`th on, zero beyond its end.
__device__ __forceinline__ void read_four(const float* row, u32 i, u32 columns, float out[4]) {
    if (columns % 4 == 0 && i < columns) {
        const float4 four = *reinterpret_cast<const float4*>(row + i);
        out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
        return;
    }
    for (u32 k = 0; k < 4; k++) out[k] = i + k < columns ? row[i + k] : 0;
}

// Puts the parts of a context together: element `i` of all heads of row `c`.
__device__ __forceinline__ float attended(const Source& s, u32 c, u32 columns, u32 i) {
    const u64 head = static_cast<u64>(c) * (columns / s.head_dim) + i / s.head_dim;
    const float2* scales = s.part_scales + head * s.parts;
    const float* partial = s.a + head * s.parts * s.head_dim + i % s.head_dim;
    const u32 parts = (s.visible[c] + PART - 1) / PART;
    // As below, where the one weight is 1.
    if (parts == 1) return *partial / scales->y;
    float max = scales[0].x;
    for (u32 k = 1; k < parts; k++) max = fmaxf(max, scales[k].x);
    float sum = 0, total = 0;
    for (u32 k = 0; k < parts; k++) {
        const float weight = expf(scales[k].x - max);
        sum = fmaf(weight, partial[static_cast<u64>(k) * s.head_dim], sum);
        total = fmaf(weight, scales[k].y, total);
    }
    return sum / total;
}

// GELUS: GELU is among what may be asked for; it takes many registers.
template <bool GELUS>
__device__ __forceinline__ void source_four(const Source& s, u32 c, u32 slot, u32 columns, u32 i,
                                            float v[4]) {
    if (s.make == ATTENTION) {
        for (u32 k = 0; k < 4; k++) v[k] = i + k < columns ? attended(s, c, columns, i + k) : 0;
        return;
    }
    const u64 row = static_cast<u64>(s.make == NORM || s.make == SCALED ? slot : c) * columns;
    read_four(s.a + row, i, columns, v);
    if (s.make == SCALED) {
        for (u32 k = 0; k < 4; k++) v[k] /= s.number;
    } else if (s.make == SWIGLU) {
        float up[4];
        read_four(s.b + row, i, columns, up);
        for (u32 k = 0; k < 4; k++) v[k] = swiglu(v[k], up[k]);
    }
    if constexpr (GELUS) {
        // The exact form: x Φ(x) (Hendrycks and Gimpel, 2016).
        if (s.make == GELU)
            for (u32 k = 0; k < 4; k++)
                v[k] = static_cast<float>(0.5 * v[k] * (1.0 + erf(v[k] / 1.4142135623730951)));
    }
}

// Makes row `c`, whose slot is `slot`, ready, and returns its scale. A thread takes the quads of elements
// thread, thread + BLOCK, … throughout; others may look after a barrier.
template <bool GELUS>
__device__ __forceinline__ float make_row(const Source& s, u32 c, u32 slot, u32 columns, u32 stride,
                                          const Place& to) {
    __shared__ float squares_room[WARPS], largest_room[WARPS];
    float squares = 0, largest = 0;
    // Some quads at once, so that a thread waits once for all of them.
    constexpr u32 some = 2;
    for (u32 start = 4 * threadIdx.x; start < stride; start += some * 4 * BLOCK) {
        float v[some][4];
#pragma unroll
        for (u32 q = 0; q < some; q++) {
            const u32 i = start + q * 4 * BLOCK;
            if (i < stride) source_four<GELUS>(s, c, slot, columns, i, v[q]);
        }
#pragma unroll
        for (u32 q = 0; q < some; q++) {
            const u32 i = start + q * 4 * BLOCK;
            if (i >= stride) continue;
            for (u32 k = 0; k < 4; k++) {
                squares = fmaf(v[q][k], v[q][k], squares);
                largest = fmaxf(largest, fabsf(v[q][k]));
            }
            *reinterpret_cast<float4*>(to.floats + i) = make_float4(v[q][0], v[q][1], v[q][2], v[q][3]);
        }
    }
    if (s.make == NORM) {
        // RMSNorm (Zhang and Sennrich, 2019): y = x / sqrt(mean(x²) + ε) · w.
        const float mean = block_sum(squares, squares_room) / static_cast<float>(columns);
        const float scale = 1.0f / sqrtf(mean + s.number);
        largest = 0;
        for (u32 i = 4 * threadIdx.x; i < stride; i += 4 * BLOCK) {
            float v[4], w[4];
            read_four(to.floats, i, stride, v);
            read_four(s.b, i, columns, w);
            for (u32 k = 0; k < 4; k++) {
                v[k] = v[k] * scale * w[k];
                largest = fmaxf(largest, fabsf(v[k]));
            }
            *reinterpret_cast<float4*>(to.floats + i) = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
    largest = block_max(largest, largest_room);
    int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 255) - 127;
    if (exponent < -100) exponent = -100;
    if (!is_finite(largest)) exponent = 14;
    const float inverse = __uint_as_float(static_cast<u32>(14 - exponent + 127) << 23);
    // All lanes of a warp come as often, for they add up the groups together: eight lanes one.
    for (u32 start = 0; start < stride; start += 4 * BLOCK) {
        const u32 i = start + 4 * threadIdx.x;
        float v[4] = {0, 0, 0, 0};
        if (i < stride) read_four(to.floats, i, stride, v);
        const u32 low = pair_of_halves(v[0] * inverse, v[1] * inverse);
        const u32 high = pair_of_halves(v[2] * inverse, v[3] * inverse);
        float sum = (half_to_float(low & 0xffff) + half_to_float(low >> 16)) +
                    (half_to_float(high & 0xffff) + half_to_float(high >> 16));
        for (u32 distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        if (i >= stride) continue;
        *reinterpret_cast<uint2*>(to.halves + i) = make_uint2(low, high);
        if (i % GROUP == 0) to.sums[i / GROUP] = sum;
    }
    return __uint_as_float(static_cast<u32>(exponent - 14 + 127) << 23);
}

// Has the norm's weights brought near while a kernel waits for the one before.
__device__ __forceinline__ void prefetch_source(const Source& s, u32 columns) {
    // Floats that come together.
    constexpr u32 line = 32;
    if (s.make == NORM && threadIdx.x * line < columns) prefetch(s.b + threadIdx.x * line);
}

struct ReadyParams {
    View view;
    Source source;
    Prepared out;
    // The floats are wanted in `out`; else they are kept in shared memory, [stride].
    u32 floats;
    u32 unused;
};

// A block a row.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_ready(const ReadyParams p) {
    let_next_begin();
    prefetch_source(p.source, p.out.columns);
    wait_for_previous();
    MOR_DYNAMIC_SHARED(float, row_room);
    const u32 c = blockIdx.x, slot = p.view.slots[c];
    if (c >= *p.view.count) return;
    const Prepared& out = p.out;
    const u64 row = static_cast<u64>(c) * out.stride;
    const Place place = {p.floats ? out.floats + row : row_room, out.halves + row, out.sums + row / GROUP};
    const float scale = make_row<true>(p.source, c, slot, out.columns, out.stride, place);
    if (threadIdx.x == 0) out.scales[c] = scale;
}
MOR_KERNEL(mor_ready)

// Rows on their way, and how they enter.
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
    // A row that is put aside before others take its slot: out of which slot, into which. The same: none.
    u32 aside_from;
    u32 aside_to;
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
    // [slots][width] residual streams.
    float* x;
    u32 context;
    u32 width;
};

// Takes what the host sent. One block.
__device__ __forceinline__ void take_input(const BeginParams& p) {
    enter();
    const Input in = *p.input;
    if (in.aside_from != in.aside_to) {
        const float* from = p.x + static_cast<u64>(in.aside_from) * p.width;
        float* to = p.x + static_cast<u64>(in.aside_to) * p.width;
        for (u32 i = threadIdx.x; i < p.width; i += BLOCK) to[i] = from[i];
        if (threadIdx.x == 0) p.rows[in.aside_to] = p.rows[in.aside_from];
        __syncthreads();
    }
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
MOR_WORK(mor_begin, BeginParams, (BLOCK), take_input)

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
__device__ __forceinline__ void embed(const EmbedParams& p) {
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
MOR_WORK(mor_embed, EmbedParams, (BLOCK), embed)

struct CopyRowsParams {
    View view;
    const float* from;
    float* to;
    u32 width;
    u32 unused;
};

// Rows by slot from one buffer to another. A block a row.
__device__ __forceinline__ void copy_rows(const CopyRowsParams& p) {
    enter();
    if (blockIdx.x >= *p.view.count) return;
    const u64 start = static_cast<u64>(p.view.slots[blockIdx.x]) * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += BLOCK) p.to[start + i] = p.from[start + i];
}
MOR_WORK(mor_copy_rows, CopyRowsParams, (BLOCK), copy_rows)

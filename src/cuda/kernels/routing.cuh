// Who goes on: as src/cpu/forward.rs and src/routing.rs, for rows that stay in their slots.
#pragma once
#include "attention.cuh"

enum RouterKind : u32 { NO_ROUTER = 0, EXPERT_CHOICE = 1, TOKEN_CHOICE = 2 };
enum RouterFunction : u32 { SIGMOID = 0, TANH = 1, SOFTMAX = 2, IDENTITY = 3 };

// A prefix sum of flags over a block: the number of threads before this one whose flag is set, and in
// `total` that of all. `room` [WARPS + 1] is free again after the next barrier.
__device__ __forceinline__ u32 block_rank(bool flag, u32* room, u32* total) {
    const u32 votes = __ballot_sync(ALL_LANES, flag);
    if (lane_index() == 0) room[warp_index()] = __popc(votes);
    __syncthreads();
    u32 before = 0, sum = 0;
    for (u32 w = 0; w < WARPS; w++) {
        if (w == warp_index()) before = sum;
        sum += room[w];
    }
    *total = sum;
    return before + __popc(votes & ((1u << lane_index()) - 1));
}

// Shows each thread what `load` has of each of `count` rows, a block of them at a time through `room` [BLOCK]: by
// itself a thread would wait for memory twice a row.
template <class Load, class See>
__device__ __forceinline__ void see_all(u32 count, uint4* room, Load load, See see) {
    for (u32 start = 0; start < count; start += BLOCK) {
        const u32 here = count - start < BLOCK ? count - start : BLOCK;
        if (threadIdx.x < here) room[threadIdx.x] = load(start + threadIdx.x);
        __syncthreads();
        for (u32 j = 0; j < here; j++) see(room[j]);
        __syncthreads();
    }
}

// ---- Places in the cache

struct SeatsParams {
    const u32* active;
    const Row* rows;
    State* states;
    // [sequences][recursions] entries before this pass.
    const u32* kept;
    // The rows of this recursion, for the layers that follow.
    u32* running;
    Report* report;
    u32 recursions;
    // The recursion whose rows run, or ANY for all, each at its own.
    u32 recursion;
    // Models without a router: every row runs this recursion, unless its limit is lower.
    u32 routed;
    u32 unused;
};

// Gives the rows that run their entries: those of a sequence at a recursion side by side, in the order
// of their positions. One block.
__device__ __forceinline__ void give_seats(const SeatsParams& p) {
    enter();
    __shared__ u32 room[WARPS + 1];
    __shared__ uint4 others[BLOCK];
    const u32 flying = p.report->flying;
    u32 running = 0;
    for (u32 start = 0; start < flying; start += BLOCK) {
        const u32 i = start + threadIdx.x;
        const u32 slot = i < flying ? p.active[i] : 0;
        const Row row = p.rows[slot];
        const u32 r = p.routed ? row.recursion : p.recursion;
        u32 before = 0;
        see_all(
            flying, others,
            [&](u32 j) {
                const Row other = p.rows[p.active[j]];
                return make_uint4(other.sequence, other.position, other.recursion, 0);
            },
            [&](uint4 other) {
                before += other.x == row.sequence && other.y < row.position && (!p.routed || other.z == r);
            });
        bool runs = false;
        if (i < flying) {
            runs = p.routed ? p.recursion == ANY || p.recursion == r : r < row.depth_limit;
            p.states[slot].entry = p.kept[row.sequence * p.recursions + r] + before;
        }
        u32 total;
        const u32 rank = block_rank(runs, room, &total);
        if (runs) p.running[running + rank] = slot;
        running += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) p.report->running = running;
}
MOR_WORK(mor_seats, SeatsParams, (BLOCK), give_seats)

// ---- Decisions

struct ScoreParams {
    View view;
    const Row* rows;
    // [slots][width]
    const float* h;
    // [slots]
    float* scores;
    // Of each recursion before which a row may stand its router's weights [width], or null.
    const float* weights[MAX_RECURSIONS];
    u32 width;
    // Divides what goes into the router.
    float temperature;
};

// Expert-choice, routers of one layer: each row by that of the recursion before which it stands. A block a row.
__device__ __forceinline__ void score(const ScoreParams& p) {
    enter();
    __shared__ float room[WARPS];
    if (blockIdx.x >= *p.view.count) return;
    const u32 slot = p.view.slots[blockIdx.x], recursion = p.rows[slot].recursion;
    const float* weights = recursion < MAX_RECURSIONS ? p.weights[recursion] : nullptr;
    if (!weights) return;
    const float* h = p.h + static_cast<u64>(slot) * p.width;
    float sum = 0;
    for (u32 i = threadIdx.x; i < p.width; i += BLOCK) sum = fmaf(h[i] / p.temperature, weights[i], sum);
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) p.scores[slot] = sum;
}
MOR_WORK(mor_score, ScoreParams, (BLOCK), score)

struct SelectParams {
    const u32* active;
    const Row* rows;
    u32* selected;
    // Place of the number of those that were selected.
    u32* count;
    Report* report;
    u32 recursion;
    u32 unused;
};

// The rows that stand before one recursion, in their order. One block.
__device__ __forceinline__ void select_rows(const SelectParams& p) {
    enter();
    __shared__ u32 room[WARPS + 1];
    const u32 flying = p.report->flying;
    u32 selected = 0;
    for (u32 start = 0; start < flying; start += BLOCK) {
        const u32 i = start + threadIdx.x;
        const u32 slot = i < flying ? p.active[i] : 0;
        const bool here = i < flying && p.rows[slot].recursion == p.recursion;
        u32 total;
        const u32 rank = block_rank(here, room, &total);
        if (here) p.selected[selected + rank] = slot;
        selected += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) *p.count = selected;
}
MOR_WORK(mor_select, SelectParams, (BLOCK), select_rows)

struct DecideParams {
    // Rows that are asked: those that entered, or all in the recursions.
    View view;
    u32* active;
    u32* waiting;
    // [batch] flags.
    u32* flags;
    // The pass's input, for the rows of a text in capacity mode.
    const Input* input;
    Row* rows;
    State* states;
    // [slots][outputs]; and what decides instead, or null.
    const float* scores;
    const float* deciding_scores;
    // Token-choice, loss-free balancing: [outputs] added when picking, or null.
    const float* pick_bias;
    Report* report;
    double capacity;
    u32 kind;
    u32 function;
    float alpha;
    u32 weighted;
    u32 outputs;
    // Token-choice: whether the depths are still to be chosen.
    u32 choose;
    // Recursion 0 gives every token its keys (shared KV).
    u32 keys_for_all;
};

__device__ __forceinline__ float weight_of(const DecideParams& p, float score) {
    if (p.function == IDENTITY) return score;
    return p.alpha * (p.function == TANH ? tanhf(score) : 1.0f / (1.0f + expf(-score)));
}

// Token-choice: the depth that a row takes, and its weight.
__device__ __forceinline__ void choose_depth(const DecideParams& p, const float* scores, u32 limit, State* state) {
    float weights[MAX_RECURSIONS];
    if (p.function == SOFTMAX) {
        float max = LEAST, sum = 0;
        for (u32 o = 0; o < p.outputs; o++) max = fmaxf(max, scores[o]);
        for (u32 o = 0; o < p.outputs; o++) sum += weights[o] = expf(scores[o] - max);
        for (u32 o = 0; o < p.outputs; o++) weights[o] = weights[o] / sum * p.alpha;
    } else {
        for (u32 o = 0; o < p.outputs; o++) weights[o] = weight_of(p, scores[o]);
    }
    u32 best = 0;
    float most = LEAST;
    for (u32 o = 0; o < limit; o++) {
        const float value = weights[o] + (p.pick_bias ? p.pick_bias[o] : 0.0f);
        if (value > most) {
            most = value;
            best = o;
        }
    }
    state->depth = best + 1;
    state->weight = p.weighted ? weights[best] : 1.0f;
}

// Expert-choice: whether the row at place `c` has one of the best scores, of equals the earlier.
__device__ __forceinline__ bool is_among_best(const DecideParams& p, u32 c, u32 candidates, const u32* eligible) {
    // The text came in one pass.
    u32 count = static_cast<u32>(p.capacity * p.input->entering);
    if (count < 1) count = 1;
    const float sign = p.function != IDENTITY && p.alpha < 0 ? -1.0f : 1.0f;
    const float own = p.scores[p.view.slots[c]] * sign;
    u32 better = 0;
    for (u32 j = 0; j < candidates; j++) {
        if (!(eligible[j] & 1)) continue;
        const float other = p.scores[p.view.slots[j]] * sign;
        better += other > own || (other == own && j < c);
    }
    return better < count;
}

// Rows that go on stay in `active`, in their order; the others leave. One block.
__device__ __forceinline__ void decide(const DecideParams& p) {
    enter();
    __shared__ u32 room[WARPS + 1];
    const u32 n = *p.view.count, flying = p.report->flying;
    // Rows before those that are asked stay where they are.
    const u32 first = flying - n;
    u32* goes = p.flags;
    for (u32 c = threadIdx.x; c < n; c += BLOCK) {
        const u32 slot = p.view.slots[c];
        const Row row = p.rows[slot];
        const u32 r = row.recursion;
        bool eligible;
        if (p.kind == TOKEN_CHOICE) {
            if (p.choose) {
                const float* scores = p.scores + static_cast<u64>(slot) * p.outputs;
                for (u32 o = 0; o < p.outputs; o++)
                    if (!is_finite(scores[o])) report_error(p.report, SCORE_NOT_FINITE, slot);
                choose_depth(p, scores, row.depth_limit, &p.states[slot]);
            }
            eligible = p.states[slot].depth > r;
        } else {
            // A row that was not kept before was only along for its keys.
            eligible = r < row.depth_limit && r == p.states[slot].depth;
        }
        goes[c] = eligible;
    }
    __syncthreads();
    if (p.kind == EXPERT_CHOICE) {
        // Whose scores pass, apart from who was asked, since the best are sought among those.
        for (u32 start = 0; start < n; start += BLOCK) {
            const u32 c = start + threadIdx.x;
            u32 outcome = 0;
            if (c < n && (goes[c] & 1)) {
                const u32 slot = p.view.slots[c];
                const Row row = p.rows[slot];
                const float score = p.scores[slot];
                const float deciding = p.deciding_scores ? p.deciding_scores[slot] : score;
                if (!is_finite(score) || !is_finite(deciding)) report_error(p.report, SCORE_NOT_FINITE, slot);
                const bool kept = p.input->by_capacity ? is_among_best(p, c, n, goes) : deciding >= row.least_score;
                if (kept) {
                    p.states[slot].depth = row.recursion + 1;
                    p.states[slot].weight = p.weighted ? weight_of(p, score) : 1.0f;
                }
                outcome = kept || (p.keys_for_all && row.recursion == 0);
            }
            // Bit 1: what follows. Bit 0 is still needed by others.
            if (c < n) atomicOr(&goes[c], outcome << 1);
        }
        __syncthreads();
        for (u32 c = threadIdx.x; c < n; c += BLOCK) goes[c] >>= 1;
        __syncthreads();
    }
    u32 staying = 0, waiting = p.report->waiting;
    for (u32 start = 0; start < n; start += BLOCK) {
        const u32 c = start + threadIdx.x;
        const bool inside = c < n;
        const u32 slot = inside ? p.view.slots[c] : 0;
        const bool stays = inside && goes[c];
        u32 total;
        // The list and the view may be the same: all read before any writes, for what is written lies
        // before what is read later.
        const u32 rank = block_rank(stays, room, &total);
        __syncthreads();
        if (stays) p.active[first + staying + rank] = slot;
        const u32 here = n - start < BLOCK ? n - start : BLOCK;
        if (inside && !stays) {
            p.waiting[waiting + threadIdx.x - rank] = slot;
            p.states[slot].stage = LEFT;
        }
        staying += total;
        waiting += here - total;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        p.report->flying = first + staying;
        p.report->waiting = waiting;
    }
}
MOR_WORK(mor_decide, DecideParams, (BLOCK), decide)

struct MergeParams {
    View view;
    Row* rows;
    const State* states;
    // [slots][hidden] the residual stream, and the block's result.
    float* x;
    float* h;
    u32 width;
    // The block goes on from the new residual stream (expert-choice).
    u32 follow;
};

// Adds the block's weighted result to the residual stream of the rows for which it counts. All stand
// before the next recursion then. A block a row.
__device__ __forceinline__ void merge(const MergeParams& p) {
    enter();
    if (blockIdx.x >= *p.view.count) return;
    const u32 slot = p.view.slots[blockIdx.x];
    const State state = p.states[slot];
    const bool counts = state.depth == p.rows[slot].recursion + 1;
    __syncthreads();
    if (threadIdx.x == 0) p.rows[slot].recursion++;
    if (!counts) return;
    float* x = p.x + static_cast<u64>(slot) * p.width;
    float* h = p.h + static_cast<u64>(slot) * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += BLOCK) {
        x[i] += state.weight * h[i];
        if (p.follow) h[i] = x[i];
    }
}
MOR_WORK(mor_merge, MergeParams, (BLOCK), merge)

// ---- Leaving

struct LeaveParams {
    const u32* active;
    u32* waiting;
    // [slots] scratch.
    u32* flags;
    // Rows whose own last layers run now, and of those the rows whose logits are wanted; by sequence and
    // position.
    u32* ready;
    u32* wanted;
    const Row* rows;
    State* states;
    Report* report;
    // Models without a router: recursions that were run, as far as each row's limit allows.
    u32 recursions;
    u32 routed;
    // Most rows that may be ready; the others wait on.
    u32 most;
    u32 unused;
};

// `a`: a sequence and a position.
__device__ __forceinline__ bool comes_before(uint4 a, const Row& b) {
    return a.x < b.sequence || (a.x == b.sequence && a.y < b.position);
}

// Of the rows that have left the recursions those may go on to whose sequence nobody before them is
// still on the way; own last layers attend to all tokens before. One block.
__device__ __forceinline__ void leave(const LeaveParams& p) {
    enter();
    __shared__ u32 room[WARPS + 1];
    __shared__ uint4 others[BLOCK];
    const u32 before = p.report->waiting;
    const u32 flying = p.routed ? p.report->flying : 0;
    const u32 left = before + (p.routed ? 0 : p.report->flying);
    for (u32 i = before + threadIdx.x; i < left; i += BLOCK) {
        const u32 slot = p.active[i - before];
        const u32 limit = p.rows[slot].depth_limit;
        p.states[slot].depth = limit < p.recursions ? limit : p.recursions;
        p.waiting[i] = slot;
    }
    __syncthreads();
    for (u32 start = 0; start < left; start += BLOCK) {
        const u32 i = start + threadIdx.x;
        const Row row = p.rows[i < left ? p.waiting[i] : 0];
        bool goes = true;
        see_all(
            flying, others,
            [&](u32 j) {
                const Row other = p.rows[p.active[j]];
                return make_uint4(other.sequence, other.position, 0, 0);
            },
            [&](uint4 other) { goes = goes && !(other.x == row.sequence && other.y < row.position); });
        if (i < left) p.flags[i] = goes;
    }
    __syncthreads();
    u32 ready = 0, wanted = 0, waits = 0;
    for (u32 start = 0; start < left; start += BLOCK) {
        const u32 i = start + threadIdx.x;
        const u32 slot = i < left ? p.waiting[i] : 0;
        const Row row = p.rows[slot];
        bool goes = i < left && p.flags[i];
        bool wants = goes && row.wants_logits;
        u32 rank = 0, wanted_rank = 0;
        see_all(
            left, others,
            [&](u32 j) {
                // The list may have been packed up to `start`; those before have been counted there.
                const Row other = p.rows[j < start ? p.flags[j] >> 1 : p.waiting[j]];
                return make_uint4(other.sequence, other.position, p.flags[j] != 0, other.wants_logits);
            },
            [&](uint4 other) {
                const bool before = other.z && comes_before(other, row);
                rank += before;
                wanted_rank += before && other.w;
            });
        goes = goes && rank < p.most;
        wants = wants && goes;
        __syncthreads();
        // A packed place forgets its row; the flag keeps it.
        if (i < left && p.flags[i]) p.flags[i] = slot << 1 | 1;
        if (goes) {
            p.ready[rank] = slot;
            p.states[slot].stage = DONE;
            if (wants) p.wanted[wanted_rank] = slot;
        }
        u32 total;
        const u32 waiting_rank = block_rank(i < left && !goes, room, &total);
        if (i < left && !goes) {
            p.waiting[waits + waiting_rank] = slot;
            p.states[slot].stage = LEFT;
        }
        waits += total;
        __syncthreads();
        block_rank(goes, room, &total);
        ready += total;
        __syncthreads();
        block_rank(wants, room, &total);
        wanted += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        p.report->flying = flying;
        p.report->waiting = waits;
        p.report->ready = ready;
        p.report->wanted = wanted;
    }
}
MOR_WORK(mor_leave, LeaveParams, (BLOCK), leave)

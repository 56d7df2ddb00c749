// From logits to one token, as src/sampling.rs: the same candidates in the same order, the same sums in
// double precision, so that equal logits give equal tokens.
#pragma once
#include "rows.cuh"

// Most candidates that are drawn from here; with more, or without a limit, the host draws.
constexpr u32 MAX_CANDIDATES = 256;

// How the token after a row is drawn.
struct Draw {
    // The place of its random number in [0, 1).
    double random;
    float repeat_penalty;
    u32 repeat_last_n;
    // 0: the host draws.
    u32 candidates;
    float top_p;
    float min_p;
    float temperature;
};

struct SampleParams {
    View view;
    const Row* rows;
    // [sequences]
    const Draw* draws;
    // [rows][vocab]
    const float* logits;
    // [rows][vocab] scratch, for penalties.
    float* penalized;
    // [sequences][context]
    const u32* tokens;
    // By slot.
    u32* drawn;
    Report* report;
    u32 vocab;
    u32 context;
};

// Greater for greater numbers.
__device__ __forceinline__ u32 key_of(float value) {
    const u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Calls each thread's part of `logits`.
#define MOR_FOR_LOGITS(i, vocab) for (u32 i = threadIdx.x; i < (vocab); i += BLOCK)

// The key of the `count`-th greatest, and how many are greater.
__device__ __forceinline__ u32 nth_key(const float* logits, u32 vocab, u32 count, u32* greater) {
    __shared__ u32 histogram[256];
    __shared__ u32 found[2];
    u32 prefix = 0, above = 0;
    for (u32 shift = 24;; shift -= 8) {
        histogram[threadIdx.x] = 0;
        __syncthreads();
        MOR_FOR_LOGITS(i, vocab) {
            const u32 key = key_of(logits[i]);
            if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 sum = above, digit = 255;
            while (sum + histogram[digit] < count) sum += histogram[digit--];
            found[0] = digit;
            found[1] = sum;
        }
        __syncthreads();
        prefix = prefix << 8 | found[0];
        above = found[1];
        if (shift == 0) break;
    }
    *greater = above;
    return prefix;
}

// A block a row.
extern "C" __global__ void __launch_bounds__(BLOCK) mor_sample(const SampleParams p) {
    enter();
    static_assert(MAX_CANDIDATES == BLOCK, "a thread a candidate");
    const u32 c = blockIdx.x;
    if (c >= *p.view.count) return;
    __shared__ u32 collected;
    __shared__ u32 tokens[MAX_CANDIDATES], ordered[MAX_CANDIDATES];
    __shared__ float values[MAX_CANDIDATES];
    __shared__ float sorted[MAX_CANDIDATES];
    __shared__ double weights[MAX_CANDIDATES], tempered[MAX_CANDIDATES];
    __shared__ u32 room[WARPS];
    const u32 slot = p.view.slots[c];
    const Row row = p.rows[slot];
    const float* logits = p.logits + static_cast<u64>(c) * p.vocab;
    bool bad = false;
    MOR_FOR_LOGITS(i, p.vocab) bad |= !is_finite(logits[i]);
    if (__syncthreads_or(bad)) {
        if (threadIdx.x == 0) report_error(p.report, LOGIT_NOT_FINITE, slot);
        return;
    }
    const Draw draw = p.draws[row.sequence];
    if (draw.candidates == 0) return;
    if (draw.repeat_penalty != 1.0f) {
        float* penalized = p.penalized + static_cast<u64>(c) * p.vocab;
        MOR_FOR_LOGITS(i, p.vocab) penalized[i] = logits[i];
        __syncthreads();
        const u32 known = row.position + 1, last = known < draw.repeat_last_n ? known : draw.repeat_last_n;
        const u32* recent = p.tokens + static_cast<u64>(row.sequence) * p.context + known - last;
        // A token that came twice is written twice with the same value.
        for (u32 i = threadIdx.x; i < last; i += BLOCK) {
            const float logit = logits[recent[i]];
            penalized[recent[i]] = logit * (logit > 0 ? 1.0f / draw.repeat_penalty : draw.repeat_penalty);
        }
        __syncthreads();
        logits = penalized;
    }
    const u32 count = draw.candidates < p.vocab ? draw.candidates : p.vocab;
    u32 greater;
    const u32 least = nth_key(logits, p.vocab, count, &greater);
    if (threadIdx.x == 0) collected = 0;
    __syncthreads();
    MOR_FOR_LOGITS(i, p.vocab)
        if (key_of(logits[i]) > least) {
            const u32 at = atomicAdd(&collected, 1u);
            tokens[at] = i;
            values[at] = logits[i];
        }
    __syncthreads();
    // Of those that equal the last the earliest.
    u32 taken = greater;
    for (u32 start = 0; start < p.vocab && taken < count; start += BLOCK) {
        const u32 i = start + threadIdx.x;
        const bool equal = i < p.vocab && key_of(logits[i]) == least;
        const u32 votes = __ballot_sync(ALL_LANES, equal);
        if (lane_index() == 0) room[warp_index()] = __popc(votes);
        __syncthreads();
        u32 at = taken, total = 0;
        for (u32 w = 0; w < WARPS; w++) {
            if (w == warp_index()) at += total;
            total += room[w];
        }
        at += __popc(votes & ((1u << lane_index()) - 1));
        if (equal && at < count) {
            tokens[at] = i;
            values[at] = logits[i];
        }
        taken += total;
        __syncthreads();
    }
    if (threadIdx.x < count) {
        const u32 token = tokens[threadIdx.x];
        const u32 key = key_of(values[threadIdx.x]);
        u32 rank = 0;
        for (u32 j = 0; j < count; j++) {
            const u32 other = key_of(values[j]);
            rank += other > key || (other == key && tokens[j] < token);
        }
        ordered[rank] = token;
        sorted[rank] = values[threadIdx.x];
    }
    __syncthreads();
    if (draw.temperature == 0.0f) {
        if (threadIdx.x == 0) p.drawn[slot] = ordered[0];
        return;
    }
    if (threadIdx.x < count) {
        const float below = sorted[threadIdx.x] - sorted[0];
        weights[threadIdx.x] = exp(static_cast<double>(below));
        tempered[threadIdx.x] = exp(static_cast<double>(below / draw.temperature));
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    u32 left = count;
    if (draw.top_p < 1.0f) {
        double total = 0, sum = 0;
        for (u32 j = 0; j < count; j++) total += weights[j];
        const double enough = total * static_cast<double>(draw.top_p);
        for (u32 j = 0; j < count; j++) {
            sum += weights[j];
            if (sum >= enough) {
                left = j + 1;
                break;
            }
        }
    }
    if (draw.min_p > 0.0f) {
        u32 likely = 0;
        while (likely < count && weights[likely] >= static_cast<double>(draw.min_p)) likely++;
        if (likely < left) left = likely;
    }
    if (left < 1) left = 1;
    double total = 0;
    for (u32 j = 0; j < left; j++) total += tempered[j];
    double rest = draw.random * total;
    u32 token = ordered[left - 1];
    for (u32 j = 0; j < left; j++) {
        rest -= tempered[j];
        if (rest < 0) {
            token = ordered[j];
            break;
        }
    }
    p.drawn[slot] = token;
}
MOR_KERNEL(mor_sample)

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

// Tokens of which a block of `mor_candidates` finds the best.
constexpr u32 CHUNK = 1024;

__device__ __forceinline__ u32 chunks_of(u32 vocab) { return (vocab + CHUNK - 1) / CHUNK; }

struct CandidatesParams {
    View view;
    const Row* rows;
    // [sequences]
    const Draw* draws;
    // [rows][vocab]
    const float* logits;
    // [rows][chunks · MAX_CANDIDATES], of which the first are written: the best of each chunk.
    u64* candidates;
    // [sequences][context]
    const u32* tokens;
    Report* report;
    u32 vocab;
    u32 context;
};

struct SampleParams {
    View view;
    const Row* rows;
    const Draw* draws;
    const u64* candidates;
    // By slot.
    u32* drawn;
    u32 vocab;
    u32 unused;
};

// A token with its logit as one number: greater for greater logits, of equals for the earlier token. No
// two tokens have the same, and none has 0, which stands for no token.
__device__ __forceinline__ u64 candidate_of(u32 token, float logit) {
    const u32 bits = __float_as_uint(logit);
    const u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(order) << 32 | static_cast<u32>(~token);
}

__device__ __forceinline__ u32 token_of(u64 candidate) { return ~static_cast<u32>(candidate); }

__device__ __forceinline__ float logit_of(u64 candidate) {
    const u32 order = static_cast<u32>(candidate >> 32);
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// The greatest number that `each` has, for all threads of the block. `each` calls what it is given with
// every number of its thread.
template <class Each>
__device__ __forceinline__ u64 greatest(Each each) {
    __shared__ u64 room[WARPS];
    u64 most = 0;
    each([&](u64 candidate) { most = candidate > most ? candidate : most; });
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, most, distance);
        most = other > most ? other : most;
    }
    if (lane_index() == 0) room[warp_index()] = most;
    __syncthreads();
    for (u32 w = 0; w < WARPS; w++) most = room[w] > most ? room[w] : most;
    return most;
}

// Where a digit's count stands: lanes look at eight digits each, and together meet all banks.
__device__ __forceinline__ u32 place_of(u32 digit) { return digit % 8 * WARP + digit / 8; }

// A number that exactly `count` of those that `each` has reach; no two are equal, and there are as many.
// Digit by digit from the top: how many there are of each decides the digit of the last that is wanted.
template <class Each>
__device__ __forceinline__ u64 least_of(u32 count, Each each) {
    // Three, so that a barrier a digit is enough: one is counted in while warps that are late may still
    // read the one before, and the one after is cleared.
    __shared__ u32 histograms[3][256];
    static_assert(BLOCK == 256, "a thread a digit");
    const u32 lane = lane_index();
    u64 prefix = 0;
    histograms[0][threadIdx.x] = 0;
    __syncthreads();
    for (u32 round = 0, shift = 56;; round++, shift -= 8) {
        u32* histogram = histograms[round % 3];
        each([&](u64 candidate) {
            if (candidate >> shift >> 8 == prefix) atomicAdd(&histogram[place_of(candidate >> shift & 255)], 1u);
        });
        histograms[(round + 1) % 3][threadIdx.x] = 0;
        __syncthreads();
        // Every warp looks for itself. A lane has eight digits, the first lane the greatest.
        u32 counts[8], sum = 0;
        for (u32 i = 0; i < 8; i++) sum += counts[i] = histogram[place_of(255 - i) - lane];
        u32 above = sum;
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            const u32 before = __shfl_up_sync(ALL_LANES, above, distance);
            if (lane >= distance) above += before;
        }
        above -= sum;
        // The digit with which `count` is reached, how many have it, and how many of them are wanted.
        u32 digit = 0, have = 0, wanted = 0;
        for (u32 i = 0; i < 8; i++) {
            if (above < count && count <= above + counts[i]) {
                digit = 255 - 8 * lane - i;
                have = counts[i];
                wanted = count - above;
            }
            above += counts[i];
        }
        const u32 finder = __ffs(__ballot_sync(ALL_LANES, have > 0)) - 1;
        prefix = prefix << 8 | __shfl_sync(ALL_LANES, digit, finder);
        have = __shfl_sync(ALL_LANES, have, finder);
        count = __shfl_sync(ALL_LANES, wanted, finder);
        // At the last digit at the latest, for all are different.
        if (have == count) return prefix << shift;
    }
}

// What a thread has of a chunk, in registers. (NVRTC would take a generic lambda for a function of the host.)
struct OfChunk {
    static constexpr u32 EACH = CHUNK / BLOCK;
    u64 candidates[EACH];

    template <class See>
    __device__ __forceinline__ void operator()(See see) const {
        for (u32 i = 0; i < EACH; i++)
            if (candidates[i] != 0) see(candidates[i]);
    }
};

// What a thread has of a list in memory. It keeps the first ones, which are all if each chunk of 50,000 tokens has 40; there
// may be thousands more, which are loaded whenever they are looked at.
struct OfList {
    static constexpr u32 TOGETHER = 8;

    const u64* list;
    u32 length;
    u64 kept[TOGETHER];

    __device__ __forceinline__ OfList(const u64* list, u32 length) : list(list), length(length) {
        load(threadIdx.x, kept);
    }

    // Several at a time; zeros beyond the end.
    __device__ __forceinline__ void load(u32 start, u64 some[TOGETHER]) const {
        for (u32 i = 0; i < TOGETHER; i++)
            some[i] = start + i * BLOCK < length ? list[start + i * BLOCK] : 0;
    }

    template <class See>
    __device__ __forceinline__ void operator()(See see) const {
        for (u32 i = 0; i < TOGETHER; i++)
            if (kept[i] != 0) see(kept[i]);
#pragma unroll 1
        for (u32 start = threadIdx.x + TOGETHER * BLOCK; start < length; start += TOGETHER * BLOCK) {
            u64 some[TOGETHER];
            load(start, some);
            for (u32 i = 0; i < TOGETHER; i++)
                if (some[i] != 0) see(some[i]);
        }
    }
};

// Numbers of shared memory that a thread goes through one after the other, loaded several at a time.
constexpr u32 IN_A_ROW = 8;

__device__ __forceinline__ void load_in_a_row(const double* from, u32 left, double some[IN_A_ROW]) {
    for (u32 i = 0; i < IN_A_ROW; i++) some[i] = i < left ? from[i] : 0;
}

// Finds the candidates of a part of the vocabulary: its best, in any order. grid: (rows · chunks), the first row's first:
// so blocks of rows that are not there come last, and keep none waiting.
__device__ __forceinline__ void find_candidates(const CandidatesParams& p) {
    enter();
    constexpr u32 EACH = OfChunk::EACH;
    const u32 chunks = chunks_of(p.vocab), c = blockIdx.x / chunks, chunk = blockIdx.x % chunks, first = chunk * CHUNK;
    if (c >= *p.view.count) return;
    __shared__ u32 penalized[CHUNK / WARP];
    __shared__ u32 collected;
    const float* logits = p.logits + static_cast<u64>(c) * p.vocab;
    float values[EACH];
    bool bad = false;
    for (u32 i = 0; i < EACH; i++) {
        const u32 token = first + i * BLOCK + threadIdx.x;
        values[i] = token < p.vocab ? logits[token] : 0;
        bad |= !is_finite(values[i]);
    }
    const u32 slot = p.view.slots[c];
    const Row row = p.rows[slot];
    const Draw draw = p.draws[row.sequence];
    if (threadIdx.x < CHUNK / WARP) penalized[threadIdx.x] = 0;
    if (threadIdx.x == 0) collected = 0;
    if (__syncthreads_or(bad) && threadIdx.x == 0) report_error(p.report, LOGIT_NOT_FINITE, slot);
    if (draw.candidates == 0) return;
    if (draw.repeat_penalty != 1.0f) {
        const u32 known = row.position + 1, last = known < draw.repeat_last_n ? known : draw.repeat_last_n;
        const u32* recent = p.tokens + static_cast<u64>(row.sequence) * p.context + known - last;
        // Each token once, however often it came: a bit each.
        for (u32 i = threadIdx.x; i < last; i += BLOCK) {
            const u32 at = recent[i] - first;
            if (at < CHUNK) atomicOr(&penalized[at / WARP], 1u << at % WARP);
        }
        __syncthreads();
        for (u32 i = 0; i < EACH; i++)
            if (penalized[i * WARPS + warp_index()] >> lane_index() & 1)
                values[i] *= values[i] > 0 ? 1.0f / draw.repeat_penalty : draw.repeat_penalty;
    }
    OfChunk each;
    for (u32 i = 0; i < EACH; i++) {
        const u32 token = first + i * BLOCK + threadIdx.x;
        each.candidates[i] = token < p.vocab ? candidate_of(token, values[i]) : 0;
    }
    const u32 most = p.vocab - first < CHUNK ? p.vocab - first : CHUNK;
    const u32 count = draw.candidates < most ? draw.candidates : most;
    u64* list = p.candidates + static_cast<u64>(c) * chunks * MAX_CANDIDATES + chunk * draw.candidates;
    if (count == 1) {
        const u64 best = greatest(each);
        if (threadIdx.x == 0) list[0] = best;
        return;
    }
    const u64 least = least_of(count, each);
    each([&](u64 candidate) {
        if (candidate >= least) list[atomicAdd(&collected, 1u)] = candidate;
    });
}
MOR_WORK(mor_candidates, CandidatesParams, (BLOCK), find_candidates)

// Draws from the candidates. A block a row.
__device__ __forceinline__ void sample(const SampleParams& p) {
    enter();
    static_assert(MAX_CANDIDATES == BLOCK, "a thread a candidate");
    const u32 c = blockIdx.x;
    if (c >= *p.view.count) return;
    __shared__ u32 collected, left;
    __shared__ u64 found[MAX_CANDIDATES], ordered[MAX_CANDIDATES];
    __shared__ double weights[MAX_CANDIDATES], tempered[MAX_CANDIDATES], sums[2][MAX_CANDIDATES];
    const u32 slot = p.view.slots[c];
    const Draw draw = p.draws[p.rows[slot].sequence];
    if (draw.candidates == 0) return;
    const u32 chunks = chunks_of(p.vocab), rest_of_vocab = p.vocab - (chunks - 1) * CHUNK;
    const u32 of_last = draw.candidates < rest_of_vocab ? draw.candidates : rest_of_vocab;
    const OfList each{p.candidates + static_cast<u64>(c) * chunks * MAX_CANDIDATES,
                      (chunks - 1) * draw.candidates + of_last};
    const u32 count = draw.candidates < p.vocab ? draw.candidates : p.vocab;
    if (count == 1) {
        const u64 best = greatest(each);
        if (threadIdx.x == 0) p.drawn[slot] = token_of(best);
        return;
    }
    if (threadIdx.x == 0) {
        collected = 0;
        left = count;
    }
    const u64 least = least_of(count, each);
    each([&](u64 candidate) {
        if (candidate >= least) found[atomicAdd(&collected, 1u)] = candidate;
    });
    __syncthreads();
    const u32 t = threadIdx.x;
    if (t < count) {
        u32 rank = 0;
        for (u32 j = 0; j < count; j++) rank += found[j] > found[t];
        ordered[rank] = found[t];
    }
    __syncthreads();
    if (t < count) {
        const float below = logit_of(ordered[t]) - logit_of(ordered[0]);
        weights[t] = exp(static_cast<double>(below));
        tempered[t] = exp(static_cast<double>(below / draw.temperature));
    }
    __syncthreads();
    // Sums up to each candidate, one after the other as the host adds them; a warp for each of the two.
    if (t == 0 || t == WARP) {
        const double* terms = t == 0 ? weights : tempered;
        double sum = 0, some[IN_A_ROW];
#pragma unroll 1
        for (u32 j = 0; j < count; j += IN_A_ROW) {
            load_in_a_row(terms + j, count - j, some);
            for (u32 i = 0; i < IN_A_ROW; i++) some[i] = sum += some[i];
            for (u32 i = 0; i < IN_A_ROW && j + i < count; i++) sums[t / WARP][j + i] = some[i];
        }
    }
    __syncthreads();
    if (t < count) {
        if (draw.top_p < 1.0f && sums[0][t] >= sums[0][count - 1] * static_cast<double>(draw.top_p))
            atomicMin(&left, t + 1);
        if (draw.min_p > 0.0f && !(weights[t] >= static_cast<double>(draw.min_p))) atomicMin(&left, t);
    }
    __syncthreads();
    if (t != 0) return;
    const u32 kept = left < 1 ? 1 : left;
    double rest = draw.random * sums[1][kept - 1], some[IN_A_ROW];
    // The first with which it is less than zero, as it then stays.
    u32 chosen = 0;
#pragma unroll 1
    for (; chosen < kept; chosen += IN_A_ROW) {
        load_in_a_row(tempered + chosen, kept - chosen, some);
        u32 passed = 0;
        for (u32 i = 0; i < IN_A_ROW; i++) {
            rest -= some[i];
            passed += rest >= 0;
        }
        if (rest < 0) {
            chosen += passed;
            break;
        }
    }
    p.drawn[slot] = token_of(ordered[chosen < kept ? chosen : kept - 1]);
}
MOR_WORK(mor_sample, SampleParams, (BLOCK), sample)

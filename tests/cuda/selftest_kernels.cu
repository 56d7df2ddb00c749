/* Small kernels for the tests of the emulation itself (selftest.cpp). */
#include "emulated.h"
#include "selftest_kernels.h"

/** One block per row: the sum of its values, by shuffles and shared memory. */
extern "C" __global__ void __launch_bounds__(256) sum_rows(const SumRows p) {
    __shared__ float partial[32];
    float sum = 0;
    for (unsigned i = threadIdx.x; i < p.columns; i += blockDim.x)
        sum += p.values[blockIdx.x * p.columns + i];
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    if (p.with_barrier) __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0;
        for (unsigned i = 0; i < blockDim.x / 32; i++) total += partial[i];
        p.sums[blockIdx.x] = total;
    }
}
MOR_KERNEL(sum_rows)

/** Blocks of 32 x 8 threads move tiles of 32 x 32 through dynamic shared memory. */
extern "C" __global__ void transpose(const Transpose p) {
    MOR_DYNAMIC_SHARED(float, tile);
    const unsigned x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32;
    for (unsigned i = threadIdx.y; i < 32; i += blockDim.y)
        if (x < p.columns && y + i < p.rows)
            tile[i * 33 + threadIdx.x] = p.from[(y + i) * p.columns + x];
    __syncthreads();
    const unsigned column = blockIdx.x * 32, row = y + threadIdx.x;
    for (unsigned i = threadIdx.y; i < 32; i += blockDim.y)
        if (row < p.rows && column + i < p.columns)
            p.to[(column + i) * p.rows + row] = tile[threadIdx.x * 33 + i];
}
MOR_KERNEL(transpose)

/** What shared memory holds that nobody wrote. */
extern "C" __global__ void unwritten(const Transpose p) {
    __shared__ float own;
    MOR_DYNAMIC_SHARED(float, rest);
    if (p.rows) own = rest[0] = 1; // not seen to be never
    p.to[0] = own;
    p.to[1] = rest[0];
}
MOR_KERNEL(unwritten)

/** D += A B by one warp; the fragments are loaded by the formulas of the PTX manual. */
extern "C" __global__ void multiply(const Multiply p) {
    const unsigned group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    uint16_t a[8], b[4];
    float d[4];
    for (unsigned i = 0; i < 8; i++) {
        const unsigned row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const unsigned column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a[i] = p.a[row * 16 + column];
    }
    for (unsigned i = 0; i < 4; i++)
        b[i] = p.b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
    for (unsigned i = 0; i < 4; i++)
        d[i] = p.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    uint32_t a_pairs[4], b_pairs[2];
    for (unsigned i = 0; i < 4; i++) a_pairs[i] = a[2 * i] | uint32_t(a[2 * i + 1]) << 16;
    for (unsigned i = 0; i < 2; i++) b_pairs[i] = b[2 * i] | uint32_t(b[2 * i + 1]) << 16;
    mor_emulated_mma_m16n8k16(d, a_pairs, b_pairs);
    for (unsigned i = 0; i < 4; i++)
        p.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
}
MOR_KERNEL(multiply)

/** D = A B^T by four warps, twice, of which the second adds nothing to the first; B in shared memory, in swizzle. */
extern "C" __global__ void multiply_shared(const MultiplyShared p) {
    MOR_DYNAMIC_SHARED(unsigned char, room);
    const unsigned begin = mor_emulated::SHARED_BEGIN, place = (begin + 1023) / 1024 * 1024;
    unsigned char *rows = room + (place - begin);
    for (unsigned i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
        const unsigned row = i / 64, byte = 2 * (i % 64);
        std::memcpy(rows + row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16, p.b + i, 2);
    }
    __syncthreads();
    const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, first = threadIdx.x / 32 * 16;
    uint32_t a[4];
    for (unsigned r = 0; r < 4; r++)
        std::memcpy(a + r, p.a + (first + g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8, 4);
    const uint64_t b = (place + 32 * p.step) / 16 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 62;
    float d[8][4];
    const uint32_t zeros[4] = {};
    mor_emulated_wgmma(d, 8, a, b, false);
    mor_emulated_wgmma_commit();
    mor_emulated_wgmma(d, 8, zeros, b, true);
    mor_emulated_wgmma_commit();
    if (!p.too_early) mor_emulated_wgmma_wait(0);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < 64 * 128; i += blockDim.x) rows[i] = 0;
    __syncthreads();
    mor_emulated_wgmma_wait(0);
    for (unsigned c = 0; c < 8; c++)
        for (unsigned i = 0; i < 4; i++)
            p.d[(first + g + i / 2 * 8) * 64 + 8 * c + 2 * t + i % 2] = d[c][i];
}
MOR_KERNEL(multiply_shared)

/** Warp 0 copies, warp 1 writes what came; a gate opens when the place is full, another when it is free again. */
extern "C" __global__ void rounds(const Rounds p) {
    MOR_DYNAMIC_SHARED(unsigned long long, gates);
    unsigned *place = reinterpret_cast<unsigned *>(gates + 2);
    const unsigned lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        mor_emulated::begin_gate(gates, 32);
        mor_emulated::begin_gate(gates + 1, 32);
    }
    place[lane] = 99;
    __syncthreads();
    for (unsigned round = 0; round < p.rounds; round++) {
        if (threadIdx.x < 32) {
            if (round > 0) mor_emulated::wait_at_gate(gates + 1, round - 1);
            // Two batches, of which the first may be waited for alone.
            mor_emulated_begin_copy(place + lane, p.from + lane, 4, false);
            mor_emulated_close_copies();
            mor_emulated_wait_for_copies(0);
            mor_emulated_begin_copy(place + lane, p.from + 32 * round + lane, 4, true);
            mor_emulated_close_copies();
            mor_emulated_wait_for_copies(1);
            p.to[32 * p.rounds + lane] = place[lane];
            mor_emulated_finish_copies();
            mor_emulated::arrive_at_gate(gates);
        } else {
            mor_emulated::wait_at_gate(gates, round);
            p.to[32 * round + lane] = place[lane];
            mor_emulated::arrive_at_gate(gates + 1);
        }
    }
}
MOR_KERNEL(rounds)

extern "C" __global__ void count(const Count p) {
    if (threadIdx.x) return;
    const unsigned now = ++*p.counter;
    if (p.handle) cudaGraphSetConditional(p.handle, now < p.limit);
}
MOR_KERNEL(count)

extern "C" __global__ void add(const Add p) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.count) p.values[i] = __fmaf_rn(p.values[i], p.scale, p.addend);
}
MOR_KERNEL(add)

/** Every warp collective once, for one warp. */
extern "C" __global__ void collectives(const Collectives p) {
    const unsigned lane = threadIdx.x, all = 0xffffffffu;
    unsigned *out = p.out + lane;
    out[0 * 32] = __shfl_sync(all, lane, 5);
    out[1 * 32] = __shfl_sync(all, lane, 3, 8);
    out[2 * 32] = __shfl_up_sync(all, lane, 3, 16);
    out[3 * 32] = __shfl_down_sync(all, lane, 3, 16);
    out[4 * 32] = __shfl_xor_sync(all, lane, 9);
    out[5 * 32] = __ballot_sync(all, lane % 3 == 0);
    out[6 * 32] = unsigned(__any_sync(all, lane == 7)) | unsigned(__all_sync(all, lane < 31)) << 1;
    out[7 * 32] = __reduce_add_sync(all, lane);
    out[8 * 32] = unsigned(__reduce_min_sync(all, int(lane) - 16));
    // The halves of the warp go their own ways, and meet again.
    if (lane < 16)
        out[9 * 32] = __shfl_xor_sync(0x0000ffffu, lane, 1);
    else
        out[9 * 32] = __shfl_xor_sync(0xffff0000u, lane, 2);
    __syncwarp();
    out[10 * 32] = unsigned(__shfl_sync(all, (unsigned long long)lane << 33, 2) >> 33);
    out[11 * 32] = unsigned(__syncthreads_count(lane < 10));
}
MOR_KERNEL(collectives)

__device__ static float deep(float x, unsigned depth) {
    volatile float room[1024];
    for (unsigned i = 0; i < 1024; i++) room[i] = x;
    return depth ? deep(room[depth], depth - 1) + room[1] : x;
}

/** Does one thing wrong. */
extern "C" __global__ void misbehave(const Misbehave p) {
    __shared__ float large[13 * 1024];
    MOR_DYNAMIC_SHARED(float, dynamic);
    const unsigned t = threadIdx.x;
    switch (p.wrong) {
    case EARLY_EXIT:
        if (t == 3) return;
        __syncthreads();
        break;
    case DIVIDED:
        if (t < 32)
            __syncthreads();
        else
            __syncthreads();
        break;
    case ABSENT_LANES:
        if (t >= 16) return;
        p.values[t] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
        break;
    case OTHER_MASK:
        p.values[t] = float(__ballot_sync(t < 16 ? 0xffffffffu : 0xffff0000u, 1));
        break;
    case READ_OTHER_LANE:
        if (t < 16) p.values[t] = __shfl_sync(0x0000ffffu, 1.0f, 20);
        break;
    case WRITE_BEYOND:
    case FAR_BEYOND: p.values[p.index] = 1; break;
    case SHARED_TOO_LARGE:
        for (unsigned i = t; i < 13 * 1024; i += blockDim.x) large[i] = 0;
        p.values[t] = large[t];
        break;
    case DYNAMIC_BEYOND: dynamic[p.index] = 1; break;
    case DEEP_STACK: p.values[t] = deep(1, 1000); break;
    case TRAP: __trap();
    case UNFINISHED_PRODUCTS: {
        float d[8][4];
        const uint32_t a[4] = {};
        mor_emulated_wgmma(d, 8, a, 0, false);
        return;
    }
    case UNFINISHED_COPIES: mor_emulated_begin_copy(dynamic, p.values, 4, true); return;
    case CLOSED_GATE:
    case LATE_AT_GATE:
        if (t == 0) mor_emulated::begin_gate(dynamic, 1);
        __syncthreads();
        if (t == 1 && p.wrong == LATE_AT_GATE)
            for (unsigned i = 0; i < 2; i++) mor_emulated::arrive_at_gate(dynamic);
        __syncthreads();
        mor_emulated::wait_at_gate(dynamic, 0);
        break;
    default: break;
    }
}
MOR_KERNEL(misbehave)

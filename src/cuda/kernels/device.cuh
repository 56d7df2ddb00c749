// What the kernels need of the machine: halves, matrix products of a warp, sums over a block. The one
// place that tells the device from the host's emulation of it (tests/cuda).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef MOR_EMULATED
#include "emulated.h"
#define MOR_TENSOR_CORES 1
#define MOR_WARPGROUPS 1
#else
#define MOR_KERNEL(name)
#define MOR_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#if __CUDA_ARCH__ >= 800
#define MOR_TENSOR_CORES 1
#endif
// Of 9.0 alone: later devices have something else.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MOR_WARPGROUPS 1
#endif
#endif

// Threads of a block; products for a lone row may have two teams of so many, and those by warpgroups have others.
constexpr u32 BLOCK = 256;
constexpr u32 WARP = 32;
constexpr u32 WARPS = BLOCK / WARP;
constexpr u32 ALL_LANES = 0xffffffffu;

// Below every number that is compared with it.
constexpr float LEAST = -3.402823466e38f;

// As MAX_RECURSIONS in src/model.
constexpr u32 MAX_RECURSIONS = 64;

__device__ __forceinline__ u32 lane_index() { return threadIdx.x % WARP; }
__device__ __forceinline__ u32 warp_index() { return threadIdx.x / WARP; }

__device__ __forceinline__ float half_to_float(u16 bits) {
#ifdef MOR_EMULATED
    _Float16 value;
    __builtin_memcpy(&value, &bits, 2);
    return static_cast<float>(value);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

// Rounds to the nearest, ties to even; too large a value becomes infinite.
__device__ __forceinline__ u16 float_to_half(float value) {
#ifdef MOR_EMULATED
    _Float16 half = static_cast<_Float16>(value);
    u16 bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
#else
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}

__device__ __forceinline__ u32 pair_of_halves(float low, float high) {
    return float_to_half(low) | static_cast<u32>(float_to_half(high)) << 16;
}

__device__ __forceinline__ float bfloat_to_float(u16 bits) {
    return __uint_as_float(static_cast<u32>(bits) << 16);
}

// Four bytes as four halves, each less 1024 + `OFFSET`, exactly: 0x64 above a byte is the half
// 1024 + byte.
template <u32 OFFSET>
__device__ __forceinline__ void bytes_to_halves(u32 bytes, u32 halves[2]) {
#ifdef MOR_EMULATED
    for (u32 i = 0; i < 2; i++) {
        float a = static_cast<float>(bytes >> (16 * i) & 255) - static_cast<float>(OFFSET);
        float b = static_cast<float>(bytes >> (16 * i + 8) & 255) - static_cast<float>(OFFSET);
        halves[i] = pair_of_halves(a, b);
    }
#else
    constexpr u32 bias = (0x6400u + OFFSET) * 0x10001u;
    u32 a = __byte_perm(bytes, 0x64646464u, 0x4140u);
    u32 b = __byte_perm(bytes, 0x64646464u, 0x4342u);
    asm("sub.f16x2 %0, %1, %2;" : "=r"(halves[0]) : "r"(a), "r"(bias));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(halves[1]) : "r"(b), "r"(bias));
#endif
}

#ifdef MOR_TENSOR_CORES
// d += a · b for a warp, 16 × 8 with 16 products each (PTX: mma.m16n8k16, row.col, halves, sums in
// single precision).
__device__ __forceinline__ void multiply_add(float d[4], const u32 a[4], const u32 b[2]) {
#ifdef MOR_EMULATED
    mor_emulated_mma_m16n8k16(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

__device__ __forceinline__ float warp_sum(float value) {
    for (u32 distance = WARP / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (u32 distance = WARP / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, distance));
    return value;
}

#ifdef MOR_TENSOR_CORES
// The largest of a warp's numbers.
__device__ __forceinline__ u32 warp_most(u32 value) { return __reduce_max_sync(ALL_LANES, value); }
#endif

// 1 / √x to 22 bits and more.
__device__ __forceinline__ float inverse_root(float x) {
#ifdef MOR_EMULATED
    return 1.0f / sqrtf(x);
#else
    float root;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#endif
}

// The sum over a block, for all its threads, in one fixed order. `room` [WARPS] is free again after
// the next barrier.
__device__ __forceinline__ float block_sum(float value, float* room) {
    value = warp_sum(value);
    if (lane_index() == 0) room[warp_index()] = value;
    __syncthreads();
    float sum = 0;
    for (u32 w = 0; w < WARPS; w++) sum += room[w];
    return sum;
}

// For tests/cuda/timeline.py, which measures where a launch's time goes: when a block has done what.
#ifdef MOR_TIMELINE
#include "timeline.h"
#else
#define MOR_TIMED(name)
enum Moment : u32 { WAITED, READY, MULTIPLIED };
__device__ __forceinline__ void mark(Moment) {}
#endif

// The kernels of a program overlap where the device can do that (9.0 and later, src/cuda/launch.rs): each
// lets the next one begin at once, and looks at what those before it wrote, or writes, only after
// `wait_for_previous`, which every thread calls. Weights, which nobody writes, may be read before. The emulation runs one
// after the other, but goes the way of devices on which they overlap, so that it is tested.
#if __CUDA_ARCH__ >= 900 || defined(MOR_EMULATED)
constexpr bool KERNELS_OVERLAP = true;
#else
constexpr bool KERNELS_OVERLAP = false;
#endif

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#ifdef MOR_EMULATED
    mor_emulated::current->waited = true;
#endif
    mark(WAITED);
}

// A kernel's end. A kernel of which a thread has not waited could end before the one before it has, and the next,
// which waits for it alone, would read too early.
__device__ __forceinline__ void end_work() {
#ifdef MOR_EMULATED
    if (!mor_emulated::current->waited) mor_emulated::trap("it ends without wait_for_previous");
#endif
}

// For kernels that read nothing ahead.
__device__ __forceinline__ void enter() {
    let_next_begin();
    wait_for_previous();
}

// A kernel that is a function, `...`, of its parameters.
#define MOR_WORK(name, Params, BOUNDS, ...)                                    \
    extern "C" __global__ void __launch_bounds__ BOUNDS name(const Params p) { \
        MOR_TIMED(name);                                                       \
        (__VA_ARGS__)(p);                                                      \
        end_work();                                                            \
    }                                                                          \
    MOR_KERNEL(name)

// Has memory brought nearer that will be read soon.
__device__ __forceinline__ void prefetch(const void* place) {
#ifdef MOR_EMULATED
    (void)place;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
#endif
}

// Where something stands in the block's shared memory.
__device__ __forceinline__ u32 place_in_shared(const void* place) {
#ifdef MOR_EMULATED
    return static_cast<u32>(static_cast<const u8*>(place) - mor_emulated::dynamic_shared) + mor_emulated::SHARED_BEGIN;
#else
    return static_cast<u32>(__cvta_generic_to_shared(place));
#endif
}

#ifdef MOR_EMULATED
inline u8* at_place(u32 place) { return mor_emulated::dynamic_shared + (place - mor_emulated::SHARED_BEGIN); }
#endif

#ifdef MOR_TENSOR_CORES
// Begins to copy 4 or 16 bytes from memory to a place in shared memory, past the registers, or to write zeros where
// nothing is `wanted`. Copies are counted by the batches that a thread closes.
template <u32 BYTES>
__device__ __forceinline__ void begin_copy(u32 place, const void* from, bool wanted = true) {
#ifdef MOR_EMULATED
    mor_emulated_begin_copy(at_place(place), from, BYTES, wanted);
#else
    const u32 bytes = wanted ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(from), "n"(BYTES), "r"(bytes)
                     : "memory");
#endif
}

template <u32 BYTES>
__device__ __forceinline__ void begin_copy(void* to, const void* from, bool wanted = true) {
    begin_copy<BYTES>(place_in_shared(to), from, wanted);
}

__device__ __forceinline__ void close_copies() {
#ifdef MOR_EMULATED
    mor_emulated_close_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all of the thread's copies have arrived but those of its last `BATCHES` batches.
template <u32 BATCHES>
__device__ __forceinline__ void wait_for_copies() {
#ifdef MOR_EMULATED
    mor_emulated_wait_for_copies(BATCHES);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(BATCHES) : "memory");
#endif
}
#endif

#ifdef MOR_WARPGROUPS
// Products of four warps at a time, which multiply while the warps go on (PTX: wgmma). A warp has sixteen rows of
// weights in its registers, as for `multiply_add`; all have the same rows of activations, in shared memory, of which
// the tensor cores read sixteen columns (32 bytes) at a time. Until products that were begun are waited for, nobody may
// touch their registers or what they read.

// Rows of activations, 64 columns (128 bytes) each, in the places that `swizzled_place_of_chunk` (wide.cuh) gives.
struct SharedRows {
    u64 description;

    // From the PTX manual, matrix-descriptor-format; all numbers in 16 bytes: the place where they begin, from one eight
    // of rows to the next, and that chunks change places in 128 bytes.
    __device__ __forceinline__ explicit SharedRows(u32 place)
        : description((place & 0x3ffffu) >> 4 | 1ull << 16 | 1024ull / 16 << 32 | 1ull << 62) {}

    // From step `step` of sixteen columns on.
    __device__ __forceinline__ u64 from_step(u32 step) const { return description + 32 / 16 * step; }
};

// What threads wrote to shared memory, or copied and waited for, is then there for tensor cores, after a barrier.
__device__ __forceinline__ void show_tensor_cores() {
#ifndef MOR_EMULATED
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Four warps need so many registers for a thread, so that others may have more (PTX: setmaxnreg).
template <u32 REGISTERS>
__device__ __forceinline__ void give_registers_until() {
#ifndef MOR_EMULATED
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

template <u32 REGISTERS>
__device__ __forceinline__ void take_registers_until() {
#ifndef MOR_EMULATED
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// A gate in shared memory, eight bytes, that opens again and again (PTX: mbarrier), each time when all who are to come
// have arrived. Who waits says how often it must have opened before; nobody may be two openings behind.
//
// It is known by its place, as are others that are used in a loop: a pointer would be converted there each time.
constexpr u32 GATE_BYTES = 8;

// By one thread, before a barrier.
__device__ __forceinline__ void begin_gate(u32 gate, u32 count) {
#ifdef MOR_EMULATED
    mor_emulated::begin_gate(at_place(gate), count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(gate), "r"(count) : "memory");
#endif
}

__device__ __forceinline__ void arrive_at(u32 gate) {
#ifdef MOR_EMULATED
    mor_emulated::arrive_at_gate(at_place(gate));
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(gate) : "memory");
#endif
}

// Arrives when all copies that the thread has begun are there.
__device__ __forceinline__ void copies_arrive_at(u32 gate) {
#ifdef MOR_EMULATED
    mor_emulated_finish_copies();
    mor_emulated::arrive_at_gate(at_place(gate));
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(gate) : "memory");
#endif
}

__device__ __forceinline__ void wait_at(u32 gate, u32 openings) {
#ifdef MOR_EMULATED
    mor_emulated::wait_at_gate(at_place(gate), openings);
#else
    u32 open;
    do {
        asm volatile("{ .reg .pred open;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 open, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, open; }"
                     : "=r"(open)
                     : "r"(gate), "r"(openings & 1)
                     : "memory");
    } while (!open);
#endif
}

__device__ __forceinline__ uint4 load_shared(u32 place) {
    uint4 v;
#ifdef MOR_EMULATED
    __builtin_memcpy(&v, at_place(place), sizeof v);
#else
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(place)
                 : "memory");
#endif
    return v;
}

// Before the first product that is begun after registers were written.
__device__ __forceinline__ void begin_products() {
#ifndef MOR_EMULATED
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Those that were begun may be waited for.
__device__ __forceinline__ void close_products() {
#ifdef MOR_EMULATED
    mor_emulated_wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all products of the warp are done.
__device__ __forceinline__ void wait_for_products() {
#ifdef MOR_EMULATED
    mor_emulated_wgmma_wait(0);
#else
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Begins d = a · b, or d += a · b where `adds`, for 16 × 8 · C of a warp.
template <u32 C>
__device__ __forceinline__ void begin_multiply(float d[C][4], const u32 a[4], u64 b, bool adds) {
    static_assert(C == 8 || C == 16, "64 or 128 rows");
#ifdef MOR_EMULATED
    mor_emulated_wgmma(d, C, a, b, adds);
#else
#define MOR_D(c) "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
#define MOR_D8(c) MOR_D(c), MOR_D(c + 1), MOR_D(c + 2), MOR_D(c + 3), MOR_D(c + 4), MOR_D(c + 5), MOR_D(c + 6), MOR_D(c + 7)
#define MOR_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(adds))
    if constexpr (C == 8)
        asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %37, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
                     "{%32,%33,%34,%35}, %36, adds, 1, 1, 0; }"
                     : MOR_D8(0)
                     : MOR_A);
    else
        asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %69, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                     "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                     "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
                     "{%64,%65,%66,%67}, %68, adds, 1, 1, 0; }"
                     : MOR_D8(0), MOR_D8(8)
                     : MOR_A);
#undef MOR_A
#undef MOR_D8
#undef MOR_D
#endif
}
#endif

// A load that begins here, not where its result is used.
__device__ __forceinline__ u32 load_now(const u32* place) {
#ifdef MOR_EMULATED
    return *place;
#else
    u32 value;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(place) : "memory");
    return value;
#endif
}

// The same number, but what is computed from it is computed here, not before the loop.
__device__ __forceinline__ u32 only_here(u32 value) {
#ifndef MOR_EMULATED
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Finite, in a way that no optimisation takes away.
__device__ __forceinline__ bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

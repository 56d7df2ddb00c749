/*
 * CUDA C++ for a machine without a GPU: what the kernels need to be compiled by a host compiler.
 *
 *     g++ -x c++ -std=c++17 -DMOR_EMULATED -I tests/cuda src/cuda/kernels/mor.cu
 *
 * A thread of a block is a fiber (fibers.cpp), a warp is 32 of them, and the blocks of a grid run
 * one after another, so a __shared__ variable is a static one. Barriers and warp collectives wait
 * as they do on the device; what the programming guide calls undefined (threads that miss a
 * barrier, lanes that a mask names and that do not come, a shuffle from a lane outside the mask)
 * ends the process with a message. Fresh shared memory is all 0xFF bytes: as a float it is a NaN.
 *
 * MOR_EMULATED_ORDER=forward|reverse|shuffled:SEED sets in which order threads run between two
 * barriers, and blocks of a grid, and independent nodes of a graph. No result may depend on it.
 *
 * What is not checked here and is by the device's compiler: registers, and how much static shared
 * memory a kernel declares (how much it writes is checked at its launch). Blocks that wait for each
 * other, which a device does not promise to run, hang.
 */
#ifndef MOR_EMULATED_H
#define MOR_EMULATED_H

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
// As many empty instructions before the kernel, which no one runs: max_threads() finds their
// number.
#define __launch_bounds__(threads, ...) \
    __attribute__((patchable_function_entry((unsigned short)(threads), (unsigned short)(threads))))
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __shared__ static // shared.ld gathers them, so that each block finds them poisoned
#define MOR_DYNAMIC_SHARED(type, name)                                          \
    type *const name = reinterpret_cast<type *>(::mor_emulated::dynamic_shared)

/** After the definition of a kernel: makes it known to cuModuleGetFunction. */
#define MOR_KERNEL(name)                                                             \
    static const ::mor_emulated::Registration mor_registration_##name(#name, &name);

// Vector types, with the alignment that they have on the device.
#define MOR_VECTORS(type, name, two, four)                                                 \
    struct alignas(two) name##2 { type x, y; };                                            \
    struct name##3 { type x, y, z; };                                                      \
    struct alignas(four) name##4 { type x, y, z, w; };                                     \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
MOR_VECTORS(signed char, char, 2, 4)
MOR_VECTORS(unsigned char, uchar, 2, 4)
MOR_VECTORS(short, short, 4, 8)
MOR_VECTORS(unsigned short, ushort, 4, 8)
MOR_VECTORS(int, int, 8, 16)
MOR_VECTORS(unsigned, uint, 8, 16)
MOR_VECTORS(long long, longlong, 16, 16)
MOR_VECTORS(unsigned long long, ulonglong, 16, 16)
MOR_VECTORS(float, float, 8, 16)
MOR_VECTORS(double, double, 16, 16)
#undef MOR_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef unsigned long long cudaGraphConditionalHandle;
/** Sets the value of a conditional node of the graph that is running (driver_graph.cpp). */
extern "C" void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value);

namespace mor_emulated {

/** What a kernel reads about the thread that runs; valid while a grid runs. */
struct Position {
    uint3 thread;
    unsigned lane;
    bool waited; // for the kernel before (device.cuh)
};
extern Position *current;
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern unsigned char *dynamic_shared;
/** Where dynamic shared memory begins among the addresses of the block's shared memory. */
constexpr unsigned SHARED_BEGIN = 1024 + 48;

/** One kernel of the translation unit: all of them form a list. */
struct Registration {
    const char *name;
    size_t parameter_size;
    void (*function)();
    void (*invoke)(void (*function)(), const void *parameters);
    void (*clear_padding)(void *parameters);
    const Registration *next;
    static const Registration *first;

    template <class P>
    Registration(const char *kernel, void (*f)(P))
        : name(kernel), parameter_size(sizeof(P)), function(reinterpret_cast<void (*)()>(f)),
          next(first) {
        static_assert(std::is_trivially_copyable<P>::value,
                      "a kernel's parameter is a plain struct");
        invoke = [](void (*g)(), const void *parameters) {
            reinterpret_cast<void (*)(P)>(g)(*static_cast<const P *>(parameters));
        };
        clear_padding = [](void *parameters) {
            __builtin_clear_padding(static_cast<P *>(parameters));
        };
        first = this;
    }
};

enum class Operation {
    Sync,
    Shuffle,
    Ballot,
    Any,
    All,
    ReduceAdd,
    ReduceMin,
    ReduceMax,
    ReduceAnd,
    ReduceOr,
    ReduceXor,
    Mma
};

/** What one lane brings to a collective of its warp, and what it takes away. */
struct Exchange {
    Operation operation;
    unsigned mask;
    const char *name, *file;
    int line;
    uint32_t value = 0;  // brought; for a reduction of signed numbers `is_signed` is set
    unsigned source = 0; // Shuffle: the lane to read
    bool is_signed = false;
    uint32_t result = 0; // taken away
    float *d = nullptr;  // Mma
    const uint32_t *a = nullptr, *b = nullptr;
};

enum class Vote { None, Count, And, Or };
int block_barrier(Vote vote, bool predicate, const char *name, const char *file, int line);
void warp_collective(Exchange &exchange);

/** A gate of a block (mbarrier): how often it has opened, and how many are to come, of how many, until it opens again. */
struct GateState {
    unsigned opened;
    unsigned short missing, count;
};
void begin_gate(void *gate, unsigned count);
void arrive_at_gate(void *gate);
/** Until it has opened `openings` times and once more; a device cannot tell it from two times less or more. */
void wait_at_gate(const void *gate, unsigned openings);
[[noreturn]] void trap(const char *what);
unsigned long long ticks();

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

template <class T> uint32_t bits_of(T value) {
    static_assert(sizeof(T) == 4, "warp collectives take types of 4 bytes");
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
template <class T> T from_bits(uint32_t bits) {
    T value;
    std::memcpy(&value, &bits, 4);
    return value;
}
template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char *name, const char *file, int line) {
    if constexpr (sizeof(T) == 8) {
        uint32_t half[2];
        std::memcpy(half, &value, 8);
        half[0] = shuffle(mask, half[0], source, name, file, line);
        half[1] = shuffle(mask, half[1], source, name, file, line);
        std::memcpy(&value, half, 8);
        return value;
    } else {
        Exchange e{Operation::Shuffle, mask, name, file, line};
        e.value = bits_of(value);
        e.source = source;
        warp_collective(e);
        return from_bits<T>(e.result);
    }
}
inline uint32_t collective(Operation operation, unsigned mask, uint32_t value, bool is_signed,
                           const char *name, const char *file, int line) {
    Exchange e{operation, mask, name, file, line};
    e.value = value;
    e.is_signed = is_signed;
    warp_collective(e);
    return e.result;
}

} // namespace mor_emulated

#define threadIdx (::mor_emulated::current->thread)
#define blockIdx (::mor_emulated::block_index)
#define blockDim (::mor_emulated::block_size)
#define gridDim (::mor_emulated::grid_size)
constexpr int warpSize = 32;

// Where a collective stands in the source: threads that meet must stand at the same line.
#define MOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MOR_HERE) {
    mor_emulated::block_barrier(mor_emulated::Vote::None, false, "__syncthreads", file, line);
}
inline int __syncthreads_count(int predicate, MOR_HERE) {
    return mor_emulated::block_barrier(mor_emulated::Vote::Count, predicate, "__syncthreads_count",
                                       file, line);
}
inline int __syncthreads_and(int predicate, MOR_HERE) {
    return mor_emulated::block_barrier(mor_emulated::Vote::And, predicate, "__syncthreads_and",
                                       file, line);
}
inline int __syncthreads_or(int predicate, MOR_HERE) {
    return mor_emulated::block_barrier(mor_emulated::Vote::Or, predicate, "__syncthreads_or", file,
                                       line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, MOR_HERE) {
    mor_emulated::collective(mor_emulated::Operation::Sync, mask, 0, false, "__syncwarp", file,
                             line);
}

// The lane to read, as PTX's shfl.sync computes it: outside the segment of `width` lanes it is the
// lane itself.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, MOR_HERE) {
    const unsigned lane = mor_emulated::current->lane, segment = ~unsigned(width - 1);
    return mor_emulated::shuffle(mask, value,
                                 (lane & segment) | (unsigned(source) & ~segment & 31u),
                                 "__shfl_sync", file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MOR_HERE) {
    const unsigned lane = mor_emulated::current->lane, first = lane & ~unsigned(width - 1);
    return mor_emulated::shuffle(mask, value, lane - first < delta ? lane : lane - delta,
                                 "__shfl_up_sync", file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MOR_HERE) {
    const unsigned lane = mor_emulated::current->lane, last = lane | unsigned(width - 1);
    return mor_emulated::shuffle(mask, value, last - lane < delta ? lane : lane + delta,
                                 "__shfl_down_sync", file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MOR_HERE) {
    const unsigned lane = mor_emulated::current->lane, last = lane | unsigned(width - 1);
    const unsigned source = lane ^ unsigned(lane_mask);
    return mor_emulated::shuffle(mask, value, source > last ? lane : source, "__shfl_xor_sync",
                                 file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MOR_HERE) {
    return mor_emulated::collective(mor_emulated::Operation::Ballot, mask, predicate != 0, false,
                                    "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int predicate, MOR_HERE) {
    return mor_emulated::collective(mor_emulated::Operation::Any, mask, predicate != 0, false,
                                    "__any_sync", file, line);
}
inline int __all_sync(unsigned mask, int predicate, MOR_HERE) {
    return mor_emulated::collective(mor_emulated::Operation::All, mask, predicate != 0, false,
                                    "__all_sync", file, line);
}
#define MOR_REDUCTION(name, operation)                                                            \
    template <class T> T name(unsigned mask, T value, MOR_HERE) {                                 \
        static_assert(std::is_integral<T>::value, "warp reductions are for integers");            \
        return T(mor_emulated::collective(mor_emulated::Operation::operation, mask,               \
                                          uint32_t(value), std::is_signed<T>::value, #name, file, \
                                          line));                                                 \
    }
MOR_REDUCTION(__reduce_add_sync, ReduceAdd)
MOR_REDUCTION(__reduce_min_sync, ReduceMin)
MOR_REDUCTION(__reduce_max_sync, ReduceMax)
MOR_REDUCTION(__reduce_and_sync, ReduceAnd)
MOR_REDUCTION(__reduce_or_sync, ReduceOr)
MOR_REDUCTION(__reduce_xor_sync, ReduceXor)
#undef MOR_REDUCTION

/**
 * mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32: D += A B over the fragments of the 32 lanes,
 * laid out as in the PTX manual. Products are exact; sums are rounded to float, from k = 0 to 15.
 */
inline void mor_emulated_mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2],
                                      MOR_HERE) {
    mor_emulated::Exchange e{mor_emulated::Operation::Mma, 0xffffffffu, "mma.m16n8k16", file, line};
    e.d = d;
    e.a = a;
    e.b = b;
    mor_emulated::warp_collective(e);
}
#undef MOR_HERE

/**
 * wgmma.mma_async.sync.aligned.m64nNk16.f32.f16.f16, a warp's sixteen rows of it, N = 8 * count: D = A B, or D += A B,
 * with A in registers and B in shared memory, as its description says. It is carried out when it is waited for, so that
 * what is overwritten too early is seen; that A's registers are left alone is the compiler's affair. That all four
 * warps come is not checked.
 */
void mor_emulated_wgmma(float (*d)[4], unsigned count, const uint32_t a[4], uint64_t b, bool adds);
void mor_emulated_wgmma_commit();
/** Until no more than so many of the lane's batches are left. */
void mor_emulated_wgmma_wait(unsigned batches);

/**
 * cp.async, of 4 or 16 bytes, or of as many zeros where nothing is `wanted`. It is carried out when it is waited for, the
 * last first, so that what is looked at too early is seen, and what two copies are written to.
 */
void mor_emulated_begin_copy(void *to, const void *from, unsigned bytes, bool wanted);
void mor_emulated_close_copies();
/** Until no more than so many of the lane's batches are left. */
void mor_emulated_wait_for_copies(unsigned batches);
/** Until none of its copies are left, closed or not. */
void mor_emulated_finish_copies();

inline float mor_emulated_half_to_float(uint16_t bits) { return mor_emulated::half_to_float(bits); }
inline uint16_t mor_emulated_float_to_half(float value) {
    return mor_emulated::float_to_half(value);
}

// One fiber runs at a time, so that plain code is atomic.
template <class T> struct mor_same {
    typedef T type;
};
#define MOR_ATOMIC(name, expression)                                          \
    template <class T> T name(T *address, typename mor_same<T>::type value) { \
        const T old = *address;                                               \
        *address = T(expression);                                             \
        return old;                                                           \
    }
MOR_ATOMIC(atomicAdd, old + value)
MOR_ATOMIC(atomicMin, value < old ? value : old)
MOR_ATOMIC(atomicOr, old | value)
#undef MOR_ATOMIC
template <class T>
T atomicCAS(T *address, typename mor_same<T>::type compare, typename mor_same<T>::type value) {
    const T old = *address;
    if (old == compare) *address = value;
    return old;
}
inline long long clock64() { return (long long)mor_emulated::ticks(); }
[[noreturn]] inline void __trap() { mor_emulated::trap("__trap()"); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selector >> 4 * i & 15u;
        unsigned byte = unsigned(bytes >> 8 * (s & 7u)) & 0xffu;
        if (s & 8u) byte = byte & 0x80u ? 0xffu : 0;
        r |= byte << 8 * i;
    }
    return r;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }

inline unsigned __float_as_uint(float x) { return mor_emulated::bits_of(x); }
inline float __uint_as_float(unsigned x) { return mor_emulated::from_bits<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
// Some C libraries have a function of this name.
#define rsqrtf(x) (1.0f / ::sqrtf(x))

template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point<T>::value)
        return std::fmin(T(a), T(b));
    else
        return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point<T>::value)
        return std::fmax(T(a), T(b));
    else
        return T(a) < T(b) ? T(b) : T(a);
}

#endif

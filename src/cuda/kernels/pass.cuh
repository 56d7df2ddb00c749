// A whole pass as one kernel: its blocks, all of which run at the same time, go through the pass's pieces of work
// together. What a kernel of its own would wait for, the end of the one before, is here a counter of the blocks that
// are done; and the next work's first weights are on their way by then.
#pragma once
#include "exact.cuh"
#include "lone.cuh"
#include "many.cuh"
#include "routing.cuh"
#include "sampling.cuh"
#include "warpgroup.cuh"

#if defined(MOR_TENSOR_CORES) && (defined(MOR_EMULATED) || __CUDA_ARCH__ == 900)
// The works by their numbers, as `WORKS` in pass.rs: number, parameters, function. A compiler that sees all of them at
// once keeps what some of them have in registers in memory. Those are CALLED by their addresses, so that it looks at
// each by itself; others are DIRECT, for a call saves registers that nobody wants.
#define MOR_EVERY_WORK(DIRECT, CALLED) \
    DIRECT(0, BeginParams, begin_pass) \
    DIRECT(1, EmbedParams, embed) \
    DIRECT(2, CopyRowsParams, copy_rows) \
    DIRECT(3, ReadyParams, ready<NORM>) \
    DIRECT(4, ReadyParams, ready<SCALED>) \
    DIRECT(5, ReadyParams, ready<GELU>) \
    DIRECT(6, ReadyParams, ready<SWIGLU>) \
    DIRECT(7, ReadyParams, ready<PLAIN>) \
    DIRECT(8, ReadyParams, ready<ATTENTION>) \
    DIRECT(9, ReadyParams, ready_floats) \
    DIRECT(10, ProductParams, product_by_fma<true, false>) \
    DIRECT(11, ProductParams, product_by_fma<true, true>) \
    DIRECT(12, ProductParams, product_by_fma<false, false>) \
    DIRECT(13, ProductParams, product_by_fma<false, true>) \
    DIRECT(14, StoreParams, store_row<F32>) \
    DIRECT(15, StoreParams, store_row<F16>) \
    DIRECT(16, StoreParams, store_row<Q8_0>) \
    DIRECT(17, AttentionParams, attend_floats<F32>) \
    DIRECT(18, AttentionParams, attend_floats<Q8_0>) \
    DIRECT(19, SeatsParams, give_seats) \
    DIRECT(20, ScoreParams, score_rows) \
    DIRECT(21, SelectParams, select_rows) \
    DIRECT(22, DecideParams, decide_rows) \
    DIRECT(23, MergeParams, merge_rows) \
    DIRECT(24, LeaveParams, leave_recursions) \
    DIRECT(25, CandidatesParams, find_candidates) \
    DIRECT(26, SampleParams, draw_token) \
    CALLED(27, AttentionParams, attend_tiles<false, false>) \
    CALLED(28, AttentionParams, attend_tiles<false, true>) \
    CALLED(29, AttentionParams, attend_tiles<true, false>) \
    CALLED(30, AttentionParams, attend_tiles<true, true>)
// After them the products of each type of matrices, as `PRODUCTS` there.
#define MOR_EVERY_PRODUCT(TYPE, DIRECT, CALLED) \
    DIRECT(number_of_product(TYPE, 0), ProductParams, lone_product<TYPE, NORM, 1>) \
    DIRECT(number_of_product(TYPE, 1), ProductParams, lone_product<TYPE, PLAIN, 1>) \
    DIRECT(number_of_product(TYPE, 2), ProductParams, lone_product<TYPE, ATTENTION, 1>) \
    DIRECT(number_of_product(TYPE, 3), ProductParams, lone_product<TYPE, NORM, 2>) \
    DIRECT(number_of_product(TYPE, 4), ProductParams, ready_product<TYPE, 1>) \
    CALLED(number_of_product(TYPE, 5), ProductParams, ready_product<TYPE, MANY / 8>) \
    CALLED(number_of_product(TYPE, 6), ProductParams, wide_product<TYPE, 1, 2>) \
    CALLED(number_of_product(TYPE, 7), ProductParams, wide_product<TYPE, 2, 2>)

constexpr u32 WORKS = 31, PRODUCT_WORKS = 8;

__device__ constexpr u32 number_of_product(u32 type, u32 product) {
#define MOR_NUMBER(TYPE, type) TYPE,
    constexpr u32 types[] = {MOR_EVERY_TYPE(MOR_NUMBER)};
#undef MOR_NUMBER
    u32 place = 0;
    while (types[place] != type) place++;
    return WORKS + PRODUCT_WORKS * place + product;
}

// A piece of work of the pass, as pass.rs writes it.
struct Step {
    // Its number, or WHEN: the steps before number `skip` are for rows only whose number stands at `rows`.
    u32 work;
    // Its blocks.
    u32 x, y, z;
    const u32* rows;
    u32 skip;
    u32 unused;
    uint4 parameter[44];
};

constexpr u32 WHEN = 0xffffffffu;
static_assert(sizeof(Step) == 736, "as in params.rs");

struct PassParams {
    const Step* steps;
    // Of each step how many blocks are done with it; zeros at the start.
    u32* arrived;
    u32 count;
    u32 unused;
};

// The step that runs and the one after it, which is on its way.
struct Steps {
    Step of[2];
};

__device__ __forceinline__ Steps& steps() {
    __shared__ Steps both;
    return both;
}

// A block's turn at a step. A block may have several.
struct InPass {
    static constexpr bool OVERLAPS = true;

    u32 block[3];
    // Which of both steps it is.
    u32 which;
    bool first;
    // Whether the steps before are still to be waited for: until `wanted` blocks have arrived.
    bool waits;
    u32 wanted;
    const u32* arrived;
    // The counter to tell that the block is done with the step, after its last turn; else null.
    u32* done;

    __device__ __forceinline__ u32 x() const { return block[0]; }
    __device__ __forceinline__ u32 y() const { return block[1]; }
    __device__ __forceinline__ u32 z() const { return block[2]; }
    __device__ __forceinline__ bool is_first() const { return first; }
    __device__ __forceinline__ void let_next_begin() const {}

    __device__ __forceinline__ void wait() {
        if (!waits) return;
        if (threadIdx.x == 0) wait_until(arrived, wanted);
        __syncthreads();
        waits = false;
    }

    // All threads are done: shared memory is free, and has the next step.
    __device__ __forceinline__ void end() const {
        wait_for_copies<0>();
        __syncthreads();
        if (done && threadIdx.x == 0) arrive(done);
    }
};

template <class P>
__device__ __forceinline__ const P& parameter_of(const InPass& turn) {
    return *reinterpret_cast<const P*>(steps().of[turn.which].parameter);
}

// Each work is a function of its own, which is told in registers what a struct would not be.
template <u32 NUMBER>
struct Work;

#define MOR_DEFINE(number, Params, ...)                                                                           \
    template <>                                                                                                   \
    struct Work<number> {                                                                                         \
        static_assert(sizeof(Params) <= sizeof(Step::parameter), "the largest parameter");                        \
        static __device__ MOR_OUT_OF_LINE void run(u32 x, u32 y, u32 z, u32 which, bool first, bool waits,        \
                                                   u32 wanted, const u32* arrived, u32* done) {                   \
            InPass turn = {{x, y, z}, which, first, waits, wanted, arrived, done};                                \
            (__VA_ARGS__)(parameter_of<Params>(turn), turn);                                                      \
            turn.end();                                                                                           \
        }                                                                                                         \
    };
#define MOR_DEFINE_PRODUCTS(TYPE, type) MOR_EVERY_PRODUCT(TYPE, MOR_DEFINE, MOR_DEFINE)
MOR_EVERY_WORK(MOR_DEFINE, MOR_DEFINE)
MOR_EVERY_TYPE(MOR_DEFINE_PRODUCTS)

#define MOR_NO_ADDRESS(number, Params, ...) nullptr,
#define MOR_ADDRESS(number, Params, ...) Work<number>::run,
#define MOR_ADDRESSES(TYPE, type) MOR_EVERY_PRODUCT(TYPE, MOR_NO_ADDRESS, MOR_ADDRESS)
typedef void (*Run)(u32, u32, u32, u32, bool, bool, u32, const u32*, u32*);
__device__ const Run addresses[] = {MOR_EVERY_WORK(MOR_NO_ADDRESS, MOR_ADDRESS) MOR_EVERY_TYPE(MOR_ADDRESSES)};

__device__ __forceinline__ void do_work(u32 number, const InPass& t) {
#define MOR_ARGUMENTS t.block[0], t.block[1], t.block[2], t.which, t.first, t.waits, t.wanted, t.arrived, t.done
#define MOR_CASE(number, Params, ...) \
    case number: return Work<number>::run(MOR_ARGUMENTS);
#define MOR_NO_CASE(number, Params, ...)
#define MOR_PRODUCT_CASES(TYPE, type) MOR_EVERY_PRODUCT(TYPE, MOR_CASE, MOR_NO_CASE)
    switch (number) {
        MOR_EVERY_WORK(MOR_CASE, MOR_NO_CASE)
        MOR_EVERY_TYPE(MOR_PRODUCT_CASES)
        default: return addresses[number](MOR_ARGUMENTS);
    }
}

__device__ __forceinline__ void copy_step(const Step* from, u32 which) {
    if (threadIdx.x < sizeof(Step) / 16)
        begin_copy<16>(reinterpret_cast<uint4*>(&steps().of[which]) + threadIdx.x,
                       reinterpret_cast<const uint4*>(from) + threadIdx.x);
    close_copies();
}

// grid: as many blocks as the device has room for at the same time, by a cooperative launch; dynamic shared memory:
// the most that any step wants.
//
// A block that has nothing to do in a step goes on at once, and waits in the next where it has. Nobody gets ahead of
// work that is not done: a step is done when blocks that had waited for the step before it are.
extern "C" __global__ void __launch_bounds__(BLOCK, 2) mor_pass(const PassParams p) {
    InPass turn = {};
    copy_step(p.steps, 0);
    wait_for_copies<0>();
    __syncthreads();
    for (u32 number = 0; number < p.count; turn.which ^= 1) {
        const Step& step = steps().of[turn.which];
        u32 next = number + 1;
        if (step.work == WHEN) {
            turn.wait();
            // All threads say the same, although blocks that have work may be far ahead and count anew.
            if (!__syncthreads_or(load_now(step.rows) != 0)) next = step.skip;
        }
        if (next < p.count) copy_step(p.steps + next, turn.which ^ 1);
        const u32 blocks = step.work == WHEN ? 0 : step.x * step.y * step.z;
        for (u32 block = blockIdx.x; block < blocks; block += gridDim.x) {
            turn.first = block == blockIdx.x;
            turn.done = block + gridDim.x < blocks ? nullptr : p.arrived + number;
            turn.block[0] = block, turn.block[1] = turn.block[2] = 0;
            if (block >= step.x) {
                turn.block[0] = block % step.x;
                turn.block[1] = block / step.x % step.y;
                turn.block[2] = block / step.x / step.y;
            }
            do_work(step.work, turn);
            turn.waits = false;
        }
        if (blockIdx.x >= blocks) {
            turn.done = nullptr;
            turn.end();
        }
        if (blocks > 0) {
            turn.arrived = p.arrived + number;
            turn.wanted = blocks < gridDim.x ? blocks : gridDim.x;
            turn.waits = true;
        }
        number = next;
    }
}
MOR_KERNEL(mor_pass)
#endif

/* When and where the blocks of kernels run: for images that are compiled with MOR_TIMELINE (timeline.py), never for
 * those of the library. A block's first thread writes one record, when its kernel ends. */
#pragma once

/* As timeline.py reads it. */
struct Record {
    // Of the kernel's name, as `hash_of_name` makes it; the block's number among so many; where it ran.
    u32 kernel, block, blocks, multiprocessor;
    // The device's time when the block began. All other times are its multiprocessor's clock.
    u64 nanoseconds;
    u64 began, moments[3], ended;
};

/* The last so many are kept. */
constexpr u32 RECORDS = 1 << 20;
__device__ u32 mor_records_written;
__device__ Record mor_records[RECORDS];

#ifdef MOR_EMULATED
extern "C" int cuMemAlloc_v2(u64* address, size_t bytes);
extern "C" int cuMemcpyHtoD_v2(u64 address, const void* from, size_t bytes);

/* A driver's function that the emulated one lacks: of these two variables it gives a copy, for on the emulated device
 * they are not in the device's memory. */
extern "C" __attribute__((visibility("default"))) int cuModuleGetGlobal_v2(u64* address, size_t* bytes, void*,
                                                                          const char* name) {
    const bool count = __builtin_strcmp(name, "mor_records_written") == 0;
    const void* variable = count ? static_cast<const void*>(&mor_records_written) : mor_records;
    *bytes = count ? sizeof mor_records_written : sizeof mor_records;
    const int status = cuMemAlloc_v2(address, *bytes);
    return status ? status : cuMemcpyHtoD_v2(*address, variable, *bytes);
}
#endif

__device__ constexpr u32 hash_of_name(const char* name) {
    u32 hash = 2166136261u;
    for (; *name; name++) hash = (hash ^ static_cast<u8>(*name)) * 16777619u;
    return hash;
}

#ifdef MOR_EMULATED
__device__ __forceinline__ Record& record_of_block() {
    __shared__ Record record;
    return record;
}
#else
/* Records of the blocks that run, by where their first warps are. Not in shared memory, of which a product may take all
 * that two blocks of a multiprocessor have: the kernels that are measured would not run beside each other. */
constexpr u32 WARPS_AT_ONCE = 64, MULTIPROCESSORS = 256;
__device__ Record mor_open_records[MULTIPROCESSORS * WARPS_AT_ONCE];

__device__ __forceinline__ Record& record_of_block() {
    u32 multiprocessor, warp;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
    asm volatile("mov.u32 %0, %%warpid;" : "=r"(warp));
    return mor_open_records[multiprocessor % MULTIPROCESSORS * WARPS_AT_ONCE + warp % WARPS_AT_ONCE];
}
#endif

/* What the block has done by now. */
enum Moment : u32 { WAITED, READY, MULTIPLIED };

__device__ __forceinline__ void mark(Moment moment) {
    if (threadIdx.x == 0) record_of_block().moments[moment] = clock64();
}

/* A block's time in its kernel. The place of its record is asked for when it begins, and needed when it ends. */
struct Timed {
    u32 place = 0;

    __device__ __forceinline__ explicit Timed(u32 kernel) {
        if (threadIdx.x != 0) return;
        Record& r = record_of_block();
        r.kernel = kernel;
        r.block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        r.blocks = gridDim.x * gridDim.y * gridDim.z;
        for (u32 i = 0; i < 3; i++) r.moments[i] = 0;
        r.began = clock64();
#ifdef MOR_EMULATED
        r.nanoseconds = r.began;
        r.multiprocessor = 0;
#else
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(r.nanoseconds));
        asm volatile("mov.u32 %0, %%smid;" : "=r"(r.multiprocessor));
#endif
        place = atomicAdd(&mor_records_written, 1);
    }

    __device__ __forceinline__ ~Timed() {
        __syncthreads();
        if (threadIdx.x != 0) return;
        Record& r = record_of_block();
        r.ended = clock64();
        mor_records[place % RECORDS] = r;
    }
};

#define MOR_TIMED(name) const Timed timed(hash_of_name(#name))

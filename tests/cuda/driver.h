/*
 * The fake driver's own header: the declarations of cuda.h (12.6) that it implements, and its
 * state.
 */
#ifndef MOR_FAKE_DRIVER_H
#define MOR_FAKE_DRIVER_H

#include "fibers.h"

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// cuda.h
typedef int CUresult, CUdevice;
typedef unsigned long long CUdeviceptr, CUgraphConditionalHandle;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUkern_st *CUkernel;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphNode_st *CUgraphNode;
typedef struct CUgraphExec_st *CUgraphExec;

enum : CUresult {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_NOT_SUPPORTED = 801,
};

struct CUDA_KERNEL_NODE_PARAMS { // _v2 and _v3
    CUfunction func;
    unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
    void **kernelParams, **extra;
    CUkernel kern;
    CUcontext ctx;
};
enum { CU_MEMORYTYPE_HOST = 1, CU_MEMORYTYPE_DEVICE = 2, CU_MEMORYTYPE_UNIFIED = 4 };
struct CUDA_MEMCPY3D {
    size_t srcXInBytes, srcY, srcZ, srcLOD;
    unsigned srcMemoryType;
    const void *srcHost;
    CUdeviceptr srcDevice;
    void *srcArray, *reserved0;
    size_t srcPitch, srcHeight;
    size_t dstXInBytes, dstY, dstZ, dstLOD;
    unsigned dstMemoryType;
    void *dstHost;
    CUdeviceptr dstDevice;
    void *dstArray, *reserved1;
    size_t dstPitch, dstHeight, WidthInBytes, Height, Depth;
};
struct CUDA_MEMCPY_NODE_PARAMS {
    int flags, reserved;
    CUcontext copyCtx;
    CUDA_MEMCPY3D copyParams;
};
struct CUDA_MEMSET_NODE_PARAMS {
    CUdeviceptr dst;
    size_t pitch;
    unsigned value, elementSize;
    size_t width, height;
};
struct CUDA_MEMSET_NODE_PARAMS_v2 {
    CUDA_MEMSET_NODE_PARAMS set;
    CUcontext ctx;
};
struct CUDA_CHILD_GRAPH_NODE_PARAMS {
    CUgraph graph;
};
enum { CU_GRAPH_COND_TYPE_IF = 0, CU_GRAPH_COND_TYPE_WHILE = 1 };
struct CUDA_CONDITIONAL_NODE_PARAMS {
    CUgraphConditionalHandle handle;
    unsigned type, size;
    CUgraph *phGraph_out;
    CUcontext ctx;
};
enum {
    CU_GRAPH_NODE_TYPE_KERNEL = 0,
    CU_GRAPH_NODE_TYPE_MEMCPY = 1,
    CU_GRAPH_NODE_TYPE_MEMSET = 2,
    CU_GRAPH_NODE_TYPE_GRAPH = 4,
    CU_GRAPH_NODE_TYPE_EMPTY = 5,
    CU_GRAPH_NODE_TYPE_CONDITIONAL = 13,
};
struct CUgraphNodeParams {
    unsigned type;
    int reserved0[3];
    union {
        long long reserved1[29];
        CUDA_KERNEL_NODE_PARAMS kernel;
        CUDA_MEMCPY_NODE_PARAMS memcpy;
        CUDA_MEMSET_NODE_PARAMS_v2 memset;
        CUDA_CHILD_GRAPH_NODE_PARAMS graph;
        CUDA_CONDITIONAL_NODE_PARAMS conditional;
    };
    long long reserved2;
};
constexpr unsigned char CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC = 1;
constexpr unsigned char CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC = 1;
struct CUgraphEdgeData {
    unsigned char from_port, to_port, type, reserved[5];
};
static_assert(sizeof(CUDA_KERNEL_NODE_PARAMS) == 72 && sizeof(CUDA_MEMCPY3D) == 200 &&
                  sizeof(CUDA_MEMCPY_NODE_PARAMS) == 216 &&
                  sizeof(CUDA_MEMSET_NODE_PARAMS_v2) == 48 &&
                  sizeof(CUDA_CONDITIONAL_NODE_PARAMS) == 32 && sizeof(CUgraphNodeParams) == 256 &&
                  sizeof(CUgraphEdgeData) == 8,
              "the layout of cuda.h");

namespace fake {

using mor_emulated::Registration;

#define FAKE extern "C" __attribute__((visibility("default")))

/** What the environment, or fakeCudaSet, asks for. */
struct Settings {
    int version = 12060, architecture = 90, devices = 1, integrated = 0, poison = 1;
    size_t memory = size_t(8) << 30;
    std::map<int, int> attributes; // overrides, by number
    struct Fault {
        std::string function;
        uint64_t call;
        bool onwards;
        CUresult code;
    };
    std::vector<Fault> faults;
    std::vector<Fault> losses;
};

enum class Memory { Device, Pinned, Registered };
/** A live allocation; the map of them is ordered by address. */
struct Allocation {
    uintptr_t address;
    size_t size;
    Memory kind;
    int device;
    uintptr_t map_address; // with the guard pages; nothing for registered memory
    size_t map_size;
};

struct Module {
    int device;
};
struct Function {
    const Registration *kernel;
    CUmodule module;
    int max_dynamic_shared;
    size_t static_shared; // seen so far
};

/** Work that a stream has taken, to be done when somebody waits for it. */
struct Work {
    uint64_t sequence;
    const char *name;
    std::function<void()> run;
};
struct Stream {
    int device;
    bool blocking; // waits for the default stream and makes it wait
    std::vector<Work> queue;
    size_t done = 0; // of the queue
};
struct Event {
    int device;
    bool timed;
    CUstream stream = nullptr; // of the last record
    uint64_t sequence = 0;
    bool complete = true, recorded = false;
    std::chrono::steady_clock::time_point when;
};

/** A kernel launch with its parameters copied. */
struct Launch {
    CUfunction function;
    const Registration *kernel;
    dim3 grid, block;
    size_t shared_bytes;
    std::vector<unsigned char> parameters;
};

struct Graph;
struct Node {
    uintptr_t id;
    unsigned type;
    std::vector<uintptr_t> dependencies;
    Launch launch;
    CUDA_MEMCPY3D copy{};
    CUDA_MEMSET_NODE_PARAMS set{};
    std::shared_ptr<Graph> body; // of a conditional or child graph node
    CUgraph body_handle = nullptr;
    CUgraphConditionalHandle handle = 0;
    unsigned condition = 0;
};
struct Graph {
    int device;
    bool is_body;
    std::vector<Node> nodes;
};
struct Condition {
    CUgraph graph;
    unsigned initial;
    bool assign, used;
};
struct Executable {
    int device;
    std::shared_ptr<Graph> program;
    std::map<CUgraphConditionalHandle, Condition> conditions;
    std::map<CUgraphConditionalHandle, unsigned> values;
};

/** Live objects of one kind; a handle is a number that is never given out twice. */
template <class T, uintptr_t Tag> struct Table {
    std::map<uintptr_t, std::shared_ptr<T>> live;
    uintptr_t last = 0;

    uintptr_t add(std::shared_ptr<T> object) {
        const uintptr_t handle = Tag << 48 | ++last << 4;
        live[handle] = std::move(object);
        return handle;
    }
    T *find(const void *handle) const {
        const auto it = live.find(reinterpret_cast<uintptr_t>(handle));
        return it == live.end() ? nullptr : it->second.get();
    }
};

struct Driver {
    std::recursive_mutex mutex;
    Settings settings;
    bool configured = false, initialised = false;
    CUresult lost = CUDA_SUCCESS; // sticky
    std::map<std::string, uint64_t> calls;
    std::map<std::string, uint64_t> kernels; // how often each ran
    std::map<std::string, uint64_t> blocks;  // and of how many blocks in all
    std::map<std::string, uint64_t> shared;  // and the most dynamic shared memory of a block
    uint64_t launches = 0, leaks = 0, sequence = 0;
    std::string last_refusal, last_image;
    std::map<int, int> retained; // by device
    std::map<int, size_t> used;  // device memory, by device

    std::map<uintptr_t, Allocation> allocations;
    Table<Module, 0xa1> modules;
    Table<Function, 0xa2> functions;
    Table<Stream, 0xa3> streams;
    Table<Event, 0xa4> events;
    Table<Graph, 0xa5> graphs; // bodies too
    Table<Executable, 0xa6> executables;
    std::map<int, Stream> default_streams; // by device
    std::map<CUgraphConditionalHandle, Condition> conditions;
    uintptr_t last_node = 0;
};

extern Driver driver;

enum class Needs { Nothing, Init, Context };

/** At the start of every entry point: counts, injects faults, and checks what the call needs. */
CUresult enter(const char *function, Needs needs);
#define FAKE_ENTER_QUIET(function, needs)                                 \
    const std::lock_guard<std::recursive_mutex> lock(fake::driver.mutex); \
    [[maybe_unused]] static const char *const self = #function;           \
    const CUresult entered = fake::enter(self, fake::Needs::needs)
#define FAKE_ENTER(function, needs)    \
    FAKE_ENTER_QUIET(function, needs); \
    if (entered) return entered
/** Of functions that free: a lost device does not keep them from it. */
#define FAKE_ENTER_FREE(function, needs)              \
    FAKE_ENTER_QUIET(function, needs);                \
    if (entered && !fake::driver.lost) return entered

/** Says on stderr why a call is refused, and gives the code back. */
CUresult refuse(CUresult code, const char *function, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** The device of the calling thread's context, or -1. */
int current_device();
/** A device's attribute by its number, as cuDeviceGetAttribute tells it. */
int attribute(int number);

/** The live allocation that holds the whole range, or nothing. */
const Allocation *holder(uintptr_t address, size_t size);
/** What is wrong with the range for the device, for refusals: freed, too long, the host's. */
std::string complaint(uintptr_t address, size_t size);
/** Whether a range of host memory lies outside of everything that the driver knows. */
bool is_pageable(uintptr_t address, size_t size);
/** If a word of a kernel's parameters is an address that the device cannot use: what is there. */
const char *unreachable(uintptr_t word);
/** Ends the process if somebody wrote outside an allocation, up to `reach` bytes away. */
void check_guards(const char *when, size_t reach = 256);
/** Frees all memory of a device, at the release of its context; returns how many there were. */
size_t release_memory(int device);
/** Fills host memory that a pending copy will write. */
void poison(void *memory, size_t bytes);

Stream *find_stream(CUstream handle);
void push(Stream &stream, const char *name, std::function<void()> run);
/** Runs the stream's work up to and with the given sequence number, and what it waits for. */
void run_stream(Stream &stream, uint64_t sequence);
void run_device(int device);
/** The device is lost: what streams have taken will not be done. */
void drop_work();
constexpr uint64_t ALL = ~uint64_t(0);

/** Checks a launch against the limits of the device and copies its parameters. */
CUresult make_launch(const char *function, const CUDA_KERNEL_NODE_PARAMS &request, Launch &launch);
void run_launch(const Launch &launch);
/** Checks a copy that a graph is to do; `pageable` says whether such host memory is allowed. */
CUresult check_copy(const char *function, const CUDA_MEMCPY3D &copy, bool pageable);
void run_copy(const CUDA_MEMCPY3D &copy);
CUresult check_set(const char *function, const CUDA_MEMSET_NODE_PARAMS &set);
void run_set(const CUDA_MEMSET_NODE_PARAMS &set);
/** A copy node's host destination, and its size; nothing for one on the device. */
void *host_destination(const CUDA_MEMCPY3D &copy, size_t &bytes);

template <class H> H as_handle(uintptr_t handle) { return reinterpret_cast<H>(handle); }

} // namespace fake

#endif

/*
 * What the tests of the emulation share: the driver API's functions, checks, and a device to work
 * on.
 */
#ifndef MOR_SELFTEST_H
#define MOR_SELFTEST_H

#include "driver.h"
#include "selftest_kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sys/wait.h>
#include <unistd.h>

extern "C" {
CUresult cuInit(unsigned);
CUresult cuDriverGetVersion(int *);
CUresult cuGetErrorName(CUresult, const char **);
CUresult cuDeviceGetCount(int *);
CUresult cuDeviceGetAttribute(int *, int, CUdevice);
CUresult cuDevicePrimaryCtxRetain(CUcontext *, CUdevice);
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuMemGetInfo_v2(size_t *, size_t *);
CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemHostAlloc(void **, size_t, unsigned);
CUresult cuMemFreeHost(void *);
CUresult cuMemHostRegister_v2(void *, size_t, unsigned);
CUresult cuMemHostUnregister(void *);
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *, void *, unsigned);
CUresult cuMemcpyHtoD_v2(CUdeviceptr, const void *, size_t);
CUresult cuMemcpyDtoH_v2(void *, CUdeviceptr, size_t);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void *, size_t, CUstream);
CUresult cuMemcpyDtoHAsync_v2(void *, CUdeviceptr, size_t, CUstream);
CUresult cuModuleLoadData(CUmodule *, const void *);
CUresult cuModuleUnload(CUmodule);
CUresult cuModuleGetFunction(CUfunction *, CUmodule, const char *);
CUresult cuFuncSetAttribute(CUfunction, int, int);
CUresult cuFuncGetParamInfo(CUfunction, size_t, size_t *, size_t *);
CUresult cuStreamCreate(CUstream *, unsigned);
CUresult cuStreamDestroy_v2(CUstream);
CUresult cuStreamSynchronize(CUstream);
CUresult cuStreamQuery(CUstream);
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
CUresult cuEventCreate(CUevent *, unsigned);
CUresult cuEventRecord(CUevent, CUstream);
CUresult cuEventSynchronize(CUevent);
CUresult cuEventElapsedTime(float *, CUevent, CUevent);
CUresult cuEventDestroy_v2(CUevent);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, CUstream, void **, void **);
CUresult cuGraphCreate(CUgraph *, unsigned);
CUresult cuGraphDestroy(CUgraph);
CUresult cuGraphAddKernelNode_v2(CUgraphNode *, CUgraph, const CUgraphNode *, size_t,
                                 const CUDA_KERNEL_NODE_PARAMS *);
CUresult cuGraphAddMemcpyNode(CUgraphNode *, CUgraph, const CUgraphNode *, size_t,
                              const CUDA_MEMCPY3D *, CUcontext);
CUresult cuGraphAddMemsetNode(CUgraphNode *, CUgraph, const CUgraphNode *, size_t,
                              const CUDA_MEMSET_NODE_PARAMS *, CUcontext);
CUresult cuGraphAddNode_v2(CUgraphNode *, CUgraph, const CUgraphNode *, const CUgraphEdgeData *,
                           size_t, CUgraphNodeParams *);
CUresult cuGraphConditionalHandleCreate(CUgraphConditionalHandle *, CUgraph, CUcontext, unsigned,
                                        unsigned);
CUresult cuGraphInstantiateWithFlags(CUgraphExec *, CUgraph, unsigned long long);
CUresult cuGraphExecDestroy(CUgraphExec);
CUresult cuGraphLaunch(CUgraphExec, CUstream);
CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec, CUgraphNode,
                                           const CUDA_KERNEL_NODE_PARAMS *);
CUresult cuDeviceGet(CUdevice *, int);
CUresult cuDeviceGetName(char *, int, CUdevice);
CUresult cuCtxPushCurrent_v2(CUcontext);
CUresult cuCtxPopCurrent_v2(CUcontext *);
CUresult cuMemcpyDtoD_v2(CUdeviceptr, CUdeviceptr, size_t);
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, size_t, CUstream);
CUresult cuMemsetD8_v2(CUdeviceptr, unsigned char, size_t);
CUresult cuMemsetD8Async(CUdeviceptr, unsigned char, size_t, CUstream);
CUresult cuFuncGetAttribute(int *, int, CUfunction);
CUresult cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
CUresult cuGraphUpload(CUgraphExec, CUstream);
void fakeCudaReset();
void fakeCudaSet(const char *, const char *);
uint64_t fakeCudaCalls(const char *);
uint64_t fakeCudaLive();
uint64_t fakeCudaLeaks();
uint64_t fakeCudaLaunches();
uint64_t fakeCudaKernels(const char *);
const char *fakeCudaLastRefusal();
const char *fakeCudaLastImage();
}

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)
#define OK(call) expect(call, CUDA_SUCCESS, #call, __FILE__, __LINE__)
#define FAILS(call, code) expect(call, code, #call, __FILE__, __LINE__)

inline void expect(CUresult got, CUresult wanted, const char *call, const char *file, int line) {
    if (got == wanted) return;
    std::fprintf(stderr, "%s:%d: %s is %d and not %d\n", file, line, call, got, wanted);
    std::exit(1);
}

/** On a device that open_device() opens and close_device() finds empty again. */
inline CUmodule module;
inline CUstream stream;

inline CUfunction function(const char *name) {
    CUfunction f;
    OK(cuModuleGetFunction(&f, module, name));
    return f;
}

inline void open_device() {
    OK(cuInit(0));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuModuleLoadData(&module, "image"));
    OK(cuStreamCreate(&stream, 1));
}

inline void close_device() {
    OK(cuStreamDestroy_v2(stream));
    OK(cuModuleUnload(module));
    CHECK(fakeCudaLive() == 1); // the context
    OK(cuDevicePrimaryCtxRelease_v2(0));
    CHECK(fakeCudaLive() == 0 && fakeCudaLeaks() == 0);
}

template <class T> CUdeviceptr upload(const std::vector<T> &values) {
    CUdeviceptr address;
    OK(cuMemAlloc_v2(&address, values.size() * sizeof(T)));
    OK(cuMemcpyHtoD_v2(address, values.data(), values.size() * sizeof(T)));
    OK(cuStreamSynchronize(nullptr)); // else it may be on its way still
    return address;
}

template <class T> std::vector<T> download(CUdeviceptr address, size_t count) {
    std::vector<T> values(count);
    OK(cuMemcpyDtoH_v2(values.data(), address, count * sizeof(T)));
    return values;
}

template <class P>
CUresult launch(const char *name, dim3 grid, dim3 block, P parameters, unsigned shared = 0) {
    void *pointers[] = {&parameters};
    return cuLaunchKernel(function(name), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
                          stream, pointers, nullptr);
}

template <class P>
CUDA_KERNEL_NODE_PARAMS node_params(const char *name, dim3 grid, dim3 block, void **pointer,
                                    P &parameters) {
    *pointer = &parameters;
    return {function(name), grid.x, grid.y,  grid.z,  block.x, block.y,
            block.z,        0,      pointer, nullptr, nullptr, nullptr};
}

inline uint32_t random_state = 12345;
inline float random_float() {
    random_state = random_state * 1664525u + 1013904223u;
    return float(random_state >> 8) / float(1 << 23) - 1.0f;
}

/** What a child process writes to stderr until it is aborted; "" if it ends well. */
template <class F> std::string aborted(F body) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        ::close(ends[0]);
        body();
        _exit(0);
    }
    ::close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
    ::close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    const bool died = (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) ||
                      (text.find("AddressSanitizer") != std::string::npos);
    if (!died && status)
        std::fprintf(stderr, "the child ended with status %#x: %s\n", status, text.c_str());
    CHECK(died || !status);
    return died ? text : "";
}

inline bool has(const std::string &text, const char *part) {
    if (text.find(part) != std::string::npos) return true;
    std::fprintf(stderr, "\"%s\" is not in: %s\n", part, text.c_str());
    return false;
}

struct Test {
    const char *name;
    void (*run)();
};
extern const std::vector<Test> MULTIPROCESSOR_TESTS, DRIVER_TESTS, GRAPH_TESTS;

#endif

/*
 * Tests of the emulation: the multiprocessor, the driver, and that what is wrong is found.
 * selftest.sh builds and runs it under several orders and sanitizers.
 */
#include "driver.h"
#include "selftest_kernels.h"

#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
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
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        CUstream, void **, void **);
CUresult cuGraphCreate(CUgraph *, unsigned);
CUresult cuGraphDestroy(CUgraph);
CUresult cuGraphAddKernelNode_v2(CUgraphNode *, CUgraph, const CUgraphNode *, size_t,
                                 const CUDA_KERNEL_NODE_PARAMS *);
CUresult cuGraphAddMemcpyNode(CUgraphNode *, CUgraph, const CUgraphNode *, size_t, const CUDA_MEMCPY3D *,
                              CUcontext);
CUresult cuGraphAddMemsetNode(CUgraphNode *, CUgraph, const CUgraphNode *, size_t,
                              const CUDA_MEMSET_NODE_PARAMS *, CUcontext);
CUresult cuGraphAddNode_v2(CUgraphNode *, CUgraph, const CUgraphNode *, const CUgraphEdgeData *, size_t,
                           CUgraphNodeParams *);
CUresult cuGraphConditionalHandleCreate(CUgraphConditionalHandle *, CUgraph, CUcontext, unsigned, unsigned);
CUresult cuGraphInstantiateWithFlags(CUgraphExec *, CUgraph, unsigned long long);
CUresult cuGraphExecDestroy(CUgraphExec);
CUresult cuGraphLaunch(CUgraphExec, CUstream);
CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec, CUgraphNode, const CUDA_KERNEL_NODE_PARAMS *);
void fakeCudaReset();
void fakeCudaSet(const char *, const char *);
uint64_t fakeCudaCalls(const char *);
uint64_t fakeCudaLive();
uint64_t fakeCudaLeaks();
uint64_t fakeCudaLaunches();
uint64_t fakeCudaKernels();
const char *fakeCudaLastRefusal();
}

namespace {

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                  \
            std::exit(1);                                                                         \
        }                                                                                         \
    } while (0)
#define OK(call) expect(call, CUDA_SUCCESS, #call, __LINE__)
#define FAILS(call, code) expect(call, code, #call, __LINE__)

void expect(CUresult got, CUresult wanted, const char *call, int line) {
    if (got == wanted) return;
    std::fprintf(stderr, "%s:%d: %s is %d and not %d\n", __FILE__, line, call, got, wanted);
    std::exit(1);
}

CUmodule module;
CUstream stream;

CUfunction function(const char *name) {
    CUfunction f;
    OK(cuModuleGetFunction(&f, module, name));
    return f;
}

void open() {
    OK(cuInit(0));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuModuleLoadData(&module, "image"));
    OK(cuStreamCreate(&stream, 1));
}

void close() {
    OK(cuStreamDestroy_v2(stream));
    OK(cuModuleUnload(module));
    CHECK(fakeCudaLive() == 1); // the context
    OK(cuDevicePrimaryCtxRelease_v2(0));
    CHECK(fakeCudaLive() == 0 && fakeCudaLeaks() == 0);
}

template <class T>
CUdeviceptr upload(const std::vector<T> &values) {
    CUdeviceptr address;
    OK(cuMemAlloc_v2(&address, values.size() * sizeof(T)));
    OK(cuMemcpyHtoD_v2(address, values.data(), values.size() * sizeof(T)));
    return address;
}

template <class T>
std::vector<T> download(CUdeviceptr address, size_t count) {
    std::vector<T> values(count);
    OK(cuMemcpyDtoH_v2(values.data(), address, count * sizeof(T)));
    return values;
}

template <class P>
CUresult launch(const char *name, dim3 grid, dim3 block, P parameters, unsigned shared = 0) {
    void *pointers[] = {&parameters};
    return cuLaunchKernel(function(name), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, stream,
                          pointers, nullptr);
}

template <class P>
CUDA_KERNEL_NODE_PARAMS node_params(const char *name, dim3 grid, dim3 block, void **pointer, P &parameters) {
    *pointer = &parameters;
    return {function(name), grid.x, grid.y, grid.z, block.x, block.y, block.z, 0, pointer, nullptr, nullptr,
            nullptr};
}

uint32_t random_state = 12345;
float random_float() {
    random_state = random_state * 1664525u + 1013904223u;
    return float(random_state >> 8) / float(1 << 23) - 1.0f;
}

/** What a child process writes to stderr until it is aborted; "" if it ends in any other way. */
template <class F>
std::string aborted(F body) {
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
    return died ? text : "";
}

bool has(const std::string &text, const char *part) {
    if (text.find(part) != std::string::npos) return true;
    std::fprintf(stderr, "\"%s\" is not in: %s\n", part, text.c_str());
    return false;
}

float sum_with_barrier(unsigned barrier, unsigned threads = 256) {
    std::vector<float> values(1000);
    for (size_t i = 0; i < values.size(); i++) values[i] = float(i);
    const CUdeviceptr from = upload(values), to = upload(std::vector<float>(1));
    OK(launch("sum_rows", 1, threads, SumRows{(const float *)from, (float *)to, 1000, barrier}));
    OK(cuStreamSynchronize(stream));
    const float sum = download<float>(to, 1)[0];
    OK(cuMemFree_v2(from));
    OK(cuMemFree_v2(to));
    return sum;
}

void reduction() {
    open();
    for (const unsigned threads : {32u, 64u, 256u, 1024u}) CHECK(sum_with_barrier(1, threads) == 499500.0f);
    close();
}

void missing_barrier() {
    open();
    // Without the barrier thread 0 adds what is there when it comes: all of it if it comes last.
    fakeCudaSet("MOR_EMULATED_ORDER", "reverse");
    CHECK(sum_with_barrier(0) == 499500.0f);
    fakeCudaSet("MOR_EMULATED_ORDER", "forward");
    CHECK(sum_with_barrier(0) != 499500.0f);
    CHECK(sum_with_barrier(1) == 499500.0f);
    int found = 0;
    for (int seed = 0; seed < 10; seed++) {
        fakeCudaSet("MOR_EMULATED_ORDER", ("shuffled:" + std::to_string(seed)).c_str());
        found += sum_with_barrier(0) != 499500.0f;
        CHECK(sum_with_barrier(1) == 499500.0f);
    }
    CHECK(found > 5);
    fakeCudaReset();
    close();
}

void transposition() {
    open();
    const unsigned rows = 70, columns = 45;
    std::vector<float> values(rows * columns);
    for (float &v : values) v = random_float();
    const CUdeviceptr from = upload(values), to = upload(std::vector<float>(rows * columns));
    OK(launch("transpose", dim3(2, 3), dim3(32, 8), Transpose{(const float *)from, (float *)to, rows, columns},
              32 * 33 * 4));
    OK(cuStreamSynchronize(stream));
    const auto result = download<float>(to, rows * columns);
    for (unsigned y = 0; y < rows; y++)
        for (unsigned x = 0; x < columns; x++) CHECK(result[x * rows + y] == values[y * columns + x]);
    OK(cuMemFree_v2(from));
    OK(cuMemFree_v2(to));
    close();
}

uint16_t half_of(float value) { // exact for the values that are used here
    if (value == 0) return 0;
    int exponent;
    const float fraction = std::frexp(std::fabs(value), &exponent);
    return uint16_t((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (int(fraction * 2048) & 0x3ff));
}

void tensor_product() {
    open();
    std::vector<float> a(16 * 16), b(16 * 8), d(16 * 8);
    std::vector<uint16_t> a_half, b_half;
    for (float &v : a) a_half.push_back(half_of(v = std::round(random_float() * 1024) / 1024));
    for (float &v : b) b_half.push_back(half_of(v = std::round(random_float() * 1024) / 1024));
    for (float &v : d) v = random_float();
    const CUdeviceptr da = upload(a_half), db = upload(b_half), dd = upload(d);
    OK(launch("multiply", 1, 32, Multiply{(const uint16_t *)da, (const uint16_t *)db, (float *)dd}));
    OK(cuStreamSynchronize(stream));
    const auto result = download<float>(dd, 16 * 8);
    for (unsigned row = 0; row < 16; row++)
        for (unsigned column = 0; column < 8; column++) {
            float sum = d[row * 8 + column];
            for (unsigned k = 0; k < 16; k++) sum += a[row * 16 + k] * b[k * 8 + column];
            CHECK(result[row * 8 + column] == sum);
        }
    for (const CUdeviceptr p : {da, db, dd}) OK(cuMemFree_v2(p));
    close();
}

void warp_collectives() {
    open();
    const CUdeviceptr out = upload(std::vector<unsigned>(12 * 32));
    OK(launch("collectives", 1, 32, Collectives{(unsigned *)out}));
    OK(cuStreamSynchronize(stream));
    const auto r = download<unsigned>(out, 12 * 32);
    for (unsigned lane = 0; lane < 32; lane++) {
        const auto at = [&](unsigned i) { return r[i * 32 + lane]; };
        CHECK(at(0) == 5);
        CHECK(at(1) == lane / 8 * 8 + 3);
        CHECK(at(2) == (lane % 16 < 3 ? lane : lane - 3));
        CHECK(at(3) == (lane % 16 + 3 > 15 ? lane : lane + 3));
        CHECK(at(4) == (lane ^ 9));
        CHECK(at(5) == 0x49249249u);
        CHECK(at(6) == 1);
        CHECK(at(7) == 496);
        CHECK(int(at(8)) == -16);
        CHECK(at(9) == (lane < 16 ? lane ^ 1 : lane ^ 2));
        CHECK(at(10) == 2);
        CHECK(at(11) == 10);
    }
    OK(cuMemFree_v2(out));
    close();
}

/** counter = 0; while (counter < limit) counter++; then a copy to the host. */
void loop_in_a_graph() {
    open();
    unsigned *host;
    OK(cuMemHostAlloc((void **)&host, 4, 0));
    const CUdeviceptr counter = upload(std::vector<unsigned>(1, 77));
    CUgraph graph;
    CUgraphNode clear, loop, inner, copy;
    OK(cuGraphCreate(&graph, 0));
    const CUDA_MEMSET_NODE_PARAMS set{counter, 0, 0, 4, 1, 1};
    OK(cuGraphAddMemsetNode(&clear, graph, nullptr, 0, &set, nullptr));
    CUgraphConditionalHandle handle;
    OK(cuGraphConditionalHandleCreate(&handle, graph, nullptr, 1, 1));
    CUgraphNodeParams conditional;
    std::memset(&conditional, 0, sizeof conditional);
    conditional.type = CU_GRAPH_NODE_TYPE_CONDITIONAL;
    conditional.conditional.handle = handle;
    conditional.conditional.type = CU_GRAPH_COND_TYPE_WHILE;
    conditional.conditional.size = 1;
    OK(cuGraphAddNode_v2(&loop, graph, &clear, nullptr, 1, &conditional));
    FAILS(cuGraphAddNode_v2(&copy, graph, &clear, nullptr, 1, &conditional), CUDA_ERROR_INVALID_VALUE);
    const CUgraph body = *conditional.conditional.phGraph_out;
    Count parameters{(unsigned *)counter, 5, handle};
    void *pointer;
    auto request = node_params("count", 1, 32, &pointer, parameters);
    OK(cuGraphAddKernelNode_v2(&inner, body, nullptr, 0, &request));
    CUDA_MEMCPY3D down{};
    down.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    down.srcDevice = counter;
    down.dstMemoryType = CU_MEMORYTYPE_HOST;
    down.dstHost = host;
    down.WidthInBytes = 4;
    down.Height = down.Depth = 1;
    FAILS(cuGraphAddMemcpyNode(&copy, graph, &inner, 1, &down, nullptr), CUDA_ERROR_INVALID_VALUE);
    OK(cuGraphAddMemcpyNode(&copy, graph, &loop, 1, &down, nullptr));
    CUgraphExec executable;
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    OK(cuGraphLaunch(executable, stream));
    CHECK(*host == 0xffffffffu); // nothing has run
    OK(cuStreamSynchronize(stream));
    CHECK(*host == 5);
    // A launch that waits keeps the parameters that it had.
    OK(cuGraphLaunch(executable, stream));
    parameters.limit = 9;
    OK(cuGraphExecKernelNodeSetParams_v2(executable, inner, &request));
    OK(cuStreamSynchronize(stream));
    CHECK(*host == 5);
    OK(cuGraphLaunch(executable, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(*host == 9 && fakeCudaKernels() == 19);
    OK(cuGraphDestroy(graph));
    FAILS(cuGraphExecKernelNodeSetParams_v2(executable, inner, &request), CUDA_ERROR_INVALID_VALUE);
    OK(cuGraphExecDestroy(executable));
    OK(cuMemFree_v2(counter));
    OK(cuMemFreeHost(host));
    close();
}

struct Test {
    const char *name;
    void (*run)();
};
const Test TESTS[] = {
    {"reduction", reduction},
    {"missing barrier", missing_barrier},
    {"transposition", transposition},
    {"tensor product", tensor_product},
    {"warp collectives", warp_collectives},
    {"loop in a graph", loop_in_a_graph},
};

} // namespace

int main() {
    for (const Test &test : TESTS) {
        fakeCudaReset();
        test.run();
        std::printf("ok: %s\n", test.name);
        std::fflush(stdout);
    }
    return 0;
}

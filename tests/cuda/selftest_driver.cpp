/* Tests of the emulation: the fake driver's memory, streams, limits and faults. */
#include "selftest.h"

#include <sys/mman.h>
#include <thread>

namespace {

void copies_are_checked() {
    open_device();
    std::vector<float> host(100, 3);
    CUdeviceptr a, b;
    OK(cuMemAlloc_v2(&a, 400));
    OK(cuMemAlloc_v2(&b, 400));
    OK(cuMemcpyHtoD_v2(a, host.data(), 400));
    OK(cuMemcpyHtoD_v2(a + 396, host.data(), 4));
    FAILS(cuMemcpyHtoD_v2(a, host.data(), 404), CUDA_ERROR_INVALID_VALUE);
    CHECK(has(fakeCudaLastRefusal(), "go 4 bytes beyond the end of an allocation of 400 bytes"));
    FAILS(cuMemcpyHtoD_v2(a + 400, host.data(), 4), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemcpyHtoD_v2(a - 4, host.data(), 4), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemcpyDtoH_v2(host.data(), a + 8, 400), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemcpyDtoDAsync_v2(b, a + 4, 400, stream), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemcpyDtoDAsync_v2(a + 4, a, 8, stream), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemsetD8Async(a, 0, 401, stream), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemcpyHtoD_v2(a, (const void *)b, 4), CUDA_ERROR_INVALID_VALUE); // not the host's
    FAILS(cuMemcpyHtoD_v2(CUdeviceptr(host.data()), host.data(), 4),
          CUDA_ERROR_INVALID_VALUE); // nor the device's
    FAILS(cuMemFree_v2(a + 4), CUDA_ERROR_INVALID_VALUE);
    OK(cuMemFree_v2(a));
    FAILS(cuMemFree_v2(a), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemcpyDtoH_v2(host.data(), a, 4), CUDA_ERROR_INVALID_VALUE);
    CHECK(has(fakeCudaLastRefusal(), "that memory was freed"));
    FAILS(launch("add", 1, 32, Add{(float *)a, 1, 1, 1}), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(has(fakeCudaLastRefusal(), "add: its parameter holds, at byte 0"));
    FAILS(launch("add", 1, 32, Add{host.data(), 1, 1, 1}), CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(has(fakeCudaLastRefusal(), "memory of the host that is not registered"));
    OK(cuMemFree_v2(b));
    close_device();
}

void streams_work_late() {
    open_device();
    float *pinned;
    OK(cuMemHostAlloc((void **)&pinned, 8, 0));
    CHECK(std::isnan(pinned[0]));
    const CUdeviceptr x = upload(std::vector<float>(1, 1));
    float pageable = 7;
    OK(cuMemcpyHtoDAsync_v2(x, &pageable, 4, stream)); // read now
    pageable = 8;
    OK(launch("add", 1, 32, Add{(float *)x, 1, 1, 1}));
    pinned[0] = 1;
    OK(cuMemcpyDtoHAsync_v2(pinned, x, 4, stream));
    CHECK(std::isnan(pinned[0])); // not there yet
    FAILS(cuStreamQuery(stream), CUDA_ERROR_NOT_READY);
    CHECK(download<float>(x, 1)[0] == 7); // the default stream does not wait for this one
    OK(cuStreamSynchronize(stream));
    OK(cuStreamQuery(stream));
    CHECK(pinned[0] == 8);
    pinned[1] = 20;
    OK(cuMemcpyHtoDAsync_v2(x, &pinned[1], 4, stream)); // read later
    pinned[1] = 21;
    OK(cuMemcpyDtoHAsync_v2(&pageable, x, 4, stream)); // returns when it is done
    CHECK(pageable == 21);
    // Copies that do not come to the host may be made after they return; this stream does not wait.
    const CUdeviceptr y = upload(std::vector<float>(1, 1));
    pageable = 30;
    OK(cuMemcpyHtoD_v2(x, &pageable, 4));
    OK(cuMemcpyDtoD_v2(y, x, 4));
    pageable = 31; // read before
    OK(launch("add", 1, 32, Add{(float *)y, 1, 1, 1}));
    OK(cuStreamSynchronize(stream));
    OK(cuStreamSynchronize(nullptr));
    CHECK(download<float>(y, 1)[0] == 30);
    pinned[1] = 40;
    OK(cuMemcpyHtoD_v2(x, &pinned[1], 4)); // made when it returns
    OK(cuMemcpyDtoHAsync_v2(&pageable, x, 4, stream));
    CHECK(pageable == 40);
    OK(cuMemsetD8_v2(y, 0, 4)); // made later too, and nobody may rely on such zeros
    OK(cuMemcpyDtoHAsync_v2(&pageable, y, 4, stream));
    CHECK(pageable == 30);
    CHECK(std::isnan(download<float>(y, 1)[0]));
    OK(cuMemFree_v2(y));
    // A blocking stream and the default stream wait for each other.
    CUstream blocking;
    OK(cuStreamCreate(&blocking, 0));
    OK(cuMemsetD8Async(x, 0, 4, blocking));
    CHECK(download<float>(x, 1)[0] == 0);
    // Streams wait for events of each other, and for nothing else.
    CUevent event, end;
    OK(cuEventCreate(&event, 0));
    OK(cuEventCreate(&end, 0));
    pinned[1] = 3;
    OK(cuMemcpyHtoDAsync_v2(x, &pinned[1], 4, stream));
    OK(cuEventRecord(event, stream));
    OK(cuMemsetD8Async(x, 0, 4, stream));
    OK(cuStreamWaitEvent(blocking, event, 0));
    OK(cuMemcpyDtoHAsync_v2(&pinned[0], x, 4, blocking));
    OK(cuEventRecord(end, blocking));
    float time;
    FAILS(cuEventElapsedTime(&time, event, end), CUDA_ERROR_NOT_READY);
    OK(cuEventSynchronize(end));
    CHECK(pinned[0] == 3);
    OK(cuEventElapsedTime(&time, event, end));
    CHECK(time >= 0);
    OK(cuStreamSynchronize(stream));
    CHECK(download<float>(x, 1)[0] == 0);
    OK(cuEventDestroy_v2(event));
    OK(cuEventDestroy_v2(end));
    FAILS(cuEventSynchronize(event), CUDA_ERROR_INVALID_HANDLE);
    OK(cuStreamDestroy_v2(blocking));
    FAILS(cuStreamSynchronize(blocking), CUDA_ERROR_INVALID_HANDLE);
    OK(cuMemFree_v2(x));
    OK(cuMemFreeHost(pinned));
    FAILS(cuMemFreeHost(pinned), CUDA_ERROR_INVALID_VALUE);
    close_device();
}

void host_memory() {
    open_device();
    float *mapped;
    CUdeviceptr address;
    OK(cuMemHostAlloc((void **)&mapped, 4, 2));
    OK(cuMemHostGetDevicePointer_v2(&address, mapped, 0));
    *mapped = 4;
    OK(launch("add", 1, 32, Add{(float *)address, 1, 2, 1}));
    CHECK(*mapped == 4);
    OK(cuStreamSynchronize(stream));
    CHECK(*mapped == 9);
    OK(cuMemFreeHost(mapped));
    const size_t size = 3 * 4096;
    auto *pages =
        static_cast<float *>(mmap(nullptr, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    FAILS(cuMemHostGetDevicePointer_v2(&address, pages, 0), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuMemHostRegister_v2(pages, size, 0), CUDA_ERROR_INVALID_VALUE); // may not be written
    OK(cuMemHostRegister_v2(pages, size, 8));
    FAILS(cuMemHostRegister_v2(pages + 10, 4, 8), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    OK(cuMemHostGetDevicePointer_v2(&address, pages, 0));
    const CUdeviceptr sum = upload(std::vector<float>(1, 1));
    OK(launch("sum_rows", 1, 32, SumRows{(const float *)address, (float *)sum, 3072, 1}));
    OK(cuStreamSynchronize(stream));
    CHECK(download<float>(sum, 1)[0] == 0);
    OK(cuMemHostUnregister(pages));
    FAILS(cuMemHostUnregister(pages), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    fakeCudaSet("MOR_FAKE_CUDA_ATTRIBUTE", "113=0");
    FAILS(cuMemHostRegister_v2(pages, size, 8), CUDA_ERROR_NOT_SUPPORTED);
    fakeCudaSet("MOR_FAKE_CUDA_ATTRIBUTE", "99=0");
    int value;
    OK(cuDeviceGetAttribute(&value, 99, 0));
    CHECK(value == 0);
    FAILS(cuMemHostRegister_v2(pages, size, 8), CUDA_ERROR_NOT_SUPPORTED);
    munmap(pages, size);
    OK(cuMemFree_v2(sum));
    close_device();
}

void launch_limits() {
    open_device();
    const CUdeviceptr x = upload(std::vector<float>(1024));
    const Transpose p{(const float *)x, (float *)x, 1, 1};
    const auto with = [&](dim3 grid, dim3 block, unsigned shared) {
        return launch("transpose", grid, block, p, shared);
    };
    OK(with(1, 1024, 8192));
    FAILS(with(1, dim3(1024, 2), 8192), CUDA_ERROR_INVALID_VALUE);
    FAILS(with(1, dim3(1, 1, 65), 8192), CUDA_ERROR_INVALID_VALUE);
    FAILS(with(1, 0, 8192), CUDA_ERROR_INVALID_VALUE);
    FAILS(with(dim3(1, 65536), 1, 8192), CUDA_ERROR_INVALID_VALUE);
    FAILS(with(0, 1, 8192), CUDA_ERROR_INVALID_VALUE);
    OK(with(1, 1, 48 * 1024));
    FAILS(with(1, 1, 48 * 1024 + 1), CUDA_ERROR_INVALID_VALUE);
    FAILS(cuFuncSetAttribute(function("transpose"), 8, 227 * 1024 + 1), CUDA_ERROR_INVALID_VALUE);
    OK(cuFuncSetAttribute(function("transpose"), 8, 227 * 1024));
    OK(with(1, 1, 227 * 1024));
    // sum_rows has __launch_bounds__(256), transpose has none.
    int threads;
    OK(cuFuncGetAttribute(&threads, 0, function("transpose")));
    CHECK(threads == 1024);
    OK(cuFuncGetAttribute(&threads, 0, function("sum_rows")));
    CHECK(threads == 256);
    const SumRows sum{(const float *)x, (float *)x, 1, 1};
    OK(launch("sum_rows", 1, 256, sum));
    OK(cuStreamSynchronize(stream));
    FAILS(launch("sum_rows", 1, 288, sum), CUDA_ERROR_INVALID_VALUE);
    size_t offset, size;
    OK(cuFuncGetParamInfo(function("sum_rows"), 0, &offset, &size));
    CHECK(offset == 0 && size == sizeof(SumRows));
    FAILS(cuFuncGetParamInfo(function("sum_rows"), 1, &offset, &size), CUDA_ERROR_INVALID_VALUE);
    CUfunction f;
    FAILS(cuModuleGetFunction(&f, module, "no_kernel"), CUDA_ERROR_NOT_FOUND);
    FAILS(cuLaunchKernel(nullptr, 1, 1, 1, 1, 1, 1, 0, stream, nullptr, nullptr),
          CUDA_ERROR_INVALID_HANDLE);
    OK(cuMemFree_v2(x));
    close_device();
}

void memory_runs_out() {
    fakeCudaSet("MOR_FAKE_CUDA_MEMORY", "1048576");
    open_device();
    size_t available, total;
    OK(cuMemGetInfo_v2(&available, &total));
    CHECK(available == 1048576 && total == 1048576);
    CUdeviceptr a, b;
    OK(cuMemAlloc_v2(&a, 1000000));
    OK(cuMemGetInfo_v2(&available, &total));
    CHECK(available < 48576 && available > 47000);
    FAILS(cuMemAlloc_v2(&b, 100000), CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemFree_v2(a));
    OK(cuMemAlloc_v2(&b, 100000));
    OK(cuMemFree_v2(b));
    FAILS(cuMemAlloc_v2(&b, ~size_t(0)), CUDA_ERROR_OUT_OF_MEMORY);
    FAILS(cuMemAlloc_v2(&b, 0), CUDA_ERROR_INVALID_VALUE);
    close_device();
}

void faults() {
    open_device();
    CUdeviceptr p[4];
    fakeCudaSet("MOR_FAKE_CUDA_FAIL", "cuMemAlloc_v2:2=2,cuMemcpyHtoD_v2:*=719");
    OK(cuMemAlloc_v2(&p[0], 4));
    FAILS(cuMemAlloc_v2(&p[1], 4), CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemAlloc_v2(&p[1], 4));
    FAILS(cuMemcpyHtoD_v2(p[0], &p, 4), 719);
    FAILS(cuMemcpyHtoD_v2(p[0], &p, 4), 719);
    CHECK(fakeCudaCalls("cuMemAlloc_v2") == 3 && fakeCudaCalls("cuMemcpyHtoD_v2") == 2);
    CHECK(fakeCudaCalls(nullptr) > 5 && fakeCudaCalls("cuMemsetD8Async") == 0);
    fakeCudaSet("MOR_FAKE_CUDA_FAIL", "");
    OK(cuMemcpyHtoD_v2(p[0], &p, 4));
    // A lost device: that call and all after it; what is freed is freed all the same.
    const uint64_t live = fakeCudaLive();
    fakeCudaSet("MOR_FAKE_CUDA_LOST", "cuStreamSynchronize:2=999");
    OK(cuStreamSynchronize(stream));
    OK(launch("add", 1, 32, Add{(float *)p[0], 1, 1, 1}));
    FAILS(cuStreamSynchronize(stream), 999);
    FAILS(cuMemAlloc_v2(&p[2], 4), 999);
    FAILS(cuMemFree_v2(p[0]), 999);
    CHECK(fakeCudaLive() == live - 1 && fakeCudaKernels("") == 0);
    FAILS(cuInit(0), 999);
    const char *name;
    OK(cuGetErrorName(999, &name));
    CHECK(!std::strcmp(name, "CUDA_ERROR_UNKNOWN"));
    FAILS(cuGetErrorName(12345, &name), CUDA_ERROR_INVALID_VALUE);
    fakeCudaReset();
    OK(cuMemFree_v2(p[1]));
    close_device();
}

void leaks_are_reported() {
    open_device();
    CUdeviceptr p;
    CUgraph graph;
    OK(cuMemAlloc_v2(&p, 4));
    OK(cuGraphCreate(&graph, 0));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    CHECK(fakeCudaLeaks() == 4); // with the module and the stream
    CHECK(fakeCudaLive() == 0);
    FAILS(cuMemFree_v2(p), CUDA_ERROR_INVALID_CONTEXT);
    FAILS(cuDevicePrimaryCtxRelease_v2(0), CUDA_ERROR_INVALID_CONTEXT);
    fakeCudaReset();
    open_device();
    FAILS(cuMemFree_v2(p), CUDA_ERROR_INVALID_VALUE);
    close_device();
}

void devices_and_contexts() {
    fakeCudaSet("MOR_FAKE_CUDA_DEVICES", "2");
    fakeCudaSet("MOR_FAKE_CUDA_ARCH", "87");
    fakeCudaSet("MOR_FAKE_CUDA_VERSION", "12020");
    fakeCudaSet("MOR_FAKE_CUDA_INTEGRATED", "1");
    OK(cuInit(0));
    int value, device;
    OK(cuDriverGetVersion(&value));
    CHECK(value == 12020);
    OK(cuDeviceGetCount(&value));
    CHECK(value == 2);
    FAILS(cuDeviceGet(&device, 2), CUDA_ERROR_INVALID_DEVICE);
    OK(cuDeviceGet(&device, 1));
    const int wanted[][2] = {{75, 8}, {76, 7}, {18, 1}, {10, 32}, {97, 227 * 1024}};
    for (const auto &w : wanted) {
        OK(cuDeviceGetAttribute(&value, w[0], device));
        CHECK(value == w[1]);
    }
    char name[32];
    OK(cuDeviceGetName(name, sizeof name, device));
    CUcontext first, second, current;
    OK(cuDevicePrimaryCtxRetain(&first, 0));
    OK(cuDevicePrimaryCtxRetain(&second, 1));
    OK(cuDevicePrimaryCtxRetain(&current, 1));
    CHECK(second == current && first != second && fakeCudaLive() == 3);
    OK(cuCtxPushCurrent_v2(first));
    CUstream of_first;
    OK(cuStreamCreate(&of_first, 0));
    OK(cuCtxPushCurrent_v2(second));
    FAILS(cuStreamSynchronize(of_first), CUDA_ERROR_INVALID_HANDLE); // of another context
    std::thread([] {
        CUdeviceptr p;
        FAILS(cuMemAlloc_v2(&p, 4),
              CUDA_ERROR_INVALID_CONTEXT); // a context is current in one thread
    }).join();
    OK(cuCtxPopCurrent_v2(&current));
    CHECK(current == second);
    OK(cuStreamDestroy_v2(of_first));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    FAILS(cuCtxPushCurrent_v2(first), CUDA_ERROR_INVALID_CONTEXT);
    OK(cuDevicePrimaryCtxRelease_v2(1));
    OK(cuDevicePrimaryCtxRelease_v2(1));
    OK(cuCtxSetCurrent(nullptr));
    fakeCudaSet("MOR_FAKE_CUDA_DEVICES", "0");
    FAILS(cuInit(0), CUDA_ERROR_NO_DEVICE);
}

void modules_and_symbols() {
    open_device();
    CUmodule other;
    FAILS(cuModuleLoadData(&other, ""), CUDA_ERROR_INVALID_IMAGE);
    OK(cuModuleLoadData(&other, "\177ELF image"));
    CHECK(!std::strcmp(fakeCudaLastImage(), "\177ELF image"));
    CUfunction f;
    OK(cuModuleGetFunction(&f, other, "add"));
    CHECK(f != function("add"));
    OK(cuModuleUnload(other));
    int value;
    FAILS(cuFuncGetAttribute(&value, 0, f), CUDA_ERROR_INVALID_HANDLE);
    void *address;
    int status;
    OK(cuGetProcAddress_v2("cuMemAlloc", &address, 12060, 0, &status));
    CHECK(address == (void *)&cuMemAlloc_v2);
    FAILS(cuGetProcAddress_v2("cuNothing", &address, 12060, 0, &status), CUDA_ERROR_NOT_FOUND);
    close_device();
}

} // namespace

const std::vector<Test> DRIVER_TESTS = {
    {"copies are checked", copies_are_checked},
    {"streams work late", streams_work_late},
    {"host memory", host_memory},
    {"launch limits", launch_limits},
    {"memory runs out", memory_runs_out},
    {"faults", faults},
    {"leaks are reported", leaks_are_reported},
    {"devices and contexts", devices_and_contexts},
    {"modules and symbols", modules_and_symbols},
};

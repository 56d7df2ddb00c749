/*
 * A fake libcuda.so.1: NVIDIA's driver API over the emulated multiprocessor, for tests on machines
 * without a GPU. It stands in for a device, so it checks its caller more strictly than the real
 * one: whatever is refused is named on stderr. Here: devices, contexts, modules, errors.
 */
#include "driver.h"

#include <dlfcn.h>

namespace fake {

namespace {

/** Contexts that the thread has pushed, the current one last. */
thread_local std::vector<uintptr_t> context_stack;
constexpr uintptr_t CONTEXT_TAG = uintptr_t(0xa0) << 48;

CUcontext context_of(int device) {
    return as_handle<CUcontext>(CONTEXT_TAG | uintptr_t(device + 1) << 4);
}
int device_of(uintptr_t context) {
    if (context >> 48 != CONTEXT_TAG >> 48) return -1;
    const int device = int((context & 0xffffffff) >> 4) - 1;
    const auto it = driver.retained.find(device);
    return it != driver.retained.end() && it->second > 0 ? device : -1;
}

struct ErrorText {
    CUresult code;
    const char *name, *text;
};
const ErrorText ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
     "system has unsupported display driver / cuda driver combination"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

CUresult error_text(CUresult code, const char **out, const char *ErrorText::*field) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = nullptr;
    for (const ErrorText &e : ERRORS)
        if (e.code == code) *out = e.*field;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

} // namespace

int attribute(int number) {
    const Settings &s = driver.settings;
    const auto it = s.attributes.find(number);
    if (it != s.attributes.end()) return it->second;
    switch (number) {
    case 1:
    case 2:
    case 3: return 1024; // threads per block, its x and y
    case 4: return 64;
    case 5: return 2147483647; // grid
    case 6:
    case 7: return 65535;
    case 8: return 48 * 1024;
    case 9: return 64 * 1024;
    case 10: return 32;
    case 12:
    case 82: return 65536; // registers
    case 13: return 1500000;
    case 16: return 8; // multiprocessors
    case 18: return s.integrated;
    case 19:
    case 31:
    case 41:
    case 78:
    case 83:
    case 95: return 1;       // maps host memory, ..., unified addresses
    case 38: return 4 << 20; // L2
    case 39: return 2048;
    case 40: return 2;
    case 75: return s.architecture / 10;
    case 76: return s.architecture % 10;
    case 81: return 228 * 1024;
    case 86:
    case 88:
    case 89: return 0; // native host atomics, pageable memory access
    case 90:
    case 91: return s.integrated ? number == 90 : 1;
    case 97: return int(mor_emulated::MAX_SHARED);
    case 99: return 1; // host memory can be registered
    case 100: return 0;
    case 106: return 32;
    case 113: return 1; // and read-only host memory
    case 115: return 1;
    default: return 0;
    }
}

int current_device() { return context_stack.empty() ? -1 : device_of(context_stack.back()); }

namespace {

/** At the last release: the driver takes back what was not freed, and says so. */
void release_device(int device) {
    run_device(device);
    std::string left;
    const auto sweep = [&](auto &table, const char *what, auto keep) {
        size_t count = 0;
        for (auto it = table.live.begin(); it != table.live.end();) {
            if (it->second->device != device) {
                ++it;
                continue;
            }
            count += keep(*it->second);
            it = table.live.erase(it);
        }
        if (count) left += " " + std::to_string(count) + " " + what + ",";
        driver.leaks += count;
    };
    const auto any = [](const auto &) { return 1; };
    for (auto it = driver.functions.live.begin(); it != driver.functions.live.end();) {
        const Module *module = driver.modules.find(it->second->module);
        it = module && module->device == device ? driver.functions.live.erase(it) : std::next(it);
    }
    sweep(driver.executables, "executable graphs", any);
    sweep(driver.graphs, "graphs", [](const Graph &g) { return !g.is_body; });
    sweep(driver.events, "events", any);
    sweep(driver.streams, "streams", any);
    sweep(driver.modules, "modules", any);
    for (auto it = driver.conditions.begin(); it != driver.conditions.end();)
        it = driver.graphs.find(it->second.graph) ? std::next(it) : driver.conditions.erase(it);
    driver.default_streams.erase(device);
    if (const size_t count = release_memory(device)) {
        left += " " + std::to_string(count) + " allocations,";
        driver.leaks += count;
    }
    if (left.empty()) return;
    left.back() = ' ';
    std::fprintf(stderr, "fake CUDA: the context of device %d is released with%sleft\n", device,
                 left.c_str());
}

bool is_device(CUdevice device) { return device >= 0 && device < driver.settings.devices; }

} // namespace
} // namespace fake

using namespace fake;

// The driver API.

FAKE CUresult cuInit(unsigned flags) {
    FAKE_ENTER(cuInit, Nothing);
    if (driver.lost) return driver.lost;
    if (flags) return refuse(CUDA_ERROR_INVALID_VALUE, self, "flags must be 0");
    if (driver.settings.devices == 0) return CUDA_ERROR_NO_DEVICE;
    driver.initialised = true;
    return CUDA_SUCCESS;
}

FAKE CUresult cuDriverGetVersion(int *version) {
    FAKE_ENTER(cuDriverGetVersion, Nothing);
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = driver.settings.version;
    return CUDA_SUCCESS;
}

FAKE CUresult cuGetErrorName(CUresult code, const char **out) {
    return error_text(code, out, &ErrorText::name);
}
FAKE CUresult cuGetErrorString(CUresult code, const char **out) {
    return error_text(code, out, &ErrorText::text);
}

FAKE CUresult cuDeviceGetCount(int *count) {
    FAKE_ENTER(cuDeviceGetCount, Init);
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    *count = driver.settings.devices;
    return CUDA_SUCCESS;
}

FAKE CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    FAKE_ENTER(cuDeviceGet, Init);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

FAKE CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    FAKE_ENTER(cuDeviceGetName, Init);
    if (!name || size <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(name, size_t(size), "Emulated device %d", device);
    return CUDA_SUCCESS;
}

FAKE CUresult cuDeviceGetAttribute(int *value, int number, CUdevice device) {
    FAKE_ENTER(cuDeviceGetAttribute, Init);
    if (!value || number <= 0 || number > 145) return refuse(1, self, "no attribute %d", number);
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute(number);
    return CUDA_SUCCESS;
}

FAKE CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    FAKE_ENTER(cuDevicePrimaryCtxRetain, Init);
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    driver.retained[device]++;
    driver.default_streams.emplace(device, Stream{device, true, {}});
    *context = context_of(device);
    return CUDA_SUCCESS;
}

FAKE CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    FAKE_ENTER_FREE(cuDevicePrimaryCtxRelease_v2, Init);
    if (driver.retained[device] == 0)
        return refuse(CUDA_ERROR_INVALID_CONTEXT, self, "device %d is not retained", device);
    if (driver.retained[device] == 1) release_device(device);
    driver.retained[device]--;
    return entered;
}

FAKE CUresult cuCtxSetCurrent(CUcontext context) {
    FAKE_ENTER(cuCtxSetCurrent, Init);
    if (context && device_of(reinterpret_cast<uintptr_t>(context)) < 0)
        return refuse(CUDA_ERROR_INVALID_CONTEXT, self, "%p is no live context", (void *)context);
    if (!context_stack.empty()) context_stack.pop_back();
    if (context) context_stack.push_back(reinterpret_cast<uintptr_t>(context));
    return CUDA_SUCCESS;
}

FAKE CUresult cuCtxPushCurrent_v2(CUcontext context) {
    FAKE_ENTER(cuCtxPushCurrent_v2, Init);
    if (device_of(reinterpret_cast<uintptr_t>(context)) < 0)
        return refuse(CUDA_ERROR_INVALID_CONTEXT, self, "%p is no live context", (void *)context);
    context_stack.push_back(reinterpret_cast<uintptr_t>(context));
    return CUDA_SUCCESS;
}

FAKE CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    FAKE_ENTER_FREE(cuCtxPopCurrent_v2, Init);
    if (context_stack.empty())
        return refuse(CUDA_ERROR_INVALID_CONTEXT, self, "the thread has no context");
    if (context) *context = as_handle<CUcontext>(context_stack.back());
    context_stack.pop_back();
    return entered;
}

static CUresult load_module(const char *function, CUmodule *module, const void *image) {
    if (!module || !image)
        return refuse(CUDA_ERROR_INVALID_VALUE, function, "module or image is NULL");
    const char *bytes = static_cast<const char *>(image);
    driver.last_image.assign(bytes, strnlen(bytes, 16));
    if (driver.last_image.empty())
        return refuse(CUDA_ERROR_INVALID_IMAGE, function, "the image is empty");
    *module =
        as_handle<CUmodule>(driver.modules.add(std::make_shared<Module>(Module{current_device()})));
    return CUDA_SUCCESS;
}

FAKE CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    FAKE_ENTER(cuModuleLoadData, Context);
    return load_module(self, module, image);
}

FAKE CUresult cuModuleUnload(CUmodule module) {
    FAKE_ENTER_FREE(cuModuleUnload, Context);
    if (!driver.modules.find(module))
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such module");
    for (auto it = driver.functions.live.begin(); it != driver.functions.live.end();)
        it = it->second->module == module ? driver.functions.live.erase(it) : std::next(it);
    driver.modules.live.erase(reinterpret_cast<uintptr_t>(module));
    return entered;
}

FAKE CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    FAKE_ENTER(cuModuleGetFunction, Context);
    if (!function || !name) return CUDA_ERROR_INVALID_VALUE;
    const Module *m = driver.modules.find(module);
    if (!m || m->device != current_device())
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such module in this context");
    for (const Registration *kernel = Registration::first; kernel; kernel = kernel->next) {
        if (std::strcmp(kernel->name, name)) continue;
        for (const auto &known : driver.functions.live)
            if (known.second->kernel == kernel && known.second->module == module) {
                *function = as_handle<CUfunction>(known.first);
                return CUDA_SUCCESS;
            }
        *function = as_handle<CUfunction>(driver.functions.add(
            std::make_shared<Function>(Function{kernel, module, 48 * 1024, 0})));
        return CUDA_SUCCESS;
    }
    return refuse(CUDA_ERROR_NOT_FOUND, self, "there is no kernel %s (MOR_KERNEL registers one)",
                  name);
}

FAKE CUresult cuFuncSetAttribute(CUfunction function, int number, int value) {
    FAKE_ENTER(cuFuncSetAttribute, Context);
    Function *f = driver.functions.find(function);
    if (!f) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such function");
    if (number == 9 && value >= -1 && value <= 100) return CUDA_SUCCESS; // carve-out: a hint
    if (number != 8)
        return refuse(CUDA_ERROR_INVALID_VALUE, self, "attribute %d cannot be set", number);
    if (value < 0 || size_t(value) + f->static_shared > size_t(attribute(97)))
        return refuse(CUDA_ERROR_INVALID_VALUE, self, "%d bytes of dynamic shared memory for %s",
                      value, f->kernel->name);
    f->max_dynamic_shared = value;
    return CUDA_SUCCESS;
}

FAKE CUresult cuFuncGetAttribute(int *value, int number, CUfunction function) {
    FAKE_ENTER(cuFuncGetAttribute, Context);
    const Function *f = driver.functions.find(function);
    if (!f || !value) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such function");
    switch (number) {
    case 0: *value = int(mor_emulated::max_threads(*f->kernel)); break;
    case 1: *value = int(f->static_shared); break;
    case 2:
    case 3: *value = 0; break;
    case 4: *value = 64; break;
    case 5:
    case 6: *value = driver.settings.architecture; break;
    case 8: *value = f->max_dynamic_shared; break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, self, "no attribute %d", number);
    }
    return CUDA_SUCCESS;
}

FAKE CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
    FAKE_ENTER(cuFuncGetParamInfo, Context);
    const Function *f = driver.functions.find(function);
    if (!f) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such function");
    if (index || !offset)
        return CUDA_ERROR_INVALID_VALUE; // the end of the list, for callers that count
    *offset = 0;
    if (size) *size = f->kernel->parameter_size;
    return CUDA_SUCCESS;
}

FAKE CUresult cuGetProcAddress_v2(const char *symbol, void **out, int version, uint64_t,
                                  int *status) {
    FAKE_ENTER(cuGetProcAddress_v2, Nothing);
    if (!symbol || !out) return CUDA_ERROR_INVALID_VALUE;
    Dl_info own;
    dladdr(reinterpret_cast<void *>(&cuInit), &own);
    void *library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *out = library ? dlsym(library, (std::string(symbol) + "_v2").c_str()) : nullptr;
    if (!*out && library) *out = dlsym(library, symbol);
    if (library) dlclose(library);
    const bool enough = version <= driver.settings.version;
    if (!enough) *out = nullptr;
    if (status) *status = *out ? 0 : enough ? 1 : 2;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

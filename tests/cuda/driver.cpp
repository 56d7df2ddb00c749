/*
 * A fake libcuda.so.1: NVIDIA's driver API over the emulated multiprocessor, for tests on machines
 * without a GPU. It stands in for a device, so it checks its caller more strictly than the real one:
 * whatever is refused is named on stderr. Here: settings, faults, devices, contexts, modules.
 *
 * Settings, read at cuInit and at fakeCudaReset, or set one by one with fakeCudaSet:
 *   MOR_FAKE_CUDA_FAIL="cuMemAlloc_v2:3=2,cuGraphLaunch:1=*700"  the third cuMemAlloc_v2 from now fails
 *       with code 2, and every cuGraphLaunch from the first on with 700
 *   MOR_FAKE_CUDA_LOST="cuGraphLaunch:5=999"  the device is lost in that call: it and all later ones
 *       return the code (700 when none is given)
 *   MOR_FAKE_CUDA_VERSION=12060  MOR_FAKE_CUDA_ARCH=90  MOR_FAKE_CUDA_DEVICES=1
 *   MOR_FAKE_CUDA_MEMORY=bytes  MOR_FAKE_CUDA_INTEGRATED=0|1
 *   MOR_FAKE_CUDA_ATTRIBUTE="99=0,113=0"  device attributes by their numbers
 *   MOR_FAKE_CUDA_POISON=0  leaves the destinations of pending copies as they are
 *   MOR_EMULATED_ORDER=forward|reverse|shuffled:SEED
 */
#include "driver.h"

#include <cstdarg>
#include <cstdlib>
#include <dlfcn.h>

namespace fake {

Driver driver;

namespace {

/** Contexts that the thread has pushed; the last one is current. A context is its device plus one. */
thread_local std::vector<uintptr_t> context_stack;
constexpr uintptr_t CONTEXT_TAG = uintptr_t(0xa0) << 48;

CUcontext context_of(int device) { return as_handle<CUcontext>(CONTEXT_TAG | uintptr_t(device + 1) << 4); }
int device_of(uintptr_t context) {
    if (context >> 48 != CONTEXT_TAG >> 48) return -1;
    const int device = int((context & 0xffffffff) >> 4) - 1;
    const auto it = driver.retained.find(device);
    return it != driver.retained.end() && it->second > 0 ? device : -1;
}

const char *const NAMES[] = {"MOR_FAKE_CUDA_FAIL",    "MOR_FAKE_CUDA_LOST",       "MOR_FAKE_CUDA_VERSION",
                             "MOR_FAKE_CUDA_ARCH",    "MOR_FAKE_CUDA_DEVICES",    "MOR_FAKE_CUDA_MEMORY",
                             "MOR_FAKE_CUDA_POISON",  "MOR_FAKE_CUDA_INTEGRATED", "MOR_FAKE_CUDA_ATTRIBUTE",
                             "MOR_EMULATED_ORDER"};

[[noreturn]] void bad_setting(const char *name, const char *value) {
    std::fprintf(stderr, "fake CUDA: %s cannot be \"%s\"\n", name, value);
    std::abort();
}

/** "function:call=code", with a * before or in place of the number that lasts. */
std::vector<Settings::Fault> parse_faults(const char *name, const char *text, bool loss) {
    std::vector<Settings::Fault> faults;
    for (const char *at = text; *at;) {
        const char *end = std::strchr(at, ',');
        const std::string item = end ? std::string(at, end) : std::string(at);
        at = end ? end + 1 : at + item.size();
        const size_t colon = item.find(':'), equal = item.find('=');
        if (colon == std::string::npos || (!loss && equal == std::string::npos)) bad_setting(name, text);
        Settings::Fault fault;
        fault.function = item.substr(0, colon);
        std::string call = item.substr(colon + 1, equal == std::string::npos ? equal : equal - colon - 1);
        std::string code = equal == std::string::npos ? "700" : item.substr(equal + 1);
        fault.onwards = false;
        for (std::string *part : {&call, &code}) {
            const size_t star = part->find('*');
            if (star == std::string::npos) continue;
            fault.onwards = true;
            part->erase(star, 1);
        }
        char *rest;
        fault.call = call.empty() ? 1 : std::strtoull(call.c_str(), &rest, 10);
        if (!call.empty() && *rest) bad_setting(name, text);
        fault.code = int(std::strtol(code.c_str(), &rest, 10));
        if (*rest || fault.code <= 0 || fault.call == 0) bad_setting(name, text);
        const auto seen = driver.calls.find(fault.function);
        if (seen != driver.calls.end()) fault.call += seen->second;
        faults.push_back(fault);
    }
    return faults;
}

void set(const char *name, const char *value) {
    const std::string n = name;
    Settings &s = driver.settings;
    char *end = nullptr;
    const auto number = [&] {
        const unsigned long long v = std::strtoull(value, &end, 10);
        if (end == value || *end) bad_setting(name, value);
        return v;
    };
    if (n == "MOR_FAKE_CUDA_FAIL") s.faults = parse_faults(name, value, false);
    else if (n == "MOR_FAKE_CUDA_LOST") {
        s.losses = parse_faults(name, value, true);
        driver.lost = CUDA_SUCCESS;
    } else if (n == "MOR_FAKE_CUDA_VERSION") s.version = int(number());
    else if (n == "MOR_FAKE_CUDA_ARCH") s.architecture = int(number());
    else if (n == "MOR_FAKE_CUDA_DEVICES") s.devices = int(number());
    else if (n == "MOR_FAKE_CUDA_MEMORY") s.memory = number();
    else if (n == "MOR_FAKE_CUDA_INTEGRATED") s.integrated = int(number());
    else if (n == "MOR_FAKE_CUDA_POISON") s.poison = int(number());
    else if (n == "MOR_FAKE_CUDA_ATTRIBUTE") {
        s.attributes.clear();
        for (const char *at = value; *at; at = *end ? end + 1 : end) {
            const int key = int(std::strtol(at, &end, 10));
            if (*end != '=') bad_setting(name, value);
            s.attributes[key] = int(std::strtol(end + 1, &end, 10));
            if (*end && *end != ',') bad_setting(name, value);
        }
    } else if (n == "MOR_EMULATED_ORDER") {
        if (!mor_emulated::set_order(value)) bad_setting(name, value);
    } else bad_setting(name, value);
}

void configure() {
    driver.settings = Settings();
    mor_emulated::set_order("forward");
    driver.configured = true;
    for (const char *name : NAMES)
        if (const char *value = std::getenv(name)) set(name, value);
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
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

CUresult error_text(CUresult code, const char **out, const char *ErrorText::*field) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = nullptr;
    for (const ErrorText &e : ERRORS)
        if (e.code == code) *out = e.*field;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

int attribute(int number) {
    const Settings &s = driver.settings;
    const auto it = s.attributes.find(number);
    if (it != s.attributes.end()) return it->second;
    switch (number) {
    case 1: case 2: case 3: return 1024; // threads per block, its x and y
    case 4: return 64;
    case 5: return 2147483647; // grid
    case 6: case 7: return 65535;
    case 8: return 48 * 1024;
    case 9: return 64 * 1024;
    case 10: return 32;
    case 12: case 82: return 65536; // registers
    case 13: return 1500000;
    case 16: return 8; // multiprocessors
    case 18: return s.integrated;
    case 19: case 31: case 41: case 78: case 83: case 95: return 1; // maps host memory, ..., unified addresses
    case 38: return 4 << 20; // L2
    case 39: return 2048;
    case 40: return 2;
    case 75: return s.architecture / 10;
    case 76: return s.architecture % 10;
    case 81: return 228 * 1024;
    case 86: case 88: case 89: return 0; // native host atomics, pageable memory access
    case 90: case 91: return s.integrated ? number == 90 : 1;
    case 97: return int(mor_emulated::MAX_SHARED);
    case 99: return 1; // host memory can be registered
    case 100: return 0;
    case 106: return 32;
    case 113: return 1; // and read-only host memory
    case 115: return 1;
    default: return 0;
    }
}

} // namespace

CUresult enter(const char *function, Needs needs) {
    if (!driver.configured) configure();
    const uint64_t call = ++driver.calls[function];
    if (driver.lost && needs != Needs::Nothing) return driver.lost;
    for (const auto &loss : driver.settings.losses)
        if (loss.function == function && call >= loss.call) {
            drop_work();
            return driver.lost = loss.code;
        }
    for (const auto &fault : driver.settings.faults)
        if (fault.function == function && (call == fault.call || (fault.onwards && call > fault.call)))
            return fault.code;
    if (needs != Needs::Nothing && !driver.initialised)
        return refuse(CUDA_ERROR_NOT_INITIALIZED, function, "cuInit comes first");
    if (needs == Needs::Context && current_device() < 0)
        return refuse(CUDA_ERROR_INVALID_CONTEXT, function, "the thread has no current context");
    return CUDA_SUCCESS;
}

CUresult refuse(CUresult code, const char *function, const char *format, ...) {
    char message[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    driver.last_refusal = std::string(function) + ": " + message;
    std::fprintf(stderr, "fake CUDA: %s (code %d)\n", driver.last_refusal.c_str(), code);
    return code;
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
            if (it->second->device != device) { ++it; continue; }
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
    std::fprintf(stderr, "fake CUDA: the context of device %d is released with%sleft\n", device, left.c_str());
}

uint64_t live_objects() {
    uint64_t live = driver.allocations.size() + driver.modules.live.size() + driver.streams.live.size() +
                    driver.events.live.size() + driver.executables.live.size();
    for (const auto &graph : driver.graphs.live) live += !graph.second->is_body;
    for (const auto &count : driver.retained) live += uint64_t(count.second);
    return live;
}

bool is_device(CUdevice device) { return device >= 0 && device < driver.settings.devices; }

} // namespace
} // namespace fake

using namespace fake;

// Control functions, for tests.

/** Reads the settings anew from the environment, forgets counts and a lost device. Objects live on. */
FAKE void fakeCudaReset() {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    driver.calls.clear();
    driver.launches = driver.kernels = driver.leaks = 0;
    driver.lost = CUDA_SUCCESS;
    driver.last_refusal.clear();
    configure();
}
/** Sets one setting. The calls that a fault names are counted from here. */
FAKE void fakeCudaSet(const char *name, const char *value) {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    if (!driver.configured) configure();
    set(name, value);
}
/** How often a function was called since the last reset; all of them for NULL. */
FAKE uint64_t fakeCudaCalls(const char *function) {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    uint64_t total = 0;
    for (const auto &entry : driver.calls)
        if (!function || entry.first == function) total += entry.second;
    return total;
}
/** Live allocations, modules, streams, events, graphs, executable graphs and retained contexts. */
FAKE uint64_t fakeCudaLive() {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    return live_objects();
}
/** Objects that were left when contexts were released, since the last reset. */
FAKE uint64_t fakeCudaLeaks() { return driver.leaks; }
/** Launches of kernels and graphs by the host. */
FAKE uint64_t fakeCudaLaunches() { return driver.launches; }
/** Kernels that ran, in graphs too. */
FAKE uint64_t fakeCudaKernels() { return driver.kernels; }
/** The reason of the last refusal, or "". */
FAKE const char *fakeCudaLastRefusal() { return driver.last_refusal.c_str(); }
/** The first bytes of the image of the last module, up to a zero, 16 at most. */
FAKE const char *fakeCudaLastImage() { return driver.last_image.c_str(); }

// The driver API.

FAKE CUresult cuInit(unsigned flags) {
    if (!driver.initialised) {
        const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
        if (!driver.configured) configure();
    }
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

FAKE CUresult cuGetErrorName(CUresult code, const char **out) { return error_text(code, out, &ErrorText::name); }
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

FAKE CUresult cuDeviceGetUuid_v2(void *uuid, CUdevice device) {
    FAKE_ENTER(cuDeviceGetUuid_v2, Init);
    if (!uuid) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::memset(uuid, device + 1, 16);
    return CUDA_SUCCESS;
}

FAKE CUresult cuDeviceGetAttribute(int *value, int number, CUdevice device) {
    FAKE_ENTER(cuDeviceGetAttribute, Init);
    if (!value || number <= 0 || number > 145) return refuse(1, self, "no attribute %d", number);
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute(number);
    return CUDA_SUCCESS;
}

FAKE CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    FAKE_ENTER(cuDeviceTotalMem_v2, Init);
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = driver.settings.memory;
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

FAKE CUresult cuCtxGetCurrent(CUcontext *context) {
    FAKE_ENTER(cuCtxGetCurrent, Init);
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    *context = context_stack.empty() ? nullptr : as_handle<CUcontext>(context_stack.back());
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
    if (context_stack.empty()) return refuse(CUDA_ERROR_INVALID_CONTEXT, self, "the thread has no context");
    if (context) *context = as_handle<CUcontext>(context_stack.back());
    context_stack.pop_back();
    return entered;
}

FAKE CUresult cuCtxGetDevice(CUdevice *device) {
    FAKE_ENTER(cuCtxGetDevice, Context);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    *device = current_device();
    return CUDA_SUCCESS;
}

static CUresult load_module(const char *function, CUmodule *module, const void *image) {
    if (!module || !image) return refuse(CUDA_ERROR_INVALID_VALUE, function, "module or image is NULL");
    const char *bytes = static_cast<const char *>(image);
    driver.last_image.assign(bytes, strnlen(bytes, 16));
    if (driver.last_image.empty()) return refuse(CUDA_ERROR_INVALID_IMAGE, function, "the image is empty");
    *module = as_handle<CUmodule>(driver.modules.add(std::make_shared<Module>(Module{current_device()})));
    return CUDA_SUCCESS;
}

FAKE CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    FAKE_ENTER(cuModuleLoadData, Context);
    return load_module(self, module, image);
}

FAKE CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, int *options,
                                 void **values) {
    FAKE_ENTER(cuModuleLoadDataEx, Context);
    if (count && (!options || !values)) return refuse(CUDA_ERROR_INVALID_VALUE, self, "options are missing");
    return load_module(self, module, image);
}

FAKE CUresult cuModuleUnload(CUmodule module) {
    FAKE_ENTER_FREE(cuModuleUnload, Context);
    if (!driver.modules.find(module)) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such module");
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
    return refuse(CUDA_ERROR_NOT_FOUND, self, "there is no kernel %s (MOR_KERNEL registers one)", name);
}

FAKE CUresult cuFuncSetAttribute(CUfunction function, int number, int value) {
    FAKE_ENTER(cuFuncSetAttribute, Context);
    Function *f = driver.functions.find(function);
    if (!f) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such function");
    if (number == 9 && value >= -1 && value <= 100) return CUDA_SUCCESS; // carve-out: a hint
    if (number != 8) return refuse(CUDA_ERROR_INVALID_VALUE, self, "attribute %d cannot be set", number);
    if (value < 0 || size_t(value) + f->static_shared > mor_emulated::MAX_SHARED)
        return refuse(CUDA_ERROR_INVALID_VALUE, self, "%d bytes of dynamic shared memory for %s", value,
                      f->kernel->name);
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
    case 2: case 3: *value = 0; break;
    case 4: *value = 64; break;
    case 5: case 6: *value = driver.settings.architecture; break;
    case 8: *value = f->max_dynamic_shared; break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, self, "no attribute %d", number);
    }
    return CUDA_SUCCESS;
}

FAKE CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
    FAKE_ENTER(cuFuncGetParamInfo, Context);
    const Function *f = driver.functions.find(function);
    if (!f) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such function");
    if (index || !offset) return CUDA_ERROR_INVALID_VALUE; // the end of the list, for callers that count
    *offset = 0;
    if (size) *size = f->kernel->parameter_size;
    return CUDA_SUCCESS;
}

FAKE CUresult cuFuncGetName(const char **name, CUfunction function) {
    FAKE_ENTER(cuFuncGetName, Context);
    const Function *f = driver.functions.find(function);
    if (!f || !name) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such function");
    *name = f->kernel->name;
    return CUDA_SUCCESS;
}

FAKE CUresult cuGetProcAddress_v2(const char *symbol, void **out, int version, uint64_t, int *status) {
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

/*
 * The fake driver's settings, its injected faults, and the control functions that tests call.
 *
 * Settings, read at cuInit and at fakeCudaReset, or set one by one with fakeCudaSet:
 *   MOR_FAKE_CUDA_FAIL="cuMemAlloc_v2:3=2,cuGraphLaunch:2*=700"  the third cuMemAlloc_v2 from now
 *       fails with code 2, and every cuGraphLaunch from the second on with 700; * alone is 1*
 *   MOR_FAKE_CUDA_LOST="cuGraphLaunch:5=999"  the device is lost in that call: it and all later
 *       ones return the code (700 when none is given)
 *   MOR_FAKE_CUDA_VERSION=12060  MOR_FAKE_CUDA_ARCH=90  MOR_FAKE_CUDA_DEVICES=1
 *   MOR_FAKE_CUDA_MEMORY=bytes  MOR_FAKE_CUDA_INTEGRATED=0|1
 *   MOR_FAKE_CUDA_ATTRIBUTE="99=0,113=0"  device attributes by their numbers
 *   MOR_FAKE_CUDA_POISON=0  leaves the destinations of pending copies as they are, and lets
 *       cuMemsetD8_v2 write zeros, not NaNs
 *   MOR_EMULATED_ORDER=forward|reverse|shuffled:SEED
 */
#include "driver.h"

#include <cstdarg>
#include <cstdlib>

namespace fake {

Driver driver;

namespace {

const char *const NAMES[] = {"MOR_FAKE_CUDA_FAIL",      "MOR_FAKE_CUDA_LOST",
                             "MOR_FAKE_CUDA_VERSION",   "MOR_FAKE_CUDA_ARCH",
                             "MOR_FAKE_CUDA_DEVICES",   "MOR_FAKE_CUDA_MEMORY",
                             "MOR_FAKE_CUDA_POISON",    "MOR_FAKE_CUDA_INTEGRATED",
                             "MOR_FAKE_CUDA_ATTRIBUTE", "MOR_EMULATED_ORDER"};

[[noreturn]] void bad_setting(const char *name, const char *value) {
    std::fprintf(stderr, "fake CUDA: %s cannot be \"%s\"\n", name, value);
    std::abort();
}

/** Items "function:call=code"; a * at or instead of the number: from that call on. */
std::vector<Settings::Fault> parse_faults(const char *name, const char *text, bool loss) {
    std::vector<Settings::Fault> faults;
    for (const char *at = text; *at;) {
        const char *end = std::strchr(at, ',');
        const std::string item = end ? std::string(at, end) : std::string(at);
        at = end ? end + 1 : at + item.size();
        const size_t colon = item.find(':'), equal = item.find('=');
        if (colon == std::string::npos || (!loss && equal == std::string::npos))
            bad_setting(name, text);
        Settings::Fault fault;
        fault.function = item.substr(0, colon);
        std::string call =
            item.substr(colon + 1, equal == std::string::npos ? equal : equal - colon - 1);
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
    if (n == "MOR_FAKE_CUDA_FAIL")
        s.faults = parse_faults(name, value, false);
    else if (n == "MOR_FAKE_CUDA_LOST") {
        s.losses = parse_faults(name, value, true);
        driver.lost = CUDA_SUCCESS;
    } else if (n == "MOR_FAKE_CUDA_VERSION")
        s.version = int(number());
    else if (n == "MOR_FAKE_CUDA_ARCH")
        s.architecture = int(number());
    else if (n == "MOR_FAKE_CUDA_DEVICES")
        s.devices = int(number());
    else if (n == "MOR_FAKE_CUDA_MEMORY")
        s.memory = number();
    else if (n == "MOR_FAKE_CUDA_INTEGRATED")
        s.integrated = int(number());
    else if (n == "MOR_FAKE_CUDA_POISON")
        s.poison = int(number());
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
    } else
        bad_setting(name, value);
}

void configure() {
    driver.settings = Settings();
    mor_emulated::set_order("forward");
    driver.configured = true;
    for (const char *name : NAMES)
        if (const char *value = std::getenv(name)) set(name, value);
}

uint64_t live_objects() {
    uint64_t live = driver.allocations.size() + driver.modules.live.size() +
                    driver.streams.live.size() + driver.events.live.size() +
                    driver.executables.live.size();
    for (const auto &graph : driver.graphs.live) live += !graph.second->is_body;
    for (const auto &count : driver.retained) live += uint64_t(count.second);
    return live;
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
        if (fault.function == function &&
            (call == fault.call || (fault.onwards && call > fault.call)))
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

} // namespace fake

using namespace fake;

// Control functions, for tests.

/** Reads the settings from the environment, forgets counts and a lost device. Objects live on. */
FAKE void fakeCudaReset() {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    driver.calls.clear();
    driver.kernels.clear();
    driver.blocks.clear();
    driver.shared.clear();
    driver.launches = driver.leaks = 0;
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
FAKE uint64_t fakeCudaLeaks() {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    return driver.leaks;
}
/** Launches of kernels and graphs by the host. */
FAKE uint64_t fakeCudaLaunches() {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    return driver.launches;
}
static uint64_t total_of(const std::map<std::string, uint64_t> &counts, const char *part) {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    uint64_t total = 0;
    for (const auto &entry : counts)
        if (entry.first.find(part) != std::string::npos) total += entry.second;
    return total;
}
/** Kernels that ran, in graphs too, whose names have this in them. */
FAKE uint64_t fakeCudaKernels(const char *part) { return total_of(driver.kernels, part); }
/** How many blocks these had. */
FAKE uint64_t fakeCudaBlocks(const char *part) { return total_of(driver.blocks, part); }

/** The most bytes of dynamic shared memory that a block of these had. */
FAKE uint64_t fakeCudaShared(const char *part) {
    const std::lock_guard<std::recursive_mutex> lock(driver.mutex);
    uint64_t most = 0;
    for (const auto &[name, bytes] : driver.shared)
        if (name.find(part) != std::string::npos) most = std::max(most, bytes);
    return most;
}
/** The reason of the last refusal, or "". */
FAKE const char *fakeCudaLastRefusal() { return driver.last_refusal.c_str(); }
/** The first bytes of the image of the last module, up to a zero, 16 at most. */
FAKE const char *fakeCudaLastImage() { return driver.last_image.c_str(); }

/*
 * The fake driver's memory: every allocation lies between guard pages, is full of 0xFF bytes when
 * fresh, and has guard bytes around it. Freed addresses are never given out again.
 */
#include "driver.h"

#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>

namespace fake {

namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 256, GRANULE = 512;
constexpr unsigned char GUARD = 0xff; // reads beyond an allocation find NaNs too

/** Address ranges that were freed: they stay reserved, so that a use of them faults. */
std::map<uintptr_t, size_t> freed;

uintptr_t up(uintptr_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

bool was_freed(uintptr_t address) {
    const auto it = freed.upper_bound(address);
    return it != freed.begin() && address < std::prev(it)->first + std::prev(it)->second;
}

/** The guard bytes before and behind the data, up to the guard pages. */
template <class F> void guards(const Allocation &a, F f) {
    if (!a.map_size) return;
    const uintptr_t first = a.map_address + PAGE, last = a.map_address + a.map_size - PAGE;
    f(first, a.address);
    f(a.address + a.size, last);
}

CUresult allocate(const char *function, size_t size, Memory kind, uintptr_t *out) {
    if (size == 0) return refuse(CUDA_ERROR_INVALID_VALUE, function, "0 bytes");
    const int device = current_device();
    size_t &used = driver.used[device];
    const size_t charged =
        kind == Memory::Device || driver.settings.integrated ? up(size, GRANULE) : 0;
    if (size > SIZE_MAX / 2 || charged > driver.settings.memory - used)
        return CUDA_ERROR_OUT_OF_MEMORY;
    const size_t data = up(size, ALIGNMENT) + ALIGNMENT, map_size = up(data, PAGE) + 2 * PAGE;
    void *map = mmap(nullptr, map_size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    const auto base = reinterpret_cast<uintptr_t>(map);
    Allocation a{0, size, kind, device, base, map_size};
    // As close to the guard page behind it as the alignment allows.
    a.address = (base + map_size - PAGE - size) / ALIGNMENT * ALIGNMENT;
    std::memset(reinterpret_cast<void *>(base + PAGE), GUARD, map_size - 2 * PAGE);
    mprotect(map, PAGE, PROT_NONE);
    mprotect(reinterpret_cast<void *>(base + map_size - PAGE), PAGE, PROT_NONE);
    used += charged;
    driver.allocations[a.address] = a;
    *out = a.address;
    return CUDA_SUCCESS;
}

void check(const Allocation &a, const char *when, uintptr_t reach) {
    guards(a, [&](uintptr_t from, uintptr_t to) {
        if (from < a.address)
            from = std::max(from, a.address - std::min(reach, a.address - from));
        else
            to = std::min(to, from + reach);
        for (uintptr_t p = from; p < to; p++) {
            if (*reinterpret_cast<const unsigned char *>(p) == GUARD) continue;
            std::fprintf(
                stderr,
                "fake CUDA: found at %s: somebody wrote %lld bytes beyond %s of an allocation "
                "of %zu bytes\n",
                when, (long long)(p < a.address ? a.address - p : p - a.address - a.size + 1),
                p < a.address ? "the begin" : "the end", a.size);
            std::abort();
        }
    });
}

void release(const Allocation &a, const char *when) {
    if (a.kind != Memory::Registered) {
        check(a, when, ~uintptr_t(0));
        if (a.kind == Memory::Device || driver.settings.integrated)
            driver.used[a.device] -= up(a.size, GRANULE);
        mmap(reinterpret_cast<void *>(a.map_address), a.map_size, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        freed[a.map_address] = a.map_size;
        if (freed.size() > 20000) { // of 65530 maps that Linux gives to a process
            munmap(reinterpret_cast<void *>(freed.begin()->first), freed.begin()->second);
            freed.erase(freed.begin());
        }
    }
    driver.allocations.erase(a.address);
}

/** The allocation at or before an address, or nothing. */
const Allocation *before(uintptr_t address) {
    auto it = driver.allocations.upper_bound(address);
    return it == driver.allocations.begin() ? nullptr : &std::prev(it)->second;
}

CUresult give_back(const char *function, uintptr_t address, Memory kind, CUresult unknown) {
    const auto it = driver.allocations.find(address);
    if (it == driver.allocations.end() || it->second.kind != kind)
        return refuse(unknown, function, "%#zx%s", size_t(address),
                      holder(address, 1) ? " is of another kind, or not the begin of an allocation"
                                         : complaint(address, 1).c_str());
    run_device(it->second.device); // the real one waits for the device too
    release(Allocation(it->second), function);
    return CUDA_SUCCESS;
}

bool readable(uintptr_t address, size_t size, bool writable) {
    FILE *maps = std::fopen("/proc/self/maps", "r");
    if (!maps) return true;
    uintptr_t at = address;
    char line[512];
    while (at < address + size && std::fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        char rights[8];
        if (std::sscanf(line, "%lx-%lx %7s", &from, &to, rights) != 3) continue;
        if (from <= at && at < to && rights[0] == 'r' && (!writable || rights[1] == 'w')) at = to;
    }
    std::fclose(maps);
    return at >= address + size;
}

void describe(uintptr_t address, char *text, size_t size) {
    std::snprintf(text, size, "%s", complaint(address, 1).c_str());
}

[[maybe_unused]] const bool described = (mor_emulated::describe_address = describe, true);

/** For a copy between the host and the device: what is wrong with its device side. */
CUresult need(const char *function, uintptr_t address, size_t bytes) {
    if (holder(address, bytes)) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_VALUE, function, "%zu bytes at %#zx%s", bytes, size_t(address),
                  complaint(address, bytes).c_str());
}

/** And with its host side: outside of all allocations, or in memory that the host may touch. */
CUresult need_host(const char *function, uintptr_t address, size_t bytes) {
    if (!address) return refuse(CUDA_ERROR_INVALID_VALUE, function, "the host's pointer is NULL");
    if (is_pageable(address, bytes)) {
        if (was_freed(address))
            return refuse(CUDA_ERROR_INVALID_VALUE, function, "host memory at %#zx was freed",
                          size_t(address));
        return CUDA_SUCCESS;
    }
    const Allocation *a = holder(address, bytes);
    if (a && a->kind != Memory::Device) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_VALUE, function, "%zu bytes at %#zx are not the host's%s",
                  bytes, size_t(address),
                  a ? ": they are the device's" : complaint(address, bytes).c_str());
}

void copy_bytes(uintptr_t to, uintptr_t from, size_t bytes) {
    std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes);
}

uintptr_t address_of(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer); }

/** One side of a copy of rows. */
struct Side {
    unsigned type;
    uintptr_t base;
    size_t pitch, slice;

    Side(unsigned type, const void *host, CUdeviceptr device, size_t x, size_t y, size_t z,
         size_t pitch, size_t height)
        : type(type), base(type == CU_MEMORYTYPE_HOST ? address_of(host) : uintptr_t(device)),
          pitch(pitch), slice(pitch * height) {
        if (base) base += x + y * pitch + z * slice;
    }
    uintptr_t at(size_t y, size_t z) const { return base + y * pitch + z * slice; }
    size_t reach(const CUDA_MEMCPY3D &c) const {
        return at(c.Height - 1, c.Depth - 1) - base + c.WidthInBytes;
    }
};

} // namespace

const Allocation *holder(uintptr_t address, size_t size) {
    const Allocation *a = before(address);
    return a && address - a->address <= a->size && size <= a->size - (address - a->address) &&
                   (size || address - a->address < a->size)
               ? a
               : nullptr;
}

std::string complaint(uintptr_t address, size_t size) {
    char text[256];
    const Allocation *a = before(address);
    if (a && address - a->address < a->size) {
        std::snprintf(text, sizeof text,
                      " go %zu bytes beyond the end of an allocation of %zu bytes",
                      size_t(address - a->address + size - a->size), a->size);
        return text;
    }
    if (a && a->map_size && address < a->map_address + a->map_size) {
        std::snprintf(text, sizeof text,
                      ": that is %zu bytes behind the end of an allocation of %zu bytes",
                      size_t(address - a->address - a->size), a->size);
        return text;
    }
    const auto next = driver.allocations.upper_bound(address);
    if (next != driver.allocations.end() && next->second.map_size &&
        address >= next->second.map_address) {
        std::snprintf(text, sizeof text, ": that is %zu bytes before an allocation of %zu bytes",
                      size_t(next->second.address - address), next->second.size);
        return text;
    }
    return was_freed(address) ? ": that memory was freed" : ": no allocation is there";
}

bool is_pageable(uintptr_t address, size_t size) {
    const Allocation *a = before(address + (size ? size - 1 : 0));
    return !a || a->address + a->size <= address;
}

void check_guards(const char *when, size_t reach) {
    for (const auto &entry : driver.allocations) check(entry.second, when, reach);
}

const char *unreachable(uintptr_t word) {
    const Allocation *a = before(word);
    // One past the end, or within the guard bytes, it is an address to count from.
    if (a && word <= (a->map_size ? a->map_address + a->map_size : a->address + a->size))
        return nullptr;
    if (was_freed(word)) return "memory that was freed";
    const auto next = driver.allocations.upper_bound(word);
    if (next != driver.allocations.end() && next->second.map_size &&
        word >= next->second.map_address)
        return nullptr;
    const auto pageable = driver.settings.attributes.find(88);
    if (pageable != driver.settings.attributes.end() && pageable->second) return nullptr;
    // The heap lies high, and most maps above it: two small numbers side by side are no address.
    static const auto on_heap = std::make_unique<char>();
    const uintptr_t lowest = address_of(on_heap.get()) >> 32 << 32;
    unsigned char resident;
    if (word < lowest || word >> 48 ||
        mincore(reinterpret_cast<void *>(word / PAGE * PAGE), 1, &resident))
        return nullptr;
    return "memory of the host that is not registered";
}

size_t release_memory(int device) {
    std::vector<Allocation> left;
    for (const auto &entry : driver.allocations)
        if (entry.second.device == device) left.push_back(entry.second);
    for (const Allocation &a : left) release(a, "the release of the context");
    return left.size();
}

void poison(void *memory, size_t bytes) {
    if (driver.settings.poison) std::memset(memory, 0xff, bytes);
}

CUresult check_copy(const char *function, const CUDA_MEMCPY3D &c, bool pageable) {
    if (!c.WidthInBytes || !c.Height || !c.Depth || c.srcLOD || c.dstLOD || c.reserved0 ||
        c.reserved1)
        return refuse(CUDA_ERROR_INVALID_VALUE, function, "a copy of %zu x %zu x %zu bytes",
                      c.WidthInBytes, c.Height, c.Depth);
    for (const bool to : {false, true}) {
        const Side side = to ? Side(c.dstMemoryType, c.dstHost, c.dstDevice, c.dstXInBytes, c.dstY,
                                    c.dstZ, c.dstPitch, c.dstHeight)
                             : Side(c.srcMemoryType, c.srcHost, c.srcDevice, c.srcXInBytes, c.srcY,
                                    c.srcZ, c.srcPitch, c.srcHeight);
        const size_t bytes = side.reach(c);
        if (side.type == CU_MEMORYTYPE_HOST) {
            if (!pageable && is_pageable(side.base, bytes))
                return refuse(CUDA_ERROR_INVALID_VALUE, function,
                              "a conditional body copies from or to memory "
                              "of the host that is not pinned");
            if (const CUresult code = need_host(function, side.at(0, 0), bytes)) return code;
        } else if (side.type == CU_MEMORYTYPE_DEVICE || side.type == CU_MEMORYTYPE_UNIFIED) {
            if (const CUresult code = need(function, side.at(0, 0), bytes)) return code;
        } else
            return refuse(CUDA_ERROR_NOT_SUPPORTED, function, "memory of type %u", side.type);
        if ((c.Height > 1 || c.Depth > 1) && side.pitch < c.WidthInBytes)
            return refuse(CUDA_ERROR_INVALID_VALUE, function,
                          "a pitch of %zu for rows of %zu bytes", side.pitch, c.WidthInBytes);
    }
    return CUDA_SUCCESS;
}

void run_copy(const CUDA_MEMCPY3D &c) {
    const Side from(c.srcMemoryType, c.srcHost, c.srcDevice, c.srcXInBytes, c.srcY, c.srcZ,
                    c.srcPitch, c.srcHeight);
    const Side to(c.dstMemoryType, c.dstHost, c.dstDevice, c.dstXInBytes, c.dstY, c.dstZ,
                  c.dstPitch, c.dstHeight);
    for (size_t z = 0; z < c.Depth; z++)
        for (size_t y = 0; y < c.Height; y++)
            copy_bytes(to.at(y, z), from.at(y, z), c.WidthInBytes);
}

void *host_destination(const CUDA_MEMCPY3D &c, size_t &bytes) {
    if (c.dstMemoryType != CU_MEMORYTYPE_HOST || c.Height != 1 || c.Depth != 1) return nullptr;
    bytes = c.WidthInBytes;
    return static_cast<unsigned char *>(c.dstHost) + c.dstXInBytes;
}

CUresult check_set(const char *function, const CUDA_MEMSET_NODE_PARAMS &s) {
    if ((s.elementSize != 1 && s.elementSize != 2 && s.elementSize != 4) || !s.width || !s.height ||
        s.width > SIZE_MAX / 8 || s.dst % s.elementSize ||
        (s.elementSize < 4 && s.value >> 8 * s.elementSize) ||
        (s.height > 1 && s.pitch < s.width * s.elementSize))
        return refuse(CUDA_ERROR_INVALID_VALUE, function, "%zu x %zu elements of %u bytes", s.width,
                      s.height, s.elementSize);
    return need(function, s.dst, (s.height - 1) * s.pitch + s.width * s.elementSize);
}

void run_set(const CUDA_MEMSET_NODE_PARAMS &s) {
    for (size_t y = 0; y < s.height; y++)
        for (size_t x = 0; x < s.width; x++)
            copy_bytes(s.dst + y * s.pitch + x * s.elementSize, address_of(&s.value),
                       s.elementSize);
}

} // namespace fake

using namespace fake;

FAKE CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    FAKE_ENTER(cuMemGetInfo_v2, Context);
    if (!available || !total) return CUDA_ERROR_INVALID_VALUE;
    *total = driver.settings.memory;
    *available = *total - driver.used[current_device()];
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
    FAKE_ENTER(cuMemAlloc_v2, Context);
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    uintptr_t address;
    if (const CUresult code = allocate(self, size, Memory::Device, &address)) return code;
    *out = address;
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemFree_v2(CUdeviceptr address) {
    FAKE_ENTER_FREE(cuMemFree_v2, Context);
    if (address == 0) return entered;
    const CUresult code = give_back(self, address, Memory::Device, CUDA_ERROR_INVALID_VALUE);
    return entered ? entered : code;
}

FAKE CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags) {
    FAKE_ENTER(cuMemHostAlloc, Context);
    if (!out || flags & ~7u) return refuse(CUDA_ERROR_INVALID_VALUE, self, "flags %#x", flags);
    uintptr_t address;
    if (const CUresult code = allocate(self, size, Memory::Pinned, &address)) return code;
    *out = reinterpret_cast<void *>(address);
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemFreeHost(void *pointer) {
    FAKE_ENTER_FREE(cuMemFreeHost, Context);
    const CUresult code =
        give_back(self, address_of(pointer), Memory::Pinned, CUDA_ERROR_INVALID_VALUE);
    return entered ? entered : code;
}

FAKE CUresult cuMemHostRegister_v2(void *pointer, size_t size, unsigned flags) {
    FAKE_ENTER(cuMemHostRegister_v2, Context);
    const uintptr_t address = address_of(pointer);
    int supported = 0, read_only = 0;
    if (flags & ~0xfu || !pointer || !size)
        return refuse(CUDA_ERROR_INVALID_VALUE, self, "%zu bytes at %p, flags %#x", size, pointer,
                      flags);
    for (const auto &setting : driver.settings.attributes) {
        if (setting.first == 99 && !setting.second) supported = -1;
        if (setting.first == 113 && !setting.second) read_only = -1;
    }
    if (supported || (flags & 8u && read_only)) return CUDA_ERROR_NOT_SUPPORTED;
    if (!is_pageable(address, size))
        return refuse(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, self,
                      "part of it is the driver's already");
    if (!readable(address, size, !(flags & 8u)))
        return refuse(CUDA_ERROR_INVALID_VALUE, self, "not all of it is mapped%s",
                      flags & 8u ? ""
                                 : " for writing, and CU_MEMHOSTREGISTER_READ_ONLY is not set");
    driver.allocations[address] =
        Allocation{address, size, Memory::Registered, current_device(), 0, 0};
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemHostUnregister(void *pointer) {
    FAKE_ENTER_FREE(cuMemHostUnregister, Context);
    const auto it = driver.allocations.find(address_of(pointer));
    if (it != driver.allocations.end() && !readable(it->first, it->second.size, false)) {
        std::fprintf(stderr, "fake CUDA: %s: %p was unmapped before\n", self, pointer);
        std::abort();
    }
    const CUresult code = give_back(self, address_of(pointer), Memory::Registered,
                                    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    return entered ? entered : code;
}

FAKE CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *pointer, unsigned flags) {
    FAKE_ENTER(cuMemHostGetDevicePointer_v2, Context);
    if (!out || flags) return CUDA_ERROR_INVALID_VALUE;
    const Allocation *a = holder(address_of(pointer), 1);
    if (!a || a->kind == Memory::Device)
        return refuse(CUDA_ERROR_INVALID_VALUE, self, "%p is no pinned host memory", pointer);
    *out = address_of(pointer);
    return CUDA_SUCCESS;
}

// Copies by the default stream, which waits for the work of blocking streams and not for that of
// others. What comes to the host, or leaves its pinned memory, has come and left when they return. But
// what leaves pageable memory may still be on its way then, and a copy within the device not begun.

static void wait_default() { run_stream(driver.default_streams.at(current_device()), ALL); }

/** Reads pageable memory now, as the real driver does, so that the caller may change it. */
static void push_pageable(Stream &stream, const char *name, CUdeviceptr to, const void *from,
                          size_t bytes) {
    const auto *source = static_cast<const unsigned char *>(from);
    auto kept = std::make_shared<std::vector<unsigned char>>(source, source + bytes);
    push(stream, name, [=] { copy_bytes(to, address_of(kept->data()), bytes); });
}

FAKE CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    FAKE_ENTER(cuMemcpyHtoD_v2, Context);
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, to, bytes)) return code;
    if (const CUresult code = need_host(self, address_of(from), bytes)) return code;
    wait_default();
    if (is_pageable(address_of(from), bytes))
        push_pageable(driver.default_streams.at(current_device()), self, to, from, bytes);
    else
        copy_bytes(to, address_of(from), bytes);
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    FAKE_ENTER(cuMemcpyDtoH_v2, Context);
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, from, bytes)) return code;
    if (const CUresult code = need_host(self, address_of(to), bytes)) return code;
    push(driver.default_streams.at(current_device()), self,
         [=] { copy_bytes(address_of(to), from, bytes); });
    wait_default();
    check_guards(self);
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    FAKE_ENTER(cuMemcpyDtoD_v2, Context);
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, from, bytes)) return code;
    if (const CUresult code = need(self, to, bytes)) return code;
    push(driver.default_streams.at(current_device()), self, [=] { copy_bytes(to, from, bytes); });
    return CUDA_SUCCESS;
}

/**
 * Zeros that nobody may rely on: the library clears its memory only so that copies of more than was
 * written are no reads of nothing. NaNs instead, as in all fresh memory, find whoever does.
 */
FAKE CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    FAKE_ENTER(cuMemsetD8_v2, Context);
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, to, bytes)) return code;
    const int with = driver.settings.poison && value == 0 ? 0xff : value;
    push(driver.default_streams.at(current_device()), self,
         [=] { std::memset(reinterpret_cast<void *>(to), with, bytes); });
    return CUDA_SUCCESS;
}

// Copies that a stream does later.

FAKE CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes,
                                   CUstream handle) {
    FAKE_ENTER(cuMemcpyHtoDAsync_v2, Context);
    Stream *stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream in this context");
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, to, bytes)) return code;
    if (const CUresult code = need_host(self, address_of(from), bytes)) return code;
    if (is_pageable(address_of(from), bytes))
        push_pageable(*stream, self, to, from, bytes);
    else
        push(*stream, self, [=] { copy_bytes(to, address_of(from), bytes); });
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream handle) {
    FAKE_ENTER(cuMemcpyDtoHAsync_v2, Context);
    Stream *stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream in this context");
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, from, bytes)) return code;
    if (const CUresult code = need_host(self, address_of(to), bytes)) return code;
    push(*stream, self, [=] { copy_bytes(address_of(to), from, bytes); });
    // To pageable memory the real driver returns once the copy has completed.
    if (is_pageable(address_of(to), bytes))
        run_stream(*stream, ALL);
    else
        poison(to, bytes);
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes,
                                   CUstream handle) {
    FAKE_ENTER(cuMemcpyDtoDAsync_v2, Context);
    Stream *stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream in this context");
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, from, bytes)) return code;
    if (const CUresult code = need(self, to, bytes)) return code;
    if (to < from + bytes && from < to + bytes)
        return refuse(CUDA_ERROR_INVALID_VALUE, self,
                      "the ranges overlap, which leaves the result open");
    push(*stream, self, [=] { copy_bytes(to, from, bytes); });
    return CUDA_SUCCESS;
}

FAKE CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream handle) {
    FAKE_ENTER(cuMemsetD8Async, Context);
    Stream *stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream in this context");
    if (!bytes) return CUDA_SUCCESS;
    if (const CUresult code = need(self, to, bytes)) return code;
    push(*stream, self, [=] { std::memset(reinterpret_cast<void *>(to), value, bytes); });
    return CUDA_SUCCESS;
}


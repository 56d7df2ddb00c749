/*
 * The fake driver's streams, events and kernel launches. A stream only keeps its work; it is done
 * when somebody waits for it (a synchronisation, an event, a copy that must return done), as late
 * as a real device may do it. A host that reads a result too early finds that nothing has happened
 * yet.
 */
#include "driver.h"

namespace fake {

Stream *find_stream(CUstream handle) {
    const auto number = reinterpret_cast<uintptr_t>(handle);
    if (number <= 1) return &driver.default_streams.at(current_device()); // 1: CU_STREAM_LEGACY
    Stream *stream = driver.streams.find(handle);
    return stream && stream->device == current_device() ? stream : nullptr;
}

void push(Stream &stream, const char *name, std::function<void()> run) {
    stream.queue.push_back(Work{++driver.sequence, name, std::move(run)});
}

namespace {

Stream &default_stream(int device) { return driver.default_streams.at(device); }

/** The default stream and the blocking ones wait for each other's earlier work. */
void run_before(Stream &stream, uint64_t sequence) {
    if (!stream.blocking) return;
    Stream &first = default_stream(stream.device);
    if (&stream != &first) {
        run_stream(first, sequence - 1);
        return;
    }
    std::vector<std::shared_ptr<Stream>> others;
    for (const auto &entry : driver.streams.live)
        if (entry.second->blocking && entry.second->device == stream.device)
            others.push_back(entry.second);
    for (const auto &other : others) run_stream(*other, sequence - 1);
}

void run_one(Stream &stream) {
    Work work = std::move(stream.queue[stream.done++]);
    if (stream.done == stream.queue.size()) {
        stream.queue.clear();
        stream.done = 0;
    }
    run_before(stream, work.sequence);
    work.run();
}

} // namespace

void run_stream(Stream &stream, uint64_t sequence) {
    while (stream.done < stream.queue.size() && stream.queue[stream.done].sequence <= sequence)
        run_one(stream);
}

void drop_work() {
    const auto drop = [](Stream &stream) {
        stream.queue.clear();
        stream.done = 0;
    };
    for (auto &entry : driver.streams.live) drop(*entry.second);
    for (auto &entry : driver.default_streams) drop(entry.second);
}

void run_device(int device) {
    std::vector<std::shared_ptr<Stream>> streams;
    for (const auto &entry : driver.streams.live)
        if (entry.second->device == device) streams.push_back(entry.second);
    run_stream(default_stream(device), ALL);
    std::vector<unsigned> order(streams.size());
    mor_emulated::order_of(order.data(), unsigned(order.size()));
    for (const unsigned i : order) run_stream(*streams[i], ALL);
}

CUresult make_launch(const char *function, const CUDA_KERNEL_NODE_PARAMS &request, Launch &launch) {
    const Function *f = driver.functions.find(request.func);
    if (!f) return refuse(CUDA_ERROR_INVALID_HANDLE, function, "no such function");
    const char *name = f->kernel->name;
    const uint64_t grid[] = {request.gridDimX, request.gridDimY, request.gridDimZ};
    const uint64_t block[] = {request.blockDimX, request.blockDimY, request.blockDimZ};
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 ||
        grid[2] > 65535)
        return refuse(CUDA_ERROR_INVALID_VALUE, function, "%s: a grid of %zu x %zu x %zu blocks",
                      name, size_t(grid[0]), size_t(grid[1]), size_t(grid[2]));
    if (!block[0] || !block[1] || !block[2] || block[0] > 1024 || block[1] > 1024 ||
        block[2] > 64 || block[0] * block[1] * block[2] > mor_emulated::max_threads(*f->kernel))
        return refuse(CUDA_ERROR_INVALID_VALUE, function,
                      "%s: blocks of %zu x %zu x %zu threads, of at most %u", name,
                      size_t(block[0]), size_t(block[1]), size_t(block[2]),
                      mor_emulated::max_threads(*f->kernel));
    if (request.sharedMemBytes > unsigned(f->max_dynamic_shared) ||
        (f->max_dynamic_shared <= 48 * 1024 &&
         request.sharedMemBytes + f->static_shared > 48 * 1024))
        return refuse(CUDA_ERROR_INVALID_VALUE, function,
                      "%s: %u bytes of dynamic shared memory (and %zu static); the limit is %d",
                      name, request.sharedMemBytes, f->static_shared, f->max_dynamic_shared);
    if (request.extra)
        return refuse(CUDA_ERROR_NOT_SUPPORTED, function, "%s: extra is not emulated", name);
    if (!request.kernelParams || !request.kernelParams[0])
        return refuse(CUDA_ERROR_INVALID_VALUE, function, "%s: its parameter is missing", name);
    const auto *bytes = static_cast<const unsigned char *>(request.kernelParams[0]);
    launch = Launch{request.func,
                    f->kernel,
                    {request.gridDimX, request.gridDimY, request.gridDimZ},
                    {request.blockDimX, request.blockDimY, request.blockDimZ},
                    request.sharedMemBytes,
                    {bytes, bytes + f->kernel->parameter_size}};
    // What is left in the padding may look like an address.
    f->kernel->clear_padding(launch.parameters.data());
    for (size_t at = 0; at + 8 <= launch.parameters.size(); at += 8) {
        uint64_t word;
        std::memcpy(&word, &launch.parameters[at], 8);
        if (const char *what = unreachable(word))
            return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, function,
                          "%s: its parameter holds, at byte %zu, the "
                          "address %#zx: %s",
                          name, at, size_t(word), what);
    }
    return CUDA_SUCCESS;
}

void run_launch(const Launch &launch) {
    driver.kernels[launch.kernel->name]++;
    uint64_t &shared = driver.shared[launch.kernel->name];
    shared = std::max(shared, uint64_t(launch.shared_bytes));
    driver.blocks[launch.kernel->name] += uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    const size_t written = mor_emulated::run_grid(*launch.kernel, launch.parameters.data(),
                                                  launch.grid, launch.block, launch.shared_bytes);
    check_guards(launch.kernel->name, 32);
    Function *f = driver.functions.find(launch.function);
    if (!f) return;
    f->static_shared = std::max(f->static_shared, written);
    // More than that only for those that asked, and then what a block may have in all.
    const size_t limit = f->max_dynamic_shared > 48 * 1024 ? attribute(97) : 48 * 1024;
    if (f->static_shared > 48 * 1024 || f->static_shared + launch.shared_bytes > limit)
        mor_emulated::fail(nullptr,
                           "%zu bytes of static and %zu of dynamic shared memory are more than a "
                           "block may have (%zu)",
                           f->static_shared, launch.shared_bytes, limit);
}

} // namespace fake

using namespace fake;

FAKE CUresult cuStreamCreate(CUstream *out, unsigned flags) {
    FAKE_ENTER(cuStreamCreate, Context);
    if (!out || flags > 1) return refuse(CUDA_ERROR_INVALID_VALUE, self, "flags %#x", flags);
    auto stream = std::make_shared<Stream>();
    stream->device = current_device();
    stream->blocking = flags == 0;
    *out = as_handle<CUstream>(driver.streams.add(std::move(stream)));
    return CUDA_SUCCESS;
}

FAKE CUresult cuStreamDestroy_v2(CUstream handle) {
    FAKE_ENTER_FREE(cuStreamDestroy_v2, Context);
    Stream *stream = driver.streams.find(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream");
    run_stream(*stream, ALL);
    driver.streams.live.erase(reinterpret_cast<uintptr_t>(handle));
    return entered;
}

FAKE CUresult cuStreamSynchronize(CUstream handle) {
    FAKE_ENTER(cuStreamSynchronize, Context);
    Stream *stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream in this context");
    run_stream(*stream, ALL);
    check_guards(self);
    return CUDA_SUCCESS;
}

/** Does one piece of work, so that a host that asks again and again comes to an end. */
static CUresult query(Stream &stream, uint64_t sequence) {
    if (stream.done == stream.queue.size() || stream.queue[stream.done].sequence > sequence)
        return CUDA_SUCCESS;
    run_stream(stream, stream.queue[stream.done].sequence);
    return CUDA_ERROR_NOT_READY;
}

FAKE CUresult cuStreamQuery(CUstream handle) {
    FAKE_ENTER(cuStreamQuery, Context);
    Stream *stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream in this context");
    return query(*stream, ALL);
}

FAKE CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    FAKE_ENTER(cuStreamWaitEvent, Context);
    Stream *stream = find_stream(handle);
    const Event *e = driver.events.find(event);
    if (!stream || !e || flags)
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream or event");
    if (!e->recorded || e->complete) return CUDA_SUCCESS;
    const CUstream other = e->stream;
    const uint64_t sequence = e->sequence;
    push(*stream, self, [=] {
        if (Stream *s = find_stream(other)) run_stream(*s, sequence);
    });
    return CUDA_SUCCESS;
}

FAKE CUresult cuEventCreate(CUevent *out, unsigned flags) {
    FAKE_ENTER(cuEventCreate, Context);
    if (!out || flags & ~7u) return refuse(CUDA_ERROR_INVALID_VALUE, self, "flags %#x", flags);
    auto event = std::make_shared<Event>();
    event->device = current_device();
    event->timed = !(flags & 2u);
    *out = as_handle<CUevent>(driver.events.add(std::move(event)));
    return CUDA_SUCCESS;
}

FAKE CUresult cuEventDestroy_v2(CUevent event) {
    FAKE_ENTER_FREE(cuEventDestroy_v2, Context);
    if (!driver.events.find(event)) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such event");
    driver.events.live.erase(reinterpret_cast<uintptr_t>(event));
    return entered;
}

FAKE CUresult cuEventRecord(CUevent event, CUstream handle) {
    FAKE_ENTER(cuEventRecord, Context);
    Stream *stream = find_stream(handle);
    if (!stream || !driver.events.find(event))
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream or event");
    const std::shared_ptr<Event> e = driver.events.live.at(reinterpret_cast<uintptr_t>(event));
    const uint64_t sequence = driver.sequence + 1;
    e->stream = handle;
    e->sequence = sequence;
    e->complete = false;
    e->recorded = true;
    push(*stream, self, [=] {
        if (e->sequence != sequence) return; // recorded again since
        e->complete = true;
        e->when = std::chrono::steady_clock::now();
    });
    return CUDA_SUCCESS;
}

FAKE CUresult cuEventSynchronize(CUevent event) {
    FAKE_ENTER(cuEventSynchronize, Context);
    const Event *e = driver.events.find(event);
    if (!e) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such event");
    if (!e->complete)
        if (Stream *stream = find_stream(e->stream)) run_stream(*stream, e->sequence);
    check_guards(self);
    return CUDA_SUCCESS;
}

static CUresult elapsed(const char *self, float *milliseconds, CUevent start, CUevent end) {
    const Event *from = driver.events.find(start), *to = driver.events.find(end);
    if (!milliseconds || !from || !to || !from->timed || !to->timed || !from->recorded ||
        !to->recorded)
        return refuse(CUDA_ERROR_INVALID_HANDLE, self,
                      "the events must be recorded, and made with timing");
    if (!from->complete || !to->complete) return CUDA_ERROR_NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(to->when - from->when).count();
    return CUDA_SUCCESS;
}

FAKE CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    FAKE_ENTER(cuEventElapsedTime, Context);
    return elapsed(self, milliseconds, start, end);
}

FAKE CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z,
                             unsigned shared_bytes, CUstream handle, void **parameters,
                             void **extra) {
    FAKE_ENTER(cuLaunchKernel, Context);
    Stream *stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such stream in this context");
    const CUDA_KERNEL_NODE_PARAMS request{function,   grid_x,  grid_y,  grid_z,
                                          block_x,    block_y, block_z, shared_bytes,
                                          parameters, extra,   nullptr, nullptr};
    auto launch = std::make_shared<Launch>();
    if (const CUresult code = make_launch(self, request, *launch)) return code;
    driver.launches++;
    push(*stream, self, [launch] { run_launch(*launch); });
    return CUDA_SUCCESS;
}

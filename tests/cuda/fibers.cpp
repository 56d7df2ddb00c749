/*
 * The emulated multiprocessor: the threads of a block as fibers, run in turns from barrier to
 * barrier.
 *
 * Each fiber has a stack behind a guard page. A fiber runs until it waits (for its block or for
 * lanes of its warp) or ends; the scheduler then takes the next one that is ready, in the order
 * that was asked for. When none is ready and not all have ended, the kernel is wrong, and the
 * report says who waits.
 */
#include "fibers.h"

#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
// The ends of the section of __shared__ variables (shared.ld).
extern unsigned char mor_shared_begin[] __attribute__((visibility("hidden")));
extern unsigned char mor_shared_end[] __attribute__((visibility("hidden")));
// Where the compiler notes the empty instructions of __launch_bounds__, if any kernel has it.
extern const uintptr_t __start___patchable_function_entries[]
    __attribute__((weak, visibility("hidden")));
extern const uintptr_t __stop___patchable_function_entries[]
    __attribute__((weak, visibility("hidden")));

/** Keeps the registers that a call must preserve, and the stack, in *from, and goes on at `to`. */
void mor_switch_stack(void **from, void *to);
}

#if defined(__x86_64__)
// It leaves by a jump: a return would be predicted to go back to where the call came from.
asm(".text\n.hidden mor_switch_stack\n.globl mor_switch_stack\n.type mor_switch_stack,@function\n"
    "mor_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  popq %rcx\n  jmpq *%rcx\n"
    ".size mor_switch_stack,.-mor_switch_stack\n");
constexpr size_t SAVED_WORDS = 7, RETURN_WORD = 6;
typedef uint8_t Instruction;
constexpr Instruction NOP = 0x90;
#elif defined(__aarch64__)
asm(".text\n.hidden mor_switch_stack\n.globl mor_switch_stack\n.type mor_switch_stack,@function\n"
    "mor_switch_stack:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n"
    ".size mor_switch_stack,.-mor_switch_stack\n");
constexpr size_t SAVED_WORDS = 20, RETURN_WORD = 11; // x30
typedef uint32_t Instruction;
constexpr Instruction NOP = 0xd503201f;
#else
#error "the context switch is written for x86-64 and aarch64"
#endif

namespace mor_emulated {

Position *current;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char *dynamic_shared;
const Registration *Registration::first;
void (*describe_address)(uintptr_t, char *, size_t);

namespace {

// Sanitized code keeps much more on the stack.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 1024 * 1024;
#else
constexpr size_t STACK = 128 * 1024;
#endif
constexpr size_t PAGE = 4096;
// Before each stack; -fstack-clash-protection lets no frame step over it.
constexpr size_t STACK_GUARD = 64 * 1024, STACK_STEP = STACK + STACK_GUARD;

const Registration *kernel;
const void *kernel_parameters;
Fiber fibers[MAX_THREADS];
unsigned threads, ended, at_barrier;
unsigned ready[MAX_THREADS / WARP];   // lanes of each warp that can run
unsigned waiting[MAX_THREADS / WARP]; // lanes of each warp that wait for a collective
unsigned char *stacks, *shared_end;

enum class Order { Forward, Reverse, Shuffled } order = Order::Forward;
uint64_t random_state = 1;

bool same_text(const char *a, const char *b) { return a == b || !std::strcmp(a, b); }

unsigned random_below(unsigned n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return unsigned((random_state >> 11) % n);
}

/** A stack on which nothing runs now: where it goes on, and what a sanitizer needs to know. */
struct Stack {
    void *pointer, *fake;
    const void *bottom;
    size_t size;
};
Stack scheduler, stack_of[MAX_THREADS];
Stack *left; // that was left last

void arrive([[maybe_unused]] void *fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &left->bottom, &left->size);
#endif
}

/** Leaves a stack, for good if it is the `last` time, and comes back when somebody goes to it. */
void go([[maybe_unused]] bool last, Stack &from, Stack &to) {
    left = &from;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.bottom, to.size);
#endif
    mor_switch_stack(&from.pointer, to.pointer);
    arrive(from.fake);
}

/** One turn of a warp: its lanes in some order, and how many of them have been looked at. */
struct Turn {
    unsigned warp, next;
    unsigned lanes[WARP];
} turn;

Fiber *running() { return static_cast<Fiber *>(current); }

/** The stack of the next lane of this turn that can run, or the scheduler's. */
Stack &next_stack() {
    while (turn.next < WARP) {
        const unsigned lane = turn.lanes[turn.next++];
        if (!(ready[turn.warp] >> lane & 1u)) continue;
        current = &fibers[turn.warp * WARP + lane];
        return stack_of[turn.warp * WARP + lane];
    }
    return scheduler;
}

/** Gives a warp a turn: every lane of it that is ready runs once. */
void run_warp(unsigned w) {
    turn.warp = w;
    turn.next = 0;
    if (order == Order::Shuffled) order_of(turn.lanes, WARP);
    Stack &first = next_stack();
    if (&first != &scheduler) go(false, scheduler, first);
}

void yield(const Fiber &fiber) {
    go(fiber.state == State::Ended, stack_of[fiber.index], next_stack());
}

void fiber_main() {
    arrive(nullptr);
    kernel->invoke(kernel->function, kernel_parameters);
    Fiber &fiber = *running();
    if (is_multiplying(fiber)) fail(&fiber, "ends before its products");
    if (is_copying(fiber)) fail(&fiber, "ends before its copies");
    fiber.state = State::Ended;
    ready[fiber.index / WARP] &= ~(1u << fiber.lane);
    ended++;
    yield(fiber);
    std::abort(); // an ended fiber is not resumed
}

unsigned lanes_of(unsigned warp) { return std::min(WARP, threads - warp * WARP); }
unsigned full_mask(unsigned lanes) { return lanes == WARP ? ~0u : (1u << lanes) - 1; }

void map_stacks() {
    const size_t bytes = MAX_THREADS * STACK_STEP + MAX_SHARED + STACK_GUARD + 2 * PAGE;
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::perror("mor emulation: stacks");
        std::abort();
    }
    stacks = static_cast<unsigned char *>(memory);
    for (size_t i = 0; i <= MAX_THREADS; i++)
        mprotect(stacks + i * STACK_STEP, STACK_GUARD, PROT_NONE);
    // Dynamic shared memory ends at a guard page.
    const size_t room = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
    shared_end = stacks + MAX_THREADS * STACK_STEP + STACK_GUARD + room;
    mprotect(shared_end, PAGE, PROT_NONE);
}

void prepare(Fiber &fiber, unsigned index) {
    fiber.index = index;
    fiber.lane = index % WARP;
    fiber.waited = false;
    fiber.thread = {index % block_size.x, index / block_size.x % block_size.y,
                    index / (block_size.x * block_size.y)};
    fiber.state = State::Ready;
    fiber.exchange = nullptr;
    // Tops of stacks at different places of a page, or all of them would share a few lines of the
    // cache.
    auto top = reinterpret_cast<uintptr_t>(stacks + (index + 1) * STACK_STEP) - index % 32 * 128;
#if defined(__x86_64__)
    top -= 8; // as after a call, so that the fiber's frame is aligned
#endif
    void **saved = reinterpret_cast<void **>(top) - SAVED_WORDS;
    std::memset(saved, 0, SAVED_WORDS * sizeof(void *));
    saved[RETURN_WORD] = reinterpret_cast<void *>(&fiber_main);
    stack_of[index] = {saved, nullptr, stacks + index * STACK_STEP + STACK_GUARD, STACK};
}

std::string text(const uint3 &v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string lane_list(unsigned mask) {
    std::string list;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1u)) continue;
        unsigned last = lane;
        while (last + 1 < WARP && mask >> (last + 1) & 1u) last++;
        list += (list.empty() ? "" : ",") + std::to_string(lane);
        if (last != lane) list += "-" + std::to_string(last);
        lane = last;
    }
    return list.empty() ? "none" : list;
}

/** Nobody can run and not all have ended: says who waits where, and for whom. */
[[noreturn]] void report_stuck() {
    const Fiber *culprit = nullptr;
    std::string story;
    const unsigned warps = (threads + WARP - 1) / WARP;
    for (unsigned w = 0; w < warps; w++) {
        unsigned seen = 0, over = 0;
        for (unsigned lane = 0; lane < lanes_of(w); lane++)
            if (fibers[w * WARP + lane].state == State::Ended) over |= 1u << lane;
        if (over)
            story += "\n  warp " + std::to_string(w) + ": lanes " + lane_list(over) + " have ended";
        for (unsigned lane = 0; lane < lanes_of(w); lane++) {
            const Fiber &f = fibers[w * WARP + lane];
            if (f.state == State::Ended || seen >> lane & 1u) continue;
            if (f.state == State::AtGate) {
                if (!culprit) culprit = &f;
                story += "\n  warp " + std::to_string(w) + ": lane " + std::to_string(lane) +
                         " waits for opening " + std::to_string(f.openings + 1) +
                         " of a gate that has opened " + std::to_string(f.gate->opened) +
                         " times; " + std::to_string(f.gate->missing) + " are missing";
                continue;
            }
            const bool barrier = f.state == State::AtBarrier;
            unsigned same = 0;
            for (unsigned other = lane; other < lanes_of(w); other++) {
                const Fiber &g = fibers[w * WARP + other];
                if (g.state == f.state && (barrier ? g.line == f.line && g.file == f.file
                                                   : g.exchange->line == f.exchange->line &&
                                                         g.exchange->file == f.exchange->file &&
                                                         g.exchange->mask == f.exchange->mask))
                    same |= 1u << other;
            }
            seen |= same;
            if (!culprit) culprit = &f;
            story += "\n  warp " + std::to_string(w) + ": lanes " + lane_list(same) + " wait at ";
            char place[512];
            if (barrier)
                std::snprintf(place, sizeof place, "%s (%s:%d)", f.name, f.file, f.line);
            else
                std::snprintf(place, sizeof place, "%s (%s:%d) with mask %08x", f.exchange->name,
                              f.exchange->file, f.exchange->line, f.exchange->mask);
            story += place;
        }
    }
    fail(culprit, "waits for threads that will not come%s", story.c_str());
}

void release_barrier() {
    const Fiber &first = fibers[0];
    int count = 0;
    for (unsigned i = 0; i < threads; i++) {
        const Fiber &f = fibers[i];
        if (f.line != first.line || !same_text(f.file, first.file) || f.vote != first.vote)
            fail(&f,
                 "waits at %s (%s:%d) while thread %s waits at %s (%s:%d): the block is divided",
                 f.name, f.file, f.line, text(first.thread).c_str(), first.name, first.file,
                 first.line);
        count += f.predicate;
    }
    const int result = first.vote == Vote::And  ? count == int(threads)
                       : first.vote == Vote::Or ? count != 0
                                                : count;
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].state = State::Ready;
        fibers[i].vote_result = result;
    }
    for (unsigned w = 0; w * WARP < threads; w++) ready[w] = full_mask(lanes_of(w));
    at_barrier = 0;
}

/** Lets threads go on whose gate has opened. */
bool release_gates() {
    bool released = false;
    for (unsigned i = 0; i < threads; i++) {
        Fiber &f = fibers[i];
        if (f.state != State::AtGate || f.gate->opened <= f.openings) continue;
        f.state = State::Ready;
        ready[i / WARP] |= 1u << f.lane;
        released = true;
    }
    return released;
}

void run_block() {
    const unsigned warps = (threads + WARP - 1) / WARP;
    for (unsigned i = 0; i < threads; i++) prepare(fibers[i], i);
    for (unsigned w = 0; w < warps; w++) {
        ready[w] = full_mask(lanes_of(w));
        waiting[w] = 0;
    }
    ended = at_barrier = 0;
    if (order != Order::Shuffled) order_of(turn.lanes, WARP);
    while (ended < threads) {
        if (order == Order::Shuffled) {
            // Warps take turns at random between any two waits.
            const unsigned start = random_below(warps);
            unsigned w = start;
            while (!ready[w]) {
                w = (w + 1) % warps;
                if (w == start) break;
            }
            if (ready[w]) {
                run_warp(w);
                continue;
            }
        } else {
            for (unsigned i = 0; i < warps; i++) {
                const unsigned w = order == Order::Forward ? i : warps - 1 - i;
                while (ready[w]) run_warp(w);
            }
        }
        if (at_barrier == threads)
            release_barrier();
        else if (ended < threads && !release_gates())
            report_stuck();
    }
}

struct Range {
    unsigned char *begin;
    size_t bytes;
};

/** The memory of __shared__ variables, without the sanitizer's red zones between them. */
const std::vector<Range> &shared_ranges() {
    static std::vector<Range> ranges;
    if (!ranges.empty()) return ranges;
#if defined(__SANITIZE_ADDRESS__)
    unsigned char *begin = nullptr;
    for (unsigned char *p = mor_shared_begin; p <= mor_shared_end; p++) {
        const bool usable = p < mor_shared_end && !__asan_address_is_poisoned(p);
        if (usable && !begin) begin = p;
        if (usable || !begin) continue;
        ranges.push_back({begin, size_t(p - begin)});
        begin = nullptr;
    }
#else
    ranges.push_back({mor_shared_begin, size_t(mor_shared_end - mor_shared_begin)});
#endif
    return ranges;
}

void poison_shared(size_t dynamic_bytes) {
    for (const Range &range : shared_ranges()) std::memset(range.begin, 0xff, range.bytes);
    std::memset(dynamic_shared, 0xff, dynamic_bytes);
}

size_t shared_bytes_written() {
    size_t written = 0;
    for (const Range &range : shared_ranges())
        for (size_t i = 0; i < range.bytes; i++) written += range.begin[i] != 0xff;
    return written;
}

#if !defined(__SANITIZE_ADDRESS__)
struct sigaction old_segv, old_bus;

void on_fault(int, siginfo_t *info, void *) {
    char where[256] = "";
    if (describe_address)
        describe_address(reinterpret_cast<uintptr_t>(info->si_addr), where, sizeof where);
    const auto address = static_cast<unsigned char *>(info->si_addr);
    if (address >= stacks && address < stacks + MAX_THREADS * STACK_STEP)
        std::snprintf(where, sizeof where, "; the stack of a thread is full (%zu bytes)", STACK);
    else if (address >= shared_end && address < shared_end + PAGE)
        std::snprintf(where, sizeof where, "; that is behind the dynamic shared memory");
    fail(running(), "touches address %p, which it may not%s", info->si_addr, where);
}

/** Reports faults in kernels with the thread's name; the host's own handlers come back after. */
struct FaultReports {
    stack_t old_stack;
    FaultReports() {
        static unsigned char alternative[64 * 1024];
        stack_t stack{};
        stack.ss_sp = alternative;
        stack.ss_size = sizeof alternative;
        sigaltstack(&stack, &old_stack);
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_segv);
        sigaction(SIGBUS, &action, &old_bus);
    }
    ~FaultReports() {
        sigaction(SIGSEGV, &old_segv, nullptr);
        sigaction(SIGBUS, &old_bus, nullptr);
        if (old_stack.ss_flags & SS_DISABLE) old_stack.ss_size = MINSIGSTKSZ;
        sigaltstack(&old_stack, nullptr);
    }
};
#else
struct FaultReports {
    ~FaultReports() {}
};
#endif

} // namespace

void fail(const Fiber *fiber, const char *format, ...) {
    char message[8192];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "mor emulation: kernel %s, block %s, thread %s: %s\n",
                 kernel ? kernel->name : "?", text(block_index).c_str(),
                 fiber ? text(fiber->thread).c_str() : "?", message);
    std::fflush(stderr);
    std::signal(SIGABRT, SIG_DFL);
    std::abort();
}

void trap(const char *what) { fail(running(), "%s", what); }

unsigned long long ticks() {
    return (unsigned long long)std::chrono::steady_clock::now().time_since_epoch().count();
}

Fiber *warp_fibers() { return fibers + running()->index / WARP * WARP; }
unsigned warp_lanes() { return lanes_of(running()->index / WARP); }

int block_barrier(Vote vote, bool predicate, const char *name, const char *file, int line) {
    Fiber &fiber = *running();
    fiber.vote = vote;
    fiber.predicate = predicate;
    fiber.name = name;
    fiber.file = file;
    fiber.line = line;
    fiber.state = State::AtBarrier;
    ready[fiber.index / WARP] &= ~(1u << fiber.lane);
    at_barrier++;
    yield(fiber);
    return fiber.vote_result;
}

void begin_gate(void *gate, unsigned count) {
    GateState &state = *static_cast<GateState *>(gate);
    state = {0, static_cast<unsigned short>(count), static_cast<unsigned short>(count)};
}

void arrive_at_gate(void *gate) {
    GateState &state = *static_cast<GateState *>(gate);
    if (--state.missing > 0) return;
    state.missing = state.count;
    state.opened++;
}

void wait_at_gate(const void *gate, unsigned openings) {
    const GateState &state = *static_cast<const GateState *>(gate);
    Fiber &fiber = *running();
    if (state.opened <= openings) {
        fiber.gate = &state;
        fiber.openings = openings;
        fiber.state = State::AtGate;
        ready[fiber.index / WARP] &= ~(1u << fiber.lane);
        yield(fiber);
    }
    if (state.opened != openings + 1)
        fail(&fiber, "waits for opening %u of a gate that has opened %u times", openings + 1, state.opened);
}

void warp_collective(Exchange &exchange) {
    Fiber &fiber = *running();
    const unsigned w = fiber.index / WARP;
    Fiber *warp = fibers + w * WARP;
    if (!(exchange.mask >> fiber.lane & 1u))
        fail(&fiber, "calls %s (%s:%d) with mask %08x, which does not name its own lane %u",
             exchange.name, exchange.file, exchange.line, exchange.mask, fiber.lane);
    if (const unsigned absent = exchange.mask & ~full_mask(lanes_of(w)))
        fail(&fiber, "calls %s (%s:%d) with mask %08x: the block has no threads for lanes %s",
             exchange.name, exchange.file, exchange.line, exchange.mask, lane_list(absent).c_str());
    fiber.exchange = &exchange;
    waiting[w] |= 1u << fiber.lane;
    if ((waiting[w] & exchange.mask) == exchange.mask) {
        for (unsigned lane = 0; lane < lanes_of(w); lane++) {
            if (!(exchange.mask >> lane & 1u)) continue;
            const Exchange &other = *warp[lane].exchange;
            if (other.mask != exchange.mask || other.operation != exchange.operation ||
                other.line != exchange.line || !same_text(other.file, exchange.file))
                fail(
                    &fiber,
                    "calls %s (%s:%d) with mask %08x while lane %u is in %s (%s:%d) with mask %08x",
                    exchange.name, exchange.file, exchange.line, exchange.mask, lane, other.name,
                    other.file, other.line, other.mask);
        }
        complete(warp, exchange.mask);
        for (unsigned lane = 0; lane < lanes_of(w); lane++)
            if (exchange.mask >> lane & 1u) warp[lane].state = State::Ready;
        waiting[w] &= ~exchange.mask;
        ready[w] |= exchange.mask;
        return;
    }
    fiber.state = State::AtWarp;
    ready[w] &= ~(1u << fiber.lane);
    yield(fiber);
}

unsigned max_threads(const Registration &which) {
    const auto *entry = reinterpret_cast<const Instruction *>(which.function);
    for (const uintptr_t *note = __start___patchable_function_entries;
         note != __stop___patchable_function_entries; note++) {
        const auto *at = reinterpret_cast<const Instruction *>(*note);
        if (at >= entry || entry - at > std::ptrdiff_t(MAX_THREADS)) continue;
        const auto threads = unsigned(entry - at);
        while (at < entry && *at == NOP) at++; // or the note is another kernel's
        if (at == entry) return threads;
    }
    return MAX_THREADS;
}

bool set_order(const char *text) {
    const std::string name = text;
    if (name == "forward")
        order = Order::Forward;
    else if (name == "reverse")
        order = Order::Reverse;
    else if (name.compare(0, 9, "shuffled:") == 0) {
        char *end;
        const uint64_t seed = std::strtoull(text + 9, &end, 10);
        if (end == text + 9 || *end) return false;
        order = Order::Shuffled;
        random_state = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
        if (!random_state) random_state = 1;
    } else
        return false;
    return true;
}

void order_of(unsigned *out, unsigned count) {
    for (unsigned i = 0; i < count; i++) out[i] = order == Order::Reverse ? count - 1 - i : i;
    if (order == Order::Shuffled)
        for (unsigned i = count; i > 1; i--) std::swap(out[i - 1], out[random_below(i)]);
}

size_t run_grid(const Registration &which, const void *parameters, dim3 grid, dim3 block,
                size_t shared_bytes) {
    if (!stacks) map_stacks();
    kernel = &which;
    kernel_parameters = parameters;
    block_size = block;
    grid_size = grid;
    threads = block.x * block.y * block.z;
    dynamic_shared = shared_end - (shared_bytes + 15) / 16 * 16;
    const FaultReports reports;

    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<unsigned> shuffled;
    if (order == Order::Shuffled) {
        shuffled.resize(blocks);
        order_of(shuffled.data(), unsigned(blocks));
    }
    size_t written = 0;
    for (uint64_t n = 0; n < blocks; n++) {
        const uint64_t i = order == Order::Forward   ? n
                           : order == Order::Reverse ? blocks - 1 - n
                                                     : shuffled[n];
        block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                       unsigned(i / grid.x / grid.y)};
        poison_shared(shared_bytes);
        run_block();
        if (n == 0) written = shared_bytes_written();
    }
    current = nullptr;
    return written;
}

} // namespace mor_emulated

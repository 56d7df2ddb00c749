/*
 * The emulated multiprocessor, as the driver and the collectives see it (fibers.cpp).
 */
#ifndef MOR_FIBERS_H
#define MOR_FIBERS_H

#include "emulated.h"

namespace mor_emulated {

enum class State { Ready, AtBarrier, AtWarp, AtGate, Ended };

/** One thread of the block that runs. */
struct Fiber : Position {
    unsigned index; // in the block, x fastest
    State state;
    Exchange *exchange;      // AtWarp: what it brought
    const char *name, *file; // AtBarrier: where it waits
    int line;
    Vote vote;
    bool predicate;
    int vote_result;
    const GateState *gate; // AtGate: where it waits, until it has opened so often and once more
    unsigned openings;
};

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 227 * 1024;

/** The fibers of the warp of the fiber that runs, and how many lanes it has. */
Fiber *warp_fibers();
unsigned warp_lanes();
/** Carries a collective out for all lanes of its mask, which have all arrived (collectives.cpp). */
void complete(Fiber *warp, unsigned mask);

/** Whether a thread has begun products, or copies, that it has not waited for. */
bool is_multiplying(const Fiber &fiber);
bool is_copying(const Fiber &fiber);

/**
 * Runs a grid to its end. The sizes are within the limits of a device. Returns the bytes of static
 * shared memory that its first block wrote to.
 */
size_t run_grid(const Registration &kernel, const void *parameters, dim3 grid, dim3 block,
                size_t shared_bytes);

/** How many threads a block of the kernel may have, by its __launch_bounds__. */
unsigned max_threads(const Registration &kernel);

/** "forward", "reverse" or "shuffled:SEED"; false for anything else. */
bool set_order(const char *order);
/** The order in which `count` things that do not depend on each other are to run. */
void order_of(unsigned *order, unsigned count);

/** Says what is known about an address that a kernel had no right to use; the driver sets it. */
extern void (*describe_address)(uintptr_t address, char *text, size_t size);

/** Writes "kernel …, block …, thread …: " and the message, and ends the process. */
[[noreturn]] void fail(const Fiber *fiber, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

} // namespace mor_emulated

#endif

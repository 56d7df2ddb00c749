/* The parameters of the kernels of selftest_kernels.cu. */
#ifndef MOR_SELFTEST_KERNELS_H
#define MOR_SELFTEST_KERNELS_H

#include <cstdint>

struct SumRows {
    const float *values;
    float *sums;
    unsigned columns, with_barrier;
};

struct Transpose {
    const float *from;
    float *to;
    unsigned rows, columns;
};

struct Multiply {
    const uint16_t *a, *b; // 16 x 16 and 16 x 8 halves, by rows
    float *d;              // 16 x 8, in and out
};

struct MultiplyShared {
    const uint16_t *a, *b; // 64 x 16 and 64 x 64 halves, by rows
    float *d;              // 64 x 64, out: a times sixteen columns of the rows of b
    unsigned step;         // which sixteen
    unsigned too_early;    // whether b is overwritten before the products are waited for
};

/** A warp brings numbers to another by a place in shared memory, a round each. */
struct Rounds {
    const unsigned *from;
    unsigned *to; // 32 a round, then what the place had before the last copies were waited for
    unsigned rounds;
};

struct Count {
    unsigned *counter;
    unsigned limit;
    unsigned long long handle; // of the conditional node, or 0
};

struct Add {
    float *values;
    unsigned count;
    float scale, addend;
};

/** What a test of reports does wrong. */
enum Wrong : unsigned {
    NOTHING,
    EARLY_EXIT,
    DIVIDED,
    ABSENT_LANES,
    OTHER_MASK,
    WRITE_BEYOND,
    FAR_BEYOND,
    SHARED_TOO_LARGE,
    DYNAMIC_BEYOND,
    DEEP_STACK,
    READ_OTHER_LANE,
    TRAP,
    UNFINISHED_PRODUCTS,
    UNFINISHED_COPIES,
    CLOSED_GATE,
    LATE_AT_GATE
};
struct Misbehave {
    float *values;
    unsigned wrong;
    long long index;
};

struct Collectives {
    unsigned *out; // 32 words for each collective
};

#endif

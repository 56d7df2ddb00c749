// Tells a graph whether the recursion that follows has any rows to run. A module of its own: the driver
// brings the function that does it, and a driver that has no conditional nodes refuses the module.
#include "report.cuh"

#ifndef MOR_EMULATED
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);
#endif

struct ConditionParams {
    const Report* report;
    u64 condition;
};

// One thread.
extern "C" __global__ void mor_condition(const ConditionParams p) {
    cudaGraphSetConditional(p.condition, p.report->flying > 0);
}
MOR_KERNEL(mor_condition)

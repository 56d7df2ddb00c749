// The one kernel that decides which part of a graph runs. A module of its own: only drivers from CUDA 12.3
// on give modules this function, and an older one refuses a module that calls it (docs/cuda.md).
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

// One thread: the body of the conditional node runs, or runs again, unless `*value` is zero.
extern "C" __global__ void mor_set_condition(unsigned long long handle, const unsigned int* value) {
    cudaGraphSetConditional(handle, *value);
}

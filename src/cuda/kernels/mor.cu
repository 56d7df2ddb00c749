// All kernels but the one in conditional.cu, as one translation unit. tools/cuda/build.py compiles it for
// devices, tests/cuda for the host.
#include "pass.cuh"
#ifdef MOR_EMULATED
#include "conditional.cu"
#endif

// All kernels but the one in conditional.cu, as one translation unit. tools/cuda/build.py compiles it for
// devices, tests/cuda for the host.
#include "exact.cuh"
#include "lone.cuh"
#include "many.cuh"
#include "routing.cuh"
#include "sampling.cuh"
#include "warpgroup.cuh"
#ifdef MOR_EMULATED
#include "conditional.cu"
#endif

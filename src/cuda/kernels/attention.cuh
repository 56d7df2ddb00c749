// Attention over the cache: a kernel for each of its types. grid: (blocks of rows, key heads, parts).
#pragma once
#include "attention_floats.cuh"
#include "attention_halves.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2) mor_attention_f16(const AttentionParams p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
#ifdef MOR_TENSOR_CORES
    const bool whole = p.input.cache.head_dim % CHUNK_ELEMENTS == 0;
    if (whole && p.alone)
        attend_halves<true, true>(p, shared);
    else if (whole)
        attend_halves<true, false>(p, shared);
    else if (p.alone)
        attend_halves<false, true>(p, shared);
    else
        attend_halves<false, false>(p, shared);
#else
    attend_row<F16>(p, shared);
#endif
}
MOR_KERNEL(mor_attention_f16)

extern "C" __global__ void __launch_bounds__(BLOCK, 2) mor_attention_f32(const AttentionParams p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
    attend_row<F32>(p, shared);
}
MOR_KERNEL(mor_attention_f32)

extern "C" __global__ void __launch_bounds__(BLOCK, 2) mor_attention_q8_0(const AttentionParams p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
    attend_row<Q8_0>(p, shared);
}
MOR_KERNEL(mor_attention_q8_0)

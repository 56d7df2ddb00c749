// Attention over the cache: a kernel for each of its types. grid: (blocks of rows, key heads, parts).
#pragma once
#include "attention_floats.cuh"
#include "attention_halves.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2) mor_attention_f16(const AttentionParams p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
#ifdef MOR_TENSOR_CORES
    if (p.input.cache.head_dim % CHUNK_ELEMENTS == 0)
        attend_halves<true>(p, shared);
    else
        attend_halves<false>(p, shared);
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

// Attention over the cache: a kernel for each of its types, of halves by tensor cores one for each kind of rows and
// heads. grid: (blocks of rows, key heads, parts).
#pragma once
#include "attention_floats.cuh"
#include "attention_prompt.cuh"

// A cache of any type, on any device.
template <u32 TYPE>
__device__ __forceinline__ void attend_floats(const AttentionParams& p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
    attend_row<TYPE>(p, shared);
}

MOR_WORK(mor_attention_f32, AttentionParams, (BLOCK, 2), attend_floats<F32>)
MOR_WORK(mor_attention_q8_0, AttentionParams, (BLOCK, 2), attend_floats<Q8_0>)
#if !defined(MOR_TENSOR_CORES) || defined(MOR_EMULATED)
MOR_WORK(mor_attention_f16, AttentionParams, (BLOCK, 2), attend_floats<F16>)
#endif

#ifdef MOR_TENSOR_CORES
// A cache in halves; WHOLE and ALONE as in attention_halves.cuh.
template <bool WHOLE, bool ALONE>
__device__ __forceinline__ void attend_tiles(const AttentionParams& p) {
    enter();
    MOR_DYNAMIC_SHARED(float4, shared);
    attend_halves<WHOLE, ALONE>(p, shared);
}

MOR_WORK(mor_attention_halves, AttentionParams, (BLOCK, 2), attend_tiles<false, false>)
MOR_WORK(mor_attention_halves_alone, AttentionParams, (BLOCK, 2), attend_tiles<false, true>)
MOR_WORK(mor_attention_halves_whole, AttentionParams, (BLOCK, 2), attend_tiles<true, false>)
MOR_WORK(mor_attention_halves_whole_alone, AttentionParams, (BLOCK, 2), attend_tiles<true, true>)
#endif

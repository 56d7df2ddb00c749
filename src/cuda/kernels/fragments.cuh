// What the products by tensor cores have in common: weights into the fragments of a warp's multiplication,
// activations beside them, and the multiplication. A lane (g, t) has rows g and g + 8
// of a tile and the eight columns of part t of a group.
#pragma once
#include "ready.cuh"

#ifdef MOR_TENSOR_CORES
// Fragments of two steps of sixteen columns, and by what their products are multiplied.
struct Fragments {
    u32 a[2][4];
    float scales[2][2], mins[2];
};

// `g`: the group's number in its block.
template <u32 TYPE>
__device__ __forceinline__ Fragments unpack(const u32 words[2 * field_words(TYPE)], u32 g) {
    Fragments f;
    for (u32 upper = 0; upper < 2; upper++) {
        const u32* from = words + upper * field_words(TYPE);
        if constexpr (block_columns(TYPE) == 1) {
            u32 w[4];
            for (u32 i = 0; i < 4; i++)
                w[i] = TYPE == F16 ? from[i]
                                   : pair_of_halves(__uint_as_float(from[i] << 16),
                                                    __uint_as_float(from[i] & 0xffff0000u));
            f.a[0][upper] = w[0];
            f.a[0][2 + upper] = w[1];
            f.a[1][upper] = w[2];
            f.a[1][2 + upper] = w[3];
        } else {
            Fields<TYPE> fields;
            for (u32 i = 0; i < field_words(TYPE); i++) fields.words[i] = from[i];
            const Codes w = codes<TYPE>(fields, g, lane_index() % 4);
            u32 halves[2];
            bytes_to_halves<code_offset(TYPE)>(w.low, halves);
            f.a[0][upper] = halves[0];
            f.a[0][2 + upper] = halves[1];
            bytes_to_halves<code_offset(TYPE)>(w.high, halves);
            f.a[1][upper] = halves[0];
            f.a[1][2 + upper] = halves[1];
            f.scales[0][upper] = w.low_scale;
            f.scales[1][upper] = w.high_scale;
            f.mins[upper] = w.min;
        }
    }
    return f;
}

// The lane's part of a row of activations for a group: as `Unit` (ring.cuh) and `codes` order the columns.
template <u32 TYPE>
__device__ __forceinline__ void read_activations(const u16* group, u32 b[2][2]) {
    const u32 t = lane_index() % 4;
    if constexpr (block_columns(TYPE) == 1) {
        const uint4 bits = *reinterpret_cast<const uint4*>(group + 8 * t);
        b[0][0] = bits.x, b[0][1] = bits.y, b[1][0] = bits.z, b[1][1] = bits.w;
        return;
    }
    for (u32 step = 0; step < 2; step++) {
        const uint2 bits = *reinterpret_cast<const uint2*>(group + 4 * t + 16 * step);
        b[step][0] = bits.x, b[step][1] = bits.y;
    }
}

// Whether the two steps of a group have scales of their own.
__device__ constexpr bool has_two_scales(u32 type) { return type == Q6_K; }

// Adds products of a group, or of its step `step`, to `sums` as its weights are scaled, 16 × 8; `x0` and `x1` are the
// group's sums of the activations of the lane's two columns.
template <u32 TYPE>
__device__ __forceinline__ void add_scaled(const Fragments& f, u32 step, const float products[4], float x0, float x1,
                                           float sums[4]) {
    for (u32 i = 0; i < 4; i++) {
        sums[i] = fmaf(products[i], f.scales[step][i / 2], sums[i]);
        if constexpr (has_min(TYPE)) sums[i] = fmaf(-f.mins[i / 2], i % 2 ? x1 : x0, sums[i]);
    }
}

// Adds a group's products to `sums`, 16 × 8.
template <u32 TYPE>
__device__ __forceinline__ void add_products(const Fragments& f, const u32 b[2][2], float x0, float x1,
                                             float sums[4]) {
    if constexpr (block_columns(TYPE) == 1) {
        multiply_add(sums, f.a[0], b[0]);
        multiply_add(sums, f.a[1], b[1]);
    } else if constexpr (has_two_scales(TYPE)) {
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        multiply_add(low, f.a[0], b[0]);
        multiply_add(high, f.a[1], b[1]);
        add_scaled<TYPE>(f, 0, low, x0, x1, sums);
        add_scaled<TYPE>(f, 1, high, x0, x1, sums);
    } else {
        float both[4] = {0, 0, 0, 0};
        multiply_add(both, f.a[0], b[0]);
        multiply_add(both, f.a[1], b[1]);
        add_scaled<TYPE>(f, 0, both, x0, x1, sums);
    }
}

// For all types that tensor cores take: KERNELS(type, its name).
#define MOR_EVERY_TYPE(KERNELS)                                                                         \
    KERNELS(F16, f16) KERNELS(BF16, bf16) KERNELS(Q8_0, q8_0) KERNELS(Q4_0, q4_0) KERNELS(Q4_1, q4_1) \
    KERNELS(Q5_0, q5_0) KERNELS(Q5_1, q5_1) KERNELS(Q4_K, q4_k) KERNELS(Q5_K, q5_k) KERNELS(Q6_K, q6_k)
#endif

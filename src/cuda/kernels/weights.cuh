// Weights as they lie in memory: the block formats in tiles of sixteen rows (src/quant/tiles.rs), halves in such tiles
// too where they were copied to the device (src/cuda/weights.rs), else row by row. Everything is taken in groups of 32
// columns, of which a lane with part t (0 to 3) takes columns 4t to 4t + 3 and 16 + 4t to 16 + 4t + 3; of halves for
// tensor cores 8t to 8t + 7, which lie together.
#pragma once
#include "device.cuh"

// The numbers that GGUF gives the types.
enum Type : u32 {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
    Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30
};

constexpr u32 TILE_ROWS = 16;
constexpr u32 GROUP = 32;

// Eight weights as bytes of which `offset` is to be taken away: (byte - offset) · scale - min.
struct Codes {
    u32 low, high;
    float low_scale, high_scale, min;
};

__device__ constexpr u32 block_columns(u32 type) {
    return type == Q4_K || type == Q5_K || type == Q6_K ? 256 : type == F32 || type == F16 || type == BF16 ? 1 : 32;
}

// Groups of a block; one of plain types.
__device__ constexpr u32 groups_of_block(u32 type) {
    return block_columns(type) == 1 ? 1 : block_columns(type) / GROUP;
}

__device__ constexpr u32 block_bytes(u32 type) {
    return type == F32 ? 4 : type == F16 || type == BF16 ? 2 : type == Q8_0 ? 34 : type == Q4_0 ? 18
         : type == Q4_1 ? 20 : type == Q5_0 ? 22 : type == Q5_1 ? 24 : type == Q4_K ? 144
         : type == Q5_K ? 176 : 210;
}

__device__ constexpr u32 code_offset(u32 type) {
    return type == Q8_0 ? 128 : type == Q4_0 ? 8 : type == Q5_0 ? 16 : type == Q6_K ? 32 : 0;
}

// Whether weights have a minimum, so that the sum of the activations counts too.
__device__ constexpr bool has_min(u32 type) {
    return type == Q4_1 || type == Q5_1 || type == Q4_K || type == Q5_K;
}

// The field of four bytes that begins `at` bytes into the block of row `row`.
__device__ __forceinline__ u32 field(const u8* tile, u32 at, u32 row) {
    return *reinterpret_cast<const u32*>(tile + TILE_ROWS * at + 4 * row);
}

// The same of two bytes.
__device__ __forceinline__ u32 half_field(const u8* tile, u32 at, u32 row) {
    return *reinterpret_cast<const u16*>(tile + TILE_ROWS * at + 2 * row);
}

// Words that `Fields` take of each type.
__device__ constexpr u32 field_words(u32 type) {
    return type == Q4_0 || type == Q4_1                      ? 2
           : type == Q8_0 || type == Q5_0 || type == Q5_1 ? 3
           : type == F16 || type == BF16                  ? 4
           : type == Q5_K                                 ? 8
                                                          : 6;
}

// What a lane reads of a part of a row's group, as it lies in memory.
template <u32 TYPE>
struct Fields {
    u32 words[field_words(TYPE)];
};

// Part `t` of a group of row `row`: `block` begins the tile's block, of whose groups it is number `g`.
template <u32 TYPE>
__device__ __forceinline__ Fields<TYPE> read_fields(const u8* block, u32 g, u32 row, u32 t) {
    Fields<TYPE> f;
    // The scale, and the minimum's above it.
    u32 scale = half_field(block, TYPE == Q6_K ? 208 : 0, row);
    if constexpr (has_min(TYPE)) scale |= half_field(block, 2, row) << 16;
    f.words[0] = scale;
    if constexpr (TYPE == Q8_0) {
        f.words[1] = field(block, 2 + 4 * t, row);
        f.words[2] = field(block, 18 + 4 * t, row);
    } else if constexpr (TYPE == Q4_0 || TYPE == Q4_1) {
        f.words[1] = field(block, (TYPE == Q4_0 ? 2 : 4) + 4 * t, row);
    } else if constexpr (TYPE == Q5_0 || TYPE == Q5_1) {
        constexpr u32 fifth_bits = TYPE == Q5_0 ? 2 : 4;
        f.words[1] = field(block, fifth_bits + 4 + 4 * t, row);
        f.words[2] = field(block, fifth_bits, row);
    } else if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        const u32 nibbles = (TYPE == Q4_K ? 16 : 48) + 32 * (g / 2) + 4 * t;
        for (u32 i = 0; i < 3; i++) f.words[1 + i] = field(block, 4 + 4 * i, row);
        f.words[4] = field(block, nibbles, row);
        f.words[5] = field(block, nibbles + 16, row);
        if constexpr (TYPE == Q5_K) {
            f.words[6] = field(block, 16 + 4 * t, row);
            f.words[7] = field(block, 32 + 4 * t, row);
        }
    } else if constexpr (TYPE == Q6_K) {
        const u32 half = g / 4;
        const u32 low = 64 * half + 32 * (g % 2) + 4 * t, high = 128 + 32 * half + 4 * t;
        f.words[1] = field(block, low, row);
        f.words[2] = field(block, low + 16, row);
        f.words[3] = field(block, high, row);
        f.words[4] = field(block, high + 16, row);
        f.words[5] = field(block, 192 + g / 2 * 4, row);
    }
    return f;
}

// Bit i of four in the lowest place of byte i, times 16: the fifth bits.
__device__ __forceinline__ u32 spread_fifth_bits(u32 bits) {
    return (bits & 1) << 4 | (bits & 2) << 11 | (bits & 4) << 18 | (bits & 8) << 25;
}

// The 6-bit scale and minimum of group `g` of a K block (src/quant/k.rs) out of its twelve bytes.
__device__ __forceinline__ void scale_and_min(const u32 s[3], u32 g, float* scale, float* min) {
    u32 shift = 8 * (g % 4);
    u32 a = s[0] >> shift & 255, b = s[1] >> shift & 255, c = s[2] >> shift & 255;
    if (g < 4) {
        *scale = static_cast<float>(a & 63);
        *min = static_cast<float>(b & 63);
    } else {
        *scale = static_cast<float>((c & 15) | (a >> 6 << 4));
        *min = static_cast<float>(c >> 4 | (b >> 6 << 4));
    }
}

// The same of what was read; `g` is the group's number in its block.
template <u32 TYPE>
__device__ __forceinline__ Codes codes(const Fields<TYPE>& f, u32 g, u32 t) {
    Codes w;
    w.min = 0;
    const float d = half_to_float(static_cast<u16>(f.words[0]));
    const float min = half_to_float(static_cast<u16>(f.words[0] >> 16));
    w.low_scale = w.high_scale = d;
    if constexpr (TYPE == Q8_0) {
        w.low = f.words[1] ^ 0x80808080u;
        w.high = f.words[2] ^ 0x80808080u;
    } else if constexpr (TYPE == Q4_0 || TYPE == Q4_1 || TYPE == Q5_0 || TYPE == Q5_1) {
        w.low = f.words[1] & 0x0f0f0f0fu;
        w.high = f.words[1] >> 4 & 0x0f0f0f0fu;
        if constexpr (TYPE == Q5_0 || TYPE == Q5_1) {
            u32 h = f.words[2] >> (4 * t);
            w.low |= spread_fifth_bits(h);
            w.high |= spread_fifth_bits(h >> 16);
        }
        if constexpr (has_min(TYPE)) w.min = -min;
    } else if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        const u32 shift = 4 * (g % 2);
        w.low = f.words[4] >> shift & 0x0f0f0f0fu;
        w.high = f.words[5] >> shift & 0x0f0f0f0fu;
        if constexpr (TYPE == Q5_K) {
            w.low |= (f.words[6] >> g & 0x01010101u) << 4;
            w.high |= (f.words[7] >> g & 0x01010101u) << 4;
        }
        float scale, group_min;
        scale_and_min(f.words + 1, g, &scale, &group_min);
        w.low_scale = w.high_scale = d * scale;
        w.min = min * group_min;
    } else if constexpr (TYPE == Q6_K) {
        const u32 r = g % 4, shift = 4 * (r / 2);
        w.low = (f.words[1] >> shift & 0x0f0f0f0fu) | (f.words[3] >> (2 * r) & 0x03030303u) << 4;
        w.high = (f.words[2] >> shift & 0x0f0f0f0fu) | (f.words[4] >> (2 * r) & 0x03030303u) << 4;
        const u32 scales = f.words[5] >> (16 * (g % 2));
        w.low_scale = d * static_cast<float>(static_cast<signed char>(scales & 255));
        w.high_scale = d * static_cast<float>(static_cast<signed char>(scales >> 8 & 255));
    }
    return w;
}

// Where the columns of a part stand in the row.
__device__ __forceinline__ u32 column_of(u32 group, u32 t, u32 i) {
    return GROUP * group + (i < 4 ? 4 * t + i : 12 + 4 * t + i);
}

// Number `i` of weights of a plain type.
template <u32 TYPE>
__device__ __forceinline__ float plain_weight(const u8* data, u32 i) {
    if constexpr (TYPE == F32) return reinterpret_cast<const float*>(data)[i];
    u16 bits = reinterpret_cast<const u16*>(data)[i];
    return TYPE == F16 ? half_to_float(bits) : bfloat_to_float(bits);
}

// A matrix as kernels see it. Rows of block formats are filled up to whole tiles.
struct Matrix {
    const u8* data;
    // [rows], or null.
    const float* bias;
    float* out;
    u32 type;
    u32 rows;
    u32 columns;
    u32 row_bytes;
    // Of plain types: bytes from a row to the next of its tile, and from a group of a row to its next. A tile has the bytes
    // of sixteen rows.
    u32 row_step;
    u32 group_step;
    // Elements from one row of `out` to the next.
    u32 out_stride;
    // Whether results are added to what is there, and whether a row of `out` is a row's slot, not its
    // place among those that run.
    u32 add;
    u32 by_slot;
    u32 unused;
};

// Where a row of a plain type begins.
__device__ __forceinline__ const u8* plain_row(const Matrix& m, u32 row) {
    return m.data + static_cast<u64>(row / TILE_ROWS) * TILE_ROWS * m.row_bytes +
           static_cast<u64>(row % TILE_ROWS) * m.row_step;
}

// The eight weights of a part, whatever the type; 0 outside the matrix.
template <u32 TYPE>
__device__ __forceinline__ void decode(const Matrix& m, u32 row, u32 group, u32 t, float out[8]) {
    if constexpr (block_columns(TYPE) == 1) {
        const u8* data = plain_row(m, row) + static_cast<u64>(group) * m.group_step;
        for (u32 i = 0; i < 8; i++) {
            const bool inside = row < m.rows && column_of(group, t, i) < m.columns;
            out[i] = inside ? plain_weight<TYPE>(data, column_of(0, t, i)) : 0;
        }
    } else {
        const u8* tile = m.data + static_cast<u64>(row / TILE_ROWS) * TILE_ROWS * m.row_bytes;
        constexpr u32 groups = block_columns(TYPE) / GROUP;
        const u8* block = tile + static_cast<u64>(group / groups) * (TILE_ROWS * block_bytes(TYPE));
        const Codes w = codes<TYPE>(read_fields<TYPE>(block, group % groups, row % TILE_ROWS, t), group % groups, t);
        constexpr float offset = static_cast<float>(code_offset(TYPE));
        for (u32 i = 0; i < 4; i++) {
            out[i] = (static_cast<float>(w.low >> (8 * i) & 255) - offset) * w.low_scale - w.min;
            out[4 + i] = (static_cast<float>(w.high >> (8 * i) & 255) - offset) * w.high_scale - w.min;
        }
    }
}

// Calls CALL(type) with the type as a constant.
#define MOR_FOR_TYPE(type, CALL) \
    switch (type) {              \
        case F32: CALL(F32); break;   \
        case F16: CALL(F16); break;   \
        case BF16: CALL(BF16); break; \
        case Q8_0: CALL(Q8_0); break; \
        case Q4_0: CALL(Q4_0); break; \
        case Q4_1: CALL(Q4_1); break; \
        case Q5_0: CALL(Q5_0); break; \
        case Q5_1: CALL(Q5_1); break; \
        case Q4_K: CALL(Q4_K); break; \
        case Q5_K: CALL(Q5_K); break; \
        case Q6_K: CALL(Q6_K); break; \
    }

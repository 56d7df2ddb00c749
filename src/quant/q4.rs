//! Q4_0 and Q4_1: 32 weights of 4 bits. Byte j holds weight j below and weight j + 16 above.
//!
//! ```text
//! Q4_0, 18 bytes                               Q4_1, 20 bytes
//! 0  d      f16  scale                         0  d      f16  scale
//! 2  q[16]  u8   weight = d * (nibble - 8)     2  m      f16  minimum
//!                                              4  q[16]  u8   weight = d * nibble + m
//! ```

use super::{half_at, inverse, put_half};

pub(super) fn decode_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for j in 0..16 {
        let q = block[2 + j];
        out[j] = f32::from((q & 15) as i8 - 8) * d;
        out[16 + j] = f32::from((q >> 4) as i8 - 8) * d;
    }
}

pub(super) fn decode_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let m = half_at(block, 2);
    for j in 0..16 {
        let q = block[4 + j];
        out[j] = f32::from(q & 15) * d + m;
        out[16 + j] = f32::from(q >> 4) * d + m;
    }
}

/// The weight of largest magnitude (the first of equals) becomes -8 exactly, so the scale takes the
/// opposite sign; +8 does not exist and becomes +7.
pub(super) fn encode_0(row: &[f32; 32], block: &mut [u8; 18]) -> bool {
    let (mut largest, mut signed) = (0.0f32, 0.0f32);
    for &v in row {
        if v.abs() > largest {
            (largest, signed) = (v.abs(), v);
        }
    }
    let d = signed / -8.0;
    let inverse = inverse(d);
    // Product and sum are rounded each, as the reference is written. A C compiler that fuses them
    // gets another nibble for the rare quotient that lies within rounding of a tie.
    let nibble = |v: f32| (v * inverse + 8.5).clamp(0.0, 15.0) as u8;
    for j in 0..16 {
        block[2 + j] = nibble(row[j]) | nibble(row[16 + j]) << 4;
    }
    put_half(block, 0, d)
}

/// The smallest weight becomes 0, the largest 15.
pub(super) fn encode_1(row: &[f32; 32], block: &mut [u8; 20]) -> bool {
    let (mut low, mut high) = (f32::MAX, f32::MIN);
    for &v in row {
        if v < low {
            low = v;
        }
        if v > high {
            high = v;
        }
    }
    let d = (high - low) / 15.0;
    let inverse = inverse(d);
    let nibble = |v: f32| ((v - low) * inverse + 0.5).clamp(0.0, 15.0) as u8;
    for j in 0..16 {
        block[4 + j] = nibble(row[j]) | nibble(row[16 + j]) << 4;
    }
    put_half(block, 0, d) & put_half(block, 2, low)
}

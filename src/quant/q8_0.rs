//! Q8_0: 32 weights in 34 bytes.
//!
//! ```text
//! 0  d      f16     scale
//! 2  q[32]  i8      weight j = d * q[j]
//! ```

use super::{half_at, inverse, put_half};

pub(super) fn decode(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for j in 0..32 {
        out[j] = f32::from(block[2 + j] as i8) * d;
    }
}

/// The largest magnitude becomes ±127. The quotient is taken with the scale before it is rounded to
/// half precision, and rounded half away from zero.
pub(super) fn encode(row: &[f32; 32], block: &mut [u8; 34]) -> bool {
    let largest = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let inverse = inverse(d);
    for j in 0..32 {
        block[2 + j] = (row[j] * inverse).round() as i8 as u8;
    }
    put_half(block, 0, d)
}

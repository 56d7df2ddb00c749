//! The K formats: 256 weights in groups whose scales are themselves quantized.
//!
//! ```text
//! Q4_K, 144 bytes           Q5_K, 176 bytes             Q6_K, 210 bytes
//! 0   d       f16           0   d       f16             0    low[128]  u8   low four bits
//! 2   dmin    f16           2   dmin    f16             128  high[64]  u8   two high bits
//! 4   s[12]   6-bit pairs   4   s[12]   6-bit pairs     192  s[16]     i8   scale of 16 weights
//! 16  q[128]  nibbles       16  h[32]   fifth bits      208  d         f16
//!                           48  q[128]  nibbles
//! ```
//! Q4_K and Q5_K: eight groups of 32; weight = (d * scale) * n - dmin * min. The nibbles of groups
//! 2g and 2g + 1 share 32 bytes; bit g of `h[l]` is the fifth bit of weight l of group g.
//! Q6_K: weight = (d * scale) * (n - 32).

use super::half_at;

/// The 6-bit scale and minimum of group `g` (0 to 7). The first four groups have whole bytes, whose
/// two upper bits hold the upper bits of the last four.
#[inline(always)]
fn scale_and_min<const N: usize>(block: &[u8; N], g: usize) -> (f32, f32) {
    let s = |i: usize| block[4 + i];
    let (scale, min) = if g < 4 {
        (s(g) & 63, s(g + 4) & 63)
    } else {
        (
            s(g + 4) & 15 | s(g - 4) >> 6 << 4,
            s(g + 4) >> 4 | s(g) >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

pub(super) fn decode_q4(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for g in 0..8 {
        let (scale, min) = scale_and_min(block, g);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (g % 2);
        for l in 0..32 {
            let n = block[16 + 32 * (g / 2) + l] >> shift & 15;
            out[32 * g + l] = scale * f32::from(n) - min;
        }
    }
}

pub(super) fn decode_q5(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for g in 0..8 {
        let (scale, min) = scale_and_min(block, g);
        let (scale, min) = (d * scale, dmin * min);
        let shift = 4 * (g % 2);
        for l in 0..32 {
            let fifth = block[16 + l] >> g & 1;
            let n = block[48 + 32 * (g / 2) + l] >> shift & 15 | fifth << 4;
            out[32 * g + l] = scale * f32::from(n) - min;
        }
    }
}

/// Each half of 128 weights is four runs of 32: runs 0 and 1 are the lower nibbles of 64 bytes, runs
/// 2 and 3 the upper ones; run r takes bits 2r and 2r + 1 of 32 high bytes.
pub(super) fn decode_q6(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for run in 0..8 {
        let (half, r) = (run / 4, run % 4);
        let (low_at, high_at) = (64 * half + 32 * (r % 2), 128 + 32 * half);
        let shift = 4 * (r / 2);
        for part in 0..2 {
            let scale = d * f32::from(block[192 + 2 * run + part] as i8);
            for l in 16 * part..16 * part + 16 {
                let low = block[low_at + l] >> shift & 15;
                let high = block[high_at + l] >> (2 * r) & 3;
                out[32 * run + l] = scale * f32::from((low | high << 4) as i8 - 32);
            }
        }
    }
}

//! Q5_0 and Q5_1: 32 weights of 5 bits. The low four bits lie as in Q4; bit j of `h` is the fifth
//! bit of weight j.
//!
//! ```text
//! Q5_0, 22 bytes                              Q5_1, 24 bytes
//! 0  d      f16  scale                        0  d      f16  scale
//! 2  h      u32  fifth bits                   2  m      f16  minimum
//! 6  q[16]  u8   weight = d * (n - 16)        4  h      u32  fifth bits
//!                                             8  q[16]  u8   weight = d * n + m
//! ```

use super::half_at;

/// The 5-bit numbers j and j + 16 of a block.
#[inline(always)]
fn pair(h: u32, q: u8, j: usize) -> (u8, u8) {
    let low = (h >> j & 1) as u8;
    let high = (h >> (j + 16) & 1) as u8;
    (q & 15 | low << 4, q >> 4 | high << 4)
}

pub(super) fn decode_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let h = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for j in 0..16 {
        let (a, b) = pair(h, block[6 + j], j);
        out[j] = f32::from(a as i8 - 16) * d;
        out[16 + j] = f32::from(b as i8 - 16) * d;
    }
}

pub(super) fn decode_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let m = half_at(block, 2);
    let h = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for j in 0..16 {
        let (a, b) = pair(h, block[8 + j], j);
        out[j] = f32::from(a) * d + m;
        out[16 + j] = f32::from(b) * d + m;
    }
}

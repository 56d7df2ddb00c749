//! F32, F16 and BF16: one weight is one block.

use super::TooLarge;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Weights converted at once: `half` uses the CPU's own conversion on slices, which pays only when
/// its detection is not repeated for every weight.
const LANE: usize = 64;

pub(super) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *o = f32::from_le_bytes(*b);
    }
}

pub(super) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut lane = [f16::ZERO; LANE];
    for (bytes, out) in bytes.chunks(2 * LANE).zip(out.chunks_mut(LANE)) {
        for (b, h) in bytes.as_chunks::<2>().0.iter().zip(&mut lane) {
            *h = f16::from_le_bytes(*b);
        }
        let n = out.len().min(bytes.len() / 2);
        lane[..n].convert_to_f32_slice(&mut out[..n]);
    }
}

pub(super) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    }
}

pub(super) fn encode_f32(row: &[f32], out: &mut [u8]) -> Result<(), TooLarge> {
    for (v, b) in row.iter().zip(out.as_chunks_mut::<4>().0) {
        *b = v.to_le_bytes();
    }
    Ok(())
}

/// Round to nearest, ties to even.
pub(super) fn encode_f16(row: &[f32], out: &mut [u8]) -> Result<(), TooLarge> {
    for (column, (v, b)) in row.iter().zip(out.as_chunks_mut::<2>().0).enumerate() {
        let stored = f16::from_f32(*v);
        if stored.is_infinite() {
            return Err(TooLarge { column });
        }
        *b = stored.to_le_bytes();
    }
    Ok(())
}

/// Round to nearest, ties to even.
pub(super) fn encode_bf16(row: &[f32], out: &mut [u8]) -> Result<(), TooLarge> {
    for (column, (v, b)) in row.iter().zip(out.as_chunks_mut::<2>().0).enumerate() {
        let stored = bf16::from_f32(*v);
        if stored.is_infinite() {
            return Err(TooLarge { column });
        }
        *b = stored.to_le_bytes();
    }
    Ok(())
}

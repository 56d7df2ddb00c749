//! Block formats: how a row of weights is stored in few bits.
//!
//! A row is cut into blocks of [`TensorType::block_len`] weights; each block carries its own scale.
//! The code here is the plain, portable meaning of every format. The scalar engine runs on it, and
//! every faster kernel is tested against it.
//!
//! Decoding takes any bytes: a block is never "wrong", at worst its scale is NaN. Encoding is as
//! ggml's reference encoders do it, bit for bit, so that files made here equal files made there.

mod float;
mod k;
mod q4;
mod q5;
mod q8_0;
#[cfg(test)]
mod tests;
pub(crate) mod tiles;
mod types;

pub use types::TensorType;
pub(crate) use types::ggml_type_name;

use crate::{Error, Result};

/// Decodes one row: `bytes` must be exactly [`TensorType::row_bytes`] of `out.len()`.
///
/// # Errors
/// [`Error::InvalidArgument`] when the two lengths do not belong together.
pub fn dequantize_row(ty: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    check_lengths(ty, out.len(), bytes.len())?;
    dequantize_into(ty, bytes, out);
    Ok(())
}

/// As [`dequantize_row`], for callers that have checked the lengths once for all rows of a tensor.
/// Lengths that do not match leave the rest of `out` as it was; they never read out of bounds.
pub(crate) fn dequantize_into(ty: TensorType, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(ty.row_bytes(out.len()), Some(bytes.len()));
    match ty {
        TensorType::F32 => float::decode_f32(bytes, out),
        TensorType::F16 => float::decode_f16(bytes, out),
        TensorType::BF16 => float::decode_bf16(bytes, out),
        TensorType::Q8_0 => decode_blocks(bytes, out, q8_0::decode),
        TensorType::Q4_0 => decode_blocks(bytes, out, q4::decode_0),
        TensorType::Q4_1 => decode_blocks(bytes, out, q4::decode_1),
        TensorType::Q5_0 => decode_blocks(bytes, out, q5::decode_0),
        TensorType::Q5_1 => decode_blocks(bytes, out, q5::decode_1),
        TensorType::Q4_K => decode_blocks(bytes, out, k::decode_q4),
        TensorType::Q5_K => decode_blocks(bytes, out, k::decode_q5),
        TensorType::Q6_K => decode_blocks(bytes, out, k::decode_q6),
    }
}

/// Encodes one row: `out` must be exactly [`TensorType::row_bytes`] of `row.len()`.
///
/// # Errors
/// [`Error::InvalidArgument`] when the lengths do not belong together, when a weight is not finite
/// or too large for the format (the sentence names the column), or when the type has no encoder
/// here ([`TensorType::can_encode`]). `out` then holds nothing of use.
pub fn quantize_row(ty: TensorType, row: &[f32], out: &mut [u8]) -> Result<()> {
    check_lengths(ty, row.len(), out.len())?;
    if let Some(column) = row.iter().position(|v| !v.is_finite()) {
        return Err(Error::argument(format_args!(
            "column {column} holds {}, which {} cannot store; the weights are damaged",
            row[column],
            ty.name()
        )));
    }
    let stored = match ty {
        TensorType::F32 => float::encode_f32(row, out),
        TensorType::F16 => float::encode_f16(row, out),
        TensorType::BF16 => float::encode_bf16(row, out),
        TensorType::Q8_0 => encode_blocks(row, out, q8_0::encode),
        TensorType::Q4_0 => encode_blocks(row, out, q4::encode_0),
        TensorType::Q4_1 => encode_blocks(row, out, q4::encode_1),
        _ => {
            return Err(Error::argument(format_args!(
                "{} can be read but not written; choose F32, F16, BF16, Q8_0, Q4_0 or Q4_1",
                ty.name()
            )));
        }
    };
    stored.map_err(|TooLarge { column }| {
        Error::argument(format_args!(
            "the weights from column {column} on (the first is {}) are too large for {}; choose {}",
            row[column],
            ty.name(),
            if ty == TensorType::BF16 {
                "F32"
            } else {
                "BF16 or F32"
            }
        ))
    })
}

/// A weight, or the scale of its block, is finite but would be stored as infinity.
struct TooLarge {
    /// The weight, or the first weight of the block.
    column: usize,
}

fn check_lengths(ty: TensorType, columns: usize, bytes: usize) -> Result<()> {
    match ty.row_bytes(columns) {
        Some(n) if n == bytes => Ok(()),
        Some(n) => Err(Error::argument(format_args!(
            "a {} row of {columns} weights takes {n} bytes, but the buffer has {bytes}",
            ty.name()
        ))),
        None => Err(Error::argument(format_args!(
            "a {} row must be a multiple of {} weights long, but has {columns}",
            ty.name(),
            ty.block_len()
        ))),
    }
}

/// Decodes block after block. Both lengths are constants of the block functions, so that their
/// loops have no bounds checks and vectorise.
#[inline(always)]
fn decode_blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let blocks = bytes.as_chunks::<BYTES>().0;
    for (block, out) in blocks.iter().zip(out.as_chunks_mut::<LEN>().0) {
        decode(block, out);
    }
}

/// Encodes block after block; `encode` says whether the block's scale could be stored.
fn encode_blocks<const BYTES: usize, const LEN: usize>(
    row: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; LEN], &mut [u8; BYTES]) -> bool,
) -> std::result::Result<(), TooLarge> {
    let blocks = row.as_chunks::<LEN>().0;
    for (i, (row, block)) in blocks
        .iter()
        .zip(out.as_chunks_mut::<BYTES>().0)
        .enumerate()
    {
        if !encode(row, block) {
            return Err(TooLarge { column: i * LEN });
        }
    }
    Ok(())
}

/// The half-precision number at byte `at` of a block.
#[inline(always)]
fn half_at<const N: usize>(block: &[u8; N], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Stores `v` at byte `at` of a block; `false` when it is too large for half precision.
fn put_half<const N: usize>(block: &mut [u8; N], at: usize, v: f32) -> bool {
    let stored = half::f16::from_f32(v);
    block[at..at + 2].copy_from_slice(&stored.to_le_bytes());
    stored.is_finite()
}

/// `1 / d`, and 0 for the scale of a block of zeros.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

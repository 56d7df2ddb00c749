//! The block formats against vectors that another implementation made (tools/golden/quant.py), and
//! the encoders against the error that their formats permit.

mod common;

use common::Random;
use mor::quant::{TensorType, dequantize_row, quantize_row};

fn golden(name: &str) -> Vec<u8> {
    common::data(&format!("quant/{name}"))
}

fn golden_f32(name: &str) -> Vec<f32> {
    golden(name)
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

#[test]
fn decoding_equals_ggml_to_the_bit() {
    for ty in TensorType::ALL
        .into_iter()
        .filter(|&ty| ty != TensorType::F32)
    {
        let bytes = golden(&format!("{ty}.bytes"));
        let wanted = golden_f32(&format!("{ty}.f32"));
        let mut out = vec![0.0; wanted.len()];
        dequantize_row(ty, &bytes, &mut out).unwrap();
        for (i, (a, b)) in out.iter().zip(&wanted).enumerate() {
            assert_eq!(a.to_bits(), b.to_bits(), "{ty} weight {i}: {a} is not {b}");
        }
    }
}

#[test]
fn encoding_equals_ggml_to_the_bit() {
    let row = golden_f32("encode.f32");
    for ty in [
        TensorType::F16,
        TensorType::BF16,
        TensorType::Q8_0,
        TensorType::Q4_0,
        TensorType::Q4_1,
    ] {
        let wanted = golden(&format!("encode.{ty}.bytes"));
        let mut out = vec![0; wanted.len()];
        quantize_row(ty, &row, &mut out).unwrap();
        for (i, (a, b)) in out
            .chunks(ty.block_bytes())
            .zip(wanted.chunks(ty.block_bytes()))
            .enumerate()
        {
            assert_eq!(a, b, "{ty} block {i}");
        }
    }
}

/// The largest error of a block of weights, as the format permits it. A half has 11 bits, so
/// storing a scale d moves it by at most d * 2^-11, or 2^-25 where it is subnormal; that error is
/// multiplied by the largest integer of the block. `slack` covers the few roundings in f32.
fn bound(ty: TensorType, block: &[f32]) -> f32 {
    let half_error = |d: f32| (d.abs() / 2048.0).max(1.0 / (1 << 25) as f32);
    let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let low = block.iter().copied().fold(f32::MAX, f32::min);
    let high = block.iter().copied().fold(f32::MIN, f32::max);
    let slack = largest * 1e-6;
    slack
        + match ty {
            TensorType::F32 => 0.0,
            TensorType::F16 => half_error(largest),
            // Eight bits of precision: half a unit in the last place is 2^-9 of a power of two.
            TensorType::BF16 => largest / 256.0,
            // Half a step, and up to 127 steps of a moved scale.
            TensorType::Q8_0 => largest / 127.0 / 2.0 + 127.0 * half_error(largest / 127.0),
            // A whole step: the end opposite to the largest weight is cut from 8 steps to 7.
            TensorType::Q4_0 => largest / 8.0 + 8.0 * half_error(largest / 8.0),
            // Half a step, up to 15 steps of a moved scale, and a moved minimum.
            TensorType::Q4_1 => {
                let d = (high - low) / 15.0;
                d / 2.0 + 15.0 * half_error(d) + half_error(low)
            }
            _ => unreachable!("no encoder"),
        }
}

#[test]
fn encoding_then_decoding_stays_within_the_format() {
    let mut random = Random(7);
    for ty in TensorType::ALL.into_iter().filter(|ty| ty.can_encode()) {
        for round in 0..2000 {
            let magnitude = f32::exp2((round % 30) as f32 - 18.0);
            let shift = if round % 3 == 0 {
                magnitude * random.unit()
            } else {
                0.0
            };
            let row: Vec<f32> = (0..64).map(|_| random.unit() * magnitude + shift).collect();
            let mut bytes = vec![0; ty.row_bytes(64).unwrap()];
            let mut back = vec![0.0; 64];
            quantize_row(ty, &row, &mut bytes).unwrap();
            dequantize_row(ty, &bytes, &mut back).unwrap();
            for (row, back) in row.chunks(32).zip(back.chunks(32)) {
                let bound = bound(ty, row);
                for (a, b) in row.iter().zip(back) {
                    assert!(
                        (a - b).abs() <= bound,
                        "{ty}: {a} came back as {b}, bound {bound}"
                    );
                }
            }
        }
    }
}

/// Every pattern of bytes decodes without a panic, whatever it means.
#[test]
fn any_bytes_decode() {
    let mut random = Random(11);
    for ty in TensorType::ALL {
        let mut out = vec![0.0; 512];
        for _ in 0..200 {
            let bytes: Vec<u8> = (0..ty.row_bytes(512).unwrap())
                .map(|_| random.next() as u8)
                .collect();
            dequantize_row(ty, &bytes, &mut out).unwrap();
        }
        let bytes = vec![0xff; ty.row_bytes(512).unwrap()];
        dequantize_row(ty, &bytes, &mut out).unwrap();
    }
}

/// Any finite row either encodes into finite weights or is refused.
#[test]
fn encoders_never_make_infinities() {
    let mut random = Random(13);
    for ty in TensorType::ALL.into_iter().filter(|ty| ty.can_encode()) {
        let mut refused = 0;
        for round in 0..3000 {
            let row: Vec<f32> = (0..32)
                .map(|_| f32::from_bits(random.next() as u32))
                .map(|v| if v.is_finite() { v } else { 0.0 })
                .map(|v| {
                    if round % 2 == 0 {
                        v
                    } else {
                        v.clamp(-60000.0, 60000.0)
                    }
                })
                .collect();
            let mut bytes = vec![0; ty.row_bytes(32).unwrap()];
            if quantize_row(ty, &row, &mut bytes).is_err() {
                refused += 1;
                continue;
            }
            let mut back = vec![0.0; 32];
            dequantize_row(ty, &bytes, &mut back).unwrap();
            assert!(back.iter().all(|v| v.is_finite()), "{ty}: {row:?}");
        }
        assert_eq!(refused > 0, ty != TensorType::F32, "{ty} refused {refused}");
        assert!(refused <= 1500, "{ty} refused small weights");
    }
}

#[test]
fn refusals_name_the_column() {
    for (value, shown) in [
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (f32::NEG_INFINITY, "-inf"),
    ] {
        for ty in TensorType::ALL.into_iter().filter(|ty| ty.can_encode()) {
            let mut row = [0.5; 64];
            row[37] = value;
            let mut out = vec![0; ty.row_bytes(64).unwrap()];
            let text = quantize_row(ty, &row, &mut out).unwrap_err().to_string();
            assert!(text.contains(&format!("column 37 holds {shown}")), "{text}");
        }
    }
    for (ty, value, column) in [
        (TensorType::F16, 65520.0, 37),
        (TensorType::BF16, f32::MAX, 37),
        (TensorType::Q8_0, 1e7, 32),
        (TensorType::Q4_0, 1e6, 32),
        (TensorType::Q4_1, 1e6, 32),
        (TensorType::Q4_1, -70000.0, 32),
    ] {
        let mut row = [0.5; 64];
        row[37] = value;
        let mut out = vec![0; ty.row_bytes(64).unwrap()];
        let text = quantize_row(ty, &row, &mut out).unwrap_err().to_string();
        assert!(text.contains(&format!("column {column} ")), "{ty}: {text}");
    }
}

#[test]
fn lengths_are_checked() {
    for ty in TensorType::ALL {
        let bytes = vec![0; ty.block_bytes()];
        let mut out = vec![0.0; ty.block_len()];
        assert!(
            dequantize_row(ty, &bytes[1..], &mut out).is_err(),
            "{ty}: too few bytes"
        );
        assert!(
            dequantize_row(ty, &bytes, &mut out[1..]).is_err(),
            "{ty}: too few weights"
        );
        dequantize_row(ty, &[], &mut []).unwrap();
        let written = quantize_row(ty, &out, &mut vec![0; ty.block_bytes()]);
        assert_eq!(written.is_ok(), ty.can_encode(), "{ty}");
        assert!(
            quantize_row(ty, &out, &mut vec![0; ty.block_bytes() + 1]).is_err(),
            "{ty}"
        );
        if ty.block_len() > 1 {
            assert_eq!(ty.row_bytes(ty.block_len() + 1), None, "{ty}");
        } else {
            assert_eq!(ty.row_bytes(usize::MAX), None, "{ty}");
        }
    }
}

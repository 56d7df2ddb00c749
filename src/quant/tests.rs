//! Blocks that were worked out by hand from the tables in the modules.

use super::*;

/// 1.0, 0.5 and 2.0 as halves, little-endian.
const ONE: [u8; 2] = [0x00, 0x3c];
const HALF: [u8; 2] = [0x00, 0x38];
const TWO: [u8; 2] = [0x00, 0x40];

fn decoded(ty: TensorType, parts: &[&[u8]]) -> Vec<f32> {
    let bytes = parts.concat();
    let mut out = vec![f32::NAN; bytes.len() / ty.block_bytes() * ty.block_len()];
    dequantize_row(ty, &bytes, &mut out).unwrap();
    out
}

#[test]
fn layouts_and_names_agree_with_the_formats() {
    for ty in TensorType::ALL {
        assert_eq!(TensorType::from_gguf(ty.gguf_id()), Some(ty));
        assert_eq!(TensorType::parse(&ty.name().to_lowercase()), Some(ty));
        assert_eq!(ggml_type_name(ty.gguf_id()), Some(ty.name()));
        assert_eq!(ty.to_string(), ty.name());
        assert_eq!(ty.row_bytes(ty.block_len()), Some(ty.block_bytes()));
        assert_eq!(ty.row_bytes(0), Some(0));
    }
    assert_eq!(TensorType::from_gguf(16), None);
    assert_eq!(ggml_type_name(16), Some("IQ2_XXS"));
    assert_eq!(ggml_type_name(u32::MAX), None);
    assert_eq!(TensorType::parse("Q4_K_M"), None);
}

#[test]
fn floats() {
    let wanted = [1.0, -0.5, 2.0];
    let f32s: Vec<u8> = wanted.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
    assert_eq!(decoded(TensorType::F32, &[&f32s]), wanted);
    assert_eq!(
        decoded(TensorType::F16, &[&ONE, &[0x00, 0xb8], &TWO]),
        wanted
    );
    assert_eq!(
        decoded(TensorType::BF16, &[&[0x80, 0x3f, 0x00, 0xbf, 0x00, 0x40]]),
        wanted
    );
    // More than one lane, and a rest.
    let many = ONE.repeat(150);
    assert_eq!(decoded(TensorType::F16, &[&many]), vec![1.0; 150]);
}

#[test]
fn floats_round_ties_to_even() {
    // One unit in the last place is 2^-10 at 1 for F16, 2^-7 for BF16; ties lie half-way.
    for (ty, ulp) in [
        (TensorType::F16, 1.0 / 1024.0),
        (TensorType::BF16, 1.0 / 128.0),
    ] {
        let row = [1.0 + 0.5 * ulp, 1.0 + 1.5 * ulp, 1.0 + 0.75 * ulp];
        let mut bytes = [0; 6];
        quantize_row(ty, &row, &mut bytes).unwrap();
        let wanted = [1.0, 1.0 + 2.0 * ulp, 1.0 + ulp];
        assert_eq!(decoded(ty, &[&bytes]), wanted, "{ty}");
    }
}

#[test]
fn q8_0_block() {
    let mut q = [0u8; 32];
    (q[0], q[1], q[31]) = (127, 0x80, 0xff);
    let out = decoded(TensorType::Q8_0, &[&HALF, &q]);
    assert_eq!((out[0], out[1], out[2], out[31]), (63.5, -64.0, 0.0, -0.5));

    let mut row = [0.0; 32];
    (row[0], row[1], row[2], row[3]) = (127.0, 2.5, -2.5, 0.49);
    let mut bytes = [0; 34];
    quantize_row(TensorType::Q8_0, &row, &mut bytes).unwrap();
    assert_eq!(bytes[..6], [0x00, 0x3c, 127, 3, 0xfd, 0]); // ties away from zero
}

#[test]
fn q4_0_block() {
    let mut q = [0x88u8; 16];
    (q[0], q[15]) = (0xf0, 0x1f);
    let out = decoded(TensorType::Q4_0, &[&TWO, &q]);
    assert_eq!((out[0], out[16]), (-16.0, 14.0));
    assert_eq!((out[15], out[31]), (14.0, -14.0));
    assert_eq!(out[1], 0.0);

    // The largest weight is 8, so the scale is -1: 8 is stored as 0, -8 would be 16 and becomes 15.
    let mut row = [0.0; 32];
    (row[0], row[16], row[1]) = (8.0, -8.0, 3.0);
    let mut bytes = [0; 18];
    quantize_row(TensorType::Q4_0, &row, &mut bytes).unwrap();
    assert_eq!(bytes[..5], [0x00, 0xbc, 0xf0, 0x85, 0x88]);
    // A block of zeros keeps ggml's negative zero as its scale.
    quantize_row(TensorType::Q4_0, &[0.0; 32], &mut bytes).unwrap();
    assert_eq!(bytes[..3], [0x00, 0x80, 0x88]);
}

#[test]
fn q4_1_block() {
    let mut q = [0u8; 16];
    (q[0], q[15]) = (0xf1, 0x2f);
    let out = decoded(TensorType::Q4_1, &[&HALF, &TWO, &q]);
    assert_eq!((out[0], out[16], out[15], out[31]), (2.5, 9.5, 9.5, 3.0));
    assert_eq!(out[1], 2.0);

    let mut row = [1.0; 32];
    (row[0], row[16], row[1]) = (16.0, 2.5, 5.0);
    let mut bytes = [0; 20];
    quantize_row(TensorType::Q4_1, &row, &mut bytes).unwrap();
    assert_eq!(bytes[..7], [0x00, 0x3c, 0x00, 0x3c, 0x2f, 0x04, 0x00]);
}

#[test]
fn q5_blocks() {
    let mut q = [0u8; 16];
    (q[0], q[15]) = (0xf1, 0x2f);
    // The fifth bits of weights 0, 15 and 31.
    let h = (1u32 | 1 << 15 | 1 << 31).to_le_bytes();
    let out = decoded(TensorType::Q5_0, &[&TWO, &h, &q]);
    assert_eq!((out[0], out[16]), (2.0, -2.0)); // 17 - 16, 15 - 16
    assert_eq!((out[15], out[31]), (30.0, 4.0)); // 31 - 16, 18 - 16
    assert_eq!(out[1], -32.0);
    let out = decoded(TensorType::Q5_1, &[&TWO, &HALF, &h, &q]);
    assert_eq!((out[0], out[16]), (34.5, 30.5));
    assert_eq!((out[15], out[31]), (62.5, 36.5));
    assert_eq!(out[1], 0.5);
}

/// Groups 0 and 1 have whole bytes; groups 4 and 5 take their two upper bits from them.
/// Scales: 33, 2 | 0b11_0101 = 53, 0b01_0001 = 17. Minima: 5, 0 | 0b10_0011 = 35, 4.
const SCALES: [u8; 12] = [
    33 | 0b11 << 6, // scale 0, upper bits of scale 4
    2 | 0b01 << 6,  // scale 1, upper bits of scale 5
    0,
    0,
    5 | 0b10 << 6, // min 0, upper bits of min 4
    0,             // min 1
    0,
    0,
    0b0101 | 0b0011 << 4, // lower bits of scale 4, min 4
    0b0001 | 4 << 4,      // of scale 5, min 5
    0,
    0,
];

#[test]
fn q4_k_block() {
    let mut q = [0u8; 128];
    q[0] = 0xa3; // groups 0 and 1
    q[64 + 31] = 0x1f; // groups 4 and 5
    let out = decoded(TensorType::Q4_K, &[&TWO, &HALF, &SCALES, &q]);
    assert_eq!(out[0], 2.0 * 33.0 * 3.0 - 0.5 * 5.0);
    assert_eq!(out[32], 2.0 * 2.0 * 10.0);
    assert_eq!(out[1], -2.5);
    assert_eq!(out[4 * 32 + 31], 2.0 * 53.0 * 15.0 - 0.5 * 35.0);
    assert_eq!(out[5 * 32 + 31], 2.0 * 17.0 - 0.5 * 4.0);
    assert_eq!(out[7 * 32], 0.0);
}

#[test]
fn q5_k_block() {
    let (mut q, mut h) = ([0u8; 128], [0u8; 32]);
    q[0] = 0xa3;
    q[64 + 31] = 0x1f;
    h[0] = 0b0000_0001; // group 0
    h[31] = 0b0010_0000; // group 5
    let out = decoded(TensorType::Q5_K, &[&TWO, &HALF, &SCALES, &h, &q]);
    assert_eq!(out[0], 2.0 * 33.0 * 19.0 - 0.5 * 5.0);
    assert_eq!(out[32], 2.0 * 2.0 * 10.0);
    assert_eq!(out[4 * 32 + 31], 2.0 * 53.0 * 15.0 - 0.5 * 35.0);
    assert_eq!(out[5 * 32 + 31], 2.0 * 17.0 * 17.0 - 0.5 * 4.0);
}

#[test]
fn q6_k_block() {
    let (mut low, mut high, mut scales) = ([0u8; 128], [0u8; 64], [0u8; 16]);
    low[0] = 0x53; // weights 0 (lower nibble) and 64 (upper)
    high[0] = 0b0010_0001; // weight 0: 1, weight 32: 0, weight 64: 2, weight 96: 0
    (scales[0], scales[4], scales[15]) = (3, 0xfe, 1);
    low[127] = 0xf0; // weights 223 and 255 of the second half
    high[63] = 0b1100_0000;
    let out = decoded(TensorType::Q6_K, &[&low, &high, &scales, &HALF]);
    assert_eq!(out[0], 1.5 * (19.0 - 32.0));
    assert_eq!(out[64], 0.5 * -2.0 * (37.0 - 32.0));
    assert_eq!(out[1], 1.5 * -32.0);
    assert_eq!(out[255], 0.5 * (63.0 - 32.0));
}

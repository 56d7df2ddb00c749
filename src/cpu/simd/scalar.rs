//! Plain Rust, lane by lane.

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Scalar;

fn map(f: impl Fn(usize) -> u32) -> [u32; LANES] {
    std::array::from_fn(f)
}

/// The sum of the products of four pairs of bytes.
fn dot_4(w: u32, x: i32, weight: impl Fn(u8) -> i32) -> i32 {
    let (w, x) = (w.to_le_bytes(), x.to_le_bytes());
    (0..4).map(|i| weight(w[i]) * i32::from(x[i] as i8)).sum()
}

// SAFETY: needs no instruction set.
unsafe impl Simd for Scalar {
    type I = [u32; LANES];
    type F = [f32; LANES];
    type Sum = [u32; LANES];
    const NARROW: i32 = 0;
    const SIGNED_BIAS: i32 = 0;

    unsafe fn splat(value: i32) -> Self::I {
        [value as u32; LANES]
    }
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        map(|i| a[i] & b[i])
    }
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        map(|i| a[i] | b[i])
    }
    unsafe fn shl<const N: i32>(a: Self::I) -> Self::I {
        map(|i| a[i] << N)
    }
    unsafe fn shr<const N: i32>(a: Self::I) -> Self::I {
        map(|i| a[i] >> N)
    }
    unsafe fn shr_by(a: Self::I, n: u32) -> Self::I {
        map(|i| a[i] >> n)
    }
    unsafe fn sign_extend_byte(a: Self::I) -> Self::I {
        map(|i| a[i] as i8 as u32)
    }
    unsafe fn start(total: Self::I) -> Self::Sum {
        total
    }
    unsafe fn dot(sum: Self::Sum, w: Self::I, x: i32) -> Self::Sum {
        map(|i| sum[i].wrapping_add(dot_4(w[i], x, i32::from) as u32))
    }
    unsafe fn dot_signed(sum: Self::Sum, w: Self::I, x: i32) -> Self::Sum {
        map(|i| sum[i].wrapping_add(dot_4(w[i], x, |w| i32::from(w as i8)) as u32))
    }
    unsafe fn finish(sum: Self::Sum, _: Self::I) -> Self::I {
        sum
    }
    unsafe fn to_float(a: Self::I) -> Self::F {
        a.map(|a| a as i32 as f32)
    }
    unsafe fn splat_float(value: f32) -> Self::F {
        [value; LANES]
    }
    unsafe fn load(floats: &[f32; LANES]) -> Self::F {
        *floats
    }
    unsafe fn load_half(halves: &[[u8; 2]; LANES]) -> Self::F {
        halves.map(|h| half::f16::from_le_bytes(h).to_f32())
    }
    unsafe fn load_bfloat(halves: &[[u8; 2]; LANES]) -> Self::F {
        halves.map(|h| f32::from_bits(u32::from(u16::from_le_bytes(h)) << 16))
    }
    unsafe fn load_bytes(bytes: &[u8; LANES]) -> Self::F {
        bytes.map(|b| f32::from(b as i8))
    }
    unsafe fn load_words(words: &[[u8; 4]; LANES]) -> Self::I {
        words.map(u32::from_le_bytes)
    }
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    unsafe fn gather_half(rows: &[*const u8; LANES], offset: usize) -> Self::F {
        rows.map(|row| {
            // SAFETY: the caller passes places of two bytes.
            let bytes = unsafe { row.add(offset).cast::<[u8; 2]>().read_unaligned() };
            half::f16::from_le_bytes(bytes).to_f32()
        })
    }
    unsafe fn gather_4(rows: &[*const u8; LANES], offset: usize) -> Self::I {
        // SAFETY: the caller passes places of four bytes.
        rows.map(|row| unsafe { row.add(offset).cast::<u32>().read_unaligned() }.to_le())
    }
    unsafe fn gather_16(rows: &[*const u8; LANES], offset: usize) -> [Self::I; 4] {
        // SAFETY: the caller passes places of sixteen bytes.
        std::array::from_fn(|k| unsafe { Self::gather_4(rows, offset + 4 * k) })
    }
    unsafe fn store(a: Self::F, out: &mut [f32; LANES]) {
        *out = a;
    }
    unsafe fn prefetch(_: *const u8) {}
}

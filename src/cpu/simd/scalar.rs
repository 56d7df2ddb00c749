//! Plain Rust, lane by lane. Nothing of it is inlined into the kernels: sixteen lanes of everything would
//! be by far the largest part of the library, for machines that are by far the rarest.

use super::{LANES, Rows, Simd};

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Scalar;

fn map(f: impl Fn(usize) -> u32) -> [u32; LANES] {
    std::array::from_fn(f)
}

// SAFETY: needs no instruction set.
unsafe impl Simd for Scalar {
    type I = [u32; LANES];
    type F = [f32; LANES];
    type Sum = [u32; LANES];
    type Vector = f32;
    const VECTOR: usize = 1;
    const PLAIN: bool = true;
    const NARROW: i32 = 0;
    const SIGNED_BIAS: i32 = 0;

    unsafe fn splat(value: i32) -> Self::I {
        [value as u32; LANES]
    }
    #[inline(never)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        map(|i| a[i] & b[i])
    }
    #[inline(never)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        map(|i| a[i] | b[i])
    }
    #[inline(never)]
    unsafe fn shl<const N: i32>(a: Self::I) -> Self::I {
        map(|i| a[i] << N)
    }
    #[inline(never)]
    unsafe fn shr<const N: i32>(a: Self::I) -> Self::I {
        map(|i| a[i] >> N)
    }
    #[inline(never)]
    unsafe fn shr_by(a: Self::I, n: u32) -> Self::I {
        map(|i| a[i] >> n)
    }
    #[inline(never)]
    unsafe fn sign_extend_byte(a: Self::I) -> Self::I {
        map(|i| a[i] as i8 as u32)
    }
    unsafe fn start(total: Self::I) -> Self::Sum {
        total
    }
    /// Never used, as the next.
    unsafe fn dot(sum: Self::Sum, _: Self::I, _: i32) -> Self::Sum {
        sum
    }
    unsafe fn dot_signed(sum: Self::Sum, _: Self::I, _: i32) -> Self::Sum {
        sum
    }
    unsafe fn finish(sum: Self::Sum, _: Self::I) -> Self::I {
        sum
    }
    #[inline(never)]
    unsafe fn to_float(a: Self::I) -> Self::F {
        a.map(|a| a as i32 as f32)
    }
    unsafe fn splat_float(value: f32) -> Self::F {
        [value; LANES]
    }
    unsafe fn load(floats: &[f32; LANES]) -> Self::F {
        *floats
    }
    #[inline(never)]
    unsafe fn load_half(halves: &[[u8; 2]; LANES]) -> Self::F {
        halves.map(|h| half::f16::from_le_bytes(h).to_f32())
    }
    #[inline(never)]
    unsafe fn load_bfloat(halves: &[[u8; 2]; LANES]) -> Self::F {
        halves.map(|h| f32::from_bits(u32::from(u16::from_le_bytes(h)) << 16))
    }
    #[inline(never)]
    unsafe fn load_bytes(bytes: &[u8; LANES]) -> Self::F {
        bytes.map(|b| f32::from(b as i8))
    }
    #[inline(never)]
    unsafe fn load_words(words: &[[u8; 4]; LANES]) -> Self::I {
        words.map(u32::from_le_bytes)
    }
    #[inline(never)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(never)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(never)]
    unsafe fn gather_half(rows: Rows, offset: usize) -> Self::F {
        std::array::from_fn(|row| {
            let place = rows.at(row.min(rows.last), offset);
            // SAFETY: the caller passes places of two bytes.
            let bytes = unsafe { place.cast::<[u8; 2]>().read_unaligned() };
            half::f16::from_le_bytes(bytes).to_f32()
        })
    }
    #[inline(never)]
    unsafe fn gather_4(rows: Rows, offset: usize) -> Self::I {
        map(|row| {
            let place = rows.at(row.min(rows.last), offset);
            // SAFETY: the caller passes places of four bytes.
            unsafe { place.cast::<u32>().read_unaligned() }.to_le()
        })
    }
    #[inline(never)]
    unsafe fn gather_16(rows: Rows, offset: usize) -> [Self::I; 4] {
        // SAFETY: the caller passes places of sixteen bytes.
        std::array::from_fn(|k| unsafe { Self::gather_4(rows, offset + 4 * k) })
    }
    unsafe fn store(a: Self::F, out: &mut [f32; LANES]) {
        *out = a;
    }
    unsafe fn load_vector(from: *const f32) -> f32 {
        // SAFETY: the caller has a float there.
        unsafe { *from }
    }
    unsafe fn store_vector(a: f32, to: *mut f32) {
        // SAFETY: the caller has room for a float there.
        unsafe { *to = a };
    }
    unsafe fn mul_add_vector(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    unsafe fn prefetch(_: *const u8) {}
}

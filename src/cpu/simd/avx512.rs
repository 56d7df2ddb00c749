//! AVX-512 with VNNI: a register is sixteen lanes.

use super::avx2::{eight_halves, four_words};
use super::{LANES, Rows, Simd};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512;

impl Avx512 {
    /// Rows of activations that a matrix product takes at a time: what fits the registers.
    pub const ROWS: usize = 8;
}

// No closures here, and none in the kernels: the compiler would not inline these functions into them,
// since a closure does not have its function's instruction set.
// SAFETY: all bodies are inlined into their callers, which enable the instruction set.
#[allow(unsafe_op_in_unsafe_fn)] // every line is an intrinsic of the set that the trait demands
unsafe impl Simd for Avx512 {
    type I = __m512i;
    type F = __m512;
    type Sum = __m512i;
    type Vector = __m512;
    const VECTOR: usize = LANES;
    const NARROW: i32 = 0;
    /// The instruction multiplies unsigned with signed bytes.
    const SIGNED_BIAS: i32 = 128;

    #[inline(always)]
    unsafe fn splat(value: i32) -> __m512i {
        _mm512_set1_epi32(value)
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn shl<const N: i32>(a: __m512i) -> __m512i {
        _mm512_sll_epi32(a, _mm_cvtsi32_si128(N))
    }
    #[inline(always)]
    unsafe fn shr<const N: i32>(a: __m512i) -> __m512i {
        _mm512_srl_epi32(a, _mm_cvtsi32_si128(N))
    }
    #[inline(always)]
    unsafe fn shr_by(a: __m512i, n: u32) -> __m512i {
        _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32))
    }
    #[inline(always)]
    unsafe fn sign_extend_byte(a: __m512i) -> __m512i {
        _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(a))
    }
    #[inline(always)]
    unsafe fn start(total: __m512i) -> __m512i {
        total
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, w: __m512i, x: i32) -> __m512i {
        _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: __m512i, w: __m512i, x: i32) -> __m512i {
        let unsigned = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
        _mm512_dpbusd_epi32(sum, unsigned, _mm512_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn finish(sum: __m512i, _: __m512i) -> __m512i {
        sum
    }
    #[inline(always)]
    unsafe fn to_float(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn splat_float(value: f32) -> __m512 {
        _mm512_set1_ps(value)
    }
    #[inline(always)]
    unsafe fn load(floats: &[f32; LANES]) -> __m512 {
        _mm512_loadu_ps(floats.as_ptr())
    }
    #[inline(always)]
    unsafe fn load_half(halves: &[[u8; 2]; LANES]) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()))
    }
    #[inline(always)]
    unsafe fn load_bfloat(halves: &[[u8; 2]; LANES]) -> __m512 {
        let halves = _mm256_loadu_si256(halves.as_ptr().cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }
    #[inline(always)]
    unsafe fn load_bytes(bytes: &[u8; LANES]) -> __m512 {
        let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    }
    #[inline(always)]
    unsafe fn load_words(words: &[[u8; 4]; LANES]) -> __m512i {
        _mm512_loadu_si512(words.as_ptr().cast())
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn gather_half(rows: Rows, offset: usize) -> __m512 {
        let (low, high) = (eight_halves(rows, 0, offset), eight_halves(rows, 8, offset));
        _mm512_cvtph_ps(_mm256_set_m128i(high, low))
    }
    #[inline(always)]
    unsafe fn gather_4(rows: Rows, offset: usize) -> __m512i {
        let low = _mm256_set_m128i(four_words(rows, 4, offset), four_words(rows, 0, offset));
        let high = _mm256_set_m128i(four_words(rows, 12, offset), four_words(rows, 8, offset));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
    #[inline(always)]
    unsafe fn gather_16(rows: Rows, offset: usize) -> [__m512i; 4] {
        let (a, b) = (every_fourth(rows, 0, offset), every_fourth(rows, 1, offset));
        let (c, d) = (every_fourth(rows, 2, offset), every_fourth(rows, 3, offset));
        let (ab0, ab1) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd0, cd1) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab0, cd0),
            _mm512_unpackhi_epi64(ab0, cd0),
            _mm512_unpacklo_epi64(ab1, cd1),
            _mm512_unpackhi_epi64(ab1, cd1),
        ]
    }
    #[inline(always)]
    unsafe fn store(a: __m512, out: &mut [f32; LANES]) {
        _mm512_storeu_ps(out.as_mut_ptr(), a);
    }
    #[inline(always)]
    unsafe fn sums_of_lanes(four: &[[f32; LANES]; 4]) -> [f32; 4] {
        super::avx2::sums_of_lanes(four)
    }
    #[inline(always)]
    unsafe fn load_vector(from: *const f32) -> __m512 {
        _mm512_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn store_vector(a: __m512, to: *mut f32) {
        _mm512_storeu_ps(to, a)
    }
    #[inline(always)]
    unsafe fn mul_add_vector(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
}

/// The 16 bytes of rows i, 4 + i, 8 + i and 12 + i, so that a transposition stays inside 128 bits.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn every_fourth(rows: Rows, i: usize, offset: usize) -> __m512i {
    let z = _mm512_castsi128_si512(_mm_loadu_si128(rows.at(i, offset).cast()));
    let z = _mm512_inserti32x4::<1>(z, _mm_loadu_si128(rows.at(4 + i, offset).cast()));
    let z = _mm512_inserti32x4::<2>(z, _mm_loadu_si128(rows.at(8 + i, offset).cast()));
    _mm512_inserti32x4::<3>(z, _mm_loadu_si128(rows.at(12 + i, offset).cast()))
}

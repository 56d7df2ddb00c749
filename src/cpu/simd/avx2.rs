//! AVX2: two registers are sixteen lanes.

use super::{LANES, Rows, Simd, dots_by_lanes};
use std::arch::x86_64::*;

/// Any machine with AVX2.
pub(in crate::cpu) const PLAIN: u8 = 0;
/// Four products of bytes a lane in one instruction, of AVX-VNNI.
pub(in crate::cpu) const VNNI: u8 = 1;
/// As `VNNI`, in AVX-512's spelling of it: so that machines which have that one test it.
#[cfg(any(test, feature = "bench"))]
pub(in crate::cpu) const VNNI_512: u8 = 2;

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx2<const HAS: u8>;

impl<const HAS: u8> Avx2<HAS> {
    /// Rows of activations that a matrix product takes at a time: what fits the registers.
    pub const ROWS: usize = 4;
}

/// Lanes 0 to 7 and 8 to 15.
type Pair<T> = [T; 2];

// SAFETY: all bodies are inlined into their callers, which enable the instruction set.
#[allow(unsafe_op_in_unsafe_fn)] // every line is an intrinsic of the set that the trait demands
unsafe impl<const HAS: u8> Simd for Avx2<HAS> {
    type I = Pair<__m256i>;
    type F = Pair<__m256>;
    /// Without VNNI sixteen bits each: two for a lane.
    type Sum = Pair<__m256i>;
    type Vector = __m256;
    const VECTOR: usize = 8;
    const NARROW: i32 = if HAS == PLAIN { 2 } else { 0 };
    /// The instructions multiply unsigned with signed bytes.
    const SIGNED_BIAS: i32 = 128;

    #[inline(always)]
    unsafe fn splat(value: i32) -> Self::I {
        [_mm256_set1_epi32(value); 2]
    }
    #[inline(always)]
    unsafe fn and([a, b]: Self::I, [c, d]: Self::I) -> Self::I {
        [_mm256_and_si256(a, c), _mm256_and_si256(b, d)]
    }
    #[inline(always)]
    unsafe fn or([a, b]: Self::I, [c, d]: Self::I) -> Self::I {
        [_mm256_or_si256(a, c), _mm256_or_si256(b, d)]
    }
    #[inline(always)]
    unsafe fn shl<const N: i32>([a, b]: Self::I) -> Self::I {
        [_mm256_slli_epi32::<N>(a), _mm256_slli_epi32::<N>(b)]
    }
    #[inline(always)]
    unsafe fn shr<const N: i32>([a, b]: Self::I) -> Self::I {
        [_mm256_srli_epi32::<N>(a), _mm256_srli_epi32::<N>(b)]
    }
    #[inline(always)]
    unsafe fn shr_by([a, b]: Self::I, n: u32) -> Self::I {
        let n = _mm_cvtsi32_si128(n as i32);
        [_mm256_srl_epi32(a, n), _mm256_srl_epi32(b, n)]
    }
    #[inline(always)]
    unsafe fn sign_extend_byte([a, b]: Self::I) -> Self::I {
        let (a, b) = (_mm256_slli_epi32::<24>(a), _mm256_slli_epi32::<24>(b));
        [_mm256_srai_epi32::<24>(a), _mm256_srai_epi32::<24>(b)]
    }
    #[inline(always)]
    unsafe fn start(total: Self::I) -> Self::Sum {
        match HAS {
            PLAIN => [_mm256_setzero_si256(); 2],
            _ => total,
        }
    }
    #[inline(always)]
    unsafe fn dot([a, b]: Self::Sum, [v, w]: Self::I, x: i32) -> Self::Sum {
        let x = _mm256_set1_epi32(x);
        match HAS {
            PLAIN => [
                _mm256_add_epi16(a, _mm256_maddubs_epi16(v, x)),
                _mm256_add_epi16(b, _mm256_maddubs_epi16(w, x)),
            ],
            VNNI => [
                _mm256_dpbusd_avx_epi32(a, v, x),
                _mm256_dpbusd_avx_epi32(b, w, x),
            ],
            _ => [_mm256_dpbusd_epi32(a, v, x), _mm256_dpbusd_epi32(b, w, x)],
        }
    }
    /// Without VNNI never used: [`Simd::dots`] has another way.
    #[inline(always)]
    unsafe fn dot_signed(sum: Self::Sum, [v, w]: Self::I, x: i32) -> Self::Sum {
        let sign = _mm256_set1_epi8(-128);
        let unsigned = [_mm256_xor_si256(v, sign), _mm256_xor_si256(w, sign)];
        Self::dot(sum, unsigned, x)
    }
    #[inline(always)]
    unsafe fn finish([a, b]: Self::Sum, [c, d]: Self::I) -> Self::I {
        if HAS != PLAIN {
            return [a, b];
        }
        let one = _mm256_set1_epi16(1);
        [
            _mm256_add_epi32(c, _mm256_madd_epi16(a, one)),
            _mm256_add_epi32(d, _mm256_madd_epi16(b, one)),
        ]
    }
    #[inline(always)]
    unsafe fn to_float([a, b]: Self::I) -> Self::F {
        [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)]
    }
    #[inline(always)]
    unsafe fn splat_float(value: f32) -> Self::F {
        [_mm256_set1_ps(value); 2]
    }
    #[inline(always)]
    unsafe fn load(floats: &[f32; LANES]) -> Self::F {
        let start = floats.as_ptr();
        [_mm256_loadu_ps(start), _mm256_loadu_ps(start.add(8))]
    }
    #[inline(always)]
    unsafe fn load_half(halves: &[[u8; 2]; LANES]) -> Self::F {
        let start = halves.as_ptr();
        [
            _mm256_cvtph_ps(_mm_loadu_si128(start.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(start.add(8).cast())),
        ]
    }
    #[inline(always)]
    unsafe fn load_bfloat(halves: &[[u8; 2]; LANES]) -> Self::F {
        let start = halves.as_ptr();
        let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(start.cast()));
        let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(start.add(8).cast()));
        [
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
        ]
    }
    #[inline(always)]
    unsafe fn load_bytes(bytes: &[u8; LANES]) -> Self::F {
        let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
        let (low, high) = (bytes, _mm_unpackhi_epi64(bytes, bytes));
        [
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
        ]
    }
    #[inline(always)]
    unsafe fn load_words(words: &[[u8; 4]; LANES]) -> Self::I {
        let start = words.as_ptr();
        [
            _mm256_loadu_si256(start.cast()),
            _mm256_loadu_si256(start.add(8).cast()),
        ]
    }
    #[inline(always)]
    unsafe fn mul([a, b]: Self::F, [c, d]: Self::F) -> Self::F {
        [_mm256_mul_ps(a, c), _mm256_mul_ps(b, d)]
    }
    #[inline(always)]
    unsafe fn mul_add([a, b]: Self::F, [c, d]: Self::F, [e, f]: Self::F) -> Self::F {
        [_mm256_fmadd_ps(a, c, e), _mm256_fmadd_ps(b, d, f)]
    }
    #[inline(always)]
    unsafe fn gather_half(rows: Rows, offset: usize) -> Self::F {
        [
            _mm256_cvtph_ps(eight_halves(rows, 0, offset)),
            _mm256_cvtph_ps(eight_halves(rows, 8, offset)),
        ]
    }
    #[inline(always)]
    unsafe fn gather_4(rows: Rows, offset: usize) -> Self::I {
        [
            _mm256_set_m128i(four_words(rows, 4, offset), four_words(rows, 0, offset)),
            _mm256_set_m128i(four_words(rows, 12, offset), four_words(rows, 8, offset)),
        ]
    }
    #[inline(always)]
    unsafe fn gather_16(rows: Rows, offset: usize) -> [Self::I; 4] {
        let (low, high) = (eight_rows(rows, 0, offset), eight_rows(rows, 8, offset));
        [
            [low[0], high[0]],
            [low[1], high[1]],
            [low[2], high[2]],
            [low[3], high[3]],
        ]
    }
    #[inline(always)]
    unsafe fn store(a: Self::F, out: &mut [f32; LANES]) {
        _mm256_storeu_ps(out.as_mut_ptr(), a[0]);
        _mm256_storeu_ps(out.as_mut_ptr().add(8), a[1]);
    }
    #[inline(always)]
    unsafe fn hidden(n: usize) -> usize {
        let mut n = n;
        std::arch::asm!("/* {n} */", n = inout(reg) n, options(pure, nomem, nostack, preserves_flags));
        n
    }
    #[inline(always)]
    unsafe fn sums_of_lanes(four: &[[f32; LANES]; 4]) -> [f32; 4] {
        sums_of_lanes(four)
    }
    #[inline(always)]
    unsafe fn load_vector(from: *const f32) -> __m256 {
        _mm256_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn store_vector(a: __m256, to: *mut f32) {
        _mm256_storeu_ps(to, a)
    }
    #[inline(always)]
    unsafe fn mul_add_vector(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }

    #[inline(always)]
    unsafe fn dots<const SIGNED: bool, const ARRANGED: bool, const R: usize>(
        totals: &mut [Self::I; R],
        numbers: &[Self::I; 8],
        [from, to]: [usize; 2],
        steps: usize,
        x: *const i8,
    ) {
        if !SIGNED || HAS != PLAIN {
            return dots_by_lanes::<Self, SIGNED, R>(totals, numbers, [from, to], steps, x);
        }
        // The instruction multiplies bytes without a sign with bytes that have one, and pairs of
        // products must fit sixteen bits. So w + 128 is taken as 16 · high + low, whose products can
        // be added up eight times, where bytes as a whole would have to be widened each time.
        let (half, one) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        for part in 0..2 {
            let zero = _mm256_setzero_si256();
            let (mut low, mut high) = ([zero; R], [zero; R]);
            let mut k = from;
            let end = if R > 1 { Self::hidden(to) } else { to };
            while k < end {
                let w = _mm256_xor_si256(numbers.get_unchecked(k)[part], _mm256_set1_epi8(-128));
                let l = _mm256_and_si256(w, half);
                let h = _mm256_and_si256(_mm256_srli_epi16::<4>(w), half);
                for r in 0..R {
                    let x = x.add(32 * r + 4 * k).cast::<i32>().read_unaligned();
                    let x = _mm256_set1_epi32(x);
                    low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(l, x));
                    high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(h, x));
                }
                k += 1;
            }
            for (r, total) in totals.iter_mut().enumerate() {
                let high = _mm256_slli_epi32::<4>(_mm256_madd_epi16(high[r], one));
                let sum = _mm256_add_epi32(high, _mm256_madd_epi16(low[r], one));
                total[part] = _mm256_add_epi32(total[part], sum);
            }
        }
    }
}

/// Two bytes of each of eight rows. One insertion into a register each; a detour by memory would have
/// to wait for it.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
pub(super) unsafe fn eight_halves(rows: Rows, first: usize, offset: usize) -> __m128i {
    _mm_set_epi16(
        rows.at(first + 7, offset).cast::<i16>().read_unaligned(),
        rows.at(first + 6, offset).cast::<i16>().read_unaligned(),
        rows.at(first + 5, offset).cast::<i16>().read_unaligned(),
        rows.at(first + 4, offset).cast::<i16>().read_unaligned(),
        rows.at(first + 3, offset).cast::<i16>().read_unaligned(),
        rows.at(first + 2, offset).cast::<i16>().read_unaligned(),
        rows.at(first + 1, offset).cast::<i16>().read_unaligned(),
        rows.at(first, offset).cast::<i16>().read_unaligned(),
    )
}

/// Four bytes of each of four rows.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
pub(super) unsafe fn four_words(rows: Rows, first: usize, offset: usize) -> __m128i {
    _mm_set_epi32(
        rows.at(first + 3, offset).cast::<i32>().read_unaligned(),
        rows.at(first + 2, offset).cast::<i32>().read_unaligned(),
        rows.at(first + 1, offset).cast::<i32>().read_unaligned(),
        rows.at(first, offset).cast::<i32>().read_unaligned(),
    )
}

/// Rows i and 4 + i, so that a transposition stays inside 128 bits.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn two_rows(rows: Rows, i: usize, offset: usize) -> __m256i {
    _mm256_set_m128i(
        _mm_loadu_si128(rows.at(4 + i, offset).cast()),
        _mm_loadu_si128(rows.at(i, offset).cast()),
    )
}

/// 16 bytes of each of eight rows: bytes 0 to 3 in the first result, and so on.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn eight_rows(rows: Rows, first: usize, offset: usize) -> [__m256i; 4] {
    let (a, b) = (
        two_rows(rows, first, offset),
        two_rows(rows, first + 1, offset),
    );
    let (c, d) = (
        two_rows(rows, first + 2, offset),
        two_rows(rows, first + 3, offset),
    );
    let (ab0, ab1) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (cd0, cd1) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab0, cd0),
        _mm256_unpackhi_epi64(ab0, cd0),
        _mm256_unpacklo_epi64(ab1, cd1),
        _mm256_unpackhi_epi64(ab1, cd1),
    ]
}

/// [`Simd::sums_of_lanes`], which the compiler makes four times as many instructions of.
#[allow(unsafe_op_in_unsafe_fn)] // every line is an intrinsic
#[inline(always)]
pub(super) unsafe fn sums_of_lanes(four: &[[f32; LANES]; 4]) -> [f32; 4] {
    let mut quads = [_mm_setzero_ps(); 4];
    for (quad, lanes) in quads.iter_mut().zip(four) {
        let start = lanes.as_ptr();
        let eight = _mm256_add_ps(_mm256_loadu_ps(start), _mm256_loadu_ps(start.add(8)));
        *quad = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
    }
    let [a, b, c, d] = quads;
    // Of two rows, lanes 0 and 2, then 1 and 3.
    let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    let sums = _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
    let mut out = [0.0; 4];
    _mm_storeu_ps(out.as_mut_ptr(), sums);
    out
}

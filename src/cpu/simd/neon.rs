//! 64-bit ARM: four registers are sixteen lanes. Products of bytes need ARMv8.2 and later (dotprod:
//! phones since 2018, Jetson Orin; i8mm: phones since 2021) to be one instruction. Those, and the
//! conversion from half precision, have no stable intrinsics, so they are written as assembly.

use super::{LANES, Rows, Simd, dots_by_lanes};
use std::arch::aarch64::*;
use std::arch::asm;

/// Any 64-bit ARM.
pub(in crate::cpu) const PLAIN: u8 = 0;
/// Four products of bytes a lane in one instruction.
pub(in crate::cpu) const DOTPROD: u8 = 1;
/// And products of two rows of eight bytes with two columns.
pub(in crate::cpu) const I8MM: u8 = 2;

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Neon<const HAS: u8>;

impl<const HAS: u8> Neon<HAS> {
    /// Rows of activations that a matrix product takes at a time: what fits the registers.
    pub const ROWS: usize = if HAS >= DOTPROD { 4 } else { 2 };
}

/// Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.
type Quad<T> = [T; 4];

/// Sums in the making of four lanes, where there is no dotprod: four sums of sixteen bits for each of
/// lanes 0 and 1, and of lanes 2 and 3.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Halves(int16x8_t, int16x8_t);

/// Four products of signed bytes in each lane, added up.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // every line is an intrinsic of the set that the trait demands
unsafe fn dot(sum: Halves, w: int32x4_t, x: int8x16_t) -> Halves {
    let w = vreinterpretq_s8_s32(w);
    let low = vmlal_s8(sum.0, vget_low_s8(w), vget_low_s8(x));
    let high = vmlal_high_s8(sum.1, w, x);
    Halves(low, high)
}

#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn finish(sum: Halves, total: int32x4_t) -> int32x4_t {
    vaddq_s32(total, vpaddq_s32(vpaddlq_s16(sum.0), vpaddlq_s16(sum.1)))
}

/// The same bytes, of which the compiler knows nothing.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn hidden_bytes(bytes: int8x16_t) -> int8x16_t {
    let mut bytes = bytes;
    asm!("/* {bytes:v} */", bytes = inout(vreg) bytes, options(pure, nomem, nostack, preserves_flags));
    bytes
}

/// Four products of signed bytes in each lane, with the four bytes number `WORD` of `x`, added to
/// `sum`.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn dot_word<const WORD: i32>(sum: int32x4_t, w: int32x4_t, x: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    asm!(
        ".arch_extension dotprod",
        "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{word}]",
        sum = inout(vreg) sum,
        w = in(vreg) w,
        x = in(vreg) x,
        word = const WORD,
        options(pure, nomem, nostack, preserves_flags)
    );
    sum
}

/// Adds the products of four columns: those of word `WORD` of each row's `x`.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn dot_words<const WORD: i32, const R: usize>(
    totals: &mut [Quad<int32x4_t>; R],
    w: Quad<int32x4_t>,
    x: &[int8x16_t; R],
) {
    for (total, x) in totals.iter_mut().zip(x) {
        for (total, w) in total.iter_mut().zip(w) {
            *total = dot_word::<WORD>(*total, w, *x);
        }
    }
}

/// [`Simd::dots`] with dotprod, for numbers in their plain order. An instruction picks four bytes out
/// of a register, so sixteen activations are loaded at once.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn dots_by_words<const HAS: u8, const R: usize>(
    totals: &mut [Quad<int32x4_t>; R],
    numbers: &[Quad<int32x4_t>; 8],
    [from, to]: [usize; 2],
    x: *const i8,
) {
    debug_assert!(from.is_multiple_of(4) && to.is_multiple_of(4));
    // Hidden for the reason given in `dots_by_lanes`.
    let end = if R > 1 { Neon::<HAS>::hidden(to) } else { to };
    let mut k = from;
    while k < end {
        let mut words = [vdupq_n_s8(0); R];
        for (r, words) in words.iter_mut().enumerate() {
            *words = vld1q_s8(x.add(32 * r + 4 * k));
        }
        dot_words::<0, R>(totals, *numbers.get_unchecked(k), &words);
        dot_words::<1, R>(totals, *numbers.get_unchecked(k + 1), &words);
        dot_words::<2, R>(totals, *numbers.get_unchecked(k + 2), &words);
        dot_words::<3, R>(totals, *numbers.get_unchecked(k + 3), &words);
        k += 4;
    }
}

/// The products of two rows of eight bytes (`w`) with two others (`x`), added to a 2 × 2 matrix.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn matrix_product(sum: int32x4_t, w: int32x4_t, x: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    asm!(
        ".arch_extension i8mm",
        "smmla {sum:v}.4s, {w:v}.16b, {x:v}.16b",
        sum = inout(vreg) sum,
        w = in(vreg) w,
        x = in(vreg) x,
        options(pure, nomem, nostack, preserves_flags)
    );
    sum
}

/// Four half-precision numbers.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn to_single(halves: uint16x4_t) -> float32x4_t {
    let singles: float32x4_t;
    asm!(
        "fcvtl {singles:v}.4s, {halves:v}.4h",
        singles = out(vreg) singles,
        halves = in(vreg) halves,
        options(pure, nomem, nostack, preserves_flags)
    );
    singles
}

/// Two bytes of each of four rows.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn four_halves(rows: Rows, first: usize, offset: usize) -> float32x4_t {
    let halves = vdup_n_u16(0);
    let halves = vld1_lane_u16::<0>(rows.at(first, offset).cast(), halves);
    let halves = vld1_lane_u16::<1>(rows.at(first + 1, offset).cast(), halves);
    let halves = vld1_lane_u16::<2>(rows.at(first + 2, offset).cast(), halves);
    to_single(vld1_lane_u16::<3>(
        rows.at(first + 3, offset).cast(),
        halves,
    ))
}

/// Four bytes of each of four rows.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn four_words(rows: Rows, first: usize, offset: usize) -> int32x4_t {
    let words = vdupq_n_s32(0);
    let words = vld1q_lane_s32::<0>(rows.at(first, offset).cast(), words);
    let words = vld1q_lane_s32::<1>(rows.at(first + 1, offset).cast(), words);
    let words = vld1q_lane_s32::<2>(rows.at(first + 2, offset).cast(), words);
    vld1q_lane_s32::<3>(rows.at(first + 3, offset).cast(), words)
}

/// Sixteen bytes of each of four rows: bytes 0 to 3 in the first result, and so on.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn four_rows(rows: Rows, first: usize, offset: usize) -> Quad<int32x4_t> {
    let a = vld1q_s32(rows.at(first, offset).cast());
    let b = vld1q_s32(rows.at(first + 1, offset).cast());
    let c = vld1q_s32(rows.at(first + 2, offset).cast());
    let d = vld1q_s32(rows.at(first + 3, offset).cast());
    let even_ab = vreinterpretq_s64_s32(vtrn1q_s32(a, b));
    let odd_ab = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    let even_cd = vreinterpretq_s64_s32(vtrn1q_s32(c, d));
    let odd_cd = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    [
        vreinterpretq_s32_s64(vtrn1q_s64(even_ab, even_cd)),
        vreinterpretq_s32_s64(vtrn1q_s64(odd_ab, odd_cd)),
        vreinterpretq_s32_s64(vtrn2q_s64(even_ab, even_cd)),
        vreinterpretq_s32_s64(vtrn2q_s64(odd_ab, odd_cd)),
    ]
}

/// Applies a function of registers to each of four. A macro, for the reason given in `avx512.rs`.
macro_rules! four {
    ($function:ident($a:expr)) => {
        [
            $function($a[0]),
            $function($a[1]),
            $function($a[2]),
            $function($a[3]),
        ]
    };
    ($function:ident($a:expr, each $b:expr)) => {
        [
            $function($a[0], $b[0]),
            $function($a[1], $b[1]),
            $function($a[2], $b[2]),
            $function($a[3], $b[3]),
        ]
    };
    ($function:ident($a:expr, each $b:expr, all $c:expr)) => {
        [
            $function($a[0], $b[0], $c),
            $function($a[1], $b[1], $c),
            $function($a[2], $b[2], $c),
            $function($a[3], $b[3], $c),
        ]
    };
    ($function:ident($a:expr, all $b:expr)) => {
        [
            $function($a[0], $b),
            $function($a[1], $b),
            $function($a[2], $b),
            $function($a[3], $b),
        ]
    };
}

// SAFETY: NEON is part of every 64-bit ARM; the bodies that need more are inlined into callers that
// enable it.
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe impl<const HAS: u8> Simd for Neon<HAS> {
    type I = Quad<int32x4_t>;
    type F = Quad<float32x4_t>;
    type Sum = Quad<Halves>;
    type Vector = float32x4_t;
    const VECTOR: usize = 4;
    const NARROW: i32 = if HAS >= DOTPROD { 0 } else { 1 };
    const SIGNED_BIAS: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: i32) -> Self::I {
        [vdupq_n_s32(value); 4]
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        four!(vandq_s32(a, each b))
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        four!(vorrq_s32(a, each b))
    }
    #[inline(always)]
    unsafe fn shl<const N: i32>(a: Self::I) -> Self::I {
        let n = vdupq_n_s32(N);
        four!(vshlq_s32(a, all n))
    }
    #[inline(always)]
    unsafe fn shr<const N: i32>(a: Self::I) -> Self::I {
        Self::shr_by(a, N as u32)
    }
    #[inline(always)]
    unsafe fn shr_by(a: Self::I, n: u32) -> Self::I {
        let n = vdupq_n_s32(-(n as i32));
        let a = four!(vreinterpretq_u32_s32(a));
        let a = four!(vshlq_u32(a, all n));
        four!(vreinterpretq_s32_u32(a))
    }
    #[inline(always)]
    unsafe fn sign_extend_byte(a: Self::I) -> Self::I {
        let (up, down) = (vdupq_n_s32(24), vdupq_n_s32(-24));
        let upper = four!(vshlq_s32(a, all up));
        // The shift of signed numbers brings copies of the sign.
        four!(vshlq_s32(upper, all down))
    }
    /// As [`Simd::dot`] and [`Simd::finish`] never used with dotprod: [`Simd::dots`] has another way.
    #[inline(always)]
    unsafe fn start(_: Self::I) -> Self::Sum {
        let zero = vdupq_n_s16(0);
        [Halves(zero, zero); 4]
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::Sum, w: Self::I, x: i32) -> Self::Sum {
        // Knowing that both halves are the same, the compiler would use the lower one alone, and move
        // the weights' upper half down for it each time.
        let x = hidden_bytes(vreinterpretq_s8_s32(vdupq_n_s32(x)));
        four!(dot(sum, each w, all x))
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: Self::Sum, w: Self::I, x: i32) -> Self::Sum {
        Self::dot(sum, w, x)
    }
    #[inline(always)]
    unsafe fn finish(sum: Self::Sum, total: Self::I) -> Self::I {
        four!(finish(sum, each total))
    }
    #[inline(always)]
    unsafe fn to_float(a: Self::I) -> Self::F {
        four!(vcvtq_f32_s32(a))
    }
    #[inline(always)]
    unsafe fn splat_float(value: f32) -> Self::F {
        [vdupq_n_f32(value); 4]
    }
    #[inline(always)]
    unsafe fn load(floats: &[f32; LANES]) -> Self::F {
        let start = floats.as_ptr();
        [
            vld1q_f32(start),
            vld1q_f32(start.add(4)),
            vld1q_f32(start.add(8)),
            vld1q_f32(start.add(12)),
        ]
    }
    #[inline(always)]
    unsafe fn load_half(halves: &[[u8; 2]; LANES]) -> Self::F {
        let start = halves.as_ptr().cast::<u16>();
        [
            to_single(vld1_u16(start)),
            to_single(vld1_u16(start.add(4))),
            to_single(vld1_u16(start.add(8))),
            to_single(vld1_u16(start.add(12))),
        ]
    }
    #[inline(always)]
    unsafe fn load_bfloat(halves: &[[u8; 2]; LANES]) -> Self::F {
        let start = halves.as_ptr().cast::<u16>();
        let (low, high) = (vld1q_u16(start), vld1q_u16(start.add(8)));
        [
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
            vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
            vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
        ]
    }
    #[inline(always)]
    unsafe fn load_bytes(bytes: &[u8; LANES]) -> Self::F {
        let bytes = vld1q_s8(bytes.as_ptr().cast());
        let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
        [
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
            vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
            vcvtq_f32_s32(vmovl_high_s16(high)),
        ]
    }
    #[inline(always)]
    unsafe fn load_words(words: &[[u8; 4]; LANES]) -> Self::I {
        let start = words.as_ptr().cast::<i32>();
        [
            vld1q_s32(start),
            vld1q_s32(start.add(4)),
            vld1q_s32(start.add(8)),
            vld1q_s32(start.add(12)),
        ]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        four!(vmulq_f32(a, each b))
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [
            vfmaq_f32(c[0], a[0], b[0]),
            vfmaq_f32(c[1], a[1], b[1]),
            vfmaq_f32(c[2], a[2], b[2]),
            vfmaq_f32(c[3], a[3], b[3]),
        ]
    }
    #[inline(always)]
    unsafe fn gather_half(rows: Rows, offset: usize) -> Self::F {
        [
            four_halves(rows, 0, offset),
            four_halves(rows, 4, offset),
            four_halves(rows, 8, offset),
            four_halves(rows, 12, offset),
        ]
    }
    #[inline(always)]
    unsafe fn gather_4(rows: Rows, offset: usize) -> Self::I {
        [
            four_words(rows, 0, offset),
            four_words(rows, 4, offset),
            four_words(rows, 8, offset),
            four_words(rows, 12, offset),
        ]
    }
    #[inline(always)]
    unsafe fn gather_16(rows: Rows, offset: usize) -> [Self::I; 4] {
        let (a, b) = (four_rows(rows, 0, offset), four_rows(rows, 4, offset));
        let (c, d) = (four_rows(rows, 8, offset), four_rows(rows, 12, offset));
        [
            [a[0], b[0], c[0], d[0]],
            [a[1], b[1], c[1], d[1]],
            [a[2], b[2], c[2], d[2]],
            [a[3], b[3], c[3], d[3]],
        ]
    }
    #[inline(always)]
    unsafe fn store(a: Self::F, out: &mut [f32; LANES]) {
        let start = out.as_mut_ptr();
        vst1q_f32(start, a[0]);
        vst1q_f32(start.add(4), a[1]);
        vst1q_f32(start.add(8), a[2]);
        vst1q_f32(start.add(12), a[3]);
    }
    #[inline(always)]
    unsafe fn hidden(n: usize) -> usize {
        let mut n = n;
        asm!("/* {n} */", n = inout(reg) n, options(pure, nomem, nostack, preserves_flags));
        n
    }
    #[inline(always)]
    unsafe fn sums_of_lanes(four: &[[f32; LANES]; 4]) -> [f32; 4] {
        let mut quads = [vdupq_n_f32(0.0); 4];
        for (quad, lanes) in quads.iter_mut().zip(four) {
            let [a, b, c, d] = Self::load(lanes);
            *quad = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
        }
        let [a, b, c, d] = quads;
        // Of two, lanes 0 and 2, then 1 and 3.
        let ab = vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b));
        let cd = vaddq_f32(vzip1q_f32(c, d), vzip2q_f32(c, d));
        let first = vcombine_f32(vget_low_f32(ab), vget_low_f32(cd));
        let second = vcombine_f32(vget_high_f32(ab), vget_high_f32(cd));
        let mut sums = [0.0; 4];
        vst1q_f32(sums.as_mut_ptr(), vaddq_f32(first, second));
        sums
    }
    #[inline(always)]
    unsafe fn load_vector(from: *const f32) -> float32x4_t {
        vld1q_f32(from)
    }
    #[inline(always)]
    unsafe fn store_vector(a: float32x4_t, to: *mut f32) {
        vst1q_f32(to, a)
    }
    #[inline(always)]
    unsafe fn mul_add_vector(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        vfmaq_f32(c, a, b)
    }
    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        asm!(
            "prfm pldl1keep, [{address}]",
            address = in(reg) address,
            options(nostack, readonly, preserves_flags)
        );
    }

    /// With i8mm: columns 8j to 8j + 7 of a row side by side, two rows in each register. Rows 4q and
    /// 4q + 1 in number 2j, rows 4q + 2 and 4q + 3 in number 2j + 1.
    #[inline(always)]
    unsafe fn arrange(numbers: [Self::I; 8]) -> [Self::I; 8] {
        let mut arranged = numbers;
        if HAS >= I8MM {
            for j in 0..4 {
                let (a, b) = (numbers[2 * j], numbers[2 * j + 1]);
                for q in 0..4 {
                    arranged[2 * j][q] = vzip1q_s32(a[q], b[q]);
                    arranged[2 * j + 1][q] = vzip2q_s32(a[q], b[q]);
                }
            }
        }
        arranged
    }

    #[inline(always)]
    unsafe fn dots<const SIGNED: bool, const ARRANGED: bool, const R: usize>(
        totals: &mut [Self::I; R],
        numbers: &[Self::I; 8],
        [from, to]: [usize; 2],
        steps: usize,
        x: *const i8,
    ) {
        if HAS == PLAIN {
            return dots_by_lanes::<Self, SIGNED, R>(totals, numbers, [from, to], steps, x);
        }
        if HAS < I8MM || !ARRANGED {
            return dots_by_words::<HAS, R>(totals, numbers, [from, to], x);
        }
        const { assert!(R <= 4) };
        let pairs = R.div_ceil(2);
        // Of each pair of rows of activations, for each four lanes: a 2 × 2 matrix for rows 4q and
        // 4q + 1, one for rows 4q + 2 and 4q + 3. An odd last row is its own partner.
        let partners = |pair: usize| (2 * pair, (2 * pair + 1).min(R - 1));
        let mut sums = [[[vdupq_n_s32(0); 2]; 4]; 2];
        for (pair, sums) in sums.iter_mut().enumerate().take(pairs) {
            let (first, second) = partners(pair);
            for (q, sum) in sums.iter_mut().enumerate() {
                let (a, b) = (totals[first][q], totals[second][q]);
                *sum = [vzip1q_s32(a, b), vzip2q_s32(a, b)];
            }
        }
        for j in from / 2..to / 2 {
            let at = x.add(8 * j);
            for (pair, sums) in sums.iter_mut().enumerate().take(pairs) {
                let (first, second) = partners(pair);
                let x = vcombine_s8(vld1_s8(at.add(32 * first)), vld1_s8(at.add(32 * second)));
                for (q, sum) in sums.iter_mut().enumerate() {
                    sum[0] = matrix_product(sum[0], numbers[2 * j][q], x);
                    sum[1] = matrix_product(sum[1], numbers[2 * j + 1][q], x);
                }
            }
        }
        for (pair, sums) in sums.iter().enumerate().take(pairs) {
            for (q, [a, b]) in sums.iter().enumerate() {
                totals[2 * pair][q] = vuzp1q_s32(*a, *b);
                if 2 * pair + 1 < R {
                    totals[2 * pair + 1][q] = vuzp2q_s32(*a, *b);
                }
            }
        }
    }
}

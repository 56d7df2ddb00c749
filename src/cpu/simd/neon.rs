//! 64-bit ARM: four registers are sixteen lanes. `DOTPROD` says whether the machine multiplies and
//! adds bytes in one instruction (ARMv8.2 and later: phones since 2018, Jetson Orin). That instruction
//! and the conversion from half precision have no stable intrinsics, so they are written as assembly.

use super::{LANES, Simd};
use std::arch::aarch64::*;
use std::arch::asm;

#[derive(Clone, Copy)]
pub(in crate::cpu) struct Neon<const DOTPROD: bool>;

/// Lanes 0 to 3, 4 to 7, 8 to 11 and 12 to 15.
type Quad<T> = [T; 4];

/// Four products of signed bytes in each lane, added up.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // every line is an intrinsic of the set that the trait demands
unsafe fn dot<const DOTPROD: bool>(acc: int32x4_t, w: int32x4_t, x: int8x16_t) -> int32x4_t {
    let w = vreinterpretq_s8_s32(w);
    if DOTPROD {
        let mut sum = acc;
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
        return sum;
    }
    // Two products of at most 128 · 127 fit sixteen bits.
    let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    let high = vmull_high_s8(w, x);
    vpadalq_s16(acc, vpaddq_s16(low, high))
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
unsafe fn four_halves(rows: &[*const u8; LANES], first: usize, offset: usize) -> float32x4_t {
    let halves = vdup_n_u16(0);
    let halves = vld1_lane_u16::<0>(rows[first].add(offset).cast(), halves);
    let halves = vld1_lane_u16::<1>(rows[first + 1].add(offset).cast(), halves);
    let halves = vld1_lane_u16::<2>(rows[first + 2].add(offset).cast(), halves);
    to_single(vld1_lane_u16::<3>(
        rows[first + 3].add(offset).cast(),
        halves,
    ))
}

/// Four bytes of each of four rows.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn four_words(rows: &[*const u8; LANES], first: usize, offset: usize) -> int32x4_t {
    let words = vdupq_n_s32(0);
    let words = vld1q_lane_s32::<0>(rows[first].add(offset).cast(), words);
    let words = vld1q_lane_s32::<1>(rows[first + 1].add(offset).cast(), words);
    let words = vld1q_lane_s32::<2>(rows[first + 2].add(offset).cast(), words);
    vld1q_lane_s32::<3>(rows[first + 3].add(offset).cast(), words)
}

/// Sixteen bytes of each of four rows: bytes 0 to 3 in the first result, and so on.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn four_rows(rows: &[*const u8; LANES], first: usize, offset: usize) -> Quad<int32x4_t> {
    let a = vld1q_s32(rows[first].add(offset).cast());
    let b = vld1q_s32(rows[first + 1].add(offset).cast());
    let c = vld1q_s32(rows[first + 2].add(offset).cast());
    let d = vld1q_s32(rows[first + 3].add(offset).cast());
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
    ($function:ident($a:expr, all $b:expr)) => {
        [
            $function($a[0], $b),
            $function($a[1], $b),
            $function($a[2], $b),
            $function($a[3], $b),
        ]
    };
}

/// Each lane shifted left, or right with zeros from above for a negative number.
#[inline(always)]
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe fn shift(a: int32x4_t, n: int32x4_t) -> int32x4_t {
    vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), n))
}

// SAFETY: NEON is part of every 64-bit ARM; the bodies that need more are inlined into callers that
// enable it.
#[allow(unsafe_op_in_unsafe_fn)] // as above
unsafe impl<const DOTPROD: bool> Simd for Neon<DOTPROD> {
    type I = Quad<int32x4_t>;
    type F = Quad<float32x4_t>;
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
    unsafe fn shl<const N: u32>(a: Self::I) -> Self::I {
        let n = vdupq_n_s32(N as i32);
        four!(shift(a, all n))
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(a: Self::I) -> Self::I {
        Self::shr_by(a, N)
    }
    #[inline(always)]
    unsafe fn shr_by(a: Self::I, n: u32) -> Self::I {
        let n = vdupq_n_s32(-(n as i32));
        four!(shift(a, all n))
    }
    #[inline(always)]
    unsafe fn sign_extend_byte(a: Self::I) -> Self::I {
        let (up, down) = (vdupq_n_s32(24), vdupq_n_s32(-24));
        let upper = four!(vshlq_s32(a, all up));
        // The shift of signed numbers brings copies of the sign.
        four!(vshlq_s32(upper, all down))
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
        [
            dot::<DOTPROD>(acc[0], w[0], x),
            dot::<DOTPROD>(acc[1], w[1], x),
            dot::<DOTPROD>(acc[2], w[2], x),
            dot::<DOTPROD>(acc[3], w[3], x),
        ]
    }
    #[inline(always)]
    unsafe fn dot_signed(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        Self::dot(acc, w, x)
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
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        four!(vaddq_f32(a, each b))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        four!(vmulq_f32(a, each b))
    }
    #[inline(always)]
    unsafe fn gather_half(rows: &[*const u8; LANES], offset: usize) -> Self::F {
        [
            four_halves(rows, 0, offset),
            four_halves(rows, 4, offset),
            four_halves(rows, 8, offset),
            four_halves(rows, 12, offset),
        ]
    }
    #[inline(always)]
    unsafe fn gather_4(rows: &[*const u8; LANES], offset: usize) -> Self::I {
        [
            four_words(rows, 0, offset),
            four_words(rows, 4, offset),
            four_words(rows, 8, offset),
            four_words(rows, 12, offset),
        ]
    }
    #[inline(always)]
    unsafe fn gather_16(rows: &[*const u8; LANES], offset: usize) -> [Self::I; 4] {
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
    unsafe fn prefetch(address: *const u8) {
        asm!(
            "prfm pldl1keep, [{address}]",
            address = in(reg) address,
            options(nostack, readonly, preserves_flags)
        );
    }
}

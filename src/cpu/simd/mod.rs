//! What the kernels ask of an instruction set, and which ones this machine has.
//!
//! A kernel works on sixteen rows of a matrix at once, each in a lane of its own. So no sum crosses
//! lanes, a lane adds up its row's blocks in their order, and every instruction set gives the same
//! bits: whole numbers are exact, and floats are multiplied and added with one rounding
//! ([`Simd::mul_add`]) or with two, as the kernel says, everywhere alike.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

#[cfg(all(target_arch = "x86_64", any(test, feature = "bench")))]
pub(super) use avx2::VNNI_512;
#[cfg(target_arch = "x86_64")]
pub(super) use avx2::{Avx2, PLAIN, VNNI};
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::{DOTPROD, I8MM, Neon, PLAIN};
pub(super) use scalar::Scalar;

/// Rows that are worked on together.
pub(super) const LANES: usize = 16;

/// The instruction sets that there are kernels for. A value is had only by [`Level::available`] and
/// [`Level::best`], so holding one proves that the machine has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// Plain Rust: any machine.
    Scalar,
    /// AVX2, FMA and F16C: x86-64 since 2013.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// As `Avx2`, with products of bytes: laptops and small boards since 2021 (Alder Lake, N100), which have no AVX-512.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 F, BW, VL and VNNI: servers since 2019, Zen 4 and later.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON: any 64-bit ARM.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with byte products: phones since 2018, Jetson Orin.
    #[cfg(target_arch = "aarch64")]
    Dotprod,
    /// As `Dotprod`, with products of small byte matrices: phones since 2021, Graviton 3.
    #[cfg(target_arch = "aarch64")]
    I8mm,
}

impl Level {
    /// All that this machine has, the plainest first.
    pub fn available() -> impl Iterator<Item = Level> {
        #[cfg(target_arch = "x86_64")]
        let more = {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            let avx_vnni = avx2 && (has_avx_vnni() || (avx512 && HAS_STAND_IN));
            [
                avx2.then_some(Level::Avx2),
                avx_vnni.then_some(Level::AvxVnni),
                avx512.then_some(Level::Avx512),
            ]
        };
        #[cfg(target_arch = "aarch64")]
        let more = {
            let dotprod = std::arch::is_aarch64_feature_detected!("dotprod");
            let i8mm = dotprod && std::arch::is_aarch64_feature_detected!("i8mm");
            [
                Some(Level::Neon),
                dotprod.then_some(Level::Dotprod),
                i8mm.then_some(Level::I8mm),
            ]
        };
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let more = [];
        [Some(Level::Scalar)].into_iter().chain(more).flatten()
    }

    /// Rows of activations that a matrix product takes at a time: what fits the registers.
    pub fn rows(self) -> usize {
        match self {
            Level::Scalar => 1,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::<PLAIN>::ROWS,
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => Avx2::<VNNI>::ROWS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Avx512::ROWS,
            #[cfg(target_arch = "aarch64")]
            Level::Neon => Neon::<PLAIN>::ROWS,
            #[cfg(target_arch = "aarch64")]
            Level::Dotprod => Neon::<DOTPROD>::ROWS,
            #[cfg(target_arch = "aarch64")]
            Level::I8mm => Neon::<I8MM>::ROWS,
        }
    }

    /// The best that this machine has.
    pub fn best() -> Level {
        Level::available().last().unwrap_or(Level::Scalar)
    }
}

/// Whether AVX-512's spelling of the instruction is there for where AVX-VNNI's is missing.
#[cfg(target_arch = "x86_64")]
const HAS_STAND_IN: bool = cfg!(any(test, feature = "bench"));

/// Whether the machine has the instruction of [`Level::AvxVnni`] in its own spelling.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_avx_vnni() -> bool {
    is_x86_feature_detected!("avxvnni")
}

/// Where sixteen rows lie in memory.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub start: *const u8,
    /// Bytes from one row to the next. (Not sixteen pointers: they would take up all registers.)
    pub stride: usize,
    /// The last row that is there; only [`Scalar`] heeds it, the others need all sixteen.
    pub last: usize,
}

impl Rows {
    /// The place `offset` bytes into a row.
    #[inline(always)]
    pub fn at(self, row: usize, offset: usize) -> *const u8 {
        let four = self
            .start
            .wrapping_add(offset)
            .wrapping_add(row / 4 * (4 * self.stride));
        four.wrapping_add(row % 4 * self.stride)
    }
}

/// Sixteen lanes of 32 bits: as whole numbers, as four bytes each, or as floats.
///
/// # Safety
/// Its functions may be called only on a machine that has the instruction set, and their bodies must
/// be inlined into a function that enables it.
pub(super) unsafe trait Simd: Copy {
    /// Lanes of whole numbers or bytes.
    type I: Copy;
    /// Lanes of floats.
    type F: Copy;
    /// Sums of products of bytes in the making.
    type Sum: Copy;
    /// One register of floats, [`Simd::VECTOR`] of the sixteen lanes.
    type Vector: Copy;

    const VECTOR: usize;

    /// Whether products of bytes are taken in plain words instead (see `tiles.rs`).
    const PLAIN: bool = false;
    /// Products of a [`Simd::dot`] that share a sum of sixteen bits; 0 where sums have 32 bits.
    const NARROW: i32;
    /// What [`Simd::dots`] adds to each signed weight, to be taken off again by the caller.
    const SIGNED_BIAS: i32;

    /// The same number in each lane.
    unsafe fn splat(value: i32) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Each lane shifted left.
    unsafe fn shl<const N: i32>(a: Self::I) -> Self::I;
    /// Each lane shifted right, zeros from above.
    unsafe fn shr<const N: i32>(a: Self::I) -> Self::I;
    /// As [`Simd::shr`], by a number that is not a constant.
    unsafe fn shr_by(a: Self::I, n: u32) -> Self::I;
    /// The lowest byte of each lane as a signed number.
    unsafe fn sign_extend_byte(a: Self::I) -> Self::I;
    /// Begins sums of products, to be added to `total` (perhaps only at the end).
    unsafe fn start(total: Self::I) -> Self::Sum;
    /// `sum + w · x` in each lane: four weights from 0 to 127 times four numbers from -127 to 127,
    /// the same in each lane.
    unsafe fn dot(sum: Self::Sum, w: Self::I, x: i32) -> Self::Sum;
    /// As [`Simd::dot`] for weights from -128 to 127, each of which counts as
    /// [`Simd::SIGNED_BIAS`] more, where [`dots_by_lanes`] is used for them.
    unsafe fn dot_signed(sum: Self::Sum, w: Self::I, x: i32) -> Self::Sum;
    /// The sums, `total` (as given to [`Simd::start`]) among them.
    unsafe fn finish(sum: Self::Sum, total: Self::I) -> Self::I;
    /// Whole numbers to floats.
    unsafe fn to_float(a: Self::I) -> Self::F;
    unsafe fn splat_float(value: f32) -> Self::F;
    /// Sixteen floats.
    unsafe fn load(floats: &[f32; LANES]) -> Self::F;
    /// Sixteen half-precision numbers.
    unsafe fn load_half(halves: &[[u8; 2]; LANES]) -> Self::F;
    /// Sixteen numbers of the upper half of a float each.
    unsafe fn load_bfloat(halves: &[[u8; 2]; LANES]) -> Self::F;
    /// Sixteen signed bytes.
    unsafe fn load_bytes(bytes: &[u8; LANES]) -> Self::F;
    /// Four bytes for each lane.
    unsafe fn load_words(words: &[[u8; 4]; LANES]) -> Self::I;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The half-precision number at each of sixteen places.
    unsafe fn gather_half(rows: Rows, offset: usize) -> Self::F;
    /// The four bytes at each of sixteen places.
    unsafe fn gather_4(rows: Rows, offset: usize) -> Self::I;
    /// Sixteen bytes at each of sixteen places: bytes 0 to 3 in the first result, and so on.
    unsafe fn gather_16(rows: Rows, offset: usize) -> [Self::I; 4];
    unsafe fn store(a: Self::F, out: &mut [f32; LANES]);
    unsafe fn load_vector(from: *const f32) -> Self::Vector;
    unsafe fn store_vector(a: Self::Vector, to: *mut f32);
    /// As [`Simd::mul_add`].
    unsafe fn mul_add_vector(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Asks for the cache line at an address, which need not be one.
    unsafe fn prefetch(address: *const u8);

    /// Each lanes' sum, pairwise as [`sum_of_lanes`](super::ops::sum_of_lanes) has it.
    #[inline(always)]
    unsafe fn sums_of_lanes(four: &[[f32; LANES]; 4]) -> [f32; 4] {
        four.map(super::ops::sum_of_lanes)
    }

    /// The same number, of which the compiler knows nothing.
    #[inline(always)]
    unsafe fn hidden(n: usize) -> usize {
        n
    }

    /// Brings 32 columns of weights into the order in which [`Simd::dots`] takes them.
    #[inline(always)]
    unsafe fn arrange(numbers: [Self::I; 8]) -> [Self::I; 8] {
        numbers
    }

    /// Adds to `totals` the products of `R` rows of activations with columns `4 · from` to `4 · to`
    /// of `numbers`, which [`Simd::arrange`] has arranged or (`ARRANGED` is false) not. Row r's 32
    /// activations lie at `x + 32 · r`. `steps` calls of [`Simd::dot`] do not overflow a sum. Of signed
    /// numbers each counts as [`Simd::SIGNED_BIAS`] more.
    #[inline(always)]
    unsafe fn dots<const SIGNED: bool, const ARRANGED: bool, const R: usize>(
        totals: &mut [Self::I; R],
        numbers: &[Self::I; 8],
        [from, to]: [usize; 2],
        steps: usize,
        x: *const i8,
    ) {
        // SAFETY: the caller's machine has the instruction set, and the activations are there.
        unsafe { dots_by_lanes::<Self, SIGNED, R>(totals, numbers, [from, to], steps, x) }
    }
}

/// [`Simd::dots`] for numbers in their plain order.
#[inline(always)]
pub(super) unsafe fn dots_by_lanes<S: Simd, const SIGNED: bool, const R: usize>(
    totals: &mut [S::I; R],
    numbers: &[S::I; 8],
    [from, to]: [usize; 2],
    steps: usize,
    x: *const i8,
) {
    // The loops that matter are hidden from the compiler: unrolled, it would mix all their steps and
    // run out of registers. A single row needs few.
    // SAFETY: as the caller says.
    unsafe {
        if steps <= 2 {
            let end = if R > 1 { S::hidden(to) } else { to };
            let mut k = from;
            while k < end {
                let mut sums = starts::<S, R>(totals);
                for step in 0..steps {
                    dot_step::<S, SIGNED, R>(&mut sums, numbers, k + step, x);
                }
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = S::finish(sum, *total);
                }
                k += steps;
            }
            return;
        }
        for first in (from..to).step_by(steps) {
            let last = if first + steps < to {
                first + steps
            } else {
                to
            };
            let mut sums = starts::<S, R>(totals);
            let end = if R > 1 { S::hidden(last) } else { last };
            let mut k = first;
            while k < end {
                dot_step::<S, SIGNED, R>(&mut sums, numbers, k, x);
                dot_step::<S, SIGNED, R>(&mut sums, numbers, k + 1, x);
                k += 2;
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = S::finish(sum, *total);
            }
        }
    }
}

#[inline(always)]
unsafe fn starts<S: Simd, const R: usize>(totals: &[S::I; R]) -> [S::Sum; R] {
    // SAFETY: as the caller says.
    unsafe {
        let mut sums = [S::start(totals[0]); R];
        for (sum, total) in sums.iter_mut().zip(totals) {
            *sum = S::start(*total);
        }
        sums
    }
}

/// Adds the products of columns `4 · k` to `4 · k + 3`.
#[inline(always)]
unsafe fn dot_step<S: Simd, const SIGNED: bool, const R: usize>(
    sums: &mut [S::Sum; R],
    numbers: &[S::I; 8],
    k: usize,
    x: *const i8,
) {
    // SAFETY: `k` is below 8; the rest as the caller says.
    unsafe {
        let weights = *numbers.get_unchecked(k);
        for (r, sum) in sums.iter_mut().enumerate() {
            let x = x.add(32 * r + 4 * k).cast::<i32>().read_unaligned();
            *sum = match SIGNED {
                true => S::dot_signed(*sum, weights, x),
                false => S::dot(*sum, weights, x),
            };
        }
    }
}

//! What the kernels ask of an instruction set, and which ones this machine has.
//!
//! A kernel works on sixteen rows of a matrix at once, each in a lane of its own. So no sum crosses
//! lanes, a lane adds up its row's blocks in their order, and every instruction set gives the same
//! bits: whole numbers are exact, and products and sums of floats are rounded one by one (never
//! fused).

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
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
    /// AVX-512 F, BW, VL and VNNI: servers since 2019, Zen 4 and later.
    #[cfg(target_arch = "x86_64")]
    Avx512,
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
            [avx2.then_some(Level::Avx2), avx512.then_some(Level::Avx512)]
        };
        #[cfg(not(target_arch = "x86_64"))]
        let more = [];
        [Some(Level::Scalar)].into_iter().chain(more).flatten()
    }

    /// The best that this machine has.
    pub fn best() -> Level {
        Level::available().last().unwrap_or(Level::Scalar)
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

    /// What [`Simd::dot_signed`] adds to each weight, to be taken off again by the caller.
    const SIGNED_BIAS: i32;

    /// The same number in each lane.
    unsafe fn splat(value: i32) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Each lane shifted left.
    unsafe fn shl<const N: u32>(a: Self::I) -> Self::I;
    /// Each lane shifted right, zeros from above.
    unsafe fn shr<const N: u32>(a: Self::I) -> Self::I;
    /// As [`Simd::shr`], by a number that is not a constant.
    unsafe fn shr_by(a: Self::I, n: u32) -> Self::I;
    /// The lowest byte of each lane as a signed number.
    unsafe fn sign_extend_byte(a: Self::I) -> Self::I;
    /// `acc + w · x` in each lane: four weights from 0 to 127 times four numbers, the same in each
    /// lane.
    unsafe fn dot(acc: Self::I, w: Self::I, x: i32) -> Self::I;
    /// As [`Simd::dot`] for weights from -128 to 127, each of which counts as
    /// [`Simd::SIGNED_BIAS`] more.
    unsafe fn dot_signed(acc: Self::I, w: Self::I, x: i32) -> Self::I;
    /// Whole numbers to floats.
    unsafe fn to_float(a: Self::I) -> Self::F;
    unsafe fn splat_float(value: f32) -> Self::F;
    /// Sixteen floats.
    unsafe fn load(floats: &[f32; LANES]) -> Self::F;
    /// Sixteen half-precision numbers.
    unsafe fn load_half(halves: &[[u8; 2]; LANES]) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// The half-precision number at each of sixteen places.
    unsafe fn gather_half(rows: &[*const u8; LANES], offset: usize) -> Self::F;
    /// The four bytes at each of sixteen places.
    unsafe fn gather_4(rows: &[*const u8; LANES], offset: usize) -> Self::I;
    /// Sixteen bytes at each of sixteen places: bytes 0 to 3 in the first result, and so on.
    unsafe fn gather_16(rows: &[*const u8; LANES], offset: usize) -> [Self::I; 4];
    unsafe fn store(a: Self::F, out: &mut [f32; LANES]);
    /// Asks for the cache line at an address, which need not be one.
    unsafe fn prefetch(address: *const u8);
}

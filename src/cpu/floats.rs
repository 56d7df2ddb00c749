//! Products of matrices that are stored as floats (F32, F16, BF16), straight from the file.
//!
//! A sum has sixteen lanes: lane `i` adds up columns `i`, `i + 16`, …, each product fused with its
//! addition; then the lanes are added pairwise. Every instruction set, one row or many, keep this order.

use super::activations::Activations;
use super::ops::sum_of_lanes;
use super::simd::{LANES, Level, Scalar, Simd};
#[cfg(target_arch = "aarch64")]
use super::simd::{Neon, PLAIN};
use super::team::Disjoint;
use crate::model::Matrix;
use crate::quant::TensorType;

/// Some outputs of a matrix of floats.
pub(super) struct Floats<'a> {
    pub weight: &'a Matrix,
    /// The matrix's bytes, all rows.
    pub bytes: &'a [u8],
    pub input: &'a Activations<'a>,
    pub outputs: std::ops::Range<usize>,
    /// [n, rows of the matrix]
    pub y: &'a Disjoint<'a, f32>,
    /// Whether results are added to what is there.
    pub add: bool,
}

impl Floats<'_> {
    pub fn run(&self, level: Level) {
        match self.weight.ty {
            TensorType::F32 => self.run_type::<F32>(level),
            TensorType::F16 => self.run_type::<F16>(level),
            TensorType::BF16 => self.run_type::<BF16>(level),
            _ => {}
        }
    }

    fn run_type<T: Element>(&self, level: Level) {
        match level {
            // SAFETY: a `Level` is had only by a machine that has its instruction set.
            Level::Scalar => unsafe { all::<Scalar, T>(self) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 | Level::AvxVnni => unsafe { all_avx2::<T>(self) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { all_avx512::<T>(self) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above; no bytes are multiplied here.
            Level::Neon | Level::Dotprod | Level::I8mm => unsafe { all::<Neon<PLAIN>, T>(self) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn all_avx2<T: Element>(floats: &Floats) {
    // SAFETY: passed on.
    unsafe { all::<super::simd::Avx2<{ super::simd::PLAIN }>, T>(floats) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn all_avx512<T: Element>(floats: &Floats) {
    // SAFETY: passed on.
    unsafe { all::<super::simd::Avx512, T>(floats) }
}

/// How a weight is stored.
trait Element {
    const BYTES: usize;
    /// # Safety
    /// The instruction set of `S` is there, and sixteen elements are readable.
    unsafe fn load<S: Simd>(from: *const u8) -> S::F;
}

struct F32;
impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        // SAFETY: as the trait says; the file's floats need not be aligned.
        unsafe { S::load(&from.cast::<[f32; LANES]>().read_unaligned()) }
    }
}

struct F16;
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        // SAFETY: as the trait says.
        unsafe { S::load_half(&*from.cast()) }
    }
}

struct BF16;
impl Element for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::F {
        // SAFETY: as the trait says.
        unsafe { S::load_bfloat(&*from.cast()) }
    }
}

/// Two rows of activations with two of weights at a time, or a lone row with four: enough sums to keep
/// the adders busy, few enough for any machine's registers.
#[inline(always)]
unsafe fn all<S: Simd, T: Element>(floats: &Floats) {
    let n = floats.input.n;
    let end = floats.outputs.end;
    let mut row = 0;
    while row < n {
        let mut output = floats.outputs.start;
        // SAFETY: passed on; rows and outputs are inside.
        unsafe {
            if n - row >= 2 && !S::PLAIN {
                while output + 2 <= end {
                    block::<S, T, 2, 2>(floats, output, row);
                    output += 2;
                }
                if output < end {
                    block::<S, T, 1, 2>(floats, output, row);
                }
                row += 2;
            } else {
                while output + 4 <= end && !S::PLAIN {
                    block::<S, T, 4, 1>(floats, output, row);
                    output += 4;
                }
                while output < end {
                    block::<S, T, 1, 1>(floats, output, row);
                    output += 1;
                }
                row += 1;
            }
        }
    }
}

/// `M` outputs of `N` rows.
#[inline(always)]
unsafe fn block<S: Simd, T: Element, const M: usize, const N: usize>(
    floats: &Floats,
    output: usize,
    row: usize,
) {
    let columns = floats.weight.columns;
    let weights: [&[u8]; M] = std::array::from_fn(|m| {
        &floats.bytes[(output + m) * floats.weight.row_bytes..][..columns * T::BYTES]
    });
    let rows: [&[f32]; N] =
        std::array::from_fn(|i| &floats.input.x[(row + i) * columns..][..columns]);
    // SAFETY: the caller has the instruction set; every sixteen elements lie inside their rows.
    unsafe {
        let mut sums = [[S::splat_float(0.0); N]; M];
        for start in (0..columns / LANES).map(|chunk| chunk * LANES) {
            let mut x = [S::splat_float(0.0); N];
            for (x, row) in x.iter_mut().zip(&rows) {
                *x = S::load(&*row.as_ptr().add(start).cast());
            }
            for (sums, weights) in sums.iter_mut().zip(&weights) {
                let w = T::load::<S>(weights.as_ptr().add(start * T::BYTES));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = S::mul_add(w, x, *sum);
                }
            }
        }
        let rest = columns % LANES;
        if rest > 0 {
            // The last columns, filled up with zeros.
            let start = columns - rest;
            for (sums, weights) in sums.iter_mut().zip(&weights) {
                let mut w = [0u8; 4 * LANES];
                w[..rest * T::BYTES].copy_from_slice(&weights[start * T::BYTES..]);
                let w = T::load::<S>(w.as_ptr());
                for (sum, row) in sums.iter_mut().zip(&rows) {
                    let mut x = [0.0; LANES];
                    x[..rest].copy_from_slice(&row[start..]);
                    *sum = S::mul_add(w, S::load(&x), *sum);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                let mut lanes = [0.0; LANES];
                S::store(*sum, &mut lanes);
                // Element (row, output) belongs to the one task that has this output.
                let at = (row + i) * floats.weight.rows + output + m;
                let y = &mut floats.y.slice(at, 1)[0];
                let before = if floats.add { *y } else { 0.0 };
                *y = before + sum_of_lanes(lanes);
            }
        }
    }
}

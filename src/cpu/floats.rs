//! Products of matrices that are stored as floats (F32, F16, BF16): of few rows straight from the file, of many with weights
//! that were taken apart.
//!
//! A sum has sixteen lanes: lane `i` adds up columns `i`, `i + 16`, …, each product fused with its
//! addition; then the lanes are added pairwise. Every instruction set, one row or many, keep this order.

use super::activations::{Activations, GROUP};
use super::matmul::GROUP_BYTES;
use super::ops::sum_of_lanes;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512, PLAIN};
use super::simd::{LANES, Level, Scalar, Simd};
#[cfg(target_arch = "aarch64")]
use super::simd::{Neon, PLAIN};
use super::team::Disjoint;
use crate::model::Matrix;
use crate::quant::TensorType;
use std::hint::black_box;
use std::ops::Range;

/// Some outputs of a matrix of floats.
pub(super) struct Floats<'a> {
    pub weight: &'a Matrix,
    /// The matrix's bytes, all rows.
    pub bytes: &'a [u8],
    pub input: &'a Activations<'a>,
    pub outputs: Range<usize>,
    /// [`scratch_bytes`](super::matmul::scratch_bytes), from a multiple of 64 on.
    pub scratch: Disjoint<'a, u8>,
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
            Level::Scalar => unsafe { all::<Scalar, T>(self, None) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 | Level::AvxVnni => unsafe { all_avx2::<T>(self) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { all_avx512::<T>(self) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above; no bytes are multiplied here.
            Level::Neon | Level::Dotprod | Level::I8mm => unsafe {
                all::<Neon<PLAIN>, T>(self, Some(rows::<Neon<PLAIN>, 4>))
            },
        }
    }

    /// Writes, or adds, results of a row, from output `first` on.
    ///
    /// # Safety
    /// They belong to the caller's task.
    #[inline(never)]
    unsafe fn put(&self, row: usize, first: usize, values: &[f32]) {
        // SAFETY: as the caller says.
        let y = unsafe { self.y.slice(row * self.weight.rows + first, values.len()) };
        for (y, value) in y.iter_mut().zip(values) {
            *y = if self.add { *y + value } else { *value };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn all_avx2<T: Element>(floats: &Floats) {
    // SAFETY: passed on.
    unsafe { all::<Avx2<PLAIN>, T>(floats, Some(rows_avx2)) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_avx2(floats: &Floats, weights: *const f32, first: usize) {
    // SAFETY: passed on.
    unsafe { rows::<Avx2<PLAIN>, 3>(floats, weights, first) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn all_avx512<T: Element>(floats: &Floats) {
    // SAFETY: passed on.
    unsafe { all::<Avx512, T>(floats, Some(rows_avx512)) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn rows_avx512(floats: &Floats, weights: *const f32, first: usize) {
    // SAFETY: passed on.
    unsafe { rows::<Avx512, 4>(floats, weights, first) }
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

/// Outputs of many rows at a time.
const OUTPUTS: usize = 4;

/// Rows that each come as a lone one does.
const FEW_ROWS: usize = 4;

/// Bytes of a row of halves that is not long: what comes after the next [`OUTPUTS`] has room in a first cache.
const SHORT_ROW: usize = 2 << 10;

/// Sixteens of columns that are gone through at a time, so that what they take of the rows and of the weights stays in the
/// first cache while the lanes are added up, a register of them after another.
const SEGMENT: usize = 64;

/// The bytes of a row's last columns, which are fewer than sixteen, filled up with zeros.
///
/// # Safety
/// So many are readable.
#[inline(never)]
unsafe fn last_columns(from: *const u8, bytes: usize) -> [u8; 4 * LANES] {
    let mut last = [0; 4 * LANES];
    // SAFETY: as the caller says.
    last[..bytes].copy_from_slice(unsafe { std::slice::from_raw_parts(from, bytes) });
    last
}

/// Asks for weights after the next [`OUTPUTS`] rows, in the order of memory, as many bytes as sixteen columns of these
/// have. `rows` is where these begin, `chunk` which sixteen.
///
/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
unsafe fn ask_ahead<S: Simd, T: Element>(rows: *const u8, row_bytes: usize, chunk: usize) {
    let step = OUTPUTS * LANES * T::BYTES;
    let next = rows.wrapping_add(2 * OUTPUTS * row_bytes + chunk * step);
    for line in 0..step.div_ceil(64) {
        // SAFETY: as the caller says; what is asked for need not be there.
        unsafe { S::prefetch(next.wrapping_add(64 * line)) };
    }
}

/// Multiplies [`OUTPUTS`] outputs, taken apart, from one on, with all rows.
type ManyRows = unsafe fn(&Floats, *const f32, usize);

/// A lone row straight from the file; more by `many`, if there is such a thing, with weights that were taken apart.
#[inline(always)]
unsafe fn all<S: Simd, T: Element>(floats: &Floats, many: Option<ManyRows>) {
    let n = floats.input.n;
    let outputs = floats.outputs.clone();
    // SAFETY: passed on; rows and outputs are inside.
    unsafe {
        if let Some(many) = many
            && n > FEW_ROWS
        {
            for first in outputs.step_by(OUTPUTS) {
                many(floats, unpack::<S, T>(floats, first), first);
            }
            return;
        }
        // A lone row waits for memory, and a single stream is what processors foresee best. Short rows of halves make one,
        // four together, where others are asked for in the order of memory; long ones, and short ones of floats, if they
        // come one by one. Long rows of floats are best as four streams (measured: benches/RESULTS.md).
        let row_bytes = floats.weight.row_bytes;
        let ahead = T::BYTES < 4 && row_bytes <= SHORT_ROW;
        let long_floats = T::BYTES == 4 && row_bytes > 2 * SHORT_ROW;
        let together = !S::PLAIN && (n > 1 || ahead || long_floats);
        let mut output = outputs.start;
        while together && output + OUTPUTS <= outputs.end {
            for row in 0..n {
                match ahead {
                    true => block::<S, T, OUTPUTS, true>(floats, output, row),
                    false => block::<S, T, OUTPUTS, false>(floats, output, row),
                }
            }
            output += OUTPUTS;
        }
        while output < outputs.end {
            for row in 0..n {
                block::<S, T, 1, false>(floats, output, row);
            }
            output += 1;
        }
    }
}

/// The weights of [`OUTPUTS`] outputs from `first` on as floats: for each of the registers that are sixteen lanes, and
/// each sixteen columns, that register of every output. Beyond the last column zeros; of outputs that are not there, anything.
#[inline(always)]
unsafe fn unpack<S: Simd, T: Element>(floats: &Floats, first: usize) -> *const f32 {
    const { assert!(size_of::<f32>() * OUTPUTS * GROUP <= GROUP_BYTES) };
    let Floats { weight, bytes, .. } = *floats;
    let chunks = weight.columns.div_ceil(LANES);
    let room_bytes = size_of::<f32>() * OUTPUTS * LANES * chunks;
    let room = floats.scratch.pointer(0, room_bytes).cast::<f32>();
    let (whole, row_bytes) = (weight.columns / LANES, weight.row_bytes);
    let count = OUTPUTS.min(floats.outputs.end - first);
    let start = bytes[first * row_bytes..][..count * row_bytes].as_ptr();
    // SAFETY: the caller has the instruction set; sixteen elements at a time lie inside their rows, and this part of the
    // scratch is the task's own.
    unsafe {
        for chunk in 0..whole {
            ask_ahead::<S, T>(start, row_bytes, chunk);
            let to = room.add(chunk * OUTPUTS * S::VECTOR);
            let from = start.add(chunk * LANES * T::BYTES);
            for m in 0..count {
                put_weights::<S, T>(from.add(m * row_bytes), to.add(m * S::VECTOR), chunks);
            }
        }
        if whole < chunks {
            let to = room.add(whole * OUTPUTS * S::VECTOR);
            for m in 0..count {
                let from = start.add(m * row_bytes + whole * LANES * T::BYTES);
                let last = last_columns(from, weight.columns % LANES * T::BYTES);
                put_weights::<S, T>(last.as_ptr(), to.add(m * S::VECTOR), chunks);
            }
        }
    }
    room
}

/// Sixteen weights of an output, as [`unpack`] puts them.
#[inline(always)]
unsafe fn put_weights<S: Simd, T: Element>(from: *const u8, to: *mut f32, chunks: usize) {
    let mut lanes = [0.0; LANES];
    // SAFETY: as the caller says.
    unsafe {
        S::store(T::load::<S>(from), &mut lanes);
        for part in 0..LANES / S::VECTOR {
            let vector = S::load_vector(lanes.as_ptr().add(part * S::VECTOR));
            S::store_vector(vector, to.add(part * chunks * OUTPUTS * S::VECTOR));
        }
    }
}

/// [`OUTPUTS`] outputs from `first` on, of all rows, `R` or fewer at a time: as many as leave registers for their sums, for
/// themselves and for a weight, three of sixteen, four of 32.
#[inline(always)]
unsafe fn rows<S: Simd, const R: usize>(floats: &Floats, weights: *const f32, first: usize) {
    let n = floats.input.n;
    let mut row = 0;
    for left in (1..=n.div_ceil(R)).rev() {
        let some = (n - row).div_ceil(left);
        // SAFETY: passed on.
        unsafe {
            match some {
                2 => multiply::<S, 2>(floats, weights, first, row),
                3 if R > 3 => multiply::<S, 3>(floats, weights, first, row),
                _ => multiply::<S, R>(floats, weights, first, row),
            }
        }
        row += some;
    }
}

/// [`OUTPUTS`] outputs from `first` on, of rows `row` to `row + R`.
#[inline(always)]
unsafe fn multiply<S: Simd, const R: usize>(
    floats: &Floats,
    weights: *const f32,
    first: usize,
    row: usize,
) {
    let columns = floats.weight.columns;
    let x = floats.input.x[row * columns..][..R * columns].as_ptr();
    let mut sums = [[[0.0; LANES]; OUTPUTS]; R];
    // In memory, where each register goes once: left alone, the compiler makes several copies of them.
    let sums = black_box(&mut sums);
    let (whole, chunks) = (columns / LANES, columns.div_ceil(LANES));
    // SAFETY: the caller has the instruction set, and the weights are there; rows are inside.
    unsafe {
        let mut last = [[0; _]; R];
        if whole < chunks {
            for (i, last) in last.iter_mut().enumerate() {
                let from = x.add(i * columns + whole * LANES).cast();
                *last = last_columns(from, columns % LANES * size_of::<f32>());
            }
        }
        let mut start = 0;
        while start < chunks {
            let (end, x, stride) = match start < whole {
                true => (whole.min(start + SEGMENT), x.add(start * LANES), columns),
                false => (chunks, last.as_ptr().cast(), LANES),
            };
            add_products::<S, R>(sums, weights, chunks, start..end, x, stride);
            start = end;
        }
    }
    let count = OUTPUTS.min(floats.outputs.end - first);
    for (i, sums) in sums.iter().enumerate() {
        // SAFETY: the caller has the instruction set; these elements of the row belong to the one task that has these
        // outputs.
        unsafe { floats.put(row + i, first, &S::sums_of_lanes(sums)[..count]) };
    }
}

/// Adds the products of some of all `chunks` of sixteen columns; `x` is where the first of them is in the first row.
#[inline(always)]
unsafe fn add_products<S: Simd, const R: usize>(
    sums: &mut [[[f32; LANES]; OUTPUTS]; R],
    weights: *const f32,
    chunks: usize,
    some: Range<usize>,
    x: *const f32,
    row_stride: usize,
) {
    // SAFETY: as the caller says.
    unsafe {
        // Unrolled, it would mix the registers of all parts and run out of them.
        let parts = S::hidden(LANES / S::VECTOR);
        for part in 0..parts {
            let lane = part * S::VECTOR;
            let zero = S::load_vector([0.0; LANES].as_ptr());
            let mut registers = [[zero; OUTPUTS]; R];
            for (registers, sums) in registers.iter_mut().zip(sums.iter()) {
                for (register, lanes) in registers.iter_mut().zip(sums) {
                    *register = S::load_vector(lanes.as_ptr().add(lane));
                }
            }
            let mut w = weights.add((part * chunks + some.start) * OUTPUTS * S::VECTOR);
            let mut x = x.add(lane);
            for _ in some.clone() {
                let mut rows = [zero; R];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = S::load_vector(x.add(i * row_stride));
                }
                for m in 0..OUTPUTS {
                    let w = S::load_vector(w.add(m * S::VECTOR));
                    for (registers, row) in registers.iter_mut().zip(&rows) {
                        registers[m] = S::mul_add_vector(w, *row, registers[m]);
                    }
                }
                w = w.add(OUTPUTS * S::VECTOR);
                x = x.add(LANES);
            }
            for (registers, sums) in registers.iter().zip(sums.iter_mut()) {
                for (register, lanes) in registers.iter().zip(sums) {
                    S::store_vector(*register, lanes.as_mut_ptr().add(lane));
                }
            }
        }
    }
}

/// `M` outputs of a row, straight from the file; `AHEAD`, of [`OUTPUTS`]: while others are asked for.
#[inline(always)]
unsafe fn block<S: Simd, T: Element, const M: usize, const AHEAD: bool>(
    floats: &Floats,
    output: usize,
    row: usize,
) {
    let columns = floats.weight.columns;
    let weights: [&[u8]; M] = std::array::from_fn(|m| {
        &floats.bytes[(output + m) * floats.weight.row_bytes..][..columns * T::BYTES]
    });
    let x = &floats.input.x[row * columns..][..columns];
    // SAFETY: the caller has the instruction set; every sixteen elements lie inside their rows.
    unsafe {
        let mut sums = [S::splat_float(0.0); M];
        for chunk in 0..columns / LANES {
            let start = chunk * LANES;
            let x = S::load(&*x.as_ptr().add(start).cast());
            if AHEAD {
                ask_ahead::<S, T>(weights[0].as_ptr(), floats.weight.row_bytes, chunk);
            }
            for (sum, weights) in sums.iter_mut().zip(&weights) {
                let w = weights.as_ptr().add(start * T::BYTES);
                *sum = S::mul_add(T::load::<S>(w), x, *sum);
            }
        }
        let rest = columns % LANES;
        if rest > 0 {
            let start = columns - rest;
            let x = last_columns(x[start..].as_ptr().cast(), rest * size_of::<f32>());
            let x = F32::load::<S>(x.as_ptr());
            for (sum, weights) in sums.iter_mut().zip(&weights) {
                let w = last_columns(weights[start * T::BYTES..].as_ptr(), rest * T::BYTES);
                *sum = S::mul_add(T::load::<S>(w.as_ptr()), x, *sum);
            }
        }
        let mut lanes = [[0.0; LANES]; M];
        for (lanes, sum) in lanes.iter_mut().zip(sums) {
            S::store(sum, lanes);
        }
        match lanes.first_chunk() {
            Some(four) => floats.put(row, output, &S::sums_of_lanes(four)),
            None => floats.put(row, output, &lanes.map(sum_of_lanes)),
        }
    }
}

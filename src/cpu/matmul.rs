//! Matrix products `y = W x`. Where the weights are quantized the activations are too, to a byte each,
//! once for all matrices that take them.
//!
//! The sum of a row is taken group by group (32 columns, in order):
//! `sum = fma(whole · scale_w, scale_x, sum)`, then, where the format has minimums,
//! `sum = fma(minimum, scale_x · sum_x, sum)`, with `whole` the exact sum of the products of whole
//! numbers and `fma` rounded once.
//! Every instruction set, one row or many, and any cut of the work among threads keep this order, so
//! all give the same bits.

use super::ops;
use super::simd::{LANES, Level};
use super::team::{Disjoint, Team};
use super::tiles::Tiles;
use crate::model::{Linear, Matrix};
use crate::quant::{TensorType, dequantize_into};

/// Columns that share a scale when activations are quantized.
pub(crate) const GROUP: usize = 32;

/// Rows of activations, and the same as bytes.
pub(crate) struct Activations<'a> {
    /// Columns of each row.
    pub columns: usize,
    /// [n, columns]
    pub x: &'a [f32],
    /// [n, columns] whole numbers from -127 to 127.
    pub bytes: &'a [i8],
    /// [n, columns / 32] what a whole number is worth.
    pub scales: &'a [f32],
    /// [n, columns / 32] sums of 32 whole numbers each.
    pub sums: &'a [i32],
    /// [n, columns / 16] sums of sixteen whole numbers each.
    pub half_sums: &'a [i32],
}

/// Where quantized activations are kept.
pub(crate) struct ByteRows<'a> {
    pub bytes: &'a mut [i8],
    pub scales: &'a mut [f32],
    pub sums: &'a mut [i32],
    pub half_sums: &'a mut [i32],
}

impl ByteRows<'_> {
    /// `n` rows of `columns` columns as activations; quantized if one of `weights` is.
    pub fn activations<'a, 'w>(
        &'a mut self,
        level: Level,
        x: &'a [f32],
        columns: usize,
        mut weights: impl Iterator<Item = &'w Matrix>,
    ) -> Activations<'a> {
        if weights.any(|w| !is_float(w.ty)) {
            let rows = x.chunks_exact(columns).enumerate();
            let groups = columns / GROUP;
            for (r, x) in rows {
                let bytes = &mut self.bytes[r * columns..][..columns];
                let scales = &mut self.scales[r * groups..][..groups];
                let sums = &mut self.sums[r * groups..][..groups];
                let half_sums = &mut self.half_sums[r * 2 * groups..][..2 * groups];
                quantize(level, x, bytes, scales, sums, half_sums);
            }
        }
        Activations {
            columns,
            x,
            bytes: self.bytes,
            scales: self.scales,
            sums: self.sums,
            half_sums: self.half_sums,
        }
    }
}

fn is_float(ty: TensorType) -> bool {
    matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16)
}

super::levels! {
    /// One row to bytes: in each group the largest magnitude becomes 127. A group with a value that
    /// is not finite gets a scale that is not a number, so that it shows in every result.
    fn quantize(x: &[f32], bytes: &mut [i8], scales: &mut [f32], sums: &mut [i32], half_sums: &mut [i32]) {
        let groups = x.as_chunks::<GROUP>().0.iter().zip(bytes.as_chunks_mut::<GROUP>().0);
        for (i, (x, bytes)) in groups.enumerate() {
            let mut largest = 0.0f32;
            let mut finite = true;
            for x in x {
                largest = if x.abs() > largest { x.abs() } else { largest };
                finite &= x.abs() < f32::INFINITY;
            }
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            // The inverse of a tiny number may be infinite; such a group is as good as zero.
            let inverse = if inverse < f32::INFINITY { inverse } else { 0.0 };
            let mut halves = [0i32; 2];
            for (k, (x, byte)) in x.iter().zip(bytes.iter_mut()).enumerate() {
                // Adding and taking off 1.5 · 2^23 rounds to the nearest whole number, ties to even.
                const ROUND: f32 = 12_582_912.0;
                let rounded = x * inverse + ROUND;
                let whole = rounded.to_bits() as i32 - ROUND.to_bits() as i32;
                let whole = if finite { whole } else { 0 };
                *byte = whole as i8;
                halves[k / 16] += whole;
            }
            scales[i] = if finite { largest / 127.0 } else { f32::NAN };
            sums[i] = halves[0] + halves[1];
            half_sums[2 * i..][..2].copy_from_slice(&halves);
        }
    }
}

/// A matrix and where its results go.
pub(crate) struct Product<'a> {
    pub linear: &'a Linear,
    /// [n, outputs]
    pub y: &'a mut [f32],
}

/// Bytes of weights that one task reads: long enough that taking it costs nothing beside it, short
/// enough that threads end together.
const TASK_BYTES: usize = 32 << 10;

/// Bytes of scratch memory that a thread needs for matrices of up to `columns` columns.
pub(crate) const fn scratch_bytes(columns: usize) -> usize {
    let tile = columns.div_ceil(GROUP) * GROUP_BYTES;
    let row = columns * size_of::<f32>();
    let most = if tile > row { tile } else { row };
    most.next_multiple_of(64)
}

/// The most that a group of sixteen rows takes when it is taken apart.
pub(super) const GROUP_BYTES: usize = 10 * 64;

/// Computes several products of the same `n` rows of activations, spread over the team. `scratch` has
/// [`scratch_bytes`] for each thread and begins at a multiple of 64.
pub(crate) fn products(
    team: &mut Team,
    level: Level,
    file: &[u8],
    input: &Activations,
    n: usize,
    products: &mut [Product],
    scratch: &mut [u8],
) {
    let stride = scratch.len() / team.threads() / 64 * 64;
    let scratch = Disjoint::new(scratch);
    // At most three matrices take the same input.
    let mut works: [Option<Work>; 3] = [const { None }; 3];
    let mut tasks = 0;
    for (work, product) in works.iter_mut().zip(products) {
        let weight = &product.linear.weight;
        let tile = weight.row_bytes * LANES;
        let outputs = LANES * (TASK_BYTES / tile).max(1);
        *work = Some(Work {
            linear: product.linear,
            y: Disjoint::new(&mut product.y[..n * weight.rows]),
            outputs,
            first_task: tasks,
        });
        tasks += weight.rows.div_ceil(outputs);
    }
    team.run(tasks, &|task, thread| {
        let mut mine = works.iter().flatten().rev();
        let Some(work) = mine.find(|w| w.first_task <= task) else {
            return;
        };
        // SAFETY: each thread has its own stretch of the scratch.
        let scratch = unsafe { scratch.slice(thread * stride, stride) };
        let first = (task - work.first_task) * work.outputs;
        let last = (first + work.outputs).min(work.linear.weight.rows);
        work.run(level, file, input, n, first..last, scratch);
    });
}

struct Work<'a> {
    linear: &'a Linear,
    y: Disjoint<'a, f32>,
    /// Outputs of a task.
    outputs: usize,
    first_task: usize,
}

impl Work<'_> {
    fn run(
        &self,
        level: Level,
        file: &[u8],
        input: &Activations,
        n: usize,
        outputs: std::ops::Range<usize>,
        scratch: &mut [u8],
    ) {
        let weight = &self.linear.weight;
        let all = weight.rows;
        if is_float(weight.ty) {
            // SAFETY: any bytes are floats.
            let row = unsafe { scratch.align_to_mut::<f32>() }.1;
            let row = &mut row[..weight.columns];
            for output in outputs.clone() {
                dequantize_into(weight.ty, weight.row(file, output), row);
                for (r, x) in input.x.chunks_exact(weight.columns).take(n).enumerate() {
                    // SAFETY: element (r, output) belongs to the one task that has this output.
                    unsafe { self.y.slice(r * all + output, 1)[0] = ops::dot(level, row, x) };
                }
            }
        } else {
            let job = Tiles {
                weight,
                bytes: &file[weight.offset..][..weight.rows * weight.row_bytes],
                input,
                n,
                outputs: outputs.clone(),
                scratch,
                y: &self.y,
            };
            job.run(level);
        }
        if let Some(bias) = &self.linear.bias {
            let values = bias.values(file).enumerate().skip(outputs.start);
            for (output, value) in values.take(outputs.len()) {
                for r in 0..n {
                    // SAFETY: as above.
                    unsafe { self.y.slice(r * all + output, 1)[0] += value };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::thread::ThreadParams;
    use crate::quant::dequantize_row;
    use crate::quant::tiles::{TILE_ROWS, interleave};

    const QUANTIZED: [TensorType; 8] = [
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q8_0,
        TensorType::Q4_K,
        TensorType::Q5_K,
        TensorType::Q6_K,
    ];

    fn random(state: &mut u64) -> u64 {
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn unit(state: &mut u64) -> f32 {
        (random(state) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// A matrix of any bits but for its scales, which are set to small numbers.
    fn matrix(ty: TensorType, rows: usize, columns: usize, state: &mut u64) -> (Vec<u8>, Matrix) {
        let row_bytes = ty.row_bytes(columns).unwrap();
        let mut file: Vec<u8> = (0..rows * row_bytes)
            .map(|_| (random(state) >> 56) as u8)
            .collect();
        let halves: &[usize] = match ty {
            TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4_K | TensorType::Q5_K => &[0, 2],
            TensorType::Q6_K => &[208],
            _ => &[0],
        };
        for block in file.chunks_exact_mut(ty.block_bytes()) {
            for at in halves {
                let scale = half::f16::from_f32(unit(state) / 16.0);
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        let matrix = Matrix {
            ty,
            rows,
            columns,
            offset: 0,
            row_bytes,
            tiled: false,
        };
        (file, matrix)
    }

    struct Case {
        file: Vec<u8>,
        linear: Linear,
        x: Vec<f32>,
        n: usize,
    }

    impl Case {
        /// The same matrix in tiles.
        fn tiled(&self) -> Self {
            let mut weight = self.linear.weight;
            let mut file = self.file.clone();
            let tile = TILE_ROWS * weight.row_bytes;
            let tiles = file.chunks_exact_mut(tile).zip(self.file.chunks_exact(tile));
            tiles.for_each(|(to, from)| interleave(weight.ty, from, to));
            weight.tiled = true;
            Case {
                file,
                linear: Linear { weight, bias: None },
                x: self.x.clone(),
                n: self.n,
            }
        }

        fn new(ty: TensorType, rows: usize, columns: usize, n: usize, state: &mut u64) -> Self {
            let (file, weight) = matrix(ty, rows, columns, state);
            Case {
                file,
                linear: Linear { weight, bias: None },
                x: (0..n * columns).map(|_| unit(state) * 3.0).collect(),
                n,
            }
        }

        /// The result, and the activations' scales and bytes.
        fn run(&self, level: Level, n: usize, threads: usize) -> (Vec<f32>, Vec<f32>, Vec<i8>) {
            let (columns, rows) = (self.linear.weight.columns, self.linear.weight.rows);
            let mut bytes = vec![0; n * columns];
            let mut scales = vec![0.0; n * columns / GROUP];
            let mut sums = vec![0; n * columns / GROUP];
            let mut half_sums = vec![0; n * columns / 16];
            let mut kept = ByteRows {
                bytes: &mut bytes,
                scales: &mut scales,
                sums: &mut sums,
                half_sums: &mut half_sums,
            };
            let input = kept.activations(
                level,
                &self.x[..n * columns],
                columns,
                [&self.linear.weight].into_iter(),
            );
            #[repr(align(64))]
            struct Room([u8; 4096]);
            let mut room = Room([0; 4096]);
            let mut team = Team::new(threads, &ThreadParams::default(), &mut room.0).unwrap();
            let mut scratch = vec![0u8; threads * scratch_bytes(columns) + 64];
            let start = scratch.as_ptr().align_offset(64);
            let mut y = vec![f32::NAN; n * rows];
            let mut all = [Product {
                linear: &self.linear,
                y: &mut y,
            }];
            let end = start + threads * scratch_bytes(columns);
            products(
                &mut team,
                level,
                &self.file,
                &input,
                n,
                &mut all,
                &mut scratch[start..end],
            );
            (y, scales, bytes)
        }
    }

    /// What the module's comment says, in the plainest words.
    fn oracle(case: &Case, scales: &[f32], bytes: &[i8]) -> Vec<f64> {
        let weight = &case.linear.weight;
        let mut row = vec![0.0; weight.columns];
        let mut y = Vec::new();
        for r in 0..case.n {
            for output in 0..weight.rows {
                dequantize_row(weight.ty, weight.row(&case.file, output), &mut row).unwrap();
                let x = |c: usize| {
                    let at = r * weight.columns + c;
                    f64::from(bytes[at]) * f64::from(scales[at / GROUP])
                };
                y.push((0..weight.columns).map(|c| f64::from(row[c]) * x(c)).sum());
            }
        }
        y
    }

    #[test]
    fn every_level_equals_the_oracle_and_each_other_bit_by_bit() {
        let levels: Vec<Level> = Level::available().collect();
        println!("kernels tested: {levels:?}");
        let mut state = 7;
        for ty in QUANTIZED {
            for (rows, columns, n) in [(1, 256, 1), (16, 512, 1), (37, 768, 3), (50, 256, 19)] {
                let case = Case::new(ty, rows, columns, n, &mut state);
                let (plain, scales, bytes) = case.run(Level::Scalar, n, 1);
                let expected = oracle(&case, &scales, &bytes);
                // The oracle is exact but for its weights, each rounded once (2^-24 of it); the
                // kernel rounds a few times for each group. Terms are below 32 · 8 in these cases.
                let bound = 1e-6 * 256.0 * (columns / GROUP) as f64;
                for (y, e) in plain.iter().zip(&expected) {
                    assert!((f64::from(*y) - e).abs() < bound, "{ty}: {y} and {e}");
                }
                let size = expected.iter().map(|e| e.abs()).fold(0.0, f64::max);
                assert!(
                    size > 100.0 * bound,
                    "{ty}: the bound is too wide to mean anything"
                );
                let tiled = case.tiled();
                for (level, case) in levels.iter().flat_map(|l| [(l, &case), (l, &tiled)]) {
                    for threads in [1, 2] {
                        let (y, s, b) = case.run(*level, n, threads);
                        assert!(s == scales && b == bytes, "{ty} {level:?}");
                        let same = y
                            .iter()
                            .zip(&plain)
                            .all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{ty} {level:?} {rows}x{columns} n {n}");
                    }
                    // A row alone.
                    let (first, ..) = case.run(*level, 1, 1);
                    assert!(first == plain[..rows], "{ty} {level:?}: alone");
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_show() {
        let mut state = 3;
        for level in Level::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut case = Case::new(TensorType::Q8_0, 5, 64, 1, &mut state);
                case.x[40] = bad;
                let (y, ..) = case.run(level, 1, 1);
                assert!(y.iter().all(|y| y.is_nan()), "{level:?} {bad}");
            }
            for tiny in [0.0, 1e-45, 1e-38] {
                let mut case = Case::new(TensorType::Q8_0, 5, 64, 1, &mut state);
                case.x.fill(tiny);
                let (y, ..) = case.run(level, 1, 1);
                assert!(y.iter().all(|y| y.abs() < 1e-30), "{level:?} {tiny}");
            }
        }
    }
}

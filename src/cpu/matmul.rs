//! Matrix products `y = W x`. Where the weights are quantized the activations are too, to a byte each,
//! once for all matrices that take them.
//!
//! The sum of a row is taken group by group (32 columns, of Q6_K 16, in order):
//! `sum = fma(whole · scale_w, scale_x, sum)`, then, where the format has minimums,
//! `sum = fma(minimum, scale_x · sum_x, sum)`, with `whole` the exact sum of the products of whole
//! numbers and `fma` rounded once.
//! Every instruction set, one row or many, and any cut of the work among threads keep this order, so
//! all give the same bits. Matrices of floats have an order of their own (`floats.rs`).

use super::activations::{Activations, GROUP, prepare};
use super::floats::Floats;
use super::simd::{LANES, Level};
use super::team::{Disjoint, Team};
use super::tiles::Tiles;
use crate::model::Linear;
use crate::quant::TensorType;

/// Whether a matrix takes activations as they are, not as bytes.
fn is_float(ty: TensorType) -> bool {
    matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16)
}

/// A matrix and where its results go.
pub(crate) struct Product<'a> {
    linear: &'a Linear,
    y: &'a mut [f32],
    add: bool,
}

impl<'a> Product<'a> {
    /// `y = W x`; `y` is [n, outputs].
    pub fn new(linear: &'a Linear, y: &'a mut [f32]) -> Self {
        Product {
            linear,
            y,
            add: false,
        }
    }

    /// `y += W x`.
    pub fn added(linear: &'a Linear, y: &'a mut [f32]) -> Self {
        Product {
            linear,
            y,
            add: true,
        }
    }
}

/// Bytes of weights that one task reads: long enough that taking it costs nothing beside it, short
/// enough that threads end together.
const TASK_BYTES: usize = 32 << 10;

/// Bytes of scratch memory that a thread needs for matrices of up to `columns` columns.
pub(crate) const fn scratch_bytes(columns: usize) -> usize {
    (columns.div_ceil(GROUP) * GROUP_BYTES).next_multiple_of(64)
}

/// The most that a group of sixteen rows takes when it is taken apart, or of some rows of floats.
pub(super) const GROUP_BYTES: usize = 10 * 64;

/// What products are made with.
pub(crate) struct MatMul<'a> {
    pub team: &'a mut Team,
    pub level: Level,
    /// The model's file.
    pub file: &'a [u8],
    /// Room for activations as bytes ([`panel_words`](super::activations::panel_words)).
    pub panels: &'a mut [u32],
    /// [`scratch_bytes`] for each thread, from a multiple of 64 on.
    pub scratch: &'a mut [u8],
}

impl MatMul<'_> {
    /// Has `each(row, x)` write (or change) each row of `x` [n, columns], then multiplies them with one
    /// to three matrices of so many columns. Answers the rows as the products took them.
    pub fn run<'b>(
        &'b mut self,
        n: usize,
        x: &'b mut [f32],
        each: &(dyn Fn(usize, &mut [f32]) + Sync),
        products: &mut [Product],
    ) -> Activations<'b> {
        let columns = products[0].linear.weight.columns;
        let quantized = products.iter().any(|p| !is_float(p.linear.weight.ty));
        let panels = if quantized {
            &mut *self.panels
        } else {
            &mut []
        };
        let input = prepare(self.team, self.level, [n, columns], x, panels, each);
        multiply(
            self.team,
            self.level,
            self.file,
            &input,
            products,
            self.scratch,
        );
        input
    }
}

/// Computes the products, spread over the team.
fn multiply(
    team: &mut Team,
    level: Level,
    file: &[u8],
    input: &Activations,
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
            y: Disjoint::new(&mut product.y[..input.n * weight.rows]),
            add: product.add,
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
        work.run(level, file, input, first..last, scratch);
    });
}

struct Work<'a> {
    linear: &'a Linear,
    y: Disjoint<'a, f32>,
    add: bool,
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
        outputs: std::ops::Range<usize>,
        scratch: &mut [u8],
    ) {
        let weight = &self.linear.weight;
        let all = weight.rows;
        let bytes = &file[weight.offset..][..weight.rows * weight.row_bytes];
        if is_float(weight.ty) {
            let job = Floats {
                weight,
                bytes,
                input,
                outputs: outputs.clone(),
                scratch: Disjoint::new(scratch),
                y: &self.y,
                add: self.add,
            };
            job.run(level);
        } else {
            let job = Tiles {
                weight,
                bytes,
                input,
                outputs: outputs.clone(),
                scratch: Disjoint::new(scratch),
                y: &self.y,
                add: self.add,
            };
            job.run(level);
        }
        if let Some(bias) = &self.linear.bias {
            let values = bias.values(file).enumerate().skip(outputs.start);
            for (output, value) in values.take(outputs.len()) {
                for r in 0..input.n {
                    // SAFETY: as above.
                    unsafe { self.y.slice(r * all + output, 1)[0] += value };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::activations::{GroupRow, panel_words, width};
    use super::*;
    use crate::model::Matrix;
    use crate::quant::quantize_row;
    use crate::quant::tiles::{TILE_ROWS, interleave, is_tiled};

    const TYPES: [TensorType; 11] = [
        TensorType::F32,
        TensorType::F16,
        TensorType::BF16,
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

    /// A matrix of any bits but for its scales, which are set to small numbers; or of floats.
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
        if is_float(ty) {
            for row in file.chunks_exact_mut(row_bytes) {
                let values: Vec<f32> = (0..columns).map(|_| 16.0 * unit(state)).collect();
                quantize_row(ty, &values, row).unwrap();
            }
        }
        let blocks = file.chunks_exact_mut(ty.block_bytes());
        for block in blocks.filter(|_| !is_float(ty)) {
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
            weight.tiled = is_tiled(weight.ty);
            let tile = TILE_ROWS * weight.row_bytes;
            let tiles = file.chunks_exact_mut(tile);
            for (to, from) in tiles.zip(self.file.chunks_exact(tile)) {
                if weight.tiled {
                    interleave(weight.ty, from, to);
                }
            }
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

        /// The result, and the activations that went into it.
        fn run(&self, level: Level, n: usize, threads: usize) -> (Vec<f32>, Vec<f64>) {
            let (columns, rows) = (self.linear.weight.columns, self.linear.weight.rows);
            // Slots that no row fills may hold anything.
            let mut panels = vec![0x5555_5555; panel_words(n, columns)];
            let mut x = vec![0.0; n * columns];
            let mut scratch = vec![0u8; threads * scratch_bytes(columns) + 64];
            let start = scratch.as_ptr().align_offset(64);
            let mut matmul = MatMul {
                team: &mut Team::of(threads),
                level,
                file: &self.file,
                panels: &mut panels,
                scratch: &mut scratch[start..start + threads * scratch_bytes(columns)],
            };
            let each = |row: usize, x: &mut [f32]| {
                x.copy_from_slice(&self.x[row * columns..][..columns]);
            };
            let mut y = vec![f32::NAN; n * rows];
            let mut product = [Product::new(&self.linear, &mut y)];
            let taken = taken(level, &matmul.run(n, &mut x, &each, &mut product));
            (y, taken)
        }
    }

    /// The activations as a product takes them: floats, or what bytes are worth.
    fn taken(level: Level, input: &Activations) -> Vec<f64> {
        if input.panels.is_empty() {
            return input.x.iter().map(|x| f64::from(*x)).collect();
        }
        let mut all = Vec::new();
        for row in 0..input.n {
            for group in 0..input.columns / GROUP {
                let group = GroupRow::of(input, width(level, input.n), row, group);
                let worth = |byte: &u8| f64::from(*byte as i8) * f64::from(group.scale);
                all.extend(group.bytes.iter().map(worth));
            }
        }
        all
    }

    /// What the module's comment says, in the plainest words.
    fn oracle(case: &Case, x: &[f64]) -> Vec<f64> {
        let weight = &case.linear.weight;
        let mut row = vec![0.0; weight.columns];
        let mut y = Vec::new();
        for x in x.chunks_exact(weight.columns) {
            for output in 0..weight.rows {
                weight.decode_row(&case.file, output, &mut row);
                y.push(row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum());
            }
        }
        y
    }

    #[test]
    fn every_level_equals_the_oracle_and_each_other_bit_by_bit() {
        let levels: Vec<Level> = Level::available().collect();
        println!("kernels tested: {levels:?}");
        #[cfg(target_arch = "x86_64")]
        if levels.contains(&Level::AvxVnni) && !crate::cpu::simd::has_avx_vnni() {
            println!("AvxVnni in AVX-512's spelling");
        }
        let mut state = 7;
        for ty in TYPES {
            let sizes = [
                (1, 256, 1),
                (16, 512, 1),
                (37, 768, 3),
                (50, 256, 19),
                (16, 256, 9),
                (7, 90, 5),
                // Of floats, more columns than are gone through at a time (floats.rs), and rows that the kernels cannot
                // share evenly.
                (9, 1125, 11),
                (5, 1100, 8),
                (6, 1100, 3),
            ];
            for (rows, columns, n) in sizes {
                if ty.row_bytes(columns).is_none() {
                    continue;
                }
                let case = Case::new(ty, rows, columns, n, &mut state);
                let (plain, taken) = case.run(Level::Scalar, n, 1);
                let expected = oracle(&case, &taken);
                // The oracle is exact but for its weights, each rounded once (2^-24 of it); the
                // kernel rounds a few times for each group. Terms are below 32 · 8 in these cases.
                let bound = 1e-6 * 256.0 * (columns / GROUP) as f64;
                for (y, e) in plain.iter().zip(&expected) {
                    assert!(
                        (f64::from(*y) - e).abs() < bound,
                        "{ty} {rows}x{columns} n {n}: {y} and {e}"
                    );
                }
                let size = expected.iter().map(|e| e.abs()).fold(0.0, f64::max);
                assert!(
                    size > 100.0 * bound,
                    "{ty}: the bound is too wide to mean anything"
                );
                let tiled = case.tiled();
                for (level, case) in levels.iter().flat_map(|l| [(l, &case), (l, &tiled)]) {
                    for threads in [1, 2] {
                        let (y, t) = case.run(*level, n, threads);
                        assert!(t == taken, "{ty} {level:?}");
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

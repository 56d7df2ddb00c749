//! Matrix products `y = W x`. Where the weights are quantized the activations are too, to a byte each,
//! once for all matrices that take them.
//!
//! The sum of a row is taken group by group (32 columns, in order):
//! `sum += (whole · scale_w) · scale_x`, then, where the format has minimums,
//! `sum += minimum · (scale_x · sum_x)`, with `whole` the exact sum of the products of whole numbers.
//! Every instruction set, one row or many, and any cut of the work among threads keep this order, so
//! all give the same bits.

use super::blocks::{Format, Group, Place, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use super::ops;
use super::simd::{LANES, Level, Scalar, Simd};
use super::team::{Disjoint, Team};
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
    /// [n, columns / 16] sums of sixteen whole numbers each.
    pub sums: &'a [i32],
}

/// Where quantized activations are kept.
pub(crate) struct ByteRows<'a> {
    pub bytes: &'a mut [i8],
    pub scales: &'a mut [f32],
    pub sums: &'a mut [i32],
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
                let sums = &mut self.sums[r * 2 * groups..][..2 * groups];
                quantize(level, x, bytes, scales, sums);
            }
        }
        Activations {
            columns,
            x,
            bytes: self.bytes,
            scales: self.scales,
            sums: self.sums,
        }
    }
}

fn is_float(ty: TensorType) -> bool {
    matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16)
}

super::levels! {
    /// One row to bytes: in each group the largest magnitude becomes 127. A group with a value that
    /// is not finite gets a scale that is not a number, so that it shows in every result.
    fn quantize(x: &[f32], bytes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
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
            sums[2 * i..][..2].copy_from_slice(&halves);
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

/// The most that a [`Group`] takes.
const GROUP_BYTES: usize = 12 * 64;

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

/// Some outputs of a quantized matrix, sixteen at a time.
struct Tiles<'a> {
    weight: &'a Matrix,
    /// The matrix's bytes, all rows.
    bytes: &'a [u8],
    input: &'a Activations<'a>,
    n: usize,
    outputs: std::ops::Range<usize>,
    scratch: &'a mut [u8],
    /// [n, rows of the matrix]
    y: &'a Disjoint<'a, f32>,
}

impl Tiles<'_> {
    fn run(self, level: Level) {
        // The kernels' unchecked reads rest on these.
        let (groups, columns) = (self.weight.columns / GROUP, self.weight.columns);
        assert!(
            columns == self.input.columns && columns.is_multiple_of(self.weight.ty.block_len())
        );
        assert!(self.outputs.end <= self.weight.rows && !self.outputs.is_empty());
        assert!(self.bytes.len() >= self.weight.rows * self.weight.row_bytes);
        assert!(self.input.bytes.len() >= self.n * columns);
        assert!(self.input.scales.len() >= self.n * groups);
        assert!(self.input.sums.len() >= self.n * 2 * groups);
        assert!(self.scratch.len() >= groups * GROUP_BYTES);
        match self.weight.ty {
            TensorType::Q4_0 => self.run_format::<Q4_0>(level),
            TensorType::Q4_1 => self.run_format::<Q4_1>(level),
            TensorType::Q5_0 => self.run_format::<Q5_0>(level),
            TensorType::Q5_1 => self.run_format::<Q5_1>(level),
            TensorType::Q8_0 => self.run_format::<Q8_0>(level),
            TensorType::Q4_K => self.run_format::<Q4K>(level),
            TensorType::Q5_K => self.run_format::<Q5K>(level),
            TensorType::Q6_K => self.run_format::<Q6K>(level),
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => {}
        }
    }

    fn run_format<T: Format>(self, level: Level) {
        debug_assert_eq!(T::BYTES, self.weight.ty.block_bytes());
        match level {
            // SAFETY: a `Level` is had only by a machine that has its instruction set; the sizes
            // were checked in `run`.
            Level::Scalar => unsafe { tiles_scalar::<T>(self) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { tiles_avx2::<T>(self) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { tiles_avx512::<T>(self) },
        }
    }
}

unsafe fn tiles_scalar<T: Format>(tiles: Tiles) {
    // SAFETY: passed on.
    unsafe { run_tiles::<Scalar, T, 1>(tiles) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tiles_avx2<T: Format>(tiles: Tiles) {
    // SAFETY: passed on.
    unsafe { run_tiles::<super::simd::Avx2, T, 4>(tiles) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tiles_avx512<T: Format>(tiles: Tiles) {
    // SAFETY: passed on.
    unsafe { run_tiles::<super::simd::Avx512, T, 8>(tiles) }
}

/// All tiles of the job; `R` rows of activations at a time share what is taken out of a block.
#[inline(always)]
unsafe fn run_tiles<S: Simd, T: Format, const R: usize>(tiles: Tiles) {
    let weight = tiles.weight;
    let blocks = weight.row_bytes / T::BYTES;
    let unpacked = tiles.scratch.as_mut_ptr().cast::<Group<S>>();
    const { assert!(size_of::<Group<S>>() <= GROUP_BYTES && align_of::<Group<S>>() <= 64) };
    let mut first = tiles.outputs.start;
    while first < tiles.outputs.end {
        let last = tiles.outputs.end - 1;
        // Lanes beyond the last row do its work again, for nobody.
        let rows: [*const u8; LANES] = std::array::from_fn(|lane| {
            let row = (first + lane).min(last);
            // SAFETY: inside the matrix's bytes.
            unsafe { tiles.bytes.as_ptr().add(row * weight.row_bytes) }
        });
        let out = Out {
            first,
            count: (last + 1 - first).min(LANES),
            all: weight.rows,
            y: tiles.y,
        };
        let input = tiles.input;
        // SAFETY: the rows are whole, and the activations have `n` rows, as `run` has checked.
        unsafe {
            if tiles.n == 1 {
                sum_packed::<S, T>(&rows, weight.row_bytes, input, &out);
            } else {
                unpack::<S, T>(&rows, blocks, unpacked);
                let mut r = 0;
                while r + R <= tiles.n {
                    sum_unpacked::<S, T, R>(unpacked, blocks, input, r, &out);
                    r += R;
                }
                while r < tiles.n {
                    sum_unpacked::<S, T, 1>(unpacked, blocks, input, r, &out);
                    r += 1;
                }
            }
        }
        first += LANES;
    }
}

/// Where a tile's results go.
struct Out<'a> {
    first: usize,
    count: usize,
    /// Outputs of the matrix.
    all: usize,
    y: &'a Disjoint<'a, f32>,
}

impl Out<'_> {
    #[inline(always)]
    unsafe fn put<S: Simd>(&self, r: usize, sum: S::F) {
        let mut lanes = [0.0; LANES];
        // SAFETY: the caller has the instruction set.
        unsafe { S::store(sum, &mut lanes) };
        // SAFETY: these outputs of every row belong to this task.
        let y = unsafe { self.y.slice(r * self.all + self.first, self.count) };
        y.copy_from_slice(&lanes[..self.count]);
    }
}

#[inline(always)]
unsafe fn unpack<S: Simd, T: Format>(rows: &[*const u8; LANES], blocks: usize, out: *mut Group<S>) {
    for block in 0..blocks {
        let offset = block * T::BYTES;
        let place = Place { rows, offset };
        // SAFETY: whole blocks; the scratch has room for a group for each 32 columns.
        unsafe {
            let head = T::head::<S>(place);
            for g in 0..T::GROUPS {
                let group = T::group::<S>(place, &head, g);
                out.add(block * T::GROUPS + g).write(group);
            }
        }
    }
}

/// One row of activations, straight from the file's bytes: each is used once, so nothing is put aside.
#[inline(always)]
unsafe fn sum_packed<S: Simd, T: Format>(
    rows: &[*const u8; LANES],
    row_bytes: usize,
    input: &Activations,
    out: &Out,
) {
    // SAFETY: passed on.
    unsafe {
        let mut sums = [S::splat_float(0.0)];
        for block in 0..row_bytes / T::BYTES {
            let offset = block * T::BYTES;
            // The next tile's bytes, as many as this step takes.
            let next = rows[0].wrapping_add(LANES * (row_bytes + offset));
            for line in 0..(LANES * T::BYTES).div_ceil(64) {
                S::prefetch(next.wrapping_add(64 * line));
            }
            let place = Place { rows, offset };
            let head = T::head::<S>(place);
            for g in 0..T::GROUPS {
                let group = T::group::<S>(place, &head, g);
                add_group::<S, T, 1>(&mut sums, &group, input, 0, block * T::GROUPS + g);
            }
        }
        out.put::<S>(0, sums[0]);
    }
}

#[inline(always)]
unsafe fn sum_unpacked<S: Simd, T: Format, const R: usize>(
    groups: *const Group<S>,
    blocks: usize,
    input: &Activations,
    first_row: usize,
    out: &Out,
) {
    // SAFETY: passed on; `unpack` has written the groups.
    unsafe {
        let mut sums = [S::splat_float(0.0); R];
        for index in 0..blocks * T::GROUPS {
            let group = &*groups.add(index);
            add_group::<S, T, R>(&mut sums, group, input, first_row, index);
        }
        for (r, sum) in sums.iter().enumerate() {
            out.put::<S>(first_row + r, *sum);
        }
    }
}

/// Adds one group of columns to the sums of `R` rows of activations.
#[inline(always)]
unsafe fn add_group<S: Simd, T: Format, const R: usize>(
    sums: &mut [S::F; R],
    group: &Group<S>,
    input: &Activations,
    first_row: usize,
    index: usize,
) {
    // SAFETY: `Tiles::run` has checked that the activations have these rows and this group.
    unsafe {
        if T::HALVES {
            add_part::<S, T, R>(sums, group, input, first_row, index, [0, 1]);
            add_part::<S, T, R>(sums, group, input, first_row, index, [1, 2]);
        } else {
            add_part::<S, T, R>(sums, group, input, first_row, index, [0, 2]);
        }
        if let Some(minimum) = group.minimum {
            for (r, sum) in sums.iter_mut().enumerate() {
                let at = (first_row + r) * (input.columns / GROUP) + index;
                let scale = *input.scales.get_unchecked(at);
                let x = scale * sum_of_halves(input, at, [0, 2]) as f32;
                *sum = S::add(*sum, S::mul(minimum, S::splat_float(x)));
            }
        }
    }
}

/// The sum of the whole numbers in the given halves of a group.
#[inline(always)]
unsafe fn sum_of_halves(input: &Activations, at: usize, [from, to]: [usize; 2]) -> i32 {
    let mut sum = 0;
    for half in from..to {
        // SAFETY: the caller's group is there.
        sum += unsafe { *input.sums.get_unchecked(2 * at + half) };
    }
    sum
}

/// Adds the columns of a group that have one scale: `halves` of sixteen.
#[inline(always)]
unsafe fn add_part<S: Simd, T: Format, const R: usize>(
    sums: &mut [S::F; R],
    group: &Group<S>,
    input: &Activations,
    first_row: usize,
    index: usize,
    halves: [usize; 2],
) {
    let bias = T::BIAS + if T::SIGNED { S::SIGNED_BIAS } else { 0 };
    let start = first_row * (input.columns / GROUP) + index;
    // SAFETY: as the caller says.
    unsafe {
        let bytes = input.bytes.as_ptr().add(GROUP * start);
        let mut wholes = [S::splat(0); R];
        for (r, whole) in wholes.iter_mut().enumerate() {
            let at = start + r * (input.columns / GROUP);
            *whole = S::splat(-bias * sum_of_halves(input, at, halves));
        }
        for k in 4 * halves[0]..4 * halves[1] {
            let numbers = group.numbers[k];
            for (r, whole) in wholes.iter_mut().enumerate() {
                let x = bytes.add(r * input.columns + 4 * k).cast::<i32>();
                *whole = if T::SIGNED {
                    S::dot_signed(*whole, numbers, x.read_unaligned())
                } else {
                    S::dot(*whole, numbers, x.read_unaligned())
                };
            }
        }
        for (r, sum) in sums.iter_mut().enumerate() {
            let at = start + r * (input.columns / GROUP);
            let scale = *input.scales.get_unchecked(at);
            *sum = S::add(*sum, scaled::<S>(wholes[r], group.scales[halves[0]], scale));
        }
    }
}

#[inline(always)]
unsafe fn scaled<S: Simd>(whole: S::I, weight_scale: S::F, scale: f32) -> S::F {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let products = S::mul(S::to_float(whole), weight_scale);
        S::mul(products, S::splat_float(scale))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::thread::ThreadParams;
    use crate::quant::dequantize_row;

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
            let mut sums = vec![0; n * columns / 16];
            let mut kept = ByteRows {
                bytes: &mut bytes,
                scales: &mut scales,
                sums: &mut sums,
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
                for level in &levels {
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

//! Products of quantized matrices, sixteen rows at a time: the kernels behind `matmul.rs`, written once
//! for all instruction sets and block formats. The order of every sum is told there.

use super::blocks::{Format, Group, Place, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use super::matmul::{Activations, GROUP, GROUP_BYTES};
#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
use super::simd::{LANES, Level, Scalar, Simd};
use super::team::Disjoint;
use crate::model::Matrix;
use crate::quant::TensorType;

/// Some outputs of a quantized matrix, sixteen at a time.
pub(super) struct Tiles<'a> {
    pub weight: &'a Matrix,
    /// The matrix's bytes, all rows.
    pub bytes: &'a [u8],
    pub input: &'a Activations<'a>,
    pub n: usize,
    pub outputs: std::ops::Range<usize>,
    pub scratch: &'a mut [u8],
    /// [n, rows of the matrix]
    pub y: &'a Disjoint<'a, f32>,
}

impl Tiles<'_> {
    pub fn run(self, level: Level) {
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
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Level::Neon => unsafe { run_tiles::<Neon<false>, T, 4>(self) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Level::Dotprod => unsafe { tiles_dotprod::<T>(self) },
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

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "dotprod")]
unsafe fn tiles_dotprod<T: Format>(tiles: Tiles) {
    // SAFETY: passed on.
    unsafe { run_tiles::<Neon<true>, T, 4>(tiles) }
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

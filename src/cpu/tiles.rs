//! Products of quantized matrices, sixteen rows at a time: the kernels behind `matmul.rs`, written once
//! for all instruction sets and block formats. The order of every sum is told there.

use super::activations::{Activations, GROUP, GROUP_WORDS, GroupRow, PanelGroup, width};
use super::blocks::{
    Format, Group, InRows, InTile, Place, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0,
};
use super::matmul::GROUP_BYTES;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512, PLAIN, VNNI};
#[cfg(target_arch = "aarch64")]
use super::simd::{DOTPROD, I8MM, Neon, PLAIN};
use super::simd::{LANES, Level, Rows, Scalar, Simd};
use super::team::Disjoint;
use crate::model::Matrix;
use crate::quant::TensorType;

/// Some outputs of a quantized matrix, sixteen at a time.
pub(super) struct Tiles<'a> {
    pub weight: &'a Matrix,
    /// The matrix's bytes, all rows.
    pub bytes: &'a [u8],
    pub input: &'a Activations<'a>,
    pub outputs: std::ops::Range<usize>,
    pub scratch: Disjoint<'a, u8>,
    /// [n, rows of the matrix]
    pub y: &'a Disjoint<'a, f32>,
    /// Whether results are added to what is there.
    pub add: bool,
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
        let panels = self.input.n.div_ceil(width(level, self.input.n));
        let words = panels * width(level, self.input.n) * groups * GROUP_WORDS;
        assert!(self.input.panels.len() >= words);
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
            Level::Scalar => unsafe { plain::tiles::<T>(&self, 1) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { tiles_avx2::<T>(self, None) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::AvxVnni => unsafe { tiles_avx2::<T>(self, Some(sum_of_avx_vnni::<T>())) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { tiles_avx512::<T>(self) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Level::Neon => unsafe {
                run_tiles::<Neon<PLAIN>, T, { Neon::<PLAIN>::ROWS }, { Neon::<PLAIN>::ROWS / 2 }>(
                    self, None,
                )
            },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Level::Dotprod => unsafe { tiles_dotprod::<T>(self) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Level::I8mm => unsafe { tiles_i8mm::<T>(self) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tiles_avx2<T: Format>(tiles: Tiles, sum: Option<Sum<Avx2<PLAIN>>>) {
    const ROWS: usize = Avx2::<PLAIN>::ROWS;
    // SAFETY: passed on.
    unsafe { run_tiles::<Avx2<PLAIN>, T, ROWS, { ROWS / 2 }>(tiles, sum) }
}

/// What sums a panel on [`Level::AvxVnni`]. (A lone row mostly waits for its weights, whatever multiplies them, and the last
/// rows of many are few: for these there is no code of their own.)
#[cfg(target_arch = "x86_64")]
fn sum_of_avx_vnni<T: Format>() -> Sum<Avx2<PLAIN>> {
    #[cfg(any(test, feature = "bench"))]
    if !super::simd::has_avx_vnni() {
        return sum_vnni_512::<T>;
    }
    sum_avx_vnni::<T>
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
unsafe fn sum_avx_vnni<T: Format>(
    groups: *const Group<Avx2<PLAIN>>,
    panel: Panel,
    next: &mut Ahead,
    out: &Out,
) {
    const ROWS: usize = Avx2::<VNNI>::ROWS;
    // SAFETY: passed on; groups of both are the same registers in the same order.
    unsafe { sum_unpacked::<Avx2<VNNI>, T, ROWS, ROWS>(groups.cast(), panel, next, out) }
}

#[cfg(all(target_arch = "x86_64", any(test, feature = "bench")))]
#[target_feature(enable = "avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn sum_vnni_512<T: Format>(
    groups: *const Group<Avx2<PLAIN>>,
    panel: Panel,
    next: &mut Ahead,
    out: &Out,
) {
    use super::simd::VNNI_512;
    const ROWS: usize = Avx2::<VNNI_512>::ROWS;
    // SAFETY: as above.
    unsafe { sum_unpacked::<Avx2<VNNI_512>, T, ROWS, ROWS>(groups.cast(), panel, next, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tiles_avx512<T: Format>(tiles: Tiles) {
    // SAFETY: passed on.
    unsafe { run_tiles::<Avx512, T, { Avx512::ROWS }, { Avx512::ROWS / 2 }>(tiles, None) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "dotprod")]
unsafe fn tiles_dotprod<T: Format>(tiles: Tiles) {
    // SAFETY: passed on.
    unsafe {
        run_tiles::<Neon<DOTPROD>, T, { Neon::<DOTPROD>::ROWS }, { Neon::<DOTPROD>::ROWS / 2 }>(
            tiles, None,
        )
    }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "dotprod,i8mm")]
unsafe fn tiles_i8mm<T: Format>(tiles: Tiles) {
    // SAFETY: passed on.
    unsafe {
        run_tiles::<Neon<I8MM>, T, { Neon::<I8MM>::ROWS }, { Neon::<I8MM>::ROWS / 2 }>(tiles, None)
    }
}

/// One panel of activations.
#[derive(Clone, Copy)]
struct Panel<'a> {
    input: &'a Activations<'a>,
    /// Which one.
    index: usize,
    /// Groups of columns.
    count: usize,
}

/// What takes the place of [`sum_unpacked`] for all rows of a panel.
type Sum<S> = unsafe fn(*const Group<S>, Panel, &mut Ahead, &Out);

/// All tiles of the job; `R` rows of activations at a time share what is taken out of a block, and
/// the last `H` or fewer of many.
#[inline(always)]
unsafe fn run_tiles<S: Simd, T: Format, const R: usize, const H: usize>(
    tiles: Tiles,
    sum: Option<Sum<S>>,
) {
    const { assert!(size_of::<Group<S>>() <= GROUP_BYTES && align_of::<Group<S>>() <= 64) };
    let Tiles { weight, input, .. } = tiles;
    let row_bytes = weight.row_bytes;
    let unpacked = tiles
        .scratch
        .pointer(0, tiles.scratch.len())
        .cast::<Group<S>>();
    for first in tiles.outputs.clone().step_by(LANES) {
        if tiles.outputs.end - first < LANES {
            let width = if input.n == 1 { 1 } else { R };
            // SAFETY: passed on.
            return unsafe { plain::tile::<T>(&tiles, first, width) };
        }
        let out = Out::new(&tiles, first);
        // SAFETY: inside the matrix's bytes, as `run` has checked.
        let start = unsafe { tiles.bytes.as_ptr().add(first * row_bytes) };
        let in_rows = InRows(Rows {
            start,
            stride: row_bytes,
            last: LANES - 1,
        });
        let in_tile = InTile(start);
        let blocks = row_bytes / T::BYTES;
        // SAFETY: the rows, or the tile, are whole, and the activations have `n` rows, as `run` has
        // checked.
        unsafe {
            match (input.n, weight.is_tile(first)) {
                (1, false) => sum_packed::<S, T, _>(in_rows, start, blocks, input, &out),
                (1, true) => sum_packed::<S, T, _>(in_tile, start, blocks, input, &out),
                (_, false) => unpack::<S, T, _>(in_rows, blocks, unpacked),
                (_, true) => unpack::<S, T, _>(in_tile, blocks, unpacked),
            }
            if input.n > 1 {
                let count = blocks * T::GROUPS;
                let panels = input.n.div_ceil(R);
                let mut next = Ahead::new(start, LANES * row_bytes, count * panels);
                for index in 0..panels {
                    let panel = Panel {
                        input,
                        index,
                        count,
                    };
                    if input.n - index * R <= H {
                        sum_unpacked::<S, T, H, R>(unpacked, panel, &mut next, &out);
                    } else if let Some(sum) = sum {
                        sum(unpacked, panel, &mut next, &out);
                    } else {
                        sum_unpacked::<S, T, R, R>(unpacked, panel, &mut next, &out);
                    }
                }
            }
        }
    }
}

/// Asks for the bytes of the next tile while this one is worked on.
struct Ahead {
    next: *const u8,
    lines: usize,
    /// How many lines fall due in a step, in parts of 2^16.
    rate: usize,
    due: usize,
}

impl Ahead {
    /// The bytes after a tile of `bytes`, in as many `steps`.
    fn new(tile: *const u8, bytes: usize, steps: usize) -> Self {
        let lines = bytes.div_ceil(64);
        Ahead {
            next: tile.wrapping_add(bytes),
            lines,
            rate: (lines << 16) / steps + 1,
            due: 0,
        }
    }

    #[inline(always)]
    unsafe fn step<S: Simd>(&mut self) {
        self.due += self.rate;
        while self.due >> 16 > 0 && self.lines > 0 {
            // SAFETY: the caller has the instruction set; what is asked for need not be there.
            unsafe { S::prefetch(self.next) };
            self.next = self.next.wrapping_add(64);
            self.lines -= 1;
            self.due -= 1 << 16;
        }
    }
}

/// Where a tile's results go.
struct Out<'a> {
    first: usize,
    count: usize,
    /// Outputs of the matrix.
    all: usize,
    y: &'a Disjoint<'a, f32>,
    add: bool,
}

impl<'a> Out<'a> {
    fn new(tiles: &Tiles<'a>, first: usize) -> Self {
        Out {
            first,
            count: (tiles.outputs.end - first).min(LANES),
            all: tiles.weight.rows,
            y: tiles.y,
            add: tiles.add,
        }
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(&self, r: usize, sum: S::F) {
        // SAFETY: these outputs of every row belong to this task; the caller has the instruction set.
        unsafe {
            let y = self.y.slice(r * self.all + self.first, self.count);
            if let [y] = y.as_chunks_mut::<LANES>().0 {
                let sum = match self.add {
                    true => S::mul_add(sum, S::splat_float(1.0), S::load(y)),
                    false => sum,
                };
                S::store(sum, y);
            } else {
                let mut lanes = [0.0; LANES];
                S::store(sum, &mut lanes);
                for (y, lane) in y.iter_mut().zip(lanes) {
                    *y = if self.add { *y + lane } else { lane };
                }
            }
        }
    }
}

/// Takes sixteen rows apart, group by group.
#[inline(always)]
unsafe fn unpack<S: Simd, T: Format, P: Place>(rows: P, blocks: usize, out: *mut Group<S>) {
    for block in 0..blocks {
        let place = rows.after(block * T::BYTES);
        // SAFETY: whole blocks; the scratch has room for a group for each 32 columns.
        unsafe {
            let head = T::head::<S>(place);
            for g in 0..T::GROUPS {
                let mut group = T::group::<S>(place, &head, g);
                group.numbers = S::arrange(group.numbers);
                out.add(block * T::GROUPS + g).write(group);
            }
        }
    }
}

/// One row of activations, straight from the file's bytes: each is used once, so nothing is put aside.
#[inline(always)]
unsafe fn sum_packed<S: Simd, T: Format, P: Place>(
    rows: P,
    start: *const u8,
    blocks: usize,
    input: &Activations,
    out: &Out,
) {
    // SAFETY: passed on.
    unsafe {
        let mut sums = [S::splat_float(0.0)];
        let mut rows = rows;
        for block in 0..blocks {
            rows = rows.forgotten::<S>();
            // The next tile's bytes, as many as this step takes.
            let next = start.wrapping_add(LANES * (blocks + block) * T::BYTES);
            for line in 0..(LANES * T::BYTES).div_ceil(64) {
                S::prefetch(next.wrapping_add(64 * line));
            }
            let place = rows.after(block * T::BYTES);
            let head = T::head::<S>(place);
            for g in 0..T::GROUPS {
                let group = T::group::<S>(place, &head, g);
                let index = block * T::GROUPS + g;
                let x = PanelGroup(input.panels.as_ptr().add(index * GROUP_WORDS));
                add_group::<S, T, false, 1, 1>(&mut sums, &group, x);
            }
        }
        out.put::<S>(0, sums[0]);
    }
}

/// The first `R` rows of a panel of `W` against weights that were taken apart. Slots of the last panel
/// that no row fills hold anything, and nothing comes of them.
#[inline(always)]
unsafe fn sum_unpacked<S: Simd, T: Format, const R: usize, const W: usize>(
    groups: *const Group<S>,
    Panel {
        input,
        index: panel,
        count,
    }: Panel,
    next: &mut Ahead,
    out: &Out,
) {
    // SAFETY: passed on; `unpack` has written the groups, and `run` has checked the panels.
    unsafe {
        let mut sums = [S::splat_float(0.0); R];
        let mut x = input.panels.as_ptr().add(panel * count * W * GROUP_WORDS);
        for index in 0..count {
            next.step::<S>();
            add_group::<S, T, true, R, W>(&mut sums, &*groups.add(index), PanelGroup(x));
            x = x.add(W * GROUP_WORDS);
        }
        let rows = (input.n - panel * W).min(R);
        for (r, sum) in sums.iter().enumerate().take(rows) {
            out.put::<S>(panel * W + r, *sum);
        }
    }
}

/// Adds one group of columns to the sums of the first `R` rows of a panel of `W`. `ARRANGED` says whether the
/// numbers are in the order of [`Simd::arrange`].
#[inline(always)]
unsafe fn add_group<S: Simd, T: Format, const ARRANGED: bool, const R: usize, const W: usize>(
    sums: &mut [S::F; R],
    group: &Group<S>,
    x: PanelGroup<W>,
) {
    // SAFETY: the caller's rows are there.
    unsafe {
        if T::HALVES {
            for (half, scale) in [group.scale, group.other].into_iter().enumerate() {
                let mut wholes = [S::splat(0); R];
                for (r, whole) in wholes.iter_mut().enumerate() {
                    *whole = weigh_bias::<S, T>(x.half_sum(r, half));
                }
                let columns = [4 * half, 4 * half + 4];
                dots::<S, T, ARRANGED, R>(&mut wholes, group, x.bytes(), columns);
                add_scaled::<S, R, W>(sums, &wholes, scale, x);
            }
        } else {
            let mut wholes = [S::splat(0); R];
            for (r, whole) in wholes.iter_mut().enumerate() {
                *whole = weigh_bias::<S, T>(x.sum(r));
            }
            dots::<S, T, ARRANGED, R>(&mut wholes, group, x.bytes(), [0, 8]);
            add_scaled::<S, R, W>(sums, &wholes, group.scale, x);
        }
        if T::MINIMUMS {
            for (r, sum) in sums.iter_mut().enumerate() {
                let x = S::splat_float(x.weighted(r));
                *sum = S::mul_add(group.other, x, *sum);
            }
        }
    }
}

/// What the weights' bias amounts to, from -8 times the sum of the activations.
#[inline(always)]
unsafe fn weigh_bias<S: Simd, T: Format>(sum: i32) -> S::I {
    let bias = T::BIAS + if T::SIGNED { S::SIGNED_BIAS } else { 0 };
    debug_assert!(bias % 8 == 0);
    // SAFETY: the caller has the instruction set.
    // Wrapping, because a slot that no row fills may hold anything.
    unsafe { S::splat(sum.wrapping_mul(bias / 8)) }
}

/// Adds the products of columns `4 · from` to `4 · to` of a group.
#[inline(always)]
unsafe fn dots<S: Simd, T: Format, const ARRANGED: bool, const R: usize>(
    wholes: &mut [S::I; R],
    group: &Group<S>,
    x: *const i8,
    columns: [usize; 2],
) {
    // Products that share a sum of sixteen bits must fit it.
    let steps = match S::NARROW {
        0 => 8,
        products => (i16::MAX as i32 / (127 * T::MAX * products)) as usize,
    };
    let numbers = &group.numbers;
    // SAFETY: as the caller says.
    unsafe {
        match T::SIGNED {
            true => S::dots::<true, ARRANGED, R>(wholes, numbers, columns, steps, x),
            false => S::dots::<false, ARRANGED, R>(wholes, numbers, columns, steps, x),
        }
    }
}

/// `sums = fma(whole · weight_scale, scale, sums)`.
#[inline(always)]
unsafe fn add_scaled<S: Simd, const R: usize, const W: usize>(
    sums: &mut [S::F; R],
    wholes: &[S::I; R],
    weight_scale: S::F,
    x: PanelGroup<W>,
) {
    for (r, (sum, whole)) in sums.iter_mut().zip(wholes).enumerate() {
        // SAFETY: the caller's rows are there.
        unsafe {
            let scale = S::splat_float(x.scale(r));
            *sum = S::mul_add(S::mul(S::to_float(*whole), weight_scale), scale, *sum);
        }
    }
}

/// The same in plain words, for any format: what the other instruction sets are measured by, and what
/// does the last rows of a matrix where they are fewer than sixteen.
mod plain {
    use super::*;

    /// # Safety
    /// As [`run_tiles`]; panels have `width` rows.
    pub unsafe fn tiles<T: Format>(tiles: &Tiles, width: usize) {
        for first in tiles.outputs.clone().step_by(LANES) {
            // SAFETY: passed on.
            unsafe { tile::<T>(tiles, first, width) };
        }
    }

    /// # Safety
    /// As above; `first` is one of the outputs.
    pub unsafe fn tile<T: Format>(tiles: &Tiles, first: usize, width: usize) {
        let out = Out::new(tiles, first);
        let row_bytes = tiles.weight.row_bytes;
        let start = tiles.bytes[first * row_bytes..].as_ptr();
        // Lanes beyond the last row do its work again, for nobody.
        let in_rows = InRows(Rows {
            start,
            stride: row_bytes,
            last: out.count - 1,
        });
        let place = match tiles.weight.is_tile(first) {
            true => Ok(InTile(start)),
            false => Err(in_rows),
        };
        let blocks = row_bytes / T::BYTES;
        let unpacked = tiles.scratch.pointer(0, tiles.scratch.len()).cast();
        let kind = Kind {
            bias: T::BIAS,
            signed: T::SIGNED,
            halves: T::HALVES,
            minimums: T::MINIMUMS,
        };
        // SAFETY: whole blocks, and scratch for them, as `run` has checked.
        unsafe {
            unpack::<Scalar, T, _>(place, blocks, unpacked);
            let groups = std::slice::from_raw_parts(unpacked, blocks * T::GROUPS);
            sum(kind, groups, tiles.input, width, &out);
        }
    }

    /// What a format's numbers mean.
    struct Kind {
        bias: i32,
        signed: bool,
        halves: bool,
        minimums: bool,
    }

    unsafe fn sum(
        kind: Kind,
        groups: &[Group<Scalar>],
        input: &Activations,
        width: usize,
        out: &Out,
    ) {
        for row in 0..input.n {
            let mut sums = [0.0f32; LANES];
            for (index, group) in groups.iter().enumerate() {
                let x = GroupRow::of(input, width, row, index);
                for (lane, sum) in sums.iter_mut().enumerate() {
                    add(&kind, group, lane, &x, sum);
                }
            }
            // SAFETY: passed on.
            unsafe { out.put::<Scalar>(row, sums) };
        }
    }

    fn add(kind: &Kind, group: &Group<Scalar>, lane: usize, x: &GroupRow, sum: &mut f32) {
        let words = if kind.halves { 4 } else { 8 };
        let parts = group.numbers.chunks(words).zip(x.bytes.chunks(4 * words));
        for ((numbers, bytes), weight_scale) in parts.zip([group.scale[lane], group.other[lane]]) {
            let mut whole = 0;
            for (number, bytes) in numbers.iter().zip(bytes.as_chunks::<4>().0) {
                for (number, byte) in number[lane].to_le_bytes().into_iter().zip(bytes) {
                    let number = match kind.signed {
                        true => i32::from(number as i8),
                        false => i32::from(number),
                    };
                    whole += (number - kind.bias) * i32::from(*byte as i8);
                }
            }
            *sum = (whole as f32 * weight_scale).mul_add(x.scale, *sum);
        }
        if kind.minimums {
            *sum = group.other[lane].mul_add(x.weighted, *sum);
        }
    }
}

//! Rows of activations, as floats and, for quantized weights, as bytes.
//!
//! Bytes are kept in panels: so many rows as a kernel takes at a time stand side by side, group by
//! group (32 columns), each group with all that its products need, so that a kernel walks one
//! stretch of memory with one pointer.

use super::simd::Level;
use super::team::{Disjoint, Team};

/// Columns that share a scale when activations are quantized.
pub(crate) const GROUP: usize = 32;

/// Words of four bytes that a group of one row takes. In a panel of `w` rows:
/// - `w` times 32 whole numbers from -127 to 127, a byte each,
/// - `w` times what a whole number is worth (f32),
/// - `w` times that times the sum of the group's whole numbers (f32),
/// - `w` times -8 times the sum of the whole numbers (i32),
/// - `w` times -8 times the sums of the first and of the last sixteen (i32, i32).
pub(super) const GROUP_WORDS: usize = GROUP / 4 + 5;

/// Words that `n` rows of `columns` columns take: whole panels of the widest kind.
pub(crate) const fn panel_words(n: usize, columns: usize) -> usize {
    let rows = n.next_multiple_of(MAX_WIDTH);
    rows.saturating_mul(columns.div_ceil(GROUP) * GROUP_WORDS)
}

/// Rows of the widest panel.
const MAX_WIDTH: usize = 8;

/// Rows of a panel.
pub(super) fn width(level: Level, n: usize) -> usize {
    if n == 1 { 1 } else { level.rows() }
}

/// `n` rows, ready for matrix products.
pub(crate) struct Activations<'a> {
    pub n: usize,
    pub columns: usize,
    /// [n, columns]
    pub x: &'a [f32],
    /// Panels of [`width`] rows; empty where no weights are quantized.
    pub panels: &'a [u32],
}

/// Has `each(row, x)` write (or change) each row of `x` [n, columns], and quantizes it into `panels`, which
/// has room for [`panel_words`] or, where no weights are quantized, is empty.
pub(super) fn prepare<'a>(
    team: &mut Team,
    level: Level,
    [n, columns]: [usize; 2],
    x: &'a mut [f32],
    panels: &'a mut [u32],
    each: &(dyn Fn(usize, &mut [f32]) + Sync),
) -> Activations<'a> {
    let quantized = !panels.is_empty();
    let width = width(level, n);
    let words = columns / GROUP * GROUP_WORDS * width;
    let (rows, shared) = (Disjoint::new(&mut x[..n * columns]), Disjoint::new(panels));
    team.run(n.div_ceil(width), &|panel, _| {
        let first = panel * width;
        for slot in 0..width.min(n - first) {
            let row = first + slot;
            // SAFETY: each row belongs to one panel, each panel to one task.
            let x = unsafe { rows.slice(row * columns, columns) };
            each(row, x);
            if quantized {
                // SAFETY: as above.
                let panel = unsafe { shared.slice(panel * words, words) };
                quantize(level, x, panel, width, slot);
            }
        }
    });
    Activations {
        n,
        columns,
        x: &x[..n * columns],
        panels,
    }
}

super::levels! {
    /// One row to bytes: in each group the largest magnitude becomes 127. A group with a value that
    /// is not finite gets a scale that is not a number, so that it shows in every result.
    fn quantize(x: &[f32], panel: &mut [u32], width: usize, slot: usize) {
        let groups = panel.chunks_exact_mut(GROUP_WORDS * width);
        for (x, group) in x.as_chunks::<GROUP>().0.iter().zip(groups) {
            let mut largest = 0u32;
            for x in x {
                // Magnitudes compare as their bits do, NaN and infinity above all.
                largest = largest.max(x.to_bits() & 0x7fff_ffff);
            }
            let finite = largest < f32::INFINITY.to_bits();
            let largest = f32::from_bits(largest);
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            // The inverse of a tiny number may be infinite; such a group is as good as zero.
            let inverse = if finite && inverse < f32::INFINITY { inverse } else { 0.0 };
            let mut wholes = [0i32; GROUP];
            for (whole, x) in wholes.iter_mut().zip(x) {
                // Adding and taking off 1.5 · 2^23 rounds to the nearest whole number, ties to even.
                const ROUND: f32 = 12_582_912.0;
                *whole = (x * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            }
            if !finite {
                wholes = [0; GROUP];
            }
            let bytes = wholes.map(|whole| whole as u8);
            let (words, rest) = group.split_at_mut(GROUP / 4 * width);
            let (scales, rest) = rest.split_at_mut(width);
            let (weighted, rest) = rest.split_at_mut(width);
            let (sums, halves) = rest.split_at_mut(width);
            let own = &mut words[GROUP / 4 * slot..][..GROUP / 4];
            for (word, bytes) in own.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *word = u32::from_ne_bytes(*bytes);
            }
            let (first, second) = wholes.split_at(GROUP / 2);
            let (first, second) = (first.iter().sum::<i32>(), second.iter().sum::<i32>());
            let scale = if finite { largest / 127.0 } else { f32::NAN };
            scales[slot] = scale.to_bits();
            weighted[slot] = (scale * (first + second) as f32).to_bits();
            sums[slot] = (-8 * (first + second)) as u32;
            halves[2 * slot..][..2].copy_from_slice(&[-8 * first, -8 * second].map(|s| s as u32));
        }
    }
}

/// One group of columns of one row.
pub(super) struct GroupRow {
    pub bytes: [u8; GROUP],
    pub scale: f32,
    /// The scale times the sum.
    pub weighted: f32,
}

impl GroupRow {
    /// Group `index` of `row`, out of panels of `width` rows.
    pub fn of(input: &Activations, width: usize, row: usize, index: usize) -> Self {
        let (panel, slot) = (row / width, row % width);
        let first = (panel * (input.columns / GROUP) + index) * width * GROUP_WORDS;
        let group = &input.panels[first..][..width * GROUP_WORDS];
        let float = |field: usize| f32::from_bits(group[(GROUP / 4 + field) * width + slot]);
        let mut bytes = [0; GROUP];
        let words = &group[slot * GROUP / 4..][..GROUP / 4];
        for (bytes, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *bytes = word.to_ne_bytes();
        }
        GroupRow {
            bytes,
            scale: float(0),
            weighted: float(1),
        }
    }
}

/// One group of columns of a panel of `W` rows.
#[derive(Clone, Copy)]
pub(super) struct PanelGroup<const W: usize>(pub *const u32);

/// # Safety
/// For all: the pointer is to a whole group, and `row` is below `W`.
impl<const W: usize> PanelGroup<W> {
    /// The bytes of all rows, `GROUP` each.
    #[inline(always)]
    pub unsafe fn bytes(self) -> *const i8 {
        self.0.cast()
    }
    #[inline(always)]
    pub unsafe fn scale(self, row: usize) -> f32 {
        // SAFETY: inside the group, as for the others.
        f32::from_bits(unsafe { *self.0.add(GROUP / 4 * W + row) })
    }
    /// The scale times the sum.
    #[inline(always)]
    pub unsafe fn weighted(self, row: usize) -> f32 {
        // SAFETY: as above.
        f32::from_bits(unsafe { *self.0.add((GROUP / 4 + 1) * W + row) })
    }
    /// -8 times the sum.
    #[inline(always)]
    pub unsafe fn sum(self, row: usize) -> i32 {
        // SAFETY: as above.
        unsafe { *self.0.add((GROUP / 4 + 2) * W + row) as i32 }
    }
    /// -8 times the sum of the first or the second sixteen.
    #[inline(always)]
    pub unsafe fn half_sum(self, row: usize, half: usize) -> i32 {
        // SAFETY: as above.
        unsafe { *self.0.add((GROUP / 4 + 3) * W + 2 * row + half) as i32 }
    }
}

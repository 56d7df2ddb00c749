//! Causal attention over the ragged cache, as flash attention does it (Dao et al., 2022): no row of
//! scores is ever stored whole.
//!
//! The entries that a row sees are taken in blocks of [`BLOCK`], block by block with a running maximum
//! (Milakov and Gimelshein, 2018), and the blocks in parts of [`PART`] entries, whose results are merged
//! in their order. Products are fused. So a row's bits depend on what it sees, not on the rows beside
//! it, and the parts of a long context can be worked on by several threads.

use super::levels;
use super::ops::{exp, sum_of_lanes};
use super::simd::{LANES, Level, Rows, Scalar, Simd};
#[cfg(target_arch = "aarch64")]
use super::simd::{Neon, PLAIN};
use super::team::{Disjoint, Team};
use crate::kv::{KvCache, KvShape, KvType, PAGE_TOKENS};

/// Entries whose scores are known together.
const BLOCK: usize = 4 * PAGE_TOKENS;
/// Entries of a part, whole blocks.
const PART: usize = 8 * BLOCK;
/// Query heads that go over the keys together: enough to make up for decoding them.
const QUERIES: usize = 12;

/// Where a row stands in the cache.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Seat {
    /// The list that it attends to: the plane of its sequence.
    pub list: u32,
    /// Entries that it sees: those at its own position and before.
    pub visible: u32,
    /// 1 when the last of them is its own, to be written by this layer, otherwise 0.
    pub own: u32,
}

/// Elements of a head, in whole vectors.
fn padded(shape: &KvShape) -> usize {
    // A page's rows of values are as wide.
    const { assert!(LANES == crate::kv::VECTOR) };
    shape.head_dim.next_multiple_of(LANES)
}

/// Query heads of each key head.
fn group(shape: &KvShape, heads: usize) -> usize {
    heads / shape.kv_heads
}

/// Rows that go over the keys together.
fn tile_rows(shape: &KvShape, heads: usize) -> usize {
    (QUERIES / group(shape, heads)).max(1)
}

/// Floats of a result of `queries` query heads over some entries.
fn result_floats(shape: &KvShape, queries: usize) -> usize {
    queries * (padded(shape) + 2)
}

/// Bytes of scratch memory that a thread needs.
pub(crate) fn scratch_bytes(shape: &KvShape, heads: usize) -> usize {
    let queries = tile_rows(shape, heads) * group(shape, heads);
    let width = padded(shape);
    let floats =
        PAGE_TOKENS * width + queries * (width + BLOCK) + 2 * result_floats(shape, queries);
    (floats * size_of::<f32>()).next_multiple_of(64)
}

/// Floats for the parts of one row's context.
pub(crate) fn partial_floats(shape: &KvShape, heads: usize) -> usize {
    let parts = (shape.table_pages * PAGE_TOKENS).div_ceil(PART);
    parts.saturating_mul(result_floats(shape, heads))
}

/// The rows of a pass and the cache that they attend to.
pub(crate) struct Attention<'a> {
    pub level: Level,
    pub kv: &'a KvCache<'a>,
    pub heads: usize,
    /// One for each row.
    pub seats: &'a [Seat],
    /// [rows, heads, head_dim]
    pub q: &'a [f32],
}

impl Attention<'_> {
    /// Attention of each row's heads over the entries that it sees, into `out` [rows, heads,
    /// head_dim]. `scratch` has [`scratch_bytes`] for each thread and begins at a multiple of 64;
    /// `partials` has [`partial_floats`].
    pub fn run(&self, team: &mut Team, scratch: &mut [u8], partials: &mut [f32], out: &mut [f32]) {
        let stride = scratch.len() / team.threads() / 64 * 64;
        let scratch = Disjoint::new(scratch);
        let out = Disjoint::new(out);
        match self.seats {
            [_] => self.run_parts(team, &scratch, stride, partials, &out),
            _ => self.run_tiles(team, &scratch, stride, &out),
        }
    }

    /// A lone row: the parts of its context are spread over the team.
    fn run_parts(
        &self,
        team: &mut Team,
        scratch: &Disjoint<u8>,
        stride: usize,
        partials: &mut [f32],
        out: &Disjoint<f32>,
    ) {
        let kv_heads = self.kv.shape.kv_heads;
        let unit = |kv_head| Unit {
            attention: self,
            rows: (0, 1),
            kv_head,
        };
        let parts = unit(0).visible().div_ceil(PART);
        let floats = result_floats(self.kv.shape, unit(0).queries());
        let results = Disjoint::new(partials);
        team.run(parts * kv_heads, &|task, thread| {
            let unit = unit(task % kv_heads);
            // SAFETY: each thread has its own stretch of the scratch, each task its own result.
            let (scratch, result) = unsafe {
                (
                    scratch.slice(thread * stride, stride),
                    results.slice(task * floats, floats),
                )
            };
            let (mut room, ..) = unit.carve(scratch);
            unit.attend(task / kv_heads, &mut room, &mut unit.carve_result(result));
        });
        for kv_head in 0..kv_heads {
            let unit = unit(kv_head);
            // SAFETY: the team has come to rest.
            let (_, _, mut total) = unit.carve(unsafe { scratch.slice(0, stride) });
            total.clear();
            for part in 0..parts {
                let at = (part * kv_heads + kv_head) * floats;
                // SAFETY: as above.
                let result = unsafe { results.slice(at, floats) };
                total.merge(self.level, &unit.carve_result(result));
            }
            unit.finish(&total, out);
        }
    }

    /// Many rows: a few of them with one key head each are a task.
    fn run_tiles(
        &self,
        team: &mut Team,
        scratch: &Disjoint<u8>,
        stride: usize,
        out: &Disjoint<f32>,
    ) {
        let shape = self.kv.shape;
        let rows = tile_rows(shape, self.heads);
        let tiles = self.seats.len().div_ceil(rows);
        team.run(tiles * shape.kv_heads, &|task, thread| {
            // The last rows see most. They come first, so that nobody is left with them at the end.
            let start = (tiles - 1 - task / shape.kv_heads) * rows;
            let end = (start + rows).min(self.seats.len());
            let mut first = start;
            while first < end {
                // Rows that see the same keys.
                let list = self.seats[first].list;
                let mut last = first + 1;
                while last < end && self.seats[last].list == list {
                    last += 1;
                }
                let unit = Unit {
                    attention: self,
                    rows: (first, last),
                    kv_head: task % shape.kv_heads,
                };
                // SAFETY: each thread has its own stretch of the scratch.
                let scratch = unsafe { scratch.slice(thread * stride, stride) };
                let (mut room, mut result, mut total) = unit.carve(scratch);
                total.clear();
                for part in 0..unit.visible().div_ceil(PART) {
                    unit.attend(part, &mut room, &mut result);
                    total.merge(self.level, &result);
                }
                unit.finish(&total, out);
                first = last;
            }
        });
    }
}

/// Some rows with the same keys and one key head: query `i` is row `i / group`'s head `i % group` of
/// those that the key head serves.
struct Unit<'a> {
    attention: &'a Attention<'a>,
    /// First row and the one after the last.
    rows: (usize, usize),
    kv_head: usize,
}

/// What a thread needs to go over some entries.
struct Room<'a> {
    /// A page's keys [head_dim][PAGE_TOKENS] or values [PAGE_TOKENS][padded].
    page: &'a mut [f32],
    /// [queries][padded] queries, divided by the root of the head size.
    q: &'a mut [f32],
    /// [queries][BLOCK] scores, then their exponentials.
    scores: &'a mut [f32],
}

/// Attention over some entries, for each query.
struct Outcome<'a> {
    /// [queries] the largest score.
    max: &'a mut [f32],
    /// [queries] the sum of `exp(score - max)`.
    sum: &'a mut [f32],
    /// [queries][padded] the sum of the values, weighed so.
    out: &'a mut [f32],
}

impl Unit<'_> {
    fn queries(&self) -> usize {
        let (first, last) = self.rows;
        (last - first) * group(self.attention.kv.shape, self.attention.heads)
    }

    fn seats(&self) -> &[Seat] {
        &self.attention.seats[self.rows.0..self.rows.1]
    }

    /// The most that one of the rows sees.
    fn visible(&self) -> usize {
        let seen = self.seats().iter().map(|s| s.visible as usize);
        seen.max().unwrap_or(0)
    }

    /// Cuts up a thread's scratch memory.
    fn carve<'r>(&self, scratch: &'r mut [u8]) -> (Room<'r>, Outcome<'r>, Outcome<'r>) {
        let (queries, shape) = (self.queries(), self.attention.kv.shape);
        // SAFETY: any bytes are floats.
        let floats = unsafe { scratch.align_to_mut::<f32>() }.1;
        let (page, floats) = floats.split_at_mut(PAGE_TOKENS * padded(shape));
        let (q, floats) = floats.split_at_mut(queries * padded(shape));
        let (scores, floats) = floats.split_at_mut(queries * BLOCK);
        let (result, total) = floats.split_at_mut(result_floats(shape, queries));
        let room = Room { page, q, scores };
        (room, self.carve_result(result), self.carve_result(total))
    }

    fn carve_result<'r>(&self, floats: &'r mut [f32]) -> Outcome<'r> {
        let (out, floats) = floats.split_at_mut(self.queries() * padded(self.attention.kv.shape));
        let (max, floats) = floats.split_at_mut(self.queries());
        Outcome {
            max,
            sum: &mut floats[..self.queries()],
            out,
        }
    }

    /// Attention over one part of the context.
    fn attend(&self, part: usize, room: &mut Room, result: &mut Outcome) {
        match self.attention.level {
            // SAFETY: a `Level` is had only by a machine that has its instruction set.
            Level::Scalar => unsafe { attend::<Scalar>(self, part, room, result) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::AvxVnni => unsafe { attend_avx2(self, part, room, result) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { attend_avx512(self, part, room, result) },
            // SAFETY: as above; attention multiplies no bytes.
            #[cfg(target_arch = "aarch64")]
            Level::Neon | Level::Dotprod | Level::I8mm => unsafe {
                attend::<Neon<PLAIN>>(self, part, room, result);
            },
        }
    }

    /// Writes the rows' results.
    fn finish(&self, total: &Outcome, out: &Disjoint<f32>) {
        let Attention { kv, heads, .. } = self.attention;
        let (dim, group) = (kv.shape.head_dim, group(kv.shape, *heads));
        let sums = total.out.chunks_exact(padded(kv.shape)).zip(&*total.sum);
        for (query, (values, sum)) in sums.enumerate() {
            let row = self.rows.0 + query / group;
            let head = self.kv_head * group + query % group;
            // SAFETY: this head of this row belongs to this unit.
            let out = unsafe { out.slice((row * heads + head) * dim, dim) };
            for (out, value) in out.iter_mut().zip(values) {
                *out = value / sum;
            }
        }
    }
}

impl Outcome<'_> {
    /// The outcome of no entries.
    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }

    /// Adds what comes of further entries.
    fn merge(&mut self, level: Level, more: &Outcome) {
        let width = self.out.len() / self.max.len();
        for (query, out) in self.out.chunks_exact_mut(width).enumerate() {
            let max = self.max[query].max(more.max[query]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            // exp(-inf) is 0: what has seen no entries counts nothing.
            let (own, other) = (exp(self.max[query] - max), exp(more.max[query] - max));
            self.max[query] = max;
            self.sum[query] = self.sum[query] * own + more.sum[query] * other;
            let more = &more.out[query * width..][..width];
            weigh(level, out, own, more, other);
        }
    }
}

levels! {
    fn weigh(a: &mut [f32], own: f32, b: &[f32], other: f32) {
        for (a, b) in a.iter_mut().zip(b) {
            *a = *a * own + b * other;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn attend_avx2(unit: &Unit, part: usize, room: &mut Room, result: &mut Outcome) {
    // SAFETY: passed on.
    unsafe { attend::<super::simd::Avx2<{ super::simd::PLAIN }>>(unit, part, room, result) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn attend_avx512(unit: &Unit, part: usize, room: &mut Room, result: &mut Outcome) {
    // SAFETY: passed on.
    unsafe { attend::<super::simd::Avx512>(unit, part, room, result) }
}

/// Calls `kernel::<S, N>(first, …)` for up to four queries at a time: what fits any machine's
/// registers. A macro, because a closure would not have the instruction set.
macro_rules! by_fours {
    ($queries:expr, $kernel:ident::<$S:ident>($($arg:expr),*)) => {
        let mut first = 0;
        while first < $queries {
            match $queries - first {
                1 => $kernel::<$S, 1>(first, $($arg),*),
                2 => $kernel::<$S, 2>(first, $($arg),*),
                3 => $kernel::<$S, 3>(first, $($arg),*),
                _ => $kernel::<$S, 4>(first, $($arg),*),
            }
            first += 4;
        }
    };
}

/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
unsafe fn attend<S: Simd>(unit: &Unit, part: usize, room: &mut Room, result: &mut Outcome) {
    let kv = unit.attention.kv;
    let (shape, kv_head) = (kv.shape, unit.kv_head);
    let (dim, width, queries) = (shape.head_dim, padded(shape), unit.queries());
    let group = group(shape, unit.attention.heads);
    let pages = kv.table(unit.seats()[0].list as usize);
    let end = unit.visible().min((part + 1) * PART);
    let scale = 1.0 / (dim as f32).sqrt();
    for (query, q) in room.q.chunks_exact_mut(width).enumerate() {
        let row = unit.rows.0 + query / group;
        let head = kv_head * group + query % group;
        let from = &unit.attention.q[(row * unit.attention.heads + head) * dim..][..dim];
        for (q, from) in q.iter_mut().zip(from) {
            *q = from * scale;
        }
    }
    result.clear();
    for base in (part * PART..end).step_by(BLOCK) {
        let count = (end - base).min(BLOCK);
        let first = base / PAGE_TOKENS;
        let pages = &pages[first..end.div_ceil(PAGE_TOKENS)];
        for i in 0..count.div_ceil(PAGE_TOKENS) {
            // SAFETY: the caller has the instruction set; the rooms are as large as their sizes say.
            unsafe {
                fetch_ahead::<S>(pages.get(i + 1).map(|page| kv.keys(*page, kv_head)));
                decode_keys::<S>(shape, kv.keys(pages[i], kv_head), room.page);
                by_fours!(queries, score::<S>(room, dim, width, i));
            }
        }
        for (query, scores) in room.scores.chunks_exact_mut(BLOCK).enumerate() {
            let visible = unit.seats()[query / group].visible as usize;
            let visible = visible.saturating_sub(base).min(BLOCK);
            let out = &mut result.out[query * width..][..width];
            let (max, sum) = (&mut result.max[query], &mut result.sum[query]);
            soften(scores, visible, max, sum, out);
        }
        for i in 0..count.div_ceil(PAGE_TOKENS) {
            let slots = (count - i * PAGE_TOKENS).min(PAGE_TOKENS);
            // SAFETY: as above.
            unsafe {
                fetch_ahead::<S>(pages.get(i + 1).map(|page| kv.values(*page, kv_head)));
                decode_values::<S>(shape, kv.values(pages[i], kv_head), room.page);
                by_fours!(queries, add_values::<S>(room, result.out, width, i, slots));
            }
        }
    }
}

/// Asks for what will be decoded next.
#[inline(always)]
unsafe fn fetch_ahead<S: Simd>(bytes: Option<&[u8]>) {
    for line in bytes.unwrap_or_default().chunks(64) {
        // SAFETY: the caller has the instruction set.
        unsafe { S::prefetch(line.as_ptr()) };
    }
}

/// A tile of keys as floats [head_dim][PAGE_TOKENS].
#[inline(always)]
unsafe fn decode_keys<S: Simd>(shape: &KvShape, tile: &[u8], out: &mut [f32]) {
    let out = out.as_chunks_mut::<LANES>().0;
    // SAFETY: the caller has the instruction set.
    unsafe {
        match shape.ty {
            KvType::F32 => copy_floats(tile, out.as_flattened_mut()),
            KvType::F16 => {
                let tile = tile.as_chunks::<2>().0.as_chunks::<LANES>().0;
                for (out, halves) in out.iter_mut().zip(tile) {
                    S::store(S::load_half(halves), out);
                }
            }
            // The blocks of sixteen rows: scales, then bytes, four columns at a time.
            KvType::Q8_0 => {
                let blocks = tile.chunks_exact(LANES * 34);
                for (block, out) in blocks.zip(out.as_chunks_mut::<32>().0) {
                    let (scales, words) = block.split_at(2 * LANES);
                    let scales = S::load_half(&scales.as_chunks::<2>().0.as_chunks().0[0]);
                    let words = words.as_chunks::<4>().0.as_chunks::<LANES>().0;
                    for (words, out) in words.iter().zip(out.as_chunks_mut::<4>().0) {
                        let words = S::load_words(words);
                        for (i, out) in out.iter_mut().enumerate() {
                            let bytes = S::sign_extend_byte(S::shr_by(words, 8 * i as u32));
                            S::store(S::mul(S::to_float(bytes), scales), out);
                        }
                    }
                }
            }
        }
    }
}

/// A page of values as floats [PAGE_TOKENS][padded].
#[inline(always)]
unsafe fn decode_values<S: Simd>(shape: &KvShape, values: &[u8], out: &mut [f32]) {
    // SAFETY: the caller has the instruction set.
    unsafe {
        match shape.ty {
            KvType::F32 => copy_floats(values, out),
            KvType::F16 => {
                let values = values.as_chunks::<2>().0.as_chunks::<LANES>().0;
                for (out, halves) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(values) {
                    S::store(S::load_half(halves), out);
                }
            }
            KvType::Q8_0 => {
                let rows = Rows {
                    start: values.as_ptr(),
                    stride: shape.value_bytes,
                    last: PAGE_TOKENS - 1,
                };
                let width = out.len() / PAGE_TOKENS;
                for block in 0..width / 32 {
                    let mut scales = [0.0; LANES];
                    S::store(S::gather_half(rows, 34 * block), &mut scales);
                    for (slot, scale) in scales.iter().enumerate() {
                        let bytes = &values[slot * shape.value_bytes + 34 * block + 2..][..32];
                        let out = &mut out[slot * width + 32 * block..][..32];
                        let halves = bytes.as_chunks::<LANES>().0.iter();
                        for (bytes, out) in halves.zip(out.as_chunks_mut::<LANES>().0) {
                            S::store(S::mul(S::load_bytes(bytes), S::splat_float(*scale)), out);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn copy_floats(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *out = f32::from_le_bytes(*bytes);
    }
}

/// The scores of `N` queries from `first` on with page `i` of a block.
#[inline(always)]
unsafe fn score<S: Simd, const N: usize>(
    first: usize,
    room: &mut Room,
    dim: usize,
    width: usize,
    i: usize,
) {
    let q = &room.q[first * width..][..N * width];
    let scores = &mut room.scores[first * BLOCK..][..N * BLOCK];
    let keys = &room.page.as_chunks::<LANES>().0[..dim];
    // SAFETY: the caller has the instruction set; query `n` has `width` elements, `dim` at most.
    unsafe {
        let mut sums = [S::splat_float(0.0); N];
        for (d, keys) in keys.iter().enumerate() {
            let keys = S::load(keys);
            for (n, sum) in sums.iter_mut().enumerate() {
                let q = S::splat_float(*q.get_unchecked(n * width + d));
                *sum = S::mul_add(q, keys, *sum);
            }
        }
        for (sum, scores) in sums.into_iter().zip(scores.as_chunks_mut::<BLOCK>().0) {
            S::store(sum, &mut scores.as_chunks_mut::<LANES>().0[i]);
        }
    }
}

/// Turns the scores of a block into `exp(score - max)`, 0 for those from `visible` on; the sum and
/// the weighed values so far are scaled to the new maximum.
#[inline(always)]
fn soften(scores: &mut [f32], visible: usize, max: &mut f32, sum: &mut f32, out: &mut [f32]) {
    let scores = scores.as_chunks_mut::<LANES>().0;
    if visible == 0 {
        return scores.as_flattened_mut().fill(0.0);
    }
    let mut lanes = [*max; LANES];
    for (chunk, scores) in scores.iter_mut().enumerate() {
        for (i, score) in scores.iter_mut().enumerate() {
            let seen = chunk * LANES + i < visible;
            *score = if seen { *score } else { f32::NEG_INFINITY };
            lanes[i] = if *score > lanes[i] { *score } else { lanes[i] };
        }
    }
    let new = lanes.iter().fold(*max, |a, b| if *b > a { *b } else { a });
    // exp(-inf) is 0: before the first block there is nothing.
    let correction = exp(*max - new);
    let mut sums = [0.0; LANES];
    for scores in scores.iter_mut() {
        for (score, sum) in scores.iter_mut().zip(&mut sums) {
            *score = exp(*score - new);
            *sum += *score;
        }
    }
    *max = new;
    *sum = *sum * correction + sum_of_lanes(sums);
    for out in out.iter_mut() {
        *out *= correction;
    }
}

/// Adds the first `slots` values of page `i` of a block to the sums of `N` queries from `first` on.
#[inline(always)]
unsafe fn add_values<S: Simd, const N: usize>(
    first: usize,
    room: &mut Room,
    out: &mut [f32],
    width: usize,
    i: usize,
    slots: usize,
) {
    let weights = &room.scores[first * BLOCK..][..N * BLOCK];
    let out = &mut out[first * width..][..N * width];
    let values = room.page.as_chunks::<LANES>().0;
    let chunks = width / LANES;
    for chunk in 0..chunks {
        // SAFETY: the caller has the instruction set; slot, query and chunk are inside.
        unsafe {
            let mut sums = [S::splat_float(0.0); N];
            for (n, sum) in sums.iter_mut().enumerate() {
                let out = out.as_chunks().0;
                *sum = S::load(out.get_unchecked(n * chunks + chunk));
            }
            for slot in 0..slots {
                let value = S::load(values.get_unchecked(slot * chunks + chunk));
                for (n, sum) in sums.iter_mut().enumerate() {
                    let weight = *weights.get_unchecked(n * BLOCK + i * PAGE_TOKENS + slot);
                    *sum = S::mul_add(S::splat_float(weight), value, *sum);
                }
            }
            for (n, sum) in sums.into_iter().enumerate() {
                let out = out.as_chunks_mut().0;
                S::store(sum, out.get_unchecked_mut(n * chunks + chunk));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::dequantize_row;

    const KV_HEADS: usize = 2;
    const HEADS: usize = 6;
    /// Two parts, and of the second two blocks, a page and some entries.
    const ENTRIES: usize = PART + 2 * BLOCK + PAGE_TOKENS + 5;
    const PAGES: usize = ENTRIES.div_ceil(PAGE_TOKENS);

    /// Softmax attention in double precision, over keys and values as they are stored.
    fn oracle(kv: &KvCache, head: usize, visible: usize, q: &[f32]) -> Vec<f64> {
        let kv_head = head / (HEADS / KV_HEADS);
        let entry = |slot: usize, is_value: bool| {
            let page = kv.table(0)[slot / PAGE_TOKENS];
            let (mut key, mut value) = (vec![0; kv.shape.key_bytes], vec![0; kv.shape.key_bytes]);
            kv.read(page, kv_head, slot % PAGE_TOKENS, [&mut key, &mut value]);
            let mut out = vec![0.0; q.len()];
            let ty = kv.shape.ty.tensor_type();
            dequantize_row(ty, if is_value { &value } else { &key }, &mut out).unwrap();
            out
        };
        let score = |slot| {
            let products = q.iter().zip(entry(slot, false));
            let dot: f64 = products.map(|(q, k)| f64::from(*q) * f64::from(k)).sum();
            (dot / (q.len() as f64).sqrt()).exp()
        };
        let weights: Vec<f64> = (0..visible).map(score).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; q.len()];
        for (slot, weight) in weights.iter().enumerate() {
            for (out, value) in out.iter_mut().zip(entry(slot, true)) {
                *out += weight / total * f64::from(value);
            }
        }
        out
    }

    #[test]
    fn every_level_equals_the_oracle_and_each_other_bit_by_bit() {
        let levels: Vec<Level> = Level::available().collect();
        println!("attention tested: {levels:?}");
        // Heads of whole vectors, and others.
        for (ty, head_dim) in [
            (KvType::F16, 16),
            (KvType::F16, 64),
            (KvType::F16, 24),
            (KvType::F32, 64),
            (KvType::Q8_0, 64),
        ] {
            let shape = KvShape {
                planes: 1,
                sequences: 1,
                table_pages: PAGES,
                pages: PAGES,
                ..KvShape::new(ty, KV_HEADS, head_dim).unwrap()
            };
            // What no entry has been written to may hold anything.
            let mut pages = vec![0xff; shape.pages * shape.page_bytes()];
            let (mut tables, mut lengths) = ([0; PAGES], [0]);
            let (mut owners, mut free, mut counts) = ([0; PAGES], [0; PAGES], [0; 2]);
            let mut kv = KvCache {
                shape: &shape,
                pages: &mut pages,
                tables: &mut tables,
                lengths: &mut lengths,
                owners: &mut owners,
                free: &mut free,
                counts: &mut counts,
            };
            kv.reset();
            let wave = |i: usize, speed: f32| (i as f32 * speed).sin();
            for entry in 0..ENTRIES {
                let row = |speed: f32| -> Vec<f32> {
                    let first = entry * KV_HEADS * head_dim;
                    (0..KV_HEADS * head_dim)
                        .map(|i| wave(first + i, speed))
                        .collect()
                };
                let slot = kv.append(0).unwrap();
                // SAFETY: no other thread is at work.
                unsafe { kv.writer().store((0, slot), &row(0.7), &row(1.3)) }.unwrap();
            }
            let seen = [
                1,
                PAGE_TOKENS,
                BLOCK + 1,
                PART,
                PART + 1,
                ENTRIES - 1,
                ENTRIES,
            ];
            let seats = seen.map(|visible| Seat {
                visible: visible as u32,
                ..Seat::default()
            });
            let q: Vec<f32> = (0..seats.len() * HEADS * head_dim)
                .map(|i| 2.0 * wave(i, 0.3))
                .collect();
            let row = HEADS * head_dim;
            let run = |level: Level, threads: usize, first: usize, last: usize| {
                let mut team = Team::of(threads);
                let bytes = scratch_bytes(&shape, HEADS);
                let mut scratch = vec![0xff; threads * bytes + 64];
                let start = scratch.as_ptr().align_offset(64);
                let mut partials = vec![f32::NAN; partial_floats(&shape, HEADS)];
                let mut out = vec![f32::NAN; (last - first) * row];
                let attention = Attention {
                    level,
                    kv: &kv,
                    heads: HEADS,
                    seats: &seats[first..last],
                    q: &q[first * row..last * row],
                };
                let scratch = &mut scratch[start..][..threads * bytes];
                attention.run(&mut team, scratch, &mut partials, &mut out);
                out
            };
            let plain = run(Level::Scalar, 1, 0, seats.len());
            for (index, out) in plain.chunks_exact(head_dim).enumerate() {
                let q = &q[index * head_dim..][..head_dim];
                let visible = seats[index / HEADS].visible as usize;
                let expected = oracle(&kv, index % HEADS, visible, q);
                for (out, expected) in out.iter().zip(expected) {
                    // Values are at most 1, so the result is a mean of such; scores of at most 16
                    // are off by some 2^-24 of it, which their exponentials pass on.
                    assert!(
                        (f64::from(*out) - expected).abs() < 1e-5,
                        "{ty:?} {head_dim}"
                    );
                }
            }
            for level in &levels {
                let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
                for threads in [1, 2] {
                    let together = run(*level, threads, 0, seats.len());
                    assert!(together.iter().zip(&plain).all(same), "{ty:?} {level:?}");
                    for i in 0..seats.len() {
                        let alone = run(*level, threads, i, i + 1);
                        let expected = &plain[i * row..][..row];
                        assert!(alone.iter().zip(expected).all(same), "{ty:?} {level:?} {i}");
                    }
                }
            }
        }
    }
}

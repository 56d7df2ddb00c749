//! Causal attention over the ragged cache.

use super::ops::{exp, sum_of_lanes, sum_of_products};
#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
use super::simd::{LANES, Level, Scalar, Simd};
use super::team::Team;
use crate::kv::{KvCache, KvType, PAGE_TOKENS};
use crate::model::MAX_HEAD_DIM;

/// Where a row stands in the cache plane it attends to.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Seat {
    /// The row's sequence.
    pub sequence: u32,
    /// Entries that it sees: those at its own position and before.
    pub visible: u32,
}

/// Attention of each row's heads over the entries that it sees; `q` and `out` are
/// [n, heads, head_dim]. The softmax is taken page by page (Milakov and Gimelshein, 2018), so no
/// row of scores is ever stored.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    team: &mut Team,
    level: Level,
    kv: &KvCache,
    plane: usize,
    heads: usize,
    seats: &[Seat],
    q: &[f32],
    out: &mut [f32],
) {
    let head_dim = kv.shape().head_dim;
    let group = heads / kv.shape().kv_heads;
    team.for_each_piece(out, head_dim, |index, out| {
        let seat = seats[index / heads];
        let head = Head {
            kv,
            pages: kv.table(seat.sequence as usize, plane),
            kv_head: index % heads / group,
            visible: seat.visible as usize,
            q: &q[index * head_dim..][..head_dim],
        };
        head.run(level, out);
    });
}

/// One head of one row.
#[derive(Clone, Copy)]
struct Head<'a> {
    kv: &'a KvCache<'a>,
    pages: &'a [u32],
    kv_head: usize,
    visible: usize,
    q: &'a [f32],
}

impl Head<'_> {
    fn run(self, level: Level, out: &mut [f32]) {
        match level {
            // SAFETY: a `Level` is had only by a machine that has its instruction set.
            Level::Scalar => unsafe { attend::<Scalar>(self, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { attend_avx2(self, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { attend_avx512(self, out) },
            // SAFETY: as above; attention multiplies no bytes.
            #[cfg(target_arch = "aarch64")]
            Level::Neon | Level::Dotprod => unsafe { attend::<Neon<false>>(self, out) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn attend_avx2(head: Head, out: &mut [f32]) {
    // SAFETY: passed on.
    unsafe { attend::<super::simd::Avx2>(head, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn attend_avx512(head: Head, out: &mut [f32]) {
    // SAFETY: passed on.
    unsafe { attend::<super::simd::Avx512>(head, out) }
}

/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
unsafe fn attend<S: Simd>(head: Head, out: &mut [f32]) {
    let Head {
        kv,
        pages,
        kv_head,
        visible,
        q,
    } = head;
    let scale = 1.0 / (q.len() as f32).sqrt();
    // Half-precision keys and values of whole lanes are used as they lie; others are decoded first.
    let direct = kv.shape().ty == KvType::F16 && q.len().is_multiple_of(LANES);
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    out.fill(0.0);
    let mut left = visible;
    for &page in pages {
        let count = left.min(PAGE_TOKENS);
        if count == 0 {
            break;
        }
        left -= count;
        let mut scores = [0.0f32; PAGE_TOKENS];
        let scores = &mut scores[..count];
        if direct {
            // SAFETY: passed on.
            unsafe { score_halves::<S>(q, kv.page_keys(page, kv_head), scores) };
        } else {
            score_decoded(kv, page, kv_head, q, scores);
        }
        let mut page_max = max;
        for score in scores.iter_mut() {
            *score *= scale;
            page_max = page_max.max(*score);
        }
        // exp(-inf) is 0: the first page starts from nothing.
        let correction = exp(max - page_max);
        max = page_max;
        sum *= correction;
        for out in out.iter_mut() {
            *out *= correction;
        }
        for score in scores.iter_mut() {
            *score = exp(*score - max);
        }
        for p in scores.iter() {
            sum += p;
        }
        if direct {
            // SAFETY: passed on.
            unsafe { add_halves::<S>(scores, kv.page_values(page, kv_head), out) };
        } else {
            add_decoded(kv, page, kv_head, scores, out);
        }
    }
    for out in out.iter_mut() {
        *out /= sum;
    }
}

/// `q · key` of each slot; keys are [slots, head_dim].
#[inline(always)]
unsafe fn score_halves<S: Simd>(q: &[f32], keys: &[[u8; 2]], scores: &mut [f32]) {
    let q_lanes = q.as_chunks::<LANES>().0;
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(q.len())) {
        let mut lanes = [0.0; LANES];
        // SAFETY: the caller has the instruction set.
        unsafe {
            let mut sum = S::splat_float(0.0);
            for (q, key) in q_lanes.iter().zip(key.as_chunks::<LANES>().0) {
                sum = S::mul_add(S::load(q), S::load_half(key), sum);
            }
            S::store(sum, &mut lanes);
        }
        *score = sum_of_lanes(lanes);
    }
}

/// `out += Σ p · value`; values are [slots, head_dim].
#[inline(always)]
unsafe fn add_halves<S: Simd>(weights: &[f32], values: &[[u8; 2]], out: &mut [f32]) {
    let chunks = out.len() / LANES;
    let values = values.as_chunks::<LANES>().0;
    for (i, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let mut sum = S::load(out);
            for (slot, p) in weights.iter().enumerate() {
                let value = S::load_half(&values[slot * chunks + i]);
                sum = S::mul_add(S::splat_float(*p), value, sum);
            }
            S::store(sum, out);
        }
    }
}

#[inline(always)]
fn score_decoded(kv: &KvCache, page: u32, kv_head: usize, q: &[f32], scores: &mut [f32]) {
    let mut entry = [0.0f32; MAX_HEAD_DIM];
    let entry = &mut entry[..q.len()];
    for (slot, score) in scores.iter_mut().enumerate() {
        kv.key(page, kv_head, slot, entry);
        *score = sum_of_products(q, entry);
    }
}

#[inline(always)]
fn add_decoded(kv: &KvCache, page: u32, kv_head: usize, weights: &[f32], out: &mut [f32]) {
    let mut entry = [0.0f32; MAX_HEAD_DIM];
    let entry = &mut entry[..out.len()];
    for (slot, p) in weights.iter().enumerate() {
        kv.value(page, kv_head, slot, entry);
        for (out, value) in out.iter_mut().zip(&*entry) {
            *out += p * value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::thread::ThreadParams;
    use crate::kv::KvShape;

    const KV_HEADS: usize = 2;
    const HEADS: usize = 6;
    /// Two full pages and a part of one.
    const ENTRIES: usize = 2 * PAGE_TOKENS + 5;

    /// Softmax attention in double precision, over keys and values as they are stored.
    fn oracle(kv: &KvCache, head: usize, visible: usize, q: &[f32]) -> Vec<f64> {
        let kv_head = head / (HEADS / KV_HEADS);
        let entry = |slot: usize, is_value: bool| {
            let mut out = vec![0.0; q.len()];
            let page = kv.table(0, 0)[slot / PAGE_TOKENS];
            match is_value {
                true => kv.value(page, kv_head, slot % PAGE_TOKENS, &mut out),
                false => kv.key(page, kv_head, slot % PAGE_TOKENS, &mut out),
            }
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
        // Heads of whole lanes, whose half-precision entries are used as they lie, and another.
        for (ty, head_dim) in [
            (KvType::F16, 16),
            (KvType::F16, 64),
            (KvType::F16, 24),
            (KvType::F32, 64),
            (KvType::Q8_0, 64),
        ] {
            let shape = KvShape {
                ty,
                kv_heads: KV_HEADS,
                head_dim,
                planes: 1,
                sequences: 1,
                table_pages: 3,
                pages: 3,
                head_bytes: ty.tensor_type().row_bytes(head_dim).unwrap(),
            };
            let mut pages = vec![0; shape.pages * shape.page_bytes()];
            let (mut tables, mut lengths) = ([0; 3], [0]);
            let (mut free, mut free_count) = ([0; 3], [0]);
            let mut kv = KvCache {
                shape: &shape,
                pages: &mut pages,
                tables: &mut tables,
                lengths: &mut lengths,
                free: &mut free,
                free_count: &mut free_count,
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
                let slot = kv.append(0, 0).unwrap();
                kv.store((0, 0, slot), &row(0.7), &row(1.3)).unwrap();
            }
            let seats = [1, PAGE_TOKENS, ENTRIES].map(|visible| Seat {
                sequence: 0,
                visible: visible as u32,
            });
            let q: Vec<f32> = (0..seats.len() * HEADS * head_dim)
                .map(|i| 2.0 * wave(i, 0.3))
                .collect();
            let run = |level: Level| {
                let mut team = Team::new(1, &ThreadParams::default(), &mut []).unwrap();
                let mut out = vec![f32::NAN; q.len()];
                attention(&mut team, level, &kv, 0, HEADS, &seats, &q, &mut out);
                out
            };
            let plain = run(Level::Scalar);
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
                assert!(run(*level).iter().zip(&plain).all(same), "{ty:?} {level:?}");
            }
        }
    }
}

//! The operations of a layer, in plain Rust: the oracle of every faster kernel to come.
//!
//! Each output element is computed by one thread in one fixed order, which depends on the shapes of
//! the weights only. So a row's bits depend neither on the rows beside it nor on the number of
//! threads.

use super::team::{Disjoint, Team};
use crate::kv::{KvCache, PAGE_TOKENS};
use crate::model::{Linear, MAX_HEAD_DIM, Rope, RopePairing, Vector};
use crate::quant::dequantize_into;

/// Independent partial sums of a dot product: enough to fill the adders of any core that the
/// compiler vectorises for.
const LANES: usize = 16;
/// Outputs of a matrix product that one task computes.
const TASK_OUTPUTS: usize = 32;

/// `a · b`: lane `i` sums elements `i`, `i + 16`, …; then lanes are added pairwise.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `y[r] = W x[r] + bias` for `n` rows: `x` is [n, columns], `y` [n, outputs], `scratch` has room
/// for one decoded weight row per thread.
pub fn matmul(
    team: &mut Team,
    file: &[u8],
    linear: &Linear,
    x: &[f32],
    y: &mut [f32],
    n: usize,
    scratch: &mut [f32],
) {
    let weight = &linear.weight;
    let (columns, outputs) = (weight.columns, weight.rows);
    let x = &x[..n * columns];
    let stride = scratch.len() / team.threads();
    let y = Disjoint::new(&mut y[..n * outputs]);
    let scratch = Disjoint::new(scratch);
    team.run(outputs.div_ceil(TASK_OUTPUTS), &|task, thread| {
        // SAFETY: each thread has its own stretch of the scratch.
        let row = unsafe { scratch.slice(thread * stride, columns) };
        let first = task * TASK_OUTPUTS;
        for output in first..outputs.min(first + TASK_OUTPUTS) {
            dequantize_into(weight.ty, weight.row(file, output), row);
            for (r, x) in x.chunks_exact(columns).enumerate() {
                // SAFETY: element (r, output) belongs to the one task that has this output.
                let y = unsafe { y.slice(r * outputs + output, 1) };
                y[0] = dot(row, x);
            }
        }
        if let Some(bias) = &linear.bias {
            let values = bias.values(file).enumerate().skip(first);
            for (output, value) in values.take(TASK_OUTPUTS) {
                for r in 0..n {
                    // SAFETY: as above.
                    let y = unsafe { y.slice(r * outputs + output, 1) };
                    y[0] += value;
                }
            }
        }
    });
}

/// RMSNorm (Zhang and Sennrich, 2019) of each row: `y = x / sqrt(mean(x²) + ε) · w`.
pub fn rms_norm(
    team: &mut Team,
    file: &[u8],
    weight: &Vector,
    epsilon: f32,
    x: &[f32],
    y: &mut [f32],
) {
    let width = weight.length;
    team.for_each_piece(y, width, |row, y| {
        let x = &x[row * width..][..width];
        let scale = 1.0 / (dot(x, x) / width as f32 + epsilon).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight.values(file)) {
            *y = x * scale * w;
        }
    });
}

/// Cosine and sine of each rotated pair at `position`, into `table` [dims / 2] of (cos, sin).
/// In double precision: at position 100,000 a single-precision angle is off by half a percent.
pub fn rope_row(rope: &Rope, factors: Option<&[f32]>, position: usize, table: &mut [[f32; 2]]) {
    for (i, entry) in table.iter_mut().enumerate() {
        let exponent = 2.0 * i as f64 / rope.dims as f64;
        let factor = factors.map_or(1.0, |f| f64::from(f[i]));
        let angle = position as f64 / rope.scale / rope.base.powf(exponent) / factor;
        *entry = [angle.cos() as f32, angle.sin() as f32];
    }
}

/// Rotates the heads of each row of `x` [n, heads · head_dim]; row `c` of `x` turns by row
/// `rows[c]` of `table`.
pub fn rope(
    team: &mut Team,
    rope: &Rope,
    head_dim: usize,
    row_size: usize,
    rows: &[u32],
    table: &[[f32; 2]],
    x: &mut [f32],
) {
    let half = rope.dims / 2;
    team.for_each_piece(x, row_size, |row, x| {
        let table = &table[rows[row] as usize * half..][..half];
        for head in x.chunks_exact_mut(head_dim) {
            for (i, [cos, sin]) in table.iter().enumerate() {
                let (first, second) = match rope.pairing {
                    RopePairing::Neox => (i, i + half),
                    RopePairing::Norm => (2 * i, 2 * i + 1),
                };
                let (a, b) = (head[first], head[second]);
                head[first] = a * cos - b * sin;
                head[second] = b * cos + a * sin;
            }
        }
    });
}

/// `gate = silu(gate) · up` (SwiGLU; Shazeer, 2020), row by row.
pub fn swiglu(team: &mut Team, row_size: usize, gate: &mut [f32], up: &[f32]) {
    team.for_each_piece(gate, row_size, |row, gate| {
        for (g, u) in gate.iter_mut().zip(&up[row * row_size..]) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
    });
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Where a row stands in the cache plane it attends to.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Seat {
    /// The row's sequence.
    pub sequence: u32,
    /// Entries that it sees: those at its own position and before.
    pub visible: u32,
}

/// Causal attention of each row's heads over the entries that it sees; `q` and `out` are
/// [n, heads, head_dim]. The softmax is taken page by page (Milakov and Gimelshein, 2018), so no
/// row of scores is ever stored.
pub fn attention(
    team: &mut Team,
    kv: &KvCache,
    plane: usize,
    heads: usize,
    seats: &[Seat],
    q: &[f32],
    out: &mut [f32],
) {
    let head_dim = kv.shape().head_dim;
    let group = heads / kv.shape().kv_heads;
    let scale = 1.0 / (head_dim as f32).sqrt();
    team.for_each_piece(out, head_dim, |index, out| {
        let seat = seats[index / heads];
        let kv_head = index % heads / group;
        let q = &q[index * head_dim..][..head_dim];
        let mut entry = [0.0f32; MAX_HEAD_DIM];
        let entry = &mut entry[..head_dim];
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
        out.fill(0.0);
        let mut left = seat.visible as usize;
        for &page in kv.table(seat.sequence as usize, plane) {
            let count = left.min(PAGE_TOKENS);
            if count == 0 {
                break;
            }
            left -= count;
            let mut scores = [0.0f32; PAGE_TOKENS];
            let mut page_max = max;
            for (slot, score) in scores[..count].iter_mut().enumerate() {
                kv.key(page, kv_head, slot, entry);
                *score = dot(q, entry) * scale;
                page_max = page_max.max(*score);
            }
            // exp(-inf) is 0: the first page starts from nothing.
            let correction = (max - page_max).exp();
            max = page_max;
            sum *= correction;
            out.iter_mut().for_each(|o| *o *= correction);
            for (slot, score) in scores[..count].iter().enumerate() {
                let p = (score - max).exp();
                sum += p;
                kv.value(page, kv_head, slot, entry);
                for (o, v) in out.iter_mut().zip(&*entry) {
                    *o += p * v;
                }
            }
        }
        out.iter_mut().for_each(|o| *o /= sum);
    });
}

/// The Gauss error function in double precision, for exact GELU: Taylor's series near zero,
/// Lentz's continued fraction of erfc farther out (Abramowitz and Stegun 7.1.6, 7.1.14).
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 2.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term > 1e-17 * sum {
            n += 1.0;
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-a * a).exp() * sum
    } else if a > 6.0 {
        1.0
    } else {
        let tail = (1..=60).rev().fold(a, |tail, k| a + k as f64 / 2.0 / tail);
        1.0 - (-a * a).exp() / tail / std::f64::consts::PI.sqrt()
    };
    value.copysign(x)
}

/// GELU, the exact form: `x Φ(x)` (Hendrycks and Gimpel, 2016).
pub fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_adds_every_element_once() {
        for n in [0, 1, 15, 16, 17, 33, 576] {
            let a: Vec<f32> = (0..n).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..n).map(|i| (i % 5) as f32 - 2.0).collect();
            // Small whole numbers: every order of adding is exact.
            let expected: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(dot(&a, &b), expected, "{n} elements");
        }
    }

    #[test]
    fn erf_equals_published_values() {
        // Abramowitz and Stegun, table 7.1.
        let table = [
            (0.0, 0.0),
            (0.1, 0.1124629160),
            (0.5, 0.5204998778),
            (1.0, 0.8427007929),
            (1.9, 0.9927904292),
            (2.0, 0.9953222650),
            (3.0, 0.9999779095),
        ];
        for (x, expected) in table {
            assert!((erf(x) - expected).abs() < 1e-10, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        assert_eq!(erf(7.0), 1.0);
        assert!(erf(f64::NAN).is_nan());
    }
}

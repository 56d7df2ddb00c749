//! The operations of a layer besides its matrix products.
//!
//! Each output element is computed by one thread in one fixed order, which depends on the shapes of
//! the weights only. So a row's bits depend neither on the rows beside it nor on the number of
//! threads, nor on the instruction set.

use super::simd::Level;
use crate::model::{Rope, RopePairing, Vector};

/// Independent partial sums of a dot product: enough to fill the adders of any core that the
/// compiler vectorises for.
const LANES: usize = 16;

/// `a · b`: lane `i` sums elements `i`, `i + 16`, …; then lanes are added pairwise.
#[inline(always)]
pub(super) fn sum_of_products(a: &[f32], b: &[f32]) -> f32 {
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
    sum_of_lanes(lanes)
}

/// Lanes added pairwise: 0 and 8, 1 and 9, …, then 0 and 4, ….
#[inline(always)]
pub(super) fn sum_of_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x` to two units in the last place (Cody and Waite's reduction, a polynomial of degree seven on
/// what is left), in operations that vectorise. Below -87 it is 0, above 88.7 infinite.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: rounds what is added to a whole number
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.clamp(-88.0, 89.0) * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x.clamp(-88.0, 89.0) - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + c;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    // 2^n in two steps, for n = 128 has no bits of its own.
    let half = exponent as i32 >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let value = p * power(half) * power(exponent as i32 - half);
    let value = if x < -87.0 { 0.0 } else { value };
    let value = if x > 88.7 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

/// The largest of `x`, and the sum of `e^(x - largest)`: in double precision, for it may have many terms.
pub(crate) fn softmax_sums(level: Level, x: &[f32]) -> (f32, f64) {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..rest.len()].copy_from_slice(rest);
    let mut most = last;
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = if *x > *most { *x } else { *most };
        }
    }
    let largest = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0; LANES];
    add_exps(level, chunks, largest, &mut sums);
    add_exps(level, &[last], largest, &mut sums);
    (largest, sums.into_iter().sum())
}

/// RMSNorm (Zhang and Sennrich, 2019) of each row of `x`: `y = x / sqrt(mean(x²) + ε) · w`.
pub(super) fn norm<'a>(
    level: Level,
    file: &'a [u8],
    weight: &Vector,
    epsilon: f32,
    x: &'a [f32],
) -> impl Fn(usize, &mut [f32]) + Sync + use<'a> {
    let weight = weight.bytes(file);
    move |row, y| {
        let x = &x[row * weight.len()..][..weight.len()];
        norm_row(level, x, weight, epsilon, y);
    }
}

super::levels! {
    fn norm_row(x: &[f32], weight: &[[u8; 4]], epsilon: f32, y: &mut [f32]) {
        let scale = 1.0 / (sum_of_products(x, x) / x.len() as f32 + epsilon).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * f32::from_le_bytes(*w);
        }
    }

    fn add_exps(x: &[[f32; LANES]], largest: f32, sums: &mut [f64; LANES]) {
        for x in x {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += f64::from(exp(*x - largest));
            }
        }
    }

    /// `gate = silu(gate) · up` (SwiGLU; Shazeer, 2020).
    pub(crate) fn swiglu(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
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

super::levels! {
    /// Rotates the heads of one row `x` [heads · head_dim] by `table`.
    pub(crate) fn rotate(pairing: RopePairing, head_dim: usize, table: &[[f32; 2]], x: &mut [f32]) {
        for head in x.chunks_exact_mut(head_dim) {
            let turn = |a: &mut f32, b: &mut f32, [cos, sin]: &[f32; 2]| {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            };
            match pairing {
                RopePairing::Neox => {
                    let (first, rest) = head.split_at_mut(table.len());
                    for ((a, b), angle) in first.iter_mut().zip(rest).zip(table) {
                        turn(a, b, angle);
                    }
                }
                RopePairing::Norm => {
                    for ([a, b], angle) in head.as_chunks_mut::<2>().0.iter_mut().zip(table) {
                        turn(a, b, angle);
                    }
                }
            }
        }
    }
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
            assert_eq!(sum_of_products(&a, &b), expected, "{n} elements");
        }
    }

    #[test]
    fn exp_is_near_the_exact_one() {
        let mut worst = 0.0f64;
        for i in -870_000..887_000 {
            let x = i as f32 / 10_000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        // Two units in the last place.
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(
            (exp(0.0), exp(-100.0), exp(f32::NEG_INFINITY)),
            (1.0, 0.0, 0.0)
        );
        assert_eq!(
            (exp(89.0), exp(f32::INFINITY)),
            (f32::INFINITY, f32::INFINITY)
        );
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_sum_of_a_softmax_has_every_term() {
        for n in [1, 15, 16, 1000, 1007] {
            let x: Vec<f32> = (0..n).map(|i| (i * 37 % 101) as f32 / 7.0 - 9.0).collect();
            let most = x.iter().copied().fold(f32::MIN, f32::max);
            let exact: f64 = x.iter().map(|x| f64::from(x - most).exp()).sum();
            let plain = softmax_sums(Level::Scalar, &x);
            assert_eq!(plain.0, most);
            // Terms are right to two units in the last place.
            assert!((plain.1 / exact - 1.0).abs() < 2.0 * f64::from(f32::EPSILON));
            for level in Level::available() {
                assert_eq!(softmax_sums(level, &x), plain, "{level:?}, {n}");
            }
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

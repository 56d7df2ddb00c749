//! Scores → who goes on. Pure functions on the scores of one recursion.

use crate::model::{RouterFunction, RouterSpec};
use crate::order::sort_by;

/// How expert-choice routers decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Routing {
    /// Causal: a token goes on while its score passes the cut. What generation uses.
    #[default]
    Threshold,
    /// The paper's top-k over the whole text, which must come in one pass: scores texts against
    /// published numbers, cannot generate.
    Capacity,
}

/// The weight of a score: `alpha · f(score)`, the raw score for [`RouterFunction::Identity`].
/// Softmax is over several scores; see [`token_weights`].
pub(crate) fn weight(spec: &RouterSpec, score: f32) -> f32 {
    match spec.function {
        RouterFunction::Sigmoid | RouterFunction::Softmax => spec.alpha * sigmoid(score),
        RouterFunction::Tanh => spec.alpha * score.tanh(),
        RouterFunction::Identity => score,
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The least score that passes `cut`. A sigmoid of the score is compared with the cut, also where
/// the router's own function is tanh (whose trained cut, 0, is the same score); without a router
/// function the raw score is. An auxiliary router always ends in a sigmoid. A cut of 0 lets every
/// token pass, a cut of 1 none.
pub(crate) fn least_score(spec: &RouterSpec, cut: f32) -> f32 {
    if cut <= 0.0 {
        f32::NEG_INFINITY
    } else if cut >= 1.0 {
        f32::INFINITY
    } else if spec.function == RouterFunction::Identity && !spec.auxiliary {
        cut
    } else {
        (cut / (1.0 - cut)).ln()
    }
}

/// Capacity mode: keeps the best `max(1, floor(capacity · total))` scores; of equal scores the
/// earlier wins. Writes 1 to `kept` for those and 0 for the others.
///
/// # Panics
/// When `kept` is shorter than `scores`.
pub(crate) fn keep_best(
    spec: &RouterSpec,
    scores: &[f32],
    capacity: f64,
    total: usize,
    kept: &mut [u32],
) {
    let count = ((capacity * total as f64) as usize)
        .max(1)
        .min(scores.len());
    let kept = &mut kept[..scores.len()];
    kept.iter_mut().enumerate().for_each(|(i, k)| *k = i as u32);
    // The weight grows with the score (falls, with a negative alpha), and the score has no
    // saturated ends where different tokens look equal.
    let negative = spec.function != RouterFunction::Identity && spec.alpha < 0.0;
    let sign = if negative { -1.0 } else { 1.0 };
    sort_by(kept, &|a, b| {
        let (x, y) = (scores[a as usize] * sign, scores[b as usize] * sign);
        y.total_cmp(&x).then(a.cmp(&b))
    });
    kept[..count].sort_unstable();
    // From indices to flags, in place: an index is never below its own place in the list.
    let mut left = count;
    for i in (0..scores.len()).rev() {
        let best = left > 0 && kept[left - 1] as usize == i;
        left -= usize::from(best);
        kept[i] = u32::from(best);
    }
}

/// Token-choice: turns the scores of one token for each depth into weights.
pub(crate) fn token_weights(spec: &RouterSpec, scores: &mut [f32]) {
    if spec.function != RouterFunction::Softmax {
        scores.iter_mut().for_each(|s| *s = weight(spec, *s));
        return;
    }
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - max).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s = *s / sum * spec.alpha);
}

/// Token-choice: the index of the greatest `weight + bias`, the first of equals.
pub(crate) fn pick(weights: &[f32], biases: impl Iterator<Item = f32>) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, (weight, bias)) in weights.iter().zip(biases).enumerate() {
        if weight + bias > best.1 {
            best = (i, weight + bias);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RouterKind;

    fn spec(function: RouterFunction) -> RouterSpec {
        RouterSpec {
            kind: RouterKind::Expert,
            function,
            alpha: 0.1,
            temperature: 1.0,
            weighted: true,
            auxiliary: false,
            cut: 0.5,
            capacities: vec![],
        }
    }

    #[test]
    fn the_trained_cut_is_the_reference_s() {
        assert_eq!(least_score(&spec(RouterFunction::Sigmoid), 0.5), 0.0);
        assert_eq!(least_score(&spec(RouterFunction::Tanh), 0.5), 0.0);
        assert_eq!(least_score(&spec(RouterFunction::Identity), 0.5), 0.5);
        for function in [RouterFunction::Sigmoid, RouterFunction::Identity] {
            assert_eq!(least_score(&spec(function), 0.0), f32::NEG_INFINITY);
            assert_eq!(least_score(&spec(function), 1.0), f32::INFINITY);
        }
    }

    #[test]
    fn the_best_are_kept_and_at_least_one() {
        let scores = [0.5, -1.0, 3.0, 0.5, 0.5];
        let mut kept = [0; 5];
        let sigmoid = spec(RouterFunction::Sigmoid);
        keep_best(&sigmoid, &scores, 0.6, 5, &mut kept);
        assert_eq!(kept, [1, 0, 1, 1, 0]);
        keep_best(&sigmoid, &scores, 0.0, 5, &mut kept);
        assert_eq!(kept, [0, 0, 1, 0, 0]);
        keep_best(&sigmoid, &scores, 1.0, 50, &mut kept);
        assert_eq!(kept, [1; 5]);
        let mut negative = spec(RouterFunction::Sigmoid);
        negative.alpha = -0.1;
        keep_best(&negative, &scores, 0.2, 5, &mut kept);
        assert_eq!(kept, [0, 1, 0, 0, 0]);
    }

    #[test]
    fn the_first_of_equal_depths_is_picked_and_the_bias_counts() {
        assert_eq!(pick(&[0.2, 0.4, 0.4], [0.0; 3].into_iter()), 1);
        assert_eq!(pick(&[0.2, 0.4, 0.4], [0.3, 0.0, 0.0].into_iter()), 0);
    }
}

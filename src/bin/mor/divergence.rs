//! How far a model's predictions are from another model's: the figures of llama-perplexity's
//! `--kl-divergence`, but from whole logits in double precision.

/// Logits as logarithms of probabilities.
pub struct LogSoftmax<'a> {
    logits: &'a [f32],
    max: f64,
    /// Logarithm of the sum of the exponentials, relative to `max`.
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    /// Of logits that are all numbers, one at least.
    pub fn new(logits: &'a [f32]) -> Self {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|l| (f64::from(*l) - max).exp()).sum();
        LogSoftmax {
            logits,
            max,
            log_sum: sum.ln(),
        }
    }

    /// Logarithm of the probability of `token`.
    pub fn of(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.max - self.log_sum
    }

    /// The most likely token, the first of them.
    fn top(&self) -> usize {
        let mut top = 0;
        for (token, logit) in self.logits.iter().enumerate() {
            if *logit > self.logits[top] {
                top = token;
            }
        }
        top
    }

    /// KL(self || other) in nats: what a text of this distribution costs more under the other.
    fn divergence(&self, other: &Self) -> f64 {
        let terms = (0..self.logits.len()).map(|token| {
            let here = self.of(token);
            here.exp() * (here - other.of(token))
        });
        terms.sum()
    }
}

/// The divergences of many tokens.
#[derive(Default)]
pub struct Divergences {
    values: Vec<f64>,
    same_top: usize,
}

/// What there is to say of them.
#[derive(Debug)]
pub struct Summary {
    /// Nats a token.
    pub mean: f64,
    /// Of the mean.
    pub standard_error: f64,
    /// 99 % of the tokens are at most this far off.
    pub p99: f64,
    /// The largest.
    pub max: f64,
    /// Share of the tokens where both hold the same token for the most likely one.
    pub same_top: f64,
}

impl Divergences {
    /// Adds what base and model say of one token.
    pub fn add(&mut self, base: &LogSoftmax, model: &LogSoftmax) {
        self.values.push(base.divergence(model));
        self.same_top += usize::from(base.top() == model.top());
    }

    /// Of two tokens at least.
    pub fn summary(mut self) -> Summary {
        let n = self.values.len() as f64;
        let mean = self.values.iter().sum::<f64>() / n;
        let squares: f64 = self.values.iter().map(|v| (v - mean).powi(2)).sum();
        self.values.sort_unstable_by(f64::total_cmp);
        let last = self.values.len() - 1;
        Summary {
            mean,
            standard_error: (squares / (n - 1.0) / n).sqrt(),
            p99: between(&self.values, 0.99 * last as f64),
            max: self.values[last],
            same_top: self.same_top as f64 / n,
        }
    }
}

/// The value at a place between two values.
fn between(values: &[f64], place: f64) -> f64 {
    let below = values[place.floor() as usize];
    let above = values[place.ceil() as usize];
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-7, "{a} is not {b}");
    }

    fn divergence(base: &[f32], model: &[f32]) -> f64 {
        LogSoftmax::new(base).divergence(&LogSoftmax::new(model))
    }

    #[test]
    fn divergences_are_those_worked_out_by_hand() {
        // Probabilities 1/2, 1/2 and 1/4, 3/4.
        let (even, odd) = ([0.0, 0.0], [0.0, 3f32.ln()]);
        near(LogSoftmax::new(&odd).of(0), 0.25f64.ln());
        // 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3
        near(divergence(&even, &odd), 0.143_841_036);
        // 1/4 ln 1/2 + 3/4 ln 3/2: the direction matters.
        near(divergence(&odd, &even), 0.130_812_036);
        // Certain of what the other holds for one of four.
        near(divergence(&[0.0, -1e4, -1e4, -1e4], &[0.0; 4]), 4f64.ln());
    }

    #[test]
    fn large_logits_lose_nothing() {
        assert_eq!(divergence(&[1e4, 1e4], &[-1e4, -1e4]), 0.0);
        // A token that the model rules out costs its logit, not infinity.
        near(divergence(&[0.0, 0.0], &[0.0, -1e4]), 5e3 - 2f64.ln());
    }

    #[test]
    fn summaries_are_those_worked_out_by_hand() {
        let divergences = Divergences {
            values: vec![3.0, 1.0, 2.0],
            same_top: 2,
        };
        let summary = divergences.summary();
        near(summary.mean, 2.0);
        // Variance 1, of three values.
        near(summary.standard_error, (1.0f64 / 3.0).sqrt());
        near(summary.p99, 2.98);
        near(summary.max, 3.0);
        near(summary.same_top, 2.0 / 3.0);
    }

    #[test]
    fn the_first_of_equals_is_the_most_likely() {
        let mut divergences = Divergences::default();
        let row = |logits| LogSoftmax::new(logits);
        divergences.add(&row(&[0.0, 2.0, 2.0]), &row(&[1.0, 5.0, 5.0]));
        divergences.add(&row(&[0.0, 2.0, 2.0]), &row(&[1.0, 5.0, 5.1]));
        assert_eq!(divergences.same_top, 1);
    }
}

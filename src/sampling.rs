//! From logits to one token.

use crate::error::{Error, Result};
use std::cmp::Ordering;

/// How tokens are drawn. The filters work in the order of the fields, as in llama.cpp's sampler
/// chain: penalty, top-k, top-p, min-p, temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerParams {
    /// Logits of the last [`SamplerParams::repeat_last_n`] tokens are divided by this where
    /// positive and multiplied where negative (Keskar et al., 2019); 1 does nothing. From 0.001 to 1000, so that
    /// what comes of it is a number.
    pub repeat_penalty: f32,
    /// How far back the penalty looks.
    pub repeat_last_n: usize,
    /// Only the `top_k` likeliest tokens stay; 0 does nothing.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities add up to `top_p` stay; 1 does nothing.
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the likeliest stay; 0 does nothing.
    pub min_p: f32,
    /// Logits are divided by this before the draw; 0 takes the likeliest token.
    pub temperature: f32,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            temperature: 0.8,
            seed: 0,
        }
    }
}

impl SamplerParams {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        SamplerParams {
            temperature: 0.0,
            ..Default::default()
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |what: &str, value: f32, range: &str| {
            Err(Error::argument(format_args!(
                "{what} is {value}; it must be {range}"
            )))
        };
        if !(0.001..=1000.0).contains(&self.repeat_penalty) {
            return wrong(
                "the repetition penalty",
                self.repeat_penalty,
                "between 0.001 and 1000",
            );
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return wrong("top-p", self.top_p, "between 0 and 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return wrong("min-p", self.min_p, "between 0 and 1");
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return wrong("the temperature", self.temperature, "0 or positive");
        }
        Ok(())
    }
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Candidate {
    /// The token.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
}

/// Draws tokens; holds the random state.
#[derive(Debug, Clone)]
pub(crate) struct Sampler {
    params: SamplerParams,
    state: u64,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for numbers that are out of their range.
    pub fn new(params: SamplerParams) -> Result<Self> {
        params.check()?;
        let state = params.seed;
        Ok(Sampler { params, state })
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// The number in [0, 1) that the next draw uses.
    #[cfg(feature = "cuda")]
    pub(crate) fn peek(&self) -> f64 {
        next_f64(&mut self.state.clone())
    }

    /// Goes on as after a draw that was made elsewhere, with that number.
    #[cfg(feature = "cuda")]
    pub(crate) fn advance(&mut self) {
        if self.params.temperature != 0.0 {
            next_f64(&mut self.state);
        }
    }

    /// Where the random sequence stands.
    pub(crate) fn state(&self) -> u64 {
        self.state
    }

    /// Goes on from where another sampler's random sequence stood.
    pub(crate) fn set_state(&mut self, state: u64) {
        self.state = state;
    }

    /// Draws from `logits` `[vocab]`. `recent` are the tokens so far, for the penalty; `candidates`
    /// `[vocab]` is scratch.
    ///
    /// # Panics
    /// Without logits, and when `candidates` is shorter.
    pub fn sample(&mut self, logits: &[f32], recent: &[u32], candidates: &mut [Candidate]) -> u32 {
        let p = &self.params;
        let most = if p.temperature == 0.0 { 1 } else { p.top_k };
        let candidates = if p.repeat_penalty == 1.0 && (1..=FEW).contains(&most) {
            best_few(logits, most, candidates)
        } else {
            let all = all(logits, candidates);
            if p.repeat_penalty != 1.0 {
                let last = &recent[recent.len().saturating_sub(p.repeat_last_n)..];
                penalize(all, logits, last, p.repeat_penalty);
            }
            best(all, most)
        };
        if p.temperature == 0.0 {
            return candidates[0].token;
        }
        let candidates = filter(candidates, p);
        // Softmax over what is left; the first is the likeliest.
        let (max, temperature) = (candidates[0].logit, p.temperature);
        let weight = |c: &Candidate| f64::from((c.logit - max) / temperature).exp();
        let total: f64 = candidates.iter().map(weight).sum();
        let mut left = next_f64(&mut self.state) * total;
        for c in &*candidates {
            left -= weight(c);
            if left < 0.0 {
                return c.token;
            }
        }
        // Rounding may leave a crumb.
        candidates[candidates.len() - 1].token
    }
}

/// Each token once, however often it came.
fn penalize(candidates: &mut [Candidate], logits: &[f32], last: &[u32], penalty: f32) {
    for &token in last {
        if let Some(logit) = logits.get(token as usize) {
            let factor = if *logit > 0.0 { 1.0 / penalty } else { penalty };
            candidates[token as usize].logit = logit * factor;
        }
    }
}

/// Likelier first; of equals the earlier.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// A number that stands to those of other logits as [`f32::total_cmp`] has it.
fn rank(logit: f32) -> i32 {
    let bits = logit.to_bits().cast_signed();
    bits ^ ((bits >> 31).cast_unsigned() >> 1).cast_signed()
}

/// Every token.
fn all<'a>(logits: &[f32], candidates: &'a mut [Candidate]) -> &'a mut [Candidate] {
    let candidates = &mut candidates[..logits.len()];
    for (i, (c, logit)) in candidates.iter_mut().zip(logits).enumerate() {
        *c = Candidate {
            token: i as u32,
            logit: *logit,
        };
    }
    candidates
}

/// The `most` likeliest (0: all) in order.
fn best(candidates: &mut [Candidate], most: usize) -> &mut [Candidate] {
    let mut candidates = candidates;
    if most > 0 && most < candidates.len() {
        candidates.select_nth_unstable_by(most - 1, order);
        candidates = &mut candidates[..most];
    }
    candidates.sort_unstable_by(order);
    candidates
}

/// So many are found faster one by one.
const FEW: usize = 256;

/// What [`all`] and [`best`] find, without a look at most of the tokens: those of which sixteen
/// together have nothing that would be among the best so far. For a large vocabulary that is nearly
/// all.
fn best_few<'a>(
    logits: &[f32],
    most: usize,
    candidates: &'a mut [Candidate],
) -> &'a mut [Candidate] {
    const LANES: usize = 16;
    let mut count = 0;
    // The least that the next must be above.
    let mut least = i32::MIN;
    for (chunk, logits) in logits.chunks(LANES).enumerate() {
        if let Ok(lanes) = <&[f32; LANES]>::try_from(logits)
            && count == most
        {
            let above = lanes
                .iter()
                .fold(0, |any, l| any | u32::from(rank(*l) > least));
            if above == 0 {
                continue;
            }
        }
        for (lane, logit) in logits.iter().enumerate() {
            if count == most && rank(*logit) <= least {
                continue;
            }
            let new = Candidate {
                token: (chunk * LANES + lane) as u32,
                logit: *logit,
            };
            let before = &candidates[..count];
            let at = before.partition_point(|c| order(c, &new) == Ordering::Less);
            count = (count + 1).min(most);
            candidates.copy_within(at..count - 1, at + 1);
            candidates[at] = new;
            if count == most {
                least = rank(candidates[most - 1].logit);
            }
        }
    }
    &mut candidates[..count]
}

/// Top-p and min-p of candidates in order: what is left, never empty.
fn filter<'a>(candidates: &'a mut [Candidate], p: &SamplerParams) -> &'a mut [Candidate] {
    let max = candidates[0].logit;
    let weight = |c: &Candidate| f64::from(c.logit - max).exp();
    let mut count = candidates.len();
    if p.top_p < 1.0 {
        let enough = candidates.iter().map(weight).sum::<f64>() * f64::from(p.top_p);
        let mut sum = 0.0;
        let reached = candidates.iter().position(|c| {
            sum += weight(c);
            sum >= enough
        });
        count = reached.map_or(count, |at| at + 1);
    }
    if p.min_p > 0.0 {
        let likely = |c: &&Candidate| weight(c) >= f64::from(p.min_p);
        count = count.min(candidates.iter().take_while(likely).count());
    }
    &mut candidates[..count.max(1)]
}

/// SplitMix64 (Steele et al., 2014), the upper 53 bits as a number in [0, 1).
fn next_f64(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(params: SamplerParams, logits: &[f32], recent: &[u32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params).unwrap();
        let mut scratch = vec![Candidate::default(); logits.len()];
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[sampler.sample(logits, recent, &mut scratch) as usize] += 1;
        }
        counts
    }

    /// Nothing filtered.
    fn plain(temperature: f32) -> SamplerParams {
        SamplerParams {
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature,
            ..Default::default()
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let n = 100_000;
        for temperature in [0.5, 1.0, 2.0] {
            let counts = draws(plain(temperature), &logits, &[], n);
            let total: f64 = logits
                .iter()
                .map(|l| f64::from(l / temperature).exp())
                .sum();
            for (count, logit) in counts.iter().zip(logits) {
                let p = f64::from(logit / temperature).exp() / total;
                // Five standard deviations of a binomial count.
                let tolerance = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
                assert!((*count as f64 - n as f64 * p).abs() < tolerance);
            }
        }
    }

    /// The first numbers of the algorithm's authors for this seed: a seed gives the same draws in every version.
    #[test]
    fn random_numbers_are_splitmix64_s() {
        let mut state = 1_234_567;
        for expected in [
            6_457_827_717_110_365_317u64,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ] {
            let drawn = next_f64(&mut state);
            assert_eq!(drawn, (expected >> 11) as f64 / (1u64 << 53) as f64);
        }
    }

    #[test]
    fn the_short_way_finds_the_same() {
        let mut state = 5;
        for length in [1, 15, 16, 40, 1000] {
            // Few values, so that many are equal.
            let value = |_| match (next_f64(&mut state) * 60.0).floor() as f32 {
                // Zeros of both signs, and what the engine lets nobody see.
                50.0 => -0.0,
                51.0 => f32::NEG_INFINITY,
                52.0 => f32::INFINITY,
                53.0 => f32::NAN,
                54.0 => -f32::NAN,
                value => 25.0 - value,
            };
            let logits: Vec<f32> = (0..length).map(value).collect();
            let mut scratch = [(); 2].map(|()| vec![Candidate::default(); length]);
            for most in [1, 2, 17, FEW] {
                let [a, b] = &mut scratch;
                let short = best_few(&logits, most, a);
                let long = best(all(&logits, b), most);
                let same = |(a, b): (&Candidate, &Candidate)| {
                    a.token == b.token && a.logit.to_bits() == b.logit.to_bits()
                };
                assert!(short.len() == long.len() && short.iter().zip(long.iter()).all(same));
            }
        }
    }

    #[test]
    fn filters_leave_what_they_say() {
        let logits = [0.0, 3.0, 2.9, -5.0, 2.8];
        let with = |change: fn(&mut SamplerParams)| {
            let mut params = plain(1.0);
            change(&mut params);
            let counts = draws(params, &logits, &[], 2000);
            counts.iter().map(|c| *c > 0).collect::<Vec<_>>()
        };
        let greedy = [false, true, false, false, false];
        assert_eq!(with(|p| p.top_k = 1), greedy);
        assert_eq!(with(|p| p.top_k = 3), [false, true, true, false, true]);
        assert_eq!(with(|p| p.top_p = 0.3), greedy);
        // exp(3 - 2.9) = 1.1: the second is 0.905 times as likely, the third 0.82.
        assert_eq!(with(|p| p.min_p = 0.9), [false, true, true, false, false]);
        assert_eq!(with(|p| p.temperature = 0.0), greedy);
    }

    #[test]
    fn the_penalty_counts_each_recent_token_once() {
        let logits = [2.0, 1.9];
        let mut params = SamplerParams::greedy();
        params.repeat_penalty = 1.2;
        assert_eq!(draws(params.clone(), &logits, &[0, 0, 0], 1), [0, 1]);
        params.repeat_last_n = 1;
        assert_eq!(draws(params, &logits, &[0, 0, 1], 1), [1, 0]);
    }

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(SamplerParams { seed, ..plain(1.0) }).unwrap();
            let mut scratch = vec![Candidate::default(); 50];
            let mut draw = || sampler.sample(&logits, &[], &mut scratch);
            (0..20).map(|_| draw()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn impossible_parameters_are_refused() {
        for change in [
            (|p| p.temperature = -1.0) as fn(&mut SamplerParams),
            |p| p.temperature = f32::NAN,
            |p| p.top_p = 1.5,
            |p| p.min_p = -0.1,
            |p| p.repeat_penalty = 0.0,
            |p| p.repeat_penalty = 1e-38,
            |p| p.repeat_penalty = f32::INFINITY,
        ] {
            let mut params = SamplerParams::default();
            change(&mut params);
            assert!(Sampler::new(params).is_err());
        }
    }
}

//! Random numbers that are the same on every machine: whole numbers until the last step.

/// SplitMix64 (Steele et al., 2014).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// The sequence of a seed, one of many by `stream`.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut random = Random(seed);
        random.0 = random.next() ^ stream.wrapping_mul(0xd134_2543_de82_ef95);
        random
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of mean 0 and deviation 1, nearly normal: four even ones added up.
    pub(super) fn normal(&mut self) -> f32 {
        /// Of the sum of four whole numbers below 2^16: 2^16 · √(4/12).
        const DEVIATION: f32 = 37_837.2;
        let bits = self.next();
        let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
        (sum as f32 - 131_070.0) / DEVIATION
    }
}

/// Token ids, each as likely as any other, without an end: what models are calibrated and measured
/// with.
#[derive(Debug, Clone)]
pub struct RandomTokens {
    random: Random,
    vocab: u64,
}

impl RandomTokens {
    /// The sequence of a seed, of tokens below `vocab`.
    pub fn new(vocab: usize, seed: u64) -> Self {
        RandomTokens {
            random: Random::new(seed, 0),
            vocab: vocab.max(1) as u64,
        }
    }
}

impl Iterator for RandomTokens {
    type Item = u32;
    fn next(&mut self) -> Option<u32> {
        Some((self.random.next() % self.vocab) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_nearly_normal() {
        let mut random = Random::new(7, 1);
        let numbers: Vec<f64> = (0..100_000).map(|_| f64::from(random.normal())).collect();
        let mean = |of: fn(f64) -> f64| numbers.iter().map(|n| of(*n)).sum::<f64>() / 1e5;
        assert!(mean(|n| n).abs() < 0.02);
        assert!((mean(|n| n * n) - 1.0).abs() < 0.02);
    }

    #[test]
    fn tokens_are_those_of_the_seed_and_cover_the_vocabulary() {
        let tokens = |seed| RandomTokens::new(8, seed).take(200).collect::<Vec<_>>();
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
        assert!((0..8).all(|t| tokens(1).contains(&t)));
    }
}

//! How fast this machine reads memory: what generation is measured against.

use std::hint::black_box;
use std::time::Instant;

/// Far more than any cache holds.
const BYTES: usize = 256 << 20;
const PASSES: usize = 5;

/// Bytes that `threads` threads together read in a second, the best of some passes.
pub fn measure(threads: usize) -> f64 {
    // Not zeros, which the system may give as one page.
    let words = vec![1u64; BYTES / size_of::<u64>()];
    let part = words.len().div_ceil(threads);
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(part) {
                scope.spawn(|| black_box(sum(part)));
            }
        });
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}

/// Sums that do not wait for each other, so that reading is what takes the time.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for words in words.as_chunks::<32>().0 {
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

//! How fast this machine reads memory: what generation is measured against.

use std::hint::black_box;
use std::thread::Builder;
use std::time::Instant;

/// Far more than any cache holds.
const BYTES: usize = 256 << 20;
const PASSES: usize = 5;

/// Bytes that `threads` threads together read in a second, the best of some passes; none where the system refuses the
/// memory or a thread for that.
pub fn measure(threads: usize) -> Option<f64> {
    let mut words = Vec::new();
    words.try_reserve_exact(BYTES / size_of::<u64>()).ok()?;
    // Not zeros, which the system may give as one page.
    words.resize(BYTES / size_of::<u64>(), 1u64);
    let (own, others) = words.split_at(words.len().div_ceil(threads));
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in others.chunks(own.len()) {
                let sums = move || black_box(sum(part));
                Builder::new().spawn_scoped(scope, sums).ok()?;
            }
            black_box(sum(own));
            Some(())
        })?;
        Some(BYTES as f64 / start.elapsed().as_secs_f64())
    };
    let mut best = 0.0;
    for _ in 0..PASSES {
        best = pass()?.max(best);
    }
    Some(best)
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

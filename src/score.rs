//! Texts that are scored: the logits of many rows, and how likely tokens are.

use crate::cpu::ops;
use crate::cpu::simd::Level;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::session::{Chunk, Session};
use std::sync::atomic::Ordering;

impl Session {
    /// Runs `tokens` and calls `each(index, logits)` for every one of them, in order: the logits
    /// `[vocab]` of what follows `tokens[index]`.
    ///
    /// # Errors
    /// As [`Session::prefill`], and what `each` answers.
    pub fn score(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let model = self.model.clone();
        let mut done = 0;
        self.run(tokens, false, &mut |chunk| {
            let rows = chunk.rows;
            chunk.score(&model, rows, &mut |logits| {
                each(done, logits)?;
                done += 1;
                Ok(())
            })
        })
    }

    /// Runs `tokens` and writes into `out`, for each of them, the natural logarithm of the probability that the model gave
    /// it after all before: the softmax of its logits, whatever the sampler would do. Their sum says how likely the
    /// tokens are as a continuation of the text so far, of which there must be some. (So not with capacity routing,
    /// which wants the whole text at once.) Faster with more
    /// [`SessionParams::logit_rows`](crate::SessionParams::logit_rows) than one.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where `out` has another length than `tokens`, [`Error::NotReady`] for an empty session and
    /// after a rewind; else as [`Session::prefill`]. On an error the session is as it was before, and what `out` holds
    /// means nothing.
    pub fn log_probabilities(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        self.check(self.length, tokens)?;
        if out.len() != tokens.len() {
            return Err(Error::argument(format_args!(
                "there is room for {} numbers, but there are {} tokens",
                out.len(),
                tokens.len()
            )));
        }
        let model = self.model.clone();
        out[0] = log_probability(self.logits()?, tokens[0]);
        let mut rest = tokens[1..].iter().zip(&mut out[1..]);
        self.run(tokens, false, &mut |chunk| {
            // Of what follows the last token nothing is asked.
            let rows = chunk.rows.min(rest.len());
            chunk.score(&model, rows, &mut |logits| {
                if let Some((token, out)) = rest.next() {
                    *out = log_probability(logits, *token);
                }
                Ok(())
            })
        })
    }
}

impl Chunk<'_, '_> {
    /// Calls `each` with the logits of the first `rows` rows, as many of which are computed together as there is room for.
    fn score(
        self,
        model: &Model,
        rows: usize,
        each: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let vocab = model.hyperparameters().vocab_size;
        let most = self.buffers.logits.len() / vocab;
        for first in (0..rows).step_by(most) {
            if self.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
                return Err(Error::Cancelled);
            }
            let count = most.min(rows - first);
            self.engine.logits(model, self.buffers, first, count)?;
            self.buffers.logits[..count * vocab]
                .chunks_exact(vocab)
                .try_for_each(&mut *each)?;
        }
        Ok(())
    }
}

/// The logarithm of the softmax at a token.
fn log_probability(logits: &[f32], token: u32) -> f32 {
    let (largest, sum) = ops::softmax_sums(Level::best(), logits);
    (f64::from(logits[token as usize]) - f64::from(largest) - sum.ln()) as f32
}

//! Text, token by token: sample, run, decode, watch for the end.

use crate::error::Result;
use crate::sampling::Sampler;
use crate::session::Session;
use crate::tokenizer::{Tokenizer, Utf8Stream};
use std::ops::ControlFlow;

/// When to stop.
#[derive(Debug, Clone, Default)]
pub struct GenerateParams {
    /// Most tokens to write.
    pub max_tokens: usize,
    /// Texts that end the generation; they are not part of the result.
    pub stop: Vec<String>,
}

/// One token as it comes.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// The token.
    pub token: u32,
    /// Recursions that it ran.
    pub depth: u8,
    /// The text that is certain with this token: whole characters, nothing that may still turn
    /// out to be a stop string. May be empty.
    pub text: &'a str,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model drew an end-of-generation token.
    End,
    /// A stop string came up.
    Stop,
    /// [`GenerateParams::max_tokens`] were written.
    Length,
    /// The session's context is full.
    ContextFull,
    /// The callback asked for it.
    Callback,
}

impl Session {
    /// Continues the text so far. Every token that `each` sees has been run and is part of the
    /// session; an end-of-generation token is neither run nor shown.
    pub fn generate(
        &mut self,
        tokenizer: &Tokenizer,
        sampler: &mut Sampler,
        params: &GenerateParams,
        mut each: impl FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Finish> {
        let mut text = Utf8Stream::new(tokenizer.max_piece_bytes())?;
        let mut scanner = StopScanner::new(&params.stop);
        let (mut last, mut finish) = (None, Finish::Length);
        for _ in 0..params.max_tokens {
            let token = self.sample(sampler)?;
            if tokenizer.is_end(token) {
                finish = Finish::End;
                break;
            }
            if self.tokens().len() == self.plan().params().context {
                finish = Finish::ContextFull;
                break;
            }
            self.prefill(&[token])?;
            let depth = self.depths().last().copied().unwrap_or(0);
            last = Some((token, depth));
            // A model may have more rows than its tokenizer has tokens; those are no text.
            let known = (token as usize) < tokenizer.vocab_size();
            let bytes = if known {
                tokenizer.token_bytes(token, false)?
            } else {
                &[]
            };
            let stopped = scanner.push(text.push(bytes)?);
            let text = scanner.ready();
            if each(Piece { token, depth, text }).is_break() {
                return Ok(Finish::Callback);
            }
            if stopped {
                return Ok(Finish::Stop);
            }
        }
        // What was held back turned out to be plain text.
        scanner.push(text.finish());
        if let Some((token, depth)) = last {
            let text = scanner.flush();
            if !text.is_empty() && each(Piece { token, depth, text }).is_break() {
                return Ok(Finish::Callback);
            }
        }
        Ok(finish)
    }
}

/// Holds back text that may be the beginning of a stop string.
struct StopScanner<'a> {
    stops: &'a [String],
    /// Text that came and was not yet given out, from `given` on.
    text: String,
    given: usize,
    /// End of what may be given out.
    ready: usize,
}

impl<'a> StopScanner<'a> {
    fn new(stops: &'a [String]) -> Self {
        StopScanner {
            stops,
            text: String::new(),
            given: 0,
            ready: 0,
        }
    }

    /// Takes more text; true when a stop string is complete.
    fn push(&mut self, more: &str) -> bool {
        self.text.drain(..self.given);
        self.given = 0;
        self.text.push_str(more);
        let stops = self.stops.iter().filter(|s| !s.is_empty());
        if let Some(at) = stops.clone().filter_map(|s| self.text.find(&**s)).min() {
            self.ready = at;
            return true;
        }
        let held = stops.map(|s| overlap(&self.text, s)).max().unwrap_or(0);
        self.ready = self.text.len() - held;
        false
    }

    /// What is certain, once.
    fn ready(&mut self) -> &str {
        let start = std::mem::replace(&mut self.given, self.ready);
        &self.text[start..self.ready]
    }

    /// All that is left.
    fn flush(&mut self) -> &str {
        self.ready = self.text.len();
        self.ready()
    }
}

/// The length of the longest end of `text` that begins `stop` without being all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let fits = |length: &usize| {
        stop.is_char_boundary(*length) && text.as_bytes().ends_with(&stop.as_bytes()[..*length])
    };
    let most = text.len().min(stop.len().saturating_sub(1));
    (1..=most).rev().find(fits).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out when `pieces` go in, and whether a stop string did.
    fn scan(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut scanner = StopScanner::new(&stops);
        let mut out = Vec::new();
        for piece in pieces {
            let stopped = scanner.push(piece);
            out.push(scanner.ready().to_owned());
            if stopped {
                return (out, true);
            }
        }
        out.push(scanner.flush().to_owned());
        (out, false)
    }

    fn check(stops: &[&str], pieces: &[&str], out: &[&str], stopped: bool) {
        let out = out.iter().map(|s| s.to_string()).collect();
        assert_eq!(scan(stops, pieces), (out, stopped));
    }

    #[test]
    fn a_stop_string_never_shows_even_in_pieces() {
        check(&[], &["ab", "c"], &["ab", "c", ""], false);
        check(&["END"], &["one E", "N", "D two"], &["one ", "", ""], true);
        check(
            &["END"],
            &["one E", "N", "T"],
            &["one ", "", "ENT", ""],
            false,
        );
        check(&["END"], &["one EN"], &["one ", "EN"], false);
        check(&["\n\n", "aab"], &["xaa", "aab"], &["x", "aa"], true);
        check(&["é!"], &["caf", "é", "?"], &["caf", "", "é?", ""], false);
        check(&[""], &["ab"], &["ab", ""], false);
    }
}

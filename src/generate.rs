//! Text, token by token: sample, run, decode, watch for the end.

use crate::error::{Error, Result};
use crate::model::Model;
use crate::session::Session;
use crate::tokenizer::{Tokenizer, Utf8Stream};
use std::ops::ControlFlow;

/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub struct GenerateParams<'a> {
    /// Most tokens to write. The default is as many as the context has room for.
    pub max_tokens: usize,
    /// Texts that end the generation, each of at most [`MAX_STOP_BYTES`]; they are not part of
    /// the result.
    pub stop: &'a [&'a str],
}

impl GenerateParams<'_> {
    /// What [`Session::generate`] looks at before it begins.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stop string that is too long.
    pub fn check(&self) -> Result<()> {
        check_stops(self.stop.iter().copied())
    }
}

fn check_stops<'s>(mut stops: impl Iterator<Item = &'s str>) -> Result<()> {
    match stops.find(|stop| stop.len() > MAX_STOP_BYTES) {
        None => Ok(()),
        Some(long) => Err(Error::argument(format_args!(
            "a stop string has {} bytes; at most {MAX_STOP_BYTES} are possible",
            long.len()
        ))),
    }
}

impl Default for GenerateParams<'_> {
    fn default() -> Self {
        GenerateParams {
            max_tokens: usize::MAX,
            stop: &[],
        }
    }
}

/// One token as it comes. Text that was held back may follow in a last one, which has the last token again: who
/// wants the tokens has them from [`Session::tokens`].
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Piece<'a> {
    /// The token.
    pub token: u32,
    /// Recursions that it ran.
    pub depth: u8,
    /// The text that is certain with this token: whole characters, nothing that may still turn
    /// out to be a stop string. May be empty. (A zero byte, which is not part of it, follows it in
    /// memory, for C.)
    pub text: &'a str,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The model drew an end-of-generation token.
    End,
    /// A stop string came up. Its tokens, which were not shown, were run and are in the session:
    /// [`Session::rewind`] takes them out before the text goes on.
    Stop,
    /// [`GenerateParams::max_tokens`] were written.
    Length,
    /// The session's context is full.
    ContextFull,
    /// The callback asked for it.
    Callback,
    /// It was cancelled; the session stands after the last token that was shown.
    Cancelled,
}

/// Bytes that a session keeps for generated text: twice what may be held back (the beginning of a
/// stop string, and what one token adds), once to hold it and once to show it.
pub(crate) fn text_room(model: &Model) -> usize {
    let piece = model.tokenizer().map_or(0, |t| t.max_piece_bytes());
    2 * (MAX_STOP_BYTES + Utf8Stream::max_text_bytes(piece))
}

impl Session {
    /// Continues the text so far, with the session's sampler and the model's tokenizer. Every
    /// token that `each` sees has been run and is part of the session; an end-of-generation token
    /// is neither run nor shown. Where the context is full, or a cancel or an error comes, the token that
    /// would have been next is drawn again by the next call, and text that was held back is shown.
    ///
    /// # Errors
    /// [`Error::NotReady`] without a prompt and after a rewind, [`Error::Tokenizer`] where the model has none, [`Error::InvalidArgument`] for a
    /// stop string that is too long; else as [`Session::step`]. The tokens before a failure stay.
    pub fn generate(
        &mut self,
        params: &GenerateParams,
        each: impl FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Finish> {
        self.generate_with(params.max_tokens, params.stop.iter().copied(), each)
    }

    /// As [`Session::generate`], with the stop strings from anywhere.
    pub(crate) fn generate_with<'s>(
        &mut self,
        max_tokens: usize,
        stops: impl Iterator<Item = &'s str> + Clone,
        mut each: impl FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Finish> {
        check_stops(stops.clone())?;
        let model = self.model().clone();
        let tokenizer = model.tokenizer()?;
        let (mut stream, mut held) = (Utf8Stream::new(), Held::default());
        let (mut last, mut finish) = (None, Ok(Finish::Length));
        for _ in 0..max_tokens {
            let token = match self.next_token(tokenizer) {
                Ok(ControlFlow::Continue(token)) => token,
                Ok(ControlFlow::Break(end)) => {
                    finish = Ok(end);
                    break;
                }
                Err(error) => {
                    finish = Err(error);
                    break;
                }
            };
            let depth = self.depths().last().copied().unwrap_or(0);
            last = Some((token, depth));
            let bytes = tokenizer.drawn_bytes(token, false);
            let (room, shown) = self.text_room();
            held.forget_given(room);
            stream.push(bytes, |more| held.append(room, more));
            let stopped = held.scan(room, stops.clone());
            let text = held.ready(room, shown);
            if each(Piece { token, depth, text }).is_break() {
                return Ok(Finish::Callback);
            }
            if stopped {
                return Ok(Finish::Stop);
            }
        }
        // What was held back turned out to be plain text.
        let (room, shown) = self.text_room();
        held.forget_given(room);
        held.append(room, stream.finish());
        if let Some((token, depth)) = last {
            let text = held.all(room, shown);
            if !text.is_empty() && each(Piece { token, depth, text }).is_break() {
                return finish.and(Ok(Finish::Callback));
            }
        }
        finish
    }

    /// Draws the next token and runs it, unless something ends the text.
    fn next_token(&mut self, tokenizer: &Tokenizer) -> Result<ControlFlow<Finish, u32>> {
        if self.take_cancel() {
            return Ok(ControlFlow::Break(Finish::Cancelled));
        }
        let drawn_from = self.sampler.state();
        let token = self.sample()?;
        if tokenizer.is_end(token) {
            return Ok(ControlFlow::Break(Finish::End));
        }
        let end = match self.tokens().len() == self.plan().params().context {
            true => Ok(Finish::ContextFull),
            false => match self.prefill(&[token]) {
                Ok(()) => return Ok(ControlFlow::Continue(token)),
                Err(Error::Cancelled) => Ok(Finish::Cancelled),
                Err(error) => Err(error),
            },
        };
        self.sampler.set_state(drawn_from);
        end.map(ControlFlow::Break)
    }
}

/// Text that came, of which the end is held back while it may be the beginning of a stop string.
/// The text itself lies in a buffer that is passed to each call.
#[derive(Default)]
struct Held {
    /// Bytes of text in the buffer.
    length: usize,
    /// How much of it was given out.
    given: usize,
    /// How much of it may be given out.
    ready: usize,
}

impl Held {
    fn forget_given(&mut self, room: &mut [u8]) {
        room.copy_within(self.given..self.length, 0);
        self.length -= self.given;
        self.ready -= self.given;
        self.given = 0;
    }

    fn append(&mut self, room: &mut [u8], more: &str) {
        room[self.length..][..more.len()].copy_from_slice(more.as_bytes());
        self.length += more.len();
    }

    /// Looks for stop strings; true when one is complete. What comes before it, or before what
    /// may become one, is ready.
    fn scan<'s>(&mut self, room: &[u8], stops: impl Iterator<Item = &'s str> + Clone) -> bool {
        let text = as_text(&room[..self.length]);
        let stops = stops.filter(|s| !s.is_empty());
        if let Some(at) = stops.clone().filter_map(|s| text.find(s)).min() {
            self.ready = at;
            return true;
        }
        let held = stops.map(|s| overlap(text, s)).max().unwrap_or(0);
        self.ready = text.len() - held;
        false
    }

    /// What is certain, once: copied to `shown`, with a zero byte behind it.
    fn ready<'t>(&mut self, room: &[u8], shown: &'t mut [u8]) -> &'t str {
        let start = std::mem::replace(&mut self.given, self.ready);
        let length = self.ready - start;
        shown[..length].copy_from_slice(&room[start..self.ready]);
        shown[length] = 0;
        as_text(&shown[..length])
    }

    /// All that is left.
    fn all<'t>(&mut self, room: &[u8], shown: &'t mut [u8]) -> &'t str {
        self.ready = self.length;
        self.ready(room, shown)
    }
}

/// Only whole characters are written to the buffer and only whole characters are cut out.
fn as_text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
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
        let (mut held, mut out) = (Held::default(), Vec::new());
        let (mut room, mut shown) = ([0; 64], [0; 64]);
        for piece in pieces {
            held.forget_given(&mut room);
            held.append(&mut room, piece);
            let stopped = held.scan(&room, stops.iter().copied());
            out.push(held.ready(&room, &mut shown).to_owned());
            if stopped {
                return (out, true);
            }
        }
        out.push(held.all(&room, &mut shown).to_owned());
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

//! SentencePiece's BPE: the text as one word of characters, merged to the token of the best score.

use crate::error::{Error, Result};

use super::merge::{EncodeScratch, Merge, NONE};
use super::vocabulary::{VISIBLE_SPACE, Vocabulary};

/// What turns a text into tokens.
pub(super) struct Spm {
    /// The order of each token's score: lower is better.
    pub ranks: Vec<u32>,
    /// The token of each byte, or [`NONE`].
    pub bytes: [u32; 256],
    /// Whether a space is put before the text and after each special token.
    pub add_space_prefix: bool,
    /// Stands for characters that have neither token nor bytes.
    pub unknown: Option<u32>,
}

/// Turns a score into a rank: better scores are lower. None for what is not a number.
pub(super) fn rank(score: f32) -> Option<u32> {
    if score.is_nan() {
        return None;
    }
    // Adding 0 turns -0 into 0. The bits of floats sort as their values do once the sign is turned
    // (positive) or all is (negative); inverted once more, the largest score comes first.
    let bits = (score + 0.0).to_bits();
    Some(match bits >> 31 {
        0 => !bits & 0x7FFF_FFFF,
        _ => bits,
    })
}

impl Spm {
    /// Appends the tokens of `text`, which begins the whole text or follows a special token.
    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        text: &str,
        scratch: &mut EncodeScratch,
        push: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<()> {
        if text.len() > scratch.max_piece_bytes() {
            return Err(super::no_room(text.len(), scratch));
        }
        let EncodeScratch {
            text: word, merger, ..
        } = scratch;
        word.clear();
        if self.add_space_prefix {
            word.push(b' ');
        }
        // Spaces and ▁ are the same to SentencePiece; here both are the space.
        for (index, part) in text.split(VISIBLE_SPACE).enumerate() {
            if index > 0 {
                word.push(b' ');
            }
            word.extend_from_slice(part.as_bytes());
        }
        let word = word.as_slice();
        merger.clear();
        let mut start = 0;
        while start < word.len() {
            let end = start + character_length(word[start]);
            let id = vocabulary.find(&word[start..end]).unwrap_or(NONE);
            merger.push(id, start);
            start = end;
        }
        merger.run(word.len(), |left, right| {
            let id = vocabulary.find(&word[left.start..right.end])?;
            let rank = *self.ranks.get(id as usize)?;
            Some(Merge { rank, id })
        });
        let mut after_unknown = false;
        merger.symbols().try_for_each(|(id, start)| {
            if id != NONE {
                after_unknown = false;
                return push(id);
            }
            let character = &word[start..start + character_length(word[start])];
            after_unknown = self.spell(character, after_unknown, push)?;
            Ok(())
        })
    }

    /// Appends a character that is no token, by its bytes or as the unknown token. A row of unknown
    /// ones is one token. Tells whether the character was unknown.
    fn spell(
        &self,
        character: &[u8],
        after_unknown: bool,
        push: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<bool> {
        let bytes = match character {
            b" " => VISIBLE_SPACE.as_bytes(),
            other => other,
        };
        let ids = || bytes.iter().map(|&byte| self.bytes[usize::from(byte)]);
        if ids().all(|id| id != NONE) {
            ids().try_for_each(push)?;
            return Ok(false);
        }
        let unknown = self.unknown.ok_or_else(|| {
            Error::tokenizer(format_args!(
                "the vocabulary has no token for '{}', and none for unknown characters",
                String::from_utf8_lossy(character)
            ))
        })?;
        if !after_unknown {
            push(unknown)?;
        }
        Ok(true)
    }
}

/// The bytes of the character that begins with `byte`, in text that is known to be UTF-8.
fn character_length(byte: u8) -> usize {
    match byte {
        0..0xC0 => 1,
        0xC0..0xE0 => 2,
        0xE0..0xF0 => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_scores_rank_lower() {
        let scores = [
            f32::INFINITY,
            2.0,
            1e-40,
            0.0,
            -1e-40,
            -1.0,
            -2.0,
            f32::MIN,
            f32::NEG_INFINITY,
        ];
        let ranks: Vec<u32> = scores.iter().filter_map(|&score| rank(score)).collect();
        assert_eq!(ranks.len(), scores.len());
        assert!(ranks.is_sorted_by(|a, b| a < b), "{ranks:x?}");
        assert!(ranks.iter().all(|&rank| rank < NONE));
        assert_eq!(rank(-0.0), rank(0.0));
        assert_eq!(rank(f32::NAN), None);
    }
}

//! Tokens that are found in text as a whole before anything else, and those that end a generation.

use std::collections::HashMap;

use crate::error::Result;
use crate::memory::reserved;
use crate::order::sort_by;

use super::vocabulary::{Kind, Vocabulary};

/// The special tokens of a vocabulary, to be found in text.
///
/// The leftmost is taken, and of those that begin at the same place the longest: HF's rule. (HF looks for tokens that it
/// normalizes in a second round; a GGUF file does not tell which those are.) llama.cpp takes the longest of the whole text
/// first, which differs only where two special tokens overlap.
pub(super) struct Specials {
    /// Sorted by their bytes.
    ids: Vec<u32>,
    /// The first of `ids` that begins with each byte or a later one.
    starts: [u32; 257],
}

/// A special token in a text.
pub(super) struct Found {
    pub id: u32,
    pub start: usize,
    pub end: usize,
}

impl Specials {
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self> {
        let is_special = |id: &u32| {
            let kind = vocabulary.kind(*id);
            matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown)
                && !vocabulary.bytes(*id).is_empty()
        };
        let all = 0..vocabulary.len() as u32;
        let mut ids = reserved(all.clone().filter(is_special).count())?;
        ids.extend(all.filter(is_special));
        sort_by(&mut ids, &|a, b| {
            vocabulary.bytes(a).cmp(vocabulary.bytes(b))
        });
        let mut starts = [0; 257];
        for (byte, start) in (0u16..).zip(&mut starts) {
            let before = ids.partition_point(|&id| u16::from(vocabulary.bytes(id)[0]) < byte);
            *start = before as u32;
        }
        Ok(Specials { ids, starts })
    }

    /// The first special token in `text` at or after `from`. Control tokens only if asked: text
    /// from outside must not speak for the system.
    pub(super) fn find(
        &self,
        vocabulary: &Vocabulary,
        text: &[u8],
        from: usize,
        control: bool,
    ) -> Option<Found> {
        if self.ids.is_empty() {
            return None;
        }
        (from..text.len()).find_map(|start| {
            let (length, id) = self.longest(vocabulary, &text[start..], control)?;
            Some(Found {
                id,
                start,
                end: start + length,
            })
        })
    }

    /// The longest special token that `text` begins with.
    fn longest(&self, vocabulary: &Vocabulary, text: &[u8], control: bool) -> Option<(usize, u32)> {
        let first = usize::from(*text.first()?);
        let range = self.starts[first] as usize..self.starts[first + 1] as usize;
        let mut candidates = &self.ids[range];
        let mut best = None;
        // Those in `candidates` all begin with the first `length` bytes of the text.
        for length in 1.. {
            let Some((&shortest, longer)) = candidates.split_first() else {
                break;
            };
            if vocabulary.bytes(shortest).len() == length {
                if control || vocabulary.kind(shortest) == Kind::UserDefined {
                    best = Some((length, shortest));
                }
                candidates = longer;
            }
            let Some(&next) = text.get(length) else {
                break;
            };
            let from = candidates.partition_point(|&id| vocabulary.bytes(id)[length] < next);
            let to = candidates.partition_point(|&id| vocabulary.bytes(id)[length] <= next);
            candidates = &candidates[from..to];
        }
        best
    }
}

/// Names of the token that ends a turn, likeliest first.
const END_OF_TURN: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Further names of tokens after which nothing is to be generated.
const OTHER_ENDS: [&str; 11] = [
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<|eom_id|>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
];

/// Names of the fill-in-the-middle tokens that llama.cpp counts as ends; of each row the first one
/// that the vocabulary has.
const FILL_ENDS: [&[&str]; 3] = [
    &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    &[
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
    ],
    &["<|file_sep|>"],
];

/// The token that ends a turn, by name.
pub(super) fn end_of_turn(names: &HashMap<&str, u32>) -> Option<u32> {
    END_OF_TURN.iter().find_map(|name| names.get(name)).copied()
}

/// All tokens that end a generation by their names, with these.
pub(super) fn ends(names: &HashMap<&str, u32>) -> impl Iterator<Item = (&'static str, u32)> {
    let find = |name: &&'static str| names.get(name).map(|id| (*name, *id));
    let named = END_OF_TURN.iter().chain(&OTHER_ENDS).filter_map(find);
    let fill = FILL_ENDS.iter();
    named.chain(fill.filter_map(move |row| row.iter().find_map(find)))
}

#[cfg(test)]
mod tests {
    use super::super::vocabulary::Spelling;
    use super::*;

    fn found(text: &str, control: bool) -> Vec<(usize, usize, u32)> {
        let tokens = [
            ("<s>", Kind::Control),
            ("  ", Kind::UserDefined),
            ("    ", Kind::UserDefined),
            ("<s", Kind::UserDefined),
            ("<", Kind::Normal),
            ("", Kind::Control),
            ("é", Kind::UserDefined),
            ("<s>>", Kind::Control),
        ];
        let texts = tokens.iter().map(|(text, _)| text).collect();
        let kinds = tokens.iter().map(|&(_, kind)| kind).collect();
        let vocabulary = Vocabulary::new(&texts, kinds, Spelling::SentencePiece, false).unwrap();
        let specials = Specials::new(&vocabulary).unwrap();
        let mut from = 0;
        std::iter::from_fn(|| {
            let found = specials.find(&vocabulary, text.as_bytes(), from, control)?;
            from = found.end;
            Some((found.start, found.end, found.id))
        })
        .collect()
    }

    #[test]
    fn the_longest_at_the_leftmost_place() {
        assert_eq!(found("       x", true), [(0, 4, 2), (4, 6, 1)]);
        assert_eq!(found("a<s>>", true), [(1, 5, 7)]);
        assert_eq!(found("a<s>", true), [(1, 4, 0)]);
        assert_eq!(found("aé<", true), [(1, 3, 6)]);
        assert_eq!(found("", true), []);
    }

    #[test]
    fn control_tokens_only_when_asked() {
        assert_eq!(found("a<s>>", false), [(1, 3, 3)]);
        assert_eq!(found("a<s>", false), [(1, 3, 3)]);
    }

    #[test]
    fn ends_by_name() {
        let names = HashMap::from([
            ("<|endoftext|>", 0),
            ("<|im_end|>", 2),
            ("<reponame>", 4),
            ("x", 9),
        ]);
        assert_eq!(end_of_turn(&names), Some(2));
        let mut all: Vec<u32> = ends(&names).map(|(_, id)| id).collect();
        all.sort();
        assert_eq!(all, [0, 2, 4]);
    }
}

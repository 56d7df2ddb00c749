//! Byte-level BPE: words of bytes, merged by a list of pairs.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::gguf::Strings;
use crate::memory::{reserved, reserved_string};

use super::byte_level;
use super::excerpt;
use super::merge::{EncodeScratch, Merge, NONE};
use super::vocabulary::Vocabulary;
use super::words::{PreTokenizer, Words};

/// What turns a text into tokens.
pub(super) struct Bpe {
    pub pre: PreTokenizer,
    /// Whether a word that is a token is taken as it is.
    pub ignore_merges: bool,
    /// The token of each byte, or [`NONE`].
    pub bytes: [u32; 256],
    pub merges: Merges,
}

impl Bpe {
    /// Appends the tokens of `text`. A byte that is no token disappears, as in HF and llama.cpp.
    pub(super) fn encode(
        &self,
        vocabulary: &Vocabulary,
        text: &str,
        scratch: &mut EncodeScratch,
        push: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<()> {
        for word in Words::new(self.pre, text) {
            if self.ignore_merges
                && let Some(id) = vocabulary.find(word.as_bytes())
            {
                push(id)?;
                continue;
            }
            if word.len() > scratch.max_piece_bytes() {
                return Err(super::no_room(word.len(), scratch));
            }
            let merger = &mut scratch.merger;
            merger.clear();
            for (start, &byte) in word.as_bytes().iter().enumerate() {
                let id = self.bytes[usize::from(byte)];
                if id != NONE {
                    merger.push(id, start);
                }
            }
            merger.run(word.len(), |left, right| {
                self.merges.find(left.id, right.id)
            });
            merger.symbols().try_for_each(|(id, _)| push(id))?;
        }
        Ok(())
    }
}

/// The tokens of single bytes.
pub(super) fn byte_ids(names: &HashMap<&str, u32>) -> [u32; 256] {
    let mut ids = [NONE; 256];
    for character in ('\u{21}'..='\u{143}').filter(|&c| byte_level::byte_of(c).is_some()) {
        let mut buffer = [0; 4];
        let name: &str = character.encode_utf8(&mut buffer);
        if let (Some(byte), Some(&id)) = (byte_level::byte_of(character), names.get(name)) {
            ids[usize::from(byte)] = id;
        }
    }
    ids
}

/// The pairs that are merged. Kept by their left token, so that finding one is a search among the
/// few right tokens of it.
pub(super) struct Merges {
    /// Where the pairs of each left token begin; one more than tokens.
    starts: Vec<u32>,
    /// Sorted by the right token within the pairs of a left one.
    pairs: Vec<Pair>,
}

struct Pair {
    right: u32,
    rank: u32,
    id: u32,
}

impl Merges {
    /// Reads `tokenizer.ggml.merges`: "left right", earliest first.
    pub(super) fn new(lines: &Strings, names: &HashMap<&str, u32>, tokens: usize) -> Result<Self> {
        let mut all: Vec<(u32, Pair)> = reserved(lines.len())?;
        let longest = lines.iter().map(str::len).max().unwrap_or(0);
        let mut joined = reserved_string(longest)?;
        for (rank, line) in (0..NONE).zip(lines.iter()) {
            all.push(parse(rank, line, names, &mut joined)?);
        }
        // A pair that is listed twice keeps its first rank.
        all.sort_unstable_by_key(|(left, pair)| (*left, pair.right, pair.rank));
        all.dedup_by_key(|(left, pair)| (*left, pair.right));
        let mut starts = reserved(tokens + 1)?;
        let mut pairs: Vec<Pair> = reserved(all.len())?;
        for (left, pair) in all {
            while starts.len() <= left as usize {
                starts.push(pairs.len() as u32);
            }
            pairs.push(pair);
        }
        starts.resize(tokens + 1, pairs.len() as u32);
        Ok(Merges { starts, pairs })
    }

    fn find(&self, left: u32, right: u32) -> Option<Merge> {
        let left = left as usize;
        let range = *self.starts.get(left)? as usize..*self.starts.get(left + 1)? as usize;
        let pairs = &self.pairs[range];
        let index = pairs.binary_search_by_key(&right, |pair| pair.right).ok()?;
        let Pair { rank, id, .. } = pairs[index];
        Some(Merge { rank, id })
    }
}

/// `joined` has room for the line.
fn parse(
    rank: u32,
    line: &str,
    names: &HashMap<&str, u32>,
    joined: &mut String,
) -> Result<(u32, Pair)> {
    let wrong = |what: &str| {
        Error::tokenizer(format_args!(
            "merge {rank} ('{}') {what}; the file's vocabulary is damaged",
            excerpt(line)
        ))
    };
    let (left, right) = line
        .split_once(' ')
        .filter(|(left, right)| !left.is_empty() && !right.is_empty())
        .ok_or_else(|| wrong("is not two tokens with a space between"))?;
    let find = |name: &str| names.get(name).copied();
    let both = find(left).zip(find(right));
    let (left_id, right_id) =
        both.ok_or_else(|| wrong("names a token that the vocabulary lacks"))?;
    joined.clear();
    joined.push_str(left);
    joined.push_str(right);
    let id = find(joined).ok_or_else(|| wrong("makes a token that the vocabulary lacks"))?;
    let right = right_id;
    Ok((left_id, Pair { right, rank, id }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(merges: &[&str]) -> Strings {
        merges.iter().collect()
    }

    #[test]
    fn pairs_are_found() {
        let names = HashMap::from([("a", 0), ("b", 1), ("ab", 2), ("ba", 3), ("aba", 4)]);
        let list = lines(&["a b", "b a", "ab a", "a b", "a ba"]);
        let merges = Merges::new(&list, &names, 5).unwrap();
        let find = |left, right| merges.find(left, right).map(|merge| (merge.rank, merge.id));
        assert_eq!(find(0, 1), Some((0, 2)));
        assert_eq!(find(1, 0), Some((1, 3)));
        assert_eq!(find(2, 0), Some((2, 4)));
        assert_eq!(find(0, 3), Some((4, 4)));
        assert_eq!(find(4, 4), None);
        assert_eq!(find(3, 0), None);
        assert_eq!(find(NONE, 0), None);
    }

    #[test]
    fn damaged_merges_are_refused() {
        let names = HashMap::from([("a", 0), ("b", 1)]);
        for bad in ["a b", "a c", "c a", "ab", "", " ", "a ", " a", "a b c"] {
            let result = Merges::new(&lines(&[bad]), &names, 2);
            assert!(matches!(result, Err(Error::Tokenizer(_))), "{bad:?}");
        }
        assert!(Merges::new(&lines(&[]), &names, 2).is_ok());
    }

    #[test]
    fn all_bytes_have_names() {
        let names = HashMap::from([("Ġ", 7), ("!", 8), ("Ń", 9)]);
        let ids = byte_ids(&names);
        assert_eq!((ids[0x20], ids[0x21], ids[0xAD]), (7, 8, 9));
        assert_eq!(ids.iter().filter(|&&id| id == NONE).count(), 253);
    }
}

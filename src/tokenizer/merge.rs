//! Merging neighbours, best pair first: the heart of both kinds of BPE.
//!
//! A word's symbols stand in a fixed array, linked to their neighbours; a tournament tree over that
//! array knows the best pair. A merge costs O(log n) whatever the word, so a hostile word of a
//! megabyte costs no more per byte than a normal one, and nothing is allocated.

use std::mem::size_of;

use crate::error::{Error, Result};

/// Stands for no symbol, no token and no rank.
pub(super) const NONE: u32 = u32::MAX;

/// One piece of a word.
#[derive(Clone, Copy)]
struct Symbol {
    /// The token that it is, or [`NONE`].
    id: u32,
    /// Where it begins in the word.
    start: u32,
    previous: u32,
    next: u32,
    /// How early the pair of this symbol and the next is merged; [`NONE`] if never.
    rank: u32,
    /// The token that the pair becomes.
    merged: u32,
}

/// A pair that can be merged.
pub(super) struct Merge {
    /// Lower is earlier; less than [`NONE`].
    pub rank: u32,
    pub id: u32,
}

/// One side of a pair, as a vocabulary sees it.
#[derive(Clone, Copy)]
pub(super) struct Side {
    pub id: u32,
    pub start: usize,
    pub end: usize,
}

/// The working memory of `Tokenizer::encode_into`, sized once for the longest piece of text without
/// a break; it does not grow, and a longer piece is an error. A piece is a word for byte-level
/// vocabularies, whose texts may be of any length, and what stands between two special tokens for
/// SentencePiece's.
pub struct EncodeScratch {
    max_piece_bytes: usize,
    pub(super) merger: Merger,
    /// A text as SentencePiece normalizes it.
    pub(super) text: Vec<u8>,
}

impl EncodeScratch {
    /// Memory for pieces of up to `max_piece_bytes` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a size that nobody can have.
    pub fn new(max_piece_bytes: usize) -> Result<Self> {
        let bytes = Self::bytes(max_piece_bytes)?;
        let mut scratch = EncodeScratch {
            max_piece_bytes,
            merger: Merger {
                symbols: Vec::new(),
                winners: Vec::new(),
                length: 0,
            },
            text: Vec::new(),
        };
        let slots = max_piece_bytes + 1;
        let merger = &mut scratch.merger;
        merger
            .symbols
            .try_reserve_exact(slots)
            .and_then(|()| merger.winners.try_reserve_exact(slots))
            .and_then(|()| scratch.text.try_reserve_exact(slots))
            .map_err(|_| Error::OutOfMemory { bytes })?;
        // Filled here, so that the pages are there before the first text is.
        merger.symbols.resize(slots, Symbol::EMPTY);
        merger.winners.resize(slots, 0);
        scratch.text.resize(slots, 0);
        scratch.text.clear();
        Ok(scratch)
    }

    /// The bytes that [`EncodeScratch::new`] takes for pieces of up to `max_piece_bytes` bytes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a size that nobody can have.
    pub fn bytes(max_piece_bytes: usize) -> Result<usize> {
        // One slot more than bytes: SentencePiece puts a space before the text.
        const SLOT: usize = size_of::<Symbol>() + size_of::<u32>() + 1;
        let slots = max_piece_bytes.checked_add(1);
        // Positions are 32-bit numbers, of which the largest means none.
        slots
            .filter(|&slots| u32::try_from(slots).is_ok_and(|slots| slots < NONE))
            .and_then(|slots| slots.checked_mul(SLOT))
            .ok_or_else(|| {
                Error::argument(format_args!(
                    "a text of {max_piece_bytes} bytes is too long to be tokenized at once; split it"
                ))
            })
    }

    /// The longest piece that fits, in bytes.
    pub fn max_piece_bytes(&self) -> usize {
        self.max_piece_bytes
    }
}

impl std::fmt::Debug for EncodeScratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncodeScratch")
            .field("max_piece_bytes", &self.max_piece_bytes)
            .finish_non_exhaustive()
    }
}

impl Symbol {
    const EMPTY: Symbol = Symbol {
        id: NONE,
        start: 0,
        previous: NONE,
        next: NONE,
        rank: NONE,
        merged: NONE,
    };
}

/// The symbols of one word while they are merged.
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    /// A tournament tree over the first `length` symbols: node n has the nodes 2n and 2n + 1 below
    /// it, the nodes from `length` on are the symbols themselves, and node 1 knows the winner.
    winners: Vec<u32>,
    length: usize,
}

impl Merger {
    /// Begins a new word.
    pub(super) fn clear(&mut self) {
        self.length = 0;
    }

    /// Appends a symbol that begins at byte `start` of the word. There is room for one for each byte
    /// of the longest piece and one more.
    pub(super) fn push(&mut self, id: u32, start: usize) {
        self.symbols[self.length] = Symbol {
            id,
            start: start as u32, // below u32::MAX: `bytes` has checked
            ..Symbol::EMPTY
        };
        self.length += 1;
    }

    /// Merges until no pair is left that `find` knows. `end` is the length of the word in bytes.
    pub(super) fn run(&mut self, end: usize, find: impl Fn(Side, Side) -> Option<Merge>) {
        let length = self.length;
        if length < 2 {
            return;
        }
        for index in 0..length {
            self.symbols[index].previous = if index == 0 { NONE } else { index as u32 - 1 };
            let last = index + 1 == length;
            self.symbols[index].next = if last { NONE } else { index as u32 + 1 };
        }
        for index in 0..length {
            self.rank(index, end, &find);
        }
        for node in (1..length).rev() {
            self.play(node);
        }
        loop {
            let left = self.winners[1] as usize;
            if self.symbols[left].rank == NONE {
                return;
            }
            self.merge(left, end, &find);
        }
    }

    /// The symbols that are left: token (or [`NONE`]) and first byte, in order.
    pub(super) fn symbols(&self) -> impl Iterator<Item = (u32, usize)> + '_ {
        let mut index = if self.length == 0 { NONE } else { 0 };
        std::iter::from_fn(move || {
            let symbol = self.symbols[..self.length].get(index as usize)?;
            // A word of one symbol was never linked, but its `next` is NONE from `push`.
            index = symbol.next;
            Some((symbol.id, symbol.start as usize))
        })
    }

    fn merge(&mut self, left: usize, end: usize, find: &impl Fn(Side, Side) -> Option<Merge>) {
        let Symbol {
            next,
            merged,
            previous,
            ..
        } = self.symbols[left];
        let right = next as usize;
        let after = self.symbols[right].next;
        self.symbols[left].id = merged;
        self.symbols[left].next = after;
        if after != NONE {
            self.symbols[after as usize].previous = left as u32;
        }
        self.symbols[right].rank = NONE;
        self.replay(right);
        self.rank(left, end, find);
        self.replay(left);
        if previous != NONE {
            self.rank(previous as usize, end, find);
            self.replay(previous as usize);
        }
    }

    /// Looks up the pair of a symbol and the next.
    fn rank(&mut self, left: usize, end: usize, find: &impl Fn(Side, Side) -> Option<Merge>) {
        let right = self.symbols[left].next;
        let found = match right {
            NONE => None,
            _ => find(self.side(left, end), self.side(right as usize, end)),
        };
        let symbol = &mut self.symbols[left];
        (symbol.rank, symbol.merged) = found.map_or((NONE, NONE), |found| (found.rank, found.id));
    }

    fn side(&self, index: usize, end: usize) -> Side {
        let symbol = &self.symbols[index];
        let end = match symbol.next {
            NONE => end,
            next => self.symbols[next as usize].start as usize,
        };
        Side {
            id: symbol.id,
            start: symbol.start as usize,
            end,
        }
    }

    /// Plays the matches above a symbol again.
    fn replay(&mut self, index: usize) {
        let mut node = (self.length + index) / 2;
        while node > 0 {
            self.play(node);
            node /= 2;
        }
    }

    fn play(&mut self, node: usize) {
        let (a, b) = (self.winner(2 * node), self.winner(2 * node + 1));
        let key = |index: u32| (self.symbols[index as usize].rank, index);
        self.winners[node] = if key(a) <= key(b) { a } else { b };
    }

    fn winner(&self, node: usize) -> u32 {
        match node.checked_sub(self.length) {
            Some(symbol) => symbol as u32,
            None => self.winners[node],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Merges by a list of pairs of one-letter tokens; a merged pair is named by a fresh id.
    fn run(word: &[u32], pairs: &[(u32, u32, u32)]) -> Vec<u32> {
        let mut scratch = EncodeScratch::new(word.len()).unwrap();
        let merger = &mut scratch.merger;
        merger.clear();
        for (start, &id) in word.iter().enumerate() {
            merger.push(id, start);
        }
        merger.run(word.len(), |left, right| {
            let rank = pairs
                .iter()
                .position(|&(a, b, _)| (a, b) == (left.id, right.id))?;
            Some(Merge {
                rank: rank as u32,
                id: pairs[rank].2,
            })
        });
        merger.symbols().map(|(id, _)| id).collect()
    }

    /// The definition: merge the leftmost pair of the lowest rank, again and again.
    fn naive(word: &[u32], pairs: &[(u32, u32, u32)]) -> Vec<u32> {
        let mut word = word.to_vec();
        loop {
            let rank = |i: usize| {
                pairs
                    .iter()
                    .position(|&(a, b, _)| (a, b) == (word[i], word[i + 1]))
            };
            let best = (0..word.len().saturating_sub(1))
                .filter_map(|i| rank(i).map(|rank| (rank, i)))
                .min();
            let Some((rank, i)) = best else { return word };
            word[i] = pairs[rank].2;
            word.remove(i + 1);
        }
    }

    #[test]
    fn agrees_with_the_definition() {
        let pairs = [
            (0, 0, 3),
            (3, 3, 4),
            (1, 2, 5),
            (0, 1, 6),
            (4, 5, 7),
            (6, 2, 8),
            (4, 0, 9),
            (2, 2, 2),
        ];
        let mut state = 1u64;
        for length in 0..200 {
            let word: Vec<u32> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                    (state >> 60) as u32 % 3
                })
                .collect();
            assert_eq!(run(&word, &pairs), naive(&word, &pairs), "{word:?}");
        }
    }

    #[test]
    fn the_leftmost_of_equal_pairs_goes_first() {
        assert_eq!(run(&[0, 0, 0], &[(0, 0, 3)]), [3, 0]);
        assert_eq!(run(&[7], &[(7, 7, 8)]), [7]);
        assert_eq!(run(&[], &[(7, 7, 8)]), [0; 0]);
    }

    #[test]
    fn sizes() {
        assert_eq!(EncodeScratch::bytes(999).unwrap(), 29_000);
        assert!(EncodeScratch::bytes(usize::MAX).is_err());
        assert!(EncodeScratch::new(u32::MAX as usize).is_err());
    }
}

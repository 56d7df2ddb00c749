//! The tokens of a file: their bytes, their kinds, and finding one by its bytes.

use std::hash::{BuildHasher, RandomState};

use crate::error::{Error, Result};
use crate::gguf::Strings;
use crate::memory::reserved;

use super::byte_level;
use super::merge::NONE;

/// Longer tokens than any vocabulary has are refused: they would make each look-up slow.
pub(super) const MAX_TOKEN_BYTES: usize = 4096;

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Undefined,
    Normal,
    Unknown,
    /// Has a meaning to the model and no text, such as the end of a turn.
    Control,
    /// Text that is always one token.
    UserDefined,
    Unused,
    /// One byte, for characters that are no token.
    Byte,
}

impl Kind {
    pub(super) fn from_gguf(number: i32) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Undefined,
        }
    }

    /// Whether the token's text is kept as the file spells it.
    fn is_literal(self) -> bool {
        matches!(self, Self::Control | Self::Unknown | Self::UserDefined)
    }
}

/// How the file spells the bytes of normal tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Byte-level BPE's alphabet.
    ByteLevel,
    /// SentencePiece: plain text with ▁ for the space.
    SentencePiece,
}

/// The tokens of a file.
pub(super) struct Vocabulary {
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    longest: usize,
    /// Tokens that text can become, at the hash of their bytes or in the next free place.
    table: Vec<u32>,
    hasher: RandomState,
}

/// ▁, SentencePiece's visible space.
pub(super) const VISIBLE_SPACE: &str = "\u{2581}";

impl Vocabulary {
    /// Reads the tokens as the file spells them. `indexed` tells whether [`Vocabulary::find`] is
    /// needed.
    pub(super) fn new(
        texts: &Strings,
        kinds: Vec<Kind>,
        spelling: Spelling,
        indexed: bool,
    ) -> Result<Self> {
        let total = texts.text_bytes();
        if u32::try_from(total).is_err() {
            return Err(Error::tokenizer(format_args!(
                "the vocabulary is {total} bytes long, which is more than any real one"
            )));
        }
        let mut vocabulary = Vocabulary {
            bytes: reserved(total)?,
            ends: reserved(texts.len())?,
            kinds,
            longest: 0,
            table: Vec::new(),
            hasher: RandomState::new(),
        };
        if indexed {
            // At most half full, so that a search ends soon.
            let slots = texts.len().saturating_mul(2).next_power_of_two();
            vocabulary.table = reserved(slots)?;
            vocabulary.table.resize(slots, NONE);
        }
        for (id, text) in (0..).zip(texts.iter()) {
            vocabulary.add(id, text, spelling, indexed)?;
        }
        Ok(vocabulary)
    }

    fn add(&mut self, id: u32, text: &str, spelling: Spelling, indexed: bool) -> Result<()> {
        if text.len() > MAX_TOKEN_BYTES {
            return Err(Error::tokenizer(format_args!(
                "token {id} is {} bytes long; at most {MAX_TOKEN_BYTES} are accepted",
                text.len()
            )));
        }
        let kind = self.kind(id);
        let start = self.bytes.len();
        let searchable = match byte_token(text) {
            Some(byte) if kind == Kind::Byte => {
                self.bytes.push(byte);
                false
            }
            _ if kind.is_literal() => {
                self.bytes.extend_from_slice(text.as_bytes());
                // Text must not turn into a control token by merging. A user's token is found
                // before any merging, but merging may find it too.
                kind == Kind::UserDefined && !text.contains([' ', '\u{2581}'])
            }
            _ => self.add_normal(text, spelling),
        };
        let length = self.bytes.len() - start;
        self.longest = self.longest.max(length);
        // The total was checked: a token never takes more bytes than its spelling.
        self.ends.push(self.bytes.len() as u32);
        if indexed && searchable && length > 0 {
            self.index(id);
        }
        Ok(())
    }

    /// Appends the bytes of a normal token and tells whether text can become it.
    fn add_normal(&mut self, text: &str, spelling: Spelling) -> bool {
        match spelling {
            Spelling::ByteLevel => {
                let spelled = byte_level::decode_into(text, &mut self.bytes);
                if !spelled {
                    self.bytes.extend_from_slice(text.as_bytes());
                }
                spelled
            }
            Spelling::SentencePiece => {
                for (index, part) in text.split(VISIBLE_SPACE).enumerate() {
                    if index > 0 {
                        self.bytes.push(b' ');
                    }
                    self.bytes.extend_from_slice(part.as_bytes());
                }
                // Spaces of the text are ▁ to SentencePiece, so a plain one is never met.
                !text.contains(' ')
            }
        }
    }

    /// The number of tokens.
    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// The bytes of a token: its text if it has one, its name if it is a control token.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let index = id as usize;
        let start = match index {
            0 => 0,
            _ => self.ends[index - 1] as usize,
        };
        &self.bytes[start..self.ends[index] as usize]
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds[id as usize]
    }

    /// The bytes of the longest token.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    /// The token that this text is, control tokens left out.
    pub(super) fn find(&self, text: &[u8]) -> Option<u32> {
        if text.len() > self.longest || self.table.is_empty() {
            return None;
        }
        let mask = self.table.len() - 1;
        let mut slot = self.hasher.hash_one(text) as usize & mask;
        loop {
            match self.table[slot] {
                NONE => return None,
                id if self.bytes(id) == text => return Some(id),
                _ => slot = (slot + 1) & mask,
            }
        }
    }

    fn index(&mut self, id: u32) {
        let mask = self.table.len() - 1;
        let mut slot = self.hasher.hash_one(self.bytes(id)) as usize & mask;
        while self.table[slot] != NONE {
            slot = (slot + 1) & mask;
        }
        self.table[slot] = id;
    }
}

/// The byte of a token called <0x00> to <0xFF>.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary(tokens: &[(&str, i32)], spelling: Spelling) -> Vocabulary {
        let texts = tokens.iter().map(|(text, _)| text).collect();
        let kinds = tokens
            .iter()
            .map(|&(_, kind)| Kind::from_gguf(kind))
            .collect();
        Vocabulary::new(&texts, kinds, spelling, true).unwrap()
    }

    #[test]
    fn sentencepiece_tokens() {
        let tokens = [
            ("<unk>", 2),
            ("<s>", 3),
            ("<0x0A>", 6),
            ("▁a▁", 1),
            ("b c", 1),
            ("", 1),
            ("漢", 4),
        ];
        let vocabulary = vocabulary(&tokens, Spelling::SentencePiece);
        assert_eq!(vocabulary.len(), 7);
        assert_eq!(vocabulary.bytes(0), b"<unk>");
        assert_eq!(vocabulary.bytes(2), b"\n");
        assert_eq!(vocabulary.bytes(3), b" a ");
        assert_eq!(vocabulary.bytes(5), b"");
        assert_eq!(vocabulary.find(b" a "), Some(3));
        assert_eq!(vocabulary.find("漢".as_bytes()), Some(6));
        for absent in ["<s>", "<unk>", "\n", "b c", "", "▁a▁", "x"] {
            assert_eq!(vocabulary.find(absent.as_bytes()), None, "{absent:?}");
        }
        assert_eq!(vocabulary.longest(), 5);
    }

    #[test]
    fn byte_level_tokens() {
        let tokens = [("Ġa", 1), ("<|end|>", 3), ("漢 字", 1), ("Ċ", 1)];
        let vocabulary = vocabulary(&tokens, Spelling::ByteLevel);
        assert_eq!(vocabulary.bytes(0), b" a");
        assert_eq!(vocabulary.bytes(1), b"<|end|>");
        assert_eq!(vocabulary.bytes(2), "漢 字".as_bytes());
        assert_eq!(vocabulary.find(b"\n"), Some(3));
        assert_eq!(vocabulary.find(b"<|end|>"), None);
        assert_eq!(vocabulary.find("漢 字".as_bytes()), None);
    }

    #[test]
    fn byte_names() {
        assert_eq!(byte_token("<0xfF>"), Some(255));
        for bad in ["<0x+1>", "<0x1>", "<0x123>", "0x12", "<0xé>"] {
            assert_eq!(byte_token(bad), None, "{bad}");
        }
    }

    #[test]
    fn long_tokens_are_refused() {
        let text = "a".repeat(MAX_TOKEN_BYTES + 1);
        let texts = Strings::from(vec![text]);
        let result = Vocabulary::new(&texts, vec![Kind::Normal], Spelling::ByteLevel, true);
        assert!(result.is_err());
    }
}

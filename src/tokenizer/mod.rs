//! Text to tokens and back.
//!
//! A [`Tokenizer`] is read from a file's `tokenizer.ggml.*` keys. It knows byte-level BPE (`gpt2`,
//! with the pre-tokenizers of GPT-2, SmolLM, Llama 3, Qwen 2 and llama.cpp's default) and
//! SentencePiece's BPE (`llama`). [`Utf8Stream`] joins generated tokens to text.

mod bpe;
mod byte_level;
mod decode;
mod load;
mod merge;
mod special;
mod spm;
mod stream;
mod vocabulary;
mod words;

use crate::error::{Error, Result};
use crate::memory::try_push;

use bpe::Bpe;
use special::Specials;
use spm::Spm;
use vocabulary::{Kind, Vocabulary};

pub use merge::EncodeScratch;
pub use stream::Utf8Stream;

/// The vocabulary of a file and the rules that go with it. It is read-only and may be shared by
/// threads.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    specials: Specials,
    model: Model,
    ids: SpecialIds,
}

enum Model {
    Bpe(Bpe),
    Spm(Spm),
}

/// The tokens with a role.
struct SpecialIds {
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    /// All tokens that end a generation, sorted.
    ends: Vec<u32>,
}

/// How to read a text. The default is [`EncodeOptions::PROMPT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Put the tokens that begin and end a text around it, if the file asks for them.
    pub add_special: bool,
    /// Read the names of control tokens, such as `<|im_end|>`, as these tokens. Only for text that
    /// is trusted, such as a rendered chat template.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A text from its beginning, which says nothing but itself.
    pub const PROMPT: Self = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    /// A part of a text that has begun.
    pub const PLAIN: Self = EncodeOptions {
        add_special: false,
        parse_special: false,
    };
    /// A conversation that a chat template has written, with the names of control tokens in it.
    pub const CHAT: Self = EncodeOptions {
        add_special: false,
        parse_special: true,
    };
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self::PROMPT
    }
}

impl Tokenizer {
    /// The number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.ids.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.ids.eos
    }

    /// The token that ends a turn of a conversation.
    pub fn eot(&self) -> Option<u32> {
        self.ids.eot
    }

    /// Whether nothing is to be generated after this token.
    pub fn is_end(&self, id: u32) -> bool {
        self.ids.ends.binary_search(&id).is_ok()
    }

    /// Whether the file asks for [`Tokenizer::bos`] before each text.
    pub fn add_bos(&self) -> bool {
        self.ids.add_bos
    }

    /// Whether the file asks for [`Tokenizer::eos`] after each text.
    pub fn add_eos(&self) -> bool {
        self.ids.add_eos
    }

    /// The most tokens that a text of `text_bytes` bytes can become.
    pub fn max_tokens(&self, text_bytes: usize) -> usize {
        // A byte is at most one token, but a space of SentencePiece may be spelled by three. There is one more before
        // the text and after each special token, which is a byte or more and one token.
        let text = match self.model {
            Model::Bpe(_) => text_bytes,
            Model::Spm(_) => text_bytes.saturating_mul(4).saturating_add(3),
        };
        text.saturating_add(2)
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a text that the vocabulary cannot spell, [`Error::OutOfMemory`].
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let mut scratch = EncodeScratch::new(text.len())?;
        let mut ids = Vec::new();
        self.encode_with(text, options, &mut scratch, &mut |id| {
            try_push(&mut ids, id)
        })?;
        Ok(ids)
    }

    /// Writes the tokens of a text to `out` and returns their number. Allocates nothing: a text
    /// with a longer piece than the scratch memory was made for is an error, and so are more tokens
    /// than `out` holds ([`Error::BufferTooSmall`]; [`Tokenizer::max_tokens`] are always enough).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] and [`Error::InvalidArgument`] for such texts, [`Error::BufferTooSmall`].
    pub fn encode_into(
        &self,
        text: &str,
        options: EncodeOptions,
        scratch: &mut EncodeScratch,
        out: &mut [u32],
    ) -> Result<usize> {
        let mut count = 0;
        self.encode_with(text, options, scratch, &mut |id| {
            // Counted to the end even without room, so that the error can tell the size.
            if let Some(slot) = out.get_mut(count) {
                *slot = id;
            }
            count += 1;
            Ok(())
        })?;
        if count > out.len() {
            return Err(Error::BufferTooSmall {
                needed: count,
                capacity: out.len(),
            });
        }
        Ok(count)
    }

    fn encode_with(
        &self,
        text: &str,
        options: EncodeOptions,
        scratch: &mut EncodeScratch,
        push: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<()> {
        let EncodeOptions {
            add_special,
            parse_special,
        } = options;
        if let Some(bos) = self.ids.bos
            && add_special
            && self.ids.add_bos
        {
            push(bos)?;
        }
        let mut position = 0;
        // Each piece of text begins the text or follows a special token, as SentencePiece sees it.
        while position < text.len() {
            let found =
                self.specials
                    .find(&self.vocabulary, text.as_bytes(), position, parse_special);
            let end = found.as_ref().map_or(text.len(), |found| found.start);
            // A special token is whole characters, so the cut falls between characters.
            self.encode_plain(&text[position..end], scratch, push)?;
            position = end;
            if let Some(found) = found {
                push(found.id)?;
                position = found.end;
            }
        }
        match self.ids.eos {
            Some(eos) if add_special && self.ids.add_eos => push(eos),
            _ => Ok(()),
        }
    }

    /// Encodes a piece of text without special tokens, all up to the next one.
    fn encode_plain(
        &self,
        text: &str,
        scratch: &mut EncodeScratch,
        push: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<()> {
        match &self.model {
            _ if text.is_empty() => Ok(()),
            Model::Bpe(bpe) => bpe.encode(&self.vocabulary, text, scratch, push),
            Model::Spm(spm) => spm.encode(&self.vocabulary, text, scratch, push),
        }
    }

    /// The bytes that a token adds to a text; they need not be whole characters. Control tokens and
    /// the like have none unless `special` asks for their names.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token outside the vocabulary.
    pub fn token_bytes(&self, id: u32, special: bool) -> Result<&[u8]> {
        self.check(id)?;
        Ok(match self.vocabulary.kind(id) {
            Kind::Normal | Kind::UserDefined | Kind::Byte => self.vocabulary.bytes(id),
            Kind::Control | Kind::Unknown if special => self.vocabulary.bytes(id),
            _ => &[],
        })
    }

    /// As [`Tokenizer::token_bytes`] of a token that a model has drawn, which may have more rows than its tokenizer has
    /// tokens: those are no text.
    pub(crate) fn drawn_bytes(&self, id: u32, special: bool) -> &[u8] {
        self.token_bytes(id, special).unwrap_or_default()
    }

    /// The bytes of the longest token.
    pub fn max_piece_bytes(&self) -> usize {
        self.vocabulary.longest()
    }

    /// Whether a space is put before each text.
    fn adds_space_prefix(&self) -> bool {
        matches!(&self.model, Model::Spm(spm) if spm.add_space_prefix)
    }

    fn check(&self, id: u32) -> Result<()> {
        if (id as usize) < self.vocabulary.len() {
            return Ok(());
        }
        Err(Error::argument(format_args!(
            "token {id} does not exist; the vocabulary has {} tokens",
            self.vocabulary.len()
        )))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let model = match self.model {
            Model::Bpe(_) => "gpt2",
            Model::Spm(_) => "llama",
        };
        f.debug_struct("Tokenizer")
            .field("model", &model)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// The beginning of a text from a file, fit for an error message.
fn excerpt(text: &str) -> impl std::fmt::Display {
    crate::text::excerpt(text, 40)
}

/// The error for a piece that is longer than the scratch memory was made for.
fn no_room(bytes: usize, scratch: &EncodeScratch) -> Error {
    Error::argument(format_args!(
        "the text has a piece of {bytes} bytes without a break, but the tokenizer's memory was made for {}",
        scratch.max_piece_bytes()
    ))
}

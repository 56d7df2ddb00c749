//! Tokens back to text.

use super::{Tokenizer, Utf8Stream};
use crate::error::{Error, Result};

impl Tokenizer {
    /// Writes the text of some tokens to `out` and returns its length in bytes. Allocates nothing.
    /// See [`Tokenizer::decode`].
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] with the text's length when `out` is shorter.
    pub fn decode_into(&self, ids: &[u32], special: bool, out: &mut [u8]) -> Result<usize> {
        let mut length = 0;
        self.decode_with(ids, special, |text| {
            // Counted to the end even without room, so that the error can tell the size.
            if let Some(room) = out.get_mut(length..length + text.len()) {
                room.copy_from_slice(text.as_bytes());
            }
            length += text.len();
            Ok(())
        })?;
        if length > out.len() {
            return Err(Error::BufferTooSmall {
                needed: length,
                capacity: out.len(),
            });
        }
        Ok(length)
    }

    /// The text of some tokens. What is no valid text becomes U+FFFD, and the space that
    /// SentencePiece puts before a text is taken away again.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token outside the vocabulary, [`Error::OutOfMemory`].
    pub fn decode(&self, ids: &[u32], special: bool) -> Result<String> {
        let mut text = String::new();
        self.decode_with(ids, special, |more| {
            text.try_reserve(more.len())
                .map_err(|_| Error::OutOfMemory { bytes: more.len() })?;
            text.push_str(more);
            Ok(())
        })?;
        Ok(text)
    }

    fn decode_with(
        &self,
        ids: &[u32],
        special: bool,
        mut each: impl FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let mut stream = Utf8Stream::new();
        let mut at_start = self.adds_space_prefix();
        for &id in ids {
            let mut bytes = self.token_bytes(id, special)?;
            if at_start && !bytes.is_empty() {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
                at_start = false;
            }
            let mut outcome = Ok(());
            stream.push(bytes, |text| {
                if outcome.is_ok() {
                    outcome = each(text);
                }
            });
            outcome?;
        }
        match stream.finish() {
            "" => Ok(()),
            text => each(text),
        }
    }
}

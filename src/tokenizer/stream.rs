//! Text from tokens as they come: a token may end in the middle of a character.

use crate::error::{Error, Result};

/// The most bytes of a character that can be missing its end.
const MAX_PENDING: usize = 3;

/// Joins the bytes of tokens to text and never yields half a character. Bytes that can be no text
/// become U+FFFD, just as `String::from_utf8_lossy` would write the whole.
#[derive(Debug)]
pub struct Utf8Stream {
    max_piece_bytes: usize,
    /// The beginning of a character, then the bytes of the call.
    input: Vec<u8>,
    output: String,
}

impl Utf8Stream {
    /// A stream for pieces of up to `max_piece_bytes` bytes; see
    /// [`Tokenizer::max_piece_bytes`](super::Tokenizer::max_piece_bytes). Allocates here and never
    /// again.
    pub fn new(max_piece_bytes: usize) -> Result<Self> {
        let too_long = Error::OutOfMemory {
            bytes: max_piece_bytes,
        };
        // A byte that is no text becomes three.
        let Some((room, text)) = max_piece_bytes
            .checked_add(MAX_PENDING)
            .and_then(|room| Some((room, room.checked_mul('\u{fffd}'.len_utf8())?)))
        else {
            return Err(too_long);
        };
        let mut stream = Utf8Stream {
            max_piece_bytes,
            input: Vec::new(),
            output: String::new(),
        };
        stream
            .input
            .try_reserve_exact(room)
            .and_then(|()| stream.output.try_reserve_exact(text))
            .map_err(|_| too_long)?;
        Ok(stream)
    }

    /// Takes the bytes of one token and gives the characters that are complete with them.
    pub fn push(&mut self, bytes: &[u8]) -> Result<&str> {
        if bytes.len() > self.max_piece_bytes {
            return Err(Error::argument(format_args!(
                "a piece of {} bytes was pushed into a stream made for {}",
                bytes.len(),
                self.max_piece_bytes
            )));
        }
        self.output.clear();
        self.input.extend_from_slice(bytes);
        let kept = drain(&self.input, &mut self.output);
        self.input.drain(..kept);
        Ok(&self.output)
    }

    /// Ends the text: U+FFFD if a character was left incomplete, else nothing. The stream is then
    /// ready for another text.
    pub fn finish(&mut self) -> &str {
        self.output.clear();
        if !self.input.is_empty() {
            self.output.push(char::REPLACEMENT_CHARACTER);
            self.input.clear();
        }
        &self.output
    }
}

/// Appends the text of `input` and returns where the incomplete character at its end begins.
fn drain(input: &[u8], output: &mut String) -> usize {
    let mut position = 0;
    loop {
        let rest = &input[position..];
        let error = match std::str::from_utf8(rest) {
            Ok(text) => {
                output.push_str(text);
                return input.len();
            }
            Err(error) => error,
        };
        let valid = error.valid_up_to();
        output.push_str(std::str::from_utf8(&rest[..valid]).unwrap_or_default());
        position += valid;
        let Some(invalid) = error.error_len() else {
            return position;
        };
        output.push(char::REPLACEMENT_CHARACTER);
        position += invalid;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pieces(bytes: &[u8], size: usize) -> String {
        let mut stream = Utf8Stream::new(size).unwrap();
        let room = (stream.input.capacity(), stream.output.capacity());
        let mut text = String::new();
        for piece in bytes.chunks(size) {
            text.push_str(stream.push(piece).unwrap());
        }
        text.push_str(stream.finish());
        assert_eq!(room, (stream.input.capacity(), stream.output.capacity()));
        text
    }

    #[test]
    fn any_cut_gives_the_lossy_text() {
        let cases: [&[u8]; 9] = [
            "plain, é, 漢字, 👩🏽‍🚀".as_bytes(),
            b"\xff\xfe\xc0\x80",
            b"a\xf0\x9f\x98",
            b"a\xf0\x9f\x98b\xe6\xbc",
            b"\xed\xa0\x80x\xf4\x90\x80\x80",
            b"\xe2\x82\xe2\x82\xac\x80\x80",
            b"\xf0\xf0\xf0\x9f\x98\x80",
            b"",
            b"\xc3",
        ];
        for bytes in cases {
            for size in 1..=8 {
                assert_eq!(in_pieces(bytes, size), String::from_utf8_lossy(bytes));
            }
        }
    }

    #[test]
    fn characters_come_whole() {
        let mut stream = Utf8Stream::new(4).unwrap();
        assert_eq!(stream.push(b"a\xf0\x9f").unwrap(), "a");
        assert_eq!(stream.push(b"\x98").unwrap(), "");
        assert_eq!(stream.push(b"\x80!").unwrap(), "😀!");
        assert_eq!(stream.finish(), "");
        assert!(stream.push(b"12345").is_err());
    }
}

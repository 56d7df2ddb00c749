//! Text from tokens as they come: a token may end in the middle of a character.

/// What stands for bytes that are no text.
const REPLACEMENT: &str = "\u{fffd}";

/// Joins the bytes of tokens to text and never yields half a character. Bytes that can be no text
/// become U+FFFD, just as `String::from_utf8_lossy` would write the whole. Allocates nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Utf8Stream {
    /// The beginning of a character whose end is missing: at most three bytes between calls.
    pending: [u8; 4],
    length: usize,
}

impl Utf8Stream {
    /// The most bytes of text that `bytes` bytes can become, what was pending included.
    pub const fn max_text_bytes(bytes: usize) -> usize {
        bytes.saturating_add(3).saturating_mul(REPLACEMENT.len())
    }

    /// A stream at the beginning of a text.
    pub fn new() -> Self {
        Self::default()
    }

    /// The pending bytes of a stream and how many they are, for who keeps them; at most three.
    #[cfg(feature = "ffi")]
    pub(crate) fn pending(&self) -> ([u8; 4], usize) {
        (self.pending, self.length)
    }

    /// A stream with these bytes pending; none where they are too many.
    #[cfg(feature = "ffi")]
    pub(crate) fn with_pending(pending: [u8; 4], length: usize) -> Option<Self> {
        (length < pending.len()).then_some(Utf8Stream { pending, length })
    }

    /// Takes the bytes of one token and gives the characters that are complete with them, in one or
    /// more pieces.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&str)) {
        let mut bytes = bytes;
        // Byte by byte until the pending character is complete or turns out to be none.
        while self.length > 0 {
            let Some((first, rest)) = bytes.split_first() else {
                return;
            };
            bytes = rest;
            self.pending[self.length] = *first;
            self.length += 1;
            self.settle(&mut each);
        }
        let kept = decode(bytes, &mut each);
        self.length = bytes.len() - kept;
        self.pending[..self.length].copy_from_slice(&bytes[kept..]);
    }

    /// Gives what is certain of the pending bytes and keeps the rest.
    fn settle(&mut self, each: &mut impl FnMut(&str)) {
        let pending = self.pending;
        let kept = decode(&pending[..self.length], each);
        self.pending.copy_within(kept..self.length, 0);
        self.length -= kept;
    }

    /// Ends the text: U+FFFD if a character was left incomplete, else nothing. The stream is then
    /// ready for another text.
    pub fn finish(&mut self) -> &'static str {
        match std::mem::take(&mut self.length) {
            0 => "",
            _ => REPLACEMENT,
        }
    }
}

/// Gives the text of `input` and returns where the incomplete character at its end begins, at most
/// three bytes before it.
fn decode(input: &[u8], each: &mut impl FnMut(&str)) -> usize {
    let mut position = 0;
    loop {
        let rest = &input[position..];
        let (valid, invalid) = match std::str::from_utf8(rest) {
            Ok(text) => {
                give(text, each);
                return input.len();
            }
            Err(error) => (error.valid_up_to(), error.error_len()),
        };
        give(
            std::str::from_utf8(&rest[..valid]).unwrap_or_default(),
            each,
        );
        position += valid;
        let Some(invalid) = invalid else {
            return position;
        };
        each(REPLACEMENT);
        position += invalid;
    }
}

fn give(text: &str, each: &mut impl FnMut(&str)) {
    if !text.is_empty() {
        each(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pieces(bytes: &[u8], size: usize) -> String {
        let mut stream = Utf8Stream::new();
        let mut text = String::new();
        for piece in bytes.chunks(size) {
            let before = text.len();
            stream.push(piece, |more| text.push_str(more));
            assert!(text.len() - before <= Utf8Stream::max_text_bytes(piece.len()));
        }
        text.push_str(stream.finish());
        text
    }

    #[test]
    fn any_cut_gives_the_lossy_text() {
        let cases: [&[u8]; 10] = [
            "plain, é, 漢字, 👩🏽‍🚀".as_bytes(),
            b"\xff\xfe\xc0\x80",
            b"a\xf0\x9f\x98",
            b"a\xf0\x9f\x98b\xe6\xbc",
            b"\xed\xa0\x80x\xf4\x90\x80\x80",
            b"\xe2\x82\xe2\x82\xac\x80\x80",
            b"\xf0\xf0\xf0\x9f\x98\x80",
            b"\xf0\x9f\xf0\x9f\x98\xff\xe2\xc3\xa9",
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
        let mut stream = Utf8Stream::new();
        let mut push = |bytes| {
            let mut text = String::new();
            stream.push(bytes, |more| text.push_str(more));
            text
        };
        assert_eq!(push(b"a\xf0\x9f"), "a");
        assert_eq!(push(b"\x98"), "");
        assert_eq!(push(b"\x80!"), "😀!");
        assert_eq!(stream.finish(), "");
    }
}

//! Sentences without a heap: an error must be told even when there is no memory left, and telling it
//! must not allocate.

use std::fmt::{self, Write};

/// A short text kept in place. What does not fit is cut off, with an ellipsis at the end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Text {
    length: u16,
    bytes: [u8; Text::CAPACITY],
}

/// Shown where a text was cut.
const ELLIPSIS: &str = "…";

impl Text {
    /// The most bytes of a text: some sentences, and a name from a file among them.
    pub const CAPACITY: usize = 446;

    /// The text that `what` prints, which is often `format_args!(…)`.
    pub fn new(what: impl fmt::Display) -> Self {
        let mut text = Text {
            length: 0,
            bytes: [0; Text::CAPACITY],
        };
        // `write_str` answers with an error when the text is full, which ends the printing.
        let _ = write!(text, "{what}");
        text
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        // Only whole characters were written, so this is never the default.
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }

    fn append(&mut self, text: &str) {
        let start = usize::from(self.length);
        self.bytes[start..start + text.len()].copy_from_slice(text.as_bytes());
        self.length += text.len() as u16; // at most CAPACITY, which fits
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = Text::CAPACITY - ELLIPSIS.len() - usize::from(self.length);
        if text.len() <= room {
            self.append(text);
            return Ok(());
        }
        let mut end = room;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.append(&text[..end]);
        self.append(ELLIPSIS);
        Err(fmt::Error)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl std::ops::Deref for Text {
    type Target = str;
    fn deref(&self) -> &str {
        self.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_kept_and_the_rest_is_cut_between_characters() {
        assert_eq!(Text::new("").as_str(), "");
        assert_eq!(Text::new(format_args!("{} é {}", 1, "x")).as_str(), "1 é x");
        for filler in ["x", "é", "漢", "😀"] {
            let long = filler.repeat(Text::CAPACITY);
            for start in ["", "a", "ab", "abc"] {
                let text = Text::new(format_args!("{start}{long} and more"));
                let kept = text.as_str().strip_suffix(ELLIPSIS).unwrap();
                assert!(format!("{start}{long}").starts_with(kept));
                assert!(kept.len() + 4 + ELLIPSIS.len() > Text::CAPACITY);
            }
        }
        let full = "x".repeat(Text::CAPACITY - ELLIPSIS.len());
        assert_eq!(Text::new(&full).as_str(), full);
    }
}

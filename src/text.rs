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
        Text::printed(format_args!("{what}"))
    }

    /// Once for all texts: each place that tells an error would have its own, and the library is to
    /// stay small.
    #[inline(never)]
    fn printed(what: fmt::Arguments) -> Self {
        let mut text = Text {
            length: 0,
            bytes: [0; Text::CAPACITY],
        };
        // `write_str` answers with an error when the text is full, which ends the printing.
        let _ = text.write_fmt(what);
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

/// The first `most` characters of a text from a file, fit for a sentence: without control
/// characters, and with an ellipsis where it was cut.
pub(crate) fn excerpt(text: &str, most: usize) -> impl fmt::Display {
    struct Excerpt<'a>(&'a str, usize);
    impl fmt::Display for Excerpt<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let Excerpt(text, most) = self;
            match text.char_indices().nth(*most) {
                None => write!(f, "{}", text.escape_debug()),
                Some((end, _)) => write!(f, "{}{ELLIPSIS}", text[..end].escape_debug()),
            }
        }
    }
    Excerpt(text, most)
}

/// Things with commas between.
pub(crate) fn listed<T: fmt::Display>(items: impl Iterator<Item = T> + Clone) -> impl fmt::Display {
    struct Listed<I>(I);
    impl<T: fmt::Display, I: Iterator<Item = T> + Clone> fmt::Display for Listed<I> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            for (i, item) in self.0.clone().enumerate() {
                let comma = if i > 0 { ", " } else { "" };
                write!(f, "{comma}{item}")?;
            }
            Ok(())
        }
    }
    Listed(items)
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

    #[test]
    fn excerpts_and_lists() {
        assert_eq!(excerpt("é\n", 2).to_string(), "é\\n");
        assert_eq!(excerpt("漢字!", 2).to_string(), "漢字…");
        assert_eq!(excerpt("", 0).to_string(), "");
        assert_eq!(listed([1, 2, 3].iter()).to_string(), "1, 2, 3");
        assert_eq!(listed([""; 0].iter()).to_string(), "");
    }
}

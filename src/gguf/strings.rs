//! Many strings in one.

use crate::Result;
use crate::memory::{reserved, reserved_string};
use std::fmt;
use std::ops::Index;

/// A list of strings, kept one after the other in one piece of memory: a vocabulary has a hundred
/// thousand, and a heap block for each would cost more than the text.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Strings {
    text: String,
    /// Where each string ends in `text`.
    ends: Vec<usize>,
}

impl Strings {
    /// An empty list.
    pub const fn new() -> Self {
        Strings {
            text: String::new(),
            ends: Vec::new(),
        }
    }

    /// An empty list with room for `count` strings of `bytes` bytes together.
    pub(super) fn reserved(count: usize, bytes: usize) -> Result<Self> {
        Ok(Strings {
            text: reserved_string(bytes)?,
            ends: reserved(count)?,
        })
    }

    /// The number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no string.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of all strings together.
    pub fn text_bytes(&self) -> usize {
        self.text.len()
    }

    /// The string at `index`.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.text[start..end])
    }

    /// Every string, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &str> + ExactSizeIterator + Clone {
        (0..self.len()).map(|index| &self[index])
    }

    /// Appends a string.
    pub fn push(&mut self, string: &str) {
        self.text.push_str(string);
        self.ends.push(self.text.len());
    }
}

impl Index<usize> for Strings {
    type Output = str;

    fn index(&self, index: usize) -> &str {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start..self.ends[index]]
    }
}

impl Default for &Strings {
    fn default() -> Self {
        static EMPTY: Strings = Strings::new();
        &EMPTY
    }
}

impl<S: AsRef<str>> Extend<S> for Strings {
    fn extend<I: IntoIterator<Item = S>>(&mut self, items: I) {
        items.into_iter().for_each(|item| self.push(item.as_ref()));
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(items: I) -> Self {
        let mut strings = Strings::new();
        strings.extend(items);
        strings
    }
}

impl From<Vec<String>> for Strings {
    fn from(items: Vec<String>) -> Self {
        items.into_iter().collect()
    }
}

impl fmt::Debug for Strings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_comes_back() {
        let items = ["", "a", "", "漢字", "b c"];
        let strings: Strings = items.into_iter().collect();
        assert_eq!((strings.len(), strings.text_bytes()), (5, 10));
        assert!(strings.iter().eq(items));
        assert!(strings.iter().rev().eq(items.into_iter().rev()));
        assert_eq!((&strings[0], &strings[3]), ("", "漢字"));
        assert_eq!((strings.get(4), strings.get(5)), (Some("b c"), None));
        assert_eq!(format!("{strings:?}"), format!("{items:?}"));
        // The same bytes cut elsewhere are another list.
        assert_ne!(strings, ["a", "", "漢字", "b c", ""].into_iter().collect());
        assert!(<&Strings>::default().is_empty());
    }
}

//! A cursor over the bytes of a file that cannot leave them.

use super::{Strings, shown};
use crate::memory::try_string;
use crate::{Error, Result};
use std::fmt::{self, Display};

/// Reads little-endian values one after another. `what` in the calls is a noun for the sentence that
/// says where the file broke off; it is printed only then.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, n: usize, what: impl Display) -> Result<&'a [u8]> {
        let Some((taken, _)) = self.bytes[self.at..].split_at_checked(n) else {
            return Err(Error::format(format_args!(
                "it ends inside {what} (after {} bytes); fetch it again",
                self.bytes.len()
            )));
        };
        self.at += n;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: impl Display) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: impl Display) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of at least `least` bytes each: at most `limit`, and no more than the rest
    /// of the file can hold. What passes may be allocated.
    pub(super) fn count(&mut self, limit: u64, least: usize, what: impl Display) -> Result<usize> {
        let n = self.u64(&what)?;
        self.check_count(n, limit, least, what)
    }

    pub(super) fn check_count(
        &self,
        n: u64,
        limit: u64,
        least: usize,
        what: impl Display,
    ) -> Result<usize> {
        if n > limit {
            return Err(Error::format(format_args!(
                "{what} is {n}, but the limit is {limit}"
            )));
        }
        let left = self.remaining();
        match usize::try_from(n) {
            Ok(n) if n <= left / least => Ok(n),
            _ => Err(Error::format(format_args!(
                "{what} is {n}, more than the {left} bytes that are left can hold; fetch it again"
            ))),
        }
    }

    /// A string: its length, then UTF-8.
    pub(super) fn string(&mut self, limit: u64, what: impl Display) -> Result<&'a str> {
        std::str::from_utf8(self.text(limit, &what)?)
            .map_err(|_| Error::format(format_args!("{what} is not UTF-8 text; fetch it again")))
    }

    /// As [`Reader::string`], owned.
    pub(super) fn owned_string(&mut self, limit: u64, what: impl Display) -> Result<String> {
        try_string(self.string(limit, what)?)
    }

    /// `n` strings, where `n` has passed [`Reader::check_count`].
    pub(super) fn strings(
        &mut self,
        n: usize,
        limit: u64,
        what: impl Display + Copy,
    ) -> Result<Strings> {
        // Once for the lengths, so that the bytes are allocated in one piece.
        let mut ahead = self.clone();
        let mut total = 0;
        for _ in 0..n {
            total += ahead.text(limit, what)?.len();
        }
        let mut strings = Strings::reserved(n, total)?;
        for _ in 0..n {
            strings.push(self.string(limit, what)?);
        }
        Ok(strings)
    }

    fn text(&mut self, limit: u64, what: impl Display) -> Result<&'a [u8]> {
        let n = self.u64(&what)?;
        let n = self.check_count(n, limit, 1, format_args!("the length of {what}"))?;
        self.take(n, what)
    }
}

/// "the value of 'key'"
#[derive(Clone, Copy)]
pub(super) struct ValueOf<'a>(pub &'a str);

impl Display for ValueOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the value of {}", shown(self.0))
    }
}

//! A cursor over the bytes of a file that cannot leave them.

use super::shown;
use crate::{Error, Result};

/// Reads little-endian values one after another. `what` in the calls is a noun for the sentence that
/// says where the file broke off.
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

    pub(super) fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let Some((taken, _)) = self.bytes[self.at..].split_at_checked(n) else {
            return Err(Error::format(format_args!(
                "it ends inside {what} (after {} bytes); fetch it again",
                self.bytes.len()
            )));
        };
        self.at += n;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of at least `least` bytes each: at most `limit`, and no more than the rest
    /// of the file can hold. What passes may be allocated.
    pub(super) fn count(&mut self, limit: u64, least: usize, what: &str) -> Result<usize> {
        let n = self.u64(what)?;
        self.check_count(n, limit, least, what)
    }

    pub(super) fn check_count(
        &self,
        n: u64,
        limit: u64,
        least: usize,
        what: &str,
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
    pub(super) fn string(&mut self, limit: u64, what: &str) -> Result<&'a str> {
        // The sentence is needed only when something is wrong, so the noun is built only then.
        let n = self.u64(what)?;
        let n = match usize::try_from(n) {
            Ok(small) if n <= limit && small <= self.remaining() => small,
            _ => self.check_count(n, limit, 1, &format!("the length of {what}"))?,
        };
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| Error::format(format_args!("{what} is not UTF-8 text; fetch it again")))
    }

    /// As [`Reader::string`], owned.
    pub(super) fn owned_string(&mut self, limit: u64, what: &str) -> Result<String> {
        let text = self.string(limit, what)?;
        let mut owned = String::new();
        owned
            .try_reserve_exact(text.len())
            .map_err(|_| Error::OutOfMemory { bytes: text.len() })?;
        owned.push_str(text);
        Ok(owned)
    }
}

/// An empty vector with room for `n`; `n` must have passed [`Reader::count`].
pub(super) fn vec_for<T>(n: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(n).map_err(|_| Error::OutOfMemory {
        bytes: n.saturating_mul(size_of::<T>()),
    })?;
    Ok(vec)
}

/// "the value of 'key'"
pub(super) fn value_of(key: &str) -> String {
    format!("the value of {}", shown(key))
}

//! The date, which templates ask for by `strftime_now`.

use minijinja::{Error, ErrorKind};
use std::ffi::{CString, c_char};
use std::mem::zeroed;

/// The longest text that is written.
const MAX: usize = 256;

/// The time of here and now, as Python's `strftime` writes it, which is C's.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let refused = |what| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {what}"));
    if format.is_empty() {
        return Ok(String::new());
    }
    let format = CString::new(format).map_err(|_| refused("the format has a zero byte"))?;
    let mut text = [0u8; MAX];
    // SAFETY: `tm` is numbers and a pointer to a text that is never freed, all of which may be zero; both functions
    // get places for their results, the second one as many bytes as there are, and formats that end with a zero.
    let written = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = zeroed();
        if libc::localtime_r(&now, &mut parts).is_null() {
            return Err(refused("the clock is not set"));
        }
        libc::strftime(
            text.as_mut_ptr().cast::<c_char>(),
            MAX,
            format.as_ptr(),
            &parts,
        )
    };
    match written {
        0 => Err(refused("the format writes nothing, or too much")),
        bytes => Ok(String::from_utf8_lossy(&text[..bytes]).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_written() {
        let year: u32 = strftime_now("%Y").unwrap().parse().unwrap();
        assert!((2025..2200).contains(&year), "{year}");
        let parts = strftime_now("%d %b %Y, %H:%M:%S").unwrap();
        assert_eq!(parts.len(), "26 Jul 2024, 12:00:00".len(), "{parts}");
        assert_eq!(strftime_now("").unwrap(), "");
        for format in ["%999999999d", &"x".repeat(MAX), "\0"] {
            assert!(strftime_now(format).is_err(), "{format}");
        }
    }
}

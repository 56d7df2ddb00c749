//! What stands between a C caller and Rust: no panic passes.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Every export's body: runs a block and answers `$on_panic` when it panics. A panic is a bug of this
/// library; the caller gets an error and its program goes on. `error:`: for calls that write a `mor_error`.
macro_rules! boundary {
    (error: $out_error:expr, $body:block) => {
        match $crate::ffi::boundary::catch(|| $body) {
            Some(status) => status,
            // SAFETY: the caller's duty, see the manual.
            None => unsafe { $crate::ffi::status::report_panic($out_error) },
        }
    };
    ($on_panic:expr, $body:block) => {
        match $crate::ffi::boundary::catch(|| $body) {
            Some(value) => value,
            None => $on_panic,
        }
    };
}

/// The value of `work`, or nothing when it panicked.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(value) => Some(value),
        Err(payload) => {
            // Dropping it could panic once more.
            std::mem::forget(payload);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ffi::status::{mor_error, mor_status};

    #[test]
    fn a_panic_is_written_where_errors_are() {
        let call =
            |out_error: *mut mor_error| boundary!(error: out_error, { panic!("on purpose") });
        // SAFETY: numbers and bytes.
        let mut error: mor_error = unsafe { std::mem::zeroed() };
        assert_eq!(call(&mut error), mor_status::MOR_ERROR_INTERNAL);
        assert_eq!(error.status, mor_status::MOR_ERROR_INTERNAL);
        assert!(error.text[0] != 0);
        assert_eq!(call(std::ptr::null_mut()), mor_status::MOR_ERROR_INTERNAL);
    }
}

//! What stands between a C caller and Rust: no panic passes.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Every export's body: runs a block and answers `$on_panic` when it panics. A panic is a bug of this
/// library; the caller gets an error and its program goes on.
macro_rules! boundary {
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

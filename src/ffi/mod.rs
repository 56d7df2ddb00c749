//! The C interface: nothing but translation. `include/mor.h` is generated from here
//! (`cargo build --features header`); the comments are the C manual. A session's calls are in `session.rs`,
//! `generation.rs` and `sequence.rs`, a batch's in `batch.rs` and `requests.rs`, other objects have a file each.
//!
//! What every export does: its whole body stands in the macro `boundary`, so that no panic leaves it; every
//! pointer is checked for NULL and every handle for its mark; results are written on success only.
//! What cannot be checked (a dangling pointer, a buffer shorter than it was said to be) is the
//! caller's duty, and each `unsafe` here rests on it.
#![allow(non_camel_case_types)] // the names are C's
#![allow(clippy::missing_safety_doc)] // the C manual says what each pointer must be

#[macro_use]
pub(crate) mod boundary;
mod handle;
mod params;

// In the order of the header.
mod status;

mod model;

mod tokenizer;

mod session;

mod generation;

mod sequence;

mod batch;

mod requests;

pub use batch::*;
pub use generation::*;
pub use model::*;
pub use params::MOR_ZERO_TERMINATED;
pub use requests::*;
pub use sequence::*;
pub use session::*;
pub use status::*;
pub use tokenizer::*;

use std::ffi::c_char;

/// The version of this library, as "1.2.3". The text lives as long as the program.
#[unsafe(no_mangle)]
pub extern "C" fn mor_version() -> *const c_char {
    boundary!(std::ptr::null(), {
        concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
    })
}

//! Status codes and error texts.

use crate::error::Error;
use std::ffi::{CStr, c_char};

/// What a call came to. The numbers are fixed: new ones are added at the end, none is reused.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::upper_case_acronyms)]
pub enum mor_status {
    /// The call did what it says.
    MOR_OK = 0,
    /// A parameter, token, text, size or pointer that the call cannot take.
    MOR_ERROR_INVALID_ARGUMENT = 1,
    /// The system gave no memory, or no room for one more thread.
    MOR_ERROR_OUT_OF_MEMORY = 2,
    /// The system refused to read or map a file.
    MOR_ERROR_IO = 3,
    /// The model file is damaged, truncated or made to mislead.
    MOR_ERROR_FORMAT = 4,
    /// The file is sound but of a kind that this library does not run, or this system cannot do
    /// what was asked for.
    MOR_ERROR_UNSUPPORTED = 5,
    /// The file has no tokenizer, or one that cannot be used, or the text cannot be expressed in it.
    MOR_ERROR_TOKENIZER = 6,
    /// The file has no chat template, or a broken one, or it refuses the conversation.
    MOR_ERROR_TEMPLATE = 7,
    /// The sequence does not fit into the context of the session or batch.
    MOR_ERROR_CONTEXT_FULL = 8,
    /// Every page of the KV cache is taken.
    MOR_ERROR_KV_FULL = 9,
    /// The model computed a value that is not finite: its weights are damaged. Or a key or a value that is too large for
    /// the type in which they are kept.
    MOR_ERROR_NOT_FINITE = 10,
    /// The system refused a thread for another reason than a lack of memory or room, or its affinity
    /// or niceness.
    MOR_ERROR_THREAD = 11,
    /// The call was cancelled; the session is as it was before the call (after `mor_session_prefill_whole`
    /// it holds what the text has in common with what it held).
    MOR_ERROR_CANCELLED = 12,
    /// Another thread (or a callback of this one) is inside a call on this object.
    MOR_ERROR_BUSY = 13,
    /// A buffer is too small; the needed size was written where the call says.
    MOR_ERROR_BUFFER_TOO_SMALL = 14,
    /// A saved state is damaged, or of another model, version or kind of session.
    MOR_ERROR_STATE = 15,
    /// The model's file was shortened while it was mapped.
    MOR_ERROR_FILE_CHANGED = 16,
    /// The system refused to lock memory.
    MOR_ERROR_LOCK = 17,
    /// The call needs something that has not happened yet, such as logits before any token.
    MOR_ERROR_NOT_READY = 18,
    /// A bug in this library. The object of the call accepts nothing but being freed.
    MOR_ERROR_INTERNAL = 19,
    /// There is no GPU that can be used, it has too little memory, or it failed. What was made on it
    /// accepts nothing but being freed; the CPU still works.
    MOR_ERROR_DEVICE = 20,
}

use mor_status::*;

impl From<&Error> for mor_status {
    fn from(error: &Error) -> Self {
        match error {
            Error::Io { .. } => MOR_ERROR_IO,
            Error::Format(_) => MOR_ERROR_FORMAT,
            Error::Unsupported(_) | Error::Convert(_) => MOR_ERROR_UNSUPPORTED,
            Error::InvalidArgument(_) => MOR_ERROR_INVALID_ARGUMENT,
            Error::NotReady(_) => MOR_ERROR_NOT_READY,
            Error::BufferTooSmall { .. } => MOR_ERROR_BUFFER_TOO_SMALL,
            Error::Tokenizer(_) => MOR_ERROR_TOKENIZER,
            Error::Template(_) => MOR_ERROR_TEMPLATE,
            Error::ContextFull { .. } => MOR_ERROR_CONTEXT_FULL,
            Error::KvFull { .. } => MOR_ERROR_KV_FULL,
            Error::OutOfMemory { .. } | Error::NoThread { .. } => MOR_ERROR_OUT_OF_MEMORY,
            Error::Lock { .. } => MOR_ERROR_LOCK,
            Error::FileChanged { .. } => MOR_ERROR_FILE_CHANGED,
            Error::Cancelled => MOR_ERROR_CANCELLED,
            Error::State(_) => MOR_ERROR_STATE,
            Error::NotFinite(_) => MOR_ERROR_NOT_FINITE,
            Error::Thread(_) => MOR_ERROR_THREAD,
            Error::Device(_) => MOR_ERROR_DEVICE,
        }
    }
}

/// One sentence about a status (a `mor_status`), for people. Never NULL; a number that is no status
/// gives a sentence too. The text lives as long as the program. What went wrong in a particular call is told better
/// by the `mor_error` that it took, or by the object's `..._last_error`.
#[unsafe(no_mangle)]
pub extern "C" fn mor_status_text(status: i32) -> *const c_char {
    boundary!(c"unknown status".as_ptr(), { sentence(status).as_ptr() })
}

fn sentence(status: i32) -> &'static CStr {
    const TEXTS: [&CStr; 21] = [
        c"success",
        c"a parameter, token, text, size or pointer cannot be taken",
        c"out of memory",
        c"the system refused to read or map the file",
        c"the model file is damaged",
        c"not supported",
        c"the model has no usable tokenizer, or the text cannot be expressed in it",
        c"the model has no usable chat template, or it refuses the conversation",
        c"the context is full",
        c"the KV cache is full",
        c"the model computed a value that is not finite (its weights are damaged), or too large for the type of keys and values",
        c"a thread could not be started or set up",
        c"the call was cancelled",
        c"the object is in use by another call",
        c"the buffer is too small",
        c"the saved state cannot be restored",
        c"the model's file was shortened while it was mapped",
        c"the system refused to lock memory",
        c"the call needs something that has not happened yet",
        c"a bug in the library; free the object",
        c"no GPU can be used, or it has too little memory, or it failed",
    ];
    let known = usize::try_from(status).ok().and_then(|i| TEXTS.get(i));
    known.copied().unwrap_or(c"unknown status")
}

/// Bytes of an error's text, its final zero included.
pub const MOR_ERROR_TEXT_BYTES: usize = 512;

/// Why a call that makes an object failed. The memory is the caller's. After a call that failed it
/// holds the status and a sentence; after one that succeeded, `MOR_OK` and an empty text.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_error {
    /// What the call returned.
    pub status: mor_status,
    /// What was wrong and what to do about it, one sentence of UTF-8 that ends with a zero byte.
    pub text: [c_char; MOR_ERROR_TEXT_BYTES],
}

/// A sentence kept in an object, as C reads it.
pub(super) struct LastError([u8; MOR_ERROR_TEXT_BYTES]);

impl LastError {
    pub const EMPTY: LastError = LastError([0; MOR_ERROR_TEXT_BYTES]);

    pub fn set(&mut self, text: &str) {
        // An `Error`'s text is shorter than this; what is not is cut between characters.
        let mut end = text.len().min(MOR_ERROR_TEXT_BYTES - 1);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.0[..end].copy_from_slice(&text.as_bytes()[..end]);
        self.0[end] = 0;
    }

    pub fn as_ptr(&self) -> *const c_char {
        self.0.as_ptr().cast()
    }
}

/// What a failing call has to tell.
#[allow(clippy::large_enum_variant)] // an error is kept in place so that it needs no memory
pub(super) enum Failure {
    Error(Error),
    /// A status whose sentence says all.
    Status(mor_status),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

impl Failure {
    pub fn argument(what: impl std::fmt::Display) -> Self {
        Failure::Error(Error::argument(what))
    }

    pub fn status(&self) -> mor_status {
        match self {
            Failure::Error(error) => error.into(),
            Failure::Status(status) => *status,
        }
    }

    /// Its sentence.
    pub fn text(&self) -> crate::Text {
        match self {
            Failure::Error(error) => crate::Text::new(error),
            Failure::Status(status) => {
                crate::Text::new(sentence(*status as i32).to_str().unwrap_or_default())
            }
        }
    }
}

/// Tells the outcome of a call that makes an object. NULL `out_error` means that nobody asks.
pub(super) unsafe fn report(outcome: Result<(), Failure>, out_error: *mut mor_error) -> mor_status {
    let (status, text) = match outcome {
        Ok(()) => (MOR_OK, crate::Text::new("")),
        Err(failure) => (failure.status(), failure.text()),
    };
    if !out_error.is_null() {
        // SAFETY: not NULL, and the caller's duty.
        unsafe { put_error(out_error, status, &text) };
    }
    status
}

/// Tells that a call that makes an object panicked.
pub(super) unsafe fn report_panic(out_error: *mut mor_error) -> mor_status {
    // SAFETY: passed on.
    unsafe { report(Err(Failure::Status(MOR_ERROR_INTERNAL)), out_error) }
}

/// Writes a `mor_error`. The caller passes room for one.
pub(super) unsafe fn put_error(out: *mut mor_error, status: mor_status, text: &str) {
    let mut last = LastError::EMPTY;
    last.set(text);
    // SAFETY: by this function's contract.
    unsafe {
        (&raw mut (*out).status).write_unaligned(status);
        (&raw mut (*out).text)
            .cast::<[u8; MOR_ERROR_TEXT_BYTES]>()
            .write_unaligned(last.0);
    }
}

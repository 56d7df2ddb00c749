//! The one error type. Each variant is one kind of failure (and one status of the C header); its
//! text is a sentence that says what was wrong and, where that is not obvious, what to do.
//!
//! Making an error takes no memory, and neither does printing it, so that running out of it can be
//! told. (On Windows, the system's own words are an exception.)

use crate::text::Text;
use std::fmt::{self, Display};
use std::io;
use std::path::Path;

/// Everything that can go wrong in this crate. What the system said is part of the sentence, and no
/// [`source`](std::error::Error::source) besides.
///
/// An error holds its sentence, in some 460 bytes, so that telling of missing memory takes none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused to read, write or map a file.
    #[error("cannot use '{path}': {}", said(system))]
    Io {
        /// The file in question.
        path: Text,
        /// What the system said.
        system: io::Error,
    },
    /// A file is damaged, truncated or made to mislead.
    #[error("the file is damaged: {0}")]
    Format(Text),
    /// A file is sound, but of a kind that this library does not run.
    #[error("not supported: {0}")]
    Unsupported(Text),
    /// A parameter, token or text that the call cannot take.
    #[error("{0}")]
    InvalidArgument(Text),
    /// The call needs something that has not happened yet.
    #[error("{0}")]
    NotReady(Text),
    /// A buffer cannot hold the result.
    #[error("the buffer holds {capacity}, but the result needs {needed}")]
    BufferTooSmall {
        /// What the result takes, in elements of the buffer.
        needed: usize,
        /// What the buffer holds.
        capacity: usize,
    },
    /// The file's vocabulary cannot be used, or a text cannot be expressed in it.
    #[error("tokenizer: {0}")]
    Tokenizer(Text),
    /// The chat template of the file is broken or refuses the conversation.
    #[error("chat template: {0}")]
    Template(Text),
    /// The sequence does not fit into the session's context.
    #[error(
        "the text needs {needed} tokens, but the planned context holds {context}; plan a larger context or shorten the text"
    )]
    ContextFull {
        /// Tokens that the call would have come to.
        needed: usize,
        /// Tokens that the session was planned for.
        context: usize,
    },
    /// Every page of the KV cache is taken.
    #[error("the KV cache is full ({pages} pages); plan more KV memory or a shorter context")]
    KvFull {
        /// Pages in the pool.
        pages: usize,
    },
    /// The system gave no memory.
    #[error("out of memory: {bytes} bytes were refused")]
    OutOfMemory {
        /// The size that was asked for.
        bytes: usize,
    },
    /// The system gave no memory, or no room, for one more thread.
    #[error(
        "the system refused thread {index}: it has no {bytes} bytes for its stack, or limits the number of threads (ulimit -u, a container's limit); ask for fewer"
    )]
    NoThread {
        /// Which of a session's threads, from 1.
        index: usize,
        /// The size of its stack.
        bytes: usize,
    },
    /// The system refused to keep memory resident.
    #[error(
        "the system refused to lock {bytes} bytes into memory ({}); raise the limit (ulimit -l, RLIMIT_MEMLOCK) or do without the lock",
        said(system)
    )]
    Lock {
        /// The size that was asked for.
        bytes: usize,
        /// What the system said.
        system: io::Error,
    },
    /// The model's file was shortened while it was mapped.
    #[error(
        "the model's file was {mapped} bytes long when it was mapped and is {now} now; load it anew, or load a copy that nobody can change"
    )]
    FileChanged {
        /// The length that the map relies on.
        mapped: u64,
        /// The length that was found.
        now: u64,
    },
    /// The call was cancelled, and the session stands where it stood before; of a conversion, nothing is left.
    #[error("the call was cancelled")]
    Cancelled,
    /// A saved state that is damaged or belongs to another model or another kind of session.
    #[error("the saved state cannot be restored: {0}")]
    State(Text),
    /// The model computed a value that is not a number or infinite, or a key or value too large for the type in which
    /// these are kept.
    #[error("the model computed {0}")]
    NotFinite(Text),
    /// A thread could not be started or set up, or one of the team died.
    #[error("threads: {0}")]
    Thread(Text),
    /// There is no GPU that can be used, it has too little memory, or it failed. What was made on it
    /// is lost; the CPU still works.
    #[error("GPU: {0}")]
    Device(Text),
    /// A checkpoint cannot be converted.
    #[error("cannot convert: {0}")]
    Convert(Text),
}

/// The result of every fallible call in this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Format`]: the file is damaged.
    pub fn format(what: impl Display) -> Self {
        Error::Format(Text::new(what))
    }
    /// An [`Error::Unsupported`]: the file is sound but cannot run here.
    pub fn unsupported(what: impl Display) -> Self {
        Error::Unsupported(Text::new(what))
    }
    /// An [`Error::InvalidArgument`]: the caller asked for something impossible.
    pub fn argument(what: impl Display) -> Self {
        Error::InvalidArgument(Text::new(what))
    }
    /// An [`Error::NotReady`]: something must be done first.
    pub fn not_ready(what: impl Display) -> Self {
        Error::NotReady(Text::new(what))
    }
    /// An [`Error::Tokenizer`].
    pub fn tokenizer(what: impl Display) -> Self {
        Error::Tokenizer(Text::new(what))
    }
    /// An [`Error::Template`].
    pub fn template(what: impl Display) -> Self {
        Error::Template(Text::new(what))
    }
    /// An [`Error::State`].
    pub fn state(what: impl Display) -> Self {
        Error::State(Text::new(what))
    }
    /// An [`Error::NotFinite`]: the weights are damaged.
    pub fn not_finite(what: impl Display) -> Self {
        Error::NotFinite(Text::new(format_args!(
            "a value that is not finite ({what}); its weights are damaged"
        )))
    }
    /// An [`Error::NotFinite`]: another type of keys and values could hold it.
    pub(crate) fn too_large(ty: impl Display) -> Self {
        Error::NotFinite(Text::new(format_args!(
            "a key or a value that is too large for {ty}; keep keys and values as F32"
        )))
    }
    /// An [`Error::Thread`].
    pub fn thread(what: impl Display) -> Self {
        Error::Thread(Text::new(what))
    }
    /// An [`Error::Device`].
    pub fn device(what: impl Display) -> Self {
        Error::Device(Text::new(what))
    }
    /// An [`Error::Convert`].
    pub fn convert(what: impl Display) -> Self {
        Error::Convert(Text::new(what))
    }
    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl AsRef<Path>, system: io::Error) -> Self {
        Error::Io {
            path: Text::new(path.as_ref().display()),
            system,
        }
    }
}

/// What the system said, as [`io::Error`] prints it, which would take memory.
fn said(error: &io::Error) -> impl Display {
    struct Said<'a>(&'a io::Error);
    impl Display for Said<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            #[cfg(unix)]
            if let Some(code) = self.0.raw_os_error() {
                return write!(f, "{} (os error {code})", system_text(code));
            }
            Display::fmt(self.0, f)
        }
    }
    Said(error)
}

/// The system's sentence for an error code.
#[cfg(unix)]
fn system_text(code: i32) -> Text {
    let mut buffer = [0u8; 256];
    // One byte less than there are, so that a zero is at the end whatever is written.
    let room = buffer.len() - 1;
    // SAFETY: the buffer is writable and longer than `room`. A code that the system does not know is
    // a failure, but there is a text for it too.
    let _ = unsafe { libc::strerror_r(code, buffer.as_mut_ptr().cast(), room) };
    let text = std::ffi::CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
    Text::new(text.to_str().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_words_are_those_of_the_standard_library() {
        for code in 0..200 {
            let error = io::Error::from_raw_os_error(code);
            assert_eq!(said(&error).to_string(), error.to_string());
        }
        let other = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert_eq!(said(&other).to_string(), other.to_string());
    }
}

//! The one error type. Each variant is one kind of failure (and one status of the C header); its
//! text is a sentence that says what was wrong and, where that is not obvious, what to do.

use std::path::PathBuf;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused to read, write or map a file.
    #[error("cannot use '{}': {source}", path.display())]
    Io {
        /// The file in question.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is damaged, truncated or made to mislead.
    #[error("the file is damaged: {0}")]
    Format(String),
    /// A file is sound, but of a kind that this library does not run.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A parameter, token or text that the call cannot take.
    #[error("{0}")]
    InvalidArgument(String),
    /// The file's vocabulary cannot be used, or a text cannot be expressed in it.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template of the file is broken or refuses the conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// The sequence does not fit into the session's context.
    #[error(
        "the text needs {needed} tokens, but the session's context holds {context}; plan a larger context or shorten the text"
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
    /// The model computed a value that is not a number or infinite.
    #[error("the model computed a value that is not finite ({0}); its weights are damaged")]
    NotFinite(String),
    /// A thread could not be started, or one of the team died.
    #[error("threads: {0}")]
    Thread(String),
    /// A checkpoint cannot be converted.
    #[error("cannot convert: {0}")]
    Convert(String),
}

/// The result of every fallible call in this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Format`]: the file is damaged.
    pub fn format(what: impl Into<String>) -> Self {
        Error::Format(what.into())
    }
    /// An [`Error::Unsupported`]: the file is sound but cannot run here.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Error::Unsupported(what.into())
    }
    /// An [`Error::InvalidArgument`]: the caller asked for something impossible.
    pub fn argument(what: impl Into<String>) -> Self {
        Error::InvalidArgument(what.into())
    }
    /// An [`Error::Tokenizer`].
    pub fn tokenizer(what: impl Into<String>) -> Self {
        Error::Tokenizer(what.into())
    }
    /// An [`Error::Convert`].
    pub fn convert(what: impl Into<String>) -> Self {
        Error::Convert(what.into())
    }
    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            source,
        }
    }
}

//! The GGUF container: metadata, a table of tensors, and their bytes.
//!
//! [`Gguf::parse`] reads the head of a file that is already in memory (usually mapped) and checks
//! all of it before anything is used: a file that parses has every tensor inside the file, on its
//! alignment, overlapping no other. Files are untrusted. A count is compared with the bytes that are
//! left before anything of that size is allocated, so a file cannot make the reader take more than a
//! small multiple of its own size ([`limits`]).
//!
//! [`GgufWriter`] writes such a file as a stream and puts it in place only when it is complete.

pub mod limits;
mod metadata;
mod parse;
mod reader;
mod strings;
mod value;
mod writer;

pub use metadata::Metadata;
pub use strings::Strings;
pub use value::{Array, Value};
pub use writer::{GgufWriter, TensorPlan};
#[cfg(feature = "convert")]
pub(crate) use writer::{create_beside, replace};

use crate::quant::TensorType;
use crate::text::excerpt;
use std::fmt;

/// The first four bytes of every GGUF file.
const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written. Version 2 has the same layout and is read as well.
const VERSION: u32 = 3;
/// Optional metadata key: the alignment of tensor data.
const ALIGNMENT_KEY: &str = "general.alignment";

/// What a GGUF file says of one tensor. The range `offset..offset + bytes` lies inside the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The tensor's name, unique in its file.
    pub name: String,
    /// How its weights are stored.
    pub ty: TensorType,
    /// Sizes, the fastest-moving first: `dims[0]` columns (the length of a row), `dims[1]` rows, ….
    pub dims: Vec<u64>,
    /// Where its bytes begin, from the start of the file.
    pub offset: usize,
    /// How many bytes it has.
    pub bytes: usize,
}

impl TensorInfo {
    /// The length of a row, a whole number of blocks.
    pub fn columns(&self) -> usize {
        // A parsed tensor has one to four sizes, and their product fits a usize.
        self.dims.first().map_or(0, |&n| n as usize)
    }

    /// The number of rows: the product of all sizes but the first.
    pub fn rows(&self) -> usize {
        self.dims.iter().skip(1).map(|&n| n as usize).product()
    }
}

/// The checked head of a GGUF file.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The key-value pairs.
    pub metadata: Metadata,
    /// Length of the whole file.
    pub file_bytes: usize,
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
}

impl Gguf {
    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let found = self
            .by_name
            .binary_search_by(|&i| self.tensors[i as usize].name.as_str().cmp(name))
            .ok()?;
        Some(&self.tensors[self.by_name[found] as usize])
    }

    /// Every tensor, in the order of the file's table.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }
}

/// A name from a file as it may be shown: quoted, without control characters, and not too long.
fn shown(name: &str) -> impl fmt::Display {
    const SHOWN: usize = 80;
    struct Shown<'a>(&'a str);
    impl fmt::Display for Shown<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "'{}'", excerpt(self.0, SHOWN))
        }
    }
    Shown(name)
}

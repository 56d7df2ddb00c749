//! Where the bytes of a model live.

use crate::error::{Error, Result};
use memmap2::{Mmap, MmapMut, MmapOptions};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

/// How a file is brought into memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadParams {
    /// Read the file into memory of this process instead of mapping it. A map costs no memory of
    /// its own and is shared between processes, but whoever truncates the file during a call
    /// brings the process down; a copy is safe from that.
    pub copy: bool,
    /// Touch every page now, so that no later call waits for the disk.
    pub prefault: bool,
    /// Keep every page in memory until the model goes (`mlock`).
    pub lock: bool,
}

/// The bytes of one model.
pub(crate) enum Storage {
    /// A part of a file.
    Map {
        map: Mmap,
        file: File,
        /// How long the file must be for every byte of the map to exist.
        end: u64,
    },
    /// A private copy of a file.
    Copy(MmapMut),
    /// Bytes of the program.
    Static(&'static [u8]),
    /// Bytes of the caller.
    Owned(Vec<u8>),
}

impl Storage {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Storage::Map { map, .. } => map,
            Storage::Copy(copy) => copy,
            Storage::Static(bytes) => bytes,
            Storage::Owned(bytes) => bytes,
        }
    }

    /// A file, or the part of it from an offset on and of a length. `path` is for sentences.
    pub fn file(
        mut file: File,
        path: &Path,
        part: Option<(u64, Option<u64>)>,
        params: &LoadParams,
    ) -> Result<Self> {
        let io = |source| Error::io(path, source);
        let metadata = file.metadata().map_err(io)?;
        if metadata.is_dir() {
            return Err(Error::argument(format_args!(
                "'{}' is a folder; convert a checkpoint folder with 'mor convert' first",
                path.display()
            )));
        }
        let (offset, bytes) = part.unwrap_or_default();
        let rest = metadata.len().saturating_sub(offset);
        let bytes = bytes.unwrap_or(rest);
        if bytes > rest {
            return Err(Error::argument(format_args!(
                "{bytes} bytes from {offset} on were asked for, but the file has {}",
                metadata.len()
            )));
        }
        if bytes == 0 {
            return Err(Error::format(format_args!("'{}' is empty", path.display())));
        }
        let length = usize::try_from(bytes)
            .map_err(|_| Error::unsupported("a file larger than this machine's address space"))?;
        if params.copy {
            file.seek(SeekFrom::Start(offset)).map_err(io)?;
            let mut copy = anonymous(length)?;
            if params.lock {
                copy.lock().map_err(|source| refused(length, source))?;
            }
            // Reading touches every page.
            file.read_exact(&mut copy).map_err(io)?;
            return Ok(Storage::Copy(copy));
        }
        // SAFETY: the map is private to this process and read-only. Bytes that another process
        // changes are only ever read as numbers, any of which is valid. A file that is truncated
        // is found by `check_file` before each pass; during a pass it is not, and `LoadParams`
        // says so.
        let map = unsafe { MmapOptions::new().offset(offset).len(length).map(&file) }.map_err(
            |source| match source.kind() {
                ErrorKind::OutOfMemory => Error::OutOfMemory { bytes: length },
                _ => io(source),
            },
        )?;
        if params.lock {
            map.lock().map_err(|source| refused(length, source))?;
        }
        if params.prefault {
            touch(&map);
        }
        let end = offset + bytes;
        Ok(Storage::Map { map, file, end })
    }

    /// Memory that outlives the model, used in place or copied.
    #[cfg(feature = "ffi")]
    pub fn memory(bytes: &'static [u8], params: &LoadParams) -> Result<Self> {
        if !params.copy {
            return Ok(Storage::Static(bytes));
        }
        let mut copy = anonymous(bytes.len())?;
        if params.lock {
            let refused = |source| refused(bytes.len(), source);
            copy.lock().map_err(refused)?;
        }
        copy.copy_from_slice(bytes);
        Ok(Storage::Copy(copy))
    }

    /// See [`Model::check_file`](super::Model::check_file).
    pub fn check_file(&self) -> Result<()> {
        let Storage::Map { file, end, .. } = self else {
            return Ok(());
        };
        let source = match file.metadata() {
            Ok(metadata) if metadata.len() >= *end => return Ok(()),
            Ok(metadata) => {
                return Err(Error::FileChanged {
                    mapped: *end,
                    now: metadata.len(),
                });
            }
            Err(source) => source,
        };
        Err(Error::io("the model's file", source))
    }
}

/// Zeroed memory straight from the system: pages that are never touched cost nothing.
pub(crate) fn anonymous(bytes: usize) -> Result<MmapMut> {
    MmapMut::map_anon(bytes.max(1)).map_err(|_| Error::OutOfMemory { bytes })
}

/// The error of a lock that the system refused.
fn refused(bytes: usize, source: std::io::Error) -> Error {
    Error::Lock { bytes, source }
}

/// Reads a byte of every page.
fn touch(bytes: &[u8]) {
    /// The smallest page of any system that this runs on.
    const PAGE: usize = 4096;
    for byte in bytes.iter().step_by(PAGE) {
        std::hint::black_box(*byte);
    }
}

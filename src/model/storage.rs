//! Where the bytes of a model live.

use crate::error::{Error, Result};
#[cfg(unix)]
use crate::memory::reserved;
use memmap2::{Mmap, MmapMut, MmapOptions};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

/// Where a model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The NVIDIA GPU of this number, from 0. Needs the feature `cuda` and NVIDIA's driver.
    Cuda(u32),
}

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
    /// Where the model runs: for a GPU the weights are copied there, or used in place where it shares
    /// the host's memory.
    pub device: Device,
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
            return Err(Error::unsupported(format_args!(
                "'{}' is a folder, not a GGUF file; a checkpoint folder must be converted first (mor convert)",
                path.display()
            )));
        }
        if !metadata.is_file() {
            return Err(Error::unsupported(format_args!(
                "'{}' is a pipe or a device, not a file",
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
        // No piece of memory is longer than an isize.
        let length = isize::try_from(bytes)
            .map_err(|_| Error::unsupported("a file larger than this machine's address space"))?
            .unsigned_abs();
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

/// Opens a file for reading.
///
/// [`File::open`] copies a path that is longer than some hundred bytes (on Windows any) to the heap,
/// and ends the process where there is no memory for that. Here it is an error, but for Windows.
pub(super) fn open(path: &Path) -> Result<File> {
    let io = |source| Error::io(path, source);
    #[cfg(unix)]
    if let Some(opened) = open_long(path)? {
        return opened.map_err(io);
    }
    File::open(path).map_err(io)
}

/// Opens a path that is too long for [`File::open`]; none when it is not.
#[cfg(unix)]
fn open_long(path: &Path) -> Result<Option<std::io::Result<File>>> {
    use std::ffi::CStr;
    use std::os::fd::FromRawFd;
    use std::os::unix::ffi::OsStrExt;
    /// Shorter ones the standard library keeps on the stack; its own limit, 384, is its secret.
    const SHORT: usize = 256;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const FLAGS: libc::c_int = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_LARGEFILE;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const FLAGS: libc::c_int = libc::O_RDONLY | libc::O_CLOEXEC;
    let path = path.as_os_str().as_bytes();
    if path.len() < SHORT {
        return Ok(None);
    }
    let mut copy = reserved(path.len() + 1)?;
    copy.extend_from_slice(path);
    copy.push(0);
    let Ok(name) = CStr::from_bytes_with_nul(&copy) else {
        return Ok(Some(Err(ErrorKind::InvalidInput.into())));
    };
    loop {
        // SAFETY: the name is a C string, and without O_CREAT no third argument is read.
        let descriptor = unsafe { libc::open(name.as_ptr(), FLAGS) };
        if descriptor >= 0 {
            // SAFETY: just opened, and nobody else knows it.
            return Ok(Some(Ok(unsafe { File::from_raw_fd(descriptor) })));
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Ok(Some(Err(error)));
        }
    }
}

/// Zeroed memory straight from the system: pages that are never touched cost nothing.
pub(crate) fn anonymous(bytes: usize) -> Result<MmapMut> {
    MmapMut::map_anon(bytes.max(1)).map_err(|_| Error::OutOfMemory { bytes })
}

/// The error of a lock that the system refused.
fn refused(bytes: usize, system: std::io::Error) -> Error {
    Error::Lock { bytes, system }
}

/// Reads a byte of every page.
fn touch(bytes: &[u8]) {
    /// The smallest page of any system that this runs on.
    const PAGE: usize = 4096;
    for byte in bytes.iter().step_by(PAGE) {
        std::hint::black_box(*byte);
    }
}

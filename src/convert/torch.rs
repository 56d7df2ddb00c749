//! Finding the tensors of a file that `torch.save` wrote: a zip, uncompressed, of a pickle that
//! describes tensors and of the storages that hold their numbers.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::options::Progress;
use super::pickle::{PickledTensor, read_state_dict};
use super::source::{Dtype, Found, file_label};
use crate::error::{Error, Result};

/// More parts than any checkpoint's archive has.
const MAX_ENTRIES: usize = 1 << 18;

/// What `torch.save` began files with before version 1.6.
const LEGACY_MAGIC: [u8; 14] = [
    0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19,
];

pub(super) fn looks_legacy(bytes: &[u8]) -> bool {
    bytes.starts_with(&LEGACY_MAGIC)
}

pub(super) fn legacy(path: &Path) -> Error {
    Error::convert(format_args!(
        "'{}' is of PyTorch's format before version 1.6; load it and save it again with a newer PyTorch",
        file_label(path)
    ))
}

/// Lists the tensors of a mapped file; every range lies inside it.
pub(super) fn read(bytes: &[u8], path: &Path, progress: &mut dyn Progress) -> Result<Vec<Found>> {
    let archive = Archive::open(bytes, path)?;
    let pickle = archive.entry("data.pkl")?;
    let pickle = bytes.get(pickle).unwrap_or_default();
    // The part is absent before PyTorch 2.1.
    let order = archive.entry("byteorder").ok();
    if order.is_some_and(|at| bytes.get(at) != Some(b"little")) {
        return Err(Error::unsupported(format_args!(
            "'{}' was written on a big-endian machine; save it again on a little-endian one",
            archive.label
        )));
    }
    let state = read_state_dict(pickle).map_err(|error| match error {
        Error::Convert(what) => Error::convert(format_args!("'{}': {what}", archive.label)),
        other => other,
    })?;
    if state.skipped > 0 {
        let first = state.first_skipped.as_deref();
        let first = first.map_or(String::new(), |name| format!(", '{name}' first"));
        progress.note(&format!(
            "{} entries of '{}' are no tensors and were left out{first}.",
            state.skipped, archive.label
        ));
    }
    state
        .tensors
        .into_iter()
        .map(|(name, tensor)| archive.find(name, tensor))
        .collect()
}

/// The parts of the zip: where each one's bytes lie in the file.
struct Archive {
    label: String,
    /// The folder inside the zip.
    root: String,
    entries: HashMap<String, Range<usize>>,
}

impl Archive {
    fn open(bytes: &[u8], path: &Path) -> Result<Archive> {
        let label = file_label(path);
        let damaged =
            |what: String| Error::convert(format_args!("'{label}' is not a sound zip: {what}"));
        let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(|e| damaged(e.to_string()))?;
        if zip.len() > MAX_ENTRIES {
            return Err(damaged(format!("it has {} parts", zip.len())));
        }
        let mut entries = HashMap::new();
        let mut root = None;
        for index in 0..zip.len() {
            let part = zip.by_index(index).map_err(|e| damaged(e.to_string()))?;
            let name = part
                .name()
                .map_err(|e| damaged(e.to_string()))?
                .into_owned();
            if part.compression() != CompressionMethod::Stored {
                return Err(Error::unsupported(format_args!(
                    "'{label}' is compressed, which torch.save never does; save it again with torch.save"
                )));
            }
            let range = part.data_start().and_then(|start| {
                let start = usize::try_from(start).ok()?;
                let end = start.checked_add(usize::try_from(part.size()).ok()?)?;
                (end <= bytes.len()).then_some(start..end)
            });
            let range = range.ok_or_else(|| damaged(format!("'{name}' lies outside it")))?;
            if let Some(folder) = name.strip_suffix("data.pkl") {
                root.get_or_insert_with(|| folder.to_string());
            }
            entries.insert(name, range);
        }
        let root = root.ok_or_else(|| {
            Error::convert(format_args!(
                "'{label}' is a zip without data.pkl; torch.save did not write it"
            ))
        })?;
        Ok(Archive {
            label,
            root,
            entries,
        })
    }

    fn entry(&self, name: &str) -> Result<Range<usize>> {
        let full = format!("{}{name}", self.root);
        self.entries
            .get(&full)
            .cloned()
            .ok_or_else(|| Error::convert(format_args!("'{}' lacks its part '{full}'", self.label)))
    }

    /// Where a tensor's numbers lie in the file.
    fn find(&self, name: String, tensor: PickledTensor) -> Result<Found> {
        let found = |start, end| Found {
            name: name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            start,
            end,
        };
        // Its size is not known, and no weight may be of such a type: it is listed to be named.
        if matches!(tensor.dtype, Dtype::Other(_)) {
            return Ok(found(0, 0));
        }
        if !is_contiguous(&tensor) {
            return Err(Error::unsupported(format_args!(
                "'{name}' is stored with the strides {:?} for the shape {:?}; save it after .contiguous()",
                tensor.strides, tensor.shape
            )));
        }
        let storage = self.entry(&format!("data/{}", tensor.storage))?;
        let size = tensor.dtype.bytes();
        let start = tensor.offset.checked_mul(size);
        let length = tensor.shape.iter().try_fold(size, |n, &d| n.checked_mul(d));
        let start = start.and_then(|s| s.checked_add(storage.start));
        let end = start.zip(length).and_then(|(s, l)| s.checked_add(l));
        match start.zip(end) {
            Some((start, end)) if end <= storage.end => Ok(found(start, end)),
            _ => Err(Error::convert(format_args!(
                "'{name}' reaches beyond its storage in '{}'; the file is damaged",
                self.label
            ))),
        }
    }
}

/// Whether the numbers lie row after row without gaps; the stride of a dimension of one is moot.
fn is_contiguous(tensor: &PickledTensor) -> bool {
    let mut expected = 1usize;
    for (&size, &stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
        if size != 1 && stride != expected {
            return false;
        }
        expected = expected.saturating_mul(size);
    }
    true
}

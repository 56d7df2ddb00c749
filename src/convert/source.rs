//! The tensors of a checkpoint, wherever its files keep them: mapped, never loaded.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::document::Document;
use super::options::Progress;
use super::{safetensors, torch};
use crate::error::{Error, Result};

/// What the numbers of a source tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    BF16,
    F64,
    /// Listed, so that it can be named, but no weight may be of this type.
    Other(&'static str),
}

impl Dtype {
    /// Bytes of one number; of no meaning for `Other`.
    pub(super) fn bytes(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::Other(_) => 1,
        }
    }
}

/// One tensor as a reader of one file format found it: its bytes lie contiguously at `range`.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: usize,
    pub end: usize,
}

/// One tensor of the checkpoint.
#[derive(Debug, Clone)]
pub(super) struct SourceTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    file: usize,
    start: usize,
    end: usize,
}

/// A checkpoint: its mapped files and what they hold, by name.
pub(super) struct Source {
    files: Vec<Mmap>,
    tensors: BTreeMap<String, SourceTensor>,
    /// How to speak of the checkpoint in a sentence.
    pub label: String,
}

impl Source {
    /// Opens the checkpoint in a folder, or a single weights file.
    pub(super) fn open(input: &Path, progress: &mut dyn Progress) -> Result<Source> {
        let paths = if input.is_dir() {
            find_files(input)?
        } else {
            vec![input.to_path_buf()]
        };
        let mut source = Source {
            files: Vec::new(),
            tensors: BTreeMap::new(),
            label: file_label(input),
        };
        let mut stripped = 0usize;
        for path in &paths {
            stripped += source.add_file(path, progress)?;
        }
        if stripped > 0 {
            progress.note(&format!(
                "{stripped} tensor names carried a wrapper's prefix such as 'module.' or '_orig_mod.', which was dropped."
            ));
        }
        source.add_model_prefix()?;
        Ok(source)
    }

    /// Adds the tensors of one file; returns how many names had a wrapper's prefix.
    fn add_file(&mut self, path: &Path, progress: &mut dyn Progress) -> Result<usize> {
        let map = map_file(path)?;
        // The length of a safetensors header may begin with the letters of a zip.
        let is_safetensors = path.extension().is_some_and(|e| e == "safetensors");
        let found = if map.starts_with(b"PK\x03\x04") && !is_safetensors {
            torch::read(&map, path, progress)?
        } else if torch::looks_legacy(&map) {
            return Err(torch::legacy(path));
        } else if is_safetensors {
            safetensors::read(&map, path)?
        } else {
            return Err(Error::convert(format_args!(
                "'{}' is neither safetensors nor a zip that torch.save wrote",
                file_label(path)
            )));
        };
        let file = self.files.len();
        let mut stripped = 0;
        for tensor in found {
            let name = strip_wrappers(&tensor.name);
            stripped += usize::from(name != tensor.name);
            let entry = SourceTensor {
                name: name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape,
                file,
                start: tensor.start,
                end: tensor.end,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::convert(format_args!(
                    "the tensor '{name}' is in the checkpoint twice; keep one of them"
                )));
            }
        }
        self.files.push(map);
        Ok(stripped)
    }

    /// A decoder saved without its head has names that lack the leading `model.`.
    fn add_model_prefix(&mut self) -> Result<()> {
        if !self.tensors.contains_key("embed_tokens.weight") {
            return Ok(());
        }
        let old = std::mem::take(&mut self.tensors);
        for (name, mut tensor) in old {
            let name = if name.starts_with("model.") || name.starts_with("lm_head.") {
                name
            } else {
                format!("model.{name}")
            };
            tensor.name = name.clone();
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(Error::convert(format_args!(
                    "the tensor '{name}' is in the checkpoint twice, with and without the leading 'model.'"
                )));
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Option<&SourceTensor> {
        self.tensors.get(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The bytes of a tensor, where they lie in its file.
    pub(super) fn bytes(&self, tensor: &SourceTensor) -> &[u8] {
        // Every range was checked against its file by the reader that found it.
        self.files
            .get(tensor.file)
            .and_then(|file| file.get(tensor.start..tensor.end))
            .unwrap_or(&[])
    }

    /// Whether two tensors hold the same numbers in the same type and shape. Comparing the mapped
    /// bytes ends at the first difference, so unequal tensors cost next to nothing.
    pub(super) fn equal(&self, a: &SourceTensor, b: &SourceTensor) -> bool {
        a.dtype == b.dtype && a.shape == b.shape && self.bytes(a) == self.bytes(b)
    }
}

/// The length of a file. Anything else is refused: to open a pipe would wait for its writer.
pub(super) fn regular(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    match metadata.is_file() {
        true => Ok(metadata.len()),
        false => Err(Error::convert(format_args!(
            "'{}' is a folder, a device, a pipe or a socket, where a file is needed",
            path.display()
        ))),
    }
}

/// Maps a file read-only.
pub(super) fn map_file(path: &Path) -> Result<Mmap> {
    regular(path)?;
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: the map is read-only and lives no longer than the conversion. A file that another
    // program truncates meanwhile would fault, as for every program that maps files; the
    // documentation of `convert` says so.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}

/// A path's last component, for sentences.
pub(super) fn file_label(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |n| n.to_string_lossy().into_owned(),
    )
}

/// Drops the segments that training wrappers add to a name.
fn strip_wrappers(name: &str) -> String {
    const WRAPPERS: [&str; 4] = [
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    ];
    let mut kept: Vec<&str> = Vec::new();
    for part in name.split('.') {
        let wrapper = WRAPPERS.contains(&part) || (kept.is_empty() && part == "module");
        if !wrapper {
            kept.push(part);
        }
    }
    kept.join(".")
}

/// The weight files of a folder, safetensors before pickles.
fn find_files(folder: &Path) -> Result<Vec<PathBuf>> {
    for (stem, extension) in [("model", "safetensors"), ("pytorch_model", "bin")] {
        let single = folder.join(format!("{stem}.{extension}"));
        if single.is_file() {
            return Ok(vec![single]);
        }
        let index = folder.join(format!("{stem}.{extension}.index.json"));
        if index.is_file() {
            return shards_of_index(folder, &index);
        }
        let shards = shards_by_name(folder, stem, extension)?;
        if !shards.is_empty() {
            return Ok(shards);
        }
    }
    Err(Error::convert(format_args!(
        "the folder '{}' holds no model.safetensors, no pytorch_model.bin and no shards of either",
        folder.display()
    )))
}

/// The files that an index names.
fn shards_of_index(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let document = Document::json(index)?;
    let map = document
        .value()
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| {
            Error::convert(format_args!(
                "'{}' lacks the object weight_map",
                file_label(index)
            ))
        })?;
    let mut files = std::collections::BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().unwrap_or_default();
        // An index must not reach outside its folder.
        if name.is_empty() || Path::new(name).file_name() != Some(std::ffi::OsStr::new(name)) {
            return Err(Error::convert(format_args!(
                "'{}' names the shard {file}, which is not a plain file name",
                file_label(index)
            )));
        }
        files.insert(folder.join(name));
    }
    Ok(files.into_iter().collect())
}

/// `model-00001-of-00003.safetensors` and its siblings; all of them must be there.
fn shards_by_name(folder: &Path, stem: &str, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = BTreeMap::new();
    let mut total = None;
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        let name = file_label(&path);
        let numbers = name
            .strip_prefix(stem)
            .and_then(|n| n.strip_prefix('-'))
            .and_then(|n| n.strip_suffix(extension))
            .and_then(|n| n.strip_suffix('.'))
            .and_then(|n| n.split_once("-of-"));
        let Some((number, of)) = numbers else {
            continue;
        };
        let (Ok(number), Ok(of)) = (number.parse::<usize>(), of.parse::<usize>()) else {
            continue;
        };
        if *total.get_or_insert(of) != of {
            return Err(Error::convert(format_args!(
                "the folder '{}' mixes shards of {of} and of {} files",
                folder.display(),
                total.unwrap_or(of)
            )));
        }
        found.insert(number, path);
    }
    if let Some(of) = total.filter(|&of| of != found.len()) {
        return Err(Error::convert(format_args!(
            "the folder '{}' holds {} of {of} shards; add the missing ones",
            folder.display(),
            found.len()
        )));
    }
    Ok(found.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_dropped_anywhere() {
        assert_eq!(
            strip_wrappers("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.w"),
            "model.layers.0.mlp.w"
        );
        assert_eq!(strip_wrappers("model.module.w"), "model.module.w");
    }
}

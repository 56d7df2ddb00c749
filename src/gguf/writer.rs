//! Writing a GGUF file as a stream.

use super::limits::*;
use super::parse::tensor_bytes;
use super::{ALIGNMENT_KEY, Array, MAGIC, Metadata, VERSION, Value, shown};
use crate::quant::TensorType;
use crate::{Error, Result};
use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A tensor that is going to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlan {
    /// The name; at most 63 bytes.
    pub name: String,
    /// How the weights are stored.
    pub ty: TensorType,
    /// Sizes, the fastest-moving first, as in [`TensorInfo`](super::TensorInfo).
    pub dims: Vec<u64>,
}

/// Writes one file: the head at once, then the tensors in the planned order.
///
/// The bytes go to a temporary file beside the target, which takes the target's name in
/// [`GgufWriter::finish`]; until then the target is untouched. A writer that is dropped before
/// removes what it wrote.
///
/// ```
/// # fn main() -> mor::Result<()> {
/// # let folder = tempfile::tempdir().map_err(|e| mor::Error::io("temp", e))?;
/// # let path = folder.path().join("model.gguf");
/// use mor::gguf::{GgufWriter, Metadata, TensorPlan};
/// use mor::quant::TensorType;
/// let mut metadata = Metadata::new();
/// metadata.insert("general.architecture", "mor");
/// let plan = [TensorPlan { name: "output_norm.weight".into(), ty: TensorType::F32, dims: vec![2] }];
/// let mut writer = GgufWriter::create(&path, &metadata, &plan)?;
/// writer.write_tensor_bytes(&1.0f32.to_le_bytes())?;
/// writer.write_tensor_bytes(&0.5f32.to_le_bytes())?;
/// writer.next_tensor()?;
/// writer.finish()
/// # }
/// ```
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    temporary: Temporary,
    /// Names and sizes, in order.
    tensors: Vec<(String, usize)>,
    alignment: usize,
    /// The tensor that is being written; all are done when it is their number.
    current: usize,
    /// Bytes of it so far.
    written: usize,
}

impl GgufWriter {
    /// Checks the plan, creates the temporary file and writes the head.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the plan or the metadata would give a file that
    /// [`Gguf::parse`](super::Gguf::parse) refuses, [`Error::Io`] when the system does.
    pub fn create(path: &Path, metadata: &Metadata, plan: &[TensorPlan]) -> Result<GgufWriter> {
        let alignment = checked_alignment(metadata)?;
        check_metadata(metadata)?;
        check_names(plan)?;
        let mut tensors = Vec::with_capacity(plan.len());
        for t in plan {
            let bytes = tensor_bytes(&t.name, t.ty, &t.dims).map_err(as_argument)?;
            tensors.push((t.name.clone(), bytes));
        }
        let head = head(metadata, plan, &tensors, alignment)?;
        let mut temporary = Temporary::beside(path)?;
        temporary.write(&head)?;
        Ok(GgufWriter {
            path: path.to_owned(),
            temporary,
            tensors,
            alignment,
            current: 0,
            written: 0,
        })
    }

    /// Appends to the current tensor, in pieces of any size.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the tensor would get more bytes than it has.
    pub fn write_tensor_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let Some((name, size)) = self.tensors.get(self.current) else {
            return Err(Error::argument("all planned tensors are written already"));
        };
        if bytes.len() > size - self.written {
            return Err(Error::argument(format_args!(
                "the tensor {} has {size} bytes, but got {}",
                shown(name),
                self.written.saturating_add(bytes.len())
            )));
        }
        self.temporary.write(bytes)?;
        self.written += bytes.len();
        Ok(())
    }

    /// Ends the current tensor; what is written next belongs to the one after it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when it has not got all its bytes.
    pub fn next_tensor(&mut self) -> Result<()> {
        let Some((name, size)) = self.tensors.get(self.current) else {
            return Err(Error::argument("all planned tensors are written already"));
        };
        if self.written != *size {
            return Err(Error::argument(format_args!(
                "the tensor {} has {size} bytes, but got {}",
                shown(name),
                self.written
            )));
        }
        let padding = size.next_multiple_of(self.alignment) - size;
        self.temporary.pad(padding)?;
        self.current += 1;
        self.written = 0;
        Ok(())
    }

    /// Ends the last tensor where [`GgufWriter::next_tensor`] has not, and puts the file in place.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a tensor has not got all its bytes; nothing is left then.
    pub fn finish(mut self) -> Result<()> {
        if self.current + 1 == self.tensors.len() {
            self.next_tensor()?;
        }
        if let Some((name, _)) = self.tensors.get(self.current) {
            return Err(Error::argument(format_args!(
                "the tensor {} and those after it were not written",
                shown(name)
            )));
        }
        self.temporary.rename_to(&self.path)
    }
}

/// A damaged plan is the caller's doing, not a file's.
fn as_argument(e: Error) -> Error {
    match e {
        Error::Format(what) => Error::InvalidArgument(what),
        other => other,
    }
}

fn checked_alignment(metadata: &Metadata) -> Result<usize> {
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => DEFAULT_ALIGNMENT,
        // Other readers take no other integer type here.
        Some(&Value::U32(n)) => n,
        Some(_) => {
            return Err(Error::argument(format_args!(
                "the key '{ALIGNMENT_KEY}' must be a U32"
            )));
        }
    };
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(Error::argument(format_args!(
            "the key '{ALIGNMENT_KEY}' must be a power of two up to {MAX_ALIGNMENT}, but is {alignment}"
        )));
    }
    Ok(alignment as usize)
}

fn check_metadata(metadata: &Metadata) -> Result<()> {
    check_limit(
        "the number of metadata entries",
        metadata.len(),
        MAX_METADATA_ENTRIES,
    )?;
    for (key, value) in metadata.iter() {
        if key.is_empty() {
            return Err(Error::argument("a metadata key is empty"));
        }
        check_limit("the length of a metadata key", key.len(), MAX_KEY_BYTES)?;
        let string = |s: &str| {
            check_limit(
                format_args!("the length of a string of {}", shown(key)),
                s.len(),
                MAX_STRING_BYTES,
            )
        };
        match value {
            Value::String(s) => string(s)?,
            Value::Array(array) => {
                check_limit(
                    format_args!("the length of {}", shown(key)),
                    array.len(),
                    MAX_ARRAY_LEN,
                )?;
                if let Array::String(strings) = array {
                    strings.iter().try_for_each(string)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_limit(what: impl Display, n: usize, limit: u64) -> Result<()> {
    if n as u64 > limit {
        return Err(Error::argument(format_args!(
            "{what} is {n}, but the limit is {limit}"
        )));
    }
    Ok(())
}

fn check_names(plan: &[TensorPlan]) -> Result<()> {
    check_limit("the number of tensors", plan.len(), MAX_TENSORS)?;
    let mut names: Vec<&str> = plan.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    for pair in names.windows(2) {
        if pair[0] == pair[1] {
            return Err(Error::argument(format_args!(
                "the tensor {} appears twice",
                shown(pair[0])
            )));
        }
    }
    for t in plan {
        if t.name.is_empty() || t.name.len() > MAX_WRITTEN_NAME_BYTES {
            return Err(Error::argument(format_args!(
                "the tensor name {} has {} bytes; 1 to {MAX_WRITTEN_NAME_BYTES} are possible",
                shown(&t.name),
                t.name.len()
            )));
        }
        if t.dims.is_empty() || t.dims.len() > MAX_DIMS as usize {
            return Err(Error::argument(format_args!(
                "the tensor {} has {} dimensions; 1 to {MAX_DIMS} are possible",
                shown(&t.name),
                t.dims.len()
            )));
        }
    }
    Ok(())
}

/// Everything before the first tensor's bytes, padding included.
fn head(
    metadata: &Metadata,
    plan: &[TensorPlan],
    tensors: &[(String, usize)],
    alignment: usize,
) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(plan.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut out, key);
        out.extend_from_slice(&value.type_id().to_le_bytes());
        put_value(&mut out, value);
    }
    let mut offset = 0usize;
    for (t, (_, bytes)) in plan.iter().zip(tensors) {
        put_string(&mut out, &t.name);
        out.extend_from_slice(&(t.dims.len() as u32).to_le_bytes());
        for n in &t.dims {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&t.ty.gguf_id().to_le_bytes());
        out.extend_from_slice(&(offset as u64).to_le_bytes());
        offset = bytes
            .checked_next_multiple_of(alignment)
            .and_then(|n| n.checked_add(offset))
            .ok_or_else(|| Error::argument("the tensors together are impossibly large"))?;
    }
    out.resize(out.len().next_multiple_of(alignment), 0);
    Ok(out)
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::U64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Array(array) => {
            out.extend_from_slice(&array.element_id().to_le_bytes());
            out.extend_from_slice(&(array.len() as u64).to_le_bytes());
            put_elements(out, array);
        }
    }
}

fn put_elements(out: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($v:ident) => {
            $v.iter()
                .for_each(|v| out.extend_from_slice(&v.to_le_bytes()))
        };
    }
    match array {
        Array::U8(v) => out.extend_from_slice(v),
        Array::I8(v) => numbers!(v),
        Array::U16(v) => numbers!(v),
        Array::I16(v) => numbers!(v),
        Array::U32(v) => numbers!(v),
        Array::I32(v) => numbers!(v),
        Array::F32(v) => numbers!(v),
        Array::Bool(v) => out.extend(v.iter().map(|&v| u8::from(v))),
        Array::String(v) => v.iter().for_each(|v| put_string(out, v)),
        Array::U64(v) => numbers!(v),
        Array::I64(v) => numbers!(v),
        Array::F64(v) => numbers!(v),
    }
}

/// Creates a hidden file in the folder of `target`, so that renaming stays on one file system. It is nobody else's: not
/// that of another process either, which may have the same number where it runs in a container.
pub(crate) fn create_beside(target: &Path) -> Result<(PathBuf, File)> {
    /// Files of this process, so that two writers never meet.
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    /// Those of others, and what killed ones have left, are stepped over.
    const ATTEMPTS: u32 = 1000;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    // Until it has the permissions of what it replaces, which may be fewer than usual, it is nobody else's to read.
    #[cfg(unix)]
    if target.exists() {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    let mut failure = io::Error::from(io::ErrorKind::AlreadyExists);
    for _ in 0..ATTEMPTS {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        // Not made of the target's name, which may be as long as names can be.
        let path = target.with_file_name(format!(".mor-{}-{serial}.part", std::process::id()));
        match options.open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => failure = e,
            Err(e) => return Err(Error::io(target, e)),
        }
    }
    Err(Error::io(target, failure))
}

/// Gives a file the name of another, and its permissions: what only its owner could read stays so.
pub(crate) fn replace(new: &Path, old: &Path) -> io::Result<()> {
    if let Ok(before) = fs::metadata(old) {
        let before = before.permissions();
        if before != fs::metadata(new)?.permissions() {
            fs::set_permissions(new, before)?;
        }
    }
    fs::rename(new, old)
}

/// A file that disappears unless it is renamed.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    /// `None` once the file is closed.
    file: Option<BufWriter<File>>,
    renamed: bool,
}

impl Temporary {
    fn beside(target: &Path) -> Result<Self> {
        let (path, file) = create_beside(target)?;
        Ok(Self {
            path,
            file: Some(BufWriter::with_capacity(1 << 20, file)),
            renamed: false,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.file {
            Some(file) => file.write_all(bytes).map_err(|e| Error::io(&self.path, e)),
            None => Ok(()),
        }
    }

    fn pad(&mut self, mut n: usize) -> Result<()> {
        let zeros = [0; 256];
        while n > 0 {
            let part = n.min(zeros.len());
            self.write(&zeros[..part])?;
            n -= part;
        }
        Ok(())
    }

    /// Flushes to the disk, closes (Windows renames no open file) and renames.
    fn rename_to(&mut self, target: &Path) -> Result<()> {
        if let Some(file) = self.file.take() {
            let file = file
                .into_inner()
                .map_err(|e| Error::io(&self.path, e.into_error()))?;
            file.sync_all().map_err(|e| Error::io(&self.path, e))?;
        }
        replace(&self.path, target).map_err(|e| Error::io(target, e))?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            // Taken apart, so that what is buffered is not written to a file that goes away.
            let _ = file.into_parts();
        }
        if !self.renamed {
            // Nobody is left who could be told.
            let _ = fs::remove_file(&self.path);
        }
    }
}

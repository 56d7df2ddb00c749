//! From bytes to [`Gguf`]. Every check of a file is here.

use super::limits::*;
use super::reader::{Reader, ValueOf};
use super::value::id;
use super::{ALIGNMENT_KEY, Array, Gguf, MAGIC, Metadata, TensorInfo, VERSION, Value, shown};
use crate::memory::reserved;
use crate::order::sort_by;
use crate::quant::{TensorType, ggml_type_name};
use crate::text::{Text, listed};
use crate::{Error, Result};
use std::cmp::Ordering;

/// The shortest pair: an empty key's length, a type, one byte.
const LEAST_PAIR: usize = 8 + 4 + 1;
/// The shortest tensor entry: an empty name's length, dimension count, one size, type, offset.
const LEAST_TENSOR: usize = 8 + 4 + 8 + 4 + 8;

impl Gguf {
    /// Reads and checks the head of a file; `bytes` is the whole file.
    ///
    /// # Errors
    /// [`Error::Format`] when the file is damaged or misleading, [`Error::Unsupported`] when it is
    /// sound but of a kind that is not read here.
    pub fn parse(bytes: &[u8]) -> Result<Gguf> {
        let mut r = Reader::new(bytes);
        check_version(&mut r)?;
        let tensor_count = r.count(MAX_TENSORS, LEAST_TENSOR, "the number of tensors")?;
        let pair_count = r.count(
            MAX_METADATA_ENTRIES,
            LEAST_PAIR,
            "the number of metadata entries",
        )?;
        let metadata = read_metadata(&mut r, pair_count)?;
        let alignment = alignment(&metadata)?;
        let mut tensors = reserved(tensor_count)?;
        for _ in 0..tensor_count {
            tensors.push(read_tensor(&mut r)?);
        }
        let data = r.position().checked_next_multiple_of(alignment);
        for tensor in &mut tensors {
            place(tensor, data, alignment, bytes.len())?;
        }
        check_overlaps(&tensors)?;
        let by_name = index_names(&tensors)?;
        Ok(Gguf {
            metadata,
            file_bytes: bytes.len(),
            tensors,
            by_name,
        })
    }
}

fn check_version(r: &mut Reader) -> Result<()> {
    if r.array::<4>("the magic number")? != MAGIC {
        return Err(Error::format(
            "it does not begin with 'GGUF'; give a GGUF file, or convert the checkpoint first",
        ));
    }
    let version = r.u32("the version")?;
    match version {
        2 | VERSION => Ok(()),
        1 => Err(Error::unsupported(
            "GGUF version 1; write the file anew with a current converter",
        )),
        // Small versions are small only in the right byte order.
        v if v & 0xffff == 0 && v != 0 => Err(Error::unsupported(
            "a big-endian GGUF file; convert it to little-endian",
        )),
        v => Err(Error::unsupported(format_args!(
            "GGUF version {v}; versions 2 and 3 are read"
        ))),
    }
}

fn read_metadata(r: &mut Reader, count: usize) -> Result<Metadata> {
    let mut entries = reserved(count)?;
    for _ in 0..count {
        let key = r.owned_string(MAX_KEY_BYTES, "a metadata key")?;
        if key.is_empty() {
            return Err(Error::format("a metadata key is empty"));
        }
        let value = read_value(r, &key)?;
        entries.push((key, value));
    }
    Metadata::from_entries(entries)
}

fn read_value(r: &mut Reader, key: &str) -> Result<Value> {
    let what = ValueOf(key);
    Ok(match r.u32(what)? {
        id::U8 => Value::U8(u8::from_le_bytes(r.array(what)?)),
        id::I8 => Value::I8(i8::from_le_bytes(r.array(what)?)),
        id::U16 => Value::U16(u16::from_le_bytes(r.array(what)?)),
        id::I16 => Value::I16(i16::from_le_bytes(r.array(what)?)),
        id::U32 => Value::U32(u32::from_le_bytes(r.array(what)?)),
        id::I32 => Value::I32(i32::from_le_bytes(r.array(what)?)),
        id::F32 => Value::F32(f32::from_le_bytes(r.array(what)?)),
        id::BOOL => {
            let [byte] = r.array(what)?;
            Value::Bool(boolean(byte, what)?)
        }
        id::STRING => Value::String(r.owned_string(MAX_STRING_BYTES, what)?),
        id::ARRAY => Value::Array(read_array(r, what)?),
        id::U64 => Value::U64(u64::from_le_bytes(r.array(what)?)),
        id::I64 => Value::I64(i64::from_le_bytes(r.array(what)?)),
        id::F64 => Value::F64(f64::from_le_bytes(r.array(what)?)),
        other => return Err(unknown_type(what, other)),
    })
}

fn read_array(r: &mut Reader, what: ValueOf) -> Result<Array> {
    let element = r.u32(what)?;
    let n = r.u64(what)?;
    macro_rules! numbers {
        ($type:ty) => {
            numbers(r, n, what, <$type>::from_le_bytes)?
        };
    }
    Ok(match element {
        id::U8 => Array::U8(numbers!(u8)),
        id::I8 => Array::I8(numbers!(i8)),
        id::U16 => Array::U16(numbers!(u16)),
        id::I16 => Array::I16(numbers!(i16)),
        id::U32 => Array::U32(numbers!(u32)),
        id::I32 => Array::I32(numbers!(i32)),
        id::F32 => Array::F32(numbers!(f32)),
        id::U64 => Array::U64(numbers!(u64)),
        id::I64 => Array::I64(numbers!(i64)),
        id::F64 => Array::F64(numbers!(f64)),
        id::BOOL => Array::Bool(booleans(r, n, what)?),
        id::STRING => {
            // A string takes at least the eight bytes of its length.
            let n = array_len(r, n, 8, what)?;
            Array::String(r.strings(n, MAX_STRING_BYTES, what)?)
        }
        id::ARRAY => {
            return Err(Error::unsupported(format_args!(
                "{what} is an array of arrays"
            )));
        }
        other => return Err(unknown_type(what, other)),
    })
}

fn unknown_type(what: ValueOf, id: u32) -> Error {
    Error::format(format_args!(
        "{what} has type {id}, which GGUF does not define; fetch it again"
    ))
}

fn boolean(byte: u8, what: ValueOf) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::format(format_args!(
            "{what} is a boolean that is neither 0 nor 1, but {byte}"
        ))),
    }
}

fn array_len(r: &Reader, n: u64, least: usize, what: ValueOf) -> Result<usize> {
    let length = format_args!("the length of {what}");
    r.check_count(n, MAX_ARRAY_LEN, least, length)
}

fn numbers<const N: usize, T>(
    r: &mut Reader,
    n: u64,
    what: ValueOf,
    number: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>> {
    let n = array_len(r, n, N, what)?;
    let mut out = reserved(n)?;
    // The length has passed the check, so the product is at most the bytes that are left.
    let bytes = r.take(n * N, what)?;
    out.extend(bytes.as_chunks::<N>().0.iter().map(|b| number(*b)));
    Ok(out)
}

fn booleans(r: &mut Reader, n: u64, what: ValueOf) -> Result<Vec<bool>> {
    let n = array_len(r, n, 1, what)?;
    let mut out = reserved(n)?;
    for &byte in r.take(n, what)? {
        out.push(boolean(byte, what)?);
    }
    Ok(out)
}

fn alignment(metadata: &Metadata) -> Result<usize> {
    let alignment = metadata.u32(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(Error::format(format_args!(
            "the key '{ALIGNMENT_KEY}' should be a power of two up to {MAX_ALIGNMENT}, but is {alignment}"
        )));
    }
    Ok(alignment as usize)
}

/// Reads an entry of the tensor table. Its offset still counts from the start of the data.
fn read_tensor(r: &mut Reader) -> Result<TensorInfo> {
    let name = r.owned_string(MAX_NAME_BYTES, "a tensor's name")?;
    let dims = read_dims(r, &name)?;
    let ty = read_type(r, &name)?;
    let bytes = tensor_bytes(&name, ty, &dims)?;
    let offset = r.u64("a tensor's offset")?;
    let offset = usize::try_from(offset).map_err(|_| beyond_end(&name))?;
    Ok(TensorInfo {
        name,
        ty,
        dims,
        offset,
        bytes,
    })
}

fn read_dims(r: &mut Reader, name: &str) -> Result<Vec<u64>> {
    let n = r.u32("a tensor's dimensions")?;
    if n == 0 || n > MAX_DIMS {
        return Err(Error::format(format_args!(
            "the tensor {} has {n} dimensions; 1 to {MAX_DIMS} are possible",
            shown(name)
        )));
    }
    let mut dims = reserved(n as usize)?;
    for _ in 0..n {
        dims.push(r.u64("a tensor's dimensions")?);
    }
    Ok(dims)
}

fn read_type(r: &mut Reader, name: &str) -> Result<TensorType> {
    let id = r.u32("a tensor's type")?;
    TensorType::from_gguf(id).ok_or_else(|| {
        let found = match ggml_type_name(id) {
            Some(name) => Text::new(name),
            None => Text::new(format_args!("number {id}")),
        };
        Error::unsupported(format_args!(
            "the tensor {} has type {found}; convert the model to one of {}",
            shown(name),
            listed(TensorType::ALL.iter())
        ))
    })
}

/// Bytes of a tensor, with everything about its sizes checked: none is zero, the number of weights
/// and of bytes fits, rows are whole blocks.
pub(super) fn tensor_bytes(name: &str, ty: TensorType, dims: &[u64]) -> Result<usize> {
    if dims.is_empty() || dims.contains(&0) {
        return Err(Error::format(format_args!(
            "the tensor {} has a size of zero",
            shown(name)
        )));
    }
    let too_large = || {
        Error::format(format_args!(
            "the tensor {} is impossibly large",
            shown(name)
        ))
    };
    let mut sizes = dims.iter().map(|&n| usize::try_from(n).ok());
    let columns = sizes.next().flatten().ok_or_else(too_large)?;
    let rows = sizes
        .try_fold(1usize, |rows, n| rows.checked_mul(n?))
        .ok_or_else(too_large)?;
    rows.checked_mul(columns).ok_or_else(too_large)?;
    if !columns.is_multiple_of(ty.block_len()) {
        return Err(Error::format(format_args!(
            "the tensor {} has rows of {columns} weights, but {ty} needs a multiple of {}",
            shown(name),
            ty.block_len()
        )));
    }
    ty.row_bytes(columns)
        .and_then(|row| row.checked_mul(rows))
        .ok_or_else(too_large)
}

fn beyond_end(name: &str) -> Error {
    Error::format(format_args!(
        "the tensor {} reaches beyond the end of the file; fetch it again",
        shown(name)
    ))
}

/// Makes the tensor's offset absolute, now that the start of the data is known.
fn place(tensor: &mut TensorInfo, data: Option<usize>, align: usize, file: usize) -> Result<()> {
    if !tensor.offset.is_multiple_of(align) {
        return Err(Error::format(format_args!(
            "the tensor {} begins at {}, which is not a multiple of the alignment {align}",
            shown(&tensor.name),
            tensor.offset
        )));
    }
    let start = data.and_then(|data| data.checked_add(tensor.offset));
    let end = start.and_then(|start| start.checked_add(tensor.bytes));
    match (start, end) {
        (Some(start), Some(end)) if end <= file => {
            tensor.offset = start;
            Ok(())
        }
        _ => Err(beyond_end(&tensor.name)),
    }
}

/// Indices of all tensors, sorted.
fn sorted(
    tensors: &[TensorInfo],
    order: &dyn Fn(&TensorInfo, &TensorInfo) -> Ordering,
) -> Result<Vec<u32>> {
    let mut indices = reserved(tensors.len())?;
    indices.extend(0..tensors.len() as u32);
    sort_by(&mut indices, &|a, b| {
        order(&tensors[a as usize], &tensors[b as usize])
    });
    Ok(indices)
}

fn check_overlaps(tensors: &[TensorInfo]) -> Result<()> {
    let order = sorted(tensors, &|a, b| a.offset.cmp(&b.offset))?;
    for pair in order.windows(2) {
        let (a, b) = (&tensors[pair[0] as usize], &tensors[pair[1] as usize]);
        // `place` has found offset + bytes inside the file.
        if a.offset + a.bytes > b.offset {
            return Err(Error::format(format_args!(
                "the tensors {} and {} overlap",
                shown(&a.name),
                shown(&b.name)
            )));
        }
    }
    Ok(())
}

fn index_names(tensors: &[TensorInfo]) -> Result<Vec<u32>> {
    let order = sorted(tensors, &|a, b| a.name.cmp(&b.name))?;
    for pair in order.windows(2) {
        let name = &tensors[pair[0] as usize].name;
        if *name == tensors[pair[1] as usize].name {
            return Err(Error::format(format_args!(
                "the tensor {} appears twice",
                shown(name)
            )));
        }
    }
    Ok(order)
}

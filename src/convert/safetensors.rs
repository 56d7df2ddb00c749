//! Finding the tensors of a safetensors file.

use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype as FileDtype;

use super::source::{Dtype, Found, file_label};
use crate::error::{Error, Result};

/// Lists the tensors of a mapped file; every range lies inside it.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Vec<Found>> {
    let damaged = |what: String| {
        Error::convert(format_args!(
            "'{}' is not a sound safetensors file: {what}",
            file_label(path)
        ))
    };
    let (header, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|e| damaged(e.to_string()))?;
    let data = header.saturating_add(8);
    let mut found = Vec::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let range = data.checked_add(start).zip(data.checked_add(end));
        let Some((start, end)) = range.filter(|&(s, e)| s <= e && e <= bytes.len()) else {
            return Err(damaged(format!("the tensor '{name}' lies outside it")));
        };
        found.push(Found {
            name,
            dtype: dtype(info.dtype),
            shape: info.shape.clone(),
            start,
            end,
        });
    }
    Ok(found)
}

fn dtype(dtype: FileDtype) -> Dtype {
    match dtype {
        FileDtype::F32 => Dtype::F32,
        FileDtype::F16 => Dtype::F16,
        FileDtype::BF16 => Dtype::BF16,
        FileDtype::F64 => Dtype::F64,
        FileDtype::I64 => Dtype::Other("I64"),
        FileDtype::I32 => Dtype::Other("I32"),
        FileDtype::I8 => Dtype::Other("I8"),
        FileDtype::U8 => Dtype::Other("U8"),
        FileDtype::BOOL => Dtype::Other("BOOL"),
        _ => Dtype::Other("of an unusual type"),
    }
}

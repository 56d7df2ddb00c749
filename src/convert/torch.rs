//! stub
use super::options::Progress;
use super::source::{Found, file_label};
use crate::error::{Error, Result};
use std::path::Path;
pub(super) fn read(_: &[u8], path: &Path, _: &mut dyn Progress) -> Result<Vec<Found>> {
    Err(legacy(path))
}
pub(super) fn looks_legacy(_: &[u8]) -> bool {
    false
}
pub(super) fn legacy(path: &Path) -> Error {
    Error::convert(format!("'{}'", file_label(path)))
}

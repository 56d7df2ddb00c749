//! The key-value pairs of a file, in order.

use super::{Array, Strings, Value, shown};
use crate::memory::{reserved, try_collect};
use crate::order::sort_by;
use crate::{Error, Result};
use std::fmt::Display;

/// An ordered map from keys to values. The order is the file's, or that of insertion.
///
/// The typed getters answer `Ok(None)` for a key that is absent and an [`Error::Format`] that names
/// the key when its value has another type or does not fit; the `require_` getters also fail when it
/// is absent.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    /// Indices into `entries`, sorted by key.
    by_key: Vec<u32>,
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The pairs of a file, which must have different keys.
    pub(super) fn from_entries(entries: Vec<(String, Value)>) -> Result<Self> {
        let key = |index: u32| entries[index as usize].0.as_str();
        let mut by_key = reserved(entries.len())?;
        by_key.extend(0..entries.len() as u32);
        sort_by(&mut by_key, &|a, b| key(a).cmp(key(b)));
        for pair in by_key.windows(2) {
            if key(pair[0]) == key(pair[1]) {
                return Err(Error::format(format_args!(
                    "the key {} appears twice",
                    shown(key(pair[0]))
                )));
            }
        }
        Ok(Metadata { entries, by_key })
    }

    /// Where `key` stands in `by_key`, or where it would.
    fn search(&self, key: &str) -> std::result::Result<usize, usize> {
        self.by_key
            .binary_search_by(|&index| self.entries[index as usize].0.as_str().cmp(key))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let found = self.search(key).ok()?;
        Some(&self.entries[self.by_key[found] as usize].1)
    }

    /// Sets `key`, at its old place when there was one and else at the end. Returns the old value.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        let (key, value) = (key.into(), value.into());
        match self.search(&key) {
            Ok(found) => {
                let old = &mut self.entries[self.by_key[found] as usize].1;
                Some(std::mem::replace(old, value))
            }
            Err(place) => {
                self.by_key.insert(place, self.entries.len() as u32);
                self.entries.push((key, value));
                None
            }
        }
    }

    /// Takes `key` out, if it is there.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.by_key.remove(self.search(key).ok()?);
        let (_, value) = self.entries.remove(at as usize);
        for index in self.by_key.iter_mut().filter(|index| **index > at) {
            *index -= 1;
        }
        Some(value)
    }

    /// Every pair, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        read(value)
            .map(Some)
            .ok_or_else(|| mismatch(key, wanted, value))
    }

    /// A whole number of any integer type that fits 32 unsigned bits.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a whole number from 0 to 4294967295", |v| {
            u32::try_from(v.as_integer()?).ok()
        })
    }

    /// A floating-point number, rounded to single precision.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.f64(key)?.map(|v| v as f32))
    }

    /// A floating-point number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a floating-point number", |v| match *v {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        })
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |v| match *v {
            Value::Bool(v) => Some(v),
            _ => None,
        })
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| match v {
            Value::String(v) => Some(v.as_str()),
            _ => None,
        })
    }

    /// The source of the chat template (Jinja), which is one where it is more than white space.
    ///
    /// # Errors
    /// [`Error::Format`] where its key is no text.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        let template = self.str("tokenizer.chat_template")?;
        Ok(template.filter(|text| !text.trim().is_empty()))
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&Strings>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(v)) => Some(v),
            _ => None,
        })
    }

    /// An array of whole numbers of any integer type that all fit 32 signed bits.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        let wanted = "an array of 32-bit whole numbers";
        let read = |v: &Value| {
            let Value::Array(array) = v else { return None };
            match array {
                Array::U8(v) => narrow(v),
                Array::I8(v) => narrow(v),
                Array::U16(v) => narrow(v),
                Array::I16(v) => narrow(v),
                Array::U32(v) => narrow(v),
                Array::I32(v) => narrow(v),
                Array::U64(v) => narrow(v),
                Array::I64(v) => narrow(v),
                _ => None,
            }
        };
        self.typed(key, wanted, read)?.transpose()
    }

    /// An array of floating-point numbers, rounded to single precision.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let read = |v: &Value| match v {
            Value::Array(Array::F32(v)) => Some(copied(v, |v| v)),
            Value::Array(Array::F64(v)) => Some(copied(v, |v| v as f32)),
            _ => None,
        };
        self.typed(key, FLOATS, read)?.transpose()
    }

    /// An array of floating-point numbers.
    pub fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let read = |v: &Value| match v {
            Value::Array(Array::F32(v)) => Some(copied(v, f64::from)),
            Value::Array(Array::F64(v)) => Some(copied(v, |v| v)),
            _ => None,
        };
        self.typed(key, FLOATS, read)?.transpose()
    }

    /// As [`Metadata::u32`]; the key must be there.
    pub fn require_u32(&self, key: &str) -> Result<u32> {
        required(key, self.u32(key))
    }

    /// As [`Metadata::f32`]; the key must be there.
    pub fn require_f32(&self, key: &str) -> Result<f32> {
        required(key, self.f32(key))
    }

    /// As [`Metadata::bool`]; the key must be there.
    pub fn require_bool(&self, key: &str) -> Result<bool> {
        required(key, self.bool(key))
    }

    /// As [`Metadata::str`]; the key must be there.
    pub fn require_str(&self, key: &str) -> Result<&str> {
        required(key, self.str(key))
    }

    /// As [`Metadata::strings`]; the key must be there.
    pub fn require_strings(&self, key: &str) -> Result<&Strings> {
        required(key, self.strings(key))
    }
}

const FLOATS: &str = "an array of floating-point numbers";

fn copied<T: Copy, U>(values: &[T], convert: impl Fn(T) -> U) -> Result<Vec<U>> {
    try_collect(values.iter().map(|&v| Ok(convert(v))))
}

/// None when a value does not fit.
fn narrow<T: Copy + TryInto<i32>>(values: &[T]) -> Option<Result<Vec<i32>>> {
    let mut narrowed = match reserved(values.len()) {
        Ok(narrowed) => narrowed,
        Err(error) => return Some(Err(error)),
    };
    for &v in values {
        narrowed.push(v.try_into().ok()?);
    }
    Some(Ok(narrowed))
}

fn required<T>(key: &str, found: Result<Option<T>>) -> Result<T> {
    found?.ok_or_else(|| Error::format(format_args!("the file lacks the key {}", shown(key))))
}

fn mismatch(key: &str, wanted: &str, value: &Value) -> Error {
    let key = shown(key);
    let is = |is: &dyn Display| {
        Error::format(format_args!(
            "the key {key} should be {wanted}, but is {is}"
        ))
    };
    match value.as_integer() {
        Some(v) => is(&v),
        None => is(&value.kind()),
    }
}

//! The key-value pairs of a file, in order.

use super::{Array, Value, shown};
use crate::{Error, Result};
use std::collections::HashMap;

/// An ordered map from keys to values. The order is the file's, or that of insertion.
///
/// The typed getters answer `Ok(None)` for a key that is absent and an [`Error::Format`] that names
/// the key when its value has another type or does not fit; the `require_` getters also fail when it
/// is absent.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
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

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Sets `key`, at its old place when there was one and else at the end. Returns the old value.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        let (key, value) = (key.into(), value.into());
        if let Some(&i) = self.index.get(&key) {
            return Some(std::mem::replace(&mut self.entries[i].1, value));
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        None
    }

    /// Takes `key` out, if it is there.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.index.remove(key)?;
        let (_, value) = self.entries.remove(at);
        for i in self.index.values_mut().filter(|i| **i > at) {
            *i -= 1;
        }
        Some(value)
    }

    /// Every pair, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// Makes room for `pairs` more, so that a parser's insertions cannot fail for memory.
    pub(super) fn try_reserve(&mut self, pairs: usize) -> Result<()> {
        let reserved = self
            .entries
            .try_reserve_exact(pairs)
            .is_ok_and(|()| self.index.try_reserve(pairs).is_ok());
        if reserved {
            return Ok(());
        }
        let pair = size_of::<(String, Value)>() + size_of::<(String, usize)>();
        Err(Error::OutOfMemory {
            bytes: pairs.saturating_mul(pair),
        })
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
            .ok_or_else(|| Error::format(mismatch(key, wanted, value)))
    }

    /// A whole number of any integer type that fits 32 unsigned bits.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a whole number from 0 to 4294967295", |v| {
            u32::try_from(v.as_integer()?).ok()
        })
    }

    /// A whole number of any integer type that fits 64 unsigned bits.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number that is not negative", |v| {
            u64::try_from(v.as_integer()?).ok()
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

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(v)) => Some(v.as_slice()),
            _ => None,
        })
    }

    /// An array of whole numbers of any integer type that all fit 32 signed bits.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.typed(key, "an array of 32-bit whole numbers", |v| {
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
        })
    }

    /// An array of floating-point numbers, rounded to single precision.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "an array of floating-point numbers", |v| match v {
            Value::Array(Array::F32(v)) => Some(v.clone()),
            Value::Array(Array::F64(v)) => Some(v.iter().map(|&v| v as f32).collect()),
            _ => None,
        })
    }

    /// An array of floating-point numbers.
    pub fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "an array of floating-point numbers", |v| match v {
            Value::Array(Array::F32(v)) => Some(v.iter().map(|&v| v.into()).collect()),
            Value::Array(Array::F64(v)) => Some(v.clone()),
            _ => None,
        })
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
    pub fn require_strings(&self, key: &str) -> Result<&[String]> {
        required(key, self.strings(key))
    }
}

fn narrow<T: Copy + TryInto<i32>>(values: &[T]) -> Option<Vec<i32>> {
    values.iter().map(|&v| v.try_into().ok()).collect()
}

fn required<T>(key: &str, found: Result<Option<T>>) -> Result<T> {
    found?.ok_or_else(|| Error::format(format_args!("the file lacks the key {}", shown(key))))
}

fn mismatch(key: &str, wanted: &str, value: &Value) -> String {
    let key = shown(key);
    match value.as_integer() {
        Some(v) => format!("the key {key} should be {wanted}, but is {v}"),
        None => format!("the key {key} should be {wanted}, but is {}", value.kind()),
    }
}

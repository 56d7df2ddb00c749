//! Small configuration files, JSON or YAML, read as loosely typed trees. Every complaint names
//! the file and the key.

use std::path::Path;

use serde_json::Value;

use super::source::{file_label, regular};
use crate::error::{Error, Result};

/// No configuration, index or tokenizer of a real model comes near this. Parsed, it may take forty times as much.
const MAX_BYTES: u64 = 64 << 20;

/// A parsed configuration file, or an empty one in its place.
#[derive(Debug, Clone)]
pub(super) struct Document {
    label: String,
    value: Value,
    /// Whether it only says where a model differs from another.
    partial: bool,
}

impl Document {
    /// Stands for a file that is not there: no key is present.
    pub(super) fn absent(label: &str) -> Document {
        Document {
            label: label.to_string(),
            value: Value::Null,
            partial: false,
        }
    }

    pub(super) fn json(path: &Path) -> Result<Document> {
        let value = serde_json::from_str(&read_text(path)?).map_err(|e| {
            Error::convert(format_args!(
                "'{}' is not sound JSON: {e}",
                file_label(path)
            ))
        })?;
        Ok(Document {
            label: file_label(path),
            value,
            partial: false,
        })
    }

    pub(super) fn yaml(path: &Path) -> Result<Document> {
        Self::parse_yaml(&read_text(path)?, &file_label(path))
    }

    pub(super) fn parse_yaml(text: &str, label: &str) -> Result<Document> {
        let value = serde_saphyr::from_str(text).map_err(|e| {
            // The parser's message draws a picture below its first line.
            let first = e.to_string().lines().next().unwrap_or_default().to_string();
            Error::convert(format_args!("'{label}' is not sound YAML: {first}"))
        })?;
        Ok(Document {
            label: label.to_string(),
            value,
            partial: false,
        })
    }

    /// Reads `folder/name` as JSON if it is there.
    pub(super) fn json_beside(folder: &Path, name: &str) -> Result<Option<Document>> {
        let path = folder.join(name);
        if path.is_file() {
            Self::json(&path).map(Some)
        } else {
            Ok(None)
        }
    }

    /// The table under a key as a document of its own, if there is one, which says only in what a model differs.
    pub(super) fn part(&self, key: &str) -> Option<Document> {
        let value = self.get(key).filter(|value| value.is_object())?.clone();
        Some(Document {
            label: format!("{}: {key}", self.label),
            value,
            partial: true,
        })
    }

    pub(super) fn value(&self) -> &Value {
        &self.value
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// Whether it is there, whole.
    pub(super) fn is_present(&self) -> bool {
        !self.value.is_null() && !self.partial
    }

    /// The value under a dotted key; `null` counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        let mut value = &self.value;
        for part in key.split('.') {
            value = value.get(part)?;
        }
        (!value.is_null()).then_some(value)
    }

    /// Whether the key is there and says `null`, which is not the same as saying nothing.
    pub(super) fn is_null(&self, key: &str) -> bool {
        let pointer = format!("/{}", key.replace('.', "/"));
        self.value.pointer(&pointer).is_some_and(Value::is_null)
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let shown: String = value.to_string().chars().take(80).collect();
        Error::convert(format_args!(
            "{key} in '{}' is {shown}, not {wanted}",
            self.label
        ))
    }

    /// A number; text that spells one counts too, since some writers quote everything.
    pub(super) fn f64(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .or_else(|| value.as_str().and_then(|s| s.trim().parse().ok()))
            .filter(|v| v.is_finite())
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "a finite number"))
    }

    pub(super) fn f32(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.f64(key)?.map(|v| v as f32))
    }

    pub(super) fn usize(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .or_else(|| value.as_str().and_then(|s| s.trim().parse().ok()))
            .and_then(|v| u32::try_from(v).ok())
            .map(|v| Some(v as usize))
            .ok_or_else(|| self.wrong(key, value, "a whole number"))
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "text"))
    }

    /// One of a fixed set of names.
    pub(super) fn named<T>(
        &self,
        key: &str,
        parse: fn(&str) -> Option<T>,
        known: &str,
    ) -> Result<Option<T>> {
        let Some(text) = self.str(key)? else {
            return Ok(None);
        };
        parse(text).map(Some).ok_or_else(|| {
            Error::convert(format_args!(
                "{key} in '{}' is '{text}', which is none of {known}",
                self.label
            ))
        })
    }

    /// Numbers separated by commas, as the training configuration spells capacities; a single
    /// number and a list count too.
    pub(super) fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let numbers: Option<Vec<f64>> = match value {
            Value::String(text) => text.split(',').map(|s| s.trim().parse().ok()).collect(),
            Value::Array(items) => items.iter().map(Value::as_f64).collect(),
            other => other.as_f64().map(|v| vec![v]),
        };
        numbers
            .filter(|list| list.iter().all(|v| v.is_finite()))
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "numbers separated by commas"))
    }
}

/// Reads a whole text file of a bounded size.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let length = regular(path)?;
    if length > MAX_BYTES {
        return Err(Error::convert(format_args!(
            "'{}' has {length} bytes, more than the {MAX_BYTES} that a configuration may have",
            file_label(path)
        )));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes).map_err(|_| {
        let instead = match path.extension().is_some_and(|name| name == "model") {
            true => "SentencePiece's own files are not read; give tokenizer.json or a GGUF file that has the vocabulary",
            false => "it must be UTF-8",
        };
        Error::convert(format_args!("'{}' is no text: {instead}", file_label(path)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_training_configurations_hold() {
        let text =
            "mor:\n  enable: true\n  type: null\n  capacity: 1.0,0.5\n  temp: 1.0\nlist: '1.0'\n";
        let document = Document::parse_yaml(text, "mor.yaml").unwrap();
        assert_eq!(document.bool("mor.enable").unwrap(), Some(true));
        assert_eq!(document.str("mor.type").unwrap(), None);
        assert_eq!(document.f64s("mor.capacity").unwrap(), Some(vec![1.0, 0.5]));
        assert_eq!(document.f64s("list").unwrap(), Some(vec![1.0]));
        assert_eq!(document.f64("mor.temp").unwrap(), Some(1.0));
        assert_eq!(document.f64("mor.absent.key").unwrap(), None);
        let error = document.bool("mor.temp").unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot convert: mor.temp in 'mor.yaml' is 1.0, not true or false"
        );
    }

    #[test]
    fn broken_yaml_is_one_sentence() {
        let error = Document::parse_yaml("a: [1, 2", "mor.yaml").unwrap_err();
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
    }
}

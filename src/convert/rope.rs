//! Rotary positions: their base, and how they are scaled for longer contexts.

use std::f64::consts::TAU;

use super::document::Document;
use crate::error::{Error, Result};

/// How positions or frequencies are scaled.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scaling {
    None,
    /// Positions are divided by it.
    Linear(f32),
    /// What each frequency is divided by, [head_dim / 2] (Llama 3.1).
    Frequencies(Vec<f32>),
}

/// What config.json says of rotary positions: in `rope_theta` and `rope_scaling`, or in `rope_parameters`, which newer
/// versions of transformers write, one table or one for each type of layers.
pub(super) struct Rope<'a> {
    config: &'a Document,
    /// The table, if there is one.
    table: Option<String>,
}

impl<'a> Rope<'a> {
    pub(super) fn of(config: &'a Document) -> Result<Self> {
        let is_table = |key: &str| {
            let table = config.get(key).and_then(|value| value.as_object());
            table.is_some_and(|table| !table.is_empty())
        };
        // Where both are there, as where rope_scaling was added to a newer file, transformers takes this one.
        let table = match ["rope_scaling", "rope_parameters"]
            .iter()
            .find(|key| is_table(key))
        {
            None => None,
            Some(key) => {
                let tables = config.get(key).and_then(|value| value.as_object());
                let nested = tables.is_some_and(|all| all.values().any(|value| value.is_object()));
                let only = tables.is_some_and(|all| all.len() == 1);
                let full = format!("{key}.full_attention");
                match nested {
                    false => Some((*key).to_string()),
                    true if only && is_table(&full) => Some(full),
                    true => {
                        return Err(Error::unsupported(format_args!(
                            "rotary positions that differ between layers ({key} in '{}')",
                            config.label()
                        )));
                    }
                }
            }
        };
        Ok(Rope { config, table })
    }

    fn key(&self, name: &str) -> Option<String> {
        self.table.as_ref().map(|table| format!("{table}.{name}"))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.key(name) {
            Some(key) => self.config.f64(&key),
            None => Ok(None),
        }
    }

    pub(super) fn theta(&self) -> Result<Option<f32>> {
        // In this order as transformers does it.
        Ok(match self.number("rope_theta")? {
            Some(theta) => Some(theta as f32),
            None => self.config.f32("rope_theta")?,
        })
    }

    /// For heads of a width, with a base.
    pub(super) fn scaling(&self, head_dim: usize, theta: f32) -> Result<Scaling> {
        let partial = match self.config.f64("partial_rotary_factor")? {
            Some(factor) => Some(factor),
            None => self.number("partial_rotary_factor")?,
        };
        if let Some(factor) = partial.filter(|factor| *factor != 1.0) {
            return Err(self.unsupported(&format!(
                "partial_rotary_factor {factor}; mor rotates whole heads"
            )));
        }
        let Some(table) = &self.table else {
            // An empty one is as good as none.
            return match self.config.get("rope_scaling") {
                Some(value) if !value.is_object() => {
                    Err(self.unsupported("a rope_scaling that is no table"))
                }
                _ => Ok(Scaling::None),
            };
        };
        let kind = ["rope_type", "type"]
            .iter()
            .find_map(|name| self.config.get(&format!("{table}.{name}"))?.as_str());
        match kind {
            Some("default") => Ok(Scaling::None),
            None if table.starts_with("rope_parameters") => Ok(Scaling::None),
            Some("linear") => Ok(Scaling::Linear(self.positive("factor")? as f32)),
            Some("llama3") => self
                .llama3(head_dim, f64::from(theta))
                .map(Scaling::Frequencies),
            other => Err(self.unsupported(&format!(
                "rotary scaling of type '{}' ({table}); mor runs default, linear and llama3",
                other.unwrap_or("unknown")
            ))),
        }
    }

    /// As transformers' `_compute_llama3_parameters`: frequencies whose wave is longer than the context that the model
    /// was first trained for are divided by `factor`, short ones are left, those between are mixed.
    fn llama3(&self, head_dim: usize, theta: f64) -> Result<Vec<f32>> {
        let factor = self.positive("factor")?;
        let (low, high) = (
            self.positive("low_freq_factor")?,
            self.positive("high_freq_factor")?,
        );
        let trained = self.positive("original_max_position_embeddings")?;
        if low >= high {
            return Err(self.unsupported(&format!(
                "a low_freq_factor of {low} that is not below the high_freq_factor, {high}"
            )));
        }
        let divisor = |pair: usize| {
            let wave = TAU * theta.powf(2.0 * pair as f64 / head_dim as f64);
            let smooth = (trained / wave - low) / (high - low);
            // How much of the frequency is left.
            1.0 / ((1.0 - smooth.clamp(0.0, 1.0)) / factor + smooth.clamp(0.0, 1.0))
        };
        Ok((0..head_dim / 2).map(|pair| divisor(pair) as f32).collect())
    }

    fn positive(&self, name: &str) -> Result<f64> {
        let value = self.number(name)?;
        value.filter(|value| *value > 0.0).ok_or_else(|| {
            let key = self.key(name).unwrap_or_default();
            Error::convert(format_args!(
                "'{}' needs {key}, a number above 0, for its rotary scaling",
                self.config.label()
            ))
        })
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::unsupported(format_args!("{what} (in '{}')", self.config.label()))
    }
}

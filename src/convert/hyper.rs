//! Widths and constants of the Llama part, from config.json or from the tensors' shapes.

use super::document::Document;
use super::options::{Overrides, Progress};
use super::source::Source;
use super::spec::Structure;
use crate::error::{Error, Result};

/// What SmolLM, on which the authors' models are built, uses.
const DEFAULT_HEAD_DIM: usize = 64;
const DEFAULT_CONTEXT: usize = 2048;
const DEFAULT_ROPE_THETA: f32 = 10000.0;
const DEFAULT_RMS_EPS: f32 = 1e-5;

/// Widths and constants.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Shape {
    pub hidden: usize,
    pub vocab: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context: usize,
    pub rope_theta: f32,
    pub rms_eps: f32,
}

pub(super) fn resolve(
    source: &Source,
    structure: &Structure,
    config: &Document,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Shape> {
    refuse_other_models(config, progress)?;
    let (vocab, hidden) = matrix(source, "model.embed_tokens.weight")?;
    let layer = structure.first_block_layer();
    let (ffn, _) = matrix(source, &format!("{layer}.mlp.gate_proj.weight"))?;
    let hidden = config.usize("hidden_size")?.unwrap_or(hidden);
    let heads = Heads::resolve(source, &layer, hidden, config, overrides, progress)?;
    let mut say = |text: String| progress.note(&text);
    let shape = Shape {
        hidden,
        vocab: config.usize("vocab_size")?.unwrap_or(vocab),
        ffn: config.usize("intermediate_size")?.unwrap_or(ffn),
        heads: heads.query,
        kv_heads: heads.kv,
        head_dim: heads.dim,
        context: match overrides.context_length {
            Some(n) => n as usize,
            None => config.usize("max_position_embeddings")?.unwrap_or_else(|| {
                say(format!(
                    "The context length is not known; {DEFAULT_CONTEXT} is assumed."
                ));
                DEFAULT_CONTEXT
            }),
        },
        rope_theta: match overrides.rope_theta.or(rope_theta(config)?) {
            Some(theta) => theta,
            None => {
                say(format!(
                    "The base of the rotary angles is not known; {DEFAULT_ROPE_THETA} is assumed."
                ));
                DEFAULT_ROPE_THETA
            }
        },
        rms_eps: match overrides.rms_eps.or(config.f32("rms_norm_eps")?) {
            Some(eps) => eps,
            None => {
                say(format!(
                    "The epsilon of the norms is not known; {DEFAULT_RMS_EPS:e} is assumed."
                ));
                DEFAULT_RMS_EPS
            }
        },
    };
    shape.check()?;
    Ok(shape)
}

impl Shape {
    fn check(&self) -> Result<()> {
        let fields = [
            ("hidden_size", self.hidden),
            ("vocab_size", self.vocab),
            ("intermediate_size", self.ffn),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.context),
        ];
        for (name, value) in fields {
            if value == 0 || u32::try_from(value).is_err() {
                return Err(Error::convert(format_args!(
                    "{name} is {value}, which no model has"
                )));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::convert(format_args!(
                "{} query heads cannot share {} key and value heads evenly; check num_attention_heads and num_key_value_heads",
                self.heads, self.kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::convert(format_args!(
                "a head of width {} cannot be rotated in pairs; check head_dim",
                self.head_dim
            )));
        }
        for (name, value) in [
            ("rope_theta", self.rope_theta),
            ("rms_norm_eps", self.rms_eps),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::convert(format_args!(
                    "{name} is {value}; it must be above 0"
                )));
            }
        }
        Ok(())
    }
}

struct Heads {
    query: usize,
    kv: usize,
    dim: usize,
}

impl Heads {
    fn resolve(
        source: &Source,
        layer: &str,
        hidden: usize,
        config: &Document,
        overrides: &Overrides,
        progress: &mut dyn Progress,
    ) -> Result<Heads> {
        let (q_rows, _) = matrix(source, &format!("{layer}.self_attn.q_proj.weight"))?;
        let (k_rows, _) = matrix(source, &format!("{layer}.self_attn.k_proj.weight"))?;
        let told = |own: Option<u32>, key: &str| match own {
            Some(n) => Ok(Some(n as usize)),
            None => config.usize(key),
        };
        let query = told(overrides.heads, "num_attention_heads")?;
        let kv = told(overrides.kv_heads, "num_key_value_heads")?;
        let dim = match (told(overrides.head_dim, "head_dim")?, query) {
            (Some(dim), _) => dim,
            (None, Some(heads)) if config.is_present() => hidden.checked_div(heads).unwrap_or(0),
            (None, Some(heads)) => q_rows.checked_div(heads).unwrap_or(0),
            (None, None) => {
                progress.note(&format!(
                    "The width of a head is not known; {DEFAULT_HEAD_DIM} is assumed."
                ));
                DEFAULT_HEAD_DIM
            }
        };
        let count = |rows: usize, what: &str| {
            rows.checked_div(dim).filter(|n| *n > 0 && n * dim == rows).ok_or_else(|| {
                Error::convert(format_args!(
                    "'{layer}.self_attn.{what}.weight' has {rows} rows, which heads of width {dim} do not divide; give the number of heads or head_dim"
                ))
            })
        };
        Ok(Heads {
            query: match query {
                Some(n) => n,
                None => count(q_rows, "q_proj")?,
            },
            // A Llama configuration that names no key and value heads has one for each query head.
            kv: match (kv, query) {
                (Some(n), _) => n,
                (None, Some(n)) if config.get("num_attention_heads").is_some() => n,
                _ => count(k_rows, "k_proj")?,
            },
            dim,
        })
    }
}

fn rope_theta(config: &Document) -> Result<Option<f32>> {
    match config.f32("rope_theta")? {
        Some(theta) => Ok(Some(theta)),
        None => config.f32("rope_parameters.rope_theta"),
    }
}

/// Refuses configurations whose computation is not that of a Llama decoder.
fn refuse_other_models(config: &Document, progress: &mut dyn Progress) -> Result<()> {
    let act = config.str("hidden_act")?.unwrap_or("silu");
    if act != "silu" {
        return Err(Error::unsupported(format_args!(
            "the activation '{act}' (hidden_act in '{}'); mor runs silu",
            config.label()
        )));
    }
    for key in ["rope_scaling", "rope_parameters"] {
        let kind = ["rope_type", "type"]
            .iter()
            .find_map(|leaf| config.get(&format!("{key}.{leaf}"))?.as_str());
        let scaled = match kind {
            Some(kind) => kind != "default",
            None => key == "rope_scaling" && config.get(key).is_some(),
        };
        if scaled {
            return Err(Error::unsupported(format_args!(
                "rotary scaling of type '{}' ({key} in '{}'); mor runs unscaled rotary positions",
                kind.unwrap_or("unknown"),
                config.label()
            )));
        }
    }
    if let Some(factor) = config.f64("partial_rotary_factor")?.filter(|f| *f != 1.0) {
        return Err(Error::unsupported(format_args!(
            "partial_rotary_factor {factor} in '{}'; mor rotates whole heads",
            config.label()
        )));
    }
    let model = config.str("model_type")?.unwrap_or("llama");
    if !model.contains("llama") && !model.contains("mor") {
        progress.note(&format!(
            "The configuration calls the model '{model}'; it is taken to compute as Llama does."
        ));
    }
    Ok(())
}

/// Rows and columns of a matrix.
fn matrix(source: &Source, name: &str) -> Result<(usize, usize)> {
    let tensor = source.get(name).ok_or_else(|| {
        Error::convert(format_args!(
            "the tensor '{name}' is missing; it was looked for in {}",
            source.label
        ))
    })?;
    match tensor.shape.as_slice() {
        &[rows, columns] => Ok((rows, columns)),
        other => Err(Error::convert(format_args!(
            "'{name}' has shape {other:?}, but it must be a matrix"
        ))),
    }
}

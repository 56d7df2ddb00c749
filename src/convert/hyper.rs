//! Widths and constants of the Llama part, from config.json or from the tensors' shapes.

use serde_json::Value;

use super::document::Document;
use super::options::{Overrides, Progress};
use super::rope::{Rope, Scaling};
use super::source::Source;
use super::spec::Structure;
use crate::error::{Error, Result};

/// What SmolLM, on which the authors' models are built, uses.
const DEFAULT_HEAD_DIM: usize = 64;
const DEFAULT_CONTEXT: usize = 2048;
const DEFAULT_ROPE_THETA: f32 = 10000.0;
const DEFAULT_RMS_EPS: f32 = 1e-5;
/// What transformers take where a configuration does not say.
const CONFIGS_RMS_EPS: f32 = 1e-6;

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
    pub rope_scaling: Scaling,
    pub rms_eps: f32,
}

pub(super) fn resolve(
    source: &Source,
    structure: &Structure,
    config: &Document,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Shape> {
    refuse_other_models(config)?;
    let rope = Rope::of(config)?;
    let (vocab, hidden) = matrix(source, "model.embed_tokens.weight")?;
    let layer = structure.first_block_layer();
    let (ffn, _) = matrix(source, &format!("{layer}.mlp.gate_proj.weight"))?;
    let hidden = config.usize("hidden_size")?.unwrap_or(hidden);
    let heads = Heads::resolve(source, &layer, hidden, config, overrides, progress)?;
    let mut say = |text: String| progress.note(&text);
    let mut shape = Shape {
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
        rope_theta: match overrides.rope_theta.or(rope.theta()?) {
            Some(theta) => theta,
            None => {
                say(format!(
                    "The base of the rotary angles is not known; {DEFAULT_ROPE_THETA} is assumed."
                ));
                DEFAULT_ROPE_THETA
            }
        },
        rope_scaling: Scaling::None,
        rms_eps: match overrides.rms_eps.or(config.f32("rms_norm_eps")?) {
            Some(eps) => eps,
            None => {
                let assumed = match config.is_present() {
                    true => CONFIGS_RMS_EPS,
                    false => DEFAULT_RMS_EPS,
                };
                say(format!(
                    "The epsilon of the norms is not known; {assumed:e} is assumed."
                ));
                assumed
            }
        },
    };
    shape.check()?;
    shape.rope_scaling = rope.scaling(shape.head_dim, shape.rope_theta)?;
    if let Some(window) = attention_window(config)?.filter(|window| *window < shape.context) {
        let then = match overrides.context_length {
            Some(_) => "what comes after those may make no sense",
            None => {
                shape.context = window;
                "the context length is set to that"
            }
        };
        progress.note(&format!(
            "Attention is to the last {window} tokens, which mor does not limit: {then}."
        ));
    }
    Ok(shape)
}

/// How many tokens some layers attend to at most.
fn attention_window(config: &Document) -> Result<Option<usize>> {
    match config.bool("use_sliding_window")? {
        Some(false) => Ok(None),
        _ => Ok(config.usize("sliding_window")?.filter(|window| *window > 0)),
    }
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
                (None, Some(n))
                    if config.is_present() && config.get("num_attention_heads").is_some() =>
                {
                    n
                }
                _ => count(k_rows, "k_proj")?,
            },
            dim,
        })
    }
}

/// Refuses configurations whose computation is not that of a Llama decoder.
fn refuse_other_models(config: &Document) -> Result<()> {
    let act = config.str("hidden_act")?.unwrap_or("silu");
    if act != "silu" {
        return Err(Error::unsupported(format_args!(
            "the activation '{act}' (hidden_act in '{}'); mor runs silu",
            config.label()
        )));
    }
    // Factors of models that have the names of Llama's tensors and compute otherwise: 1 is none.
    for key in [
        "attention_multiplier",
        "residual_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "logit_scale",
        "scale_emb",
        "scale_depth",
        "dim_model_base",
        "clip_qkv",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ] {
        if config
            .get(key)
            .is_some_and(|value| value.as_f64() != Some(1.0))
        {
            return Err(Error::unsupported(format_args!(
                "{key} in '{}' asks for a computation that Llama does not do",
                config.label()
            )));
        }
    }
    let layers = |key: &str| config.get(key).and_then(|list| list.as_array());
    let unrotated =
        layers("no_rope_layers").is_some_and(|list| list.iter().any(|rotates| *rotates == 0));
    let full = |kind: &Value| *kind == "full_attention" || *kind == "sliding_attention";
    if unrotated || layers("layer_types").is_some_and(|list| !list.iter().all(full)) {
        return Err(Error::unsupported(format_args!(
            "layers that differ from each other (no_rope_layers or layer_types in '{}')",
            config.label()
        )));
    }
    let model = config.str("model_type")?.unwrap_or("llama");
    if ["mistral", "qwen2"].contains(&model) || model.contains("llama") || model.contains("mor") {
        return Ok(());
    }
    Err(Error::unsupported(format_args!(
        "a model of type '{model}'; if it computes as Llama does, say \"model_type\": \"llama\" in '{}'",
        config.label()
    )))
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

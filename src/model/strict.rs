//! Nothing that a file says may go unheeded: a tensor that no layer uses, or a key that asks for a
//! computation that is not done, means that the file holds another model than the one that would
//! run. All of it is looked at once, when the model is opened.

use super::{Architecture, Hyperparameters, Layer, Linear, Parts, RouterKind};
use crate::error::{Error, Result};
use crate::gguf::{Array, Gguf, Metadata, Value};
use crate::memory::reserved;
use std::fmt;

/// Fails on the first tensor or key of the file that the model does not follow.
pub(super) fn check(parts: &Parts) -> Result<()> {
    let (gguf, h) = (&parts.gguf, &parts.hyperparameters);
    check_keys(&gguf.metadata, h)?;
    check_aliases(gguf, h)?;
    check_router(parts)?;
    check_tensors(parts)
}

/// The value at which a key asks for nothing special.
enum Neutral {
    Is(f64),
    /// A factor: 1, or 0, by which llama.cpp's files say that there is none.
    Factor,
    Flag(bool),
    Word(&'static str),
    /// What attention divides by anyway.
    AttentionScale,
}

/// Keys of the Llama family (without their prefix) that change what a model computes in ways that
/// are not implemented.
const UNIMPLEMENTED: [(&str, Neutral); 22] = [
    ("attention.causal", Neutral::Flag(true)),
    ("attention.clamp_kqv", Neutral::Is(0.0)),
    ("attention.kv_lora_rank", Neutral::Is(0.0)),
    ("attention.max_alibi_bias", Neutral::Is(0.0)),
    ("attention.output_scale", Neutral::Factor),
    ("attention.q_lora_rank", Neutral::Is(0.0)),
    ("attention.scale", Neutral::AttentionScale),
    ("attention.shared_kv_layers", Neutral::Is(0.0)),
    ("attention.sliding_window", Neutral::Is(0.0)),
    ("attention.temperature_scale", Neutral::Is(0.0)),
    ("attention.value_scale", Neutral::Factor),
    ("attn_logit_softcapping", Neutral::Is(0.0)),
    ("embedding_scale", Neutral::Factor),
    ("final_logit_softcapping", Neutral::Is(0.0)),
    ("hidden_activation", Neutral::Word("silu")),
    ("logit_scale", Neutral::Factor),
    ("nextn_predict_layers", Neutral::Is(0.0)),
    ("residual_scale", Neutral::Factor),
    ("rope.dimension_sections", Neutral::Is(0.0)),
    ("rope.scaling.attn_factor", Neutral::Factor),
    ("swin_norm", Neutral::Flag(false)),
    ("use_parallel_residual", Neutral::Flag(false)),
];

/// Keys of the Llama family that are read, or known to be for people.
const FAMILY: [&str; 19] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
];

/// Those that only this project's files have.
const OWN: [&str; 16] = [
    "kv.strategy",
    "recursion.aliases",
    "recursion.count",
    "recursion.sharing",
    "rope.pairing",
    "router.alpha",
    "router.balancing",
    "router.capacities",
    "router.cut",
    "router.function",
    "router.gating",
    "router.kind",
    "router.selection",
    "router.temperature",
    "router.type",
    "tensor_data_layout",
];

/// Whether `llama.<name>` is looked at, be it only to refuse it.
#[cfg(feature = "convert")]
pub(crate) fn is_llama_key(name: &str) -> bool {
    FAMILY.contains(&name) || UNIMPLEMENTED.iter().any(|(known, _)| *known == name)
}

/// Every key must be one that is heeded, or ask for nothing.
pub(crate) fn check_keys(metadata: &Metadata, h: &Hyperparameters) -> Result<()> {
    if metadata.u32("split.count")?.unwrap_or(1) > 1 {
        return Err(Error::unsupported(
            "a model split into several files; merge them first (llama-gguf-split --merge)",
        ));
    }
    let prefix = match h.architecture {
        Architecture::Llama => "llama.",
        Architecture::Mor => "mor.",
    };
    for (key, value) in metadata.iter() {
        let Some(name) = key.strip_prefix(prefix) else {
            if key.starts_with("mor.") {
                return Err(Error::format(format_args!(
                    "the key {key} has no meaning in a file of architecture 'llama'"
                )));
            }
            continue;
        };
        match UNIMPLEMENTED.iter().find(|(known, _)| *known == name) {
            Some((_, neutral)) if is_neutral(value, neutral, h) => {}
            Some(_) => {
                return Err(Error::unsupported(format_args!(
                    "{key} is {}; mor does not compute that",
                    Shown(value)
                )));
            }
            None if h.architecture == Architecture::Llama => {}
            None if FAMILY.contains(&name) || OWN.contains(&name) => {}
            None => {
                return Err(Error::unsupported(format_args!(
                    "the key {key} is not known; a newer version of mor may run the file"
                )));
            }
        }
    }
    check_rope_scaling(metadata, h, prefix)
}

/// A factor without a type is linear scaling to some readers and nothing to others.
fn check_rope_scaling(metadata: &Metadata, h: &Hyperparameters, prefix: &str) -> Result<()> {
    let find = |name: &str| {
        let mut pairs = metadata.iter();
        let is = |key: &str| key.strip_prefix(prefix) == Some(name);
        pairs.find(|(key, _)| is(key)).map(|(_, value)| value)
    };
    match (find("rope.scaling.type"), find("rope.scaling.factor")) {
        (None, Some(factor)) if !is_neutral(factor, &Neutral::Factor, h) => {
            Err(Error::unsupported(format_args!(
                "{prefix}rope.scaling.factor is {}, but {prefix}rope.scaling.type does not say how positions are scaled",
                Shown(factor)
            )))
        }
        _ => Ok(()),
    }
}

fn is_neutral(value: &Value, neutral: &Neutral, h: &Hyperparameters) -> bool {
    match (neutral, value) {
        (Neutral::Flag(wanted), Value::Bool(flag)) => flag == wanted,
        (Neutral::Word(wanted), Value::String(text)) => text == wanted,
        // One number for each layer.
        (Neutral::Is(wanted), Value::Array(array)) => match array {
            Array::U32(all) => all.iter().all(|n| f64::from(*n) == *wanted),
            Array::I32(all) => all.iter().all(|n| f64::from(*n) == *wanted),
            _ => false,
        },
        (Neutral::Is(wanted), value) => number(value) == Some(*wanted),
        (Neutral::Factor, value) => matches!(number(value), Some(0.0 | 1.0)),
        (Neutral::AttentionScale, value) => number(value).is_some_and(|scale| {
            let own = 1.0 / (h.head_dim as f64).sqrt();
            // Files keep it in single precision.
            scale == 0.0 || (scale / own - 1.0).abs() < 1e-6
        }),
        _ => false,
    }
}

fn number(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(v) => Some(v.into()),
        Value::F64(v) => Some(v),
        _ => value.as_integer().map(|v| v as f64),
    }
}

/// A value in a sentence.
struct Shown<'a>(&'a Value);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0 {
            Value::Bool(flag) => write!(f, "{flag}"),
            Value::String(text) => write!(f, "'{text}'"),
            Value::F32(v) => write!(f, "{v}"),
            Value::Array(_) => write!(f, "not 0 throughout"),
            other => match number(other) {
                Some(v) => write!(f, "{v}"),
                None => write!(f, "of an unknown kind"),
            },
        }
    }
}

/// An alias must give a tensor to a recursion that would otherwise take the shared one.
fn check_aliases(gguf: &Gguf, h: &Hyperparameters) -> Result<()> {
    let key = "mor.recursion.aliases";
    let Some(aliases) = gguf.metadata.strings(key)? else {
        return Ok(());
    };
    let mut names = reserved(aliases.len())?;
    names.extend(
        aliases
            .iter()
            .map(|a| a.split_once('=').map_or(a, |(name, _)| name)),
    );
    names.sort_unstable();
    for (i, name) in names.iter().enumerate() {
        if !is_of_a_recursion(name, h) {
            return Err(Error::format(format_args!(
                "{key} gives the tensor {name}, which no layer looks up"
            )));
        }
        if gguf.tensor(name).is_some() || i > 0 && names[i - 1] == *name {
            return Err(Error::format(format_args!(
                "{key} gives the tensor {name}, which the file has already"
            )));
        }
    }
    Ok(())
}

/// Whether `name` is `blk.N.rec.R.PART` with a block that is shared and a recursion after the first.
fn is_of_a_recursion(name: &str, h: &Hyperparameters) -> bool {
    let mut words = name.split('.');
    let (blk, block, rec) = (words.next(), words.next(), words.next());
    let (recursion, part, leaf) = (words.next(), words.next(), words.next());
    let number = |word: Option<&str>| word.and_then(|w| w.parse::<usize>().ok());
    let ends = usize::from(h.sharing.has_own_ends());
    let shared = ends..h.stored_blocks - ends;
    let linear = matches!(
        part,
        Some("attn_q" | "attn_k" | "attn_v" | "attn_output" | "ffn_gate" | "ffn_up" | "ffn_down")
    );
    let norm = matches!(part, Some("attn_norm" | "ffn_norm"));
    blk == Some("blk")
        && rec == Some("rec")
        && words.next().is_none()
        && number(block).is_some_and(|n| shared.contains(&n))
        && number(recursion).is_some_and(|r| (1..h.recursions).contains(&r))
        && (leaf == Some("weight") && (linear || norm) || leaf == Some("bias") && linear)
}

/// What the keys say of the routers must be what the tensors are.
fn check_router(parts: &Parts) -> Result<()> {
    let (metadata, routers) = (&parts.gguf.metadata, &parts.routers);
    let Some(router) = routers.first() else {
        return Ok(());
    };
    let type_key = "mor.router.type";
    let two_layers = match metadata.str(type_key)? {
        None => router.second.is_some(),
        Some("linear") => false,
        Some("mlp") => true,
        Some(other) => {
            return Err(Error::unsupported(format_args!(
                "{type_key} is '{other}'; known are linear, mlp"
            )));
        }
    };
    if routers.iter().any(|r| r.second.is_some() != two_layers) {
        return Err(Error::format(format_args!(
            "the routers are not all of the kind that {type_key} says"
        )));
    }
    let balancing_key = "mor.router.balancing";
    let biased = router.pick_bias.is_some();
    match metadata.str(balancing_key)? {
        None => Ok(()),
        Some("loss") if !biased => Ok(()),
        Some("loss_free") if biased => Ok(()),
        Some("loss") => Err(Error::format(format_args!(
            "{balancing_key} is 'loss', but there is a tensor router.0.bias"
        ))),
        Some("loss_free") => Err(Error::format(format_args!(
            "{balancing_key} is 'loss_free', but the tensor router.0.bias is missing"
        ))),
        Some(other) => Err(Error::unsupported(format_args!(
            "{balancing_key} is '{other}'; known are loss, loss_free"
        ))),
    }
}

/// Every tensor of the file must be one that the model uses.
fn check_tensors(parts: &Parts) -> Result<()> {
    let tensors = parts.gguf.tensors();
    // Where each tensor begins, and whether something lies there for the model; tensors of a
    // parsed file do not overlap.
    let mut used: Vec<(usize, bool)> = reserved(tensors.len())?;
    used.extend(tensors.iter().map(|t| (t.offset, false)));
    used.sort_unstable();
    each_offset(parts, |offset| {
        if let Ok(at) = used.binary_search_by_key(&offset, |(start, _)| *start) {
            used[at].1 = true;
        }
    });
    let is_used = |offset| used.binary_search(&(offset, true)).is_ok();
    let unused = |name: &str, offset| !is_used(offset) && !may_be_left_out(name);
    match tensors.iter().find(|t| unused(&t.name, t.offset)) {
        None => Ok(()),
        Some(tensor) => Err(Error::unsupported(format_args!(
            "the file has the tensor {}, which no part of a model of {} blocks and {} recursions uses",
            tensor.name, parts.hyperparameters.stored_blocks, parts.hyperparameters.recursions
        ))),
    }
}

/// Rotary frequencies that old converters stored, though they follow from the metadata.
fn may_be_left_out(name: &str) -> bool {
    name == "rope.freqs" || name.starts_with("blk.") && name.ends_with(".attn_rot_embd.weight")
}

/// Where everything begins that a run of the model reads.
fn each_offset(parts: &Parts, mut each: impl FnMut(usize)) {
    each(parts.token_embedding.offset);
    each(parts.output.offset);
    each(parts.output_norm.offset);
    parts.rope_factors.iter().for_each(|v| each(v.offset));
    for layer in &parts.layers {
        each(layer.attn_norm.offset);
        each(layer.ffn_norm.offset);
        let Layer { q, k, v, o, .. } = layer;
        for linear in [q, k, v, o, &layer.gate, &layer.up, &layer.down] {
            each_of(linear, &mut each);
        }
    }
    for router in parts.routers.iter().chain(&parts.auxiliary_routers) {
        each_of(&router.first, &mut each);
        router.second.iter().for_each(|l| each_of(l, &mut each));
    }
    // Only the choice of a depth adds a bias.
    let router = parts.hyperparameters.router.as_ref();
    if router.is_some_and(|r| r.kind == RouterKind::Token) {
        let biases = parts.routers.iter().filter_map(|r| r.pick_bias.as_ref());
        biases.for_each(|bias| each(bias.offset));
    }
}

fn each_of(linear: &Linear, each: &mut impl FnMut(usize)) {
    each(linear.weight.offset);
    linear.bias.iter().for_each(|bias| each(bias.offset));
}

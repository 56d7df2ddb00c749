//! The keys of a converted checkpoint, as docs/format.md describes them.

use super::layout::Layout;
use super::options::Overrides;
use super::rope::Scaling;
use super::router::{Rule, TRAINED_CUT};
use super::spec::Spec;
use crate::gguf::{Array, Metadata, Value};
use crate::model::TensorLayout;
use crate::quant::TensorType;

/// llama.cpp's number for a file that is mostly of one type.
pub(super) fn file_type(ty: TensorType) -> u32 {
    match ty {
        TensorType::F32 => 0,
        TensorType::F16 => 1,
        TensorType::Q4_0 => 2,
        TensorType::Q4_1 => 3,
        TensorType::Q8_0 => 7,
        TensorType::Q5_0 => 8,
        TensorType::Q5_1 => 9,
        TensorType::Q4_K => 15,
        TensorType::Q5_K => 17,
        TensorType::Q6_K => 18,
        TensorType::BF16 => 32,
    }
}

/// Says of what type the file mostly is.
pub(super) fn set_file_type(metadata: &mut Metadata, ty: TensorType) {
    metadata.insert("general.file_type", Value::U32(file_type(ty)));
    metadata.insert("general.quantization_version", Value::U32(2));
}

/// Says how the quantized matrices are arranged.
pub(super) fn set_layout(metadata: &mut Metadata, layout: TensorLayout) {
    let name = Value::String(layout.name().to_string());
    metadata.insert("mor.tensor_data_layout", name);
}

/// The metadata of a checkpoint, without its tokenizer.
pub(super) fn build(
    spec: &Spec,
    layout: &Layout,
    ty: TensorType,
    name: &str,
    overrides: &Overrides,
) -> Metadata {
    let mut m = Metadata::default();
    let text = |s: &str| Value::String(s.to_string());
    // Every count was checked to fit when the shape was resolved.
    let number = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
    m.insert("general.architecture", text("mor"));
    m.insert("general.type", text("model"));
    m.insert(
        "general.name",
        text(overrides.name.as_deref().unwrap_or(name)),
    );
    set_file_type(&mut m, ty);
    let s = &spec.shape;
    m.insert("mor.context_length", number(s.context));
    m.insert("mor.embedding_length", number(s.hidden));
    m.insert("mor.block_count", number(spec.blocks()));
    m.insert("mor.feed_forward_length", number(s.ffn));
    m.insert("mor.vocab_size", number(s.vocab));
    m.insert("mor.attention.head_count", number(s.heads));
    m.insert("mor.attention.head_count_kv", number(s.kv_heads));
    m.insert("mor.attention.key_length", number(s.head_dim));
    m.insert("mor.attention.value_length", number(s.head_dim));
    m.insert(
        "mor.attention.layer_norm_rms_epsilon",
        Value::F32(s.rms_eps),
    );
    m.insert("mor.rope.freq_base", Value::F32(s.rope_theta));
    m.insert("mor.rope.dimension_count", number(s.head_dim));
    m.insert("mor.rope.pairing", text("neox"));
    if let Scaling::Linear(factor) = s.rope_scaling {
        m.insert("mor.rope.scaling.type", text("linear"));
        m.insert("mor.rope.scaling.factor", Value::F32(factor));
    }
    m.insert("mor.recursion.count", number(spec.recursions));
    m.insert(
        "mor.recursion.sharing",
        text(spec.executed_sharing().name()),
    );
    if !layout.aliases.is_empty() {
        let aliases = Array::String(layout.aliases.iter().collect());
        m.insert("mor.recursion.aliases", Value::Array(aliases));
    }
    insert_router(&mut m, spec);
    m.insert("mor.kv.strategy", text(spec.kv.name()));
    m
}

fn insert_router(m: &mut Metadata, spec: &Spec) {
    let text = |s: &str| Value::String(s.to_string());
    let Some(router) = &spec.router else {
        m.insert("mor.router.kind", text("none"));
        return;
    };
    m.insert("mor.router.kind", text(spec.kind.name()));
    m.insert(
        "mor.router.type",
        text(if router.mlp { "mlp" } else { "linear" }),
    );
    m.insert("mor.router.function", text(router.function.name()));
    m.insert("mor.router.alpha", Value::F32(router.alpha));
    m.insert("mor.router.temperature", Value::F32(router.temperature));
    m.insert("mor.router.gating", text(router.gating.name()));
    match &router.rule {
        Rule::Expert {
            selection,
            capacities,
            ..
        } => {
            m.insert("mor.router.selection", text(selection.name()));
            m.insert("mor.router.cut", Value::F32(TRAINED_CUT));
            m.insert(
                "mor.router.capacities",
                Value::Array(Array::F64(capacities.clone())),
            );
        }
        Rule::Token { balancing } => {
            m.insert("mor.router.balancing", text(balancing.name()));
        }
    }
}

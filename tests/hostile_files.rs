//! Damaged and misleading models through the library: an error that says what is wrong.
#![cfg(feature = "convert")]

mod common;
#[path = "hostile/support.rs"]
mod support;

use common::cases::gguf_bytes;
use mor::gguf::{Array, Value};
use mor::quant::TensorType;
use support::*;

/// Kinds whose tensors differ.
const KINDS: [&str; 6] = [
    "vanilla",
    "recursive_middle_sequence",
    "expert_mlp_router",
    "expert_aux_router",
    "expert_own_attention",
    "token_loss_free",
];

#[test]
fn truncation_at_every_97th_byte() {
    let bytes = gguf_bytes("expert_aux_router", TensorType::F32);
    for length in (0..bytes.len() - 32).step_by(97) {
        let sentence = refusal(bytes[..length].to_vec(), &format!("{length} bytes"));
        assert_says(&sentence, "the file is damaged", "truncated");
    }
}

/// Tensors that a file may lack: the head is tied then, the picks unbiased, and recursions that
/// lack their own tensors take the shared ones, where there are any.
fn is_optional(name: &str) -> bool {
    name == "output.weight" || name.ends_with(".bias") || name.contains(".rec.")
}

#[test]
fn every_tensor_missing_once() {
    for kind in KINDS {
        let draft = Draft::of(&gguf_bytes(kind, TensorType::F32));
        for i in 0..draft.tensors.len() {
            let mut draft = draft.clone();
            let (plan, _) = draft.tensors.remove(i);
            let result = run(draft.bytes(), &[1, 2, 3, 0]);
            match result {
                Ok(()) => assert!(
                    is_optional(&plan.name),
                    "{kind}: {} is not missed",
                    plan.name
                ),
                Err(error) => {
                    let sentence = error.to_string();
                    // Of an MLP router's two layers, either may be named.
                    let stem = plan.name.trim_end_matches(".weight");
                    assert_says(&sentence, stem, kind);
                    assert!(
                        sentence.contains("missing") || sentence.contains("lacks"),
                        "{kind}: {sentence}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_tensor_of_a_wrong_shape_once() {
    for kind in KINDS {
        let draft = Draft::of(&gguf_bytes(kind, TensorType::F32));
        for i in 0..draft.tensors.len() {
            // One more column; one more row; a third dimension.
            for spoil in 0..3 {
                let mut draft = draft.clone();
                let (plan, bytes) = &mut draft.tensors[i];
                match (spoil, plan.dims.len()) {
                    (0, _) => plan.dims[0] += 1,
                    (1, 1) => plan.dims.push(2),
                    (1, _) => plan.dims[1] += 1,
                    _ => plan.dims.resize(3, 2),
                }
                let weights: u64 = plan.dims.iter().product();
                bytes.resize(4 * weights as usize, 0);
                let name = plan.name.clone();
                // The rows of an MLP router's first layer are only known from the second's.
                let stem = name
                    .trim_end_matches("0.weight")
                    .trim_end_matches(".weight");
                let stem = stem.trim_end_matches(".0");
                let what = format!("{kind}: {name}, {spoil}");
                let sentence = refusal(draft.bytes(), &what);
                assert_says(&sentence, stem, &what);
                assert_says(&sentence, "shape", &what);
            }
        }
    }
}

#[test]
fn norms_of_another_type() {
    let bytes = gguf_bytes("vanilla", TensorType::F32);
    let draft = Draft::of(&bytes);
    for i in 0..draft.tensors.len() {
        let mut draft = draft.clone();
        let (plan, bytes) = &mut draft.tensors[i];
        if plan.dims.len() > 1 {
            continue;
        }
        plan.ty = TensorType::F16;
        bytes.truncate(bytes.len() / 2);
        let name = plan.name.clone();
        let sentence = refusal(draft.bytes(), &name);
        assert_says(&sentence, "must be F32", &name);
    }
}

/// One spoilt weight anywhere is noticed; none passes for a result.
#[test]
fn one_weight_that_is_not_a_number() {
    for kind in KINDS {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let draft = Draft::of(&gguf_bytes(kind, TensorType::F32));
            for i in 0..draft.tensors.len() {
                let mut draft = draft.clone();
                let (plan, bytes) = &mut draft.tensors[i];
                bytes[..4].copy_from_slice(&value.to_le_bytes());
                let what = format!("{kind}: {value} in {}", plan.name);
                assert_says(&refusal(draft.bytes(), &what), "not finite", &what);
            }
        }
    }
}

/// What is added to choose a depth belongs to no sequence, so it is looked at before there is any; and a GPU would
/// not notice it.
#[test]
fn a_router_s_bias_that_is_not_a_number() {
    let mut draft = Draft::of(&gguf_bytes("token_loss_free", TensorType::F32));
    let mut tensors = draft.tensors.iter_mut();
    let (_, bytes) = tensors
        .find(|(plan, _)| plan.name == "router.0.bias")
        .unwrap();
    bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = mor::Model::from_bytes(draft.bytes()).map(drop).unwrap_err();
    assert_says(&error.to_string(), "router.0.bias", "on loading");
}

#[test]
fn encoded_weights_that_are_not_numbers() {
    for ty in [
        TensorType::Q8_0,
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::F16,
    ] {
        let draft = Draft::of(&gguf_bytes("expert_middle_cycle", ty));
        for i in 0..draft.tensors.len() {
            let mut draft = draft.clone();
            let (plan, bytes) = &mut draft.tensors[i];
            if plan.ty == TensorType::F32 {
                continue;
            }
            // An F16 NaN: the scale of a block, or a weight.
            bytes[..2].copy_from_slice(&0x7e00u16.to_le_bytes());
            let what = format!("{ty}: {}", plan.name);
            assert_says(&refusal(draft.bytes(), &what), "not finite", &what);
        }
    }
}

fn texts(all: &[&str]) -> Value {
    Value::Array(Array::String(all.iter().collect()))
}

fn text(s: &str) -> Value {
    Value::String(s.into())
}

fn shares(values: &[f64]) -> Value {
    Value::Array(Array::F64(values.to_vec()))
}

/// A key, its value, and what the sentence says besides.
type Spoilt = (&'static str, Value, &'static str);

fn sizes() -> Vec<Spoilt> {
    use Value::{I32, U32, U64};
    vec![
        ("attention.head_count", U32(0), "is zero"),
        ("attention.head_count", U32(3), "evenly"),
        ("attention.head_count", U32(1 << 30), "more than the limit"),
        ("attention.head_count", I32(-4), "head_count"),
        ("attention.head_count_kv", U32(0), "is zero"),
        ("attention.head_count_kv", U32(3), "evenly"),
        ("attention.key_length", U32(0), "is zero"),
        ("attention.key_length", U32(100_000), "more than the limit"),
        ("attention.value_length", U32(4), "different lengths"),
        ("block_count", U32(0), "is zero"),
        ("block_count", U32(2), "at least 3 stored blocks"),
        ("block_count", U32(2000), "more than the limit"),
        ("block_count", U32(1000), "missing"),
        ("block_count", U64(u64::MAX), "block_count"),
        ("embedding_length", U32(0), "is zero"),
        ("embedding_length", U32(33), "shape"),
        ("embedding_length", U32(u32::MAX), "more than the limit"),
        ("feed_forward_length", U32(0), "is zero"),
        ("feed_forward_length", U32(65), "shape"),
        ("context_length", U32(0), "is zero"),
        ("context_length", U32(1 << 30), "more than the limit"),
        ("context_length", text("long"), "context_length"),
        ("vocab_size", U32(97), "shape"),
        ("vocab_size", U32(u32::MAX), "more than the limit"),
        ("expert_count", U32(8), "mixture-of-experts"),
        ("rope.dimension_count", U32(0), "is zero"),
        ("rope.dimension_count", U32(7), "an even number"),
        ("rope.dimension_count", U32(16), "at most the head"),
        ("recursion.count", U32(0), "is zero"),
        ("recursion.count", U32(4), "4 shares"),
        ("recursion.count", U32(65), "more than the limit"),
        ("recursion.count", U32(u32::MAX), "more than the limit"),
    ]
}

fn rules() -> Vec<Spoilt> {
    use Value::F32;
    let positive = "a positive number";
    vec![
        ("attention.layer_norm_rms_epsilon", F32(-1e-5), positive),
        ("attention.layer_norm_rms_epsilon", F32(0.0), positive),
        ("attention.layer_norm_rms_epsilon", F32(f32::NAN), positive),
        ("rope.freq_base", F32(-1.0), positive),
        ("rope.freq_base", F32(f32::INFINITY), positive),
        ("rope.pairing", text("sideways"), "known are"),
        ("rope.scaling.type", text("yarn"), "known are"),
        ("recursion.sharing", text("none"), "more than one recursion"),
        ("recursion.sharing", text("spiral"), "known are"),
        (
            "recursion.aliases",
            vec![String::from("a")].into(),
            "name=target",
        ),
        (
            "recursion.aliases",
            vec![String::from("a=b")].into(),
            "lacks",
        ),
        ("router.kind", text("oracle"), "known are"),
        ("router.kind", text("token"), "router"),
        ("router.function", text("softmax"), "known are"),
        ("router.gating", text("maybe"), "known are"),
        ("router.selection", text("aux_router"), "missing"),
        ("router.alpha", F32(f32::INFINITY), "must be finite"),
        ("router.alpha", F32(f32::NAN), "must be finite"),
        ("router.cut", F32(1.5), "between 0 and 1"),
        ("router.cut", F32(f32::NAN), "between 0 and 1"),
        ("router.temperature", F32(0.0), positive),
        ("router.temperature", F32(-1.0), positive),
        ("router.capacities", shares(&[1.0, 0.5]), "3 shares"),
        (
            "router.capacities",
            shares(&[1.0, 0.5, 2.0]),
            "between 0 and 1",
        ),
        (
            "router.capacities",
            shares(&[1.0, -0.5, 0.1]),
            "between 0 and 1",
        ),
        (
            "router.capacities",
            shares(&[1.0, f64::NAN, 0.1]),
            "between 0 and 1",
        ),
        ("router.capacities", text("all"), "capacities"),
        ("kv.strategy", text("none"), "known are"),
    ]
}

#[test]
fn hyperparameters_out_of_range() {
    let draft = Draft::of(&gguf_bytes("expert_middle_cycle", TensorType::F32));
    for (key, value, phrase) in [sizes(), rules()].concat() {
        let what = format!("{key} = {value:?}");
        let mut draft = draft.clone();
        draft.metadata.insert(format!("mor.{key}"), value);
        assert_says(&refusal(draft.bytes(), &what), phrase, &what);
    }
}

#[test]
fn hyperparameters_that_are_missing() {
    let draft = Draft::of(&gguf_bytes("expert_middle_cycle", TensorType::F32));
    for key in [
        "general.architecture",
        "mor.attention.head_count",
        "mor.attention.layer_norm_rms_epsilon",
        "mor.block_count",
        "mor.context_length",
        "mor.embedding_length",
        "mor.feed_forward_length",
        "mor.recursion.sharing",
        "mor.vocab_size",
    ] {
        let mut draft = draft.clone();
        assert!(draft.metadata.remove(key).is_some(), "{key}");
        assert_says(&refusal(draft.bytes(), key), key, key);
    }
}

#[test]
fn huge_strings_and_arrays() {
    let bytes = gguf_bytes("expert_middle_cycle", TensorType::F32);
    let after = |key: &str| {
        let at = bytes.windows(key.len()).position(|w| w == key.as_bytes());
        at.unwrap() + key.len() + 4
    };
    for length in [u64::MAX, 1 << 63, 1 << 40, 1 << 25, bytes.len() as u64] {
        let length = length.to_le_bytes();
        let string = patch(&bytes, after("general.architecture"), &length);
        assert_says(&refusal(string, "string"), "general.architecture", "string");
        let array = patch(&bytes, after("mor.router.capacities") + 4, &length);
        assert_says(&refusal(array, "array"), "capacities", "array");
    }
}

/// A tensor that no part of the model uses belongs to another model.
#[test]
fn tensors_that_nothing_uses() {
    let llama = {
        let mut draft = Draft::of(&gguf_bytes("vanilla", TensorType::F32));
        let keys: Vec<_> = draft.metadata.iter().map(|(k, _)| k.to_owned()).collect();
        for key in keys {
            let kept = key.strip_prefix("mor.").filter(|name| {
                !["recursion", "router", "kv.", "rope.pairing"]
                    .iter()
                    .any(|other| name.starts_with(other))
            });
            let value = draft.metadata.get(&key).cloned().unwrap();
            if key.starts_with("mor.") {
                draft.metadata.remove(&key);
            }
            if let Some(name) = kept {
                draft.metadata.insert(format!("llama.{name}"), value);
            }
        }
        draft.metadata.insert("general.architecture", "llama");
        draft
    };
    assert!(run(llama.bytes(), &[1, 2]).is_ok());
    let mor = |case| Draft::of(&gguf_bytes(case, TensorType::F32));
    let extra = |draft: &Draft, name: &str| {
        let mut draft = draft.clone();
        let mut tensor = draft.tensors[0].clone();
        tensor.0.name = name.into();
        draft.tensors.push(tensor);
        draft
    };
    let middle = mor("expert_middle_cycle");
    for (draft, name) in [
        (&llama, "blk.0.attn_q_norm.weight"),
        (&llama, "blk.99.attn_q.weight"),
        (&llama, "blk.0.attn_norm.bias"),
        (&llama, "rope_factors_long.weight"),
        (&llama, "router.0.weight"),
        (&middle, "aux_router.0.weight"),
        (&middle, "router.3.weight"),
        (&middle, "router.0.0.weight"),
        (&middle, "blk.1.rec.3.attn_q.weight"),
        (&middle, "blk.0.rec.1.attn_q.weight"),
        (&middle, "nonsense"),
    ] {
        let sentence = refusal(extra(draft, name).bytes(), name);
        assert_says(&sentence, &format!("has the tensor {name}"), name);
    }
    for name in ["blk.0.attn_rot_embd.weight", "rope.freqs"] {
        run(extra(&llama, name).bytes(), &[1, 2]).unwrap();
    }
    // Where tokens were added the key of a Llama file may be stale; the list is not.
    let mut stale = llama.clone();
    let names: Vec<String> = (0..96).map(|i| format!("t{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    stale.metadata.insert("llama.vocab_size", 90u32);
    assert!(run(stale.bytes(), &[1, 2]).is_err());
    stale
        .metadata
        .insert("tokenizer.ggml.tokens", texts(&names));
    run(stale.bytes(), &[1, 2]).unwrap();
    // A scaling that is none is none, and the older key's factor goes with the newer one's word.
    let scores = |changes: &[(&str, Value)]| {
        let mut draft = llama.clone();
        for (key, value) in changes {
            draft.metadata.insert(*key, value.clone());
        }
        let model = mor::Model::from_bytes(draft.bytes()).unwrap();
        let mut session = mor::Session::new(&model, &Default::default()).unwrap();
        session.prefill(&[1, 2, 3]).unwrap();
        session.logits().unwrap().to_vec()
    };
    let factor = |key| (key, Value::F32(4.0));
    let kind = |word: &str| ("llama.rope.scaling.type", Value::String(word.into()));
    let older = "llama.rope.scale_linear";
    let plain = scores(&[]);
    let scaled = scores(&[factor(older)]);
    assert_ne!(plain, scaled);
    assert_eq!(scores(&[factor(older), kind("none")]), plain);
    assert_eq!(scores(&[factor(older), kind("linear")]), scaled);
    assert_eq!(
        scores(&[factor("llama.rope.scaling.factor"), kind("linear")]),
        scaled
    );
    // Fewer blocks than are stored; the same of recursions.
    let mut fewer = llama.clone();
    fewer.metadata.insert("llama.block_count", 1u32);
    assert_says(&refusal(fewer.bytes(), "blocks"), "blk.1.", "blocks");
    let mut fewer = mor("expert_own_attention");
    fewer.metadata.insert("mor.recursion.count", 2u32);
    fewer.metadata.remove("mor.router.capacities");
    assert_says(
        &refusal(fewer.bytes(), "recursions"),
        "tensor",
        "recursions",
    );
}

/// Keys that ask for a computation that is not done.
#[test]
fn keys_that_would_change_the_result() {
    let draft = Draft::of(&gguf_bytes("expert_middle_cycle", TensorType::F32));
    let whole = |n: u32| Value::U32(n);
    let real = Value::F32;
    let text = |s: &str| Value::String(s.into());
    let head = 8f32;
    for (key, value, phrase) in [
        ("mor.attention.sliding_window", whole(4096), "4096"),
        (
            "mor.attention.sliding_window",
            Value::Array(Array::U32(vec![0, 8])),
            "not 0 throughout",
        ),
        ("mor.logit_scale", real(0.5), "0.5"),
        ("mor.residual_scale", real(0.22), "0.22"),
        ("mor.embedding_scale", real(12.0), "12"),
        ("mor.attention.scale", real(0.015625), "0.015625"),
        ("mor.attention.causal", Value::Bool(false), "false"),
        ("mor.attn_logit_softcapping", real(50.0), "50"),
        ("mor.final_logit_softcapping", real(30.0), "30"),
        ("mor.attention.clamp_kqv", real(8.0), "8"),
        ("mor.attention.max_alibi_bias", real(8.0), "8"),
        ("mor.use_parallel_residual", Value::Bool(true), "true"),
        ("mor.hidden_activation", text("gelu"), "'gelu'"),
        ("mor.rope.scaling.factor", real(4.0), "how positions"),
        ("mor.rope.scaling.type", text("yarn"), "known are"),
        ("mor.exit.gate", text("x"), "is not known"),
        ("mor.router.type", text("tree"), "known are linear, mlp"),
        ("mor.router.type", text("mlp"), "mor.router.type"),
        ("mor.router.balancing", text("loss_free"), "router.0.bias"),
        ("mor.router.balancing", text("luck"), "known are loss"),
        ("split.count", Value::U16(3), "merge them first"),
        (
            "mor.recursion.aliases",
            texts(&["blk.1.rec.7.attn_q.weight=blk.1.attn_q.weight"]),
            "no layer looks up",
        ),
        (
            "mor.recursion.aliases",
            texts(&["output.weight=token_embd.weight"]),
            "no layer looks up",
        ),
        (
            "mor.recursion.aliases",
            texts(&["blk.1.rec.1.attn_q.weight=blk.1.attn_q.weight"; 2]),
            "has already",
        ),
    ] {
        let mut draft = draft.clone();
        draft.metadata.insert(key, value);
        assert_says(&refusal(draft.bytes(), key), phrase, key);
    }
    for (key, value) in [
        ("mor.attention.sliding_window", whole(0)),
        ("mor.logit_scale", real(1.0)),
        ("mor.residual_scale", real(0.0)),
        ("mor.attention.scale", real(1.0 / head.sqrt())),
        ("mor.attention.causal", Value::Bool(true)),
        ("mor.hidden_activation", text("silu")),
        (
            "mor.attention.sliding_window",
            Value::Array(Array::I32(vec![0, 0])),
        ),
        ("mor.rope.scaling.factor", real(1.0)),
        ("mor.router.type", text("linear")),
        ("split.count", Value::U16(1)),
        ("general.anything", text("for people")),
    ] {
        let mut draft = draft.clone();
        draft.metadata.insert(key, value);
        run(draft.bytes(), &[1, 2]).unwrap_or_else(|e| panic!("{key}: {e}"));
    }
    let mut llama = Draft::of(&gguf_bytes("vanilla", TensorType::F32));
    llama.metadata.insert("general.architecture", "llama");
    assert!(run(llama.bytes(), &[1]).is_err());
    // Shares that the file does not tell are the paper's.
    let mut silent = draft;
    silent.metadata.remove("mor.router.capacities").unwrap();
    let model = mor::Model::from_bytes(silent.bytes()).unwrap();
    let router = model.hyperparameters().router.as_ref().unwrap();
    assert_eq!(router.capacities, [1.0, 2.0 / 3.0, 1.0 / 3.0]);
}

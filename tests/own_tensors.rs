//! Each tensor of a recursion is looked up on its own: a weight of its own may go with a shared bias,
//! and a bias of its own with a shared weight.

mod common;

use common::Random;
use mor::gguf::{GgufWriter, Metadata, TensorPlan};
use mor::quant::TensorType;
use mor::{KvType, Model, Session, SessionParams};

const HIDDEN: u64 = 32;
const FFN: u64 = 48;
const VOCAB: u64 = 24;

/// A recursive model of one block and two recursions; `own` names tensors of the second one, with
/// the tensor that its values are copied from, or new values.
fn logits(own: &[(&str, Option<&str>)]) -> Vec<u32> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "mor");
    for (key, value) in [
        ("context_length", 16),
        ("embedding_length", HIDDEN as u32),
        ("block_count", 1),
        ("feed_forward_length", FFN as u32),
        ("vocab_size", VOCAB as u32),
        ("attention.head_count", 2),
        ("recursion.count", 2),
    ] {
        metadata.insert(format!("mor.{key}"), value);
    }
    metadata.insert("mor.attention.layer_norm_rms_epsilon", 1e-5f32);
    metadata.insert("mor.recursion.sharing", "cycle");
    let mut tensors: Vec<(String, Vec<u64>)> = vec![
        ("token_embd.weight".into(), vec![HIDDEN, VOCAB]),
        ("output_norm.weight".into(), vec![HIDDEN]),
        ("blk.0.attn_norm.weight".into(), vec![HIDDEN]),
        ("blk.0.attn_q.weight".into(), vec![HIDDEN, HIDDEN]),
        ("blk.0.attn_k.weight".into(), vec![HIDDEN, HIDDEN]),
        ("blk.0.attn_v.weight".into(), vec![HIDDEN, HIDDEN]),
        ("blk.0.attn_output.weight".into(), vec![HIDDEN, HIDDEN]),
        ("blk.0.attn_output.bias".into(), vec![HIDDEN]),
        ("blk.0.ffn_norm.weight".into(), vec![HIDDEN]),
        ("blk.0.ffn_gate.weight".into(), vec![HIDDEN, FFN]),
        ("blk.0.ffn_up.weight".into(), vec![HIDDEN, FFN]),
        ("blk.0.ffn_down.weight".into(), vec![FFN, HIDDEN]),
    ];
    let values = |name: &str, count: u64| -> Vec<u8> {
        // A name's values are the same in every file.
        let seed = name
            .bytes()
            .fold(7, |h: u64, b| h.wrapping_mul(31) + u64::from(b));
        let mut random = Random(seed);
        let floats = (0..count).map(|_| random.unit() / 2.0);
        floats.flat_map(f32::to_le_bytes).collect()
    };
    let mut sources: Vec<String> = tensors.iter().map(|(name, _)| name.clone()).collect();
    for (part, source) in own {
        let shape = tensors.iter().find(|(n, _)| *n == format!("blk.0.{part}"));
        let shape = shape.unwrap().1.clone();
        let name = format!("blk.0.rec.1.{part}");
        sources.push(source.map_or(name.clone(), str::to_owned));
        tensors.push((name, shape));
    }
    let plan: Vec<TensorPlan> = tensors
        .iter()
        .map(|(name, dims)| TensorPlan {
            name: name.clone(),
            ty: TensorType::F32,
            dims: dims.clone(),
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut writer = GgufWriter::create(&path, &metadata, &plan).unwrap();
    for (tensor, source) in plan.iter().zip(&sources) {
        let count = tensor.dims.iter().product();
        writer.write_tensor_bytes(&values(source, count)).unwrap();
        writer.next_tensor().unwrap();
    }
    writer.finish().unwrap();
    let model = Model::open(&path).unwrap();
    let params = SessionParams {
        kv: KvType::F32,
        ..Default::default()
    };
    let mut session = Session::new(&model, &params).unwrap();
    session.prefill(&[1, 5, 9]).unwrap();
    let logits = session.step(3).unwrap();
    logits.iter().map(|l| l.to_bits()).collect()
}

#[test]
fn a_weight_and_its_bias_are_looked_up_apart() {
    let (weight, bias) = ("attn_output.weight", "attn_output.bias");
    let shared = logits(&[]);
    let own_weight = logits(&[(weight, None)]);
    let own_bias = logits(&[(bias, None)]);
    let copied = Some("blk.0.attn_output.weight");
    assert!(own_weight == logits(&[(weight, None), (bias, Some("blk.0.attn_output.bias"))]));
    assert!(own_bias == logits(&[(weight, copied), (bias, None)]));
    assert!(shared == logits(&[(weight, copied)]));
    assert!(shared != own_weight && shared != own_bias);
}

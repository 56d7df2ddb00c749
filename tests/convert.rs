//! Checkpoints in, GGUF out: every case of the reference, and what can be wrong with a checkpoint.
#![cfg(feature = "convert")]

#[path = "convert/support.rs"]
mod support;

#[path = "convert/layout.rs"]
mod layout;
#[path = "convert/structure.rs"]
mod structure;
#[path = "convert/tokenizer.rs"]
mod tokenizer;
#[path = "convert/torch.rs"]
mod torch;

use mor::convert::ConvertOptions;
use mor::gguf::Gguf;
use mor::quant::TensorType;
use support::*;

#[test]
fn every_case_converts_to_f32_without_loss() {
    for case in cases() {
        let (bytes, summary) = convert_case(&case, TensorType::F32);
        let gguf = Gguf::parse(&bytes).unwrap();
        let checkpoint = Checkpoint::read(&case);
        check_every_tensor(&case, &gguf, &bytes, &checkpoint);
        assert_eq!(summary.tensors, gguf.tensors().len());
        assert_eq!(summary.output_bytes as usize, bytes.len());
    }
}

#[test]
fn every_case_converts_to_every_type() {
    for case in cases() {
        for ty in TensorType::ALL.into_iter().filter(|t| t.can_encode()) {
            let (bytes, _) = convert_case(&case, ty);
            let gguf = Gguf::parse(&bytes).unwrap();
            for tensor in gguf.tensors() {
                let plain = tensor.dims.len() == 1 || tensor.name.contains("router");
                let wanted = if plain { TensorType::F32 } else { ty };
                assert_eq!(tensor.ty, wanted, "{case}: {}", tensor.name);
            }
        }
    }
}

#[test]
fn a_type_without_an_encoder_is_refused() {
    let options = ConvertOptions {
        ty: Some(TensorType::Q6_K),
        ..ConvertOptions::default()
    };
    let error = convert_folder(&case_folder("vanilla"), &options).unwrap_err();
    assert_eq!(
        error,
        "Q6_K cannot be written; choose one of F32, F16, BF16, Q8_0, Q4_0, Q4_1"
    );
}

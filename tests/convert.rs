//! Checkpoints in, GGUF out: every case of the reference, and what can be wrong with a checkpoint.
#![cfg(feature = "convert")]

mod common;
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

use mor::Model;
use mor::convert::{ConvertOptions, Output, Silent, SynthOptions, SynthShape, convert, synth};
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

/// A header's length may begin with the letters of a zip.
#[test]
fn a_long_safetensors_header_is_no_zip() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(case_folder("vanilla")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let padded = u64::from_le_bytes(*b"PK\x01\0\0\0\0\0");
    let (header, data) = bytes[8..].split_at(length);
    let spaces = vec![b' '; padded as usize - length];
    std::fs::write(
        &path,
        [&padded.to_le_bytes()[..], header, &spaces, data].concat(),
    )
    .unwrap();
    convert_folder(folder.path(), &ConvertOptions::default()).unwrap();
}

/// Keys that mean nothing in a Llama file do not get a meaning by being renamed, and ours do not belong there.
#[test]
fn a_llama_file_stays_a_vanilla_model() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
    let options = SynthOptions {
        shape: SynthShape::parse("tiny").unwrap(),
        layers: None,
        ty: TensorType::F32,
        seed: 1,
        mean_depth: None,
    };
    synth(&from, &options, &mut Silent).unwrap();
    let bytes = std::fs::read(&from).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(
        gguf.metadata.str("general.architecture").unwrap(),
        Some("llama")
    );
    for (prefix, refused) in [("llama", false), ("mor", true)] {
        let mut metadata = gguf.metadata.clone();
        metadata.insert(format!("{prefix}.recursion.count"), 2u32);
        metadata.insert(format!("{prefix}.recursion.sharing"), "middle_cycle");
        let changed = folder.path().join("c.gguf");
        common::write_copy(&changed, &metadata, &gguf, &bytes);
        let outcome = convert(&changed, &to, &ConvertOptions::default(), &mut Silent);
        assert_eq!(outcome.is_err(), refused, "{prefix}");
        if !refused {
            let model = Model::open(&to).unwrap();
            assert_eq!(model.hyperparameters().recursions, 1);
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

/// A name that no file can have costs no work; one that is as long as names can be is none of those.
#[test]
fn outputs_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let error = Output::new(&folder.path().join("missing/"))
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("names no file"), "{error}");
    let longest = folder.path().join("x".repeat(255));
    let output = Output::new(&longest).unwrap();
    std::fs::write(output.temporary(), "whole").unwrap();
    output.keep().unwrap();
    assert_eq!(std::fs::read_to_string(longest).unwrap(), "whole");
}

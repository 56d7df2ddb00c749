//! Tiles: the same model, arranged for the kernels.

use mor::convert::{ConvertOptions, Silent, SynthOptions, SynthShape, synth};
use mor::gguf::TensorInfo;
use mor::model::TensorLayout;
use mor::quant::TensorType;
use mor::{Model, Session, SessionParams};
use std::path::Path;

use crate::support::*;

/// Bits of the logits after each of some tokens, all of them below 8.
fn bits(bytes: Vec<u8>) -> Vec<u32> {
    let model = Model::from_bytes(bytes).unwrap();
    let params = SessionParams {
        context: 32,
        threads: 2,
        ..Default::default()
    };
    let mut session = Session::new(&model, &params).unwrap();
    let mut bits = Vec::new();
    // A whole prompt, then a single token.
    for tokens in [&[1, 2, 3, 4, 5, 6, 7][..], &[5]] {
        let keep = |_, row: &[f32]| {
            bits.extend(row.iter().map(|l| l.to_bits()));
            Ok(())
        };
        session.score(tokens, keep).unwrap();
    }
    bits
}

fn arranged(input: &Path, layout: TensorLayout) -> Converted {
    let options = ConvertOptions {
        layout,
        ..Default::default()
    };
    convert_folder(input, &options).unwrap()
}

fn tensors(converted: &Converted) -> Vec<u8> {
    let gguf = converted.gguf();
    let bytes = |t: &TensorInfo| converted.bytes[t.offset..][..t.bytes].to_vec();
    gguf.tensors().iter().flat_map(bytes).collect()
}

#[test]
fn tiles_and_rows_give_the_same_bits_and_each_other() {
    let folder = tempfile::tempdir().unwrap();
    for ty in TensorType::ALL.into_iter().filter(|t| t.can_encode()) {
        for case in [
            "expert_middle_cycle",
            "token_kv_shared",
            "recursive_middle_sequence",
        ] {
            let rows = convert_folder(&case_folder(case), &options(ty)).unwrap();
            let path = folder.path().join("rows.gguf");
            std::fs::write(&path, &rows.bytes).unwrap();
            let tiles = arranged(&path, TensorLayout::Tiles16);
            // Only types of blocks are arranged.
            let same = tensors(&tiles) == tensors(&rows);
            assert_eq!(same, ty.block_len() == 1, "{case} {ty}");
            assert!(
                bits(tiles.bytes.clone()) == bits(rows.bytes.clone()),
                "{case} {ty}"
            );
            let direct = ConvertOptions {
                ty: Some(ty),
                ..Default::default()
            };
            let direct = convert_folder(&case_folder(case), &direct).unwrap();
            assert!(direct.bytes == tiles.bytes, "{case} {ty}");
            let path = folder.path().join("tiles.gguf");
            std::fs::write(&path, &tiles.bytes).unwrap();
            let back = arranged(&path, TensorLayout::Rows);
            assert!(back.bytes == rows.bytes, "{case} {ty}");
        }
    }
}

/// Other programs would take tiles for rows, so the file no longer says that it is Llama's.
#[test]
fn a_llama_file_in_tiles_is_a_mor_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("llama.gguf");
    let options = SynthOptions {
        shape: SynthShape::parse("tiny").unwrap(),
        layers: None,
        ty: TensorType::Q4_0,
        seed: 1,
        mean_depth: None,
    };
    synth(&path, &options, &mut Silent).unwrap();
    let rows = arranged(&path, TensorLayout::Rows);
    assert_eq!(rows.summary.architecture, "llama");
    let tiles = arranged(&path, TensorLayout::Tiles16);
    assert_eq!(tiles.summary.architecture, "mor");
    let metadata = tiles.gguf().metadata;
    assert!(metadata.iter().all(|(key, _)| !key.starts_with("llama.")));
    assert_eq!(
        metadata.str("mor.tensor_data_layout").unwrap(),
        Some("tiles16")
    );
    assert!(bits(tiles.bytes.clone()) == bits(std::fs::read(&path).unwrap()));
    // An unknown layout is refused by name.
    let at = tiles
        .bytes
        .windows(7)
        .position(|w| w == b"tiles16")
        .unwrap();
    let mut other = tiles.bytes;
    other[at + 6] = b'7';
    let error = Model::from_bytes(other).err().unwrap().to_string();
    assert!(
        error.contains("mor.tensor_data_layout is 'tiles17'"),
        "{error}"
    );
}

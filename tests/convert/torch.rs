//! PyTorch files, as tools/golden/convert.py made them.

use mor::convert::ConvertOptions;
use mor::quant::TensorType;

use crate::support::*;

/// Options under which two conversions of the same tensors give the same file.
fn named(ty: TensorType) -> ConvertOptions {
    let mut options = options(ty);
    options.overrides.name = Some("same".into());
    options
}

#[test]
fn a_bin_file_gives_the_same_file_as_safetensors() {
    for (bin, case) in [("bin", "expert_rec4_tied"), ("sharded", "token_cycle")] {
        let options = named(TensorType::Q8_0);
        let from_bin = convert_folder(&data_folder().join(bin), &options).unwrap();
        let from_case = convert_folder(&case_folder(case), &options).unwrap();
        assert!(from_bin.bytes == from_case.bytes, "{bin}");
    }
}

#[test]
fn wrapped_bfloat16_is_read() {
    let converted = convert_folder(&data_folder().join("bf16"), &named(TensorType::BF16)).unwrap();
    let from_case = convert_folder(&case_folder("expert_cycle"), &named(TensorType::BF16)).unwrap();
    // Routers and norms were rounded in the checkpoint; the matrices round to the same.
    let (a, b) = (converted.gguf(), from_case.gguf());
    let matrices = a.tensors().iter().filter(|t| t.ty == TensorType::BF16);
    assert!(matrices.clone().count() > 7);
    for tensor in matrices {
        let other = decoded(&b, &from_case.bytes, &tensor.name);
        assert!(
            decoded(&a, &converted.bytes, &tensor.name) == other,
            "{}",
            tensor.name
        );
    }
    let notes = converted.notes.join("\n");
    assert!(
        notes.contains("2 entries of 'pytorch_model.bin' are no tensors"),
        "{notes}"
    );
    assert!(notes.contains("'_orig_mod.'"), "{notes}");
}

#[test]
fn a_pickle_that_would_run_a_command_is_refused() {
    let error = convert_folder(&data_folder().join("evil"), &options(TensorType::F32)).unwrap_err();
    assert_eq!(
        error,
        "cannot convert: 'pytorch_model.bin': the pickle tries to import os.system; refused"
    );
}

#[test]
fn other_pytorch_files_are_refused() {
    for (folder, sentence) in [
        (
            "legacy",
            "cannot convert: 'pytorch_model.bin' is of PyTorch's format before version 1.6; load it and save it again with a newer PyTorch",
        ),
        (
            "strided",
            "not supported: 'model.embed_tokens.weight' is stored with the strides [1, 4] for the shape [4, 2]; save it after .contiguous()",
        ),
    ] {
        let error = convert_folder(&data_folder().join(folder), &options(TensorType::F32));
        assert_eq!(error.unwrap_err(), sentence);
    }
}

#[test]
fn a_damaged_archive_is_an_error() {
    let whole = std::fs::read(data_folder().join("bf16/pytorch_model.bin")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    for end in (0..whole.len()).step_by(997) {
        std::fs::write(&path, &whole[..end]).unwrap();
        assert!(
            convert_folder(folder.path(), &options(TensorType::F32)).is_err(),
            "{end}"
        );
    }
}

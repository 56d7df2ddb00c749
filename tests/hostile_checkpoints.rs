//! Bad checkpoints through `mor convert`: each one sentence and exit code 1, and no file.
#![cfg(all(feature = "cli", feature = "convert"))]

mod common;
#[path = "hostile/support.rs"]
mod support;

use common::cases::case_folder;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::path::Path;
use support::*;

const CASE: &str = "expert_middle_cycle";

/// `mor convert` refuses the folder and leaves nothing behind.
#[track_caller]
fn refuse(desk: &Desk, folder: &Path, phrase: &str) {
    let out = desk.arg("out.gguf");
    refuses(&["convert", folder.to_str().unwrap(), "-o", &out], phrase);
    let left = std::fs::read_dir(desk.path("")).unwrap();
    let left = left.map(|e| e.unwrap().file_name().into_string().unwrap());
    let left: Vec<_> = left
        .filter(|n| n.starts_with("out.") || n.ends_with("part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The case with its tensors changed: each is kept with a shape, or left out.
fn respelled(
    desk: &Desk,
    name: &str,
    change: impl Fn(&str, Vec<usize>) -> Option<Vec<usize>>,
) -> std::path::PathBuf {
    let folder = desk.copy(&case_folder(CASE), name);
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let kept = file.iter().filter_map(|(name, tensor)| {
        let shape = change(name, tensor.shape().to_vec())?;
        let view = TensorView::new(tensor.dtype(), shape, tensor.data()).unwrap();
        Some((name.to_owned(), view))
    });
    let kept: Vec<_> = kept.collect();
    std::fs::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
    folder
}

#[test]
fn folders_without_a_checkpoint() {
    let desk = Desk::new();
    refuse(&desk, &desk.path("missing"), "No such file");
    std::fs::create_dir(desk.path("empty")).unwrap();
    refuse(&desk, &desk.path("empty"), "holds no model.safetensors");
    let text = desk.file("text.txt", "It is a truth");
    refuse(&desk, Path::new(&text), "neither safetensors");
    let none = desk.file("none.txt", "");
    refuse(&desk, Path::new(&none), "neither safetensors");
}

/// To open one would wait for its writer.
#[cfg(unix)]
#[test]
fn pipes_in_place_of_files() {
    let desk = Desk::new();
    let pipe = |path: &Path| {
        let made = std::process::Command::new("mkfifo").arg(path).status();
        assert!(made.unwrap().success());
    };
    let folder = desk.copy(&case_folder(CASE), "shard");
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    pipe(&folder.join("model-00001-of-00001.safetensors"));
    refuse(&desk, &folder, "a pipe or a socket");
    let named = desk.path("named");
    std::fs::create_dir(&named).unwrap();
    pipe(&named.join("tokenizer.json"));
    let good = case_folder(CASE);
    let (good, named) = (good.to_str().unwrap(), named.to_str().unwrap());
    let out = desk.arg("out.gguf");
    let args = ["convert", good, "--tokenizer", named, "-o", &out];
    refuses(&args, "a pipe or a socket");
}

#[test]
fn tensors_that_are_missing_or_of_a_wrong_shape() {
    let desk = Desk::new();
    for (i, part) in [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "layers.0.self_attn.q_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "router",
    ]
    .into_iter()
    .enumerate()
    {
        let without = |name: &str, shape| (!name.contains(part)).then_some(shape);
        let folder = respelled(&desk, &format!("without-{i}"), without);
        refuse(&desk, &folder, "cannot convert");
        // The same numbers as one row: every count of bytes is right.
        let flat = |name: &str, shape: Vec<usize>| {
            let weights = shape.iter().product();
            Some(if name.contains(part) {
                vec![1, 1, weights]
            } else {
                shape
            })
        };
        let folder = respelled(&desk, &format!("flat-{i}"), flat);
        refuse(&desk, &folder, "cannot convert");
    }
}

#[test]
fn truncated_and_garbled_safetensors() {
    let desk = Desk::new();
    let folder = desk.copy(&case_folder(CASE), "short");
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(5000) {
        std::fs::write(&path, &bytes[..length]).unwrap();
        refuse(&desk, &folder, "not a sound safetensors file");
    }
    for length in [u64::MAX, 1 << 62, bytes.len() as u64] {
        std::fs::write(&path, patch(&bytes, 0, &length.to_le_bytes())).unwrap();
        refuse(&desk, &folder, "not a sound safetensors file");
    }
}

#[test]
fn configurations_that_are_not_what_they_should_be() {
    let desk = Desk::new();
    for (i, (file, text, phrase)) in [
        ("config.json", "hidden_size: 32", "not sound JSON"),
        ("config.json", "", "not sound JSON"),
        (
            "config.json",
            "{\"num_attention_heads\": \"many\"}",
            "num_attention_heads",
        ),
        (
            "config.json",
            "{\"num_attention_heads\": 0}",
            "cannot convert",
        ),
        (
            "config.json",
            "{\"num_attention_heads\": -1}",
            "num_attention_heads",
        ),
        ("mor.yaml", "recursive: [1, 2", "not sound YAML"),
        ("mor.yaml", "a: b: c: {", "not sound YAML"),
        (
            "mor.yaml",
            "recursive: {enable: true, num_recursion: 0}",
            "cannot convert",
        ),
        (
            "mor.yaml",
            "recursive: {enable: true, num_recursion: 99999999999}",
            "cannot convert",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = desk.copy(&case_folder(CASE), &i.to_string());
        std::fs::write(folder.join(file), text).unwrap();
        refuse(&desk, &folder, phrase);
    }
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    for file in ["config.json", "mor.yaml"] {
        let folder = desk.copy(&case_folder(CASE), &format!("deep-{file}"));
        std::fs::write(folder.join(file), &deep).unwrap();
        refuse(&desk, &folder, "not sound");
    }
}

/// A zip of uncompressed files, as `torch.save` writes it.
fn stored_zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in files {
        let at = out.len() as u32;
        let mut common = vec![10, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        common.extend(crc32(bytes).to_le_bytes());
        common.extend((bytes.len() as u32).to_le_bytes());
        common.extend((bytes.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name.as_bytes());
        out.extend(*bytes);
        directory.extend(b"PK\x01\x02\x0a\0");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (at, count) = (out.len() as u32, (files.len() as u16).to_le_bytes());
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend(count);
    out.extend(count);
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend([0, 0]);
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| {
            (c >> 1) ^ (0xedb8_8320 & (c & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(!0, step)
}

#[test]
fn pickles_that_import_or_are_broken() {
    let desk = Desk::new();
    let witness = desk.arg("witness");
    let shell = format!("\u{80}\u{2}cposix\nsystem\n(S'touch {witness}'\ntR.");
    // In Latin-1, as pickles are.
    let shell: Vec<u8> = shell.chars().map(|c| c as u8).collect();
    for (i, (pickle, phrase)) in [
        (&shell[..], "posix"),
        (b"\x80\x02cbuiltins\neval\n(S'1'\ntR.", "builtins"),
        (b"\x80\x02", "cannot convert"),
        (b"", "cannot convert"),
        (b"no pickle at all", "cannot convert"),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = desk.copy(&case_folder(CASE), &i.to_string());
        std::fs::remove_file(folder.join("model.safetensors")).unwrap();
        let zip = stored_zip(&[("archive/data.pkl", pickle), ("archive/version", b"3\n")]);
        std::fs::write(folder.join("pytorch_model.bin"), zip).unwrap();
        refuse(&desk, &folder, phrase);
    }
    assert!(!Path::new(&witness).exists(), "the pickle was executed");
    let folder = desk.copy(&case_folder(CASE), "no-zip");
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    for bytes in [&b"PK"[..], b"PK\x03\x04 and nothing more", b"plain"] {
        std::fs::write(folder.join("pytorch_model.bin"), bytes).unwrap();
        refuse(&desk, &folder, "cannot convert");
    }
}

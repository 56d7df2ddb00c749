//! Bad input through the program: each one sentence and exit code 1, never a panic.
#![cfg(all(feature = "cli", feature = "convert"))]

mod common;
#[path = "hostile/support.rs"]
mod support;

use common::cases::{case_folder, gguf_bytes};
use mor::gguf::{Array, Value};
use mor::quant::TensorType;
use std::path::Path;
use support::*;

const CASE: &str = "expert_middle_cycle";

fn sound() -> Vec<u8> {
    gguf_bytes(CASE, TensorType::F32)
}

/// A model that can write: letters, and a tokenizer of the SentencePiece kind for them.
fn speaking() -> Vec<u8> {
    let mut draft = Draft::of(&sound());
    let letters = (b'a'..=b'z').map(|c| char::from(c).to_string());
    let mut tokens: Vec<String> = vec![
        "<unk>".into(),
        "<s>".into(),
        "</s>".into(),
        "\u{2581}".into(),
    ];
    tokens.extend(letters);
    tokens.extend((tokens.len()..96).map(|i| format!("spare{i}")));
    let kinds = (0..96)
        .map(|i| match i {
            0 => 2,
            1 | 2 => 3,
            _ => 1,
        })
        .collect();
    let mut set = |key: &str, value| {
        draft
            .metadata
            .insert(format!("tokenizer.ggml.{key}"), value)
    };
    set("model", Value::String("llama".into()));
    set("tokens", tokens.into());
    set("scores", Value::Array(Array::F32(vec![0.0; 96])));
    set("token_type", Value::Array(Array::I32(kinds)));
    set("bos_token_id", Value::U32(1));
    set("eos_token_id", Value::U32(2));
    set("unknown_token_id", Value::U32(0));
    draft.bytes()
}

/// Every command that opens a model refuses the one at `model`.
#[track_caller]
fn all_refuse(desk: &Desk, model: &str, phrase: &str) {
    let tokens = desk.file("tokens.txt", "1 2 3 0\n");
    let out = desk.arg("out.safetensors");
    refuses(&["inspect", model], phrase);
    refuses(&["plan", model, "-c", "16"], phrase);
    refuses(&["run", model, "-p", "a"], phrase);
    refuses(&["chat", model], phrase);
    refuses(&["perplexity", model, &tokens], phrase);
    refuses(&["eval", model, "--tokens", &tokens, "-o", &out], phrase);
    refuses(
        &["generate-tokens", model, "--tokens", &tokens, "-n", "2"],
        phrase,
    );
    assert!(!Path::new(&out).exists());
}

#[test]
fn what_is_no_model() {
    let desk = Desk::new();
    all_refuse(
        &desk,
        &desk.arg("missing.gguf"),
        "No such file or directory (os error 2); check the spelling of its path",
    );
    all_refuse(&desk, &desk.file("empty.gguf", ""), "is empty");
    all_refuse(
        &desk,
        &desk.file("text.gguf", "It is a truth"),
        "does not begin with 'GGUF'",
    );
    all_refuse(&desk, &desk.file("short.gguf", "GG"), "ends");
    let folder = case_folder(CASE);
    all_refuse(&desk, folder.to_str().unwrap(), "is a folder");
    let wrong = patch(&sound(), 0, b"GGML");
    all_refuse(
        &desk,
        &desk.file("magic.gguf", wrong),
        "does not begin with 'GGUF'",
    );
}

#[test]
fn truncation_at_every_thousandth_byte() {
    let (desk, bytes) = (Desk::new(), sound());
    for length in (0..bytes.len() - 32).step_by(1000).skip(1) {
        let model = desk.file("short.gguf", &bytes[..length]);
        refuses(&["inspect", &model], "the file is damaged");
    }
}

#[test]
fn misleading_files() {
    let (desk, bytes) = (Desk::new(), sound());
    let huge = u64::MAX.to_le_bytes();
    let (q, k) = ("blk.0.attn_q.weight", "blk.0.attn_k.weight");
    let offset = |name| bytes[type_at(&bytes, name) + 4..][..8].to_vec();
    let odd = u64::from_le_bytes(offset(q).try_into().unwrap()) + 4;
    let gemma = {
        let mut draft = Draft::of(&bytes);
        draft
            .metadata
            .insert("general.architecture", Value::String("gemma3".into()));
        draft.bytes()
    };
    let cases = [
        (
            "tensor count",
            patch(&bytes, 8, &huge),
            "the number of tensors",
        ),
        (
            "metadata count",
            patch(&bytes, 16, &huge),
            "the number of metadata entries",
        ),
        ("key length", patch(&bytes, 24, &huge), "a metadata key"),
        (
            "overlap",
            patch(&bytes, type_at(&bytes, k) + 4, &offset(q)),
            "overlap",
        ),
        (
            "misaligned",
            patch(&bytes, type_at(&bytes, q) + 4, &odd.to_le_bytes()),
            "not a multiple of the alignment",
        ),
        (
            "type",
            patch(&bytes, type_at(&bytes, q), &999u32.to_le_bytes()),
            "number 999",
        ),
        (
            "IQ2_XXS",
            patch(&bytes, type_at(&bytes, q), &16u32.to_le_bytes()),
            "IQ2_XXS",
        ),
        ("gemma", gemma, "architecture 'gemma3'"),
    ];
    for (name, bytes, phrase) in cases {
        all_refuse(&desk, &desk.file(&format!("{name}.gguf"), bytes), phrase);
    }
}

/// A name in a file must not be able to write lines of its own, nor to speak to the terminal.
#[test]
fn names_with_line_ends_stay_on_one_line() {
    let (desk, bytes) = (Desk::new(), sound());
    let hostile = "x\nmor: all is well\n\u{1b}[31m";
    for key in [
        "general.architecture",
        "mor.router.kind",
        "mor.recursion.sharing",
    ] {
        let mut draft = Draft::of(&bytes);
        draft.metadata.insert(key, Value::String(hostile.into()));
        let model = desk.file("names.gguf", draft.bytes());
        refuses(&["inspect", &model], "not supported");
        let (_, text) = mor(&["inspect", &model]);
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }
}

#[test]
fn weights_that_are_not_numbers() {
    let (desk, bytes) = (Desk::new(), sound());
    let tokens = desk.file("tokens.txt", "1 2 3 0\n");
    let out = desk.arg("out.safetensors");
    for (name, value) in [
        ("token_embd.weight", f32::NAN),
        ("output_norm.weight", f32::INFINITY),
        ("router.0.weight", f32::NAN),
        ("blk.1.ffn_down.weight", f32::NEG_INFINITY),
    ] {
        let mut draft = Draft::of(&bytes);
        let tensor = draft.tensors.iter_mut().find(|(plan, _)| plan.name == name);
        tensor.unwrap().1[..4].copy_from_slice(&value.to_le_bytes());
        let model = desk.file("nan.gguf", draft.bytes());
        let phrase = "not finite";
        refuses(
            &[
                "eval", &model, "--tokens", &tokens, "-o", &out, "--cut", "0",
            ],
            phrase,
        );
        refuses(
            &[
                "generate-tokens",
                &model,
                "--tokens",
                &tokens,
                "-n",
                "2",
                "--cut",
                "0",
            ],
            phrase,
        );
    }
}

#[test]
fn values_of_the_command_line() {
    let desk = Desk::new();
    let model = desk.file("model.gguf", speaking());
    let tokens = desk.file("tokens.txt", "1 2 3\n4 5\n");
    let out = desk.arg("out.safetensors");
    let huge = usize::MAX.to_string();
    let eval = |more: &[&str], phrase: &str| {
        let all = [&["eval", &model, "--tokens", &tokens, "-o", &out], more].concat();
        refuses(&all, phrase);
    };
    eval(&["--cut", "2"], "between 0 and 1");
    eval(&["--cut", "nan"], "between 0 and 1");
    eval(&["--cut=-0.5"], "between 0 and 1");
    eval(&["--cut", "-0.5"], "between 0 and 1");
    eval(&["--max-depth", "9"], "depth limit is 9");
    eval(&["--max-depth", "0"], "depth limit is 0");
    eval(&["-t", "100000"], "threads");
    // The library's 0 is its default.
    for (command, option) in [
        (&["plan", &model][..], "--batch"),
        (&["plan", &model], "--threads"),
        (
            &["eval", &model, "--tokens", &tokens, "-o", &out],
            "--threads",
        ),
        (&["run", &model, "-p", "", "-n", "1"], "--threads"),
    ] {
        let (code, text) = mor(&[command, &[option, "0"]].concat());
        assert!(code == 2 && text.contains(option), "{code}, {text}");
    }
    eval(&["--kv", "q8_0"], "no multiple of 32");
    let generate = ["generate-tokens", &model, "--tokens", &tokens, "-n", &huge];
    refuses(&generate, "context");
    refuses(
        &["plan", &model, "-c", "0x10"].map(|a| if a == "0x10" { &*huge } else { a }),
        "context",
    );
    refuses(
        &["plan", &model, "-c", "16", "--sequences", "0"],
        "sequences",
    );
    refuses(
        &["plan", &model, "-c", "16", "--sequences", &huge],
        "sequences",
    );
    refuses(&["run", &model, "-p", "It", "--temp=-1"], "temperature");
    refuses(&["run", &model, "-p", "It", "--temp", "-1"], "temperature");
    refuses(&["run", &model, "-p", "It", "-c", "0"], "holds nothing");
    refuses(&["plan", &model, "-c", "0"], "holds nothing");
    refuses(&["chat", &model, "-c", "0"], "holds nothing");
    refuses(&["run", &model, "-p", "It", "--temp", "nan"], "temperature");
    refuses(&["run", &model, "-p", "It", "--top-p", "2"], "top-p");
    refuses(&["run", &model, "-p", "It", "--min-p", "2"], "min-p");
    refuses(
        &["run", &model, "-p", "It", "--repeat-penalty", "0"],
        "repetition penalty",
    );
    refuses(
        &["run", &model, "-p", "It", "--max-depth", "9"],
        "depth limit is 9",
    );
    refuses(&["run", &model, "-p", "It", "-c", &huge], "context");
    refuses(
        &[
            "run",
            &model,
            "-p",
            "It is a truth universally acknowledged",
            "-c",
            "2",
        ],
        "larger context",
    );
}

#[test]
fn wrong_usage_is_told_apart() {
    for args in [
        &["run", "--no-such-option"][..],
        &["frobnicate"],
        &["eval"],
        &["run", "-p", "It", "--temp", "warm"],
        &["run", "-p", "It", "-n", "-3"],
        &["run", "-p", "It", "-n", "many"],
        &["convert", "model", "-o", "out", "--type", "q3"],
        &["convert", "model", "-o", "out", "--type", "q6_k"],
        &["convert", "model", "-o", "out", "--kind", "foo"],
        &["convert", "model", "-o", "out", "--sharing", "spiral"],
        &["plan", "--kv", "q2"],
        &[],
    ] {
        let (code, text) = mor(args);
        assert_eq!(code, 2, "{args:?}: {text}");
    }
}

#[test]
fn token_files() {
    let desk = Desk::new();
    let model = desk.file("model.gguf", sound());
    let out = desk.arg("out.safetensors");
    let refuse = |tokens: &str, phrase: &str| {
        refuses(&["eval", &model, "--tokens", tokens, "-o", &out], phrase);
        let capacity = ["--routing", "capacity"];
        let eval = ["eval", &model, "--tokens", tokens, "-o", &out];
        refuses(&[&eval[..], &capacity].concat(), phrase);
        refuses(
            &["generate-tokens", &model, "--tokens", tokens, "-n", "2"],
            phrase,
        );
    };
    refuse(
        &desk.file("outside.txt", "1 2 96\n"),
        "line 1: the model has no token 96; its vocabulary ends at 95",
    );
    refuse(
        &desk.file("last.txt", "1 2\n4294967295"),
        "the model has no token",
    );
    refuse(
        &desk.file("words.txt", "1 2\nthree 4\n"),
        "line 2: 'three' is no token id",
    );
    refuse(&desk.file("minus.txt", "1 -2\n"), "'-2' is no token id");
    refuse(&desk.file("large.txt", "99999999999\n"), "is no token id");
    refuse(&desk.file("empty.txt", ""), "holds no token ids");
    refuse(&desk.file("blank.txt", " \n\n\t\n"), "holds no token ids");
    refuse(&desk.file("bytes.txt", [0xff, 0xfe, 0]), "no UTF-8");
    refuse(&desk.file("escape.txt", "1 \u{1b}[2J\n"), "is no token id");
    refuse(&desk.arg("missing.txt"), "check the spelling of its path");
    refuse(desk.path("").to_str().unwrap(), "give a file");
}

#[test]
fn places_that_cannot_be_written() {
    let desk = Desk::new();
    let model = desk.file("model.gguf", sound());
    let tokens = desk.file("tokens.txt", "1 2 3\n");
    let case = case_folder(CASE);
    let case = case.to_str().unwrap();
    refuses(
        &[
            "eval",
            &model,
            "--tokens",
            &tokens,
            "-o",
            &desk.arg("no/out.safetensors"),
        ],
        "cannot write",
    );
    refuses(
        &["convert", case, "-o", &desk.arg("no/out.gguf")],
        "there is no folder",
    );
    refuses(
        &["convert", case, "-o", desk.path("").to_str().unwrap()],
        "cannot",
    );
}

/// What is no regular file is neither replaced nor written to.
#[cfg(unix)]
#[test]
fn special_files_as_output() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    let desk = Desk::new();
    let model = desk.file("model.gguf", sound());
    let tokens = desk.file("tokens.txt", "1 2 3\n");
    let case = case_folder(CASE);
    let case = case.to_str().unwrap();
    let name = std::ffi::CString::new(desk.arg("pipe")).unwrap();
    // SAFETY: the name is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    std::fs::create_dir(desk.path("folder")).unwrap();
    symlink("pipe", desk.path("to-pipe")).unwrap();
    symlink("folder", desk.path("to-folder")).unwrap();
    symlink("second", desk.path("first")).unwrap();
    symlink("first", desk.path("second")).unwrap();
    for (name, phrase) in [
        ("pipe", "a device, a pipe or a socket"),
        ("to-pipe", "a device, a pipe or a socket"),
        ("to-folder", "a folder"),
        ("first", "a circle of symbolic links"),
    ] {
        let out = desk.arg(name);
        refuses(&["convert", case, "-o", &out], phrase);
        refuses(&["convert", &model, "-o", &out], phrase);
        refuses(&["eval", &model, "--tokens", &tokens, "-o", &out], phrase);
        let kind = std::fs::symlink_metadata(desk.path(name)).unwrap();
        let kind = kind.file_type();
        assert!(kind.is_fifo() || name != "pipe" && kind.is_symlink());
    }
    assert_eq!(std::fs::read_dir(desk.path("")).unwrap().count(), 8);
}

#[cfg(unix)]
#[test]
fn a_link_as_output_stays_and_leads_to_the_new_file() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let desk = Desk::new();
    let model = desk.file("model.gguf", sound());
    let tokens = desk.file("tokens.txt", "1 2 3\n");
    let usual = std::fs::metadata(&tokens).unwrap().permissions();
    std::fs::create_dir(desk.path("real")).unwrap();
    symlink("real/out", desk.path("link")).unwrap();
    symlink(desk.path("link"), desk.path("link-to-link")).unwrap();
    let out = desk.arg("link-to-link");
    // A file that does not exist yet, then one that does.
    for _ in 0..2 {
        for args in [
            &["convert", &model, "-o", &out][..],
            &["eval", &model, "--tokens", &tokens, "-o", &out],
        ] {
            let (code, text) = mor(args);
            assert_eq!(code, 0, "{args:?}: {text}");
            assert!(desk.path("link").is_symlink() && desk.path("link-to-link").is_symlink());
            let file = std::fs::symlink_metadata(desk.path("real/out")).unwrap();
            assert!(file.is_file() && file.len() > 100);
            assert_eq!(file.permissions().mode(), usual.mode(), "{args:?}");
        }
    }
    assert_eq!(std::fs::read_dir(desk.path("real")).unwrap().count(), 1);
}

/// A file that opens for nobody is not written either.
#[test]
fn models_that_would_not_open() {
    let desk = Desk::new();
    let draft = Draft::of(&sound());
    let out = desk.arg("out.gguf");
    for name in [
        "blk.1.attn_k.weight",
        "output_norm.weight",
        "router.1.weight",
    ] {
        let mut draft = draft.clone();
        draft.tensors.retain(|(plan, _)| plan.name != name);
        let model = desk.file("model.gguf", draft.bytes());
        refuses(&["convert", &model, "-o", &out], "missing");
        let mut draft = draft.clone();
        draft.metadata.insert("mor.embedding_length", 16u32);
        let model = desk.file("model.gguf", draft.bytes());
        refuses(&["convert", &model, "-o", &out], "shape");
        assert_eq!(std::fs::read_dir(desk.path("")).unwrap().count(), 1);
    }
}

/// The program with its standard output sent elsewhere.
#[cfg(target_os = "linux")]
fn mor_to(args: &[&str], stdout: std::process::Stdio) -> (i32, String) {
    use std::process::{Command, Stdio};
    let child = Command::new(env!("CARGO_BIN_EXE_mor"))
        .args(args)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), text)
}

#[cfg(target_os = "linux")]
#[test]
fn a_standard_output_that_is_full_or_closed() {
    let desk = Desk::new();
    let model = &*desk.file("model.gguf", speaking());
    let tokens = &*desk.file("tokens.txt", "1 2 3\n");
    let text = &*desk.file(
        "text.txt",
        "it is a truth universally acknowledged ".repeat(20),
    );
    for args in [
        &["inspect", model][..],
        &["inspect", model, "--tensors"],
        &["inspect", model, "--json"],
        &["plan", model],
        &["plan", model, "--json"],
        &["perplexity", model, text, "-c", "32"],
        &["perplexity", model, text, "-c", "32", "--json"],
        &["perplexity", model, text, "-c", "32", "--against", model],
        &["generate-tokens", model, "--tokens", tokens, "-n", "2"],
        &["run", model, "-p", "it", "-n", "2"],
        &["help"],
        &["run", "--help"],
        &["--version"],
    ] {
        let full = std::fs::File::create("/dev/full").unwrap();
        let (code, text) = mor_to(args, full.into());
        assert_eq!(code, 1, "{args:?}: {text}");
        assert!(
            text.starts_with("mor: cannot write to standard output: ") && text.lines().count() == 1,
            "{args:?}: {text}"
        );
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (code, text) = mor_to(args, writer.into());
        assert_eq!(code, 0, "{args:?}: {text}");
        assert!(!text.contains("panicked"), "{args:?}: {text}");
    }
}

#[test]
fn texts_for_perplexity() {
    let desk = Desk::new();
    let tokenizer = common::root().join("tests/data/tokenizer/smollm.gguf");
    refuses(&["inspect", tokenizer.to_str().unwrap()], "is missing");
    let model = desk.file("model.gguf", sound());
    let text = desk.file("text.txt", "It is a truth.");
    refuses(&["perplexity", &model, &text], "tokenizer");
    refuses(&["run", &model, "-p", "a"], "tokenizer");
    let inside = &*desk.file("speaking.gguf", speaking());
    refuses(&["perplexity", inside, &desk.arg("no.txt")], "cannot read");
    refuses(&["perplexity", inside, &text], "at least two windows");
    refuses(
        &["perplexity", inside, &text, "-c", "3"],
        "at least 4 tokens",
    );
    refuses(
        &["perplexity", inside, &text, "-c", &usize::MAX.to_string()],
        "two windows",
    );
}

#[test]
fn bases_for_perplexity() {
    let desk = Desk::new();
    let model = &*desk.file("speaking.gguf", speaking());
    let text = &*desk.file("text.txt", "it is a truth ".repeat(20));
    let against = |base: &str, phrase: &str| {
        let args = ["perplexity", model, text, "-c", "32", "--against", base];
        refuses(&args, phrase);
    };
    against(&desk.arg("no.gguf"), "check the spelling of its path");
    against(text, "GGUF");
    let inside = common::default_model();
    against(
        inside.to_str().unwrap(),
        "a vocabulary of 4096 tokens, the model of 96; give a base of the same vocabulary",
    );
    let mut other = Draft::of(&speaking());
    let tokens = other.metadata.get("tokenizer.ggml.tokens").unwrap();
    let Value::Array(Array::String(tokens)) = tokens else {
        panic!("tokens are strings");
    };
    let swapped = tokens.iter().map(|token| match token {
        "i" => "t".to_string(),
        "t" => "i".to_string(),
        other => other.to_string(),
    });
    let swapped: Vec<String> = swapped.collect();
    other.metadata.insert("tokenizer.ggml.tokens", swapped);
    against(
        &desk.file("other.gguf", other.bytes()),
        "as other tokens than the model; give a base of the same tokenizer",
    );
}

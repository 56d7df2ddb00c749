//! Tokenizers of the output, from Hugging Face's files and from other GGUF files.

use std::path::{Path, PathBuf};

use mor::convert::ConvertOptions;
use mor::gguf::Gguf;
use mor::quant::TensorType;
use mor::tokenizer::{EncodeOptions, Tokenizer};
use serde_json::{Value, json};

use crate::support::*;

/// A vanilla model whose embedding has `rows` rows.
fn model_with_rows(rows: usize) -> Copy {
    let mut copy = Copy::of("vanilla");
    copy.replace_in(
        "config.json",
        "\"vocab_size\": 96",
        &format!("\"vocab_size\": {rows}"),
    );
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let (shape, bytes) = copy.tensor(name);
        shape[0] = rows;
        bytes.resize(rows * shape[1] * 4, 0);
    }
    copy
}

fn with_tokenizer(path: &Path) -> ConvertOptions {
    ConvertOptions {
        tokenizer: Some(path.to_path_buf()),
        ..options(TensorType::Q8_0)
    }
}

fn gguf_file(pre: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/tokenizer")
        .join(format!("{pre}.gguf"))
}

fn metadata_of(path: &Path) -> mor::gguf::Metadata {
    Gguf::parse(&std::fs::read(path).unwrap()).unwrap().metadata
}

#[test]
fn the_checkpoints_own_tokenizer_json_is_found() {
    let copy = model_with_rows(320);
    let data = data_folder().join("tokenizer");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(data.join(file), copy.path().join(file)).unwrap();
    }
    let converted = copy.convert(&options(TensorType::F16)).unwrap();
    let m = converted.gguf().metadata;
    assert_eq!(m.require_str("tokenizer.ggml.pre").unwrap(), "smollm");
    assert_eq!(m.require_u32("tokenizer.ggml.bos_token_id").unwrap(), 0);
    assert_eq!(m.require_u32("tokenizer.ggml.eos_token_id").unwrap(), 2);
    assert_eq!(m.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
    assert_eq!(
        m.require_str("tokenizer.chat_template").unwrap(),
        "{{ messages[0].content }}"
    );
    assert_eq!(
        m.require_strings("tokenizer.ggml.tokens").unwrap().len(),
        320
    );
    assert!(
        converted
            .notes
            .iter()
            .any(|n| n.contains("filled with unused tokens"))
    );
    let tokenizer = Tokenizer::from_metadata(&m).unwrap();
    let expected = std::fs::read_to_string(data.join("expected.json")).unwrap();
    let expected: Vec<(String, Vec<u32>)> = serde_json::from_str(&expected).unwrap();
    for (text, ids) in expected {
        let how = EncodeOptions {
            add_special: true,
            parse_special: true,
        };
        assert_eq!(tokenizer.encode(&text, how).unwrap(), ids, "{text}");
    }
}

#[test]
fn without_a_tokenizer_the_file_says_so() {
    let converted = convert_folder(&case_folder("vanilla"), &options(TensorType::F32)).unwrap();
    assert!(converted.notes.contains(
        &"There is no tokenizer, so the file can be evaluated by token ids only.".to_string()
    ));
}

#[test]
fn a_gguf_files_tokenizer_is_copied() {
    for name in ["smollm", "spm"] {
        let path = gguf_file(name);
        let wanted = metadata_of(&path);
        let count = wanted
            .require_strings("tokenizer.ggml.tokens")
            .unwrap()
            .len();
        for rows in [count, count + 7] {
            let copy = model_with_rows(rows);
            let m = copy
                .convert(&with_tokenizer(&path))
                .unwrap()
                .gguf()
                .metadata;
            let tokens = m.require_strings("tokenizer.ggml.tokens").unwrap();
            assert_eq!(tokens.len(), rows);
            let wanted_tokens = wanted.require_strings("tokenizer.ggml.tokens").unwrap();
            assert!(tokens.iter().take(count).eq(wanted_tokens.iter()), "{name}");
            assert_eq!(
                m.i32s("tokenizer.ggml.token_type").unwrap().unwrap().len(),
                rows
            );
            for key in [
                "tokenizer.ggml.merges",
                "tokenizer.ggml.model",
                "tokenizer.ggml.pre",
            ] {
                assert_eq!(m.get(key), wanted.get(key), "{name}: {key}");
            }
        }
    }
}

#[test]
fn a_vocabulary_that_does_not_fit_is_refused_with_both_numbers() {
    let path = gguf_file("smollm");
    let count = metadata_of(&path)
        .require_strings("tokenizer.ggml.tokens")
        .unwrap()
        .len();
    for path in [path, data_folder().join("tokenizer/tokenizer.json")] {
        let count = if path.extension().unwrap() == "json" {
            288
        } else {
            count
        };
        let error = convert_folder(&case_folder("vanilla"), &with_tokenizer(&path)).unwrap_err();
        assert_eq!(
            error,
            format!(
                "cannot convert: the tokenizer '{}' has {count} tokens, but the embedding has 96 rows; give the tokenizer of this model",
                path.file_name().unwrap().to_str().unwrap()
            )
        );
    }
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn split(regex: &str) -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
        byte_level(false),
    ]})
}

/// A vocabulary as Hugging Face spells it, made from a GGUF file's.
fn as_json(m: &mor::gguf::Metadata, pre_tokenizer: Value, pairs: bool) -> Value {
    let tokens = m.require_strings("tokenizer.ggml.tokens").unwrap();
    let types = m.i32s("tokenizer.ggml.token_type").unwrap().unwrap();
    let (mut vocab, mut added) = (serde_json::Map::new(), Vec::new());
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        if kind == 1 {
            vocab.insert(token.to_owned(), id.into());
        } else {
            added.push(json!({"id": id, "content": token, "special": kind == 3}));
        }
    }
    let merges: Vec<Value> = m
        .require_strings("tokenizer.ggml.merges")
        .unwrap()
        .iter()
        .map(|merge| match merge.split_once(' ').filter(|_| pairs) {
            Some((a, b)) => json!([a, b]),
            None => json!(merge),
        })
        .collect();
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": tokens[0], "type_id": 0}}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    })
}

#[test]
fn every_known_way_of_cutting_words_is_recognized() {
    let digits = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true}, byte_level(true)]});
    let ways = [
        ("gpt-2", byte_level(true)),
        ("smollm", digits),
        ("llama-bpe", split(LLAMA3)),
        ("qwen2", split(&LLAMA3.replace("{1,3}", ""))),
    ];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    for (pre, way) in ways {
        let wanted = metadata_of(&gguf_file(pre));
        let tokens = wanted.require_strings("tokenizer.ggml.tokens").unwrap();
        let copy = model_with_rows(tokens.len());
        for pairs in [false, true] {
            std::fs::write(&file, as_json(&wanted, way.clone(), pairs).to_string()).unwrap();
            let m = copy
                .convert(&with_tokenizer(&file))
                .unwrap()
                .gguf()
                .metadata;
            assert_eq!(m.require_str("tokenizer.ggml.pre").unwrap(), pre);
            assert_eq!(m.bool("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
            assert_eq!(m.require_strings("tokenizer.ggml.tokens").unwrap(), tokens);
            for key in ["tokenizer.ggml.merges", "tokenizer.ggml.model"] {
                assert_eq!(m.get(key), wanted.get(key), "{pre}: {key}");
            }
            assert_eq!(
                m.i32s("tokenizer.ggml.token_type").unwrap(),
                wanted.i32s("tokenizer.ggml.token_type").unwrap()
            );
        }
    }
}

#[test]
fn unknown_tokenizers_are_refused_in_one_sentence() {
    let wanted = metadata_of(&gguf_file("gpt-2"));
    let rows = wanted
        .require_strings("tokenizer.ggml.tokens")
        .unwrap()
        .len();
    let copy = model_with_rows(rows);
    let good = as_json(&wanted, byte_level(true), false);
    let spoiled = [
        (
            "/pre_tokenizer",
            split(r"\S+"),
            "cuts text into words in an unknown way (Split, ByteLevel)",
        ),
        (
            "/pre_tokenizer",
            json!(null),
            "cuts text into words in an unknown way ()",
        ),
        (
            "/model/type",
            json!("Unigram"),
            "is a tokenizer of type 'Unigram', not BPE",
        ),
        (
            "/normalizer",
            json!({"type": "Lowercase"}),
            "normalizes text by 'Lowercase'",
        ),
        (
            "/model/merges",
            json!(["a b c"]),
            "has the merge \"a b c\", which is not two tokens",
        ),
        (
            "/model/vocab",
            json!({"a": -1}),
            "the token 'a' in 'tokenizer.json' has the number -1",
        ),
        (
            "/model/vocab",
            json!({"a": 4_000_000_000u64}),
            "has 4000000001 tokens, but the embedding has",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    for (at, value, sentence) in spoiled {
        let mut document = good.clone();
        *document.pointer_mut(at).unwrap() = value;
        std::fs::write(&file, document.to_string()).unwrap();
        let error = copy.convert(&with_tokenizer(&file)).unwrap_err();
        assert!(error.contains(sentence), "{error}");
    }
}

#[test]
fn requantizing_can_replace_the_tokenizer() {
    let path = gguf_file("smollm");
    let rows = metadata_of(&path)
        .require_strings("tokenizer.ggml.tokens")
        .unwrap()
        .len();
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("first.gguf");
    let bytes = model_with_rows(rows)
        .convert(&options(TensorType::F32))
        .unwrap()
        .bytes;
    std::fs::write(&first, bytes).unwrap();
    let m = convert_folder(&first, &with_tokenizer(&path))
        .unwrap()
        .gguf()
        .metadata;
    assert_eq!(m.require_str("tokenizer.ggml.pre").unwrap(), "smollm");
}

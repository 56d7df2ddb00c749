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

/// Of a list of tokens that end a text each does, not the first alone.
#[test]
fn every_token_that_ends_a_text_ends_it() {
    let data = data_folder().join("tokenizer");
    let ends = |config: Value, generation: Value| {
        let copy = model_with_rows(320);
        std::fs::copy(
            data.join("tokenizer.json"),
            copy.path().join("tokenizer.json"),
        )
        .unwrap();
        let path = copy.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut document: Value = serde_json::from_str(&text).unwrap();
        document["eos_token_id"] = config;
        std::fs::write(path, document.to_string()).unwrap();
        let path = copy.path().join("generation_config.json");
        std::fs::write(path, json!({"eos_token_id": generation}).to_string()).unwrap();
        let converted = copy.convert(&options(TensorType::F16)).unwrap();
        let tokenizer = Tokenizer::from_metadata(&converted.gguf().metadata).unwrap();
        let ends = (20..320)
            .filter(|id| tokenizer.is_end(*id))
            .collect::<Vec<u32>>();
        let told = converted
            .notes
            .iter()
            .filter(|note| note.contains("said to end a text"));
        (tokenizer.eos(), ends, told.count())
    };
    assert_eq!(ends(json!(30), json!(null)), (Some(30), vec![30], 0));
    assert_eq!(
        ends(json!([31, 30]), json!(null)),
        (Some(31), vec![30, 31], 0)
    );
    assert_eq!(ends(json!(null), json!(32)), (Some(32), vec![32], 0));
    assert_eq!(
        ends(json!(30), json!([30, 33])),
        (Some(30), vec![30, 33], 0)
    );
    let (eos, found, told) = ends(json!(30), json!([31, 32, 33, 34, 999]));
    assert_eq!((eos, found.len() + told), (Some(30), 5));
}

#[test]
fn without_a_tokenizer_the_file_says_so() {
    let converted = convert_folder(&case_folder("vanilla"), &options(TensorType::F32)).unwrap();
    let told = "There is no tokenizer, so the file can be evaluated by token ids only";
    assert!(converted.notes.iter().any(|note| note.starts_with(told)));
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

/// A post-processor that puts tokens before and after a text.
fn around(before: &[(&str, usize)], after: &[(&str, usize)]) -> Value {
    let piece = |(name, _): &(&str, usize)| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let pieces = before.iter().map(piece).chain([text]);
    let pieces: Vec<Value> = pieces.chain(after.iter().map(piece)).collect();
    let tokens: serde_json::Map<String, Value> = before
        .iter()
        .chain(after)
        .map(|(name, id)| {
            (
                name.to_string(),
                json!({"id": name, "ids": [id], "tokens": [name]}),
            )
        })
        .collect();
    json!({"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": tokens})
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
        "post_processor": around(&[(&tokens[0], 0)], &[]),
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
            let mut document = as_json(&wanted, way.clone(), pairs);
            document["model"]["ignore_merges"] = json!(pre == "llama-bpe");
            let convert = |document: &Value| {
                std::fs::write(&file, document.to_string()).unwrap();
                let converted = copy.convert(&with_tokenizer(&file)).unwrap();
                (converted.gguf().metadata, converted.notes.concat())
            };
            let (m, notes) = convert(&document);
            assert_eq!(m.require_str("tokenizer.ggml.pre").unwrap(), pre);
            assert!(!notes.contains("ignore_merges"), "{notes}");
            // Whether words that are tokens are merged goes with the way that they are cut.
            document["model"]["ignore_merges"] = json!(pre != "llama-bpe");
            let (other, notes) = convert(&document);
            let other = other.require_str("tokenizer.ggml.pre").unwrap().to_string();
            match pre {
                "llama-bpe" => assert_eq!(other, "smaug-bpe"),
                _ => assert!(other == pre && notes.contains("ignore_merges is not followed")),
            }
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

/// What the post-processor puts around a text, with what tokenizer_config.json says of it.
#[test]
fn tokens_around_a_text_are_those_of_the_post_processor() {
    let wanted = metadata_of(&gguf_file("gpt-2"));
    let tokens = wanted.require_strings("tokenizer.ggml.tokens").unwrap();
    let copy = model_with_rows(tokens.len());
    let good = as_json(&wanted, byte_level(true), false);
    let name = |id: usize| tokens.get(id).unwrap();
    let token = |id: usize| (name(id), id);
    let list = |steps: Value| json!({"type": "Sequence", "processors": steps});
    let bytes = json!({"type": "ByteLevel", "trim_offsets": true});
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    let convert = |post: Value, companion: Value| {
        let mut document = good.clone();
        document["post_processor"] = post;
        std::fs::write(&file, document.to_string()).unwrap();
        let beside = folder.path().join("tokenizer_config.json");
        std::fs::write(beside, companion.to_string()).unwrap();
        let m = copy.convert(&with_tokenizer(&file))?.gguf().metadata;
        let id = |role: &str| m.u32(&format!("tokenizer.ggml.{role}_token_id")).unwrap();
        let adds = |role: &str| m.bool(&format!("tokenizer.ggml.add_{role}_token")).unwrap();
        let around = |role| id(role).filter(|_| adds(role) == Some(true));
        Ok::<_, String>((around("bos"), around("eos")))
    };
    let none = json!({});
    let named = json!({"bos_token": name(3), "eos_token": {"content": name(4)}});
    let off = json!({"bos_token": name(3), "add_bos_token": false, "add_eos_token": true, "eos_token": name(4)});
    let both = around(&[token(3)], &[token(4)]);
    let bert = json!({"type": "RobertaProcessing", "sep": [name(4), 4], "cls": [name(3), 3]});
    for (post, companion, expected) in [
        (json!(null), &named, (None, None)),
        (bytes.clone(), &named, (None, None)),
        (around(&[token(3)], &[]), &named, (Some(3), None)),
        (around(&[token(3)], &[]), &none, (Some(3), None)),
        (both.clone(), &named, (Some(3), Some(4))),
        (around(&[], &[token(4)]), &none, (None, Some(4))),
        (list(json!([bytes, both])), &none, (Some(3), Some(4))),
        (bert, &named, (Some(3), Some(4))),
        (both.clone(), &off, (None, Some(4))),
        // What is not put there need not be the other.
        (around(&[token(5)], &[]), &off, (None, Some(4))),
    ] {
        assert_eq!(
            convert(post.clone(), companion.clone()),
            Ok(expected),
            "{post} {companion}"
        );
    }
    for (post, phrase) in [
        (around(&[token(5)], &[]), "not the bos_token"),
        (around(&[], &[token(5)]), "not the eos_token"),
        (
            around(&[token(3), token(4)], &[]),
            "a token before it and one after it (TemplateProcessing)",
        ),
        (around(&[(name(3), 1 << 40)], &[]), "not the bos_token"),
        (
            list(json!([around(&[token(3)], &[]), around(&[], &[token(4)])])),
            "a token before it and one after it (TemplateProcessing)",
        ),
        (
            json!({"type": "Prefix"}),
            "a token before it and one after it (Prefix)",
        ),
    ] {
        let error = convert(post.clone(), named.clone()).unwrap_err();
        assert!(error.contains(phrase), "{post}: {error}");
    }
}

/// Qwen's config.json numbers a token with which no text begins; templates would write it.
#[test]
fn a_token_that_is_said_not_to_be_there_is_not() {
    let copy = model_with_rows(320);
    let data = data_folder().join("tokenizer");
    std::fs::copy(
        data.join("tokenizer.json"),
        copy.path().join("tokenizer.json"),
    )
    .unwrap();
    for (companion, bos) in [(json!({}), Some(0)), (json!({"bos_token": null}), None)] {
        let beside = copy.path().join("tokenizer_config.json");
        std::fs::write(beside, companion.to_string()).unwrap();
        let metadata = copy
            .convert(&options(TensorType::F16))
            .unwrap()
            .gguf()
            .metadata;
        assert_eq!(metadata.u32("tokenizer.ggml.bos_token_id").unwrap(), bos);
    }
}

/// Where the tokenizer writes an unknown token, mor writes nothing, and says so.
#[test]
fn bytes_without_a_token_are_noted() {
    let wanted = metadata_of(&gguf_file("gpt-2"));
    let tokens = wanted.require_strings("tokenizer.ggml.tokens").unwrap();
    let copy = model_with_rows(tokens.len());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    let notes = |unknown: Value, without: &[&str]| {
        let mut document = as_json(&wanted, byte_level(true), false);
        document["model"]["unk_token"] = unknown;
        let vocabulary = document["model"]["vocab"].as_object_mut().unwrap();
        for token in without {
            assert!(vocabulary.remove(*token).is_some());
        }
        std::fs::write(&file, document.to_string()).unwrap();
        let notes = copy.convert(&with_tokenizer(&file)).unwrap().notes;
        notes
            .into_iter()
            .filter(|note| note.contains("are no tokens"))
            .collect::<Vec<_>>()
    };
    assert!(notes(json!(null), &["\u{143}"]).is_empty());
    assert!(notes(json!("<unk>"), &[]).is_empty());
    let told = notes(json!("<unk>"), &["\u{143}", "\u{a1}"]);
    assert!(
        told.len() == 1 && told[0].starts_with("2 bytes are no tokens"),
        "{told:?}"
    );
}

/// Rules of added tokens that a GGUF file cannot hold are said.
#[test]
fn rules_of_added_tokens_are_noted() {
    let wanted = metadata_of(&gguf_file("gpt-2"));
    let tokens = wanted.require_strings("tokenizer.ggml.tokens").unwrap();
    let copy = model_with_rows(tokens.len());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    let mut document = as_json(&wanted, byte_level(true), false);
    document["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
    let notes = |document: &Value| {
        std::fs::write(&file, document.to_string()).unwrap();
        copy.convert(&with_tokenizer(&file)).unwrap().notes.concat()
    };
    let before = notes(&document);
    assert!(
        before.contains("NFC") && !before.contains("strip"),
        "{before}"
    );
    document["added_tokens"][0]["lstrip"] = json!(true);
    document["added_tokens"][0]["single_word"] = json!(true);
    let after = notes(&document);
    for key in ["lstrip is not followed", "single_word is not followed"] {
        assert!(after.contains(key), "{after}");
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
            "/normalizer",
            json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}),
            "normalizes text by 'Strip'",
        ),
        (
            "/model/byte_fallback",
            json!(true),
            "uses model.byte_fallback",
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
        let (parent, key) = at.rsplit_once('/').unwrap();
        document.pointer_mut(parent).unwrap()[key] = value;
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

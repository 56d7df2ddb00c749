//! Tokens of hard text, compared with what other tokenizers make of it: HF's tokenizers for the
//! byte-level vocabularies, sentencepiece for its own. `tools/golden/tokenizer.py` makes the data.

mod common;

use std::path::{Path, PathBuf};

use mor::Error;
use mor::gguf::Gguf;
use mor::tokenizer::{EncodeOptions, EncodeScratch, Tokenizer, Utf8Stream};
use serde_json::Value;

/// The committed data, or other data of the same form (`--fuzz` makes as much as one likes).
fn folder() -> PathBuf {
    std::env::var_os("MOR_TEST_TOKENIZER_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer"),
        PathBuf::from,
    )
}

fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(folder().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn tokenizer(path: &Path) -> Tokenizer {
    let bytes = std::fs::read(path).unwrap();
    Tokenizer::from_metadata(&Gguf::parse(&bytes).unwrap().metadata).unwrap()
}

fn cases() -> Vec<String> {
    serde_json::from_value(json("cases.json")).unwrap()
}

/// Encodes every case in both ways, compares, and decodes again. Returns the number of comparisons.
fn compare(tokenizer: &Tokenizer, name: &str, lossless: bool) -> usize {
    let cases = cases();
    let answers = json(&format!("{name}.json"));
    let longest = cases.iter().map(String::len).max().unwrap_or(0);
    let mut scratch = EncodeScratch::new(longest).unwrap();
    let mut out = vec![0; tokenizer.max_tokens(longest)];
    let mut compared = 0;
    for (key, parse_special) in [("plain", false), ("special", true)] {
        let options = EncodeOptions {
            add_special: false,
            parse_special,
        };
        for (index, case) in cases.iter().enumerate() {
            let expected = match &answers[key][index] {
                // The same as in the plain text, or not known.
                Value::Null if !parse_special || answers.get(key).is_none() => continue,
                Value::Null => &answers["plain"][index],
                ids => ids,
            };
            let expected: &Vec<u32> = &serde_json::from_value(expected.clone()).unwrap();
            let count = tokenizer
                .encode_into(case, options, &mut scratch, &mut out)
                .unwrap();
            assert_eq!(
                &out[..count],
                expected.as_slice(),
                "{name}, {key}: {case:?}"
            );
            assert_eq!(&tokenizer.encode(case, options).unwrap(), expected);
            if lossless {
                assert_eq!(&tokenizer.decode(expected, true).unwrap(), case);
                let mut exact = vec![0; case.len()];
                let length = tokenizer.decode_into(expected, true, &mut exact);
                assert_eq!((length.unwrap(), &exact[..]), (case.len(), case.as_bytes()));
                if let Some((_, short)) = exact.split_last_mut() {
                    let needed = tokenizer.decode_into(expected, true, short).unwrap_err();
                    assert!(
                        matches!(needed, Error::BufferTooSmall { needed, .. } if needed == case.len())
                    );
                }
                assert_eq!(&streamed(tokenizer, expected), case);
            }
            compared += 1;
        }
    }
    compared
}

/// Decodes token by token.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = Utf8Stream::new();
    let mut text = String::new();
    for &id in ids {
        let bytes = tokenizer.token_bytes(id, true).unwrap();
        stream.push(bytes, |more| text.push_str(more));
    }
    text.push_str(stream.finish());
    text
}

#[test]
fn byte_level_vocabularies() {
    for name in ["smollm", "gpt-2", "default", "llama-bpe", "qwen2"] {
        let tokenizer = tokenizer(&folder().join(format!("{name}.gguf")));
        assert!(compare(&tokenizer, name, true) >= 2 * 70, "{name}");
    }
}

#[test]
fn sentencepiece_vocabularies() {
    for name in ["spm", "spm-unknown"] {
        let tokenizer = tokenizer(&folder().join(format!("{name}.gguf")));
        assert!(compare(&tokenizer, name, false) >= 70, "{name}");
    }
}

#[test]
fn sentencepiece_decodes_what_it_encoded() {
    let tokenizer = tokenizer(&folder().join("spm.gguf"));
    for case in cases().iter().filter(|case| !case.contains('▁')) {
        let ids = tokenizer.encode(case, EncodeOptions::PLAIN).unwrap();
        assert_eq!(&tokenizer.decode(&ids, false).unwrap(), case);
    }
}

#[test]
fn begin_and_end_of_text() {
    let options = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    let spm = tokenizer(&folder().join("spm.gguf"));
    assert!(spm.add_bos() && !spm.add_eos());
    assert_eq!(spm.encode("", options).unwrap(), [1]);
    assert_eq!(spm.encode("", EncodeOptions::PLAIN).unwrap(), [0; 0]);
    assert!(spm.is_end(2) && !spm.is_end(1));
    let llama = tokenizer(&folder().join("llama-bpe.gguf"));
    let bos = llama.bos().unwrap();
    assert_eq!(llama.encode("", options).unwrap(), [bos]);
    let smollm = tokenizer(&folder().join("smollm.gguf"));
    assert!(!smollm.add_bos());
    assert_eq!(smollm.eos(), smollm.eot());
    assert!(smollm.is_end(smollm.eos().unwrap()));
    assert_eq!(smollm.encode("", options).unwrap(), [0; 0]);
}

#[test]
fn smollm2() {
    let Some(path) = std::env::var_os("MOR_TEST_SMOLLM2") else {
        common::skip(
            "tokenizer, the whole vocabulary of SmolLM2",
            "MOR_TEST_SMOLLM2 names no SmolLM2 file (49,152 tokens, gguf)",
        );
        return;
    };
    let tokenizer = tokenizer(Path::new(&path));
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.eot()),
        (Some(1), Some(2), Some(2))
    );
    let ends = (0..49_152).filter(|&id| tokenizer.is_end(id));
    println!("ends: {:?}", ends.collect::<Vec<_>>());
    assert!(tokenizer.is_end(0) && tokenizer.is_end(2) && !tokenizer.is_end(1));
    // Some control characters and planes are no tokens there, so decoding is not compared.
    assert!(compare(&tokenizer, "smollm2", false) >= 2 * 70);
}

//! A text, through tokenizers of each kind: what has a token for each byte gives it back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mor::gguf::Gguf;
use mor::{EncodeOptions, Tokenizer};
use std::sync::LazyLock;

static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    ["default", "gpt-2", "llama-bpe", "qwen2", "smollm", "spm"]
        .map(|name| {
            let root = env!("CARGO_MANIFEST_DIR");
            let bytes =
                std::fs::read(format!("{root}/../tests/data/tokenizer/{name}.gguf")).unwrap();
            Tokenizer::from_metadata(&Gguf::parse(&bytes).unwrap().metadata).unwrap()
        })
        .into()
});

fuzz_target!(|text: &str| {
    for tokenizer in &*TOKENIZERS {
        let plain = EncodeOptions {
            add_special: false,
            parse_special: false,
        };
        let all = EncodeOptions {
            add_special: true,
            parse_special: true,
        };
        let tokens = tokenizer.encode(text, plain).unwrap();
        assert!(tokens.len() <= tokenizer.max_tokens(text.len()));
        let mut bytes = Vec::new();
        for token in tokens {
            bytes.extend_from_slice(tokenizer.token_bytes(token, true).unwrap());
        }
        // A space may stand before.
        assert!(bytes.ends_with(text.as_bytes()), "came back as {bytes:?}");
        let tokens = tokenizer.encode(text, all).unwrap();
        assert!(tokens.len() <= tokenizer.max_tokens(text.len()));
    }
});

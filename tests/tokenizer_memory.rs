//! Once made, the tokenizer's working memory is all that encoding and decoding use, and no word is
//! so long that it stops being cheap.

mod common;

use std::path::Path;

use common::allocator::{Allocator, allocations};
use mor::gguf::Gguf;
use mor::tokenizer::{EncodeOptions, EncodeScratch, Tokenizer, Utf8Stream};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn tokenizer(name: &str) -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer");
    let bytes = std::fs::read(path.join(name)).unwrap();
    Tokenizer::from_metadata(&Gguf::parse(&bytes).unwrap().metadata).unwrap()
}

const VOCABULARIES: [&str; 7] = [
    "smollm.gguf",
    "gpt-2.gguf",
    "default.gguf",
    "llama-bpe.gguf",
    "qwen2.gguf",
    "spm.gguf",
    "spm-unknown.gguf",
];

const ALL: EncodeOptions = EncodeOptions {
    add_special: true,
    parse_special: true,
};

#[test]
fn nothing_is_allocated() {
    let text = "The 123 quick\tfoxes, 漢字 👩🏽‍🚀 <tool> <|im_end|>\r\n    don't!".repeat(20);
    for name in VOCABULARIES {
        let tokenizer = tokenizer(name);
        let mut scratch = EncodeScratch::new(text.len()).unwrap();
        let mut out = vec![0; tokenizer.max_tokens(text.len())];
        let mut stream = Utf8Stream::new();
        let mut decoded = 0;
        let count = allocations(|| {
            let tokens = tokenizer
                .encode_into(&text, ALL, &mut scratch, &mut out)
                .unwrap();
            for &id in &out[..tokens] {
                let bytes = tokenizer.token_bytes(id, true).unwrap();
                stream.push(bytes, |more| decoded += more.len());
            }
            decoded += stream.finish().len();
        });
        assert_eq!(count, 0, "{name}");
        assert!(decoded > text.len() / 4, "{name}");
    }
    let counted = allocations(|| drop(std::hint::black_box(vec![1u8])));
    assert_eq!(counted, 1, "the counter counts");
}

#[test]
fn too_small_memory_is_an_error() {
    for name in VOCABULARIES {
        let tokenizer = tokenizer(name);
        let mut scratch = EncodeScratch::new(3).unwrap();
        let mut out = [0; 64];
        let mut encode = |text, out: &mut [u32]| {
            tokenizer.encode_into(text, EncodeOptions::PLAIN, &mut scratch, out)
        };
        let count = encode("xyz", &mut out).unwrap();
        assert!(encode("wxyz", &mut out).is_err());
        let error = encode("xyz", &mut out[..count - 1])
            .unwrap_err()
            .to_string();
        assert!(error.contains(&format!("needs {count}")), "{error}");
        assert_eq!(encode("", &mut []).unwrap(), 0);
        // Only a piece without a break must fit, and to byte-level vocabularies a word is one.
        let words = "x y ".repeat(10);
        assert_eq!(encode(&words, &mut out).is_ok(), !name.starts_with("spm"));
    }
}

/// A megabyte in one word. Quadratic work would take hours here; the test has no other clock.
#[test]
fn long_words_are_cheap() {
    const BYTES: usize = 1 << 20;
    let mut state = 1u64;
    let random: String = (0..BYTES)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            char::from(b"theandio"[(state >> 61) as usize])
        })
        .collect();
    let texts = [
        "a".repeat(BYTES),
        " ".repeat(BYTES),
        "!'".repeat(BYTES / 2),
        random,
    ];
    for name in VOCABULARIES {
        let tokenizer = tokenizer(name);
        let mut scratch = EncodeScratch::new(BYTES).unwrap();
        let mut out = vec![0; tokenizer.max_tokens(BYTES)];
        for text in &texts {
            let begun = std::time::Instant::now();
            let count = tokenizer
                .encode_into(text, ALL, &mut scratch, &mut out)
                .unwrap();
            println!("{name}: {count} tokens in {:?}", begun.elapsed());
            assert!(count > 0);
        }
    }
}

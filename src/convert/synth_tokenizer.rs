//! A vocabulary that nobody trained, of any size from 257: the bytes, and words that grow letter by
//! letter. Text goes in and comes out, and both this library and llama.cpp read it.

use std::collections::VecDeque;

use super::tokenizer::{CONTROL, NORMAL, TOKENS, TYPES};
use crate::gguf::{Array, Metadata, Strings, Value};

/// What ends a text.
const END: &str = "<|endoftext|>";

/// Writes a vocabulary of `vocab` tokens into the metadata.
pub(super) fn insert(metadata: &mut Metadata, vocab: usize) {
    let mut tokens: Strings = [END].into_iter().collect();
    // The characters that stand for bytes in such vocabularies; which stands for which is agreed on.
    let bytes = [
        '\u{21}'..='\u{7e}',
        '\u{a1}'..='\u{ac}',
        '\u{ae}'..='\u{143}',
    ];
    tokens.extend(bytes.into_iter().flatten().map(String::from));
    let mut merges = Strings::new();
    // A word is a token and one more letter, so that each is made in one way only.
    let letters = || ('a'..='z').map(String::from);
    let space = "\u{120}".to_string();
    let mut words: VecDeque<String> = [space].into_iter().chain(letters()).collect();
    while let Some(word) = words.pop_front() {
        for letter in letters() {
            if tokens.len() >= vocab {
                words.clear();
                break;
            }
            let longer = format!("{word}{letter}");
            merges.push(&format!("{word} {letter}"));
            tokens.push(&longer);
            words.push_back(longer);
        }
    }
    let mut types = vec![NORMAL; tokens.len()];
    types[0] = CONTROL;
    let id = Value::U32(0);
    metadata.insert("tokenizer.ggml.model", "gpt2");
    metadata.insert("tokenizer.ggml.pre", "smollm");
    metadata.insert(TOKENS, Value::Array(Array::String(tokens)));
    metadata.insert(TYPES, Value::Array(Array::I32(types)));
    metadata.insert("tokenizer.ggml.merges", Value::Array(Array::String(merges)));
    metadata.insert("tokenizer.ggml.bos_token_id", id.clone());
    metadata.insert("tokenizer.ggml.eos_token_id", id);
    metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(false));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    #[test]
    fn text_goes_in_and_comes_out() {
        for vocab in [257, 1024, 49_152] {
            let mut metadata = Metadata::new();
            insert(&mut metadata, vocab);
            let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
            let tokens = metadata.strings(TOKENS).unwrap().unwrap();
            assert_eq!(tokens.len(), vocab);
            for text in ["It is a truth\n\tuniversally", " é 漢 😀 \u{0}", "12 a"] {
                let ids = tokenizer
                    .encode(text, crate::tokenizer::EncodeOptions::PLAIN)
                    .unwrap();
                let decode = |id: &u32| tokenizer.token_bytes(*id, true).unwrap().to_vec();
                let bytes: Vec<u8> = ids.iter().flat_map(decode).collect();
                assert_eq!(bytes, text.as_bytes());
                // Where there are words, letters become fewer tokens.
                let words = vocab > 257 && text.starts_with("It");
                assert!(!words || ids.len() < text.len());
            }
        }
    }
}

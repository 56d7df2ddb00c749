//! The `tokenizer.*` keys of the output: copied from a GGUF file or made from a `tokenizer.json`.

use std::path::{Path, PathBuf};

use super::document::Document;
use super::options::Progress;
use super::source::{file_label, map_file};
use super::tokenizer_json;
use crate::error::{Error, Result};
use crate::gguf::{Array, Gguf, Metadata, Value};
use crate::tokenizer::Tokenizer;

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";

/// GGUF's number for a token that no text has.
pub(super) const UNUSED: i32 = 5;
pub(super) const NORMAL: i32 = 1;
pub(super) const CONTROL: i32 = 3;

/// Puts a tokenizer into the metadata: the one that was asked for, or else the checkpoint's own.
/// `vocab` is the number of the embedding's rows, `config` the checkpoint's config.json.
pub(super) fn insert(
    metadata: &mut Metadata,
    asked: Option<&Path>,
    folder: &Path,
    vocab: usize,
    config: &Document,
    progress: &mut dyn Progress,
) -> Result<()> {
    let own = folder.join("tokenizer.json");
    if asked.is_none() && !own.is_file() {
        progress.note("There is no tokenizer, so the file can be evaluated by token ids only; --tokenizer names one (the authors train with SmolLM's).");
        return Ok(());
    }
    replace(metadata, asked.unwrap_or(&own), vocab, config, progress)
}

/// Replaces whatever tokenizer the metadata holds by the one in a file, or in a folder.
pub(super) fn replace(
    metadata: &mut Metadata,
    path: &Path,
    vocab: usize,
    config: &Document,
    progress: &mut dyn Progress,
) -> Result<()> {
    for key in tokenizer_keys(metadata) {
        metadata.remove(&key);
    }
    let inside = path.join("tokenizer.json");
    let path = if path.is_dir() { &inside } else { path };
    let ends = if super::is_gguf(path)? {
        copy(metadata, path)?;
        Vec::new()
    } else {
        tokenizer_json::insert(metadata, path, vocab, config, progress)?
    };
    fit(metadata, path, vocab, progress)?;
    // What this library cannot read back must not go into a file.
    let tokenizer = Tokenizer::from_metadata(metadata)?;
    add_ends(metadata, &tokenizer, &ends, progress);
    Ok(())
}

/// Makes these tokens end a text, besides those that do already, by their role or by their name.
fn add_ends(
    metadata: &mut Metadata,
    tokenizer: &Tokenizer,
    ends: &[u32],
    progress: &mut dyn Progress,
) {
    let mut places = vec!["tokenizer.ggml.eom_token_id"];
    if tokenizer.eot().is_none() {
        places.push("tokenizer.ggml.eot_token_id");
    }
    let mut done = Vec::new();
    for &id in ends {
        if (id as usize) < tokenizer.vocab_size() && !tokenizer.is_end(id) && !done.contains(&id) {
            match places.pop() {
                Some(key) => {
                    metadata.insert(key, Value::U32(id));
                }
                None => progress.note(&format!(
                    "Token {id} is said to end a text, for which a GGUF file has no place left; it does not."
                )),
            }
            done.push(id);
        }
    }
}

fn tokenizer_keys(metadata: &Metadata) -> Vec<String> {
    metadata
        .iter()
        .map(|(key, _)| key)
        .filter(|key| key.starts_with("tokenizer."))
        .map(str::to_string)
        .collect()
}

fn copy(metadata: &mut Metadata, path: &Path) -> Result<()> {
    let map = map_file(path)?;
    let other = match Gguf::parse(&map) {
        Ok(gguf) => gguf.metadata,
        Err(error) => {
            return Err(Error::convert(format_args!(
                "the tokenizer cannot be taken from '{}': {error}",
                file_label(path)
            )));
        }
    };
    if other.get(TOKENS).is_none() {
        return Err(Error::convert(format_args!(
            "'{}' holds no tokenizer ({TOKENS}); give another file",
            file_label(path)
        )));
    }
    for key in tokenizer_keys(&other) {
        if let Some(value) = other.get(&key) {
            metadata.insert(key, value.clone());
        }
    }
    Ok(())
}

/// Refuses a vocabulary that is larger than the embedding; fills up one that is smaller, as
/// training pads embeddings to round sizes.
fn fit(
    metadata: &mut Metadata,
    path: &Path,
    vocab: usize,
    progress: &mut dyn Progress,
) -> Result<()> {
    let mut tokens = metadata.strings(TOKENS)?.unwrap_or_default().clone();
    let count = tokens.len();
    if count > vocab {
        return Err(too_large(path, count, vocab));
    }
    if count == vocab {
        return Ok(());
    }
    progress.note(&format!(
        "The tokenizer has {count} tokens and the embedding {vocab} rows; the rest is filled with unused tokens."
    ));
    let mut types = metadata.i32s(TYPES)?.unwrap_or_else(|| vec![NORMAL; count]);
    tokens.extend((count..vocab).map(padding));
    types.resize(vocab, UNUSED);
    metadata.insert(TOKENS, Value::Array(Array::String(tokens)));
    metadata.insert(TYPES, Value::Array(Array::I32(types)));
    if let Some(mut scores) = metadata.f32s(SCORES)? {
        scores.resize(vocab, 0.0);
        metadata.insert(SCORES, Value::Array(Array::F32(scores)));
    }
    Ok(())
}

pub(super) fn too_large(path: &Path, tokens: usize, vocab: usize) -> Error {
    Error::convert(format_args!(
        "the tokenizer '{}' has {tokens} tokens, but the embedding has {vocab} rows; give the tokenizer of this model",
        file_label(path)
    ))
}

/// The spelling of a row that no token has, as llama.cpp's converter writes it.
pub(super) fn padding(id: usize) -> String {
    format!("[PAD{id}]")
}

/// A file in the same folder as `path`.
pub(super) fn beside(path: &Path, name: &str) -> PathBuf {
    path.with_file_name(name)
}

//! Reading the `tokenizer.json` of Hugging Face: byte-level BPE, with the companions that name
//! its special tokens and its chat template.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;

use super::document::{Document, read_text};
use super::options::Progress;
use super::tokenizer::{CONTROL, NORMAL, TOKENS, TYPES, UNUSED, beside, padding, too_large};
use crate::error::{Error, Result};
use crate::gguf::{Array, Metadata, Strings, Value};

const USER_DEFINED: i32 = 4;

/// GPT-2's words.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's words: numbers in groups of up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's words: the same with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Writes the vocabulary of a `tokenizer.json` into the metadata.
pub(super) fn insert(
    metadata: &mut Metadata,
    path: &Path,
    vocab: usize,
    config: &Document,
    progress: &mut dyn Progress,
) -> Result<()> {
    let document = Document::json(path)?;
    check_model(&document)?;
    check_normalizer(&document, progress)?;
    let pre = pre_tokenizer(&document, progress)?;
    // As llama.cpp has it, that is a matter of how words are cut.
    let ignores = document.get("model.ignore_merges").and_then(Json::as_bool);
    if ignores.unwrap_or(false) != (pre == "llama-bpe") {
        progress.note(
            "The tokenizer's ignore_merges is not followed: words that are tokens may be cut otherwise.",
        );
    }
    let vocabulary = Vocabulary::read(&document, path, vocab)?;
    let text = |s: &str| Value::String(s.to_string());
    metadata.insert("tokenizer.ggml.model", text("gpt2"));
    metadata.insert("tokenizer.ggml.pre", text(pre));
    let merges = Value::Array(Array::String(merges(&document)?));
    let special = special_tokens(&document, path, config, &vocabulary)?;
    metadata.insert(TOKENS, Value::Array(Array::String(vocabulary.tokens)));
    metadata.insert(TYPES, Value::Array(Array::I32(vocabulary.types)));
    metadata.insert("tokenizer.ggml.merges", merges);
    for (key, value) in special {
        metadata.insert(key, value);
    }
    if let Some(template) = chat_template(path)? {
        metadata.insert("tokenizer.chat_template", Value::String(template));
    }
    Ok(())
}

fn unsupported(document: &Document, what: &str) -> Error {
    Error::unsupported(format_args!(
        "'{}' {what}; give a GGUF file with the same vocabulary as the tokenizer instead",
        document.label()
    ))
}

fn check_model(document: &Document) -> Result<()> {
    let kind = document.str("model.type")?.unwrap_or("BPE");
    if kind != "BPE" {
        return Err(unsupported(
            document,
            &format!("is a tokenizer of type '{kind}', not BPE"),
        ));
    }
    for key in [
        "model.continuing_subword_prefix",
        "model.end_of_word_suffix",
    ] {
        if document.str(key)?.is_some_and(|s| !s.is_empty()) {
            return Err(unsupported(document, &format!("uses {key}")));
        }
    }
    Ok(())
}

fn check_normalizer(document: &Document, progress: &mut dyn Progress) -> Result<()> {
    match document.str("normalizer.type")? {
        None => Ok(()),
        Some("NFC") => {
            progress.note("The tokenizer normalizes text to NFC, which mor leaves to its caller.");
            Ok(())
        }
        Some(other) => Err(unsupported(
            document,
            &format!("normalizes text by '{other}'"),
        )),
    }
}

/// llama.cpp's name for the way a text is cut into words.
fn pre_tokenizer(document: &Document, progress: &mut dyn Progress) -> Result<&'static str> {
    let mut steps = Vec::new();
    if let Some(root) = document.get("pre_tokenizer") {
        match root.get("pretokenizers").and_then(Json::as_array) {
            Some(list) => steps.extend(list),
            None => steps.push(root),
        }
    }
    let kind = |step: &Json| {
        step.get("type")
            .and_then(Json::as_str)
            .unwrap_or("")
            .to_string()
    };
    let unknown = || {
        let kinds: Vec<String> = steps.iter().map(|s| kind(s)).collect();
        unsupported(
            document,
            &format!(
                "cuts text into words in an unknown way ({})",
                kinds.join(", ")
            ),
        )
    };
    let Some((bytes, cutters)) = steps
        .split_last()
        .filter(|(last, _)| kind(last) == "ByteLevel")
    else {
        return Err(unknown());
    };
    let flag = |step: &Json, key: &str| step.get(key).and_then(Json::as_bool);
    if flag(bytes, "add_prefix_space") == Some(true) {
        progress.note(
            "The tokenizer's add_prefix_space is not followed: text is encoded as it stands.",
        );
    }
    let gpt2_words = flag(bytes, "use_regex").unwrap_or(true);
    match (cutters, gpt2_words) {
        ([], true) => Ok("gpt-2"),
        ([digits], true)
            if kind(digits) == "Digits" && flag(digits, "individual_digits") == Some(true) =>
        {
            Ok("smollm")
        }
        ([split], false)
            if kind(split) == "Split"
                && flag(split, "invert") != Some(true)
                && split.get("behavior").is_none_or(|how| how == "Isolated") =>
        {
            match split.pointer("/pattern/Regex").and_then(Json::as_str) {
                Some(GPT2) => Ok("gpt-2"),
                Some(LLAMA3) => Ok("llama-bpe"),
                Some(QWEN2) => Ok("qwen2"),
                _ => Err(unknown()),
            }
        }
        _ => Err(unknown()),
    }
}

/// Tokens and their types by number.
struct Vocabulary {
    tokens: Strings,
    types: Vec<i32>,
}

impl Vocabulary {
    fn read(document: &Document, path: &Path, vocab: usize) -> Result<Vocabulary> {
        let entries = document
            .get("model.vocab")
            .and_then(Json::as_object)
            .ok_or_else(|| {
                Error::convert(format_args!(
                    "'{}' lacks the object model.vocab",
                    document.label()
                ))
            })?;
        let number = |name: &str, id: &Json| {
            id.as_u64()
                .and_then(|id| usize::try_from(id).ok())
                .ok_or_else(|| {
                    Error::convert(format_args!(
                        "the token '{name}' in '{}' has the number {id}",
                        document.label()
                    ))
                })
        };
        let mut slots: Vec<(usize, &str, i32)> = Vec::new();
        for (name, id) in entries {
            slots.push((number(name, id)?, name, NORMAL));
        }
        let added = document.get("added_tokens").and_then(Json::as_array);
        for token in added.into_iter().flatten() {
            let name = token.get("content").and_then(Json::as_str).unwrap_or("");
            let special = token
                .get("special")
                .and_then(Json::as_bool)
                .unwrap_or(false);
            let id = number(name, token.get("id").unwrap_or(&Json::Null))?;
            slots.push((id, name, if special { CONTROL } else { USER_DEFINED }));
        }
        let count = slots
            .iter()
            .map(|s| s.0.saturating_add(1))
            .max()
            .unwrap_or(0);
        if count > vocab {
            return Err(too_large(path, count, vocab));
        }
        Self::fill(&slots, count, document)
    }

    /// `count` is at most the number of embedding rows, so it is safe to allocate.
    fn fill(slots: &[(usize, &str, i32)], count: usize, document: &Document) -> Result<Vocabulary> {
        let mut named: Vec<Option<(&str, i32)>> = vec![None; count];
        for &(id, name, kind) in slots {
            let Some(slot) = named.get_mut(id) else {
                continue;
            };
            // An added token usually stands in the vocabulary too; its entry says more.
            if let Some((other, _)) = slot.filter(|(other, _)| *other != name) {
                return Err(Error::convert(format_args!(
                    "the tokens '{other}' and '{name}' in '{}' both have the number {id}",
                    document.label()
                )));
            }
            *slot = Some((name, kind));
        }
        let (tokens, types) = named
            .into_iter()
            .enumerate()
            .map(|(id, slot)| {
                slot.map_or_else(
                    || (padding(id), UNUSED),
                    |(name, kind)| (name.to_string(), kind),
                )
            })
            .unzip();
        Ok(Vocabulary { tokens, types })
    }
}

/// The merges in order, each as two tokens with a space between; older files spell them so, newer
/// ones as pairs.
fn merges(document: &Document) -> Result<Strings> {
    let wrong = |entry: &Json| {
        Error::convert(format_args!(
            "'{}' has the merge {entry}, which is not two tokens",
            document.label()
        ))
    };
    let list = document.get("model.merges").and_then(Json::as_array);
    list.ok_or_else(|| {
        Error::convert(format_args!(
            "'{}' lacks the list model.merges",
            document.label()
        ))
    })?
    .iter()
    .map(|entry| {
        let text = match entry {
            Json::String(text) => text.clone(),
            Json::Array(pair) => match pair.as_slice() {
                [Json::String(a), Json::String(b)] => format!("{a} {b}"),
                _ => return Err(wrong(entry)),
            },
            _ => return Err(wrong(entry)),
        };
        // A byte-level token never holds a space: it is spelled otherwise.
        if text.split(' ').filter(|part| !part.is_empty()).count() != 2 {
            return Err(wrong(entry));
        }
        Ok(text)
    })
    .collect()
}

/// The tokens with a role, and whether a text begins with one.
fn special_tokens(
    document: &Document,
    path: &Path,
    config: &Document,
    vocabulary: &Vocabulary,
) -> Result<Vec<(&'static str, Value)>> {
    let companion_path = beside(path, "tokenizer_config.json");
    let companion = if companion_path.is_file() {
        Document::json(&companion_path)?
    } else {
        Document::absent("tokenizer_config.json")
    };
    let ids: HashMap<&str, usize> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token, id))
        .collect();
    let named = |role: &str| {
        let value = companion.get(&format!("{role}_token"))?;
        let name = value.as_str().or_else(|| value.get("content")?.as_str())?;
        ids.get(name).copied()
    };
    let numbered = |role: &str| {
        let value = config.get(&format!("{role}_token_id"))?;
        let id = value.as_u64().or_else(|| value.get(0)?.as_u64())?;
        usize::try_from(id)
            .ok()
            .filter(|id| *id < vocabulary.tokens.len())
    };
    let roles = [
        ("bos", "tokenizer.ggml.bos_token_id"),
        ("eos", "tokenizer.ggml.eos_token_id"),
        ("unk", "tokenizer.ggml.unknown_token_id"),
        ("pad", "tokenizer.ggml.padding_token_id"),
    ];
    let mut keys = Vec::new();
    for (role, key) in roles {
        let id = named(role).or_else(|| numbered(role));
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            keys.push((key, Value::U32(id)));
        }
    }
    for (key, name) in [
        ("add_bos_token", "tokenizer.ggml.add_bos_token"),
        ("add_eos_token", "tokenizer.ggml.add_eos_token"),
    ] {
        let begins = key == "add_bos_token" && template_begins_with_a_token(document);
        let add = companion.bool(key)?.unwrap_or(begins);
        keys.push((name, Value::Bool(add)));
    }
    Ok(keys)
}

/// Whether the post-processor puts a special token before every text.
fn template_begins_with_a_token(document: &Document) -> bool {
    let Some(root) = document.get("post_processor") else {
        return false;
    };
    let list = root.get("processors").and_then(Json::as_array);
    let steps: Vec<&Json> = list.map_or_else(|| vec![root], |list| list.iter().collect());
    steps
        .iter()
        .any(|step| step.pointer("/single/0/SpecialToken").is_some())
}

/// The chat template: a file of its own, or a key of tokenizer_config.json.
fn chat_template(path: &Path) -> Result<Option<String>> {
    let file = beside(path, "chat_template.jinja");
    if file.is_file() {
        return read_text(&file).map(Some);
    }
    let companion = beside(path, "tokenizer_config.json");
    if !companion.is_file() {
        return Ok(None);
    }
    let document = Document::json(&companion)?;
    Ok(match document.get("chat_template") {
        Some(Json::String(text)) => Some(text.clone()),
        // Several, each with a name.
        Some(Json::Array(list)) => {
            let default = list
                .iter()
                .find(|t| t.get("name").and_then(Json::as_str) == Some("default"));
            let template = default.or_else(|| list.first());
            template
                .and_then(|t| t.get("template")?.as_str())
                .map(str::to_string)
        }
        _ => None,
    })
}

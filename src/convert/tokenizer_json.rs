//! Reading the `tokenizer.json` of Hugging Face: byte-level BPE, with the companions that name
//! its special tokens and its chat template.

use std::collections::{HashMap, HashSet};
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

/// Writes the vocabulary of a `tokenizer.json` into the metadata. Returns the tokens that end a text, of which a file
/// names one as such.
pub(super) fn insert(
    metadata: &mut Metadata,
    path: &Path,
    vocab: usize,
    config: &Document,
    progress: &mut dyn Progress,
) -> Result<Vec<u32>> {
    let document = Document::json(path)?;
    check_model(&document)?;
    check_normalizer(&document, progress)?;
    let pre = pre_tokenizer(&document, progress)?;
    // As llama.cpp has it, that is a matter of how words are cut.
    let ignores = document.get("model.ignore_merges").and_then(Json::as_bool) == Some(true);
    let pre = match pre {
        "llama-bpe" if !ignores => "smaug-bpe",
        pre => pre,
    };
    if ignores && pre != "llama-bpe" {
        progress.note(
            "The tokenizer's ignore_merges is not followed: words that are tokens may be cut otherwise.",
        );
    }
    note_added_tokens(&document, progress);
    let vocabulary = Vocabulary::read(&document, path, vocab)?;
    note_unknown_bytes(&document, &vocabulary, progress);
    let text = |s: &str| Value::String(s.to_string());
    metadata.insert("tokenizer.ggml.model", text("gpt2"));
    metadata.insert("tokenizer.ggml.pre", text(pre));
    let merges = Value::Array(Array::String(merges(&document)?));
    let generation = generation_config(path)?;
    let special = special_tokens(&document, path, [config, &generation], &vocabulary)?;
    metadata.insert(TOKENS, Value::Array(Array::String(vocabulary.tokens)));
    metadata.insert(TYPES, Value::Array(Array::I32(vocabulary.types)));
    metadata.insert("tokenizer.ggml.merges", merges);
    for (key, value) in special {
        metadata.insert(key, value);
    }
    if let Some(template) = chat_template(path)? {
        metadata.insert("tokenizer.chat_template", Value::String(template));
    }
    Ok(ends(config, &generation))
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
    if document.bool("model.byte_fallback")? == Some(true) {
        return Err(unsupported(document, "uses model.byte_fallback"));
    }
    Ok(())
}

fn check_normalizer(document: &Document, progress: &mut dyn Progress) -> Result<()> {
    for step in steps_of(document, "normalizer", "normalizers") {
        match kind(step) {
            "NFC" => progress
                .note("The tokenizer normalizes text to NFC, which mor leaves to its caller."),
            other => {
                let how = format!("normalizes text by '{other}'");
                return Err(unsupported(document, &how));
            }
        }
    }
    Ok(())
}

/// What the component `key` does: nothing, one thing, or the `list` of a sequence.
fn steps_of<'a>(document: &'a Document, key: &str, list: &str) -> Vec<&'a Json> {
    match document.get(key) {
        None => Vec::new(),
        Some(root) => match root.get(list).and_then(Json::as_array) {
            Some(list) => list.iter().collect(),
            None => vec![root],
        },
    }
}

fn kind(step: &Json) -> &str {
    step.get("type").and_then(Json::as_str).unwrap_or("")
}

/// llama.cpp's name for the way a text is cut into words.
fn pre_tokenizer(document: &Document, progress: &mut dyn Progress) -> Result<&'static str> {
    let steps = steps_of(document, "pre_tokenizer", "pretokenizers");
    let unknown = || {
        let kinds: Vec<&str> = steps.iter().map(|step| kind(step)).collect();
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

/// Says where added tokens are found in text by rules that a GGUF file has no place for.
fn note_added_tokens(document: &Document, progress: &mut dyn Progress) {
    let added = document.get("added_tokens").and_then(Json::as_array);
    let set = |token: &Json, key: &str| token.get(key).and_then(Json::as_bool) == Some(true);
    for key in ["lstrip", "rstrip", "single_word"] {
        let mut tokens = added.into_iter().flatten().filter(|token| set(token, key));
        if let Some(name) = tokens.find_map(|token| token.get("content")?.as_str()) {
            progress.note(&format!(
                "The tokenizer's {key} is not followed: '{name}' is found wherever it stands, and spaces beside it stay."
            ));
        }
    }
}

/// A byte without a token becomes the unknown token there, and nothing here, as in llama.cpp.
fn note_unknown_bytes(document: &Document, vocabulary: &Vocabulary, progress: &mut dyn Progress) {
    let Some(unknown) = document.get("model.unk_token").and_then(Json::as_str) else {
        return;
    };
    // How byte-level BPE spells the 256 bytes.
    let bytes = ('!'..='~')
        .chain('\u{a1}'..='\u{ac}')
        .chain('\u{ae}'..='\u{143}');
    let mut missing: HashSet<String> = bytes.map(String::from).collect();
    for token in vocabulary.tokens.iter() {
        missing.remove(token);
    }
    if !missing.is_empty() {
        progress.note(&format!(
            "{} bytes are no tokens: they are left out of a text, where the tokenizer writes '{unknown}'.",
            missing.len()
        ));
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

fn generation_config(path: &Path) -> Result<Document> {
    let name = "generation_config.json";
    Ok(match beside(path, name) {
        path if path.is_file() => Document::json(&path)?,
        _ => Document::absent(name),
    })
}

/// The tokens that end a text, as the configurations list them.
fn ends(config: &Document, generation: &Document) -> Vec<u32> {
    let mut ids = Vec::new();
    for value in [config, generation].map(|document| document.get("eos_token_id")) {
        let listed = value.and_then(Json::as_array).map(Vec::as_slice);
        let all = listed.unwrap_or_else(|| value.map_or(&[], std::slice::from_ref));
        ids.extend(all.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
    }
    ids
}

/// The tokens with a role, and whether a text begins with one.
fn special_tokens(
    document: &Document,
    path: &Path,
    [config, generation]: [&Document; 2],
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
        // Qwen's config.json has one all the same, and templates would write it.
        if role == "bos" && companion.is_null("bos_token") {
            return None;
        }
        let key = format!("{role}_token_id");
        let value = config.get(&key).or_else(|| generation.get(&key))?;
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
    // The companion has the last word on whether they are put there.
    let around = around_texts(document)?;
    let before = companion.bool("add_bos_token")?;
    let after = companion.bool("add_eos_token")?;
    let put = |role: &str| match role {
        "bos" => around.before.filter(|_| before != Some(false)),
        "eos" => around.after.filter(|_| after != Some(false)),
        _ => None,
    };
    let mut keys = Vec::new();
    for (role, key) in roles {
        if let Some(other) = put(role)
            && (named(role).is_some_and(|id| id != other) || vocabulary.tokens.get(other).is_none())
        {
            let what = format!(
                "puts token {other} before or after a text, which is not the {role}_token of tokenizer_config.json; a GGUF file has one key for both"
            );
            return Err(unsupported(document, &what));
        }
        let id = put(role).or_else(|| named(role)).or_else(|| numbered(role));
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            keys.push((key, Value::U32(id)));
        }
    }
    let adds = |flag: Option<bool>, put: Option<usize>| Value::Bool(flag.unwrap_or(put.is_some()));
    keys.push(("tokenizer.ggml.add_bos_token", adds(before, put("bos"))));
    keys.push(("tokenizer.ggml.add_eos_token", adds(after, put("eos"))));
    Ok(keys)
}

/// The tokens that the post-processor puts before and after a text.
#[derive(Default)]
struct Around {
    before: Option<usize>,
    after: Option<usize>,
}

fn around_texts(document: &Document) -> Result<Around> {
    let mut around = Around::default();
    for step in steps_of(document, "post_processor", "processors") {
        let found = match kind(step) {
            "ByteLevel" => continue,
            "TemplateProcessing" => template(step),
            "BertProcessing" | "RobertaProcessing" => {
                let id = |at: &str| step.pointer(at).and_then(id_of);
                Some(Around {
                    before: id("/cls/1"),
                    after: id("/sep/1"),
                })
            }
            _ => None,
        };
        // One after another would add up.
        let first = around.before.is_none() && around.after.is_none();
        around = found.filter(|_| first).ok_or_else(|| {
            let how = format!(
                "does more to a text than to put a token before it and one after it ({})",
                kind(step)
            );
            unsupported(document, &how)
        })?;
    }
    Ok(around)
}

/// Of a template for one text, `$A` with at most a token before it and one after it.
fn template(step: &Json) -> Option<Around> {
    let pieces = step.get("single")?.as_array()?;
    let at = pieces.iter().position(|p| p.get("Sequence").is_some())?;
    let token = |piece: &Json| {
        let name = piece.pointer("/SpecialToken/id")?.as_str()?;
        match step
            .get("special_tokens")?
            .get(name)?
            .get("ids")?
            .as_array()?
            .as_slice()
        {
            [id] => id_of(id),
            _ => None,
        }
    };
    let only = |pieces: &[Json]| match pieces {
        [] => Some(None),
        [piece] => token(piece).map(Some),
        _ => None,
    };
    Some(Around {
        before: only(&pieces[..at])?,
        after: only(&pieces[at + 1..])?,
    })
}

fn id_of(number: &Json) -> Option<usize> {
    usize::try_from(number.as_u64()?).ok()
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

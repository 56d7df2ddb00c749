//! Reading a tokenizer from a file's metadata. Nothing in there is trusted.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::gguf::{Metadata, Strings};
use crate::memory::{reserved, try_collect, try_push};

use super::bpe::{Bpe, Merges, byte_ids};
use super::merge::NONE;
use super::special::{self, Specials};
use super::spm::{self, Spm};
use super::vocabulary::{Kind, Spelling, Vocabulary, byte_token};
use super::words::PreTokenizer;
use super::{Model, SpecialIds, Tokenizer, excerpt};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const EOT: &str = "tokenizer.ggml.eot_token_id";
const EOM: &str = "tokenizer.ggml.eom_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";

type Names<'a> = HashMap<&'a str, u32>;

impl Tokenizer {
    /// Reads the `tokenizer.ggml.*` keys of a file.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where they are missing, damaged or of a kind that is not known; [`Error::OutOfMemory`].
    pub fn from_metadata(metadata: &Metadata) -> Result<Tokenizer> {
        let model = metadata.str(MODEL)?.ok_or_else(|| {
            Error::tokenizer(format_args!("the file has none (it lacks {MODEL})"))
        })?;
        let texts = metadata.strings(TOKENS)?.unwrap_or_default();
        if texts.is_empty() {
            return Err(Error::tokenizer(format_args!(
                "the vocabulary is empty or missing ({TOKENS})"
            )));
        }
        let names = names(texts)?;
        let mut kinds = kinds(metadata, texts.len())?;
        let ends = ends(metadata, &names, &kinds)?;
        for &id in &ends {
            // As llama.cpp: what ends a generation is no text, whatever the file says.
            kinds[id as usize] = Kind::Control;
        }
        match model {
            "gpt2" => load_bpe(metadata, texts, &names, kinds, ends),
            "llama" => load_spm(metadata, texts, &names, kinds, ends),
            other => Err(Error::tokenizer(format_args!(
                "the file's tokenizer '{}' is not supported; supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
                excerpt(other)
            ))),
        }
    }
}

fn load_bpe(
    metadata: &Metadata,
    texts: &Strings,
    names: &Names,
    kinds: Vec<Kind>,
    ends: Vec<u32>,
) -> Result<Tokenizer> {
    let pre = PreTokenizer::parse(metadata.str(PRE)?)?;
    let lines = metadata
        .strings(MERGES)?
        .ok_or_else(|| Error::tokenizer(format_args!("the file lacks the merges ({MERGES})")))?;
    let llama3 = pre == PreTokenizer::Llama3;
    let bpe = Bpe {
        pre,
        ignore_merges: llama3,
        bytes: byte_ids(names),
        merges: Merges::new(lines, names, texts.len())?,
    };
    let vocabulary = Vocabulary::new(texts, kinds, Spelling::ByteLevel, bpe.ignore_merges)?;
    let defaults = Defaults {
        bos: None,
        eos: None,
        add_bos: llama3,
    };
    let ids = special_ids(metadata, names, ends, defaults)?;
    Ok(Tokenizer {
        specials: Specials::new(&vocabulary)?,
        vocabulary,
        model: Model::Bpe(bpe),
        ids,
    })
}

fn load_spm(
    metadata: &Metadata,
    texts: &Strings,
    names: &Names,
    kinds: Vec<Kind>,
    ends: Vec<u32>,
) -> Result<Tokenizer> {
    let mut bytes = [NONE; 256];
    for (&name, &id) in names {
        if let Some(byte) = byte_token(name) {
            bytes[usize::from(byte)] = id;
        }
    }
    // SentencePiece's usual places, for files that do not say.
    let usual = |id: u32| Some(id).filter(|&id| (id as usize) < texts.len());
    let spm = Spm {
        ranks: ranks(metadata, texts.len())?,
        bytes,
        add_space_prefix: metadata.bool(ADD_SPACE)?.unwrap_or(true),
        unknown: token(metadata, UNKNOWN, texts.len())?.or(usual(0)),
    };
    let vocabulary = Vocabulary::new(texts, kinds, Spelling::SentencePiece, true)?;
    let defaults = Defaults {
        bos: usual(1),
        eos: usual(2),
        add_bos: true,
    };
    let ids = special_ids(metadata, names, ends, defaults)?;
    Ok(Tokenizer {
        specials: Specials::new(&vocabulary)?,
        vocabulary,
        model: Model::Spm(spm),
        ids,
    })
}

/// The tokens by their spelling, which must differ (except for empty ones, which are never used).
fn names(texts: &Strings) -> Result<Names<'_>> {
    if u32::try_from(texts.len()).is_err() {
        return Err(Error::tokenizer("the vocabulary has too many tokens"));
    }
    let mut names = Names::new();
    names
        .try_reserve(texts.len())
        .map_err(|_| Error::OutOfMemory {
            bytes: texts.len().saturating_mul(size_of::<(&str, u32)>()),
        })?;
    for (id, text) in (0..).zip(texts.iter()).filter(|(_, text)| !text.is_empty()) {
        if let Some(other) = names.insert(text, id) {
            return Err(Error::tokenizer(format_args!(
                "tokens {other} and {id} are both '{}'; the file's vocabulary is damaged",
                excerpt(text)
            )));
        }
    }
    Ok(names)
}

fn kinds(metadata: &Metadata, tokens: usize) -> Result<Vec<Kind>> {
    let mut kinds = reserved(tokens)?;
    match metadata.i32s(TYPES)? {
        None => kinds.resize(tokens, Kind::Normal),
        Some(numbers) => {
            check_length(TYPES, numbers.len(), tokens)?;
            kinds.extend(numbers.into_iter().map(Kind::from_gguf));
        }
    }
    Ok(kinds)
}

/// The order of the tokens' scores; without scores all are equal.
fn ranks(metadata: &Metadata, tokens: usize) -> Result<Vec<u32>> {
    let mut ranks = reserved(tokens)?;
    let Some(scores) = metadata.f32s(SCORES)? else {
        ranks.resize(tokens, 0);
        return Ok(ranks);
    };
    check_length(SCORES, scores.len(), tokens)?;
    for (id, score) in scores.into_iter().enumerate() {
        let rank = spm::rank(score).ok_or_else(|| {
            Error::tokenizer(format_args!("the score of token {id} is no number"))
        })?;
        ranks.push(rank);
    }
    Ok(ranks)
}

fn check_length(key: &str, length: usize, tokens: usize) -> Result<()> {
    if length == tokens {
        return Ok(());
    }
    Err(Error::tokenizer(format_args!(
        "{key} has {length} entries for {tokens} tokens"
    )))
}

/// A token that the file names by its number.
fn token(metadata: &Metadata, key: &str, tokens: usize) -> Result<Option<u32>> {
    match metadata.u32(key)? {
        Some(id) if id as usize >= tokens => Err(Error::tokenizer(format_args!(
            "{key} is {id}, but the vocabulary has {tokens} tokens"
        ))),
        id => Ok(id),
    }
}

/// What holds where the file does not say.
struct Defaults {
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
}

/// The tokens that end a generation by their names, unless ordinary text becomes them: `</s>` is made of letters in
/// Qwen's vocabulary, for HTML.
fn ends(metadata: &Metadata, names: &Names, kinds: &[Kind]) -> Result<Vec<u32>> {
    let merges = metadata.strings(MERGES)?.unwrap_or_default();
    let is_merged = |name: &str| {
        merges.iter().any(|line| {
            let parts = line.split_once(' ');
            parts.is_some_and(|(left, right)| name.strip_prefix(left) == Some(right))
        })
    };
    let mut roles = [None; 3];
    for (role, key) in roles.iter_mut().zip([EOS, EOT, EOM]) {
        *role = metadata.u32(key)?;
    }
    let is_end = |&(name, id): &(&str, u32)| {
        kinds[id as usize] != Kind::Normal || roles.contains(&Some(id)) || !is_merged(name)
    };
    try_collect(special::ends(names).filter(is_end).map(|(_, id)| Ok(id)))
}

/// `ends`: those by name, to which those with a role come.
fn special_ids(
    metadata: &Metadata,
    names: &Names,
    mut ends: Vec<u32>,
    defaults: Defaults,
) -> Result<SpecialIds> {
    let tokens = metadata.strings(TOKENS)?.unwrap_or_default().len();
    let named = |key| token(metadata, key, tokens);
    let bos = named(BOS)?.or(defaults.bos);
    let eos = named(EOS)?.or(defaults.eos);
    let eot = named(EOT)?.or_else(|| special::end_of_turn(names).filter(|id| ends.contains(id)));
    let add_bos = metadata.bool(ADD_BOS)?.unwrap_or(defaults.add_bos);
    let add_eos = metadata.bool(ADD_EOS)?.unwrap_or(false);
    for (wanted, id, key) in [(add_bos, bos, BOS), (add_eos, eos, EOS)] {
        if wanted && id.is_none() {
            return Err(Error::tokenizer(format_args!(
                "texts are to begin or end with a token that the file does not name ({key})"
            )));
        }
    }
    for id in [eos, eot, named(EOM)?].into_iter().flatten() {
        try_push(&mut ends, id)?;
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(SpecialIds {
        bos,
        eos,
        eot,
        add_bos,
        add_eos,
        ends,
    })
}

#[cfg(test)]
mod tests {
    use super::super::EncodeOptions;
    use super::*;
    use crate::gguf::{Array, Value};

    fn strings(items: &[&str]) -> Value {
        Value::Array(Array::String(items.iter().collect()))
    }

    /// "ab" and "abc" from letters, an end token and a user's one.
    fn bpe() -> Metadata {
        let mut metadata = Metadata::new();
        metadata.insert(MODEL, Value::String("gpt2".into()));
        metadata.insert(PRE, Value::String("gpt-2".into()));
        let tokens = ["a", "b", "c", "ab", "abc", "<|im_end|>", "<tool>"];
        metadata.insert(TOKENS, strings(&tokens));
        metadata.insert(TYPES, Value::Array(Array::I32(vec![1, 1, 1, 1, 1, 1, 4])));
        metadata.insert(MERGES, strings(&["a b", "ab c"]));
        metadata
    }

    fn spm() -> Metadata {
        let mut metadata = Metadata::new();
        metadata.insert(MODEL, Value::String("llama".into()));
        metadata.insert(TOKENS, strings(&["<unk>", "<s>", "</s>", "▁", "a", "▁a"]));
        metadata.insert(TYPES, Value::Array(Array::I32(vec![2, 3, 3, 1, 1, 1])));
        let scores = vec![0.0, 0.0, 0.0, -2.0, -3.0, -1.0];
        metadata.insert(SCORES, Value::Array(Array::F32(scores)));
        metadata
    }

    fn refusal(base: fn() -> Metadata, change: impl FnOnce(&mut Metadata)) -> String {
        let mut metadata = base();
        change(&mut metadata);
        match Tokenizer::from_metadata(&metadata) {
            Err(Error::Tokenizer(text)) => text.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn small_vocabularies_work() {
        let bpe = Tokenizer::from_metadata(&bpe()).unwrap();
        let plain = EncodeOptions::PLAIN;
        let special = EncodeOptions {
            parse_special: true,
            ..plain
        };
        assert_eq!(bpe.encode("abcab", plain).unwrap(), [4, 3]);
        assert_eq!(bpe.encode("a<tool>b", plain).unwrap(), [0, 6, 1]);
        // Ends are control tokens, whatever their type; the letters of this name are no tokens.
        assert_eq!(bpe.encode("c<|im_end|>", special).unwrap(), [2, 5]);
        assert_eq!(bpe.encode("c<|im_end|>", plain).unwrap(), [2]);
        assert_eq!(bpe.eot(), Some(5));
        assert!(bpe.is_end(5) && bpe.eos().is_none() && bpe.bos().is_none());
        assert_eq!(bpe.decode(&[4, 5, 6], false).unwrap(), "abc<tool>");
        assert_eq!(bpe.decode(&[4, 5], true).unwrap(), "abc<|im_end|>");
        assert!(bpe.decode(&[7], true).is_err());
        let spm = Tokenizer::from_metadata(&spm()).unwrap();
        assert_eq!(spm.encode("aa zz", plain).unwrap(), [5, 4, 3, 0]);
        // After a special token the text begins anew, with its space.
        assert_eq!(spm.encode("a</s>a", special).unwrap(), [5, 2, 5]);
    }

    /// The worst there is: no token has a space, whose three bytes are tokens, and each user's token begins a text anew.
    #[test]
    fn the_most_tokens_are_enough() {
        let mut tokens = vec!["<unk>".to_owned(), "x".to_owned()];
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        let mut metadata = spm();
        metadata.insert(TOKENS, Value::Array(Array::String(tokens.iter().collect())));
        let types = [2, 4].into_iter().chain([6; 256]).collect();
        metadata.insert(TYPES, Value::Array(Array::I32(types)));
        metadata.insert(SCORES, Value::Array(Array::F32(vec![0.0; 258])));
        metadata.insert(BOS, Value::U32(0));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        for text in ["x x x x x x x x x x x x", " ", "x", "xxx", ""] {
            let most = tokenizer.max_tokens(text.len());
            let count = tokenizer.encode(text, EncodeOptions::PROMPT).unwrap().len();
            assert!(count <= most, "{count} tokens, {most} at most: '{text}'");
        }
    }

    /// `</s>` as in Qwen's vocabulary, which merges it from letters.
    #[test]
    fn what_text_becomes_is_no_end() {
        let mut metadata = bpe();
        let tokens = ["<", "/", "s", ">", "</", "s>", "</s>"];
        metadata.insert(TOKENS, strings(&tokens));
        metadata.insert(TYPES, Value::Array(Array::I32(vec![1; 7])));
        metadata.insert(MERGES, strings(&["< /", "s >", "</ s>"]));
        let text = Tokenizer::from_metadata(&metadata).unwrap();
        let how = EncodeOptions {
            parse_special: true,
            ..Default::default()
        };
        assert!(!text.is_end(6));
        // Words are cut before merging.
        assert_eq!(text.encode("s</s>", how).unwrap(), [2, 4, 2, 3]);
        assert_eq!(text.decode(&[2, 6], false).unwrap(), "s</s>");
        // The file may say that it is one, by its type or as its end.
        metadata.insert(TYPES, Value::Array(Array::I32(vec![1, 1, 1, 1, 1, 1, 3])));
        assert!(Tokenizer::from_metadata(&metadata).unwrap().is_end(6));
        metadata.insert(TYPES, Value::Array(Array::I32(vec![1; 7])));
        metadata.insert(EOS, Value::U32(6));
        let end = Tokenizer::from_metadata(&metadata).unwrap();
        assert!(end.is_end(6));
        assert_eq!(end.encode("s</s>", how).unwrap(), [2, 6]);
        assert_eq!(end.decode(&[2, 6], false).unwrap(), "s");
        metadata.remove(EOS);
        metadata.insert(MERGES, strings(&["< /", "s >"]));
        assert!(Tokenizer::from_metadata(&metadata).unwrap().is_end(6));
    }

    #[test]
    fn missing_and_unknown_parts_are_refused() {
        let text = |value: &str| Value::String(value.into());
        assert!(refusal(bpe, |m| drop(m.remove(MODEL))).contains(MODEL));
        assert!(refusal(bpe, |m| drop(m.insert(MODEL, text("bert")))).contains("bert"));
        assert!(refusal(bpe, |m| drop(m.insert(PRE, text("tekken\u{7}")))).contains("tekken"));
        assert!(refusal(bpe, |m| drop(m.remove(MERGES))).contains(MERGES));
        assert!(refusal(bpe, |m| drop(m.remove(TOKENS))).contains(TOKENS));
        assert!(refusal(spm, |m| drop(m.insert(TOKENS, strings(&[])))).contains(TOKENS));
    }

    #[test]
    fn damaged_arrays_are_refused() {
        let types = |count| Value::Array(Array::I32(vec![1; count]));
        let scores = |scores: Vec<f32>| Value::Array(Array::F32(scores));
        for count in [0, 6, 8] {
            assert!(refusal(bpe, |m| drop(m.insert(TYPES, types(count)))).contains("7 tokens"));
        }
        assert!(refusal(spm, |m| drop(m.insert(SCORES, scores(vec![0.0])))).contains("1 entries"));
        let mut bad = vec![0.0; 6];
        bad[3] = f32::NAN;
        assert!(refusal(spm, |m| drop(m.insert(SCORES, scores(bad)))).contains("token 3"));
        let twice = strings(&["a", "b", "c", "ab", "abc", "b", "x"]);
        assert!(refusal(bpe, |m| drop(m.insert(TOKENS, twice))).contains("1 and 5"));
        for (second, why) in [
            ("b z", "lacks"),
            ("b ", "two tokens"),
            (" b", "two tokens"),
            ("b", "two tokens"),
        ] {
            let merges = strings(&["a b", second]);
            let told = refusal(bpe, |m| drop(m.insert(MERGES, merges)));
            assert!(told.contains("merge 1") && told.contains(why), "{told}");
        }
        // Of another type altogether: the container says so.
        let mut metadata = bpe();
        metadata.insert(TOKENS, Value::U32(3));
        assert!(Tokenizer::from_metadata(&metadata).is_err());
    }

    #[test]
    fn ids_out_of_range_are_refused() {
        for key in [BOS, EOS, EOT, EOM] {
            let refused = refusal(bpe, |m| drop(m.insert(key, Value::U32(7))));
            assert!(
                refused.contains(key) && refused.contains("7 tokens"),
                "{refused}"
            );
        }
        assert!(refusal(spm, |m| drop(m.insert(UNKNOWN, Value::U32(u32::MAX)))).contains(UNKNOWN));
        assert!(refusal(bpe, |m| drop(m.insert(ADD_BOS, Value::Bool(true)))).contains(BOS));
        // The usual places of SentencePiece do not exist in so small a vocabulary.
        let small = |m: &mut Metadata| {
            m.insert(TOKENS, strings(&["a"]));
            m.remove(TYPES);
            m.remove(SCORES);
        };
        assert!(refusal(spm, small).contains(BOS));
    }

    #[test]
    fn odd_but_sound_vocabularies_load() {
        let mut metadata = bpe();
        metadata.insert(TOKENS, strings(&["a", "b", "c", "ab", "abc", "", ""]));
        metadata.insert(TYPES, Value::Array(Array::I32(vec![1, 1, 1, 1, 1, 99, -5])));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        assert_eq!(tokenizer.decode(&[0, 5, 6], true).unwrap(), "a");
        let mut metadata = spm();
        metadata.remove(TYPES);
        metadata.remove(SCORES);
        metadata.insert(ADD_BOS, Value::Bool(false));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        let ids = tokenizer.encode("a", EncodeOptions::PLAIN).unwrap();
        assert_eq!(ids, [5]);
    }

    #[test]
    fn what_cannot_be_spelled_is_an_error_not_a_panic() {
        let mut metadata = spm();
        metadata.insert(TOKENS, strings(&["a", "b", "c"]));
        metadata.remove(TYPES);
        metadata.remove(SCORES);
        metadata.insert(UNKNOWN, Value::U32(2));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        let encode = |text| tokenizer.encode(text, EncodeOptions::PLAIN);
        // The space before the text, and the two unknown letters, are one unknown each.
        assert_eq!(encode("ayzb").unwrap(), [2, 0, 2, 1]);
    }
}

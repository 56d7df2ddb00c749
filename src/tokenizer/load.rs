//! Reading a tokenizer from a file's metadata. Nothing in there is trusted.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::gguf::Metadata;

use super::bpe::{Bpe, Merges, byte_ids};
use super::merge::NONE;
use super::special::{self, Specials};
use super::spm::{self, Spm};
use super::vocabulary::{Kind, Spelling, Vocabulary, byte_token, reserved};
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
    pub fn from_metadata(metadata: &Metadata) -> Result<Tokenizer> {
        let model = metadata
            .str(MODEL)?
            .ok_or_else(|| Error::tokenizer(format!("the file has none (it lacks {MODEL})")))?;
        let texts = metadata.strings(TOKENS)?.unwrap_or_default();
        if texts.is_empty() {
            return Err(Error::tokenizer(format!(
                "the vocabulary is empty or missing ({TOKENS})"
            )));
        }
        let names = names(texts)?;
        let mut kinds = kinds(metadata, texts.len())?;
        for id in special::ends(&names) {
            // As llama.cpp: what ends a generation is no text, whatever the file says.
            kinds[id as usize] = Kind::Control;
        }
        match model {
            "gpt2" => load_bpe(metadata, texts, &names, kinds),
            "llama" => load_spm(metadata, texts, &names, kinds),
            other => Err(Error::tokenizer(format!(
                "the file's tokenizer '{}' is not supported; supported are gpt2 (byte-level BPE) and llama (SentencePiece BPE)",
                excerpt(other)
            ))),
        }
    }
}

fn load_bpe(
    metadata: &Metadata,
    texts: &[String],
    names: &Names,
    kinds: Vec<Kind>,
) -> Result<Tokenizer> {
    let pre = PreTokenizer::parse(metadata.str(PRE)?)?;
    let lines = metadata
        .strings(MERGES)?
        .ok_or_else(|| Error::tokenizer(format!("the file lacks the merges ({MERGES})")))?;
    let llama3 = pre == PreTokenizer::Llama3;
    let bpe = Bpe {
        pre,
        ignore_merges: llama3,
        bytes: byte_ids(names),
        merges: Merges::new(lines, names, texts.len())?,
    };
    let vocabulary = Vocabulary::new(texts, kinds, Spelling::ByteLevel, bpe.ignore_merges)?;
    let ids = special_ids(
        metadata,
        names,
        Defaults {
            bos: None,
            eos: None,
            add_bos: llama3,
        },
    )?;
    Ok(Tokenizer {
        specials: Specials::new(&vocabulary)?,
        vocabulary,
        model: Model::Bpe(bpe),
        ids,
    })
}

fn load_spm(
    metadata: &Metadata,
    texts: &[String],
    names: &Names,
    kinds: Vec<Kind>,
) -> Result<Tokenizer> {
    let mut bytes = Box::new([NONE; 256]);
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
    let ids = special_ids(metadata, names, defaults)?;
    Ok(Tokenizer {
        specials: Specials::new(&vocabulary)?,
        vocabulary,
        model: Model::Spm(spm),
        ids,
    })
}

/// The tokens by their spelling, which must differ (except for empty ones, which are never used).
fn names(texts: &[String]) -> Result<Names<'_>> {
    if u32::try_from(texts.len()).is_err() {
        return Err(Error::tokenizer("the vocabulary has too many tokens"));
    }
    let mut names = Names::new();
    names
        .try_reserve(texts.len())
        .map_err(|_| Error::OutOfMemory {
            bytes: texts.len().saturating_mul(size_of::<(&str, u32)>()),
        })?;
    for (id, text) in (0..).zip(texts).filter(|(_, text)| !text.is_empty()) {
        if let Some(other) = names.insert(text, id) {
            return Err(Error::tokenizer(format!(
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
        let rank = spm::rank(score)
            .ok_or_else(|| Error::tokenizer(format!("the score of token {id} is no number")))?;
        ranks.push(rank);
    }
    Ok(ranks)
}

fn check_length(key: &str, length: usize, tokens: usize) -> Result<()> {
    if length == tokens {
        return Ok(());
    }
    Err(Error::tokenizer(format!(
        "{key} has {length} entries for {tokens} tokens"
    )))
}

/// A token that the file names by its number.
fn token(metadata: &Metadata, key: &str, tokens: usize) -> Result<Option<u32>> {
    match metadata.u32(key)? {
        Some(id) if id as usize >= tokens => Err(Error::tokenizer(format!(
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

fn special_ids(metadata: &Metadata, names: &Names, defaults: Defaults) -> Result<SpecialIds> {
    let tokens = metadata.strings(TOKENS)?.unwrap_or_default().len();
    let named = |key| token(metadata, key, tokens);
    let bos = named(BOS)?.or(defaults.bos);
    let eos = named(EOS)?.or(defaults.eos);
    let eot = named(EOT)?.or_else(|| special::end_of_turn(names));
    let add_bos = metadata.bool(ADD_BOS)?.unwrap_or(defaults.add_bos);
    let add_eos = metadata.bool(ADD_EOS)?.unwrap_or(false);
    for (wanted, id, key) in [(add_bos, bos, BOS), (add_eos, eos, EOS)] {
        if wanted && id.is_none() {
            return Err(Error::tokenizer(format!(
                "texts are to begin or end with a token that the file does not name ({key})"
            )));
        }
    }
    let mut ends: Vec<u32> = special::ends(names)
        .chain(eos)
        .chain(eot)
        .chain(named(EOM)?)
        .collect();
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

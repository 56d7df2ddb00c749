//! What commands read: models, token files.

use crate::Result;
use crate::args::EngineArgs;
use mor::{KvType, Model, Session, SessionParams};
use std::path::Path;

/// The bytes of the default model, aligned for the engine.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static DEFAULT_MODEL: &Aligned<[u8]> =
    &Aligned(*include_bytes!("../../../models/austen-mor-5m-q8_0.gguf"));

/// The model at `path`, or the one that the program carries.
pub fn open(path: Option<&Path>) -> Result<Model> {
    Ok(match path {
        Some(path) => Model::open(path)?,
        None => Model::from_static(&DEFAULT_MODEL.0)?,
    })
}

/// Longest context that is planned without being asked for.
const DEFAULT_CONTEXT: usize = 4096;

/// `context`, or as many tokens as the model was trained for, within reason.
pub fn context(model: &Model, context: Option<usize>) -> usize {
    context.unwrap_or_else(|| model.hyperparameters().context_length.min(DEFAULT_CONTEXT))
}

/// A session as the arguments want it.
pub fn session(
    model: &Model,
    engine: &EngineArgs,
    default_kv: KvType,
    mut params: SessionParams,
) -> Result<Session<'static>> {
    if let Some(threads) = engine.threads {
        params.threads = threads;
    }
    params.kv = engine.kv.map_or(default_kv, KvType::from);
    let mut session = Session::new(model, &params)?;
    if let Some(cut) = engine.cut {
        session.set_cut(cut)?;
    }
    if let Some(limit) = engine.max_depth {
        session.set_depth_limit(limit)?;
    }
    Ok(session)
}

/// Token ids separated by white space, one sequence a line; empty lines are passed over.
pub fn token_lines(path: &Path) -> Result<Vec<Vec<u32>>> {
    let text = read_text(path)?;
    let mut lines = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let ids = line.split_whitespace().map(|word| {
            word.parse::<u32>().map_err(|_| {
                format!(
                    "'{}', line {}: '{word}' is no token id",
                    path.display(),
                    number + 1
                )
            })
        });
        let ids = ids.collect::<std::result::Result<Vec<_>, _>>()?;
        if !ids.is_empty() {
            lines.push(ids);
        }
    }
    if lines.is_empty() {
        return Err(format!("'{}' holds no token ids", path.display()).into());
    }
    Ok(lines)
}

/// A whole text file.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes =
        std::fs::read(path).map_err(|e| format!("cannot read '{}': {e}", path.display()))?;
    String::from_utf8(bytes).map_err(|_| format!("'{}' is no UTF-8 text", path.display()).into())
}

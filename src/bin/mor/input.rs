//! What commands read: models, token files.

use crate::Result;
use crate::args::{EngineArgs, TextArgs};
use crate::terminal::tell;
use mor::{Device, KvType, LoadParams, Model, Session, SessionParams};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::Once;

/// The bytes of the default model, aligned for the engine.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static DEFAULT_MODEL: &Aligned<[u8]> =
    &Aligned(*include_bytes!("../../../models/austen-mor-5m-q8_0.gguf"));

/// The model at `path`, or the one that the program carries.
pub fn open(path: Option<&Path>, device: Device) -> Result<Model> {
    Ok(match path {
        Some(path) => {
            readable(path)?;
            let params = LoadParams {
                device,
                ..Default::default()
            };
            Model::open_with(path, &params)?
        }
        None => Model::from_static_on(&DEFAULT_MODEL.0, device)?,
    })
}

/// Longest context that is planned without being asked for.
const DEFAULT_CONTEXT: usize = 4096;

/// `context`, or as many tokens as the model was trained for, within reason.
pub fn context(model: &Model, context: Option<usize>) -> Result<usize> {
    match context {
        Some(0) => Err("a context of 0 tokens holds nothing; give more with -c".into()),
        Some(context) => Ok(context),
        None => Ok(model.hyperparameters().context_length.min(DEFAULT_CONTEXT)),
    }
}

/// Tells where a session is planned for more tokens than its model was trained for.
pub fn tell_of_context(session: &Session) {
    let trained = session.model().hyperparameters().context_length;
    let context = session.plan().params().context;
    if context > trained {
        tell(format_args!(
            "mor: the context of {context} tokens is longer than the {trained} that the model was trained for; what comes after those may make no sense"
        ));
    }
}

/// Tells where a cut changes nothing, but not again for each of a command's sessions.
pub fn tell_of_cut(model: &Model, cut: Option<f32>) {
    static TOLD: Once = Once::new();
    if cut.is_some() && model.hyperparameters().router.is_none() {
        TOLD.call_once(|| {
            tell(format_args!(
                "mor: the model has no routers, so --cut changes nothing"
            ));
        });
    }
}

/// A session as the arguments want it.
pub fn session(
    model: &Model,
    engine: &EngineArgs,
    default_kv: KvType,
    mut params: SessionParams,
) -> Result<Session> {
    if let Some(threads) = engine.threads {
        params.threads = threads;
    }
    params.kv = engine.kv.map_or(default_kv, KvType::from);
    let mut session = Session::new(model, &params)?;
    tell_of_cut(model, engine.cut);
    if let Some(cut) = engine.cut {
        session.set_cut(cut)?;
    }
    if let Some(limit) = engine.max_depth {
        session.set_depth_limit(limit)?;
    }
    Ok(session)
}

/// A line of a file of token ids.
pub struct TokenLine {
    /// Its number in the file, from 0.
    pub number: usize,
    /// One or more.
    pub ids: Vec<u32>,
}

/// Token ids of a model separated by white space, one sequence a line; blank lines are passed over.
pub fn token_lines(path: &Path, model: &Model) -> Result<Vec<TokenLine>> {
    let text = read_text(path)?;
    let mut lines = Vec::new();
    // Some editors write a byte order mark, which is no white space.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    for (number, line) in text.lines().enumerate() {
        let ids = line.split_whitespace().map(|word| {
            word.parse::<u32>().map_err(|_| {
                format!(
                    "{}, line {}: '{word}' is no token id; give whole numbers separated by white space",
                    named(path),
                    number + 1
                )
            })
        });
        let ids = ids.collect::<std::result::Result<Vec<_>, _>>()?;
        if !ids.is_empty() {
            lines.push(TokenLine { number, ids });
        }
    }
    if lines.is_empty() {
        let name = named(path);
        return Err(format!("{name} holds no token ids; give at least one line of them").into());
    }
    let vocab = model.hyperparameters().vocab_size;
    for line in &lines {
        if let Some(id) = line.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(format!(
                "{}, line {}: the model has no token {id}; its vocabulary ends at {}",
                named(path),
                line.number + 1,
                vocab - 1
            )
            .into());
        }
    }
    Ok(lines)
}

/// The text that was typed, or that of the file without its last line's end.
pub fn prompt(args: &TextArgs) -> Result<String> {
    let Some(path) = &args.file else {
        return Ok(args.prompt.clone().unwrap_or_default());
    };
    let mut text = read_text(path)?;
    let line_end = if text.ends_with("\r\n") {
        2
    } else {
        usize::from(text.ends_with('\n'))
    };
    text.truncate(text.len() - line_end);
    Ok(text)
}

/// A whole text file; `-` is standard input.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = match is_standard_input(path) {
        true => {
            let mut bytes = Vec::new();
            let read = std::io::stdin().read_to_end(&mut bytes);
            read.map_err(|error| format!("cannot read standard input: {error}"))?;
            bytes
        }
        false => std::fs::read(path).map_err(|e| unreadable(path, &e))?,
    };
    let no_text = |_| {
        format!(
            "{} is no UTF-8 text; convert it to UTF-8 first",
            named(path)
        )
    };
    Ok(String::from_utf8(bytes).map_err(no_text)?)
}

pub fn is_standard_input(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Fails for `-`, as which other programs know standard output: a file in the making is no stream.
pub fn no_stream(output: &Path) -> Result<()> {
    match is_standard_input(output) {
        true => Err(
            "cannot write to standard output; give a path with -o (./- for a file of that name)"
                .into(),
        ),
        false => Ok(()),
    }
}

/// How a text file is called in a sentence.
pub fn named(path: &Path) -> String {
    match is_standard_input(path) {
        true => "standard input".to_owned(),
        false => format!("'{}'", path.display()),
    }
}

/// Fails, with a sentence that says what to do, when there is no such file or folder or it may not
/// be read.
pub fn readable(path: &Path) -> Result<()> {
    let read = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::read_dir(path).map(drop),
        // To open a pipe would wait for its writer.
        Ok(metadata) if metadata.is_file() => std::fs::File::open(path).map(drop),
        Ok(_) => {
            let path = path.display();
            return Err(format!("'{path}' is a device, a pipe or a socket; give a file").into());
        }
        Err(error) => Err(error),
    };
    read.map_err(|e| unreadable(path, &e).into())
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    let advice = match error.kind() {
        ErrorKind::NotFound => "; check the spelling of its path",
        ErrorKind::PermissionDenied => "; ask its owner for permission",
        ErrorKind::IsADirectory => "; give a file",
        _ => "",
    };
    format!("cannot read '{}': {error}{advice}", path.display())
}

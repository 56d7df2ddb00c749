//! `mor tokenize` and `mor detokenize`.

use crate::Result;
use crate::args::{DetokenizeArgs, TokenizeArgs};
use crate::input;
use crate::terminal::stdout;
use mor::Device;
use mor::tokenizer::EncodeOptions;
use std::io::Write;

/// Shows the tokens of a text.
pub fn tokenize(args: &TokenizeArgs) -> Result<()> {
    let model = input::open(args.model.as_deref(), Device::Cpu)?;
    let tokenizer = model.tokenizer()?;
    let options = EncodeOptions {
        add_special: !args.plain,
        parse_special: !args.plain,
    };
    let ids = tokenizer.encode(&input::prompt(&args.text)?, options)?;
    let mut out = stdout();
    if args.pieces {
        for id in ids {
            // A token may be a part of a character.
            let bytes = tokenizer.token_bytes(id, true)?;
            match std::str::from_utf8(bytes) {
                Ok(text) => writeln!(out, "{id} {text:?}")?,
                Err(_) => writeln!(out, "{id} \"{}\"", bytes.escape_ascii())?,
            }
        }
    } else {
        let words: Vec<String> = ids.iter().map(u32::to_string).collect();
        writeln!(out, "{}", words.join(" "))?;
    }
    Ok(())
}

/// Shows the text of each line of tokens.
pub fn detokenize(args: &DetokenizeArgs) -> Result<()> {
    let model = input::open(args.model.as_deref(), Device::Cpu)?;
    let tokenizer = model.tokenizer()?;
    let mut out = stdout();
    for line in input::token_lines(&args.tokens, &model)? {
        // A model may have rows that its tokenizer has no text for; they are shown as nothing, as `run` does.
        let known = |id: &u32| (*id as usize) < tokenizer.vocab_size();
        let ids: Vec<u32> = line.ids.into_iter().filter(known).collect();
        writeln!(out, "{}", tokenizer.decode(&ids, args.special)?)?;
    }
    Ok(())
}

//! Talks with a model; each line of standard input is a message.
//!
//!     cargo run --release --example chat -- MODEL.gguf
//!
//! The same program in C++ is `examples/cpp/chat.cpp`.

use mor::chat::{ChatTemplate, Message};
use mor::generate::GenerateParams;
use mor::tokenizer::EncodeOptions;
use mor::{Model, Session, SessionParams};
use std::io::{Write, stdin, stdout};
use std::ops::ControlFlow;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: chat MODEL.gguf")?;
    let model = Model::open(path)?;
    let tokenizer = model.tokenizer()?;
    let template = ChatTemplate::from_metadata(&model.gguf().metadata, tokenizer)?;
    let mut session = Session::new(&model, &SessionParams::default())?;

    let mut turns: Vec<(&str, String)> = Vec::new();
    for line in stdin().lines() {
        turns.push(("user", line?));
        // The whole conversation is written and tokenized each time: only so does it stand as the model was trained on
        // it. What the session holds of it already is not run again.
        let tokens = match &template {
            Some(template) => {
                let messages = turns
                    .iter()
                    .map(|(role, content)| Message { role, content });
                let text = template.render(&messages.collect::<Vec<_>>(), true)?;
                tokenizer.encode(&text, EncodeOptions::CHAT)?
            }
            // A model that was never taught to chat continues one text.
            None => {
                let said: String = turns.iter().map(|(_, content)| content.as_str()).collect();
                tokenizer.encode(&said, EncodeOptions::PROMPT)?
            }
        };
        let kept = session.prefill_whole(&tokens)?;
        eprintln!("[{} of {} tokens run]", tokens.len() - kept, tokens.len());
        let mut answer = String::new();
        let params = GenerateParams {
            max_tokens: 100,
            ..Default::default()
        };
        session.generate(&params, |piece| {
            answer.push_str(piece.text);
            print!("{}", piece.text);
            match stdout().flush() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        println!();
        turns.push(("assistant", answer));
    }
    Ok(())
}

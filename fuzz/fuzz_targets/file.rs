//! A model file: its head is what comes, its weights are zeros. Whatever opens is run.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mor::chat::{ChatTemplate, Message};
use mor::generate::GenerateParams;
use mor::gguf::{Gguf, Metadata};
use mor::{Batch, EncodeOptions, Model, Request, Session, SessionParams, Tokenizer};
use std::ops::ControlFlow;

/// More than any model of the seeds has.
const WEIGHTS: usize = 800_000;

fuzz_target!(|head: &[u8]| {
    let mut bytes = head.to_vec();
    bytes.resize(head.len() + WEIGHTS, 0);
    if let Ok(gguf) = Gguf::parse(&bytes) {
        tokenize(&gguf.metadata);
    }
    if let Ok(model) = Model::from_bytes(bytes) {
        run(&model);
    }
});

fn tokenize(metadata: &Metadata) {
    let Ok(tokenizer) = Tokenizer::from_metadata(metadata) else {
        return;
    };
    let all = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    for text in ["Hello, wörld 12 \u{1F600}\n <s>", "  a", ""] {
        let Ok(tokens) = tokenizer.encode(text, all) else {
            continue;
        };
        assert!(tokens.len() <= tokenizer.max_tokens(text.len()));
        for token in tokens {
            let bytes = tokenizer.token_bytes(token, true).unwrap();
            assert!(bytes.len() <= tokenizer.max_piece_bytes());
        }
    }
    if let Ok(Some(template)) = ChatTemplate::from_metadata(metadata, &tokenizer) {
        let hello = Message {
            role: "user",
            content: "hello",
        };
        let _ = template.render(&[hello], true);
    }
}

fn run(model: &Model) {
    let vocabulary = model.hyperparameters().vocab_size as u32;
    let prompt = [1, 2, 3, 0, 5].map(|token| token % vocabulary);
    let params = SessionParams {
        context: 12,
        batch: 4,
        threads: 1,
        sequences: 2,
        ..Default::default()
    };
    if let Ok(mut session) = Session::new(model, &params) {
        let _ = session.prefill(&prompt);
        let _ = session.step(0);
        let params = GenerateParams {
            max_tokens: 3,
            stop: &["a", "bc"],
        };
        let _ = session.generate(&params, |_| ControlFlow::Continue(()));
    }
    if let Ok(mut batch) = Batch::new(model, &params) {
        for _ in 0..2 {
            let request = Request {
                prompt: &prompt,
                max_tokens: 3,
                ..Default::default()
            };
            let _ = batch.add(&request);
        }
        // Sixteen tokens of at most so many recursions.
        for _ in 0..200 {
            if batch.is_idle() || batch.tick().is_err() {
                return;
            }
        }
        panic!("the batch does not come to an end");
    }
}

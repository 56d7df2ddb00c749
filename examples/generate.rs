//! Continues a text and shows how deep each token went.
//!
//!     cargo run --release --example generate -- models/austen-mor-5m-q8_0.gguf "It is a truth"
//!
//! The same program in C is `examples/c/generate.c`.

use mor::generate::GenerateParams;
use mor::tokenizer::EncodeOptions;
use mor::{Model, SamplerParams, Session, SessionParams};
use std::io::Write;
use std::ops::ControlFlow;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (arguments.next(), arguments.next()) else {
        return Err("usage: generate MODEL.gguf PROMPT".into());
    };

    // Maps the file; the weights are used where they lie.
    let model = Model::open(path)?;
    let mut session = Session::new(&model, &SessionParams::default())?;
    session.set_sampler(SamplerParams {
        temperature: 0.7,
        seed: 1,
        ..Default::default()
    })?;

    let options = EncodeOptions::PROMPT;
    session.prefill(&model.tokenizer()?.encode(&prompt, options)?)?;

    print!("{prompt}");
    let params = GenerateParams {
        max_tokens: 64,
        stop: &["\n\n"],
    };
    // Whole characters only, and never a part of a stop string.
    let finish = session.generate(&params, |piece| {
        print!("{}", piece.text);
        match std::io::stdout().flush() {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    println!("\n({finish:?})");

    let recursions = model.hyperparameters().recursions;
    let histogram = session.depth_histogram();
    for (depth, tokens) in histogram.iter().enumerate().take(recursions + 1) {
        println!("{tokens:4} tokens ran {depth} recursions");
    }
    let (planned, used) = (session.plan().bytes(), session.kv_bytes_used());
    println!("{planned} bytes of session, of which {used} bytes of KV pages are in use");
    Ok(())
}

//! Continues every line of a file, many at once, with live progress.
//!
//!     printf 'It is a truth\nEmma was\nSir Walter\n' > prompts.txt
//!     cargo run --release --example batch -- models/austen-mor-5m-q8_0.gguf prompts.txt

use mor::batch::Event;
use mor::tokenizer::EncodeOptions;
use mor::{Batch, Model, Request, SamplerParams, SessionParams};
use std::io::Write;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(prompts)) = (arguments.next(), arguments.next()) else {
        return Err("usage: batch MODEL.gguf FILE".into());
    };
    let model = Model::open(path)?;
    let tokenizer = model.tokenizer()?;
    let prompts = std::fs::read_to_string(prompts)?;
    let mut waiting = prompts.lines().filter(|line| !line.is_empty());
    let total = waiting.clone().count();

    // Sixteen at a time; all memory is taken here.
    let params = SessionParams {
        context: 256,
        sequences: 16,
        batch: 64,
        ..Default::default()
    };
    let mut batch = Batch::new(&model, &params)?;
    let (start, mut tokens, mut asked, mut answered) = (Instant::now(), 0, 0, 0);
    loop {
        // Whenever there is a place, the next prompt takes it.
        while batch.free_places() > 0
            && let Some(prompt) = waiting.next()
        {
            let options = EncodeOptions::PROMPT;
            batch.add(&Request {
                prompt: &tokenizer.encode(prompt, options)?,
                max_tokens: 64,
                sampler: SamplerParams {
                    temperature: 0.7,
                    seed: asked,
                    ..Default::default()
                },
                ..Default::default()
            })?;
            asked += 1;
        }
        if batch.is_idle() {
            break;
        }
        for event in batch.tick()?.to_vec() {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Finished(sequence, finish) => {
                    let depths = batch.depths(sequence)?;
                    let sum: usize = depths.iter().map(|depth| usize::from(*depth)).sum();
                    let mean = sum as f64 / depths.len().max(1) as f64;
                    let text = tokenizer.decode(batch.tokens(sequence)?, false)?;
                    println!("\r{text}\n({finish:?}, {mean:.2} recursions a token)\n");
                    if let Some(failure) = batch.failure(sequence)? {
                        eprintln!("\r{failure}");
                    }
                    batch.remove(sequence)?;
                    answered += 1;
                }
                // With too little memory sequences take turns; nothing is lost.
                _ => {}
            }
        }
        let rate = f64::from(tokens) / start.elapsed().as_secs_f64();
        eprint!("\r{answered} of {total} answered, {rate:.0} tokens a second ");
        std::io::stderr().flush()?;
    }
    eprintln!();
    Ok(())
}

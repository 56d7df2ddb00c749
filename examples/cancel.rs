//! Ends a generation from another thread.
//!
//!     cargo run --release --example cancel -- models/austen-mor-5m-q8_0.gguf
//!
//! The same program in C is `examples/c/cancel.c`.

use mor::generate::GenerateParams;
use mor::{Model, Session, SessionParams};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: cancel MODEL.gguf")?;
    let model = Model::open(path)?;
    let params = SessionParams {
        context: 100_000,
        ..Default::default()
    };
    let mut session = Session::new(&model, &params)?;
    session.prefill(&[1, 2, 3])?;

    // Belongs to the session and may go to any thread.
    let canceller = session.canceller()?;
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        canceller.cancel();
        Instant::now()
    });
    let endless = GenerateParams {
        max_tokens: usize::MAX,
        ..Default::default()
    };
    let finish = session.generate(&endless, |_| ControlFlow::Continue(()))?;
    let asked = other.join().map_err(|_| "the other thread panicked")?;
    println!(
        "{finish:?} {:?} after it was asked for; the session holds {} tokens and can go on",
        asked.elapsed(),
        session.tokens().len()
    );
    session.step(4)?;
    Ok(())
}

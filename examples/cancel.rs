//! Ends a long prompt from another thread. (A generation ends so too, with `Finish::Cancelled`.)
//!
//!     cargo run --release --example cancel -- models/austen-mor-5m-q8_0.gguf
//!
//! The same program in C is `examples/c/cancel.c`.

use mor::{Error, Model, Session, SessionParams};
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
    // Longer than any machine takes for it.
    let prompt: Vec<u32> = (0..90_000).map(|i| 5 + i % 1000).collect();
    let outcome = session.prefill(&prompt);
    let asked = other.join().map_err(|_| "the other thread panicked")?;
    match outcome {
        Err(Error::Cancelled) => println!(
            "cancelled {:?} after it was asked for; the session holds {} tokens and can go on",
            asked.elapsed(),
            session.tokens().len()
        ),
        other => return Err(format!("not cancelled: {other:?}").into()),
    }
    session.step(4)?;
    Ok(())
}

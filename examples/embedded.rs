//! A control loop: memory of its own, everything resident before it begins, a token on time.
//!
//!     cargo run --release --example embedded -- models/austen-mor-5m-q8_0.gguf
//!
//! The same program in C is `examples/c/embedded.c`.

use mor::{LoadParams, Model, Plan, SamplerParams, Session, SessionParams};
use std::time::{Duration, Instant};

/// The session's whole memory, reserved when the program is linked.
#[repr(align(64))]
struct Memory([u8; 4 << 20]);
static mut MEMORY: Memory = Memory([0; 4 << 20]);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args()
        .nth(1)
        .ok_or("usage: embedded MODEL.gguf")?;
    // A copy: no page comes from a disk later, and nobody can truncate it.
    let load = LoadParams {
        copy: true,
        ..Default::default()
    };
    let model = Model::open_with(path, &load)?;

    let params = SessionParams {
        context: 128,
        batch: 16,
        threads: 1,
        prefault: true,
        ..Default::default()
    };
    let plan = Plan::new(&model, &params)?;
    println!("the session will take {} bytes", plan.bytes());
    // SAFETY: this is the only reference to it, and `main` runs once.
    #[allow(static_mut_refs)]
    let memory = unsafe { &mut MEMORY };
    let mut session = Session::with_plan_in(&model, plan, &mut memory.0)?;
    session.set_sampler(SamplerParams::greedy())?;

    // The deepest recursions are left out when the token would be late.
    const BUDGET: Duration = Duration::from_millis(5);
    session.set_time_budget(Some(BUDGET));

    session.prefill(&[1, 2, 3])?;
    let (mut worst, mut late) = (Duration::ZERO, 0);
    for _ in 0..100 {
        let token = session.sample()?;
        let start = Instant::now();
        session.step(token)?;
        let time = start.elapsed();
        worst = worst.max(time);
        late += usize::from(time > BUDGET);
    }
    println!("100 steps within {BUDGET:?}: the slowest took {worst:?}, {late} were late");
    println!("depths: {:?}", session.depths());
    Ok(())
}

//! `mor bench -b`: throughput of many sequences at once. As in the MoR paper's measurement the lengths
//! of the answers are normally distributed; unlike there everything is counted: prompts, keys and
//! values, logits, sampling.

use crate::Result;
use crate::args::BenchArgs;
use crate::input;
use crate::terminal::{Progress, counted, mebibytes, one_line, stdout};
use mor::batch::{Counters, Event};
use mor::convert::RandomTokens;
use mor::{Batch, Model, Plan, Request, SamplerParams, SequenceId, SessionParams};
use serde_json::json;
use std::collections::HashMap;
use std::io::Write;
use std::time::{Duration, Instant};

/// Tokens that a sequence generates on average, when nothing else is said: the paper's.
const MEAN_OUTPUT: usize = 256;
/// Each place serves so many sequences on average.
const ROUNDS: usize = 2;

/// Measures every number of sequences with every number of threads.
pub fn bench_batch(args: &BenchArgs) -> Result<()> {
    let single = |what: &str, values: &Option<Vec<usize>>, default: usize| match values.as_deref() {
        None => Ok(default),
        Some([one]) => Ok(*one),
        Some(_) => Err(format!(
            "with -b there is one number of tokens; give one with {what}"
        )),
    };
    let load = Load {
        prompt: single("-p", &args.prompt, 1)?,
        output: single("-n", &args.generation, MEAN_OUTPUT)?,
        arrivals: args.arrivals,
    };
    if load.prompt == 0 || load.output == 0 {
        return Err("with -b a sequence has a prompt and an answer of at least one token".into());
    }
    if args.repeats.is_some() {
        return Err("-r goes with one sequence; with -b make the answers longer (-n)".into());
    }
    if args.before != [0] {
        return Err("-d goes with one sequence; with -b make the prompt longer (-p)".into());
    }
    if args
        .arrivals
        .is_some_and(|rate| rate <= 0.0 || !rate.is_finite())
    {
        return Err("arrivals are a positive number a second".into());
    }
    let model = input::open(Some(&args.model), args.device)?;
    input::tell_of_cut(&model, args.cut);
    let threads = args.threads();
    let mut all = Vec::new();
    for threads in threads {
        let with = |sequences: &usize| params(args, &load, *sequences, threads);
        all.extend(args.sequences.iter().map(with));
    }
    // What cannot be had is told before anything is measured.
    for params in &all {
        Plan::batch(&model, params)?;
    }
    let mut results = Vec::new();
    for params in &all {
        let measured = measure(&model, args, &load, params)?;
        if !args.json {
            if results.is_empty() {
                heading(&model, &load)?;
            }
            writeln!(stdout(), "{}", line(&measured))?;
            stdout().flush()?;
        }
        results.push(measured);
    }
    if args.json {
        let first = results.first();
        let object = json!({
            "model": model.hyperparameters().name,
            "kind": model.hyperparameters().kind(),
            "recursions": model.hyperparameters().recursions,
            "weight_bytes": model.weight_bytes(),
            "prompt_tokens_per_second": null,
            "generation_tokens_per_second": first.map(Measured::tokens_per_second),
            "mean_depth": first.map(Measured::mean_depth),
            "session_bytes": first.map(|m| m.plan_bytes),
            "device_bytes": first.map(|m| m.device_bytes),
            "threads": first.map(|m| m.threads),
            "sequences": first.map(|m| m.sequences),
            "prompt_tokens": load.prompt,
            "mean_output_tokens": load.output,
            "arrivals_per_second": load.arrivals,
            "in_step": args.in_step,
            "tests": results.iter().map(as_json).collect::<Vec<_>>(),
        });
        writeln!(stdout(), "{}", serde_json::to_string_pretty(&object)?)?;
    }
    Ok(())
}

/// What the sequences are.
struct Load {
    prompt: usize,
    /// In mean; the standard deviation is a quarter of it.
    output: usize,
    /// Sequences that come in a second, at random; `None`: the next comes when there is a place.
    arrivals: Option<f64>,
}

/// What a test measured, while there was work for all places.
struct Measured {
    sequences: usize,
    threads: usize,
    rows: usize,
    seconds: f64,
    tokens: u64,
    /// Tokens that were run, prompts among them, and their recursions.
    run: u64,
    recursions: u64,
    counters: Counters,
    plan_bytes: usize,
    device_bytes: usize,
    /// The most bytes of pages in use.
    kv_bytes: usize,
    first_token: Duration,
    sequences_begun: usize,
}

/// The next of a sequence of lengths around a mean.
fn length(random: &mut RandomTokens, mean: usize) -> usize {
    // The sum of twelve uniform numbers is as good as normal, with a deviation of 1.
    let normal = (0..12).map(|_| uniform(random)).sum::<f64>() - 6.0;
    let length = (mean as f64 * (1.0 + normal / 4.0)).round();
    (length.max(1.0) as usize).min(2 * mean)
}

/// Whole numbers below this serve as uniform numbers.
const UNIFORM: u32 = 1 << 20;

/// A number between 0 and 1.
fn uniform(random: &mut RandomTokens) -> f64 {
    (f64::from(random.next().unwrap_or(0)) + 0.5) / f64::from(UNIFORM)
}

fn params(args: &BenchArgs, load: &Load, sequences: usize, threads: usize) -> SessionParams {
    let mut params = SessionParams {
        context: load.output.saturating_mul(2).saturating_add(load.prompt),
        sequences,
        batch: args.batch.unwrap_or(sequences.max(load.prompt.min(64))),
        threads,
        ..Default::default()
    };
    if let Some(kv) = args.kv {
        params.kv = kv.into();
    }
    params
}

fn measure(
    model: &Model,
    args: &BenchArgs,
    load: &Load,
    params: &SessionParams,
) -> Result<Measured> {
    let SessionParams {
        sequences, threads, ..
    } = *params;
    let mut batch = Batch::new(model, params)?;
    batch.set_in_step(args.in_step);
    let total = sequences * ROUNDS;
    let progress = Progress::new("measuring", (total * load.output) as u64);
    let mut lengths = RandomTokens::new(UNIFORM as usize, 7);
    let mut tokens = RandomTokens::new(model.hyperparameters().vocab_size, 1);
    let mut begun: HashMap<SequenceId, (Instant, bool)> = HashMap::new();
    let (mut added, mut drawn, mut kv_bytes) = (0, 0, 0);
    let (mut run, mut recursions) = (0, 0);
    let (mut first_token, mut first_tokens) = (Duration::ZERO, 0);
    let start = Instant::now();
    let mut next_arrival = 0.0;
    while added < total || (load.arrivals.is_some() && !batch.is_idle()) {
        while added < total && batch.free_places() > 0 {
            if let Some(rate) = load.arrivals {
                if start.elapsed().as_secs_f64() < next_arrival {
                    break;
                }
                // The time to the next is exponentially distributed.
                next_arrival -= uniform(&mut lengths).ln() / rate;
            }
            let prompt: Vec<u32> = tokens.by_ref().take(load.prompt).collect();
            let id = batch.add(&Request {
                prompt: &prompt,
                max_tokens: length(&mut lengths, load.output),
                sampler: SamplerParams {
                    seed: added as u64,
                    ..Default::default()
                },
                cut: args.cut,
                depth_limit: args.max_depth,
                ignore_end: true,
                ..Default::default()
            })?;
            begun.insert(id, (Instant::now(), false));
            added += 1;
        }
        let events = batch.tick()?.to_vec();
        if events.is_empty() && batch.is_idle() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut drawn_now = 0;
        for event in events {
            match event {
                Event::Token { sequence, .. } => {
                    drawn_now += 1;
                    if let Some((since, seen @ false)) = begun.get_mut(&sequence) {
                        *seen = true;
                        first_token += since.elapsed();
                        first_tokens += 1;
                    }
                }
                Event::Finished(sequence, _) => {
                    let depths = batch.depths(sequence)?;
                    run += depths.len() as u64;
                    recursions += depths.iter().map(|d| u64::from(*d)).sum::<u64>();
                    batch.remove(sequence)?;
                }
                _ => {}
            }
        }
        drawn += drawn_now;
        progress.advance(drawn_now);
        kv_bytes = kv_bytes.max(batch.kv_bytes_used());
    }
    Ok(Measured {
        sequences,
        threads,
        rows: batch.plan().params().batch,
        seconds: start.elapsed().as_secs_f64(),
        tokens: drawn,
        run,
        recursions,
        counters: *batch.counters(),
        plan_bytes: batch.plan().bytes(),
        device_bytes: batch.plan().device_bytes(),
        kv_bytes,
        first_token,
        sequences_begun: first_tokens,
    })
}

impl Measured {
    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
    fn mean_depth(&self) -> f64 {
        self.recursions as f64 / self.run.max(1) as f64
    }
    fn rows_run(&self) -> u64 {
        self.counters.rows.iter().sum()
    }
    /// Rows that had to run, over row places that ran.
    fn occupancy(&self) -> f64 {
        self.rows_run() as f64 / self.counters.row_capacity.max(1) as f64
    }
    fn rows_per_tick(&self) -> impl Iterator<Item = f64> {
        let ticks = self.counters.ticks.max(1) as f64;
        let used = self.counters.rows.iter().rposition(|rows| *rows > 0);
        let rows = &self.counters.rows[..used.map_or(0, |last| last + 1)];
        rows.iter().map(move |rows| *rows as f64 / ticks)
    }
    fn first_token_seconds(&self) -> f64 {
        self.first_token.as_secs_f64() / self.sequences_begun.max(1) as f64
    }
}

fn heading(model: &Model, load: &Load) -> Result<()> {
    let h = model.hyperparameters();
    let mut out = stdout();
    writeln!(
        out,
        "{}: {}, weights {}; prompts of {}, answers of {} ± {} tokens{}",
        one_line(h.name.as_deref().unwrap_or("(unnamed)")),
        h.kind(),
        mebibytes(model.weight_bytes()),
        counted(load.prompt, "token"),
        load.output,
        load.output / 4,
        match load.arrivals {
            Some(rate) => format!(", {rate} a second"),
            None => String::new(),
        }
    )?;
    writeln!(
        out,
        "{:>9} {:>7} {:>10} {:>6} {:>10} {:>11} {:>10} {:>9}  rows a tick, by recursion",
        "sequences", "threads", "tokens/s", "depth", "places used", "first token", "KV", "plan"
    )?;
    out.flush()?;
    Ok(())
}

fn line(m: &Measured) -> String {
    let rows: Vec<String> = m.rows_per_tick().map(|rows| format!("{rows:.1}")).collect();
    format!(
        "{:>9} {:>7} {:>10.2} {:>6.2} {:>9.1} % {:>8.1} ms {:>10} {:>9}  {}",
        m.sequences,
        m.threads,
        m.tokens_per_second(),
        m.mean_depth(),
        100.0 * m.occupancy(),
        1000.0 * m.first_token_seconds(),
        mebibytes(m.kv_bytes as u64),
        mebibytes((m.plan_bytes + m.device_bytes) as u64),
        rows.join(" "),
    )
}

fn as_json(m: &Measured) -> serde_json::Value {
    json!({
        "sequences": m.sequences,
        "threads": m.threads,
        "rows": m.rows,
        "seconds": m.seconds,
        "tokens": m.tokens,
        "tokens_per_second": m.tokens_per_second(),
        "mean_depth": m.mean_depth(),
        "ticks": m.counters.ticks,
        "rows_per_tick": m.rows_per_tick().collect::<Vec<_>>(),
        "share_of_places": m.occupancy(),
        "finished_rows": m.counters.finished,
        "logit_rows": m.counters.logits,
        "evictions": m.counters.evictions,
        "first_token_seconds": m.first_token_seconds(),
        "kv_bytes_peak": m.kv_bytes,
        "plan_bytes": m.plan_bytes,
        "device_bytes": m.device_bytes,
    })
}

//! `mor bench`: how fast a model runs, and what bounds it. Tests are those of llama-bench: random
//! tokens, a warm-up, then repetitions; a prompt is run up to its last token's logits, and in
//! generation every token is.

use crate::Result;
use crate::args::{BenchArgs, EngineArgs};
use crate::bandwidth;
use crate::bench_batch::bench_batch;
use crate::input;
use crate::terminal::{Progress, counted, mebibytes, one_line, session_memory, stdout};
use mor::convert::RandomTokens;
use mor::{KvType, Model, Plan, Session, SessionParams};
use serde_json::json;
use std::io::Write;
use std::time::Instant;

/// Measures prompts and generation.
pub fn bench(args: &BenchArgs) -> Result<()> {
    if !args.sequences.is_empty() {
        return bench_batch(args);
    }
    if args.repeats() == 0 {
        return Err("nothing is measured in 0 repetitions; give more with -r".into());
    }
    let tests = tests(args);
    let longest = tests
        .iter()
        .map(|test| test.before.saturating_add(test.tokens))
        .max();
    let Some(context) = longest else {
        return Err("there is nothing to measure; give tokens with -p or -n".into());
    };
    let model = input::open(Some(&args.model), args.device)?;
    let params = SessionParams {
        context,
        batch: args.batch.unwrap_or(0),
        ..Default::default()
    };
    let threads = args.threads();
    // What cannot be had is told before anything is measured.
    for &threads in &threads {
        let params = SessionParams {
            threads,
            ..params.clone()
        };
        Plan::new(&model, &params)?;
    }
    let progress = Progress::new("measuring", work(args, &tests));
    let mut bench = Bench {
        args,
        progress,
        random: RandomTokens::new(model.hyperparameters().vocab_size, 1),
        results: Vec::new(),
        session_bytes: Vec::new(),
    };
    for threads in threads {
        bench.with_threads(&model, &params, threads, &tests)?;
    }
    if args.json {
        let object = as_json(&model, &bench);
        writeln!(stdout(), "{}", serde_json::to_string_pretty(&object)?)?;
    }
    Ok(())
}

/// What is run and how often it is counted.
#[derive(Clone, Copy, PartialEq)]
struct Test {
    kind: Kind,
    tokens: usize,
    /// Tokens that are in the context already.
    before: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Prompt,
    Generation,
}

/// The tests of each number of threads, in order.
fn tests(args: &BenchArgs) -> Vec<Test> {
    let of = |kind, lengths: &[usize], before| {
        let lengths = lengths.iter().filter(|n| **n > 0);
        let test = |tokens: &usize| Test {
            kind,
            tokens: *tokens,
            before,
        };
        lengths.map(test).collect::<Vec<_>>()
    };
    let at = |before: &usize| {
        let prompt = args.prompt.as_deref().unwrap_or(&[512]);
        let generation = args.generation.as_deref().unwrap_or(&[128]);
        let prompts = of(Kind::Prompt, prompt, *before);
        [prompts, of(Kind::Generation, generation, *before)].concat()
    };
    args.before.iter().flat_map(at).collect()
}

/// Tokens that are run in all, a context for each test.
fn work(args: &BenchArgs, tests: &[Test]) -> u64 {
    let runs = args.repeats().saturating_add(1);
    let tokens = |test: &Test| test.before.saturating_add(test.tokens.saturating_mul(runs)) as u64;
    let once = tests.iter().map(tokens).fold(0, u64::saturating_add);
    once.saturating_mul(args.threads.len().max(1) as u64)
}

/// What a test measured.
struct Measured {
    test: Test,
    threads: usize,
    /// Tokens per second, of each repetition.
    samples: Vec<f64>,
    mean_depth: f64,
    reads: Option<Reads>,
    /// Bytes that the machine reads in a second with as many threads; a GPU's memory is not measured.
    bandwidth: Option<f64>,
}

/// Bytes that a generated token reads on average.
#[derive(Clone, Copy)]
struct Reads {
    weights: f64,
    kv: f64,
}

impl Measured {
    fn mean(&self) -> f64 {
        self.samples.iter().sum::<f64>() / self.samples.len() as f64
    }

    /// Of a sample; 0 of a single one.
    fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.samples.iter().map(|s| (s - mean).powi(2)).sum();
        (squares / (self.samples.len() - 1).max(1) as f64).sqrt()
    }

    fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len().is_multiple_of(2) {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        } else {
            sorted[middle]
        }
    }

    /// Bytes read in a second.
    fn bytes_per_second(&self) -> Option<f64> {
        self.reads
            .map(|reads| (reads.weights + reads.kv) * self.mean())
    }

    /// Of what the machine reads.
    fn share_of_bandwidth(&self) -> Option<f64> {
        Some(self.bytes_per_second()? / self.bandwidth?)
    }

    /// As llama-bench calls it.
    fn name(&self) -> String {
        let kind = match self.test.kind {
            Kind::Prompt => "pp",
            Kind::Generation => "tg",
        };
        match self.test.before {
            0 => format!("{kind}{}", self.test.tokens),
            before => format!("{kind}{} @ d{before}", self.test.tokens),
        }
    }
}

/// The measurement in progress.
struct Bench<'a> {
    args: &'a BenchArgs,
    progress: Progress,
    random: RandomTokens,
    results: Vec<Measured>,
    /// Of each number of threads, on the host and on a GPU.
    session_bytes: Vec<[usize; 2]>,
}

impl Bench<'_> {
    /// Runs all tests with so many threads.
    fn with_threads(
        &mut self,
        model: &Model,
        params: &SessionParams,
        threads: usize,
        tests: &[Test],
    ) -> Result<()> {
        let engine = EngineArgs {
            device: self.args.device,
            threads: Some(threads),
            kv: self.args.kv,
            cut: self.args.cut,
            max_depth: self.args.max_depth,
        };
        let mut session = input::session(model, &engine, KvType::F16, params.clone())?;
        if self.session_bytes.is_empty() && !self.args.json {
            self.heading(&session)?;
        }
        let plan = session.plan();
        self.session_bytes.push([plan.bytes(), plan.device_bytes()]);
        let bandwidth = match model.is_on_gpu() {
            true => None,
            false => bandwidth::measure(threads),
        };
        for test in tests {
            let measured = self.test(&mut session, *test, bandwidth)?;
            if !self.args.json {
                let line = line(&measured);
                self.progress.suspend(|| writeln!(stdout(), "{line}"))?;
            }
            self.results.push(measured);
        }
        if let (Some(bandwidth), false) = (bandwidth, self.args.json) {
            let line = format!(
                "memory: {:.1} GB/s are read with {}",
                bandwidth / 1e9,
                counted(threads, "thread")
            );
            self.progress.suspend(|| writeln!(stdout(), "{line}"))?;
        }
        Ok(())
    }

    fn test(
        &mut self,
        session: &mut Session,
        test: Test,
        bandwidth: Option<f64>,
    ) -> Result<Measured> {
        session.rewind(0)?;
        let before: Vec<u32> = self.random.by_ref().take(test.before).collect();
        for chunk in before.chunks(session.plan().params().batch) {
            session.prefill(chunk)?;
            self.progress.advance(chunk.len() as u64);
        }
        // The first run fills caches and finds pages, and is not counted.
        self.repetition(session, test)?;
        let (mut samples, mut depths) = (Vec::new(), 0);
        let mut reads = Reads {
            weights: 0.0,
            kv: 0.0,
        };
        for _ in 0..self.args.repeats() {
            samples.push(self.repetition(session, test)?);
            let ran = &session.depths()[test.before..];
            depths += ran.iter().map(|d| usize::from(*d)).sum::<usize>();
            if test.kind == Kind::Generation {
                add_reads(&mut reads, session, test.before);
            }
        }
        let tokens = (test.tokens * self.args.repeats()) as f64;
        let reads = Reads {
            weights: reads.weights / tokens,
            kv: reads.kv / tokens,
        };
        Ok(Measured {
            test,
            threads: session.plan().params().threads,
            samples,
            mean_depth: depths as f64 / tokens,
            reads: (test.kind == Kind::Generation).then_some(reads),
            bandwidth,
        })
    }

    /// Runs new tokens after the context, and returns how many of them were run in a second.
    fn repetition(&mut self, session: &mut Session, test: Test) -> Result<f64> {
        session.rewind(test.before)?;
        let tokens: Vec<u32> = self.random.by_ref().take(test.tokens).collect();
        let start = Instant::now();
        match test.kind {
            Kind::Prompt => {
                session.prefill(&tokens)?;
                session.logits()?;
            }
            Kind::Generation => {
                // It draws the next token itself, so that no logits have to be brought to the host.
                let draws = session.model().is_on_gpu();
                for token in &tokens {
                    if draws {
                        session.prefill(&[*token])?;
                        session.sample()?;
                    } else {
                        session.step(*token)?;
                    }
                }
            }
        }
        let time = start.elapsed();
        self.progress.advance(test.tokens as u64);
        Ok(test.tokens as f64 / time.as_secs_f64().max(1e-9))
    }

    /// Names what is measured.
    fn heading(&self, session: &Session) -> Result<()> {
        let model = session.model();
        let h = model.hyperparameters();
        let mut out = stdout();
        writeln!(
            out,
            "{}: {}, {}, weights {}, session {} (KV {}, {} a pass)",
            one_line(h.name.as_deref().unwrap_or("(unnamed)")),
            h.kind(),
            matrix_type(model),
            mebibytes(model.weight_bytes()),
            session_memory(session.plan()),
            session.plan().params().kv.tensor_type().name(),
            counted(session.plan().params().batch, "row"),
        )?;
        writeln!(
            out,
            "{:<16} {:>7} {:>20} {:>6} {:>16} {:>10} {:>7} {:>9}",
            "test",
            "threads",
            "tokens/s",
            "depth",
            "weights/token",
            "KV/token",
            "GB/s",
            "of memory"
        )?;
        Ok(())
    }
}

/// Adds up what the tokens from `first` on have read.
fn add_reads(sum: &mut Reads, session: &Session, first: usize) {
    let (model, plan, depths) = (session.model(), session.plan(), session.depths());
    let entry = plan.kv_bytes_per_token() / model.schedule().planes.len();
    for last in first..depths.len() {
        sum.weights += model.weight_bytes_read(usize::from(depths[last])) as f64;
        sum.kv += (model.kv_entries_read(&depths[..=last]) * entry as u64) as f64;
    }
}

/// The type that most of the weights have.
fn matrix_type(model: &Model) -> &'static str {
    let tensors = model.gguf().tensors();
    let bytes = |ty| {
        let same = tensors.iter().filter(|t| t.ty == ty);
        same.map(|t| t.bytes).sum::<usize>()
    };
    let most = tensors.iter().max_by_key(|t| bytes(t.ty));
    most.map_or("no weights", |t| t.ty.name())
}

/// A line of the table.
fn line(m: &Measured) -> String {
    let mut line = format!(
        "{:<16} {:>7} {:>20} {:>6.2}",
        m.name(),
        m.threads,
        format!("{:.2} ± {:.2}", m.mean(), m.deviation()),
        m.mean_depth
    );
    if let (Some(reads), Some(rate)) = (m.reads, m.bytes_per_second()) {
        line += &format!(
            " {:>16} {:>10} {:>7.2}",
            mebibytes(reads.weights as u64),
            mebibytes(reads.kv as u64),
            rate / 1e9,
        );
        if let Some(share) = m.share_of_bandwidth() {
            line += &format!(" {:>7.0} %", 100.0 * share);
        }
    }
    line
}

fn as_json(model: &Model, bench: &Bench) -> serde_json::Value {
    let first = |kind| bench.results.iter().find(|m| m.test.kind == kind);
    let (prompt, generation) = (first(Kind::Prompt), first(Kind::Generation));
    // Where both were measured, generation is what a model is run for.
    let main = generation.or(prompt);
    json!({
        "model": model.hyperparameters().name,
        "kind": model.hyperparameters().kind(),
        "type": matrix_type(model),
        "prompt_tokens_per_second": prompt.map(Measured::mean),
        "generation_tokens_per_second": generation.map(Measured::mean),
        "mean_depth": main.map(|m| m.mean_depth),
        "weight_bytes": model.weight_bytes(),
        "session_bytes": bench.session_bytes.first().map(|bytes| bytes[0]),
        "device_bytes": bench.session_bytes.first().map(|bytes| bytes[1]),
        "threads": main.map(|m| m.threads),
        "sequences": 1,
        "memory_bandwidth_bytes_per_second": main.and_then(|m| m.bandwidth),
        "tests": bench.results.iter().map(test_json).collect::<Vec<_>>(),
    })
}

fn test_json(m: &Measured) -> serde_json::Value {
    json!({
        "test": m.name(),
        "kind": match m.test.kind {
            Kind::Prompt => "prompt",
            Kind::Generation => "generation",
        },
        "tokens": m.test.tokens,
        "tokens_before": m.test.before,
        "threads": m.threads,
        "tokens_per_second": m.mean(),
        "standard_deviation": m.deviation(),
        "median": m.median(),
        "samples": m.samples,
        "mean_depth": m.mean_depth,
        "weight_bytes_per_token": m.reads.map(|reads| reads.weights),
        "kv_bytes_per_token": m.reads.map(|reads| reads.kv),
        "bytes_per_second": m.bytes_per_second(),
        "memory_bandwidth_bytes_per_second": m.bandwidth,
        "share_of_memory_bandwidth": m.share_of_bandwidth(),
    })
}

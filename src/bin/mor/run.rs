//! `mor run`, and what `mor chat` shares with it.

use crate::Result;
use crate::args::{RunArgs, SamplingArgs};
use crate::input;
use crate::interrupt::{INTERRUPTED, Interrupt};
use crate::terminal::{
    Progress, Stdout, counted, depth_style, grouped, has_colours, mebibytes, session_memory,
    stdout, tell,
};
use mor::generate::{Finish, GenerateParams, Piece};
use mor::tokenizer::{EncodeOptions, Utf8Stream};
use mor::{KvType, SamplerParams, Session, SessionParams, Tokenizer};
use std::io::Write;
use std::ops::ControlFlow;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Continues a text.
pub fn run(args: &RunArgs) -> Result<()> {
    let model = input::open(args.model.as_deref(), args.engine.device)?;
    let tokenizer = model.tokenizer()?;
    let params = SessionParams {
        context: input::context(&model, args.context)?,
        ..Default::default()
    };
    let mut session = input::session(&model, &args.engine, KvType::F16, params)?;
    input::tell_of_context(&session);
    session.set_sampler(sampler(&args.sampling))?;
    let options = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    let stop: Vec<&str> = args.stop.iter().map(String::as_str).collect();
    let params = GenerateParams {
        max_tokens: args.n,
        stop: &stop,
    };
    // Said before anything is printed.
    params.check()?;
    let text = input::prompt(&args.text)?;
    let prompt = tokenizer.encode(&text, options)?;
    if prompt.is_empty() {
        return Err("the prompt is empty, and this model has no token that begins a text; give some text with -p or -f".into());
    }
    let interrupt = Interrupt::new(session.canceller()?)?;
    interrupt.arm();
    let mut times = Times::default();
    prefill(&mut session, &prompt, &mut times)?;
    let mut out = Output::new(args.depths);
    out.echo(&session, tokenizer, &text)?;
    let finish = generate(&mut session, &params, &mut out, &mut times)?;
    out.end_line()?;
    if finish == Finish::ContextFull {
        tell(format_args!("mor: the context is full; -c makes it larger"));
    }
    summary(&mut session, &times, args.depths);
    if finish == Finish::Cancelled {
        stdout().flush()?;
        std::process::exit(INTERRUPTED.into());
    }
    Ok(())
}

pub fn sampler(args: &SamplingArgs) -> SamplerParams {
    let clock = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(0, |t| t.as_nanos() as u64)
    };
    SamplerParams {
        repeat_penalty: args.repeat_penalty,
        repeat_last_n: args.repeat_last_n,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        temperature: args.temp,
        seed: args.seed.unwrap_or_else(clock),
    }
}

/// Tokens and time of one exchange.
#[derive(Default)]
pub struct Times {
    prompt_tokens: usize,
    prompt: Duration,
    generated_tokens: usize,
    generation: Duration,
}

/// Runs a prompt.
pub fn prefill(session: &mut Session, tokens: &[u32], times: &mut Times) -> Result<()> {
    let (start, params) = (Instant::now(), session.plan().params());
    let needed = session.tokens().len() + tokens.len();
    if needed > params.context {
        let context = params.context;
        return Err(mor::Error::ContextFull { needed, context }.into());
    }
    let batch = params.batch;
    let progress = Progress::new("reading the prompt", tokens.len() as u64);
    for chunk in tokens.chunks(batch) {
        session.prefill(chunk)?;
        progress.advance(chunk.len() as u64);
    }
    times.prompt_tokens = tokens.len();
    times.prompt = start.elapsed();
    Ok(())
}

/// Writes until the model or the parameters end it.
pub fn generate(
    session: &mut Session,
    params: &GenerateParams,
    out: &mut Output,
    times: &mut Times,
) -> Result<Finish> {
    let (start, before) = (Instant::now(), session.tokens().len());
    let mut written = Ok(());
    let finish = session.generate(params, |piece| {
        written = out.piece(&piece);
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    written?;
    times.generated_tokens = session.tokens().len() - before;
    times.generation = start.elapsed();
    Ok(finish)
}

/// Standard output, coloured by depth when that is wanted.
pub struct Output {
    stream: Stdout,
    depths: bool,
    /// What was generated.
    pub text: String,
}

impl Output {
    pub fn new(depths: bool) -> Self {
        Output {
            stream: stdout(),
            depths: depths && has_colours(),
            text: String::new(),
        }
    }

    /// Shows the prompt, which is all that the session holds, as it was typed: with the names of
    /// special tokens, but without those that the file puts around every text.
    fn echo(&mut self, session: &Session, tokenizer: &Tokenizer, prompt: &str) -> Result<()> {
        if !self.depths {
            return Ok(self.write(prompt, 0)?);
        }
        let added = |token: Option<u32>, asked: bool| usize::from(asked && token.is_some());
        let first = added(tokenizer.bos(), tokenizer.add_bos());
        let last = session.tokens().len() - added(tokenizer.eos(), tokenizer.add_eos());
        let mut text = Utf8Stream::new();
        for i in first..last {
            let mut bytes = tokenizer.token_bytes(session.tokens()[i], true)?;
            if i == first && !prompt.starts_with(' ') {
                // SentencePiece's own space.
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
            let mut written = Ok(());
            text.push(bytes, |piece| {
                if written.is_ok() {
                    written = self.write(piece, session.depths()[i]);
                }
            });
            written?;
        }
        self.write(text.finish(), 0)?;
        Ok(())
    }

    fn piece(&mut self, piece: &Piece) -> std::io::Result<()> {
        self.text.push_str(piece.text);
        self.write(piece.text, piece.depth)
    }

    fn write(&mut self, text: &str, depth: u8) -> std::io::Result<()> {
        if self.depths && !text.is_empty() {
            let style = depth_style(usize::from(depth));
            write!(self.stream, "{style}{text}{style:#}")?;
        } else {
            self.stream.write_all(text.as_bytes())?;
        }
        self.stream.flush()
    }

    pub fn end_line(&mut self) -> std::io::Result<()> {
        self.stream.write_all(b"\n")
    }
}

/// What the run took, on standard error.
pub fn summary(session: &mut Session, times: &Times, depths: bool) {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let model = session.model().clone();
    let h = model.hyperparameters();
    let all = session.depths();
    let mean = all.iter().map(|d| f64::from(*d)).sum::<f64>() / all.len().max(1) as f64;
    let kv_bytes = session.kv_bytes_used() as u64;
    if depths {
        let histogram = session.depth_histogram();
        let counts = (0..=h.recursions).map(|depth| {
            let count = histogram[depth];
            let style = depth_style(depth);
            format!("{style}{depth}{style:#}: {count}")
        });
        let counts: Vec<_> = counts.collect();
        tell(format_args!("tokens by depth  {}", counts.join("  ")));
    }
    tell(format_args!(
        "prompt {}, {:.1} tokens/s | generation {}, {:.1} tokens/s | mean depth {mean:.2} of {} | weights {} | session {} (KV in use {}; {} bytes)",
        counted(times.prompt_tokens, "token"),
        rate(times.prompt_tokens, times.prompt),
        counted(times.generated_tokens, "token"),
        rate(times.generated_tokens, times.generation),
        h.recursions,
        mebibytes(model.weight_bytes()),
        session_memory(session.plan()),
        mebibytes(kv_bytes),
        grouped(kv_bytes),
    ));
}

//! `mor run` and `mor chat`.

use crate::Result;
use crate::args::{ChatArgs, RunArgs, SamplingArgs};
use crate::input;
use crate::terminal::{Progress, depth_style, grouped, mebibytes};
use mor::chat::{ChatTemplate, Message};
use mor::generate::{Finish, GenerateParams, Piece};
use mor::tokenizer::{EncodeOptions, Utf8Stream};
use mor::{KvType, Model, SamplerParams, Session, SessionParams, Tokenizer};
use rustyline::error::ReadlineError;
use std::io::Write;
use std::ops::ControlFlow;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Continues a text.
pub fn run(args: &RunArgs) -> Result<()> {
    let model = input::open(args.model.as_deref())?;
    let tokenizer = model.tokenizer()?;
    let params = SessionParams {
        context: input::context(&model, args.context),
        ..Default::default()
    };
    let mut session = input::session(&model, &args.engine, KvType::F16, params)?;
    session.set_sampler(sampler(&args.sampling))?;
    let options = EncodeOptions {
        add_special: true,
        parse_special: true,
    };
    let prompt = tokenizer.encode(&args.prompt, options)?;
    let mut times = Times::default();
    prefill(&mut session, &prompt, &mut times)?;
    let mut out = Output::new(args.depths);
    out.echo(&session, tokenizer, 0)?;
    let stop: Vec<&str> = args.stop.iter().map(String::as_str).collect();
    let params = GenerateParams {
        max_tokens: args.n,
        stop: &stop,
    };
    let finish = generate(&mut session, &params, &mut out, &mut times)?;
    out.end_line()?;
    if finish == Finish::ContextFull {
        eprintln!("mor: the context is full; -c makes it larger");
    }
    summary(&mut session, &times, args.depths);
    Ok(())
}

/// Talks, line by line.
pub fn chat(args: &ChatArgs) -> Result<()> {
    let model = input::open(args.model.as_deref())?;
    let tokenizer = model.tokenizer()?;
    let template = template(&model, tokenizer)?;
    let params = SessionParams {
        context: input::context(&model, args.context),
        ..Default::default()
    };
    let mut session = input::session(&model, &args.engine, KvType::F16, params)?;
    session.set_sampler(sampler(&args.sampling))?;
    let mut conversation: Vec<(&str, String)> = Vec::new();
    if let Some(system) = &args.system {
        conversation.push(("system", system.clone()));
    }
    let params = GenerateParams {
        max_tokens: args.n,
        stop: &[],
    };
    let mut editor = rustyline::DefaultEditor::new()?;
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if line.trim().is_empty() {
            continue;
        }
        // History is a convenience; a line that it does not take is still answered.
        let _ = editor.add_history_entry(&line);
        conversation.push(("user", line));
        let messages: Vec<Message> = conversation
            .iter()
            .map(|(role, content)| Message { role, content })
            .collect();
        let text = template.render(&messages, true)?;
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        let tokens = tokenizer.encode(&text, options)?;
        let mut times = Times::default();
        // What the session has already seen of it stays; at least one token must run.
        let same = |(a, b): &(&u32, &u32)| a == b;
        let seen = session
            .tokens()
            .iter()
            .zip(&tokens)
            .take_while(same)
            .count();
        let seen = seen.min(tokens.len().saturating_sub(1));
        session.rewind(seen)?;
        prefill(&mut session, &tokens[seen..], &mut times)?;
        let mut out = Output::new(args.depths);
        let finish = generate(&mut session, &params, &mut out, &mut times)?;
        out.end_line()?;
        conversation.push(("assistant", out.text));
        if finish == Finish::ContextFull {
            eprintln!("mor: the context is full; begin anew, or give more with -c");
        }
        summary(&mut session, &times, args.depths);
    }
}

/// The file's template; for a model that was never taught to chat, each message as a paragraph.
fn template(model: &Model, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    const PARAGRAPHS: &str =
        "{% for message in messages %}{{ message.content }}{{ '\\n\\n' }}{% endfor %}";
    if let Some(template) = ChatTemplate::from_metadata(&model.gguf().metadata, tokenizer)? {
        return Ok(template);
    }
    eprintln!("mor: the model has no chat template; each message is a paragraph that it continues");
    Ok(ChatTemplate::new(PARAGRAPHS, String::new(), String::new())?)
}

fn sampler(args: &SamplingArgs) -> SamplerParams {
    let clock = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(0, |t| t.as_nanos() as u64)
    };
    SamplerParams {
        repeat_penalty: args.repeat_penalty,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        temperature: args.temp,
        seed: args.seed.unwrap_or_else(clock),
        ..Default::default()
    }
}

/// Tokens and time of one exchange.
#[derive(Default)]
struct Times {
    prompt_tokens: usize,
    prompt: Duration,
    generated_tokens: usize,
    generation: Duration,
}

fn prefill(session: &mut Session, tokens: &[u32], times: &mut Times) -> Result<()> {
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

fn generate(
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
struct Output {
    stream: anstream::Stdout,
    depths: bool,
    /// What was generated.
    text: String,
}

impl Output {
    fn new(depths: bool) -> Self {
        Output {
            stream: anstream::stdout(),
            depths,
            text: String::new(),
        }
    }

    /// Shows the session's tokens from `start` on.
    fn echo(&mut self, session: &Session, tokenizer: &Tokenizer, start: usize) -> Result<()> {
        let mut text = Utf8Stream::new();
        for (token, depth) in session.tokens().iter().zip(session.depths()).skip(start) {
            let mut written = Ok(());
            text.push(tokenizer.token_bytes(*token, false)?, |piece| {
                if written.is_ok() {
                    written = self.write(piece, *depth);
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

    fn end_line(&mut self) -> std::io::Result<()> {
        self.stream.write_all(b"\n")
    }
}

/// What the run took, on standard error.
fn summary(session: &mut Session, times: &Times, depths: bool) {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let model = session.model().clone();
    let h = model.hyperparameters();
    let all = session.depths();
    let mean = all.iter().map(|d| f64::from(*d)).sum::<f64>() / all.len().max(1) as f64;
    let session_bytes = session.plan().bytes() as u64;
    let kv_bytes = session.kv_bytes_used() as u64;
    if depths {
        let histogram = session.depth_histogram();
        let counts = (0..=h.recursions).map(|depth| {
            let count = histogram[depth];
            let style = depth_style(depth);
            format!("{style}{depth}{style:#}: {count}")
        });
        let counts: Vec<_> = counts.collect();
        anstream::eprintln!("tokens by depth  {}", counts.join("  "));
    }
    eprintln!(
        "prompt {} tokens, {:.1} tokens/s | generation {} tokens, {:.1} tokens/s | mean depth {mean:.2} of {} | weights {} | session {} (KV in use {}; {} bytes)",
        times.prompt_tokens,
        rate(times.prompt_tokens, times.prompt),
        times.generated_tokens,
        rate(times.generated_tokens, times.generation),
        h.recursions,
        mebibytes(model.weight_bytes()),
        mebibytes(session_bytes),
        mebibytes(kv_bytes),
        grouped(kv_bytes),
    );
}

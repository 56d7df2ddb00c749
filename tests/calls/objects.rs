//! The objects that a table's calls work on, and each call in Rust.

use mor::batch::{self, Event, Pressure, Status};
use mor::chat::{ChatTemplate, Message};
use mor::generate::{Finish, GenerateParams};
use mor::model::{Device, LoadParams, RouterKind};
use mor::tokenizer::{EncodeOptions, Utf8Stream};
use mor::{
    Batch, Canceller, Error, KvType, Model, Plan, Request, Result, Routing, SamplerParams,
    SequenceId, Session, SessionParams,
};
use std::fmt::Display;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::str::FromStr;

/// The result of a call, or the name of a status and the sentence.
pub type Outcome = std::result::Result<String, (&'static str, String)>;

pub struct Objects {
    /// The file that the table is for.
    file: PathBuf,
    threads: usize,
    model: Option<Model>,
    session: Option<(Session, Canceller)>,
    /// What the last generation called back with.
    pieces: Vec<(u32, u8)>,
    text: String,
    state: Vec<u8>,
    batch: Option<Batch>,
    /// The sequence that each place of the table has.
    sequences: [Option<SequenceId>; 8],
}

impl Objects {
    pub fn new(file: PathBuf, threads: usize) -> Self {
        Objects {
            file,
            threads,
            model: None,
            session: None,
            pieces: Vec::new(),
            text: String::new(),
            state: Vec::new(),
            batch: None,
            sequences: [None; 8],
        }
    }

    pub fn call(&mut self, verb: &str, args: &[&str]) -> Outcome {
        let outcome = match verb {
            "load" | "load_bytes" => self.load(args),
            "load_on" => self.load_on(args),
            "describe" | "metadata" | "plan" | "batch_plan" | "batch_plan_in" | "batch_pages" => {
                self.ask_model(verb, args)
            }
            "encode" | "decode" | "decode_each" | "token_bytes" | "is_end" | "format_chat" => {
                self.tokenize(verb, args)
            }
            "session" => self.create_session(args[0]),
            "generate" | "generate_until" | "generate_cancel" => self.generate(verb, args),
            "pieces" => Ok(list(self.pieces.iter().map(|(t, d)| format!("{t}:{d}")))),
            "text" => Ok(self.text.clone()),
            "batch" => self.create_batch(args[0]),
            "add" | "fork" => self.add(verb, args),
            "tick" | "run" => self.tick(verb),
            "stop" | "remove" | "resume" | "status" | "failure" | "batch_tokens"
            | "batch_depths" => self.ask_sequence(verb, number(args[0])),
            "batch_idle" | "batch_kv_bytes" | "batch_counters" | "in_step" => {
                self.ask_batch(verb, args)
            }
            _ => self.ask_session(verb, args),
        };
        outcome.map_err(|error| (status(&error), error.to_string()))
    }

    fn load(&mut self, args: &[&str]) -> Result<String> {
        let path = self.path(args[0]);
        self.model = Some(match args.get(1) {
            None => Model::open(path)?,
            Some(count) => {
                let bytes = std::fs::read(path).unwrap();
                Model::from_bytes(bytes[..number(count)].to_vec())?
            }
        });
        Ok(String::new())
    }

    fn load_on(&mut self, args: &[&str]) -> Result<String> {
        let device = match args[1] {
            "cpu" => Device::Cpu,
            "cuda" => Device::Cuda(0),
            other => panic!("no device '{other}'"),
        };
        let params = LoadParams {
            device,
            ..LoadParams::default()
        };
        self.model = Some(Model::open_with(self.path(args[0]), &params)?);
        Ok(String::new())
    }

    fn path(&self, name: &str) -> PathBuf {
        match name {
            "@" => self.file.clone(),
            name => crate::common::root().join(name),
        }
    }

    fn model(&self) -> &Model {
        self.model.as_ref().expect("the table loads a model first")
    }

    fn session(&mut self) -> &mut Session {
        &mut self.session.as_mut().expect("the table makes a session").0
    }

    fn batch(&mut self) -> &mut Batch {
        self.batch.as_mut().expect("the table makes a batch first")
    }

    fn ask_model(&self, verb: &str, args: &[&str]) -> Result<String> {
        let model = self.model();
        let params = || self.params(args[0]);
        Ok(match verb {
            "describe" => describe(model),
            "metadata" => {
                let text = model.gguf().metadata.str(args[0])?;
                text.ok_or_else(|| Error::argument("no such key"))?.into()
            }
            "plan" => plan_line(&Plan::new(model, &params())?),
            "batch_plan" => batch_plan_line(&Plan::batch(model, &params())?),
            "batch_plan_in" => {
                let (depth, bytes) = (number(args[1]), number(args[2]));
                batch_plan_line(&Plan::batch_in(model, &params(), depth, bytes)?)
            }
            "batch_pages" => Plan::pages_for(model, &params(), number(args[1]))?.to_string(),
            other => panic!("no verb '{other}'"),
        })
    }

    fn tokenize(&self, verb: &str, args: &[&str]) -> Result<String> {
        let model = self.model();
        let tokenizer = model.tokenizer()?;
        Ok(match verb {
            "encode" => list(tokenizer.encode(args[1], flags(args[0]))?),
            "decode" => tokenizer.decode(&numbers(args[1]), args[0] == "1")?,
            "decode_each" => {
                let mut stream = Utf8Stream::new();
                let mut text = String::new();
                for token in numbers(args[1]) {
                    let known = (token as usize) < tokenizer.vocab_size();
                    let bytes = match known {
                        true => tokenizer.token_bytes(token, args[0] == "1")?,
                        false => &[],
                    };
                    stream.push(bytes, |piece| text.push_str(piece));
                    text.push('|');
                }
                text + stream.finish()
            }
            "token_bytes" => {
                let bytes = tokenizer.token_bytes(number(args[1]), args[0] == "1")?;
                bytes.iter().map(|byte| format!("{byte:02x}")).collect()
            }
            "is_end" => tokenizer.is_end(number(args[0])).to_string(),
            "format_chat" => {
                let turns = args[1..].chunks(2);
                let messages: Vec<Message> = turns
                    .map(|turn| Message {
                        role: turn[0],
                        content: turn[1],
                    })
                    .collect();
                ChatTemplate::from_metadata(&model.gguf().metadata, tokenizer)?
                    .ok_or_else(|| Error::template("the file has none"))?
                    .render(&messages, args[0] == "1")?
            }
            other => panic!("no verb '{other}'"),
        })
    }

    /// Of a session or batch.
    fn params(&self, options: &str) -> SessionParams {
        let defaults = SessionParams::default();
        SessionParams {
            context: option(options, "context", 0),
            sequences: option(options, "sequences", 1),
            batch: option(options, "batch", defaults.batch),
            threads: option(options, "threads", self.threads),
            kv: match option(options, "kv", "f16".to_owned()).as_str() {
                "f16" => KvType::F16,
                "q8_0" => KvType::Q8_0,
                "f32" => KvType::F32,
                other => panic!("no kv type '{other}'"),
            },
            kv_pages: option(options, "pages", 0),
            ..defaults
        }
    }

    fn create_session(&mut self, options: &str) -> Result<String> {
        let mut session = Session::new(self.model(), &self.params(options))?;
        let canceller = session.canceller()?;
        self.session = Some((session, canceller));
        Ok(String::new())
    }

    fn ask_session(&mut self, verb: &str, args: &[&str]) -> Result<String> {
        if verb == "restore" {
            let mut state = self.state.clone();
            if let Some(place) = args.first() {
                state[number::<usize>(place)] ^= 1;
            }
            return self.session().restore(&state).map(|()| String::new());
        }
        if verb == "prompt" {
            let tokens = self.model().tokenizer()?.encode(args[1], flags(args[0]))?;
            self.session().prefill(&tokens)?;
            return Ok(tokens.len().to_string());
        }
        let canceller = self
            .session
            .as_ref()
            .map(|(_, canceller)| canceller.clone());
        let session = self.session();
        match verb {
            "prefill" => session.prefill(&numbers(args[0]))?,
            "prefill_whole" => return Ok(session.prefill_whole(&numbers(args[0]))?.to_string()),
            "log_probabilities" => {
                let tokens = numbers(args[0]);
                let mut out = vec![0.0; tokens.len()];
                session.log_probabilities(&tokens, &mut out)?;
                return Ok(list(out.iter().map(|x| (100.0 * x).round() as i32)));
            }
            "step" => return Ok(likeliest(session.step(number(args[0]))?)),
            "logits" => return Ok(likeliest(session.logits()?)),
            "sampler" => session.set_sampler(sampler(args[0]))?,
            "sample" => return Ok(session.sample()?.to_string()),
            "length" => return Ok(session.tokens().len().to_string()),
            "tokens" => return Ok(list(&session.tokens()[number(args[0])..])),
            "depths" => return Ok(list(&session.depths()[number(args[0])..])),
            "histogram" => {
                let recursions = session.model().hyperparameters().recursions;
                return Ok(list(&session.depth_histogram()[..=recursions]));
            }
            "kv_bytes" => return Ok(session.kv_bytes_used().to_string()),
            "cut" => session.set_cut(number(args[0]))?,
            "depth_limit" => session.set_depth_limit(number(args[0]))?,
            "routing" => session.set_routing(match args[0] {
                "threshold" => Routing::Threshold,
                "capacity" => Routing::Capacity,
                other => panic!("no routing '{other}'"),
            }),
            "rewind" => session.rewind(number(args[0]))?,
            "cancel" => canceller.expect("it comes with the session").cancel(),
            "reset_cancel" => canceller.expect("it comes with the session").reset(),
            "save" => {
                let mut state = vec![0; session.save_bytes()];
                let written = session.save(&mut state)?;
                assert_eq!(written, state.len());
                self.state = state;
                return Ok(written.to_string());
            }
            other => panic!("no verb '{other}'"),
        }
        Ok(String::new())
    }

    fn generate(&mut self, verb: &str, args: &[&str]) -> Result<String> {
        // After how many pieces something happens.
        let (after, stop) = match verb {
            "generate" => (usize::MAX, &args[1..]),
            _ => (number(args[1]), &args[2..]),
        };
        let params = GenerateParams {
            max_tokens: if args[0].is_empty() {
                usize::MAX
            } else {
                number(args[0])
            },
            stop,
        };
        let (mut pieces, mut text) = (Vec::new(), String::new());
        let (session, canceller) = self.session.as_mut().expect("the table makes a session");
        let finish = session.generate(&params, |piece| {
            pieces.push((piece.token, piece.depth));
            text += piece.text;
            if pieces.len() == after {
                match verb {
                    "generate_until" => return ControlFlow::Break(()),
                    _ => canceller.cancel(),
                }
            }
            ControlFlow::Continue(())
        });
        (self.pieces, self.text) = (pieces, text);
        Ok(match finish? {
            Finish::End => "end",
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ContextFull => "context_full",
            Finish::Callback => "callback",
            Finish::Cancelled => "cancelled",
            other => panic!("{other:?}"),
        }
        .to_owned())
    }

    fn create_batch(&mut self, options: &str) -> Result<String> {
        let mut batch = Batch::new(self.model(), &self.params(options))?;
        if option(options, "pressure", "evict".to_owned()) == "refuse" {
            batch.set_pressure(Pressure::Refuse);
        }
        self.batch = Some(batch);
        self.sequences = [None; 8];
        Ok(String::new())
    }

    fn add(&mut self, verb: &str, args: &[&str]) -> Result<String> {
        let place: usize = number(args[0]);
        let [options, text] = args[args.len() - 2..] else {
            panic!("{verb} takes options and a prompt");
        };
        let prompt = self.model().tokenizer()?.encode(text, flags("0"))?;
        let request = Request {
            prompt: &prompt,
            max_tokens: option(options, "max", usize::MAX),
            sampler: sampler(options),
            cut: given(options, "cut"),
            depth_limit: given(options, "depth_limit"),
            priority: option(options, "priority", 0),
            ignore_end: option(options, "ignore_end", 0) == 1,
        };
        let sequence = match verb {
            "add" => self.batch().add(&request)?,
            _ => {
                let parent = self.sequences[number::<usize>(args[1])].expect("a sequence");
                self.batch().fork(parent, number(args[2]), &request)?
            }
        };
        self.sequences[place] = Some(sequence);
        Ok(String::new())
    }

    /// What one tick brings, or (`run`) all until there is nothing left to run.
    fn tick(&mut self, verb: &str) -> Result<String> {
        let sequences = self.sequences;
        let place = |id: SequenceId| {
            let found = sequences.iter().position(|sequence| *sequence == Some(id));
            found.expect("every sequence has a place")
        };
        let mut events = Vec::new();
        loop {
            events.extend(self.batch().tick()?.iter().map(|event| match *event {
                Event::Token {
                    sequence,
                    token,
                    depth,
                } => format!("token:{}:{token}:{depth}", place(sequence)),
                Event::Evicted(id) => format!("evicted:{}", place(id)),
                Event::Resumed(id) => format!("resumed:{}", place(id)),
                Event::Full(id) => format!("full:{}", place(id)),
                Event::Finished(id, why) => format!("finished:{}:{}", place(id), ended(why)),
                other => panic!("{other:?}"),
            }));
            if verb == "tick" || self.batch().is_idle() {
                return Ok(list(events));
            }
        }
    }

    fn ask_sequence(&mut self, verb: &str, place: usize) -> Result<String> {
        let id = self.sequences[place].expect("a sequence");
        let batch = self.batch();
        match verb {
            "stop" => batch.stop(id)?,
            "remove" => batch.remove(id)?,
            "resume" => batch.resume(id)?,
            "batch_tokens" => return Ok(list(batch.tokens(id)?)),
            "batch_depths" => return Ok(list(batch.depths(id)?)),
            "failure" => return Ok(batch.failure(id)?.map_or("OK", status).to_owned()),
            "status" => {
                return Ok(match batch.status(id)? {
                    Status::Waiting => "waiting".to_owned(),
                    Status::Running => "running".to_owned(),
                    Status::Full => "full".to_owned(),
                    Status::Finished(why) => format!("finished:{}", ended(why)),
                    other => panic!("{other:?}"),
                });
            }
            other => panic!("no verb '{other}'"),
        }
        Ok(String::new())
    }

    fn ask_batch(&mut self, verb: &str, args: &[&str]) -> Result<String> {
        let batch = self.batch();
        Ok(match verb {
            "batch_idle" => batch.is_idle().to_string(),
            "batch_kv_bytes" => batch.kv_bytes_used().to_string(),
            "batch_counters" => {
                let c = batch.counters();
                let rows: u64 = c.rows.iter().sum();
                let counts = [
                    c.ticks,
                    c.row_capacity,
                    c.finished,
                    c.logits,
                    c.evictions,
                    rows,
                ];
                list(counts)
            }
            "in_step" => {
                batch.set_in_step(args[0] == "1");
                String::new()
            }
            other => panic!("no verb '{other}'"),
        })
    }
}

// --- How a table writes things. ------------------------------------------------------------------

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(" ")
}

fn number<T: FromStr>(text: &str) -> T {
    text.parse()
        .unwrap_or_else(|_| panic!("'{text}' is no number here"))
}

fn numbers(text: &str) -> Vec<u32> {
    text.split_whitespace().map(number).collect()
}

/// The value of `key=value` in a list of such.
fn given<T: FromStr>(options: &str, key: &str) -> Option<T> {
    let mut all = options.split_whitespace();
    all.find_map(|o| o.strip_prefix(key)?.strip_prefix('=').map(number))
}

fn option<T: FromStr>(options: &str, key: &str, default: T) -> T {
    given(options, key).unwrap_or(default)
}

fn sampler(options: &str) -> SamplerParams {
    let d = SamplerParams::default();
    SamplerParams {
        repeat_penalty: option(options, "penalty", d.repeat_penalty),
        repeat_last_n: option(options, "last_n", d.repeat_last_n),
        top_k: option(options, "top_k", d.top_k),
        top_p: option(options, "top_p", d.top_p),
        min_p: option(options, "min_p", d.min_p),
        temperature: option(options, "temperature", d.temperature),
        seed: option(options, "seed", d.seed),
    }
}

fn flags(text: &str) -> EncodeOptions {
    let flags: u32 = number(text);
    EncodeOptions {
        add_special: flags & 1 != 0,
        parse_special: flags & 2 != 0,
    }
}

/// The token of the largest number, the first of equals.
fn likeliest(logits: &[f32]) -> String {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best.to_string()
}

fn describe(model: &Model) -> String {
    let h = model.hyperparameters();
    let kind = match &h.router {
        Some(router) if router.kind == RouterKind::Expert => "expert_choice",
        Some(_) => "token_choice",
        None if h.recursions > 1 => "recursive",
        None => "vanilla",
    };
    let template = model.gguf().metadata.get("tokenizer.chat_template");
    format!(
        "{kind} vocab {} context {} hidden {} feed_forward {} heads {} kv_heads {} head_dim {} \
         stored {} logical {} recursions {} weights {} unshared {} parameters {} tokenizer {} \
         template {}",
        h.vocab_size,
        h.context_length,
        h.hidden_size,
        h.feed_forward_size,
        h.heads,
        h.kv_heads,
        h.head_dim,
        h.stored_blocks,
        h.logical_layers(),
        h.recursions,
        model.weight_bytes(),
        model.unshared_weight_bytes(),
        model.parameters(),
        u32::from(model.tokenizer().is_ok()),
        u32::from(template.is_some()),
    )
}

fn plan_line(plan: &Plan) -> String {
    let p = plan.params();
    assert!(plan.bytes() > plan.kv_bytes(), "the pages are a part");
    let (kv, token) = (plan.kv_bytes(), plan.kv_bytes_per_token());
    let (context, batch, pages) = (p.context, p.batch, p.kv_pages);
    format!("context {context} batch {batch} pages {pages} kv_bytes {kv} per_token {token}")
}

fn batch_plan_line(plan: &Plan) -> String {
    format!("sequences {} {}", plan.params().sequences, plan_line(plan))
}

fn ended(why: batch::Finish) -> &'static str {
    match why {
        batch::Finish::End => "end",
        batch::Finish::Length => "length",
        batch::Finish::ContextFull => "context_full",
        batch::Finish::Stopped => "stopped",
        batch::Finish::Failed => "failed",
        other => panic!("{other:?}"),
    }
}

/// The name of the status that the C header has for a failure.
fn status(error: &Error) -> &'static str {
    match error {
        Error::Io { .. } => "IO",
        Error::Format(_) => "FORMAT",
        Error::Unsupported(_) => "UNSUPPORTED",
        Error::InvalidArgument(_) => "INVALID_ARGUMENT",
        Error::NotReady(_) => "NOT_READY",
        Error::BufferTooSmall { .. } => "BUFFER_TOO_SMALL",
        Error::Tokenizer(_) => "TOKENIZER",
        Error::Template(_) => "TEMPLATE",
        Error::ContextFull { .. } => "CONTEXT_FULL",
        Error::KvFull { .. } => "KV_FULL",
        Error::OutOfMemory { .. } => "OUT_OF_MEMORY",
        Error::Cancelled => "CANCELLED",
        Error::State(_) => "STATE",
        Error::Device(_) => "DEVICE",
        other => panic!("a table has no name for {other:?}"),
    }
}

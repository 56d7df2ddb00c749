//! `mor perplexity`: windows and scoring as llama-perplexity's default. The text is cut into windows
//! of `context` tokens; in each, the tokens of the second half are predicted from all before them.

use crate::Result;
use crate::args::{EngineArgs, Kv, PerplexityArgs};
use crate::divergence::{Divergences, LogSoftmax, Summary};
use crate::input;
use crate::terminal::{Progress, counted, stdout};
use mor::tokenizer::EncodeOptions;
use mor::{Device, KvType, Model, Session, SessionParams};
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// Measures the perplexity of a text, and how far the predictions are from another model's.
pub fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let model = input::open(Some(&args.model), args.engine.device)?;
    let tokenizer = model.tokenizer()?;
    let text = input::read_text(&args.text)?;
    let tokens = tokenizer.encode(&text, EncodeOptions::PROMPT)?;
    if args.context < 4 {
        return Err("a window needs at least 4 tokens; give more with -c".into());
    }
    let context = args.context;
    if tokens.len() / 2 < context {
        return Err(format!(
            "{} has {} tokens; at least two windows of {context} are needed (a smaller -c helps)",
            input::named(&args.text),
            tokens.len()
        )
        .into());
    }
    let params = SessionParams {
        context,
        logit_rows: 32,
        ..Default::default()
    };
    // The last token of a window is only predicted, so that no run would look at it.
    let vocab = model.hyperparameters().vocab_size;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
        return Err(format!(
            "the file's tokenizer gives token {token}, but its model has {vocab}; the tokenizer is another model's"
        )
        .into());
    }
    let mut base = match &args.against {
        Some(path) => {
            let base = base_of(&model, path, &text, &tokens)?;
            Some(Base::new(&base, &args.engine, params.clone())?)
        }
        None => None,
    };
    let mut session = input::session(&model, &args.engine, KvType::F16, params)?;
    input::tell_of_context(&session);
    let (mut sum, mut count) = (0.0f64, 0usize);
    let batch = session.plan().params().batch;
    let windows = tokens.chunks_exact(context);
    let progress = Progress::new("scoring", (windows.len() * (context - 1)) as u64);
    let first = context / 2;
    for window in windows {
        let mut window = window.to_vec();
        if let (true, Some(bos)) = (tokenizer.add_bos(), tokenizer.bos()) {
            window[0] = bos;
        }
        session.rewind(0)?;
        if let Some(base) = &mut base {
            base.session.rewind(0)?;
        }
        // Nothing is asked of the logits before the second half, so none are computed.
        for chunk in window[..first].chunks(batch) {
            session.prefill(chunk)?;
            if let Some(base) = &mut base {
                base.session.prefill(chunk)?;
            }
            progress.advance(chunk.len() as u64);
        }
        let (scored, next) = (&window[first..context - 1], &window[first + 1..]);
        for (scored, next) in scored.chunks(batch).zip(next.chunks(batch)) {
            if let Some(base) = &mut base {
                base.score(scored)?;
            }
            session.score(scored, |i, logits| {
                let predicted = LogSoftmax::new(logits);
                sum -= predicted.of(next[i] as usize);
                count += 1;
                if let Some(base) = &mut base {
                    let row = &base.logits[i * vocab..][..vocab];
                    base.divergences.add(&LogSoftmax::new(row), &predicted);
                }
                progress.advance(1);
                Ok(())
            })?;
        }
    }
    drop(progress);
    let perplexity = (sum / count as f64).exp();
    let divergence = base.map(|base| base.divergences.summary());
    report(args, perplexity, count, divergence)
}

fn report(
    args: &PerplexityArgs,
    perplexity: f64,
    count: usize,
    divergence: Option<Summary>,
) -> Result<()> {
    let mut out = stdout();
    if args.json {
        let mut object = json!({ "perplexity": perplexity, "tokens": count });
        if let Some(d) = divergence {
            object["kl_mean"] = d.mean.into();
            object["kl_standard_error"] = d.standard_error.into();
            object["kl_p99"] = d.p99.into();
            object["kl_max"] = d.max.into();
            object["same_top"] = d.same_top.into();
        }
        writeln!(out, "{object}")?;
        return Ok(());
    }
    let (tokens, context) = (counted(count, "token"), args.context);
    writeln!(
        out,
        "perplexity {perplexity:.4} over {tokens} in windows of {context}"
    )?;
    if let Some(d) = divergence {
        let (mean, error) = (d.mean, d.standard_error);
        let (p99, max) = (d.p99, d.max);
        writeln!(
            out,
            "divergence from the base {mean:.6} ± {error:.6} nats a token, 99th percentile {p99:.6}, maximum {max:.6}"
        )?;
        let same = 100.0 * d.same_top;
        writeln!(out, "same most likely token {same:.2} %")?;
    }
    Ok(())
}

/// The model that a model is compared with.
struct Base {
    session: Session,
    /// [tokens, vocab], of the tokens that were scored last
    logits: Vec<f32>,
    divergences: Divergences,
}

impl Base {
    /// The base runs as trained and with exact keys and values, so that a cut, a depth limit and the
    /// type of the keys are measured like the type of the weights.
    fn new(model: &Model, engine: &EngineArgs, params: SessionParams) -> Result<Self> {
        let engine = EngineArgs {
            kv: Some(Kv::F32),
            cut: None,
            max_depth: None,
            ..engine.clone()
        };
        Ok(Base {
            session: input::session(model, &engine, KvType::F32, params)?,
            logits: Vec::new(),
            divergences: Divergences::default(),
        })
    }

    fn score(&mut self, tokens: &[u32]) -> Result<()> {
        self.logits.clear();
        self.session.score(tokens, |_, logits| {
            self.logits.extend_from_slice(logits);
            Ok(())
        })?;
        Ok(())
    }
}

/// The model at `path`, which must predict the same tokens as `model`.
fn base_of(model: &Model, path: &Path, text: &str, tokens: &[u32]) -> Result<Model> {
    let base = input::open(Some(path), Device::Cpu)
        .map_err(|error| format!("the model of --against: {error}"))?;
    let path = path.display();
    let vocabulary = base.hyperparameters().vocab_size;
    let needed = model.hyperparameters().vocab_size;
    if vocabulary != needed {
        return Err(format!(
            "'{path}' has a vocabulary of {vocabulary} tokens, the model of {needed}; give a base of the same vocabulary"
        )
        .into());
    }
    // A base without a tokenizer is taken at its word.
    if let Ok(tokenizer) = base.tokenizer()
        && tokenizer.encode(text, EncodeOptions::PROMPT)? != tokens
    {
        return Err(format!(
            "'{path}' reads the text as other tokens than the model; give a base of the same tokenizer"
        )
        .into());
    }
    Ok(base)
}

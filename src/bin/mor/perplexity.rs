//! `mor perplexity`: windows and scoring as llama-perplexity's default. The text is cut into windows
//! of `context` tokens; in each, the tokens of the second half are predicted from all before them.

use crate::Result;
use crate::args::PerplexityArgs;
use crate::input;
use crate::terminal::{Progress, counted, stdout};
use mor::tokenizer::EncodeOptions;
use mor::{KvType, SessionParams, Tokenizer};
use serde_json::json;
use std::io::Write;

/// Measures the perplexity of a text.
pub fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let model = input::open(Some(&args.model))?;
    let tokenizer = Tokenizer::from_metadata(&model.gguf().metadata)?;
    let text = input::read_text(&args.text)?;
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let tokens = tokenizer.encode(&text, options)?;
    let context = args.context;
    if context < 4 {
        return Err("a window needs at least 4 tokens; give more with -c".into());
    }
    if tokens.len() / 2 < context {
        return Err(format!(
            "'{}' has {} tokens; at least two windows of {context} are needed (a smaller -c helps)",
            args.text.display(),
            tokens.len()
        )
        .into());
    }
    let params = SessionParams {
        context,
        logit_rows: 32,
        ..Default::default()
    };
    let mut session = input::session(&model, &args.engine, KvType::F16, params)?;
    let (mut sum, mut count) = (0.0f64, 0usize);
    let batch = session.plan().params().batch;
    let windows = tokens.chunks_exact(context);
    let progress = Progress::new("scoring", (windows.len() * context) as u64);
    let first = context / 2;
    for window in windows {
        let mut window = window.to_vec();
        if let (true, Some(bos)) = (tokenizer.add_bos(), tokenizer.bos()) {
            window[0] = bos;
        }
        session.rewind(0)?;
        // Nothing is asked of the logits before the second half, so none are computed.
        for chunk in window[..first].chunks(batch) {
            session.prefill(chunk)?;
            progress.advance(chunk.len() as u64);
        }
        let rest = &window[first..];
        session.score(rest, |i, logits| {
            if let Some(next) = rest.get(i + 1) {
                sum += negative_log_likelihood(logits, *next as usize);
                count += 1;
            }
            progress.advance(1);
            Ok(())
        })?;
    }
    drop(progress);
    let perplexity = (sum / count as f64).exp();
    if args.json {
        let object = json!({ "perplexity": perplexity, "tokens": count });
        writeln!(stdout(), "{object}")?;
    } else {
        let tokens = counted(count, "token");
        writeln!(
            stdout(),
            "perplexity {perplexity:.4} over {tokens} in windows of {context}"
        )?;
    }
    Ok(())
}

/// `-log softmax(logits)[token]`, in double precision.
fn negative_log_likelihood(logits: &[f32], token: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    sum.ln() + f64::from(max) - f64::from(logits[token])
}

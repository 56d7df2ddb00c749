//! `mor eval` and `mor generate-tokens`: the engine on bare token ids.

use crate::Result;
use crate::args::{EvalArgs, GenerateTokensArgs, RoutingArg};
use crate::input;
use crate::terminal::Progress;
use mor::{KvType, Routing, SamplerParams, SessionParams};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::io::Write;

/// Scores each line of tokens.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let model = input::open(Some(&args.model))?;
    let lines = input::token_lines(&args.tokens)?;
    let vocab = model.hyperparameters().vocab_size;
    let longest = lines.iter().map(Vec::len).max().unwrap_or(0);
    let batch = match args.routing {
        RoutingArg::Threshold => args.batch.unwrap_or(64),
        RoutingArg::Capacity => longest,
    };
    let params = SessionParams {
        context: longest,
        batch,
        logit_rows: 16,
        ..Default::default()
    };
    // Exact keys and values: the result is compared with references.
    let mut session = input::session(&model, &args.engine, KvType::F32, params)?;
    session.set_routing(match args.routing {
        RoutingArg::Threshold => Routing::Threshold,
        RoutingArg::Capacity => Routing::Capacity,
    });
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let progress = Progress::new("scoring", lines.len() as u64);
    for (line, tokens) in lines.iter().enumerate() {
        session.rewind(0)?;
        let mut logits = Vec::with_capacity(tokens.len() * vocab * 4);
        session.score(tokens, |_, row| {
            logits.extend(row.iter().flat_map(|l| l.to_le_bytes()));
            Ok(())
        })?;
        let depths = session.depths().iter();
        let depths = depths.flat_map(|d| i64::from(*d).to_le_bytes()).collect();
        let t = tokens.len();
        tensors.insert(
            format!("logits_{line}"),
            (Dtype::F32, vec![t, vocab], logits),
        );
        tensors.insert(format!("depth_{line}"), (Dtype::I64, vec![t], depths));
        progress.advance(1);
    }
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &args.output)
        .map_err(|e| format!("cannot write '{}': {e}", args.output.display()).into())
}

/// Continues each line of tokens greedily.
pub fn generate_tokens(args: &GenerateTokensArgs) -> Result<()> {
    let model = input::open(Some(&args.model))?;
    let lines = input::token_lines(&args.tokens)?;
    let longest = lines.iter().map(Vec::len).max().unwrap_or(0);
    let params = SessionParams {
        context: longest.saturating_add(args.n),
        ..Default::default()
    };
    let mut session = input::session(&model, &args.engine, KvType::F32, params)?;
    session.set_sampler(SamplerParams::greedy())?;
    let mut out = std::io::stdout().lock();
    for tokens in &lines {
        session.rewind(0)?;
        session.prefill(tokens)?;
        let mut words: Vec<String> = tokens.iter().map(u32::to_string).collect();
        for _ in 0..args.n {
            let token = session.sample()?;
            words.push(token.to_string());
            session.prefill(&[token])?;
        }
        writeln!(out, "{}", words.join(" "))?;
    }
    Ok(())
}

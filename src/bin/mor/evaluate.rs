//! `mor eval` and `mor generate-tokens`: the engine on bare token ids.

use crate::Result;
use crate::args::{EvalArgs, GenerateTokensArgs, RoutingArg};
use crate::input::{self, TokenLine};
use crate::interrupt::Interrupt;
use crate::terminal::{Progress, stdout};
use mor::convert::Output;
use mor::{KvType, Routing, SamplerParams, Session, SessionParams};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::io::Write;

/// Results by name: type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Scores each line of tokens.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let model = input::open(Some(&args.model), args.engine.device)?;
    let lines = input::token_lines(&args.tokens, &model)?;
    let longest = longest(&lines);
    let batch = match args.routing {
        RoutingArg::Threshold => args.batch.unwrap_or(0),
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
    // Ctrl-C takes the file away that is begun here.
    Interrupt::new(session.canceller()?)?.arm();
    // Before the work, so that a wrong name costs none.
    input::no_stream(&args.output)?;
    let output = Output::new(&args.output)?;
    output.differs_from(&args.model)?;
    if !input::is_standard_input(&args.tokens) {
        output.differs_from(&args.tokens)?;
    }
    let progress = Progress::new("scoring", lines.iter().map(|l| l.ids.len() as u64).sum());
    let mut tensors = Tensors::new();
    for line in &lines {
        score(&mut session, line, &mut tensors, &progress)?;
    }
    drop(progress);
    write(&tensors, output).map_err(|e| {
        let path = args.output.display();
        format!("cannot write '{path}': {e}").into()
    })
}

/// Adds one line's logits and depths to the results.
fn score(
    session: &mut Session,
    line: &TokenLine,
    tensors: &mut Tensors,
    progress: &Progress,
) -> Result<()> {
    let (number, t) = (line.number, line.ids.len());
    let vocab = session.model().hyperparameters().vocab_size;
    let mut logits = Vec::new();
    let bytes = t * vocab * size_of::<f32>();
    let no_room = |_| {
        format!(
            "the logits of line {} take {bytes} bytes, which the system does not give; score fewer lines at a time",
            number + 1
        )
    };
    logits.try_reserve_exact(bytes).map_err(no_room)?;
    session.rewind(0)?;
    session.score(&line.ids, |_, row| {
        logits.extend(row.iter().flat_map(|l| l.to_le_bytes()));
        progress.advance(1);
        Ok(())
    })?;
    let depths = session.depths().iter();
    let depths = depths.flat_map(|d| i64::from(*d).to_le_bytes()).collect();
    tensors.insert(
        format!("logits_{number}"),
        (Dtype::F32, vec![t, vocab], logits),
    );
    tensors.insert(format!("depth_{number}"), (Dtype::I64, vec![t], depths));
    Ok(())
}

fn write(tensors: &Tensors, output: Output) -> Result<()> {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    // The crate makes a file that only its owner may read; this one gets the usual permissions.
    let usual = std::fs::metadata(output.temporary())?.permissions();
    safetensors::serialize_to_file(views, None, output.temporary())?;
    std::fs::set_permissions(output.temporary(), usual)?;
    Ok(output.keep()?)
}

/// Continues each line of tokens greedily.
pub fn generate_tokens(args: &GenerateTokensArgs) -> Result<()> {
    let model = input::open(Some(&args.model), args.engine.device)?;
    let lines = input::token_lines(&args.tokens, &model)?;
    let params = SessionParams {
        context: longest(&lines).saturating_add(args.n),
        ..Default::default()
    };
    let mut session = input::session(&model, &args.engine, KvType::F32, params)?;
    session.set_sampler(SamplerParams::greedy())?;
    let batch = session.plan().params().batch;
    let work = lines
        .iter()
        .map(|l| l.ids.len().saturating_add(args.n) as u64);
    let work = work.fold(0, u64::saturating_add);
    let (progress, mut out) = (Progress::new("writing", work), stdout());
    for TokenLine { ids, .. } in &lines {
        session.rewind(0)?;
        for chunk in ids.chunks(batch) {
            session.prefill(chunk)?;
            progress.advance(chunk.len() as u64);
        }
        let mut words: Vec<String> = ids.iter().map(u32::to_string).collect();
        for _ in 0..args.n {
            let token = session.sample()?;
            words.push(token.to_string());
            session.prefill(&[token])?;
            progress.advance(1);
        }
        progress.suspend(|| writeln!(out, "{}", words.join(" ")))?;
    }
    Ok(())
}

fn longest(lines: &[TokenLine]) -> usize {
    lines.iter().map(|line| line.ids.len()).max().unwrap_or(0)
}

//! `mor inspect` and `mor plan`.

use crate::Result;
use crate::args::{InspectArgs, PlanArgs};
use crate::input;
use crate::terminal::{grouped, mebibytes};
use mor::gguf::Value;
use mor::model::{Hyperparameters, KvStrategy, LayerRun, RouterKind};
use mor::{Model, Plan, SessionParams};
use serde_json::json;
use std::collections::BTreeMap;

/// Shows what a model file holds.
pub fn inspect(args: &InspectArgs) -> Result<()> {
    let model = input::open(args.model.as_deref())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&as_json(&model))?);
        return Ok(());
    }
    let h = model.hyperparameters();
    let name = h.name.as_deref().unwrap_or("(unnamed)");
    println!("{name}: {}", h.kind());
    println!(
        "  hidden {}  heads {} (key heads {}, size {})  feed-forward {}  vocabulary {}  context {}",
        h.hidden_size,
        h.heads,
        h.kv_heads,
        h.head_dim,
        h.feed_forward_size,
        grouped(h.vocab_size as u64),
        grouped(h.context_length as u64)
    );
    println!("  types {}", types(&model).join(", "));
    if let Some(router) = &h.router {
        let who = match router.kind {
            RouterKind::Expert => "before each recursion, a router decides which tokens go on",
            RouterKind::Token => "one router gives each token its depth",
        };
        println!(
            "  routing: {who} ({}, alpha {}, cut {})",
            router.function.name(),
            router.alpha,
            router.cut
        );
        let kv = match h.kv {
            KvStrategy::RecursionWise => "each recursion keeps those of the tokens active in it",
            KvStrategy::Shared => "recursion 0 keeps those of all tokens, deeper ones read them",
        };
        println!("  keys and values: {kv}");
    }
    println!("\nschedule (stored block, by recursion)");
    for line in schedule_lines(&model) {
        println!("  {line}");
    }
    let (stored, unshared) = (model.weight_bytes(), model.unshared_weight_bytes());
    println!(
        "\nlayers   {:>4} stored   {:>4} logical (a token of full depth)",
        h.stored_blocks,
        h.logical_layers()
    );
    println!(
        "weights  {} stored, {} without sharing: {:.2} times as much",
        mebibytes(stored),
        mebibytes(unshared),
        unshared as f64 / stored as f64
    );
    println!("\nmetadata");
    for (key, value) in model.gguf().metadata.iter() {
        println!("  {key} = {}", shown(value));
    }
    if args.tensors {
        println!("\ntensors");
        for tensor in model.gguf().tensors() {
            let ty = tensor.ty.name();
            println!(
                "  {:<40} {ty:<5} {:?} {} bytes",
                tensor.name, tensor.dims, tensor.bytes
            );
        }
    }
    Ok(())
}

/// The blocks of each part of the schedule.
fn schedule_lines(model: &Model) -> Vec<String> {
    let (h, schedule) = (model.hyperparameters(), model.schedule());
    let ends = usize::from(h.sharing.has_own_ends());
    let blocks = |first: usize, runs: &[LayerRun]| {
        let blocks = first..first + runs.len();
        blocks.map(|b| b.to_string()).collect::<Vec<_>>().join(" ")
    };
    let mut lines = Vec::new();
    if !schedule.prelude.is_empty() {
        lines.push(format!("first        {}", blocks(0, &schedule.prelude)));
    }
    let mut per_stage = 0..schedule.stages.len();
    if h.sharing.repeats_in_place() && h.router.is_none() {
        let order: Vec<String> = per_stage
            .map(|i| (ends + i / h.recursions).to_string())
            .collect();
        lines.push(format!("in place     {}", order.join(" ")));
    } else if h.recursions == 1 {
        let runs = &schedule.stages[0].runs;
        lines.push(format!("all tokens   {}", blocks(ends, runs)));
    } else {
        lines.extend(per_stage.by_ref().map(|i| {
            let stage = &schedule.stages[i];
            format!(
                "recursion {}  {}",
                stage.recursion,
                blocks(ends, &stage.runs)
            )
        }));
    }
    if !schedule.coda.is_empty() {
        let first = h.stored_blocks - schedule.coda.len();
        lines.push(format!("last         {}", blocks(first, &schedule.coda)));
    }
    lines
}

/// "Q8_0 (4.5 MiB)" for each type, most bytes first.
fn types(model: &Model) -> Vec<String> {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in model.gguf().tensors() {
        *sums.entry(tensor.ty.name()).or_default() += tensor.bytes as u64;
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    sums.iter()
        .map(|(name, bytes)| format!("{name} ({})", mebibytes(*bytes)))
        .collect()
}

/// A metadata value on one line.
fn shown(value: &Value) -> String {
    const MOST: usize = 100;
    let mut text = match value {
        Value::Array(array) => format!("{} values", grouped(array.len() as u64)),
        Value::String(text) => text.escape_debug().to_string(),
        other => plain(other).to_string(),
    };
    if let Some((at, _)) = text.char_indices().nth(MOST) {
        text.truncate(at);
        text.push('…');
    }
    text
}

fn plain(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Array(array) => json!({ "length": array.len() }),
    }
}

fn as_json(model: &Model) -> serde_json::Value {
    let h: &Hyperparameters = model.hyperparameters();
    let metadata = model.gguf().metadata.iter();
    let metadata: serde_json::Map<_, _> =
        metadata.map(|(k, v)| (k.to_string(), plain(v))).collect();
    let tensors: Vec<_> = model
        .gguf()
        .tensors()
        .iter()
        .map(|t| json!({ "name": t.name, "type": t.ty.name(), "dims": t.dims, "bytes": t.bytes }))
        .collect();
    json!({
        "name": h.name,
        "kind": h.kind(),
        "recursions": h.recursions,
        "sharing": h.sharing.name(),
        "schedule": schedule_lines(model),
        "stored_layers": h.stored_blocks,
        "logical_layers": h.logical_layers(),
        "weight_bytes": model.weight_bytes(),
        "unshared_weight_bytes": model.unshared_weight_bytes(),
        "metadata": metadata,
        "tensors": tensors,
    })
}

/// Shows the memory of a session.
pub fn plan(args: &PlanArgs) -> Result<()> {
    let model = input::open(args.model.as_deref())?;
    let mut params = SessionParams {
        context: input::context(&model, args.context),
        sequences: args.sequences,
        kv: args.kv.into(),
        ..Default::default()
    };
    if let Some(threads) = args.threads {
        params.threads = threads;
    }
    let plan = Plan::new(&model, &params)?;
    let lines = plan.lines();
    if args.json {
        let lines: serde_json::Map<_, _> = lines
            .iter()
            .map(|(k, v)| (k.to_string(), json!(v)))
            .collect();
        let object = json!({
            "context": plan.params().context,
            "sequences": plan.params().sequences,
            "threads": plan.params().threads,
            "batch": plan.params().batch,
            "weight_bytes": model.weight_bytes(),
            "session_bytes": plan.bytes(),
            "kv_bytes": plan.kv_bytes(),
            "kv_bytes_per_token_at_full_depth": plan.kv_bytes_per_token(),
            "lines": lines,
        });
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    println!(
        "{} sequences of {} tokens, {} threads, {} rows a pass",
        plan.params().sequences,
        grouped(plan.params().context as u64),
        plan.params().threads,
        plan.params().batch
    );
    for (name, bytes) in &lines {
        println!("  {name:<26} {:>16}", grouped(*bytes as u64));
    }
    println!(
        "  {:<26} {:>16} bytes",
        "session",
        grouped(plan.bytes() as u64)
    );
    println!(
        "  {:<26} {:>16} bytes, mapped from the file",
        "weights",
        grouped(model.weight_bytes())
    );
    println!(
        "\nKV pages are taken as tokens come: {} bytes a token of full depth, less for those that leave early.",
        grouped(plan.kv_bytes_per_token() as u64)
    );
    Ok(())
}

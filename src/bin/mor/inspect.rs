//! `mor inspect`.

use crate::Result;
use crate::args::InspectArgs;
use crate::input;
use crate::terminal::{counted, grouped, mebibytes, one_line, stdout};
use mor::gguf::{Array, Value};
use mor::model::{Hyperparameters, KvStrategy, LayerRun, RouterKind};
use mor::{Device, Model};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;

/// Shows what a model file holds.
pub fn inspect(args: &InspectArgs) -> Result<()> {
    let model = input::open(args.model.as_deref(), Device::Cpu)?;
    let mut out = stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&as_json(&model))?)?;
        return Ok(());
    }
    let h = model.hyperparameters();
    let name = h.name.as_deref().unwrap_or("(unnamed)");
    writeln!(out, "{}: {}", one_line(name), h.kind())?;
    writeln!(
        out,
        "  hidden {}  heads {} (key heads {}, size {})  feed-forward {}  vocabulary {}  context {}",
        h.hidden_size,
        h.heads,
        h.kv_heads,
        h.head_dim,
        h.feed_forward_size,
        grouped(h.vocab_size as u64),
        grouped(h.context_length as u64)
    )?;
    writeln!(out, "  types {}", types(&model).join(", "))?;
    if let Some(router) = &h.router {
        let who = match router.kind {
            RouterKind::Expert => "before each recursion, a router decides which tokens go on",
            RouterKind::Token => "one router gives each token its depth",
        };
        writeln!(
            out,
            "  routing: {who} ({}, alpha {}, cut {})",
            router.function.name(),
            router.alpha,
            router.cut
        )?;
        let kv = match h.kv {
            KvStrategy::RecursionWise => "each recursion keeps those of the tokens active in it",
            KvStrategy::Shared => "recursion 0 keeps those of all tokens, deeper ones read them",
        };
        writeln!(out, "  keys and values: {kv}")?;
    }
    writeln!(out, "\nschedule (stored block, by recursion)")?;
    for line in schedule_lines(&model) {
        writeln!(out, "  {line}")?;
    }
    let (stored, unshared) = (model.weight_bytes(), model.unshared_weight_bytes());
    writeln!(
        out,
        "\nlayers   {:>4} stored   {:>4} logical (a token of full depth)",
        h.stored_blocks,
        h.logical_layers()
    )?;
    writeln!(
        out,
        "weights  {} stored, {} without sharing: {:.2} times as much",
        mebibytes(stored),
        mebibytes(unshared),
        unshared as f64 / stored as f64
    )?;
    writeln!(out, "\nmetadata")?;
    for (key, value) in model.gguf().metadata.iter() {
        writeln!(out, "  {} = {}", one_line(key), shown(value))?;
    }
    if args.tensors {
        writeln!(out, "\ntensors")?;
        for tensor in model.gguf().tensors() {
            let ty = tensor.ty.name();
            writeln!(
                out,
                "  {:<40} {ty:<5} {:?} {} bytes",
                one_line(&tensor.name),
                tensor.dims,
                tensor.bytes
            )?;
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
        Value::String(text) => text.escape_debug().to_string(),
        Value::Array(array) => match numbers(array) {
            Some(numbers) => return numbers.to_string(),
            None => counted(array.len(), "value"),
        },
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
        Value::Array(array) => numbers(array).unwrap_or(json!({ "length": array.len() })),
    }
}

/// A short array of numbers in full; texts and long arrays are only counted.
fn numbers(array: &Array) -> Option<serde_json::Value> {
    const MOST: usize = 16;
    if array.len() > MOST {
        return None;
    }
    Some(match array {
        Array::U8(v) => json!(v),
        Array::I8(v) => json!(v),
        Array::U16(v) => json!(v),
        Array::I16(v) => json!(v),
        Array::U32(v) => json!(v),
        Array::I32(v) => json!(v),
        Array::F32(v) => json!(v),
        Array::Bool(v) => json!(v),
        Array::String(_) => return None,
        Array::U64(v) => json!(v),
        Array::I64(v) => json!(v),
        Array::F64(v) => json!(v),
    })
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

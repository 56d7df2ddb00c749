//! `mor plan`.

use crate::Result;
use crate::args::PlanArgs;
use crate::input;
use crate::terminal::{counted, grouped, stdout};
use mor::{Model, Plan, SessionParams};
use serde_json::json;
use std::io::Write;

/// Shows the memory of a session or a batch.
pub fn plan(args: &PlanArgs) -> Result<()> {
    let model = input::open(args.model.as_deref(), args.device)?;
    let is_batch = args.sequences.is_some() || args.memory.is_some();
    if args.mean_depth.is_some() && !is_batch {
        return Err(
            "a mean depth is for batches; say how many sequences (-b) or bytes (--memory)".into(),
        );
    }
    let most = model.hyperparameters().recursions as f64;
    let mean_depth = is_batch.then(|| args.mean_depth.unwrap_or(most));
    let plan = planned(&model, args, mean_depth)?;
    if args.json {
        let object = as_json(&model, &plan, mean_depth);
        writeln!(stdout(), "{}", serde_json::to_string_pretty(&object)?)?;
        return Ok(());
    }
    Ok(show(&model, &plan, mean_depth)?)
}

/// `mean_depth`: of a batch.
fn planned(model: &Model, args: &PlanArgs, mean_depth: Option<f64>) -> Result<Plan> {
    let mut params = SessionParams {
        context: input::context(model, args.context)?,
        sequences: args.sequences.unwrap_or(1),
        kv: args.kv.into(),
        ..Default::default()
    };
    if let Some(threads) = args.threads {
        params.threads = threads;
    }
    if let Some(rows) = args.batch {
        params.batch = rows;
    }
    Ok(match (mean_depth, args.memory) {
        (None, _) => Plan::new(model, &params)?,
        (Some(mean_depth), Some(bytes)) => Plan::batch_in(model, &params, mean_depth, bytes)?,
        (Some(mean_depth), None) => {
            params.kv_pages = Plan::pages_for(model, &params, mean_depth)?;
            Plan::batch(model, &params)?
        }
    })
}

fn as_json(model: &Model, plan: &Plan, mean_depth: Option<f64>) -> serde_json::Value {
    let lines = plan.lines();
    let lines: serde_json::Map<_, _> = lines
        .iter()
        .map(|(k, v)| (k.to_string(), json!(v)))
        .collect();
    json!({
        "context": plan.params().context,
        "sequences": plan.params().sequences,
        "threads": plan.params().threads,
        "batch": plan.params().batch,
        "weight_bytes": model.weight_bytes(),
        "session_bytes": plan.bytes(),
        "heap_bytes": mean_depth.map(|_| plan.heap_bytes()),
        "mean_depth": mean_depth,
        "kv_pages": plan.params().kv_pages,
        "kv_bytes": plan.kv_bytes(),
        "kv_bytes_per_token_at_full_depth": plan.kv_bytes_per_token(),
        "device_bytes": plan.device_bytes(),
        "pinned_bytes": plan.pinned_bytes(),
        "device_weight_bytes": model.device_bytes(),
        "weights_in_place": model.is_in_place_on_gpu(),
        "lines": lines,
    })
}

fn show(model: &Model, plan: &Plan, mean_depth: Option<f64>) -> std::io::Result<()> {
    let mut out = stdout();
    writeln!(
        out,
        "{} of {}, {}, {} a pass",
        counted(plan.params().sequences, "sequence"),
        counted(plan.params().context, "token"),
        counted(plan.params().threads, "thread"),
        counted(plan.params().batch, "row")
    )?;
    for (name, bytes) in plan.lines() {
        writeln!(out, "  {name:<26} {:>16}", grouped(bytes as u64))?;
    }
    writeln!(
        out,
        "  {:<26} {:>16} bytes",
        if mean_depth.is_some() {
            "batch"
        } else {
            "session"
        },
        grouped(plan.bytes() as u64)
    )?;
    if model.is_on_gpu() {
        let weights = match model.is_in_place_on_gpu() {
            true => "read where the file is mapped",
            false => "a copy of the file's",
        };
        for (name, bytes, note) in [
            ("on the GPU", plan.device_bytes(), "taken once"),
            ("pinned", plan.pinned_bytes(), "of the host, for copies"),
            ("weights on the GPU", model.device_bytes(), weights),
        ] {
            let bytes = grouped(bytes as u64);
            writeln!(out, "  {name:<26} {bytes:>16} bytes, {note}")?;
        }
    }
    writeln!(
        out,
        "  {:<26} {:>16} bytes, mapped from the file",
        "weights",
        grouped(model.weight_bytes())
    )?;
    writeln!(
        out,
        "\nKV pages are taken as tokens come: {} bytes a token of full depth, less for those that leave early.",
        grouped(plan.kv_bytes_per_token() as u64)
    )?;
    if let Some(mean_depth) = mean_depth {
        writeln!(
            out,
            "There are pages for full contexts in which a token runs {mean_depth} recursions on average."
        )?;
    }
    Ok(())
}

//! A whole pass as one kernel (src/cuda/kernels/pass.cuh): its launches become steps in the device's memory, through
//! which blocks that run at the same time go together.
//!
//! It is on trial: `MOR_CUDA_PASS=1` asks for it, until a device has shown that it is faster than a graph.

use super::driver::Address;
use super::functions::PASS_SHARED;
use super::launch::{Function, Launch, Work};
use super::params::*;
use crate::error::{Error, Result};
use crate::memory::{reserved, try_push};
use crate::model::Model;
use crate::quant::TensorType;
use std::ffi::CStr;

/// Whether a pass of up to so many rows may be one kernel: with more, products want blocks of which only one fits on a
/// multiprocessor.
pub(super) fn takes(rows: usize) -> bool {
    rows <= SOME
}

/// The works by their numbers, as `MOR_EVERY_WORK` in pass.cuh; the kernels' names without `mor_`.
const WORKS: [&str; 31] = [
    "begin",
    "embed",
    "copy_rows",
    "ready_norm",
    "ready_scaled",
    "ready_gelu",
    "ready_swiglu",
    "ready_plain",
    "ready_attention",
    "floats",
    "lone_exact",
    "lone_exact_f32",
    "exact",
    "exact_f32",
    "store_f32",
    "store_f16",
    "store_q8_0",
    "attention_f32",
    "attention_q8_0",
    "seats",
    "score",
    "select",
    "decide",
    "merge",
    "leave",
    "candidates",
    "sample",
    "attention_halves",
    "attention_halves_alone",
    "attention_halves_whole",
    "attention_halves_whole_alone",
];

/// After these the products of each type, as `MOR_EVERY_PRODUCT` there; the type's name follows.
const PRODUCTS: [&str; 8] = [
    "lone_product_norm_",
    "lone_product_plain_",
    "lone_product_attention_",
    "lone_swiglu_",
    "few_product_",
    "many_product_",
    "wide_product_64x64_",
    "wide_product_128x64_",
];

/// For [`Step::work`]: the steps before number `skip` are for rows only.
const WHEN: u32 = u32::MAX;

/// The number that a kernel's work has in a pass.
pub(super) fn number_of(name: &CStr) -> Option<u32> {
    let name = name.to_str().ok()?.strip_prefix("mor_")?;
    if let Some(number) = WORKS.iter().position(|work| *work == name) {
        return Some(number as u32);
    }
    PRODUCTS.iter().enumerate().find_map(|(number, product)| {
        let ty = name.strip_prefix(product)?;
        // In the order of MOR_EVERY_TYPE, which are those that tensor cores take.
        let mut types = TensorType::ALL.iter().filter(|ty| **ty != TensorType::F32);
        let place = types.position(|known| known.name().eq_ignore_ascii_case(ty))?;
        Some((WORKS.len() + PRODUCTS.len() * place + number) as u32)
    })
}

/// No fewer steps than a pass of a model has.
pub(super) fn most_steps(model: &Model) -> usize {
    /// Of a layer: four times rows made ready, seven products, keys stored and attention; of a recursion with its
    /// routers; of what is left.
    const OF_LAYER: usize = 13;
    const OF_RECURSION: usize = 16;
    const OF_PASS: usize = 24;
    let schedule = model.schedule();
    let block: usize = schedule.stages.iter().map(|stage| stage.runs.len()).sum();
    let layers = schedule.prelude.len() + block + schedule.coda.len();
    let recursions = model.hyperparameters().recursions;
    OF_LAYER * layers + OF_RECURSION * recursions + OF_PASS
}

/// The steps of a pass's work, which are to stand at `to`, and the work that is left: copies and one kernel of `blocks`
/// blocks. `arrived`: counters for the steps, zeros at each start.
pub(super) fn one_kernel(
    work: Vec<Work>,
    kernel: Function<PassParams>,
    blocks: u32,
    to: Address,
    arrived: Address,
) -> Result<(Vec<Step>, Vec<Work>)> {
    let mut steps = Vec::new();
    let (mut before, mut after) = (reserved(2)?, reserved(1)?);
    let mut inside = reserved(work.len())?;
    for piece in work {
        match piece {
            Work::Send { .. } => before.push(piece),
            Work::Receive { .. } => after.push(piece),
            _ => inside.push(piece),
        }
    }
    append(&mut steps, &inside)?;
    let params = PassParams {
        steps: to,
        arrived,
        count: steps.len() as u32,
        unused: 0,
    };
    let launch = Launch::new(kernel, [blocks, 1, 1], BLOCK, PASS_SHARED, &params);
    before.push(Work::Launch(launch.together()));
    before.append(&mut after);
    Ok((steps, before))
}

fn append(steps: &mut Vec<Step>, work: &[Work]) -> Result<()> {
    for piece in work {
        let mut step = Step {
            work: WHEN,
            blocks: [0; 3],
            rows: 0,
            skip: 0,
            unused: 0,
            parameter: [0; _],
        };
        match piece {
            Work::Launch(launch) => {
                let number = launch.number.filter(|_| launch.shared <= PASS_SHARED);
                step.work = number.ok_or_else(|| Error::device("a kernel that no pass has"))?;
                step.blocks = launch.grid;
                step.parameter[..launch.parameter.len()].copy_from_slice(&launch.parameter);
                try_push(steps, step)?;
            }
            Work::When { rows, work, .. } => {
                step.rows = *rows;
                let at = steps.len();
                try_push(steps, step)?;
                append(steps, work)?;
                steps[at].skip = steps.len() as u32;
            }
            Work::Send { .. } | Work::Receive { .. } => {
                return Err(Error::device("a copy within a pass"));
            }
        }
    }
    Ok(())
}

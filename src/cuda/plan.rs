//! The memory of a session or batch on a device, computed before it exists.

use super::params::*;
use crate::error::Result;
use crate::kv::{KvShape, PAGE_TOKENS};
use crate::layout::{Layout, regions, too_large};
use crate::model::{Hyperparameters, Model};
use crate::sampling::Candidate;
use half::f16;

/// Parts begin at multiples of this: what the widest loads want, and copies like.
const ALIGNMENT: usize = 256;

/// Sizes of the parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Rows of a pass.
    pub rows: usize,
    /// Rows between their first and their last layer. There is one slot more, for a row that is put aside.
    pub slots: usize,
    pub sequences: usize,
    pub context: usize,
    /// Rows of logits that are computed together.
    pub logit_rows: usize,
}

/// Where everything is. Input and output are copied as a whole, from and to pinned memory with the same
/// layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DevicePlan {
    pub sizes: Sizes,
    /// Changes of page tables that a launch takes along; more are written one by one before it.
    pub changes: usize,
    /// Elements of a row of prepared activations: the widest, in whole groups.
    pub widest: usize,
    /// Parts of the longest context.
    pub parts: usize,
    /// What the host sends, from the beginning of the device's memory on.
    pub input: InputRegions,
    pub input_bytes: usize,
    /// What it gets back, from `output_start` on; offsets are from there.
    pub output: OutputRegions,
    pub output_start: usize,
    pub output_bytes: usize,
    /// What stays there.
    pub regions: DeviceRegions,
    pub bytes: usize,
}

/// What the parts are as large as.
pub(crate) struct Extents<'a> {
    model: &'a Model,
    h: &'a Hyperparameters,
    kv: &'a KvShape,
    sizes: Sizes,
    changes: usize,
    widest: usize,
    parts: usize,
}

impl Extents<'_> {
    /// Rows of prepared activations: logits are computed from such rows too.
    fn prepared(&self) -> usize {
        self.sizes.rows.max(self.sizes.logit_rows)
    }

    /// Slots, and the one for a row that is put aside.
    fn places(&self) -> usize {
        self.sizes.slots + 1
    }
}

regions! {
    pub(crate) struct InputRegions; (s: &Extents)

    head: Input = [1],
    new_rows: Row = [s.sizes.rows],
    new_slots: u32 = [s.sizes.rows],
    old_active: u32 = [s.sizes.rows],
    old_waiting: u32 = [s.sizes.slots],
    kept: u32 = [s.sizes.sequences, s.h.recursions],
    draws: Draw = [s.sizes.sequences],
    changes: Change = [s.changes],
}

regions! {
    pub(crate) struct OutputRegions; (s: &Extents)

    report: Report = [1],
    states: State = [s.sizes.slots],
    drawn: u32 = [s.places()],
}

regions! {
    pub(crate) struct DeviceRegions; (s: &Extents)

    x: f32 = [s.places(), s.h.hidden_size],
    h: f32 = [s.sizes.slots, s.h.hidden_size],
    rope: [f32; 2] = [s.sizes.slots, s.h.rope.dims / 2],
    rope_factors: f32 = [s.model.rope_factors().map_or(0, |f| f.length)],
    floats: f32 = [s.prepared(), s.widest],
    halves: f16 = [s.prepared(), s.widest],
    scales: f32 = [s.prepared(), RUNS as usize],
    factors: f32 = [s.prepared()],
    sums: f32 = [s.prepared(), s.widest / GROUP as usize],
    q: f32 = [s.sizes.rows, s.h.query_size()],
    k: f32 = [s.sizes.rows, s.h.kv_size()],
    v: f32 = [s.sizes.rows, s.h.kv_size()],
    partial: f32 = [s.sizes.rows, s.parts, s.h.query_size()],
    partial_scales: [f32; 2] = [s.sizes.rows, s.parts, s.h.heads],
    visible: u32 = [s.sizes.rows],
    gate: f32 = [s.sizes.rows, s.h.feed_forward_size],
    up: f32 = [s.sizes.rows, s.h.feed_forward_size],
    router_hidden: f32 = [s.sizes.rows, s.model.router_width()],
    scores: f32 = [s.sizes.slots, s.h.recursions],
    aux_scores: f32 = [s.sizes.slots],
    rows: Row = [s.places()],
    entering: u32 = [s.sizes.rows],
    active: u32 = [s.sizes.rows],
    waiting: u32 = [s.sizes.slots],
    running: u32 = [s.sizes.rows],
    ready: u32 = [s.sizes.rows],
    wanted: u32 = [s.sizes.rows],
    selected: u32 = [s.sizes.rows],
    selected_count: u32 = [1],
    flags: u32 = [s.sizes.slots],
    tokens: u32 = [s.sizes.sequences, s.sizes.context],
    logits: f32 = [s.sizes.logit_rows, s.h.vocab_size],
    /// Of each chunk of the vocabulary.
    candidates: Candidate = [
        s.sizes.logit_rows,
        s.h.vocab_size.div_ceil(CHUNK as usize),
        MAX_CANDIDATES,
    ],
    tables: u32 = [s.kv.lists(), s.kv.table_pages],
    pages: u8 = [s.kv.pages, s.kv.page_bytes()],
}

impl DevicePlan {
    pub fn new(model: &Model, sizes: Sizes, kv: &KvShape) -> Result<Self> {
        let h = model.hyperparameters();
        let tables = kv.lists().saturating_mul(kv.table_pages);
        // The kernels count places of page tables in 32 bits. A launch's second dimension counts key heads or some rows
        // together, its third parts of a context.
        let parts = sizes.context.div_ceil(PART as usize);
        if tables > u32::MAX as usize
            || h.kv_heads.max(sizes.rows.div_ceil(FEW as usize)) > MAX_BLOCKS
            || parts > MAX_BLOCKS
        {
            return Err(too_large());
        }
        // As many new pages as a pass takes: each sequence some rows, the last page of each begun.
        let pages = sizes
            .rows
            .div_ceil(PAGE_TOKENS)
            .saturating_add(sizes.sequences);
        let changes = kv.planes.saturating_mul(pages).min(tables);
        let widest = model.widest_row().next_multiple_of(GROUP as usize);
        let extents = Extents {
            model,
            h,
            kv,
            sizes,
            changes,
            widest,
            parts,
        };
        let mut layout = Layout::<ALIGNMENT>::new();
        let input = InputRegions::lay_out(&mut layout, &extents)?;
        let input_bytes = layout.bytes;
        let mut own = Layout::<ALIGNMENT>::new();
        let output = OutputRegions::lay_out(&mut own, &extents)?;
        layout.bytes = input_bytes.checked_add(own.bytes).ok_or_else(too_large)?;
        let regions = DeviceRegions::lay_out(&mut layout, &extents)?;
        Ok(DevicePlan {
            sizes,
            changes,
            widest,
            parts,
            input,
            input_bytes,
            output,
            output_start: input_bytes,
            output_bytes: own.bytes,
            regions,
            bytes: layout.bytes,
        })
    }

    /// Bytes of pinned memory.
    pub fn pinned_bytes(&self) -> usize {
        self.input_bytes + self.output_bytes
    }
}

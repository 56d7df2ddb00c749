//! The memory of a session or batch on a device, computed before it exists.

use super::params::*;
use crate::error::Result;
use crate::kv::{KvShape, PAGE_TOKENS};
use crate::model::Model;
use crate::plan::{Layout, Region, too_large};

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
    pub input: InputPlan,
    pub output: OutputPlan,
    pub input_bytes: usize,
    pub output_bytes: usize,
    pub bytes: usize,
    /// Elements of a row of prepared activations: the widest, in whole groups.
    pub widest: usize,
    /// Parts of the longest context.
    pub parts: usize,
    pub x: Region,
    pub h: Region,
    pub rope: Region,
    pub rope_factors: Region,
    pub floats: Region,
    pub halves: Region,
    pub scales: Region,
    pub factors: Region,
    pub sums: Region,
    pub q: Region,
    pub k: Region,
    pub v: Region,
    pub partial: Region,
    pub partial_scales: Region,
    pub visible: Region,
    pub gate: Region,
    pub up: Region,
    pub router_hidden: Region,
    pub scores: Region,
    pub aux_scores: Region,
    pub rows: Region,
    pub entering: Region,
    pub active: Region,
    pub waiting: Region,
    pub running: Region,
    pub ready: Region,
    pub wanted: Region,
    pub selected: Region,
    pub selected_count: Region,
    pub flags: Region,
    pub tokens: Region,
    pub logits: Region,
    /// Of each chunk of the vocabulary.
    pub candidates: Region,
    pub tables: Region,
    pub pages: Region,
}

/// What the host sends, from the beginning of the device's memory on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InputPlan {
    pub head: Region,
    pub new_rows: Region,
    pub new_slots: Region,
    pub old_active: Region,
    pub old_waiting: Region,
    pub kept: Region,
    pub draws: Region,
    pub changes: Region,
}

/// What it gets back; offsets are from the output's own beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutputPlan {
    /// Where the output begins in the device's memory.
    pub start: usize,
    pub report: Region,
    pub states: Region,
    pub drawn: Region,
}

impl DevicePlan {
    pub fn new(model: &Model, sizes: Sizes, kv: &KvShape) -> Result<Self> {
        let h = model.hyperparameters();
        let Sizes {
            rows: n,
            slots,
            sequences,
            context,
            logit_rows,
        } = sizes;
        // As many new pages as a pass takes: each sequence some rows, the last page of each begun.
        let lists = sequences.saturating_mul(kv.planes);
        // The kernels count places of page tables in 32 bits. A launch's second dimension counts key heads or some rows
        // together, its third parts of a context.
        if lists.saturating_mul(kv.table_pages) > u32::MAX as usize
            || h.kv_heads.max(n.div_ceil(FEW as usize)) > MAX_BLOCKS
            || context.div_ceil(PART as usize) > MAX_BLOCKS
        {
            return Err(too_large());
        }
        let pages = n.div_ceil(PAGE_TOKENS).saturating_add(sequences);
        let changes = kv.planes.saturating_mul(pages);
        let changes = changes.min(lists.saturating_mul(kv.table_pages));
        let mut layout = Layout::<ALIGNMENT> { bytes: 0 };
        let input = InputPlan {
            head: layout.add_items(size_of::<Input>(), &[1])?,
            new_rows: layout.add_items(size_of::<Row>(), &[n])?,
            new_slots: layout.add_items(4, &[n])?,
            old_active: layout.add_items(4, &[n])?,
            old_waiting: layout.add_items(4, &[slots])?,
            kept: layout.add_items(4, &[sequences, h.recursions])?,
            draws: layout.add_items(size_of::<Draw>(), &[sequences])?,
            changes: layout.add_items(size_of::<Change>(), &[changes])?,
        };
        let input_bytes = layout.bytes;
        let start = input_bytes;
        let mut own = Layout::<ALIGNMENT> { bytes: 0 };
        let output = OutputPlan {
            start,
            report: own.add_items(size_of::<Report>(), &[1])?,
            states: own.add_items(size_of::<State>(), &[slots])?,
            drawn: own.add_items(4, &[slots + 1])?,
        };
        layout.bytes = start.checked_add(own.bytes).ok_or_else(too_large)?;
        let widest = model.widest_row().next_multiple_of(GROUP as usize);
        // Logits are computed from prepared rows too.
        let prepared = n.max(logit_rows);
        let parts = context.div_ceil(PART as usize);
        let chunks = h.vocab_size.div_ceil(CHUNK as usize);
        let (q, kv_size) = (h.query_size(), h.kv_size());
        Ok(DevicePlan {
            sizes,
            changes,
            input,
            output,
            input_bytes,
            output_bytes: own.bytes,
            widest,
            parts,
            x: layout.add_items(4, &[slots + 1, h.hidden_size])?,
            h: layout.add_items(4, &[slots, h.hidden_size])?,
            rope: layout.add_items(8, &[slots, h.rope.dims / 2])?,
            rope_factors: layout.add_items(4, &[model.rope_factors().map_or(0, |f| f.length)])?,
            floats: layout.add_items(4, &[prepared, widest])?,
            halves: layout.add_items(2, &[prepared, widest])?,
            scales: layout.add_items(4, &[prepared, RUNS as usize])?,
            factors: layout.add_items(4, &[prepared])?,
            sums: layout.add_items(4, &[prepared, widest / GROUP as usize])?,
            q: layout.add_items(4, &[n, q])?,
            k: layout.add_items(4, &[n, kv_size])?,
            v: layout.add_items(4, &[n, kv_size])?,
            partial: layout.add_items(4, &[n, parts, q])?,
            partial_scales: layout.add_items(8, &[n, parts, h.heads])?,
            visible: layout.add_items(4, &[n])?,
            gate: layout.add_items(4, &[n, h.feed_forward_size])?,
            up: layout.add_items(4, &[n, h.feed_forward_size])?,
            router_hidden: layout.add_items(4, &[n, model.router_width()])?,
            scores: layout.add_items(4, &[slots, h.recursions])?,
            aux_scores: layout.add_items(4, &[slots])?,
            rows: layout.add_items(size_of::<Row>(), &[slots + 1])?,
            entering: layout.add_items(4, &[n])?,
            active: layout.add_items(4, &[n])?,
            waiting: layout.add_items(4, &[slots])?,
            running: layout.add_items(4, &[n])?,
            ready: layout.add_items(4, &[n])?,
            wanted: layout.add_items(4, &[n])?,
            selected: layout.add_items(4, &[n])?,
            selected_count: layout.add_items(4, &[1])?,
            flags: layout.add_items(4, &[slots])?,
            tokens: layout.add_items(4, &[sequences, context])?,
            logits: layout.add_items(4, &[logit_rows, h.vocab_size])?,
            candidates: layout.add_items(8, &[logit_rows, chunks, MAX_CANDIDATES])?,
            tables: layout.add_items(4, &[lists, kv.table_pages])?,
            pages: layout.add_items(1, &[kv.pages, kv.page_bytes()])?,
            bytes: layout.bytes,
        })
    }

    /// Bytes of pinned memory.
    pub fn pinned_bytes(&self) -> usize {
        self.input_bytes + self.output_bytes
    }
}

//! The kernels' parameters and what they share with the host, as src/cuda/kernels/*.cuh declare them: the
//! same fields in the same order, but for one that fills a gap. A test compares the sizes (tests/cuda).

use super::driver::Address;
use crate::model::MAX_RECURSIONS;
use crate::quant::TensorType;

/// Threads of a block, where nothing else is said, and other sizes that the kernels have as constants.
pub(super) const BLOCK: u32 = 256;
/// The same of products by warpgroups (src/cuda/kernels/warpgroup.cuh).
pub(super) const WARPGROUPS_BLOCK: u32 = 384;
pub(super) const TILE_ROWS: u32 = 16;
pub(super) const GROUP: u32 = 32;
/// Runs into which the columns of a product are cut.
pub(super) const RUNS: u32 = BLOCK / 32;
/// Bytes that a block's rings take where a multiprocessor is to have two blocks. Rings of four stages, each of one unit,
/// that would take more have two stages.
pub(super) const MOST_RING: u32 = 72 << 10;
/// Rows of activations that a block of a product takes at a time, at most.
pub(super) const MANY: u32 = 32;
pub(super) const FEW: u32 = 8;
/// Batches of groups of activations that such a block has on their way, with one matrix and with two abreast.
pub(super) const BATCHES_AHEAD: [u32; 2] = [4, 3];
/// Rows up to which passes have programs of their own.
pub(super) const SOME: usize = 64;
/// Groups of weights and activations that `mor_wide_product_…` copies together, at least.
pub(super) const WIDE_GROUPS: u32 = 2;
/// Rows of a block at most in attention for prompts.
pub(super) const PROMPT_ROWS: u32 = 64;
/// Entries of a part of a context.
pub(super) const PART: u32 = 256;
/// Blocks that a launch has at most in its second and in its third dimension.
pub(super) const MAX_BLOCKS: usize = 65_535;
pub(super) const MAX_CANDIDATES: usize = 256;
/// Tokens of which a block finds the candidates.
pub(super) const CHUNK: u32 = 1024;

/// Structs that are copied to the device.
///
/// # Safety
/// `repr(C)`, without padding.
pub(super) unsafe trait Parameter: Copy {}

// SAFETY: a number.
unsafe impl Parameter for u32 {}
// SAFETY: a number.
unsafe impl Parameter for f32 {}

/// As the device takes them.
pub(super) fn bytes_of<P: Parameter>(values: &[P]) -> &[u8] {
    // SAFETY: `Parameter`s have no padding, so that all of it are bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

macro_rules! structs {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            #[repr(C)]
            pub(super) struct $name { $($(#[$field_doc])* pub $field: $ty,)* }
            // The fields fill the struct, so that there is no padding.
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$ty>())*);
            // SAFETY: by the line above.
            unsafe impl Parameter for $name {}
        )*
    };
}

structs! {
    struct View { slots: Address, count: Address, }
    struct Row {
        sequence: u32, position: u32, token: u32, recursion: u32,
        least_score: f32, depth_limit: u32, wants_logits: u32, unused: u32,
    }
    struct State { depth: u32, stage: u32, entry: u32, weight: f32, }
    struct Prepared {
        floats: Address, halves: Address, scales: Address, factors: Address, sums: Address,
        columns: u32, stride: u32,
    }
    struct Matrix {
        data: Address, bias: Address, out: Address, ty: u32, rows: u32, columns: u32, row_bytes: u32,
        row_step: u32, group_step: u32, out_stride: u32, add: u32, by_slot: u32, unused: u32,
    }
    struct Input {
        entering: u32, flying: u32, waiting: u32, changes: u32, asked: u32, by_capacity: u32,
        aside_from: u32, aside_to: u32,
    }
    struct Change { index: u32, page: u32, }
    struct Report {
        flying: u32, waiting: u32, ready: u32, wanted: u32, running: u32, error: u32, culprit: u32,
        entering: u32,
    }
    struct BeginParams {
        input: Address, new_rows: Address, new_slots: Address, old_active: Address,
        old_waiting: Address, changes: Address, tables: Address, rows: Address, states: Address,
        entering: Address, active: Address, waiting: Address, wanted: Address, report: Address,
        tokens: Address, x: Address, context: u32, width: u32,
    }
    struct EmbedParams {
        view: View, rows: Address, embedding: Matrix, h: Address, rope: Address, factors: Address,
        base: f64, scale: f64, pairs: u32, unused: u32,
    }
    struct CopyRowsParams { view: View, from: Address, to: Address, width: u32, unused: u32, }
    struct Source {
        a: Address, b: Address, part_scales: Address, visible: Address, make: u32, number: f32,
        head_dim: u32, per_head: u32, parts: u32, unused: u32,
    }
    struct ReadyParams {
        view: View, source: Source, out: Prepared, columns_of_run: u32, sums: u32, order: u32,
        unused: u32,
    }
    struct ProductParams {
        matrices: [Matrix; 3], first_tiles: [u32; 3], tiles: u32, groups: u32, groups_of_run: u32,
        tiles_of_block: u32, longer_blocks: u32, stage_units: u32, slot: u32, zero: u32, row_blocks: u32,
        rows: u32, groups_at_once: u32, input: Prepared, view: View, source: Source,
    }
    struct Cache {
        pages: Address, tables: Address, planes: u32, table_pages: u32, page_bytes: u32,
        key_bytes: u32, value_bytes: u32, kv_heads: u32, head_dim: u32, one_sequence: u32,
    }
    struct Planes { recursion: u32, keys: [u32; MAX_RECURSIONS], plane: [u32; MAX_RECURSIONS], }
    struct StoreParams {
        view: View, rows: Address, states: Address, rope: Address, q: Address, k: Address, v: Address,
        report: Address, cache: Cache, planes: Planes, heads: u32, pairs: u32, neighbours: u32,
    }
    struct AttentionParams {
        input: StoreParams, partial: Address, partial_scales: Address, visible: Address,
        parts: u32, stores: u32, rows: u32, row_shift: u32, heads_of_key: u32, factor: f32,
    }
    struct SeatsParams {
        active: Address, rows: Address, states: Address, kept: Address, running: Address,
        report: Address, recursions: u32, recursion: u32, routed: u32, unused: u32,
    }
    struct ScoreParams {
        view: View, rows: Address, h: Address, scores: Address, weights: [Address; MAX_RECURSIONS],
        width: u32, temperature: f32,
    }
    struct SelectParams {
        active: Address, rows: Address, selected: Address, count: Address, report: Address,
        recursion: u32, unused: u32,
    }
    struct DecideParams {
        view: View, active: Address, waiting: Address, flags: Address, input: Address, rows: Address,
        states: Address, scores: Address, deciding_scores: Address, pick_bias: Address,
        report: Address, capacity: f64, kind: u32, function: u32, alpha: f32,
        weighted: u32, outputs: u32, choose: u32, keys_for_all: u32, unused: u32,
    }
    struct MergeParams {
        view: View, rows: Address, states: Address, x: Address, h: Address, width: u32, follow: u32,
    }
    struct LeaveParams {
        active: Address, waiting: Address, flags: Address, ready: Address, wanted: Address,
        rows: Address, states: Address, report: Address, recursions: u32, routed: u32, most: u32,
        unused: u32,
    }
    struct ConditionParams { report: Address, condition: u64, }
    struct Draw {
        random: f64, repeat_penalty: f32, repeat_last_n: u32, candidates: u32, top_p: f32, min_p: f32,
        temperature: f32,
    }
    struct CandidatesParams {
        view: View, rows: Address, draws: Address, logits: Address, candidates: Address,
        tokens: Address, report: Address, vocab: u32, context: u32,
    }
    struct SampleParams {
        view: View, rows: Address, draws: Address, candidates: Address, drawn: Address, vocab: u32,
        unused: u32,
    }
}

/// Whether weights of a type have a minimum, as `has_min` in weights.cuh.
pub(super) fn has_min(ty: u32) -> bool {
    use TensorType::{Q4_1, Q4_K, Q5_1, Q5_K};
    [Q4_1, Q5_1, Q4_K, Q5_K]
        .iter()
        .any(|with| with.gguf_id() == ty)
}

impl Source {
    /// Rows `a`, of which is made what `make` says.
    pub fn new(make: u32, a: Address) -> Self {
        Source {
            a,
            b: 0,
            part_scales: 0,
            visible: 0,
            make,
            number: 0.0,
            head_dim: 0,
            per_head: 0,
            parts: 0,
            unused: 0,
        }
    }
}

/// What is done about keys and values (`Keys` in cache.cuh).
pub(super) mod keys {
    pub const ALL_TOKENS: u32 = 0;
    pub const KEPT_TOKENS: u32 = 1;
    pub const READ_ONLY: u32 = 2;
}

/// For [`ProductParams::slot`]: not known before the launch.
pub(super) const ANY_SLOT: u32 = u32::MAX;

/// For [`Planes::recursion`] and [`SeatsParams::recursion`]: each row's own.
pub(super) const ANY: u32 = u32::MAX;

/// How a row's input is made (`Make` in ready.cuh).
pub(super) mod make {
    pub const NORM: u32 = 0;
    pub const SCALED: u32 = 1;
    pub const GELU: u32 = 2;
    pub const SWIGLU: u32 = 3;
    pub const PLAIN: u32 = 4;
    pub const ATTENTION: u32 = 5;
}

/// How the halves of a row's groups stand (`Order` in ready.cuh).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    ByColumn = 0,
    PlainFragments = 1,
    BlockFragments = 2,
}

/// Where a row is (`Stage` in rows.cuh).
pub(super) mod stage {
    pub const LEFT: u32 = 2;
    pub const DONE: u32 = 3;
}

/// What went wrong (`Error` in rows.cuh).
pub(super) mod error {
    pub const NONE: u32 = 0;
    pub const SCORE_NOT_FINITE: u32 = 1;
    pub const KEY_NOT_FINITE: u32 = 2;
}

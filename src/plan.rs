//! The memory of a session, computed before it exists: one arena, each part at a known place.

use crate::cpu::activations::panel_words;
use crate::cpu::attention::{self, Seat};
use crate::cpu::matmul;
use crate::cpu::team::{MAX_THREADS, Team};
use crate::cpu::thread::{STACK_BYTES, ThreadParams, cores};
use crate::error::{Error, Result};
use crate::generate;
use crate::kv::{KvCache, KvRegions, KvShape, KvType, PAGE_TOKENS};
use crate::layout::{Carver, Layout, Region, parts, too_large};
use crate::model::{Hyperparameters, MAX_CONTEXT, Model, PlaneTokens};
use crate::sampling::Candidate;

/// Every part of the arena begins at a multiple of this: a cache line, and the widest vector.
pub const ARENA_ALIGNMENT: usize = 64;

/// Most sequences of a batch.
pub(crate) const MAX_SEQUENCES: usize = (1 << 20) - 1;

/// Rows of logits that are computed together where the plan does not say: with more, reading the
/// output matrix costs next to nothing beside the products.
const LOGIT_ROWS: usize = 32;

/// What a session or a batch is planned for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionParams {
    /// Tokens that a sequence can hold; 0 means as many as the model was trained for.
    pub context: usize,
    /// Sequences: of a [`Batch`](crate::Batch), the most at a time; a [`Session`](crate::Session) runs
    /// one.
    pub sequences: usize,
    /// Most rows of one pass over the weights: prompts are taken in chunks of this size, and a batch
    /// runs so many tokens at a time. 0 means 64, on a GPU 512, whose passes take little longer.
    /// Capacity routing needs the whole text in one pass.
    pub batch: usize,
    /// Threads that share each operation, the caller's included; 0 means one for each core. On a GPU one.
    pub threads: usize,
    /// How keys and values are stored.
    pub kv: KvType,
    /// Pages of the KV pool; 0 means enough for every token to take every recursion.
    pub kv_pages: usize,
    /// Rows of logits that are computed together when a whole text is scored, or tokens are drawn for
    /// many sequences; 0 means one for each sequence, up to 32. (On a GPU at least one for each.) More than `batch` counts
    /// as `batch`.
    pub logit_rows: usize,
    /// What the helper threads ask of the system.
    pub thread: ThreadParams,
    /// Touch every page of the session's memory when it is created, so that no later call waits
    /// for the system to give one.
    pub prefault: bool,
    /// Keep the session's memory from being swapped out (`mlock`).
    pub lock: bool,
}

impl Default for SessionParams {
    fn default() -> Self {
        SessionParams {
            context: 0,
            sequences: 1,
            batch: 0,
            threads: 0,
            kv: KvType::F16,
            kv_pages: 0,
            logit_rows: 0,
            thread: ThreadParams::default(),
            prefault: false,
            lock: false,
        }
    }
}

/// The layout of a session's arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub(crate) params: SessionParams,
    pub(crate) kv_shape: KvShape,
    kv: KvRegions,
    regions: Regions,
    /// Rows between their first and their last layer.
    slots: usize,
    /// Bytes at the beginning that belong to the team; the arena follows.
    team_bytes: usize,
    arena_bytes: usize,
    #[cfg(feature = "cuda")]
    on_device: Option<crate::cuda::DevicePlan>,
}

/// One token of one sequence on its way through the layers.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Row {
    pub sequence: u32,
    pub position: u32,
    pub token: u32,
    /// The recursion that it stands before.
    pub recursion: u32,
}

impl Plan {
    /// Plans a session of `model`. Takes no memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for sizes that nobody can have, [`Error::Unsupported`] for what this system or the model
    /// cannot do, [`Error::Device`] where a GPU has not the memory.
    pub fn new(model: &Model, params: &SessionParams) -> Result<Self> {
        // All rows of a pass are done before the next pass begins.
        Self::with_stays(model, params, 1)
    }

    /// Plans a [`Batch`](crate::Batch) of `params.sequences` sequences, whose tick runs the shared block
    /// for up to `params.batch` rows. Takes no memory.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn batch(model: &Model, params: &SessionParams) -> Result<Self> {
        let h = model.hyperparameters();
        // A row that has left waits for those before it, which take all recursions at most.
        let stays = if h.router.is_some() { h.recursions } else { 1 };
        Self::with_stays(model, params, stays)
    }

    /// Plans the batch with the most sequences that `bytes` bytes can hold, and with pages for the
    /// whole context of each when a token runs `mean_depth` recursions on average. The bytes are for the
    /// batch's block of memory ([`Plan::bytes`]) or, on a GPU, for what it takes there
    /// ([`Plan::device_bytes`]). Of `params`, `sequences` and `kv_pages` are what is sought.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when not even one sequence fits.
    pub fn batch_in(
        model: &Model,
        params: &SessionParams,
        mean_depth: f64,
        bytes: usize,
    ) -> Result<Self> {
        let plan = |sequences: usize| {
            let mut params = SessionParams {
                sequences,
                ..params.clone()
            };
            params.kv_pages = Self::pages_for(model, &params, mean_depth)?;
            Self::batch(model, &params)
        };
        let takes = |plan: &Self| match model.is_on_gpu() {
            true => plan.device_bytes(),
            false => plan.bytes(),
        };
        let least = plan(1)?;
        if takes(&least) > bytes {
            return Err(Error::argument(format_args!(
                "a batch of one sequence takes {} bytes, but there are {bytes}",
                takes(&least)
            )));
        }
        let (mut fits, mut too_many) = (least, MAX_SEQUENCES + 1);
        while too_many - fits.params.sequences > 1 {
            let middle = fits.params.sequences.midpoint(too_many);
            match plan(middle) {
                Ok(plan) if takes(&plan) <= bytes => fits = plan,
                _ => too_many = middle,
            }
        }
        Ok(fits)
    }

    /// Pages of the KV pool ([`SessionParams::kv_pages`]) that `params.sequences` sequences take when
    /// their contexts are full and a token runs `mean_depth` recursions on average.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for sizes and depths that nobody can have.
    pub fn pages_for(model: &Model, params: &SessionParams, mean_depth: f64) -> Result<usize> {
        let h = model.hyperparameters();
        let (least, most) = (h.least_depth() as f64, h.recursions as f64);
        if !(least..=most).contains(&mean_depth) {
            return Err(Error::argument(format_args!(
                "the mean depth is {mean_depth}; this model's is between {least} and {most}"
            )));
        }
        let context = Self::context(model, params)?;
        let planes = &model.schedule().planes;
        let routed = planes.iter().filter(|p| p.tokens != PlaneTokens::All);
        let block = routed.count() as f64 / most;
        let whole = planes.iter().filter(|p| p.tokens == PlaneTokens::All);
        let entries = context as f64 * (whole.count() as f64 + mean_depth * block);
        // The last page of a plane is half empty on average.
        let pages = entries / PAGE_TOKENS as f64 + planes.len() as f64 / 2.0;
        Ok((params.sequences as f64 * pages).ceil() as usize)
    }

    /// Tokens of each sequence's context; they and the sequences are as many as somebody can have.
    fn context(model: &Model, params: &SessionParams) -> Result<usize> {
        let context = match params.context {
            0 => model.hyperparameters().context_length,
            tokens => tokens,
        };
        check("context", context, MAX_CONTEXT)?;
        check("sequences", params.sequences, MAX_SEQUENCES)?;
        Ok(context)
    }

    /// Plans memory in which rows stay for up to `stays` passes.
    fn with_stays(model: &Model, params: &SessionParams, stays: usize) -> Result<Self> {
        let mut params = params.clone();
        params.context = Self::context(model, &params)?;
        if params.threads == 0 {
            params.threads = cores();
        }
        if params.batch == 0 {
            params.batch = if model.is_on_gpu() { 512 } else { 64 };
        }
        // There are never more rows than tokens.
        let tokens = params.context.saturating_mul(params.sequences);
        params.batch = params.batch.min(tokens);
        if params.logit_rows == 0 {
            params.logit_rows = params.sequences.min(params.batch).clamp(1, LOGIT_ROWS);
        }
        check("batch", params.batch, MAX_CONTEXT)?;
        check("threads", params.threads, MAX_THREADS)?;
        check("logit rows", params.logit_rows, MAX_CONTEXT)?;
        // More rows do not come together.
        params.logit_rows = params.logit_rows.min(params.batch);
        params.thread.check()?;
        let kv_shape = kv_shape(model, &mut params)?;

        let slots = params.batch.checked_mul(stays).ok_or_else(too_large)?;
        #[cfg(feature = "cuda")]
        let on_device = match model.is_on_gpu() {
            true => Some(Self::plan_device(model, &mut params, slots, &kv_shape)?),
            false => None,
        };
        let extents = Extents {
            model,
            params: &params,
            kv: &kv_shape,
            slots,
        };
        let mut layout = Layout::<ARENA_ALIGNMENT>::new();
        let kv = KvRegions::lay_out(&mut layout, &kv_shape)?;
        let regions = Regions::lay_out(&mut layout, &extents)?;
        let team_bytes = Team::bytes(params.threads).next_multiple_of(ARENA_ALIGNMENT);
        if team_bytes > isize::MAX as usize - layout.bytes {
            return Err(too_large());
        }
        Ok(Plan {
            params,
            kv_shape,
            kv,
            regions,
            slots,
            team_bytes,
            arena_bytes: layout.bytes,
            #[cfg(feature = "cuda")]
            on_device,
        })
    }

    #[cfg(feature = "cuda")]
    fn plan_device(
        model: &Model,
        params: &mut SessionParams,
        slots: usize,
        kv: &KvShape,
    ) -> Result<crate::cuda::DevicePlan> {
        // No other thread is needed, and every sequence may want its logits at once.
        params.threads = 1;
        let wanted = params.sequences.min(params.batch);
        params.logit_rows = params.logit_rows.max(wanted).min(params.batch);
        let sizes = crate::cuda::Sizes {
            rows: params.batch,
            slots,
            sequences: params.sequences,
            context: params.context,
            logit_rows: params.logit_rows,
        };
        crate::cuda::DevicePlan::new(model, sizes, kv)
    }

    /// The plan of the GPU's memory, where the model is on one.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self) -> Option<&crate::cuda::DevicePlan> {
        self.on_device.as_ref()
    }

    /// Bytes of a GPU's memory that a session or batch takes, besides the weights; 0 on the CPU.
    pub fn device_bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.on_device.as_ref().map_or(0, |plan| plan.bytes);
        #[cfg(not(feature = "cuda"))]
        0
    }

    /// Bytes of the host's memory that are pinned for copies to and from a GPU; 0 on the CPU.
    pub fn pinned_bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self
            .on_device
            .as_ref()
            .map_or(0, |plan| plan.pinned_bytes());
        #[cfg(not(feature = "cuda"))]
        0
    }

    /// What was asked for, with every default filled in.
    pub fn params(&self) -> &SessionParams {
        &self.params
    }

    /// Bytes of a session's one block of memory: all that it takes, but for the stacks of its
    /// helper threads. Its beginning must be aligned to [`ARENA_ALIGNMENT`].
    pub fn bytes(&self) -> usize {
        self.team_bytes + self.arena_bytes
    }

    /// Bytes of the heap that a [`Batch`](crate::Batch) takes besides, for its list of sequences.
    pub fn heap_bytes(&self) -> usize {
        crate::batch::heap_bytes(self.params.sequences, self.slots)
    }

    /// Rows that may be between their first and their last layer at a time.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of the stacks that the system gives the helper threads; they take memory only where
    /// they are touched, some kilobytes each.
    pub fn stack_bytes(&self) -> usize {
        (self.params.threads - 1) * STACK_BYTES
    }

    /// Cuts a session's memory into the team's part and the arena.
    pub(crate) fn split(
        &self,
        memory: &'static mut [u8],
    ) -> (&'static mut [u8], &'static mut [u8]) {
        let (team, arena) = memory.split_at_mut(self.team_bytes);
        (team, &mut arena[..self.arena_bytes])
    }

    /// Bytes of the KV pool, pages only.
    pub fn kv_bytes(&self) -> usize {
        self.kv_shape.pages * self.kv_shape.page_bytes()
    }

    /// Bytes that one token of full depth takes in the KV pool.
    pub fn kv_bytes_per_token(&self) -> usize {
        self.kv_shape.planes * self.kv_shape.page_bytes() / PAGE_TOKENS
    }

    /// The memory in a few named lines, which add up to [`Plan::bytes`].
    pub fn lines(&self) -> [(&'static str, usize); 7] {
        let (kv, other) = (&self.kv, &self.regions);
        let sampling = other.logits.bytes + other.candidates.bytes + other.text.bytes;
        let tables =
            kv.tables.bytes + kv.lengths.bytes + kv.owners.bytes + kv.free.bytes + kv.counts.bytes;
        let history = other.tokens.bytes + other.depths.bytes;
        let work = other.scratch.bytes + other.partials.bytes;
        let named = kv.pages.bytes + tables + history + sampling + work;
        [
            ("KV pages", kv.pages.bytes),
            ("KV page tables", tables),
            ("activations and padding", self.arena_bytes - named),
            ("work in progress", work),
            ("logits, sampling, text", sampling),
            ("tokens and depths", history),
            ("threads", self.team_bytes),
        ]
    }

    /// [sequences, context] tokens so far.
    pub(crate) fn tokens<'a>(&self, arena: &'a [u8]) -> &'a [u32] {
        let Region { offset, bytes } = self.regions.tokens;
        // SAFETY: `u32` is `Plain`: it takes any bytes as values.
        unsafe { arena[offset..offset + bytes].align_to() }.1
    }

    /// [sequences, context] the depths of the tokens so far.
    pub(crate) fn depths<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        let Region { offset, bytes } = self.regions.depths;
        &arena[offset..offset + bytes]
    }

    /// The arena's parts as slices.
    pub(crate) fn carve<'a>(&'a self, arena: &'a mut [u8]) -> Buffers<'a> {
        let mut carver = Carver::new(arena);
        // In the order of the layout.
        let kv = KvCache::carve(&self.kv, &mut carver, &self.kv_shape);
        Buffers::carve(&self.regions, &mut carver, kv)
    }
}

fn check(what: &str, value: usize, limit: usize) -> Result<()> {
    if value == 0 || value > limit {
        return Err(Error::argument(format_args!(
            "{what}: {value} was asked for; 1 to {limit} are possible"
        )));
    }
    Ok(())
}

/// The cache's sizes; fills in the number of pages.
fn kv_shape(model: &Model, params: &mut SessionParams) -> Result<KvShape> {
    let h = model.hyperparameters();
    let ty = params.kv.tensor_type();
    let shape = KvShape::new(params.kv, h.kv_heads, h.head_dim).ok_or_else(|| {
        Error::argument(format_args!(
            "the KV cache cannot be {}: a head has {} elements, no multiple of {}; use f16",
            ty.name(),
            h.head_dim,
            ty.block_len()
        ))
    })?;
    let planes = model.schedule().planes.len();
    let table_pages = params.context.div_ceil(PAGE_TOKENS);
    let full = table_pages
        .checked_mul(planes)
        .and_then(|pages| pages.checked_mul(params.sequences))
        .ok_or_else(too_large)?;
    if params.kv_pages == 0 || params.kv_pages > full {
        params.kv_pages = full;
    }
    if params.kv_pages > u32::MAX as usize {
        return Err(too_large());
    }
    Ok(KvShape {
        planes,
        sequences: params.sequences,
        table_pages,
        pages: params.kv_pages,
        on_gpu: model.is_on_gpu(),
        ..shape
    })
}

/// What the arena's parts are as large as.
pub(crate) struct Extents<'a> {
    model: &'a Model,
    params: &'a SessionParams,
    kv: &'a KvShape,
    /// Rows between their first and their last layer.
    slots: usize,
}

impl Extents<'_> {
    fn h(&self) -> &Hyperparameters {
        self.model.hyperparameters()
    }

    /// So many, but on a GPU none: it has the rows and pages, the host keeps the books.
    fn here(&self, count: usize) -> usize {
        if self.model.is_on_gpu() { 0 } else { count }
    }

    /// Rows of one pass.
    fn rows(&self) -> usize {
        self.here(self.params.batch)
    }

    fn scratch_bytes(&self) -> usize {
        let product = matmul::scratch_bytes(self.model.widest_row());
        product.max(attention::scratch_bytes(self.kv, self.h().heads))
    }

    fn page_bytes(&self) -> usize {
        match self.model.is_on_gpu() {
            true => self.kv.page_bytes(),
            false => 0,
        }
    }
}

parts! {
    /// The arena's parts. A row has a slot from its first layer to its last; in between, the rows that
    /// run together are packed, in the order of `active`.
    pub(crate) struct Buffers<'a> { kv: KvCache<'a> }
    /// Where they lie.
    struct Regions; (s: &Extents)

    /// The residual stream.
    x: f32 = [s.here(s.slots), s.h().hidden_size],
    /// That of rows in the recursions, packed.
    h: f32 = [s.rows(), s.h().hidden_size],
    /// Normalised rows.
    norm: f32 = [s.rows(), s.h().hidden_size],
    /// Queries, of each head.
    q: f32 = [s.rows(), s.h().query_size()],
    /// Keys, of each key head.
    k: f32 = [s.rows(), s.h().kv_size()],
    /// Values, of each key head.
    v: f32 = [s.rows(), s.h().kv_size()],
    /// Attention's result, of each head.
    attn: f32 = [s.rows(), s.h().query_size()],
    gate: f32 = [s.rows(), s.h().feed_forward_size],
    up: f32 = [s.rows(), s.h().feed_forward_size],
    /// Inside a router of two layers.
    router_hidden: f32 = [s.rows(), s.model.router_width()],
    /// Router scores, later weights.
    scores: f32 = [s.rows(), s.h().recursions],
    /// Scores of the auxiliary router.
    aux_scores: f32 = [s.rows()],
    /// Cosine and sine at each row's position.
    rope: [f32; 2] = [s.here(s.slots), s.h().rope.dims / 2],
    /// Divisors of the frequencies, if there are any.
    rope_factors: f32 = [s.model.rope_factors().map_or(0, |f| f.length)],
    /// The rows.
    rows: Row = [s.slots],
    /// Slots of the rows that are in the recursions.
    active: u32 = [s.params.batch],
    /// 1 for packed rows that go on, else 0.
    kept: u32 = [s.rows()],
    /// Recursions that each row ran or, as soon as that is decided, will run.
    depth: u8 = [s.slots],
    /// Slots of rows that have left the recursions.
    left: u32 = [s.slots],
    /// Rows in the last layers, packed; then what logits are computed from.
    leaving: f32 = [s.rows(), s.h().hidden_size],
    /// Where each packed row stands in its plane.
    seats: Seat = [s.rows()],
    /// Activations as bytes.
    panels: u32 = [panel_words(s.rows(), s.model.widest_row())],
    /// What each thread is at: weights that are taken apart, attention's scores.
    scratch: u8 = [s.params.threads, s.here(s.scratch_bytes())],
    /// Attention's results over parts of a long context.
    partials: f32 = [s.here(attention::partial_floats(s.kv, s.h().heads))],
    /// The last token's residual stream after the last layer.
    last_row: f32 = [s.h().hidden_size],
    logits: f32 = [s.params.logit_rows, s.h().vocab_size],
    /// Sampling.
    candidates: Candidate = [s.h().vocab_size],
    /// Generated text that is not yet given out.
    text: u8 = [generate::text_room(s.model)],
    /// A page of the cache on its way to or from a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    page: u8 = [s.page_bytes()],
    /// The tokens so far.
    tokens: u32 = [s.params.sequences, s.params.context],
    /// Their depths.
    depths: u8 = [s.params.sequences, s.params.context],
}

//! The memory of a session, computed before it exists: one arena, each part at a known place.

use crate::cpu::activations::panel_words;
use crate::cpu::attention::{self, Seat};
use crate::cpu::matmul;
use crate::cpu::team::{MAX_THREADS, Team};
use crate::cpu::thread::{STACK_BYTES, ThreadParams, cores};
use crate::error::{Error, Result};
use crate::generate;
use crate::kv::{KvCache, KvRegions, KvShape, KvType, PAGE_TOKENS};
use crate::model::{MAX_CONTEXT, Model, PlaneTokens};
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
    /// many sequences; 0 means one for each sequence, up to 32. (On a GPU at least one for each.)
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

/// A part of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Region {
    /// Where it begins, a multiple of [`ARENA_ALIGNMENT`].
    pub offset: usize,
    /// Its size without padding.
    pub bytes: usize,
}

/// The layout of a session's arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub(crate) params: SessionParams,
    pub(crate) kv_shape: KvShape,
    kv: KvRegions,
    activations: Activations,
    sequences: Sequences,
    /// Rows between their first and their last layer.
    slots: usize,
    /// Bytes at the beginning that belong to the team; the arena follows.
    team_bytes: usize,
    arena_bytes: usize,
    #[cfg(feature = "cuda")]
    on_device: Option<crate::cuda::DevicePlan>,
}

/// Buffers of one pass, each [batch, …].
#[derive(Debug, Clone, PartialEq, Eq)]
struct Activations {
    x: Region,
    h: Region,
    norm: Region,
    q: Region,
    k: Region,
    v: Region,
    attn: Region,
    gate: Region,
    up: Region,
    router_hidden: Region,
    scores: Region,
    aux_scores: Region,
    rope: Region,
    rope_factors: Region,
    rows: Region,
    active: Region,
    kept: Region,
    depth: Region,
    left: Region,
    leaving: Region,
    seats: Region,
    panels: Region,
    scratch: Region,
    partials: Region,
    last_row: Region,
    logits: Region,
    candidates: Region,
    text: Region,
    page: Region,
}

/// What is remembered of each sequence, each [sequences, context].
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sequences {
    tokens: Region,
    depths: Region,
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
        let context = match params.context {
            0 => h.context_length,
            tokens => tokens,
        };
        let planes = &model.schedule().planes;
        let routed = planes.iter().filter(|p| p.tokens != PlaneTokens::All);
        let block = routed.count() as f64 / most;
        let whole = planes.iter().filter(|p| p.tokens == PlaneTokens::All);
        let entries = context as f64 * (whole.count() as f64 + mean_depth * block);
        // The last page of a plane is half empty on average.
        let pages = entries / PAGE_TOKENS as f64 + planes.len() as f64 / 2.0;
        Ok((params.sequences as f64 * pages).ceil() as usize)
    }

    /// Plans memory in which rows stay for up to `stays` passes.
    fn with_stays(model: &Model, params: &SessionParams, stays: usize) -> Result<Self> {
        let h = model.hyperparameters();
        let mut params = params.clone();
        if params.context == 0 {
            params.context = h.context_length;
        }
        check("context", params.context, MAX_CONTEXT)?;
        check("sequences", params.sequences, MAX_SEQUENCES)?;
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
        params.thread.check()?;
        let kv_shape = kv_shape(model, &mut params)?;

        let mut layout = Layout { bytes: 0 };
        let slots = params.batch.checked_mul(stays).ok_or_else(too_large)?;
        #[cfg(feature = "cuda")]
        let on_device = match model.is_on_gpu() {
            true => Some(Self::plan_device(model, &mut params, slots, &kv_shape)?),
            false => None,
        };
        // A GPU has the rows and pages; the host keeps the books.
        let on_gpu = model.is_on_gpu();
        let here = |count: usize| if on_gpu { 0 } else { count };
        let (n, x_slots) = (here(params.batch), here(slots));
        let hidden = h.hidden_size;
        let widest = model.widest_row();
        let scratch_bytes =
            matmul::scratch_bytes(widest).max(attention::scratch_bytes(&kv_shape, h.heads));
        let activations = Activations {
            x: layout.add::<f32>(&[x_slots, hidden])?,
            h: layout.add::<f32>(&[n, hidden])?,
            norm: layout.add::<f32>(&[n, hidden])?,
            q: layout.add::<f32>(&[n, h.query_size()])?,
            k: layout.add::<f32>(&[n, h.kv_size()])?,
            v: layout.add::<f32>(&[n, h.kv_size()])?,
            attn: layout.add::<f32>(&[n, h.query_size()])?,
            gate: layout.add::<f32>(&[n, h.feed_forward_size])?,
            up: layout.add::<f32>(&[n, h.feed_forward_size])?,
            router_hidden: layout.add::<f32>(&[n, model.router_width()])?,
            scores: layout.add::<f32>(&[n, h.recursions])?,
            aux_scores: layout.add::<f32>(&[n])?,
            rope: layout.add::<[f32; 2]>(&[x_slots, h.rope.dims / 2])?,
            rope_factors: layout.add::<f32>(&[model.rope_factors().map_or(0, |f| f.length)])?,
            rows: layout.add::<Row>(&[slots])?,
            active: layout.add::<u32>(&[params.batch])?,
            kept: layout.add::<u32>(&[n])?,
            depth: layout.add::<u8>(&[slots])?,
            left: layout.add::<u32>(&[slots])?,
            leaving: layout.add::<f32>(&[n, hidden])?,
            seats: layout.add::<Seat>(&[n])?,
            panels: layout.add::<u32>(&[panel_words(n, widest)])?,
            scratch: layout.add::<u8>(&[params.threads, here(scratch_bytes)])?,
            partials: layout.add::<f32>(&[here(attention::partial_floats(&kv_shape, h.heads))])?,
            last_row: layout.add::<f32>(&[hidden])?,
            logits: layout.add::<f32>(&[params.logit_rows, h.vocab_size])?,
            candidates: layout.add::<Candidate>(&[h.vocab_size])?,
            text: layout.add::<u8>(&[generate::text_room(model)])?,
            page: layout.add::<u8>(&[if on_gpu { kv_shape.page_bytes() } else { 0 }])?,
        };
        let sequences = Sequences {
            tokens: layout.add::<u32>(&[params.sequences, params.context])?,
            depths: layout.add::<u8>(&[params.sequences, params.context])?,
        };
        let lists = params.sequences.saturating_mul(kv_shape.planes);
        let kv = KvRegions {
            tables: layout.add::<u32>(&[lists, kv_shape.table_pages])?,
            lengths: layout.add::<u32>(&[lists])?,
            owners: layout.add::<u32>(&[kv_shape.pages])?,
            free: layout.add::<u32>(&[kv_shape.pages])?,
            counts: layout.add::<u32>(&[2])?,
            pages: layout.add::<u8>(&[here(kv_shape.pages), kv_shape.page_bytes()])?,
        };
        let team_bytes = Team::bytes(params.threads).next_multiple_of(ARENA_ALIGNMENT);
        if team_bytes > isize::MAX as usize - layout.bytes {
            return Err(too_large());
        }
        Ok(Plan {
            params,
            kv_shape,
            kv,
            activations,
            sequences,
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
        let a = &self.activations;
        let sampling = a.logits.bytes + a.candidates.bytes + a.text.bytes;
        let tables = self.kv.tables.bytes
            + self.kv.lengths.bytes
            + self.kv.owners.bytes
            + self.kv.free.bytes
            + self.kv.counts.bytes;
        let history = self.sequences.tokens.bytes + self.sequences.depths.bytes;
        let named =
            self.kv.pages.bytes + tables + history + sampling + a.scratch.bytes + a.partials.bytes;
        [
            ("KV pages", self.kv.pages.bytes),
            ("KV page tables", tables),
            ("activations and padding", self.arena_bytes - named),
            ("work in progress", a.scratch.bytes + a.partials.bytes),
            ("logits, sampling, text", sampling),
            ("tokens and depths", history),
            ("threads", self.team_bytes),
        ]
    }

    /// [sequences, context] tokens so far.
    pub(crate) fn tokens<'a>(&self, arena: &'a [u8]) -> &'a [u32] {
        let Region { offset, bytes } = self.sequences.tokens;
        // SAFETY: `u32` is `Plain`: it takes any bytes as values.
        unsafe { arena[offset..offset + bytes].align_to() }.1
    }

    /// [sequences, context] the depths of the tokens so far.
    pub(crate) fn depths<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        let Region { offset, bytes } = self.sequences.depths;
        &arena[offset..offset + bytes]
    }

    /// The arena's parts as slices.
    pub(crate) fn carve<'a>(&'a self, arena: &'a mut [u8]) -> Buffers<'a> {
        let mut carver = Carver { rest: arena, at: 0 };
        let a = &self.activations;
        // In the order of the layout.
        Buffers {
            x: carver.take(a.x),
            h: carver.take(a.h),
            norm: carver.take(a.norm),
            q: carver.take(a.q),
            k: carver.take(a.k),
            v: carver.take(a.v),
            attn: carver.take(a.attn),
            gate: carver.take(a.gate),
            up: carver.take(a.up),
            router_hidden: carver.take(a.router_hidden),
            scores: carver.take(a.scores),
            aux_scores: carver.take(a.aux_scores),
            rope: carver.take(a.rope),
            rope_factors: carver.take(a.rope_factors),
            rows: carver.take(a.rows),
            active: carver.take(a.active),
            kept: carver.take(a.kept),
            depth: carver.take(a.depth),
            left: carver.take(a.left),
            leaving: carver.take(a.leaving),
            seats: carver.take(a.seats),
            panels: carver.take(a.panels),
            scratch: carver.take(a.scratch),
            partials: carver.take(a.partials),
            last_row: carver.take(a.last_row),
            logits: carver.take(a.logits),
            candidates: carver.take(a.candidates),
            text: carver.take(a.text),
            page: carver.take(a.page),
            tokens: carver.take(self.sequences.tokens),
            depths: carver.take(self.sequences.depths),
            kv: KvCache {
                shape: &self.kv_shape,
                tables: carver.take(self.kv.tables),
                lengths: carver.take(self.kv.lengths),
                owners: carver.take(self.kv.owners),
                free: carver.take(self.kv.free),
                counts: carver.take(self.kv.counts),
                pages: carver.take(self.kv.pages),
            },
        }
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
        ..shape
    })
}

pub(crate) fn too_large() -> Error {
    Error::argument(
        "the session would be larger than can be addressed; plan a smaller context or fewer sequences",
    )
}

/// Adds up regions, each of which begins at a multiple of `ALIGNMENT`.
pub(crate) struct Layout<const ALIGNMENT: usize> {
    pub bytes: usize,
}

impl Layout<ARENA_ALIGNMENT> {
    fn add<T: Plain>(&mut self, dims: &[usize]) -> Result<Region> {
        self.add_items(size_of::<T>(), dims)
    }
}

impl<const ALIGNMENT: usize> Layout<ALIGNMENT> {
    /// A region for items of so many bytes.
    pub fn add_items(&mut self, item: usize, dims: &[usize]) -> Result<Region> {
        let bytes = dims
            .iter()
            .try_fold(item, |size, dim| size.checked_mul(*dim))
            .ok_or_else(too_large)?;
        let offset = self.bytes;
        // `isize::MAX` is the most that one allocation can be.
        self.bytes = offset
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(ALIGNMENT))
            .filter(|end| *end <= isize::MAX as usize)
            .ok_or_else(too_large)?;
        Ok(Region { offset, bytes })
    }
}

/// Types that may lie in the arena.
///
/// # Safety
/// Any bytes are a valid value, there is no padding, and the alignment divides
/// [`ARENA_ALIGNMENT`].
pub(crate) unsafe trait Plain {}
// SAFETY: plain numbers, and `repr(C)` structs of numbers of one size.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for [f32; 2] {}
// SAFETY: as above.
unsafe impl Plain for Row {}
// SAFETY: as above.
unsafe impl Plain for Seat {}
// SAFETY: as above.
unsafe impl Plain for Candidate {}

/// Hands out regions in the order of their offsets.
struct Carver<'a> {
    rest: &'a mut [u8],
    at: usize,
}

impl<'a> Carver<'a> {
    fn take<T: Plain>(&mut self, region: Region) -> &'a mut [T] {
        let rest = std::mem::take(&mut self.rest);
        let (_, rest) = rest.split_at_mut(region.offset - self.at);
        let (bytes, rest) = rest.split_at_mut(region.bytes);
        self.rest = rest;
        self.at = region.offset + region.bytes;
        // SAFETY: `Plain` types take any bytes as values.
        let (before, items, after) = unsafe { bytes.align_to_mut::<T>() };
        debug_assert!(
            before.is_empty() && after.is_empty(),
            "the arena is aligned"
        );
        items
    }
}

/// The arena's parts. Shapes are in elements. A row has a slot from its first layer to its last; in
/// between, the rows that run together are packed, in the order of `active`.
pub(crate) struct Buffers<'a> {
    /// [slots, hidden] the residual stream.
    pub x: &'a mut [f32],
    /// [batch, hidden] rows in the recursions, packed.
    pub h: &'a mut [f32],
    /// [batch, hidden] normalised rows.
    pub norm: &'a mut [f32],
    /// [batch, heads, head_dim]
    pub q: &'a mut [f32],
    /// [batch, kv_heads, head_dim]
    pub k: &'a mut [f32],
    /// [batch, kv_heads, head_dim]
    pub v: &'a mut [f32],
    /// [batch, heads, head_dim] attention's result.
    pub attn: &'a mut [f32],
    /// [batch, feed_forward]
    pub gate: &'a mut [f32],
    /// [batch, feed_forward]
    pub up: &'a mut [f32],
    /// [batch, router width] inside a router of two layers.
    pub router_hidden: &'a mut [f32],
    /// [batch, outputs] router scores, later weights.
    pub scores: &'a mut [f32],
    /// [batch] scores of the auxiliary router.
    pub aux_scores: &'a mut [f32],
    /// [slots, rope dims / 2] cosine and sine at each row's position.
    pub rope: &'a mut [[f32; 2]],
    /// [rope dims / 2] divisors of the frequencies, or empty.
    pub rope_factors: &'a mut [f32],
    /// [slots] the rows.
    pub rows: &'a mut [Row],
    /// [batch] slots of the rows that are in the recursions.
    pub active: &'a mut [u32],
    /// [batch] 1 for packed rows that go on, else 0.
    pub kept: &'a mut [u32],
    /// [slots] recursions that each row ran or, as soon as that is decided, will run.
    pub depth: &'a mut [u8],
    /// [slots] slots of rows that have left the recursions.
    pub left: &'a mut [u32],
    /// [batch, hidden] rows in the last layers, packed; then what logits are computed from.
    pub leaving: &'a mut [f32],
    /// [batch] where each packed row stands in its plane.
    pub seats: &'a mut [Seat],
    /// [`panel_words`] activations as bytes.
    pub panels: &'a mut [u32],
    /// [threads, …] what each thread is at: weights that are taken apart, attention's scores.
    pub scratch: &'a mut [u8],
    /// Attention's results over parts of a long context.
    pub partials: &'a mut [f32],
    /// `[hidden]` the last token's residual stream after the last layer.
    pub last_row: &'a mut [f32],
    /// [logit_rows, vocab]
    pub logits: &'a mut [f32],
    /// `[vocab]` sampling.
    pub candidates: &'a mut [Candidate],
    /// [`generate::text_room`] generated text that is not yet given out.
    pub text: &'a mut [u8],
    /// A page of the cache on its way to or from a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub page: &'a mut [u8],
    /// [sequences, context] tokens so far.
    pub tokens: &'a mut [u32],
    /// [sequences, context] their depths.
    pub depths: &'a mut [u8],
    /// The cache.
    pub kv: KvCache<'a>,
}

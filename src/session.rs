//! A session: one sequence, its memory, and the calls that move it on.

use crate::arena::{Locked, Prepared, own_memory};
use crate::cpu::{self, Clock, Pace, Settings, simd::Level, team::Team};
#[cfg(feature = "cuda")]
use crate::cuda::{self, Gpu};
use crate::error::{Error, Result};
use crate::memory::Shared;
use crate::model::{MAX_RECURSIONS, Model};
use crate::plan::{Buffers, Plan, Row, SessionParams};
use crate::routing::Routing;
use crate::sampling::{Sampler, SamplerParams};
use memmap2::MmapMut;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// One sequence in the making. After creation no call allocates.
pub struct Session {
    // Goes before the model, whose mapped file a GPU may be using.
    pub(crate) engine: Engine,
    pub(crate) model: Model,
    pub(crate) plan: Plan,
    pub(crate) arena: &'static mut [u8],
    routing: Routing,
    settings: Settings,
    pub(crate) sampler: Sampler,
    pace: Pace,
    cancel: CancelFlag,
    /// Tokens so far.
    pub(crate) length: usize,
    pub(crate) last: Last,
    _locked: Option<Locked>,
    /// The memory that all this lies in, unless it is the caller's. Dropped last.
    _memory: Option<MmapMut>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all = f.debug_struct("Session");
        all.field("length", &self.length);
        all.field("params", self.plan.params());
        all.finish_non_exhaustive()
    }
}

/// What does a session's work.
// A box ends the process where there is no memory for it.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Engine {
    /// Threads, and the instruction set of the kernels.
    Cpu { team: Team, level: Level },
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(Gpu),
}

impl Engine {
    /// Logits of `count` of the rows that passed the last layer from row `first` on, into
    /// `buffers.logits`.
    pub(crate) fn logits(
        &mut self,
        model: &Model,
        buffers: &mut Buffers,
        first: usize,
        count: usize,
    ) -> Result<()> {
        match self {
            Engine::Cpu { team, level } => cpu::logits(model, team, *level, buffers, first, count),
            #[cfg(feature = "cuda")]
            Engine::Cuda(gpu) => gpu.logits_of(first, count, buffers.logits),
        }
    }
}

/// What is known of the last token's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Last {
    /// No token yet, or the last one was rewound.
    Nothing,
    /// The token's residual stream stands in the arena; the logits are not computed yet.
    Row,
    /// As before, and the logits stand in the arena too.
    Logits,
}

/// Cancels calls of a session from other threads. Clones cancel the same session.
#[derive(Clone)]
pub struct Canceller(Shared<AtomicBool>);

impl std::fmt::Debug for Canceller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let waits = self.0.load(Ordering::Relaxed);
        f.debug_tuple("Canceller").field(&waits).finish()
    }
}

impl Canceller {
    /// Ends the session's call in progress within the time of one layer (on a GPU of one pass), or its
    /// next call at once: [`Session::prefill`] and the like then fail with [`Error::Cancelled`] and the session
    /// stands where it stood before; [`Session::generate`] ends with
    /// [`Finish::Cancelled`](crate::generate::Finish::Cancelled). One cancel ends one call.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Takes back a cancel that no call has met yet.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Who may cancel.
enum CancelFlag {
    Nobody,
    Shared(Canceller),
    Borrowed(&'static AtomicBool),
}

impl CancelFlag {
    fn get(&self) -> Option<&AtomicBool> {
        match self {
            CancelFlag::Nobody => None,
            CancelFlag::Shared(canceller) => Some(&canceller.0),
            CancelFlag::Borrowed(flag) => Some(flag),
        }
    }
}

/// What is done with the rows of a chunk. (Not generic: each kind would have the code of a whole pass.)
pub(crate) type After<'a> = &'a mut dyn FnMut(Chunk) -> Result<()>;

/// Rows that have run together.
pub(crate) struct Chunk<'a, 'b> {
    pub engine: &'a mut Engine,
    pub buffers: &'a mut Buffers<'b>,
    /// How many.
    pub rows: usize,
    pub cancel: Option<&'a AtomicBool>,
}

impl Session {
    /// Plans a session and takes its memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] and [`Error::Unsupported`] as of [`Plan::new`]; [`Error::OutOfMemory`], [`Error::Thread`],
    /// [`Error::Lock`], [`Error::Device`] where the system refuses what was planned; [`Error::FileChanged`].
    pub fn new(model: &Model, params: &SessionParams) -> Result<Self> {
        Self::with_plan(model, Plan::new(model, params)?)
    }

    /// Takes the memory of a plan that was made for the same model.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn with_plan(model: &Model, plan: Plan) -> Result<Self> {
        // SAFETY: the map is moved into the session, which drops it after all that lies in it.
        let (memory, bytes) = unsafe { own_memory(&plan) }?;
        let mut session = Session::with_plan_in(model, plan, bytes)?;
        session._memory = Some(memory);
        Ok(session)
    }

    /// A session in memory of the caller, of at least [`Plan::bytes`] bytes and aligned to
    /// [`ARENA_ALIGNMENT`](crate::plan::ARENA_ALIGNMENT). What the memory holds before does not matter. With one thread nothing
    /// else is allocated; on a GPU its memory, pinned memory and some of the heap are.
    ///
    /// The memory is a static, or leaked: helper threads wait in it until the session is dropped, which safe code may
    /// forget to do.
    ///
    /// # Errors
    /// As [`Session::new`], and [`Error::BufferTooSmall`].
    pub fn new_in(
        model: &Model,
        params: &SessionParams,
        memory: &'static mut [u8],
    ) -> Result<Self> {
        Self::with_plan_in(model, Plan::new(model, params)?, memory)
    }

    /// As [`Session::new_in`], with a plan that was made for the same model.
    ///
    /// # Errors
    /// As [`Session::new_in`].
    pub fn with_plan_in(model: &Model, plan: Plan, memory: &'static mut [u8]) -> Result<Self> {
        if plan.params().sequences != 1 {
            return Err(Error::argument(
                "a session runs one sequence; plan it for one",
            ));
        }
        if plan != Plan::new(model, plan.params())? {
            return Err(Error::argument("the plan was made for another model"));
        }
        let Prepared {
            team,
            arena,
            locked,
        } = Prepared::prepare(model, &plan, memory)?;
        let engine = match model.is_on_gpu() {
            #[cfg(feature = "cuda")]
            true => Engine::Cuda(Gpu::new(model, &plan, cuda::Kind::Session)?),
            _ => Engine::Cpu {
                team,
                level: Level::best(),
            },
        };
        Ok(Session {
            model: model.clone(),
            plan,
            arena,
            engine,
            routing: Routing::Threshold,
            settings: Settings::of(model),
            sampler: Sampler::new(SamplerParams::default())?,
            pace: Pace::default(),
            cancel: CancelFlag::Nobody,
            length: 0,
            last: Last::Nothing,
            _locked: locked,
            _memory: None,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The plan that this session follows.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.plan.tokens(self.arena)[..self.length]
    }

    /// Recursions that each token so far ran, 0 when its router let it pass by.
    pub fn depths(&self) -> &[u8] {
        &self.plan.depths(self.arena)[..self.length]
    }

    /// How many of the tokens so far ran each number of recursions, from 0 to N_r.
    pub fn depth_histogram(&self) -> [usize; MAX_RECURSIONS + 1] {
        let mut counts = [0; MAX_RECURSIONS + 1];
        for depth in self.depths() {
            counts[usize::from(*depth)] += 1;
        }
        counts
    }

    /// Bytes of KV pages in use.
    pub fn kv_bytes_used(&mut self) -> usize {
        let pages = self.buffers().kv.pages_used();
        pages * self.plan.kv_shape.page_bytes()
    }

    /// Keys (and values) kept, summed over planes: one for each layer that a token passed.
    pub fn kv_entries(&mut self) -> usize {
        let lengths = self.buffers().kv.lengths;
        lengths.iter().map(|l| *l as usize).sum()
    }

    fn buffers(&mut self) -> Buffers<'_> {
        self.plan.carve(self.arena)
    }

    /// Room for text that is being generated, held back and shown.
    pub(crate) fn text_room(&mut self) -> (&mut [u8], &mut [u8]) {
        let text = self.buffers().text;
        text.split_at_mut(text.len() / 2)
    }

    /// What cancels this session's calls from other threads.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn canceller(&mut self) -> Result<Canceller> {
        if let CancelFlag::Shared(canceller) = &self.cancel {
            return Ok(canceller.clone());
        }
        let canceller = Canceller(Shared::new(AtomicBool::new(false))?);
        self.cancel = CancelFlag::Shared(canceller.clone());
        Ok(canceller)
    }

    /// As [`Session::canceller`], with a flag of the caller: setting it cancels.
    pub fn set_cancel_flag(&mut self, flag: &'static AtomicBool) {
        self.cancel = CancelFlag::Borrowed(flag);
    }

    /// Whether a cancel is waiting; it is then over.
    pub(crate) fn take_cancel(&self) -> bool {
        let flag = self.cancel.get();
        flag.is_some_and(|flag| flag.swap(false, Ordering::Relaxed))
    }

    /// How [`Session::sample`] and [`Session::generate`] draw tokens from now on; the random
    /// sequence begins at its seed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for numbers that are out of their range.
    pub fn set_sampler(&mut self, params: SamplerParams) -> Result<()> {
        self.sampler = Sampler::new(params)?;
        #[cfg(feature = "cuda")]
        if let Engine::Cuda(gpu) = &mut self.engine {
            gpu.forget_drawn();
        }
        Ok(())
    }

    /// The time that a token may take, from [`Session::step`]'s call to its logits; `None`, the
    /// default, sets no limit. The deepest recursions of a token are left out when by the speed
    /// measured so far they would not be done in time; the first never is, so a budget below
    /// what it takes is missed. Prompts of more than one token are not limited. Results then
    /// depend on the clock.
    pub fn set_time_budget(&mut self, budget: Option<Duration>) {
        self.pace.budget = budget;
    }

    /// The cut of threshold routing: a token goes on while the sigmoid of its score (the score itself, where the
    /// router has neither a function nor an auxiliary router) is at least this. Higher is faster and coarser; 0 sends
    /// every token through all recursions, 1 through none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless it is from 0 to 1.
    pub fn set_cut(&mut self, cut: f32) -> Result<()> {
        self.settings.set_cut(cut)
    }

    /// The most recursions that tokens take from now on, 1 to N_r.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number.
    pub fn set_depth_limit(&mut self, limit: usize) -> Result<()> {
        self.settings.set_depth_limit(&self.model, limit)
    }

    /// Who decides which tokens go on. Capacity routing needs an empty session whose batch holds
    /// the whole text.
    pub fn set_routing(&mut self, routing: Routing) {
        self.routing = routing;
    }

    /// Runs `tokens` after those so far, in chunks of the planned batch. On an error the session
    /// is as it was before.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without tokens and for one outside the vocabulary; [`Error::ContextFull`],
    /// [`Error::KvFull`], [`Error::Cancelled`], [`Error::NotFinite`], [`Error::FileChanged`], [`Error::Device`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        self.run(tokens, tokens.len() == 1, &mut |_| Ok(()))
    }

    /// Makes the session hold this text and nothing else: of the beginning that it holds already nothing is run again,
    /// of the rest everything, and at least the last token, unless its logits are there. What a chat calls each turn.
    /// (Capacity routing looks at a text as a whole, so with it all is run again.) Returns how many tokens stayed.
    ///
    /// What can be seen before, such as a token outside the vocabulary, is an error that changes nothing. After one that
    /// came when tokens ran, such as a cancel, the session holds the common beginning, as after a rewind.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn prefill_whole(&mut self, tokens: &[u32]) -> Result<usize> {
        let pairs = self.tokens().iter().zip(tokens);
        let same = pairs.take_while(|(a, b)| a == b).count();
        let kept = match self.routing {
            Routing::Capacity => 0,
            Routing::Threshold => {
                let is_whole = same == tokens.len() && same == self.length;
                if is_whole && self.last != Last::Nothing {
                    return Ok(same);
                }
                same.min(tokens.len().saturating_sub(1))
            }
        };
        self.check(kept, &tokens[kept..])?;
        self.rewind(kept)?;
        self.prefill(&tokens[kept..])?;
        Ok(kept)
    }

    /// Runs one token and returns the logits `[vocab]` of what follows it.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn step(&mut self, token: u32) -> Result<&[f32]> {
        let model = self.model.clone();
        // Within the run, so that where there are no logits the token did not run.
        self.run(&[token], true, &mut |chunk| {
            chunk.engine.logits(&model, chunk.buffers, 0, 1)
        })?;
        self.last = Last::Logits;
        Ok(self.known_logits())
    }

    /// The logits `[vocab]` after the last token.
    ///
    /// # Errors
    /// [`Error::NotReady`] before the first token and after a rewind; [`Error::NotFinite`], [`Error::FileChanged`],
    /// [`Error::Device`].
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.compute_logits()?;
        Ok(self.known_logits())
    }

    fn known_logits(&mut self) -> &[f32] {
        let vocab = self.model.hyperparameters().vocab_size;
        &self.buffers().logits[..vocab]
    }

    fn compute_logits(&mut self) -> Result<()> {
        match self.last {
            Last::Logits => Ok(()),
            Last::Nothing => Err(Error::not_ready(
                "there is no last token to take logits of since the session began or was rewound; run a prompt first",
            )),
            Last::Row => {
                self.model.check_file()?;
                let mut buffers = self.plan.carve(self.arena);
                match &mut self.engine {
                    Engine::Cpu { .. } => {
                        let row = &*buffers.last_row;
                        buffers.leaving[..row.len()].copy_from_slice(row);
                        self.engine.logits(&self.model, &mut buffers, 0, 1)?;
                    }
                    #[cfg(feature = "cuda")]
                    Engine::Cuda(gpu) => gpu.last_logits(buffers.logits)?,
                }
                self.last = Last::Logits;
                Ok(())
            }
        }
    }

    /// Draws a token from the logits after the last one. It is not run: pass it to
    /// [`Session::step`] or [`Session::prefill`].
    ///
    /// # Errors
    /// As [`Session::logits`].
    pub fn sample(&mut self) -> Result<u32> {
        #[cfg(feature = "cuda")]
        if let (Engine::Cuda(gpu), true) = (&mut self.engine, self.last == Last::Row)
            && let Some(token) = gpu.take_drawn(&mut self.sampler)
        {
            return Ok(token);
        }
        self.compute_logits()?;
        let vocab = self.model.hyperparameters().vocab_size;
        let b = self.plan.carve(self.arena);
        let (logits, recent) = (&b.logits[..vocab], &b.tokens[..self.length]);
        Ok(self.sampler.sample(logits, recent, b.candidates))
    }

    /// Forgets all tokens from `length` on; their pages are free again.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there are fewer tokens.
    pub fn rewind(&mut self, length: usize) -> Result<()> {
        if length > self.length {
            return Err(Error::argument(format_args!(
                "cannot rewind to {length} tokens, there are only {}",
                self.length
            )));
        }
        if length < self.length {
            self.truncate(length);
        }
        Ok(())
    }

    /// Brings cache and history back to the first `length` tokens, from any state.
    pub(crate) fn truncate(&mut self, length: usize) {
        let mut b = self.plan.carve(self.arena);
        for (plane, description) in self.model.schedule().planes.iter().enumerate() {
            let entries = description.tokens.entries(&b.depths[..length]);
            b.kv.truncate(plane, entries);
        }
        self.length = length;
        self.last = Last::Nothing;
    }

    /// Runs `tokens` chunk by chunk; after each, `after` sees the rows of that chunk. `timed`: it is one token, whose
    /// depth a budget limits.
    pub(crate) fn run(&mut self, tokens: &[u32], timed: bool, after: After) -> Result<()> {
        self.check(self.length, tokens)?;
        let (start, last) = (self.length, self.last);
        #[cfg(feature = "cuda")]
        if let Engine::Cuda(gpu) = &mut self.engine {
            gpu.keep_last_row(last != Last::Nothing);
        }
        for chunk in tokens.chunks(self.plan.params().batch) {
            // A panic, of `after` or by a defect, must leave no entries of tokens that are not there.
            let work = AssertUnwindSafe(|| self.run_chunk(chunk, timed, after));
            let ran = catch_unwind(work);
            if let Ok(Ok(())) = ran {
                continue;
            }
            self.truncate(start);
            // The last token's row is still there; its logits, and what was drawn from them, may not be.
            if last != Last::Nothing {
                self.last = Last::Row;
            }
            #[cfg(feature = "cuda")]
            if let Engine::Cuda(gpu) = &mut self.engine {
                gpu.forget_drawn();
            }
            let failed = ran.unwrap_or_else(|panic| resume_unwind(panic));
            if matches!(failed, Err(Error::Cancelled)) {
                self.take_cancel();
            }
            return failed;
        }
        let row = (tokens.len() - 1) % self.plan.params().batch;
        let hidden = self.model.hyperparameters().hidden_size;
        let b = self.plan.carve(self.arena);
        match &mut self.engine {
            Engine::Cpu { .. } => b
                .last_row
                .copy_from_slice(&b.leaving[row * hidden..][..hidden]),
            #[cfg(feature = "cuda")]
            Engine::Cuda(gpu) => gpu.set_last_row(row),
        }
        self.last = Last::Row;
        Ok(())
    }

    fn run_chunk(&mut self, chunk: &[u32], timed: bool, after: After) -> Result<()> {
        self.model.check_file()?;
        let n = chunk.len();
        let mut buffers = self.plan.carve(self.arena);
        for (i, (row, token)) in buffers.rows.iter_mut().zip(chunk).enumerate() {
            *row = Row {
                sequence: 0,
                position: (self.length + i) as u32,
                token: *token,
                recursion: 0,
            };
            buffers.active[i] = i as u32;
        }
        match &mut self.engine {
            Engine::Cpu { team, level } => {
                let clock = match timed {
                    true => Clock::start(&mut self.pace, self.model.tail_bytes()),
                    false => None,
                };
                let mut pass = cpu::Pass {
                    model: &self.model,
                    team,
                    level: *level,
                    buffers: &mut buffers,
                    flying: 0,
                    left: 0,
                    settings: &[self.settings],
                    routing: self.routing,
                    cancel: self.cancel.get(),
                    clock,
                    depth_in_time: MAX_RECURSIONS,
                    culprit: None,
                };
                pass.enter(n)?;
                while pass.flying > 0 {
                    pass.recurse()?;
                }
                for (i, slot) in pass.buffers.left[..n].iter_mut().enumerate() {
                    *slot = i as u32;
                }
                pass.finish(0..n)?;
            }
            #[cfg(feature = "cuda")]
            Engine::Cuda(gpu) => {
                // A launch is not interrupted; between two a cancel is seen.
                let cancel = self.cancel.get();
                if cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
                    return Err(Error::Cancelled);
                }
                let settings = match timed {
                    true => self.pace.limited(&self.model, self.settings),
                    false => self.settings,
                };
                let started = std::time::Instant::now();
                gpu.run_session(
                    &self.model,
                    &mut buffers,
                    n,
                    settings,
                    self.routing,
                    &self.sampler,
                )?;
                if timed {
                    let depth = buffers.depth[0];
                    self.pace.learn(&self.model, depth, started.elapsed());
                }
            }
        }
        buffers.tokens[self.length..][..n].copy_from_slice(chunk);
        buffers.depths[self.length..][..n].copy_from_slice(&buffers.depth[..n]);
        after(Chunk {
            engine: &mut self.engine,
            buffers: &mut buffers,
            rows: n,
            cancel: self.cancel.get(),
        })?;
        self.length += n;
        Ok(())
    }

    /// Refuses tokens that cannot be run after the first `length`, before anything is done.
    pub(crate) fn check(&self, length: usize, tokens: &[u32]) -> Result<()> {
        let vocab = self.model.hyperparameters().vocab_size;
        let params = self.plan.params();
        if tokens.is_empty() {
            return Err(Error::argument("there are no tokens to run"));
        }
        let needed = length.saturating_add(tokens.len());
        if needed > params.context {
            return Err(Error::ContextFull {
                needed,
                context: params.context,
            });
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::argument(format_args!(
                "token {token} is outside the vocabulary of {vocab}"
            )));
        }
        let routed = self.model.hyperparameters().router.is_some();
        if self.routing == Routing::Capacity
            && routed
            && (length > 0 || tokens.len() > params.batch)
        {
            return Err(Error::argument(format_args!(
                "capacity routing looks at the whole text at once: {needed} tokens need an empty session with a batch of as many, this one has {}",
                params.batch
            )));
        }
        Ok(())
    }
}

//! Many sequences at once, batched by depth: the shared block is the same at every depth, so each
//! [`Batch::tick`] runs it once over all tokens that need it, whatever their sequence and recursion. A
//! token that leaves makes room at once for another; nobody waits for the deepest. (The scheduling that
//! the Mixture-of-Recursions paper, Bae et al., 2025, calls continuous depth-wise batching.)
//!
//! What a sequence gets does not depend on who else is there: the same bits as alone in a
//! [`Session`](crate::Session).

mod books;
#[cfg(feature = "cuda")]
mod device;
mod pressure;

use crate::arena::{Locked, Prepared, own_memory};
use crate::cpu::{Pass, Settings, simd::Level, team::Team};
#[cfg(feature = "cuda")]
use crate::cuda::{self, Gpu};
use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::model::{MAX_RECURSIONS, Model};
use crate::plan::{MAX_SEQUENCES, Plan, SessionParams};
use crate::routing::Routing;
use crate::sampling::{Sampler, SamplerParams};
#[cfg(feature = "ffi")]
pub(crate) use books::MAX_EVENTS;
pub(crate) use books::heap_bytes;
use books::{Books, Sequence, State};
use memmap2::MmapMut;

/// Names a sequence of a batch; no number is ever used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub(crate) u64);

impl SequenceId {
    /// The lower bits are the sequence's place, of which a plan has at most so many.
    const PLACES: u64 = MAX_SEQUENCES as u64 + 1;

    fn place(self) -> usize {
        (self.0 % Self::PLACES) as usize
    }
}

/// What a new sequence is to do.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// Its tokens; for a fork, those after the common prefix.
    pub prompt: &'a [u32],
    /// Most tokens to generate; 0 only runs the prompt.
    pub max_tokens: usize,
    /// How tokens are drawn.
    pub sampler: SamplerParams,
    /// The cut of threshold routing, as [`Session::set_cut`](crate::Session::set_cut); `None` means
    /// as trained and, for a fork, as its parent.
    pub cut: Option<f32>,
    /// The most recursions of a token; `None` means all and, for a fork, as its parent. Models
    /// without routers take all.
    pub depth_limit: Option<usize>,
    /// Under pressure sequences of lower priority give way; of equals the later.
    pub priority: i32,
    /// Goes on after end-of-generation tokens.
    pub ignore_end: bool,
}

impl Default for Request<'_> {
    fn default() -> Self {
        Request {
            prompt: &[],
            max_tokens: usize::MAX,
            sampler: SamplerParams::default(),
            cut: None,
            depth_limit: None,
            priority: 0,
            ignore_end: false,
        }
    }
}

/// What happens when the KV pool is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pressure {
    /// The sequence of lowest priority gives its pages back and goes on when there is room again:
    /// it is run anew from its tokens, to the same results.
    #[default]
    Evict,
    /// The sequence of lowest priority of those that need a page stands still, with what it has,
    /// until [`Batch::resume`].
    Refuse,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The model drew an end-of-generation token.
    End,
    /// [`Request::max_tokens`] were generated.
    Length,
    /// It has as many tokens as the plan allows.
    ContextFull,
    /// [`Batch::stop`].
    Stopped,
    /// The model computed a value that is not finite, or too large for the type of keys and values; [`Batch::failure`] says
    /// which.
    Failed,
}

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Waits for pages of the KV pool, or for the first tick.
    Waiting,
    /// Its tokens are being run.
    Running,
    /// The KV pool has no page for it, under [`Pressure::Evict`] not even when it is alone.
    /// [`Batch::resume`] lets it try again.
    Full,
    /// Done; its tokens can be read, and forks made of it, until it is removed.
    Finished(Finish),
}

/// What a tick brought for a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A token was drawn.
    Token {
        /// The sequence that it is about.
        sequence: SequenceId,
        /// The token; it is run by a later tick.
        token: u32,
        /// Recursions of the token before it, after which it was drawn; its own are told with the next one
        /// ([`Batch::depths`]).
        depth: u8,
    },
    /// It gave its pages back and waits ([`Pressure::Evict`]).
    Evicted(SequenceId),
    /// It was evicted and runs again.
    Resumed(SequenceId),
    /// There is no page for it; it stands still.
    Full(SequenceId),
    /// It ended.
    Finished(SequenceId, Finish),
}

/// What ran so far; the sum of `rows` over `row_capacity` is the share of the room that was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Ticks that ran anything.
    pub ticks: u64,
    /// Rows of the recursions' passes, by recursion from 0: each ran the block once. Without routers
    /// a row runs all recursions in one pass and counts at 0.
    pub rows: [u64; MAX_RECURSIONS],
    /// Rows for which there was room in those passes.
    pub row_capacity: u64,
    /// Rows that passed the own last layers.
    pub finished: u64,
    /// Rows of logits.
    pub logits: u64,
    /// Sequences that gave their pages back.
    pub evictions: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            ticks: 0,
            rows: [0; MAX_RECURSIONS],
            row_capacity: 0,
            finished: 0,
            logits: 0,
            evictions: 0,
        }
    }
}

/// The GPU that does the work, if one does.
#[cfg(feature = "cuda")]
type OnGpu<'a> = Option<&'a mut Gpu>;
#[cfg(not(feature = "cuda"))]
type OnGpu<'a> = Option<&'a mut std::convert::Infallible>;

/// Many sequences in the making. After creation no call allocates.
pub struct Batch {
    // Goes before the model, whose mapped file it may be using.
    #[cfg(feature = "cuda")]
    gpu: Option<Gpu>,
    model: Model,
    plan: Plan,
    arena: &'static mut [u8],
    team: Team,
    level: Level,
    /// Of each place.
    settings: Vec<Settings>,
    books: Books,
    _locked: Option<Locked>,
    /// The memory that all this lies in, unless it is the caller's. Dropped last.
    _memory: Option<MmapMut>,
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all = f.debug_struct("Batch");
        all.field("params", self.plan.params());
        all.finish_non_exhaustive()
    }
}

impl Batch {
    /// Plans a batch ([`Plan::batch`]) and takes its memory.
    ///
    /// # Errors
    /// As [`Session::new`](crate::Session::new).
    pub fn new(model: &Model, params: &SessionParams) -> Result<Self> {
        let plan = Plan::batch(model, params)?;
        // SAFETY: the map is moved into the batch, which drops it after all that lies in it.
        let (memory, bytes) = unsafe { own_memory(&plan) }?;
        let mut batch = Batch::with_plan_in(model, plan, bytes)?;
        batch._memory = Some(memory);
        Ok(batch)
    }

    /// A batch in memory of the caller, of at least [`Plan::bytes`] bytes and aligned to
    /// [`ARENA_ALIGNMENT`](crate::plan::ARENA_ALIGNMENT); [`Plan::heap_bytes`] more are allocated. As for
    /// [`Session::new_in`](crate::Session::new_in) the memory is a static, or leaked.
    ///
    /// # Errors
    /// As [`Session::new_in`](crate::Session::new_in).
    pub fn new_in(
        model: &Model,
        params: &SessionParams,
        memory: &'static mut [u8],
    ) -> Result<Self> {
        Self::with_plan_in(model, Plan::batch(model, params)?, memory)
    }

    fn with_plan_in(model: &Model, plan: Plan, memory: &'static mut [u8]) -> Result<Self> {
        let Prepared {
            team,
            arena,
            locked,
        } = Prepared::prepare(model, &plan, memory)?;
        let places = plan.params().sequences;
        let mut settings = reserved(places)?;
        settings.resize(places, Settings::of(model));
        let books = Books::new(&plan)?;
        #[cfg(feature = "cuda")]
        let gpu = match model.is_on_gpu() {
            true => Some(Gpu::new(model, &plan, cuda::Kind::Batch)?),
            false => None,
        };
        Ok(Batch {
            #[cfg(feature = "cuda")]
            gpu,
            model: model.clone(),
            plan,
            arena,
            team,
            level: Level::best(),
            settings,
            books,
            _locked: locked,
            _memory: None,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The plan that this batch follows.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What happens from now on when the KV pool is full.
    pub fn set_pressure(&mut self, pressure: Pressure) {
        self.books.pressure = pressure;
    }

    /// Ordinary batching, to compare with: new tokens enter only when all have left, so that
    /// everyone waits for the deepest.
    pub fn set_in_step(&mut self, in_step: bool) {
        self.books.in_step = in_step;
    }

    /// A new sequence. Nothing is run yet.
    ///
    /// # Errors
    /// [`Error::NotReady`] when all places are taken; [`Error::ContextFull`] and
    /// [`Error::InvalidArgument`] for what can never run. The batch is as before then.
    pub fn add(&mut self, request: &Request) -> Result<SequenceId> {
        self.add_after(None, request)
    }

    /// A new sequence that begins with the first `length` tokens of another, whose keys and values
    /// it shares as far as they are there. It has its parent's cut and depth limit.
    ///
    /// # Errors
    /// As [`Batch::add`]; [`Error::InvalidArgument`] when the parent has fewer tokens, or the request
    /// another cut or depth limit.
    pub fn fork(
        &mut self,
        parent: SequenceId,
        length: usize,
        request: &Request,
    ) -> Result<SequenceId> {
        let parent = self.books.find(parent)?;
        let known = self.books.sequences[parent].known;
        if length > known {
            return Err(Error::argument(format_args!(
                "a fork of {length} tokens was asked for, but the sequence has {known}"
            )));
        }
        self.add_after(Some((parent, length)), request)
    }

    fn add_after(
        &mut self,
        prefix: Option<(usize, usize)>,
        request: &Request,
    ) -> Result<SequenceId> {
        let params = self.plan.params();
        let length = prefix.map_or(0, |(_, length)| length);
        let known = length.saturating_add(request.prompt.len());
        if known == 0 {
            return Err(Error::argument("there are no tokens to run"));
        }
        if known > params.context {
            return Err(Error::ContextFull {
                needed: known,
                context: params.context,
            });
        }
        let vocab = self.model.hyperparameters().vocab_size;
        if let Some(token) = request.prompt.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::argument(format_args!(
                "token {token} is outside the vocabulary of {vocab}"
            )));
        }
        let settings = self.settings_for(prefix.map(|(parent, _)| parent), request)?;
        let sampler = Sampler::new(request.sampler.clone())?;
        let context = params.context;
        let (place, id) = self.books.free_place()?;
        let b = self.plan.carve(self.arena);
        let tokens = place * context;
        b.tokens[tokens + length..tokens + known].copy_from_slice(request.prompt);
        let mut done = 0;
        if let Some((parent, _)) = prefix {
            // The last token must be run: what follows it is drawn from its logits.
            done = self.books.sequences[parent].done.min(length).min(known - 1);
            let from = parent * context;
            b.tokens.copy_within(from..from + length, tokens);
            b.depths.copy_within(from..from + done, tokens);
            if let Err(error) = self.share([parent, place], done) {
                self.with_pass(|books, pass, _| books.set_back(pass, place, true));
                return Err(error);
            }
        }
        let wanted = known.saturating_add(request.max_tokens);
        self.settings[place] = settings;
        self.books.sequences[place] = Sequence {
            id,
            state: State::Waiting { evicted: false },
            priority: request.priority,
            sampler,
            known,
            entered: done,
            done,
            measured: done,
            end: wanted.min(context),
            end_reason: match wanted > context {
                true => Finish::ContextFull,
                false => Finish::Length,
            },
            ignore_end: request.ignore_end,
            failure: None,
        };
        Ok(id)
    }

    /// Gives a place the entries of a parent's first `done` tokens, whose depths it has already.
    fn share(&mut self, [parent, place]: [usize; 2], done: usize) -> Result<()> {
        let mut b = self.plan.carve(self.arena);
        let first = place * self.plan.params().context;
        let depths = &b.depths[first..first + done];
        for (plane, description) in self.model.schedule().planes.iter().enumerate() {
            let entries = description.tokens.entries(depths);
            let (from, to) = (b.kv.list(parent, plane), b.kv.list(place, plane));
            b.kv.share(from, to, entries);
            #[cfg(feature = "cuda")]
            if let Some(gpu) = &mut self.gpu {
                gpu.send_table(&b.kv, to, entries)?;
            }
        }
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &mut self.gpu {
            // It learns the others when they are run.
            gpu.send_tokens(place, &b.tokens[first..first + done])?;
        }
        Ok(())
    }

    fn settings_for(&self, parent: Option<usize>, request: &Request) -> Result<Settings> {
        let before = parent.map_or(Settings::of(&self.model), |parent| self.settings[parent]);
        let mut settings = before;
        if let Some(cut) = request.cut {
            settings.set_cut(cut)?;
        }
        if let Some(limit) = request.depth_limit {
            settings.set_depth_limit(&self.model, limit)?;
        }
        if parent.is_some() && settings != before {
            return Err(Error::argument(
                "a fork has its parent's cut and depth limit; leave them out",
            ));
        }
        let h = self.model.hyperparameters();
        if h.router.is_none() && settings.depth_limit != h.recursions {
            return Err(Error::argument(format_args!(
                "the depth limit is {}, but in a batch a model without routers runs all its {} recursions",
                settings.depth_limit, h.recursions
            )));
        }
        Ok(settings)
    }

    /// Ends a sequence; its tokens stay.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no such sequence, as of all calls that take one.
    pub fn stop(&mut self, sequence: SequenceId) -> Result<()> {
        let place = self.books.find(sequence)?;
        if !matches!(self.books.sequences[place].state, State::Finished(_)) {
            self.with_pass(|books, pass, _| books.set_back(pass, place, false));
            self.books.sequences[place].state = State::Finished(Finish::Stopped);
        }
        Ok(())
    }

    /// Forgets a sequence, in whatever state: its place and its pages are free.
    ///
    /// # Errors
    /// As [`Batch::stop`].
    pub fn remove(&mut self, sequence: SequenceId) -> Result<()> {
        let place = self.books.find(sequence)?;
        self.with_pass(|books, pass, _| books.set_back(pass, place, true));
        self.books.sequences[place].state = State::Free;
        Ok(())
    }

    /// Lets a sequence that stands still because the KV pool was full try again.
    ///
    /// # Errors
    /// As [`Batch::stop`].
    pub fn resume(&mut self, sequence: SequenceId) -> Result<()> {
        let place = self.books.find(sequence)?;
        let state = &mut self.books.sequences[place].state;
        if *state == State::Full {
            *state = State::Running;
        }
        Ok(())
    }

    /// One pass over the weights: new tokens enter, every token in the recursions runs its next one,
    /// those that leave are finished, and what follows them is drawn. Returns what happened, or nothing
    /// when no sequence can run.
    ///
    /// # Errors
    /// What concerns one sequence ends that sequence only. An error of the whole batch, such as
    /// [`Error::FileChanged`], loses nothing: the next tick tries again, and brings first what this one
    /// would have brought. (When many fail in a row, and more happens than a tick has room for, the last
    /// events are kept. After [`Error::Device`] the device may have gone for good.)
    pub fn tick(&mut self) -> Result<&[Event]> {
        self.model.check_file()?;
        if self.books.told {
            self.books.events.clear();
        }
        let outcome = self.with_pass(|books, pass, gpu| books.tick(pass, gpu));
        self.books.told = outcome.is_ok();
        outcome.map(|()| &*self.books.events)
    }

    /// Whether no sequence waits or runs.
    pub fn is_idle(&self) -> bool {
        let mut all = self.books.sequences.iter();
        !all.any(|s| matches!(s.state, State::Waiting { .. } | State::Running))
    }

    /// Places for further sequences.
    pub fn free_places(&self) -> usize {
        let all = self.books.sequences.iter();
        all.filter(|s| s.state == State::Free).count()
    }

    /// Where a sequence stands.
    ///
    /// # Errors
    /// As [`Batch::stop`].
    pub fn status(&self, sequence: SequenceId) -> Result<Status> {
        let place = self.books.find(sequence)?;
        Ok(match self.books.sequences[place].state {
            State::Running => Status::Running,
            State::Full => Status::Full,
            State::Finished(finish) => Status::Finished(finish),
            State::Waiting { .. } | State::Free => Status::Waiting,
        })
    }

    /// Why a sequence failed, if it did.
    ///
    /// # Errors
    /// As [`Batch::stop`].
    pub fn failure(&self, sequence: SequenceId) -> Result<Option<&Error>> {
        let place = self.books.find(sequence)?;
        Ok(self.books.sequences[place].failure.as_ref())
    }

    /// A sequence's tokens so far, its prompt among them.
    ///
    /// # Errors
    /// As [`Batch::stop`].
    pub fn tokens(&self, sequence: SequenceId) -> Result<&[u32]> {
        let place = self.books.find(sequence)?;
        let all = self.plan.tokens(self.arena);
        let first = place * self.plan.params().context;
        Ok(&all[first..][..self.books.sequences[place].known])
    }

    /// Recursions that each token of a sequence ran; those that did not pass all layers yet, the last
    /// that was drawn among them, are left out.
    ///
    /// # Errors
    /// As [`Batch::stop`].
    pub fn depths(&self, sequence: SequenceId) -> Result<&[u8]> {
        let place = self.books.find(sequence)?;
        let all = self.plan.depths(self.arena);
        let first = place * self.plan.params().context;
        Ok(&all[first..][..self.books.sequences[place].measured])
    }

    /// Bytes of KV pages in use; a page that several sequences share counts once.
    pub fn kv_bytes_used(&mut self) -> usize {
        let pages = self.plan.carve(self.arena).kv.pages_used();
        pages * self.plan.kv_shape.page_bytes()
    }

    /// What ran since creation.
    pub fn counters(&self) -> &Counters {
        &self.books.counters
    }

    /// Calls `each` with the rows in flight.
    fn with_pass<R>(&mut self, each: impl FnOnce(&mut Books, &mut Pass, OnGpu) -> R) -> R {
        let mut buffers = self.plan.carve(self.arena);
        let mut pass = Pass {
            model: &self.model,
            team: &mut self.team,
            level: self.level,
            buffers: &mut buffers,
            flying: self.books.flying,
            left: self.books.left,
            settings: &self.settings,
            routing: Routing::Threshold,
            cancel: None,
            clock: None,
            depth_in_time: MAX_RECURSIONS,
            culprit: None,
        };
        #[cfg(feature = "cuda")]
        let gpu = self.gpu.as_mut();
        #[cfg(not(feature = "cuda"))]
        let gpu = None;
        let result = each(&mut self.books, &mut pass, gpu);
        let (flying, left) = (pass.flying, pass.left);
        (self.books.flying, self.books.left) = (flying, left);
        result
    }
}

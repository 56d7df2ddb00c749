//! A session: one sequence, its memory, and the calls that move it on.

use crate::cpu::{self, team::Team};
use crate::error::{Error, Result};
use crate::model::{Model, PlaneTokens};
use crate::plan::{Buffers, Plan, Row, SessionParams};
use crate::routing::Routing;
use crate::sampling::Sampler;

/// One sequence in the making. After creation no call allocates.
pub struct Session {
    model: Model,
    plan: Plan,
    arena: Arena,
    team: Team,
    settings: Settings,
    /// Tokens so far.
    length: usize,
    last: Last,
}

/// What may change between two tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Settings {
    routing: Routing,
    cut: f32,
    depth_limit: usize,
}

/// What is known of the last token's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    /// No token yet, or the last one was rewound.
    Nothing,
    /// The residual stream stands in this row of the last pass.
    Row(usize),
    /// The logits stand in the arena.
    Logits,
}

impl Session {
    /// Plans a session and takes its memory.
    pub fn new(model: &Model, params: &SessionParams) -> Result<Self> {
        Self::with_plan(model, Plan::new(model, params)?)
    }

    /// Takes the memory of a plan that was made for the same model.
    pub fn with_plan(model: &Model, plan: Plan) -> Result<Self> {
        if plan.params().sequences != 1 {
            return Err(Error::argument(
                "a session runs one sequence; plan it for one",
            ));
        }
        if plan != Plan::new(model, plan.params())? {
            return Err(Error::argument("the plan was made for another model"));
        }
        let mut arena = Arena::new(plan.bytes())?;
        let team = Team::new(plan.params().threads)?;
        let mut buffers = plan.carve(arena.bytes_mut());
        buffers.kv.reset();
        if let Some(factors) = model.rope_factors() {
            let values = factors.values(model.bytes());
            for (to, from) in buffers.rope_factors.iter_mut().zip(values) {
                *to = from;
            }
        }
        let h = model.hyperparameters();
        let settings = Settings {
            routing: Routing::Threshold,
            cut: h.router.as_ref().map_or(0.5, |r| r.cut),
            depth_limit: h.recursions,
        };
        Ok(Session {
            model: model.clone(),
            plan,
            arena,
            team,
            settings,
            length: 0,
            last: Last::Nothing,
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
        &self.plan.tokens(self.arena.bytes())[..self.length]
    }

    /// Recursions that each token so far ran, 0 when its router let it pass by.
    pub fn depths(&self) -> &[u8] {
        &self.plan.depths(self.arena.bytes())[..self.length]
    }

    /// Bytes of KV pages in use.
    pub fn kv_bytes_used(&mut self) -> usize {
        let pages = self.plan.carve(self.arena.bytes_mut()).kv.pages_used();
        pages * self.plan.kv_shape.page_bytes()
    }

    /// Keys (and values) kept, summed over planes: one for each layer that a token passed.
    pub fn kv_entries(&mut self) -> usize {
        let buffers = self.plan.carve(self.arena.bytes_mut());
        buffers.kv.lengths.iter().map(|l| *l as usize).sum()
    }

    /// The cut of threshold routing: a token goes on while the sigmoid of its score is at least
    /// this. Higher is faster and coarser; 0 sends every token through all recursions.
    pub fn set_cut(&mut self, cut: f32) -> Result<()> {
        if !(0.0..=1.0).contains(&cut) {
            return Err(Error::argument(format_args!(
                "the cut is {cut}; it must be between 0 and 1"
            )));
        }
        self.settings.cut = cut;
        Ok(())
    }

    /// The most recursions that tokens take from now on, 1 to N_r.
    pub fn set_depth_limit(&mut self, limit: usize) -> Result<()> {
        let most = self.model.hyperparameters().recursions;
        if limit == 0 || limit > most {
            return Err(Error::argument(format_args!(
                "the depth limit is {limit}; this model has 1 to {most} recursions"
            )));
        }
        self.settings.depth_limit = limit;
        Ok(())
    }

    /// Who decides which tokens go on. Capacity routing needs an empty session whose batch holds
    /// the whole text.
    pub fn set_routing(&mut self, routing: Routing) {
        self.settings.routing = routing;
    }

    /// Runs `tokens` after those so far, in chunks of the planned batch. On an error the session
    /// holds the tokens that it held before; only their logits must be computed anew, by
    /// rewinding and running the last one again.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        self.run(tokens, |_, _| Ok(()))
    }

    /// Runs one token and returns the logits `[vocab]` of what follows it.
    pub fn step(&mut self, token: u32) -> Result<&[f32]> {
        self.prefill(&[token])?;
        self.logits()
    }

    /// The logits `[vocab]` after the last token.
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.compute_logits()?;
        let vocab = self.model.hyperparameters().vocab_size;
        Ok(&self.plan.carve(self.arena.bytes_mut()).logits[..vocab])
    }

    fn compute_logits(&mut self) -> Result<()> {
        match self.last {
            Last::Logits => Ok(()),
            Last::Nothing => Err(Error::argument(
                "there is no last token to take logits of; run a prompt first",
            )),
            Last::Row(row) => {
                let mut buffers = self.plan.carve(self.arena.bytes_mut());
                cpu::logits(&self.model, &mut self.team, &mut buffers, row, 1)?;
                self.last = Last::Logits;
                Ok(())
            }
        }
    }

    /// Runs `tokens` and calls `each(index, logits)` for every one of them, in order: the logits
    /// `[vocab]` of what follows `tokens[index]`.
    pub fn score(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let vocab = self.model.hyperparameters().vocab_size;
        let most = self.plan.params().logit_rows;
        let model = self.model.clone();
        let mut done = 0;
        self.run(tokens, |(team, buffers), n| {
            for first in (0..n).step_by(most) {
                let count = most.min(n - first);
                cpu::logits(&model, team, buffers, first, count)?;
                for logits in buffers.logits[..count * vocab].chunks_exact(vocab) {
                    each(done, logits)?;
                    done += 1;
                }
            }
            Ok(())
        })
    }

    /// Draws a token from the logits after the last one. It is not run: pass it to
    /// [`Session::step`] or [`Session::prefill`].
    pub fn sample(&mut self, sampler: &mut Sampler) -> Result<u32> {
        self.compute_logits()?;
        let vocab = self.model.hyperparameters().vocab_size;
        let b = self.plan.carve(self.arena.bytes_mut());
        let (logits, recent) = (&b.logits[..vocab], &b.tokens[..self.length]);
        Ok(sampler.sample(logits, recent, b.candidates))
    }

    /// Forgets all tokens from `length` on; their pages are free again.
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
    fn truncate(&mut self, length: usize) {
        let mut b = self.plan.carve(self.arena.bytes_mut());
        for (plane, description) in self.model.schedule().planes.iter().enumerate() {
            let entries = match description.tokens {
                PlaneTokens::All => length,
                PlaneTokens::DeeperThan(recursion) => {
                    let deep = |d: &&u8| usize::from(**d) > recursion;
                    b.depths[..length].iter().filter(deep).count()
                }
            };
            b.kv.truncate(0, plane, entries);
        }
        self.length = length;
        self.last = Last::Nothing;
    }

    /// Runs `tokens` chunk by chunk; after each, `after` sees the rows of that chunk.
    fn run(
        &mut self,
        tokens: &[u32],
        mut after: impl FnMut((&mut Team, &mut Buffers), usize) -> Result<()>,
    ) -> Result<()> {
        self.check(tokens)?;
        let start = self.length;
        for chunk in tokens.chunks(self.plan.params().batch) {
            if let Err(error) = self.run_chunk(chunk, &mut after) {
                self.truncate(start);
                return Err(error);
            }
        }
        Ok(())
    }

    fn run_chunk(
        &mut self,
        chunk: &[u32],
        after: &mut impl FnMut((&mut Team, &mut Buffers), usize) -> Result<()>,
    ) -> Result<()> {
        let n = chunk.len();
        let mut buffers = self.plan.carve(self.arena.bytes_mut());
        for (i, (row, token)) in buffers.rows.iter_mut().zip(chunk).enumerate() {
            *row = Row {
                sequence: 0,
                position: (self.length + i) as u32,
                token: *token,
            };
        }
        cpu::Pass {
            model: &self.model,
            team: &mut self.team,
            buffers: &mut buffers,
            n,
            routing: self.settings.routing,
            cut: self.settings.cut,
            depth_limit: self.settings.depth_limit,
        }
        .run()?;
        buffers.tokens[self.length..][..n].copy_from_slice(chunk);
        buffers.depths[self.length..][..n].copy_from_slice(&buffers.depth[..n]);
        after((&mut self.team, &mut buffers), n)?;
        self.length += n;
        self.last = Last::Row(n - 1);
        Ok(())
    }

    /// Refuses tokens that cannot be run, before anything is done.
    fn check(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.model.hyperparameters().vocab_size;
        let params = self.plan.params();
        if tokens.is_empty() {
            return Err(Error::argument("there are no tokens to run"));
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::argument(format_args!(
                "token {token} is outside the vocabulary of {vocab}"
            )));
        }
        let needed = self.length + tokens.len();
        if needed > params.context {
            return Err(Error::ContextFull {
                needed,
                context: params.context,
            });
        }
        let routed = self.model.hyperparameters().router.is_some();
        if self.settings.routing == Routing::Capacity
            && routed
            && (self.length > 0 || tokens.len() > params.batch)
        {
            return Err(Error::argument(format_args!(
                "capacity routing looks at the whole text at once: {needed} tokens need an empty session with a batch of as many, this one has {}",
                params.batch
            )));
        }
        Ok(())
    }
}

/// The memory of a session: pages that the system gives when they are first written, so that those
/// never used cost nothing. (The allocator's zeroed memory would be written to at this alignment.)
struct Arena(memmap2::MmapMut);

impl Arena {
    fn new(bytes: usize) -> Result<Self> {
        match memmap2::MmapMut::map_anon(bytes.max(1)) {
            Ok(map) => Ok(Arena(map)),
            Err(_) => Err(Error::OutOfMemory { bytes }),
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

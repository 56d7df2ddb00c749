//! Which block runs when: the model as data. The engine walks this list and knows no names of
//! sharing strategies.

use crate::error::Result;
use crate::memory::{reserved, try_collect, try_push};
use crate::model::{Hyperparameters, KvStrategy};

/// One run of one decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerRun {
    /// Index into the model's table of layers (weights).
    pub layer: usize,
    /// Index into [`Schedule::planes`]: where keys and values live.
    pub plane: usize,
    /// Whether this run writes keys and values, or only reads what recursion 0 wrote.
    pub keys: Keys,
}

/// What a layer run does about keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Appends those of its rows to the plane.
    Append,
    /// Computes queries only; the plane holds every token's keys since recursion 0.
    Shared,
}

/// Layers that run one after another at one recursion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// The recursion, from 0.
    pub recursion: usize,
    /// Its layers in order.
    pub runs: Vec<LayerRun>,
}

/// The keys and values of one (recursion, layer).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    /// Which tokens have an entry here.
    pub tokens: PlaneTokens,
}

/// Which tokens have an entry in a plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaneTokens {
    /// Every token of the sequence.
    All,
    /// Tokens that ran recursion `.0`, that is, whose depth is greater.
    DeeperThan(usize),
}

impl PlaneTokens {
    /// Entries that the plane has after tokens of these depths.
    pub(crate) fn entries(self, depths: &[u8]) -> usize {
        match self {
            PlaneTokens::All => depths.len(),
            PlaneTokens::DeeperThan(recursion) => {
                let deep = |d: &&u8| usize::from(**d) > recursion;
                depths.iter().filter(deep).count()
            }
        }
    }
}

/// The order of a model's work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Own first layers: every token.
    pub prelude: Vec<LayerRun>,
    /// The recursions. With a router, stage `r` is recursion `r`; without one, a recursion may be
    /// spread over several stages (`sequence` repeats each layer in place).
    pub stages: Vec<Stage>,
    /// Own last layers: every token.
    pub coda: Vec<LayerRun>,
    /// Cache planes.
    pub planes: Vec<Plane>,
}

impl Schedule {
    /// The schedule of a model, and for each layer index in it the (stored block, recursion)
    /// whose weights it means.
    pub(crate) fn new(h: &Hyperparameters) -> Result<(Self, Vec<(usize, usize)>)> {
        let runs = h.logical_layers();
        let mut builder = Builder {
            planes: reserved(runs)?,
            weights: reserved(runs)?,
        };
        let ends = usize::from(h.sharing.has_own_ends());
        let first = (0..ends).map(|block| builder.run(block, 0, PlaneTokens::All));
        let prelude = try_collect(first)?;
        let shared = h.kv == KvStrategy::Shared && h.router.is_some();
        let expert = h.is_expert_choice();
        let mut stages = Vec::new();
        if h.sharing.repeats_in_place() && h.router.is_none() {
            for layer in 0..h.block_layers() {
                for recursion in 0..h.recursions {
                    let tokens = PlaneTokens::DeeperThan(recursion);
                    let run = builder.run(ends + layer, recursion, tokens);
                    let runs = try_collect([run])?;
                    try_push(&mut stages, Stage { recursion, runs })?;
                }
            }
        } else {
            for recursion in 0..h.recursions {
                // With shared keys, recursion 0 gives every token its keys, kept or not.
                let tokens = if shared && expert && recursion == 0 {
                    PlaneTokens::All
                } else {
                    PlaneTokens::DeeperThan(recursion)
                };
                let runs = (0..h.block_layers()).map(|layer| {
                    if shared && recursion > 0 {
                        builder.reading_run(ends + layer, recursion, ends + layer)
                    } else {
                        builder.run(ends + layer, recursion, tokens)
                    }
                });
                let runs = try_collect(runs)?;
                try_push(&mut stages, Stage { recursion, runs })?;
            }
        }
        let last = (h.stored_blocks - ends..h.stored_blocks)
            .map(|block| builder.run(block, 0, PlaneTokens::All));
        let coda = try_collect(last)?;
        let schedule = Schedule {
            prelude,
            stages,
            coda,
            planes: builder.planes,
        };
        Ok((schedule, builder.weights))
    }
}

struct Builder {
    planes: Vec<Plane>,
    weights: Vec<(usize, usize)>,
}

impl Builder {
    fn run(&mut self, block: usize, recursion: usize, tokens: PlaneTokens) -> Result<LayerRun> {
        let plane = self.planes.len();
        try_push(&mut self.planes, Plane { tokens })?;
        self.add(block, recursion, plane, Keys::Append)
    }

    /// `plane`: recursion 0 of the same layer; planes of prelude and recursion 0 are made in order.
    fn reading_run(&mut self, block: usize, recursion: usize, plane: usize) -> Result<LayerRun> {
        self.add(block, recursion, plane, Keys::Shared)
    }

    fn add(
        &mut self,
        block: usize,
        recursion: usize,
        plane: usize,
        keys: Keys,
    ) -> Result<LayerRun> {
        let layer = self.weights.len();
        try_push(&mut self.weights, (block, recursion))?;
        Ok(LayerRun { layer, plane, keys })
    }
}

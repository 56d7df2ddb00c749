//! A row's way through the model: embedding and own first layers, recursions as long as its router
//! lets it go on, own last layers. It reads like the reference; what runs when comes from the model's
//! schedule.
//!
//! Rows enter, recurse and finish in separate calls, and rows that stand before different recursions
//! run the shared block together. A session sends all its rows through at once; a batch lets rows
//! enter while others are half-way (`src/batch`).

use super::layer::Place;
use super::matmul::{MatMul, Product};
use super::ops;
use super::pace::Clock;
use super::simd::Level;
use super::team::Team;
use crate::error::{Error, Result};
use crate::model::{
    Hyperparameters, KvStrategy, LayerRun, Model, Router, RouterKind, RouterSpec, Stage,
};
use crate::plan::Buffers;
use crate::routing::{self, Routing};
use std::mem::take;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

/// What decides how deep the tokens of a sequence go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Settings {
    /// The cut of threshold routing.
    pub cut: f32,
    /// The most recursions.
    pub depth_limit: usize,
}

impl Settings {
    /// As the model was trained.
    pub fn of(model: &Model) -> Self {
        let h = model.hyperparameters();
        Settings {
            cut: h.router.as_ref().map_or(0.5, |r| r.cut),
            depth_limit: h.recursions,
        }
    }

    pub fn set_cut(&mut self, cut: f32) -> Result<()> {
        if !(0.0..=1.0).contains(&cut) {
            return Err(Error::argument(format_args!(
                "the cut is {cut}; it must be between 0 and 1"
            )));
        }
        self.cut = cut;
        Ok(())
    }

    pub fn set_depth_limit(&mut self, model: &Model, limit: usize) -> Result<()> {
        let most = model.hyperparameters().recursions;
        if limit == 0 || limit > most {
            return Err(Error::argument(format_args!(
                "the depth limit is {limit}; this model has 1 to {most} recursions"
            )));
        }
        self.depth_limit = limit;
        Ok(())
    }
}

/// Rows on their way.
pub(crate) struct Pass<'a, 'b> {
    pub model: &'a Model,
    pub team: &'a mut Team,
    pub level: Level,
    pub buffers: &'a mut Buffers<'b>,
    /// Rows in the recursions: the first of `buffers.active`. Of those that stand before the same
    /// recursion all are side by side.
    pub flying: usize,
    /// Rows that have left them: the first of `buffers.left`.
    pub left: usize,
    /// Of each sequence.
    pub settings: &'a [Settings],
    pub routing: Routing,
    /// Set from other threads to end the pass; looked at before each layer.
    pub cancel: Option<&'a AtomicBool>,
    /// The token's time budget, for passes of one row.
    pub clock: Option<Clock<'a>>,
    /// The most recursions that the time budget allows as far as is known.
    pub depth_in_time: usize,
    /// The slot of the row that made a value which is not finite.
    pub culprit: Option<u32>,
}

impl Pass<'_, '_> {
    /// `n` rows enter: slots `buffers.active[flying..][..n]`, with what is to be run in
    /// `buffers.rows`, those of a sequence in the order of their positions. They pass the own first
    /// layers and then stand before their first recursion, or have left.
    ///
    /// After an error, of this and of the other calls, some planes of the cache have the rows'
    /// entries and others not: the caller truncates.
    pub fn enter(&mut self, n: usize) -> Result<()> {
        let model = self.model;
        let first = self.flying;
        self.flying += n;
        self.embed(first..self.flying);
        self.on_packed_rows(&model.schedule().prelude, first..self.flying)?;
        self.lap(&model.schedule().prelude);
        let (d, b) = (self.hyperparameters().hidden_size, &mut *self.buffers);
        for c in first..first + n {
            let slot = b.active[c] as usize;
            b.x[slot * d..][..d].copy_from_slice(&b.h[c * d..][..d]);
            b.depth[slot] = 0;
        }
        self.limit_depth_in_advance(first);
        match &model.hyperparameters().router {
            None => Ok(()),
            Some(spec) if spec.kind == RouterKind::Expert => {
                self.route_by_expert_choice(spec, first)
            }
            Some(spec) => {
                self.choose_depths(spec, first)?;
                self.drop_shallow(first);
                Ok(())
            }
        }
    }

    /// Every row in the recursions runs the one that it stands before; without a router, all of
    /// them. Some leave.
    pub fn recurse(&mut self) -> Result<()> {
        let model = self.model;
        match &model.hyperparameters().router {
            None => self.recurse_all(&model.schedule().stages),
            Some(spec) => {
                self.block()?;
                self.merge(spec);
                match spec.kind {
                    RouterKind::Expert => self.route_by_expert_choice(spec, 0),
                    RouterKind::Token => {
                        self.drop_shallow(0);
                        Ok(())
                    }
                }
            }
        }
    }

    /// Own last layers of rows that have left: slots `buffers.left[rows]`, those of a sequence in
    /// the order of their positions. The results stand in `buffers.leaving`.
    pub fn finish(&mut self, rows: Range<usize>) -> Result<()> {
        let model = self.model;
        let (d, b) = (self.hyperparameters().hidden_size, &mut *self.buffers);
        let (leaving, slots) = (take(&mut b.leaving), take(&mut b.left));
        for (x, slot) in leaving.chunks_exact_mut(d).zip(&slots[rows.clone()]) {
            x.copy_from_slice(&b.x[*slot as usize * d..][..d]);
        }
        let x = &mut leaving[..rows.len() * d];
        let mut runs = model.schedule().coda.iter();
        let result = runs.try_for_each(|run| self.layer(Place::Own(run), &slots[rows.clone()], x));
        (self.buffers.leaving, self.buffers.left) = (leaving, slots);
        result
    }

    pub(super) fn hyperparameters(&self) -> &Hyperparameters {
        self.model.hyperparameters()
    }

    /// Token embeddings and rotary angles.
    fn embed(&mut self, packed: Range<usize>) {
        let (model, b) = (self.model, &mut *self.buffers);
        let h = model.hyperparameters();
        let embedding = model.token_embedding();
        let half = h.rope.dims / 2;
        let factors = (!b.rope_factors.is_empty()).then_some(&*b.rope_factors);
        for c in packed {
            let slot = b.active[c] as usize;
            let row = b.rows[slot];
            let x = &mut b.h[c * h.hidden_size..][..h.hidden_size];
            embedding.decode_row(model.bytes(), row.token as usize, x);
            let table = &mut b.rope[slot * half..][..half];
            ops::rope_row(&h.rope, factors, row.position as usize, table);
        }
    }

    /// Layers on some of the packed rows, none of which depend on the recursion.
    fn on_packed_rows(&mut self, runs: &[LayerRun], packed: Range<usize>) -> Result<()> {
        self.with_packed(packed, |pass, slots, h| {
            runs.iter()
                .try_for_each(|run| pass.layer(Place::Own(run), slots, h))
        })
    }

    /// Calls `each(pass, slots, rows)` with some of the packed rows.
    fn with_packed(
        &mut self,
        packed: Range<usize>,
        each: impl FnOnce(&mut Self, &[u32], &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let d = self.hyperparameters().hidden_size;
        let (h, active) = (take(&mut self.buffers.h), take(&mut self.buffers.active));
        let rows = &mut h[packed.start * d..packed.end * d];
        let result = each(self, &active[packed], rows);
        (self.buffers.h, self.buffers.active) = (h, active);
        result
    }

    /// Tells the clock that these layers are done.
    fn lap(&mut self, runs: &[LayerRun]) {
        if let Some(clock) = &mut self.clock {
            clock.lap(self.model.run_bytes(runs));
        }
    }

    /// Lowers the depth to what the time budget allows as far as is known by now; the first
    /// recursion is never left out.
    fn limit_depth_in_advance(&mut self, first: usize) {
        let Some(clock) = &self.clock else { return };
        let stages = &self.model.schedule().stages;
        let mut limit = self.limit(first);
        while limit > 1 {
            let within = stages.iter().filter(|s| s.recursion < limit);
            if clock.allows(within.map(|s| self.model.run_bytes(&s.runs)).sum()) {
                break;
            }
            // What the first recursion takes is not known yet: `in_time` decides after it.
            if clock.is_new() && !self.hyperparameters().decides_depth_first() {
                break;
            }
            limit -= 1;
        }
        self.depth_in_time = limit;
    }

    /// Whether there is time for this recursion too.
    fn in_time(&self, stage: &Stage) -> bool {
        match &self.clock {
            Some(clock) if stage.recursion > 0 => clock.allows(self.model.run_bytes(&stage.runs)),
            _ => true,
        }
    }

    fn settings(&self, packed: usize) -> Settings {
        let row = self.buffers.rows[self.buffers.active[packed] as usize];
        self.settings[row.sequence as usize]
    }

    /// The most recursions of a packed row.
    fn limit(&self, packed: usize) -> usize {
        self.settings(packed).depth_limit.min(self.depth_in_time)
    }

    /// The recursion that a packed row stands before, and the end of those that stand there too.
    fn segment(&self, first: usize) -> (usize, usize) {
        let b = &self.buffers;
        let recursion = |slot: &u32| b.rows[*slot as usize].recursion;
        let active = &b.active[first..self.flying];
        let here = recursion(&active[0]);
        let length = active.iter().take_while(|s| recursion(s) == here).count();
        (here as usize, first + length)
    }

    /// Vanilla and recursive models: every row runs every recursion within the limit, which is the
    /// same for all.
    fn recurse_all(&mut self, stages: &[Stage]) -> Result<()> {
        if self.flying == 0 {
            return Ok(());
        }
        let in_turn = !self.hyperparameters().sharing.repeats_in_place();
        let mut depth = 0;
        let limit = self.limit(0);
        for stage in stages.iter().filter(|s| s.recursion < limit) {
            if in_turn && !self.in_time(stage) {
                break;
            }
            self.on_packed_rows(&stage.runs, 0..self.flying)?;
            self.lap(&stage.runs);
            depth = depth.max(stage.recursion + 1);
        }
        let (d, b) = (self.hyperparameters().hidden_size, &mut *self.buffers);
        for (slot, h) in b.active[..self.flying].iter().zip(b.h.chunks_exact(d)) {
            b.x[*slot as usize * d..][..d].copy_from_slice(h);
            b.depth[*slot as usize] = depth as u8;
        }
        self.keep(0, |_, _| false);
        Ok(())
    }

    /// The shared block once, each row at its own recursion.
    fn block(&mut self) -> Result<()> {
        let model = self.model;
        let mut first = 0;
        while first < self.flying {
            let (recursion, end) = self.segment(first);
            // Recursions with weights of their own run one after another.
            let end = if model.block_is_shared() {
                self.flying
            } else {
                end
            };
            let stage = &model.schedule().stages[recursion];
            self.with_packed(first..end, |pass, slots, h| {
                (0..stage.runs.len()).try_for_each(|run| pass.layer(Place::Block(run), slots, h))
            })?;
            self.lap(&stage.runs);
            first = end;
        }
        Ok(())
    }

    /// Adds the block's weighted result to the residual stream of the rows for which it counts: all
    /// that were kept (expert-choice), those that have run as deep as they should (token-choice).
    /// All stand before the next recursion then.
    fn merge(&mut self, spec: &RouterSpec) {
        let (d, outputs) = (self.hyperparameters().hidden_size, self.outputs());
        let b = &mut *self.buffers;
        for c in 0..self.flying {
            let slot = b.active[c] as usize;
            let r = b.rows[slot].recursion as usize;
            b.rows[slot].recursion += 1;
            if usize::from(b.depth[slot]) != r + 1 {
                continue;
            }
            let (x, h) = (&mut b.x[slot * d..][..d], &mut b.h[c * d..][..d]);
            let weight = match spec.kind {
                _ if !spec.weighted => 1.0,
                RouterKind::Expert => routing::weight(spec, b.scores[c]),
                RouterKind::Token => b.scores[c * outputs + r],
            };
            for (x, h) in x.iter_mut().zip(&*h) {
                *x += weight * h;
            }
            if spec.kind == RouterKind::Expert {
                h.copy_from_slice(x);
            }
        }
    }

    /// Scores of a row.
    fn outputs(&self) -> usize {
        self.model.router(0).outputs()
    }

    /// Before each recursion a router decides who of the rows from `first` on goes on.
    fn route_by_expert_choice(&mut self, spec: &RouterSpec, first: usize) -> Result<()> {
        let model = self.model;
        // A row that was not kept before was only along for its keys.
        self.keep(first, |pass, c| {
            let slot = pass.buffers.active[c] as usize;
            let r = pass.buffers.rows[slot].recursion as usize;
            r < pass.limit(c)
                && r == usize::from(pass.buffers.depth[slot])
                && pass.in_time(&model.schedule().stages[r])
        });
        let shared = self.hyperparameters().kv == KvStrategy::Shared;
        let mut from = first;
        while from < self.flying {
            let (recursion, to) = self.segment(from);
            self.choose(spec, recursion, from..to)?;
            let b = &mut *self.buffers;
            for c in from..to {
                if b.kept[c] != 0 {
                    b.depth[b.active[c] as usize] = recursion as u8 + 1;
                } else if shared && recursion == 0 {
                    // Recursion 0 gives every token its keys, kept or not.
                    b.kept[c] = 1;
                }
            }
            from = to;
        }
        self.keep(first, |pass, c| pass.buffers.kept[c] != 0);
        Ok(())
    }

    /// Who of some rows that stand before the same recursion goes on: 1 or 0 in `buffers.kept`.
    fn choose(&mut self, spec: &RouterSpec, recursion: usize, packed: Range<usize>) -> Result<()> {
        let model = self.model;
        self.scores(model.router(recursion), packed.clone(), spec)?;
        if self.routing == Routing::Capacity {
            // The packed rows are all that are left of the text, which came in one pass.
            let total = self.left + self.flying;
            let b = &mut *self.buffers;
            let scores = &b.scores[packed];
            routing::keep_best(spec, scores, spec.capacities[recursion], total, b.kept);
            return Ok(());
        }
        let auxiliary = model.auxiliary_router(recursion);
        if let Some(auxiliary) = auxiliary {
            // The main router's scores are still needed as weights.
            let b = &mut *self.buffers;
            b.aux_scores[packed.clone()].copy_from_slice(&b.scores[packed.clone()]);
            self.scores(auxiliary, packed.clone(), spec)?;
        }
        for c in packed.clone() {
            let least = routing::least_score(spec, self.settings(c).cut);
            self.buffers.kept[c] = u32::from(self.buffers.scores[c] >= least);
        }
        if auxiliary.is_some() {
            let b = &mut *self.buffers;
            b.scores[packed.clone()].copy_from_slice(&b.aux_scores[packed]);
        }
        Ok(())
    }

    /// One router gives each row from `first` on its depth.
    fn choose_depths(&mut self, spec: &RouterSpec, first: usize) -> Result<()> {
        let model = self.model;
        let router = model.router(0);
        if first == self.flying {
            return Ok(());
        }
        self.scores(router, first..self.flying, spec)?;
        let outputs = router.outputs();
        for c in first..self.flying {
            let limit = self.limit(c);
            let b = &mut *self.buffers;
            let weights = &mut b.scores[c * outputs..][..outputs];
            routing::token_weights(spec, weights);
            let weights = &weights[..limit];
            let picked = match &router.pick_bias {
                Some(bias) => routing::pick(weights, bias.values(model.bytes())),
                None => routing::pick(weights, std::iter::repeat(0.0)),
            };
            b.depth[b.active[c] as usize] = picked as u8 + 1;
        }
        Ok(())
    }

    /// Token-choice: rows that have run as deep as they should leave.
    fn drop_shallow(&mut self, first: usize) {
        self.keep(first, |pass, c| {
            let slot = pass.buffers.active[c] as usize;
            u32::from(pass.buffers.depth[slot]) > pass.buffers.rows[slot].recursion
        });
    }

    /// Of the packed rows from `first` on those for which `stays(pass, index)` stay and move up,
    /// with their scores; the others leave.
    pub fn keep(&mut self, first: usize, stays: impl Fn(&Self, usize) -> bool) {
        let d = self.hyperparameters().hidden_size;
        let outputs = self
            .hyperparameters()
            .router
            .as_ref()
            .map_or(0, |_| self.outputs());
        let mut to = first;
        for from in first..self.flying {
            let stays = stays(self, from);
            let b = &mut *self.buffers;
            if !stays {
                b.left[self.left] = b.active[from];
                self.left += 1;
                continue;
            }
            if to != from {
                b.active[to] = b.active[from];
                // On a GPU rows stay in their slots.
                if !b.h.is_empty() {
                    b.h.copy_within(from * d..(from + 1) * d, to * d);
                    let scores = from * outputs..(from + 1) * outputs;
                    b.scores.copy_within(scores, to * outputs);
                }
            }
            to += 1;
        }
        self.flying = to;
    }

    /// A router's scores of some packed rows, into `buffers.scores` [rows, outputs].
    fn scores(&mut self, router: &Router, packed: Range<usize>, spec: &RouterSpec) -> Result<()> {
        let b = &mut *self.buffers;
        let mut matmul = MatMul {
            team: self.team,
            level: self.level,
            file: self.model.bytes(),
            panels: b.panels,
            scratch: b.scratch,
        };
        let (n, columns, outputs) = (packed.len(), router.first.weight.columns, router.outputs());
        let h = &b.h[packed.start * columns..];
        let heated = |row: usize, x: &mut [f32]| {
            for (x, h) in x.iter_mut().zip(&h[row * columns..]) {
                *x = h / spec.temperature;
            }
        };
        let scores = &mut b.scores[packed.start * outputs..packed.end * outputs];
        match &router.second {
            None => {
                let mut only = [Product::new(&router.first, scores)];
                matmul.run(n, b.norm, &heated, &mut only);
            }
            Some(second) => {
                let mut first = [Product::new(&router.first, b.router_hidden)];
                matmul.run(n, b.norm, &heated, &mut first);
                let gelu = |_, x: &mut [f32]| x.iter_mut().for_each(|x| *x = ops::gelu(*x));
                let mut last = [Product::new(second, scores)];
                matmul.run(n, b.router_hidden, &gelu, &mut last);
            }
        }
        self.check_scores(packed, outputs)
    }

    fn check_scores(&mut self, packed: Range<usize>, outputs: usize) -> Result<()> {
        let b = &*self.buffers;
        let scores = &b.scores[packed.start * outputs..packed.end * outputs];
        let Some(at) = scores.iter().position(|s| !s.is_finite()) else {
            return Ok(());
        };
        self.culprit = Some(b.active[packed.start + at / outputs]);
        Err(Error::not_finite("a router's score"))
    }
}

/// Logits of `count` of the rows that finished last from row `first` on, into `buffers.logits`.
pub(crate) fn logits(
    model: &Model,
    team: &mut Team,
    level: Level,
    buffers: &mut Buffers,
    first: usize,
    count: usize,
) -> Result<()> {
    let h = model.hyperparameters();
    let d = h.hidden_size;
    let x = &buffers.leaving[first * d..][..count * d];
    let logits = &mut buffers.logits[..count * h.vocab_size];
    let (file, output) = (model.bytes(), model.output());
    let normed = ops::norm(level, file, model.output_norm(), h.norm_epsilon, x);
    let mut matmul = MatMul {
        team,
        level,
        file,
        panels: buffers.panels,
        scratch: buffers.scratch,
    };
    let mut product = [Product::new(&output, logits)];
    matmul.run(count, buffers.norm, &normed, &mut product);
    match logits.iter().position(|l| !l.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::not_finite(format_args!(
            "the logit of token {}",
            at % h.vocab_size
        ))),
    }
}

//! One pass over a batch of rows: embed, first layers, recursions with routing, last layers. It
//! reads like the reference; what runs when comes from the model's schedule.

use super::activations::prepare;
use super::attention::{Attention, Seat};
use super::matmul::{Product, any_quantized, products};
use super::ops;
use super::pace::Clock;
use super::simd::Level;
use super::team::{Disjoint, Team};
use crate::error::{Error, Result};
use crate::kv::KvWriter;
use crate::model::{
    Hyperparameters, Keys, KvStrategy, Layer, LayerRun, Model, Rope, Router, RouterKind,
    RouterSpec, Stage,
};
use crate::plan::{Buffers, Row};
use crate::routing::{self, Routing};
use std::mem::take;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A pass in the making: the first `n` rows of the buffers.
pub(crate) struct Pass<'a, 'b, 'm> {
    pub model: &'a Model,
    pub team: &'a mut Team<'m>,
    pub level: Level,
    pub buffers: &'a mut Buffers<'b>,
    pub n: usize,
    pub routing: Routing,
    pub cut: f32,
    pub depth_limit: usize,
    /// Set from other threads to end the pass; looked at before each layer.
    pub cancel: Option<&'a AtomicBool>,
    /// The token's time budget, for passes of one row.
    pub clock: Option<Clock<'a>>,
}

impl Pass<'_, '_, '_> {
    /// Runs rows `0..n`, which stand in `buffers.rows`. Afterwards `buffers.x` holds the residual
    /// stream after the last layer and `buffers.depth` the recursions that each row ran; the
    /// cache has the rows' entries. On an error some planes may have them and others not: the
    /// caller truncates.
    pub fn run(&mut self) -> Result<()> {
        let model = self.model;
        let schedule = model.schedule();
        self.embed();
        for (i, active) in self.buffers.active[..self.n].iter_mut().enumerate() {
            *active = i as u32;
        }
        self.on_all_rows(&schedule.prelude)?;
        self.lap(&schedule.prelude);
        self.limit_depth_in_advance();
        match &model.hyperparameters().router {
            None => self.recurse_all(&schedule.stages)?,
            Some(spec) if spec.kind == RouterKind::Expert => {
                self.recurse_by_expert_choice(spec, &schedule.stages)?;
            }
            Some(spec) => self.recurse_by_token_choice(spec, &schedule.stages)?,
        }
        for (i, active) in self.buffers.active[..self.n].iter_mut().enumerate() {
            *active = i as u32;
        }
        self.on_all_rows(&schedule.coda)
    }

    /// Tells the clock that these layers are done.
    fn lap(&mut self, runs: &[LayerRun]) {
        if let Some(clock) = &mut self.clock {
            clock.lap(self.model.run_bytes(runs));
        }
    }

    /// Lowers the depth limit to the recursions that the time budget allows as far as is known by
    /// now; the first is never left out.
    fn limit_depth_in_advance(&mut self) {
        let Some(clock) = &self.clock else { return };
        let stages = &self.model.schedule().stages;
        while self.depth_limit > 1 {
            let within = stages.iter().filter(|s| s.recursion < self.depth_limit);
            if clock.allows(within.map(|s| self.model.run_bytes(&s.runs)).sum()) {
                return;
            }
            // What the first recursion takes is not known yet: `in_time` decides after it.
            if clock.is_new() && !self.hyperparameters().decides_depth_first() {
                return;
            }
            self.depth_limit -= 1;
        }
    }

    /// Whether there is time for this recursion too.
    fn in_time(&self, stage: &Stage) -> bool {
        match &self.clock {
            Some(clock) if stage.recursion > 0 => clock.allows(self.model.run_bytes(&stage.runs)),
            _ => true,
        }
    }

    fn hyperparameters(&self) -> &Hyperparameters {
        self.model.hyperparameters()
    }

    /// Token embeddings and rotary angles.
    fn embed(&mut self) {
        let (model, b) = (self.model, &mut *self.buffers);
        let h = model.hyperparameters();
        let embedding = model.token_embedding();
        let half = h.rope.dims / 2;
        let factors = (!b.rope_factors.is_empty()).then_some(&*b.rope_factors);
        for (i, row) in b.rows[..self.n].iter().enumerate() {
            let x = &mut b.x[i * h.hidden_size..][..h.hidden_size];
            embedding.decode_row(model.bytes(), row.token as usize, x);
            let table = &mut b.rope[i * half..][..half];
            ops::rope_row(&h.rope, factors, row.position as usize, table);
        }
    }

    /// Layers on the residual stream itself.
    fn on_all_rows(&mut self, runs: &[LayerRun]) -> Result<()> {
        let x = take(&mut self.buffers.x);
        let result = runs.iter().try_for_each(|run| self.layer(run, x, self.n));
        self.buffers.x = x;
        result
    }

    /// Layers on the first `n` packed rows.
    fn on_packed_rows(&mut self, runs: &[LayerRun], n: usize) -> Result<()> {
        let h = take(&mut self.buffers.h);
        let result = runs.iter().try_for_each(|run| self.layer(run, h, n));
        self.buffers.h = h;
        result
    }

    /// Vanilla and recursive models: every row runs every recursion within the limit.
    fn recurse_all(&mut self, stages: &[Stage]) -> Result<()> {
        let in_turn = !self.hyperparameters().sharing.repeats_in_place();
        let mut depth = 0;
        let limit = self.depth_limit;
        for stage in stages.iter().filter(|s| s.recursion < limit) {
            if in_turn && !self.in_time(stage) {
                break;
            }
            self.on_all_rows(&stage.runs)?;
            self.lap(&stage.runs);
            depth = depth.max(stage.recursion + 1);
        }
        self.buffers.depth[..self.n].fill(depth as u8);
        Ok(())
    }

    /// Before each recursion a router decides who goes on; those who do add the block's weighted
    /// result to their residual stream.
    fn recurse_by_expert_choice(&mut self, spec: &RouterSpec, stages: &[Stage]) -> Result<()> {
        let shared = self.hyperparameters().kv == KvStrategy::Shared;
        let total = self.n;
        let mut active = total;
        self.buffers.depth[..total].fill(0);
        for (r, stage) in stages.iter().enumerate().take(self.depth_limit) {
            if !self.in_time(stage) {
                break;
            }
            self.pack(active);
            let model = self.model;
            self.scores(model.router(r), active, spec)?;
            let kept = self.choose(spec, r, active)?;
            // With shared keys, recursion 0 gives every token its keys, kept or not.
            let run_all = shared && r == 0;
            let running = if run_all {
                active
            } else {
                self.compact(kept);
                kept
            };
            if running > 0 {
                self.on_packed_rows(&stage.runs, running)?;
                self.lap(&stage.runs);
            }
            self.merge_kept(spec, kept, run_all);
            let b = &mut *self.buffers;
            for c in 0..kept {
                // Kept indices ascend, so entries ahead are still untouched.
                b.active[c] = if run_all {
                    b.active[b.kept[c] as usize]
                } else {
                    b.active[c]
                };
                b.depth[b.active[c] as usize] = r as u8 + 1;
            }
            active = kept;
            if active == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Copies the active rows of the residual stream to the packed rows.
    fn pack(&mut self, active: usize) {
        let (d, b) = (self.hyperparameters().hidden_size, &mut *self.buffers);
        for (c, row) in b.active[..active].iter().enumerate() {
            b.h[c * d..][..d].copy_from_slice(&b.x[*row as usize * d..][..d]);
        }
    }

    /// Who of the active rows goes on: indices into them, ascending, in `kept`.
    fn choose(&mut self, spec: &RouterSpec, recursion: usize, active: usize) -> Result<usize> {
        if self.routing == Routing::Capacity {
            let b = &mut *self.buffers;
            let (capacity, scores) = (spec.capacities[recursion], &b.scores[..active]);
            return Ok(routing::keep_best(spec, scores, capacity, self.n, b.kept));
        }
        let least = routing::least_score(spec, self.cut);
        let model = self.model;
        if let Some(auxiliary) = model.auxiliary_router(recursion) {
            // The main router's scores are still needed as weights.
            self.buffers.aux_scores[..active].copy_from_slice(&self.buffers.scores[..active]);
            self.scores(auxiliary, active, spec)?;
            let b = &mut *self.buffers;
            let count = routing::keep_above(&b.scores[..active], least, b.kept);
            b.scores[..active].copy_from_slice(&b.aux_scores[..active]);
            return Ok(count);
        }
        let b = &mut *self.buffers;
        Ok(routing::keep_above(&b.scores[..active], least, b.kept))
    }

    /// Moves the kept of the packed rows, their scores and their row numbers to the front.
    fn compact(&mut self, kept: usize) {
        let (d, b) = (self.hyperparameters().hidden_size, &mut *self.buffers);
        for to in 0..kept {
            let from = b.kept[to] as usize;
            b.h.copy_within(from * d..(from + 1) * d, to * d);
            b.scores[to] = b.scores[from];
            b.active[to] = b.active[from];
        }
    }

    /// `x[row] += weight · h[packed]` for the kept rows.
    fn merge_kept(&mut self, spec: &RouterSpec, kept: usize, run_all: bool) {
        let (d, b) = (self.hyperparameters().hidden_size, &mut *self.buffers);
        for c in 0..kept {
            let packed = if run_all { b.kept[c] as usize } else { c };
            let row = b.active[packed] as usize;
            let weight = if spec.weighted {
                routing::weight(spec, b.scores[packed])
            } else {
                1.0
            };
            add_scaled(&mut b.x[row * d..][..d], weight, &b.h[packed * d..][..d]);
        }
    }

    /// One router gives each row its depth; a row that has run that far adds its weighted result.
    fn recurse_by_token_choice(&mut self, spec: &RouterSpec, stages: &[Stage]) -> Result<()> {
        let n = self.n;
        let d = self.hyperparameters().hidden_size;
        self.pack(n);
        let model = self.model;
        let router = model.router(0);
        self.scores(router, n, spec)?;
        let outputs = router.outputs();
        if let Some(bias) = &router.pick_bias
            && !bias.values(model.bytes()).all(f32::is_finite)
        {
            return Err(Error::not_finite("a router's bias"));
        }
        let b = &mut *self.buffers;
        for row in 0..n {
            let weights = &mut b.scores[row * outputs..][..outputs];
            routing::token_weights(spec, weights);
            let weights = &weights[..self.depth_limit];
            let picked = match &router.pick_bias {
                Some(bias) => routing::pick(weights, bias.values(model.bytes())),
                None => routing::pick(weights, std::iter::repeat(0.0)),
            };
            b.depth[row] = picked as u8 + 1;
        }
        let mut active = n;
        for (r, stage) in stages.iter().enumerate().take(self.depth_limit) {
            let b = &mut *self.buffers;
            let mut kept = 0;
            for c in 0..active {
                let row = b.active[c] as usize;
                if b.depth[row] as usize > r {
                    b.h.copy_within(c * d..(c + 1) * d, kept * d);
                    b.active[kept] = row as u32;
                    kept += 1;
                }
            }
            active = kept;
            if active == 0 {
                break;
            }
            self.on_packed_rows(&stage.runs, active)?;
            self.lap(&stage.runs);
            let b = &mut *self.buffers;
            for c in 0..active {
                let row = b.active[c] as usize;
                if b.depth[row] as usize == r + 1 {
                    let weight = if spec.weighted {
                        b.scores[row * outputs + r]
                    } else {
                        1.0
                    };
                    add_scaled(&mut b.x[row * d..][..d], weight, &b.h[c * d..][..d]);
                }
            }
        }
        Ok(())
    }

    /// A router's scores for the first `n` packed rows, into `buffers.scores` [n, outputs].
    fn scores(&mut self, router: &Router, n: usize, spec: &RouterSpec) -> Result<()> {
        let (file, b) = (self.model.bytes(), &mut *self.buffers);
        let (team, level) = (&mut *self.team, self.level);
        let quantized = any_quantized(&[&router.first]);
        let (columns, h) = (router.first.weight.columns, &*b.h);
        let input = prepare(
            team,
            level,
            n,
            columns,
            b.norm,
            b.panels,
            quantized,
            |row, x| {
                for (x, h) in x.iter_mut().zip(&h[row * columns..]) {
                    *x = h / spec.temperature;
                }
            },
        );
        let (first, scores) = (&router.first, &mut *b.scores);
        match &router.second {
            None => products(
                team,
                level,
                file,
                &input,
                &mut [Product::new(first, scores)],
                b.scratch,
            ),
            Some(second) => {
                let hidden = &mut *b.router_hidden;
                let mut all = [Product::new(first, hidden)];
                products(team, level, file, &input, &mut all, b.scratch);
                let (columns, hidden) = (second.weight.columns, &mut *b.router_hidden);
                let quantized = any_quantized(&[second]);
                let input = prepare(
                    team,
                    level,
                    n,
                    columns,
                    hidden,
                    b.panels,
                    quantized,
                    |_, x| {
                        x.iter_mut().for_each(|x| *x = ops::gelu(*x));
                    },
                );
                let mut all = [Product::new(second, scores)];
                products(team, level, file, &input, &mut all, b.scratch);
            }
        }
        if b.scores[..n * router.outputs()]
            .iter()
            .all(|s| s.is_finite())
        {
            Ok(())
        } else {
            Err(Error::not_finite("a router's score"))
        }
    }

    /// One decoder layer on rows `x` [n, hidden], which are the rows `active[..n]` of the pass.
    fn layer(&mut self, run: &LayerRun, x: &mut [f32], n: usize) -> Result<()> {
        if self.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
            return Err(Error::Cancelled);
        }
        let model = self.model;
        let layer = model.layer(run.layer);
        let x = &mut x[..n * model.hyperparameters().hidden_size];
        self.attention_half(run, layer, x, n)?;
        self.feed_forward_half(layer, x, n);
        Ok(())
    }

    fn attention_half(
        &mut self,
        run: &LayerRun,
        layer: &Layer,
        x: &mut [f32],
        n: usize,
    ) -> Result<()> {
        let (file, h) = (self.model.bytes(), self.model.hyperparameters());
        let (team, level, b) = (&mut *self.team, self.level, &mut *self.buffers);
        let (query_size, kv_size) = (h.query_size(), h.kv_size());
        let (q, attn) = (&mut b.q[..n * query_size], &mut b.attn[..n * query_size]);
        let (k, v) = (&mut b.k[..n * kv_size], &mut b.v[..n * kv_size]);
        let active = &b.active[..n];
        let quantized = any_quantized(&[&layer.q, &layer.k, &layer.v]);
        let norm = ops::Norm::new(level, file, &layer.attn_norm, h.norm_epsilon);
        let input = norm.prepare(team, n, x, b.norm, b.panels, quantized);
        let mut all = [
            Product::new(&layer.q, q),
            Product::new(&layer.k, k),
            Product::new(&layer.v, v),
        ];
        let wanted = match run.keys {
            Keys::Append => &mut all[..],
            Keys::Shared => &mut all[..1],
        };
        products(team, level, file, &input, wanted, b.scratch);
        for (seat, row) in b.seats.iter_mut().zip(active) {
            let Row {
                sequence, position, ..
            } = b.rows[*row as usize];
            let visible = match run.keys {
                Keys::Append => b.kv.append(sequence as usize, run.plane)? as u32 + 1,
                // The plane has an entry for every position.
                Keys::Shared => position + 1,
            };
            *seat = Seat { sequence, visible };
        }
        let rows = Rows {
            level,
            rope: &h.rope,
            head_dim: h.head_dim,
            table: b.rope,
            active,
            seats: &b.seats[..n],
            q: Disjoint::new(q),
            k: Disjoint::new(k),
            v,
            cache: b.kv.writer(),
            plane: run.plane,
            appends: run.keys == Keys::Append,
        };
        rows.rotate_and_store(team)?;
        let attention = Attention {
            level,
            kv: &b.kv,
            plane: run.plane,
            heads: h.heads,
            seats: &b.seats[..n],
            q,
        };
        attention.run(team, b.scratch, b.partials, attn);
        let quantized = any_quantized(&[&layer.o]);
        let input = prepare(
            team,
            level,
            n,
            query_size,
            attn,
            b.panels,
            quantized,
            |_, _| {},
        );
        let mut all = [Product::added(&layer.o, x)];
        products(team, level, file, &input, &mut all, b.scratch);
        Ok(())
    }

    fn feed_forward_half(&mut self, layer: &Layer, x: &mut [f32], n: usize) {
        let (file, h) = (self.model.bytes(), self.model.hyperparameters());
        let (team, level, b) = (&mut *self.team, self.level, &mut *self.buffers);
        let inner = h.feed_forward_size;
        let (gate, up) = (&mut b.gate[..n * inner], &mut b.up[..n * inner]);
        let quantized = any_quantized(&[&layer.gate, &layer.up]);
        let norm = ops::Norm::new(level, file, &layer.ffn_norm, h.norm_epsilon);
        let input = norm.prepare(team, n, x, b.norm, b.panels, quantized);
        let mut all = [Product::new(&layer.gate, gate), Product::new(&layer.up, up)];
        products(team, level, file, &input, &mut all, b.scratch);
        let quantized = any_quantized(&[&layer.down]);
        let input = prepare(
            team,
            level,
            n,
            inner,
            gate,
            b.panels,
            quantized,
            |row, gate| {
                ops::swiglu(level, gate, &up[row * inner..][..inner]);
            },
        );
        let mut all = [Product::added(&layer.down, x)];
        products(team, level, file, &input, &mut all, b.scratch);
    }
}

/// Queries, keys and values of some rows, before attention.
struct Rows<'a> {
    level: Level,
    rope: &'a Rope,
    head_dim: usize,
    /// [rows of the pass, rope dims / 2]
    table: &'a [[f32; 2]],
    /// The rows' numbers in the pass.
    active: &'a [u32],
    seats: &'a [Seat],
    q: Disjoint<'a, f32>,
    k: Disjoint<'a, f32>,
    v: &'a [f32],
    cache: KvWriter<'a>,
    plane: usize,
    /// Whether keys and values are wanted.
    appends: bool,
}

impl Rows<'_> {
    /// Rotates queries and keys, and puts keys and values into the cache.
    fn rotate_and_store(&self, team: &mut Team) -> Result<()> {
        let n = self.seats.len();
        let failure = Mutex::new(None);
        team.run(n, &|row, _| {
            let half = self.rope.dims / 2;
            let table = &self.table[self.active[row] as usize * half..][..half];
            let width = self.q.len() / n;
            // SAFETY: each row belongs to one task.
            let q = unsafe { self.q.slice(row * width, width) };
            ops::rotate(self.level, self.rope.pairing, self.head_dim, table, q);
            if !self.appends {
                return;
            }
            let width = self.k.len() / n;
            // SAFETY: as above.
            let k = unsafe { self.k.slice(row * width, width) };
            ops::rotate(self.level, self.rope.pairing, self.head_dim, table, k);
            let Seat { sequence, visible } = self.seats[row];
            let place = (sequence as usize, self.plane, visible as usize - 1);
            let v = &self.v[row * width..][..width];
            // SAFETY: each row has an entry of its own.
            if let Err(error) = unsafe { self.cache.store(place, k, v) } {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }
}

fn add_scaled(x: &mut [f32], scale: f32, y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += scale * y;
    }
}

/// Logits of `count` rows of the last pass from row `first` on, into `buffers.logits`.
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
    let x = &buffers.x[first * d..][..count * d];
    let logits = &mut buffers.logits[..count * h.vocab_size];
    let (file, output) = (model.bytes(), model.output());
    let quantized = any_quantized(&[&output]);
    let norm = ops::Norm::new(level, file, model.output_norm(), h.norm_epsilon);
    let (y, panels) = (&mut *buffers.norm, &mut *buffers.panels);
    let input = norm.prepare(team, count, x, y, panels, quantized);
    let mut all = [Product::new(&output, logits)];
    products(team, level, file, &input, &mut all, buffers.scratch);
    match logits.iter().position(|l| !l.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::not_finite(format_args!(
            "the logit of token {}",
            at % h.vocab_size
        ))),
    }
}

//! What a pass does on the device, written down once as a list of launches.
//!
//! It follows `src/cpu/forward.rs`. Rows stay in their slots; how many of them run is known on the device
//! only, so that every launch is large enough for all and blocks without a row end at once.

use super::Kind;
use super::driver::Address;
use super::functions::Kernels;
use super::launch::{Condition, Function, Program, Work, WorkList};
use super::memory::Buffer;
use super::params::*;
use super::plan::DevicePlan;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::kv::KvShape;
use crate::layout::Region;
use crate::model::{
    Keys, KvStrategy, LayerRun, Linear, Model, Router, RouterFunction, RouterKind, RouterSpec,
    Stage,
};
use crate::quant::TensorType;

/// Where a pass's memory is on both sides.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    pub buffer: &'a Buffer,
    /// Pinned memory of the host.
    pub input: *const u8,
    pub output: *mut u8,
}

/// Writes down the launches of a program for up to `rows` rows.
pub(super) struct Writer<'a> {
    pub model: &'a Model,
    pub weights: &'a Weights,
    pub kernels: &'a Kernels,
    pub plan: &'a DevicePlan,
    pub kv: &'a KvShape,
    pub places: Places<'a>,
    pub kind: Kind,
    /// Most rows.
    pub rows: usize,
    /// No two rows are of one sequence.
    pub apart: bool,
    /// The slot of a lone row, if it is known.
    pub slot: u32,
    pub list: WorkList,
    /// The first piece of work that there was no memory for.
    pub refused: Option<Error>,
}

impl<'a> Writer<'a> {
    /// A pass of a session: all rows enter, take their recursions and leave.
    pub fn session(mut self, program: &mut Program) -> Result<WorkList> {
        let schedule = self.model.schedule();
        // Rows take the first slots.
        if self.rows == 1 {
            self.slot = 0;
        }
        self.enter()?;
        let routed = self.model.hyperparameters().router.is_some();
        for (number, stage) in schedule.stages.iter().enumerate() {
            if !routed || number == 0 {
                self.recursion(stage)?;
                continue;
            }
            // Whether anybody is left was decided just before. Without the kernel that says so the body has no
            // condition, which would be false.
            let mut condition = Condition::default();
            if let Some(kernel) = self.kernels.condition {
                condition = program.condition()?;
                let params = ConditionParams {
                    report: self.report(0),
                    condition: condition.0,
                };
                self.launch_blocks_of(1, kernel, [1, 1, 1], 0, &params);
            }
            let before = std::mem::take(&mut self.list.work);
            self.recursion(stage)?;
            let work = std::mem::replace(&mut self.list.work, before);
            self.push(Work::When { condition, work });
        }
        self.leave()?;
        self.finish()
    }

    /// A tick of a batch: some rows enter, all in the recursions take their next one, those that can
    /// leave.
    pub fn tick(mut self) -> Result<WorkList> {
        let schedule = self.model.schedule();
        self.enter()?;
        if self.model.hyperparameters().router.is_none() {
            for stage in &schedule.stages {
                self.recursion(stage)?;
            }
        } else if self.model.block_is_shared() {
            self.seats(ANY);
            self.block(&schedule.stages[0].runs, ANY)?;
            self.merge(self.active());
            self.decide_all()?;
        } else {
            for (recursion, stage) in schedule.stages.iter().enumerate() {
                self.seats(recursion as u32);
                self.block(&stage.runs, recursion as u32)?;
            }
            self.merge(self.active());
            self.decide_all()?;
        }
        self.leave()?;
        self.finish()
    }

    /// Logits of rows that stand in their slots, after their last layers.
    pub fn logits_only(mut self) -> Result<WorkList> {
        self.begin();
        self.logits()?;
        self.finish()
    }

    // ---- The parts of a pass

    fn begin(&mut self) {
        let input = self.plan.input;
        self.push(Work::Send {
            to: self.at(Region::default()),
            from: self.places.input,
            bytes: self.plan.input_bytes,
        });
        let params = BeginParams {
            input: self.at(input.head),
            new_rows: self.at(input.new_rows),
            new_slots: self.at(input.new_slots),
            old_active: self.at(input.old_active),
            old_waiting: self.at(input.old_waiting),
            changes: self.at(input.changes),
            tables: self.at(self.plan.regions.tables),
            rows: self.at(self.plan.regions.rows),
            states: self.states(),
            entering: self.at(self.plan.regions.entering),
            active: self.at(self.plan.regions.active),
            waiting: self.at(self.plan.regions.waiting),
            wanted: self.at(self.plan.regions.wanted),
            report: self.report(0),
            tokens: self.at(self.plan.regions.tokens),
            x: self.at(self.plan.regions.x),
            context: self.plan.sizes.context as u32,
            width: self.model.hyperparameters().hidden_size as u32,
        };
        self.launch(self.kernels.begin, [1, 1, 1], 0, &params);
    }

    /// Own first layers of the rows that enter, and who of them goes on.
    fn enter(&mut self) -> Result<()> {
        self.begin();
        let (model, h) = (self.model, self.model.hyperparameters());
        let entering = View {
            slots: self.at(self.plan.regions.entering),
            count: self.report(7),
        };
        let mut embedding = self.matrix(&Linear {
            weight: *model.token_embedding(),
            bias: None,
        })?;
        embedding.out = 0;
        let factors = match model.rope_factors() {
            Some(_) => self.at(self.plan.regions.rope_factors),
            None => 0,
        };
        let params = EmbedParams {
            view: entering,
            rows: self.at(self.plan.regions.rows),
            embedding,
            h: self.at(self.plan.regions.h),
            rope: self.at(self.plan.regions.rope),
            factors,
            base: h.rope.base,
            scale: h.rope.scale,
            pairs: (h.rope.dims / 2) as u32,
            unused: 0,
        };
        self.launch(self.kernels.embed, [self.rows as u32, 1, 1], 0, &params);
        let h_rows = self.at(self.plan.regions.h);
        for run in &model.schedule().prelude {
            let planes = self.planes(|_| Some(run), 0);
            self.layer(model.layer(run.layer), entering, &planes, h_rows, true)?;
        }
        self.copy_rows(entering, self.plan.regions.h, self.plan.regions.x);
        match &h.router {
            None => Ok(()),
            Some(spec) => {
                let choose = spec.kind == RouterKind::Token;
                self.score(entering, 0, spec)?;
                self.decide(entering, 0, spec, choose)?;
                Ok(())
            }
        }
    }

    /// One stage for all rows that are left, and who of them goes on.
    fn recursion(&mut self, stage: &'a Stage) -> Result<()> {
        let recursion = stage.recursion as u32;
        self.seats(recursion);
        self.block(&stage.runs, recursion)?;
        let Some(spec) = &self.model.hyperparameters().router else {
            return Ok(());
        };
        self.merge(self.running());
        let next = stage.recursion + 1;
        if spec.kind == RouterKind::Expert && next < self.model.hyperparameters().recursions {
            self.score(self.active(), next, spec)?;
        }
        self.decide(self.active(), next, spec, false)?;
        Ok(())
    }

    /// The layers of a block on the rows that run.
    fn block(&mut self, runs: &'a [LayerRun], recursion: u32) -> Result<()> {
        let (model, h) = (self.model, self.at(self.plan.regions.h));
        let stages = &model.schedule().stages;
        let routed = model.hyperparameters().router.is_some();
        for (number, run) in runs.iter().enumerate() {
            let planes = match routed {
                true => self.planes(|r| stages.get(r).map(|s| &s.runs[number]), recursion),
                false => self.planes(|_| Some(run), recursion),
            };
            let appends = match recursion {
                ANY => stages.iter().any(|s| s.runs[number].keys == Keys::Append),
                _ => run.keys == Keys::Append,
            };
            let running = self.running();
            self.layer(model.layer(run.layer), running, &planes, h, appends)?;
        }
        Ok(())
    }

    /// After a tick's block: rows stand before different recursions, whose routers differ.
    fn decide_all(&mut self) -> Result<()> {
        let h = self.model.hyperparameters();
        let Some(spec) = &h.router else { return Ok(()) };
        if h.recursions > 1 && self.routers_are_linear() {
            self.score_linear(self.active(), spec)?;
        } else if spec.kind == RouterKind::Expert {
            for recursion in 1..h.recursions {
                let params = SelectParams {
                    active: self.at(self.plan.regions.active),
                    rows: self.at(self.plan.regions.rows),
                    selected: self.at(self.plan.regions.selected),
                    count: self.at(self.plan.regions.selected_count),
                    report: self.report(0),
                    recursion: recursion as u32,
                    unused: 0,
                };
                self.launch(self.kernels.select, [1, 1, 1], 0, &params);
                let selected = View {
                    slots: self.at(self.plan.regions.selected),
                    count: self.at(self.plan.regions.selected_count),
                };
                self.score(selected, recursion, spec)?;
            }
        }
        self.decide(self.active(), 1, spec, false)?;
        Ok(())
    }

    /// Own last layers of rows that have left, then logits of those whose logits are wanted.
    fn leave(&mut self) -> Result<()> {
        let h = self.model.hyperparameters();
        let routed = h.router.is_some();
        if !routed {
            self.copy_rows(self.active(), self.plan.regions.h, self.plan.regions.x);
        }
        let params = LeaveParams {
            active: self.at(self.plan.regions.active),
            waiting: self.at(self.plan.regions.waiting),
            flags: self.at(self.plan.regions.flags),
            ready: self.at(self.plan.regions.ready),
            wanted: self.at(self.plan.regions.wanted),
            rows: self.at(self.plan.regions.rows),
            states: self.states(),
            report: self.report(0),
            recursions: h.recursions as u32,
            routed: u32::from(routed),
            most: self.rows as u32,
            unused: 0,
        };
        self.launch(self.kernels.leave, [1, 1, 1], 0, &params);
        let ready = View {
            slots: self.at(self.plan.regions.ready),
            count: self.report(2),
        };
        let x = self.at(self.plan.regions.x);
        for run in &self.model.schedule().coda {
            let planes = self.planes(|_| Some(run), 0);
            self.layer(self.model.layer(run.layer), ready, &planes, x, true)?;
        }
        self.logits()
    }

    fn logits(&mut self) -> Result<()> {
        let (model, h) = (self.model, self.model.hyperparameters());
        let wanted = View {
            slots: self.at(self.plan.regions.wanted),
            count: self.report(3),
        };
        let rows = self.rows;
        self.rows = rows.min(self.plan.sizes.logit_rows);
        let source = self.norm(self.at(self.plan.regions.x), model.output_norm())?;
        let logits = self.at(self.plan.regions.logits);
        let output = self.output(&model.output(), logits)?;
        self.product(source, &[output], wanted);
        let vocab = h.vocab_size as u32;
        let params = CandidatesParams {
            view: wanted,
            rows: self.at(self.plan.regions.rows),
            draws: self.at(self.plan.input.draws),
            logits,
            candidates: self.at(self.plan.regions.candidates),
            tokens: self.at(self.plan.regions.tokens),
            report: self.report(0),
            vocab,
            context: self.plan.sizes.context as u32,
        };
        let blocks = self.rows as u32 * vocab.div_ceil(CHUNK);
        self.launch(self.kernels.candidates, [blocks, 1, 1], 0, &params);
        let params = SampleParams {
            view: wanted,
            rows: self.at(self.plan.regions.rows),
            draws: self.at(self.plan.input.draws),
            candidates: self.at(self.plan.regions.candidates),
            drawn: self.at_output(self.plan.output.drawn),
            vocab,
            unused: 0,
        };
        self.launch(self.kernels.sample, [self.rows as u32, 1, 1], 0, &params);
        self.rows = rows;
        Ok(())
    }

    fn finish(mut self) -> Result<WorkList> {
        self.push(Work::Receive {
            to: self.places.output,
            from: self.places.buffer.at(self.plan.output_start),
            bytes: self.plan.output_bytes,
        });
        match self.refused {
            Some(error) => Err(error),
            None => Ok(self.list),
        }
    }

    // ---- Routing

    fn seats(&mut self, recursion: u32) {
        let h = self.model.hyperparameters();
        let params = SeatsParams {
            active: self.at(self.plan.regions.active),
            rows: self.at(self.plan.regions.rows),
            states: self.states(),
            kept: self.at(self.plan.input.kept),
            running: self.at(self.plan.regions.running),
            report: self.report(0),
            recursions: h.recursions as u32,
            recursion,
            routed: u32::from(h.router.is_some()),
            unused: 0,
        };
        self.launch(self.kernels.seats, [1, 1, 1], 0, &params);
    }

    /// Whether each recursion's routers are one layer in single precision, with one score.
    fn routers_are_linear(&self) -> bool {
        let h = self.model.hyperparameters();
        let expert = h.is_expert_choice();
        let linear = |r: &Router| {
            r.second.is_none() && r.first.weight.ty == TensorType::F32 && r.outputs() == 1
        };
        expert
            && (0..h.recursions).all(|r| {
                linear(self.model.router(r)) && self.model.auxiliary_router(r).is_none_or(linear)
            })
    }

    /// Such routers' scores of rows that may stand before different recursions.
    fn score_linear(&mut self, view: View, spec: &RouterSpec) -> Result<()> {
        let model = self.model;
        self.score_by(view, spec, self.plan.regions.scores, |r| {
            Some(model.router(r))
        })?;
        match model.auxiliary_router(0) {
            Some(_) => self.score_by(view, spec, self.plan.regions.aux_scores, |r| {
                model.auxiliary_router(r)
            }),
            None => Ok(()),
        }
    }

    /// Scores of each row by the router of the recursion before which it stands.
    fn score_by(
        &mut self,
        view: View,
        spec: &RouterSpec,
        to: Region,
        router: impl Fn(usize) -> Option<&'a Router>,
    ) -> Result<()> {
        let h = self.model.hyperparameters();
        let mut params = ScoreParams {
            view,
            rows: self.at(self.plan.regions.rows),
            h: self.at(self.plan.regions.h),
            scores: self.at(to),
            weights: [0; _],
            width: h.hidden_size as u32,
            temperature: spec.temperature,
        };
        for (r, weights) in params.weights[..h.recursions].iter_mut().enumerate() {
            if let Some(router) = router(r) {
                *weights = self.weights.at(router.first.weight.offset)?;
            }
        }
        self.launch(self.kernels.score, [self.rows as u32, 1, 1], 0, &params);
        Ok(())
    }

    /// A router's scores of some rows, by slot.
    fn score(&mut self, view: View, recursion: usize, spec: &RouterSpec) -> Result<()> {
        if self.routers_are_linear() {
            return self.score_linear(view, spec);
        }
        let model = self.model;
        self.router(
            view,
            model.router(recursion),
            spec,
            self.plan.regions.scores,
        )?;
        match model.auxiliary_router(recursion) {
            Some(auxiliary) => self.router(view, auxiliary, spec, self.plan.regions.aux_scores),
            None => Ok(()),
        }
    }

    fn router(&mut self, view: View, router: &Router, spec: &RouterSpec, to: Region) -> Result<()> {
        let h = self.at(self.plan.regions.h);
        let scaled = Source {
            number: spec.temperature,
            ..Source::new(make::SCALED, h)
        };
        let Some(second) = &router.second else {
            return self.score_product(scaled, &router.first, view, to);
        };
        let hidden = self.at(self.plan.regions.router_hidden);
        let first = self.output(&router.first, hidden)?;
        self.product(scaled, &[first], view);
        self.score_product(Source::new(make::GELU, hidden), second, view, to)
    }

    fn score_product(
        &mut self,
        source: Source,
        linear: &Linear,
        view: View,
        to: Region,
    ) -> Result<()> {
        let mut scores = self.output(linear, self.at(to))?;
        scores.by_slot = 1;
        self.product(source, &[scores], view);
        Ok(())
    }

    /// Who of some rows goes on; `recursion` is for sessions, whose rows stand before the same.
    fn decide(
        &mut self,
        view: View,
        recursion: usize,
        spec: &RouterSpec,
        choose: bool,
    ) -> Result<()> {
        let h = self.model.hyperparameters();
        let model = self.model;
        let bias = model.router(0).pick_bias.as_ref();
        let bias = bias.map(|bias| self.weights.at(bias.offset)).transpose()?;
        let auxiliary = model.auxiliary_router(0).is_some();
        let params = DecideParams {
            view,
            active: self.at(self.plan.regions.active),
            waiting: self.at(self.plan.regions.waiting),
            flags: self.at(self.plan.regions.flags),
            input: self.at(self.plan.input.head),
            rows: self.at(self.plan.regions.rows),
            states: self.states(),
            scores: self.at(self.plan.regions.scores),
            deciding_scores: match auxiliary {
                true => self.at(self.plan.regions.aux_scores),
                false => 0,
            },
            pick_bias: bias.unwrap_or(0),
            report: self.report(0),
            capacity: spec.capacities.get(recursion).copied().unwrap_or(1.0),
            kind: match spec.kind {
                RouterKind::Expert => 1,
                RouterKind::Token => 2,
            },
            function: match spec.function {
                RouterFunction::Sigmoid => 0,
                RouterFunction::Tanh => 1,
                RouterFunction::Softmax => 2,
                RouterFunction::Identity => 3,
            },
            alpha: spec.alpha,
            weighted: u32::from(spec.weighted),
            outputs: model.router(0).outputs() as u32,
            choose: u32::from(choose),
            keys_for_all: u32::from(h.kv == KvStrategy::Shared),
            unused: 0,
        };
        self.launch(self.kernels.decide, [1, 1, 1], 0, &params);
        Ok(())
    }

    fn merge(&mut self, view: View) {
        let h = self.model.hyperparameters();
        let expert = h.is_expert_choice();
        let params = MergeParams {
            view,
            rows: self.at(self.plan.regions.rows),
            states: self.states(),
            x: self.at(self.plan.regions.x),
            h: self.at(self.plan.regions.h),
            width: h.hidden_size as u32,
            follow: u32::from(expert),
        };
        self.launch(self.kernels.merge, [self.rows as u32, 1, 1], 0, &params);
    }

    fn copy_rows(&mut self, view: View, from: Region, to: Region) {
        let params = CopyRowsParams {
            view,
            from: self.at(from),
            to: self.at(to),
            width: self.model.hyperparameters().hidden_size as u32,
            unused: 0,
        };
        self.launch(self.kernels.copy_rows, [self.rows as u32, 1, 1], 0, &params);
    }

    // ---- Places

    pub(super) fn at(&self, region: Region) -> Address {
        self.places.buffer.at(region.offset)
    }

    fn at_output(&self, region: Region) -> Address {
        let start = self.plan.output_start;
        self.places.buffer.at(start + region.offset)
    }

    /// The report, from its field number `field` on.
    pub(super) fn report(&self, field: usize) -> Address {
        self.at_output(self.plan.output.report) + 4 * field as Address
    }

    pub(super) fn states(&self) -> Address {
        self.at_output(self.plan.output.states)
    }

    pub(super) fn prepared(&self, columns: usize) -> Prepared {
        Prepared {
            floats: self.at(self.plan.regions.floats),
            halves: self.at(self.plan.regions.halves),
            scales: self.at(self.plan.regions.scales),
            factors: self.at(self.plan.regions.factors),
            sums: self.at(self.plan.regions.sums),
            columns: columns as u32,
            stride: (columns as u32).next_multiple_of(GROUP),
        }
    }

    fn active(&self) -> View {
        View {
            slots: self.at(self.plan.regions.active),
            count: self.report(0),
        }
    }

    fn running(&self) -> View {
        View {
            slots: self.at(self.plan.regions.running),
            count: self.report(4),
        }
    }

    pub(super) fn launch<P: Parameter>(
        &mut self,
        function: Function<P>,
        grid: [u32; 3],
        shared: u32,
        parameter: &P,
    ) {
        self.launch_blocks_of(BLOCK, function, grid, shared, parameter);
    }

    /// The same with so many threads a block.
    pub(super) fn launch_blocks_of<P: Parameter>(
        &mut self,
        threads: u32,
        function: Function<P>,
        grid: [u32; 3],
        shared: u32,
        parameter: &P,
    ) {
        let outcome = self.list.launch(function, grid, threads, shared, parameter);
        self.note(outcome);
    }

    fn push(&mut self, piece: Work) {
        let outcome = self.list.push(piece);
        self.note(outcome);
    }

    pub(super) fn note(&mut self, outcome: Result<()>) {
        self.refused = self.refused.take().or(outcome.err());
    }
}

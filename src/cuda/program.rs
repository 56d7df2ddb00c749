//! What a pass does on the device, written down once as a list of launches.
//!
//! It follows `src/cpu/forward.rs`. Rows stay in their slots; how many of them run is known on the device
//! only, so that every launch is large enough for all and blocks without a row end at once.

use super::Kind;
use super::driver::{Address, Device};
use super::launch::{Function, Launch, Module, Program, Work};
use super::memory::Buffer;
use super::params::*;
use super::plan::DevicePlan;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::kv::{KvShape, KvType};
use crate::memory::reserved;
use crate::model::{
    Keys, KvStrategy, LayerRun, Linear, Model, Router, RouterFunction, RouterKind, RouterSpec,
    Stage,
};
use crate::plan::Region;
use crate::quant::TensorType;
use std::ffi::CStr;

/// The kernels by name.
pub(super) struct Kernels {
    begin: Function<BeginParams>,
    embed: Function<EmbedParams>,
    copy_rows: Function<CopyRowsParams>,
    /// By what the rows are made of (`make`); none where products take floats only.
    ready: Option<[Function<ReadyParams>; 6]>,
    pub(super) floats: Function<ReadyParams>,
    /// By tensor cores, for each type of matrices that the model has.
    products: Vec<(u32, Products)>,
    /// In single precision, with matrices of any type and of F32 only: for one row, which it makes ready, and for
    /// up to `FEW` a block.
    pub(super) lone_exact: [Function<ProductParams>; 2],
    pub(super) exact: [Function<ProductParams>; 2],
    pub(super) store: ByCache<StoreParams>,
    pub(super) attention: ByCache<AttentionParams>,
    seats: Function<SeatsParams>,
    score: Function<ScoreParams>,
    select: Function<SelectParams>,
    decide: Function<DecideParams>,
    merge: Function<MergeParams>,
    leave: Function<LeaveParams>,
    candidates: Function<CandidatesParams>,
    sample: Function<SampleParams>,
    /// Where the driver has conditional nodes.
    condition: Option<Function<ConditionParams>>,
}

/// A kernel for each type of cache.
pub(super) struct ByCache<P> {
    f32: Function<P>,
    f16: Function<P>,
    q8_0: Function<P>,
}

impl<P> ByCache<P> {
    pub fn of(&self, ty: KvType) -> Function<P> {
        match ty {
            KvType::F32 => self.f32,
            KvType::F16 => self.f16,
            KvType::Q8_0 => self.q8_0,
        }
    }
}

/// Kernels of products by tensor cores with matrices of one type.
#[derive(Clone, Copy)]
pub(super) struct Products {
    /// For one row, which it makes ready, out of `NORM`, `PLAIN` or `ATTENTION`.
    pub lone_norm: Function<ProductParams>,
    pub lone_plain: Function<ProductParams>,
    pub lone_attention: Function<ProductParams>,
    /// The same of a norm, with a gate and what it lets through.
    pub lone_swiglu: Function<ProductParams>,
    /// For up to `FEW` rows a block, and for up to `MANY`.
    pub few: Function<ProductParams>,
    pub many: Function<ProductParams>,
    /// For more rows, where so many blocks are enough, from the smallest blocks on.
    pub wide: [WideProduct; 3],
}

/// A product for blocks of some tiles and some rows of activations.
#[derive(Clone, Copy)]
pub(super) struct WideProduct {
    pub function: Function<ProductParams>,
    pub tiles: u32,
    pub rows: u32,
    /// What a block takes for a group of columns (src/cuda/kernels/wide.cuh), to compare with others.
    pub cycles: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

impl WideProduct {
    /// As `Wide` in src/cuda/kernels/wide.cuh.
    fn shared(device: &Device, ty: TensorType, tiles: u32, rows: u32) -> usize {
        let most = match (device.architecture, rows) {
            (90, 128) => 208 << 10,
            (90, _) => 112 << 10,
            _ => 99 << 10,
        };
        let (tiles, rows) = (tiles as usize, rows as usize);
        let columns = (WIDE_GROUPS * GROUP) as usize;
        let (unit, all_rows) = (ty.block_len().max(columns), tiles * TILE_ROWS as usize);
        let weights = all_rows * (unit / ty.block_len() * ty.block_bytes());
        let sources = if ty.block_len() == 1 { all_rows } else { tiles };
        let activations = rows * (2 * columns + if has_min(ty.gguf_id()) { 12 } else { 4 });
        let bytes = |stages| {
            let units = if unit == columns { stages } else { 2 };
            8 * sources + units * weights + stages * activations
        };
        let stages = if unit == columns { 3..=6 } else { 3..=5 };
        let fits = stages.rev().find(|stages| bytes(*stages) <= most);
        bytes(fits.unwrap_or(2))
    }
}

impl Products {
    fn find(device: &Device, module: &Module, ty: TensorType) -> Result<Self> {
        let find = |kind: &str| {
            let name = format!("mor_{kind}_{}\0", ty.name().to_lowercase());
            let name = CStr::from_bytes_with_nul(name.as_bytes());
            module.function(name.map_err(|_| Error::device("a kernel's name"))?)
        };
        let wide = |kind: &str, tiles, rows, cycles| {
            Ok(WideProduct {
                function: find(kind)?,
                tiles,
                rows,
                cycles,
                shared: WideProduct::shared(device, ty, tiles, rows),
            })
        };
        Ok(Products {
            lone_norm: find("lone_product_norm")?,
            lone_plain: find("lone_product_plain")?,
            lone_attention: find("lone_product_attention")?,
            lone_swiglu: find("lone_swiglu")?,
            few: find("few_product")?,
            many: find("many_product")?,
            wide: [
                wide("wide_product_64x64", 4, 64, 256)?,
                wide("wide_product_128x64", 8, 64, 352)?,
                wide("wide_product_128x128", 8, 128, 512)?,
            ],
        })
    }

    /// The kernels that make a row ready, which takes shared memory.
    fn lone(&self) -> [Function<ProductParams>; 4] {
        [
            self.lone_norm,
            self.lone_plain,
            self.lone_attention,
            self.lone_swiglu,
        ]
    }
}

/// Bytes of dynamic shared memory for a row in single precision. Every device from 7.0 on has so much for a block,
/// beside what the kernel declares.
pub(super) const MOST_SHARED: usize = 56 << 10;

impl Kernels {
    /// The kernels that a model needs on a device.
    pub fn find(weights: &Weights, conditional: Option<&Module>) -> Result<Self> {
        let module = &weights.module;
        let (mut ready, mut products) = (None, reserved(weights.types.len())?);
        if weights.device.has_tensor_cores() {
            let find = |name: &CStr| module.function(name);
            ready = Some([
                find(c"mor_ready_norm")?,
                find(c"mor_ready_scaled")?,
                find(c"mor_ready_gelu")?,
                find(c"mor_ready_swiglu")?,
                find(c"mor_ready_plain")?,
                find(c"mor_ready_attention")?,
            ]);
            for ty in weights.types.iter().filter(|ty| **ty != TensorType::F32) {
                products.push((ty.gguf_id(), Products::find(&weights.device, module, *ty)?));
            }
        }
        Ok(Kernels {
            begin: module.function(c"mor_begin")?,
            embed: module.function(c"mor_embed")?,
            copy_rows: module.function(c"mor_copy_rows")?,
            ready,
            floats: module.function(c"mor_floats")?,
            products,
            lone_exact: [
                module.function(c"mor_lone_exact")?,
                module.function(c"mor_lone_exact_f32")?,
            ],
            exact: [
                module.function(c"mor_exact")?,
                module.function(c"mor_exact_f32")?,
            ],
            store: ByCache {
                f32: module.function(c"mor_store_f32")?,
                f16: module.function(c"mor_store_f16")?,
                q8_0: module.function(c"mor_store_q8_0")?,
            },
            attention: ByCache {
                f32: module.function(c"mor_attention_f32")?,
                f16: module.function(c"mor_attention_f16")?,
                q8_0: module.function(c"mor_attention_q8_0")?,
            },
            seats: module.function(c"mor_seats")?,
            score: module.function(c"mor_score")?,
            select: module.function(c"mor_select")?,
            decide: module.function(c"mor_decide")?,
            merge: module.function(c"mor_merge")?,
            leave: module.function(c"mor_leave")?,
            candidates: module.function(c"mor_candidates")?,
            sample: module.function(c"mor_sample")?,
            condition: match conditional {
                Some(module) => Some(module.function(c"mor_condition")?),
                None => None,
            },
        })
    }

    /// Bytes of shared memory that attention takes: `Room` in attention_floats.cuh or, which is more, `Tile`
    /// in attention_halves.cuh.
    pub(super) fn attention_shared(head_dim: usize) -> usize {
        /// Elements of a head that are taken together.
        const ELEMENTS: usize = 64;
        let warps = BLOCK as usize / 32;
        let queries = head_dim.next_multiple_of(ELEMENTS) / 16 * 32 * 16;
        let scales = 2 * 4 * warps * warps;
        queries + scales + 4 * warps * warps * (ELEMENTS + 8)
    }

    /// By tensor cores: the kernel that makes rows ready out of what `make` says, and those of products with
    /// matrices of a type.
    pub(super) fn by_tensor_cores(
        &self,
        make: u32,
        ty: u32,
    ) -> Option<(Function<ReadyParams>, &Products)> {
        let ready = self.ready.as_ref()?.get(make as usize)?;
        let (_, products) = self.products.iter().find(|(of, _)| *of == ty)?;
        Some((*ready, products))
    }

    /// Lets the kernels have what a model needs.
    pub fn prepare(&self, weights: &Weights, head_dim: usize) -> Result<()> {
        let module = &weights.module;
        for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
            module.allow_shared_memory(self.attention.of(ty), Self::attention_shared(head_dim))?;
        }
        for exact in self.lone_exact {
            module.allow_shared_memory(exact, MOST_SHARED)?;
        }
        for (_, products) in &self.products {
            for lone in products.lone() {
                module.allow_shared_memory(lone, weights.device.product_shared())?;
            }
            for product in [products.few, products.many] {
                module.allow_shared_memory(product, weights.device.product_shared())?;
            }
            for wide in products.wide {
                module.allow_shared_memory(wide.function, wide.shared)?;
            }
        }
        Ok(())
    }
}

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
    /// The slot of a lone row, if it is known.
    pub slot: u32,
    pub work: Vec<Work>,
}

impl<'a> Writer<'a> {
    /// A pass of a session: all rows enter, take their recursions and leave.
    pub fn session(mut self, program: &mut Program) -> Result<Vec<Work>> {
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
            // Whether anybody is left was decided just before.
            let condition = program.condition()?;
            if let (Some(kernel), true) = (self.kernels.condition, condition.0 != 0) {
                let report = self.report(0);
                let params = ConditionParams {
                    report,
                    condition: condition.0,
                };
                let launch = Launch::new(kernel, [1, 1, 1], 1, 0, &params);
                self.work.push(Work::Launch(launch));
            }
            let before = std::mem::take(&mut self.work);
            self.recursion(stage)?;
            let work = std::mem::replace(&mut self.work, before);
            self.work.push(Work::When { condition, work });
        }
        self.leave()?;
        self.finish();
        Ok(self.work)
    }

    /// A tick of a batch: some rows enter, all in the recursions take their next one, those that can
    /// leave.
    pub fn tick(mut self) -> Result<Vec<Work>> {
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
        self.finish();
        Ok(self.work)
    }

    /// Logits of rows that stand in their slots, after their last layers.
    pub fn logits_only(mut self) -> Result<Vec<Work>> {
        self.begin();
        self.logits()?;
        self.finish();
        Ok(self.work)
    }

    // ---- The parts of a pass

    fn begin(&mut self) {
        let input = self.plan.input;
        self.work.push(Work::Send {
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
            tables: self.at(self.plan.tables),
            rows: self.at(self.plan.rows),
            states: self.states(),
            entering: self.at(self.plan.entering),
            active: self.at(self.plan.active),
            waiting: self.at(self.plan.waiting),
            wanted: self.at(self.plan.wanted),
            report: self.report(0),
            tokens: self.at(self.plan.tokens),
            context: self.plan.sizes.context as u32,
            unused: 0,
        };
        self.launch(self.kernels.begin, [1, 1, 1], 0, &params);
    }

    /// Own first layers of the rows that enter, and who of them goes on.
    fn enter(&mut self) -> Result<()> {
        self.begin();
        let (model, h) = (self.model, self.model.hyperparameters());
        let entering = View {
            slots: self.at(self.plan.entering),
            count: self.report(7),
        };
        let mut embedding = self.matrix(&Linear {
            weight: *model.token_embedding(),
            bias: None,
        })?;
        embedding.out = 0;
        let factors = match model.rope_factors() {
            Some(_) => self.at(self.plan.rope_factors),
            None => 0,
        };
        let params = EmbedParams {
            view: entering,
            rows: self.at(self.plan.rows),
            embedding,
            h: self.at(self.plan.h),
            rope: self.at(self.plan.rope),
            factors,
            base: h.rope.base,
            scale: h.rope.scale,
            pairs: (h.rope.dims / 2) as u32,
            unused: 0,
        };
        self.launch(self.kernels.embed, [self.rows as u32, 1, 1], 0, &params);
        let h_rows = self.at(self.plan.h);
        for run in &model.schedule().prelude {
            let planes = self.planes(|_| Some(run), 0);
            self.layer(model.layer(run.layer), entering, &planes, h_rows, true)?;
        }
        self.copy_rows(entering, self.plan.h, self.plan.x);
        match &h.router {
            None => Ok(()),
            Some(spec) => {
                let choose = spec.kind == RouterKind::Token;
                self.score(entering, 0, spec)?;
                self.decide(entering, 0, spec, choose);
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
        self.decide(self.active(), next, spec, false);
        Ok(())
    }

    /// The layers of a block on the rows that run.
    fn block(&mut self, runs: &'a [LayerRun], recursion: u32) -> Result<()> {
        let (model, h) = (self.model, self.at(self.plan.h));
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
        if self.routers_are_linear() {
            self.score_linear(self.active(), spec)?;
        } else if spec.kind == RouterKind::Expert {
            for recursion in 1..h.recursions {
                let params = SelectParams {
                    active: self.at(self.plan.active),
                    rows: self.at(self.plan.rows),
                    selected: self.at(self.plan.selected),
                    count: self.at(self.plan.selected_count),
                    report: self.report(0),
                    recursion: recursion as u32,
                    unused: 0,
                };
                self.launch(self.kernels.select, [1, 1, 1], 0, &params);
                let selected = View {
                    slots: self.at(self.plan.selected),
                    count: self.at(self.plan.selected_count),
                };
                self.score(selected, recursion, spec)?;
            }
        }
        self.decide(self.active(), 1, spec, false);
        Ok(())
    }

    /// Own last layers of rows that have left, then logits of those whose logits are wanted.
    fn leave(&mut self) -> Result<()> {
        let h = self.model.hyperparameters();
        let routed = h.router.is_some();
        if !routed {
            self.copy_rows(self.active(), self.plan.h, self.plan.x);
        }
        let params = LeaveParams {
            active: self.at(self.plan.active),
            waiting: self.at(self.plan.waiting),
            flags: self.at(self.plan.flags),
            ready: self.at(self.plan.ready),
            wanted: self.at(self.plan.wanted),
            rows: self.at(self.plan.rows),
            states: self.states(),
            report: self.report(0),
            recursions: h.recursions as u32,
            routed: u32::from(routed),
            most: self.rows as u32,
            unused: 0,
        };
        self.launch(self.kernels.leave, [1, 1, 1], 0, &params);
        let ready = View {
            slots: self.at(self.plan.ready),
            count: self.report(2),
        };
        let x = self.at(self.plan.x);
        for run in &self.model.schedule().coda {
            let planes = self.planes(|_| Some(run), 0);
            self.layer(self.model.layer(run.layer), ready, &planes, x, true)?;
        }
        self.logits()
    }

    fn logits(&mut self) -> Result<()> {
        let (model, h) = (self.model, self.model.hyperparameters());
        let wanted = View {
            slots: self.at(self.plan.wanted),
            count: self.report(3),
        };
        let rows = self.rows;
        self.rows = rows.min(self.plan.sizes.logit_rows);
        let source = self.norm(self.at(self.plan.x), model.output_norm())?;
        let logits = self.at(self.plan.logits);
        let output = self.output(&model.output(), logits)?;
        self.product(source, &[output], wanted);
        let vocab = h.vocab_size as u32;
        let params = CandidatesParams {
            view: wanted,
            rows: self.at(self.plan.rows),
            draws: self.at(self.plan.input.draws),
            logits,
            candidates: self.at(self.plan.candidates),
            tokens: self.at(self.plan.tokens),
            report: self.report(0),
            vocab,
            context: self.plan.sizes.context as u32,
        };
        let grid = [self.rows as u32, vocab.div_ceil(CHUNK), 1];
        self.launch(self.kernels.candidates, grid, 0, &params);
        let params = SampleParams {
            view: wanted,
            rows: self.at(self.plan.rows),
            draws: self.at(self.plan.input.draws),
            candidates: self.at(self.plan.candidates),
            drawn: self.at_output(self.plan.output.drawn),
            vocab,
            unused: 0,
        };
        self.launch(self.kernels.sample, [self.rows as u32, 1, 1], 0, &params);
        self.rows = rows;
        Ok(())
    }

    fn finish(&mut self) {
        self.work.push(Work::Receive {
            to: self.places.output,
            from: self.places.buffer.at(self.plan.output.start),
            bytes: self.plan.output_bytes,
        });
    }

    // ---- Routing

    fn seats(&mut self, recursion: u32) {
        let h = self.model.hyperparameters();
        let params = SeatsParams {
            active: self.at(self.plan.active),
            rows: self.at(self.plan.rows),
            states: self.states(),
            kept: self.at(self.plan.input.kept),
            running: self.at(self.plan.running),
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
        let expert = h
            .router
            .as_ref()
            .is_some_and(|r| r.kind == RouterKind::Expert);
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
        let (model, h) = (self.model, self.model.hyperparameters());
        let mut params = ScoreParams {
            view,
            rows: self.at(self.plan.rows),
            h: self.at(self.plan.h),
            scores: self.at(self.plan.scores),
            weights: [0; _],
            width: h.hidden_size as u32,
            temperature: spec.temperature,
        };
        for (r, weights) in params.weights[..h.recursions].iter_mut().enumerate() {
            *weights = self.weights.at(model.router(r).first.weight.offset)?;
        }
        self.launch(self.kernels.score, [self.rows as u32, 1, 1], 0, &params);
        if model.auxiliary_router(0).is_some() {
            params.scores = self.at(self.plan.aux_scores);
            for (r, weights) in params.weights[..h.recursions].iter_mut().enumerate() {
                *weights = match model.auxiliary_router(r) {
                    Some(router) => self.weights.at(router.first.weight.offset)?,
                    None => 0,
                };
            }
            self.launch(self.kernels.score, [self.rows as u32, 1, 1], 0, &params);
        }
        Ok(())
    }

    /// A router's scores of some rows, by slot.
    fn score(&mut self, view: View, recursion: usize, spec: &RouterSpec) -> Result<()> {
        if self.routers_are_linear() {
            return self.score_linear(view, spec);
        }
        let model = self.model;
        self.router(view, model.router(recursion), spec, self.plan.scores)?;
        match model.auxiliary_router(recursion) {
            Some(auxiliary) => self.router(view, auxiliary, spec, self.plan.aux_scores),
            None => Ok(()),
        }
    }

    fn router(&mut self, view: View, router: &Router, spec: &RouterSpec, to: Region) -> Result<()> {
        let h = self.at(self.plan.h);
        let scaled = Source {
            number: spec.temperature,
            ..Source::new(make::SCALED, h)
        };
        let Some(second) = &router.second else {
            return self.score_product(scaled, &router.first, view, to);
        };
        let hidden = self.at(self.plan.router_hidden);
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
    fn decide(&mut self, view: View, recursion: usize, spec: &RouterSpec, choose: bool) {
        let h = self.model.hyperparameters();
        let model = self.model;
        let bias = model.router(0).pick_bias.as_ref();
        let bias = bias.and_then(|bias| self.weights.at(bias.offset).ok());
        let auxiliary = model.auxiliary_router(0).is_some();
        let params = DecideParams {
            view,
            active: self.at(self.plan.active),
            waiting: self.at(self.plan.waiting),
            flags: self.at(self.plan.flags),
            input: self.at(self.plan.input.head),
            rows: self.at(self.plan.rows),
            states: self.states(),
            scores: self.at(self.plan.scores),
            deciding_scores: match auxiliary {
                true => self.at(self.plan.aux_scores),
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
    }

    fn merge(&mut self, view: View) {
        let h = self.model.hyperparameters();
        let expert = h
            .router
            .as_ref()
            .is_some_and(|r| r.kind == RouterKind::Expert);
        let params = MergeParams {
            view,
            rows: self.at(self.plan.rows),
            states: self.states(),
            x: self.at(self.plan.x),
            h: self.at(self.plan.h),
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
        let start = self.plan.output.start;
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
            floats: self.at(self.plan.floats),
            halves: self.at(self.plan.halves),
            scales: self.at(self.plan.scales),
            factors: self.at(self.plan.factors),
            sums: self.at(self.plan.sums),
            columns: columns as u32,
            stride: (columns as u32).next_multiple_of(GROUP),
        }
    }

    fn active(&self) -> View {
        View {
            slots: self.at(self.plan.active),
            count: self.report(0),
        }
    }

    fn running(&self) -> View {
        View {
            slots: self.at(self.plan.running),
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
        let launch = Launch::new(function, grid, BLOCK, shared, parameter);
        self.work.push(Work::Launch(launch));
    }
}

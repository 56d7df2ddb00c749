//! The same step on an NVIDIA GPU. docs/cuda.md tells the whole story.
//!
//! The host sends rows, the device runs them through all layers, decides on its own who goes on, and
//! answers with depths and drawn tokens: one launch a pass. The page tables' bookkeeping stays on the host
//! ([`crate::kv`]): before a launch every row gets the pages that it may need, after it those that nobody
//! used are free again.

mod driver;
mod functions;
mod images;
mod launch;
mod layer;
mod memory;
mod params;
mod plan;
mod product;
mod program;
mod session;
mod weights;

pub(crate) use plan::{DevicePlan, Sizes};
pub(crate) use weights::Weights;

use crate::error::{Error, Result};
use crate::kv::{KvCache, KvType, Taken};
use crate::layout::Region;
use crate::memory::{Shared, reserved};
use crate::model::{KvStrategy, Model, PlaneTokens};
use crate::plan::Plan;
use crate::routing::{self, Routing};
use crate::sampling::Sampler;
use crate::text::Text;
use functions::Kernels;
use launch::{Module, Program, WorkList};
use memory::{Buffer, Pinned};
use params::*;
use program::{Places, Writer};
use std::mem::size_of;

/// A row that is to enter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewRow {
    pub slot: u32,
    pub sequence: u32,
    pub position: u32,
    pub token: u32,
    /// The least score with which it goes on, and the most recursions.
    pub least_score: f32,
    pub depth_limit: usize,
    pub wants_logits: bool,
}

/// Where a row is after a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    InRecursions,
    /// It has left them and waits for rows before it.
    Waiting,
    /// It has passed all layers; what follows it was drawn if that was wanted.
    Done,
}

/// What a launch is for.
pub(crate) struct Pass<'a> {
    /// Slots of the rows in the recursions, and of those that wait.
    pub active: &'a [u32],
    pub waiting: &'a [u32],
    /// No two of all rows are of one sequence.
    pub apart: bool,
    pub routing: Routing,
}

/// A program for passes of up to so many rows.
struct PassProgram {
    rows: usize,
    /// For those only whose rows are apart ([`Pass::apart`]); one row is.
    apart: bool,
    program: Program,
}

/// A session's or batch's part of a device.
pub(crate) struct Gpu {
    // In the order in which they must go.
    /// In the order in which they are looked through.
    programs: Vec<PassProgram>,
    logits: Program,
    input: Pinned,
    output: Pinned,
    buffer: Buffer,
    plan: DevicePlan,
    /// How keys and values are stored.
    kv: KvType,
    _conditional: Option<Module>,
    /// The kernels' module, and what they read.
    _weights: Shared<Weights>,
    /// Places of the page tables that the next launch changes; after one that failed they are still there.
    changed: Vec<u32>,
    /// Room for the rows of a pass.
    new_rows: Vec<NewRow>,
    /// [`session::kept_planes`].
    kept_planes: Vec<Option<usize>>,
    /// The slot of the row that the last launch stumbled over.
    culprit: Option<u32>,
    vocab: usize,
    // Sessions only: the slot of the last token's row, and whether the next launch puts it aside first; of which
    // slot the device has logits; whether it drew what follows the last token, and where the sampler stood.
    last_row: u32,
    puts_aside: bool,
    logits_slot: Option<u32>,
    draws: bool,
    drawn_by: Option<u64>,
}

/// Which passes a device is made ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All rows take all their recursions at once.
    Session,
    /// Each launch is one recursion of each row.
    Batch,
}

impl Gpu {
    pub fn new(model: &Model, plan: &Plan, kind: Kind) -> Result<Self> {
        let (Some(weights), Some(device_plan)) = (model.on_device(), plan.on_device()) else {
            return Err(Error::argument("the plan was made for another device"));
        };
        let device = &weights.device;
        // A driver that refuses the module has no conditions; the kernels then find nothing to do.
        let conditional = match device.has_conditionals() {
            true => Module::new(device, images::conditional(), false).ok(),
            false => None,
        };
        let kernels = Kernels::find(weights, conditional.as_ref())?;
        let h = model.hyperparameters();
        kernels.prepare(weights, h.head_dim)?;
        let mut buffer = Buffer::new(device, device_plan.bytes)?;
        // Copies take the whole output and whole pages, whatever of them was written.
        buffer.clear()?;
        if let Some(factors) = model.rope_factors() {
            let bytes = factors.bytes(model.bytes()).as_flattened();
            buffer.write(device_plan.regions.rope_factors.offset, bytes)?;
        }
        let input = Pinned::new(device, device_plan.input_bytes)?;
        let mut output = Pinned::new(device, device_plan.output_bytes)?;
        let places = Places {
            buffer: &buffer,
            input: input.bytes().as_ptr(),
            output: output.bytes_mut().as_mut_ptr(),
        };
        let writer = |rows: usize, apart: bool| Writer {
            model,
            weights,
            kernels: &kernels,
            plan: device_plan,
            kv: &plan.kv_shape,
            places,
            kind,
            rows,
            apart,
            slot: ANY_SLOT,
            list: WorkList::default(),
            refused: None,
        };
        let mut programs = reserved(2 * MAX_SIZES)?;
        for rows in program_sizes(device_plan.sizes.rows) {
            // A lone row always is apart; several of a session never are.
            let kinds: &[bool] = match kind {
                Kind::Batch if rows > 1 => &[true, false],
                _ => &[rows == 1],
            };
            for &apart in kinds {
                let mut program = Program::new(device)?;
                let work = match kind {
                    Kind::Session => writer(rows, apart).session(&mut program)?,
                    Kind::Batch => writer(rows, apart).tick()?,
                };
                // SAFETY: all addresses lie in `buffer` and the pinned memory, which go after the programs.
                unsafe { program.set(work) }?;
                programs.push(PassProgram {
                    rows,
                    apart: apart && rows > 1,
                    program,
                });
            }
        }
        let mut logits = Program::new(device)?;
        let work = writer(device_plan.sizes.rows, false).logits_only()?;
        // SAFETY: as above.
        unsafe { logits.set(work) }?;
        let mut gpu = Gpu {
            programs,
            logits,
            input,
            output,
            buffer,
            plan: device_plan.clone(),
            kv: plan.kv_shape.ty,
            _conditional: conditional,
            _weights: weights.clone(),
            changed: reserved(device_plan.changes)?,
            new_rows: reserved(device_plan.sizes.rows)?,
            kept_planes: session::kept_planes(model)?,
            culprit: None,
            vocab: h.vocab_size,
            last_row: 0,
            puts_aside: false,
            logits_slot: None,
            draws: false,
            drawn_by: None,
        };
        // Once without any row: what the driver takes on a first launch, it takes now.
        for of_rows in &mut gpu.programs {
            of_rows.program.run()?;
        }
        gpu.logits.run()?;
        Ok(gpu)
    }

    /// The rows that enter with the next pass.
    pub fn set_new_rows(&mut self, rows: impl Iterator<Item = NewRow>) {
        self.new_rows.clear();
        self.new_rows.extend(rows);
    }

    /// Whether the device draws for a sampler.
    pub fn draws(sampler: &Sampler) -> bool {
        draw_of(sampler).is_some()
    }

    /// How the next token of a sequence is drawn. False: by the host, from its logits.
    pub fn set_draw(&mut self, sequence: usize, sampler: &Sampler) -> bool {
        let draw = draw_of(sampler);
        self.drawn_by = Some(sampler.state());
        let value = draw.unwrap_or(Draw {
            random: 0.0,
            repeat_penalty: 1.0,
            repeat_last_n: 0,
            candidates: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 1.0,
        });
        self.put(self.plan.input.draws, sequence, value);
        draw.is_some()
    }

    /// Gives a list entries, as [`KvCache::append`] one, and their pages to the device.
    pub fn reserve(&mut self, kv: &mut KvCache, list: usize, entries: usize) -> Result<()> {
        let end = kv.length(list) + entries;
        while kv.length(list) < end {
            let taken = kv.take_entry(list)?;
            // A page that the device did not get is not the list's: nobody would send it again.
            if let Err(error) = self.send_page(kv, &taken) {
                kv.give_back(list, &taken);
                return Err(error);
            }
            kv.fill_page(list, end);
        }
        Ok(())
    }

    /// Gives the device the page of an entry, if it is new to its list.
    fn send_page(&mut self, kv: &KvCache, taken: &Taken) -> Result<()> {
        if let Some([from, to]) = taken.copied {
            let bytes = kv.shape.page_bytes();
            let page = |page: u32| self.plan.regions.pages.offset + page as usize * bytes;
            self.buffer.copy_within(page(from), page(to), bytes)?;
        }
        match taken.new_page {
            true => self.change(Change {
                index: taken.table as u32,
                page: kv.tables[taken.table],
            }),
            false => Ok(()),
        }
    }

    fn change(&mut self, change: Change) -> Result<()> {
        // A place that changed before, in a pass that never ran, changes once: the device applies all at
        // the same time.
        let same = self
            .changed
            .iter()
            .rposition(|place| *place == change.index);
        if let Some(at) = same {
            self.put(self.plan.input.changes, at, change);
            return Ok(());
        }
        if self.changed.len() < self.plan.changes {
            self.put(self.plan.input.changes, self.changed.len(), change);
            self.changed.push(change.index);
            return Ok(());
        }
        let at = self.plan.regions.tables.offset + 4 * change.index as usize;
        self.buffer.write(at, &change.page.to_le_bytes())
    }

    /// Gives the device a list's pages, which it has from elsewhere (a fork, a restored state).
    pub fn send_table(&mut self, kv: &KvCache, list: usize, entries: usize) -> Result<()> {
        let first = list * kv.shape.table_pages;
        for index in 0..entries.div_ceil(crate::kv::PAGE_TOKENS) {
            let page = kv.tables[first + index];
            self.change(Change {
                index: (first + index) as u32,
                page,
            })?;
        }
        Ok(())
    }

    /// Tells the device the tokens of a sequence that it did not run itself.
    pub fn send_tokens(&mut self, sequence: usize, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        let at = self.plan.regions.tokens.offset + 4 * sequence * self.plan.sizes.context;
        self.buffer.write(at, bytes_of(tokens))
    }

    /// Runs a pass and waits for it.
    pub fn run(&mut self, pass: &Pass) -> Result<()> {
        self.culprit = None;
        self.logits_slot = None;
        let aside = self.plan.sizes.slots as u32;
        let input = self.plan.input;
        let new = std::mem::take(&mut self.new_rows);
        for (i, row) in new.iter().enumerate() {
            let value = Row {
                sequence: row.sequence,
                position: row.position,
                token: row.token,
                recursion: 0,
                least_score: row.least_score,
                depth_limit: row.depth_limit as u32,
                wants_logits: u32::from(row.wants_logits),
                unused: 0,
            };
            self.put(input.new_rows, i, value);
            self.put(input.new_slots, i, row.slot);
        }
        let entering = new.len();
        self.new_rows = new;
        for (i, slot) in pass.active.iter().enumerate() {
            self.put(input.old_active, i, *slot);
        }
        for (i, slot) in pass.waiting.iter().enumerate() {
            self.put(input.old_waiting, i, *slot);
        }
        let head = Input {
            entering: entering as u32,
            flying: pass.active.len() as u32,
            waiting: pass.waiting.len() as u32,
            changes: self.changed.len() as u32,
            asked: 0,
            by_capacity: u32::from(pass.routing == Routing::Capacity),
            aside_from: if self.puts_aside {
                self.last_row
            } else {
                aside
            },
            aside_to: aside,
        };
        self.put(input.head, 0, head);
        // All that may leave together too, as far as the largest program goes.
        let running = entering + pass.active.len();
        let most = (running + pass.waiting.len()).min(self.plan.sizes.rows);
        let mut programs = self.programs.iter_mut();
        let program = &mut programs
            .find(|p| p.rows >= running.max(most) && (pass.apart || !p.apart))
            .ok_or_else(|| Error::argument("more rows than the pass was planned for"))?
            .program;
        let outcome = program.run();
        // The first kernel puts the row aside; those after it, of which one may have failed, overwrite it.
        if program.began() && std::mem::take(&mut self.puts_aside) {
            self.last_row = aside;
        }
        outcome?;
        self.changed.clear();
        self.check()
    }

    /// Computes logits of rows that passed all layers and whose slots nobody took since; draws too.
    pub fn compute_logits(&mut self, slots: &[u32]) -> Result<()> {
        let head = Input {
            entering: 0,
            flying: 0,
            waiting: 0,
            changes: self.changed.len() as u32,
            asked: slots.len() as u32,
            by_capacity: 0,
            aside_from: 0,
            aside_to: 0,
        };
        self.logits_slot = None;
        self.put(self.plan.input.head, 0, head);
        for (i, slot) in slots.iter().enumerate() {
            self.put(self.plan.input.new_slots, i, *slot);
        }
        self.logits.run()?;
        self.changed.clear();
        self.check()?;
        self.logits_slot = slots.first().copied();
        Ok(())
    }

    /// What the device said went wrong.
    fn check(&mut self) -> Result<()> {
        let report = self.get::<Report>(self.plan.output.report, 0);
        self.culprit = (report.error != error::NONE).then_some(report.culprit);
        match report.error {
            error::NONE => Ok(()),
            error::SCORE_NOT_FINITE => Err(Error::not_finite("a router's score")),
            error::KEY_NOT_FINITE if self.kv == KvType::F32 => {
                Err(Error::not_finite("a key or a value"))
            }
            error::KEY_NOT_FINITE => Err(Error::NotFinite(Text::new(
                "a key or a value that is not finite or too large for its type; keep keys and values as F32, and if that fails too, the weights are damaged",
            ))),
            _ => Err(Error::not_finite("a logit")),
        }
    }

    /// The slot of the row that [`Gpu::run`]'s error is about; none when the launch itself failed.
    pub fn culprit(&self) -> Option<u32> {
        self.culprit
    }

    /// Where the row in a slot is after the last launch.
    pub fn whereabouts(&self, slot: u32) -> Whereabouts {
        let state = self.get::<State>(self.plan.output.states, slot as usize);
        match state.stage {
            stage::DONE => Whereabouts::Done,
            stage::LEFT => Whereabouts::Waiting,
            _ => Whereabouts::InRecursions,
        }
    }

    /// The depth of a row as far as it is decided.
    pub fn depth(&self, slot: u32) -> u8 {
        self.get::<State>(self.plan.output.states, slot as usize)
            .depth as u8
    }

    /// The token that was drawn after the row in a slot.
    pub fn drawn(&self, slot: u32) -> u32 {
        self.get::<u32>(self.plan.output.drawn, slot as usize)
    }

    /// Copies rows of logits, each `[vocab]`, out.
    pub fn read_logits(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let at = self.plan.regions.logits.offset + 4 * row * self.vocab;
        // SAFETY: any bytes are numbers.
        let (_, bytes, _) = unsafe { out.align_to_mut::<u8>() };
        self.buffer.read(at, bytes)
    }

    /// Copies a residual stream `[hidden]` after the last layer out.
    pub fn read_row(&self, slot: u32, out: &mut [f32]) -> Result<()> {
        let at = self.plan.regions.x.offset + 4 * slot as usize * out.len();
        // SAFETY: any bytes are numbers.
        let (_, bytes, _) = unsafe { out.align_to_mut::<u8>() };
        self.buffer.read(at, bytes)
    }

    /// As if the first sequence's last token, at `position`, had passed all layers in that slot.
    pub fn write_row(&mut self, slot: u32, position: usize, row: &[f32]) -> Result<()> {
        self.logits_slot = None;
        let at = self.plan.regions.x.offset + 4 * slot as usize * row.len();
        self.buffer.write(at, bytes_of(row))?;
        // Who asks for its logits asks whose row it is.
        let row = [Row {
            sequence: 0,
            position: position as u32,
            token: 0,
            recursion: 0,
            least_score: 0.0,
            depth_limit: 0,
            wants_logits: 0,
            unused: 0,
        }];
        let at = self.plan.regions.rows.offset + slot as usize * size_of::<Row>();
        self.buffer.write(at, bytes_of(&row))
    }

    /// Copies a page of the cache out, or in.
    pub fn read_page(&self, page: u32, out: &mut [u8]) -> Result<()> {
        self.buffer.read(
            self.plan.regions.pages.offset + page as usize * out.len(),
            out,
        )
    }

    pub fn write_page(&mut self, page: u32, bytes: &[u8]) -> Result<()> {
        let at = self.plan.regions.pages.offset + page as usize * bytes.len();
        self.buffer.write(at, bytes)
    }

    fn put<P: Copy>(&mut self, region: Region, index: usize, value: P) {
        let at = region.offset + index * size_of::<P>();
        let room = &mut self.input.bytes_mut()[at..at + size_of::<P>()];
        debug_assert!(index * size_of::<P>() < region.bytes);
        // SAFETY: there is room; no alignment is asked for.
        unsafe { room.as_mut_ptr().cast::<P>().write_unaligned(value) };
    }

    fn get<P: Copy>(&self, region: Region, index: usize) -> P {
        let at = region.offset + index * size_of::<P>();
        let bytes = &self.output.bytes()[at..at + size_of::<P>()];
        // SAFETY: as many bytes as it has; `P`s are plain numbers.
        unsafe { bytes.as_ptr().cast::<P>().read_unaligned() }
    }
}

/// Programs of different sizes.
const MAX_SIZES: usize = 4;

/// Passes of few rows have a program of their own, whose products are made for them.
fn program_sizes(rows: usize) -> impl Iterator<Item = usize> {
    [1, FEW as usize, SOME]
        .into_iter()
        .filter(move |size| *size < rows)
        .chain([rows])
}

/// How the device draws what a sampler would draw next; none where only the host can.
fn draw_of(sampler: &Sampler) -> Option<Draw> {
    let p = sampler.params();
    let candidates = match p.temperature {
        0.0 => 1,
        _ => p.top_k,
    };
    if !(1..=MAX_CANDIDATES).contains(&candidates) {
        return None;
    }
    Some(Draw {
        random: sampler.peek(),
        repeat_penalty: p.repeat_penalty,
        repeat_last_n: p.repeat_last_n.min(u32::MAX as usize) as u32,
        candidates: candidates as u32,
        top_p: p.top_p,
        min_p: p.min_p,
        temperature: p.temperature,
    })
}

/// The least score with which a row of these settings goes on.
pub(crate) fn least_score(model: &Model, cut: f32) -> f32 {
    match &model.hyperparameters().router {
        Some(spec) => routing::least_score(spec, cut),
        None => cut,
    }
}

/// Whether a row of this depth has an entry in a plane, as far as it is decided before it ran: at most
/// those.
pub(crate) fn may_enter(model: &Model, tokens: PlaneTokens, depth_limit: usize) -> bool {
    let h = model.hyperparameters();
    match tokens {
        PlaneTokens::All => true,
        PlaneTokens::DeeperThan(r) => {
            r < depth_limit || (r == 0 && h.kv == KvStrategy::Shared && h.is_expert_choice())
        }
    }
}

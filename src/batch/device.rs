//! A tick on a GPU. One launch does what [`Books::run`](super::books::Books) does step by step; here the
//! rows get their places before it, and the books are brought up to date after it.

use super::books::Books;
use crate::cpu::Pass;
use crate::cuda::{self, Gpu, NewRow, Whereabouts};
use crate::error::Result;
use crate::kv::KvCache;
use crate::model::{Keys, KvStrategy, LayerRun, Model, RouterKind};
use crate::routing::Routing;

impl Books {
    /// Runs a tick with `new` more rows, slots `active[flying..]`.
    pub(super) fn run_on_gpu(&mut self, pass: &mut Pass, gpu: &mut Gpu, new: usize) -> Result<()> {
        let old = pass.flying;
        // From here on an error sets the new rows back too.
        pass.flying += new;
        self.reserve(pass, gpu, old)?;
        for (place, sequence) in self.sequences.iter().enumerate() {
            if sequence.entered > sequence.done {
                gpu.set_draw(place, &sequence.sampler);
            }
        }
        let rows = pass.buffers.active[old..pass.flying].iter();
        gpu.set_new_rows(rows.map(|slot| {
            let row = pass.buffers.rows[*slot as usize];
            let (sequence, settings) = (
                &self.sequences[row.sequence as usize],
                pass.settings[row.sequence as usize],
            );
            NewRow {
                slot: *slot,
                sequence: row.sequence,
                position: row.position,
                token: row.token,
                least_score: cuda::least_score(pass.model, settings.cut),
                depth_limit: settings.depth_limit,
                wants_logits: row.position as usize + 1 == sequence.known
                    && sequence.known < sequence.end,
            }
        }));
        let b = &*pass.buffers;
        let outcome = gpu.run(&cuda::Pass {
            active: &b.active[..old],
            waiting: &b.left[..pass.left],
            apart: self.sequences.iter().all(|s| s.entered - s.done <= 1),
            routing: Routing::Threshold,
        });
        if let Err(error) = outcome {
            pass.culprit = gpu.culprit();
            return Err(error);
        }
        self.counters.ticks += 1;
        self.counters.row_capacity += self.rows() as u64;
        self.note_recursions(pass, gpu, old);
        let ready = self.part(pass, gpu);
        self.counters.finished += ready as u64;
        self.finish_on_gpu(pass, gpu, ready)?;
        for (place, sequence) in self.sequences.iter().enumerate() {
            truncate(
                &mut pass.buffers.kv,
                place,
                &pass.model.schedule().coda,
                sequence.done,
            );
        }
        self.free_slots
            .extend_from_slice(&pass.buffers.left[..ready]);
        pass.buffers.left.copy_within(ready..pass.left, 0);
        pass.left -= ready;
        Ok(())
    }

    /// Gives every row the places that it may take in this tick; [`Books::make_room`] has seen to it that
    /// there are pages.
    fn reserve(&self, pass: &mut Pass, gpu: &mut Gpu, old: usize) -> Result<()> {
        let (model, schedule) = (pass.model, pass.model.schedule());
        let b = &mut *pass.buffers;
        for (place, sequence) in self.sequences.iter().enumerate() {
            if sequence.entered > sequence.done {
                gpu.set_kept(&b.kv, place);
                for run in &schedule.coda {
                    let list = b.kv.list(place, run.plane);
                    gpu.reserve(&mut b.kv, list, sequence.entered - sequence.done)?;
                }
            }
        }
        for (c, slot) in b.active[..pass.flying].iter().enumerate() {
            let row = b.rows[*slot as usize];
            let place = row.sequence as usize;
            if c >= old {
                reserve(gpu, &mut b.kv, place, &schedule.prelude)?;
            }
            for stage in &schedule.stages {
                let runs = match model.hyperparameters().router {
                    Some(_) => stage.recursion == row.recursion as usize,
                    None => true,
                };
                if runs {
                    reserve(gpu, &mut b.kv, place, &stage.runs)?;
                }
            }
        }
        Ok(())
    }

    /// Notes which rows ran a recursion, and takes back the places of those that did not.
    fn note_recursions(&mut self, pass: &mut Pass, gpu: &Gpu, old: usize) {
        let (model, b) = (pass.model, &mut *pass.buffers);
        for c in 0..pass.flying {
            let slot = b.active[c] as usize;
            b.depth[slot] = gpu.depth(slot as u32);
            let row = &mut b.rows[slot];
            if c < old || b.depth[slot] > 0 || all_run_first(model) {
                self.counters.rows[row.recursion as usize] += 1;
                row.recursion += 1;
                continue;
            }
            let place = row.sequence as usize;
            let runs = &model.schedule().stages[0].runs;
            let length = b.kv.length(b.kv.list(place, runs[0].plane));
            truncate(&mut b.kv, place, runs, length - 1);
        }
    }

    /// Sorts out who is still in the recursions and who has left; those that are done come to the front
    /// of `left`, by sequence and position. Returns how many they are.
    fn part(&mut self, pass: &mut Pass, gpu: &Gpu) -> usize {
        pass.keep(0, |pass, c| {
            gpu.whereabouts(pass.buffers.active[c]) == Whereabouts::InRecursions
        });
        self.bring_forward(pass, |_, slot, _| {
            gpu.whereabouts(slot) == Whereabouts::Done
        })
    }

    /// Rows `left[..ready]` have passed all layers, and what follows the last tokens was drawn.
    fn finish_on_gpu(&mut self, pass: &mut Pass, gpu: &mut Gpu, ready: usize) -> Result<()> {
        let vocab = pass.model.hyperparameters().vocab_size;
        let mut wanted = 0;
        for i in 0..ready {
            let b = &mut *pass.buffers;
            let slot = b.left[i];
            let row = b.rows[slot as usize];
            let (place, position) = (row.sequence as usize, row.position as usize);
            b.depths[place * self.context + position] = b.depth[slot as usize];
            let sequence = &mut self.sequences[place];
            if !sequence.note_done(position) {
                continue;
            }
            if sequence.known == sequence.end {
                self.end(place, self.sequences[place].end_reason);
                continue;
            }
            self.counters.logits += 1;
            let token = if Gpu::draws(&sequence.sampler) {
                sequence.sampler.advance();
                gpu.drawn(slot)
            } else {
                gpu.read_logits(wanted, &mut b.logits[..vocab])?;
                let known = &b.tokens[place * self.context..][..sequence.known];
                let logits = &b.logits[..vocab];
                sequence.sampler.sample(logits, known, b.candidates)
            };
            wanted += 1;
            self.take(pass, slot, token);
        }
        Ok(())
    }
}

/// Whether every row that enters runs recursion 0: without a choice, by token-choice, and where it gives
/// all tokens their keys.
fn all_run_first(model: &Model) -> bool {
    let h = model.hyperparameters();
    match &h.router {
        Some(router) => router.kind == RouterKind::Token || h.kv == KvStrategy::Shared,
        None => true,
    }
}

/// Gives a row its places in layers that follow one another, whose lists have equally many entries.
fn reserve(gpu: &mut Gpu, kv: &mut KvCache, place: usize, runs: &[LayerRun]) -> Result<()> {
    let first = kv.list(place, 0);
    let appending = runs.iter().filter(|run| run.keys == Keys::Append);
    let mut lists = appending.map(|run| first + run.plane);
    if kv.grow_in_place(lists.clone()) {
        return Ok(());
    }
    lists.try_for_each(|list| gpu.reserve(kv, list, 1))
}

/// The lists of some layers have so many entries.
fn truncate(kv: &mut KvCache, place: usize, runs: &[LayerRun], length: usize) {
    for run in runs {
        kv.truncate(kv.list(place, run.plane), length);
    }
}

//! What a session does with a GPU. Its rows are all done after one launch, so a row's slot is its place
//! in the chunk.

use super::params::MAX_CANDIDATES;
use super::{Gpu, NewRow, Pass, least_score, may_enter};
use crate::cpu::Settings;
use crate::error::Result;
use crate::kv::{KvCache, PAGE_TOKENS};
use crate::memory::try_collect;
use crate::model::{Model, PlaneTokens};
use crate::plan::Buffers;
use crate::routing::Routing;
use crate::sampling::Sampler;

impl Gpu {
    /// Runs the first `n` of `buffers.rows` through the whole model and notes their depths.
    pub fn run_session(
        &mut self,
        model: &Model,
        buffers: &mut Buffers,
        n: usize,
        settings: Settings,
        routing: Routing,
        sampler: &Sampler,
    ) -> Result<()> {
        self.set_kept(&buffers.kv, 0);
        let first = buffers.rows[0].position as usize;
        self.reserve_all(model, &mut buffers.kv, n, settings.depth_limit)?;
        self.draws = self.set_draw(0, sampler);
        let rows = buffers.rows[..n].iter().enumerate();
        self.set_new_rows(rows.map(|(i, row)| NewRow {
            slot: i as u32,
            sequence: 0,
            position: row.position,
            token: row.token,
            least_score: least_score(model, settings.cut),
            depth_limit: settings.depth_limit,
            wants_logits: i + 1 == n,
        }));
        self.run(&Pass {
            active: &[],
            waiting: &[],
            apart: false,
            routing,
        })?;
        self.logits_slot = Some(n as u32 - 1);
        for (slot, depth) in buffers.depth[..n].iter_mut().enumerate() {
            *depth = self.depth(slot as u32);
        }
        // Places that nobody took are free again.
        for (plane, description) in model.schedule().planes.iter().enumerate() {
            let reserved = self.reserved(model, plane, n, settings.depth_limit);
            let before = buffers.kv.length(plane) - reserved;
            let entries = description.tokens.entries(&buffers.depth[..n]);
            debug_assert!(before <= first);
            buffers.kv.truncate(plane, before + entries);
        }
        Ok(())
    }

    /// Entries that `n` rows may take in a plane.
    fn reserved(&self, model: &Model, plane: usize, n: usize, depth_limit: usize) -> usize {
        let tokens = model.schedule().planes[plane].tokens;
        if may_enter(model, tokens, depth_limit) {
            n
        } else {
            0
        }
    }

    fn reserve_all(
        &mut self,
        model: &Model,
        kv: &mut KvCache,
        n: usize,
        depth_limit: usize,
    ) -> Result<()> {
        for plane in 0..model.schedule().planes.len() {
            let entries = self.reserved(model, plane, n, depth_limit);
            self.reserve(kv, plane, entries)?;
        }
        Ok(())
    }

    /// The row of the last token.
    pub fn set_last_row(&mut self, row: usize) {
        self.last_row = row as u32;
    }

    /// Before a call's first launch: the last token's row, if there is one, stays, whatever comes of the call.
    pub fn keep_last_row(&mut self, exists: bool) {
        self.puts_aside = exists && self.last_row as usize != self.plan.sizes.slots;
    }

    pub fn last_row(&self) -> u32 {
        self.last_row
    }

    /// Takes over a saved sequence: its tokens, depths and last row stand in `buffers`, its keys and
    /// values in `kv`, as src/state.rs writes them.
    pub fn restore(
        &mut self,
        model: &Model,
        buffers: &mut Buffers,
        length: usize,
        depths: &[u8],
        mut entries: &[u8],
    ) -> Result<()> {
        let key_bytes = buffers.kv.shape.key_bytes;
        for (plane, description) in model.schedule().planes.iter().enumerate() {
            let count = description.tokens.entries(depths);
            for slot in 0..count {
                self.reserve(&mut buffers.kv, plane, 1)?;
                let (shape, at) = (buffers.kv.shape, slot % PAGE_TOKENS);
                for head in 0..shape.kv_heads {
                    let (entry, more) = entries.split_at(2 * key_bytes);
                    shape.write_entry(buffers.page, head, at, entry.split_at(key_bytes).into());
                    entries = more;
                }
                if at + 1 == PAGE_TOKENS || slot + 1 == count {
                    let page = buffers.kv.table(plane)[slot / PAGE_TOKENS];
                    self.write_page(page, buffers.page)?;
                }
            }
        }
        self.send_tokens(0, &buffers.tokens[..length])?;
        self.write_row(0, length.saturating_sub(1), buffers.last_row)?;
        self.set_last_row(0);
        self.forget_drawn();
        Ok(())
    }

    /// The next token is drawn in another way.
    pub fn forget_drawn(&mut self) {
        self.draws = false;
    }

    /// The token that the device drew after the last one, if the sampler still stands where it stood
    /// then, and nobody took it yet.
    pub fn take_drawn(&mut self, sampler: &mut Sampler) -> Option<u32> {
        if !std::mem::take(&mut self.draws) || self.drawn_by != Some(sampler.state()) {
            return None;
        }
        sampler.advance();
        Some(self.drawn(self.last_row))
    }

    /// The logits `[vocab]` after the last token.
    pub fn last_logits(&mut self, out: &mut [f32]) -> Result<()> {
        self.logits_of(self.last_row as usize, 1, out)
    }

    /// Logits of `count` rows of the last chunk from row `first` on.
    pub fn logits_of(&mut self, first: usize, count: usize, out: &mut [f32]) -> Result<()> {
        if count == 1 && self.logits_slot == Some(first as u32) {
            return self.read_logits(0, &mut out[..self.vocab]);
        }
        let mut slots = [0; MAX_CANDIDATES];
        let vocab = self.vocab;
        for done in (0..count).step_by(slots.len()) {
            let some = slots.len().min(count - done);
            for (i, slot) in slots[..some].iter_mut().enumerate() {
                *slot = (first + done + i) as u32;
            }
            self.compute_logits(&slots[..some])?;
            self.read_logits(0, &mut out[done * vocab..][..some * vocab])?;
        }
        Ok(())
    }

    /// Sets the entries that a sequence's planes of each recursion have.
    pub fn set_kept(&mut self, kv: &KvCache, sequence: usize) {
        let first = sequence * self.kept_planes.len();
        for r in 0..self.kept_planes.len() {
            let kept = match self.kept_planes[r] {
                Some(plane) => kv.length(kv.list(sequence, plane)),
                None => 0,
            };
            self.put(self.plan.input.kept, first + r, kept as u32);
        }
    }
}

/// Of each recursion a plane that has an entry for the tokens that ran it, as all such planes have; none where
/// keys are shared and no plane is the recursion's alone.
pub(super) fn kept_planes(model: &Model) -> Result<Vec<Option<usize>>> {
    let planes = &model.schedule().planes;
    let recursions = model.hyperparameters().recursions;
    let find = |r| {
        planes
            .iter()
            .position(|plane| plane.tokens == PlaneTokens::DeeperThan(r))
    };
    try_collect((0..recursions).map(|r| Ok(find(r))))
}

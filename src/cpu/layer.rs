//! One decoder layer on rows that run together, each at its own place in the cache.

use super::attention::{Attention, Seat};
use super::forward::Pass;
use super::matmul::{MatMul, Product};
use super::ops;
use super::simd::Level;
use super::team::{Disjoint, Team};
use crate::error::{Error, Result};
use crate::kv::KvWriter;
use crate::model::{Keys, Layer, LayerRun, Rope};
use crate::plan::Row;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

/// Which layer.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// This one, for all rows.
    Own(&'a LayerRun),
    /// The layer of this number in the shared block, for each row at the recursion that it stands
    /// before.
    Block(usize),
}

impl Pass<'_, '_> {
    /// One decoder layer on rows `x` [n, hidden], which have these slots. Rows of a sequence that
    /// stand before the same recursion come in the order of their positions.
    pub(super) fn layer(&mut self, place: Place, slots: &[u32], x: &mut [f32]) -> Result<()> {
        if self.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
            return Err(Error::Cancelled);
        }
        let Some(first) = slots.first() else {
            return Ok(());
        };
        let model = self.model;
        // All recursions of the rows have the same weights: the caller has seen to it.
        let layer = model.layer(self.run_of(place, *first).layer);
        self.attention_half(place, layer, slots, x)?;
        self.feed_forward_half(layer, x, slots.len());
        Ok(())
    }

    /// The run of a layer by the row in a slot.
    fn run_of<'a>(&self, place: Place<'a>, slot: u32) -> &'a LayerRun
    where
        Self: 'a,
    {
        match place {
            Place::Own(run) => run,
            Place::Block(number) => {
                let recursion = self.buffers.rows[slot as usize].recursion as usize;
                &self.model.schedule().stages[recursion].runs[number]
            }
        }
    }

    /// Finds the rows' places in the cache and makes room for those that write there. Says whether
    /// any does.
    fn take_seats(&mut self, place: Place, slots: &[u32]) -> Result<bool> {
        let mut any = false;
        for (index, slot) in slots.iter().enumerate() {
            let LayerRun { plane, keys, .. } = *self.run_of(place, *slot);
            let b = &mut *self.buffers;
            let Row {
                sequence, position, ..
            } = b.rows[*slot as usize];
            let list = b.kv.list(sequence as usize, plane);
            let (visible, own) = match keys {
                Keys::Append => (b.kv.append(list)? as u32 + 1, 1),
                // The plane has an entry for every position.
                Keys::Shared => (position + 1, 0),
            };
            any |= own == 1;
            let list = list as u32;
            b.seats[index] = Seat { list, visible, own };
        }
        Ok(any)
    }

    fn attention_half(
        &mut self,
        place: Place,
        layer: &Layer,
        slots: &[u32],
        x: &mut [f32],
    ) -> Result<()> {
        let n = slots.len();
        let appends = self.take_seats(place, slots)?;
        let (file, h) = (self.model.bytes(), self.model.hyperparameters());
        let (level, b) = (self.level, &mut *self.buffers);
        let (query_size, kv_size) = (h.query_size(), h.kv_size());
        let (q, attn) = (&mut b.q[..n * query_size], &mut b.attn[..n * query_size]);
        let (k, v) = (&mut b.k[..n * kv_size], &mut b.v[..n * kv_size]);
        let mut matmul = MatMul {
            team: self.team,
            level,
            file,
            panels: b.panels,
            scratch: b.scratch,
        };
        let mut all = [
            Product::new(&layer.q, q),
            Product::new(&layer.k, k),
            Product::new(&layer.v, v),
        ];
        let wanted = if appends { &mut all[..] } else { &mut all[..1] };
        let norm = &layer.attn_norm;
        matmul.run(
            n,
            b.norm,
            &ops::norm(level, file, norm, h.norm_epsilon, x),
            wanted,
        );
        let rows = Rows {
            level,
            rope: &h.rope,
            head_dim: h.head_dim,
            table: b.rope,
            slots,
            seats: &b.seats[..n],
            q: Disjoint::new(q),
            k: Disjoint::new(k),
            v,
            cache: b.kv.writer(),
        };
        if let Err((row, error)) = rows.rotate_and_store(matmul.team) {
            self.culprit = Some(slots[row]);
            return Err(error);
        }
        let attention = Attention {
            level,
            kv: &b.kv,
            heads: h.heads,
            seats: &b.seats[..n],
            q,
        };
        attention.run(matmul.team, matmul.scratch, b.partials, attn);
        matmul.run(n, attn, &|_, _| {}, &mut [Product::added(&layer.o, x)]);
        Ok(())
    }

    fn feed_forward_half(&mut self, layer: &Layer, x: &mut [f32], n: usize) {
        let (file, h) = (self.model.bytes(), self.model.hyperparameters());
        let (level, b) = (self.level, &mut *self.buffers);
        let inner = h.feed_forward_size;
        let (gate, up) = (&mut b.gate[..n * inner], &mut b.up[..n * inner]);
        let mut matmul = MatMul {
            team: self.team,
            level,
            file,
            panels: b.panels,
            scratch: b.scratch,
        };
        let mut both = [Product::new(&layer.gate, gate), Product::new(&layer.up, up)];
        let norm = &layer.ffn_norm;
        matmul.run(
            n,
            b.norm,
            &ops::norm(level, file, norm, h.norm_epsilon, x),
            &mut both,
        );
        let gated = |row: usize, gate: &mut [f32]| {
            ops::swiglu(level, gate, &up[row * inner..][..inner]);
        };
        matmul.run(n, gate, &gated, &mut [Product::added(&layer.down, x)]);
    }
}

/// Queries, keys and values of some rows, before attention.
struct Rows<'a> {
    level: Level,
    rope: &'a Rope,
    head_dim: usize,
    /// [slots, rope dims / 2]
    table: &'a [[f32; 2]],
    slots: &'a [u32],
    seats: &'a [Seat],
    q: Disjoint<'a, f32>,
    k: Disjoint<'a, f32>,
    v: &'a [f32],
    cache: KvWriter<'a>,
}

impl Rows<'_> {
    /// Rotates queries and keys, and puts keys and values into the cache. An error comes with the
    /// index of its row.
    fn rotate_and_store(&self, team: &mut Team) -> std::result::Result<(), (usize, Error)> {
        let n = self.seats.len();
        let failure = Mutex::new(None);
        team.run(n, &|row, _| {
            let half = self.rope.dims / 2;
            let table = &self.table[self.slots[row] as usize * half..][..half];
            let width = self.q.len() / n;
            // SAFETY: each row belongs to one task.
            let q = unsafe { self.q.slice(row * width, width) };
            ops::rotate(self.level, self.rope.pairing, self.head_dim, table, q);
            let Seat { list, visible, own } = self.seats[row];
            if own == 0 {
                return;
            }
            let width = self.k.len() / n;
            // SAFETY: as above.
            let k = unsafe { self.k.slice(row * width, width) };
            ops::rotate(self.level, self.rope.pairing, self.head_dim, table, k);
            let v = &self.v[row * width..][..width];
            // SAFETY: each row has an entry of its own.
            let stored = unsafe {
                self.cache
                    .store((list as usize, visible as usize - 1), k, v)
            };
            if let Err(error) = stored {
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                *failure = Some((row, error));
            }
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }
}

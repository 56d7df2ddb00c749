//! A decoder layer and what it is made of, as launches.

use super::Kind;
use super::driver::Address;
use super::functions::Kernels;
use super::params::*;
use super::program::Writer;
use crate::error::Result;
use crate::kv::{KvType, PAGE_TOKENS};
use crate::model::{Keys, Layer, LayerRun, Linear, PlaneTokens, RopePairing, Vector};

impl<'a> Writer<'a> {
    /// Where keys are, for rows at each recursion; `run_at` tells the layer that runs there.
    pub(super) fn planes(
        &self,
        run_at: impl Fn(usize) -> Option<&'a LayerRun>,
        recursion: u32,
    ) -> Planes {
        let all = &self.model.schedule().planes;
        let mut planes = Planes {
            recursion,
            keys: [keys::READ_ONLY; _],
            plane: [0; _],
        };
        for (r, (keys, plane)) in planes.keys.iter_mut().zip(&mut planes.plane).enumerate() {
            let Some(run) = run_at(r) else { continue };
            *plane = run.plane as u32;
            *keys = match (run.keys, all[run.plane].tokens) {
                (Keys::Shared, _) => keys::READ_ONLY,
                (Keys::Append, PlaneTokens::All) => keys::ALL_TOKENS,
                (Keys::Append, PlaneTokens::DeeperThan(_)) => keys::KEPT_TOKENS,
            };
        }
        planes
    }

    pub(super) fn layer(
        &mut self,
        layer: &Layer,
        view: View,
        planes: &Planes,
        residual: Address,
        appends: bool,
    ) -> Result<()> {
        self.attention_half(layer, view, planes, residual, appends)?;
        let (gate, up) = (
            self.at(self.plan.regions.gate),
            self.at(self.plan.regions.up),
        );
        let norm = self.norm(residual, &layer.ffn_norm)?;
        let both = [self.output(&layer.gate, gate)?, self.output(&layer.up, up)?];
        let inner = self.swiglu(norm, both, view);
        let down = self.added(&layer.down, residual)?;
        self.product(inner, &[down], view);
        Ok(())
    }

    fn attention_half(
        &mut self,
        layer: &Layer,
        view: View,
        planes: &Planes,
        residual: Address,
        appends: bool,
    ) -> Result<()> {
        let h = self.model.hyperparameters();
        let (rows, heads) = (self.rows as u32, h.heads as u32);
        let [q, k, v] = [
            self.plan.regions.q,
            self.plan.regions.k,
            self.plan.regions.v,
        ]
        .map(|r| self.at(r));
        let norm = self.norm(residual, &layer.attn_norm)?;
        let all = [
            self.output(&layer.q, q)?,
            self.output(&layer.k, k)?,
            self.output(&layer.v, v)?,
        ];
        self.product(norm, if appends { &all } else { &all[..1] }, view);
        let session = self.kind == Kind::Session;
        let cache = Cache {
            pages: self.at(self.plan.regions.pages),
            tables: self.at(self.plan.regions.tables),
            planes: self.kv.planes as u32,
            table_pages: self.kv.table_pages as u32,
            page_bytes: self.kv.page_bytes() as u32,
            key_bytes: self.kv.key_bytes as u32,
            value_bytes: self.kv.value_bytes as u32,
            kv_heads: h.kv_heads as u32,
            head_dim: h.head_dim as u32,
            one_sequence: u32::from(session),
        };
        let store = StoreParams {
            view,
            rows: self.at(self.plan.regions.rows),
            states: self.states(),
            rope: self.at(self.plan.regions.rope),
            q,
            k,
            v,
            report: self.report(0),
            cache,
            planes: *planes,
            heads,
            pairs: (h.rope.dims / 2) as u32,
            neighbours: u32::from(h.rope.pairing == RopePairing::Norm),
        };
        // Blocks store their row's entry themselves, unless a row may look at an entry that another one stores.
        if !self.apart && appends {
            let warps = BLOCK / 32;
            if session && self.kv.ty == KvType::F16 && self.rows > SOME {
                let (pages, parts) = (self.rows.div_ceil(PAGE_TOKENS), h.head_dim.div_ceil(32));
                let grid = [
                    pages as u32 + 1,
                    (cache.kv_heads * parts as u32).div_ceil(warps),
                    1,
                ];
                self.launch(self.kernels.store_pages, grid, 0, &store);
            } else {
                // A warp a head.
                let grid = [rows, cache.kv_heads.div_ceil(warps), 1];
                self.launch(self.kernels.store.of(self.kv.ty), grid, 0, &store);
            }
        }
        // Rows of a session have their entries in common. Tensor cores take many of them at once.
        let halves = self.kv.ty == KvType::F16 && self.weights.device.has_tensor_cores();
        let heads_of_key = heads / cache.kv_heads;
        let prompt = self.kernels.attention_prompt(h.head_dim);
        let prompt = prompt.filter(|_| session && halves && self.rows > SOME);
        let row_shift = match rows {
            _ if !session || !halves => 0,
            // As many as give each warp a tile.
            _ if prompt.is_some() => (PROMPT_ROWS / heads_of_key).max(1).ilog2(),
            1 => 0,
            2..=FEW => 3,
            _ => 4,
        };
        let (partial, partial_scales) =
            (self.plan.regions.partial, self.plan.regions.partial_scales);
        let parts = self.plan.parts as u32;
        let attention = AttentionParams {
            input: store,
            partial: self.at(partial),
            partial_scales: self.at(partial_scales),
            visible: self.at(self.plan.regions.visible),
            parts,
            stores: u32::from(self.apart),
            rows,
            row_shift,
            heads_of_key,
            factor: 1.0 / (h.head_dim as f32).sqrt(),
        };
        let grid = [rows.div_ceil(1 << row_shift), cache.kv_heads, parts];
        let (kernel, shared) = match prompt {
            Some(kernel) => (kernel, Kernels::attention_prompt_shared(h.head_dim)),
            None => (
                self.kernels
                    .attention(self.kv.ty, h.head_dim, row_shift == 0),
                Kernels::attention_shared(h.head_dim),
            ),
        };
        self.launch(kernel, grid, shared as u32, &attention);
        let attended = Source {
            part_scales: self.at(partial_scales),
            visible: self.at(self.plan.regions.visible),
            head_dim: cache.head_dim,
            per_head: (1u64 << 32).div_ceil(u64::from(cache.head_dim)) as u32,
            parts,
            ..Source::new(make::ATTENTION, self.at(partial))
        };
        let o = self.added(&layer.o, residual)?;
        self.product(attended, &[o], view);
        Ok(())
    }

    /// RMSNorm of the rows `x`, by slot.
    pub(super) fn norm(&self, x: Address, weight: &Vector) -> Result<Source> {
        Ok(Source {
            b: self.weights.at(weight.offset)?,
            number: self.model.hyperparameters().norm_epsilon,
            ..Source::new(make::NORM, x)
        })
    }

    /// A matrix whose results are written to `out`.
    pub(super) fn output(&self, linear: &Linear, out: Address) -> Result<Matrix> {
        Ok(Matrix {
            out,
            ..self.matrix(linear)?
        })
    }

    /// A matrix whose results are added to the rows in their slots.
    fn added(&self, linear: &Linear, residual: Address) -> Result<Matrix> {
        Ok(Matrix {
            out: residual,
            add: 1,
            by_slot: 1,
            ..self.matrix(linear)?
        })
    }

    pub(super) fn matrix(&self, linear: &Linear) -> Result<Matrix> {
        let m = &linear.weight;
        let (row_step, group_step) = self.weights.steps(m);
        Ok(Matrix {
            data: self.weights.at(m.offset)?,
            bias: match &linear.bias {
                Some(bias) => self.weights.at(bias.offset)?,
                None => 0,
            },
            out: 0,
            ty: m.ty.gguf_id(),
            rows: m.rows as u32,
            columns: m.columns as u32,
            row_bytes: m.row_bytes as u32,
            row_step: row_step as u32,
            group_step: group_step as u32,
            out_stride: m.rows as u32,
            add: 0,
            by_slot: 0,
            unused: 0,
        })
    }
}

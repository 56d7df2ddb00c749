//! A decoder layer and what it is made of, as launches.

use super::driver::Address;
use super::launch::Function;
use super::params::*;
use super::program::{Kernels, MOST_SHARED, Products, WideProduct, Writer};
use crate::error::Result;
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
        let (gate, up) = (self.at(self.plan.gate), self.at(self.plan.up));
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
        let [q, k, v] = [self.plan.q, self.plan.k, self.plan.v].map(|r| self.at(r));
        let norm = self.norm(residual, &layer.attn_norm)?;
        let all = [
            self.output(&layer.q, q)?,
            self.output(&layer.k, k)?,
            self.output(&layer.v, v)?,
        ];
        self.product(norm, if appends { &all } else { &all[..1] }, view);
        let cache = Cache {
            pages: self.at(self.plan.pages),
            tables: self.at(self.plan.tables),
            planes: self.kv.planes as u32,
            table_pages: self.kv.table_pages as u32,
            page_bytes: self.kv.page_bytes() as u32,
            key_bytes: self.kv.key_bytes as u32,
            value_bytes: self.kv.value_bytes as u32,
            kv_heads: h.kv_heads as u32,
            head_dim: h.head_dim as u32,
            ty: self.kv.ty.tensor_type().gguf_id(),
        };
        let store = StoreParams {
            view,
            rows: self.at(self.plan.rows),
            states: self.states(),
            rope: self.at(self.plan.rope),
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
        // One row's blocks store its entry themselves; with more rows, a row may look at an entry that
        // another one stores.
        let alone = rows == 1;
        if !alone {
            self.launch(self.kernels.store, [rows, 1, 1], 0, &store);
        }
        let (partial, partial_scales) = (self.plan.partial, self.plan.partial_scales);
        let parts = self.plan.parts as u32;
        let attention = AttentionParams {
            input: store,
            partial: self.at(partial),
            partial_scales: self.at(partial_scales),
            visible: self.at(self.plan.visible),
            parts,
            stores: u32::from(alone),
        };
        let groups = (heads / cache.kv_heads).div_ceil(HEADS_TOGETHER);
        let grid = [rows, cache.kv_heads * groups, parts];
        let shared = Kernels::attention_shared(h.head_dim) as u32;
        self.launch(self.kernels.attention, grid, shared, &attention);
        let attended = Source {
            part_scales: self.at(partial_scales),
            visible: self.at(self.plan.visible),
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

    /// Products of rows, made as `source` says, with matrices of as many columns. A lone row is made ready
    /// by the product itself, if shared memory has room for it; more rows by a kernel of their own before.
    pub(super) fn product(&mut self, source: Source, matrices: &[Matrix], view: View) {
        let params = self.product_params(source, matrices, view);
        let Some((ready, _)) = self.by_tensor_cores(source, matrices) else {
            return self.exact_product(params);
        };
        let of_one_type = || matrices.chunk_by(|a, b| a.ty == b.ty);
        if self.is_lone(&params) {
            for matrices in of_one_type() {
                self.lone_product(source, matrices, view);
            }
            return;
        }
        let (rows, stride) = (self.rows as u32, params.input.stride);
        let outside = 4 * stride as usize > MOST_SHARED;
        let ready_params = ReadyParams {
            view,
            source,
            out: params.input,
            columns_of_run: GROUP * params.groups_of_run,
            sums: u32::from(matrices.iter().any(|m| has_min(m.ty))),
            outside: u32::from(outside),
            unused: 0,
        };
        let shared = if outside { 0 } else { 4 * stride };
        self.launch(ready, [rows, 1, 1], shared, &ready_params);
        for matrices in of_one_type() {
            self.ready_product(source, matrices, view);
        }
    }

    /// Rows that are ready, with matrices of one type.
    fn ready_product(&mut self, source: Source, matrices: &[Matrix], view: View) {
        let Some((_, kernels)) = self.by_tensor_cores(source, matrices) else {
            return;
        };
        let (few, many) = (kernels.few, kernels.many);
        let params = self.product_params(source, matrices, view);
        let rows = self.rows as u32;
        let multiprocessors = self.weights.device.multiprocessors;
        let blocks = |w: &WideProduct| [params.tiles.div_ceil(w.tiles), rows.div_ceil(w.rows), 1];
        let count = |w: &WideProduct| blocks(w).iter().product::<u32>();
        let smallest = kernels.wide[0];
        if rows > smallest.rows && count(&smallest) >= multiprocessors / 2 {
            // Cycles of the multiprocessor that has the most to do.
            let cycles = |w: &WideProduct| count(w).div_ceil(multiprocessors) * w.cycles;
            let [first, others @ ..] = kernels.wide;
            let wide = others
                .into_iter()
                .fold(first, |best, w| match cycles(&w) < cycles(&best) {
                    true => w,
                    false => best,
                });
            let (grid, shared) = (blocks(&wide), wide.shared as u32);
            return self.launch(wide.function, grid, shared, &params);
        }
        let (kernel, each) = if rows <= FEW {
            (few, FEW)
        } else {
            (many, MANY)
        };
        self.launch(kernel, [params.tiles, rows.div_ceil(each), 1], 0, &params);
    }

    /// A lone row, with matrices of one type.
    fn lone_product(&mut self, source: Source, matrices: &[Matrix], view: View) {
        let Some((_, kernels)) = self.by_tensor_cores(source, matrices) else {
            return;
        };
        let kernel = match source.make {
            make::ATTENTION => kernels.lone_attention,
            make::PLAIN => kernels.lone_plain,
            _ => kernels.lone_norm,
        };
        let params = self.product_params(source, matrices, view);
        self.launch_lone(kernel, &params);
    }

    fn launch_lone(&mut self, kernel: Function<ProductParams>, params: &ProductParams) {
        let blocks = params.tiles.div_ceil(1 << params.log_tiles);
        let shared = Kernels::row_shared(params.input.stride as usize) as u32;
        self.launch(kernel, [blocks, 1, 1], shared, params);
    }

    /// In single precision throughout.
    fn exact_product(&mut self, params: ProductParams) {
        let (rows, shared) = (self.rows as u32, 4 * params.input.stride);
        // With GELU, of a router's hidden layer, the product would take too many registers.
        if rows == 1 && shared as usize <= MOST_SHARED && params.source.make != make::GELU {
            return self.launch(
                self.kernels.lone_exact,
                [params.tiles, 1, 1],
                shared,
                &params,
            );
        }
        let ready = ReadyParams {
            view: params.view,
            source: params.source,
            out: params.input,
            columns_of_run: 0,
            sums: 0,
            outside: 1,
            unused: 0,
        };
        self.launch(self.kernels.floats, [rows, 1, 1], 0, &ready);
        self.launch(
            self.kernels.exact,
            [params.tiles, rows.div_ceil(FEW), 1],
            0,
            &params,
        );
    }

    /// A gate and what it lets through; tells what the rows are then made of. For a lone row both matrices
    /// are one product, which writes the result.
    fn swiglu(&mut self, source: Source, both: [Matrix; 2], view: View) -> Source {
        let [gate, up] = both;
        let mut params = self.product_params(source, &both, view);
        let kernels = self.by_tensor_cores(source, &both);
        if let Some((_, kernels)) = kernels.filter(|_| self.is_lone(&params) && gate.ty == up.ty) {
            let kernel = kernels.lone_swiglu;
            // A tile of each.
            params.tiles /= 2;
            params.log_tiles = self.log_tiles(params.tiles);
            self.launch_lone(kernel, &params);
            return Source::new(make::PLAIN, gate.out);
        }
        self.product(source, &both, view);
        Source {
            b: up.out,
            ..Source::new(make::SWIGLU, gate.out)
        }
    }

    /// Whether a product by tensor cores makes its input ready itself.
    fn is_lone(&self, params: &ProductParams) -> bool {
        let shared = Kernels::row_shared(params.input.stride as usize);
        let made = [make::NORM, make::PLAIN, make::ATTENTION].contains(&params.source.make);
        self.rows == 1 && shared <= MOST_SHARED && made
    }

    /// Kernels for the first matrix's type, if tensor cores can do it with all.
    fn by_tensor_cores(
        &self,
        source: Source,
        matrices: &[Matrix],
    ) -> Option<(Function<ReadyParams>, &'a Products)> {
        let kernels: &'a Kernels = self.kernels;
        let whole = matrices[0].columns.is_multiple_of(GROUP);
        let found = matrices
            .iter()
            .map(|m| kernels.by_tensor_cores(source.make, m.ty));
        found
            .rev()
            .reduce(|all, one| all.and(one))
            .flatten()
            .filter(|_| whole)
    }

    fn product_params(&self, source: Source, matrices: &[Matrix], view: View) -> ProductParams {
        let mut all = [matrices[0]; 3];
        all[..matrices.len()].copy_from_slice(matrices);
        let (mut first_tiles, mut tiles) = ([u32::MAX; 3], 0);
        for (first, matrix) in first_tiles.iter_mut().zip(matrices) {
            *first = tiles;
            tiles += matrix.rows.div_ceil(TILE_ROWS);
        }
        let columns = matrices[0].columns;
        let groups = columns.div_ceil(GROUP);
        ProductParams {
            matrices: all,
            first_tiles,
            tiles,
            groups,
            groups_of_run: groups.div_ceil(RUNS).next_multiple_of(2),
            log_tiles: self.log_tiles(tiles),
            unused: 0,
            input: self.prepared(columns as usize),
            view,
            source,
            ahead: [Stretch { data: 0, bytes: 0 }; 3],
        }
    }

    /// Tiles that a block takes for a lone row: as many as leave a block for every multiprocessor, for what a
    /// block does before its first product is then done seldom.
    fn log_tiles(&self, tiles: u32) -> u32 {
        let enough = self.weights.device.multiprocessors;
        (1..=3)
            .rev()
            .find(|log| tiles >> log >= enough)
            .unwrap_or(0)
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
            out_stride: m.rows as u32,
            add: 0,
            by_slot: 0,
            unused: 0,
        })
    }
}

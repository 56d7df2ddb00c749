//! Matrix products, as launches.

use super::functions::{Kernels, MOST_SHARED, Products, WideProduct};
use super::launch::Function;
use super::params::*;
use super::program::Writer;
use crate::quant::TensorType;

impl<'a> Writer<'a> {
    /// Products of rows, made as `source` says, with matrices of as many columns. A lone row is made ready
    /// by the product itself, if shared memory has room for it; more rows by a kernel of their own before.
    pub(super) fn product(&mut self, source: Source, matrices: &[Matrix], view: View) {
        let params = self.product_params(source, matrices, view);
        let ready = self.kernels.ready(source.make);
        let Some(ready) = ready.filter(|_| self.takes_tensor_cores(matrices)) else {
            return self.exact_product(params, matrices);
        };
        let all: &'a Kernels = self.kernels;
        let of_one_type = || {
            let types = matrices.chunk_by(|a, b| a.ty == b.ty);
            types.filter_map(|matrices| Some((all.products(matrices[0].ty)?, matrices)))
        };
        if of_one_type().all(|(kernels, m)| self.lone(kernels, source, m, 1, view).is_some()) {
            for (kernels, matrices) in of_one_type() {
                if let Some(lone) = self.lone(kernels, source, matrices, 1, view) {
                    self.launch_product(&lone);
                }
            }
            return;
        }
        // The rows stand in one order, which all products have to want.
        let mut orders = of_one_type().map(|(kernels, matrices)| {
            let wide = self.wide(kernels, count_tiles(matrices), true);
            wide.map_or(Order::ByColumn, |wide| wide.order)
        });
        let first = orders.next().unwrap_or(Order::ByColumn);
        let order = match orders.all(|order| order == first) {
            true => first,
            false => Order::ByColumn,
        };
        self.make_ready(ready, &params, matrices, order);
        for (kernels, matrices) in of_one_type() {
            self.ready_product(kernels, source, matrices, view, order);
        }
    }

    /// Makes the rows of a product ready, in an order.
    fn make_ready(
        &mut self,
        kernel: Function<ReadyParams>,
        product: &ProductParams,
        matrices: &[Matrix],
        order: Order,
    ) {
        let params = ReadyParams {
            view: product.view,
            source: product.source,
            out: product.input,
            columns_of_run: GROUP * product.groups_of_run,
            sums: u32::from(matrices.iter().any(|m| has_min(m.ty))),
            order: order as u32,
            unused: 0,
        };
        self.launch(kernel, [self.rows as u32, 1, 1], 0, &params);
    }

    /// A gate and what it lets through; tells what the rows are then made of. For a lone row, and on trial for
    /// several, both matrices are one product, which writes the result.
    pub(super) fn swiglu(&mut self, source: Source, both: [Matrix; 2], view: View) -> Source {
        let [gate, up] = both;
        let kernels = self.kernels.products(gate.ty);
        let kernels = kernels.filter(|_| gate.ty == up.ty && self.takes_tensor_cores(&both));
        if let Some(lone) = kernels.and_then(|k| self.lone(k, source, &both, 2, view)) {
            self.launch_product(&lone);
            return Source::new(make::PLAIN, gate.out);
        }
        let ready = self.kernels.ready(source.make);
        if let (Some(kernels), Some(ready)) = (kernels, ready)
            && self.rows > 1
            && let Some(several) = self.several(kernels, source, &both, 2, view)
        {
            self.make_ready(ready, &several.params, &both, Order::ByColumn);
            self.launch_product(&several);
            return Source::new(make::PLAIN, gate.out);
        }
        self.product(source, &both, view);
        Source {
            b: up.out,
            ..Source::new(make::SWIGLU, gate.out)
        }
    }

    /// The kernel for rows of a program with many, if these are enough for it; `warpgroups`: or one by warpgroups.
    fn wide<'k>(
        &self,
        kernels: &'k Products,
        tiles: u32,
        warpgroups: bool,
    ) -> Option<&'k WideProduct> {
        let multiprocessors = self.weights.device.multiprocessors;
        let count = |w: &WideProduct| self.wide_blocks(w, tiles).iter().product::<u32>();
        if self.rows as u32 <= MANY || count(&kernels.wide[0]) < multiprocessors / 2 {
            return None;
        }
        // Cycles of the multiprocessor that has the most to do.
        let cycles = |w: &&WideProduct| count(w).div_ceil(multiprocessors) * w.cycles;
        let warpgroup = kernels.warpgroup.iter().flatten();
        let warpgroup = warpgroup.filter(|_| warpgroups);
        kernels.wide.iter().chain(warpgroup).min_by_key(cycles)
    }

    fn wide_blocks(&self, wide: &WideProduct, tiles: u32) -> [u32; 3] {
        let rows = self.rows as u32;
        [tiles.div_ceil(wide.tiles), rows.div_ceil(wide.rows), 1]
    }

    /// Rows that are ready, in an order, with matrices of one type.
    fn ready_product(
        &mut self,
        kernels: &Products,
        source: Source,
        matrices: &[Matrix],
        view: View,
        order: Order,
    ) {
        let mut params = self.product_params(source, matrices, view);
        if let Some(wide) = self.wide(kernels, params.tiles, order != Order::ByColumn) {
            let blocks = self.wide_blocks(wide, params.tiles);
            let shared = wide.shared as u32;
            if wide.order == Order::ByColumn {
                return self.launch(wide.function, blocks, shared, &params);
            }
            // A block for each multiprocessor goes through its part of them.
            let multiprocessors = self.weights.device.multiprocessors;
            let grid = [blocks.iter().product::<u32>().min(multiprocessors), 1, 1];
            params.row_blocks = blocks[1];
            return self.launch_blocks_of(WARPGROUPS_BLOCK, wide.function, grid, shared, &params);
        }
        if let Some(several) = self.several(kernels, source, matrices, 1, view) {
            return self.launch_product(&several);
        }
        let rows = self.rows as u32;
        let (kernel, each) = match rows <= FEW {
            true => (kernels.few, FEW),
            false => (kernels.many, MANY),
        };
        let [ring, _] = kernels.rings;
        // All devices of 8.0 and later have room for that.
        params.stage_units = ring.units_of_stage(params.groups_of_run, MOST_RING);
        // As many columns of sums as rows, each a little longer than a tile (many.cuh).
        let sums = 4 * RUNS * each * (TILE_ROWS + 4);
        let shared = sums + params.stage_units * ring.bytes_of_unit();
        let grid = [params.tiles, rows.div_ceil(each), 1];
        self.launch(kernel, grid, shared, &params);
    }

    /// A product of 8 or 32 ready rows a block by the kernels on trial, with matrices of one type; none where they are
    /// not asked for, where another is better, or where two abreast do not fit. `abreast`: matrices of which a block
    /// takes the same tiles.
    fn several(
        &self,
        kernels: &Products,
        source: Source,
        matrices: &[Matrix],
        abreast: u32,
        view: View,
    ) -> Option<Product> {
        let all = kernels.several.filter(|_| self.rows > 1)?;
        let mut params = self.product_params(source, matrices, view);
        params.tiles /= abreast;
        let device = &self.weights.device;
        let rows = self.rows as u32;
        let (kernel, each) = match rows <= FEW {
            true => (all[0], FEW),
            false => (all[1], MANY),
        };
        let row_blocks = rows.div_ceil(each);
        // More than one and a half times two blocks for each multiprocessor take longer than those by warpgroups.
        let blocks = params.tiles * row_blocks;
        if abreast == 2 && row_blocks > 1 && blocks >= 3 * device.multiprocessors {
            return None;
        }
        // As in several.cuh: scales, and rings of weights and of activations, of which sums take the place.
        let ring = kernels.several_rings[abreast as usize - 1];
        let group = each * (2 * GROUP + if has_min(matrices[0].ty) { 4 } else { 0 });
        let ahead = if abreast == 1 { 4 } else { 3 };
        let fixed = 4 * RUNS * each + RUNS * ahead * group;
        let whole = device.product_shared() as u32;
        // Two blocks on a multiprocessor, if that leaves a ring.
        let most = (whole / 2).saturating_sub(fixed).min(MOST_RING);
        params.stage_units = ring.units_of_stage(params.groups_of_run, most);
        let rings = params.stage_units * ring.bytes_of_unit();
        let sums = 4 * abreast * RUNS * each * (TILE_ROWS + 4);
        (fixed + rings <= whole).then_some(Product {
            kernel: kernel[abreast as usize - 1],
            grid: [params.tiles, row_blocks, 1],
            shared: (4 * RUNS * each + sums).max(fixed + rings),
            params,
        })
    }

    /// A product that makes a lone row ready itself, with matrices of one type; none where there is no such
    /// kernel, or not enough shared memory. `abreast`: matrices of which a block takes the same tiles.
    fn lone(
        &self,
        kernels: &Products,
        source: Source,
        matrices: &[Matrix],
        abreast: u32,
        view: View,
    ) -> Option<Product> {
        let kernel = match (source.make, abreast) {
            _ if self.rows > 1 => return None,
            (make::NORM, 2) => kernels.lone_swiglu,
            (make::NORM, _) => kernels.lone_norm,
            (make::PLAIN, 1) => kernels.lone_plain,
            (make::ATTENTION, 1) => kernels.lone_attention,
            _ => return None,
        };
        let mut params = self.product_params(source, matrices, view);
        params.tiles /= abreast;
        // As many tiles a block as leave a block for every multiprocessor, for what a block does before its
        // first product is then done seldom.
        let enough = self.weights.device.multiprocessors;
        let several = (1..=3).rev().find(|log| params.tiles >> log >= enough);
        params.log_tiles = several.unwrap_or(0);
        let ring = kernels.rings[abreast as usize - 1];
        let sums = (4 * abreast * RUNS * TILE_ROWS) << params.log_tiles;
        let row = sums + row_bytes(params.input.stride);
        let most = (self.weights.device.product_shared() as u32).checked_sub(row)?;
        let groups = params.groups_of_run << params.log_tiles;
        params.stage_units = ring.units_of_stage(groups, most.min(MOST_RING));
        let rings = params.stage_units * ring.bytes_of_unit();
        (rings <= most).then_some(Product {
            kernel,
            grid: [params.tiles.div_ceil(1 << params.log_tiles), 1, 1],
            params,
            shared: row + rings,
        })
    }

    fn launch_product(&mut self, product: &Product) {
        let Product { kernel, grid, .. } = *product;
        self.launch(kernel, grid, product.shared, &product.params);
    }

    /// In single precision throughout.
    fn exact_product(&mut self, params: ProductParams, matrices: &[Matrix]) {
        let single = matrices.iter().all(|m| m.ty == TensorType::F32.gguf_id());
        let (rows, tiles) = (self.rows as u32, params.tiles);
        // The warps' sums of a row, and the row (exact.cuh).
        let sums = 4 * RUNS * TILE_ROWS;
        let shared = sums + 4 * params.input.stride;
        // With GELU, of a router's hidden layer, the product would take too many registers.
        if rows == 1 && shared as usize <= MOST_SHARED && params.source.make != make::GELU {
            return self.launch(
                self.kernels.lone_exact[usize::from(single)],
                [tiles, 1, 1],
                shared,
                &params,
            );
        }
        let floats = ReadyParams {
            view: params.view,
            source: params.source,
            out: params.input,
            columns_of_run: 0,
            sums: 0,
            order: Order::ByColumn as u32,
            unused: 0,
        };
        self.launch(self.kernels.floats, [rows, 1, 1], 0, &floats);
        let grid = [tiles, rows.div_ceil(FEW), 1];
        let exact = self.kernels.exact[usize::from(single)];
        self.launch(exact, grid, FEW * sums, &params);
    }

    /// Whether tensor cores can do it with all matrices.
    fn takes_tensor_cores(&self, matrices: &[Matrix]) -> bool {
        let whole = matrices[0].columns.is_multiple_of(GROUP);
        whole
            && matrices
                .iter()
                .all(|m| self.kernels.products(m.ty).is_some())
    }

    fn product_params(&self, source: Source, matrices: &[Matrix], view: View) -> ProductParams {
        let mut all = [matrices[0]; 3];
        all[..matrices.len()].copy_from_slice(matrices);
        let mut first_tiles = [u32::MAX; 3];
        for (i, first) in first_tiles.iter_mut().take(matrices.len()).enumerate() {
            *first = count_tiles(&matrices[..i]);
        }
        let columns = matrices[0].columns;
        let groups = columns.div_ceil(GROUP);
        ProductParams {
            matrices: all,
            first_tiles,
            tiles: count_tiles(matrices),
            groups,
            groups_of_run: groups.div_ceil(RUNS).next_multiple_of(2),
            log_tiles: 0,
            stage_units: 0,
            slot: self.slot,
            zero: 0,
            row_blocks: 0,
            unused: 0,
            input: self.prepared(columns as usize),
            view,
            source,
        }
    }
}

fn count_tiles(matrices: &[Matrix]) -> u32 {
    matrices.iter().map(|m| m.rows.div_ceil(TILE_ROWS)).sum()
}

/// A product's launch, before it is decided on.
struct Product {
    kernel: Function<ProductParams>,
    params: ProductParams,
    grid: [u32; 3],
    shared: u32,
}

/// Bytes of shared memory in which a lone row of `stride` elements is made ready, as in lone.cuh: its runs' scales and
/// squares, halves and a sum for each group, of one group more.
fn row_bytes(stride: u32) -> u32 {
    8 * RUNS + (2 * (stride + GROUP) + 4 * (stride / GROUP + 1)).next_multiple_of(16)
}

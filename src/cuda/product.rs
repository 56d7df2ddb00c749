//! Matrix products, as launches.

use super::functions::{Kernels, MOST_SHARED, Products, WideProduct};
use super::launch::Function;
use super::params::*;
use super::program::Writer;
use crate::error::Error;
use crate::quant::TensorType;
use std::cmp::Ordering;

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

    /// A gate and what it lets through; tells what the rows are then made of. Where there are
    /// few rows, both matrices are one product, which writes the result.
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
            && let Some(many) = self.many(kernels, source, &both, 2, view)
        {
            self.make_ready(ready, &many.params, &both, Order::ByColumn);
            self.launch_product(&many);
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
        let warpgroup = kernels.warpgroup.iter().flatten();
        let warpgroup = warpgroup.filter(|_| warpgroups);
        // Blocks that are enough. For 32 rows those of an output matrix alone, and by warpgroups.
        let enough = match (self.rows as u32).cmp(&MANY) {
            Ordering::Greater => multiprocessors / 2,
            Ordering::Equal if warpgroup.clone().next().is_some() => 4 * multiprocessors,
            _ => return None,
        };
        if count(&kernels.wide[0]) < enough {
            return None;
        }
        // Cycles of the multiprocessor that has the most to do.
        let cycles = |w: &&WideProduct| count(w).div_ceil(multiprocessors) * w.cycles;
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
        match self.many(kernels, source, matrices, 1, view) {
            Some(many) => self.launch_product(&many),
            // No device of 8.0 or later has so little.
            None => self.note(Err(Error::device("a product has no room in shared memory"))),
        }
    }

    /// A product of ready rows, 8 or 32 at a time, with matrices of one type. `abreast`: matrices of which a block
    /// takes the same tiles; none where two do not fit, or another kernel is better.
    fn many(
        &self,
        kernels: &Products,
        source: Source,
        matrices: &[Matrix],
        abreast: u32,
        view: View,
    ) -> Option<Product> {
        let mut params = self.product_params(source, matrices, view);
        params.tiles /= abreast;
        let device = &self.weights.device;
        let ring = kernels.rings[abreast as usize - 1];
        let whole = device.product_shared() as u32;
        let rows = self.rows as u32;
        let of_rows = |each: u32| {
            let mut params = params;
            // More than one and a half times two for each multiprocessor take longer than wide blocks, on 9.0 (where
            // each part of the rows had a block of its own).
            let parts = rows.div_ceil(each);
            let tiles = params.tiles;
            if abreast == 2 && parts > 1 && tiles * parts >= 3 * device.multiprocessors {
                return None;
            }
            // As in many.cuh: scales, and rings of activations, of which sums take the place, and of weights.
            let group = each * (2 * GROUP + if has_min(matrices[0].ty) { 4 } else { 0 });
            let ahead = BATCHES_AHEAD[abreast as usize - 1];
            let fixed = |at_once| 4 * RUNS * each + RUNS * ahead * at_once * group;
            // Two blocks on a multiprocessor, if that leaves a ring.
            let most = (whole / 2).saturating_sub(fixed(1)).min(MOST_RING);
            params.stage_units = ring.units_of_stage(params.groups_of_run, 1, most);
            let mut shared = fixed(1) + params.stage_units * ring.bytes_of_unit();
            // So many blocks share the rows that the busiest place has least to do; as few as that takes, for the
            // weights come once for each.
            let places = match device.fits_twice(shared as usize) {
                true => 2 * device.multiprocessors,
                false => device.multiprocessors,
            };
            let turns = |blocks: &u32| (tiles * blocks).div_ceil(places) * parts.div_ceil(*blocks);
            let row_blocks = (1..=parts).min_by_key(turns).unwrap_or(1);
            // Blocks that have a multiprocessor each bring twice as much together, if their warps have that much.
            if params.groups_of_run > ahead && tiles * row_blocks <= device.multiprocessors {
                let left = whole.saturating_sub(fixed(2));
                let units = ring.units_of_stage(params.groups_of_run, 1, left);
                let more = fixed(2) + units * ring.bytes_of_unit();
                if more <= whole && ring.is_early_enough(units, params.groups_of_run, 2 * ahead) {
                    (params.stage_units, params.groups_at_once, shared) = (units, 2, more);
                }
            }
            let all = if each == FEW {
                kernels.few
            } else {
                kernels.many
            };
            (shared <= whole).then_some(Product {
                kernel: all[abreast as usize - 1],
                grid: [tiles, row_blocks, 1],
                threads: BLOCK,
                shared,
                params,
            })
        };
        let most = if rows <= FEW { FEW } else { MANY };
        of_rows(most).or_else(|| of_rows(FEW))
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
        let device = &self.weights.device;
        let ring = kernels.lone_rings[abreast as usize - 1];
        let whole = device.product_shared() as u32;
        // Where kernels overlap, there are as many blocks as multiprocessors, and a block wants more than half of the
        // shared memory (two teams mostly want more than half of the registers too): so each multiprocessor has one, and
        // then the next kernel's. Placed as they come, blocks of kernels that overlap would leave half of the
        // multiprocessors without any. Elsewhere each has two, if there is room.
        let overlap = device.can_overlap();
        let of_blocks = |teams: u32, at_once: u32| {
            let mut params = params;
            let all = device.multiprocessors * at_once;
            let mut blocks = all * params.tiles.div_ceil(all * MOST_TILES * teams);
            if !overlap {
                blocks = blocks.min(params.tiles);
            }
            (params.tiles_of_block, params.longer_blocks) =
                (params.tiles / blocks, params.tiles % blocks);
            let tiles = params.tiles.div_ceil(blocks);
            // As in lone.cuh. A team without a tile has no rings.
            let sums = 4 * abreast * RUNS * TILE_ROWS * tiles;
            let row = sums + row_bytes(params.input.stride);
            // The device has a KiB of each block's.
            let left = (whole / at_once - 1024 * (at_once - 1)).checked_sub(row)?;
            let most = if overlap { MOST_LONE_RINGS } else { MOST_RING };
            let with_tiles = teams.min(tiles);
            let (groups, tiles_of_team) = (params.groups_of_run, tiles.div_ceil(teams));
            let room = left.min(most) / with_tiles;
            params.stage_units = ring.units_of_stage(groups, tiles_of_team, room);
            let rings = params.stage_units * ring.bytes_of_unit() * with_tiles;
            let least = if overlap { whole / 2 + 2048 } else { 0 };
            (rings <= left).then_some(Product {
                kernel,
                grid: [blocks, 1, 1],
                threads: teams * BLOCK,
                shared: (row + rings).max(least),
                params,
            })
        };
        match overlap {
            true => of_blocks(2, 1),
            false => of_blocks(1, 2),
        }
        .or_else(|| of_blocks(1, 1))
    }

    fn launch_product(&mut self, product: &Product) {
        let Product { kernel, grid, .. } = *product;
        self.launch_blocks_of(
            product.threads,
            kernel,
            grid,
            product.shared,
            &product.params,
        );
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
                .all(|m| self.kernels.products(m.ty).is_some() && self.weights.fit_halves(m.data))
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
            tiles_of_block: 0,
            longer_blocks: 0,
            stage_units: 0,
            slot: self.slot,
            zero: 0,
            row_blocks: 0,
            rows: self.rows as u32,
            groups_at_once: 1,
            input: self.prepared(columns as usize),
            view,
            source,
        }
    }
}

/// Tiles of a team for a lone row: a thread finishes a row of one.
const MOST_TILES: u32 = BLOCK / TILE_ROWS;

/// Bytes of all rings of a block for a lone row that has a multiprocessor to itself.
const MOST_LONE_RINGS: u32 = 136 << 10;

fn count_tiles(matrices: &[Matrix]) -> u32 {
    matrices.iter().map(|m| m.rows.div_ceil(TILE_ROWS)).sum()
}

/// A product's launch, before it is decided on.
struct Product {
    kernel: Function<ProductParams>,
    params: ProductParams,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
}

/// Bytes of shared memory in which a lone row of `stride` elements is made ready, as in lone.cuh: its runs' scales and
/// squares, halves and a sum for each group, of one group more.
fn row_bytes(stride: u32) -> u32 {
    8 * RUNS + (2 * (stride + GROUP) + 4 * (stride / GROUP + 1)).next_multiple_of(16)
}

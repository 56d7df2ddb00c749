//! The kernels by name, and the shared memory that they take.

use super::driver::Device;
use super::launch::{Function, Module};
use super::params::*;
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::kv::KvType;
use crate::memory::reserved;
use crate::quant::TensorType;
use crate::text::Text;
use std::ffi::CStr;
use std::fmt;

/// The kernels by name.
pub(super) struct Kernels {
    pub begin: Function<BeginParams>,
    pub embed: Function<EmbedParams>,
    pub copy_rows: Function<CopyRowsParams>,
    /// By what the rows are made of (`make`); none where products take floats only.
    ready: Option<[Function<ReadyParams>; 6]>,
    pub floats: Function<ReadyParams>,
    /// By tensor cores, for each type of matrices that the model has.
    products: Vec<(u32, Products)>,
    /// In single precision, with matrices of any type and of F32 only: for one row, which it makes ready, and for
    /// up to `FEW` a block.
    pub lone_exact: [Function<ProductParams>; 2],
    pub exact: [Function<ProductParams>; 2],
    pub store: ByCache,
    /// For many rows of a session, in halves.
    pub store_pages: Function<StoreParams>,
    attention_f32: Function<AttentionParams>,
    /// By whether heads are whole chunks of elements, and whether blocks have one row, which matters to tensor cores.
    attention_f16: [[Function<AttentionParams>; 2]; 2],
    attention_q8_0: Function<AttentionParams>,
    /// For many rows of a session, by the size of a head, on devices that have it.
    attention_prompt: Option<[(usize, Function<AttentionParams>); 2]>,
    pub seats: Function<SeatsParams>,
    pub score: Function<ScoreParams>,
    pub select: Function<SelectParams>,
    pub decide: Function<DecideParams>,
    pub merge: Function<MergeParams>,
    pub leave: Function<LeaveParams>,
    pub candidates: Function<CandidatesParams>,
    pub sample: Function<SampleParams>,
    /// Where the driver has conditional nodes.
    pub condition: Option<Function<ConditionParams>>,
}

/// A kernel that stores keys and values for each type of cache.
pub(super) struct ByCache {
    f32: Function<StoreParams>,
    f16: Function<StoreParams>,
    q8_0: Function<StoreParams>,
}

impl ByCache {
    pub fn of(&self, ty: KvType) -> Function<StoreParams> {
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
    /// For up to `FEW` rows at a time, and for up to `MANY`: with one matrix, and with a gate and what it lets through.
    pub few: [Function<ProductParams>; 2],
    pub many: [Function<ProductParams>; 2],
    /// For more rows, where so many blocks are enough, from the smallest blocks on.
    pub wide: [WideProduct; 3],
    /// The same by warpgroups, on devices that have them; they want rows in an order of their own (`Order`). For 64 rows,
    /// and for 128, where there are registers enough for the type.
    pub warpgroup: [Option<WideProduct>; 2],
    /// What those for a lone row, and the others, have in shared memory, with one matrix and with two abreast.
    pub lone_rings: [Ring; 2],
    pub rings: [Ring; 2],
}

/// A product for blocks of some tiles and some rows of activations.
#[derive(Clone, Copy)]
pub(super) struct WideProduct {
    pub function: Function<ProductParams>,
    pub tiles: u32,
    pub rows: u32,
    /// What a block takes for a group of columns, to compare with others: of blocks by warps by count
    /// (src/cuda/kernels/wide.cuh), of those by warpgroups so many times less as a device needed less.
    pub cycles: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// How it wants its rows.
    pub order: Order,
}

/// Whether the image for a device has kernels by warpgroups.
fn has_warpgroups(device: &Device) -> bool {
    device.architecture == 90
}

impl WideProduct {
    /// Bytes of shared memory, as `Wide` in src/cuda/kernels/wide.cuh; `swizzled`: for warpgroups.
    fn shared(device: &Device, ty: TensorType, tiles: u32, rows: u32, swizzled: bool) -> usize {
        let most = match (device.architecture, rows) {
            (90, 128) => 208 << 10,
            (90, _) if swizzled => 208 << 10,
            (90, _) => 104 << 10,
            (_, 128) => 99 << 10,
            _ => 80 << 10,
        };
        let (tiles, rows) = (tiles as usize, rows as usize);
        let columns = (WIDE_GROUPS * GROUP) as usize;
        let (unit, all_rows) = (ty.block_len().max(columns), tiles * TILE_ROWS as usize);
        let weights = all_rows * (unit / ty.block_len() * ty.block_bytes());
        let sources = if ty.block_len() == 1 { all_rows } else { tiles };
        let activations = rows * (2 * columns + if has_min(ty.gguf_id()) { 12 } else { 4 });
        // Eight rows, at whole multiples of which a stage begins.
        let whole = if swizzled { 16 * columns } else { 1 };
        // Warpgroups have gates.
        let fixed = if swizzled { 128 + whole } else { 8 * sources };
        let bytes = |stages| {
            let units = if unit == columns { stages } else { 2 };
            fixed + units * weights + stages * activations.next_multiple_of(whole)
        };
        let stages = if unit == columns { 3..=6 } else { 3..=5 };
        let fits = stages.rev().find(|stages| bytes(*stages) <= most);
        bytes(fits.unwrap_or(2))
    }
}

/// The rings of a block's warps, as `Ring` in ring.cuh.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    /// Bytes and groups of what is copied at a time, for all matrices abreast.
    bytes: u32,
    groups: u32,
    stages: u32,
    /// Groups that are multiplied together.
    step: u32,
}

impl Ring {
    /// For `abreast` matrices; `plain`: groups of a unit of plain types.
    fn new(ty: TensorType, abreast: u32, plain: usize, step: u32) -> Self {
        let (columns, bytes) = match ty.block_len() {
            1 => (
                plain * GROUP as usize,
                ty.block_bytes() * plain * GROUP as usize,
            ),
            columns => (columns, ty.block_bytes()),
        };
        let bytes = abreast * TILE_ROWS * bytes as u32;
        Ring {
            bytes,
            groups: columns as u32 / GROUP,
            stages: if 4 * RUNS * bytes <= MOST_RING { 4 } else { 2 },
            step,
        }
    }

    /// Bytes that a unit of a stage takes, over all stages and warps.
    pub fn bytes_of_unit(&self) -> u32 {
        self.stages * RUNS * self.bytes
    }

    /// Units of a stage, which is of one tile: of `tiles` with `groups` each for a warp, what `most` bytes have room for,
    /// but one at least.
    pub fn units_of_stage(&self, groups: u32, tiles: u32, most: u32) -> u32 {
        let of_tile = groups.div_ceil(self.groups);
        // Units that come together, for their groups are multiplied together.
        let whole = if self.groups == 1 { self.step } else { 1 };
        let wanted = (of_tile * tiles).div_ceil(self.stages).min(of_tile);
        let room = most / self.bytes_of_unit() / whole * whole;
        let units = wanted.next_multiple_of(whole).min(room.max(whole));
        // No more than as many stages need, if all are alike.
        let stages_of_tile = of_tile.div_ceil(units);
        of_tile.div_ceil(stages_of_tile).next_multiple_of(whole)
    }

    /// Whether stages of so many units are filled before they are used, where what is waited for are activations, `ahead`
    /// groups of them, that came before or together with the weights: they are filled when the stage before is done with,
    /// or all at the beginning, which is so where all `groups` of a run, that may begin within a unit, have room.
    pub fn is_early_enough(&self, units: u32, groups: u32, ahead: u32) -> bool {
        let stage = units * self.groups;
        (self.stages - 1) * stage + 1 >= ahead || self.stages * stage >= groups + self.groups - 1
    }
}

impl Products {
    fn find(weights: &Weights, ty: TensorType) -> Result<Self> {
        let (device, module) = (&weights.device, &weights.module);
        let named = |kind: fmt::Arguments| {
            // Without the heap.
            let text = Text::new(format_args!("mor_{kind}_{}", ty.name()));
            let mut name = [0; Text::CAPACITY + 1];
            let (bytes, _) = name.split_at_mut(text.len());
            bytes.copy_from_slice(text.as_bytes());
            bytes.make_ascii_lowercase();
            let name = CStr::from_bytes_until_nul(&name);
            module.function(name.map_err(|_| Error::device("a kernel's name"))?)
        };
        let find = |kind: &str| named(format_args!("{kind}"));
        let of_size = |kind: &str, tiles, rows, cycles, order| {
            let swizzled = order != Order::ByColumn;
            Ok(WideProduct {
                function: named(format_args!("{kind}_product_{}x{rows}", tiles * TILE_ROWS))?,
                tiles,
                rows,
                cycles,
                shared: WideProduct::shared(device, ty, tiles, rows, swizzled),
                order,
            })
        };
        let fragments = match ty.block_len() {
            1 => Order::PlainFragments,
            _ => Order::BlockFragments,
        };
        let wide = |tiles, rows, cycles| of_size("wide", tiles, rows, cycles, Order::ByColumn);
        let warpgroup = |rows, cycles| of_size("warpgroup", 8, rows, cycles, fragments);
        Ok(Products {
            lone_norm: find("lone_product_norm")?,
            lone_plain: find("lone_product_plain")?,
            lone_attention: find("lone_product_attention")?,
            lone_swiglu: find("lone_swiglu")?,
            few: [find("few_product")?, find("few_swiglu")?],
            many: [find("many_product")?, find("many_swiglu")?],
            wide: [wide(4, 64, 256)?, wide(8, 64, 352)?, wide(8, 128, 512)?],
            warpgroup: match (has_warpgroups(device), ty.block_len()) {
                (false, _) => [None; 2],
                (true, 1) => [Some(warpgroup(64, 110)?), Some(warpgroup(128, 196)?)],
                (true, _) => [Some(warpgroup(64, 110)?), None],
            },
            lone_rings: [Ring::new(ty, 1, 2, 2), Ring::new(ty, 2, 2, 1)],
            rings: [Ring::new(ty, 1, 1, 1), Ring::new(ty, 2, 1, 1)],
        })
    }

    /// Those that have rings in shared memory.
    fn with_rings(&self) -> impl Iterator<Item = Function<ProductParams>> {
        let lone = [
            self.lone_norm,
            self.lone_plain,
            self.lone_attention,
            self.lone_swiglu,
        ];
        lone.into_iter().chain(self.few).chain(self.many)
    }
}

/// Elements of a head that attention takes together.
const ELEMENTS: usize = 64;

/// Bytes of dynamic shared memory for a row in single precision. Every device from 7.0 on has so much for a block,
/// beside what the kernel declares.
pub(super) const MOST_SHARED: usize = 56 << 10;

impl Kernels {
    /// The kernels that a model needs on a device.
    pub fn find(weights: &Weights, conditional: Option<&Module>) -> Result<Self> {
        let module = &weights.module;
        let (mut ready, mut products) = (None, reserved(weights.types.len())?);
        let attention_f16 = match weights.device.has_tensor_cores() {
            true => [
                [
                    module.function(c"mor_attention_halves")?,
                    module.function(c"mor_attention_halves_alone")?,
                ],
                [
                    module.function(c"mor_attention_halves_whole")?,
                    module.function(c"mor_attention_halves_whole_alone")?,
                ],
            ],
            false => [[module.function(c"mor_attention_f16")?; 2]; 2],
        };
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
                products.push((ty.gguf_id(), Products::find(weights, *ty)?));
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
            store_pages: module.function(c"mor_store_f16_pages")?,
            attention_f32: module.function(c"mor_attention_f32")?,
            attention_f16,
            attention_q8_0: module.function(c"mor_attention_q8_0")?,
            attention_prompt: match has_warpgroups(&weights.device) {
                true => Some([
                    (64, module.function(c"mor_attention_prompt_64")?),
                    (128, module.function(c"mor_attention_prompt_128")?),
                ]),
                false => None,
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

    /// Attention over a cache of a type; `alone`: by blocks of one row.
    pub fn attention(&self, ty: KvType, head_dim: usize, alone: bool) -> Function<AttentionParams> {
        let whole = head_dim.is_multiple_of(ELEMENTS);
        match ty {
            KvType::F32 => self.attention_f32,
            KvType::F16 => self.attention_f16[usize::from(whole)][usize::from(alone)],
            KvType::Q8_0 => self.attention_q8_0,
        }
    }

    /// Attention for many rows of a session over a cache of halves, where there is such a kernel.
    pub fn attention_prompt(&self, head_dim: usize) -> Option<Function<AttentionParams>> {
        let mut all = self.attention_prompt.iter().flatten();
        all.find(|(of, _)| *of == head_dim)
            .map(|(_, kernel)| *kernel)
    }

    /// Bytes of shared memory that it takes, as `Prompt` in attention_prompt.cuh: keys, values and queries.
    pub fn attention_prompt_shared(head_dim: usize) -> usize {
        2 * (2 * PART as usize * head_dim) + BLOCK as usize * head_dim
    }

    /// Bytes of shared memory that attention takes: `Room` in attention_floats.cuh or, which is more, `Tile`
    /// in attention_halves.cuh.
    pub fn attention_shared(head_dim: usize) -> usize {
        let warps = BLOCK as usize / 32;
        let queries = head_dim.next_multiple_of(ELEMENTS) / 16 * 32 * 16;
        let scales = 2 * 4 * warps * warps;
        queries + scales + 4 * warps * warps * (ELEMENTS + 8)
    }

    /// The kernel that makes rows ready for tensor cores, out of what `make` says.
    pub fn ready(&self, make: u32) -> Option<Function<ReadyParams>> {
        self.ready.as_ref()?.get(make as usize).copied()
    }

    /// Products by tensor cores with matrices of a type.
    pub fn products(&self, ty: u32) -> Option<&Products> {
        let mut all = self.products.iter();
        all.find(|(of, _)| *of == ty).map(|(_, products)| products)
    }

    /// Lets the kernels have what a model needs.
    pub fn prepare(&self, weights: &Weights, head_dim: usize) -> Result<()> {
        let module = &weights.module;
        for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
            for alone in [false, true] {
                let attention = self.attention(ty, head_dim, alone);
                module.allow_shared_memory(attention, Self::attention_shared(head_dim))?;
            }
        }
        if let Some(attention) = self.attention_prompt(head_dim) {
            module.allow_shared_memory(attention, Self::attention_prompt_shared(head_dim))?;
        }
        for exact in self.lone_exact {
            module.allow_shared_memory(exact, MOST_SHARED)?;
        }
        for (_, products) in &self.products {
            for product in products.with_rings() {
                module.allow_shared_memory(product, weights.device.product_shared())?;
            }
            for wide in products
                .wide
                .iter()
                .chain(products.warpgroup.iter().flatten())
            {
                module.allow_shared_memory(wide.function, wide.shared)?;
            }
        }
        Ok(())
    }
}

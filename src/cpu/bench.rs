//! What `benches/kernels.rs` measures: single kernels, on chosen instruction sets.

use super::activations::panel_words;
use super::attention::{Attention, Seat, partial_floats, scratch_bytes as attention_bytes};
use super::matmul::{MatMul, Product, scratch_bytes};
use super::simd::Level;
use super::team::Team;
use super::thread::ThreadParams;
use crate::kv::{KvCache, KvShape, KvType, PAGE_TOKENS};
use crate::model::{Linear, Matrix};
use crate::quant::TensorType;

/// The names of the instruction sets that this machine has.
pub fn levels() -> Vec<String> {
    Level::available()
        .map(|level| format!("{level:?}"))
        .collect()
}

fn level(name: &str) -> Option<Level> {
    Level::available().find(|level| format!("{level:?}") == name)
}

/// Small positive numbers, whatever the bytes are read as.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 1u64;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 58) as u8
    };
    (0..count).map(next).collect()
}

fn floats(count: usize) -> Vec<f32> {
    bytes(count)
        .into_iter()
        .map(|b| f32::from(b) / 32.0 - 1.0)
        .collect()
}

/// Memory that begins at a multiple of 64.
fn aligned<T>(memory: &mut [T]) -> &mut [T] {
    let start = memory.as_ptr().align_offset(64);
    &mut memory[start..]
}

/// A product of a matrix of random weights with some rows.
pub struct MatrixProduct {
    level: Level,
    file: Vec<u8>,
    linear: Linear,
    n: usize,
    x: Vec<f32>,
    panels: Vec<u32>,
    y: Vec<f32>,
    scratch: Vec<u8>,
}

impl MatrixProduct {
    /// `None` when the machine lacks the instruction set or the type has no rows of this length.
    pub fn new(
        set: &str,
        ty: TensorType,
        tiled: bool,
        [rows, columns]: [usize; 2],
        n: usize,
    ) -> Option<Self> {
        let row_bytes = ty.row_bytes(columns)?;
        let weight = Matrix {
            ty,
            rows,
            columns,
            offset: 0,
            row_bytes,
            tiled: tiled && ty.block_len() > 1,
        };
        Some(MatrixProduct {
            level: level(set)?,
            file: bytes(rows * row_bytes),
            linear: Linear { weight, bias: None },
            n,
            x: floats(n * columns + 16),
            panels: vec![0; panel_words(n, columns)],
            y: vec![0.0; n * rows],
            scratch: vec![0; scratch_bytes(columns) + 64],
        })
    }

    /// Bytes of weights.
    pub fn weight_bytes(&self) -> usize {
        self.file.len()
    }

    /// Quantizes the rows and multiplies, once, on this thread.
    pub fn run(&mut self) {
        let Ok(mut team) = Team::new(1, &ThreadParams::default(), &mut []) else {
            return;
        };
        let mut matmul = MatMul {
            team: &mut team,
            level: self.level,
            file: &self.file,
            panels: &mut self.panels,
            scratch: aligned(&mut self.scratch),
        };
        let mut product = [Product::new(&self.linear, &mut self.y)];
        // As in a session, from a multiple of 64 bytes on.
        matmul.run(self.n, aligned(&mut self.x), &|_, _| {}, &mut product);
    }
}

/// Attention of some rows over a context of random keys and values.
pub struct LongAttention {
    level: Level,
    shape: KvShape,
    heads: usize,
    pages: Vec<u8>,
    seats: Vec<Seat>,
    q: Vec<f32>,
    out: Vec<f32>,
    scratch: Vec<u8>,
    partials: Vec<f32>,
}

impl LongAttention {
    /// `rows` rows at the end of a context of `context` entries. `None` as for [`MatrixProduct`].
    pub fn new(
        set: &str,
        ty: KvType,
        heads: [usize; 2],
        dim: usize,
        context: usize,
        rows: usize,
    ) -> Option<Self> {
        let [heads, kv_heads] = heads;
        let pages = context.div_ceil(PAGE_TOKENS);
        let shape = KvShape {
            planes: 1,
            sequences: 1,
            table_pages: pages,
            pages,
            ..KvShape::new(ty, kv_heads, dim)?
        };
        let seat = |row| Seat {
            visible: (context - rows + 1 + row) as u32,
            ..Seat::default()
        };
        Some(LongAttention {
            level: level(set)?,
            heads,
            pages: bytes(pages * shape.page_bytes()),
            seats: (0..rows).map(seat).collect(),
            q: floats(rows * heads * dim),
            out: vec![0.0; rows * heads * dim],
            scratch: vec![0; attention_bytes(&shape, heads) + 64],
            partials: vec![0.0; partial_floats(&shape, heads)],
            shape,
        })
    }

    /// Bytes of keys and values that a row sees.
    pub fn bytes(&self) -> usize {
        self.pages.len()
    }

    /// Runs it once, on this thread.
    pub fn run(&mut self) {
        let Ok(mut team) = Team::new(1, &ThreadParams::default(), &mut []) else {
            return;
        };
        let mut tables: Vec<u32> = (0..self.shape.pages as u32).collect();
        let kv = KvCache {
            shape: &self.shape,
            pages: &mut self.pages,
            tables: &mut tables,
            lengths: &mut [self.seats.last().map_or(0, |s| s.visible)],
            owners: &mut [],
            free: &mut [],
            counts: &mut [0; 2],
        };
        let attention = Attention {
            level: self.level,
            kv: &kv,
            heads: self.heads,
            seats: &self.seats,
            q: &self.q,
        };
        let scratch = aligned(&mut self.scratch);
        attention.run(&mut team, scratch, &mut self.partials, &mut self.out);
    }
}

/// A team of threads that is given empty tasks, one for each thread.
pub struct Barrier {
    team: Team,
}

impl Barrier {
    /// A team of `threads`, the caller among them.
    pub fn new(threads: usize) -> Option<Self> {
        // Not given back: the team keeps it to the end.
        let memory = vec![0u8; Team::bytes(threads) + Team::ALIGNMENT].leak();
        let team = Team::new(threads, &ThreadParams::default(), aligned(memory)).ok()?;
        Some(Barrier { team })
    }

    /// Opens a job, and waits until all is done.
    pub fn run(&mut self) {
        self.team.run(self.team.threads(), &|_, _| {});
    }
}

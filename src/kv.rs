//! The ragged, paged KV cache.
//!
//! One pool of pages serves all sequences and planes. A plane, named by (recursion, layer), holds an
//! entry only for the tokens that were active there, in order of their positions; a page holds the
//! keys and values of [`PAGE_TOKENS`] entries of one plane of one sequence. So what a run takes
//! follows the work it did, and a token that left early costs no memory below its depth.

use crate::error::{Error, Result};
use crate::plan::Region;
use crate::quant::{TensorType, dequantize_into, quantize_row};

/// Entries of a page. Small enough that the last, half-empty page of each plane wastes little.
pub const PAGE_TOKENS: usize = 16;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// 4 bytes a value: as computed, for exact comparisons.
    F32,
    /// 2 bytes a value.
    #[default]
    F16,
    /// 34 bytes for 32 values; the head size must be a multiple of 32.
    Q8_0,
}

impl KvType {
    /// The block format that encodes a head.
    pub fn tensor_type(self) -> TensorType {
        match self {
            KvType::F32 => TensorType::F32,
            KvType::F16 => TensorType::F16,
            KvType::Q8_0 => TensorType::Q8_0,
        }
    }
}

/// The sizes of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvShape {
    /// How values are stored.
    pub ty: KvType,
    /// Key (and value) heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Planes of a sequence.
    pub planes: usize,
    /// Sequences.
    pub sequences: usize,
    /// Pages that one plane of one sequence can have.
    pub table_pages: usize,
    /// Pages in the pool.
    pub pages: usize,
    /// Bytes of one head of one entry.
    pub head_bytes: usize,
}

impl KvShape {
    /// Bytes of a page: keys, then values, each `[kv_heads][PAGE_TOKENS][head_dim]`.
    pub fn page_bytes(&self) -> usize {
        2 * self.kv_heads * PAGE_TOKENS * self.head_bytes
    }
}

/// Where the cache lies in the arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KvRegions {
    pub pages: Region,
    pub tables: Region,
    pub lengths: Region,
    pub free: Region,
    pub free_count: Region,
}

/// The cache, as it lies in the arena.
pub struct KvCache<'a> {
    pub(crate) shape: &'a KvShape,
    pub(crate) pages: &'a mut [u8],
    /// [sequences][planes][table_pages] page numbers.
    pub(crate) tables: &'a mut [u32],
    /// [sequences][planes] entries.
    pub(crate) lengths: &'a mut [u32],
    /// A stack of free pages, of which the first `free_count[0]` are valid.
    pub(crate) free: &'a mut [u32],
    pub(crate) free_count: &'a mut [u32],
}

impl KvCache<'_> {
    /// The sizes.
    pub fn shape(&self) -> &KvShape {
        self.shape
    }

    /// Makes every page free. Pages are not touched.
    pub(crate) fn reset(&mut self) {
        let pages = self.shape.pages;
        for (i, page) in self.free.iter_mut().enumerate() {
            *page = (pages - 1 - i) as u32;
        }
        self.free_count[0] = pages as u32;
        self.lengths.fill(0);
    }

    /// Pages in use.
    pub fn pages_used(&self) -> usize {
        self.shape.pages - self.free_count[0] as usize
    }

    fn list(&self, sequence: usize, plane: usize) -> usize {
        sequence * self.shape.planes + plane
    }

    /// Entries of a plane.
    pub fn length(&self, sequence: usize, plane: usize) -> usize {
        self.lengths[self.list(sequence, plane)] as usize
    }

    /// The pages of a plane in order; those past its length are stale.
    pub(crate) fn table(&self, sequence: usize, plane: usize) -> &[u32] {
        &self.tables[self.list(sequence, plane) * self.shape.table_pages..]
            [..self.shape.table_pages]
    }

    /// Makes room for one more entry and returns its slot. Fails, changing nothing, when the pool
    /// is empty.
    pub(crate) fn append(&mut self, sequence: usize, plane: usize) -> Result<usize> {
        let list = self.list(sequence, plane);
        let slot = self.lengths[list] as usize;
        if slot.is_multiple_of(PAGE_TOKENS) {
            let full = Error::KvFull {
                pages: self.shape.pages,
            };
            let left = self.free_count[0].checked_sub(1).ok_or(full)?;
            self.free_count[0] = left;
            self.tables[list * self.shape.table_pages + slot / PAGE_TOKENS] =
                self.free[left as usize];
        }
        self.lengths[list] += 1;
        Ok(slot)
    }

    /// Forgets the entries from `length` on and frees their pages.
    pub(crate) fn truncate(&mut self, sequence: usize, plane: usize, length: usize) {
        let list = self.list(sequence, plane);
        let old = self.lengths[list] as usize;
        if length >= old {
            return;
        }
        for page in length.div_ceil(PAGE_TOKENS)..old.div_ceil(PAGE_TOKENS) {
            self.free[self.free_count[0] as usize] =
                self.tables[list * self.shape.table_pages + page];
            self.free_count[0] += 1;
        }
        self.lengths[list] = length as u32;
    }

    /// Stores the key and value (each [kv_heads · head_dim]) of the entry at `slot`.
    pub(crate) fn store(
        &mut self,
        (sequence, plane, slot): (usize, usize, usize),
        key: &[f32],
        value: &[f32],
    ) -> Result<()> {
        let page = self.table(sequence, plane)[slot / PAGE_TOKENS];
        let (ty, head_dim) = (self.shape.ty.tensor_type(), self.shape.head_dim);
        let heads = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in heads.enumerate() {
            for (head, values) in [(head, key), (self.shape.kv_heads + head, value)] {
                let range = self.range(page, head, slot % PAGE_TOKENS);
                quantize_row(ty, values, &mut self.pages[range]).map_err(|_| {
                    Error::not_finite(format_args!("a key or a value, stored as {ty}"))
                })?;
            }
        }
        Ok(())
    }

    fn range(&self, page: u32, head: usize, slot: usize) -> std::ops::Range<usize> {
        let start = page as usize * self.shape.page_bytes()
            + (head * PAGE_TOKENS + slot) * self.shape.head_bytes;
        start..start + self.shape.head_bytes
    }

    /// The stored bytes of one head of an entry: keys first, then (from `kv_heads` on) values.
    pub(crate) fn bytes(&self, page: u32, head: usize, slot: usize) -> &[u8] {
        &self.pages[self.range(page, head, slot)]
    }

    /// As [`KvCache::bytes`], to be written.
    pub(crate) fn bytes_mut(&mut self, page: u32, head: usize, slot: usize) -> &mut [u8] {
        let range = self.range(page, head, slot);
        &mut self.pages[range]
    }

    /// Decodes a key.
    pub(crate) fn key(&self, page: u32, head: usize, slot: usize, out: &mut [f32]) {
        dequantize_into(
            self.shape.ty.tensor_type(),
            self.bytes(page, head, slot),
            out,
        );
    }

    /// The half-precision keys of one head in a page, `[PAGE_TOKENS, head_dim]`.
    pub(crate) fn page_keys(&self, page: u32, head: usize) -> &[[u8; 2]] {
        let bytes = PAGE_TOKENS * self.shape.head_bytes;
        let start = page as usize * self.shape.page_bytes() + head * bytes;
        self.pages[start..start + bytes].as_chunks::<2>().0
    }

    /// As [`KvCache::page_keys`], the values.
    pub(crate) fn page_values(&self, page: u32, head: usize) -> &[[u8; 2]] {
        self.page_keys(page, self.shape.kv_heads + head)
    }

    /// Decodes a value.
    pub(crate) fn value(&self, page: u32, head: usize, slot: usize, out: &mut [f32]) {
        self.key(page, self.shape.kv_heads + head, slot, out);
    }
}

//! The ragged, paged KV cache.
//!
//! One pool of pages serves all sequences and planes. A plane, named by (recursion, layer), holds an
//! entry only for the tokens that were active there, in order of their positions; a page holds the
//! keys and values of [`PAGE_TOKENS`] entries of one plane of one sequence. So what a run takes
//! follows the work it did, and a token that left early costs no memory below its depth.

use crate::cpu::team::Disjoint;
use crate::error::{Error, Result};
use crate::layout::parts;
use crate::model::MAX_HEAD_DIM;
use crate::quant::tiles::{self, TILE_ROWS};
use crate::quant::{TensorType, quantize_row};

/// Entries of a page: the rows of a tile. Small enough that the last, half-empty page of each plane
/// wastes little.
pub const PAGE_TOKENS: usize = TILE_ROWS;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
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
pub(crate) struct KvShape {
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
    /// Bytes of one head of a key.
    pub key_bytes: usize,
    /// Bytes of one head of a value: as many elements, but whole vectors.
    pub value_bytes: usize,
    /// Whether the pages lie on a GPU; the host then has the tables alone.
    pub on_gpu: bool,
}

impl KvShape {
    /// A cache without pages yet; `None` where the head size does not fit the type.
    pub(crate) fn new(ty: KvType, kv_heads: usize, head_dim: usize) -> Option<Self> {
        let encoded = ty.tensor_type();
        Some(KvShape {
            ty,
            kv_heads,
            head_dim,
            planes: 0,
            sequences: 0,
            table_pages: 0,
            pages: 0,
            key_bytes: encoded.row_bytes(head_dim)?,
            value_bytes: encoded.row_bytes(head_dim.next_multiple_of(VECTOR))?,
            on_gpu: false,
        })
    }

    /// Lists: one for each plane of each sequence.
    pub fn lists(&self) -> usize {
        self.sequences.saturating_mul(self.planes)
    }

    /// Pages that lie in the host's memory.
    fn pages_here(&self) -> usize {
        if self.on_gpu { 0 } else { self.pages }
    }

    /// Bytes of a page: keys, then values. The keys of a head are a tile of sixteen rows
    /// (`src/quant/tiles.rs`), so that a vector takes one element of all of them; its values are
    /// `[PAGE_TOKENS][value_bytes]`.
    pub fn page_bytes(&self) -> usize {
        self.kv_heads * PAGE_TOKENS * (self.key_bytes + self.value_bytes)
    }

    /// Where the tile of a head's keys begins in a page, and its bytes.
    pub(crate) fn keys(&self, head: usize) -> (usize, usize) {
        let bytes = PAGE_TOKENS * self.key_bytes;
        (head * bytes, bytes)
    }

    /// Where a head's values begin in a page, and their bytes.
    pub(crate) fn values(&self, head: usize) -> (usize, usize) {
        let bytes = PAGE_TOKENS * self.value_bytes;
        let keys = self.kv_heads * PAGE_TOKENS * self.key_bytes;
        (keys + head * bytes, bytes)
    }
}

impl KvShape {
    /// Copies the encoded key and value (each `key_bytes`) of one head of an entry out of a page.
    pub(crate) fn read_entry(&self, page: &[u8], head: usize, slot: usize, to: [&mut [u8]; 2]) {
        let [key, value] = to;
        let (start, bytes) = self.keys(head);
        let ty = self.ty.tensor_type();
        tiles::take_row(ty, &page[start..][..bytes], slot, key);
        let (start, _) = self.values(head);
        value.copy_from_slice(&page[start + slot * self.value_bytes..][..value.len()]);
    }

    /// Copies them into a page.
    #[cfg(feature = "cuda")]
    pub(crate) fn write_entry(
        &self,
        page: &mut [u8],
        head: usize,
        slot: usize,
        [key, value]: [&[u8]; 2],
    ) {
        let (start, bytes) = self.keys(head);
        let tile = page[start..][..bytes].as_mut_ptr();
        // SAFETY: a tile of sixteen such rows, exclusively borrowed.
        unsafe { tiles::put_row(self.ty.tensor_type(), tile, slot, key) };
        let (start, _) = self.values(head);
        page[start + slot * self.value_bytes..][..value.len()].copy_from_slice(value);
    }
}

/// Values are kept in whole vectors of so many elements.
pub(crate) const VECTOR: usize = 16;

parts! {
    /// The cache, as it lies in the arena. A list is the pages and entries of one plane of one sequence:
    /// list number `sequence · planes + plane`.
    pub(crate) struct KvCache<'a> { shape: &'a KvShape }
    /// Where it lies.
    struct KvRegions; (shape: &KvShape)

    /// Page numbers.
    tables: u32 = [shape.lists(), shape.table_pages],
    /// Entries.
    lengths: u32 = [shape.lists()],
    /// Lists that have the page.
    owners: u32 = [shape.pages],
    /// A stack of free pages, of which the first `counts[FREE]` are valid.
    free: u32 = [shape.pages],
    /// How many pages are free, and how many owners pages have beyond their first.
    counts: u32 = [2],
    pages: u8 = [shape.pages_here(), shape.page_bytes()],
}

/// Places in [`KvCache::counts`].
const FREE: usize = 0;
const SHARED: usize = 1;

/// An entry that a list was given.
pub(crate) struct Taken {
    /// Its place in the list.
    pub slot: usize,
    /// The place in the page tables that names its page.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub table: usize,
    /// Whether that page is new to the list.
    pub new_page: bool,
    /// The page whose contents the new one must have, and the new one.
    pub copied: Option<[u32; 2]>,
}

impl KvCache<'_> {
    /// Makes every page free. Pages are not touched.
    pub(crate) fn reset(&mut self) {
        let pages = self.shape.pages;
        for (i, page) in self.free.iter_mut().enumerate() {
            *page = (pages - 1 - i) as u32;
        }
        (self.counts[FREE], self.counts[SHARED]) = (pages as u32, 0);
        self.owners.fill(0);
        self.lengths.fill(0);
    }

    /// Pages in use; one that several sequences share counts once.
    pub fn pages_used(&self) -> usize {
        self.shape.pages - self.pages_free()
    }

    /// Pages that nobody has.
    pub(crate) fn pages_free(&self) -> usize {
        self.counts[FREE] as usize
    }

    /// The list of a plane of a sequence.
    pub(crate) fn list(&self, sequence: usize, plane: usize) -> usize {
        sequence * self.shape.planes + plane
    }

    /// Entries of a list.
    pub(crate) fn length(&self, list: usize) -> usize {
        self.lengths[list] as usize
    }

    /// The pages of a list in order; those past its length are stale.
    pub(crate) fn table(&self, list: usize) -> &[u32] {
        &self.tables[list * self.shape.table_pages..][..self.shape.table_pages]
    }

    /// Free pages that `entries` more entries of a list would take.
    pub(crate) fn pages_for(&self, list: usize, entries: usize) -> usize {
        let length = self.length(list);
        let more = (length + entries).div_ceil(PAGE_TOKENS) - length.div_ceil(PAGE_TOKENS);
        more + usize::from(entries > 0 && self.last_page_is_shared(list))
    }

    /// Whether the next entry of a list goes to a page that other lists have too.
    fn last_page_is_shared(&self, list: usize) -> bool {
        let length = self.length(list);
        // Mostly there is no such page at all.
        self.counts[SHARED] > 0
            && !length.is_multiple_of(PAGE_TOKENS)
            && self.owners[self.table(list)[length / PAGE_TOKENS] as usize] > 1
    }

    /// Makes room for one more entry and returns its slot; a page that other lists share is copied
    /// first. Fails, changing nothing, when the pool is empty.
    pub(crate) fn append(&mut self, list: usize) -> Result<usize> {
        let taken = self.take_entry(list)?;
        if let Some([from, to]) = taken.copied.map(|pages| pages.map(|p| p as usize)) {
            let bytes = self.shape.page_bytes();
            self.pages
                .copy_within(from * bytes..(from + 1) * bytes, to * bytes);
        }
        Ok(taken.slot)
    }

    /// As [`KvCache::append`], for pages that lie elsewhere: nothing is copied.
    pub(crate) fn take_entry(&mut self, list: usize) -> Result<Taken> {
        let slot = self.length(list);
        let table = list * self.shape.table_pages + slot / PAGE_TOKENS;
        let mut taken = Taken {
            slot,
            table,
            new_page: slot.is_multiple_of(PAGE_TOKENS),
            copied: None,
        };
        if taken.new_page {
            self.tables[table] = self.take_page()?;
        } else if self.last_page_is_shared(list) {
            let (old, new) = (self.tables[table], self.take_page()?);
            self.disown(old);
            self.tables[table] = new;
            (taken.new_page, taken.copied) = (true, Some([old, new]));
        }
        self.lengths[list] += 1;
        Ok(taken)
    }

    /// Takes back the last entry that a list was given, as if it had never been.
    #[cfg(feature = "cuda")]
    pub(crate) fn give_back(&mut self, list: usize, taken: &Taken) {
        debug_assert!(self.length(list) == taken.slot + 1);
        self.lengths[list] -= 1;
        if taken.new_page {
            self.disown(self.tables[taken.table]);
        }
        if let Some([old, _]) = taken.copied {
            self.tables[taken.table] = old;
            self.owners[old as usize] += 1;
            self.counts[SHARED] += 1;
        }
    }

    /// Gives a list entries until it has `end`, as far as its last page, which is its own, has room.
    #[cfg(feature = "cuda")]
    pub(crate) fn fill_page(&mut self, list: usize, end: usize) {
        let length = self.length(list);
        self.lengths[list] = length.next_multiple_of(PAGE_TOKENS).min(end) as u32;
    }

    /// Gives lists that have equally many entries one more each, if that takes no page.
    #[cfg(feature = "cuda")]
    pub(crate) fn grow_in_place(&mut self, lists: impl Iterator<Item = usize> + Clone) -> bool {
        let length = lists.clone().next().map_or(0, |list| self.length(list));
        debug_assert!(lists.clone().all(|list| self.length(list) == length));
        let in_place = !length.is_multiple_of(PAGE_TOKENS) && self.counts[SHARED] == 0;
        if in_place {
            lists.for_each(|list| self.lengths[list] += 1);
        }
        in_place
    }

    fn take_page(&mut self) -> Result<u32> {
        let full = Error::KvFull {
            pages: self.shape.pages,
        };
        let left = self.counts[FREE].checked_sub(1).ok_or(full)?;
        self.counts[FREE] = left;
        let page = self.free[left as usize];
        self.owners[page as usize] = 1;
        Ok(page)
    }

    /// Forgets the entries from `length` on; pages that no list has any more are free.
    pub(crate) fn truncate(&mut self, list: usize, length: usize) {
        let old = self.length(list);
        if length >= old {
            return;
        }
        for index in length.div_ceil(PAGE_TOKENS)..old.div_ceil(PAGE_TOKENS) {
            let page = self.tables[list * self.shape.table_pages + index];
            self.disown(page);
        }
        self.lengths[list] = length as u32;
    }

    /// A list gives a page up; it is free when nobody else has it.
    fn disown(&mut self, page: u32) {
        self.owners[page as usize] -= 1;
        if self.owners[page as usize] > 0 {
            self.counts[SHARED] -= 1;
            return;
        }
        self.free[self.counts[FREE] as usize] = page;
        self.counts[FREE] += 1;
    }

    /// Gives an empty list the first `length` entries of another, on the same pages.
    pub(crate) fn share(&mut self, from: usize, to: usize, length: usize) {
        debug_assert!(self.length(to) == 0 && length <= self.length(from));
        let (from, size) = (from * self.shape.table_pages, self.shape.table_pages);
        let pages = length.div_ceil(PAGE_TOKENS);
        self.tables.copy_within(from..from + pages, to * size);
        for page in &self.tables[to * size..][..pages] {
            self.owners[*page as usize] += 1;
        }
        self.counts[SHARED] += pages as u32;
        self.lengths[to] = length as u32;
    }

    /// To store entries from several threads.
    pub(crate) fn writer(&mut self) -> KvWriter<'_> {
        KvWriter {
            shape: self.shape,
            tables: self.tables,
            pages: Disjoint::new(self.pages),
        }
    }

    fn page(&self, page: u32) -> &[u8] {
        let bytes = self.shape.page_bytes();
        &self.pages[page as usize * bytes..][..bytes]
    }

    /// The keys of one head in a page, a tile.
    pub(crate) fn keys(&self, page: u32, head: usize) -> &[u8] {
        let (start, bytes) = self.shape.keys(head);
        &self.page(page)[start..][..bytes]
    }

    /// The values of one head in a page, `[PAGE_TOKENS][value_bytes]`.
    pub(crate) fn values(&self, page: u32, head: usize) -> &[u8] {
        let (start, bytes) = self.shape.values(head);
        &self.page(page)[start..][..bytes]
    }

    /// Copies out the encoded key and value (each `key_bytes`) of one head of an entry.
    pub(crate) fn read(&self, page: u32, head: usize, slot: usize, to: [&mut [u8]; 2]) {
        self.shape.read_entry(self.page(page), head, slot, to);
    }
}

/// Stores entries; several threads may do so at once.
pub(crate) struct KvWriter<'a> {
    shape: &'a KvShape,
    tables: &'a [u32],
    pages: Disjoint<'a, u8>,
}

impl KvWriter<'_> {
    /// Stores the key and value (each [kv_heads · head_dim]) of the entry at `slot`.
    ///
    /// # Safety
    /// No other thread stores or reads this entry meanwhile.
    pub unsafe fn store(
        &self,
        (list, slot): (usize, usize),
        key: &[f32],
        value: &[f32],
    ) -> Result<()> {
        let KvShape {
            ty,
            head_dim,
            key_bytes,
            ..
        } = *self.shape;
        let ty = ty.tensor_type();
        let mut encoded = [[0; size_of::<f32>() * MAX_HEAD_DIM]; 2];
        for head in 0..self.shape.kv_heads {
            let rows = [key, value].map(|row| &row[head * head_dim..][..head_dim]);
            for (row, encoded) in rows.into_iter().zip(&mut encoded) {
                quantize_row(ty, row, &mut encoded[..key_bytes]).map_err(|_| {
                    match row.iter().all(|number| number.is_finite()) {
                        true => Error::too_large(ty),
                        false => Error::not_finite("a key or a value"),
                    }
                })?;
            }
            let encoded = encoded.each_ref().map(|e| &e[..key_bytes]);
            // SAFETY: passed on.
            unsafe { self.write((list, slot), head, encoded) };
        }
        Ok(())
    }

    /// Stores the encoded key and value of one head of an entry.
    ///
    /// # Safety
    /// As [`KvWriter::store`].
    pub unsafe fn write(
        &self,
        (list, slot): (usize, usize),
        head: usize,
        [key, value]: [&[u8]; 2],
    ) {
        let shape = self.shape;
        let page = self.tables[list * shape.table_pages + slot / PAGE_TOKENS] as usize;
        let slot = slot % PAGE_TOKENS;
        let (start, bytes) = shape.keys(head);
        let tile = self.pages.pointer(page * shape.page_bytes() + start, bytes);
        // SAFETY: the tile is inside the pages, and its row `slot` is this entry's alone.
        unsafe { tiles::put_row(shape.ty.tensor_type(), tile, slot, key) };
        let (start, _) = shape.values(head);
        let start = page * shape.page_bytes() + start + slot * shape.value_bytes;
        // SAFETY: the caller's entry.
        unsafe { self.pages.slice(start, value.len()) }.copy_from_slice(value);
    }
}

//! A session's sequence as bytes: to go on later, elsewhere, or from the same prompt many times.
//!
//! ```text
//! 0   magic        "MORS"
//! 4   version      u32, 3
//! 8   bytes        u64, of all this
//! 16  model        u64, a fingerprint of the model
//! 24  KV type      u32
//! 28  last row     u32, 1 when the residual stream of the last token follows, else 0
//! 32  length       u64, tokens
//! 40  sampler      u64, state of the random sequence
//! 48  tokens       [length] u32
//!     depths       [length] u8, filled up with zeros to a multiple of 8
//!     last row     [hidden] f32, filled up likewise
//!     keys, values for each plane and each of its entries [2 · kv_heads][head bytes], filled up
//!     checksum     u64 of all before
//! ```
//!
//! All numbers are little-endian. How many entries a plane has follows from the depths, so nothing
//! in a state can point anywhere.

use crate::error::{Error, Result};
use crate::kv::{KvType, PAGE_TOKENS};
use crate::model::Model;
#[cfg(feature = "cuda")]
use crate::session::Engine;
use crate::session::{Last, Session};
use std::fmt::{self, Write as _};

const MAGIC: [u8; 4] = *b"MORS";
const VERSION: u32 = 3;
const HEAD: usize = 48;
const CHECKSUM: usize = 8;

/// Where the parts of a state lie.
struct Layout {
    tokens: usize,
    depths: usize,
    row: usize,
    kv: usize,
    checksum: usize,
}

impl Layout {
    fn new(length: usize, row_bytes: usize, kv_bytes: usize) -> Self {
        let tokens = HEAD;
        let depths = tokens + 4 * length;
        let row = (depths + length).next_multiple_of(8);
        let kv = (row + row_bytes).next_multiple_of(8);
        let checksum = (kv + kv_bytes).next_multiple_of(8);
        Layout {
            tokens,
            depths,
            row,
            kv,
            checksum,
        }
    }

    fn bytes(&self) -> usize {
        self.checksum + CHECKSUM
    }
}

impl Session {
    /// Bytes that [`Session::save`] writes now.
    pub fn save_bytes(&self) -> usize {
        self.layout(self.depths(), self.last != Last::Nothing)
            .bytes()
    }

    /// Writes the sequence so far: tokens, depths, keys and values, the state of the sampler's
    /// random sequence, and what the next logits are computed from. Settings (cut, depth limit,
    /// sampler parameters) are not part of it. Returns the number of bytes.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] when `out` has less than [`Session::save_bytes`] bytes,
    /// [`Error::FileChanged`].
    pub fn save(&mut self, out: &mut [u8]) -> Result<usize> {
        self.model.check_file()?;
        let row = self.last != Last::Nothing;
        let layout = self.layout(self.depths(), row);
        let (needed, capacity) = (layout.bytes(), out.len());
        let out = out
            .get_mut(..needed)
            .ok_or(Error::BufferTooSmall { needed, capacity })?;
        out.fill(0);
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &VERSION.to_le_bytes());
        put(8, &(needed as u64).to_le_bytes());
        put(16, &fingerprint(&self.model).to_le_bytes());
        put(24, &kv_number(self.plan.params().kv).to_le_bytes());
        put(28, &u32::from(row).to_le_bytes());
        put(32, &(self.length as u64).to_le_bytes());
        put(40, &self.sampler.state().to_le_bytes());
        let b = self.plan.carve(self.arena);
        for (i, token) in b.tokens[..self.length].iter().enumerate() {
            put(layout.tokens + 4 * i, &token.to_le_bytes());
        }
        put(layout.depths, &b.depths[..self.length]);
        #[cfg(feature = "cuda")]
        if let (Engine::Cuda(gpu), true) = (&self.engine, row) {
            gpu.read_row(gpu.last_row(), b.last_row)?;
        }
        if row {
            for (i, x) in b.last_row.iter().enumerate() {
                put(layout.row + 4 * i, &x.to_le_bytes());
            }
        }
        let mut rest = &mut out[layout.kv..];
        for plane in 0..b.kv.shape.planes {
            for slot in 0..b.kv.length(plane) {
                let page = b.kv.table(plane)[slot / PAGE_TOKENS];
                #[cfg(feature = "cuda")]
                if let (Engine::Cuda(gpu), 0) = (&self.engine, slot % PAGE_TOKENS) {
                    gpu.read_page(page, b.page)?;
                }
                for head in 0..b.kv.shape.kv_heads {
                    let (entry, more) = rest.split_at_mut(2 * b.kv.shape.key_bytes);
                    let (key, value) = entry.split_at_mut(b.kv.shape.key_bytes);
                    let to = [key, value];
                    match b.page.is_empty() {
                        true => b.kv.read(page, head, slot % PAGE_TOKENS, to),
                        // It was brought from the GPU.
                        false => b.kv.shape.read_entry(b.page, head, slot % PAGE_TOKENS, to),
                    }
                    rest = more;
                }
            }
        }
        let sum = checksum(&out[..layout.checksum]);
        out[layout.checksum..].copy_from_slice(&sum.to_le_bytes());
        Ok(needed)
    }

    /// Replaces the sequence so far by a saved one; the next logits have the bits that they would
    /// have had in the session that was saved. On an error the session is as before, but for
    /// [`Error::Device`], after which it is empty.
    ///
    /// # Errors
    /// [`Error::State`] for a state that is damaged, of another version, or of another model or
    /// KV type; [`Error::ContextFull`] and [`Error::KvFull`] when this session is too small;
    /// [`Error::FileChanged`].
    pub fn restore(&mut self, state: &[u8]) -> Result<()> {
        self.model.check_file()?;
        let saved = Saved::check(state, self)?;
        self.truncate(0);
        let length = saved.depths.len();
        let mut b = self.plan.carve(self.arena);
        for (token, bytes) in b.tokens.iter_mut().zip(saved.tokens) {
            *token = u32::from_le_bytes(*bytes);
        }
        b.depths[..length].copy_from_slice(saved.depths);
        for (x, bytes) in b.last_row.iter_mut().zip(saved.row) {
            *x = f32::from_le_bytes(*bytes);
        }
        #[cfg(feature = "cuda")]
        if let Engine::Cuda(gpu) = &mut self.engine {
            let restored = gpu.restore(&self.model, &mut b, length, saved.depths, saved.kv);
            match restored {
                Ok(()) => self.set_restored(&saved),
                Err(_) => self.truncate(0),
            }
            return restored;
        }
        let mut rest = saved.kv;
        for (plane, description) in self.model.schedule().planes.iter().enumerate() {
            for _ in 0..description.tokens.entries(saved.depths) {
                // `check` has counted the pages; a failure would be cleaned up all the same.
                let slot = b.kv.append(plane)?;
                let key_bytes = b.kv.shape.key_bytes;
                let writer = b.kv.writer();
                for head in 0..self.plan.kv_shape.kv_heads {
                    let (entry, more) = rest.split_at(2 * key_bytes);
                    let entry = entry.split_at(key_bytes).into();
                    // SAFETY: no other thread is at work.
                    unsafe { writer.write((plane, slot), head, entry) };
                    rest = more;
                }
            }
        }
        self.set_restored(&saved);
        Ok(())
    }

    fn set_restored(&mut self, saved: &Saved) {
        self.length = saved.depths.len();
        self.last = match saved.row {
            [] => Last::Nothing,
            _ => Last::Row,
        };
        self.sampler.set_state(saved.sampler);
    }

    fn layout(&self, depths: &[u8], row: bool) -> Layout {
        let planes = self.model.schedule().planes.iter();
        let entries: usize = planes.map(|p| p.tokens.entries(depths)).sum();
        let shape = &self.plan.kv_shape;
        let row = usize::from(row) * 4 * self.model.hyperparameters().hidden_size;
        let kv = entries * 2 * shape.kv_heads * shape.key_bytes;
        Layout::new(depths.len(), row, kv)
    }

    /// Pages that a sequence of these depths takes.
    fn pages_for(&self, depths: &[u8]) -> usize {
        let planes = self.model.schedule().planes.iter();
        planes
            .map(|p| p.tokens.entries(depths).div_ceil(PAGE_TOKENS))
            .sum()
    }
}

/// A state that may be restored.
struct Saved<'a> {
    tokens: &'a [[u8; 4]],
    depths: &'a [u8],
    row: &'a [[u8; 4]],
    kv: &'a [u8],
    sampler: u64,
}

impl<'a> Saved<'a> {
    fn check(state: &'a [u8], session: &Session) -> Result<Self> {
        let u32_at = |at: usize| u32::from_le_bytes(array(state, at));
        let u64_at = |at: usize| u64::from_le_bytes(array(state, at));
        if state.len() < HEAD + CHECKSUM || state[..4] != MAGIC {
            return Err(Error::state("it is no saved session"));
        }
        if u32_at(4) != VERSION {
            return Err(Error::state(format_args!(
                "it is of version {}, but this library reads version {VERSION}",
                u32_at(4)
            )));
        }
        if u64_at(8) != state.len() as u64 {
            return Err(Error::state(format_args!(
                "it has {} bytes, but was written with {}",
                state.len(),
                u64_at(8)
            )));
        }
        let body = state.len() - CHECKSUM;
        if checksum(&state[..body]) != u64_at(body) {
            return Err(Error::state("its checksum is wrong; it is damaged"));
        }
        if u64_at(16) != fingerprint(&session.model) {
            return Err(Error::state("it was saved with another model"));
        }
        let kv = session.plan.params().kv;
        if u32_at(24) != kv_number(kv) {
            return Err(Error::state(format_args!(
                "its keys and values are not stored as {} like this session's",
                kv.tensor_type()
            )));
        }
        let damaged = || Error::state("its sizes do not fit together; it is damaged");
        let length = usize::try_from(u64_at(32)).map_err(|_| damaged())?;
        if length > state.len() {
            return Err(damaged());
        }
        let context = session.plan.params().context;
        if length > context {
            return Err(Error::ContextFull {
                needed: length,
                context,
            });
        }
        // With `length` checked against the state's own size, this range may still end outside.
        let start = HEAD + 4 * length;
        let depths = state.get(start..start + length).ok_or_else(damaged)?;
        let h = session.model.hyperparameters();
        let layout = session.layout(depths, u32_at(28) == 1);
        if u32_at(28) > 1 || layout.bytes() != state.len() {
            return Err(damaged());
        }
        let tokens = state[layout.tokens..layout.depths].as_chunks::<4>().0;
        let vocab = h.vocab_size as u32;
        let possible = h.least_depth()..=h.recursions;
        if tokens.iter().any(|t| u32::from_le_bytes(*t) >= vocab)
            || depths.iter().any(|d| !possible.contains(&usize::from(*d)))
        {
            return Err(damaged());
        }
        let pages = session.plan.kv_shape.pages;
        if session.pages_for(depths) > pages {
            return Err(Error::KvFull { pages });
        }
        let row = match u32_at(28) {
            0 => 0,
            _ => 4 * h.hidden_size,
        };
        Ok(Saved {
            tokens,
            depths,
            row: state[layout.row..][..row].as_chunks::<4>().0,
            kv: &state[layout.kv..layout.checksum],
            sampler: u64_at(40),
        })
    }
}

/// `N` bytes from `at` on, which must be inside.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// A KV type's number in a state.
fn kv_number(kv: KvType) -> u32 {
    kv.tensor_type().gguf_id()
}

/// FNV-1a (Fowler, Noll, Vo) over words of eight bytes: finds damage, not malice.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Hash::new();
    hash.add(bytes);
    hash.0
}

struct Hash(u64);

impl Hash {
    fn new() -> Self {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.add_number(u64::from_le_bytes(*word));
        }
        for byte in rest {
            self.add_number(u64::from(*byte));
        }
    }

    fn add_number(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x100_0000_01b3);
        // FNV carries only upwards; this brings the upper bits down to where the next word is.
        self.0 ^= self.0 >> 32;
    }
}

impl fmt::Write for Hash {
    /// Byte by byte: into which pieces a text is cut must not matter.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes()
            .for_each(|byte| self.add_number(u64::from(byte)));
        Ok(())
    }
}

/// Tells one model from another: its sizes and rules, its tensor table, and the first bytes of each tensor, for
/// two trainings of one model differ in nothing else. Reads a page of each tensor.
fn fingerprint(model: &Model) -> u64 {
    const SAMPLE: usize = 64;
    let (gguf, bytes) = (model.gguf(), model.bytes());
    let mut hash = Hash::new();
    // Never fails.
    let _ = write!(hash, "{:?}", model.hyperparameters());
    hash.add_number(gguf.file_bytes as u64);
    for tensor in gguf.tensors() {
        hash.add(tensor.name.as_bytes());
        hash.add_number(u64::from(tensor.ty.gguf_id()));
        tensor.dims.iter().for_each(|n| hash.add_number(*n));
        hash.add_number(tensor.offset as u64);
        hash.add(&bytes[tensor.offset..][..tensor.bytes.min(SAMPLE)]);
    }
    hash.0
}

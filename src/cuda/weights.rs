//! A model's weights on a device.

use super::driver::{Address, Device};
use super::images;
use super::launch::Module;
use super::memory::{Buffer, Registered};
use super::params;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorInfo};
use crate::memory::{Shared, reserved, try_push};
use crate::model::{Hyperparameters, Matrix, TensorLayout};
use crate::quant::TensorType;
use crate::quant::tiles::{TILE_ROWS, interleave, is_tiled};

/// What sessions of a model share on a device: the driver, the kernels, the weights.
pub(crate) struct Weights {
    pub(super) device: Shared<Device>,
    pub(super) module: Module,
    /// Types of the tensors.
    pub(super) types: Vec<TensorType>,
    place: Place,
    /// Of each tensor where it begins in the file and on the device, by the former.
    table: Vec<(usize, usize)>,
}

enum Place {
    /// A copy in the device's memory, with block formats and most halves in whole tiles.
    Copy(Buffer),
    /// The file itself, where host and device share their memory.
    InPlace(Registered),
}

/// Bytes that are rearranged at a time.
const STAGE: usize = 1 << 20;

/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 256;

/// Columns of which kernels read some together.
const GROUP: usize = params::GROUP as usize;

impl Weights {
    /// Opens device number `index` and brings the weights there.
    ///
    /// # Safety
    /// `file` stays where it is as long as this lives.
    pub unsafe fn new(index: u32, gguf: &Gguf, h: &Hyperparameters, file: &[u8]) -> Result<Self> {
        let device = Device::open(index)?;
        let module = Module::new(&device, images::for_device(&device)?, true)?;
        let tiled = h.layout == TensorLayout::Tiles16;
        let mut types = reserved(TensorType::ALL.len())?;
        for tensor in gguf.tensors() {
            if !types.contains(&tensor.ty) {
                types.push(tensor.ty);
            }
        }
        let mut table = reserved(gguf.tensors().len())?;
        let ready = |t| lies_ready(t, file, tiled);
        if device.integrated && gguf.tensors().iter().all(ready) {
            // Where the platform cannot do it, the weights are copied.
            // SAFETY: passed on.
            if let Ok(registered) = unsafe { Registered::new(&device, file) } {
                table.extend(gguf.tensors().iter().map(|t| (t.offset, t.offset)));
                table.sort_unstable();
                return Ok(Weights {
                    device,
                    module,
                    types,
                    place: Place::InPlace(registered),
                    table,
                });
            }
        }
        let mut bytes = 0;
        for tensor in gguf.tensors() {
            try_push(&mut table, (tensor.offset, bytes))?;
            bytes += device_bytes(tensor).next_multiple_of(ALIGNMENT);
        }
        let mut buffer = Buffer::new(&device, bytes)?;
        let mut stage = reserved::<u8>(STAGE)?;
        for (tensor, (_, to)) in gguf.tensors().iter().zip(&table) {
            let rows = &file[tensor.offset..][..tensor.bytes];
            if is_tiled_in_copy(tensor.ty, tensor.columns()) {
                let ready = tiled && is_tiled(tensor.ty);
                send_tiles(&mut buffer, *to, tensor, rows, ready, &mut stage)?;
            } else {
                buffer.write(*to, rows)?;
            }
        }
        table.sort_unstable();
        Ok(Weights {
            device,
            module,
            types,
            place: Place::Copy(buffer),
            table,
        })
    }

    /// Bytes of the device's memory that the weights take.
    pub fn bytes(&self) -> usize {
        match &self.place {
            Place::Copy(buffer) => buffer.bytes(),
            Place::InPlace(_) => 0,
        }
    }

    /// Whether the device reads the mapped file itself.
    pub fn in_place(&self) -> bool {
        matches!(self.place, Place::InPlace(_))
    }

    /// Of a matrix of a plain type, bytes from a row to the next of its tile, and from a group of a row to its next.
    pub(super) fn steps(&self, m: &Matrix) -> (usize, usize) {
        let group_bytes = m.ty.block_bytes() * GROUP;
        match !self.in_place() && is_tiled_in_copy(m.ty, m.columns) {
            true => (group_bytes, TILE_ROWS * group_bytes),
            false => (m.row_bytes, group_bytes),
        }
    }

    /// Where the tensor that begins at `offset` in the file is on the device.
    pub(super) fn at(&self, offset: usize) -> Result<Address> {
        let found = self.table.binary_search_by_key(&offset, |(from, _)| *from);
        let index = found.map_err(|_| Error::device("a tensor was not brought to the GPU"))?;
        let to = self.table[index].1;
        Ok(match &self.place {
            Place::Copy(buffer) => buffer.at(to),
            Place::InPlace(registered) => registered.at(to),
        })
    }
}

/// Whether a tensor can be used as it lies in the file: in whole tiles, where the widest loads may begin.
fn lies_ready(tensor: &TensorInfo, file: &[u8], tiled: bool) -> bool {
    /// Bytes of the widest load.
    const WIDEST: usize = 16;
    let begins = file[tensor.offset..].as_ptr().addr().is_multiple_of(WIDEST);
    begins && (!is_tiled(tensor.ty) || tiled && tensor.rows().is_multiple_of(TILE_ROWS))
}

/// Whether rows become tiles where they are copied to the device. Of halves a tile has of each group of columns one row
/// after the other: kernels read some groups of sixteen rows together, and memory is quickest with what lies together.
fn is_tiled_in_copy(ty: TensorType, columns: usize) -> bool {
    is_tiled(ty) || ty.block_bytes() == 2 && columns.is_multiple_of(GROUP)
}

/// Bytes of a tensor in a copy: whole tiles.
fn device_bytes(tensor: &TensorInfo) -> usize {
    let row_bytes = tensor.bytes / tensor.rows();
    match is_tiled_in_copy(tensor.ty, tensor.columns()) {
        true => tensor.rows().next_multiple_of(TILE_ROWS) * row_bytes,
        false => tensor.bytes,
    }
}

/// Sends rows as tiles, the last filled up with zeros; `ready`: whole tiles are tiles already.
fn send_tiles(
    buffer: &mut Buffer,
    to: usize,
    tensor: &TensorInfo,
    rows: &[u8],
    ready: bool,
    stage: &mut Vec<u8>,
) -> Result<()> {
    let tile_bytes = rows.len() / tensor.rows() * TILE_ROWS;
    let whole = rows.len() / tile_bytes * tile_bytes;
    if ready && whole > 0 {
        buffer.write(to, &rows[..whole])?;
    }
    let mut at = if ready { whole } else { 0 };
    while at < rows.len() {
        stage.clear();
        let start = at;
        while at < rows.len() && (stage.is_empty() || stage.len() + tile_bytes <= STAGE) {
            let tile = &rows[at..rows.len().min(at + tile_bytes)];
            append_tile(stage, tensor.ty, tile, tile_bytes)?;
            at += tile.len();
        }
        buffer.write(to + start, stage)?;
    }
    Ok(())
}

/// Appends up to sixteen rows as a tile.
fn append_tile(stage: &mut Vec<u8>, ty: TensorType, rows: &[u8], tile_bytes: usize) -> Result<()> {
    let length = stage.len();
    // Room for the tile and, before it, for rows that have to be filled up.
    let refused = |_| Error::OutOfMemory { bytes: tile_bytes };
    stage.try_reserve(2 * tile_bytes).map_err(refused)?;
    if rows.len() == tile_bytes {
        stage.resize(length + tile_bytes, 0);
        make_tile(ty, rows, &mut stage[length..]);
        return Ok(());
    }
    stage.resize(length + 2 * tile_bytes, 0);
    let (tile, filled) = stage[length..].split_at_mut(tile_bytes);
    filled[..rows.len()].copy_from_slice(rows);
    make_tile(ty, filled, tile);
    stage.truncate(length + tile_bytes);
    Ok(())
}

/// Sixteen rows as a tile.
fn make_tile(ty: TensorType, rows: &[u8], tile: &mut [u8]) {
    if is_tiled(ty) {
        return interleave(ty, rows, tile);
    }
    let (row_bytes, group_bytes) = (rows.len() / TILE_ROWS, ty.block_bytes() * GROUP);
    for (group, tile) in tile.chunks_exact_mut(TILE_ROWS * group_bytes).enumerate() {
        for (row, to) in tile.chunks_exact_mut(group_bytes).enumerate() {
            let from = row * row_bytes + group * group_bytes;
            to.copy_from_slice(&rows[from..from + group_bytes]);
        }
    }
}

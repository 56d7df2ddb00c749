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
    /// Where tensors begin on the device whose weights halves cannot hold, of which tensor cores make them.
    beyond_halves: Vec<Address>,
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
        // SAFETY: passed on.
        let mut weights = unsafe { Self::brought(index, gguf, h, file)? };
        for tensor in gguf.tensors() {
            if tensor.ty == TensorType::BF16 && !fits_halves(&file[tensor.offset..][..tensor.bytes])
            {
                let at = weights.at(tensor.offset)?;
                try_push(&mut weights.beyond_halves, at)?;
            }
        }
        Ok(weights)
    }

    /// # Safety
    /// As [`Weights::new`].
    unsafe fn brought(index: u32, gguf: &Gguf, h: &Hyperparameters, file: &[u8]) -> Result<Self> {
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
                    beyond_halves: Vec::new(),
                });
            }
        }
        let mut bytes = 0;
        for tensor in gguf.tensors() {
            try_push(&mut table, (tensor.offset, bytes))?;
            bytes += device_bytes(tensor).next_multiple_of(ALIGNMENT);
        }
        let mut buffer = Buffer::new(&device, bytes)?;
        let mut stages = [reserved::<u8>(STAGE)?, reserved::<u8>(STAGE)?];
        for (tensor, (_, to)) in gguf.tensors().iter().zip(&table) {
            let rows = &file[tensor.offset..][..tensor.bytes];
            if is_tiled_in_copy(tensor.ty, tensor.columns()) {
                let ready = tiled && is_tiled(tensor.ty);
                send_tiles(&mut buffer, *to, tensor, rows, ready, &mut stages)?;
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
            beyond_halves: Vec::new(),
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

    /// Whether halves hold the weights of the matrix at an address, if it is one of a plain type.
    pub(super) fn fit_halves(&self, data: Address) -> bool {
        !self.beyond_halves.contains(&data)
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

/// Whether halves hold what a matrix of BF16 has: its greatest weight is none that would be infinite, and so far above the
/// least of a half's full precision, 2^-14, that what smaller ones lose (2^-25) is nothing beside it.
fn fits_halves(weights: &[u8]) -> bool {
    // 2^-10 and 2^16 as BF16 has them.
    const LEAST: u16 = 0x3a80;
    const TOO_LARGE: u16 = 0x4780;
    let sizes = weights.as_chunks::<2>().0.iter();
    let greatest = sizes.fold(0, |most: u16, weight| {
        most.max(u16::from_le_bytes(*weight) & 0x7fff)
    });
    greatest == 0 || (LEAST..TOO_LARGE).contains(&greatest)
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

/// Sends rows as tiles, the last filled up with zeros; `ready`: whole tiles are tiles already. `stage` and `piece` have room
/// for [`STAGE`] bytes.
fn send_tiles(
    buffer: &mut Buffer,
    mut to: usize,
    tensor: &TensorInfo,
    rows: &[u8],
    ready: bool,
    [stage, piece]: &mut [Vec<u8>; 2],
) -> Result<()> {
    let row_bytes = rows.len() / tensor.rows();
    let tile_bytes = TILE_ROWS * row_bytes;
    let (whole, rest) = match ready {
        true => rows.split_at(rows.len() / tile_bytes * tile_bytes),
        false => (&[][..], rows),
    };
    if !whole.is_empty() {
        buffer.write(to, whole)?;
    }
    to += whole.len();
    stage.clear();
    // A tile is made in pieces of so many bytes of each row, whole blocks.
    let block_bytes = tile_block_bytes(tensor.ty);
    let most = STAGE / TILE_ROWS / block_bytes * block_bytes;
    for tile in rest.chunks(tile_bytes) {
        for start in (0..row_bytes).step_by(most) {
            let width = most.min(row_bytes - start);
            if stage.len() + TILE_ROWS * width > STAGE {
                buffer.write(to, stage)?;
                to += stage.len();
                stage.clear();
            }
            let length = stage.len();
            stage.resize(length + TILE_ROWS * width, 0);
            if tile.len() == tile_bytes && width == row_bytes {
                make_tile(tensor.ty, tile, &mut stage[length..]);
                continue;
            }
            piece.clear();
            for row in tile.chunks(row_bytes) {
                piece.extend_from_slice(&row[start..start + width]);
            }
            piece.resize(TILE_ROWS * width, 0);
            make_tile(tensor.ty, piece, &mut stage[length..]);
        }
    }
    match stage.is_empty() {
        true => Ok(()),
        false => buffer.write(to, stage),
    }
}

/// Bytes of a row that stand together in a tile: a block's, or of halves a group of columns.
fn tile_block_bytes(ty: TensorType) -> usize {
    match is_tiled(ty) {
        true => ty.block_bytes(),
        false => ty.block_bytes() * GROUP,
    }
}

/// Sixteen rows as a tile.
fn make_tile(ty: TensorType, rows: &[u8], tile: &mut [u8]) {
    if is_tiled(ty) {
        return interleave(ty, rows, tile);
    }
    let (row_bytes, group_bytes) = (rows.len() / TILE_ROWS, tile_block_bytes(ty));
    for (group, tile) in tile.chunks_exact_mut(TILE_ROWS * group_bytes).enumerate() {
        for (row, to) in tile.chunks_exact_mut(group_bytes).enumerate() {
            let from = row * row_bytes + group * group_bytes;
            to.copy_from_slice(&rows[from..from + group_bytes]);
        }
    }
}

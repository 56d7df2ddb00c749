//! Tiles: sixteen rows of a quantized matrix, interleaved so that a vector register takes the same
//! field of all of them with one load.
//!
//! A tile holds the rows' first blocks, then their second blocks, and so on. In such a row of blocks
//! each field of the block (two bytes for a half-precision number, else four) stands sixteen times,
//! once for each row: field `f` bytes into a block and `w` bytes wide is found at
//! `16 · block · BLOCK_BYTES + 16 · f + w · row`. Nothing is added or left out, so a tile takes as many
//! bytes as its rows. The last rows of a matrix, if fewer than sixteen, stay as they are.

use super::{TensorType, dequantize_into};

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;

/// Whether matrices of this type are made of tiles in a tiled file: the block formats are.
pub const fn is_tiled(ty: TensorType) -> bool {
    ty.block_len() > 1
}

/// The places in a block of numbers of two bytes.
const fn halves(ty: TensorType) -> std::ops::Range<usize> {
    match ty {
        TensorType::F32 => 0..0,
        TensorType::F16
        | TensorType::BF16
        | TensorType::Q8_0
        | TensorType::Q4_0
        | TensorType::Q5_0 => 0..2,
        TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4_K | TensorType::Q5_K => 0..4,
        TensorType::Q6_K => 208..210,
    }
}

/// Calls `each(place in a row of blocks, place in the block, bytes)` for the fields of row `row`.
fn for_each_field(ty: TensorType, row: usize, mut each: impl FnMut(usize, usize, usize)) {
    let halves = halves(ty);
    let mut at = 0;
    while at < ty.block_bytes() {
        let width = if halves.contains(&at) { 2 } else { 4 };
        each(TILE_ROWS * at + width * row, at, width);
        at += width;
    }
}

/// Interleaves sixteen rows; both slices hold sixteen rows of whole blocks.
#[cfg(any(feature = "convert", feature = "cuda", test))]
pub(crate) fn interleave(ty: TensorType, rows: &[u8], tile: &mut [u8]) {
    let row_bytes = rows.len() / TILE_ROWS;
    for (row, bytes) in rows.chunks_exact(row_bytes).enumerate() {
        let blocks = tile.chunks_exact_mut(TILE_ROWS * ty.block_bytes());
        for (tile, block) in blocks.zip(bytes.chunks_exact(ty.block_bytes())) {
            for_each_field(ty, row, |to, from, width| {
                tile[to..to + width].copy_from_slice(&block[from..from + width]);
            });
        }
    }
}

/// Writes row `row` of a tile.
///
/// # Safety
/// `tile` is valid for writes of sixteen times the bytes of `bytes`, whole blocks, and nobody else uses
/// its row `row` meanwhile.
pub(crate) unsafe fn put_row(ty: TensorType, tile: *mut u8, row: usize, bytes: &[u8]) {
    for (index, block) in bytes.chunks_exact(ty.block_bytes()).enumerate() {
        let start = TILE_ROWS * ty.block_bytes() * index;
        for_each_field(ty, row, |to, from, width| {
            let field = &block[from..from + width];
            // SAFETY: inside the tile, by the layout.
            unsafe {
                tile.add(start + to)
                    .copy_from_nonoverlapping(field.as_ptr(), width)
            };
        });
    }
}

/// The inverse of [`interleave`].
#[cfg(any(feature = "convert", test))]
pub(crate) fn separate(ty: TensorType, tile: &[u8], rows: &mut [u8]) {
    let row_bytes = rows.len() / TILE_ROWS;
    for (row, bytes) in rows.chunks_exact_mut(row_bytes).enumerate() {
        take_row(ty, tile, row, bytes);
    }
}

/// Copies row `row` out of a tile.
pub(crate) fn take_row(ty: TensorType, tile: &[u8], row: usize, bytes: &mut [u8]) {
    let blocks = tile.chunks_exact(TILE_ROWS * ty.block_bytes());
    for (tile, block) in blocks.zip(bytes.chunks_exact_mut(ty.block_bytes())) {
        take_block(ty, tile, row, block);
    }
}

fn take_block(ty: TensorType, tile: &[u8], row: usize, block: &mut [u8]) {
    for_each_field(ty, row, |from, to, width| {
        block[to..to + width].copy_from_slice(&tile[from..from + width]);
    });
}

/// Decodes one row of a tile.
pub(crate) fn decode_row(ty: TensorType, tile: &[u8], row: usize, out: &mut [f32]) {
    // The longest block, Q6_K's.
    let mut block = [0; 210];
    let block = &mut block[..ty.block_bytes()];
    let blocks = tile.chunks_exact(TILE_ROWS * ty.block_bytes());
    for (tile, out) in blocks.zip(out.chunks_exact_mut(ty.block_len())) {
        take_block(ty, tile, row, block);
        dequantize_into(ty, block, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_from_a_tile_and_are_decoded_there() {
        for ty in TensorType::ALL.into_iter().filter(|ty| is_tiled(*ty)) {
            let row_bytes = 3 * ty.block_bytes();
            let rows: Vec<u8> = (0..TILE_ROWS * row_bytes)
                .map(|i| (i * 7 + i / 251) as u8)
                .collect();
            let (mut tile, mut again) = (vec![0; rows.len()], vec![0; rows.len()]);
            interleave(ty, &rows, &mut tile);
            separate(ty, &tile, &mut again);
            assert!(tile != rows && again == rows, "{ty}");
            for (row, bytes) in rows.chunks_exact(row_bytes).enumerate() {
                let (mut a, mut b) = (vec![0.0; 3 * ty.block_len()], vec![0.0; 3 * ty.block_len()]);
                dequantize_into(ty, bytes, &mut a);
                decode_row(ty, &tile, row, &mut b);
                assert!(
                    a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{ty}"
                );
            }
        }
    }

    /// The rule of the module's comment, for one field of each width.
    #[test]
    fn fields_stand_where_the_format_says() {
        let rows: Vec<u8> = (0..TILE_ROWS * 36).map(|i| i as u8).collect();
        let mut tile = vec![0; rows.len()];
        interleave(TensorType::Q4_0, &rows, &mut tile);
        // The scale of row 3's second block, and its columns' bytes 4 to 7.
        assert_eq!(tile[288 + 2 * 3..][..2], rows[3 * 36 + 18..][..2]);
        assert_eq!(
            tile[288 + 16 * 6 + 4 * 3..][..4],
            rows[3 * 36 + 18 + 6..][..4]
        );
    }
}

//! Where each weight lies in the mapped file. Nothing here holds weights: a view is an offset, a
//! type and a shape, checked once against the file.

use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorInfo};
use crate::model::{Hyperparameters, TensorLayout};
use crate::quant::tiles::{self, TILE_ROWS};
use crate::quant::{TensorType, dequantize_into};
use crate::text::Text;
use std::collections::HashMap;
use std::fmt;

/// A matrix in the file, `rows` × `columns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Matrix {
    /// How a row is encoded.
    pub ty: TensorType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Where the first row begins in the file.
    pub offset: usize,
    /// Bytes of one row.
    pub row_bytes: usize,
    /// Whether each sixteen rows are interleaved, but for a last few that are no sixteen.
    pub tiled: bool,
}

impl Matrix {
    /// Bytes of all rows.
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes as u64
    }
    /// Whether the sixteen rows from `first` on are interleaved.
    pub(crate) fn is_tile(&self, first: usize) -> bool {
        self.tiled && first + TILE_ROWS <= self.rows
    }

    /// Decodes a row.
    pub(crate) fn decode_row(&self, file: &[u8], row: usize, out: &mut [f32]) {
        let first = row / TILE_ROWS * TILE_ROWS;
        if self.is_tile(first) {
            let tile = &file[self.offset + first * self.row_bytes..][..TILE_ROWS * self.row_bytes];
            tiles::decode_row(self.ty, tile, row - first, out);
        } else {
            let bytes = &file[self.offset + row * self.row_bytes..][..self.row_bytes];
            dequantize_into(self.ty, bytes, out);
        }
    }
}

/// `length` F32 values in the file (a norm, a bias).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vector {
    /// Where they begin in the file.
    pub offset: usize,
    /// How many they are.
    pub length: usize,
}

impl Vector {
    /// The values' bytes, out of the file's.
    pub(crate) fn bytes<'a>(&self, file: &'a [u8]) -> &'a [[u8; 4]] {
        file[self.offset..][..4 * self.length].as_chunks::<4>().0
    }

    /// The values, out of the file's bytes.
    pub(crate) fn values<'a>(&self, file: &'a [u8]) -> impl ExactSizeIterator<Item = f32> + 'a {
        let bytes = self.bytes(file).iter();
        bytes.map(|b| f32::from_le_bytes(*b))
    }
}

/// A matrix with an optional bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Linear {
    /// The matrix.
    pub weight: Matrix,
    /// Added to each output.
    pub bias: Option<Vector>,
}

/// The tensors of one decoder layer at one recursion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// RMSNorm before attention.
    pub attn_norm: Vector,
    /// Queries.
    pub q: Linear,
    /// Keys.
    pub k: Linear,
    /// Values.
    pub v: Linear,
    /// Attention's output projection.
    pub o: Linear,
    /// RMSNorm before the feed-forward half.
    pub ffn_norm: Vector,
    /// SwiGLU's gate.
    pub gate: Linear,
    /// SwiGLU's other input.
    pub up: Linear,
    /// SwiGLU's output projection.
    pub down: Linear,
}

impl Layer {
    /// Its seven matrices.
    pub fn matrices(&self) -> [Matrix; 7] {
        [
            &self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down,
        ]
        .map(|l| l.weight)
    }
}

/// A router: one linear layer, or two with GELU between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Router {
    /// The only layer, or the first of two.
    pub first: Linear,
    /// The second of two.
    pub second: Option<Linear>,
    /// Loss-free balancing: added to the weights when picking, never when weighing.
    pub pick_bias: Option<Vector>,
}

impl Router {
    /// Depths (token-choice) or 1 (expert-choice).
    pub fn outputs(&self) -> usize {
        self.second.as_ref().unwrap_or(&self.first).weight.rows
    }
}

/// Finds tensors by name and checks their shapes.
pub(super) struct Finder<'a> {
    gguf: &'a Gguf,
    tiled: bool,
    aliases: HashMap<&'a str, &'a str>,
}

impl<'a> Finder<'a> {
    pub fn new(gguf: &'a Gguf, h: &Hyperparameters) -> Result<Self> {
        let entries = gguf.metadata.strings("mor.recursion.aliases")?;
        let entries = entries.unwrap_or_default();
        let mut aliases = HashMap::new();
        aliases
            .try_reserve(entries.len())
            .map_err(|_| Error::OutOfMemory {
                bytes: entries.len().saturating_mul(size_of::<(&str, &str)>()),
            })?;
        for entry in entries.iter() {
            let (name, target) = entry.split_once('=').ok_or_else(|| {
                Error::format(format_args!(
                    "mor.recursion.aliases holds '{entry}', which is not 'name=target'"
                ))
            })?;
            if gguf.tensor(target).is_none() {
                return Err(Error::format(format_args!(
                    "mor.recursion.aliases names the tensor {target}, which the file lacks"
                )));
            }
            aliases.insert(name, target);
        }
        Ok(Finder {
            gguf,
            tiled: h.layout == TensorLayout::Tiles16,
            aliases,
        })
    }

    fn find(&self, name: &str) -> Option<&'a TensorInfo> {
        self.gguf
            .tensor(name)
            .or_else(|| self.gguf.tensor(self.aliases.get(name)?))
    }

    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let matrix = self.matrix_of_any_height(name, columns)?;
        if matrix.rows != rows {
            return Err(wrong_shape(name, &[rows, columns], [matrix.rows, columns]));
        }
        Ok(matrix)
    }

    pub fn matrix_of_any_height(&self, name: &str, columns: usize) -> Result<Matrix> {
        let tensor = self.find(name).ok_or_else(|| missing(name))?;
        if tensor.dims.len() > 2 || tensor.columns() != columns {
            return Err(wrong_shape(name, &[tensor.rows(), columns], shape(tensor)));
        }
        Ok(Matrix {
            ty: tensor.ty,
            rows: tensor.rows(),
            columns,
            offset: tensor.offset,
            row_bytes: tensor.bytes / tensor.rows(),
            tiled: self.tiled && tiles::is_tiled(tensor.ty),
        })
    }

    pub fn vector(&self, name: &str, length: usize) -> Result<Vector> {
        let tensor = self.find(name).ok_or_else(|| missing(name))?;
        if tensor.columns() != length || tensor.rows() != 1 {
            return Err(wrong_shape(name, &[length], shape(tensor)));
        }
        if tensor.ty != TensorType::F32 {
            return Err(Error::unsupported(format_args!(
                "the tensor {name} is {}; norms, biases and routers must be F32",
                tensor.ty.name()
            )));
        }
        Ok(Vector {
            offset: tensor.offset,
            length,
        })
    }

    /// Block `block` at recursion `recursion`: each tensor by its own name first, then by the
    /// name that all recursions share.
    pub fn layer(&self, h: &Hyperparameters, block: usize, recursion: usize) -> Result<Layer> {
        let find = |part: &str, leaf: &str| {
            let own = name(format_args!("blk.{block}.rec.{recursion}.{part}.{leaf}"));
            if recursion > 0 && self.has(&own) {
                own
            } else {
                name(format_args!("blk.{block}.{part}.{leaf}"))
            }
        };
        let norm = |part: &str| self.vector(&find(part, "weight"), h.hidden_size);
        let linear = |part: &str, rows: usize, columns: usize| -> Result<Linear> {
            let bias = find(part, "bias");
            Ok(Linear {
                weight: self.matrix(&find(part, "weight"), rows, columns)?,
                bias: match self.has(&bias) {
                    true => Some(self.vector(&bias, rows)?),
                    false => None,
                },
            })
        };
        Ok(Layer {
            attn_norm: norm("attn_norm")?,
            q: linear("attn_q", h.query_size(), h.hidden_size)?,
            k: linear("attn_k", h.kv_size(), h.hidden_size)?,
            v: linear("attn_v", h.kv_size(), h.hidden_size)?,
            o: linear("attn_output", h.hidden_size, h.query_size())?,
            ffn_norm: norm("ffn_norm")?,
            gate: linear("ffn_gate", h.feed_forward_size, h.hidden_size)?,
            up: linear("ffn_up", h.feed_forward_size, h.hidden_size)?,
            down: linear("ffn_down", h.hidden_size, h.feed_forward_size)?,
        })
    }

    /// The router `stem` (`router.R` or `aux_router.R`) with `outputs` outputs.
    pub fn router(&self, h: &Hyperparameters, stem: &str, outputs: usize) -> Result<Router> {
        let bare = |weight: Matrix| Linear { weight, bias: None };
        let single = name(format_args!("{stem}.weight"));
        let (first, second) = if self.has(&single) {
            (bare(self.matrix(&single, outputs, h.hidden_size)?), None)
        } else {
            let [first, second] = ["0", "2"].map(|i| name(format_args!("{stem}.{i}.weight")));
            let first = self.matrix_of_any_height(&first, h.hidden_size)?;
            let second = self.matrix(&second, outputs, first.rows)?;
            (bare(first), Some(bare(second)))
        };
        let pick_bias = name(format_args!("{stem}.bias"));
        Ok(Router {
            first,
            second,
            pick_bias: if self.has(&pick_bias) {
                Some(self.vector(&pick_bias, outputs)?)
            } else {
                None
            },
        })
    }
}

/// The name of a tensor, in place: all of them fit.
fn name(parts: fmt::Arguments) -> Text {
    Text::new(parts)
}

fn missing(name: &str) -> Error {
    Error::format(format_args!("the tensor {name} is missing"))
}

/// A tensor's sizes in the order of a shape, the slowest-moving first.
fn shape(tensor: &TensorInfo) -> impl fmt::Debug {
    struct Shape<'a>(&'a [u64]);
    impl fmt::Debug for Shape<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_list().entries(self.0.iter().rev()).finish()
        }
    }
    Shape(&tensor.dims)
}

fn wrong_shape(name: &str, expected: &[usize], found: impl fmt::Debug) -> Error {
    Error::format(format_args!(
        "the tensor {name} has the shape {found:?} where {expected:?} is needed"
    ))
}

//! From the numbers of an input tensor to the bytes of the file, a few megabytes at a time.

use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::OnceLock;

use super::options::{Progress, advance};
use super::output::Output;
use super::source::{Dtype, map_file};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, GgufWriter, Metadata, TensorPlan};
use crate::model::{Hyperparameters, Model, TensorLayout};
use crate::quant::tiles::{TILE_ROWS, interleave, is_tiled, separate};
use crate::quant::{TensorType, dequantize_row, quantize_row};

/// Input bytes taken at once: enough to keep the threads busy, little enough to stay bounded.
const CHUNK_BYTES: usize = 4 << 20;

/// How an input tensor's numbers are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As one of the file format's own types.
    Block(TensorType),
    /// As doubles, which the file format's tensors never are.
    F64,
}

impl Encoding {
    /// The encoding of a checkpoint's tensor, or a refusal that names it.
    pub(super) fn of(dtype: Dtype, name: &str) -> Result<Encoding> {
        match dtype {
            Dtype::F32 => Ok(Encoding::Block(TensorType::F32)),
            Dtype::F16 => Ok(Encoding::Block(TensorType::F16)),
            Dtype::BF16 => Ok(Encoding::Block(TensorType::BF16)),
            Dtype::F64 => Ok(Encoding::F64),
            Dtype::Other(kind) => Err(Error::convert(format_args!(
                "'{name}' is {kind}, but weights must be F32, F16, BF16 or F64"
            ))),
        }
    }

    fn row_bytes(self, columns: usize) -> Option<usize> {
        match self {
            Encoding::Block(ty) => ty.row_bytes(columns),
            Encoding::F64 => columns.checked_mul(8),
        }
    }

    fn decode(self, bytes: &[u8], row: &mut [f32]) -> Result<()> {
        match self {
            Encoding::Block(ty) => dequantize_row(ty, bytes, row),
            Encoding::F64 => {
                for (value, eight) in row.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *value = f64::from_le_bytes(*eight) as f32;
                }
                Ok(())
            }
        }
    }
}

/// One tensor's way into the file.
pub(super) struct Job<'a> {
    pub name: String,
    /// What to call the tensor when its numbers are at fault: its name in the input.
    pub origin: String,
    pub bytes: &'a [u8],
    pub from: Encoding,
    /// Whether sixteen rows each are interleaved there.
    pub from_tiles: bool,
    pub to: TensorType,
    /// Whether they shall be in the file.
    pub to_tiles: bool,
    /// As the file spells them: columns first.
    pub dims: Vec<u64>,
}

impl Job<'_> {
    fn columns(&self) -> Result<usize> {
        self.dims
            .first()
            .and_then(|&c| usize::try_from(c).ok())
            .filter(|&c| c > 0)
            .ok_or_else(|| Error::convert(format_args!("'{}' has no columns", self.origin)))
    }
}

/// The format that a matrix gets: the chosen one, or F16 where its rows do not divide into blocks.
pub(super) fn matrix_type(chosen: TensorType, columns: usize) -> TensorType {
    match chosen.row_bytes(columns) {
        Some(_) => chosen,
        None => TensorType::F16,
    }
}

/// Whether a matrix of this type is made of tiles in a file of this layout.
pub(super) fn makes_tiles(layout: TensorLayout, ty: TensorType) -> bool {
    layout == TensorLayout::Tiles16 && is_tiled(ty)
}

/// Refuses formats that can be read but not written, before any work is done.
pub(super) fn check_target(ty: TensorType) -> Result<()> {
    if ty.can_encode() {
        return Ok(());
    }
    let known: Vec<&str> = TensorType::ALL
        .iter()
        .filter(|t| t.can_encode())
        .map(|t| t.name())
        .collect();
    Err(Error::argument(format_args!(
        "{} cannot be written; choose one of {}",
        ty.name(),
        known.join(", ")
    )))
}

/// Writes every tensor, reads the file back, and only then gives it its name.
pub(super) fn write_file(
    output: Output,
    metadata: &Metadata,
    jobs: &[Job],
    progress: &mut dyn Progress,
) -> Result<u64> {
    // Before the work: limits that a file keeps are not told by the checkpoint's reader.
    Hyperparameters::from_metadata(metadata).map_err(|error| match error {
        Error::Format(what) => Error::convert(format_args!(
            "{what}, which this library does not run; check config.json and the options"
        )),
        other => other,
    })?;
    let bytes = write_and_verify(output.temporary(), metadata, jobs, progress)
        .map_err(|error| output.named(error))?;
    output.keep()?;
    Ok(bytes)
}

fn write_and_verify(
    path: &Path,
    metadata: &Metadata,
    jobs: &[Job],
    progress: &mut dyn Progress,
) -> Result<u64> {
    let plans: Vec<TensorPlan> = jobs
        .iter()
        .map(|job| TensorPlan {
            name: job.name.clone(),
            ty: job.to,
            dims: job.dims.clone(),
        })
        .collect();
    progress.start(jobs.iter().map(|job| job.bytes.len() as u64).sum());
    let mut writer = GgufWriter::create(path, metadata, &plans)?;
    let mut hashes = Vec::with_capacity(jobs.len());
    for job in jobs {
        hashes.push(write_tensor(&mut writer, job, progress)?);
    }
    writer.finish()?;
    verify(path, jobs, &hashes, progress)
}

/// Encodes one tensor chunk by chunk; returns the hash of what was written.
fn write_tensor(writer: &mut GgufWriter, job: &Job, progress: &mut dyn Progress) -> Result<u64> {
    let columns = job.columns()?;
    let odd = || {
        Error::convert(format_args!(
            "'{}' has rows of an impossible length",
            job.origin
        ))
    };
    let in_row = job
        .from
        .row_bytes(columns)
        .filter(|&b| b > 0)
        .ok_or_else(odd)?;
    let out_row = job
        .to
        .row_bytes(columns)
        .filter(|&b| b > 0)
        .ok_or_else(odd)?;
    // Whole tiles at a time.
    let rows_at_once = (CHUNK_BYTES / in_row / TILE_ROWS).max(1) * TILE_ROWS;
    let mut hasher = DefaultHasher::new();
    let (mut rows, mut out, mut tiles) = (Vec::new(), Vec::new(), Vec::new());
    for chunk in job.bytes.chunks(rows_at_once.saturating_mul(in_row)) {
        let mut encoded = chunk;
        if let (true, Encoding::Block(ty)) = (job.from_tiles, job.from) {
            encoded = by_tiles(&mut rows, encoded, in_row, |t, rows| separate(ty, t, rows))?;
        }
        // The same quantized format: decoding and encoding again could only lose.
        if job.from != Encoding::Block(job.to) || job.to.block_len() == 1 {
            out.resize(chunk.len() / in_row * out_row, 0);
            encode_rows(job, columns, encoded, in_row, &mut out, out_row)?;
            encoded = &out;
        }
        if job.to_tiles {
            encoded = by_tiles(&mut tiles, encoded, out_row, |r, tile| {
                interleave(job.to, r, tile)
            })?;
        }
        writer.write_tensor_bytes(encoded)?;
        hasher.write(encoded);
        advance(progress, chunk.len())?;
    }
    writer.next_tensor()?;
    Ok(hasher.finish())
}

/// `bytes` with `change` done to each sixteen rows; what is left over at the end stays.
fn by_tiles<'a>(
    changed: &'a mut Vec<u8>,
    bytes: &[u8],
    row_bytes: usize,
    change: impl Fn(&[u8], &mut [u8]) + Sync + Send,
) -> Result<&'a [u8]> {
    changed.clear();
    changed.extend_from_slice(bytes);
    let tile = TILE_ROWS * row_bytes;
    let pairs = changed
        .par_chunks_exact_mut(tile)
        .zip(bytes.par_chunks_exact(tile));
    workers()?.install(|| pairs.for_each(|(to, from)| change(from, to)));
    Ok(changed)
}

fn encode_rows(
    job: &Job,
    columns: usize,
    input: &[u8],
    in_row: usize,
    out: &mut [u8],
    out_row: usize,
) -> Result<()> {
    let rows = out.par_chunks_mut(out_row).zip(input.par_chunks(in_row));
    workers()?.install(|| {
        rows.try_for_each_init(
            || vec![0f32; columns],
            |row, (target, source)| {
                job.from.decode(source, row)?;
                quantize_row(job.to, row, target).map_err(|e| match e {
                    // The encoder knows the column but not the tensor.
                    Error::InvalidArgument(what) => {
                        Error::convert(format_args!("'{}' cannot be stored: {what}", job.origin))
                    }
                    other => other,
                })
            },
        )
    })
}

/// The threads that round and arrange. (The pool that rayon would start by itself panics where the system refuses one.)
pub(super) fn workers() -> Result<&'static ThreadPool> {
    static POOL: OnceLock<ThreadPool> = OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let pool = ThreadPoolBuilder::new().build().map_err(|e| {
        Error::thread(format_args!(
            "the system refused a thread of the conversion ({e}); set RAYON_NUM_THREADS to fewer, or raise the limit (ulimit -u, a container's limit)"
        ))
    })?;
    Ok(POOL.get_or_init(|| pool))
}

/// Reads the file back: every tensor must be there as it was meant, and the whole must be a model
/// that opens.
fn verify(path: &Path, jobs: &[Job], hashes: &[u64], progress: &mut dyn Progress) -> Result<u64> {
    let map = map_file(path)?;
    let gguf = Gguf::parse(&map)?;
    let wrong = |name: &str| {
        Error::convert(format_args!(
            "the tensor '{name}' did not read back as it was written; the disk may be failing"
        ))
    };
    if gguf.tensors().len() != jobs.len() {
        return Err(wrong("(count)"));
    }
    for (job, hash) in jobs.iter().zip(hashes) {
        let info = gguf.tensor(&job.name).ok_or_else(|| wrong(&job.name))?;
        let bytes = info
            .offset
            .checked_add(info.bytes)
            .and_then(|end| map.get(info.offset..end))
            .ok_or_else(|| wrong(&job.name))?;
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        advance(progress, 0)?;
        if info.ty != job.to || info.dims != job.dims || hasher.finish() != *hash {
            return Err(wrong(&job.name));
        }
    }
    Model::open(path)?;
    Ok(map.len() as u64)
}

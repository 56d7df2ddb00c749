//! A model: the mapped file, what it says about itself, and where its weights lie.

mod hyperparameters;
mod schedule;
mod weights;

pub use hyperparameters::*;
pub use schedule::*;
pub use weights::{Layer, Linear, Matrix, Router, Vector};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use weights::Finder;

/// Where the bytes of a model live.
enum Storage {
    Map(memmap2::Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Storage::Map(map) => map,
            Storage::Static(bytes) => bytes,
            Storage::Owned(bytes) => bytes,
        }
    }
}

/// An opened model. It is immutable, so threads and sessions share it through [`Arc`].
pub struct Model {
    storage: Storage,
    gguf: Gguf,
    hyperparameters: Hyperparameters,
    schedule: Schedule,
    /// `schedule`'s `layer` indices point here.
    layers: Vec<Layer>,
    token_embedding: Matrix,
    output_norm: Vector,
    output: Matrix,
    /// Divides each rotary frequency (Llama 3.1's long contexts), when the file has it.
    rope_factors: Option<Vector>,
    /// One per recursion (expert-choice), or one (token-choice).
    routers: Vec<Router>,
    /// Expert-choice with an auxiliary router: one per recursion.
    auxiliary_routers: Vec<Router>,
}

impl Model {
    /// Maps the GGUF file at `path` read-only and checks all that is needed to run it. No weight
    /// is read or copied.
    ///
    /// The file must not be changed while the model lives: the system hands later readers of a
    /// truncated file a signal.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>> {
        let path = path.as_ref();
        let io = |source| Error::io(path, source);
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?;
        if length.is_dir() {
            return Err(Error::argument(format!(
                "'{}' is a folder; convert a checkpoint folder with 'mor convert' first",
                path.display()
            )));
        }
        if length.len() == 0 {
            return Err(Error::format(format!("'{}' is empty", path.display())));
        }
        // SAFETY: the map is private to this process and read-only; that nobody truncates the
        // file meanwhile is the documented duty of the caller.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Self::from_storage(Storage::Map(map))
    }

    /// A model that is part of the program.
    pub fn from_static(bytes: &'static [u8]) -> Result<Arc<Self>> {
        Self::from_storage(Storage::Static(bytes))
    }

    /// A model in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Arc<Self>> {
        Self::from_storage(Storage::Owned(bytes))
    }

    fn from_storage(storage: Storage) -> Result<Arc<Self>> {
        let gguf = Gguf::parse(storage.bytes())?;
        let h = Hyperparameters::from_metadata(&gguf.metadata)?;
        let (schedule, blocks) = Schedule::new(&h);
        let finder = Finder::new(&gguf)?;
        let layers = blocks
            .iter()
            .map(|(block, recursion)| finder.layer(&h, *block, *recursion))
            .collect::<Result<_>>()?;
        let token_embedding = finder.matrix("token_embd.weight", h.vocab_size, h.hidden_size)?;
        let output = if finder.has("output.weight") {
            finder.matrix("output.weight", h.vocab_size, h.hidden_size)?
        } else {
            token_embedding
        };
        let rope_factors = if finder.has("rope_freqs.weight") {
            Some(finder.vector("rope_freqs.weight", h.rope.dims / 2)?)
        } else {
            None
        };
        let (routers, auxiliary_routers) = Self::find_routers(&finder, &h)?;
        let output_norm = finder.vector("output_norm.weight", h.hidden_size)?;
        drop(finder);
        Ok(Arc::new(Model {
            storage,
            gguf,
            hyperparameters: h,
            schedule,
            layers,
            token_embedding,
            output_norm,
            output,
            rope_factors,
            routers,
            auxiliary_routers,
        }))
    }

    fn find_routers(finder: &Finder, h: &Hyperparameters) -> Result<(Vec<Router>, Vec<Router>)> {
        let Some(spec) = &h.router else {
            return Ok((Vec::new(), Vec::new()));
        };
        if spec.kind == RouterKind::Token {
            return Ok((
                vec![finder.router(h, "router.0", h.recursions)?],
                Vec::new(),
            ));
        }
        let all = |stem: &str| {
            (0..h.recursions)
                .map(|r| finder.router(h, &format!("{stem}.{r}"), 1))
                .collect::<Result<Vec<_>>>()
        };
        let auxiliary = if spec.auxiliary {
            all("aux_router")?
        } else {
            Vec::new()
        };
        Ok((all("router")?, auxiliary))
    }

    /// The file's metadata and tensor table.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// Sizes and rules.
    pub fn hyperparameters(&self) -> &Hyperparameters {
        &self.hyperparameters
    }

    /// The order of the work.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Bytes of the tensors that the file stores, each once: what a run maps.
    pub fn weight_bytes(&self) -> u64 {
        let tensors = self.gguf.tensors();
        tensors.iter().map(|tensor| tensor.bytes as u64).sum()
    }

    /// Bytes that the same model would need if it shared nothing between recursions.
    pub fn unshared_weight_bytes(&self) -> u64 {
        let of = |run: &LayerRun| self.layers[run.layer].matrices();
        let logical: u64 = self.schedule.runs().flat_map(of).map(|m| m.bytes()).sum();
        // A set: recursions that share a matrix point to the same bytes.
        let stored: HashSet<Matrix> = self.schedule.runs().flat_map(of).collect();
        self.weight_bytes() + logical - stored.iter().map(|m| m.bytes()).sum::<u64>()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.storage.bytes()
    }
    pub(crate) fn layer(&self, index: usize) -> &Layer {
        &self.layers[index]
    }
    pub(crate) fn token_embedding(&self) -> &Matrix {
        &self.token_embedding
    }
    pub(crate) fn output_norm(&self) -> &Vector {
        &self.output_norm
    }
    pub(crate) fn output(&self) -> Linear {
        Linear {
            weight: self.output,
            bias: None,
        }
    }
    pub(crate) fn rope_factors(&self) -> Option<&Vector> {
        self.rope_factors.as_ref()
    }
    pub(crate) fn router(&self, recursion: usize) -> &Router {
        &self.routers[recursion]
    }
    pub(crate) fn auxiliary_router(&self, recursion: usize) -> Option<&Router> {
        self.auxiliary_routers.get(recursion)
    }
    /// Width of the widest hidden layer of a router, 0 when all are linear.
    pub(crate) fn router_width(&self) -> usize {
        let routers = self.routers.iter().chain(&self.auxiliary_routers);
        let hidden = routers.filter(|r| r.second.is_some());
        hidden.map(|r| r.first.weight.rows).max().unwrap_or(0)
    }
    /// The longest row of any matrix.
    pub(crate) fn widest_row(&self) -> usize {
        let h = &self.hyperparameters;
        let widths = [
            h.hidden_size,
            h.feed_forward_size,
            h.query_size(),
            self.router_width(),
        ];
        widths.into_iter().max().unwrap_or(0)
    }
}

//! A model: the mapped file, what it says about itself, and where its weights lie.

mod hyperparameters;
mod schedule;
mod storage;
mod strict;
mod weights;

#[cfg(feature = "convert")]
pub(crate) use hyperparameters::named;
pub use hyperparameters::*;
pub use schedule::*;
pub use storage::{Device, LoadParams};
pub(crate) use storage::{Storage, anonymous};
#[cfg(feature = "convert")]
pub(crate) use strict::{check_keys, is_llama_key};
pub(crate) use weights::{Layer, Linear, Matrix, Router, Vector};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::memory::{Shared, reserved, try_collect};
use crate::text::Text;
use crate::tokenizer::Tokenizer;
use std::fs::File;
use std::path::Path;
use weights::Finder;

/// An opened model. It is immutable and cheap to clone: clones, sessions and tokenizers share one
/// mapping, which ends with the last of them. Threads may share it.
#[derive(Clone)]
pub struct Model(Shared<Parts>);

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all = f.debug_struct("Model");
        all.field("hyperparameters", self.hyperparameters());
        all.finish_non_exhaustive()
    }
}

/// What the owners of a model share.
struct Parts {
    /// The weights on a GPU. Goes before the storage, which it may use in place.
    #[cfg(feature = "cuda")]
    on_device: Option<Shared<crate::cuda::Weights>>,
    storage: Storage,
    gguf: Gguf,
    hyperparameters: Hyperparameters,
    schedule: Schedule,
    /// `schedule`'s `layer` indices point here.
    layers: Vec<Layer>,
    /// Whether every recursion has the same layers.
    block_is_shared: bool,
    /// What the layers would take if each had its own matrices, less what they take.
    shared_bytes: u64,
    token_embedding: Matrix,
    output_norm: Vector,
    output: Matrix,
    /// Divides each rotary frequency (Llama 3.1's long contexts), when the file has it.
    rope_factors: Option<Vector>,
    /// One per recursion (expert-choice), or one (token-choice).
    routers: Vec<Router>,
    /// Expert-choice with an auxiliary router: one per recursion.
    auxiliary_routers: Vec<Router>,
    /// The tokenizer, or why the file has none that can be used.
    tokenizer: std::result::Result<Tokenizer, Text>,
}

impl Model {
    /// Maps the GGUF file at `path` read-only and checks all that is needed to run it. No weight
    /// is read or copied. See [`LoadParams`] for other ways.
    ///
    /// # Errors
    /// [`Error::Io`] where the system refuses the file, [`Error::Format`] where it is damaged, [`Error::Unsupported`] where it
    /// is of a kind that is not run, [`Error::OutOfMemory`]. A file that another program truncates later ends the process
    /// when a page of it is missed: [`LoadParams::copy`] rules that out.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &LoadParams::default())
    }

    /// As [`Model::open`], with parameters.
    ///
    /// # Errors
    /// As [`Model::open`]; [`Error::Lock`] and [`Error::Device`] for what the parameters ask.
    pub fn open_with(path: impl AsRef<Path>, params: &LoadParams) -> Result<Self> {
        let path = path.as_ref();
        let file = storage::open(path)?;
        Self::from_storage(Storage::file(file, path, None, params)?, params.device)
    }

    /// A model that begins `offset` bytes into an open file and is `bytes` long (`None`: all that
    /// follows), as Android's asset manager describes one.
    ///
    /// # Errors
    /// As [`Model::open_with`], and [`Error::InvalidArgument`] for a part that is not in the file.
    pub fn from_file(
        file: File,
        offset: u64,
        bytes: Option<u64>,
        params: &LoadParams,
    ) -> Result<Self> {
        let part = Some((offset, bytes));
        let path = Path::new("file descriptor");
        Self::from_storage(Storage::file(file, path, part, params)?, params.device)
    }

    /// A model that is part of the program.
    ///
    /// # Errors
    /// As [`Model::open`], but for [`Error::Io`].
    pub fn from_static(bytes: &'static [u8]) -> Result<Self> {
        Self::from_static_on(bytes, Device::Cpu)
    }

    /// A model that is part of the program, to run on a device.
    ///
    /// # Errors
    /// As [`Model::from_static`], and [`Error::Device`].
    pub fn from_static_on(bytes: &'static [u8], device: Device) -> Result<Self> {
        Self::from_storage(Storage::Static(bytes), device)
    }

    /// A model in memory.
    ///
    /// # Errors
    /// As [`Model::from_static`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::from_bytes_on(bytes, Device::Cpu)
    }

    /// A model in memory, to run on a device.
    ///
    /// # Errors
    /// As [`Model::from_static_on`].
    pub fn from_bytes_on(bytes: Vec<u8>, device: Device) -> Result<Self> {
        Self::from_storage(Storage::Owned(bytes), device)
    }

    pub(crate) fn from_storage(storage: Storage, device: Device) -> Result<Self> {
        #[cfg(not(feature = "cuda"))]
        if device != Device::Cpu {
            return Err(Error::unsupported(
                "this build runs on the CPU only; build with the feature 'cuda'",
            ));
        }
        let gguf = Gguf::parse(storage.bytes())?;
        let h = Hyperparameters::from_metadata(&gguf.metadata)?;
        let (schedule, blocks) = Schedule::new(&h)?;
        let finder = Finder::new(&gguf, &h)?;
        let layers = blocks
            .iter()
            .map(|(block, recursion)| finder.layer(&h, *block, *recursion));
        let layers = try_collect(layers)?;
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
        let mut biases = routers.iter().filter_map(|r| r.pick_bias.as_ref());
        if biases.any(|bias| !bias.values(storage.bytes()).all(f32::is_finite)) {
            return Err(Error::format(
                "the tensor router.0.bias has a value that is not finite",
            ));
        }
        let output_norm = finder.vector("output_norm.weight", h.hidden_size)?;
        drop(finder);
        let block_is_shared = schedule.stages.iter().all(|stage| {
            let first = &schedule.stages[0];
            let mut pairs = stage.runs.iter().zip(&first.runs);
            pairs.all(|(run, first)| layers[run.layer] == layers[first.layer])
        });
        // A model without a usable tokenizer still runs on token ids.
        let tokenizer = match Tokenizer::from_metadata(&gguf.metadata) {
            Ok(tokenizer) => Ok(tokenizer),
            Err(error @ Error::OutOfMemory { .. }) => return Err(error),
            Err(Error::Tokenizer(why)) => Err(why),
            Err(other) => Err(Text::new(other)),
        };
        #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
        let mut parts = Parts {
            #[cfg(feature = "cuda")]
            on_device: None,
            storage,
            gguf,
            hyperparameters: h,
            schedule,
            block_is_shared,
            shared_bytes: shared_bytes(&layers)?,
            layers,
            token_embedding,
            output_norm,
            output,
            rope_factors,
            routers,
            auxiliary_routers,
            tokenizer,
        };
        strict::check(&parts)?;
        // Of a file that is refused nothing was sent anywhere.
        #[cfg(feature = "cuda")]
        if let Device::Cuda(index) = device {
            let (gguf, h) = (&parts.gguf, &parts.hyperparameters);
            // SAFETY: the bytes of a storage stay where they are when it is moved, and `Parts` drops it
            // last.
            let weights =
                unsafe { crate::cuda::Weights::new(index, gguf, h, parts.storage.bytes()) }?;
            parts.on_device = Some(Shared::new(weights)?);
        }
        Ok(Model(Shared::new(parts)?))
    }

    fn find_routers(finder: &Finder, h: &Hyperparameters) -> Result<(Vec<Router>, Vec<Router>)> {
        let Some(spec) = &h.router else {
            return Ok((Vec::new(), Vec::new()));
        };
        if spec.kind == RouterKind::Token {
            let router = finder.router(h, "router.0", h.recursions);
            return Ok((try_collect([router])?, Vec::new()));
        }
        let all = |stem: &str| {
            try_collect((0..h.recursions).map(|r| {
                let stem = Text::new(format_args!("{stem}.{r}"));
                finder.router(h, &stem, 1)
            }))
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
        &self.0.gguf
    }

    /// The file's tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the file has none, or one that this library does not know.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.0
            .tokenizer
            .as_ref()
            .map_err(|why| Error::Tokenizer(*why))
    }

    /// Sizes and rules.
    pub fn hyperparameters(&self) -> &Hyperparameters {
        &self.0.hyperparameters
    }

    /// The order of the work.
    pub fn schedule(&self) -> &Schedule {
        &self.0.schedule
    }

    /// Bytes of the tensors that the file stores, each once: what a run maps.
    pub fn weight_bytes(&self) -> u64 {
        let tensors = self.0.gguf.tensors();
        tensors.iter().map(|tensor| tensor.bytes as u64).sum()
    }

    /// Weights in the file.
    pub fn parameters(&self) -> u64 {
        let tensors = self.gguf().tensors();
        tensors
            .iter()
            .map(|t| (t.columns() * t.rows()) as u64)
            .sum()
    }

    /// Bytes of the matrices that a token reads on its way through these layers.
    pub(crate) fn run_bytes(&self, runs: &[LayerRun]) -> u64 {
        let of = |run: &LayerRun| self.0.layers[run.layer].matrices();
        runs.iter().flat_map(of).map(|m| m.bytes()).sum()
    }

    /// Bytes that a token reads after its last recursion: own last layers and logits.
    pub(crate) fn tail_bytes(&self) -> u64 {
        self.run_bytes(&self.schedule().coda) + self.0.output.bytes()
    }

    /// Bytes that the same model would need if it shared nothing between recursions.
    pub fn unshared_weight_bytes(&self) -> u64 {
        self.weight_bytes() + self.0.shared_bytes
    }

    /// Fails when the mapped file has become shorter than it was, so that a truncated file is an
    /// error and not a signal. There is no other protection of a map: who cannot rule out that a
    /// file is truncated during a call loads a copy ([`LoadParams::copy`]).
    pub(crate) fn check_file(&self) -> Result<()> {
        self.0.storage.check_file()
    }

    /// Whether it runs on a GPU.
    pub fn is_on_gpu(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.0.on_device.is_some();
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// The weights on the GPU that it runs on.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self) -> Option<&Shared<crate::cuda::Weights>> {
        self.0.on_device.as_ref()
    }

    /// Bytes of a GPU's memory that the weights take; 0 on the CPU, and where they are used in place.
    pub fn device_bytes(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.on_device().map_or(0, |weights| weights.bytes());
        #[cfg(not(feature = "cuda"))]
        0
    }

    /// Whether the GPU that it runs on reads the weights where the file is mapped.
    pub fn is_in_place_on_gpu(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.on_device().is_some_and(|weights| weights.in_place());
        #[cfg(not(feature = "cuda"))]
        false
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.storage.bytes()
    }
    pub(crate) fn layer(&self, index: usize) -> &Layer {
        &self.0.layers[index]
    }
    pub(crate) fn token_embedding(&self) -> &Matrix {
        &self.0.token_embedding
    }
    pub(crate) fn output_norm(&self) -> &Vector {
        &self.0.output_norm
    }
    pub(crate) fn output(&self) -> Linear {
        Linear {
            weight: self.0.output,
            bias: None,
        }
    }
    pub(crate) fn rope_factors(&self) -> Option<&Vector> {
        self.0.rope_factors.as_ref()
    }
    /// Whether every recursion runs the block with the same weights.
    pub(crate) fn block_is_shared(&self) -> bool {
        self.0.block_is_shared
    }
    pub(crate) fn router(&self, recursion: usize) -> &Router {
        &self.0.routers[recursion]
    }
    pub(crate) fn auxiliary_router(&self, recursion: usize) -> Option<&Router> {
        self.0.auxiliary_routers.get(recursion)
    }
    /// Width of the widest hidden layer of a router, 0 when all are linear.
    pub(crate) fn router_width(&self) -> usize {
        let routers = self.0.routers.iter().chain(&self.0.auxiliary_routers);
        let hidden = routers.filter(|r| r.second.is_some());
        hidden.map(|r| r.first.weight.rows).max().unwrap_or(0)
    }
    /// The longest row of any matrix.
    pub(crate) fn widest_row(&self) -> usize {
        let h = &self.0.hyperparameters;
        let widths = [
            h.hidden_size,
            h.feed_forward_size,
            h.query_size(),
            self.router_width(),
        ];
        widths.into_iter().max().unwrap_or(0)
    }
}

/// Bytes that layers save by sharing matrices.
fn shared_bytes(layers: &[Layer]) -> Result<u64> {
    let mut matrices = reserved(layers.len() * 7)?;
    matrices.extend(layers.iter().flat_map(Layer::matrices));
    // Tensors do not overlap, so equal offsets mean the same matrix.
    matrices.sort_unstable_by_key(|m| m.offset);
    let again = matrices.windows(2).filter(|m| m[0].offset == m[1].offset);
    Ok(again.map(|m| m[1].bytes()).sum())
}

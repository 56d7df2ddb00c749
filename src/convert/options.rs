//! What a caller may ask of a conversion, and how it hears of its progress.

use std::path::PathBuf;

use crate::error::{Error, Result};
pub use crate::model::{KvStrategy, RouterFunction, Sharing};
use crate::model::{TensorLayout, named};
use crate::quant::TensorType;

named! {
    /// How a model decides which tokens go through a recursion.
    Kind {
        /// A plain Llama model: no recursion, no router.
        Vanilla = "vanilla",
        /// Every token runs every recursion.
        Recursive = "recursive",
        /// A router before each recursion chooses among the tokens still active.
        Expert = "expert",
        /// One router gives each token its depth.
        Token = "token",
    }
}

named! {
    /// What an expert-choice model was trained to decide by, causally.
    Selection {
        /// The router's own score, pushed to either side of the cut by an auxiliary loss.
        AuxLoss = "aux_loss",
        /// A second, auxiliary router.
        AuxRouter = "aux_router",
    }
}

named! {
    /// How a token-choice router was kept from sending every token to one depth.
    Balancing {
        /// By a loss.
        Loss = "loss",
        /// By a bias per depth, which picks but never weighs.
        LossFree = "loss_free",
    }
}

named! {
    /// Whether the router's weight scales what a recursion adds.
    Gating {
        /// It does.
        Weighted = "weighted",
        /// It does not.
        None = "none",
    }
}

/// What the caller knows better than the checkpoint and its configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// `general.name`.
    pub name: Option<String>,
    /// The kind of model.
    pub kind: Option<Kind>,
    /// How layers are shared.
    pub sharing: Option<Sharing>,
    /// The number of recursions.
    pub recursions: Option<u32>,
    /// Layers that a token of full depth passes (`num_hidden_layers`).
    pub layers: Option<u32>,
    /// The factor on the router's weight.
    pub alpha: Option<f32>,
    /// The router's function.
    pub router_function: Option<RouterFunction>,
    /// Expert-choice: what decides causally (`sampling` in the training configuration).
    pub selection: Option<Selection>,
    /// Token-choice: how the depths were balanced.
    pub balancing: Option<Balancing>,
    /// What the router's input is divided by.
    pub temperature: Option<f32>,
    /// Whether the router's weight scales the recursion's output.
    pub gating: Option<Gating>,
    /// Expert-choice: the share of the sequence that enters each recursion.
    pub capacities: Option<Vec<f64>>,
    /// What deeper recursions attend to.
    pub kv_strategy: Option<KvStrategy>,
    /// Query heads.
    pub heads: Option<u32>,
    /// Key and value heads.
    pub kv_heads: Option<u32>,
    /// Width of a head.
    pub head_dim: Option<u32>,
    /// Base of the rotary angles.
    pub rope_theta: Option<f32>,
    /// Epsilon of the RMS norms.
    pub rms_eps: Option<f32>,
    /// Tokens that the model was trained to see.
    pub context_length: Option<u32>,
}

/// How to convert.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConvertOptions {
    /// The format of the matrices; `None`: F16 for a checkpoint, as they are for a GGUF file. Norms,
    /// biases and routers stay F32.
    pub ty: Option<TensorType>,
    /// How quantized matrices are arranged.
    pub layout: TensorLayout,
    /// Where the tokenizer is: a `tokenizer.json` or a GGUF file. Without it, the checkpoint's own.
    pub tokenizer: Option<PathBuf>,
    /// The training run's configuration (YAML). Without it, `mor.yaml` beside the checkpoint, or what the authors' scripts
    /// name after the run: `NAME.yaml` in or beside the folder NAME, or `conf/pretrain/NAME.yaml` in a project around it.
    pub training: Option<PathBuf>,
    /// What the caller knows better than the checkpoint.
    pub overrides: Overrides,
}

/// Hears how a conversion goes. Every method may be left as it is.
pub trait Progress {
    /// Work begins on `total_bytes` bytes of input tensors.
    fn start(&mut self, total_bytes: u64) {
        let _ = total_bytes;
    }
    /// `bytes` more of them are done.
    fn advance(&mut self, bytes: u64) {
        let _ = bytes;
    }
    /// Asked now and then; true ends the work with [`Error::Cancelled`](crate::Error::Cancelled), and nothing is left of it.
    fn is_cancelled(&self) -> bool {
        false
    }
    /// One sentence about something that was assumed, skipped or done differently.
    fn note(&mut self, text: &str) {
        let _ = text;
    }
}

/// Tells that `bytes` more are done, and asks whether to go on.
pub(super) fn advance(progress: &mut dyn Progress, bytes: usize) -> Result<()> {
    progress.advance(bytes as u64);
    match progress.is_cancelled() {
        true => Err(Error::Cancelled),
        false => Ok(()),
    }
}

/// A [`Progress`] that nobody hears.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}

/// What a conversion wrote.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// `general.architecture` of the output.
    pub architecture: String,
    /// Tensors stored.
    pub tensors: usize,
    /// Tensors that a recursion takes from another one instead of storing its own.
    pub aliases: usize,
    /// Bytes of tensor data in the inputs that were read.
    pub input_bytes: u64,
    /// Bytes of the whole output file.
    pub output_bytes: u64,
}

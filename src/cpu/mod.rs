//! The CPU backend: one pass of a batch of rows through the whole model.

pub(crate) mod ops;
pub(crate) mod simd;
pub(crate) mod team;
pub mod thread;

pub(crate) mod activations;
pub(crate) mod attention;
#[cfg(feature = "bench")]
pub mod bench;
mod blocks;
mod floats;
mod forward;
mod layer;
#[macro_use]
mod levels;
pub(crate) mod matmul;
mod pace;
mod tiles;

use levels::levels;

pub(crate) use forward::{Pass, Settings, logits};
pub(crate) use pace::{Clock, Pace};

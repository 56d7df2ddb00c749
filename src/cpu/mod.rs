//! The CPU backend: one pass of a batch of rows through the whole model.

// Elsewhere (32-bit ARM) the scalar level runs alone, which leaves much of the vectors' code aside.
#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code)
)]

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

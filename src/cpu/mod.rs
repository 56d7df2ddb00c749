//! The CPU backend: one pass of a batch of rows through the whole model.

pub mod ops;
pub mod team;

mod forward;

pub(crate) use forward::{Pass, logits};

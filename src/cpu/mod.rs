//! The CPU backend: one pass of a batch of rows through the whole model.

pub mod ops;
pub mod team;
pub mod thread;

mod forward;
mod pace;

pub(crate) use forward::{Pass, logits};
pub(crate) use pace::{Clock, Pace};

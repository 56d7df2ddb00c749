//! `mor` runs Mixture-of-Recursions (MoR) language models: a quantized model is mapped from a GGUF
//! file and used where it lies, a session's memory is planned to the byte before it exists, and a
//! token pays only for the recursions that its router chose.
//!
//! Data flows one way: file → model → plan → session → step → text.
//!
//! ```no_run
//! use mor::{GenerateParams, Model, Session, SessionParams};
//! use std::ops::ControlFlow;
//!
//! let model = Model::open("model.gguf")?;
//! let mut session = Session::new(&model, &SessionParams::default())?;
//! session.prefill(&model.tokenizer()?.encode("It is a truth", Default::default())?)?;
//! let params = GenerateParams { max_tokens: 64, ..Default::default() };
//! session.generate(&params, |piece| {
//!     print!("{}", piece.text);
//!     ControlFlow::Continue(())
//! })?;
//! # mor::Result::Ok(())
//! ```
//!
//! A [`Session`] runs one sequence, a [`Batch`] many in one pass over the weights. Memory is planned by a [`Plan`]
//! and taken when they are made; running tokens takes no more.
#![warn(missing_docs)]

mod arena;
pub mod batch;
#[cfg(feature = "chat")]
pub mod chat;
#[cfg(feature = "convert")]
pub mod convert;
pub mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod error;
#[cfg(feature = "ffi")]
pub mod ffi;
pub mod generate;
pub mod gguf;
#[cfg(feature = "jni")]
mod jni;
pub mod kv;
mod layout;
mod memory;
pub mod model;
mod order;
pub mod plan;
pub mod quant;
pub mod routing;
pub mod sampling;
mod score;
pub mod session;
mod state;
mod text;
pub mod tokenizer;
mod traffic;

pub use batch::{Batch, Event, Pressure, Request, SequenceId};
pub use cpu::thread::{CpuSet, ThreadParams};
pub use error::{Error, Result};
pub use generate::{GenerateParams, Piece};
pub use kv::KvType;
pub use model::{Device, LoadParams, Model};
pub use plan::{Plan, SessionParams};
pub use routing::Routing;
pub use sampling::SamplerParams;
pub use session::{Canceller, Session};
pub use text::Text;
pub use tokenizer::{EncodeOptions, Tokenizer};

/// All of them may be handed from thread to thread.
const _: fn() = || {
    fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Model>();
    is_send_and_sync::<Tokenizer>();
    is_send_and_sync::<Session>();
    is_send_and_sync::<Batch>();
    is_send_and_sync::<Canceller>();
    is_send_and_sync::<Error>();
};

/// The README's example compiles, and that of docs/batching.md.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../docs/batching.md")]
struct Readme;

//! `mor` runs Mixture-of-Recursions (MoR) language models: a quantized model is mapped from a GGUF
//! file and used where it lies, a session's memory is planned to the byte before it exists, and a
//! token pays only for the recursions that its router chose.
//!
//! Data flows one way: file → model → plan → session → step → text.
#![warn(missing_docs)]

#[cfg(feature = "chat")]
pub mod chat;
#[cfg(feature = "convert")]
pub mod convert;
pub mod error;
pub mod gguf;
pub mod quant;
pub mod tokenizer;

pub use error::{Error, Result};

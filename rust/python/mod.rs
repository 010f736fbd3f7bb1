//! Python: the extension. Only this folder uses PyO3, and only this folder knows torch.
//!
//! In: Python's tensors and buffers. Out: the same, over a block. Imports all other folders; none
//! imports it. `dlpack` is plain C and needs no interpreter.

pub mod dlpack;

#[cfg(feature = "python")]
mod errors;

#[cfg(feature = "python")]
mod torch;

#[cfg(feature = "python")]
mod sources;

#[cfg(feature = "python")]
mod buffer;

#[cfg(feature = "python")]
mod arena;

#[cfg(feature = "python")]
mod release;

#[cfg(feature = "python")]
mod loan;

#[cfg(feature = "python")]
mod connection;

#[cfg(feature = "python")]
mod block;

#[cfg(feature = "python")]
mod gather;

#[cfg(feature = "python")]
mod collector;

#[cfg(feature = "python")]
mod module;

#[cfg(feature = "python")]
mod snapshot;

#[cfg(feature = "python")]
mod digest;

#[cfg(feature = "python")]
mod extension;

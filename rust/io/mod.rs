//! Io: reads the bytes of storages and writes them into a block.
//!
//! In: storages by address, and memory to write to. Out: a block. Imports `error`, `format`,
//! `platform` and `memory`.

#[allow(unsafe_code)] // instructions of the processor
pub mod stream;

pub mod bounce;

pub mod file;

#[allow(unsafe_code)] // reads the model's storages by address
pub mod source;

pub mod part;

#[allow(unsafe_code)] // reads the model's storages by address
pub mod fill;

#[allow(unsafe_code)] // reads the model's storages by address
pub mod twins;

#[allow(unsafe_code)] // reads the model's storages by address
pub mod block;

#[allow(unsafe_code)] // maps what it has leased
pub mod snapshot;

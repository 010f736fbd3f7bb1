//! Format: what a block is, as bytes.
//!
//! In: how long storages are, and the tensors over them. Out: a layout, its table, checksums, headers; or an
//! error, for bytes that are none of these. Imports `error` alone.

pub mod dtype;

pub mod view;

pub mod layout;

#[allow(unsafe_code)] // reads the model's storages by address
pub mod checksum;

pub mod table;

#[allow(unsafe_code)] // has a block written
pub mod snapshot;

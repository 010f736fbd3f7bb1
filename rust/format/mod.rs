//! Format: what a block is, as bytes.
//!
//! In: how long storages are, and the tensors over them. Out: a layout, its table, checksums, headers; or an
//! error, for bytes that are none of these. Imports `error` alone.

pub mod dtype;

pub mod view;

pub mod layout;

pub mod checksum;

pub mod table;

pub mod header;

pub mod snapshot;

pub mod digest;

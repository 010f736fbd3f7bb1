//! Format: the bytes of a block.
//!
//! In: the lengths of storages, and the tensors over them. Out: a layout, its table, checksums and
//! headers. Bytes that are none of these give an error. Imports only `error`.

pub mod dtype;

pub mod view;

pub mod layout;

pub mod checksum;

pub mod table;

pub mod header;

pub mod snapshot;

pub mod digest;

//! The core of ray-zerocopy: plan the layout of a model's storages, gather them into one block,
//! and map that block again where it is read.
//!
//! ```text
//! storages ─ layout ─▶ table + segments ─ block ─▶ ... ═ store ═ ... ─ pages ─▶ views
//! ```
//!
//! A module imports only from those before it: `error`, `dtype`, `view`, `layout`, `checksum`, `copy`,
//! `table`, `mapping`, `page_table`, `arena`, `read`, `source`, `huge`, `target`, `block`, `snapshot`, `pages`, `dlpack`,
//! and with the feature `python` the edge towards Python.

pub mod error;

pub mod dtype;

pub mod view;

pub mod layout;

#[allow(unsafe_code)] // reads the model's storages by address
pub mod checksum;

#[allow(unsafe_code)] // instructions of the processor
pub mod copy;

pub mod table;

#[allow(unsafe_code)] // asks the kernel
pub mod mapping;

#[allow(unsafe_code)] // asks the kernel
pub mod page_table;

#[allow(unsafe_code)] // maps memory, and gives it back
pub mod arena;

#[allow(unsafe_code)] // asks the kernel
pub mod read;

pub mod source;

#[allow(unsafe_code)] // maps memory
pub mod huge;

#[allow(unsafe_code)] // writes by address
pub mod target;

#[allow(unsafe_code)] // reads the model's storages by address
pub mod block;

#[allow(unsafe_code)] // has a block written
pub mod snapshot;

#[allow(unsafe_code)] // maps memory
pub mod pages;

#[allow(unsafe_code)] // a C structure, and what it keeps
pub mod dlpack;

#[cfg(feature = "python")]
#[allow(unsafe_code)] // the buffer protocol
mod python;

//! The core of ray-zerocopy: plan the layout of a model's storages, gather them into one block,
//! and map that block again where it is read.
//!
//! ```text
//! storages ─ layout ─▶ table + segments ─ block ─▶ ... ═ store ═ ... ─ pages ─▶ views
//! ```
//!
//! A folder imports only from those before it: `error`, `format`, `memory`, `io`, and with the feature
//! `python` the edge towards Python. In its `mod.rs` it says what comes in and what goes out.

pub mod error;

pub mod format;

pub mod memory;

pub mod io;

#[allow(unsafe_code)] // a C structure and what it keeps; the buffer protocol
pub mod python;

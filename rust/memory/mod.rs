//! Memory: addresses and pages.
//!
//! In: a region of memory, or a file to map. Out: pages that are ready to be written or read.
//! Imports `error` and `platform`.

#[allow(unsafe_code)] // bytes by address
pub mod region;

pub mod aliases;

#[allow(unsafe_code)] // touches pages that it has mapped
pub mod huge;

pub mod prices;

#[allow(unsafe_code)] // gives pages back
pub mod arena;

#[allow(unsafe_code)] // gives pages back
pub mod sole;

#[allow(unsafe_code)] // writes by address
pub mod target;

pub mod store;

#[allow(unsafe_code)] // borrows descriptors of other code
pub mod connection;

pub mod forks;

#[allow(unsafe_code)] // discards pages
pub mod reaper;

pub mod lease;

#[allow(unsafe_code)] // reads pages that it has mapped
pub mod pages;

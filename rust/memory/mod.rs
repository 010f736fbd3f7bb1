//! Memory: addresses and pages.
//!
//! In: a region of memory, or a file to map. Out: pages that are ready to be written, or to be read.
//! Imports `error` and `platform`.

#[allow(unsafe_code)] // bytes by address
pub mod region;

pub mod aliases;

#[allow(unsafe_code)] // reads what it has mapped
pub mod huge;

pub mod prices;

#[allow(unsafe_code)] // gives pages back
pub mod arena;

#[allow(unsafe_code)] // gives pages back
pub mod sole;

#[allow(unsafe_code)] // writes by address
pub mod target;

pub mod store;

#[allow(unsafe_code)] // looks at descriptors of others
pub mod connection;

pub mod forks;

#[allow(unsafe_code)] // has the kernel drop pages
pub mod reaper;

pub mod lease;

#[allow(unsafe_code)] // reads what it has mapped
pub mod pages;

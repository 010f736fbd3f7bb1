//! Memory: addresses and pages.
//!
//! In: a region of memory, or a file to map. Out: pages that are ready to be written, or to be read. Imports
//! `error` and `format`.

#[allow(unsafe_code)] // bytes by address
pub mod region;

#[allow(unsafe_code)] // asks the kernel
pub mod mapping;

#[allow(unsafe_code)] // asks the kernel
pub mod page_table;

#[allow(unsafe_code)] // maps memory
pub mod huge;

#[allow(unsafe_code)] // maps memory, and gives it back
pub mod arena;

#[allow(unsafe_code)] // writes by address
pub mod target;

#[allow(unsafe_code)] // maps memory
pub mod pages;

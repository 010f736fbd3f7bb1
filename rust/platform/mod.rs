//! Platform: all system calls, in one file for each system and one for what all have.
//!
//! In: addresses and files. Out: the kernel's answers, as values and `io::Error`s. Imports nothing
//! from this crate. `portable` refuses what only Linux has as `Unsupported`, or does nothing. The
//! feature `portable` selects it on Linux, so that it is tested.

pub mod mapping;

#[allow(unsafe_code)] // system calls
mod posix;

#[cfg(all(target_os = "linux", not(feature = "portable")))]
#[allow(unsafe_code)] // system calls
mod linux;

#[cfg(not(all(target_os = "linux", not(feature = "portable"))))]
#[allow(unsafe_code)] // maps files
mod portable;

pub use posix::*;

#[cfg(all(target_os = "linux", not(feature = "portable")))]
pub use linux::*;
#[cfg(not(all(target_os = "linux", not(feature = "portable"))))]
pub use portable::*;

//! Platform: every system call, in one file a system, and one for what all have.
//!
//! In: addresses, files. Out: what the kernel says and does, as values and `io::Error`s. Imports nothing
//! of this crate. What only Linux has, `portable` refuses as `Unsupported`, or does nothing for; the
//! feature `portable` selects it on Linux, so that it is tested.

pub mod mapping;

#[allow(unsafe_code)] // asks the kernel
mod posix;

#[cfg(all(target_os = "linux", not(feature = "portable")))]
#[allow(unsafe_code)] // asks the kernel
mod linux;

#[cfg(not(all(target_os = "linux", not(feature = "portable"))))]
#[allow(unsafe_code)] // maps files
mod portable;

pub use posix::*;

#[cfg(all(target_os = "linux", not(feature = "portable")))]
pub use linux::*;
#[cfg(not(all(target_os = "linux", not(feature = "portable"))))]
pub use portable::*;

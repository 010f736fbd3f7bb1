//! Region: memory of this process, by its addresses.

use std::ops::Range;
use std::{ptr, slice};

/// Some bytes of this process that somebody else keeps alive. A span is the same of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Address of the first byte.
    pub address: usize,
    /// Length in bytes.
    pub nbytes: usize,
}

impl Region {
    /// Where a slice lies.
    pub fn of(bytes: &[u8]) -> Region {
        Region { address: bytes.as_ptr().addr(), nbytes: bytes.len() }
    }

    /// The addresses of all its bytes, or all there are where it says that it has more.
    pub fn addresses(self) -> Range<usize> {
        self.address..self.address.saturating_add(self.nbytes)
    }

    /// The bytes.
    ///
    /// # Safety
    /// They are readable, and nobody writes them, for as long as the slice lives.
    pub unsafe fn bytes<'a>(self) -> &'a [u8] {
        if self.nbytes == 0 {
            return &[]; // an empty storage has address 0
        }
        // SAFETY: not null, since not empty; readable and unwritten for 'a by the caller's promise.
        unsafe { slice::from_raw_parts(self.address as *const u8, self.nbytes) }
    }

    /// The bytes, to be written.
    ///
    /// # Safety
    /// They are writable, and nobody else reads or writes them, for as long as the slice lives.
    pub unsafe fn bytes_mut<'a>(self) -> &'a mut [u8] {
        if self.nbytes == 0 {
            return &mut [];
        }
        // SAFETY: not null, since not empty; the caller's alone for 'a by its promise.
        unsafe { slice::from_raw_parts_mut(self.address as *mut u8, self.nbytes) }
    }
}

impl From<Range<usize>> for Region {
    fn from(addresses: Range<usize>) -> Region {
        Region { address: addresses.start, nbytes: addresses.len() }
    }
}

/// Reads a byte, for which the kernel fills in its page, and those around it.
///
/// # Safety
/// It is readable.
pub unsafe fn touch(address: usize) {
    // SAFETY: the caller's promise.
    unsafe { ptr::read_volatile(address as *const u8) };
}

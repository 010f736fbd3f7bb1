//! Region: memory of this process, as an address and a length.

use std::ops::Range;
use std::{ptr, slice};

/// Bytes of this process that the caller keeps alive. A span is the same within a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Address of the first byte.
    pub address: usize,
    /// Length in bytes.
    pub nbytes: usize,
}

impl Region {
    /// The region of a slice.
    pub fn of(bytes: &[u8]) -> Region {
        Region { address: bytes.as_ptr().addr(), nbytes: bytes.len() }
    }

    /// The addresses of all its bytes, cut at the end of the address space.
    pub fn addresses(self) -> Range<usize> {
        self.address..self.address.saturating_add(self.nbytes)
    }

    /// Its bytes.
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

    /// Its bytes, writable.
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

/// Reads a byte, so that the kernel maps its page, and those around it.
///
/// # Safety
/// It is readable.
pub unsafe fn touch(address: usize) {
    // SAFETY: the caller's promise.
    unsafe { ptr::read_volatile(address as *const u8) };
}

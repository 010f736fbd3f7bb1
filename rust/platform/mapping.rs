//! A mapping of a file, as the system describes it.

use std::ops::Range;
use std::path::PathBuf;

/// One mapping of a file in this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Address of its first byte.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
    /// The file.
    pub backing: Backing,
    /// Whether a write goes into the file. If not, it makes a private copy of the page.
    pub shared: bool,
}

/// The file behind some memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The file's name as the kernel gives it, with ` (deleted)` if it is deleted. It may not be
    /// UTF-8.
    pub name: PathBuf,
    /// Its inode.
    pub inode: u64,
    /// The offset in the file where the memory starts, in bytes.
    pub offset: u64,
    /// Whether the mapping is writable.
    pub writable: bool,
}

impl Mapping {
    /// Whether all of these addresses lie in it.
    pub fn holds(&self, addresses: &Range<usize>) -> bool {
        self.start <= addresses.start && addresses.end <= self.end
    }

    /// The file behind the memory that starts at an address of the mapping.
    pub fn backing_at(&self, address: usize) -> Backing {
        let offset = self.backing.offset + (address - self.start) as u64;
        Backing { offset, ..self.backing.clone() }
    }
}

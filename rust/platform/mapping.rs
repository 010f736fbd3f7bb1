//! What a system says of a mapping of a file.

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
    /// Whether a write goes into the file; if not, the page written becomes this process's own.
    pub shared: bool,
}

/// The file behind some memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The file's name as the kernel gives it, with ` (deleted)` if it is. It may be no UTF-8.
    pub name: PathBuf,
    /// Its inode.
    pub inode: u64,
    /// Where in the file the memory starts, in bytes.
    pub offset: u64,
    /// Whether the mapping that was found can be written.
    pub writable: bool,
}

impl Mapping {
    /// Whether all of these addresses lie in it.
    pub fn holds(&self, addresses: &Range<usize>) -> bool {
        self.start <= addresses.start && addresses.end <= self.end
    }

    /// What lies behind the memory from an address of the mapping on.
    pub fn backing_at(&self, address: usize) -> Backing {
        let offset = self.backing.offset + (address - self.start) as u64;
        Backing { offset, ..self.backing.clone() }
    }
}

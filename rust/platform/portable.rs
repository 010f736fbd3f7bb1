//! Every Unix that has `mmap`: what macOS would use. What only Linux has is refused, is unknown, or
//! does nothing.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memmap2::{MmapMut, MmapOptions, MmapRaw};

use crate::platform::mapping::Mapping;

/// As on Linux: parts of a target are cut into this size.
pub const HUGE: usize = 2 << 20;

/// The smallest page.
pub const AROUND: usize = 4096;

/// Bytes in a page. Not used for anything here.
pub fn page() -> usize {
    4096
}

/// Not used for anything here.
pub fn memory_nbytes() -> usize {
    0
}

/// No system call tells the file behind an address.
#[derive(Debug)]
pub struct Mappings;

impl Mappings {
    /// Unsupported.
    pub fn open() -> io::Result<Mappings> {
        Err(unsupported("only Linux tells which file lies behind memory"))
    }

    /// Nothing.
    pub fn at_or_after(&self, _: usize) -> io::Result<Option<Mapping>> {
        Ok(None)
    }
}

impl Mapping {
    /// Unknown.
    pub fn stands(&self) -> bool {
        false
    }

    /// Unsupported.
    pub fn open(&self, _: Option<&Path>) -> io::Result<(File, PathBuf)> {
        Err(unsupported("only Linux opens a mapped file again"))
    }

    /// Unsupported.
    pub fn open_of_raylet(&self) -> Option<(File, PathBuf)> {
        None
    }
}

/// No system call tells what the page table has.
#[derive(Debug)]
pub struct PageTable;

impl PageTable {
    /// Opens nothing.
    pub fn open() -> PageTable {
        PageTable
    }

    /// Unknown.
    pub fn lacks(&self, _: usize) -> bool {
        false
    }

    /// Unknown.
    pub fn written(&self, _: &Range<usize>) -> Option<Vec<Range<usize>>> {
        None
    }
}

/// Unknown.
pub fn is_in_memory(_: usize) -> bool {
    true
}

/// Nothing: pages fault as they are written.
pub fn fill_to_write(_: Range<usize>) -> bool {
    true
}

/// Unknown.
pub fn is_readable(_: Range<usize>) -> bool {
    true
}

/// Nothing: the pages stay.
///
/// # Safety
/// As on Linux.
pub unsafe fn give_back(_: Range<usize>) {}

/// Nothing: the pages stay.
///
/// # Safety
/// As on Linux.
pub unsafe fn discard(_: Range<usize>) {}

/// Nothing.
pub fn trim() {}

/// Part of a file, mapped. Unmapped when dropped.
#[derive(Debug)]
pub struct Map(MmapRaw);

impl Map {
    /// Maps part of a file copy-on-write. The part may have any size, and start at any byte.
    pub fn private(file: &File, offset: u64, nbytes: usize) -> io::Result<Map> {
        // SAFETY: this makes no slice of it.
        Ok(Map(unsafe { MmapOptions::new().offset(offset).len(nbytes).map_copy(file) }?.into()))
    }

    /// Maps part of a file for reading.
    pub fn shared(file: &File, offset: u64, nbytes: usize) -> io::Result<Map> {
        MmapOptions::new().offset(offset).len(nbytes).map_raw_read_only(file).map(Map)
    }

    /// Unsupported.
    ///
    /// # Safety
    /// As on Linux.
    pub unsafe fn again(_: Range<usize>) -> io::Result<Map> {
        Err(unsupported("only Linux maps the same memory a second time"))
    }

    /// The addresses of the bytes.
    pub fn addresses(&self) -> Range<usize> {
        let start = self.0.as_ptr().addr();
        start..start + self.0.len()
    }

    /// Unsupported.
    pub fn own(&self) -> io::Result<()> {
        Err(unsupported("only Linux replaces a mapped file by memory"))
    }

    /// Nothing.
    pub fn forbid(&self) {}
}

/// Unsupported.
pub fn nameless_file(_: usize) -> io::Result<File> {
    Err(unsupported("only Linux frees single pages of shared memory"))
}

/// Unsupported.
///
/// # Safety
/// As on Linux.
pub unsafe fn make_private(_: Range<usize>, _: BorrowedFd<'_>) -> io::Result<()> {
    Err(unsupported("only Linux has shared memory without a name"))
}

/// Nothing: the pages stay.
///
/// # Safety
/// As on Linux.
pub unsafe fn punch(_: &File, _: u64, _: usize) {}

/// Unsupported.
pub fn collapse(_: Range<usize>) -> io::Result<()> {
    Err(unsupported("only Linux makes huge pages on request"))
}

/// Nothing.
pub fn prefer_huge(_: &MmapMut, _: bool) {}

/// Unknown.
pub fn huge_nbytes(_: &Range<usize>) -> Option<usize> {
    None
}

/// Unknown.
pub fn cached(_: &File, _: u64, _: usize) -> Option<u64> {
    None
}

/// Unknown.
pub fn has_no_disk(_: &File) -> bool {
    false
}

/// Nothing.
pub fn read_no_further(_: &File) {}

/// The file system that a file is on.
pub fn device(file: &File) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.dev())
}

/// Nothing.
pub fn reopen_direct(_: &File) -> Option<File> {
    None
}

/// Nothing.
#[cfg(test)]
pub fn evict(_: &File) {}

/// Unsupported.
pub fn watch(_: fn()) -> io::Result<i32> {
    Err(unsupported("only Linux leases files"))
}

/// Unsupported.
pub fn lease(_: &File, _: i32) -> io::Result<()> {
    Err(unsupported("only Linux leases files"))
}

/// Unsupported.
pub fn tell(_: &File, _: i32) -> io::Result<()> {
    Err(unsupported("only Linux leases files"))
}

/// Never.
pub fn is_leased(_: &File) -> bool {
    false
}

/// Unsupported.
pub fn release(_: &File) -> io::Result<()> {
    Err(unsupported("only Linux leases files"))
}

/// Unsupported.
pub fn reopen(_: &File) -> io::Result<File> {
    Err(unsupported("only Linux leases files"))
}

fn unsupported(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

//! Any system that has `mmap`: what macOS would get.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memmap2::{MmapMut, MmapOptions, MmapRaw};

use crate::platform::mapping::Mapping;

/// As on Linux, for what is cut into parts of this size.
pub const HUGE: usize = 2 << 20;

/// One page at a time, of the least size.
pub const AROUND: usize = 4096;

/// Bytes in a page, where that is of no consequence.
pub fn page() -> usize {
    4096
}

/// Of no consequence.
pub fn memory_nbytes() -> usize {
    0
}

/// Which file lies behind which memory is not told.
#[derive(Debug)]
pub struct Mappings;

impl Mappings {
    /// Refused.
    pub fn open() -> io::Result<Mappings> {
        Err(unsupported("only Linux tells which file lies behind memory"))
    }

    /// None.
    pub fn at_or_after(&self, _: usize) -> io::Result<Option<Mapping>> {
        Ok(None)
    }
}

impl Mapping {
    /// Not known.
    pub fn stands(&self) -> bool {
        false
    }

    /// Refused.
    pub fn open(&self, _: Option<&Path>) -> io::Result<(File, PathBuf)> {
        Err(unsupported("only Linux opens what is mapped"))
    }

    /// Refused.
    pub fn open_of_raylet(&self) -> Option<(File, PathBuf)> {
        None
    }
}

/// What is in the page table is not told.
#[derive(Debug)]
pub struct PageTable;

impl PageTable {
    /// It answers nothing.
    pub fn open() -> PageTable {
        PageTable
    }

    /// Not known.
    pub fn lacks(&self, _: usize) -> bool {
        false
    }

    /// Not known.
    pub fn written(&self, _: &Range<usize>) -> Option<Vec<Range<usize>>> {
        None
    }
}

/// Not known.
pub fn is_in_memory(_: usize) -> bool {
    true
}

/// Nothing: pages are filled in as they are written.
pub fn fill_to_write(_: Range<usize>) -> bool {
    true
}

/// Not known.
pub fn is_readable(_: Range<usize>) -> bool {
    true
}

/// Nothing: they stay.
///
/// # Safety
/// As on Linux.
pub unsafe fn give_back(_: Range<usize>) {}

/// Nothing: they stay.
///
/// # Safety
/// As on Linux.
pub unsafe fn discard(_: Range<usize>) {}

/// Nothing.
pub fn trim() {}

/// Part of a file, mapped; unmapped when dropped.
#[derive(Debug)]
pub struct Map(MmapRaw);

impl Map {
    /// Maps part of a file copy-on-write. It may be of any size, and start at any byte.
    pub fn private(file: &File, offset: u64, nbytes: usize) -> io::Result<Map> {
        // SAFETY: no slice of it is made here.
        Ok(Map(unsafe { MmapOptions::new().offset(offset).len(nbytes).map_copy(file) }?.into()))
    }

    /// Maps part of a file to be read.
    pub fn shared(file: &File, offset: u64, nbytes: usize) -> io::Result<Map> {
        MmapOptions::new().offset(offset).len(nbytes).map_raw_read_only(file).map(Map)
    }

    /// Refused.
    ///
    /// # Safety
    /// As on Linux.
    pub unsafe fn again(_: Range<usize>) -> io::Result<Map> {
        Err(unsupported("only Linux maps again what is mapped"))
    }

    /// Where the bytes lie.
    pub fn addresses(&self) -> Range<usize> {
        let start = self.0.as_ptr().addr();
        start..start + self.0.len()
    }

    /// Refused.
    pub fn own(&self) -> io::Result<()> {
        Err(unsupported("only Linux maps memory in place of a file"))
    }

    /// Nothing.
    pub fn forbid(&self) {}
}

/// Refused.
pub fn nameless_file(_: usize) -> io::Result<File> {
    Err(unsupported("only Linux gives shared memory back by the page"))
}

/// Nothing: they stay.
///
/// # Safety
/// As on Linux.
pub unsafe fn punch(_: &File, _: u64, _: usize) {}

/// Refused.
pub fn collapse(_: Range<usize>) -> io::Result<()> {
    Err(unsupported("only Linux makes pages huge when asked"))
}

/// Nothing.
pub fn prefer_huge(_: &MmapMut, _: bool) {}

/// Not known.
pub fn huge_nbytes(_: &Range<usize>) -> Option<usize> {
    None
}

/// Not known.
pub fn cached(_: &File, _: u64, _: usize) -> Option<u64> {
    None
}

/// Not known.
pub fn has_no_disk(_: &File) -> bool {
    false
}

/// Nothing.
pub fn read_no_further(_: &File) {}

/// The file system that a file is on.
pub fn device(file: &File) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.dev())
}

/// None.
pub fn reopen_direct(_: &File) -> Option<File> {
    None
}

/// Nothing.
#[cfg(test)]
pub fn evict(_: &File) {}

/// Refused.
pub fn watch(_: fn()) -> io::Result<i32> {
    Err(unsupported("only Linux leases files"))
}

/// Refused.
pub fn lease(_: &File, _: i32) -> io::Result<()> {
    Err(unsupported("only Linux leases files"))
}

/// Refused.
pub fn tell(_: &File, _: i32) -> io::Result<()> {
    Err(unsupported("only Linux leases files"))
}

/// It is not.
pub fn is_leased(_: &File) -> bool {
    false
}

/// There is none.
pub fn release(_: &File) -> io::Result<()> {
    Err(unsupported("only Linux leases files"))
}

/// Refused.
pub fn reopen(_: &File) -> io::Result<File> {
    Err(unsupported("only Linux leases files"))
}

fn unsupported(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

//! The page table of this process, filled by the kernel in one go where the first touch of each page
//! would fault.

use std::fs::File;
use std::ops::Range;

use crate::memory::region::Region;

pub use system::{fill_to_write, give_back, is_in_memory, page, touch};

/// Of a file, the kernel fills in the pages of so many bytes around one that is read
/// (`fault_around_bytes`), if they are in memory.
pub const AROUND: usize = 64 << 10;

/// What tells which pages are in the page table.
#[derive(Debug)]
pub struct PageTable {
    /// `/proc/self/pagemap`; without it, pages are filled in as they are touched.
    entries: Option<File>,
}

impl PageTable {
    /// The page table of this process.
    pub fn open() -> PageTable {
        PageTable { entries: File::open("/proc/self/pagemap").ok() }
    }

    /// Whether the page at an address is known not to be in it. To ask takes 2 us.
    pub fn lacks(&self, address: usize) -> bool {
        self.entries.as_ref().is_some_and(|entries| system::lacks(entries, address))
    }

    /// The pages of a private mapping of a file that this process has written, which are its own since:
    /// addresses, cut to the region; `None` where the kernel does not say. 1 GiB takes 1 ms, or 8 where
    /// all of it has been read.
    pub fn written(&self, region: Region) -> Option<Vec<Range<usize>>> {
        system::written(self.entries.as_ref()?, region)
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::ffi::c_void;
    use std::fs::File;
    use std::io;
    use std::ops::Range;
    use std::os::unix::fs::FileExt;
    use std::ptr;

    use crate::memory::region::Region;

    /// The bit of an entry of `/proc/self/pagemap` that says that the page is there.
    const PRESENT: u64 = 1 << 63;

    /// The bit that says that it is not there but in swap ...
    const SWAPPED: u64 = 1 << 62;

    /// ... and the one that says that it is a page of a file.
    const OF_FILE: u64 = 1 << 61;

    /// Bytes in a page.
    pub fn page() -> usize {
        // SAFETY: only reads a number.
        unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
    }

    pub fn lacks(entries: &File, address: usize) -> bool {
        let mut entry = [0; 8];
        let read = entries.read_exact_at(&mut entry, 8 * (address / page()) as u64);
        read.is_ok() && u64::from_ne_bytes(entry) & PRESENT == 0
    }

    pub fn written(entries: &File, region: Region) -> Option<Vec<Range<usize>>> {
        let (page, end) = (page(), region.address + region.nbytes);
        let (mut address, mut written) = (region.address - region.address % page, Vec::new());
        let mut read = vec![0; 8 * (end - address).div_ceil(page).min(16 << 10)];
        while address < end {
            let read = &mut read[..8 * (end - address).div_ceil(page).min(16 << 10)];
            entries.read_exact_at(read, 8 * (address / page) as u64).ok()?;
            for entry in read.as_chunks::<8>().0 {
                let entry = u64::from_ne_bytes(*entry);
                if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                    let own = address.max(region.address)..end.min(address + page);
                    match written.last_mut() {
                        Some(Range { end, .. }) if *end == own.start => *end = own.end,
                        _ => written.push(own),
                    }
                }
                address += page;
            }
        }
        Some(written)
    }

    /// Whether the page of a file that is mapped at an address is in memory, for this process or any.
    pub fn is_in_memory(address: usize) -> bool {
        let (start, mut found) = (address - address % page(), 0);
        // SAFETY: one byte for one page; memory that is not mapped gives ENOMEM.
        let asked = unsafe { libc::mincore(start as *mut c_void, 1, &raw mut found) };
        asked == 0 && found & 1 == 1
    }

    /// Fills in the pages of memory that is about to be written, and makes those that no one has.
    ///
    /// False where a write would be a SIGBUS, as where a file system in memory is full. What is
    /// refused for another reason faults as it is written.
    #[must_use]
    pub fn fill_to_write(region: Region) -> bool {
        let start = region.address - region.address % page();
        let nbytes = region.address + region.nbytes - start;
        // SAFETY: changes no byte and no right; a range that is not mapped gives ENOMEM.
        let filled =
            unsafe { libc::madvise(start as *mut c_void, nbytes, libc::MADV_POPULATE_WRITE) == 0 };
        filled || io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT)
    }

    /// Gives pages of a file in shared memory back to the system: those of which the region has all
    /// bytes, which are zeros from then on.
    pub fn give_back(region: Region) {
        let (start, end) =
            (region.address.next_multiple_of(page()), region.address + region.nbytes);
        let nbytes = (end - end % page()).saturating_sub(start);
        // SAFETY: the caller's to write; where that is refused, the pages stay.
        unsafe { libc::madvise(start as *mut c_void, nbytes, libc::MADV_REMOVE) };
    }

    /// Reads a byte, for which the kernel fills in its page, and those around it.
    ///
    /// # Safety
    /// It is readable.
    pub unsafe fn touch(address: usize) {
        // SAFETY: the caller's promise.
        unsafe { ptr::read_volatile(address as *const u8) };
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::fs::File;
    use std::ops::Range;

    use crate::memory::region::Region;

    pub fn lacks(_: &File, _: usize) -> bool {
        false
    }

    pub fn written(_: &File, _: Region) -> Option<Vec<Range<usize>>> {
        None
    }

    /// Bytes in a page, where that is of no consequence.
    pub fn page() -> usize {
        4096
    }

    /// Not known.
    pub fn is_in_memory(_: usize) -> bool {
        true
    }

    /// Nothing: pages are filled in as they are written.
    pub fn fill_to_write(_: Region) -> bool {
        true
    }

    /// Nothing: they stay.
    pub fn give_back(_: Region) {}

    /// Nothing: pages are filled in as they are read.
    ///
    /// # Safety
    /// None is asked for.
    pub unsafe fn touch(_: usize) {}
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs;

    use memmap2::{MmapMut, MmapOptions};

    use super::*;

    const NBYTES: usize = 1 << 20;

    #[test]
    fn what_will_be_written_is_filled_in_and_not_changed() {
        let mut memory = MmapMut::map_anon(NBYTES).unwrap();
        let (table, last) = (PageTable::open(), memory.as_ptr().addr() + NBYTES - 1);
        assert!(table.lacks(last));
        memory[0] = 1;
        assert!(fill_to_write(Region::of(&memory[100..])));
        assert!(!table.lacks(last) && is_in_memory(last));
        memory[0] = 0;
        assert!(memory.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn without_the_kernels_word_nothing_is_lacking() {
        let memory = MmapMut::map_anon(NBYTES).unwrap();
        assert!(!PageTable { entries: None }.lacks(memory.as_ptr().addr()));
    }

    #[test]
    fn pages_of_a_file_that_were_written_are_told_from_those_that_were_read() {
        let path = std::env::temp_dir().join(format!("rzc-written-{}", std::process::id()));
        fs::write(&path, vec![7; NBYTES]).unwrap();
        // SAFETY: the file is this test's own.
        let mut map = unsafe { MmapOptions::new().map_copy(&File::open(&path).unwrap()) }.unwrap();
        fs::remove_file(&path).unwrap();
        let start = map.as_ptr().addr();
        let written = |from, to| {
            let region = Region { address: start + from, nbytes: to - from };
            let ranges = PageTable::open().written(region).unwrap();
            ranges.into_iter().map(|own| own.start - start..own.end - start).collect::<Vec<_>>()
        };
        assert!(map.iter().all(|&byte| byte == 7));
        assert_eq!(written(0, NBYTES), []);
        for at in [5000, 9000, 100_000] {
            map[at] = 8;
        }
        assert_eq!(written(0, NBYTES), [4096..12_288, 98_304..102_400]);
        assert_eq!(written(5000, 98_305), [5000..12_288, 98_304..98_305]);
        assert_eq!(written(12_288, 98_304), []);
    }

    #[test]
    fn what_is_read_is_filled_in_with_what_is_around_it() {
        let file = fs::File::open("/proc/self/exe").unwrap();
        // SAFETY: nobody writes a program that runs.
        let map = unsafe { MmapOptions::new().len(2 * AROUND).map_copy_read_only(&file) }.unwrap();
        let start = map.as_ptr().addr();
        for at in [0, AROUND, 2 * AROUND - 1] {
            // SAFETY: mapped until the end.
            unsafe { touch(start + at) };
        }
        assert!((0..2 * AROUND).step_by(page()).all(|at| !PageTable::open().lacks(start + at)));
    }
}

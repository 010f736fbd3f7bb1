//! Huge pages: 2 MiB of a file in one entry of the page table.
//!
//! ```text
//!  file     ┼──────────┌ a block ───┼─────────────────┼─────────────────┼──┐────────
//!           │          └────────────┼█████████████████┼█████████████████┼──┘
//!  memory   ┼──────────┌────────────┼─────────────────┼─────────────────┼──┐────────
//!           multiples of 2 MiB: what lies whole between two of them can be huge, where
//!           address and offset agree
//! ```
//!
//! `MADV_COLLAPSE` (Linux 6.1) makes huge pages of a file in shared memory, whatever
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says, and for any user. 400 MiB are then read
//! for the first time in 2 ms, not 38.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::page_table;
use crate::memory::region::Region;

pub use system::Placed;

/// Bytes in a huge page, where pages are of 4 KiB. Elsewhere none is made, and nothing is lost.
pub const HUGE: usize = 2 << 20;

/// What is collapsed before anyone is asked whether to go on. A call waits for all processors to
/// empty their lists of pages: on an idle machine 400 MiB take 21 to 26 ms in one call or in fifty.
pub const COLLAPSED_AT_ONCE: usize = 8 << 20;

/// How long small pages are left as they are, for the sake of a first output or of the next publish: to
/// make 400 MiB huge takes a processor 170 ms, and takes the pages out of all page tables meanwhile.
pub const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// A page that someone reads just now is not collapsed; a moment later it is. These are all that a
/// block is waited for: who writes the next one there would be held up by more tries.
const MOMENTS_MS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

/// A fresh huge page that takes longer than this may be dearer than 512 small ones: then both are tried.
///
/// It takes 0.12 to 0.2 ms where the machine has had the memory before, and small ones 0.7 to 1.5 (400
/// MiB in 130 to 300). On a guest that gives free memory back to its host, what is new to it takes 2 to
/// 13 ms, one fault of the host for each 4 KiB. Small pages take as long, or 1.5 ms while they come
/// from the crumbs of memory that was never given back.
const DEAR: Duration = Duration::from_millis(1);

/// How many pages of a block at most are asked, to speak for all of them.
const ASKED: usize = 8;

/// In place of nanoseconds: the kernel makes no huge pages here.
const REFUSED: u64 = u64::MAX;

/// What fresh memory costs: how long the last 2 MiB took, huge and small.
#[derive(Debug, Default)]
pub struct Prices {
    /// In nanoseconds; 0 before the first.
    huge: AtomicU64,
    small: AtomicU64,
}

impl Prices {
    /// Whether fresh memory is to be huge.
    pub fn prefer_huge(&self) -> bool {
        let huge = self.huge.load(Ordering::Relaxed);
        huge <= DEAR.as_nanos() as u64 || huge <= self.small.load(Ordering::Relaxed)
    }

    /// Whether any huge page has been made.
    pub fn know_huge(&self) -> bool {
        self.huge.load(Ordering::Relaxed) > 0
    }

    /// Makes huge pages; false where the kernel refuses.
    pub fn time_huge(&self, nbytes: usize, make: impl FnOnce() -> io::Result<()>) -> bool {
        let started = Instant::now();
        let took = match make() {
            // a page that another thread is writing: the others are huge
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => REFUSED,
            _ => per_huge_page(started.elapsed(), nbytes),
        };
        self.huge.store(took, Ordering::Relaxed);
        took != REFUSED
    }

    /// Makes small pages.
    pub fn time_small<T>(&self, nbytes: usize, make: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let made = make();
        self.small.store(per_huge_page(started.elapsed(), nbytes), Ordering::Relaxed);
        made
    }

    /// Whether small pages were made that can be huge.
    pub fn left_some_small(&self) -> bool {
        self.small.load(Ordering::Relaxed) > 0 && self.huge.load(Ordering::Relaxed) != REFUSED
    }
}

/// How long each huge page took, had they been such.
fn per_huge_page(took: Duration, nbytes: usize) -> u64 {
    (took.as_nanos() as u64).saturating_mul(HUGE as u64) / nbytes as u64
}

/// The addresses between the first and the last multiple of [`HUGE`] in a region.
fn chunks(region: Region) -> Range<usize> {
    let end = region.address + region.nbytes;
    region.address.next_multiple_of(HUGE)..end - end % HUGE
}

impl Placed {
    /// The addresses of all that can be huge: a multiple of [`HUGE`] bytes, or none.
    pub fn chunks(&self) -> Range<usize> {
        chunks(self.region())
    }

    /// Makes fresh pages of this range of [`Placed::chunks`] huge.
    pub fn make(&self, range: Range<usize>) -> io::Result<()> {
        for address in range.clone().step_by(HUGE) {
            // none is made of nothing
            if !page_table::fill_to_write(Region { address, nbytes: 1 }) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
        }
        self.collapse(range)
    }

    /// Makes all pages huge that can be, from the first to the last, until it is `stopped`.
    ///
    /// Ends early where the kernel has no room for huge pages. Bytes stay what they are, and whoever
    /// reads or writes them meanwhile waits for no longer than a copy of 2 MiB takes.
    pub fn collapse_all(&self, stopped: impl Fn() -> bool) -> io::Result<()> {
        let chunks = self.chunks();
        let mut moments = MOMENTS_MS.into_iter().map(Duration::from_millis);
        for start in chunks.clone().step_by(COLLAPSED_AT_ONCE) {
            while !stopped() {
                match self.collapse(start..chunks.end.min(start + COLLAPSED_AT_ONCE)) {
                    // a page in use, by one who reads it just now
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        let Some(moment) = moments.next() else { break };
                        thread::sleep(moment);
                    }
                    done => {
                        done?;
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether a page of each eighth is huge, which speaks for all: who lay here before may have left
    /// some huge and others not. Asked of a mapping that is new. `None` where the kernel does not tell
    /// (before Linux 6.7), or nothing can be huge.
    pub fn is_huge(&self) -> Option<bool> {
        let chunks = self.chunks();
        let step = (chunks.len() / HUGE).div_ceil(ASKED) * HUGE;
        let asked = chunks.len().checked_div(step)?;
        Some(self.huge_nbytes_of(chunks, step)? >= asked * HUGE)
    }

    /// How much of this range of [`Placed::chunks`] lies in huge pages; `None` where the kernel does
    /// not tell (before Linux 6.7).
    pub fn huge_nbytes(&self, range: Range<usize>) -> Option<usize> {
        self.huge_nbytes_of(range, HUGE)
    }
}

/// Why pages of shared memory cannot be made huge here; `None` if they can.
pub fn obstacle() -> Option<String> {
    let error = system::try_one().err()?;
    let reason = match error.kind() {
        io::ErrorKind::InvalidInput => {
            "MADV_COLLAPSE takes Linux 6.1, built with transparent huge pages, and a process that \
             has not turned them off (PR_SET_THP_DISABLE)"
        }
        io::ErrorKind::OutOfMemory => "the machine has no 2 MiB of free memory in one piece",
        io::ErrorKind::ResourceBusy => "the memory limit of this process's group has no room",
        _ => "MADV_COLLAPSE",
    };
    Some(format!("{reason}: {error}"))
}

#[cfg(target_os = "linux")]
mod system {
    use std::ffi::c_void;
    use std::fs::File;
    use std::io;
    use std::ops::Range;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::ptr;

    use super::HUGE;
    use crate::memory::mapping;
    use crate::memory::page_table;
    use crate::memory::region::Region;

    /// Part of a file, mapped where its pages can be huge; unmapped when dropped.
    #[derive(Debug)]
    pub struct Placed {
        region: Region,
        /// What is mapped: all pages of which the region has a byte.
        pages: Region,
    }

    impl Placed {
        /// Maps part of a file copy-on-write. It may be of any size, and start at any byte.
        pub fn private(file: &File, offset: u64, nbytes: usize) -> io::Result<Placed> {
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            // the kernel is to set no memory aside for copies that may never be made
            Placed::of(file, offset, nbytes, rights, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        }

        /// Maps part of a file to be read.
        pub fn shared(file: &File, offset: u64, nbytes: usize) -> io::Result<Placed> {
            Placed::of(file, offset, nbytes, libc::PROT_READ, libc::MAP_SHARED)
        }

        fn of(
            file: &File,
            offset: u64,
            nbytes: usize,
            rights: libc::c_int,
            flags: libc::c_int,
        ) -> io::Result<Placed> {
            place(offset, nbytes, |pages| {
                let from = (offset - offset % page_table::page() as u64) as libc::off_t;
                let (start, file) = (pages.address as *mut c_void, file.as_raw_fd());
                // SAFETY: over our own reservation, which nobody else knows.
                unsafe {
                    libc::mmap(start, pages.nbytes, rights, flags | libc::MAP_FIXED, file, from)
                }
            })
        }

        /// Maps once more what is mapped shared already: writable, if that is.
        pub fn again(region: Region) -> io::Result<Placed> {
            let found = mapping::around(region).map_err(io::Error::other)?;
            let found = found.filter(|found| found.shared).ok_or(io::ErrorKind::NotFound)?;
            let offset = found.backing_at(region.address).offset;
            place(offset, region.nbytes, |pages| {
                let old = (region.address - region.address % page_table::page()) as *mut c_void;
                let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let new = pages.address as *mut c_void;
                // SAFETY: "if the value of old_size is zero, and old_address refers to a shareable
                // mapping, mremap() will create a new mapping of the same pages" (mremap(2)), here
                // over our own reservation.
                unsafe { libc::mremap(old, 0, pages.nbytes, how, new) }
            })
        }

        /// The bytes.
        pub fn region(&self) -> Region {
            self.region
        }

        /// Has the kernel copy each 2 MiB of this range of [`Placed::chunks`] into a huge page. One
        /// page of them at least must be in memory.
        pub fn collapse(&self, range: Range<usize>) -> io::Result<()> {
            assert!(self.contains(&range));
            let start = range.start as *mut c_void;
            // SAFETY: our own mapping; changes no byte.
            match unsafe { libc::madvise(start, range.len(), libc::MADV_COLLAPSE) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }

        /// How much of this range of [`Placed::chunks`] lies in huge pages, of those at each `step`.
        pub fn huge_nbytes_of(&self, range: Range<usize>, step: usize) -> Option<usize> {
            assert!(self.contains(&range));
            for address in range.clone().step_by(step) {
                // only what is in the page table counts
                // SAFETY: mapped as long as this is.
                unsafe { page_table::touch(address) };
            }
            scan(range)
        }

        fn contains(&self, range: &Range<usize>) -> bool {
            let end = self.pages.address + self.pages.nbytes;
            self.pages.address <= range.start && range.end <= end
        }
    }

    impl Drop for Placed {
        fn drop(&mut self) {
            unmap(self.pages.address, self.pages.nbytes);
        }
    }

    /// Reserves room for part of a file at an address that agrees with its offset, and has it mapped
    /// there: reserved 2 MiB too long, so that one such address is in it.
    fn place(
        offset: u64,
        nbytes: usize,
        map: impl FnOnce(Region) -> *mut c_void,
    ) -> io::Result<Placed> {
        let before = offset as usize % page_table::page();
        let mapped = (before + nbytes).next_multiple_of(page_table::page());
        let spare = if nbytes < HUGE { 0 } else { HUGE };
        let (reserve, nowhere) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, ptr::null_mut());
        // SAFETY: new memory, at an address of the kernel's choice.
        let start = unsafe {
            let flags = reserve | libc::MAP_NORESERVE;
            libc::mmap(nowhere, mapped + spare, libc::PROT_NONE, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.addr();
        let shift =
            if spare == 0 { 0 } else { (offset as usize - before).wrapping_sub(start) % HUGE };
        let pages = Region { address: start + shift, nbytes: mapped };
        let found = map(pages);
        if found == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            unmap(start, mapped + spare);
            return Err(error);
        }
        unmap(start, shift);
        unmap(pages.address + mapped, spare - shift);
        Ok(Placed { region: Region { address: pages.address + before, nbytes }, pages })
    }

    /// Unmaps pages of our own that nothing refers to any more.
    fn unmap(start: usize, nbytes: usize) {
        if nbytes > 0 {
            // SAFETY: called with what `place` has reserved, once for each page.
            unsafe { libc::munmap(start as *mut c_void, nbytes) };
        }
    }

    /// `_IOWR('f', 16, struct pm_scan_arg)`, where the libraries do not have it yet; what encodes it
    /// otherwise does not know this number.
    const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
    const PAGE_IS_HUGE: u64 = 1 << 6;

    /// `struct pm_scan_arg` of `linux/fs.h`.
    #[repr(C)]
    #[derive(Default)]
    struct Scan {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }

    /// `struct page_region`: pages of one kind, from `start` to `end`.
    #[repr(C)]
    #[derive(Clone, Default)]
    struct PageRegion {
        start: u64,
        end: u64,
        categories: u64,
    }

    /// Bytes that entries for huge pages map: 6 us for one, 30 for 200.
    fn scan(range: Range<usize>) -> Option<usize> {
        let entries = File::open("/proc/self/pagemap").ok()?;
        let mut regions = vec![PageRegion::default(); range.len() / HUGE + 1];
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start: range.start as u64,
            end: range.end as u64,
            vec: regions.as_mut_ptr().addr() as u64,
            vec_len: regions.len() as u64,
            category_mask: PAGE_IS_HUGE,
            return_mask: PAGE_IS_HUGE,
            ..Scan::default()
        };
        // SAFETY: the kernel writes as many regions as it is told that there are.
        let found = unsafe { libc::ioctl(entries.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
        let found = usize::try_from(found).ok()?;
        Some(regions[..found].iter().map(|region| (region.end - region.start) as usize).sum())
    }

    /// Makes one huge page of a file in shared memory.
    pub fn try_one() -> io::Result<()> {
        // SAFETY: a name that ends with a zero.
        let file = unsafe { libc::memfd_create(c"ray_zerocopy".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(file) });
        file.set_len(HUGE as u64)?;
        let placed = Placed::shared(&file, 0, HUGE)?;
        // SAFETY: mapped until the end.
        unsafe { page_table::touch(placed.region().address) };
        placed.collapse(placed.chunks())
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::fs::File;
    use std::io;
    use std::ops::Range;

    use crate::memory::region::Region;

    /// Only Linux has what this takes.
    #[derive(Debug)]
    pub enum Placed {}

    impl Placed {
        /// Refused.
        pub fn private(_: &File, _: u64, _: usize) -> io::Result<Placed> {
            Err(io::ErrorKind::Unsupported.into())
        }

        /// Refused.
        pub fn shared(_: &File, _: u64, _: usize) -> io::Result<Placed> {
            Err(io::ErrorKind::Unsupported.into())
        }

        /// Refused.
        pub fn again(_: Region) -> io::Result<Placed> {
            Err(io::ErrorKind::Unsupported.into())
        }

        /// Never reached, as all that follows.
        pub fn region(&self) -> Region {
            match *self {}
        }

        /// Never reached.
        pub fn collapse(&self, _: Range<usize>) -> io::Result<()> {
            match *self {}
        }

        /// Never reached.
        pub fn huge_nbytes_of(&self, _: Range<usize>, _: usize) -> Option<usize> {
            match *self {}
        }
    }

    pub fn try_one() -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs::File;

    use super::*;

    const NBYTES: usize = 5 * HUGE;

    /// A file in shared memory, each byte telling where it is.
    fn file() -> (File, Vec<u8>) {
        let path =
            format!("/dev/shm/rzc-huge-{}-{:?}", std::process::id(), std::thread::current().id());
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let bytes: Vec<_> = (0..3 * NBYTES).map(|i| (i / 251) as u8).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        (file, bytes)
    }

    fn read(placed: &Placed) -> &[u8] {
        // SAFETY: mapped while it lives, and nobody writes.
        unsafe { placed.region().bytes() }
    }

    #[test]
    fn a_mapping_agrees_with_its_file_and_holds_its_bytes() {
        let (file, bytes) = file();
        for offset in [0, 1, 4096, HUGE - 64, HUGE, NBYTES + 4160] {
            for nbytes in [1, 4096, HUGE - 1, HUGE, NBYTES] {
                for map in [Placed::private, Placed::shared] {
                    let placed = map(&file, offset as u64, nbytes).unwrap();
                    assert_eq!(read(&placed), &bytes[offset..offset + nbytes]);
                    let agree = placed.region().address % HUGE == offset % HUGE;
                    assert!(agree || nbytes < HUGE);
                    assert!(placed.chunks().is_empty() || placed.chunks().start % HUGE == 0);
                    let again = Placed::again(placed.region());
                    assert_eq!(
                        again.is_ok(),
                        again.is_ok_and(|again| read(&again) == read(&placed))
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_mapped_shared_can_be_mapped_again_and_nothing_else() {
        let (file, bytes) = file();
        let shared = Placed::shared(&file, 4160, NBYTES).unwrap();
        let again = Placed::again(shared.region()).unwrap();
        drop(shared);
        assert_eq!(read(&again), &bytes[4160..4160 + NBYTES]);
        let private = Placed::private(&file, 4160, NBYTES).unwrap();
        assert!(Placed::again(private.region()).is_err());
        let own = vec![0; NBYTES];
        let region = Region { address: own.as_ptr().addr(), nbytes: NBYTES };
        assert!(Placed::again(region).is_err());
        let beyond = Region { nbytes: 4 * NBYTES, ..again.region() };
        assert!(Placed::again(beyond).is_err());
    }

    #[test]
    fn pages_become_huge_and_bytes_stay_and_a_write_stays_with_its_mapping() {
        assert_eq!(obstacle(), None);
        let (file, bytes) = file();
        let bytes = &bytes[4160..4160 + NBYTES];
        let private = || Placed::private(&file, 4160, NBYTES).unwrap();
        let (one, other) = (private(), private());
        let write = |placed: &Placed, at: usize| {
            // SAFETY: a private mapping of this test's own.
            unsafe { *((placed.region().address + at) as *mut u8) ^= 255 };
        };
        write(&one, HUGE); // partly written before
        assert_eq!((one.is_huge(), other.is_huge()), (Some(false), Some(false)));
        Placed::shared(&file, 4160, NBYTES).unwrap().collapse_all(|| false).unwrap();
        assert_eq!(other.huge_nbytes(other.chunks()), Some(other.chunks().len()));
        assert_eq!(other.chunks().len(), NBYTES - HUGE);
        write(&other, 2 * HUGE); // and after
        let changed = |placed: &Placed| -> Vec<usize> {
            let pairs = read(placed).iter().zip(bytes).enumerate();
            pairs.filter(|(_, (one, other))| one != other).map(|(at, _)| at).collect()
        };
        assert_eq!(changed(&one), [HUGE]);
        assert_eq!(changed(&other), [2 * HUGE]);
        assert!(read(&private()) == bytes);
        assert_eq!(private().is_huge(), Some(true));
    }

    #[test]
    fn one_small_page_among_huge_ones_is_seen() {
        let (file, _) = file();
        let private = || Placed::private(&file, 0, NBYTES).unwrap();
        let shared = Placed::shared(&file, 0, NBYTES).unwrap();
        let chunks = shared.chunks();
        shared.collapse(chunks.start + HUGE..chunks.end).unwrap();
        assert_eq!(private().is_huge(), Some(false));
        shared.collapse_all(|| false).unwrap();
        assert_eq!(private().is_huge(), Some(true));
    }

    #[test]
    fn a_collapse_ends_when_it_is_stopped() {
        let (file, _) = file();
        let placed = Placed::shared(&file, 0, NBYTES).unwrap();
        placed.collapse_all(|| true).unwrap();
        assert_eq!(placed.huge_nbytes(placed.chunks()), Some(0));
    }

    #[test]
    fn what_can_have_no_huge_pages_is_refused_and_not_changed() {
        let path = std::env::temp_dir().join(format!("rzc-huge-{}", std::process::id()));
        let disk = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        disk.set_len(NBYTES as u64).unwrap();
        let placed = Placed::shared(&disk, 0, NBYTES).unwrap();
        assert!(placed.collapse_all(|| false).is_err());
        assert_eq!(placed.is_huge(), Some(false));
        assert!(read(&placed).iter().all(|&byte| byte == 0));
        assert_eq!(Placed::shared(&disk, 0, HUGE - 1).unwrap().is_huge(), None);
    }
}

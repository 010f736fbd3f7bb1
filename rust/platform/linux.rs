//! The system calls of Linux.

use std::ffi::{CStr, OsStr, c_void};
use std::fs::{self, File};
use std::io;
use std::iter;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::str;
use std::sync::{OnceLock, mpsc};
use std::thread;

use memmap2::{Advice, MmapMut};

use crate::platform::mapping::{Backing, Mapping};

/// Bytes in a huge page, if pages have 4 KiB. With other page sizes no huge pages are made, and all
/// else works.
pub const HUGE: usize = 2 << 20;

/// Bytes around a read of a mapped file whose pages the kernel maps together, if they are in memory
/// (`fault_around_bytes`).
pub const AROUND: usize = 64 << 10;

/// Bytes in a page.
pub fn page() -> usize {
    // SAFETY: it only returns a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Bytes of the machine's memory.
pub fn memory_nbytes() -> usize {
    // SAFETY: it only returns a number.
    page() * unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) as usize }
}

/// The addresses of all pages that contain any of these bytes.
fn whole_pages(addresses: &Range<usize>) -> Range<usize> {
    addresses.start - addresses.start % page()..addresses.end.next_multiple_of(page())
}

/// The result of a system call that returns 0 on success.
fn checked(status: libc::c_int) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

// ---- Mappings: the file behind an address

const MAPS: &str = "/proc/self/maps";

/// The kernel's `struct procmap_query` (linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    rights: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    device: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

/// `_IOWR('f', 17, struct procmap_query)`
const PROCMAP_QUERY: libc::Ioctl =
    (3 << 30 | (size_of::<Query>() << 16) | ((b'f' as usize) << 8) | 17) as libc::Ioctl;
const WRITABLE: u64 = 0x02;
const SHARED: u64 = 0x08;
const COVERING_OR_NEXT: u64 = 0x10;
const FILE_BACKED: u64 = 0x20;

/// The file mappings of this process. Linux 6.11 answers for one address. On older kernels the
/// whole list is read once, which takes 2 ms with torch's CUDA libraries loaded, as long as all the
/// rest of a load.
#[derive(Debug)]
pub struct Mappings {
    maps: File,
    read: OnceLock<Vec<Mapping>>,
}

impl Mappings {
    /// The mappings as they are now.
    pub fn open() -> io::Result<Mappings> {
        Ok(Mappings { maps: File::open(MAPS)?, read: OnceLock::new() })
    }

    /// The mapping at an address, or the next one above it.
    pub fn at_or_after(&self, address: usize) -> io::Result<Option<Mapping>> {
        if self.read.get().is_none() {
            match self.query(address) {
                Ok(mapping) => return Ok(Some(mapping)),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
                Err(_) => {} // an older kernel
            }
        }
        if self.read.get().is_none() {
            let _ = self.read.set(Mappings::list()?);
        }
        let mappings = self.read.get().map_or(&[][..], Vec::as_slice);
        Ok(mappings.get(mappings.partition_point(|mapping| mapping.end <= address)).cloned())
    }

    fn list() -> io::Result<Vec<Mapping>> {
        let lines = fs::read(MAPS)?;
        Ok(lines.split(|&byte| byte == b'\n').filter_map(Mapping::parse).collect())
    }

    fn query(&self, address: usize) -> io::Result<Mapping> {
        let mut name = [0_u8; libc::PATH_MAX as usize];
        let mut query = Query {
            size: size_of::<Query>() as u64,
            flags: COVERING_OR_NEXT | FILE_BACKED,
            address: address as u64,
            name_size: name.len() as u32,
            name: name.as_mut_ptr().addr() as u64,
            ..Query::default()
        };
        // SAFETY: the structure and the name have the sizes that the structure gives.
        let status = unsafe { libc::ioctl(self.maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
        checked(status)?;
        let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
        let backing = Backing {
            name: OsStr::from_bytes(name.to_bytes()).into(),
            inode: query.inode,
            offset: query.offset,
            writable: query.rights & WRITABLE != 0,
        };
        let (start, end) = (query.start as usize, query.end as usize);
        Ok(Mapping { start, end, backing, shared: query.rights & SHARED != 0 })
    }
}

impl Mapping {
    /// Whether the mapping still exists.
    pub fn stands(&self) -> bool {
        fs::read_link(self.link()).is_ok_and(|name| name == self.backing.name)
    }

    /// Opens the mapped file at its known path, by its name, or by the kernel's link, which
    /// requires CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN. Returns the path that worked.
    pub fn open(&self, known: Option<&Path>) -> io::Result<(File, PathBuf)> {
        let paths = [self.backing.name.clone(), self.link()];
        let found =
            known.map(Path::to_owned).into_iter().chain(paths).find_map(|path| self.open_at(path));
        found.ok_or_else(|| File::open(self.link()).err().unwrap_or(io::ErrorKind::NotFound.into()))
    }

    /// Opens the mapped file among the open files of the raylet that created it. It looks at the
    /// parent first, which is a worker's raylet, then at all processes called "raylet".
    pub fn open_of_raylet(&self) -> Option<(File, PathBuf)> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_raylet = |process: &u32| {
            fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|name| name == "raylet\n")
        };
        let files = |process| {
            let files = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
            files.map(|file| file.path())
        };
        let is_it =
            |path: &PathBuf| fs::read_link(path).is_ok_and(|name| name == self.backing.name);
        let parent = std::os::unix::process::parent_id();
        let raylets = iter::once(parent).chain(processes.filter(is_raylet));
        raylets.flat_map(files).filter(is_it).find_map(|path| self.open_at(path))
    }

    /// The kernel's link to the mapped file. Its file name exists only while the mapping does.
    fn link(&self) -> PathBuf {
        format!("/proc/self/map_files/{:x}-{:x}", self.start, self.end).into()
    }

    /// Opens `path` if it is the mapped file.
    fn open_at(&self, path: PathBuf) -> Option<(File, PathBuf)> {
        // never a device: to open one may have an effect
        let file = fs::metadata(&path).ok()?.is_file().then(|| File::open(&path).ok())??;
        (file.metadata().ok()?.ino() == self.backing.inode).then_some((file, path))
    }

    fn parse(line: &[u8]) -> Option<Mapping> {
        // 7f00-7f80 rw-s 00001000 00:1a 1234    /dev/shm/plasma (deleted)
        let mut fields = line.splitn(6, |&byte| byte == b' ');
        let mut next = || str::from_utf8(fields.next()?).ok();
        let (start, end) = next()?.split_once('-')?;
        let rights = next()?;
        let offset = u64::from_str_radix(next()?, 16).ok()?;
        let inode = next().and_then(|_device| next())?.parse().ok()?;
        let name = OsStr::from_bytes(fields.next()?.trim_ascii_start()).into();
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        let backing = Backing { name, inode, offset, writable: rights.starts_with("rw") };
        let shared = rights.ends_with('s');
        (inode != 0).then_some(Mapping { start, end, backing, shared })
    }
}

// ---- The page table

/// The bit in an entry of `/proc/self/pagemap` for a page in memory ...
const PRESENT: u64 = 1 << 63;

/// ... for a page in swap ...
const SWAPPED: u64 = 1 << 62;

/// ... and for a page of a file.
const OF_FILE: u64 = 1 << 61;

/// The page table of this process.
#[derive(Debug)]
pub struct PageTable {
    /// `/proc/self/pagemap`. Without it, pages fault as they are touched.
    entries: Option<File>,
}

impl PageTable {
    /// Opens it.
    pub fn open() -> PageTable {
        PageTable { entries: File::open("/proc/self/pagemap").ok() }
    }

    /// Whether it is known to lack the page at an address. Takes 2 us.
    pub fn lacks(&self, address: usize) -> bool {
        let mut entry = [0; 8];
        let at = 8 * (address / page()) as u64;
        let read = self.entries.as_ref().map(|entries| entries.read_exact_at(&mut entry, at));
        read.is_some_and(|read| read.is_ok()) && u64::from_ne_bytes(entry) & PRESENT == 0
    }

    /// The pages of a private file mapping that this process has written, and therefore owns, cut
    /// to these addresses. `None` if the kernel does not tell. (1 GiB: 1 ms, or 8 if all of it has
    /// been read.)
    pub fn written(&self, addresses: &Range<usize>) -> Option<Vec<Range<usize>>> {
        let entries = self.entries.as_ref()?;
        let (page, mut pages, mut written) = (page(), whole_pages(addresses), Vec::new());
        let mut read = vec![0; 8 * (pages.len() / page).min(16 << 10)];
        while !pages.is_empty() {
            let read = &mut read[..8 * (pages.len() / page).min(16 << 10)];
            entries.read_exact_at(read, 8 * (pages.start / page) as u64).ok()?;
            for entry in read.as_chunks::<8>().0 {
                let entry = u64::from_ne_bytes(*entry);
                if entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 {
                    let end = addresses.end.min(pages.start + page);
                    let own = addresses.start.max(pages.start)..end;
                    match written.last_mut() {
                        Some(Range { end, .. }) if *end == own.start => *end = own.end,
                        _ => written.push(own),
                    }
                }
                pages.start += page;
            }
        }
        Some(written)
    }
}

/// Whether the file page mapped at an address is in memory, for any process.
pub fn is_in_memory(address: usize) -> bool {
    let (start, mut found) = (address - address % page(), 0);
    // SAFETY: one byte of result for one page. For unmapped memory the call returns ENOMEM.
    let asked = unsafe { libc::mincore(start as *mut c_void, 1, &raw mut found) };
    asked == 0 && found & 1 == 1
}

/// Fills in the pages of memory that is about to be written, and allocates those that do not exist.
///
/// Returns false if a write would give SIGBUS, because a file system in memory is full. After any
/// other error, pages fault as they are written.
#[must_use]
pub fn fill_to_write(addresses: Range<usize>) -> bool {
    let pages = whole_pages(&addresses);
    let start = pages.start as *mut c_void;
    // SAFETY: it changes no byte and no permission. For an unmapped range it returns ENOMEM.
    let filled = checked(unsafe { libc::madvise(start, pages.len(), libc::MADV_POPULATE_WRITE) });
    !filled.is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT))
}

/// Whether all of these addresses are readable. Fills in their pages. Without `MADV_POPULATE_READ`
/// (before Linux 5.14), it only tells whether they are mapped.
pub fn is_readable(addresses: Range<usize>) -> bool {
    let pages = addresses.start - addresses.start % page()..addresses.end;
    // SAFETY: it changes no byte and no permission. For an unmapped range it returns ENOMEM.
    let advise =
        |nbytes, advice| unsafe { libc::madvise(pages.start as *mut c_void, nbytes, advice) };
    let known = advise(0, libc::MADV_POPULATE_READ) == 0;
    advise(pages.len(), if known { libc::MADV_POPULATE_READ } else { libc::MADV_NORMAL }) == 0
}

/// Gives pages of a file in shared memory back to the system: those that lie wholly in these
/// addresses.
///
/// # Safety
/// Nobody relies on their bytes, which are zeros afterwards.
pub unsafe fn give_back(addresses: Range<usize>) {
    let (start, end) = (addresses.start.next_multiple_of(page()), addresses.end);
    let nbytes = (end - end % page()).saturating_sub(start);
    // SAFETY: the caller's promise. If the kernel refuses, the pages stay.
    unsafe { libc::madvise(start as *mut c_void, nbytes, libc::MADV_REMOVE) };
}

/// Gives pages of private memory back to the system: those that lie wholly in these addresses.
///
/// # Safety
/// They are mapped, and nobody relies on their bytes, which are zeros afterwards.
pub unsafe fn discard(addresses: Range<usize>) {
    let (start, end) = (addresses.start.next_multiple_of(page()), addresses.end);
    let nbytes = (end - end % page()).saturating_sub(start);
    // SAFETY: the caller's promise. If the kernel refuses (locked pages, for example), they stay.
    unsafe { libc::madvise(start as *mut c_void, nbytes, libc::MADV_DONTNEED) };
}

/// Makes the C library give freed memory back. glibc keeps most of what is below 32 MiB.
pub fn trim() {
    // SAFETY: it frees nothing that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

// ---- Our own mappings

/// Part of a file, mapped at an address where its pages can be huge. Unmapped when dropped.
#[derive(Debug)]
pub struct Map {
    /// The addresses of the bytes ...
    addresses: Range<usize>,
    /// ... and of the whole pages that are mapped.
    pages: Range<usize>,
}

impl Map {
    /// Maps part of a file copy-on-write. The part may have any size, and start at any byte.
    pub fn private(file: &File, offset: u64, nbytes: usize) -> io::Result<Map> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // no memory is reserved for copies that may never be made
        Map::of(file, offset, nbytes, rights, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
    }

    /// Maps part of a file for reading.
    pub fn shared(file: &File, offset: u64, nbytes: usize) -> io::Result<Map> {
        Map::of(file, offset, nbytes, libc::PROT_READ, libc::MAP_SHARED)
    }

    fn of(
        file: &File,
        offset: u64,
        nbytes: usize,
        rights: libc::c_int,
        flags: libc::c_int,
    ) -> io::Result<Map> {
        Map::placed(offset, nbytes, |pages| {
            let from = (offset - offset % page() as u64) as libc::off_t;
            let (start, flags) = (pages.start as *mut c_void, flags | libc::MAP_FIXED);
            // SAFETY: it replaces our own reservation, which nobody else knows.
            unsafe { libc::mmap(start, pages.len(), rights, flags, file.as_raw_fd(), from) }
        })
    }

    /// Maps shared memory a second time, writable if the first mapping is.
    ///
    /// # Safety
    /// It stays mapped during the call. A write at these addresses is a write at the others.
    pub unsafe fn again(addresses: Range<usize>) -> io::Result<Map> {
        let found = Mappings::open()?.at_or_after(addresses.start)?;
        let found = found.filter(|found| found.shared && found.holds(&addresses));
        let found = found.ok_or(io::ErrorKind::NotFound)?;
        let offset = found.backing_at(addresses.start).offset;
        Map::placed(offset, addresses.len(), |pages| {
            let old = (addresses.start - addresses.start % page()) as *mut c_void;
            let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let new = pages.start as *mut c_void;
            // SAFETY: "if the value of old_size is zero, and old_address refers to a shareable
            // mapping, mremap() will create a new mapping of the same pages" (mremap(2)), here
            // over our own reservation.
            unsafe { libc::mremap(old, 0, pages.len(), how, new) }
        })
    }

    /// Reserves addresses for part of a file, and calls `map` for them. The first address equals
    /// the file offset modulo [`HUGE`]. It reserves [`HUGE`] bytes more, to contain such an address.
    fn placed(
        offset: u64,
        nbytes: usize,
        map: impl FnOnce(&Range<usize>) -> *mut c_void,
    ) -> io::Result<Map> {
        let before = offset as usize % page();
        let mapped = (before + nbytes).next_multiple_of(page());
        let spare = if nbytes < HUGE { 0 } else { HUGE };
        let (flags, nowhere) =
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, ptr::null_mut());
        // SAFETY: it maps new memory, at an address that the kernel chooses.
        let start = unsafe { libc::mmap(nowhere, mapped + spare, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = start.addr()..start.addr() + mapped + spare;
        let shift = match spare {
            0 => 0,
            _ => (offset as usize - before).wrapping_sub(reserved.start) % HUGE,
        };
        let start = reserved.start + shift;
        let pages = start..start + mapped;
        if map(&pages) == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            unmap(reserved);
            return Err(error);
        }
        unmap(reserved.start..pages.start);
        unmap(pages.end..reserved.end);
        Ok(Map { addresses: start + before..start + before + nbytes, pages })
    }

    /// The addresses of the bytes.
    pub fn addresses(&self) -> Range<usize> {
        self.addresses.clone()
    }

    /// Replaces the file by memory of this process, with the same bytes at the same addresses.
    /// Takes 1.4 times as long as to fill as much fresh memory.
    ///
    /// To copy each page on write would not be enough: truncating a file removes such copies from
    /// all mappings, too. Moves a few pages at a time, because a write of another thread between
    /// their copy and their move is lost.
    pub fn own(&self) -> io::Result<()> {
        let (rights, nowhere) = (libc::PROT_READ | libc::PROT_WRITE, ptr::null_mut());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let nbytes = self.pages.len();
        // SAFETY: it maps new memory, at an address that the kernel chooses.
        let own = unsafe { libc::mmap(nowhere, nbytes, rights, flags, -1, 0) };
        if own == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let own = own.addr()..own.addr() + nbytes;
        for (from, to) in self.pages.clone().step_by(AROUND).zip(own.clone().step_by(AROUND)) {
            let nbytes = AROUND.min(own.end - to);
            let _ = fill_to_write(to..to + nbytes); // if it fails, pages fault as they are written
            // SAFETY: the source is readable and the target writable; they are two mappings, so do
            // not overlap.
            unsafe { ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, nbytes) };
            let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let (to, from) = (to as *mut c_void, from as *mut c_void);
            // SAFETY: it replaces our own pages by our own pages with the same bytes.
            if unsafe { libc::mremap(to, nbytes, nbytes, how, from) } == libc::MAP_FAILED {
                let error = io::Error::last_os_error();
                unmap(to.addr()..own.end);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Makes every read or write of the bytes a SIGSEGV, because their content is unknown.
    pub fn forbid(&self) {
        let start = self.pages.start as *mut c_void;
        // SAFETY: these pages are our own.
        unsafe { libc::mprotect(start, self.pages.len(), libc::PROT_NONE) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        unmap(self.pages.clone());
    }
}

/// Unmaps pages of our own that nothing refers to any more.
fn unmap(pages: Range<usize>) {
    if !pages.is_empty() {
        // SAFETY: the callers pass addresses that `Map::placed` reserved, each page once.
        unsafe { libc::munmap(pages.start as *mut c_void, pages.len()) };
    }
}

/// A file in memory without a name: it vanishes with this process, however that ends. It counts as
/// shared memory of the process, not against the size of `/dev/shm`.
pub fn nameless_file(nbytes: usize) -> io::Result<File> {
    // SAFETY: the name ends with a zero.
    let file = unsafe { libc::memfd_create(c"ray-zerocopy".as_ptr(), libc::MFD_CLOEXEC) };
    if file < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened, and nobody else has it.
    let file = unsafe { File::from_raw_fd(file) };
    file.set_len(nbytes as u64)?;
    Ok(file)
}

/// Maps a file anew at the same addresses, copy-on-write: writes stay in this process.
///
/// # Safety
/// The addresses are a mapping of the whole file, readable and writable.
pub unsafe fn make_private(addresses: Range<usize>, file: BorrowedFd<'_>) -> io::Result<()> {
    let (rights, start) = (libc::PROT_READ | libc::PROT_WRITE, addresses.start as *mut c_void);
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the caller's promise; the bytes stay the same.
    let map = unsafe { libc::mmap(start, addresses.len(), rights, flags, file.as_raw_fd(), 0) };
    if map == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Frees whole pages of a file. If that fails, they stay, and nothing else is wrong.
///
/// # Safety
/// Nobody relies on their bytes, which are zeros afterwards.
pub unsafe fn punch(file: &File, offset: u64, nbytes: usize) {
    let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, nbytes) = (offset as libc::off_t, nbytes as libc::off_t);
    // SAFETY: the caller's promise.
    let _ = unsafe { libc::fallocate(file.as_raw_fd(), how, offset, nbytes) };
}

// ---- Huge pages

/// Makes the kernel copy each 2 MiB of a map, between two multiples of [`HUGE`], into a huge page.
/// At least one of its pages must be in memory.
pub fn collapse(addresses: Range<usize>) -> io::Result<()> {
    let start = addresses.start as *mut c_void;
    // SAFETY: it changes no byte.
    checked(unsafe { libc::madvise(start, addresses.len(), libc::MADV_COLLAPSE) })
}

/// Asks the kernel to use huge pages for a map if it has some, or none even if it uses them
/// everywhere.
pub fn prefer_huge(map: &MmapMut, huge: bool) {
    let _ = map.advise(if huge { Advice::HugePage } else { Advice::NoHugePage });
}

/// `_IOWR('f', 16, struct pm_scan_arg)`. Not every version of `libc` has it, and its `_IOWR` does
/// not know this number.
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

/// `struct page_region`: pages of one category, from `start` to `end`.
#[repr(C)]
#[derive(Clone, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Bytes of these addresses that are mapped by huge entries of the page table. `None` if the kernel
/// does not tell (before Linux 6.7). (One huge page: 6 us, 200: 30.)
pub fn huge_nbytes(addresses: &Range<usize>) -> Option<usize> {
    let entries = File::open("/proc/self/pagemap").ok()?;
    let mut regions = vec![PageRegion::default(); addresses.len() / HUGE + 1];
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: addresses.start as u64,
        end: addresses.end as u64,
        vec: regions.as_mut_ptr().addr() as u64,
        vec_len: regions.len() as u64,
        category_mask: PAGE_IS_HUGE,
        return_mask: PAGE_IS_HUGE,
        ..Scan::default()
    };
    // SAFETY: the kernel writes at most `vec_len` regions.
    let found = unsafe { libc::ioctl(entries.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    let found = usize::try_from(found).ok()?;
    Some(regions[..found].iter().map(|region| (region.end - region.start) as usize).sum())
}

// ---- Files

/// Linux 6.5. The same number on all architectures; `libc` has it for some.
const SYS_CACHESTAT: libc::c_long = 451;

/// `linux/magic.h`
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// The kernel's `struct cachestat_range` and `struct cachestat` (linux/mman.h).
#[repr(C)]
struct CachedRange {
    offset: u64,
    nbytes: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cached {
    pages: u64,
    dirty: u64,
    in_writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Bytes of a range that are in the page cache. `None` if the kernel does not tell.
pub fn cached(file: &File, offset: u64, nbytes: usize) -> Option<u64> {
    let range = CachedRange { offset, nbytes: nbytes as u64 };
    let mut cached = Cached::default();
    // SAFETY: the kernel's two structures. It writes to the second.
    let status = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut cached, 0)
    };
    if status == 0 {
        Some(cached.pages * page() as u64)
    } else {
        first_byte_cached(file, offset, nbytes)
    }
}

/// Judges a range by its first byte: on older kernels, and if this process may not write the file,
/// because then `cachestat` does not answer.
fn first_byte_cached(file: &File, offset: u64, nbytes: usize) -> Option<u64> {
    let mut byte = 0_u8;
    let target = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: one writable byte.
    let read = unsafe {
        libc::preadv2(file.as_raw_fd(), &raw const target, 1, offset as i64, libc::RWF_NOWAIT)
    };
    match (read, io::Error::last_os_error().raw_os_error()) {
        (1, _) => Some(nbytes as u64),
        (-1, Some(libc::EAGAIN)) => Some(0),
        _ => None,
    }
}

/// Whether a file lies in memory, without a disk behind it.
pub fn has_no_disk(file: &File) -> bool {
    let mut found = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: room for the structure.
    if unsafe { libc::fstatfs(file.as_raw_fd(), found.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: the kernel has filled it in.
    let found = unsafe { found.assume_init() }.f_type;
    [libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC, RAMFS_MAGIC].contains(&found)
}

/// Turns off the kernel's read-ahead for a file: the rest of it may be read past the page cache.
pub fn read_no_further(file: &File) {
    // SAFETY: it only gives advice.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
}

/// The device number of the file system that a file is on.
pub fn device(file: &File) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.dev())
}

/// The same file opened with O_DIRECT. `None` if its file system does not support that.
pub fn reopen_direct(file: &File) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).custom_flags(libc::O_DIRECT).open(path).ok()
}

/// Drops a file's pages from the page cache.
#[cfg(test)]
pub fn evict(file: &File) {
    // SAFETY: it only gives advice.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

// ---- Leases: a process that opens a leased file for writing, or truncates it, waits until the
// lease is released, at most for `/proc/sys/fs/lease-break-time` (fcntl(2))

const F_SETOWN_EX: libc::c_int = 15; // `libc` does not have it for all systems
const F_OWNER_TID: libc::c_int = 0;

/// The kernel's `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    id: libc::pid_t,
}

/// Starts the thread that waits for broken leases. It calls `serve` once for one or several of
/// them. Returns the thread's id.
///
/// The thread blocks all signals. SIGIO is sent to this thread alone, and calls no handler of the
/// process.
pub fn watch(serve: fn()) -> io::Result<i32> {
    let (tell, told) = mpsc::channel();
    let watch = move || {
        let mut signals = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: room for a set.
        unsafe { libc::sigfillset(signals.as_mut_ptr()) };
        // SAFETY: an initialized set; it changes the mask of this thread only.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, signals.as_ptr(), ptr::null_mut()) };
        // SAFETY: as before.
        unsafe { libc::sigemptyset(signals.as_mut_ptr()) };
        // SAFETY: as before.
        unsafe { libc::sigaddset(signals.as_mut_ptr(), libc::SIGIO) };
        // SAFETY: it only returns a number.
        let _ = tell.send(unsafe { libc::gettid() });
        loop {
            // SAFETY: an initialized set; the null pointer asks for no details.
            if unsafe { libc::sigwaitinfo(signals.as_ptr(), ptr::null_mut()) } == libc::SIGIO {
                serve();
            }
        }
    };
    thread::Builder::new().name("rzc.lease".into()).spawn(watch)?;
    told.recv().map_err(io::Error::other)
}

/// Takes a lease on a file that was opened for reading. The kernel tells `thread` when it is
/// broken.
///
/// Fails if the file belongs to another user (unless CAP_LEASE), is open for writing, or lies on a
/// file system without leases.
pub fn lease(file: &File, thread: i32) -> io::Result<()> {
    tell(file, thread)?; // first: a SIGIO to the whole process would end it
    // SAFETY: the file is open.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) })
}

/// Makes the kernel tell another thread about the file's lease.
pub fn tell(file: &File, thread: i32) -> io::Result<()> {
    let owner = Owner { kind: F_OWNER_TID, id: thread };
    // SAFETY: the file is open, and this is the kernel's structure.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) })
}

/// Whether the lease is held, and nobody waits for its release.
pub fn is_leased(file: &File) -> bool {
    // SAFETY: the file is open.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) == libc::F_RDLCK }
}

/// Releases a lease. Fails if the kernel has already done so after its timeout.
pub fn release(file: &File) -> io::Result<()> {
    // SAFETY: the file is open.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) })
}

/// Opens an open file a second time, for reading. A lease is on the open file description, which a
/// fork shares; the second one is separate.
pub fn reopen(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use memmap2::MmapOptions;

    use super::*;

    #[test]
    fn a_line_of_maps_is_read() {
        let line = b"7f0000-7f8000 rw-s 00001000 00:1a 1234                 /dev/shm/a b (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        let name = "/dev/shm/a b (deleted)".into();
        let backing = Backing { name, inode: 1234, offset: 0x1000, writable: true };
        assert_eq!(mapping.backing, backing);
        assert_eq!(mapping.backing_at(0x7f0010).offset, 0x1010);
        assert!(mapping.holds(&(0x7f0000..0x7f8000)));
        assert!(!mapping.holds(&(0x7f0001..0x7f8001)));
        assert!(mapping.shared);
        let private = Mapping::parse(b"7f0000-7f8000 rw-p 00001000 00:1a 1234 /private");
        assert!(!private.unwrap().shared);
        assert!(Mapping::parse(b"7f0000-7f8000 rw-s 00000000 00:00 0").is_none());
        assert!(Mapping::parse(b"").is_none());
    }

    #[test]
    fn a_name_that_is_no_utf_8_hides_no_mapping() {
        let name = [format!("rzc-{}-", std::process::id()).as_bytes(), &[0xff]].concat();
        let path = std::env::temp_dir().join(OsStr::from_bytes(&name));
        fs::write(&path, [7; 100]).unwrap();
        // SAFETY: the file is this test's own.
        let map = unsafe { MmapOptions::new().map_copy(&File::open(&path).unwrap()) }.unwrap();
        let address = map.as_ptr().addr();
        let asked = Mappings::open().unwrap().at_or_after(address).unwrap().unwrap();
        let listed = Mappings::list().unwrap();
        let listed = listed.iter().find(|mapping| mapping.start == address).unwrap();
        assert_eq!((&asked, &asked.backing.name), (listed, &path));
        assert!(asked.stands() && asked.open_at(path.clone()).is_some());
        fs::remove_file(&path).unwrap();
        assert!(Mappings::list().unwrap().iter().any(|other| other.start > address));
    }

    #[test]
    fn the_kernel_says_of_one_mapping_what_it_lists_of_all() {
        let file = File::open("/proc/self/exe").unwrap();
        // SAFETY: the kernel refuses writes to a running program.
        let map = unsafe { MmapOptions::new().offset(4096).len(5000).map_copy(&file) }.unwrap();
        let asked = Mappings::open().unwrap();
        let listed = Mappings::open().unwrap();
        listed.read.set(Mappings::list().unwrap()).unwrap();
        for address in [0, map.as_ptr().addr(), map.as_ptr().addr() + 4999] {
            let (asked, listed) = (asked.at_or_after(address), listed.at_or_after(address));
            let asked = asked.unwrap();
            assert!(asked.is_some());
            assert_eq!(asked, listed.unwrap());
        }
        assert_eq!(asked.at_or_after(usize::MAX - 4096).unwrap(), None);
        let address = map.as_ptr().addr() + 100;
        let mapping = asked.at_or_after(address).unwrap().unwrap();
        assert_eq!(mapping.backing_at(address).offset, 4196);
        assert!(!mapping.shared && mapping.backing.writable && mapping.stands());
        assert!(mapping.open_at("/proc/self/exe".into()).is_some());
        assert!(mapping.open_at(MAPS.into()).is_none());
        assert!(mapping.open(Some(MAPS.as_ref())).is_ok_and(|(_, path)| path != Path::new(MAPS)));
    }

    const NBYTES: usize = 1 << 20;

    #[test]
    fn what_will_be_written_is_filled_in_and_not_changed() {
        let mut memory = MmapMut::map_anon(NBYTES).unwrap();
        let (table, last) = (PageTable::open(), memory.as_ptr().addr() + NBYTES - 1);
        assert!(table.lacks(last));
        memory[0] = 1;
        assert!(fill_to_write(last - NBYTES + 101..last + 1));
        assert!(!table.lacks(last) && is_in_memory(last));
        memory[0] = 0;
        assert!(memory.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_can_be_read_is_told_from_what_cannot() {
        let memory = Map::private(&nameless_file(3 * NBYTES).unwrap(), 0, 3 * NBYTES).unwrap();
        let start = memory.addresses().start;
        let readable = |from, to| is_readable(start + from..start + to);
        assert!(readable(0, 3 * NBYTES) && readable(1, NBYTES) && readable(NBYTES, NBYTES));
        // SAFETY: nobody reads it any more.
        assert_eq!(unsafe { libc::mprotect((start + NBYTES) as *mut _, NBYTES, 0) }, 0);
        assert!(!readable(0, NBYTES + 1) && !readable(NBYTES, NBYTES + 1));
        assert!(readable(NBYTES - 1, NBYTES) && readable(2 * NBYTES, 3 * NBYTES));
        assert!(!is_readable(start..usize::MAX));
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
            let ranges = PageTable::open().written(&(start + from..start + to)).unwrap();
            let from_start = |own: Range<usize>| (own.start - start, own.end - start);
            ranges.into_iter().map(from_start).collect::<Vec<_>>()
        };
        assert!(map.iter().all(|&byte| byte == 7));
        assert_eq!(written(0, NBYTES), []);
        for at in [5000, 9000, 100_000] {
            map[at] = 8;
        }
        assert_eq!(written(0, NBYTES), [(4096, 12_288), (98_304, 102_400)]);
        assert_eq!(written(5000, 98_305), [(5000, 12_288), (98_304, 98_305)]);
        assert_eq!(written(12_288, 98_304), []);
    }
}

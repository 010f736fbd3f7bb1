//! Pages: a block mapped into one process.
//!
//! ```text
//!  the store's file      ████████████████████ block ████████████      one copy on the node
//!                          ▲ MAP_SHARED            ▲ MAP_PRIVATE
//!  Ray's mapping        ───┘      our mapping   ───┘  a write copies the page into this process
//! ```
//!
//! Ray maps its store read-write and shared, so a write through Ray's mapping changes the block in
//! every process on the node. A private mapping of the same file shows the same physical pages, and
//! copies only the pages that this process writes.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{io::ErrorKind, mem, process};

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::memory::huge::LEAVE_SMALL_FOR;
use crate::memory::lease;
use crate::memory::reaper::{Mapped, Reaped};
use crate::memory::region::{Region, touch};
use crate::memory::store;
use crate::platform::mapping::Backing;
use crate::platform::{self, AROUND, HUGE, Map, PageTable};

/// How often to try to make pages huge. The pause doubles each time: half a minute in total.
const TRIES: u32 = 5;

/// A block mapped into this process.
#[derive(Debug)]
pub enum Pages {
    /// The store's own mapping: a write changes the block in all processes on the node.
    Shared(Region),
    /// A copy-on-write mapping.
    Private {
        /// The mapping. The prefault thread borrows it.
        map: Arc<Reaped<Map>>,
        /// The store's mapping of the same bytes, and its file. `None` for a snapshot file.
        beneath: Option<(Region, Backing)>,
    },
    /// A copy in this process's own memory.
    Copied(Reaped<MmapMut>),
}

impl Pages {
    /// The region of the bytes.
    pub fn region(&self) -> Region {
        match self {
            Pages::Shared(region) => *region,
            Pages::Private { map, .. } => map.region(),
            Pages::Copied(map) => map.region(),
        }
    }

    /// Maps a region of the store a second time, copy-on-write.
    ///
    /// # Safety
    /// Its bytes do not change while the pages live. Ray neither writes nor reuses the bytes of an
    /// object while a reference to its buffer lives: whoever holds the pages must hold such a
    /// reference.
    pub unsafe fn private(beneath: Region) -> Result<Pages> {
        let (file, backing) = store::open(beneath)?;
        let map = Reaped::map(|| Map::private(&file, backing.offset, beneath.nbytes));
        let map = map.map_err(|error| Error::refused(backing.name.display(), &error))?;
        Ok(Pages::Private { map: Arc::new(map), beneath: Some((beneath, backing)) })
    }

    /// Maps part of a file copy-on-write.
    ///
    /// # Safety
    /// Its bytes do not change while the pages live, because the file is leased. Or the reader
    /// accepts that other processes write to it, and a SIGBUS if they shorten it.
    pub unsafe fn of_file(file: &File, offset: u64, nbytes: usize) -> Result<Pages> {
        let map = Reaped::map(|| Map::private(file, offset, nbytes));
        let map =
            map.map_err(|error| Error::refused(format!("a mapping of {nbytes} bytes"), &error))?;
        Ok(Pages::Private { map: Arc::new(map), beneath: None })
    }

    /// Bytes in huge pages. `None` if unknown.
    pub fn huge_nbytes(&self) -> Option<usize> {
        match self {
            Pages::Private { map, .. } => map.huge_nbytes(map.huge_range()),
            Pages::Shared(_) | Pages::Copied(_) => None,
        }
    }

    /// Starts to fill in the page table, so that first reads do not fault: one step for each huge
    /// page, or for each group of small ones that one fault maps. A second later, one process of
    /// the node makes small pages of the store huge. `None` if there is nothing to do, or less than
    /// a thread costs.
    pub fn prefault(&self) -> Option<Prefault> {
        let region = self.region();
        let last = region.address + region.nbytes.checked_sub(HUGE)?;
        match self {
            Pages::Copied(_) => None,
            Pages::Shared(_) => PageTable::open()
                .lacks(last)
                .then(|| Prefault::start(move |stop| fill_while_mapped(region, stop))),
            Pages::Private { map, beneath } => {
                let (map, beneath) = (Arc::downgrade(map), beneath.clone());
                Some(Prefault::start(move |stop| {
                    let huge = map.upgrade().is_some_and(|map| map.is_huge() == Some(true));
                    fill(region, &map, if huge { HUGE } else { AROUND });
                    match beneath {
                        Some((beneath, backing)) if !huge => {
                            stop.wait(LEAVE_SMALL_FOR);
                            make_huge(beneath, &backing, stop);
                        }
                        Some(_) => {}
                        None => lease::let_go(), // it may have been the last to hold the map
                    }
                }))
            }
        }
    }
}

/// Fills in the page table of a map, by one fault for each `step`, until the map is dropped.
///
/// `MADV_POPULATE_READ` is slower (400 MiB: 28 ms, faults 14), and holds the lock of the process's
/// mappings: other threads that start a thread or allocate much memory would wait for up to 16 ms.
fn fill(Region { address, nbytes }: Region, map: &Weak<Reaped<Map>>, step: usize) {
    for at in (0..nbytes).step_by(step).chain(nbytes.checked_sub(1)) {
        let Some(_mapped) = map.upgrade() else { break };
        // SAFETY: the address lies in the map's region, and the map is held.
        unsafe { touch(address + at) };
    }
}

/// Does the same for a mapping of Ray's, which may disappear at any time.
fn fill_while_mapped(Region { address, nbytes }: Region, stop: &Stop) {
    let mut pieces = (0..nbytes).step_by(AROUND).map(|at| at..nbytes.min(at + AROUND));
    let mapped = |piece: Range<usize>| {
        !stop.is_set() && platform::is_readable(address + piece.start..address + piece.end)
    };
    pieces.all(mapped);
}

/// Tells a thread to end.
#[derive(Debug, Default)]
struct Stop(AtomicBool);

impl Stop {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits for a time, or until it is set.
    fn wait(&self, timeout: Duration) {
        if !self.is_set() {
            thread::park_timeout(timeout); // it may end early, which does no harm
        }
    }
}

/// A thread that prepares pages for reading, by faults and by `MADV_COLLAPSE`.
///
/// After a drop the thread ends by itself; the drop does not wait for it.
#[derive(Debug)]
pub struct Prefault {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    /// The process of the thread: a forked child does not have it.
    process: u32,
}

impl Prefault {
    fn start(act: impl FnOnce(&Stop) + Send + 'static) -> Prefault {
        let stop = Arc::new(Stop::default());
        let stopped = Arc::clone(&stop);
        // without a thread, first reads fault
        let thread = thread::Builder::new().name("rzc.prefault".into());
        let thread = thread.spawn(move || act(&stopped)).ok();
        Prefault { stop, thread, process: process::id() }
    }

    /// Waits until the thread has finished.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // whether it succeeded or not, the bytes are the same
        }
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        if self.process != process::id() {
            return mem::forget(self.thread.take()); // this is a forked child: it has no such thread
        }
        self.stop.0.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

/// Makes pages of the store huge, through a mapping that nobody has written through, because the
/// kernel refuses to collapse a mapping with private copies. One process at a time does it, with a
/// lock on the store's file, which ends at the latest with the process. Others then find the pages
/// huge.
fn make_huge(beneath: Region, backing: &Backing, stop: &Stop) {
    let Some((file, _)) = store::open(beneath).ok().filter(|(_, found)| found == backing) else {
        return; // Ray has shut down and unmapped its store
    };
    let Ok(map) = Map::shared(&file, backing.offset, beneath.nbytes) else {
        return;
    };
    let all = || map.huge_nbytes(map.huge_range()) == Some(map.huge_range().len());
    let mut tries = 0;
    while !stop.is_set() && tries < TRIES && !all() {
        if file.try_lock().is_ok() {
            let made = map.collapse_all(|| stop.is_set());
            let _ = file.unlock();
            if made.is_err_and(|error| error.kind() != ErrorKind::OutOfMemory) {
                return; // permanent, unlike pages in use or no contiguous 2 MiB
            }
            tries += 1;
        }
        stop.wait(LEAVE_SMALL_FOR * (1 << tries));
    }
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
mod tests {
    use std::fs::{self, File};
    use std::slice;

    use super::*;

    /// A deleted file, mapped shared, as Ray maps its store.
    fn store(name: &str, nbytes: usize) -> (MmapMut, File) {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(nbytes as u64).unwrap();
        // SAFETY: the file is this test's own.
        let map = unsafe { MmapMut::map_mut(&file) }.unwrap();
        fs::remove_file(&path).unwrap();
        (map, file)
    }

    fn private(region: Region) -> Result<Pages> {
        // SAFETY: only this test has the store, and changes nothing while there are pages.
        unsafe { Pages::private(region) }
    }

    fn write(pages: &mut Pages, at: usize, byte: u8) {
        assert!(matches!(pages, Pages::Private { .. }));
        let Region { address, nbytes } = pages.region();
        // SAFETY: the pages are private, and borrowed mutably.
        let bytes = unsafe { slice::from_raw_parts_mut(address as *mut u8, nbytes) };
        bytes[at] = byte;
    }

    fn read(pages: &Pages) -> &[u8] {
        // SAFETY: the pages are only read while the slice lives.
        unsafe { pages.region().bytes() }
    }

    #[test]
    fn private_pages_read_the_store_and_keep_their_writes() {
        let (mut store, _file) = store("rzc-pages", 64 << 10);
        store.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
        let part = Region::of(&store[4160..40_000]);
        let (mut one, other) = (private(part).unwrap(), private(part).unwrap());
        assert_eq!(read(&one), &store[4160..40_000]);
        write(&mut one, 7, 99);
        assert_eq!(read(&one)[7], 99);
        assert_eq!(read(&other)[7], 4167_usize as u8);
        assert_eq!(store[4167], 4167_usize as u8);
        assert_eq!(store::backing(part).unwrap().unwrap().offset, 4160);
    }

    #[test]
    fn small_pages_become_huge_by_one_process_and_threads_end_with_the_pages() {
        let path = format!("/dev/shm/rzc-prefault-{}", std::process::id());
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(4 * HUGE as u64).unwrap();
        // SAFETY: the file is this test's own.
        let mut store = unsafe { MmapMut::map_mut(&file) }.unwrap();
        fs::remove_file(&path).unwrap();
        store.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 251) as u8);
        let part = Region::of(&store[64..]);
        let private = || private(part).unwrap();
        let (one, other) = (private(), private());
        assert_eq!(one.huge_nbytes(), Some(0));
        file.lock().unwrap(); // as another process would
        let prefault = one.prefault().unwrap();
        thread::sleep(2 * LEAVE_SMALL_FOR);
        assert_eq!(private().huge_nbytes(), Some(0));
        drop(prefault);
        let prefault = other.prefault().unwrap();
        file.unlock().unwrap();
        prefault.wait();
        assert_eq!(private().huge_nbytes(), Some(3 * HUGE));
        let huge = private();
        huge.prefault().unwrap().wait();
        assert!(!PageTable::open().lacks(huge.region().address + part.nbytes - 1));
        assert_eq!(read(&one), &store[64..]);
        assert_eq!(read(&private()), &store[64..]);
    }

    #[test]
    fn a_store_that_came_after_another_is_not_mistaken_for_it() {
        for round in 0..20 {
            let (mut store, _file) = store(&format!("rzc-round-{round}"), 1 << 20);
            store.fill(round);
            let pages = private(Region::of(&store)).unwrap();
            assert!(read(&pages).iter().all(|&byte| byte == round));
        }
    }

    #[test]
    fn ordinary_memory_is_refused() {
        let bytes = vec![0; 1 << 16];
        assert!(matches!(private(Region::of(&bytes)), Err(Error::Unsupported { .. })));
        assert_eq!(store::backing(Region::of(&bytes)), Ok(None));
    }
}

//! Pages: the block as one process sees it.
//!
//! ```text
//!  the store's file      ████████████████████ block ████████████      one copy on the node
//!                          ▲ MAP_SHARED            ▲ MAP_PRIVATE
//!  Ray's mapping        ───┘      our mapping   ───┘  a page written here becomes this process's own
//! ```
//!
//! Ray maps its store read-write and shared, so a write through a view of it would change every
//! process on the node. The same file mapped privately reads the same physical pages, and copies
//! the one page that is written.

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

/// How often pages are tried that do not become huge: half a minute in all, twice as long each time.
const TRIES: u32 = 5;

/// A block mapped into this process.
#[derive(Debug)]
pub enum Pages {
    /// The store's own mapping: a write here is a write everywhere.
    Shared(Region),
    /// The store's pages, copied page by page as they are written.
    Private {
        /// The mapping, which its thread has, too.
        map: Arc<Reaped<Map>>,
        /// What of the store was mapped again, and where it comes from; `None` for a file of the user's.
        beneath: Option<(Region, Backing)>,
    },
    /// Memory of this process alone.
    Copied(Reaped<MmapMut>),
}

impl Pages {
    /// The bytes, wherever they are.
    pub fn region(&self) -> Region {
        match self {
            Pages::Shared(region) => *region,
            Pages::Private { map, .. } => map.region(),
            Pages::Copied(map) => map.region(),
        }
    }

    /// Maps a region of the store again, privately.
    ///
    /// # Safety
    /// Its bytes stay what they are while the pages live. Ray neither writes nor reuses those of an object
    /// while a reference to its buffer lives: whoever holds the pages holds one.
    pub unsafe fn private(beneath: Region) -> Result<Pages> {
        let (file, backing) = store::open(beneath)?;
        let map = Reaped::map(|| Map::private(&file, backing.offset, beneath.nbytes));
        let map = map.map_err(|error| Error::refused(backing.name.display(), &error))?;
        Ok(Pages::Private { map: Arc::new(map), beneath: Some((beneath, backing)) })
    }

    /// Maps part of a file privately.
    ///
    /// # Safety
    /// Its bytes stay what they are while the pages live, as where the file is leased; or whoever reads them
    /// bears that others write it, and the SIGBUS where they shorten it.
    pub unsafe fn of_file(file: &File, offset: u64, nbytes: usize) -> Result<Pages> {
        let map = Reaped::map(|| Map::private(file, offset, nbytes));
        let map =
            map.map_err(|error| Error::refused(format!("{nbytes} bytes of a file"), &error))?;
        Ok(Pages::Private { map: Arc::new(map), beneath: None })
    }

    /// How many of the bytes lie in huge pages; `None` where that is not known.
    pub fn huge_nbytes(&self) -> Option<usize> {
        match self {
            Pages::Private { map, .. } => map.huge_nbytes(map.huge_range()),
            Pages::Shared(_) | Pages::Copied(_) => None,
        }
    }

    /// Starts to fill in the page table, so that the first reads do not fault: one step for each huge page,
    /// or for the small ones around each. Small pages of the store are made huge a second later, by one
    /// process of the node. `None` where there is nothing to do, or so little that a thread costs more.
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
                        None => lease::let_go(), // it may have had the map when that was dropped
                    }
                }))
            }
        }
    }
}

/// Fills in the page table of a map until it is dropped, by one fault for the pages around each `step`.
///
/// `MADV_POPULATE_READ` is the slower way, 28 ms for 400 MiB beside 14, and holds the lock of the
/// process's mappings: whoever starts a thread or allocates much waits for up to 16 ms meanwhile.
fn fill(Region { address, nbytes }: Region, map: &Weak<Reaped<Map>>, step: usize) {
    for at in (0..nbytes).step_by(step).chain(nbytes.checked_sub(1)) {
        let Some(_mapped) = map.upgrade() else { break };
        // SAFETY: the map's region, and it is held.
        unsafe { touch(address + at) };
    }
}

/// Does the same of a mapping of Ray's, which may be gone at any time.
fn fill_while_mapped(Region { address, nbytes }: Region, stop: &Stop) {
    let mut pieces = (0..nbytes).step_by(AROUND).map(|at| at..nbytes.min(at + AROUND));
    let mapped = |piece: Range<usize>| {
        !stop.is_set() && platform::is_readable(address + piece.start..address + piece.end)
    };
    pieces.all(mapped);
}

/// What tells a thread to end.
#[derive(Debug, Default)]
struct Stop(AtomicBool);

impl Stop {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits, but no longer than until it is set.
    fn wait(&self, timeout: Duration) {
        if !self.is_set() {
            thread::park_timeout(timeout); // it may end early: no harm
        }
    }
}

/// Pages made ready to be read, by faults and by `MADV_COLLAPSE`, on a thread of its own.
///
/// Dropped, it stops by itself, and nobody waits for it.
#[derive(Debug)]
pub struct Prefault {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    /// Whose thread it is: a fork leaves it behind.
    process: u32,
}

impl Prefault {
    fn start(act: impl FnOnce(&Stop) + Send + 'static) -> Prefault {
        let stop = Arc::new(Stop::default());
        let stopped = Arc::clone(&stop);
        // without a thread the first reads fault, as they would have
        let thread = thread::Builder::new().name("rzc.prefault".into());
        let thread = thread.spawn(move || act(&stopped)).ok();
        Prefault { stop, thread, process: process::id() }
    }

    /// Waits until all is done.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // filled or not, the bytes are what they were
        }
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        if self.process != process::id() {
            return mem::forget(self.thread.take()); // nobody is there to end
        }
        self.stop.0.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

/// Makes pages of the store huge, through a mapping that Ray and others have not written through:
/// the kernel refuses one with pages of its own. One process at a time has the store's file locked,
/// which ends with the process at the latest; the others find their work done.
fn make_huge(beneath: Region, backing: &Backing, stop: &Stop) {
    let Some((file, _)) = store::open(beneath).ok().filter(|(_, found)| found == backing) else {
        return; // Ray is gone, and has taken its mapping along
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
                return; // for good; no 2 MiB in one piece, or pages in use, are another matter
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
        // SAFETY: the store is the test's own, which changes nothing while there are pages.
        unsafe { Pages::private(region) }
    }

    fn write(pages: &mut Pages, at: usize, byte: u8) {
        assert!(matches!(pages, Pages::Private { .. }));
        let Region { address, nbytes } = pages.region();
        // SAFETY: borrowed mutably, and private.
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

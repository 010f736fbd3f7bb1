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

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::layout::Piece;
use crate::page_table;

/// What is filled of a page table before anyone is asked whether to go on: about a millisecond.
const FILLED_AT_ONCE: usize = 16 << 20;

/// A block mapped into this process.
#[derive(Debug)]
pub enum Pages {
    /// The store's own mapping: a write here is a write everywhere.
    Shared(Piece),
    /// The store's pages, copied page by page as they are written.
    Private {
        /// The mapping.
        map: MmapMut,
        /// Where it comes from.
        source: Source,
    },
    /// Memory of this process alone.
    Copied(MmapMut),
}

/// The file behind a piece of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file's name as the kernel gives it, with ` (deleted)` if it is.
    pub name: String,
    /// Its inode.
    pub inode: u64,
    /// Where in the file the memory starts, in bytes.
    pub offset: u64,
    /// Whether the mapping that was found can be written.
    pub writable: bool,
}

impl Pages {
    /// The bytes, wherever they are.
    pub fn piece(&self) -> Piece {
        match self {
            Pages::Shared(piece) => *piece,
            Pages::Private { map, .. } | Pages::Copied(map) => {
                Piece { address: map.as_ptr() as usize, nbytes: map.len() }
            }
        }
    }

    /// Maps a piece of the store again, privately.
    pub fn private(piece: Piece) -> Result<Pages> {
        let (map, source) = system::map_private(piece)?;
        Ok(Pages::Private { map, source })
    }

    /// Starts to fill the page table, so that the first reads do not fault.
    ///
    /// # Safety
    /// The pages outlive what is returned.
    pub unsafe fn prefault(&self) -> Prefault {
        let piece = self.piece();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let fill = move || {
            for start in (0..piece.nbytes).step_by(FILLED_AT_ONCE) {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let nbytes = FILLED_AT_ONCE.min(piece.nbytes - start);
                let part = Piece { address: piece.address + start, nbytes };
                // SAFETY: whoever holds the prefault holds the pages, and it waits for this.
                unsafe { page_table::fill_to_read(part) };
            }
        };
        // without a thread the first reads fault, as they would have
        Prefault { stop, thread: thread::Builder::new().spawn(fill).ok() }
    }
}

/// The filling of a page table (`MADV_POPULATE_READ`), on a thread of its own.
///
/// Dropped, it stops within about a millisecond, and the pages may go.
#[derive(Debug)]
pub struct Prefault {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prefault {
    /// Waits until all is filled.
    pub fn wait(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // filled or not, the bytes are what they were
        }
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wait();
    }
}

/// The file behind this memory; `None` if it is ordinary memory of this process.
pub fn source(piece: Piece) -> Result<Option<Source>> {
    system::source(piece)
}

fn unsupported(reason: impl Into<String>) -> Error {
    Error::Unsupported { reason: reason.into() }
}

#[cfg(target_os = "linux")]
mod system {
    use std::fs::{self, File};
    use std::iter;
    use std::os::unix::fs::MetadataExt;
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;

    use memmap2::{MmapMut, MmapOptions};

    use super::{Source, unsupported};
    use crate::error::Result;
    use crate::layout::Piece;

    /// One shared file mapping of this process: a line of `/proc/self/maps`.
    #[derive(Debug, Clone)]
    struct Mapping {
        start: usize,
        end: usize,
        source: Source,
        /// Where the file can be opened, once that was found.
        path: Option<PathBuf>,
    }

    /// The stores found so far. Reading `/proc/self/maps` takes 2 ms with torch's CUDA libraries
    /// loaded, as long as all the rest of a load.
    static FOUND: Mutex<Vec<Mapping>> = Mutex::new(Vec::new());

    /// More than Ray's store and a few of its files for what fell back to disk are not kept.
    const KEEP: usize = 16;

    impl Mapping {
        fn parse(line: &str) -> Option<Mapping> {
            // 7f00-7f80 rw-s 00001000 00:1a 1234    /dev/shm/plasma (deleted)
            let mut fields = line.splitn(6, ' ');
            let (start, end) = fields.next()?.split_once('-')?;
            let rights = fields.next()?;
            let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
            let inode = fields.nth(1)?.parse().ok()?;
            let name = fields.next()?.trim_start().to_owned();
            let start = usize::from_str_radix(start, 16).ok()?;
            let end = usize::from_str_radix(end, 16).ok()?;
            let source = Source { name, inode, offset, writable: rights.starts_with("rw") };
            (rights.ends_with('s') && inode != 0).then_some(Mapping {
                start,
                end,
                source,
                path: None,
            })
        }

        fn holds(&self, piece: Piece) -> bool {
            self.start <= piece.address && piece.nbytes <= self.end.saturating_sub(piece.address)
        }

        /// The kernel's link to the mapped file. Its name tells that the mapping still stands;
        /// to open it takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
        fn link(&self) -> PathBuf {
            format!("/proc/self/map_files/{:x}-{:x}", self.start, self.end).into()
        }

        fn stands(&self) -> bool {
            fs::read_link(self.link()).is_ok_and(|name| name.as_os_str() == &*self.source.name)
        }

        /// Opens `path` if it is the mapped file.
        fn open_at(&self, path: &Path) -> Option<File> {
            let file = File::open(path).ok()?;
            (file.metadata().ok()?.ino() == self.source.inode).then_some(file)
        }

        /// Opens the mapped file where it was opened before, through the kernel's link, or, for
        /// whoever may not, among the open files of the raylet that made the store.
        fn open(&mut self) -> Result<File> {
            let known = self.path.iter().cloned().chain([self.link()]);
            let name = Path::new(&self.source.name);
            let raylets = iter::once_with(raylets).flatten().flat_map(|pid| {
                let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
                files.map(|file| file.path())
            });
            let raylets = raylets.filter(|path| fs::read_link(path).is_ok_and(|link| link == name));
            for path in known.chain(raylets) {
                if let Some(file) = self.open_at(&path) {
                    self.path = Some(path);
                    return Ok(file);
                }
            }
            Err(unsupported(format!(
                "neither {} nor a file of the raylet opens {}",
                self.link().display(),
                self.source.name
            )))
        }
    }

    /// Processes that may hold the store's file: the parent, which is a worker's raylet, then all
    /// that are called so.
    fn raylets() -> Vec<u32> {
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_raylet = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "raylet\n")
        };
        [std::os::unix::process::parent_id()].into_iter().chain(pids.filter(is_raylet)).collect()
    }

    /// The mapping around a piece: remembered if it still stands, else read anew.
    fn find(piece: Piece) -> Result<Option<Mapping>> {
        let mut found = FOUND.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(mapping) = found.iter().find(|mapping| mapping.holds(piece))
            && mapping.stands()
        {
            return Ok(Some(mapping.clone()));
        }
        let maps = fs::read_to_string("/proc/self/maps")
            .map_err(|error| unsupported(format!("/proc/self/maps: {error}")))?;
        let mapping = maps.lines().filter_map(Mapping::parse).find(|mapping| mapping.holds(piece));
        if let Some(mapping) = &mapping {
            remember(&mut found, mapping);
        }
        Ok(mapping)
    }

    fn remember(found: &mut Vec<Mapping>, mapping: &Mapping) {
        // what overlaps it is gone
        found.retain(|old| old.end <= mapping.start || mapping.end <= old.start);
        found.truncate(KEEP - 1);
        found.insert(0, mapping.clone());
    }

    fn source_in(mapping: &Mapping, piece: Piece) -> Source {
        let offset = mapping.source.offset + (piece.address - mapping.start) as u64;
        Source { offset, ..mapping.source.clone() }
    }

    pub fn source(piece: Piece) -> Result<Option<Source>> {
        Ok(find(piece)?.map(|mapping| source_in(&mapping, piece)))
    }

    pub fn map_private(piece: Piece) -> Result<(MmapMut, Source)> {
        let mut mapping = find(piece)?.ok_or_else(|| unsupported("it lies in no shared file"))?;
        let known = mapping.path.is_some();
        let file = mapping.open()?;
        if !known {
            remember(&mut FOUND.lock().unwrap_or_else(|poisoned| poisoned.into_inner()), &mapping);
        }
        let source = source_in(&mapping, piece);
        let mut options = MmapOptions::new();
        options.offset(source.offset).len(piece.nbytes).no_reserve_swap();
        // SAFETY: the file is Ray's store. Ray neither writes nor reuses the bytes of an object
        // while a reference to its buffer lives, which whoever holds these pages keeps.
        let map = unsafe { options.map_copy(&file) };
        Ok((map.map_err(|error| unsupported(format!("{}: {error}", source.name)))?, source))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_line_of_maps_is_read() {
            let line =
                "7f0000-7f8000 rw-s 00001000 00:1a 1234                 /dev/shm/a b (deleted)";
            let mapping = Mapping::parse(line).unwrap();
            let name = "/dev/shm/a b (deleted)".to_owned();
            let source = Source { name, inode: 1234, offset: 0x1000, writable: true };
            assert_eq!(mapping.source, source);
            assert!(mapping.holds(Piece { address: 0x7f0000, nbytes: 0x8000 }));
            assert!(!mapping.holds(Piece { address: 0x7f0001, nbytes: 0x8000 }));
            assert!(Mapping::parse("7f0000-7f8000 rw-p 00001000 00:1a 1234 /private").is_none());
            assert!(Mapping::parse("7f0000-7f8000 rw-s 00000000 00:00 0").is_none());
            assert!(Mapping::parse("").is_none());
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use memmap2::MmapMut;

    use super::{Source, unsupported};
    use crate::error::Result;
    use crate::layout::Piece;

    const REASON: &str = "only Linux tells which file lies behind Ray's store";

    pub fn source(_: Piece) -> Result<Option<Source>> {
        Err(unsupported(REASON))
    }

    pub fn map_private(_: Piece) -> Result<(MmapMut, Source)> {
        Err(unsupported(REASON))
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs::{self, File};

    use memmap2::MmapMut;

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

    fn piece(bytes: &[u8]) -> Piece {
        Piece { address: bytes.as_ptr() as usize, nbytes: bytes.len() }
    }

    fn write(pages: &mut Pages, at: usize, byte: u8) {
        match pages {
            Pages::Private { map, .. } => map[at] = byte,
            other => panic!("{other:?}"),
        }
    }

    fn read(pages: &Pages) -> &[u8] {
        // SAFETY: the pages are only read while the slice lives.
        unsafe { pages.piece().bytes() }
    }

    #[test]
    fn private_pages_read_the_store_and_keep_their_writes() {
        let (mut store, _file) = store("rzc-pages", 64 << 10);
        store.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
        let part = piece(&store[4160..40_000]);
        let mut one = Pages::private(part).unwrap();
        let other = Pages::private(part).unwrap();
        assert_eq!(read(&one), &store[4160..40_000]);
        // SAFETY: done before the pages go.
        unsafe { one.prefault() }.wait();
        write(&mut one, 7, 99);
        assert_eq!(read(&one)[7], 99);
        assert_eq!(read(&other)[7], 4167_usize as u8);
        assert_eq!(store[4167], 4167_usize as u8);
        assert_eq!(source(part).unwrap().unwrap().offset, 4160);
    }

    #[test]
    fn a_store_that_came_after_another_is_not_mistaken_for_it() {
        for round in 0..20 {
            let (mut store, _file) = store(&format!("rzc-round-{round}"), 1 << 20);
            store.fill(round);
            let pages = Pages::private(piece(&store)).unwrap();
            assert!(read(&pages).iter().all(|&byte| byte == round));
        }
    }

    #[test]
    fn ordinary_memory_is_refused() {
        let bytes = vec![0; 1 << 16];
        assert!(matches!(Pages::private(piece(&bytes)), Err(Error::Unsupported { .. })));
        assert_eq!(source(piece(&bytes)), Ok(None));
    }
}

//! Reading: ranges of files into memory, from many threads at once.
//!
//! ```text
//!  in the page cache   pread ────┐
//!  on the disk         O_DIRECT ─┴▶ bounce buffer, in the processor's cache ─ copy ─▶ target
//!                      or pread, whichever is faster here
//! ```
//!
//! Two threads read 755 MiB to their place in 34 ms; to a bounce buffer, and copied from there past the
//! caches, in 33, the XXH3 included; read to their place and then summed, in 40.
//!
//! A read past the page cache moves whole blocks to aligned memory, and leaves the cache as it was.
//! Files are never mapped here: where a mapping gives SIGBUS, because a file has shrunk or its server
//! is gone, a read gives an error.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::format::checksum::CHUNK;
use crate::platform::mapping::Mapping;
use crate::platform::{self, HUGE};

/// The middle of a chunk tells whether it is in the page cache: to ask for all of it takes 9 us for a MiB,
/// a tenth of the time to read it from there; for so much, 1.5. Its ends may be there for a neighbour's
/// sake, with which they were read.
const SAMPLE: usize = 64 << 10;

/// The alignment of what is read past the cache: that of no disk's blocks is larger.
const BLOCK: usize = 4096;

/// Shorter ranges are read through the cache, which holds their neighbours from then on.
const DIRECT_FROM: usize = 64 << 10;

/// What a thread reads into: a chunk, and the rest of the blocks at its ends.
const SLOT: usize = CHUNK + BLOCK;

/// Bytes that are read each way before one is preferred.
const TRIED: u64 = 8 << 20;

/// The environment variable that says how what is not in the page cache is read: `direct`, `buffered`, or
/// `auto`, the faster of both.
pub const HOW: &str = "RAY_ZEROCOPY_READ";

/// How what is not in the page cache is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// As turns out to be faster.
    Auto,
    /// Through the page cache.
    Buffered,
    /// Past it, where the file system can.
    Direct,
}

impl How {
    /// As [`HOW`] says.
    pub fn from_env() -> How {
        match std::env::var(HOW).as_deref() {
            Ok("buffered") => How::Buffered,
            Ok("direct") => How::Direct,
            _ => How::Auto,
        }
    }
}

/// A file that is read by ranges, by any number of threads.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: File,
    /// The same file, opened past the page cache.
    direct: Option<File>,
    /// Whether such reads have failed.
    direct_failed: AtomicBool,
    how: How,
    speeds: Arc<Speeds>,
    as_opened: State,
}

/// How fast each way has been, of all files of a file system: one tells it for the next.
#[derive(Debug, Default)]
struct Speeds {
    directly: Speed,
    buffered: Speed,
}

/// Those of this process, by device.
static SPEEDS: Mutex<BTreeMap<u64, Arc<Speeds>>> = Mutex::new(BTreeMap::new());

/// What changes when a file is written.
type State = (u64, SystemTime);

/// Memory that threads read into, each into a slot of its own; a page that is not touched is none.
///
/// For a disk huge pages, if there are some: small ones lie anywhere, and a disk takes a few hundred
/// pieces of memory at once. Eight threads read 755 MiB in 300 to 600 ms into them, in 200 into huge
/// ones. For the page cache small ones, which are never dear.
#[derive(Debug)]
pub struct Bounce(MmapMut);

#[derive(Debug, Default)]
struct Speed {
    nbytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Reader {
    /// A file that is open already; `path` is what errors call it.
    pub fn new(file: File, path: &Path, how: How) -> io::Result<Reader> {
        let as_opened = state(&file)?;
        platform::read_no_further(&file);
        let direct = if how == How::Buffered { None } else { platform::reopen_direct(&file) };
        Ok(Reader {
            path: path.to_owned(),
            direct,
            direct_failed: AtomicBool::new(false),
            how,
            speeds: Speeds::of(&file),
            file,
            as_opened,
        })
    }

    /// The mapped file, where it can be opened and lies on a disk; files in memory have nothing to read.
    pub fn of(mapping: &Mapping, how: How) -> Option<Reader> {
        let (file, _) = mapping.open(None).ok()?;
        let path = &mapping.backing.name;
        if platform::has_no_disk(&file) { None } else { Reader::new(file, path, how).ok() }
    }

    /// Whether so little of the middle of a range is in the page cache that it comes from the disk.
    pub fn is_cold(&self, offset: u64, nbytes: usize) -> bool {
        let sample = nbytes.min(SAMPLE);
        let offset = offset + (nbytes - sample) as u64 / 2;
        platform::cached(&self.file, offset, sample)
            .is_some_and(|cached| cached < sample as u64 / 2)
    }

    /// At most [`CHUNK`] bytes from `offset` on, in a slot.
    pub fn read<'a>(&self, offset: u64, nbytes: usize, slot: &'a mut [u8]) -> Result<&'a [u8]> {
        let cold = self.is_cold(offset, nbytes);
        let read = if cold { Reader::read_cold } else { Reader::read_buffered };
        let range = read(self, offset, nbytes, slot).map_err(|e| self.error(offset, nbytes, &e))?;
        Ok(&slot[range])
    }

    /// Fills a target with the bytes from `offset` on.
    pub fn fill(&self, mut offset: u64, target: &mut [u8]) -> Result<()> {
        let mut bounce = Bounce::new(1, false)?;
        let slot = bounce.slots().next().expect("room for one");
        for chunk in target.chunks_mut(CHUNK) {
            chunk.copy_from_slice(self.read(offset, chunk.len(), slot)?);
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// Refuses a file that somebody has written to since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        let changed = || io::Error::other("it was written to while it was read");
        match state(&self.file) {
            Ok(state) if state == self.as_opened => Ok(()),
            Ok(_) => Err(self.error(0, self.as_opened.0 as usize, &changed())),
            Err(error) => Err(self.error(0, self.as_opened.0 as usize, &error)),
        }
    }

    /// Reads to a part of a slot.
    fn read_cold(&self, offset: u64, nbytes: usize, memory: &mut [u8]) -> io::Result<Range<usize>> {
        if nbytes >= DIRECT_FROM
            && let Some(direct) = self.prefers_direct()
        {
            let read = || read_direct(direct, offset, nbytes, memory);
            match self.speeds.directly.time(nbytes, read) {
                Ok(read) => return Ok(read),
                // whether the file can be read at all, the other way tells
                Err(_) => self.direct_failed.store(true, Ordering::Relaxed),
            }
        }
        self.speeds.buffered.time(nbytes, || self.read_buffered(offset, nbytes, memory))
    }

    fn read_buffered(
        &self,
        offset: u64,
        nbytes: usize,
        memory: &mut [u8],
    ) -> io::Result<Range<usize>> {
        self.file.read_exact_at(&mut memory[..nbytes], offset)?;
        Ok(0..nbytes)
    }

    fn prefers_direct(&self) -> Option<&File> {
        let direct = self.direct.as_ref()?;
        let prefers = !self.direct_failed.load(Ordering::Relaxed)
            && match self.how {
                How::Buffered => false,
                How::Direct => true,
                How::Auto => self.speeds.prefer_direct(),
            };
        prefers.then_some(direct)
    }

    fn error(&self, offset: u64, nbytes: usize, error: &io::Error) -> Error {
        let reason = match (error.kind(), self.file.metadata()) {
            (io::ErrorKind::UnexpectedEof, Ok(now)) => format!("it has {} bytes now", now.len()),
            _ => error.to_string(),
        };
        let (path, end) = (self.path.display().to_string(), offset + nbytes as u64);
        Error::Unreadable { path, start: offset, end, reason }
    }
}

impl Bounce {
    /// Room for so many threads.
    pub fn new(slots: usize, huge: bool) -> Result<Bounce> {
        let nbytes = (slots * SLOT).next_multiple_of(HUGE) + HUGE; // as it need not start at one
        let refused = |error| Error::refused(format!("{nbytes} bytes to read into"), &error);
        let map = MmapMut::map_anon(nbytes).map_err(refused)?;
        platform::prefer_huge(&map, huge);
        Ok(Bounce(map))
    }

    /// The slots, as many as it has room for.
    pub fn slots(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let before = self.0.as_ptr().addr().wrapping_neg() % HUGE;
        self.0[before..].chunks_exact_mut(SLOT)
    }
}

impl Speeds {
    fn of(file: &File) -> Arc<Speeds> {
        let mut speeds = SPEEDS.lock().unwrap_or_else(PoisonError::into_inner);
        speeds.entry(platform::device(file)).or_default().clone()
    }

    /// Whether the direct way is the faster, or has yet to be tried.
    fn prefer_direct(&self) -> bool {
        match (self.directly.tried(), self.buffered.tried()) {
            (false, _) => true,
            (true, false) => false,
            (true, true) => self.directly.is_at_least(&self.buffered),
        }
    }
}

impl Speed {
    fn time<T>(&self, nbytes: usize, read: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let start = Instant::now();
        let done = read()?;
        self.nanoseconds.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        self.nbytes.fetch_add(nbytes as u64, Ordering::Relaxed);
        Ok(done)
    }

    fn tried(&self) -> bool {
        self.nbytes.load(Ordering::Relaxed) >= TRIED
    }

    fn is_at_least(&self, other: &Speed) -> bool {
        let of = |speed: &Speed| {
            let nanoseconds = speed.nanoseconds.load(Ordering::Relaxed);
            speed.nbytes.load(Ordering::Relaxed) as f64 / nanoseconds as f64
        };
        of(self) >= of(other)
    }
}

/// Reads the blocks around a range past the page cache, and says where in the buffer the range is.
fn read_direct(
    file: &File,
    offset: u64,
    nbytes: usize,
    memory: &mut [u8],
) -> io::Result<Range<usize>> {
    let before = (offset % BLOCK as u64) as usize;
    let needed = before + nbytes;
    let blocks = &mut memory[..needed.next_multiple_of(BLOCK)];
    let mut read = 0;
    while read < needed {
        // the last block of a file is short; what comes after a short read starts at a block again
        let at = read - read % BLOCK;
        match file.read_at(&mut blocks[at..], offset - before as u64 + at as u64) {
            Ok(nbytes) if at + nbytes > read => read = at + nbytes,
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(before..needed)
}

fn state(file: &File) -> io::Result<State> {
    let metadata = file.metadata()?;
    Ok((metadata.len(), metadata.modified()?))
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    const NBYTES: usize = (5 << 20) + 777;

    /// A file of the test's own, and its bytes.
    struct Written(PathBuf, Vec<u8>);

    impl Written {
        fn new(name: &str) -> Written {
            let path = env::temp_dir().join(format!("rzc-read-{name}-{}", std::process::id()));
            let bytes: Vec<_> = (0..NBYTES).map(|i| (i % 251) as u8).collect();
            fs::write(&path, &bytes).unwrap();
            Written(path, bytes)
        }

        fn open(&self, how: How) -> Reader {
            Reader::new(File::open(&self.0).unwrap(), &self.0, how).unwrap()
        }

        fn evict(&self) {
            let file = File::open(&self.0).unwrap();
            file.sync_all().unwrap();
            platform::evict(&file);
        }
    }

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn read(reader: &Reader, offset: u64, nbytes: usize) -> Result<Vec<u8>> {
        let mut target = vec![0; nbytes];
        reader.fill(offset, &mut target)?;
        Ok(target)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn every_range_is_read_to_the_byte_whichever_way(
            start in 0..NBYTES,
            nbytes in prop_oneof![0..10_000_usize, Just(NBYTES)],
            how in prop_oneof![Just(How::Auto), Just(How::Buffered), Just(How::Direct)],
            evicted: bool,
        ) {
            let file = Written::new("range");
            if evicted {
                file.evict();
            }
            let range = start..NBYTES.min(start + nbytes);
            let read = read(&file.open(how), start as u64, range.len()).unwrap();
            prop_assert!(read == file.1[range]);
        }
    }

    #[test]
    fn there_is_a_slot_for_each_thread() {
        for threads in 1..=64 {
            let mut bounce = Bounce::new(threads, true).unwrap();
            let slots: Vec<_> = bounce.slots().take(threads).collect();
            assert_eq!(slots.len(), threads);
            assert!(slots.iter().all(|slot| slot.as_ptr().addr() % BLOCK == 0));
        }
    }

    #[cfg(all(target_os = "linux", not(feature = "portable")))]
    #[test]
    fn what_is_cold_is_told_from_what_is_warm_and_stays_cold_when_read_directly() {
        let file = Written::new("cold");
        let reader = file.open(How::Direct);
        assert!(!reader.is_cold(0, NBYTES));
        file.evict();
        assert!(reader.is_cold(0, NBYTES));
        assert!(read(&reader, 0, NBYTES).unwrap() == file.1);
        assert!(reader.direct.is_none() || reader.is_cold(0, NBYTES));
        assert!(read(&file.open(How::Buffered), 0, NBYTES).unwrap() == file.1);
        assert!(!reader.is_cold(0, NBYTES));
    }

    #[test]
    fn a_file_that_has_shrunk_is_an_error_with_its_name_and_range() {
        let file = Written::new("shrunk");
        for how in [How::Buffered, How::Direct] {
            let reader = file.open(how);
            File::options().write(true).open(&file.0).unwrap().set_len(1 << 20).unwrap();
            file.evict();
            let error = read(&reader, 4096, 2 << 20).unwrap_err();
            let path = file.0.display().to_string();
            let reason = "it has 1048576 bytes now".to_owned();
            let (start, end) = (4096, 4096 + (1 << 20));
            assert_eq!(error, Error::Unreadable { path, start, end, reason });
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error_with_its_name_and_range() {
        let path = Path::new("/proc/self/mem"); // nothing is mapped at 4096
        let reader = Reader::new(File::open(path).unwrap(), path, How::Auto).unwrap();
        let error = read(&reader, 4096, 100).unwrap_err();
        let reason = io::Error::from_raw_os_error(libc::EIO).to_string();
        let path = "/proc/self/mem".to_owned();
        assert_eq!(error, Error::Unreadable { path, start: 4096, end: 4196, reason });
    }

    #[test]
    fn a_file_that_was_written_to_is_refused() {
        let file = Written::new("written");
        let reader = file.open(How::Auto);
        assert_eq!(reader.check_unchanged(), Ok(()));
        std::thread::sleep(std::time::Duration::from_millis(20)); // a tick of the clock of files
        fs::write(&file.0, &file.1).unwrap();
        let message = reader.check_unchanged().unwrap_err().to_string();
        assert!(message.ends_with("it was written to while it was read"), "{message}");
    }
}

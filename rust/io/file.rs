//! Files: reads ranges of them into memory, from many threads at once.
//!
//! ```text
//!  in the page cache   pread ────┐
//!  on the disk         O_DIRECT ─┴▶ bounce buffer, in the processor's cache ─ copy ─▶ target
//! ```
//!
//! A thread reads into its bounce buffer, then copies past the caches to the target, and sums on
//! the way. (Two threads, 755 MiB: 33 ms with the XXH3. Read straight to the target: 34 ms without
//! it, 40 with it.)
//!
//! A read past the page cache (O_DIRECT) moves whole disk blocks to aligned memory, and leaves the
//! cache as it was. (400 MiB: 0.40 of the time of reads through the cache.) This module never maps
//! files: if a file has shrunk or its server is gone, a mapping gives SIGBUS, but a read gives an
//! error.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::format::checksum::CHUNK;
use crate::io::bounce::{BLOCK, Bounce};
use crate::platform;
use crate::platform::mapping::Mapping;

/// How much of a chunk's middle is asked for, to tell whether the chunk is in the page cache. For a
/// whole MiB the question takes 9 us, a tenth of the time to read it from the cache; for this much,
/// 1.5 us. The ends of a chunk may be cached only because a neighbour was read.
const SAMPLE: usize = 64 << 10;

/// Shorter ranges are read through the page cache, which then holds their neighbours too.
const DIRECT_FROM: usize = 64 << 10;

/// A file whose ranges any number of threads read.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: File,
    /// The same file opened with O_DIRECT, if its file system can.
    direct: Option<File>,
    /// Whether reads from `direct` have failed.
    direct_failed: AtomicBool,
    as_opened: State,
}

/// Length and modification time: a write changes them.
type State = (u64, SystemTime);

impl Reader {
    /// Takes an open file; `path` is its name in errors.
    pub fn new(file: File, path: &Path) -> io::Result<Reader> {
        let as_opened = state(&file)?;
        platform::read_no_further(&file);
        let (direct, direct_failed) = (platform::reopen_direct(&file), AtomicBool::new(false));
        Ok(Reader { path: path.to_owned(), file, direct, direct_failed, as_opened })
    }

    /// Opens a mapped file. `None` if it cannot be opened, or lies in memory: then there is nothing
    /// to read.
    pub fn of(mapping: &Mapping) -> Option<Reader> {
        let (file, _) = mapping.open(None).ok()?;
        let path = &mapping.backing.name;
        if platform::has_no_disk(&file) { None } else { Reader::new(file, path).ok() }
    }

    /// Whether less than half of the range's middle is in the page cache, so that a read goes to
    /// the disk.
    pub fn is_cold(&self, offset: u64, nbytes: usize) -> bool {
        let sample = nbytes.min(SAMPLE);
        let offset = offset + (nbytes - sample) as u64 / 2;
        platform::cached(&self.file, offset, sample)
            .is_some_and(|cached| cached < sample as u64 / 2)
    }

    /// Reads at most [`CHUNK`] bytes at `offset` into a slot.
    pub fn read<'a>(&self, offset: u64, nbytes: usize, slot: &'a mut [u8]) -> Result<&'a [u8]> {
        if let Some(direct) = &self.direct
            && nbytes >= DIRECT_FROM
            && !self.direct_failed.load(Ordering::Relaxed)
            && self.is_cold(offset, nbytes)
        {
            match read_direct(direct, offset, nbytes, slot) {
                Ok(range) => return Ok(&slot[range]),
                // the other way shows whether the file can be read at all
                Err(_) => self.direct_failed.store(true, Ordering::Relaxed),
            }
        }
        let read = self.file.read_exact_at(&mut slot[..nbytes], offset);
        read.map_err(|error| self.error(offset, nbytes, &error))?;
        Ok(&slot[..nbytes])
    }

    /// Fills `target` with the bytes at `offset`.
    pub fn fill(&self, mut offset: u64, target: &mut [u8]) -> Result<()> {
        let mut bounce = Bounce::new(1, false)?;
        let slot = bounce.slots().next().expect("room for one");
        for chunk in target.chunks_mut(CHUNK) {
            chunk.copy_from_slice(self.read(offset, chunk.len(), slot)?);
            offset += chunk.len() as u64;
        }
        Ok(())
    }

    /// Refuses a file that was written to since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        let changed = || io::Error::other("it was written to while it was read");
        match state(&self.file) {
            Ok(state) if state == self.as_opened => Ok(()),
            Ok(_) => Err(self.error(0, self.as_opened.0 as usize, &changed())),
            Err(error) => Err(self.error(0, self.as_opened.0 as usize, &error)),
        }
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

/// Reads the disk blocks around a range past the page cache. Returns the place of the range in
/// `memory`.
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
        // a file's last block is short; a read after a short one starts at a block again
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

    /// A file of this test, and its bytes.
    struct Written(PathBuf, Vec<u8>);

    impl Written {
        fn new(name: &str) -> Written {
            let path = env::temp_dir().join(format!("rzc-read-{name}-{}", std::process::id()));
            let bytes: Vec<_> = (0..NBYTES).map(|i| (i % 251) as u8).collect();
            fs::write(&path, &bytes).unwrap();
            Written(path, bytes)
        }

        fn open(&self) -> Reader {
            Reader::new(File::open(&self.0).unwrap(), &self.0).unwrap()
        }

        /// A reader through the cache, and one past it if the file system can.
        fn readers(&self) -> [Reader; 2] {
            [self.open(), Reader { direct: None, ..self.open() }]
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
            evicted: bool,
        ) {
            let file = Written::new("range");
            if evicted {
                file.evict();
            }
            let range = start..NBYTES.min(start + nbytes);
            for reader in file.readers() {
                let read = read(&reader, start as u64, range.len()).unwrap();
                prop_assert!(read == file.1[range.clone()]);
            }
        }
    }

    #[cfg(all(target_os = "linux", not(feature = "portable")))]
    #[test]
    fn what_is_cold_is_told_from_what_is_warm_and_stays_cold_when_read_directly() {
        let file = Written::new("cold");
        let [reader, buffered] = file.readers();
        assert!(!reader.is_cold(0, NBYTES));
        file.evict();
        assert!(reader.is_cold(0, NBYTES));
        assert!(read(&reader, 0, NBYTES).unwrap() == file.1);
        assert!(reader.direct.is_none() || reader.is_cold(0, NBYTES));
        assert!(read(&buffered, 0, NBYTES).unwrap() == file.1);
        assert!(!reader.is_cold(0, NBYTES));
    }

    #[test]
    fn a_file_that_has_shrunk_is_an_error_with_its_name_and_range() {
        let file = Written::new("shrunk");
        for reader in file.readers() {
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
        let reader = Reader::new(File::open(path).unwrap(), path).unwrap();
        let error = read(&reader, 4096, 100).unwrap_err();
        let reason = io::Error::from_raw_os_error(libc::EIO).to_string();
        let path = "/proc/self/mem".to_owned();
        assert_eq!(error, Error::Unreadable { path, start: 4096, end: 4196, reason });
    }

    #[test]
    fn a_file_that_was_written_to_is_refused() {
        let file = Written::new("written");
        let reader = file.open();
        assert_eq!(reader.check_unchanged(), Ok(()));
        std::thread::sleep(std::time::Duration::from_millis(20)); // a tick of the clock of files
        fs::write(&file.0, &file.1).unwrap();
        let message = reader.check_unchanged().unwrap_err().to_string();
        assert!(message.ends_with("it was written to while it was read"), "{message}");
    }
}

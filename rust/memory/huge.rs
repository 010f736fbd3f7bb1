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
use std::thread;
use std::time::Duration;

use crate::memory::region::{Region, touch};
use crate::platform::{self, HUGE, Map};

/// What is collapsed before anyone is asked whether to go on. A call waits for all processors to
/// empty their lists of pages: on an idle machine 400 MiB take 21 to 26 ms in one call or in fifty.
const COLLAPSED_AT_ONCE: usize = 8 << 20;

/// How long small pages are left as they are, for the sake of a first output or of the next publish: to
/// make 400 MiB huge takes a processor 170 ms, and takes the pages out of all page tables meanwhile.
pub const LEAVE_SMALL_FOR: Duration = Duration::from_secs(1);

/// A page that someone reads just now is not collapsed; a moment later it is. These are all that a
/// block is waited for: who writes the next one there would be held up by more tries.
const MOMENTS_MS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

/// How many pages of a block at most are asked, to speak for all of them.
const ASKED: usize = 8;

impl Map {
    /// The bytes.
    pub fn region(&self) -> Region {
        self.addresses().into()
    }

    /// The addresses of all that can be huge, between the first and the last multiple of [`HUGE`]: a
    /// multiple of it, or none.
    pub fn huge_range(&self) -> Range<usize> {
        let Range { start, end } = self.addresses();
        start.next_multiple_of(HUGE)..end - end % HUGE
    }

    /// Makes fresh pages of this range of [`Map::huge_range`] huge.
    pub fn make(&self, range: Range<usize>) -> io::Result<()> {
        for address in range.clone().step_by(HUGE) {
            // none is made of nothing
            if !platform::fill_to_write(address..address + 1) {
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
        let range = self.huge_range();
        let mut moments = MOMENTS_MS.into_iter().map(Duration::from_millis);
        for start in range.clone().step_by(COLLAPSED_AT_ONCE) {
            while !stopped() {
                match self.collapse(start..range.end.min(start + COLLAPSED_AT_ONCE)) {
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
        let range = self.huge_range();
        let step = (range.len() / HUGE).div_ceil(ASKED) * HUGE;
        let asked = range.len().checked_div(step)?;
        Some(self.huge_nbytes_of(range, step)? >= asked * HUGE)
    }

    /// How much of this range of [`Map::huge_range`] lies in huge pages; `None` where the kernel does
    /// not tell (before Linux 6.7).
    pub fn huge_nbytes(&self, range: Range<usize>) -> Option<usize> {
        self.huge_nbytes_of(range, HUGE)
    }

    /// The same of the pages at each `step`.
    fn huge_nbytes_of(&self, range: Range<usize>, step: usize) -> Option<usize> {
        assert!(self.has(&range));
        // only what is in the page table counts
        // SAFETY: mapped as long as this is.
        range.clone().step_by(step).for_each(|address| unsafe { touch(address) });
        platform::huge_nbytes(&range)
    }

    /// Has the kernel copy each 2 MiB of this range of [`Map::huge_range`] into a huge page. One page of
    /// them at least must be in memory.
    fn collapse(&self, range: Range<usize>) -> io::Result<()> {
        assert!(self.has(&range));
        platform::collapse(range)
    }

    fn has(&self, range: &Range<usize>) -> bool {
        let own = self.huge_range();
        range.is_empty() || own.start <= range.start && range.end <= own.end
    }
}

/// Why pages of shared memory cannot be made huge here; `None` if they can.
pub fn obstacle() -> Option<String> {
    let error = try_one().err()?;
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

/// Makes one huge page of a file in shared memory.
fn try_one() -> io::Result<()> {
    let file = platform::nameless_file(HUGE)?;
    let map = Map::shared(&file, 0, HUGE)?;
    // SAFETY: mapped until the end.
    unsafe { touch(map.addresses().start) };
    map.collapse(map.huge_range())
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
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

    fn read(map: &Map) -> &[u8] {
        // SAFETY: mapped while it lives, and nobody writes.
        unsafe { map.region().bytes() }
    }

    fn again(region: Region) -> io::Result<Map> {
        // SAFETY: it stays mapped, and nobody writes.
        unsafe { Map::again(region.addresses()) }
    }

    #[test]
    fn a_mapping_agrees_with_its_file_and_holds_its_bytes() {
        let (file, bytes) = file();
        for offset in [0, 1, 4096, HUGE - 64, HUGE, NBYTES + 4160] {
            for nbytes in [1, 4096, HUGE - 1, HUGE, NBYTES] {
                for map in [Map::private, Map::shared] {
                    let map = map(&file, offset as u64, nbytes).unwrap();
                    assert_eq!(read(&map), &bytes[offset..offset + nbytes]);
                    let agree = map.region().address % HUGE == offset % HUGE;
                    assert!(agree || nbytes < HUGE);
                    assert!(map.huge_range().is_empty() || map.huge_range().start % HUGE == 0);
                    let twice = again(map.region());
                    assert_eq!(twice.is_ok(), twice.is_ok_and(|twice| read(&twice) == read(&map)));
                }
            }
        }
    }

    #[test]
    fn what_is_mapped_shared_can_be_mapped_again_and_nothing_else() {
        let (file, bytes) = file();
        let shared = Map::shared(&file, 4160, NBYTES).unwrap();
        let twice = again(shared.region()).unwrap();
        drop(shared);
        assert_eq!(read(&twice), &bytes[4160..4160 + NBYTES]);
        let private = Map::private(&file, 4160, NBYTES).unwrap();
        assert!(again(private.region()).is_err());
        let own = vec![0; NBYTES];
        let region = Region { address: own.as_ptr().addr(), nbytes: NBYTES };
        assert!(again(region).is_err());
        let beyond = Region { nbytes: 4 * NBYTES, ..twice.region() };
        assert!(again(beyond).is_err());
    }

    #[test]
    fn pages_become_huge_and_bytes_stay_and_a_write_stays_with_its_mapping() {
        assert_eq!(obstacle(), None);
        let (file, bytes) = file();
        let bytes = &bytes[4160..4160 + NBYTES];
        let private = || Map::private(&file, 4160, NBYTES).unwrap();
        let (one, other) = (private(), private());
        let write = |map: &Map, at: usize| {
            // SAFETY: a private mapping of this test's own.
            unsafe { *((map.region().address + at) as *mut u8) ^= 255 };
        };
        write(&one, HUGE); // partly written before
        assert_eq!((one.is_huge(), other.is_huge()), (Some(false), Some(false)));
        Map::shared(&file, 4160, NBYTES).unwrap().collapse_all(|| false).unwrap();
        assert_eq!(other.huge_nbytes(other.huge_range()), Some(other.huge_range().len()));
        assert_eq!(other.huge_range().len(), NBYTES - HUGE);
        write(&other, 2 * HUGE); // and after
        let changed = |map: &Map| -> Vec<usize> {
            let pairs = read(map).iter().zip(bytes).enumerate();
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
        let private = || Map::private(&file, 0, NBYTES).unwrap();
        let shared = Map::shared(&file, 0, NBYTES).unwrap();
        let range = shared.huge_range();
        shared.collapse(range.start + HUGE..range.end).unwrap();
        assert_eq!(private().is_huge(), Some(false));
        shared.collapse_all(|| false).unwrap();
        assert_eq!(private().is_huge(), Some(true));
    }

    #[test]
    fn a_collapse_ends_when_it_is_stopped() {
        let (file, _) = file();
        let map = Map::shared(&file, 0, NBYTES).unwrap();
        map.collapse_all(|| true).unwrap();
        assert_eq!(map.huge_nbytes(map.huge_range()), Some(0));
    }

    #[test]
    fn what_can_have_no_huge_pages_is_refused_and_not_changed() {
        let path = std::env::temp_dir().join(format!("rzc-huge-{}", std::process::id()));
        let disk = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        disk.set_len(NBYTES as u64).unwrap();
        let map = Map::shared(&disk, 0, NBYTES).unwrap();
        assert!(map.collapse_all(|| false).is_err());
        assert_eq!(map.is_huge(), Some(false));
        assert!(read(&map).iter().all(|&byte| byte == 0));
        assert_eq!(Map::shared(&disk, 0, HUGE - 1).unwrap().is_huge(), None);
    }
}

//! Huge pages: one entry of the page table maps 2 MiB of a file.
//!
//! ```text
//!  file     ┼──────────┌ a block ───┼─────────────────┼─────────────────┼──┐────────
//!           │          └────────────┼█████████████████┼█████████████████┼──┘
//!  memory   ┼──────────┌────────────┼─────────────────┼─────────────────┼──┐────────
//!           multiples of 2 MiB: each 2 MiB between two of them can be a huge page, if
//!           address and offset are equal modulo 2 MiB
//! ```
//!
//! `MADV_COLLAPSE` (Linux 6.1) makes huge pages of a file in shared memory, whatever
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says, and for any user. (First read of 400
//! MiB: 2 ms, was 38.)

use std::io;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use crate::memory::region::{Region, touch};
use crate::platform::{self, HUGE, Map};

/// Bytes that one call collapses. `stopped` is asked between calls. A call waits until all
/// processors have emptied their lists of pages, but many calls cost no more: on an idle machine
/// 400 MiB take 21 to 26 ms in one call or in fifty.
const COLLAPSED_AT_ONCE: usize = 8 << 20;

/// How long pages stay small first, so that a first output or the next publish is not delayed. (To
/// collapse 400 MiB takes a processor 170 ms. Meanwhile the pages are out of all page tables.)
pub const LEAVE_SMALL_FOR: Duration = Duration::from_secs(1);

/// The pauses before a page in use is tried again: the kernel refuses to collapse a page while
/// somebody reads it. All tries for one block share them, because more would delay the next block
/// written there.
const MOMENTS_MS: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

/// How many huge pages of a block are checked, at most, to judge the whole block.
const ASKED: usize = 8;

impl Map {
    /// The bytes.
    pub fn region(&self) -> Region {
        self.addresses().into()
    }

    /// All addresses that can be in huge pages: from the first multiple of [`HUGE`] to the last.
    pub fn huge_range(&self) -> Range<usize> {
        let Range { start, end } = self.addresses();
        start.next_multiple_of(HUGE)..end - end % HUGE
    }

    /// Makes fresh huge pages for a range of [`Map::huge_range`].
    pub fn make(&self, range: Range<usize>) -> io::Result<()> {
        for address in range.clone().step_by(HUGE) {
            // the kernel collapses only what has a page
            if !platform::fill_to_write(address..address + 1) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
        }
        self.collapse(range)
    }

    /// Makes all pages huge that can be, in order, until `stopped` returns true.
    ///
    /// Fails early if the kernel has no room for huge pages. The bytes do not change. A process
    /// that reads or writes them meanwhile waits at most for a copy of 2 MiB.
    pub fn collapse_all(&self, stopped: impl Fn() -> bool) -> io::Result<()> {
        let range = self.huge_range();
        let mut moments = MOMENTS_MS.into_iter().map(Duration::from_millis);
        for start in range.clone().step_by(COLLAPSED_AT_ONCE) {
            while !stopped() {
                match self.collapse(start..range.end.min(start + COLLAPSED_AT_ONCE)) {
                    // a page in use: somebody reads it now
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

    /// Whether the pages are huge, judged by one page in each eighth, because a block that lay here
    /// before may have left some huge and others small. Call it on a new mapping. `None` if the
    /// kernel does not tell (before Linux 6.7), or no page can be huge.
    pub fn is_huge(&self) -> Option<bool> {
        let range = self.huge_range();
        let step = (range.len() / HUGE).div_ceil(ASKED) * HUGE;
        let asked = range.len().checked_div(step)?;
        Some(self.huge_nbytes_of(range, step)? >= asked * HUGE)
    }

    /// Bytes of a range of [`Map::huge_range`] in huge pages. `None` if the kernel does not tell
    /// (before Linux 6.7).
    pub fn huge_nbytes(&self, range: Range<usize>) -> Option<usize> {
        self.huge_nbytes_of(range, HUGE)
    }

    /// The same, for one page at each `step`.
    fn huge_nbytes_of(&self, range: Range<usize>, step: usize) -> Option<usize> {
        assert!(self.has(&range));
        // the kernel counts only pages in the page table
        // SAFETY: mapped as long as this is.
        range.clone().step_by(step).for_each(|address| unsafe { touch(address) });
        platform::huge_nbytes(&range)
    }

    /// Makes the kernel copy each 2 MiB of a range of [`Map::huge_range`] into a huge page. At
    /// least one of its pages must be in memory.
    fn collapse(&self, range: Range<usize>) -> io::Result<()> {
        assert!(self.has(&range));
        platform::collapse(range)
    }

    fn has(&self, range: &Range<usize>) -> bool {
        let own = self.huge_range();
        range.is_empty() || own.start <= range.start && range.end <= own.end
    }
}

/// Why pages of shared memory cannot be made huge here. `None` if they can.
pub fn obstacle() -> Option<String> {
    let error = try_one().err()?;
    let reason = match error.kind() {
        io::ErrorKind::InvalidInput => {
            "MADV_COLLAPSE requires Linux 6.1 or newer, built with transparent huge pages, and a process that \
             has not turned them off (PR_SET_THP_DISABLE)"
        }
        io::ErrorKind::OutOfMemory => "the machine has no contiguous 2 MiB of free memory",
        io::ErrorKind::ResourceBusy => "the memory limit of this process's cgroup is reached",
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

    /// A file in shared memory, with bytes that depend on their offset.
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
        write(&one, HUGE); // written before it is made huge
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

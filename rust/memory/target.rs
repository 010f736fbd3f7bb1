//! The target: the memory that a block is written to. Its pages are made ready part by part.
//!
//! ```text
//!  pages of a part        how it is written
//!  in the page table      directly
//!  in memory, huge        through a second mapping, where address and offset agree modulo 2 MiB
//!  in memory, small       directly, after its page table is filled in
//!  none yet               through the second mapping, as huge pages, if these are cheaper;
//!                         else directly, as small pages
//! ```
//!
//! Pages that are small in the end are made huge in the background, for the readers.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};
use crate::memory::huge::LEAVE_SMALL_FOR;
use crate::memory::prices::Prices;
use crate::memory::region::Region;
use crate::platform::{self, HUGE, Map, PageTable};

/// Memory that is being written.
#[derive(Debug)]
pub struct Target {
    whole: Region,
    page_table: PageTable,
    /// A second mapping of all of it, where pages can be huge. It is made for the first part that
    /// is not in the page table.
    again: OnceLock<Option<Map>>,
    prices: Prices,
    /// Its number in [`TARGETS`].
    number: u64,
}

/// How many targets this process has had.
static TARGETS: AtomicU64 = AtomicU64::new(0);

impl Target {
    /// The target for this memory.
    pub fn of(memory: &[u8]) -> Target {
        Target {
            number: TARGETS.fetch_add(1, Ordering::Relaxed) + 1,
            whole: Region::of(memory),
            page_table: PageTable::open(),
            again: OnceLock::new(),
            prices: Prices::default(),
        }
    }

    /// Makes the pages of a part ready, and returns the part at the address where it is best
    /// written. It judges all pages by the middle one, because those at the ends may belong to a
    /// neighbour that was written.
    ///
    /// (400 MiB that the machine has used before: huge pages 43 ms, small ones 270. Pages that
    /// another process has written: 50 ms if the page table is filled in first, 70 by faults. To
    /// fill in what the page table already has would take 16 ms.)
    ///
    /// Refuses a part that there is no memory for, because a write would be a SIGBUS.
    pub fn ready<'a>(&'a self, part: &'a mut [u8]) -> Result<&'a mut [u8]> {
        let here = Region::of(part);
        let middle = here.address + here.nbytes / 2;
        if !self.page_table.lacks(middle) {
            return Ok(part);
        }
        let fresh = !platform::is_in_memory(middle);
        let huge = match self.again(here) {
            Some((map, there)) if fresh => self.make_huge(map, &there).then_some(there),
            Some((map, there)) => is_huge(map, &there).then_some(there),
            None => None,
        };
        if let Some(there) = huge {
            // SAFETY: these are the same bytes at their second address. Nobody else has the part,
            // and while it is borrowed nobody reads it at the first address.
            return Ok(unsafe { Region::from(there).bytes_mut() });
        }
        let filled = match fresh {
            true => self.prices.make_small(here.addresses()),
            false => platform::fill_to_write(here.addresses()),
        };
        if filled { Ok(part) } else { Err(Error::NoRoom { nbytes: self.whole.nbytes as u64 }) }
    }

    /// The second mapping, and the addresses of a part in it. `None` if no page could be huge.
    fn again(&self, part: Region) -> Option<(&Map, Range<usize>)> {
        let before = part.address.checked_sub(self.whole.address);
        let before = before.filter(|before| before + part.nbytes <= self.whole.nbytes);
        let before = before.expect("a part of the target");
        let map = self.again.get_or_init(|| self.map_again()).as_ref()?;
        let start = map.addresses().start + before;
        Some((map, start..start + part.nbytes))
    }

    fn map_again(&self) -> Option<Map> {
        // SAFETY: whoever has the target keeps the memory mapped, and writes at either address only
        // through it.
        let again = || unsafe { Map::again(self.whole.addresses()) };
        (self.whole.nbytes >= 2 * HUGE).then(|| again().ok())?
    }

    /// Makes fresh pages of a part huge. False if small ones are cheaper.
    fn make_huge(&self, map: &Map, part: &Range<usize>) -> bool {
        self.prices.make_huge(map, huge_pages(map, part)) && platform::fill_to_write(part.clone()) // and the rest
    }

    /// Frees the memory of the target: others need some of it, if memory is short.
    ///
    /// # Safety
    /// Nobody relies on what was written.
    pub unsafe fn give_back(self) {
        // SAFETY: the caller's promise.
        unsafe { platform::give_back(self.whole.addresses()) };
    }

    /// Starts a thread that makes the small pages huge.
    pub fn make_huge_later(mut self) -> Option<JoinHandle<io::Result<()>>> {
        let map = self.again.take().unwrap_or_else(|| self.map_again())?;
        let ours = self.prices.left_some_small();
        if !ours && map.is_huge() != Some(false) {
            return None;
        }
        let collapse = move || {
            if ours {
                return map.collapse_all(|| false);
            }
            // others wrote these pages before; do not delay a program that publishes again and
            // again (418 MiB: 64 ms, not 24)
            thread::sleep(LEAVE_SMALL_FOR);
            map.collapse_all(|| TARGETS.load(Ordering::Relaxed) != self.number)
        };
        // without a thread, or if the kernel refuses, pages stay small
        thread::Builder::new().name("rzc.huge".into()).spawn(collapse).ok()
    }
}

/// The huge pages that start in a part. The last may reach into the next part.
fn huge_pages(map: &Map, part: &Range<usize>) -> Range<usize> {
    let end = part.end.next_multiple_of(HUGE).min(map.huge_range().end);
    part.start.next_multiple_of(HUGE)..end
}

/// Whether a part lies in huge pages, judged by the middle one.
fn is_huge(map: &Map, part: &Range<usize>) -> bool {
    let pages = huge_pages(map, part);
    let middle = pages.start + pages.len() / HUGE / 2 * HUGE;
    !pages.is_empty() && map.huge_nbytes(middle..middle + HUGE).is_some_and(|nbytes| nbytes > 0)
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
mod tests {
    use std::fs::{self, File};

    use memmap2::{MmapMut, MmapOptions};

    use super::*;

    const NBYTES: usize = 6 * HUGE;

    /// A new file, mapped shared from its second page on, as Ray maps its store.
    fn store(folder: &str) -> MmapMut {
        let name = format!("rzc-target-{}-{:?}", std::process::id(), thread::current().id());
        let path = std::path::Path::new(folder).join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        file.set_len(NBYTES as u64 + 4096).unwrap();
        // SAFETY: the file is this test's own.
        unsafe { MmapOptions::new().offset(4096).map_mut(&file) }.unwrap()
    }

    fn huge_nbytes(memory: &[u8]) -> usize {
        // SAFETY: mapped, and nobody writes.
        let again = unsafe { Map::again(Region::of(memory).addresses()) }.unwrap();
        again.huge_nbytes(again.huge_range()).unwrap()
    }

    /// Writes all of it in parts, with bytes that depend on their offset. Returns how many parts
    /// moved to the second mapping.
    fn write(target: &Target, memory: &mut [u8]) -> usize {
        let mut elsewhere = 0;
        for (index, part) in memory.chunks_mut(3 << 20).enumerate() {
            let place = part.as_ptr();
            let part = target.ready(part).unwrap();
            elsewhere += usize::from(part.as_ptr() != place);
            part.iter_mut()
                .enumerate()
                .for_each(|(i, byte)| *byte = ((index * (3 << 20) + i) / 251) as u8);
        }
        assert!(memory.iter().enumerate().all(|(i, &byte)| byte == (i / 251) as u8));
        elsewhere
    }

    #[test]
    fn fresh_pages_of_a_store_are_huge_and_written_again_as_they_are() {
        let mut store = store("/dev/shm");
        let target = Target { prices: Prices::of(1, u64::MAX), ..Target::of(&store) };
        assert!(write(&target, &mut store) > 0);
        assert!(huge_nbytes(&store) > 0);
        write(&Target::of(&store), &mut store);
        store.fill(0); // now they are in the page table
        assert_eq!(write(&Target::of(&store), &mut store), 0);
    }

    #[test]
    fn where_fresh_pages_are_dear_they_are_small_and_made_huge_afterwards() {
        let mut store = store("/dev/shm");
        let target = Target { prices: Prices::of(u64::MAX - 1, 0), ..Target::of(&store) };
        assert_eq!(write(&target, &mut store), 0);
        make_huge_later(target, &store);
    }

    /// Has small pages made huge, and checks that the bytes of [`write`] are the same.
    fn make_huge_later(target: Target, store: &[u8]) {
        assert_eq!(huge_nbytes(store), 0);
        target.make_huge_later().unwrap().join().unwrap().unwrap();
        assert_eq!(huge_nbytes(store), NBYTES - HUGE);
        assert!(store.iter().enumerate().all(|(i, &byte)| byte == (i / 251) as u8));
        assert!(Target::of(store).make_huge_later().is_none());
    }

    #[test]
    fn small_pages_that_others_wrote_are_made_huge_afterwards() {
        let mut store = store("/dev/shm");
        store.fill(7);
        // targets of concurrent tests stop it, so retry
        let made =
            || Target::of(&store).make_huge_later().is_none_or(|thread| thread.join().is_err());
        assert!((0..20).any(|_| made()));
        assert_eq!(huge_nbytes(&store), NBYTES - HUGE);
        assert!(store.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn pages_that_cannot_be_huge_are_written_where_they_are() {
        let mut disk = store(&std::env::temp_dir().to_string_lossy());
        assert_eq!(write(&Target::of(&disk), &mut disk), 0);
        let mut own = MmapMut::map_anon(NBYTES).unwrap();
        assert_eq!(write(&Target::of(&own), &mut own), 0);
        assert!(Target::of(&own).make_huge_later().is_none());
    }
}

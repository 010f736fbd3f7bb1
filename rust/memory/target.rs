//! The target: memory that a block is written to, its pages made ready part by part.
//!
//! ```text
//!  pages of a part                  it is written
//!  in the page table                where it is
//!  in memory, huge                  through a second mapping, where address and offset agree
//!  in memory, small                 where it is, the page table filled in
//!  nowhere                          through the second mapping, made huge where that is the cheaper way;
//!                                   else where it is, filled in with small ones
//! ```
//!
//! What is small in the end is made huge behind the caller's back, for the sake of who reads it.

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
    /// All of it once more, where pages can be huge, once a part was not in the page table.
    again: OnceLock<Option<Map>>,
    prices: Prices,
    /// Which of [`TARGETS`] it is.
    number: u64,
}

/// How many there have been in this process.
static TARGETS: AtomicU64 = AtomicU64::new(0);

impl Target {
    /// The target that is this memory.
    pub fn of(memory: &[u8]) -> Target {
        Target {
            number: TARGETS.fetch_add(1, Ordering::Relaxed) + 1,
            whole: Region::of(memory),
            page_table: PageTable::open(),
            again: OnceLock::new(),
            prices: Prices::default(),
        }
    }

    /// Makes the pages of a part of it ready, judging all by the middle one: those at the ends may be
    /// there for a neighbour's sake. Gives the part where it is best written.
    ///
    /// 400 MiB that the machine has had are written in 43 ms through huge pages, in 270 through small
    /// ones. Of a file whose pages others have written, in 50 with the page table filled, by faults
    /// in 70. To fill in what is there already would take 16.
    ///
    /// Refuses a part that there is no memory for: to write it would be a SIGBUS.
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
            // SAFETY: the same bytes at their second address. Nobody else has the part, and while it
            // is borrowed nobody reads them at the first one.
            return Ok(unsafe { Region::from(there).bytes_mut() });
        }
        let filled = match fresh {
            true => self.prices.make_small(here.addresses()),
            false => platform::fill_to_write(here.addresses()),
        };
        if filled { Ok(part) } else { Err(Error::NoRoom { nbytes: self.whole.nbytes as u64 }) }
    }

    /// The second mapping, and the addresses of a part in it; `None` where no page could be huge.
    fn again(&self, part: Region) -> Option<(&Map, Range<usize>)> {
        let before = part.address.checked_sub(self.whole.address);
        let before = before.filter(|before| before + part.nbytes <= self.whole.nbytes);
        let before = before.expect("a part of the target");
        let map = self.again.get_or_init(|| self.map_again()).as_ref()?;
        let start = map.addresses().start + before;
        Some((map, start..start + part.nbytes))
    }

    fn map_again(&self) -> Option<Map> {
        // SAFETY: who has the target keeps it mapped, and writes at either address through it alone.
        let again = || unsafe { Map::again(self.whole.addresses()) };
        (self.whole.nbytes >= 2 * HUGE).then(|| again().ok())?
    }

    /// Makes fresh pages of a part huge; false where they are better small.
    fn make_huge(&self, map: &Map, part: &Range<usize>) -> bool {
        self.prices.make_huge(map, huge_pages(map, part)) && platform::fill_to_write(part.clone()) // the ends, and what was not collapsed
    }

    /// Gives back what was made ready: of memory that is short, others need some to go on.
    ///
    /// # Safety
    /// Nobody counts on what was written.
    pub unsafe fn give_back(self) {
        // SAFETY: the caller's promise.
        unsafe { platform::give_back(self.whole.addresses()) };
    }

    /// Has what was written into small pages made huge, on a thread that ends with that.
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
            // others wrote here before. Who publishes one after the other is not to be held up: 64 ms for
            // 418 MiB, not 24
            thread::sleep(LEAVE_SMALL_FOR);
            map.collapse_all(|| TARGETS.load(Ordering::Relaxed) != self.number)
        };
        // without a thread, or where the kernel refuses, they stay small
        thread::Builder::new().name("rzc.huge".into()).spawn(collapse).ok()
    }
}

/// The huge pages that start in a part; the last may reach into the next part.
fn huge_pages(map: &Map, part: &Range<usize>) -> Range<usize> {
    let end = part.end.next_multiple_of(HUGE).min(map.huge_range().end);
    part.start.next_multiple_of(HUGE)..end
}

/// Whether a part lies in huge pages, judging by the middle one.
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

    /// A new file, mapped shared from a page in it on, as Ray maps its store.
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

    /// Writes it all in parts, each byte telling where it is, and says how many parts were elsewhere.
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

    /// Has small pages made huge, the bytes that [`write`] wrote as they were.
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
        // the targets of tests beside this one go before it
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

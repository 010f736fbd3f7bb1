//! The target: memory that a block is written to, its pages made ready part by part.
//!
//! ```text
//!  pages                            a part is written
//!  in the page table                where it is
//!  in memory, huge                  through a second mapping, where address and offset agree
//!  in memory, small                 where it is, the page table filled
//!  not in memory                    through the second mapping, made huge where that is the cheaper way;
//!                                   else where it is, filled with small pages
//! ```
//!
//! What is small in the end is made huge behind the caller's back, for the sake of who reads it.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::{io, slice};

use crate::error::{Error, Result};
use crate::memory::huge::{Prices, SETTLED_AFTER};
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

    /// Makes the pages of a part ready, judging all by the middle one: those at the ends may be there
    /// for a neighbour's sake. Gives the part where it is best written.
    ///
    /// 400 MiB that the machine has had are written in 43 ms through huge pages, in 270 through small
    /// ones. Of a file whose pages others have written, in 50 with the page table filled, by faults
    /// in 70. To fill in what is there already would take 16.
    ///
    /// Refuses a part that there is no memory for: to write it would be a SIGBUS.
    pub fn ready<'a>(&'a self, part: &'a mut [u8]) -> Result<&'a mut [u8]> {
        let whole = Region::of(part);
        let middle = whole.address + whole.nbytes / 2;
        if !self.page_table.lacks(middle) {
            return Ok(part);
        }
        let fresh = !platform::is_in_memory(middle);
        if let Some(Region { address, nbytes }) = self.huge(whole, fresh) {
            // SAFETY: the same bytes at their second address. Nobody else has the part, and while it
            // is borrowed nobody reads them at the first one.
            return Ok(unsafe { slice::from_raw_parts_mut(address as *mut u8, nbytes) });
        }
        let fill = || platform::fill_to_write(whole.addresses());
        let filled = if fresh { self.prices.time_small(whole.nbytes, fill) } else { fill() };
        if filled { Ok(part) } else { Err(Error::NoRoom { nbytes: self.whole.nbytes as u64 }) }
    }

    /// The part in the second mapping, if its pages are huge or are made so here.
    fn huge(&self, part: Region, fresh: bool) -> Option<Region> {
        let again = self.again.get_or_init(|| self.map_again()).as_ref()?;
        let address = again.region().address + (part.address - self.whole.address);
        let part = Region { address, ..part };
        // those that start in it; the last may reach into the next part
        let first = address.next_multiple_of(HUGE);
        let end = (address + part.nbytes).next_multiple_of(HUGE).min(again.huge_range().end);
        let chunks = first..end;
        if chunks.is_empty() {
            return None;
        }
        if !fresh {
            let middle = first + chunks.len() / HUGE / 2 * HUGE;
            return (again.huge_nbytes(middle..middle + HUGE)? > 0).then_some(part);
        }
        if !self.prices.prefer_huge() {
            return None;
        }
        let make = |chunks: Range<usize>| {
            chunks.is_empty() || self.prices.time_huge(chunks.len(), || again.make(chunks))
        };
        let made = if self.prices.know_huge() {
            make(chunks)
        } else {
            // the first page of all tells what the others would cost
            let second = first + HUGE;
            make(first..second) && self.prices.prefer_huge() && make(second..chunks.end)
        };
        // the ends, and what was not collapsed
        (made && platform::fill_to_write(part.addresses())).then_some(part)
    }

    fn map_again(&self) -> Option<Map> {
        // SAFETY: who has the target keeps it mapped, and writes at either address through it alone.
        let again = || unsafe { Map::again(self.whole.addresses()) };
        (self.whole.nbytes >= 2 * HUGE).then(|| again().ok())?
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
    pub fn settle(mut self) -> Option<JoinHandle<io::Result<()>>> {
        let again = self.again.take().unwrap_or_else(|| self.map_again())?;
        let left_by_others = !self.prices.left_some_small();
        if left_by_others && again.is_huge() != Some(false) {
            return None;
        }
        // without a thread, or where the kernel refuses, they stay small
        let collapse = move || {
            if !left_by_others {
                return again.collapse_all(|| false);
            }
            // who publishes one after the other is not to be held up: 64 ms for 418 MiB, not 24
            thread::sleep(SETTLED_AFTER);
            again.collapse_all(|| TARGETS.load(Ordering::Relaxed) != self.number)
        };
        thread::Builder::new().name("rzc.huge".into()).spawn(collapse).ok()
    }
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
mod tests {
    use std::fs::{self, File};
    use std::time::Duration;

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
        let target = Target::of(&store);
        target.prices.time_small(1, || thread::sleep(Duration::from_millis(2))); // huge are cheaper
        let whole = Region::of(&store);
        assert!(target.huge(Region { nbytes: 8 << 20, ..whole }, true).is_some());
        assert!(huge_nbytes(&store) > 0);
        write(&target, &mut store);
        write(&Target::of(&store), &mut store);
        store.fill(0); // now they are in the page table
        assert_eq!(write(&Target::of(&store), &mut store), 0);
    }

    #[test]
    fn where_fresh_pages_are_dear_they_are_small_and_made_huge_afterwards() {
        let mut store = store("/dev/shm");
        let target = Target::of(&store);
        target.prices.time_huge(1, || {
            thread::sleep(Duration::from_millis(2));
            Ok(())
        });
        assert_eq!(write(&target, &mut store), 0);
        settle(target, &store);
    }

    /// Has small pages made huge, the bytes that [`write`] wrote as they were.
    fn settle(target: Target, store: &[u8]) {
        assert_eq!(huge_nbytes(store), 0);
        target.settle().unwrap().join().unwrap().unwrap();
        assert_eq!(huge_nbytes(store), NBYTES - HUGE);
        assert!(store.iter().enumerate().all(|(i, &byte)| byte == (i / 251) as u8));
        assert!(Target::of(store).settle().is_none());
    }

    #[test]
    fn small_pages_that_others_wrote_are_made_huge_afterwards() {
        let mut store = store("/dev/shm");
        store.fill(7);
        // the targets of tests beside this one go before it
        let made = || Target::of(&store).settle().is_none_or(|thread| thread.join().is_err());
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
        assert!(Target::of(&own).settle().is_none());
    }
}

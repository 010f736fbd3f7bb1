//! Arena: shared memory for what a loader sets on its modules, lent in lots and given back as these are
//! written.
//!
//! ```text
//!  a file without a name   │█████ lot █│███████████│██  ██lot██│     ░ no pages: a hole
//!                          │░░░░░░░░░░░│▒▒▒▒▒██████│██             ▒ written to the block
//!                          └ huge pages: given back whole          small ones: by the page
//! ```
//!
//! Of huge pages 256 MiB are there in 15 ms and given back in 1, where small ones take 171 and 62, and
//! private memory 148.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use memmap2::{MmapOptions, MmapRaw};

use crate::error::{Error, Result};
use crate::memory::huge::Prices;
use crate::memory::region::Region;
use crate::platform::{self, HUGE, Map};

/// Up to so much is lent in small pages: some of the huge ones are held for a few bytes.
const SMALL: usize = 16 << 20;

/// One part of so many of what is lent may be kept idle besides, as loaders merge in steps; or more, if
/// as much was lent before.
const IDLE: usize = 8;

/// Shared memory of this process, with pages only where lots lie.
#[derive(Debug)]
pub struct Arena {
    memory: Memory,
    lots: Mutex<Lots>,
}

#[derive(Debug, Default)]
struct Lots {
    /// What is free, {start: end}; neighbours are one.
    free: BTreeMap<usize, usize>,
    /// What is lent, by its start.
    lent: BTreeMap<usize, Weak<Lot>>,
    /// Bytes lent, and the most that were.
    nbytes: usize,
    peak: usize,
    /// Free parts of [`HUGE`] bytes that have kept their pages.
    idle: Vec<usize>,
}

/// A part of an arena, at whole pages; dropped, it is free again.
#[derive(Debug)]
pub struct Lot {
    arena: Arc<Arena>,
    region: Region,
    /// Of each huge page that it starts with, the bytes that are not given back.
    held: Mutex<Vec<usize>>,
}

impl Arena {
    /// An arena without any pages, of as many addresses as the machine has memory.
    pub fn new() -> Result<Arc<Arena>> {
        let memory = Memory::new()?;
        let Range { start, end } = memory.map.huge_range();
        let lots = Lots { free: BTreeMap::from([(start, end)]), ..Lots::default() };
        Ok(Arc::new(Arena { memory, lots: Mutex::new(lots) }))
    }

    /// Lends memory, whatever is in it, its page table filled; `None` when all addresses are lent.
    pub fn lend(self: &Arc<Self>, nbytes: usize) -> Option<Arc<Lot>> {
        let size = nbytes.next_multiple_of(platform::page()).max(platform::page());
        let mut lots = lock(&self.lots);
        let huge = if lots.nbytes + nbytes <= SMALL { 0 } else { nbytes / HUGE };
        let start = lots.take(size, if huge > 0 { HUGE } else { platform::page() })?;
        let (region, held) = (Region { address: start, nbytes }, vec![HUGE; huge]);
        let lot = Arc::new(Lot { arena: self.clone(), region, held: Mutex::new(held) });
        lots.lent.insert(start, Arc::downgrade(&lot));
        lots.nbytes += nbytes;
        lots.peak = lots.peak.max(lots.nbytes);
        let pages = start..start + huge * HUGE;
        let fresh = !lots.wake(start..start + size, &pages, &self.memory);
        drop(lots);
        self.memory.make(region, pages, fresh);
        Some(lot)
    }

    /// The lot around an address.
    pub fn lot_at(&self, address: usize) -> Option<Arc<Lot>> {
        let lot = lock(&self.lots).lent.range(..=address).next_back()?.1.upgrade()?;
        (address < lot.region.address + lot.region.nbytes).then_some(lot)
    }

    /// Bytes of the pages that it has.
    pub fn nbytes(&self) -> u64 {
        self.memory.nbytes()
    }
}

impl Lots {
    /// Takes the first free addresses of this size and alignment.
    fn take(&mut self, size: usize, align: usize) -> Option<usize> {
        let fit = |(&start, &end)| {
            let at = usize::next_multiple_of(start, align);
            (at + size <= end).then_some((start, at, end))
        };
        let (start, at, end) = self.free.iter().find_map(fit)?;
        self.free.remove(&start);
        self.free
            .extend([(start, at), (at + size, end)].into_iter().filter(|(start, end)| start < end));
        Some(at)
    }

    /// Uses what is idle among these pages; what is so elsewhere in the addresses goes. True if any was.
    fn wake(&mut self, addresses: Range<usize>, pages: &Range<usize>, memory: &Memory) -> bool {
        let mut woken = false;
        self.idle.retain(|&idle| {
            let apart = idle + HUGE <= addresses.start || addresses.end <= idle;
            if pages.contains(&idle) {
                woken = true;
            } else if !apart {
                memory.punch(idle..idle + HUGE);
            }
            apart
        });
        woken
    }

    /// Gives pages back that are idle, but for so many bytes.
    fn rest(&mut self, nbytes: usize, memory: &Memory) {
        let kept = self.idle.len().min(nbytes / HUGE);
        self.idle.drain(kept..).for_each(|idle| memory.punch(idle..idle + HUGE));
    }

    fn take_back(&mut self, region: Region) {
        let (mut start, mut end) = (region.address, region.address + region.nbytes.max(1));
        end = end.next_multiple_of(platform::page());
        self.lent.remove(&start);
        self.nbytes -= region.nbytes;
        if let Some(after) = self.free.remove(&end) {
            end = after;
        }
        if let Some((&before, &until)) = self.free.range(..start).next_back()
            && until == start
        {
            start = before;
        }
        self.free.insert(start, end);
    }
}

impl Lot {
    /// Its bytes, which whoever holds it may write.
    pub fn region(&self) -> Region {
        self.region
    }

    /// Gives the pages back of which all bytes are given now, or were before: these addresses, each
    /// once only. Small pages go if they lie wholly within.
    pub fn give_back(&self, addresses: Range<usize>) {
        let memory = &self.arena.memory;
        lock(&self.arena.lots).rest(0, memory);
        let mut held = lock(&self.held);
        let mut start = self.region.address;
        for held in held.iter_mut() {
            let given = start.max(addresses.start)..addresses.end.min(start + HUGE);
            *held -= given.len();
            if !given.is_empty() && *held == 0 {
                memory.punch(start..start + HUGE);
            }
            start += HUGE;
        }
        let (page, end) = (platform::page(), self.region.address + self.region.nbytes);
        let stop = if addresses.end < end { addresses.end / page * page } else { end };
        let start = start.max(addresses.start.next_multiple_of(page));
        if start < stop {
            memory.punch(start..stop.next_multiple_of(page));
        }
    }
}

impl Drop for Lot {
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Region { address, nbytes } = self.region;
        let small = address + held.len() * HUGE;
        let end = (address + nbytes).next_multiple_of(platform::page());
        if small < end {
            self.arena.memory.punch(small..end);
        }
        let mut lots = lock(&self.arena.lots);
        let pages = (address..small).step_by(HUGE).zip(held);
        lots.idle.extend(pages.filter(|(_, held)| **held > 0).map(|(start, _)| start));
        lots.take_back(self.region);
        let idle = (lots.nbytes / IDLE).max(lots.peak - lots.nbytes).min(lots.nbytes);
        lots.rest(idle, &self.arena.memory);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file in memory, mapped where its pages can be huge.
#[derive(Debug)]
struct Memory {
    file: File,
    map: Map,
    prices: Prices,
}

impl Memory {
    fn new() -> Result<Memory> {
        Memory::mapped().map_err(|error| Error::refused("shared memory without a name", &error))
    }

    fn mapped() -> io::Result<Memory> {
        let file = platform::nameless_file(platform::memory_nbytes().next_multiple_of(HUGE))?;
        let anywhere: MmapRaw = MmapOptions::new().no_reserve_swap().map_raw(&file)?;
        let start = anywhere.as_ptr().addr();
        // SAFETY: mapped until the end of this function; nobody writes there.
        let map = unsafe { Map::again(start..start + anywhere.len()) }?; // where pages can be huge
        Ok(Memory { file, map, prices: Prices::default() })
    }

    fn nbytes(&self) -> u64 {
        self.file.metadata().map_or(0, |file| 512 * file.blocks())
    }

    /// Makes the pages of a region: some huge if they are fresh, and cheaper than small ones.
    fn make(&self, region: Region, huge: Range<usize>, fresh: bool) {
        // this memory has no file system to be full
        let fill = || {
            let _ = platform::fill_to_write(region.addresses());
        };
        if huge.is_empty() || !fresh {
            fill();
        } else if self.prices.prefer_huge()
            && self.prices.time_huge(huge.len(), || self.map.make(huge))
        {
            fill(); // the rest
        } else {
            self.prices.time_small(region.nbytes, fill);
        }
    }

    /// Frees whole pages.
    fn punch(&self, pages: Range<usize>) {
        let offset = (pages.start - self.map.addresses().start) as u64;
        // SAFETY: no slice of the mapping is ever made, and only what has been written to a block,
        // or that nobody holds any more, is punched.
        unsafe { platform::punch(&self.file, offset, pages.len()) };
    }
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
mod tests {
    use std::slice;

    use proptest::prelude::*;

    use super::*;

    fn bytes<'a>(lot: &Lot) -> &'a mut [u8] {
        let Region { address, nbytes } = lot.region();
        // SAFETY: the lot is the test's alone, which keeps it longer.
        unsafe { slice::from_raw_parts_mut(address as *mut u8, nbytes) }
    }

    const PAGE: usize = 4096;

    /// An arena that has lent so much that it lends huge pages, and what it has lent.
    fn large() -> (Arc<Arena>, Arc<Lot>) {
        let arena = Arena::new().unwrap();
        let lot = arena.lend(SMALL).unwrap();
        (arena, lot)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]

        #[test]
        fn lots_never_overlap_and_leave_no_pages(
            steps in prop::collection::vec(
                (
                    prop_oneof![0..40_000_usize, 0..3 * HUGE],
                    any::<prop::sample::Index>(),
                    any::<prop::sample::Index>(),
                ),
                1..20,
            ),
        ) {
            let (arena, first) = large();
            let mut lots: Vec<(Arc<Lot>, u8)> = Vec::new();
            for (step, (nbytes, index, cut)) in steps.into_iter().enumerate() {
                if step % 3 == 2 && !lots.is_empty() {
                    let (lot, _) = lots.swap_remove(index.index(lots.len()));
                    let Region { address, nbytes } = lot.region();
                    // as it is written to a block: from the front, and some not to the end
                    let cut = address + cut.index(nbytes + 1);
                    if step % 2 == 0 {
                        lot.give_back(address..cut);
                        lot.give_back(cut..address + nbytes);
                    }
                }
                let lot = arena.lend(nbytes).unwrap();
                bytes(&lot).fill(step as u8 + 1);
                lots.push((lot, step as u8 + 1));
            }
            for (lot, mark) in &lots {
                prop_assert!(bytes(lot).iter().all(|byte| byte == mark));
                if lot.region().nbytes > 0 {
                    let last = lot.region().address + lot.region().nbytes - 1;
                    prop_assert!(Arc::ptr_eq(lot, &arena.lot_at(last).unwrap()));
                }
            }
            lots.clear();
            let most = lock(&arena.lots).peak.max(SMALL + SMALL / IDLE);
            prop_assert!(arena.nbytes() as usize <= most);
            drop(first);
            prop_assert_eq!(arena.nbytes(), 0);
            prop_assert_eq!(lock(&arena.lots).free.len(), 1);
        }
    }

    #[test]
    fn what_is_given_back_has_no_pages_and_its_neighbours_keep_their_bytes() {
        let arena = Arena::new().unwrap();
        let lot = arena.lend(10 * PAGE + 100).unwrap();
        bytes(&lot).fill(7);
        let start = lot.region().address;
        lot.give_back(start + 1..start + 3 * PAGE + 5);
        assert_eq!(arena.nbytes(), 9 * PAGE as u64);
        assert!(bytes(&lot)[..PAGE].iter().all(|&byte| byte == 7));
        lot.give_back(start + 3 * PAGE..start + 10 * PAGE + 100);
        assert_eq!(arena.nbytes(), PAGE as u64);
    }

    #[test]
    fn a_huge_page_goes_once_all_of_it_is_given_back() {
        let (arena, first) = large();
        let nbytes = || arena.nbytes() as usize - first.region().nbytes;
        let lot = arena.lend(2 * HUGE + PAGE).unwrap();
        bytes(&lot).fill(7);
        let start = lot.region().address;
        assert_eq!(arena.memory.map.huge_nbytes(start..start + 2 * HUGE), Some(2 * HUGE));
        lot.give_back(start..start + 5);
        lot.give_back(start + HUGE - 5..start + HUGE + 5);
        assert_eq!(nbytes(), 2 * HUGE + PAGE);
        lot.give_back(start + 5..start + HUGE - 5);
        assert_eq!(nbytes(), HUGE + PAGE);
        assert!(bytes(&lot)[HUGE..].iter().all(|&byte| byte == 7));
        lot.give_back(start + HUGE + 5..start + 2 * HUGE + PAGE);
        assert_eq!(nbytes(), 0);
    }

    #[test]
    fn what_is_lent_next_has_the_pages_of_what_was_dropped() {
        let (arena, first) = large();
        drop(arena.lend(2 * HUGE));
        assert_eq!(arena.nbytes() as usize, SMALL + 2 * HUGE);
        let lot = arena.lend(2 * HUGE).unwrap();
        assert_eq!(arena.nbytes() as usize, SMALL + 2 * HUGE);
        first.give_back(first.region().address..first.region().address + SMALL);
        assert_eq!(arena.nbytes() as usize, 2 * HUGE);
        drop(lot);
    }
}

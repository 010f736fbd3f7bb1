//! Arena: shared memory for tensors that a loader casts or merges. It is lent in lots. Each lot is
//! given back while it is written to the block.
//!
//! ```text
//!  a file without a name   │█████│█████│███░░░░│     │▒▒▒▒▒│█████│        ░ free
//!                          └ a lot in units ┘        └ another ┘          ▒ written to the block: goes next
//!                          └ a lot in units ┘        └ another ┘          ▒ written: freed next
//!
//! A forked child has the memory copy-on-write, and frees nothing: the parent still uses it.
//!
//! A unit has 2 MiB, or the rest of a lot. Its pages are freed once all of it has been given back.
//!
//! Units are huge pages where these are cheaper. (340 MiB in lots of 2.25 MiB, relative to small
//! pages: 0.47 of the time to allocate and write, 0.40 to free. Merges that reuse freed lots: 0.65
//! of the time. Medians of 10, interleaved.)

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};

use memmap2::{MmapOptions, MmapRaw};

use crate::error::{Error, Result};
use crate::memory::prices::Prices;
use crate::memory::region::Region;
use crate::platform::{self, HUGE, Map};

/// Because loaders merge in steps, freed units keep their pages: up to 1/8 of the bytes that are lent,
/// or up to the most that was lent before.
const IDLE: usize = 8;

/// Shared memory of this process that has pages only in lots.
#[derive(Debug)]
pub struct Arena {
    memory: Memory,
    lots: Mutex<Lots>,
}

#[derive(Debug, Default)]
struct Lots {
    /// The free ranges, {start: end}. Adjacent ones are joined.
    free: BTreeMap<usize, usize>,
    /// The lots, by their start.
    lent: BTreeMap<usize, Weak<Lot>>,
    /// Bytes lent, and the maximum so far.
    nbytes: usize,
    peak: usize,
    /// Free units of [`HUGE`] bytes that still have their pages.
    idle: Vec<usize>,
}

/// A part of an arena, whole pages. Dropping it frees it.
#[derive(Debug)]
pub struct Lot {
    arena: Arc<Arena>,
    region: Region,
    /// For each unit, the bytes that are not given back.
    left: Mutex<Vec<usize>>,
}

impl Arena {
    /// Makes an arena without pages, as large as the machine's memory.
    pub fn new() -> Result<Arc<Arena>> {
        let memory = Memory::new()?;
        let Range { start, end } = memory.map.huge_range();
        let lots = Lots { free: BTreeMap::from([(start, end)]), ..Lots::default() };
        Ok(Arc::new(Arena { memory, lots: Mutex::new(lots) }))
    }

    /// Lends memory with any content, its page table filled. `None` if no addresses are left.
    pub fn lend(self: &Arc<Self>, nbytes: usize) -> Option<Arc<Lot>> {
        let size = nbytes.next_multiple_of(platform::page()).max(platform::page());
        let mut lots = lock(&self.lots);
        let start = lots.take(size, if nbytes < HUGE { platform::page() } else { HUGE })?;
        let region = Region { address: start, nbytes };
        let left = units(region).map(|unit| unit.len()).collect();
        let lot = Arc::new(Lot { arena: self.clone(), region, left: Mutex::new(left) });
        lots.lent.insert(start, Arc::downgrade(&lot));
        lots.nbytes += nbytes;
        lots.peak = lots.peak.max(lots.nbytes);
        let huge = start..start + nbytes / HUGE * HUGE;
        let fresh = !lots.wake(start..start + size, &huge, &self.memory);
        drop(lots);
        self.memory.make(region, huge, fresh);
        Some(lot)
    }

    /// The lot that contains an address.
    pub fn lot_at(&self, address: usize) -> Option<Arc<Lot>> {
        let lot = lock(&self.lots).lent.range(..=address).next_back()?.1.upgrade()?;
        lot.region.addresses().contains(&address).then_some(lot)
    }
}

/// The units of a lot.
fn units(lot: Region) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = lot.addresses();
    (start..end).step_by(HUGE).map(move |start| start..end.min(start + HUGE))
}

impl Lots {
    /// Takes the first free range of this size and alignment.
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

    /// Makes a lot's addresses free again, and joins them with free neighbours.
    fn take_back(&mut self, lot: Region) {
        let Range { mut start, end } = lot.addresses();
        let mut end = end.max(start + 1).next_multiple_of(platform::page());
        self.lent.remove(&start);
        self.nbytes -= lot.nbytes;
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

    /// Reuses idle units that lie within `huge`, and frees those that only overlap `addresses`.
    /// Returns whether any was reused.
    fn wake(&mut self, addresses: Range<usize>, huge: &Range<usize>, memory: &Memory) -> bool {
        let mut woken = false;
        self.idle.retain(|&idle| {
            let apart = idle + HUGE <= addresses.start || addresses.end <= idle;
            if huge.contains(&idle) {
                woken = true;
            } else if !apart {
                memory.punch(idle..idle + HUGE);
            }
            apart
        });
        woken
    }

    /// Frees idle units, except `nbytes` of them.
    fn rest(&mut self, nbytes: usize, memory: &Memory) {
        let kept = self.idle.len().min(nbytes / HUGE);
        self.idle.drain(kept..).for_each(|idle| memory.punch(idle..idle + HUGE));
    }
}

impl Lot {
    /// Its bytes. Whoever holds the lot may write them.
    pub fn region(&self) -> Region {
        self.region
    }

    /// Gives back these addresses, each only once, and frees the pages of each unit that is given
    /// back completely.
    ///
    /// # Safety
    /// Nobody relies on the bytes, which are zeros afterwards.
    pub unsafe fn give_back(&self, addresses: Range<usize>) {
        lock(&self.arena.lots).rest(0, &self.arena.memory);
        for (unit, left) in units(self.region).zip(lock(&self.left).iter_mut()) {
            let given = unit.start.max(addresses.start)..unit.end.min(addresses.end);
            *left -= given.len();
            if !given.is_empty() && *left == 0 {
                self.arena.memory.punch(unit);
            }
        }
    }
}

impl Drop for Lot {
    fn drop(&mut self) {
        let memory = &self.arena.memory;
        let mut lots = lock(&self.arena.lots);
        let left = self.left.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (unit, _) in units(self.region).zip(left).filter(|(_, left)| **left > 0) {
            match unit.len() {
                HUGE => lots.idle.push(unit.start),
                _ => memory.punch(unit),
            }
        }
        lots.take_back(self.region);
        let idle = (lots.nbytes / IDLE).max(lots.peak - lots.nbytes).min(lots.nbytes);
        lots.rest(idle, memory);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file in memory, mapped at an address where its pages can be huge.
#[derive(Debug)]
struct Memory {
    file: File,
    map: Map,
    prices: Prices,
    /// The process that mapped it.
    process: u32,
}

/// The end and the file of each memory of this process, by its start.
type Mapped = BTreeMap<usize, (usize, RawFd)>;

static MAPPED: Mutex<Mapped> = Mutex::new(Mapped::new());

thread_local! {
    /// What is mapped, while this thread forks.
    static FORKING: Cell<Option<MutexGuard<'static, Mapped>>> = const { Cell::new(None) };
}

extern "C" fn before() {
    FORKING.set(Some(lock(&MAPPED)));
}

extern "C" fn after() {
    FORKING.take();
}

extern "C" fn after_in_child() {
    for (&start, &(end, file)) in FORKING.take().iter().flat_map(|mapped| mapped.iter()) {
        // SAFETY: a memory is in the list while its file is open.
        let file = unsafe { BorrowedFd::borrow_raw(file) };
        // SAFETY: ... and while it is mapped. If the system refuses, it stays shared.
        let _ = unsafe { platform::make_private(start..end, file) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        lock(&MAPPED).remove(&self.map.addresses().start);
    }
}

impl Memory {
    fn new() -> Result<Memory> {
        Memory::mapped().map_err(|error| Error::refused("shared memory of an arena", &error))
    }

    fn mapped() -> io::Result<Memory> {
        let file = platform::nameless_file(platform::memory_nbytes().next_multiple_of(HUGE))?;
        let anywhere: MmapRaw = MmapOptions::new().no_reserve_swap().map_raw(&file)?;
        let start = anywhere.as_ptr().addr();
        // SAFETY: mapped until the end of this function; nobody writes there.
        let map = unsafe { Map::again(start..start + anywhere.len()) }?; // where pages can be huge
        static START: Once = Once::new();
        START.call_once(|| platform::at_fork(before, after, after_in_child));
        let Range { start, end } = map.addresses();
        lock(&MAPPED).insert(start, (end, file.as_raw_fd()));
        Ok(Memory { file, map, prices: Prices::default(), process: process::id() })
    }

    /// Makes the pages of a region. Fresh ones are huge where that is cheaper. This memory has no
    /// file system that could be full.
    fn make(&self, region: Region, huge: Range<usize>, fresh: bool) {
        let wanted = fresh && !huge.is_empty();
        let _ = if wanted && !self.prices.make_huge(&self.map, huge) {
            self.prices.make_small(region.addresses())
        } else {
            platform::fill_to_write(region.addresses()) // the rest
        };
    }

    /// Frees the pages of a unit.
    fn punch(&self, unit: Range<usize>) {
        if self.process != process::id() {
            return; // this is a forked child
        }
        let offset = (unit.start - self.map.addresses().start) as u64;
        // SAFETY: whoever gave the unit back has promised that nobody relies on it;
        // or nobody holds it.
        unsafe {
            platform::punch(&self.file, offset, unit.len().next_multiple_of(platform::page()))
        };
    }
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    const PAGE: usize = 4096;

    fn bytes<'a>(lot: &Lot) -> &'a mut [u8] {
        // SAFETY: only the test has the lot, and keeps it longer.
        unsafe { lot.region().bytes_mut() }
    }

    fn give_back(lot: &Lot, addresses: Range<usize>) {
        // SAFETY: the test reads only bytes that it has not given back.
        unsafe { lot.give_back(addresses) };
    }

    /// Bytes of its pages.
    fn nbytes(arena: &Arena) -> usize {
        512 * arena.memory.file.metadata().unwrap().blocks() as usize
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
            let arena = Arena::new().unwrap();
            let first = arena.lend(16 << 20).unwrap();
            let mut lots: Vec<(Arc<Lot>, u8)> = Vec::new();
            for (step, (nbytes, index, cut)) in steps.into_iter().enumerate() {
                if step % 3 == 2 && !lots.is_empty() {
                    let (lot, _) = lots.swap_remove(index.index(lots.len()));
                    let Region { address, nbytes } = lot.region();
                    // like a lot that is written to a block: from the front, not always to the end
                    let cut = address + cut.index(nbytes + 1);
                    if step % 2 == 0 {
                        give_back(&lot, address..cut);
                        give_back(&lot, cut..address + nbytes);
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
            let most = lock(&arena.lots).peak.max(18 << 20);
            prop_assert!(nbytes(&arena) <= most);
            drop(first);
            prop_assert_eq!(nbytes(&arena), 0);
            prop_assert_eq!(lock(&arena.lots).free.len(), 1);
        }
    }

    #[test]
    fn a_forked_child_has_memory_of_its_own() {
        let arena = Arena::new().unwrap();
        let lots = [PAGE, 3 * HUGE].map(|nbytes| arena.lend(nbytes).unwrap());
        lots.iter().for_each(|lot| bytes(lot).fill(7));
        // SAFETY: the child calls our own functions, which allocate nothing, and `_exit`.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let same = lots.iter().all(|lot| bytes(lot).iter().all(|&byte| byte == 7));
            lots.iter().for_each(|lot| bytes(lot).fill(9));
            lots.iter().for_each(|lot| give_back(lot, lot.region().addresses()));
            // SAFETY: it ends the child, without its exit handlers.
            unsafe { libc::_exit(i32::from(!same)) };
        }
        let mut status = 0;
        // SAFETY: the child was just forked, and the status is an integer.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0);
        assert!(lots.iter().all(|lot| bytes(lot).iter().all(|&byte| byte == 7)));
    }

    #[test]
    fn a_unit_goes_once_all_of_it_is_given_back_and_its_neighbours_keep_their_bytes() {
        let arena = Arena::new().unwrap();
        for size in [10 * PAGE + 100, 2 * HUGE + PAGE] {
            let lot = arena.lend(size).unwrap();
            bytes(&lot).fill(7);
            let (start, end) = (lot.region().address, lot.region().address + size);
            let all = nbytes(&arena);
            assert_eq!(all, size.next_multiple_of(PAGE));
            give_back(&lot, start..start + 5);
            give_back(&lot, end - 5..end);
            assert_eq!(nbytes(&arena), all);
            let unit = (start + HUGE).min(end - 5);
            give_back(&lot, start + 5..unit);
            assert_eq!(nbytes(&arena), if size < HUGE { 0 } else { all - HUGE });
            assert!(bytes(&lot)[unit - start..size - 5].iter().all(|&byte| byte == 7));
            give_back(&lot, unit..end - 5);
            assert_eq!(nbytes(&arena), 0);
        }
    }

    #[test]
    fn a_lot_lies_in_huge_pages_where_these_are_cheaper() {
        for (prices, huge) in [(Prices::of(1, 2), 2 * HUGE), (Prices::of(u64::MAX, 1), 0)] {
            let mut arena = Arena::new().unwrap();
            Arc::get_mut(&mut arena).unwrap().memory.prices = prices;
            let lot = arena.lend(2 * HUGE + PAGE).unwrap();
            let start = lot.region().address;
            assert_eq!(arena.memory.map.huge_nbytes(start..start + 2 * HUGE), Some(huge));
            assert_eq!(nbytes(&arena), 2 * HUGE + PAGE);
        }
    }

    #[test]
    fn what_is_lent_next_has_the_pages_of_what_was_dropped() {
        let arena = Arena::new().unwrap();
        let first = arena.lend(16 << 20).unwrap();
        let region = first.region();
        drop(arena.lend(2 * HUGE));
        assert_eq!(nbytes(&arena), region.nbytes + 2 * HUGE);
        let lot = arena.lend(2 * HUGE).unwrap();
        assert_eq!(nbytes(&arena), region.nbytes + 2 * HUGE);
        give_back(&first, region.addresses());
        assert_eq!(nbytes(&arena), 2 * HUGE);
        drop(lot);
    }
}

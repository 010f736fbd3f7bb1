//! Prices: measures what fresh memory costs in huge and in small pages.
//!
//! On a virtual machine that gives free memory back to its host, huge pages may cost more. (400 MiB
//! of a new store: 1.8 s with the cheaper kind, 3.8 with huge pages only. Medians of 12,
//! interleaved, on a busy machine.) Where the machine has used the memory before, huge pages are
//! always cheaper.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::platform::{self, HUGE, Map};

/// If a fresh huge page takes longer than this, 512 small ones may be cheaper: then both are tried.
///
/// A huge page takes 0.12 to 0.2 ms where the machine has used the memory before, and its small
/// pages 0.7 to 1.5 ms (400 MiB: 130 to 300). On a virtual machine that gives free memory back to
/// its host, a huge page new to the host takes 2 to 13 ms, because the host faults for each 4 KiB.
/// Small pages take as long, or 1.5 ms while they come from leftovers that were never given back.
const DEAR: Duration = Duration::from_millis(1);

/// Stands in for a price: the kernel makes no huge pages here.
const REFUSED: u64 = u64::MAX;

/// How long the last 2 MiB took, in huge and in small pages, in nanoseconds. 0 before the first.
#[derive(Debug, Default)]
pub struct Prices {
    huge: AtomicU64,
    small: AtomicU64,
}

impl Prices {
    /// Makes fresh huge pages for a range of [`Map::huge_range`]. False if small ones are cheaper,
    /// or none can be huge.
    pub fn make_huge(&self, map: &Map, range: Range<usize>) -> bool {
        // the very first huge page is timed alone, before the others are made
        let first = if self.huge.load(Ordering::Relaxed) == 0 { HUGE } else { 0 };
        let second = range.end.min(range.start + first);
        !range.is_empty()
            && [range.start..second, second..range.end]
                .into_iter()
                .filter(|part| !part.is_empty())
                .all(|part| self.prefer_huge() && self.time_huge(map, part))
    }

    /// Makes small pages. False if there is no memory for them.
    pub fn make_small(&self, addresses: Range<usize>) -> bool {
        let (started, nbytes) = (Instant::now(), addresses.len());
        let made = platform::fill_to_write(addresses);
        self.small.store(per_huge_page(started.elapsed(), nbytes), Ordering::Relaxed);
        made
    }

    /// Whether it made small pages that could be huge.
    pub fn left_some_small(&self) -> bool {
        self.small.load(Ordering::Relaxed) > 0 && self.huge.load(Ordering::Relaxed) != REFUSED
    }

    fn prefer_huge(&self) -> bool {
        let huge = self.huge.load(Ordering::Relaxed);
        huge <= DEAR.as_nanos() as u64 || huge <= self.small.load(Ordering::Relaxed)
    }

    fn time_huge(&self, map: &Map, range: Range<usize>) -> bool {
        let (started, nbytes) = (Instant::now(), range.len());
        let took = match map.make(range) {
            // WouldBlock: another thread is writing one of the pages, the others are huge
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => REFUSED,
            _ => per_huge_page(started.elapsed(), nbytes),
        };
        self.huge.store(took, Ordering::Relaxed);
        took != REFUSED
    }

    /// Given prices, in nanoseconds.
    #[cfg(test)]
    pub fn of(huge: u64, small: u64) -> Prices {
        Prices { huge: huge.into(), small: small.into() }
    }
}

/// The time for each 2 MiB.
fn per_huge_page(took: Duration, nbytes: usize) -> u64 {
    (took.as_nanos() as u64).saturating_mul(HUGE as u64) / nbytes as u64
}

//! Prices: what fresh memory costs, in huge pages and in small ones, as it turns out.
//!
//! On a guest that gives free memory back to its host, 400 MiB of a store never written to took 1.8 s by the
//! cheaper way, 3.8 s by huge pages alone (medians of 12, in turns, on a busy machine). Where the machine has
//! had the memory before, huge pages are always the cheaper way.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::platform::{self, HUGE, Map};

/// A fresh huge page that takes longer than this may be dearer than 512 small ones: then both are tried.
///
/// It takes 0.12 to 0.2 ms where the machine has had the memory before, and small ones 0.7 to 1.5 (400
/// MiB in 130 to 300). On a guest that gives free memory back to its host, what is new to it takes 2 to
/// 13 ms, one fault of the host for each 4 KiB. Small pages take as long, or 1.5 ms while they come
/// from the crumbs of memory that was never given back.
const DEAR: Duration = Duration::from_millis(1);

/// In place of nanoseconds: the kernel makes no huge pages here.
const REFUSED: u64 = u64::MAX;

/// How long the last 2 MiB took, huge and small: in nanoseconds, 0 before the first.
#[derive(Debug, Default)]
pub struct Prices {
    huge: AtomicU64,
    small: AtomicU64,
}

impl Prices {
    /// Makes fresh pages of a range of [`Map::huge_range`] huge. False where they are better made small, or
    /// none can be huge.
    pub fn make_huge(&self, map: &Map, range: Range<usize>) -> bool {
        // the first page of all tells what the others would cost
        let first = if self.huge.load(Ordering::Relaxed) == 0 { HUGE } else { 0 };
        let second = range.end.min(range.start + first);
        !range.is_empty()
            && [range.start..second, second..range.end]
                .into_iter()
                .filter(|part| !part.is_empty())
                .all(|part| self.prefer_huge() && self.time_huge(map, part))
    }

    /// Makes small pages; false where there is no memory for them.
    pub fn make_small(&self, addresses: Range<usize>) -> bool {
        let (started, nbytes) = (Instant::now(), addresses.len());
        let made = platform::fill_to_write(addresses);
        self.small.store(per_huge_page(started.elapsed(), nbytes), Ordering::Relaxed);
        made
    }

    /// Whether small pages were made that can be huge.
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
            // a page that another thread is writing: the others are huge
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => REFUSED,
            _ => per_huge_page(started.elapsed(), nbytes),
        };
        self.huge.store(took, Ordering::Relaxed);
        took != REFUSED
    }

    /// Prices as if found so, in nanoseconds.
    #[cfg(test)]
    pub fn of(huge: u64, small: u64) -> Prices {
        Prices { huge: huge.into(), small: small.into() }
    }
}

/// How long each huge page took, had they been such.
fn per_huge_page(took: Duration, nbytes: usize) -> u64 {
    (took.as_nanos() as u64).saturating_mul(HUGE as u64) / nbytes as u64
}

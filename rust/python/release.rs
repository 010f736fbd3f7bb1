//! Release: drops the owners of sources once these are written, so that the node never holds all
//! sources and the whole block together.
//!
//! ```text
//!  sources  ░░░░░░░░░░░░░▒▒▒▒▒████████████     ░ owners dropped
//!  block    █████████████████                  ▒ written, but too few bytes to drop owners yet
//! ```

use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

use crate::format::layout::Span;
use crate::memory::arena::Lot;
use crate::platform;

/// Owners are dropped after each 1/32 of the block ...
const PARTS: usize = 32;

/// ... or after this many bytes, if that is less: to drop takes the interpreter, and a walk through
/// the heap.
const MOST: usize = 64 << 20;

/// The owners of sources, with the spans that are written from these.
pub(super) struct Release {
    /// By rising offset.
    kept: Vec<Kept>,
    written: Mutex<Written>,
    /// Bytes to be written before owners are dropped.
    batch: usize,
}

struct Kept {
    span: Span,
    owner: Mutex<Option<Py<PyAny>>>,
    /// The lot of its source, if others hold it, too: they may let go at any time.
    lot: Mutex<Option<Arc<Lot>>>,
    /// Bytes of the span that are not yet written.
    left: AtomicUsize,
}

/// The bytes and owners since the last drop.
#[derive(Default)]
struct Written {
    nbytes: usize,
    owners: Vec<Py<PyAny>>,
}

/// By rising offset; an empty span comes before the one at the same offset.
fn order(span: &Span) -> (u64, u64) {
    (span.offset, span.nbytes)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Release {
    /// Takes the owner of each span's source.
    pub(super) fn new(spans: &[Span], owners: Vec<Py<PyAny>>) -> Release {
        let keep = |(&span, owner): (&Span, _)| {
            let left = AtomicUsize::new(span.nbytes as usize);
            Kept { span, owner: Mutex::new(Some(owner)), lot: Mutex::default(), left }
        };
        let mut kept: Vec<_> = spans.iter().zip(owners).map(keep).collect();
        kept.sort_unstable_by_key(|kept| order(&kept.span));
        let nbytes: u64 = spans.iter().map(|span| span.nbytes).sum();
        let batch = (nbytes as usize / PARTS).min(MOST);
        Release { kept, written: Mutex::default(), batch }
    }

    /// Keeps the lot of a span until that is written.
    pub(super) fn keep(&self, span: Span, lot: Arc<Lot>) {
        let at = self.kept.binary_search_by_key(&order(&span), |kept| order(&kept.span));
        *lock(&self.kept[at.expect("a span of the block")].lot) = Some(lot);
    }

    /// Notes that a range of the block has been written. Each range comes only once.
    pub(super) fn filled(&self, range: Range<usize>) {
        let start = |kept: &Kept| kept.span.offset as usize;
        let end = |kept: &Kept| start(kept) + kept.span.nbytes as usize;
        let first = self.kept.partition_point(|kept| end(kept) <= range.start);
        let within = self.kept[first..].iter().take_while(|kept| start(kept) < range.end);
        let owners = within.filter_map(|kept| {
            let nbytes = end(kept).min(range.end).saturating_sub(start(kept).max(range.start));
            let all = kept.left.fetch_sub(nbytes, Ordering::AcqRel) == nbytes;
            if !all {
                return None;
            }
            drop(lock(&kept.lot).take());
            lock(&kept.owner).take()
        });
        let owners: Vec<_> = owners.collect();
        let mut written = lock(&self.written);
        written.nbytes += range.len();
        written.owners.extend(owners);
        if written.nbytes >= self.batch {
            let written = mem::take(&mut *written);
            Python::attach(|_| drop(written));
            platform::trim();
        }
    }
}

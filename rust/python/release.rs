//! Release: what keeps the sources goes once these are written, so that the node never has all of
//! them beside all of the block.
//!
//! ```text
//!  sources  ░░░░░░░░░░░░░▒▒▒▒▒████████████     ░ their owners are dropped
//!  block    █████████████████                  ▒ written, and not many enough to be dropped yet
//! ```

use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

use crate::format::layout::Span;
use crate::platform;

/// One of so many parts of a block is written before owners are dropped ...
const PARTS: usize = 32;

/// ... and at most so many bytes: each time takes the interpreter, and a walk through the heap.
const MOST: usize = 64 << 20;

/// Owners by the spans that are made of what they keep.
pub(super) struct Release {
    /// By rising offset.
    kept: Vec<Kept>,
    written: Mutex<Written>,
    /// Bytes that are written before owners are dropped.
    batch: usize,
}

struct Kept {
    span: Span,
    owner: Mutex<Option<Py<PyAny>>>,
    /// Bytes that are not written yet.
    left: AtomicUsize,
}

/// What was written since owners were dropped the last time.
#[derive(Default)]
struct Written {
    nbytes: usize,
    owners: Vec<Py<PyAny>>,
}

impl Release {
    /// Takes on the owner of each span's source.
    pub(super) fn new(spans: &[Span], owners: Vec<Py<PyAny>>) -> Release {
        let keep = |(&span, owner): (&Span, _)| {
            let left = AtomicUsize::new(span.nbytes as usize);
            Kept { span, owner: Mutex::new(Some(owner)), left }
        };
        let mut kept: Vec<_> = spans.iter().zip(owners).map(keep).collect();
        kept.sort_unstable_by_key(|kept| (kept.span.offset, kept.span.nbytes));
        let nbytes: u64 = spans.iter().map(|span| span.nbytes).sum();
        let batch = (nbytes as usize / PARTS).min(MOST);
        Release { kept, written: Mutex::default(), batch }
    }

    /// Takes note of a range of the block that has been written: each once only.
    pub(super) fn filled(&self, range: Range<usize>) {
        let start = |kept: &Kept| kept.span.offset as usize;
        let end = |kept: &Kept| start(kept) + kept.span.nbytes as usize;
        let first = self.kept.partition_point(|kept| end(kept) <= range.start);
        let within = self.kept[first..].iter().take_while(|kept| start(kept) < range.end);
        let owners = within.filter_map(|kept| {
            let nbytes = end(kept).min(range.end).saturating_sub(start(kept).max(range.start));
            let all = kept.left.fetch_sub(nbytes, Ordering::AcqRel) == nbytes;
            all.then(|| kept.owner.lock().unwrap_or_else(PoisonError::into_inner).take())?
        });
        let owners: Vec<_> = owners.collect();
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.nbytes += range.len();
        written.owners.extend(owners);
        if written.nbytes >= self.batch {
            let written = mem::take(&mut *written);
            Python::attach(|_| drop(written));
            platform::trim();
        }
    }
}

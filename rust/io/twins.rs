//! Twins: finds the spans that have the bytes of a storage already.
//!
//! ```text
//!  storages   │ a │ b │ head │ c │        first guess: the next span of the same size; else look for
//!               │   │          │          the checksum; then compare each pair byte by byte
//!  spans      │ a │ b │ c │ other │
//! ```

use std::collections::{BTreeSet, HashMap};
use std::hash::Hasher;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use twox_hash::XxHash3_64;

use crate::error::Result;
use crate::format::checksum::{CHUNK, combine};
use crate::io::bounce::Bounce;
use crate::io::fill::within;
use crate::io::source::{Source, trace};
use crate::memory::region::Region;

/// With fewer chunks, a second thread costs more than it saves.
const ALONE: usize = 8;

/// Bytes of a sample.
const SAMPLE: usize = 256;

/// Storages to look for, in memory or in mapped files. They are only read.
pub struct Storages {
    lengths: Vec<usize>,
    /// The offset of each storage, if each started at a multiple of a chunk ...
    starts: Vec<usize>,
    /// ... and the sources for that target.
    sources: Vec<(u64, Source)>,
}

/// Spans by their size.
type BySize = HashMap<usize, BTreeSet<usize>>;

/// A chunk of a storage.
struct Piece {
    /// Its index among the storages asked for.
    asked: usize,
    storage: usize,
    range: Range<usize>,
}

impl Storages {
    /// Takes the storages in these regions.
    pub fn of(regions: &[Region]) -> Storages {
        let lengths: Vec<_> = regions.iter().map(|region| region.nbytes).collect();
        let mut end = 0;
        let start = |nbytes: &usize| {
            let start = end;
            end += nbytes.next_multiple_of(CHUNK) + CHUNK; // a gap, so no two become one source
            start
        };
        let starts: Vec<_> = lengths.iter().map(start).collect();
        let sources = trace(starts.iter().map(|&start| start as u64).zip(regions.iter().copied()));
        Storages { lengths, starts, sources }
    }

    /// For each storage, a span with the same bytes. No two storages get the same span, so they
    /// stay distinct. `sums` are the checksums of the spans.
    ///
    /// # Safety
    /// The storages are readable, and nobody writes them meanwhile.
    pub unsafe fn find(&self, spans: &[&[u8]], sums: &[u64]) -> Result<Vec<Option<usize>>> {
        let mut found = vec![None; self.lengths.len()];
        let (guesses, mut free) = self.guesses(spans);
        // SAFETY: the caller's promise.
        for (&(storage, span), same) in guesses.iter().zip(unsafe { self.equal(spans, &guesses) }?)
        {
            if same {
                found[storage] = Some(span);
            } else {
                free.entry(spans[span].len()).or_default().insert(span);
            }
        }
        let might = |&index: &usize| {
            let same_size = free.get(&self.lengths[index]);
            found[index].is_none() && same_size.is_some_and(|same_size| !same_size.is_empty())
        };
        let missing: Vec<_> = (0..self.lengths.len()).filter(might).collect();
        let mut by_sum: HashMap<(usize, u64), Vec<usize>> = HashMap::new();
        for &span in free.values().flatten() {
            by_sum.entry((spans[span].len(), sums[span])).or_default().push(span);
        }
        // SAFETY: the caller's promise.
        let its_sums = unsafe { self.sums(&missing) }?;
        let alike = missing.into_iter().zip(its_sums).filter_map(|(storage, sum)| {
            Some((storage, by_sum.get_mut(&(self.lengths[storage], sum))?.pop()?))
        });
        let alike: Vec<_> = alike.collect();
        // SAFETY: the caller's promise.
        for (&(storage, span), same) in alike.iter().zip(unsafe { self.equal(spans, &alike) }?) {
            found[storage] = same.then_some(span);
        }
        Ok(found)
    }

    /// As [`Storages::find`], but compares a storage only with the next span of the same size, and
    /// finds nothing if samples show that less than a quarter of the bytes can be found.
    ///
    /// # Safety
    /// As for [`Storages::find`].
    pub unsafe fn find_in_order(&self, spans: &[&[u8]]) -> Result<Vec<Option<usize>>> {
        let mut found = vec![None; self.lengths.len()];
        let (mut guesses, _) = self.guesses(spans);
        // SAFETY: the caller's promise.
        let mut alike = unsafe { self.alike(spans, &guesses) }?.into_iter();
        guesses.retain(|_| alike.next() == Some(true));
        let nbytes: usize = guesses.iter().map(|&(storage, _)| self.lengths[storage]).sum();
        if nbytes < self.lengths.iter().sum::<usize>() / 4 {
            return Ok(found);
        }
        // SAFETY: the caller's promise.
        for (&(storage, span), same) in guesses.iter().zip(unsafe { self.equal(spans, &guesses) }?)
        {
            found[storage] = same.then_some(span);
        }
        Ok(found)
    }

    /// Pairs each storage with the next free span of its size, and returns the spans left by size.
    fn guesses(&self, spans: &[&[u8]]) -> (Vec<(usize, usize)>, BySize) {
        let mut free = BySize::new();
        for (index, span) in spans.iter().enumerate().filter(|(_, span)| !span.is_empty()) {
            free.entry(span.len()).or_default().insert(index);
        }
        let mut next = 0;
        let guess = |(index, nbytes): (usize, &usize)| {
            let same_size = free.get_mut(nbytes)?;
            let span = *same_size.range(next..).next().or_else(|| same_size.first())?;
            same_size.remove(&span);
            next = span + 1;
            Some((index, span))
        };
        let guesses = self.lengths.iter().enumerate().filter_map(guess).collect();
        (guesses, free)
    }

    /// For each pair of a storage and a span of the same length: whether samples of their bytes, at
    /// the start, in the middle and at the end, are equal.
    ///
    /// # Safety
    /// As for [`Storages::find`].
    unsafe fn alike(&self, spans: &[&[u8]], pairs: &[(usize, usize)]) -> Result<Vec<bool>> {
        let mut bounce = Bounce::new(1, false)?;
        let slot = bounce.slots().next().expect("one slot");
        let mut found = Vec::with_capacity(pairs.len());
        for (asked, &(storage, span)) in pairs.iter().enumerate() {
            let (nbytes, mut same) = (self.lengths[storage], true);
            for start in [0, nbytes / 2, nbytes.saturating_sub(SAMPLE)] {
                let range = start..nbytes.min(start + SAMPLE);
                let compare = |at: usize, bytes: &[u8]| {
                    same &= spans[span][at..at + bytes.len()] == *bytes;
                };
                // SAFETY: the caller's promise.
                unsafe { self.read(&Piece { asked, storage, range }, slot, compare) }?;
                if !same {
                    break;
                }
            }
            found.push(same);
        }
        Ok(found)
    }

    /// For each pair of a storage and a span of the same length: whether their bytes are equal.
    ///
    /// # Safety
    /// As for [`Storages::find`].
    unsafe fn equal(&self, spans: &[&[u8]], pairs: &[(usize, usize)]) -> Result<Vec<bool>> {
        let same: Vec<_> = pairs.iter().map(|_| AtomicBool::new(true)).collect();
        let compare = |piece: &Piece, slot: &mut [u8]| {
            let (same, span) = (&same[piece.asked], spans[pairs[piece.asked].1]);
            if !same.load(Ordering::Relaxed) {
                return Ok(());
            }
            let compare = |at: usize, bytes: &[u8]| {
                if span[at..at + bytes.len()] != *bytes {
                    same.store(false, Ordering::Relaxed);
                }
            };
            // SAFETY: the caller's promise.
            unsafe { self.read(piece, slot, compare) }
        };
        self.each(pairs.iter().map(|&(storage, _)| storage), compare)?;
        Ok(same.into_iter().map(AtomicBool::into_inner).collect())
    }

    /// The checksums of some storages, as if they were spans.
    ///
    /// # Safety
    /// As for [`Storages::find`].
    unsafe fn sums(&self, some: &[usize]) -> Result<Vec<u64>> {
        let lengths = || some.iter().map(|&storage| self.lengths[storage]);
        let mut chunks = 0;
        let first = |nbytes: usize| {
            let first = chunks;
            chunks += nbytes.div_ceil(CHUNK);
            first
        };
        let firsts: Vec<_> = lengths().map(first).collect();
        let sums: Vec<_> = (0..chunks).map(|_| AtomicU64::new(0)).collect();
        let sum = |piece: &Piece, slot: &mut [u8]| {
            let mut hasher = XxHash3_64::new();
            // SAFETY: the caller's promise.
            unsafe { self.read(piece, slot, |_, bytes| hasher.write(bytes)) }?;
            let at = firsts[piece.asked] + piece.range.start / CHUNK;
            sums[at].store(hasher.finish(), Ordering::Relaxed);
            Ok(())
        };
        self.each(some.iter().copied(), sum)?;
        let sums: Vec<_> = sums.into_iter().map(AtomicU64::into_inner).collect();
        Ok(combine(lengths(), &sums))
    }

    /// Calls `show` with the bytes of a piece, part by part, each with its offset in the storage.
    ///
    /// # Safety
    /// As for [`Storages::find`].
    unsafe fn read(
        &self,
        piece: &Piece,
        slot: &mut [u8],
        mut show: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let start = self.starts[piece.storage];
        let range = start + piece.range.start..start + piece.range.end;
        for (source, target, own) in within(&self.sources, range) {
            // SAFETY: the caller's promise.
            show(target.start - start, unsafe { source.bytes(own, slot) }?);
        }
        Ok(())
    }

    /// Calls a function with each chunk of some storages, from several threads.
    fn each(
        &self,
        some: impl Iterator<Item = usize>,
        act: impl Fn(&Piece, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<()> {
        let pieces = some.enumerate().flat_map(|(asked, storage)| {
            let nbytes = self.lengths[storage];
            let range = move |start| start..nbytes.min(start + CHUNK);
            let ranges = (0..nbytes).step_by(CHUNK).map(range);
            ranges.map(move |range| Piece { asked, storage, range })
        });
        let pieces: Vec<_> = pieces.collect();
        let next = AtomicUsize::new(0);
        let act = |slot: &mut [u8]| {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                act(piece, slot)?;
            }
            Ok(())
        };
        let several = thread::available_parallelism().map_or(1, usize::from).min(8);
        let threads = if pieces.len() < ALONE { 1 } else { several };
        let mut bounce = Bounce::new(threads, false)?;
        thread::scope(|scope| {
            let mut slots = bounce.slots().take(threads);
            let own_slot = slots.next().expect("one thread at least");
            // if the system gives fewer threads, these do the work
            let start = |slot| thread::Builder::new().spawn_scoped(scope, || act(slot)).ok();
            let others: Vec<_> = slots.map_while(start).collect();
            let own = act(own_slot);
            others.into_iter().fold(own, |done, other| {
                done.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::checksum;

    fn find(storages: &[&[u8]], spans: &[&[u8]]) -> Vec<Option<usize>> {
        let regions: Vec<_> = storages.iter().map(|bytes| Region::of(bytes)).collect();
        // SAFETY: the slices are borrowed until it returns.
        unsafe { Storages::of(&regions).find(spans, &checksum::sums(spans)) }.unwrap()
    }

    fn slices(owned: &[Vec<u8>]) -> Vec<&[u8]> {
        owned.iter().map(|bytes| &bytes[..]).collect()
    }

    proptest! {
        #[test]
        fn each_storage_finds_a_span_of_its_own_if_there_is_one(
            storages in prop::collection::vec(prop::collection::vec(0u8..2, 0..4), 0..20),
            spans in prop::collection::vec(prop::collection::vec(0u8..2, 0..4), 0..20),
        ) {
            let (storages, spans) = (slices(&storages), slices(&spans));
            let found = find(&storages, &spans);
            let mut taken: Vec<_> = found.iter().flatten().collect();
            taken.sort_unstable();
            prop_assert!(taken.windows(2).all(|two| two[0] != two[1]));
            for (storage, span) in storages.iter().zip(&found) {
                prop_assert!(span.is_none_or(|span| spans[span] == *storage && !storage.is_empty()));
            }
            let count = |all: &[&[u8]], bytes: &[u8]| all.iter().filter(|&&other| other == bytes).count();
            for storage in storages.iter().filter(|storage| !storage.is_empty()) {
                let same = found.iter().flatten().filter(|&&span| spans[span] == *storage).count();
                prop_assert_eq!(same, count(&storages, storage).min(count(&spans, storage)));
            }
        }
    }

    #[test]
    fn in_order_a_storage_is_compared_with_the_next_span_of_its_size() {
        let long = |seed: u8| vec![seed; 2 * CHUNK + 5];
        let spans = [long(1), long(2), long(3), long(4)];
        let find = |storages: &[Vec<u8>]| {
            let (storages, spans) = (slices(storages), slices(&spans));
            let regions: Vec<_> = storages.iter().map(|bytes| Region::of(bytes)).collect();
            // SAFETY: the slices are borrowed until it returns.
            unsafe { Storages::of(&regions).find_in_order(&spans) }.unwrap()
        };
        let mut changed = long(2);
        changed[CHUNK + 9] = 7; // between two samples
        assert_eq!(find(&[long(1), changed, long(7), long(4)]), [Some(0), None, None, Some(3)],);
        assert_eq!(find(&[long(4), long(1)]), [None, None]); // elsewhere
        assert_eq!(find(&[long(1), long(7), long(7), long(7), long(7)]), [None; 5]); // too few
    }

    #[test]
    fn what_was_moved_and_what_is_long_is_found() {
        let long =
            |seed: u8| (0..3 * CHUNK + 5).map(|at| (at / 7) as u8 ^ seed).collect::<Vec<_>>();
        let spans = [long(1), long(2), long(3), vec![7; 40]];
        let mut changed = long(2);
        changed[2 * CHUNK] ^= 1;
        let storages = [vec![7; 40], long(3), changed, long(1)];
        let (storages, spans) = (slices(&storages), slices(&spans));
        let found = find(&storages, &spans);
        assert_eq!(found, [Some(3), Some(2), None, Some(0)]);
    }
}

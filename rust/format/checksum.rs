//! Checksums: they detect damaged spans.
//!
//! The checksum of a span is the XXH3 (64 bits) of its bytes. If the span is longer than a chunk,
//! it is the XXH3 of its chunks' checksums, 8 bytes each, little-endian. So several threads can
//! share a span, and a thread sums each chunk while it is in the processor's cache.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;

use twox_hash::XxHash3_64;

use crate::error::{Error, Result};
use crate::format::layout::Span;

/// Bytes in a chunk. Part of the format: never change.
pub const CHUNK: usize = 1 << 20;

/// With fewer bytes, a second thread costs more than it saves.
const SUM_ALONE: usize = 4 << 20;

/// The XXH3 of bytes: the checksum of a span of at most one chunk.
pub fn xxh3(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// The XXH3 of numbers, 8 bytes each, little-endian.
pub fn xxh3_of(numbers: &[u64]) -> u64 {
    xxh3(&numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>())
}

/// The checksums of spans of these lengths, from the checksums of all their chunks in order.
pub fn combine(lengths: impl Iterator<Item = usize>, mut chunks: &[u64]) -> Vec<u64> {
    let of_span = |nbytes: usize| {
        let (own, rest) = chunks.split_at(nbytes.div_ceil(CHUNK));
        chunks = rest;
        match own {
            [] => xxh3(&[]),
            [chunk] => *chunk,
            _ => xxh3_of(own),
        }
    };
    lengths.map(of_span).collect()
}

/// The checksum of each of these slices, as if it were a span. Uses several threads if that is
/// faster.
pub fn sums(spans: &[&[u8]]) -> Vec<u64> {
    let chunks: Vec<_> = spans.iter().flat_map(|bytes| bytes.chunks(CHUNK)).collect();
    let threads = match chunks.iter().map(|chunk| chunk.len()).sum() {
        0..SUM_ALONE => 1,
        _ => thread::available_parallelism().map_or(1, usize::from).min(8),
    };
    let mut sums = vec![0; chunks.len()];
    let share = chunks.len().div_ceil(threads).max(1);
    let shares = Mutex::new(sums.chunks_mut(share).zip(chunks.chunks(share)));
    let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
    let sum_shares = || {
        while let Some((sums, chunks)) = next() {
            sums.iter_mut().zip(chunks).for_each(|(sum, chunk)| *sum = xxh3(chunk));
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // if the system gives fewer threads, these share the work
            let _ = thread::Builder::new().spawn_scoped(scope, sum_shares);
        }
        sum_shares();
    });
    combine(spans.iter().map(|bytes| bytes.len()), &sums)
}

/// The chunks of spans, by rising offset. [`Chunks::combine`] puts their checksums back into the
/// order of the spans.
#[derive(Debug)]
pub struct Chunks {
    /// The range of each chunk in the block.
    pub ranges: Vec<Range<usize>>,
    order: Vec<usize>,
    lengths: Vec<usize>,
}

impl Chunks {
    /// Cuts spans into chunks. Refuses spans that overlap.
    pub fn of(spans: &[Span]) -> Result<Chunks> {
        let mut by_offset: Vec<_> = (0..spans.len()).collect();
        by_offset.sort_by_key(|&span| (spans[span].offset, spans[span].nbytes));
        let mut end = 0;
        for &span in &by_offset {
            let Span { offset, .. } = spans[span];
            if offset < end {
                return Err(Error::Overlap { span, offset });
            }
            end = spans[span].end()?;
        }
        let lengths: Vec<_> = spans.iter().map(|span| span.nbytes as usize).collect();
        let mut first = vec![0; spans.len()]; // index of each span's first chunk
        for span in 1..spans.len() {
            first[span] = first[span - 1] + lengths[span - 1].div_ceil(CHUNK);
        }
        let (mut ranges, mut order) = (Vec::new(), Vec::new());
        for span in by_offset {
            let Range { start, end } = spans[span].offset as usize..spans[span].end()? as usize;
            for (index, start) in (start..end).step_by(CHUNK).enumerate() {
                ranges.push(start..end.min(start + CHUNK));
                order.push(first[span] + index);
            }
        }
        Ok(Chunks { ranges, order, lengths })
    }

    /// The checksum of each span, in the order of the spans, from the checksums of the chunks.
    pub fn combine(&self, sums: &[u64]) -> Vec<u64> {
        let mut in_order = vec![0; sums.len()];
        self.order.iter().zip(sums).for_each(|(&index, &sum)| in_order[index] = sum);
        combine(self.lengths.iter().copied(), &in_order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_published_hash() {
        assert_eq!(xxh3(b""), 0x2d06_8005_38d3_94c2); // the value of the reference implementation
    }

    #[test]
    fn spans_that_share_bytes_are_refused() {
        let spans = [Span { offset: 128, nbytes: 100 }, Span { offset: 64, nbytes: 65 }];
        let refused = Chunks::of(&spans).unwrap_err();
        assert_eq!(refused, Error::Overlap { span: 0, offset: 128 });
    }
}

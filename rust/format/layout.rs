//! The layout: the offset of each storage in the block, and the segments in which Ray writes it.
//!
//! ```text
//!           ┌ packed ────────────────────────────┐┌ segment ─┐┌ segment ─┐┌ segment ┐
//!  block    │ header │ checksums │ 1 │ 3 │ pad   ││ span 0 ..  .. span 0 ││ span 2  │
//!           0        64                                                           nbytes
//! ```
//!
//! Small storages come first. `put` writes the whole block itself. Where Ray writes it, as for the
//! return value of a task, it takes segments: one with all small storages packed, and each large
//! storage straight from the model, in one segment or several.

use std::ops::Range;

use crate::error::{Error, Result};

/// Every span and every segment starts at a multiple of this, as Ray's buffers do.
pub const ALIGN: u64 = 64;

/// Bytes of the header, at the start of the block.
pub const HEADER_NBYTES: u64 = 64;

/// Bytes of a span's checksum. The checksums follow the header.
pub const CHECKSUM_NBYTES: u64 = 8;

/// Ray aligns buffers of at least this size to [`ALIGN`], smaller ones to 8.
const MIN_SEGMENT: u64 = 2048;

/// Smaller storages are packed: each segment costs the reader 0.85 us in `ray.get`.
const PACK_BELOW: u64 = 16 << 10;

/// Up to 1 MiB, Ray copies in the calling thread. Above, it starts threads, which takes 0.25 ms ...
const SEGMENT: usize = 1 << 20;

/// ... and pays from this size on. (418 MiB: segments of 1 MiB 42 ms, of 2 MiB 75, of 8 MiB 42, one
/// segment 31.)
const WHOLE_FROM: usize = 8 << 20;

/// The place of one storage in the block, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte, a multiple of [`ALIGN`].
    pub offset: u64,
    /// Bytes of the storage between the first and the last that a tensor uses.
    pub nbytes: u64,
}

/// A plan of spans, without bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// One span for each storage, in the order they were given.
    pub spans: Vec<Span>,
    /// Bytes of the first segment: the header, the checksums and all small storages.
    pub packed_nbytes: u64,
    /// Bytes in the whole block.
    pub nbytes: u64,
}

/// The next multiple of [`ALIGN`].
pub fn align_up(nbytes: u64) -> Result<u64> {
    nbytes.checked_next_multiple_of(ALIGN).ok_or(Error::Overflow { what: "the block" })
}

/// The used part of a storage: from the first to the last byte that any of its `extents` touches.
///
/// Its start is rounded down to [`ALIGN`], so that elements of every size stay aligned.
pub fn used(extents: impl IntoIterator<Item = Range<u64>>) -> Range<u64> {
    let hull = extents.into_iter().reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
    hull.map_or(0..0, |hull| hull.start - hull.start % ALIGN..hull.end)
}

impl Layout {
    /// Plans a span for each of these lengths, the small ones first.
    pub fn plan(storages: impl IntoIterator<Item = u64>) -> Result<Layout> {
        let mut spans: Vec<_> =
            storages.into_iter().map(|nbytes| Span { offset: 0, nbytes }).collect();
        let mut end = HEADER_NBYTES + CHECKSUM_NBYTES * spans.len() as u64;
        for span in spans.iter_mut().filter(|span| span.is_small()) {
            span.offset = align_up(end)?;
            end = span.end()?;
        }
        end = align_up(end)?.max(MIN_SEGMENT);
        let packed_nbytes = end;
        for span in spans.iter_mut().filter(|span| !span.is_small()) {
            span.offset = align_up(end)?;
            end = span.end()?;
        }
        Ok(Layout { spans, packed_nbytes, nbytes: end })
    }

    /// The segments after the first, by rising offset: the span of each, and its range in that
    /// span. Each starts at the next multiple of [`ALIGN`].
    pub fn segments(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let large = self.spans.iter().enumerate().filter(|(_, span)| !span.is_small());
        large
            .flat_map(|(index, span)| segments(span.nbytes as usize).map(move |part| (index, part)))
    }

    /// Bytes of the block that belong to no storage: header, checksums and alignment.
    pub fn padding(&self) -> u64 {
        self.nbytes - self.spans.iter().map(|span| span.nbytes).sum::<u64>()
    }
}

impl Span {
    /// Whether it is packed with others.
    pub fn is_small(&self) -> bool {
        self.nbytes < PACK_BELOW
    }

    /// One past its last byte.
    pub fn end(&self) -> Result<u64> {
        self.offset.checked_add(self.nbytes).ok_or(Error::Overflow { what: "a span's end" })
    }
}

/// Cuts a storage into segments that Ray copies fast: one, or several of about the same length.
fn segments(nbytes: usize) -> impl Iterator<Item = Range<usize>> {
    let count = if nbytes < WHOLE_FROM { nbytes.div_ceil(SEGMENT) } else { 1 };
    let size =
        if count > 1 { nbytes.div_ceil(count).next_multiple_of(ALIGN as usize) } else { nbytes };
    (0..count).map(move |i| i * size..nbytes.min((i + 1) * size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_model_is_one_header() {
        let layout = Layout::plan([]).unwrap();
        assert_eq!((layout.packed_nbytes, layout.nbytes), (MIN_SEGMENT, MIN_SEGMENT));
        assert_eq!(layout.segments().count(), 0);
    }

    #[test]
    fn small_storages_are_packed_and_large_ones_travel_by_themselves() {
        let layout = Layout::plan([3 << 20, 100, 64 << 20, 7]).unwrap();
        assert_eq!(layout.spans[1], Span { offset: 128, nbytes: 100 });
        assert_eq!(layout.spans[3], Span { offset: 256, nbytes: 7 });
        assert_eq!(layout.spans[0], Span { offset: MIN_SEGMENT, nbytes: 3 << 20 });
        assert_eq!(layout.segments().count(), 3 + 1);
    }

    #[test]
    fn what_overflows_is_refused() {
        assert!(Layout::plan([u64::MAX]).is_err());
        assert!(Layout::plan([u64::MAX, u64::MAX]).is_err());
    }

    #[test]
    fn the_used_part_is_the_hull_and_keeps_alignment() {
        assert_eq!(used([]), 0..0);
        assert_eq!(used([100..200, 400..404]), 64..404);
    }

    proptest! {
        #[test]
        fn spans_are_aligned_and_apart_and_segments_tile_the_block(
            sizes in prop::collection::vec(
                prop_oneof![0..100_u64, 0..32_u64 << 10, 0..20_u64 << 20, Just((1 << 20) + 1)],
                0..40,
            ),
        ) {
            let layout = Layout::plan(sizes.iter().copied()).unwrap();
            let mut spans: Vec<_> = layout.spans.iter().filter(|span| span.nbytes > 0).collect();
            spans.sort_by_key(|span| span.offset);
            prop_assert!(layout.spans.iter().map(|span| span.nbytes).eq(sizes.iter().copied()));
            prop_assert!(layout.spans.iter().all(|span| span.offset % ALIGN == 0));
            prop_assert!(spans.windows(2).all(|w| w[0].end().unwrap() <= w[1].offset));
            let header = HEADER_NBYTES + CHECKSUM_NBYTES * sizes.len() as u64;
            prop_assert!(spans.first().is_none_or(|span| span.offset >= header));
            prop_assert_eq!(layout.padding(), layout.nbytes - sizes.iter().sum::<u64>());

            // small spans lie in the first segment; each byte of the others lies in one segment, in
            // order
            for span in layout.spans.iter().filter(|span| span.is_small()) {
                prop_assert!(span.end().unwrap() <= layout.packed_nbytes);
            }
            prop_assert!(layout.packed_nbytes >= MIN_SEGMENT);
            let (mut end, mut left) = (layout.packed_nbytes, sizes.clone());
            for (span, part) in layout.segments() {
                let offset = layout.spans[span].offset + part.start as u64;
                prop_assert_eq!(offset, align_up(end).unwrap());
                prop_assert!(part.len() as u64 >= MIN_SEGMENT);
                prop_assert_eq!(left[span], sizes[span] - part.start as u64);
                left[span] -= part.len() as u64;
                end = offset + part.len() as u64;
            }
            prop_assert_eq!(end, layout.nbytes);
            prop_assert!(layout.spans.iter().zip(left).all(|(span, left)| span.is_small() || left == 0));
        }
    }
}

//! The layout: where each storage lies in the block, and how the bytes travel there.
//!
//! ```text
//!           ┌ packed ─────────────────────────┐┌ piece ────┐┌ piece ────┐┌ piece ─┐
//!  block    │ header │ span 1 │ span 3 │ pad  ││ span 0 ...  ... span 0 ││ span 2 │
//!           0        64                                                          nbytes
//! ```
//!
//! Small storages come first, copied into one packed segment. Each larger one is a segment by
//! itself, or several adjacent pieces: Ray copies them straight from the model.

use std::ops::Range;

use crate::error::{Error, Result};

/// Every span and every segment starts at a multiple of this many bytes, as Ray's buffers do.
pub const ALIGN: u64 = 64;

/// Bytes at the start of the block that hold its header.
pub const HEADER_NBYTES: u64 = 64;

/// Ray lays buffers of at least this size out at multiples of [`ALIGN`], smaller ones at 8.
const MIN_SEGMENT: u64 = 2048;

/// Storages below this are packed: a segment of its own costs the reader 0.85 us at `ray.get`.
const PACK_BELOW: u64 = 16 << 10;

/// Ray copies up to 1 MiB in the caller and starts threads, 0.25 ms a time, above it ...
const PIECE: u64 = 1 << 20;

/// ... which pays from here on. Measured on 418 MiB: pieces of 1 MiB 42 ms, of 2 MiB 75 ms, of
/// 8 MiB 42 ms, one piece 31 ms.
const WHOLE_FROM: u64 = 8 << 20;

/// Where one storage lies in the block, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte, a multiple of [`ALIGN`].
    pub offset: u64,
    /// Bytes of the storage that any tensor uses.
    pub nbytes: u64,
}

/// A run of the block that travels as one buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// The header and all small storages, copied together.
    Packed {
        /// Indices of the spans it holds.
        spans: Vec<usize>,
        /// Its length, padding included.
        nbytes: u64,
    },
    /// Some or all bytes of one storage, where the model keeps them.
    Piece {
        /// Index of the span.
        span: usize,
        /// Bytes within the used part of the storage.
        bytes: Range<u64>,
    },
}

/// A plan of spans and segments, without bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// One span for each storage, in the order they were given.
    pub spans: Vec<Span>,
    /// The block from first to last byte; all but the last are multiples of [`ALIGN`] or are
    /// followed by padding up to one.
    pub segments: Vec<Segment>,
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
    /// Lays storages of these sizes out, each once.
    pub fn plan(nbytes: &[u64]) -> Result<Layout> {
        let mut spans: Vec<_> = nbytes.iter().map(|&nbytes| Span { offset: 0, nbytes }).collect();
        let (small, large): (Vec<_>, Vec<_>) =
            (0..spans.len()).partition(|&span| nbytes[span] < PACK_BELOW);
        let mut end = HEADER_NBYTES;
        for &span in &small {
            end = spans[span].place(end)?;
        }
        end = align_up(end)?.max(MIN_SEGMENT);
        let mut segments = vec![Segment::Packed { spans: small, nbytes: end }];
        for span in large {
            end = spans[span].place(end)?;
            segments.extend(pieces(nbytes[span]).map(|bytes| Segment::Piece { span, bytes }));
        }
        Ok(Layout { spans, segments, nbytes: end })
    }

    /// Bytes of the block that belong to no storage: the header and what alignment costs.
    pub fn padding(&self) -> u64 {
        self.nbytes - self.spans.iter().map(|span| span.nbytes).sum::<u64>()
    }
}

impl Span {
    /// Moves the span to the first aligned byte from `end` on, and gives its own end.
    fn place(&mut self, end: u64) -> Result<u64> {
        self.offset = align_up(end)?;
        self.end()
    }

    /// One past its last byte.
    pub fn end(&self) -> Result<u64> {
        self.offset.checked_add(self.nbytes).ok_or(Error::Overflow { what: "a span's end" })
    }
}

/// How a large storage is cut, as Ray's copier likes it: whole, or evenly, so that no piece is small.
fn pieces(nbytes: u64) -> impl Iterator<Item = Range<u64>> {
    let count = if nbytes < WHOLE_FROM { nbytes.div_ceil(PIECE) } else { 1 };
    let size = if count > 1 { nbytes.div_ceil(count).next_multiple_of(ALIGN) } else { nbytes };
    (0..count).map(move |i| i * size..nbytes.min((i + 1) * size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_model_is_one_header() {
        let layout = Layout::plan(&[]).unwrap();
        assert_eq!(layout.segments, [Segment::Packed { spans: vec![], nbytes: MIN_SEGMENT }]);
        assert_eq!(layout.nbytes, MIN_SEGMENT);
    }

    #[test]
    fn small_storages_are_packed_and_large_ones_travel_by_themselves() {
        let layout = Layout::plan(&[3 << 20, 100, 64 << 20, 7]).unwrap();
        assert_eq!(layout.spans[1], Span { offset: 64, nbytes: 100 });
        assert_eq!(layout.spans[3], Span { offset: 192, nbytes: 7 });
        assert_eq!(layout.spans[0], Span { offset: MIN_SEGMENT, nbytes: 3 << 20 });
        assert_eq!(layout.segments.len(), 1 + 3 + 1);
    }

    #[test]
    fn what_overflows_is_refused() {
        assert!(Layout::plan(&[u64::MAX]).is_err());
        assert!(Layout::plan(&[1 << 63, 1 << 63]).is_err());
    }

    #[test]
    fn the_used_part_is_the_hull_and_keeps_alignment() {
        assert_eq!(used([]), 0..0);
        assert_eq!(used([100..200, 400..404]), 64..404);
    }

    proptest! {
        #[test]
        fn spans_are_aligned_and_apart_and_segments_tile_the_block(
            nbytes in prop::collection::vec(
                prop_oneof![0u64..100, 0u64..(32 << 10), 0u64..(20 << 20)], 0..40),
        ) {
            let layout = Layout::plan(&nbytes).unwrap();
            let mut spans: Vec<_> = layout.spans.iter().filter(|span| span.nbytes > 0).collect();
            spans.sort_by_key(|span| span.offset);
            prop_assert!(layout.spans.iter().all(|span| span.offset % ALIGN == 0));
            prop_assert!(spans.windows(2).all(|w| w[0].end().unwrap() <= w[1].offset));
            prop_assert!(spans.first().is_none_or(|span| span.offset >= HEADER_NBYTES));

            let mut end = 0;
            for segment in &layout.segments {
                let start = align_up(end).unwrap();
                end = start + match segment {
                    Segment::Packed { spans, nbytes } => {
                        for &span in spans {
                            prop_assert!(layout.spans[span].end().unwrap() <= *nbytes);
                        }
                        *nbytes
                    }
                    Segment::Piece { span, bytes } => {
                        prop_assert_eq!(layout.spans[*span].offset + bytes.start, start);
                        bytes.end - bytes.start
                    }
                };
                prop_assert!(end - start >= MIN_SEGMENT);
            }
            prop_assert_eq!(end, layout.nbytes);
            let used: u64 = nbytes.iter().sum();
            prop_assert_eq!(layout.padding(), layout.nbytes - used);
        }
    }
}

//! The layout: where each storage lies in the block, and how the bytes travel there.
//!
//! ```text
//!           ┌ packed ────────────────────────────┐┌ piece ───┐┌ piece ───┐┌ piece ──┐
//!  block    │ header │ checksums │ 1 │ 3 │ pad   ││ span 0 ..  .. span 0 ││ span 2  │
//!           0        64                                                           nbytes
//! ```
//!
//! Small storages come first. `put` writes the block as it is drawn. Where Ray is to write it, as it
//! does what a task returns, it travels in segments: the small storages packed into one, the others
//! copied straight from the model, in one piece or several.

use std::ops::Range;

use crate::error::{Error, Result};

/// Every span and every segment starts at a multiple of this many bytes, as Ray's buffers do.
pub const ALIGN: u64 = 64;

/// Bytes at the start of the block that hold its header.
pub const HEADER_NBYTES: u64 = 64;

/// Bytes of one span's checksum; all of them follow the header.
pub const CHECKSUM_NBYTES: u64 = 8;

/// Ray lays buffers of at least this size out at multiples of [`ALIGN`], smaller ones at 8.
const MIN_SEGMENT: u64 = 2048;

/// Storages below this are packed: a segment of its own costs the reader 0.85 us at `ray.get`.
const PACK_BELOW: u64 = 16 << 10;

/// Ray copies up to 1 MiB in the caller and starts threads, 0.25 ms a time, above it ...
const PIECE: usize = 1 << 20;

/// ... which pays from here on. Measured on 418 MiB: pieces of 1 MiB 42 ms, of 2 MiB 75 ms, of
/// 8 MiB 42 ms, one piece 31 ms.
const WHOLE_FROM: usize = 8 << 20;

/// Where one storage lies in the block, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte, a multiple of [`ALIGN`].
    pub offset: u64,
    /// Bytes of the storage that any tensor uses.
    pub nbytes: u64,
}

/// Memory somewhere in this process, that somebody else keeps alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Address of the first byte.
    pub address: usize,
    /// Length in bytes.
    pub nbytes: usize,
}

/// A part of the block that travels as one buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// The header and all small storages, copied together.
    Packed {
        /// Indices of the spans it holds.
        spans: Vec<usize>,
        /// Its length, padding included.
        nbytes: u64,
    },
    /// Memory of the model: a storage, or a part of one.
    Piece(Piece),
}

/// A plan of spans and segments, without bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// One span for each storage, in the order they were given.
    pub spans: Vec<Span>,
    /// The block from first to last byte, each segment at the next multiple of [`ALIGN`].
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
    /// Lays storages out, each once, the small ones first.
    pub fn plan(storages: &[Piece]) -> Result<Layout> {
        let span = |piece: &Piece| Span { offset: 0, nbytes: piece.nbytes as u64 };
        let mut spans: Vec<_> = storages.iter().map(span).collect();
        let (small, large): (Vec<_>, Vec<_>) =
            (0..spans.len()).partition(|&span| spans[span].nbytes < PACK_BELOW);
        let mut end = HEADER_NBYTES + CHECKSUM_NBYTES * spans.len() as u64;
        for &span in &small {
            spans[span].offset = align_up(end)?;
            end = spans[span].end()?;
        }
        end = align_up(end)?.max(MIN_SEGMENT);
        let mut segments = vec![Segment::Packed { spans: small, nbytes: end }];
        for span in large {
            spans[span].offset = align_up(end)?;
            end = spans[span].end()?;
            segments.extend(pieces(storages[span]));
        }
        Ok(Layout { spans, segments, nbytes: end })
    }

    /// Each storage with the offset of its span.
    pub fn place(&self, storages: &[Piece]) -> impl Iterator<Item = (u64, Piece)> {
        self.spans.iter().map(|span| span.offset).zip(storages.iter().copied())
    }

    /// Bytes of the block that belong to no storage: header, checksums, and what alignment costs.
    pub fn padding(&self) -> u64 {
        self.nbytes - self.spans.iter().map(|span| span.nbytes).sum::<u64>()
    }
}

impl Span {
    /// One past its last byte.
    pub fn end(&self) -> Result<u64> {
        self.offset.checked_add(self.nbytes).ok_or(Error::Overflow { what: "a span's end" })
    }
}

/// Cuts a storage as Ray's copier likes it: whole, or evenly, so that no piece is small.
fn pieces(storage: Piece) -> impl Iterator<Item = Segment> {
    let nbytes = storage.nbytes;
    let count = if nbytes < WHOLE_FROM { nbytes.div_ceil(PIECE) } else { 1 };
    let size =
        if count > 1 { nbytes.div_ceil(count).next_multiple_of(ALIGN as usize) } else { nbytes };
    (0..count).map(move |i| {
        let start = i * size;
        Segment::Piece(Piece { address: storage.address + start, nbytes: size.min(nbytes - start) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Storages of these sizes with these many bytes between them.
    fn storages(gaps_and_sizes: &[(usize, usize)]) -> Vec<Piece> {
        let mut end = 1 << 20;
        let mut place = |&(gap, nbytes): &(usize, usize)| {
            let address = end + gap;
            end = address + nbytes;
            Piece { address, nbytes }
        };
        gaps_and_sizes.iter().map(&mut place).collect()
    }

    #[test]
    fn an_empty_model_is_one_header() {
        let layout = Layout::plan(&[]).unwrap();
        assert_eq!(layout.segments, [Segment::Packed { spans: vec![], nbytes: MIN_SEGMENT }]);
        assert_eq!(layout.nbytes, MIN_SEGMENT);
    }

    #[test]
    fn small_storages_are_packed_and_large_ones_travel_by_themselves() {
        let storages = storages(&[(0, 3 << 20), (0, 100), (0, 64 << 20), (0, 7)]);
        let layout = Layout::plan(&storages).unwrap();
        assert_eq!(layout.spans[1], Span { offset: 128, nbytes: 100 });
        assert_eq!(layout.spans[3], Span { offset: 256, nbytes: 7 });
        assert_eq!(layout.spans[0], Span { offset: MIN_SEGMENT, nbytes: 3 << 20 });
        assert_eq!(layout.segments.len(), 1 + 3 + 1);
    }

    #[test]
    fn what_overflows_is_refused() {
        let huge = Piece { address: 0, nbytes: usize::MAX };
        assert!(Layout::plan(&[huge]).is_err());
        assert!(Layout::plan(&[huge, huge]).is_err());
    }

    #[test]
    fn the_used_part_is_the_hull_and_keeps_alignment() {
        assert_eq!(used([]), 0..0);
        assert_eq!(used([100..200, 400..404]), 64..404);
    }

    fn gaps_and_sizes() -> impl Strategy<Value = Vec<(usize, usize)>> {
        let gap = prop_oneof![Just(0), Just(64), 0usize..9000];
        let size = prop_oneof![0usize..100, 0usize..(32 << 10), 0usize..(20 << 20)];
        prop::collection::vec((gap, size), 0..40)
    }

    proptest! {
        #[test]
        fn spans_are_aligned_and_apart_and_segments_tile_the_block(
            gaps_and_sizes in gaps_and_sizes(),
        ) {
            let storages = storages(&gaps_and_sizes);
            let layout = Layout::plan(&storages).unwrap();
            let mut spans: Vec<_> = layout.spans.iter().filter(|span| span.nbytes > 0).collect();
            spans.sort_by_key(|span| span.offset);
            prop_assert!(layout.spans.iter().all(|span| span.offset % ALIGN == 0));
            prop_assert!(spans.windows(2).all(|w| w[0].end().unwrap() <= w[1].offset));
            prop_assert!(spans.first().is_none_or(|span| span.offset >= HEADER_NBYTES));

            let mut end = 0;
            let mut lies_at = Vec::new(); // offset in the block and memory there
            for segment in &layout.segments {
                let start = align_up(end).unwrap();
                let nbytes = match segment {
                    Segment::Packed { spans, nbytes } => {
                        for &span in spans {
                            prop_assert!(layout.spans[span].end().unwrap() <= *nbytes);
                        }
                        *nbytes
                    }
                    Segment::Piece(piece) => {
                        lies_at.push((start, *piece));
                        piece.nbytes as u64
                    }
                };
                prop_assert!(nbytes >= MIN_SEGMENT);
                end = start + nbytes;
            }
            prop_assert_eq!(end, layout.nbytes);
            let used: u64 = storages.iter().map(|storage| storage.nbytes as u64).sum();
            prop_assert_eq!(layout.padding(), layout.nbytes - used);

            // every large storage finds its own memory at its span
            for (storage, span) in storages.iter().zip(&layout.spans) {
                let offset_in = |&(at, piece): &(u64, Piece)| {
                    let within = span.offset.checked_sub(at)? as usize;
                    (within < piece.nbytes).then_some(piece.address + within)
                };
                if span.nbytes >= PACK_BELOW {
                    prop_assert_eq!(lies_at.iter().find_map(offset_in), Some(storage.address));
                }
            }
        }
    }
}

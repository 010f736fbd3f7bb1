//! The block: packed and checked where it is written, put together again where it came in pieces.
//!
//! A block starts with a header of 64 bytes: magic `RZCB`, version (4), bytes in the block (8), the
//! fingerprint of its table (8), zeros.

use std::ops::Range;
use std::slice;
use std::thread;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::layout::{ALIGN, HEADER_NBYTES, Layout, Piece, Segment, Span, align_up};

const MAGIC: &[u8; 8] = b"RZCB\x01\0\0\0";

/// Below this a second thread costs more than it saves.
const COPY_ALONE: usize = 8 << 20;

impl Piece {
    /// The bytes.
    ///
    /// # Safety
    /// They are readable, and nobody writes them, for as long as the slice lives.
    pub unsafe fn bytes<'a>(self) -> &'a [u8] {
        if self.nbytes == 0 {
            return &[]; // an empty storage has address 0
        }
        // SAFETY: not null, since not empty; readable and unwritten for 'a by the caller's promise.
        unsafe { slice::from_raw_parts(self.address as *const u8, self.nbytes) }
    }
}

/// The header of a block.
pub fn header(nbytes: u64, fingerprint: u64) -> [u8; HEADER_NBYTES as usize] {
    let mut header = [0; HEADER_NBYTES as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&nbytes.to_le_bytes());
    header[16..24].copy_from_slice(&fingerprint.to_le_bytes());
    header
}

/// Whether the bytes at the start of a block are the header that belongs to its table.
pub fn check_header(start: &[u8], fingerprint: u64) -> Result<()> {
    let word = |at: usize| start.get(at..at + 8).map_or([0; 8], |word| word.try_into().unwrap());
    let found = u64::from_le_bytes(word(16));
    if word(0) == *MAGIC && found == fingerprint {
        Ok(())
    } else {
        Err(Error::ForeignBlock { expected: fingerprint, found })
    }
}

/// The packed segment: the header, then the small storages at their spans.
///
/// # Safety
/// Each storage that the segment holds is readable, and nobody writes it meanwhile.
pub unsafe fn pack(layout: &Layout, storages: &[Piece], fingerprint: u64) -> Vec<u8> {
    let Some(Segment::Packed { spans, nbytes }) = layout.segments.first() else {
        return Vec::new();
    };
    let mut packed = vec![0; *nbytes as usize];
    packed[..HEADER_NBYTES as usize].copy_from_slice(&header(layout.nbytes, fingerprint));
    for &span in spans {
        // SAFETY: the caller's promise for each storage.
        let bytes = unsafe { storages[span].bytes() };
        let start = layout.spans[span].offset as usize;
        packed[start..start + bytes.len()].copy_from_slice(bytes);
    }
    packed
}

/// Whether the pieces lie as the layout has them: each at the next aligned address after the one
/// before. Refuses pieces that are not `nbytes` long together.
pub fn is_contiguous(pieces: &[Piece], nbytes: u64) -> Result<bool> {
    let mut end = 0;
    let mut contiguous = true;
    for piece in pieces {
        let start = align_up(end)?;
        let address = pieces[0].address as u64 + start;
        contiguous &= piece.address as u64 == address;
        end = start + piece.nbytes as u64;
    }
    if end != nbytes {
        return Err(Error::BlockLength { expected: nbytes, found: end });
    }
    Ok(contiguous)
}

/// The pieces in private memory of our own, page-aligned, each where the layout has it.
///
/// # Safety
/// The pieces are readable, nobody writes them meanwhile, and together they are `nbytes` long, as
/// [`is_contiguous`] has checked.
pub unsafe fn copy(pieces: &[Piece], nbytes: u64) -> Result<MmapMut> {
    let mut block = MmapMut::map_anon(nbytes as usize)
        .map_err(|error| Error::Unsupported { reason: format!("{nbytes} bytes: {error}") })?;
    let mut rest: &mut [u8] = &mut block;
    for piece in pieces {
        // SAFETY: the caller's promise for each piece.
        let bytes = unsafe { piece.bytes() };
        let padded = rest.len().min(bytes.len().next_multiple_of(ALIGN as usize));
        let (target, next) = rest.split_at_mut(padded);
        copy_parallel(&mut target[..bytes.len()], bytes);
        rest = next;
    }
    Ok(block)
}

/// The ranges of a block that belong to no span and are not its header, in order.
pub fn between(spans: &[Span], nbytes: u64) -> Vec<Range<u64>> {
    let mut spans: Vec<_> = spans.iter().map(|span| (span.offset, span.nbytes)).collect();
    spans.sort_unstable();
    let mut end = HEADER_NBYTES;
    let mut between = Vec::new();
    for (offset, length) in spans.into_iter().chain([(nbytes, 0)]) {
        if offset > end {
            between.push(end..offset);
        }
        end = end.max(offset + length);
    }
    between
}

/// Copies with as many threads as there are cores, where that pays.
pub fn copy_parallel(target: &mut [u8], source: &[u8]) {
    let threads = match source.len() {
        0..COPY_ALONE => 1,
        _ => thread::available_parallelism().map_or(1, usize::from).min(8),
    };
    let share = source.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        let mut shares = target.chunks_mut(share).zip(source.chunks(share));
        let own = shares.next();
        for (target, source) in shares {
            scope.spawn(|| target.copy_from_slice(source));
        }
        if let Some((target, source)) = own {
            target.copy_from_slice(source);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece(bytes: &[u8]) -> Piece {
        Piece { address: bytes.as_ptr() as usize, nbytes: bytes.len() }
    }

    proptest! {
        #[test]
        fn what_was_packed_lies_at_its_span(
            storages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..20),
        ) {
            let pieces: Vec<_> = storages.iter().map(|bytes| piece(bytes)).collect();
            let layout = Layout::plan(&pieces, false).unwrap();
            // SAFETY: the storages live and are only read.
            let packed = unsafe { pack(&layout, &pieces, 42) };
            prop_assert_eq!(check_header(&packed, 42), Ok(()));
            for (span, bytes) in layout.spans.iter().zip(&storages) {
                let start = span.offset as usize;
                prop_assert_eq!(&packed[start..start + bytes.len()], bytes.as_slice());
            }
        }

        #[test]
        fn a_copy_has_every_piece_at_an_aligned_place(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..9),
        ) {
            let mut expected: Vec<u8> = Vec::new();
            for bytes in &pieces {
                expected.resize(expected.len().next_multiple_of(64), 0);
                expected.extend(bytes);
            }
            let nbytes = expected.len() as u64;
            let pieces: Vec<_> = pieces.iter().map(|bytes| piece(bytes)).collect();
            is_contiguous(&pieces, nbytes).unwrap();
            // SAFETY: the pieces live and are only read; their length was checked above.
            let copy = unsafe { copy(&pieces, nbytes) }.unwrap();
            prop_assert_eq!(&copy[..], expected.as_slice());
        }
    }

    #[test]
    fn what_lies_between_spans_is_all_but_them_and_the_header() {
        let span = |offset, nbytes| Span { offset, nbytes };
        let spans = [span(256, 10), span(64, 64), span(320, 0), span(320, 64)];
        assert_eq!(between(&spans, 400), [128..256, 266..320, 384..400]);
        assert_eq!(between(&[], 64), []);
    }

    #[test]
    fn a_large_copy_is_the_same_as_a_small_one() {
        let source: Vec<u8> = (0..COPY_ALONE + 12345).map(|i| (i % 251) as u8).collect();
        let mut target = vec![0; source.len()];
        copy_parallel(&mut target, &source);
        assert!(target == source);
    }

    #[test]
    fn a_block_of_another_length_or_table_is_refused() {
        let bytes = [0; 128];
        let halves = [piece(&bytes[..64]), piece(&bytes[64..])];
        assert_eq!(is_contiguous(&halves, 128), Ok(true));
        assert_eq!(is_contiguous(&[halves[1], halves[0]], 128), Ok(false));
        let error = is_contiguous(&halves[..1], 128).unwrap_err();
        assert_eq!(error, Error::BlockLength { expected: 128, found: 64 });
        let error = check_header(&header(128, 7), 8).unwrap_err();
        assert_eq!(error, Error::ForeignBlock { expected: 8, found: 7 });
        assert!(check_header(&[1, 2, 3], 8).is_err());
    }
}

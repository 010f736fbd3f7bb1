//! The block: packed and checked where it is written, put together again where it came in pieces.
//!
//! A block starts with a header of 64 bytes: magic `RZCB`, version (4), bytes in the block (8), the
//! fingerprint of its table (8), zeros.

use std::slice;
use std::sync::atomic::{self, Ordering};
use std::thread;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::layout::{ALIGN, HEADER_NBYTES, Layout, Piece, Segment, align_up};
use crate::page_table::PageTable;

const MAGIC: &[u8; 8] = b"RZCB\x01\0\0\0";

/// Below this a second thread costs more than it saves.
const COPY_ALONE: usize = 8 << 20;

/// The part of a target whose pages are filled in at once, where they are not in the page table. To
/// ask about one takes 2 us.
const FILLED_AT_ONCE: usize = 8 << 20;

/// Below this the caches are the better way.
#[cfg(target_arch = "x86_64")]
const STREAM_FROM: usize = 64 << 10;

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
    let small = spans.iter().map(|&span| (layout.spans[span].offset, storages[span]));
    let mut packed = vec![0; *nbytes as usize];
    // SAFETY: the caller's promise for each storage.
    unsafe { place(small.collect(), &mut packed) };
    packed[..HEADER_NBYTES as usize].copy_from_slice(&header(layout.nbytes, fingerprint));
    packed
}

/// The whole block, each storage at its span; the rest of `target` is cleared.
///
/// The header comes last: whoever finds it finds all the rest.
///
/// # Safety
/// Each storage is readable, and nobody writes it meanwhile.
pub unsafe fn write(layout: &Layout, storages: &[Piece], fingerprint: u64, target: &mut [u8]) {
    let spans = layout.spans.iter().map(|span| span.offset);
    // SAFETY: the caller's promise.
    unsafe { place(spans.zip(storages.iter().copied()).collect(), target) };
    atomic::fence(Ordering::Release);
    target[..HEADER_NBYTES as usize].copy_from_slice(&header(layout.nbytes, fingerprint));
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
    let mut end = 0;
    let mut placed = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let start = align_up(end)?;
        placed.push((start, *piece));
        end = start + piece.nbytes as u64;
    }
    // SAFETY: the caller's promise.
    unsafe { place(placed, &mut block) };
    Ok(block)
}

/// Copies pieces to their offsets, which do not overlap, and clears what lies between.
///
/// With as many threads as there are cores, where that pays, whatever the pieces' sizes.
///
/// # Safety
/// The pieces are readable, and nobody writes them meanwhile.
unsafe fn place(mut pieces: Vec<(u64, Piece)>, target: &mut [u8]) {
    pieces.retain(|(_, piece)| piece.nbytes > 0);
    pieces.sort_unstable_by_key(|&(offset, _)| offset);
    let threads = match target.len() {
        0..COPY_ALONE => 1,
        _ => thread::available_parallelism().map_or(1, usize::from).min(8),
    };
    let share = target.len().div_ceil(threads).next_multiple_of(ALIGN as usize);
    let (page_table, pieces) = (&PageTable::open(), &pieces);
    let place_share = |start: usize, share: &mut [u8]| {
        for (index, part) in share.chunks_mut(FILLED_AT_ONCE).enumerate() {
            page_table.fill_to_write(part);
            // SAFETY: the caller's promise.
            unsafe { place_part(pieces, start + index * FILLED_AT_ONCE, part) };
        }
    };
    thread::scope(|scope| {
        let mut shares = target.chunks_mut(share.max(1)).enumerate();
        let own = shares.next();
        for (index, part) in shares {
            scope.spawn(move || place_share(index * share, part));
        }
        if let Some((_, part)) = own {
            place_share(0, part);
        }
    });
}

/// The part of [`place`] that starts at this offset.
///
/// # Safety
/// As for `place`.
unsafe fn place_part(pieces: &[(u64, Piece)], start: usize, target: &mut [u8]) {
    let begins = |&(offset, _): &(u64, Piece)| offset as usize;
    let ends = |placed: &(u64, Piece)| begins(placed) + placed.1.nbytes;
    let stop = start + target.len();
    let mut end = start;
    let first = pieces.partition_point(|placed| ends(placed) <= start);
    for placed in pieces[first..].iter().take_while(|placed| begins(placed) < stop) {
        let (from, to) = (begins(placed).max(start), ends(placed).min(stop));
        // SAFETY: the caller's promise.
        let bytes = unsafe { placed.1.bytes() };
        target[end - start..from - start].fill(0);
        let bytes = &bytes[from - begins(placed)..to - begins(placed)];
        copy_bytes(&mut target[from - start..to - start], bytes);
        end = to;
    }
    target[end - start..].fill(0);
}

/// Copies, past the caches where there is much of it.
///
/// A streaming store does not first read what it overwrites: a third less of memory's work. The
/// C library's `memcpy` streams too, but only what is longer than most storages (48 MiB on one
/// machine). 400 MiB by two threads, in pieces of 1 MiB: 39 ms streaming, 67 with `memcpy`.
fn copy_bytes(target: &mut [u8], source: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if source.len() >= STREAM_FROM && target.as_ptr().addr().is_multiple_of(ALIGN as usize) {
        return stream(target, source);
    }
    target.copy_from_slice(source);
}

/// Copies with streaming stores; the target starts at a multiple of [`ALIGN`].
///
/// Never inlined: among the registers of its callers the loop is up to 8 % slower.
#[cfg(target_arch = "x86_64")]
#[inline(never)]
fn stream(target: &mut [u8], source: &[u8]) {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_NTA, _mm_loadu_si128, _mm_prefetch, _mm_sfence, _mm_stream_si128,
    };
    const LINE: usize = 64;
    // bytes; the processor's own prefetching falls behind: 48 ms without, 39 with 384 to 768
    const AHEAD: usize = 512;

    let (lines, rest) = target.as_chunks_mut::<LINE>();
    let (source_lines, source_rest) = source.as_chunks::<LINE>();
    for (line, source) in lines.iter_mut().zip(source_lines) {
        // SAFETY: a hint, which may be of any address.
        unsafe { _mm_prefetch(source.as_ptr().wrapping_add(AHEAD).cast(), _MM_HINT_NTA) };
        let (quarters, _) = line.as_chunks_mut::<16>();
        let (source_quarters, _) = source.as_chunks::<16>();
        for (quarter, source) in quarters.iter_mut().zip(source_quarters) {
            // SAFETY: 16 bytes that can be read, at any alignment.
            let bytes = unsafe { _mm_loadu_si128(source.as_ptr().cast::<__m128i>()) };
            // SAFETY: 16 bytes that can be written, a multiple of 16 after an aligned start.
            unsafe { _mm_stream_si128(quarter.as_mut_ptr().cast::<__m128i>(), bytes) };
        }
    }
    rest.copy_from_slice(source_rest);
    // SAFETY: every processor of this architecture has it. Streaming stores are ordered by it alone.
    unsafe { _mm_sfence() };
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
            let layout = Layout::plan(&pieces).unwrap();
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
    fn a_whole_block_has_every_storage_at_its_span_and_zeros_between() {
        let sizes = [COPY_ALONE, 100, 0, STREAM_FROM + 1, 12_345, STREAM_FROM - 1];
        let storage = |(i, &nbytes): (usize, &usize)| {
            (0..nbytes).map(|j| ((i + j) % 251) as u8 + 1).collect::<Vec<u8>>()
        };
        let storages: Vec<_> = sizes.iter().enumerate().map(storage).collect();
        let pieces: Vec<_> = storages.iter().map(|bytes| piece(bytes)).collect();
        let layout = Layout::plan(&pieces).unwrap();
        let mut expected = vec![0; layout.nbytes as usize + 100];
        expected[..64].copy_from_slice(&header(layout.nbytes, 42));
        for (span, bytes) in layout.spans.iter().zip(&storages) {
            expected[span.offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        for shift in [0, 64, 1] {
            let mut memory = vec![7; expected.len() + shift];
            // SAFETY: the storages live and are only read.
            unsafe { write(&layout, &pieces, 42, &mut memory[shift..]) };
            assert!(memory[shift..] == expected);
        }
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

//! The block: packed and checked where it is written, put together again where it came in pieces.
//!
//! A block starts with a header of 64 bytes: magic `RZCB`, version (4), bytes in the block (8), the
//! fingerprint of its table (8), the XXH3 of its checksums (8), zeros. The checksum of each span, 8
//! bytes each, follows.

use std::ops::Range;
use std::panic::resume_unwind;
use std::slice;
use std::sync::atomic::{self, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use memmap2::MmapMut;

use crate::checksum::{self, Chunks, Summing, xxh3_of};
use crate::error::{Error, Result};
use crate::huge::HUGE;
#[cfg(target_arch = "x86_64")]
use crate::layout::ALIGN;
use crate::layout::{CHECKSUM_NBYTES, HEADER_NBYTES, Layout, Piece, Segment, Span, align_up};
use crate::read::Bounce;
use crate::source::Source;
use crate::table::Table;
use crate::target::Target;

const MAGIC: &[u8; 4] = b"RZCB";

const VERSION: u32 = 2;

/// Below this a second thread costs more than it saves.
const COPY_ALONE: usize = 8 << 20;

/// The part of a target that a thread takes on at once, making its pages ready.
const PART: usize = 8 << 20;

/// Of what an arena has lent, at most one of so many parts: for so long it is in memory twice.
const LENT_PARTS: usize = 64;

/// Threads that read files, however few the cores: a disk wants several requests at a time.
const READING: usize = 8;

/// Below this the caches are the better way.
#[cfg(target_arch = "x86_64")]
const STREAM_FROM: usize = 64 << 10;

/// What is summed and then copied, while the first cache has it. 400 MiB by two threads, summed: 25 ms
/// in tiles of 2 or 4 KiB, 29 of 8, and 22 not summed; the best of forty runs took 12.6 each.
const TILE: usize = 4 << 10;

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

/// The header of a block with these checksums.
pub fn header(nbytes: u64, fingerprint: u64, sums: &[u64]) -> [u8; HEADER_NBYTES as usize] {
    let mut header = [0; HEADER_NBYTES as usize];
    header[..4].copy_from_slice(MAGIC);
    header[4..8].copy_from_slice(&VERSION.to_le_bytes());
    header[8..16].copy_from_slice(&nbytes.to_le_bytes());
    header[16..24].copy_from_slice(&fingerprint.to_le_bytes());
    header[24..32].copy_from_slice(&xxh3_of(sums).to_le_bytes());
    header
}

/// Writes checksums and header, the header last: whoever finds it finds all the rest.
pub fn seal(block: &mut [u8], nbytes: u64, fingerprint: u64, sums: &[u64]) {
    let (header_at, rest) = block.split_at_mut(HEADER_NBYTES as usize);
    for (target, sum) in rest.chunks_exact_mut(CHECKSUM_NBYTES as usize).zip(sums) {
        target.copy_from_slice(&sum.to_le_bytes());
    }
    atomic::fence(Ordering::Release);
    header_at.copy_from_slice(&header(nbytes, fingerprint, sums));
}

/// Whether the bytes at the start of a block are the header that belongs to its table.
pub fn check_header(start: &[u8], fingerprint: u64) -> Result<()> {
    let word = |at: usize| start.get(at..at + 8).map_or([0; 8], |word| word.try_into().unwrap());
    let found = u64::from_le_bytes(word(16));
    if start.starts_with(MAGIC) && found == fingerprint {
        Ok(())
    } else {
        Err(Error::ForeignBlock { expected: fingerprint, found })
    }
}

/// The checksums at the start of a block, which need not be there whole; refuses those that have
/// changed, or a header that has.
pub fn checksums(table: &Table, fingerprint: u64, start: &[u8]) -> Result<Vec<u64>> {
    if !table.has_checksums() {
        return Err(Error::NoChecksums);
    }
    let (header_nbytes, count) = (HEADER_NBYTES as usize, table.spans.len());
    let end = header_nbytes + CHECKSUM_NBYTES as usize * count;
    let too_short = Error::BlockLength { expected: end as u64, found: start.len() as u64 };
    let sums = start.get(header_nbytes..end).ok_or(too_short)?.as_chunks().0;
    let sums: Vec<_> = sums.iter().map(|&sum| u64::from_le_bytes(sum)).collect();
    if start[..header_nbytes] != header(table.nbytes, fingerprint, &sums) {
        return Err(Error::Corrupt { what: "the header of the block, or its checksums" });
    }
    Ok(sums)
}

/// Refuses the first span that is not as it was written.
pub fn check(table: &Table, expected: &[u64], found: &[u64]) -> Result<()> {
    match expected.iter().zip(found).position(|(expected, found)| expected != found) {
        Some(span) => {
            let Span { offset, nbytes } = table.spans[span];
            let (tensor, start, end) = (table.name(span), offset, offset + nbytes);
            let (expected, found) = (expected[span], found[span]);
            Err(Error::Damaged { span, tensor, start, end, expected, found })
        }
        None => Ok(()),
    }
}

/// Refuses a block of which the header, a checksum or a span is not as it was written.
///
/// # Safety
/// The block is as long as its table says, readable, and nobody writes it meanwhile.
pub unsafe fn verify(table: &Table, fingerprint: u64, block: Piece) -> Result<()> {
    // SAFETY: the caller's promise.
    let expected = checksums(table, fingerprint, unsafe { block.bytes() })?;
    let piece = |span: &Span| {
        let (address, nbytes) = (block.address + span.offset as usize, span.nbytes as usize);
        Piece { address, nbytes }
    };
    let pieces: Vec<_> = table.spans.iter().map(piece).collect();
    // SAFETY: within the block, as the table was checked for.
    let found = unsafe { checksum::sums(&pieces) };
    check(table, &expected, &found)
}

/// The packed segment: the header, all checksums, then the small storages at their spans.
///
/// # Safety
/// The storages are readable, and nobody writes them meanwhile.
pub unsafe fn pack(layout: &Layout, storages: &[Piece], fingerprint: u64) -> Result<Vec<u8>> {
    let Some(Segment::Packed { spans, nbytes }) = layout.segments.first() else {
        return Ok(Vec::new());
    };
    let small = spans.iter().map(|&span| (layout.spans[span].offset, storages[span].into()));
    let mut packed = vec![0; *nbytes as usize];
    // SAFETY: the caller's promise for each storage.
    unsafe { place(small.collect(), &[], &mut packed) }?;
    // SAFETY: the caller's promise.
    let sums = unsafe { checksum::sums(storages) };
    seal(&mut packed, layout.nbytes, fingerprint, &sums);
    Ok(packed)
}

/// The whole block, each source at its offset in it, with the checksums of these spans; the rest of
/// `target` is cleared.
///
/// # Safety
/// As for [`place`].
pub unsafe fn write(
    sources: Vec<(u64, Source)>,
    spans: &[Span],
    nbytes: u64,
    fingerprint: u64,
    target: &mut [u8],
) -> Result<()> {
    // SAFETY: the caller's promise.
    let sums = unsafe { place(sources, spans, target) }?;
    seal(target, nbytes, fingerprint, &sums);
    Ok(())
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
        .map_err(|error| Error::refused(format!("a copy of {nbytes} bytes"), &error))?;
    let mut end = 0;
    let mut placed = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let start = align_up(end)?;
        placed.push((start, (*piece).into()));
        end = start + piece.nbytes as u64;
    }
    // SAFETY: the caller's promise.
    unsafe { place(placed, &[], &mut block) }?;
    Ok(block)
}

/// Fills a target from sources, each at its offset, and clears what lies between them. Gives the
/// checksums of spans of it, which sources fill wholly.
///
/// With as many threads as pay: each takes the next part of the target, whatever the sources' sizes.
/// Refuses a file that cannot be read, or is written to meanwhile; the target is then half filled.
///
/// # Safety
/// Sources in memory are readable, and nobody writes them meanwhile.
pub unsafe fn place(
    mut sources: Vec<(u64, Source)>,
    spans: &[Span],
    target: &mut [u8],
) -> Result<Vec<u64>> {
    let chunks = Chunks::of(spans)?;
    let mut sums = vec![0; chunks.ranges.len()];
    sources.retain(|(_, source)| source.nbytes() > 0);
    sources.sort_unstable_by_key(|&(offset, _)| offset);
    let threads = match target.len() {
        0..COPY_ALONE => 1,
        _ if sources.iter().any(|(_, source)| source.is_cold()) => READING,
        _ => thread::available_parallelism().map_or(1, usize::from).min(8),
    };
    let ready = Target::of(target);
    let part = match sources.iter().any(|(_, source)| matches!(source, Source::Lent(..))) {
        true => (target.len() / LENT_PARTS).clamp(HUGE, PART),
        false => PART,
    };
    let parts = Mutex::new(parts(target, part, &chunks.ranges, &mut sums).into_iter());
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let place_parts = || {
        let mut bounce = Bounce::default();
        while let Some(Part { start, target, summing }) = next() {
            let mut part = Part { start, target: ready.ready(target)?, summing };
            // SAFETY: the caller's promise.
            let placed = unsafe { place_part(&sources, &mut part, &mut bounce) };
            placed.inspect_err(|_| while next().is_some() {})?; // nor need the others go on
        }
        Ok(())
    };
    let placed = thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(place_parts)).collect();
        let own = place_parts();
        others.into_iter().fold(own, |placed, other| {
            placed.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    });
    if let Err(Error::NoRoom { .. }) = placed {
        ready.give_back();
        return placed.map(|()| vec![]);
    }
    placed?;
    let _ = ready.settle(); // whoever waits for it waits for nothing that he needs
    sources.iter().try_for_each(|(_, source)| source.check_unchanged())?;
    Ok(chunks.combine(&sums))
}

/// A part of a target for one thread, and the sums of the chunks in it.
struct Part<'a> {
    start: usize,
    target: &'a mut [u8],
    summing: Summing<'a>,
}

/// Cuts a target into parts, of at most `nbytes` where it is all chunks, and never within a chunk.
fn parts<'a>(
    mut target: &'a mut [u8],
    nbytes: usize,
    mut chunks: &'a [Range<usize>],
    mut sums: &'a mut [u64],
) -> Vec<Part<'a>> {
    let (mut parts, mut start) = (Vec::new(), 0);
    while !target.is_empty() {
        // what follows the last chunk that fits goes along with it
        let fit = chunks.partition_point(|chunk| chunk.end <= start + nbytes);
        let stop = chunks.get(fit).map_or(start + nbytes, |next| next.start.min(start + nbytes));
        let (part, rest) = target.split_at_mut(target.len().min(stop - start));
        let (own, other_chunks) = chunks.split_at(fit);
        let (own_sums, other_sums) = sums.split_at_mut(fit);
        parts.push(Part { start, target: part, summing: Summing::new(own, own_sums) });
        (target, chunks, sums, start) = (rest, other_chunks, other_sums, stop);
    }
    parts
}

/// The part of [`place`] that starts at this offset.
///
/// # Safety
/// As for `place`.
unsafe fn place_part(
    sources: &[(u64, Source)],
    Part { start, target, summing }: &mut Part<'_>,
    bounce: &mut Bounce,
) -> Result<()> {
    let start = *start;
    let begins = |&(offset, _): &(u64, Source)| offset as usize;
    let ends = |placed: &(u64, Source)| begins(placed) + placed.1.nbytes();
    let stop = start + target.len();
    let mut end = start;
    let first = sources.partition_point(|placed| ends(placed) <= start);
    for placed in sources[first..].iter().take_while(|placed| begins(placed) < stop) {
        let (from, to) = (begins(placed).max(start), ends(placed).min(stop));
        target[end - start..from - start].fill(0);
        let target = &mut target[from - start..to - start];
        match &placed.1 {
            Source::Memory(piece) | Source::Lent(_, piece) => {
                // SAFETY: the caller's promise.
                let bytes = unsafe { piece.bytes() };
                let bytes = &bytes[from - begins(placed)..to - begins(placed)];
                copy_bytes(target, bytes, from, summing);
                if let Source::Lent(lot, _) = &placed.1 {
                    let Range { start, end } = bytes.as_ptr_range();
                    lot.give_back(start.addr()..end.addr());
                }
            }
            Source::File { reader, offset, .. } => {
                let offset = offset + (from - begins(placed)) as u64;
                let take = |start, bytes: &[u8]| summing.take(from + start, bytes);
                reader.read_by_parts(offset, target, bounce, take)?;
            }
        }
        end = to;
    }
    target[end - start..].fill(0);
    Ok(())
}

/// Copies, past the caches where there is much of it, and sums what goes to this offset.
///
/// A streaming store does not first read what it overwrites: a third less of memory's work. The
/// C library's `memcpy` streams too, but only what is longer than most storages (48 MiB on one
/// machine). 400 MiB by two threads, in pieces of 1 MiB: 39 ms streaming, 67 with `memcpy`.
fn copy_bytes(target: &mut [u8], source: &[u8], offset: usize, summing: &mut Summing<'_>) {
    let tile = if summing.is_done() { source.len().max(1) } else { TILE };
    let streams = streams(target, source);
    let tiles = target.chunks_mut(tile).zip(source.chunks(tile)).enumerate();
    for (index, (target, source)) in tiles {
        summing.take(offset + index * tile, source);
        if streams {
            stream(target, source);
        } else {
            target.copy_from_slice(source);
        }
    }
    if streams {
        order();
    }
}

#[cfg(target_arch = "x86_64")]
fn streams(target: &[u8], source: &[u8]) -> bool {
    source.len() >= STREAM_FROM && target.as_ptr().addr().is_multiple_of(ALIGN as usize)
}

/// Copies with streaming stores, which [`order`] is to follow; the target starts at a multiple of
/// [`ALIGN`].
///
/// Never inlined: among the registers of its callers the loop is up to 8 % slower.
#[cfg(target_arch = "x86_64")]
#[inline(never)]
fn stream(target: &mut [u8], source: &[u8]) {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_NTA, _mm_loadu_si128, _mm_prefetch, _mm_stream_si128,
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
}

/// Orders streaming stores before what is written next.
#[cfg(target_arch = "x86_64")]
fn order() {
    // SAFETY: every processor of this architecture has it. Streaming stores are ordered by it alone.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

#[cfg(not(target_arch = "x86_64"))]
fn streams(_: &[u8], _: &[u8]) -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn stream(target: &mut [u8], source: &[u8]) {
    target.copy_from_slice(source);
}

#[cfg(not(target_arch = "x86_64"))]
fn order() {}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::read::{How, Reader};

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
            let packed = unsafe { pack(&layout, &pieces, 42) }.unwrap();
            prop_assert_eq!(check_header(&packed, 42), Ok(()));
            // SAFETY: as above.
            let sums = unsafe { checksum::sums(&pieces) };
            let table = Table::new(&layout, vec![]).unwrap();
            prop_assert_eq!(checksums(&table, 42, &packed), Ok(sums));
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

    proptest! {
        #[test]
        fn a_header_and_checksums_that_nobody_sealed_are_refused(
            sums in prop::collection::vec(any::<u64>(), 0..9), other in prop::collection::vec(any::<u8>(), 0..200),
            at: prop::sample::Index, change in 1..=u8::MAX,
        ) {
            let spans = vec![Span { offset: 192, nbytes: 0 }; sums.len()];
            let table = Table { version: 2, nbytes: 192, spans, views: vec![] };
            let mut start = vec![0; 64 + 8 * sums.len()];
            seal(&mut start, table.nbytes, 42, &sums);
            prop_assert_eq!(checksums(&table, 42, &start), Ok(sums));
            prop_assert!(checksums(&table, 42, &other).is_err() && check_header(&other, 42).is_err());
            let at = at.index(start.len());
            prop_assert!(checksums(&table, 42, &start[..at]).is_err());
            start[at] ^= change;
            prop_assert!(checksums(&table, 42, &start).is_err());
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
        let sources: Vec<_> = layout.place(&pieces).map(|(at, piece)| (at, piece.into())).collect();
        let mut expected = vec![0; layout.nbytes as usize + 100];
        // SAFETY: the storages live and are only read.
        let sums = unsafe { checksum::sums(&pieces) };
        seal(&mut expected, layout.nbytes, 42, &sums);
        for (span, bytes) in layout.spans.iter().zip(&storages) {
            expected[span.offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        for shift in [0, 64, 1] {
            let mut memory = vec![7; expected.len() + shift];
            // SAFETY: the storages live and are only read.
            unsafe {
                write(sources.clone(), &layout.spans, layout.nbytes, 42, &mut memory[shift..])
            }
            .unwrap();
            assert!(memory[shift..] == expected);
        }
    }

    #[test]
    fn what_lies_in_a_file_is_read_to_its_place_and_what_cannot_be_is_refused() {
        let path = std::env::temp_dir().join(format!("rzc-place-{}", std::process::id()));
        let bytes: Vec<_> = (0..20 << 20).map(|i: usize| (i % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let reader = Arc::new(Reader::new(file, &path, How::Auto).unwrap());
        let from_file = |offset, nbytes| Source::File { reader: reader.clone(), offset, nbytes };
        let memory = vec![99; 5000];
        let sources = vec![
            (64, from_file(100, 10)),
            (128, Source::Memory(piece(&memory))),
            (6400, from_file(8, 17 << 20)),
        ];
        let mut target = vec![7; 18 << 20];
        // SAFETY: the memory lives and is only read.
        unsafe { place(sources.clone(), &[], &mut target) }.unwrap();
        assert_eq!(target[64..74], bytes[100..110]);
        assert!(target[128..5128] == memory);
        assert!(target[6400..][..17 << 20] == bytes[8..][..17 << 20]);
        assert!(
            [&target[..64], &target[74..128], &target[5128..6400]].concat() == [0; 64 + 54 + 1272]
        );
        File::options().write(true).open(&path).unwrap().set_len(9 << 20).unwrap();
        fs::remove_file(&path).unwrap();
        // SAFETY: as above.
        let error = unsafe { place(sources, &[], &mut target) }.unwrap_err();
        assert!(matches!(error, Error::Unreadable { .. }), "{error}");
    }

    #[test]
    fn a_block_of_which_any_byte_of_header_checksums_or_spans_has_changed_is_refused() {
        let storages = [vec![1; 100], vec![], vec![2; 20_000], vec![3; 2 * checksum::CHUNK + 1]];
        let pieces: Vec<_> = storages.iter().map(|bytes| piece(bytes)).collect();
        let layout = Layout::plan(&pieces).unwrap();
        let table = Table::new(&layout, vec![]).unwrap();
        let sources = layout.place(&pieces).map(|(at, piece)| (at, piece.into())).collect();
        let mut block = vec![0; layout.nbytes as usize];
        // SAFETY: the storages live and are only read.
        unsafe { write(sources, &layout.spans, layout.nbytes, 42, &mut block) }.unwrap();
        // SAFETY: the block lives and is only read meanwhile.
        let verify = |block: &[u8]| unsafe { verify(&table, 42, piece(block)) };
        assert_eq!(verify(&block), Ok(()));
        for at in 0..HEADER_NBYTES as usize + 8 * storages.len() {
            block[at] ^= 4;
            assert!(matches!(verify(&block), Err(Error::Corrupt { .. })), "byte {at}");
            block[at] ^= 4;
        }
        for (index, span) in layout.spans.iter().enumerate().filter(|(_, span)| span.nbytes > 0) {
            for at in [span.offset, span.offset + span.nbytes / 2, span.end().unwrap() - 1] {
                block[at as usize] ^= 4;
                let error = verify(&block).unwrap_err();
                assert!(matches!(error, Error::Damaged { span, .. } if span == index), "{at}");
                block[at as usize] ^= 4;
            }
        }
        assert_eq!(verify(&block), Ok(()));
    }

    #[test]
    fn a_block_of_another_length_or_table_is_refused() {
        let bytes = [0; 128];
        let halves = [piece(&bytes[..64]), piece(&bytes[64..])];
        assert_eq!(is_contiguous(&halves, 128), Ok(true));
        assert_eq!(is_contiguous(&[halves[1], halves[0]], 128), Ok(false));
        let error = is_contiguous(&halves[..1], 128).unwrap_err();
        assert_eq!(error, Error::BlockLength { expected: 128, found: 64 });
        let error = check_header(&header(128, 7, &[]), 8).unwrap_err();
        assert_eq!(error, Error::ForeignBlock { expected: 8, found: 7 });
        assert!(check_header(&[1, 2, 3], 8).is_err());
    }
}

//! The block: packed and checked where it is written, put together again where it came in pieces.
//!
//! A block starts with a header of 64 bytes: magic `RZCB`, version (4), bytes in the block (8), the
//! fingerprint of its table (8), the XXH3 of its checksums (8), zeros. The checksum of each span, 8
//! bytes each, follows.

use std::ops::{Range, RangeInclusive};
use std::panic::resume_unwind;
use std::slice;
use std::sync::atomic::{self, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::format::checksum::{self, CHUNK, Chunks, xxh3, xxh3_of};
use crate::format::layout::{
    CHECKSUM_NBYTES, HEADER_NBYTES, Layout, Piece, Segment, Span, align_up,
};
use crate::format::table::Table;
use crate::io::file::Bounce;
use crate::io::source::Source;
use crate::io::stream::{copy_and_sum, copy_bytes};
use crate::memory::huge::HUGE;
use crate::memory::target::Target;

const MAGIC: &[u8; 4] = b"RZCB";

const VERSION: u32 = 2;

/// Below this a second thread costs more than it saves.
const COPY_ALONE: usize = 8 << 20;

/// The part of a target that a thread takes on at once, making its pages ready.
const PART: usize = 8 << 20;

/// Of what an arena has lent, at most one of so many parts: for so long it is in memory twice.
const LENT_PARTS: usize = 64;

/// Threads that read from a disk, however few the cores: it wants several requests at a time, and a
/// thread that copies what it has read asks for nothing. 755 MiB by 8, 12, 16 and 24 threads took 1.28,
/// 1.20, 1.18 and 1.14 times as long as to read them and no more; by 24, 32 and 64, another time, 1.11,
/// 1.07 and 1.10.
const READING: RangeInclusive<usize> = 8..=24;

/// Parts of a target for which there is a thread, where there are more than the least: its slot is not
/// to be a twentieth of what it reads.
const PARTS_A_THREAD: usize = 12;

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
    let any = |of: fn(&Source) -> bool| sources.iter().any(|(_, source)| of(source));
    let alone = target.len() < COPY_ALONE;
    let cold = !alone && any(|source| source.is_cold(PART));
    let part = if any(|source| matches!(source, Source::Lent(..))) {
        (target.len() / LENT_PARTS).clamp(HUGE, PART)
    } else if cold {
        HUGE // or at the end most threads wait for the last
    } else {
        PART
    };
    let ready = Target::of(target);
    let parts = Part { start: 0, target, chunks: &chunks.ranges, sums: &mut sums }.cut(part);
    let threads = if alone {
        1
    } else if cold {
        let most = parts.len() / 2; // for less, no thread is worth its slot
        (parts.len() / PARTS_A_THREAD).clamp(*READING.start(), *READING.end()).min(most)
    } else {
        thread::available_parallelism().map_or(1, usize::from).min(8)
    };
    let parts = Mutex::new(parts.into_iter());
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let place_parts = |slot: &mut [u8]| {
        while let Some(mut part) = next() {
            part.target = ready.ready(part.target)?;
            // SAFETY: the caller's promise.
            let placed = unsafe { place_part(&sources, part, slot) };
            placed.inspect_err(|_| while next().is_some() {})?; // nor need the others go on
        }
        Ok(())
    };
    let mut bounce = Bounce::new(threads, cold)?;
    let placed = thread::scope(|scope| {
        let mut slots = bounce.slots().take(threads);
        let own_slot = slots.next().expect("one thread at least");
        let others: Vec<_> = slots.map(|slot| scope.spawn(|| place_parts(slot))).collect();
        let own = place_parts(own_slot);
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

/// A part of a target, and the chunks in it, whose sums are asked for.
struct Part<'a> {
    start: usize,
    target: &'a mut [u8],
    chunks: &'a [Range<usize>],
    sums: &'a mut [u64],
}

impl<'a> Part<'a> {
    /// Cuts it into parts of at most so many bytes, never within a chunk that is no longer.
    fn cut(self, nbytes: usize) -> Vec<Part<'a>> {
        let Part { mut start, mut target, mut chunks, mut sums } = self;
        let mut parts = Vec::new();
        while !target.is_empty() {
            // what follows the last chunk that fits goes along with it
            let fit = chunks.partition_point(|chunk| chunk.end <= start + nbytes);
            let next = chunks.get(fit).map_or(usize::MAX, |next| next.start);
            let stop = next.min(start + nbytes).min(start + target.len());
            let (part, rest) = target.split_at_mut(stop - start);
            let (own, other_chunks) = chunks.split_at(fit);
            let (own_sums, other_sums) = sums.split_at_mut(fit);
            parts.push(Part { start, target: part, chunks: own, sums: own_sums });
            (start, target, chunks, sums) = (stop, rest, other_chunks, other_sums);
        }
        parts
    }

    fn range(&self) -> Range<usize> {
        self.start..self.start + self.target.len()
    }
}

/// The sources that have bytes of a range of the target, each with the part of the range that it fills.
fn within(
    sources: &[(u64, Source)],
    range: Range<usize>,
) -> impl Iterator<Item = (&(u64, Source), Range<usize>)> {
    let filled = |placed: &(u64, Source)| {
        let start = placed.0 as usize;
        start..start + placed.1.nbytes()
    };
    let first = sources.partition_point(|placed| filled(placed).end <= range.start);
    let within = sources[first..].iter().take_while(move |placed| filled(placed).start < range.end);
    within.map(move |placed| {
        let Range { start, end } = filled(placed);
        (placed, start.max(range.start)..end.min(range.end))
    })
}

/// [`place`] for a part of the target.
///
/// # Safety
/// As for `place`.
unsafe fn place_part(sources: &[(u64, Source)], part: Part<'_>, slot: &mut [u8]) -> Result<()> {
    let range = part.range();
    for piece in part.cut(CHUNK) {
        // SAFETY: the caller's promise.
        unsafe { place_piece(sources, piece, slot) }?;
    }
    for ((offset, source), range) in within(sources, range) {
        if let Source::Lent(lot, piece) = source {
            let address = |at| piece.address + (at - *offset as usize);
            lot.give_back(address(range.start)..address(range.end));
        }
    }
    Ok(())
}

/// [`place`] for so little of the target that what is read for it stays in a processor's cache.
///
/// # Safety
/// As for `place`.
unsafe fn place_piece(sources: &[(u64, Source)], piece: Part<'_>, slot: &mut [u8]) -> Result<()> {
    let range = piece.range();
    let Part { start, target, chunks, sums } = piece;
    let mut chunks = chunks.iter().zip(sums).peekable();
    let mut in_pieces = Vec::new();
    let mut end = start;
    for ((offset, source), Range { start: from, end: to }) in within(sources, range) {
        target[end - start..from - start].fill(0);
        let begin = from - *offset as usize;
        let bytes = match source {
            Source::Memory(piece) | Source::Lent(_, piece) => {
                // SAFETY: the caller's promise.
                unsafe { &piece.bytes()[begin..begin + (to - from)] }
            }
            Source::File { reader, offset, .. } => {
                reader.read(offset + begin as u64, to - from, slot)?
            }
        };
        end = from;
        while let Some((chunk, sum)) = chunks.next_if(|(chunk, _)| chunk.start < to) {
            if chunk.end > to {
                in_pieces.push((chunk, sum));
                continue;
            }
            copy_bytes(
                &mut target[end - start..chunk.start - start],
                &bytes[end - from..chunk.start - from],
            );
            let own = &mut target[chunk.start - start..chunk.end - start];
            *sum = copy_and_sum(own, &bytes[chunk.start - from..chunk.end - from]);
            end = chunk.end;
        }
        copy_bytes(&mut target[end - start..to - start], &bytes[end - from..]);
        end = to;
    }
    target[end - start..].fill(0);
    for (chunk, sum) in in_pieces {
        *sum = xxh3(&target[chunk.start - start..chunk.end - start]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::io::file::{How, Reader};
    use crate::io::stream::STREAM_FROM;

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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn whatever_pieces_it_comes_in_a_span_is_summed_as_a_whole(
            sizes in prop::collection::vec(prop_oneof![0..200_usize, 0..3 * CHUNK], 1..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..9),
            align in prop_oneof![4 => Just(64_usize), 1 => Just(1)],
            gap in 0..100_usize,
        ) {
            let mut end = 64;
            let place = |&nbytes: &usize| {
                let offset = (end + gap).next_multiple_of(align);
                end = offset + nbytes;
                Span { offset: offset as u64, nbytes: nbytes as u64 }
            };
            let mut spans: Vec<_> = sizes.iter().map(place).collect();
            spans.reverse();
            let block: Vec<_> = (0..end).map(|i| (i * 31 % 251) as u8).collect();
            let span = |span: &Span| piece(&block[span.offset as usize..][..span.nbytes as usize]);
            // SAFETY: the block lives and is only read.
            let expected = unsafe { checksum::sums(&spans.iter().map(span).collect::<Vec<_>>()) };

            let path = std::env::temp_dir().join(format!("rzc-pieces-{}", std::process::id()));
            fs::write(&path, &block).unwrap();
            let reader = Reader::new(File::open(&path).unwrap(), &path, How::Auto).unwrap();
            let reader = Arc::new(reader);
            fs::remove_file(&path).unwrap();
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(end)).chain([0, end]).collect();
            cuts.sort();
            let source = |(index, range): (usize, &[usize])| {
                let (start, end) = (range[0], range[1]);
                let (offset, nbytes) = (start as u64, end - start);
                match index % 2 {
                    0 => (offset, Source::File { reader: reader.clone(), offset, nbytes }),
                    _ => (offset, piece(&block[start..end]).into()),
                }
            };
            let sources = cuts.windows(2).enumerate().map(source).collect();
            let mut memory = vec![7; end + 64];
            let start = memory.as_ptr().align_offset(64);
            let target = &mut memory[start..start + end];
            // SAFETY: the block lives and is only read.
            prop_assert_eq!(unsafe { super::place(sources, &spans, target) }, Ok(expected));
            prop_assert!(target == block);
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

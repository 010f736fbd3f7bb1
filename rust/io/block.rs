//! The block: written whole, packed for Ray, read from a snapshot, or joined from pieces.

use std::sync::Arc;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::format::checksum;
use crate::format::header::{check_spans, checksums, seal, start_nbytes};
use crate::format::layout::{Layout, align_up};
use crate::format::table::Table;
use crate::io::file::Reader;
use crate::io::fill::{Release, fill};
use crate::io::source::Source;
use crate::memory::reaper::{self, Reaped};
use crate::memory::region::Region;

/// Writes the whole block, each source at its offset, and zeros elsewhere in `target`. Calls
/// `release` with each range that has been written.
///
/// # Safety
/// As for [`fill`].
pub unsafe fn write(
    sources: Vec<(u64, Source)>,
    layout: &Layout,
    fingerprint: u64,
    target: &mut [u8],
    release: Option<Release<'_>>,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let sums = unsafe { fill(sources, &layout.spans, target, release) }?;
    seal(target, layout.nbytes, fingerprint, &sums);
    Ok(())
}

/// The first segment: the header, all checksums, then the small storages at their spans.
///
/// # Safety
/// The storages are readable, and nobody writes them meanwhile.
pub unsafe fn pack(layout: &Layout, storages: &[Region], fingerprint: u64) -> Result<Vec<u8>> {
    let placed = layout.spans.iter().zip(storages);
    let small = placed.filter(|(span, _)| span.is_small());
    let small = small.map(|(span, &storage)| (span.offset, storage.into())).collect();
    let mut packed = vec![0; layout.packed_nbytes as usize];
    // SAFETY: the caller's promise for each storage.
    unsafe { fill(small, &[], &mut packed, None) }?;
    // SAFETY: the caller's promise.
    let bytes: Vec<_> = storages.iter().map(|storage| unsafe { storage.bytes() }).collect();
    seal(&mut packed, layout.nbytes, fingerprint, &checksum::sums(&bytes));
    Ok(packed)
}

/// Reads the block at `offset` of a file into `target`, by several threads, and compares each span
/// with its checksum. It writes the block's header last: until then, and after an error, `target`
/// is not a block.
pub fn read(
    table: &Table,
    fingerprint: u64,
    reader: Arc<Reader>,
    offset: u64,
    target: &mut [u8],
) -> Result<()> {
    let mut start = vec![0; start_nbytes(table)];
    reader.fill(offset, &mut start)?;
    let expected = checksums(table, fingerprint, &start)?;
    let (first, offset) = (start.len() as u64, offset + start.len() as u64);
    let nbytes = (table.nbytes - first) as usize; // not negative: `decode` has refused such a table
    let source = Source::File { reader, offset, nbytes };
    // SAFETY: no source is memory.
    let found = unsafe { fill(vec![(first, source)], &table.spans, target, None) }?;
    check_spans(table, &expected, &found)?;
    seal(target, table.nbytes, fingerprint, &expected);
    Ok(())
}

/// Whether the pieces of a block lie one after another, each at the next aligned address. Refuses
/// pieces that are not `nbytes` long in total.
pub fn is_contiguous(pieces: &[Region], nbytes: u64) -> Result<bool> {
    let mut contiguous = true;
    let mut end = 0;
    for piece in pieces {
        let start = align_up(end)?;
        contiguous &= piece.address as u64 == pieces[0].address as u64 + start;
        end = start + piece.nbytes as u64;
    }
    if end != nbytes {
        return Err(Error::BlockLength { expected: nbytes, found: end });
    }
    Ok(contiguous)
}

/// A copy of a block's pieces in new private memory, page-aligned, each at its place in the block.
///
/// # Safety
/// The pieces are readable, nobody writes them meanwhile, and together they are `nbytes` long, as
/// [`is_contiguous`] has checked.
pub unsafe fn copy(pieces: &[Region], nbytes: u64) -> Result<Reaped<MmapMut>> {
    let mut block = reaper::memory(nbytes as usize)?;
    let mut sources = Vec::with_capacity(pieces.len());
    let mut end = 0;
    for &piece in pieces {
        let start = align_up(end)?;
        sources.push((start, piece.into()));
        end = start + piece.nbytes as u64;
    }
    // SAFETY: the caller's promise.
    unsafe { fill(sources, &[], &mut block, None) }?;
    Ok(block)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::header::{check_header, verify};
    use crate::format::layout::HEADER_NBYTES;
    use crate::io::stream::STREAM_FROM;

    fn plan(storages: &[Region]) -> Result<Layout> {
        Layout::plan(storages.iter().map(|storage| storage.nbytes as u64))
    }

    fn sources(layout: &Layout, storages: &[Region]) -> Vec<(u64, Source)> {
        let placed = layout.spans.iter().zip(storages);
        placed.map(|(span, &storage)| (span.offset, storage.into())).collect()
    }

    proptest! {
        #[test]
        fn what_was_packed_lies_at_its_span(
            storages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..20),
        ) {
            let pieces: Vec<_> = storages.iter().map(|bytes| Region::of(bytes)).collect();
            let layout = plan(&pieces).unwrap();
            // SAFETY: the storages live and are only read.
            let packed = unsafe { pack(&layout, &pieces, 42) }.unwrap();
            prop_assert_eq!(check_header(&packed, 42), Ok(()));
            let sums = checksum::sums(&storages.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let table = Table::new(&layout, vec![]).unwrap();
            prop_assert_eq!(checksums(&table, 42, &packed), Ok(sums));
            for (span, bytes) in layout.spans.iter().zip(&storages) {
                let start = span.offset as usize;
                prop_assert_eq!(&packed[start..start + bytes.len()], bytes.as_slice());
            }
        }

        #[test]
        fn a_copy_has_every_piece_where_the_block_has_it(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..9),
        ) {
            let mut expected: Vec<u8> = Vec::new();
            for bytes in &pieces {
                expected.resize(expected.len().next_multiple_of(64), 0);
                expected.extend(bytes);
            }
            let nbytes = expected.len() as u64;
            let pieces: Vec<_> = pieces.iter().map(|bytes| Region::of(bytes)).collect();
            is_contiguous(&pieces, nbytes).unwrap();
            // SAFETY: the pieces live and are only read; their length was checked above.
            let copy = unsafe { copy(&pieces, nbytes) }.unwrap();
            prop_assert_eq!(&copy[..], expected.as_slice());
        }
    }

    #[test]
    fn a_whole_block_has_every_storage_at_its_span_and_zeros_between() {
        let sizes = [8 << 20, 100, 0, STREAM_FROM + 1, 12_345, STREAM_FROM - 1];
        let storage = |(i, &nbytes): (usize, &usize)| {
            (0..nbytes).map(|j| ((i + j) % 251) as u8 + 1).collect::<Vec<u8>>()
        };
        let storages: Vec<_> = sizes.iter().enumerate().map(storage).collect();
        let pieces: Vec<_> = storages.iter().map(|bytes| Region::of(bytes)).collect();
        let layout = plan(&pieces).unwrap();
        let mut expected = vec![0; layout.nbytes as usize + 100];
        let sums = checksum::sums(&storages.iter().map(Vec::as_slice).collect::<Vec<_>>());
        seal(&mut expected, layout.nbytes, 42, &sums);
        for (span, bytes) in layout.spans.iter().zip(&storages) {
            expected[span.offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        for shift in [0, 64, 1] {
            let mut memory = vec![7; expected.len() + shift];
            // SAFETY: the storages live and are only read.
            unsafe { write(sources(&layout, &pieces), &layout, 42, &mut memory[shift..], None) }
                .unwrap();
            assert!(memory[shift..] == expected);
        }
    }

    #[test]
    fn a_block_of_which_any_byte_of_header_checksums_or_spans_has_changed_is_refused() {
        let storages = [vec![1; 100], vec![], vec![2; 20_000], vec![3; 2 * checksum::CHUNK + 1]];
        let pieces: Vec<_> = storages.iter().map(|bytes| Region::of(bytes)).collect();
        let layout = plan(&pieces).unwrap();
        let table = Table::new(&layout, vec![]).unwrap();
        let mut block = vec![0; layout.nbytes as usize];
        // SAFETY: the storages live and are only read.
        unsafe { write(sources(&layout, &pieces), &layout, 42, &mut block, None) }.unwrap();
        let verify = |block: &[u8]| verify(&table, 42, block);
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
    fn pieces_of_another_length_are_refused() {
        let bytes = [0; 128];
        let halves = [Region::of(&bytes[..64]), Region::of(&bytes[64..])];
        assert_eq!(is_contiguous(&halves, 128), Ok(true));
        assert_eq!(is_contiguous(&[halves[1], halves[0]], 128), Ok(false));
        let error = is_contiguous(&halves[..1], 128).unwrap_err();
        assert_eq!(error, Error::BlockLength { expected: 128, found: 64 });
    }
}

//! The start of a block: its header, and the checksum of each span.
//!
//! The header has 64 bytes: magic `RZCB`, version (4), bytes in the block (8), the fingerprint of its
//! table (8), the XXH3 of its checksums (8), zeros. The checksums follow, 8 bytes each.

use std::sync::atomic::{self, Ordering};

use crate::error::{Error, Result};
use crate::format::checksum::{self, xxh3_of};
use crate::format::layout::{CHECKSUM_NBYTES, HEADER_NBYTES, Span};
use crate::format::table::Table;

const MAGIC: &[u8; 4] = b"RZCB";

const VERSION: u32 = 2;

/// Bytes of a block's header and checksums.
pub fn start_nbytes(table: &Table) -> usize {
    HEADER_NBYTES as usize + CHECKSUM_NBYTES as usize * table.spans.len()
}

/// The header of a block with these checksums.
fn header(nbytes: u64, fingerprint: u64, sums: &[u64]) -> [u8; HEADER_NBYTES as usize] {
    let mut header = [0; HEADER_NBYTES as usize];
    header[..4].copy_from_slice(MAGIC);
    header[4..8].copy_from_slice(&VERSION.to_le_bytes());
    header[8..16].copy_from_slice(&nbytes.to_le_bytes());
    header[16..24].copy_from_slice(&fingerprint.to_le_bytes());
    header[24..32].copy_from_slice(&xxh3_of(sums).to_le_bytes());
    header
}

/// Writes the checksums, then the header: a reader that finds the header finds all the rest.
pub fn seal(block: &mut [u8], nbytes: u64, fingerprint: u64, sums: &[u64]) {
    let (header_at, rest) = block.split_at_mut(HEADER_NBYTES as usize);
    for (target, sum) in rest.chunks_exact_mut(CHECKSUM_NBYTES as usize).zip(sums) {
        target.copy_from_slice(&sum.to_le_bytes());
    }
    atomic::fence(Ordering::Release);
    header_at.copy_from_slice(&header(nbytes, fingerprint, sums));
}

/// Refuses bytes that are not the header of this table's block, and a version newer than ours.
pub fn check_header(start: &[u8], fingerprint: u64) -> Result<()> {
    let word = |at: usize| start.get(at..at + 8).map_or([0; 8], |word| word.try_into().unwrap());
    let found = u64::from_le_bytes(word(16));
    if !start.starts_with(MAGIC) || found != fingerprint {
        return Err(Error::ForeignBlock { expected: fingerprint, found });
    }
    let version = (u64::from_le_bytes(word(0)) >> 32) as u32;
    if version > VERSION {
        let (found, supported) = (version, VERSION);
        return Err(Error::Version { what: "the block", found, supported });
    }
    Ok(())
}

/// Refuses a block that does not start with `header`: it has another table, or other bytes.
pub fn check_same(start: &[u8], header: &[u8]) -> Result<()> {
    let found = start.get(..HEADER_NBYTES as usize);
    if found == Some(header) { Ok(()) } else { Err(Error::OtherBase) }
}

/// The checksums at the start of a block; `start` may be cut short. Refuses a header or checksums
/// that have changed.
pub fn checksums(table: &Table, fingerprint: u64, start: &[u8]) -> Result<Vec<u64>> {
    let (header_nbytes, end) = (HEADER_NBYTES as usize, start_nbytes(table));
    let too_short = Error::BlockLength { expected: end as u64, found: start.len() as u64 };
    let sums = start.get(header_nbytes..end).ok_or(too_short)?.as_chunks().0;
    let sums: Vec<_> = sums.iter().map(|&sum| u64::from_le_bytes(sum)).collect();
    if start[..header_nbytes] != header(table.nbytes, fingerprint, &sums) {
        return Err(Error::Corrupt { what: "the header of the block, or its checksums" });
    }
    Ok(sums)
}

/// Refuses the first span that has changed.
pub fn check_spans(table: &Table, expected: &[u64], found: &[u64]) -> Result<()> {
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

/// Refuses a block whose header, checksums or spans have changed. `block` has the length that its
/// table says.
pub fn verify(table: &Table, fingerprint: u64, block: &[u8]) -> Result<()> {
    let expected = checksums(table, fingerprint, block)?;
    let span = |span: &Span| &block[span.offset as usize..][..span.nbytes as usize];
    let spans: Vec<_> = table.spans.iter().map(span).collect();
    check_spans(table, &expected, &checksum::sums(&spans))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_header_and_checksums_that_nobody_sealed_are_refused(
            sums in prop::collection::vec(any::<u64>(), 0..9), other in prop::collection::vec(any::<u8>(), 0..200),
            at: prop::sample::Index, change in 1..=u8::MAX,
        ) {
            let spans = vec![Span { offset: 192, nbytes: 0 }; sums.len()];
            let table = Table { nbytes: 192, spans, views: vec![] };
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
    fn a_header_of_another_table_is_refused() {
        let error = check_header(&header(128, 7, &[]), 8).unwrap_err();
        assert_eq!(error, Error::ForeignBlock { expected: 8, found: 7 });
        assert!(check_header(&[1, 2, 3], 8).is_err());
        let mut newer = header(128, 7, &[]);
        newer[4] += 1;
        let (found, supported) = (VERSION + 1, VERSION);
        let error = check_header(&newer, 7).unwrap_err();
        assert_eq!(error, Error::Version { what: "the block", found, supported });
    }
}

//! Snapshots: a block as a file, with all that it takes to rebuild the object.
//!
//! ```text
//!  │ header │ skeleton │ table │ buffers │ pad │ block: header, checksums, spans │
//!  0        64                                 a multiple of 4096                end of the file
//! ```
//!
//! The header, little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 4 | magic `RZCS` |
//! | 2 + 2 | version 1, zero |
//! | 8 + 8 + 8 | bytes of the skeleton, of the table, of the list of buffers |
//! | 8 + 8 + 8 | XXH3 of each |
//! | 8 | XXH3 of the bytes before |
//!
//! The list of buffers holds the numbers of the views that are buffers (numpy's, for example) and
//! not tensors, 4 bytes each.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::checksum::xxh3;
use crate::format::table::Table;

const MAGIC: &[u8; 4] = b"RZCS";
const VERSION: u16 = 1;

/// Bytes of the header.
pub const SNAPSHOT_HEADER_NBYTES: usize = 64;

/// The block starts at a multiple of this, which is a multiple of a page and of every disk's
/// blocks.
const BLOCK_ALIGN: u64 = 4096;

/// The parts before the block, as errors name them.
const PARTS: [&str; 3] =
    ["the skeleton of the snapshot", "the table of the snapshot", "the list of buffers"];

/// The lengths and checksums of the parts before the block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    nbytes: [u64; 3],
    sums: [u64; 3],
}

impl Header {
    /// The header of a skeleton, a table and a list of buffers.
    pub fn new(parts: [&[u8]; 3]) -> Header {
        Header { nbytes: parts.map(|part| part.len() as u64), sums: parts.map(xxh3) }
    }

    /// The header as bytes; the inverse of [`Header::decode`].
    pub fn encode(&self) -> [u8; SNAPSHOT_HEADER_NBYTES] {
        let mut bytes = [0; SNAPSHOT_HEADER_NBYTES];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        let (words, _) = bytes[8..].as_chunks_mut::<8>();
        let numbers = self.nbytes.iter().chain(&self.sums);
        words.iter_mut().zip(numbers).for_each(|(word, number)| *word = number.to_le_bytes());
        let sum = xxh3(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Decodes a header. Refuses one in which any byte has changed.
    pub fn decode(bytes: &[u8]) -> Result<Header> {
        if !bytes.starts_with(MAGIC) {
            return Err(Error::NotASnapshot { found: bytes[..bytes.len().min(4)].to_vec() });
        }
        let (needed, found) = (SNAPSHOT_HEADER_NBYTES as u64, bytes.len() as u64);
        let bytes: &[u8; SNAPSHOT_HEADER_NBYTES] =
            bytes.first_chunk().ok_or(Error::SnapshotLength { expected: needed, found })?;
        let (words, _) = bytes[8..].as_chunks::<8>();
        let word = |index: usize| u64::from_le_bytes(words[index]);
        if word(6) != xxh3(&bytes[..56]) {
            return Err(Error::Corrupt { what: "the header of the snapshot" });
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version > VERSION {
            let (found, supported) = (version.into(), VERSION.into());
            return Err(Error::Version { what: "the snapshot", found, supported });
        }
        let header = Header { nbytes: [0, 1, 2].map(word), sums: [3, 4, 5].map(word) };
        header.block_offset()?;
        Ok(header)
    }

    /// Where the block starts.
    pub fn block_offset(&self) -> Result<u64> {
        let sum = self
            .nbytes
            .iter()
            .try_fold(SNAPSHOT_HEADER_NBYTES as u64, |sum, &nbytes| sum.checked_add(nbytes));
        sum.and_then(|sum| sum.checked_next_multiple_of(BLOCK_ALIGN))
            .ok_or(Error::Overflow { what: "the snapshot" })
    }

    /// The ranges of skeleton, table and list of buffers in `head`, which is all that precedes the
    /// block. Refuses parts that have changed.
    pub fn parts(&self, head: &[u8]) -> Result<[Range<usize>; 3]> {
        let mut start = SNAPSHOT_HEADER_NBYTES;
        let mut ranges = [const { 0..0 }; 3];
        for (index, range) in ranges.iter_mut().enumerate() {
            // no overflow: `block_offset` has added up the same numbers
            *range = start..start + self.nbytes[index] as usize;
            let (expected, found) = (range.end as u64, head.len() as u64);
            let part = head.get(range.clone()).ok_or(Error::SnapshotLength { expected, found })?;
            if xxh3(part) != self.sums[index] {
                return Err(Error::Corrupt { what: PARTS[index] });
            }
            start = range.end;
        }
        Ok(ranges)
    }
}

/// The decoded parts before the block.
#[derive(Debug)]
pub struct Head {
    /// The range of the skeleton ...
    pub skeleton: Range<usize>,
    /// ... of the table ...
    pub table: Range<usize>,
    /// ... and of the list of buffers.
    pub buffers: Range<usize>,
    /// The table.
    pub decoded: Table,
    /// Where the block starts.
    pub offset: u64,
}

impl Head {
    /// Reads all that precedes the block of a snapshot that is `nbytes` long.
    pub fn decode(head: &[u8], nbytes: u64) -> Result<Head> {
        let header = Header::decode(head)?;
        let [skeleton, table, buffers] = header.parts(head)?;
        let decoded = Table::decode(&head[table.clone()])?;
        let offset = header.block_offset()?;
        let expected = offset.checked_add(decoded.nbytes);
        let expected = expected.ok_or(Error::Overflow { what: "the snapshot" })?;
        if expected != nbytes {
            return Err(Error::SnapshotLength { expected, found: nbytes });
        }
        Ok(Head { skeleton, table, buffers, decoded, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = Header::new([b"", b"", b""]).encode();
        bytes[4] = VERSION as u8 + 1;
        assert_eq!(
            Header::decode(&bytes),
            Err(Error::Corrupt { what: "the header of the snapshot" })
        );
        let sum = xxh3(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        let (found, supported) = (u32::from(VERSION) + 1, VERSION.into());
        let newer = Error::Version { what: "the snapshot", found, supported };
        assert_eq!(Header::decode(&bytes), Err(newer));
    }

    proptest! {
        #[test]
        fn decode_is_the_inverse_of_encode(parts: [Vec<u8>; 3]) {
            let header = Header::new([&parts[0], &parts[1], &parts[2]]);
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header.clone()));
            let head = [&header.encode()[..], &parts[0], &parts[1], &parts[2]].concat();
            let found = header.parts(&head).unwrap().map(|range| head[range].to_vec());
            prop_assert_eq!(&found, &parts);
            prop_assert!(header.block_offset().unwrap() >= head.len() as u64);
        }

        #[test]
        fn a_header_of_which_any_byte_has_changed_is_refused(
            parts: [Vec<u8>; 3], at in 0..SNAPSHOT_HEADER_NBYTES, change in 1..=u8::MAX,
        ) {
            let mut bytes = Header::new([&parts[0], &parts[1], &parts[2]]).encode();
            bytes[at] ^= change;
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn a_truncated_header_is_refused(parts: [Vec<u8>; 3], cut in 0..SNAPSHOT_HEADER_NBYTES) {
            let bytes = Header::new([&parts[0], &parts[1], &parts[2]]).encode();
            prop_assert!(Header::decode(&bytes[..cut]).is_err());
        }

        #[test]
        fn numbers_that_nobody_wrote_never_panic(nbytes: [u64; 3], sums: [u64; 3], head: Vec<u8>) {
            if let Ok(header) = Header::decode(&Header { nbytes, sums }.encode()) {
                let _ = header.parts(&head);
            }
        }
    }
}

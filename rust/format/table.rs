//! The offset table: a layout and its views, encoded. `decode` checks all of it before it returns
//! any.
//!
//! All numbers are little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 4 | magic `RZCT` |
//! | 2 + 2 | version 2, zero |
//! | 8 | bytes in the block |
//! | 4 + 4 | number of spans, number of views |
//! | 16 a span | offset, nbytes |
//! | 16 a view + 16 a dimension | span (4), dtype (1), flags (1), dimensions (2), offset (8), shape (8 each), stride (8 each) |

use crate::error::{Error, Result};
use crate::format::checksum::xxh3;
use crate::format::dtype::Dtype;
use crate::format::layout::{ALIGN, CHECKSUM_NBYTES, HEADER_NBYTES, Layout, Span};
use crate::format::view::{Dims, Flags, View};

const MAGIC: &[u8; 4] = b"RZCT";

const VERSION: u16 = 2;

/// Spans in a block and views over them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Bytes in the block.
    pub nbytes: u64,
    /// The span of each storage.
    pub spans: Vec<Span>,
    /// The tensors.
    pub views: Vec<View>,
}

impl Table {
    /// The table of a layout and the views over its spans.
    pub fn new(layout: &Layout, views: Vec<View>) -> Result<Table> {
        let table = Table { nbytes: layout.nbytes, spans: layout.spans.clone(), views };
        table.validate()?;
        Ok(table)
    }

    /// The table of other views over the same spans.
    pub fn with(&self, views: Vec<View>) -> Result<Table> {
        let table = Table { nbytes: self.nbytes, spans: self.spans.clone(), views };
        table.validate()?;
        Ok(table)
    }

    /// The table as bytes; the inverse of [`Table::decode`].
    pub fn encode(&self) -> Vec<u8> {
        let dimensions: usize = self.views.iter().map(|view| view.shape.len()).sum();
        let capacity = 24 + 16 * (self.spans.len() + self.views.len() + dimensions);
        let mut bytes = Vec::with_capacity(capacity);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(self.nbytes.to_le_bytes());
        bytes.extend((self.spans.len() as u32).to_le_bytes());
        bytes.extend((self.views.len() as u32).to_le_bytes());
        for span in &self.spans {
            bytes.extend(span.offset.to_le_bytes());
            bytes.extend(span.nbytes.to_le_bytes());
        }
        for view in &self.views {
            bytes.extend((view.span as u32).to_le_bytes());
            bytes.extend([view.dtype as u8, view.flags.0]);
            bytes.extend((view.shape.len() as u16).to_le_bytes());
            bytes.extend(view.offset.to_le_bytes());
            for number in view.shape.iter().chain(&view.stride) {
                bytes.extend(number.to_le_bytes());
            }
        }
        bytes
    }

    /// Decodes a table. Refuses it unless every span lies within the block, and every view within
    /// its span.
    pub fn decode(bytes: &[u8]) -> Result<Table> {
        let mut reader = Reader { bytes, position: 0 };
        let magic = reader.bytes(4).unwrap_or(bytes);
        if magic != MAGIC {
            return Err(Error::NotATable { found: magic.to_vec() });
        }
        let version = reader.u16()?;
        if version > VERSION {
            let (found, supported) = (version.into(), VERSION.into());
            return Err(Error::Version { what: "the offset table", found, supported });
        }
        if version < VERSION || reader.u16()? != 0 {
            return Err(Error::Corrupt { what: "the offset table" });
        }
        let nbytes = reader.u64()?;
        let (spans, views) = (reader.u32()?, reader.u32()?);
        // check the length before reserving memory
        reader.expect(16 * (u64::from(spans) + u64::from(views)))?;
        let spans = (0..spans).map(|_| reader.span()).collect::<Result<_>>()?;
        let views = (0..views).map(|_| reader.view()).collect::<Result<_>>()?;
        if reader.position != bytes.len() {
            let (needed, available) = (reader.position as u64, bytes.len() as u64);
            return Err(Error::TableLength { needed, available });
        }
        let table = Table { nbytes, spans, views };
        table.validate()?;
        Ok(table)
    }

    /// The tensors in a span, for the reader of an error.
    pub fn name(&self, span: usize) -> String {
        let mut over = self.views.iter().enumerate().filter(|(_, view)| view.span == span);
        let first = over.next().map_or("no tensor".to_owned(), |(index, view)| {
            format!("tensor {index}, {} {:?}", view.dtype.name(), view.shape)
        });
        match over.count() {
            0 => first,
            more => format!("{first} and {more} more"),
        }
    }

    fn validate(&self) -> Result<()> {
        let header = HEADER_NBYTES + CHECKSUM_NBYTES * self.spans.len() as u64;
        if header > self.nbytes {
            return Err(Error::BlockLength { expected: header, found: self.nbytes });
        }
        for (index, span) in self.spans.iter().enumerate() {
            let end = span.end()?;
            if span.offset % ALIGN != 0 || span.offset < header {
                let (span, offset) = (index, span.offset);
                return Err(Error::Misaligned { span, offset, align: ALIGN });
            }
            if end > self.nbytes {
                return Err(Error::OutOfBlock { span: index, end, nbytes: self.nbytes });
            }
        }
        for (index, view) in self.views.iter().enumerate() {
            let (span, spans) = (view.span, self.spans.len());
            let no_such_span = Error::NoSuchSpan { view: index, span, spans };
            view.check(self.spans.get(span).ok_or(no_such_span)?.nbytes)?;
        }
        Ok(())
    }
}

/// The XXH3 of a table's bytes. The block's header has it too, which ties the block to its table.
pub fn fingerprint(table: &[u8]) -> u64 {
    xxh3(table)
}

/// Decodes numbers from the front of a slice, never past its end.
struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn expect(&self, nbytes: u64) -> Result<()> {
        let (needed, available) = (self.position as u64 + nbytes, self.bytes.len() as u64);
        if needed > available { Err(Error::TableLength { needed, available }) } else { Ok(()) }
    }

    fn bytes(&mut self, nbytes: usize) -> Result<&'a [u8]> {
        self.expect(nbytes as u64)?;
        let bytes = &self.bytes[self.position..self.position + nbytes];
        self.position += nbytes;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn dims(&mut self, n: u16) -> Result<Dims> {
        let bytes = self.bytes(8 * usize::from(n))?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|&word| u64::from_le_bytes(word)).collect())
    }

    fn span(&mut self) -> Result<Span> {
        Ok(Span { offset: self.u64()?, nbytes: self.u64()? })
    }

    fn view(&mut self) -> Result<View> {
        let span = self.u32()? as usize;
        let [dtype, flags] = self.array()?;
        let (dtype, flags) = (Dtype::from_code(dtype)?, Flags(flags));
        let dimensions = self.u16()?;
        let offset = self.u64()?;
        let (shape, stride) = (self.dims(dimensions)?, self.dims(dimensions)?);
        Ok(View { span, dtype, flags, offset, shape, stride })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any valid table: storages of any size, and a dense view over a part of some of them.
    fn tables() -> impl Strategy<Value = Table> {
        let view = (any::<prop::sample::Index>(), 0u64..9, 0u8..47, 0u8..16);
        let views = prop::collection::vec(view, 0..20);
        (prop::collection::vec(0u64..100_000, 1..20), views).prop_map(|(nbytes, views)| {
            let layout = Layout::plan(nbytes.iter().copied()).unwrap();
            let views = views.into_iter().map(|(index, offset, dtype, flags)| {
                let span = index.index(nbytes.len());
                let dtype = Dtype::from_code(dtype).unwrap();
                let n = (nbytes[span] / dtype.itemsize()).saturating_sub(offset);
                let (shape, stride) = (Dims::from_slice(&[n / 2, 2]), Dims::from_slice(&[2, 1]));
                let mut flags = Flags(flags);
                if !dtype.is_complex() {
                    flags.0 &= !Flags::CONJ.0;
                    flags.0 &= if dtype.is_float() { u8::MAX } else { !Flags::REQUIRES_GRAD.0 };
                }
                View { span, dtype, flags, offset, shape, stride }
            });
            Table::new(&layout, views.collect()).unwrap()
        })
    }

    /// Numbers near which sums and products of 64 bits overflow.
    fn numbers() -> impl Strategy<Value = u64> {
        let edge = prop::sample::select(vec![31, 32, 58, 62, 63, 64]);
        prop_oneof![0u64..5, edge.prop_map(|bits| u64::MAX >> (64 - bits)), any::<u64>()]
    }

    /// Whether nothing can be read out of bounds, and torch accepts all views.
    fn is_safe(table: &Table) -> bool {
        let mut spans = table.spans.iter();
        let mut views = table.views.iter();
        spans.all(|span| span.end().is_ok_and(|end| end <= table.nbytes))
            && views.all(|view| view.check(table.spans[view.span].nbytes).is_ok())
    }

    proptest! {
        #[test]
        fn decode_is_the_inverse_of_encode(table in tables()) {
            prop_assert_eq!(Table::decode(&table.encode()), Ok(table));
        }

        #[test]
        fn views_over_anothers_spans_are_refused_or_safe(table in tables(), other in tables()) {
            if let Ok(variant) = table.with(other.views) {
                prop_assert!(is_safe(&variant));
                prop_assert_eq!(variant.spans, table.spans);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Table::decode(&bytes);
            let _ = Table::decode(&[b"RZCT\x02\0\0\0".as_slice(), &bytes].concat());
        }

        #[test]
        fn a_damaged_table_is_refused_or_another_one_and_safe(
            table in tables(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = table.encode();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(table) = Table::decode(&bytes) {
                prop_assert!(is_safe(&table));
                prop_assert_eq!(table.encode(), bytes);
            }
        }

        #[test]
        fn a_table_with_numbers_that_nobody_wrote_is_refused_or_safe(
            table in tables(), written in prop::collection::vec((any::<prop::sample::Index>(), numbers()), 1..4),
        ) {
            let mut bytes = table.encode();
            let words = bytes.as_chunks_mut::<8>().0;
            for (at, number) in written {
                let at = at.index(words.len());
                words[at] = number.to_le_bytes();
            }
            if let Ok(table) = Table::decode(&bytes) {
                prop_assert!(is_safe(&table));
                prop_assert_eq!(table.encode(), bytes);
            }
        }

        #[test]
        fn a_truncated_table_is_refused(table in tables(), cut: prop::sample::Index) {
            let bytes = table.encode();
            prop_assert!(Table::decode(&bytes[..cut.index(bytes.len())]).is_err());
            prop_assert!(Table::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
        }
    }

    #[test]
    fn a_huge_announced_count_reserves_nothing() {
        let mut bytes = b"RZCT\x02\0\0\0".to_vec();
        bytes.extend([0xff; 16]);
        let (needed, available) = (24 + 32 * u64::from(u32::MAX), 24);
        assert_eq!(Table::decode(&bytes), Err(Error::TableLength { needed, available }));
    }

    #[test]
    fn a_fingerprint_changes_with_any_byte() {
        let layout = Layout::plan([5, 70]).unwrap();
        let table = Table::new(&layout, vec![]).unwrap().encode();
        for at in 0..table.len() {
            let mut other = table.clone();
            other[at] ^= 1;
            assert_ne!(fingerprint(&table), fingerprint(&other), "byte {at}");
        }
    }
}
